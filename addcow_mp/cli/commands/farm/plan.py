"""``addcow farm plan``: what a commit or flatten of every overlay would do."""

from __future__ import annotations

from typing import Annotated

import typer

from addcow_mp.cli.farm_job import FarmJob, FarmRun, carry_out, tell
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
from addcow_mp.farm.image_job import Operation


def command(
    *,
    operation: Annotated[Operation, typer.Argument(metavar="commit|flatten")],
    places: Places,
    discard: Discard = False,
    workers: Workers,
    printing: ListPrinting,
    force: Force = False,
    opening: Opening,
) -> None:
    """Say what a commit or flatten of every overlay would do, in which order, and what it needs."""
    if discard and operation is Operation.COMMIT:
        raise UsageError(message="--discard is for flatten")
    job = FarmJob(operation, FarmRun(dry_run=True), discard=discard)
    access = opening.access(force=force, exclude=places.exclude)
    listed = places.listed()
    with workers.working(access, workers.copy_options(), ProgressOptions()) as (options, hooks):
        done = carry_out(listed, job, options, hooks)
    tell(done, printing)
