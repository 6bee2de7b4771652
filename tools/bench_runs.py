"""A case of the benchmark, and how one run of it is timed.

A *contender* is one way to do a case's job. Whole processes are timed from outside, from the call
that starts them to their end, with their output discarded; making an overlay before a run, or
removing a result after it, is not timed. The first contender of a case is the one that is judged;
the others are its peers, and the fastest of them counts.

Two clocks are different: `reported` takes the seconds that addcow itself reports, without the
start-up of the interpreter; `bare_loop` those of processes that are ready and then only copy. They
are compared with each other, never with a whole process.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

from addcow_mp.units import KiB, MiB
from bench_files import BenchError, Run

ADDCOW = str(Path(sys.executable).with_name("addcow"))

#: The copy buffer of the bare loop, in whole pages, and its processes, as the fastest plain copy
#: needs them.
BUFFER, PROCESSES = 1 * MiB, 2

#: One write into a new file: longer ones take memory in long ranges, which can be much slower.
FRESH_STEP = 256 * KiB

#: Seconds after which a copying process counts as dead.
PATIENCE = 600.0

#: The installed command with its compiled modules, as a user has it, whatever is set here.
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
}


class Measure(Enum):
    """The meaning of the ratio of a case."""

    SPEED = "times as fast as the peer"
    COST = "times the peer's time"


class Disk(Enum):
    """Where a stage's files lie."""

    GIVEN = "the directory given"
    XFS = "XFS with reflink on a loop device"


def nothing() -> None:
    """No preparation, no check, no clean-up."""


@dataclass(frozen=True)
class Around:
    """What happens around a run, outside the timing; ``verify`` after the warm-up alone."""

    before: Callable[[], None] = nothing
    verify: Callable[[], None] = nothing
    after: Callable[[], None] = nothing


@dataclass(frozen=True)
class Contender:
    """One way to do a job. ``run`` returns its seconds, ``shown`` says what that is.

    ``counted``: whether it is among the peers of which the fastest counts.
    """

    name: str
    shown: str
    run: Callable[[], float]
    around: Around = Around()
    counted: bool = True


@dataclass(frozen=True, kw_only=True)
class Case:
    """A job, those who do it, and the ratio to be reached; None if there is none.

    ``contenders`` are made for a directory and the bytes of guest data; ``hot`` are the files
    that they read. Short commands run ``often`` times as many times. ``synced``: whether everything
    is synced before each run. ``limit``: what keeps the target from being reached, as measured; it
    is printed where the target is missed.
    """

    name: str
    title: str
    contenders: Callable[[Path, int], list[Contender]]
    hot: tuple[str, ...] = ()
    target: float | None = None
    measure: Measure = Measure.SPEED
    often: int = 1
    synced: bool = True
    limit: str = ""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Files for some cases; they take ``room`` times the guest data, results included."""

    build: Callable[[Path, int], None]
    cases: tuple[Case, ...]
    room: float
    disk: Disk = Disk.GIVEN


def command(
    *arguments: str, cwd: Path, name: str, around: Around = Around(), counted: bool = True
) -> Contender:
    """A contender that is a command line."""
    shown = " ".join(_shown(word) for word in arguments)
    return Contender(name, shown, lambda: timed(arguments, cwd), around, counted)


def _shown(word: str) -> str:
    """A word of a command line, without the directories of this machine."""
    return {ADDCOW: "addcow", sys.executable: "python", "": '""'}.get(word, word)


def addcow(*arguments: str, cwd: Path, around: Around = Around()) -> Contender:
    """The installed addcow as a contender."""
    return command(ADDCOW, *arguments, cwd=cwd, name="addcow", around=around)


def timed(arguments: tuple[str, ...], cwd: Path) -> float:
    """The seconds of one whole process, its output discarded."""
    start = time.perf_counter()
    done = subprocess.run(
        arguments,
        cwd=cwd,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    seconds = time.perf_counter() - start
    _insist(done)
    return seconds


def reported(arguments: tuple[str, ...], cwd: Path) -> float:
    """The seconds that addcow itself reports for its work, start-up left out."""
    words = (*arguments, "--output", "json")
    done = subprocess.run(words, cwd=cwd, env=ENVIRONMENT, capture_output=True, check=False)
    _insist(done)
    return float(json.loads(done.stdout)["seconds"])


def _insist(done: subprocess.CompletedProcess[bytes]) -> None:
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()
        words = " ".join(_shown(word) for word in done.args)
        raise BenchError(f"{words}: exit status {done.returncode}: {said}")


def bare_loop(source: Path, target: Path, runs: list[Run], *, fresh: bool = False) -> float:
    """The seconds that processes need to copy ``runs``, from the moment they are ready.

    Into a ``fresh`` file, each run is preallocated, and written in steps that are fast there.
    """
    context = get_context("fork")
    gate = context.Barrier(PROCESSES + 1, timeout=PATIENCE)
    share = -(-len(runs) // PROCESSES)
    parts = [runs[number * share : (number + 1) * share] for number in range(PROCESSES)]
    copiers = [
        context.Process(target=_copy, args=(source, target, part, gate, fresh)) for part in parts
    ]
    for copier in copiers:
        copier.start()
    gate.wait()
    start = time.perf_counter()
    gate.wait()
    seconds = time.perf_counter() - start
    for copier in copiers:
        copier.join()
    return seconds


def _copy(source: Path, target: Path, runs: list[Run], gate: Barrier, fresh: bool) -> None:
    here, there = os.open(source, os.O_RDONLY), os.open(target, os.O_WRONLY)
    buffer = memoryview(mmap.mmap(-1, BUFFER))
    gate.wait()
    for start, stop in runs:
        if fresh:
            os.posix_fallocate(there, start, stop - start)
        for at in range(start, stop, BUFFER):
            part = buffer[: stop - at]
            part = part[: os.preadv(here, [part], at)]
            step = FRESH_STEP if fresh else BUFFER
            for first in range(0, len(part), step):
                os.pwrite(there, part[first : first + step], at + first)
    gate.wait()
