"""Cases of the benchmark: commands that describe an image with many runs of data.

`check` and `map` look at each run; `info` looks at none, and takes what a start takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from addcow_mp.units import GiB, KiB
from bench_files import CLUSTER, OLD, Run, write_overlay, write_raw
from bench_runs import Case, Contender, Measure, Stage, addcow

#: Runs of data, in every other cluster, and the wanted multiples of the time of `info`.
FEW, MANY = 8192, 65536
WANTED = {FEW: 1.2, MANY: 2.0}

#: Guest data at full scale, with which there are so many runs.
FULL = 4 * GiB

#: Data of one run: the file system cannot join it with the next one.
DATA = 4 * KiB


_LIMIT = (
    "the interpreter: the list of extents costs a microsecond a run, and map makes and prints two "
    "extents for each, in some six steps of Python"
)


def _files(runs: int) -> Callable[[Path, int], None]:
    def build(here: Path, total: int) -> None:
        # Fewer where the bench is scaled down.
        count = max(1, min(runs, runs * total // FULL))
        size = 2 * count * CLUSTER
        write_raw(here / "base.raw", size, [], OLD)
        write_overlay(here / "top.add-cow", "base.raw", size, _places(count))

    return build


def _places(runs: int) -> Iterator[Run]:
    """A little data in every other cluster; the rest of the cluster stays a hole."""
    starts = range(0, 2 * runs * CLUSTER, 2 * CLUSTER)
    return ((start, start + DATA) for start in starts)


def _described_by(verb: str) -> Callable[[Path, int], list[Contender]]:
    def contenders(here: Path, _: int) -> list[Contender]:
        return [addcow(verb, "top.add-cow", cwd=here), addcow("info", "top.add-cow", cwd=here)]

    return contenders


def _cases(runs: int) -> tuple[Case, ...]:
    return tuple(
        Case(
            name=f"{verb}-{runs}-runs",
            title=f"{verb} of {runs:,} runs against info",
            contenders=_described_by(verb),
            hot=("top.add-cow",),
            target=WANTED[runs],
            measure=Measure.COST,
            limit=_LIMIT,
        )
        for verb in ("check", "map")
    )


FRAGMENT_STAGES = (
    Stage(build=_files(FEW), cases=_cases(FEW), room=0.1),
    Stage(build=_files(MANY), cases=_cases(MANY), room=0.3),
)
