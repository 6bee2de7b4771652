"""``addcow farm scrub status``: what was verified, when, and with what result."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import typer

from addcow_mp.cli.jsontext import print_document
from addcow_mp.cli.layer_reports import print_findings, worst
from addcow_mp.cli.messages import one_line
from addcow_mp.cli.options import Locking, LockingOption, Printing, StateFile
from addcow_mp.farm.scrub import DIFFERENT, UNVERIFIED
from addcow_mp.farm.scrub_state import Entry, Record, read
from addcow_mp.units import human_size

#: Runs that are shown to people: the last ones.
SHOWN_RUNS = 10


def command(*, state: StateFile, printing: Printing, locking: LockingOption = Locking.on) -> None:
    """Say what was verified, when, and what came of it.

    Exit status: 0 nothing amiss is known, 1 something could not be verified, 2 something differs.
    """
    as_json = printing.as_json
    raise typer.Exit(_show(state, as_json=as_json, locking=locking is Locking.on))


def _show(state: str, *, as_json: bool, locking: bool) -> int:
    """Print what the ledger in the file ``state`` says; returns the exit status of that.

    Files that are gone are counted, and change nothing of the status.
    """
    with read(state, locking=locking) as scrub_state:
        entries, runs = list(scrub_state.entries().values()), scrub_state.runs()
    there = [one for one in entries if not one.is_gone]
    coverage = _coverage(there, len(entries) - len(there), runs)
    status = worst([one.known() for one in there])
    if as_json:
        told = {
            "layers": [_layer(one) for one in there],
            "coverage": coverage,
            "runs": [_run(one) for one in runs],
        }
        print_document(told)
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
