"""The options of the commands that change the images of a farm, and their one run."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from addcow_mp.cli import signals
from addcow_mp.cli.farm_results import print_result
from addcow_mp.cli.listing import explain
from addcow_mp.cli.log import FarmLog
from addcow_mp.cli.messages import say, warn
from addcow_mp.cli.options import (
    ChangeOptions,
    CopyingOptions,
    DryRun,
    FarmProgress,
    ListPrinting,
    NoManifest,
    OnError,
    OptionGroup,
    Places,
    TimeLimit,
    Verify,
    Workers,
    name_of_file,
    time_limit,
)
from addcow_mp.errors import StoppedError
from addcow_mp.farm.farm_job import FarmJob, run_farm_job
from addcow_mp.farm.image_job import JobSpec, Operation
from addcow_mp.farm.result import FarmResult

if TYPE_CHECKING:
    from addcow_mp.device.copying import CopyOptions
    from addcow_mp.jobs.rebase import NewBacking


class FarmRunOptions(OptionGroup):
    """The options of every job on a farm."""

    places: Places
    dry_run: DryRun = False
    on_error: Annotated[
        OnError,
        typer.Option("--on-error", help="skip: the others go on; stop: begin nothing more"),
    ] = "skip"
    time_limit: TimeLimit = None
    log: Annotated[
        str | None,
        typer.Option(
            "--log",
            metavar="FILE",
            callback=name_of_file,
            help="append a JSON object for each event to a regular file",
        ),
    ] = None
    progress: FarmProgress
    workers: Workers
    printing: ListPrinting
    changing: ChangeOptions
    no_manifest: NoManifest = False

    def run_spec(self, spec: JobSpec, copy_options: CopyOptions, *, durable: bool = True) -> None:
        """Run ``spec`` on all images, print the result and exit."""
        job = FarmJob(spec, self.dry_run, time_limit(self.time_limit))
        access = self.changing.access(
            force=self.changing.force,
            durable=durable,
            writes=not self.dry_run,
            exclude=self.places.exclude,
        )
        quiet = self.printing.quiet
        listed = self.places.listed()
        with (
            closing(FarmLog(self.log)) as log,
            self.workers.working(access, copy_options, self.progress, quiet=quiet) as (
                options,
                hooks,
            ),
        ):
            all_options = replace(options, manifests=not self.no_manifest)
            result = run_farm_job(listed, job, all_options, hooks, log)
            for image in result.images:
                warn([] if image.report is None else image.report.warnings)
        finish(result, self.printing)


class FarmJobOptions(FarmRunOptions):
    """The options of ``farm commit``, ``farm flatten`` and ``farm rebase``, which copy."""

    verify: Verify = False
    copying: CopyingOptions

    def run(
        self,
        operation: Operation,
        *,
        discard: bool = False,
        backing: NewBacking | None = None,
        base: str | None = None,
    ) -> None:
        """Run ``operation`` on all images, print the result and exit."""
        stops = self.on_error == "stop"
        spec = JobSpec(operation, discard, self.verify, stops, backing, base)
        self.run_spec(spec, self.copying.copy_options(), durable=self.copying.durable)


def finish(result: FarmResult, printing: ListPrinting) -> None:
    """Print ``result`` and exit."""
    print_result(result, printing)
    plan, images = result.plan, [image.path for image in result.images]
    overlays = [one.path for one in plan.dependency_index.farm]
    explain(plan.places, [*images, *overlays], quiet=printing.quiet)
    if plan.rebasing is not None and overlays and not images:
        say("no overlay in these places stands on the backing file to be replaced")
    if type(result.problem) is StoppedError:
        raise signals.by_signal(result.problem)
    if result.problem is not None:
        raise result.problem
    raise typer.Exit(result.exit_code)
