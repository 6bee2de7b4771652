"""``addcow farm commit``: commit every overlay into its backing file, the deepest chains first."""

from __future__ import annotations

from addcow_mp.cli.farm_job import FarmJob, FarmRun, carry_out, tell
from addcow_mp.cli.options import (
    ChangeOptions,
    CopyingOptions,
    FarmProgress,
    ListPrinting,
    Places,
    Verify,
    Workers,
)
from addcow_mp.farm.image_job import Operation


def command(
    *,
    places: Places,
    verify: Verify = False,
    run: FarmRun,
    progress: FarmProgress,
    workers: Workers,
    printing: ListPrinting,
    copying: CopyingOptions,
    changing: ChangeOptions,
) -> None:
    """Commit every overlay into its backing file, the deepest chains first.

    The same command run again does only what is left. Exit status: 0 all done, 1 some image was
    refused or failed, 75 the time limit was reached.
    """
    wishes = FarmJob(Operation.COMMIT, verifies=verify, run=run)
    access = changing.access_for(copying, writes=not run.dry_run, exclude=places.exclude)
    copy_options = copying.copy_options()
    listed = places.listed()
    with workers.working(access, copy_options, progress, quiet=printing.quiet) as (options, hooks):
        done = carry_out(listed, wishes, options, hooks)
    tell(done, printing)
