"""``addcow rebase``: another backing file for an overlay."""

from __future__ import annotations

from functools import partial

from addcow_mp.cli.image_job import ImageJobOptions
from addcow_mp.cli.options import DryRun
from addcow_mp.cli.rebasing import NewBackingOptions


def command(
    *, options: ImageJobOptions, backing: NewBackingOptions, dry_run: DryRun = False
) -> None:
    """Give an overlay another backing file; its guest sees the same disk.

    Clusters in which the old and the new backing file differ are copied into the image file first.
    With -u only the name changes, and the guest sees what the new backing file holds.
    """
    from addcow_mp.jobs.rebase import compared_estimate, rebase

    new = backing.new_backing()
    if dry_run:
        options.plan("rebase", partial(compared_estimate, backing=new))
    else:
        options.run(partial(rebase, backing=new), "Image rebased.")
