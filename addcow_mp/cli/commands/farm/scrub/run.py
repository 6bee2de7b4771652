"""``addcow farm scrub run``: verify what is due, within a time and a rate."""

from __future__ import annotations

from typing import Annotated

import typer

from addcow_mp.cli import signals
from addcow_mp.cli.findings import counts_of, findings_of, print_counts, print_layers
from addcow_mp.cli.jsontext import print_document
from addcow_mp.cli.listing import explain
from addcow_mp.cli.messages import say
from addcow_mp.cli.options import (
    FarmProgress,
    Opening,
    OptionGroup,
    Places,
    Printing,
    Rate,
    Share,
    StateFile,
    TimeLimit,
    Workers,
    time_limit,
)
from addcow_mp.errors import StoppedError
from addcow_mp.farm.scrub import Scrubbed, scrub
from addcow_mp.units import parse_share


class _Bounds(OptionGroup):
    """How much a run verifies, how fast and for how long."""

    time_limit: TimeLimit = None
    rate: Rate = None
    sample: Annotated[
        str | None,
        typer.Option("--sample", metavar="P%", help="read a random share of each layer only"),
    ] = None


def command(
    *,
    state: StateFile,
    places: Places,
    bounds: _Bounds,
    progress: FarmProgress,
    workers: Workers,
    printing: Printing,
    share: Share = False,
    opening: Opening,
) -> None:
    """Compare layers with their manifests, the longest-unverified first.

    The same command continues where the last one ended. Exit status: 0 all as it was, 1 something
    could not be verified, 2 something differs, 75 the time limit was reached.
    """
    listed, quiet = places.listed(), printing.quiet
    is_late = time_limit(bounds.time_limit)
    part = None if bounds.sample is None else parse_share(bounds.sample, "--sample")
    access = opening.access(share=share, exclude=places.exclude)
    copy_options = workers.copy_options(bounds.rate)
    with workers.working(access, copy_options, progress, quiet=quiet) as (options, hooks):
        found = scrub(listed, state, options, hooks, share=part, is_late=is_late)
    _show(found, as_json=printing.as_json, quiet=quiet)
    if found.places is not None and not found.left:
        explain(found.places, [one.path for one in found.layer_reports], quiet=quiet)
    if found.problem is not None:
        if found.is_problem_worst:
            if type(found.problem) is StoppedError:
                raise signals.by_signal(found.problem)
            raise found.problem
        say(str(found.problem))
    raise typer.Exit(found.exit_code)


def _show(found: Scrubbed, *, as_json: bool, quiet: bool) -> None:
    reports = found.layer_reports
    summary = {**counts_of(reports), "bytes": found.bytes_read, "left": found.left}
    if as_json:
        layers = [one.as_json() for one in reports]
        print_document({"layers": layers, **findings_of(reports), "summary": summary})
        return
    print_layers(reports, quiet=quiet)
    if not quiet:
        print_counts(summary)
