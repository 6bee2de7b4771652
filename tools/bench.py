"""The benchmark: addcow beside the tools that a user would take instead, on this machine.

    python tools/bench.py --list
    python tools/bench.py                      # everything, 4 GiB of guest data
    python tools/bench.py --quick              # everything, small and less exact
    python tools/bench.py --only compare --scale 1/16 --runs 3

Each stage is built in a temporary directory beneath `--dir`, its cases run there, and it is removed
before the next one, also after Ctrl-C. In a case the contenders run in turns, and another one is
first in each round. The first round is the warm-up: it is not counted, and its results are checked.
A case that cannot run here is skipped, with the reason in the output and in all three documents. A
contender that fails ends its case, and the exit status is then 1. A missed target is a result like
any other, with exit status 0.

The figures are useful only if nothing else runs: the load at the start is part of the report.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path

from addcow_mp.units import GiB, human_size
from bench_cases import STAGES
from bench_files import BenchError, CannotError, filesystem_of, free_space, warm_only, xfs
from bench_report import (
    Result,
    Setting,
    Timing,
    machine,
    told_ratio,
    told_reached,
    told_reason,
    told_target,
    write_all,
)
from bench_runs import ADDCOW, Case, Contender, Disk, Stage

#: Guest data at full scale: what the targets were set for.
FULL = 4 * GiB

#: Counted runs. A case that takes longer ends after the least number, so that all cases together
#: take about half an hour.
RUNS, LEAST_RUNS, CASE_SECONDS = 5, 3, 30.0

#: Scale and runs of --quick, which takes less than a minute.
QUICK_SCALE, QUICK_RUNS = Fraction(1, 32), 2

#: Bytes that a file system needs beside the files themselves.
SPARE = 1 * GiB


def main() -> int:
    """Run the bench that the command line asks for; returns the exit status."""
    # As after Ctrl-C, whatever was made is removed and unmounted on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options = _options()
    if options.list:
        _print_cases()
        return 0
    problem = _problem(options.only)
    if problem:
        print(f"bench: {problem}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="addcow-bench-", dir=options.dir) as name:
        directory = Path(name)
        setting = _setting(options, directory)
        results = list(_run_all(_chosen(options.only), directory, setting))
    for path in write_all(Path(options.output), options.name, setting, results):
        print(path)
    return 1 if any(one.failed for one in results) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure addcow against its peers.")
    parser.add_argument("--list", action="store_true", help="list the cases and leave")
    parser.add_argument("--only", metavar="CASE", action="append", default=[], help="repeatable")
    parser.add_argument("--dir", metavar="DIR", help="where files are made (default: TMPDIR)")
    parser.add_argument("--scale", type=Fraction, metavar="N/M", help="part of 4 GiB (default: 1)")
    parser.add_argument("--runs", type=int, metavar="N", help=f"counted runs (default: {RUNS})")
    parser.add_argument("--quick", action="store_true", help=f"scale {QUICK_SCALE}, few runs")
    parser.add_argument("--output", metavar="DIR", default="docs/bench", help="for the documents")
    parser.add_argument("--name", default="bench", help="of the documents (default: bench)")
    options = parser.parse_args()
    scale, runs = (QUICK_SCALE, QUICK_RUNS) if options.quick else (Fraction(1), RUNS)
    options.scale = scale if options.scale is None else options.scale
    options.runs = runs if options.runs is None else options.runs
    if options.scale <= 0 or options.runs < 1:
        parser.error("--scale and --runs are positive")
    if options.dir and not os.path.isdir(options.dir):
        parser.error(f"{options.dir}: no such directory")
    return options


def _print_cases() -> None:
    for stage in STAGES:
        for case in stage.cases:
            print(f"{case.name:<20} {told_target(Result(case)):<22} {case.title}")


def _problem(only: Sequence[str]) -> str:
    """The reason why a stage cannot be measured, if there is one."""
    known = [case.name for stage in STAGES for case in stage.cases]
    unknown = [name for name in only if name not in known]
    if unknown:
        return f"no such case: {', '.join(unknown)}; the cases are {', '.join(known)}"
    if not os.access(ADDCOW, os.X_OK):
        return "addcow is not installed beside this Python: pip install -e ."
    if shutil.which("qemu-img") is None:
        return "qemu-img is needed: apt-get install qemu-utils"
    return ""


def _chosen(only: Sequence[str]) -> list[Stage]:
    """The stages, with the requested cases."""
    stages = (
        replace(stage, cases=tuple(case for case in stage.cases if not only or case.name in only))
        for stage in STAGES
    )
    return [stage for stage in stages if stage.cases]


def _setting(options: argparse.Namespace, directory: Path) -> Setting:
    return Setting(
        data=int(FULL * options.scale),
        scale=str(options.scale),
        runs=options.runs,
        filesystem=filesystem_of(directory),
        when=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        machine=machine(),
    )


def _run_all(stages: Iterable[Stage], directory: Path, setting: Setting) -> Iterator[Result]:
    for stage in stages:
        for result in _run_stage(stage, directory, setting):
            print(_line(result), flush=True)
            yield result


def _run_stage(stage: Stage, directory: Path, setting: Setting) -> list[Result]:
    """The results of a stage's cases; none has run if the stage cannot be built."""
    results = [Result(case) for case in stage.cases]
    try:
        with _place(stage, directory, setting.data) as here:
            stage.build(here, setting.data)
            for result in results:
                result.filesystem = filesystem_of(here)
                _run_case(result, here, setting)
    except (BenchError, OSError) as error:
        for result in results:
            if not result.timings and not result.failed:
                why = "skipped" if isinstance(error, CannotError) else "failed"
                setattr(result, why, str(error))
    return results


@contextmanager
def _place(stage: Stage, directory: Path, data: int) -> Iterator[Path]:
    """An empty directory for the stage's files, on the file system that it needs."""
    needed = int(stage.room * data) + SPARE
    if free_space(directory) < needed:
        raise CannotError(f"{human_size(needed)} of free space are needed")
    if stage.disk is Disk.XFS:
        with xfs(directory, needed) as here:
            yield here
    else:
        with tempfile.TemporaryDirectory(dir=directory) as name:
            yield Path(name)


def _run_case(result: Result, here: Path, setting: Setting) -> None:
    try:
        result.timings = _timings(result.case, here, setting)
    except (BenchError, OSError) as error:
        result.failed = str(error)


def _timings(case: Case, here: Path, setting: Setting) -> list[Timing]:
    contenders = case.contenders(here, setting.data)
    timings = [Timing(one.name, one.shown, one.counted) for one in contenders]
    warm_only(here, case.hot)
    end = time.monotonic() + CASE_SECONDS
    for turn in range(1 + setting.runs * case.often):
        if turn > LEAST_RUNS * case.often and time.monotonic() > end:
            break
        for number in _order(len(contenders), turn):
            seconds = _run_once(contenders[number], check=turn == 0, synced=case.synced)
            if turn:
                timings[number].seconds.append(seconds)
    return timings


def _order(count: int, turn: int) -> Iterator[int]:
    """Every contender once, another one first in each round."""
    return ((turn + step) % count for step in range(count))


def _run_once(contender: Contender, *, check: bool, synced: bool) -> float:
    around = contender.around
    around.before()
    try:
        if synced:
            # Earlier runs leave nothing to write for this one, and clones find clean pages.
            os.sync()
        seconds = contender.run()
        if check:
            around.verify()
        return seconds
    finally:
        around.after()


def _line(result: Result) -> str:
    name = f"{result.case.name:<20}"
    if not result.timings:
        return f"{name} {told_reason(result)}"
    ours, peer = result.timings[0].median, result.peer.median
    reached = told_reached(result).strip("*") or "-"
    return (
        f"{name} {ours:8.3f} s, {result.peer.name} {peer:.3f} s: {told_ratio(result)}, "
        f"target {told_target(result)}: {reached}"
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
