"""Scrubbing from the command line: a run, what it has found, and what is remembered."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime

import typer

from addcow_mp.cli import signals
from addcow_mp.cli.jsontext import as_document
from addcow_mp.cli.limit import Limit
from addcow_mp.cli.progressing import counting
from addcow_mp.cli.reasons import explain
from addcow_mp.cli.saying import one_line, say
from addcow_mp.cli.verifying import counts_of, findings_of, layer_of, print_findings, worst
from addcow_mp.cli.working import working
from addcow_mp.device.access import Access
from addcow_mp.device.moving import Manner
from addcow_mp.errors import AddcowError, StoppedError, TimeLimitError, UsageError
from addcow_mp.farm.ledger import Entry, Record, read
from addcow_mp.farm.scrub import DIFFERENT, UNVERIFIED, Scrubbed, scrub
from addcow_mp.jobs.report import Conduct
from addcow_mp.units import human_size, parse_share

#: Runs that are shown to people: the last ones.
SHOWN_RUNS = 10


@dataclass(frozen=True)
class Wishes:
    """What the options of a run ask for."""

    state: str
    sample: str | None = None
    time_limit: str | None = None
    form: str | None = None
    progress_fd: int | None = None
    quiet: bool = False
    as_json: bool = False
    jobs: int | None = None
    manner: Manner = field(default_factory=Manner)


def carry_out(places: list[str], access: Access, wishes: Wishes) -> None:
    """Scrub, print what was found, and exit."""
    _refuse_no_name(wishes.state)
    limit = Limit(wishes.time_limit)
    share = None if wishes.sample is None else parse_share(wishes.sample, "--sample")
    with working(wishes.jobs, access, wishes.manner, progress=False) as conduct:
        with counting(wishes.form, wishes.progress_fd, conduct) as counted:
            found = scrub(
                places, wishes.state, counted, share=share, is_late=lambda: limit.is_reached
            )
        problem = found.problem or _what_stopped_it(found, conduct)
    _show(found, wishes)
    if found.places is not None:
        explain(found.places, [one.path for one in found.verdicts], quiet=wishes.quiet)
    if problem is not None:
        _raise(found, problem)
    raise typer.Exit(worst(found.verdicts))


def _refuse_no_name(state: str) -> None:
    if not state:
        raise UsageError(message="--state '': name a file")


def _raise(found: Scrubbed, problem: AddcowError) -> None:
    """Raise what ended a run, unless damage counts for more: then it is said."""
    is_signal = isinstance(problem, StoppedError) and not isinstance(problem, TimeLimitError)
    if is_signal or worst(found.verdicts) != DIFFERENT:
        raise problem
    say(str(problem))


def _what_stopped_it(found: Scrubbed, conduct: Conduct) -> AddcowError | None:
    if not found.left:
        return None
    named = f"{found.left} layers left"
    if conduct.stopping():
        return signals.as_met(StoppedError(path=named))
    told = f"{named}: the time limit was reached; the same command goes on from there"
    return TimeLimitError(message=told)


def _show(found: Scrubbed, wishes: Wishes) -> None:
    summary = counts_of(found.verdicts)
    summary |= {"bytes": found.bytes_read, "left": found.left}
    if wishes.as_json:
        layers = [layer_of(one) for one in found.verdicts]
        told = {"layers": layers, **findings_of(found.verdicts), "summary": summary}
        print(as_document(told))
        return
    print_findings(found.verdicts, quiet=wishes.quiet)
    if not wishes.quiet:
        counts = (f"{count} {word}" for word, count in summary.items())
        print(", ".join(counts).replace("-", " "))


# What is remembered


def show_status(state: str, *, as_json: bool, locking: bool) -> int:
    """Print what the ledger in the file ``state`` says; returns the exit status of that.

    Files that are gone are counted, and change nothing of the status.
    """
    _refuse_no_name(state)
    with read(state, locking=locking) as ledger:
        entries, runs = list(ledger.entries().values()), ledger.runs()
    there = [one for one in entries if not one.is_gone]
    coverage = _coverage(there, len(entries) - len(there), runs)
    status = worst([one.known() for one in there])
    if as_json:
        told = {
            "layers": [_layer(one) for one in there],
            "coverage": coverage,
            "runs": [_run(one) for one in runs],
        }
        print(as_document(told))
        return status
    print_findings([one.known() for one in there])
    for run in runs[-SHOWN_RUNS:]:
        print(one_line(_run_line(run)))
    print(_coverage_line(coverage))
    return status


def _coverage(there: list[Entry], gone: int, runs: list[Record]) -> dict[str, object]:
    verified = [one for one in there if one.verified is not None]
    pass_ = max((run.pass_ for run in runs), default=0)
    return {
        "layers": len(there),
        "verified": len(verified),
        "never-verified": len(there) - len(verified),
        "different": sum(1 for one in there if one.exit == DIFFERENT),
        "unverified": sum(1 for one in there if one.exit == UNVERIFIED),
        "gone": gone,
        "bytes": sum(one.bytes for one in there),
        "bytes-verified": sum(map(_bytes_verified, there)),
        "oldest": _time(min((one.verified or 0 for one in verified), default=None)),
        "pass": pass_,
        "pass-left": sum(1 for one in there if one.pass_ < pass_),
    }


def _bytes_verified(entry: Entry) -> int:
    return entry.bytes if entry.verified is not None else min(entry.bytes, entry.begun().bytes_read)


def _layer(entry: Entry) -> dict[str, object]:
    return {
        "filename": entry.path,
        "exit": entry.exit,
        "verified": _time(entry.verified),
        "sampled": _time(entry.sampled),
        "bytes": entry.bytes,
        "ranges": json.loads(entry.ranges),
        "findings": json.loads(entry.findings),
    }


def _run(run: Record) -> dict[str, object]:
    return {
        "begun": _time(run.begun),
        "ended": _time(run.ended),
        "result": run.result,
        "sample": run.sample,
        "seed": run.seed,
        "pass": run.pass_,
        "layers": run.layers,
        "bytes": run.bytes,
        "different": run.different,
    }


def _run_line(run: Record) -> str:
    sample = "" if run.sample is None else f", a sample of {100 * run.sample:g} %"
    return (
        f"{_time(run.begun)}: {run.result}{sample}, {run.layers} layers, "
        f"{human_size(run.bytes)}, {run.different} different"
    )


def _coverage_line(coverage: dict[str, object]) -> str:
    told = [f"{coverage[key]} {key.replace('-', ' ')}" for key in _COUNTS]
    sizes = [human_size(int(str(coverage[key]))) for key in ("bytes-verified", "bytes")]
    oldest = coverage["oldest"] or "nothing"
    return f"{', '.join(told)}; {sizes[0]} of {sizes[1]}, the oldest of {oldest}"


_COUNTS = ("layers", "verified", "never-verified", "different", "unverified", "gone")


def _time(seconds: float | None) -> str | None:
    """A time in UTC, as ISO 8601 writes it."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
