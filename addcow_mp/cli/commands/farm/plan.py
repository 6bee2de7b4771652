"""``addcow farm plan``: what a commit, flatten or reset of every overlay would do."""

from __future__ import annotations

from typing import Annotated

import typer

from addcow_mp.cli.farm_job import finish
from addcow_mp.cli.options import (
    Discard,
    Force,
    ListPrinting,
    Opening,
    Places,
    ProgressOptions,
    Workers,
)
from addcow_mp.errors import UsageError
from addcow_mp.farm.farm_job import FarmJob, run_farm_job
from addcow_mp.farm.image_job import JobSpec, Operation


def command(
    *,
    operation: Annotated[Operation, typer.Argument(metavar="commit|flatten|reset")],
    places: Places,
    discard: Discard = False,
    workers: Workers,
    printing: ListPrinting,
    force: Force = False,
    opening: Opening,
) -> None:
    """Say what a job on every overlay would do, in which order, and what it needs.

    Exit status: 0 something can be done, or nothing is to be done; 1 all is refused, or something
    could not be examined.
    """
    if operation is Operation.REBASE:
        raise UsageError(message="use 'addcow farm rebase --dry-run', which takes -b NEW")
    if discard and operation is not Operation.FLATTEN:
        raise UsageError(message="--discard is for flatten")
    job = FarmJob(JobSpec(operation, discard), is_dry_run=True)
    access = opening.access(force=force, exclude=places.exclude)
    listed = places.listed()
    with workers.working(access, workers.copy_options(), ProgressOptions()) as (options, hooks):
        result = run_farm_job(listed, job, options, hooks)
    finish(result, printing)
