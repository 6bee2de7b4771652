"""The cases of whole farms: commit and flatten of a thousand small overlays, and a plan.

The peer gets a qcow2 overlay for each of ours, with the same data over the same backing file, and
as many processes as there are processors. Before each run the overlays are copied back from where
they are kept, one backing file gets its old content again, and everything is synced.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

from addcow_mp.units import GiB, KiB, MiB
from bench_files import (
    CLUSTER,
    NEW,
    OLD,
    BenchError,
    Run,
    noise,
    tool,
    write_overlay,
    write_qcow2,
    write_raw,
    write_sparse,
)
from bench_runs import PROCESSES, Around, Case, Contender, Measure, Stage, addcow, command

FULL = 4 * GiB

#: The overlays that are changed, at full scale.
OVERLAYS = 1000

#: What each overlay holds that is committed, and what it lacks that is flattened.
COMMITTED, FLATTENED = 512 * KiB, 4 * MiB

#: The processor's time that the plan of 10,000 overlays may take, in seconds.
PLANNING = 2.0

UNSAFE, WRITEBACK = ("-t", "unsafe"), ("-t", "writeback")

#: Why a job of a farm cannot reach its target, as measured against a bare loop of the same calls,
#: which neither locks nor refuses anything.
_STEPS = (
    "the interpreter: on a busy machine the bare loop of the same calls took 0.6 s of processor "
    "time and this 3.7, for the start of three interpreters, and for each image a plan, the locks, "
    "and a hundred calls that open, look and publish"
)
_DISK = (
    "the disk: the bare loop of the same writes and syncs takes three quarters of the time, and as "
    "long when the bits and ALL_ALLOCATED share a sync"
)
_CLOCK = (
    "the machine: the target was set where an empty typer program starts in 0.06 s; compare the "
    "row startup"
)


Contenders = Callable[[Path, int], list[Contender]]


def count_of(total: int) -> int:
    """The number of overlays for ``total`` bytes of guest data."""
    return max(4, OVERLAYS * total // FULL)


def _base(number: int) -> str:
    """The name of a backing file; all have the same length, so that one qcow2 header fits all."""
    return f"base-{number:05}.raw"


def _commit_files(here: Path, total: int) -> None:
    """Overlays over backing files of their own, and qcow2 overlays over the same ones."""
    (here / "farm").mkdir()
    for number in range(count_of(total)):
        write_raw(here / "farm" / _base(number), 2 * COMMITTED, [(0, 2 * COMMITTED)], OLD)
    _write_overlays(here, count_of(total), _base, 2 * COMMITTED, (0, COMMITTED))
    _write_peers(here, count_of(total), _base)
    _keep(here)


def _flatten_files(here: Path, total: int) -> None:
    """Overlays over one backing file, and qcow2 overlays over the same one."""
    (here / "farm").mkdir()
    write_raw(here / "farm" / _base(0), FLATTENED, [(0, FLATTENED)], OLD)
    _write_overlays(here, count_of(total), lambda _: _base(0), FLATTENED, (0, CLUSTER))
    _write_peers(here, count_of(total), lambda _: _base(0))
    _keep(here)


def _overlay(number: int) -> str:
    """The name of an overlay, without its suffix; all have the same length."""
    return f"vm-{number:05}"


def _write_overlays(
    here: Path, count: int, base: Callable[[int], str], size: int, run: Run
) -> None:
    """Make overlays that hold ``run``: the first one, and copies of it with other names."""
    first = here / "farm" / f"{_overlay(0)}.add-cow"
    write_overlay(first, base(0), size, [run])
    content = first.read_bytes()
    for number in range(1, count):
        own = content.replace(_overlay(0).encode(), _overlay(number).encode())
        own = own.replace(base(0).encode(), base(number).encode())
        write_sparse(here / "farm" / f"{_overlay(number)}.add-cow", own)
        write_raw(here / "farm" / f"{_overlay(number)}.raw", size, [run], NEW)


def _write_peers(here: Path, count: int, base: Callable[[int], str]) -> None:
    """Make a qcow2 overlay for each of ours, and a list of their names."""
    (here / "peer").mkdir()
    first = here / "peer" / "vm-0.qcow2"
    write_qcow2(first, f"../farm/{_base(0)}", here / "farm" / f"{_overlay(0)}.raw")
    content = first.read_bytes()
    for number in range(1, count):
        own = content.replace(_base(0).encode(), base(number).encode())
        (here / "peer" / f"vm-{number}.qcow2").write_bytes(own)
    names = [f"peer/vm-{number}.qcow2" for number in range(count)]
    (here / "images").write_text("\n".join(names))


def _keep(here: Path) -> None:
    """Keep copies of all overlays as they are now."""
    tool("cp", "-a", "--sparse=always", "farm", "kept-farm", cwd=here)
    tool("cp", "-a", "--sparse=always", "peer", "kept-peer", cwd=here)
    for path in (here / "kept-farm").glob("base-*"):
        path.unlink()


def _brought_back(here: Path, name: str, base: str = "") -> Callable[[], None]:
    """Bring back the overlays in ``name``, and the old content of a backing file; sync all."""

    def bring_back() -> None:
        tool("cp", "-a", "--sparse=always", f"kept-{name}/.", name, cwd=here)
        if base:
            with (here / "farm" / base).open("r+b", buffering=0) as file:
                file.write(noise(0, CLUSTER, OLD))
        os.sync()

    return bring_back


def _insist(is_done: bool, what: str) -> None:
    if not is_done:
        raise BenchError(f"{what}: not the expected content")


def _xargs(here: Path, *words: str, around: Around) -> Contender:
    each = ("xargs", "-a", "images", f"-P{PROCESSES}", "-n1")
    return command(*each, *words, cwd=here, name=f"xargs {' '.join(words[:2])}", around=around)


def _commit(ours: tuple[str, ...], theirs: tuple[str, ...]) -> Contenders:
    def contenders(here: Path, total: int) -> list[Contender]:
        base = here / "farm" / _base(count_of(total) - 1)

        def verify() -> None:
            _insist(base.read_bytes()[:CLUSTER] == noise(0, CLUSTER, NEW), base.name)

        own, other = (
            Around(before=_brought_back(here, name, base.name), verify=verify)
            for name in ("farm", "peer")
        )
        words = ("qemu-img", "commit", "-q", "-f", "qcow2", *theirs)
        return [
            addcow("farm", "commit", "-q", *ours, "farm", cwd=here, around=own),
            _xargs(here, *words, around=other),
        ]

    return contenders


def _flatten(ours: tuple[str, ...], theirs: tuple[str, ...]) -> Contenders:
    def contenders(here: Path, total: int) -> list[Contender]:
        last = count_of(total) - 1
        image, qcow2 = here / "farm" / f"{_overlay(last)}.raw", here / "peer" / f"vm-{last}.qcow2"
        wanted = bytes(noise(0, CLUSTER, NEW)) + (here / "farm" / _base(0)).read_bytes()[CLUSTER:]

        def verify_own() -> None:
            _insist(image.read_bytes() == wanted, image.name)

        def verify_other() -> None:
            tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", qcow2, here / "shown")
            _insist((here / "shown").read_bytes() == wanted, qcow2.name)

        own = Around(before=_brought_back(here, "farm"), verify=verify_own)
        other = Around(before=_brought_back(here, "peer"), verify=verify_other)
        words = ("qemu-img", "rebase", "-q", "-f", "qcow2", "-b", "", *theirs)
        return [
            addcow("farm", "flatten", "-q", *ours, "farm", cwd=here, around=own),
            _xargs(here, *words, around=other),
        ]

    return contenders


# ---- the plan ----


def _planned_files(here: Path, total: int) -> None:
    """Ten times as many overlays as are changed, which take little space."""
    (here / "farm").mkdir()
    write_raw(here / "farm" / _base(0), FLATTENED, [(0, CLUSTER)], OLD)
    count, run = 10 * count_of(total), (CLUSTER, 2 * CLUSTER)
    _write_overlays(here, count, lambda _: _base(0), FLATTENED, run)


def _processor_seconds(words: Contender) -> float:
    """The processor's time of one run, of all its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words.run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _plan(here: Path, total: int) -> list[Contender]:
    ours = addcow("farm", "plan", "flatten", "-q", "farm", cwd=here)
    allowed = PLANNING * count_of(total) / OVERLAYS
    shown = f"{1000 * PLANNING / (10 * OVERLAYS)} ms an overlay"
    return [
        Contender("addcow, processor", ours.shown, lambda: _processor_seconds(ours)),
        Contender("what it may take", shown, lambda: allowed),
    ]


# ---- all of them ----


def _cases(
    name: str, title: str, contenders: Callable[..., Contenders], target: float, limit: str
) -> tuple[Case, ...]:
    ways = (("unsafe", "no sync", UNSAFE, UNSAFE), ("durable", "durable", (), WRITEBACK))
    return tuple(
        Case(
            name=f"{name}-{way}",
            title=f"{title}, {told}",
            contenders=contenders(ours, theirs),
            hot=("farm", "peer"),
            target=target,
            limit=limit,
        )
        for way, told, ours, theirs in ways
    )


FARM_STAGES = (
    Stage(
        build=_commit_files,
        cases=_cases(
            "farm-commit", "farm commit of 1,000 overlays of 512 KiB", _commit, 4.0, _STEPS
        ),
        room=1,
    ),
    Stage(
        build=_flatten_files,
        cases=_cases(
            "farm-flatten",
            "farm flatten of 1,000 overlays of 4 MiB over one base",
            _flatten,
            3.0,
            _DISK,
        ),
        room=2.5,
    ),
    Stage(
        build=_planned_files,
        cases=(
            Case(
                name="farm-plan",
                title="farm plan of 10,000 overlays, processor's time",
                contenders=_plan,
                hot=("farm",),
                target=1.0,
                measure=Measure.COST,
                limit=_CLOCK,
            ),
        ),
        room=0.5,
    ),
)
