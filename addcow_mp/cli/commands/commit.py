"""``addcow commit``: move the overlay's clusters into its backing file, or further down."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from addcow_mp.cli.image_job import ImageJobOptions
from addcow_mp.cli.options import DryRun, name_of_file

if TYPE_CHECKING:
    from addcow_mp.jobs.options import Hooks, RunOptions
    from addcow_mp.jobs.report import Estimate


def command(
    *,
    options: ImageJobOptions,
    base: Annotated[
        str | None,
        typer.Option(
            "-b",
            metavar="BASE",
            callback=name_of_file,
            help="commit into this layer of the chain; implies -d",
        ),
    ] = None,
    keep: Annotated[bool, typer.Option("-d", help="leave overlay and image as they are")] = False,
    dry_run: DryRun = False,
) -> None:
    """Move the overlay's clusters into its backing file, or into a layer further down.

    With -b, BASE shows afterwards what FILE shows, and FILE and the layers between stay. What other
    overlays above BASE show stays too: the layer directly above BASE first gets what BASE held.
    """
    if dry_run:
        options.plan("commit", partial(_estimate, base=base, keep=keep))
    elif base is None:
        from addcow_mp.jobs.commit import commit

        options.run(partial(commit, keep=keep), "Image committed.")
    else:
        from addcow_mp.jobs.commit_base import commit_into

        options.run(partial(commit_into, base=base), "Image committed.")


def _estimate(
    path: str,
    options: RunOptions,
    hooks: Hooks,  # noqa: ARG001 - nothing is compared
    *,
    base: str | None,
    keep: bool,
) -> Estimate | None:
    if base is None:
        from addcow_mp.jobs.commit import estimate

        return estimate(path, options, keep=keep)
    from addcow_mp.jobs.commit_base import estimate as estimate_into

    return estimate_into(path, base, options)
