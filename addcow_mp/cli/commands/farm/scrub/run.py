"""``addcow farm scrub run``: verify what is due, within a time and a rate."""

from __future__ import annotations

from typing import Annotated

import typer

from addcow_mp.cli import signals
from addcow_mp.cli.jsontext import print_document
from addcow_mp.cli.layer_reports import counts_of, findings_of, layer_of, print_findings, worst
from addcow_mp.cli.limit import Limit
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
)
from addcow_mp.cli.reasons import explain
from addcow_mp.errors import AddcowError, StoppedError, TimeLimitError
from addcow_mp.farm.scrub import DIFFERENT, Scrubbed, scrub
from addcow_mp.jobs.options import Hooks
from addcow_mp.units import parse_share


class _Bounds(OptionGroup):
    """How much a run verifies, how fast and for how long."""

    time_limit: TimeLimit = None
    rate: Rate = None
    sample: Annotated[
        str | None,
        typer.Option("--sample", metavar="P%", help="read only so much of each layer, at random"),
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
    """Hold layers against their manifests, the longest-unverified first.

    The same command goes on where the last one ended. Exit status: 0 all as it was, 1 something
    could not be verified, 2 something differs, 75 the time limit was reached.
    """
    listed, quiet = places.listed(), printing.quiet
    limit = Limit(bounds.time_limit)
    part = None if bounds.sample is None else parse_share(bounds.sample, "--sample")
    access = opening.access(share=share, exclude=places.exclude)
    copy_options = workers.copy_options(bounds.rate)
    with workers.working(access, copy_options, progress, quiet=quiet) as (options, hooks):
        found = scrub(listed, state, options, hooks, share=part, is_late=lambda: limit.is_reached)
        problem = found.problem or _what_stopped_it(found, hooks)
    _show(found, as_json=printing.as_json, quiet=quiet)
    if found.places is not None and not found.left:
        explain(found.places, [one.path for one in found.layer_reports], quiet=quiet)
    if problem is not None:
        _raise(found, problem)
    raise typer.Exit(worst(found.layer_reports))


def _raise(found: Scrubbed, problem: AddcowError) -> None:
    """Raise what ended a run, unless damage counts for more: then it is said."""
    is_signal = isinstance(problem, StoppedError) and not isinstance(problem, TimeLimitError)
    if is_signal or worst(found.layer_reports) != DIFFERENT:
        raise problem
    say(str(problem))


def _what_stopped_it(found: Scrubbed, hooks: Hooks) -> AddcowError | None:
    if not found.left:
        return None
    named = f"{found.left} layers left"
    if hooks.stopping():
        return signals.by_signal(StoppedError(path=named))
    told = f"{named}: the time limit was reached; the same command continues from there"
    return TimeLimitError(message=told)


def _show(found: Scrubbed, *, as_json: bool, quiet: bool) -> None:
    summary = counts_of(found.layer_reports)
    summary |= {"bytes": found.bytes_read, "left": found.left}
    if as_json:
        layers = [layer_of(one) for one in found.layer_reports]
        told = {"layers": layers, **findings_of(found.layer_reports), "summary": summary}
        print_document(told)
        return
    print_findings(found.layer_reports, quiet=quiet)
    if not quiet:
        counts = (f"{count} {word}" for word, count in summary.items())
        print(", ".join(counts).replace("-", " "))
