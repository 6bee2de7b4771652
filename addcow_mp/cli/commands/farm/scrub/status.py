"""``addcow farm scrub status``: what was verified, when, and with what result."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import typer

from addcow_mp.cli.findings import print_layers
from addcow_mp.cli.jsontext import print_document
from addcow_mp.cli.messages import one_line
from addcow_mp.cli.options import LockingOption, Printing, StateFile
from addcow_mp.farm.scrub_state import Entry, Record, ScrubStatus, read
from addcow_mp.findings import DIFFERENT, UNVERIFIED
from addcow_mp.units import human_size

#: The last runs, which are shown to people.
SHOWN_RUNS = 10


def command(*, state: StateFile, printing: Printing, locking: LockingOption = "on") -> None:
    """Show what was verified, when, and with what result.

    Files that do not exist any more are counted, and do not affect the exit status. Exit status:
    0 nothing is known to be wrong, 1 something could not be verified, 2 something differs.
    """
    status = read(state, locking=locking == "on")
    if printing.as_json:
        layers, runs = [_layer(one) for one in status.layers], [_run(one) for one in status.runs]
        print_document({"layers": layers, "coverage": _coverage(status), "runs": runs})
    else:
        print_layers(one.known() for one in status.layers)
        for run in status.runs[-SHOWN_RUNS:]:
            print(one_line(_run_line(run)))
        print(_coverage_line(_coverage(status)))
    raise typer.Exit(status.exit_code)


def _coverage(status: ScrubStatus) -> dict[str, object]:
    layers = status.layers
    verified = [one.verified for one in layers if one.verified is not None]
    pass_ = max((run.pass_ for run in status.runs), default=0)
    return {
        "layers": len(layers),
        "verified": len(verified),
        "never-verified": len(layers) - len(verified),
        "different": sum(1 for one in layers if one.exit == DIFFERENT),
        "unverified": sum(1 for one in layers if one.exit == UNVERIFIED),
        "gone": status.gone,
        "bytes": sum(one.bytes for one in layers),
        "bytes-verified": sum(map(_bytes_verified, layers)),
        "oldest": _time(min(verified, default=None)),
        "pass": pass_,
        "pass-left": sum(1 for one in layers if one.pass_ < pass_),
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
    keys = ("layers", "verified", "never-verified", "different", "unverified", "gone")
    counts = ", ".join(f"{coverage[key]} {key.replace('-', ' ')}" for key in keys)
    done, size = (human_size(int(str(coverage[key]))) for key in ("bytes-verified", "bytes"))
    return f"{counts}; {done} of {size}, the oldest of {coverage['oldest'] or 'nothing'}"


def _time(seconds: float | None) -> str | None:
    """A time in UTC, as ISO 8601 writes it."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
