"""The cases of the benchmark: contenders, files and targets.

A *stage* is a set of files for some cases, which run one after the other. It is removed before the
next stage is built, so that disk and page cache hold one stage at a time.

Three things would make a comparison unfair, and are avoided here:

- `commit -d` changes nothing in the overlay and can be repeated, but if the file system clones, a
  second clone of the same blocks does nothing. So there the backing file is replaced before each
  run by a copy with the old content.
- Tools that do different work by default get options that make it equal: `qemu-img convert` and cp
  never sync, so addcow convert runs with `-t unsafe` against them, and durable cases run
  `qemu-img convert` with `-t writeback`, which syncs at its end.
- After the warm-up every result is compared with the expected one: a tool that does less work is no
  peer.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import addcow_mp
from addcow_mp.jobs.manifest import create
from addcow_mp.jobs.options import RunOptions
from addcow_mp.units import GiB, KiB, MiB, TiB
from bench_farms import FARM_STAGES
from bench_files import (
    CLUSTER,
    NEW,
    OLD,
    CannotError,
    alternating,
    remove,
    same,
    tool,
    write_chain,
    write_many_qcow2,
    write_overlay,
    write_qcow2,
    write_raw,
)
from bench_fragments import FRAGMENT_STAGES
from bench_guests import GUEST_STAGES
from bench_life import LIFE_STAGES
from bench_runs import (
    ADDCOW,
    BUFFER,
    PROCESSES,
    Around,
    Case,
    Contender,
    Disk,
    Measure,
    Stage,
    addcow,
    bare_loop,
    command,
    reported,
)

Build = Callable[[Path, int], None]
Contenders = Callable[[Path, int], list[Contender]]
AroundOf = Callable[[Path], Around]

LONG, SHORT = 16 * MiB, 64 * KiB

UNSAFE = ("-t", "unsafe")
WRITEBACK = ("-t", "writeback")

#: What a task moves, and preallocates at most, in one go.
TASK = 64 * MiB

#: How many more runs commands of some ten milliseconds get.
OFTEN = 5


# ---- commit ----


def _commit_files(run: int) -> Build:
    """An overlay, its twin, and for each a backing file with other data in the same places."""

    def build(here: Path, total: int) -> None:
        runs = alternating(total, run)
        size = 2 * len(runs) * run
        for name in ("base.raw", "peer-base.raw"):
            write_raw(here / name, size, runs, OLD)
        write_overlay(here / "top.add-cow", "base.raw", size, runs)
        write_qcow2(here / "top.qcow2", "peer-base.raw", here / "top.raw")

    return build


TWINS = ("top.add-cow", "top.raw", "top.qcow2")
COMMIT_FILES = (*TWINS, "base.raw", "peer-base.raw")


def _commit(ours: tuple[str, ...], theirs: tuple[str, ...]) -> Contenders:
    def contenders(here: Path, _: int) -> list[Contender]:
        arrived = Around(verify=lambda: same(here / "top.raw", here / "base.raw"))
        return [
            addcow("commit", "-d", *ours, "top.add-cow", cwd=here, around=arrived),
            _qemu_commit(here, *theirs),
        ]

    return contenders


def _qemu_commit(here: Path, *options: str) -> Contender:
    return command(
        *("qemu-img", "commit", "-d", "-f", "qcow2", *options, "top.qcow2"),
        cwd=here,
        name="qemu-img commit",
        around=Around(verify=lambda: same(here / "top.raw", here / "peer-base.raw")),
    )


def _ceiling(run: int) -> Contenders:
    def contenders(here: Path, total: int) -> list[Contender]:
        words = (ADDCOW, "commit", "-d", *UNSAFE, "top.add-cow")
        files, runs = (here / "top.raw", here / "base.raw"), alternating(total, run)
        shown = f"preadv and pwrite by {PROCESSES} processes through {BUFFER // KiB} KiB each"
        return [
            Contender(
                "addcow, start-up excluded",
                f"the seconds that {' '.join(('addcow', *words[1:]))} reports",
                lambda: reported(words, here),
            ),
            Contender("bare loop", shown, lambda: bare_loop(*files, runs)),
        ]

    return contenders


def _ways(here: Path, _: int) -> list[Contender]:
    """The method that is chosen by itself, and each that can be pinned."""
    commit = ("commit", "-d", *UNSAFE)
    pinned = (("--copy", "range"), ("--copy", "map"), ("--copy", "buffer"))
    arrived = Around(verify=lambda: same(here / "top.raw", here / "base.raw"))
    others = (
        command(ADDCOW, *commit, *way, "top.add-cow", cwd=here, name=" ".join(way), around=arrived)
        for way in pinned
    )
    return [addcow(*commit, "top.add-cow", cwd=here, around=arrived), *others]


#: Why a commit cannot reach its target: the bare loop does nothing but move the bytes.
_MEMORY = (
    "memory bandwidth: the bare loop of the same calls (the ceiling row) takes nearly as long, to "
    "which the start of two interpreters is added"
)
_DIRTY = "the limit of dirty memory, which two writers reach sooner than one; then the disk counts"


@dataclass(frozen=True)
class CommitTargets:
    """How many times as fast as qemu-img a commit must be."""

    unsafe: float
    dirty: float
    durable: float


def _commit_cases(name: str, run: int, targets: CommitTargets) -> tuple[Case, ...]:
    return (
        Case(
            name=f"commit-{name}-unsafe",
            title=f"commit -d, no sync, {name} runs",
            contenders=_commit(UNSAFE, UNSAFE),
            hot=COMMIT_FILES,
            target=targets.unsafe,
            limit=_MEMORY,
        ),
        Case(
            name=f"commit-{name}-dirty",
            title=f"commit -d, no sync, {name} runs, over the dirty pages of the run before",
            contenders=_commit(UNSAFE, UNSAFE),
            hot=COMMIT_FILES,
            target=targets.dirty,
            synced=False,
            limit=_DIRTY,
        ),
        Case(
            name=f"commit-{name}-durable",
            title=f"commit -d, durable, {name} runs",
            contenders=_commit((), WRITEBACK),
            hot=COMMIT_FILES,
            target=targets.durable,
        ),
        Case(
            name=f"ways-{name}",
            title=f"the method that is chosen against each that can be pinned, {name} runs",
            contenders=_ways,
            hot=("top.add-cow", "top.raw", "base.raw"),
            target=0.9,
        ),
        Case(
            name=f"ceiling-{name}",
            title=f"the moving part of commit alone, {name} runs",
            contenders=_ceiling(run),
            hot=("top.add-cow", "top.raw", "base.raw"),
            target=0.9,
        ),
    )


# ---- reading metadata ----


def _look(*words: str) -> Contenders:
    """The same command line for addcow and for qemu-img, on the twins."""

    def contenders(here: Path, _: int) -> list[Contender]:
        qemu = ("qemu-img", *words, "-f", "qcow2", "top.qcow2")
        return [
            addcow(*words, "top.add-cow", cwd=here),
            command(*qemu, cwd=here, name=f"qemu-img {words[0]}"),
        ]

    return contenders


def _equal_files(here: Path, total: int) -> None:
    runs = alternating(2 * total, LONG, 0)
    for name in ("one.raw", "other.raw"):
        write_raw(here / name, runs[-1][1], runs, NEW)


def _compare(here: Path, _: int) -> list[Contender]:
    words = ("compare", "-f", "raw", "-F", "raw", "one.raw", "other.raw")
    peer = command("qemu-img", *words, cwd=here, name="qemu-img compare")
    return [addcow(*words, cwd=here), peer]


EMPTY_PROGRAM = '''import typer

app = typer.Typer()


@app.command()
def nothing() -> None:
    """Do nothing."""


app()
'''


def _small_files(here: Path, _: int) -> None:
    (here / "empty.py").write_text(EMPTY_PROGRAM)
    write_raw(here / "base.raw", GiB, [], OLD)
    write_overlay(here / "top.add-cow", "base.raw", GiB, [])


def _startup(*arguments: str, name: str) -> Contenders:
    def contenders(here: Path, _: int) -> list[Contender]:
        peer = command(sys.executable, *arguments, cwd=here, name=name)
        return [addcow("info", "top.add-cow", cwd=here), peer]

    return contenders


# ---- new files: flatten and convert ----


def _base_file(gap: int) -> Build:
    def build(here: Path, total: int) -> None:
        runs = alternating(total, LONG, gap)
        write_raw(here / "base.raw", runs[-1][1] + gap, runs, OLD)

    return build


def _flatten(ours: tuple[str, ...], theirs: tuple[str, ...]) -> Contenders:
    def contenders(here: Path, _: int) -> list[Contender]:
        return [
            addcow("flatten", *ours, "new.add-cow", cwd=here, around=_around_flatten(here)),
            _rebase(here, *theirs),
            _qemu_convert(here, "new.qcow2", here / "base.raw", "-W", "-m", "16", *theirs),
        ]

    return contenders


def _around_flatten(here: Path) -> Around:
    made = here / "new.add-cow", here / "new.raw"
    return Around(
        before=lambda: _new_overlay(made[0]),
        verify=lambda: same(here / "base.raw", made[1]),
        after=lambda: remove(*made),
    )


def _new_overlay(path: Path) -> None:
    addcow_mp.create(path, backing="base.raw", backing_format="raw")


def _new_qcow2(here: Path) -> None:
    options = ("-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw")
    tool("qemu-img", "create", *options, "new.qcow2", cwd=here)


def _rebase(here: Path, *options: str) -> Contender:
    made = here / "new.qcow2"
    return command(
        *("qemu-img", "rebase", *options, "-f", "qcow2", "-b", "", made.name),
        cwd=here,
        name='qemu-img rebase -b ""',
        around=Around(
            before=lambda: _new_qcow2(here),
            verify=lambda: same(here / "base.raw", made, "qcow2"),
            after=lambda: remove(made),
        ),
    )


def _qemu_convert(here: Path, source: str, expected: Path, *options: str) -> Contender:
    """Convert a qcow2 file, made again if it is the empty one, into a raw file."""
    result, fresh = here / "converted.raw", source == "new.qcow2"
    offloading = "-C" in options
    return command(
        *("qemu-img", "convert", *options, "-f", "qcow2", "-O", "raw", source, result.name),
        cwd=here,
        name="qemu-img convert -C" if offloading else "qemu-img convert -W -m 16",
        around=Around(
            before=lambda: _new_qcow2(here) if fresh else None,
            verify=lambda: same(expected, result),
            after=lambda: remove(result, *([here / source] if fresh else [])),
        ),
        counted=not offloading,
    )


def _ceiling_of_new(words: tuple[str, ...], source: str, around: AroundOf) -> Contenders:
    """The moving part of a job that makes a new file, beside a bare loop that makes one."""

    def contenders(here: Path, _: int) -> list[Contender]:
        copied, size = here / "bare.raw", (here / source).stat().st_size
        runs = [(at, min(at + TASK, size)) for at in range(0, size, TASK)]
        made = Around(lambda: write_raw(copied, size, [], NEW), after=lambda: remove(copied))
        shown = f"posix_fallocate, preadv and pwrite into a new file by {PROCESSES} processes"
        return [
            Contender(
                "addcow, start-up excluded",
                f"the seconds that {' '.join(('addcow', *words))} reports",
                lambda: reported((ADDCOW, *words), here),
                around(here),
            ),
            Contender(
                "bare loop",
                shown,
                lambda: bare_loop(here / source, copied, runs, fresh=True),
                made,
            ),
        ]

    return contenders


def _chain_files(here: Path, total: int) -> None:
    write_chain(here, total, LONG)


def _convert(here: Path, _: int) -> list[Contender]:
    whole = here / "all.raw"
    return [
        addcow(
            *("convert", *UNSAFE, "-O", "raw", "top.add-cow", "ours.raw"),
            cwd=here,
            around=_around_copy(whole, here / "ours.raw"),
        ),
        _qemu_convert(here, "top.qcow2", whole, "-W", "-m", "16"),
        command(
            *("cp", "--sparse=always", whole.name, "copied.raw"),
            cwd=here,
            name="cp --sparse=always",
            around=_around_copy(whole, here / "copied.raw"),
        ),
    ]


def _around_copy(expected: Path, result: Path) -> Around:
    return Around(verify=lambda: same(expected, result), after=lambda: remove(result))


# ---- XFS with reflink ----


def _clone_files(here: Path, total: int) -> None:
    _commit_files(LONG)(here, total)
    os.rename(here / "base.raw", here / "base-old.raw")


def _renew(base: Path) -> None:
    """Give ``base`` the content that it had before the commit.

    It is not read into the page cache: no contender reads it, and pages of it that a clone makes
    invalid have to be taken out of the cache one by one, which is no part of either job.
    """
    remove(base)
    tool("cp", "--reflink=always", base.with_name(f"{base.stem}-old.raw"), base)
    os.sync()


def _commit_cloning(here: Path, name: str) -> Around:
    """Around a commit of ``name`` into its own base; nothing but the overlay holds new data."""
    base = here / ("base.raw" if name == "top" else f"{name}-base.raw")
    return Around(before=lambda: _renew(base), verify=lambda: same(here / f"{name}.raw", base))


def _xfs_commit(here: Path, _: int) -> list[Contender]:
    around = _commit_cloning(here, "top")
    ours = addcow("commit", "-d", "top.add-cow", cwd=here, around=around)
    return [ours, _qemu_commit(here, *WRITEBACK)]


def _xfs_flatten(here: Path, total: int) -> list[Contender]:
    """As elsewhere; convert -C, which lets the file system copy, is shown but does not count."""
    offloaded = _qemu_convert(here, "new.qcow2", here / "base.raw", "-C", *WRITEBACK)
    return [*_flatten((), WRITEBACK)(here, total), offloaded]


def _spread_files(here: Path, total: int) -> None:
    """A quarter of the data in 16 TiB, and the same in four times its size: 1 GiB in 4 GiB."""
    count = len(alternating(total // 4, LONG))
    _spread(here, "huge", count, 16 * TiB)
    _spread(here, "small", count, 4 * count * LONG)


def _spread(here: Path, name: str, count: int, size: int) -> None:
    step = size // count
    runs = [(index * step, index * step + LONG) for index in range(count)]
    write_raw(here / f"{name}-base-old.raw", size, runs, OLD)
    write_raw(here / f"{name}-base.raw", size, [], OLD)
    write_overlay(here / f"{name}.add-cow", f"{name}-base.raw", size, runs)


def _sparse(here: Path, _: int) -> list[Contender]:
    huge = addcow("commit", "-d", "huge.add-cow", cwd=here, around=_commit_cloning(here, "huge"))
    small = command(
        *(ADDCOW, "commit", "-d", "small.add-cow"),
        cwd=here,
        name="addcow, small image",
        around=_commit_cloning(here, "small"),
    )
    return [huge, small]


# ---- farms ----

#: The whole farm's images, at full scale.
IMAGES = 10_000
FULL = 4 * GiB

#: Overlays over one base that are verified: a small change of each golden image.
LAYERS = 1000


def _farm_files(images: int) -> Build:
    """A farm of small overlays, and as many of qcow2 over one base."""

    def build(here: Path, total: int) -> None:
        count = max(1, images * total // FULL)
        options = ("--images", str(count), "--seed", "1", "--no-faults")
        tool(sys.executable, Path(__file__).parent / "mkfarm.py", here / "farm", *options)
        write_raw(here / "base.raw", MiB, [(0, 64 * KiB)], OLD)
        write_many_qcow2(here, "base.raw", count)

    return build


def _farm_check(here: Path, _: int) -> list[Contender]:
    each = ("qemu-img", "check", "-q")
    peer = ("xargs", "-a", "images", f"-P{PROCESSES}", "-n1", *each)
    return [
        addcow("farm", "check", "farm", cwd=here),
        command(*peer, cwd=here, name="xargs qemu-img check"),
    ]


def _farm_case(name: str, title: str, target: float) -> Case:
    hot = ("farm", "qcow2", "base.raw")
    return Case(name=name, title=title, contenders=_farm_check, hot=hot, target=target)


def _verified_files(here: Path, total: int) -> None:
    """A thousand overlays over one base, all clusters allocated, with manifests."""
    if shutil.which("b3sum") is None:
        raise CannotError("b3sum is needed: apt-get install b3sum")
    size = max(CLUSTER, total // LAYERS // CLUSTER * CLUSTER)
    (here / "farm").mkdir()
    write_raw(here / "farm" / "base.raw", size, [(0, size)], OLD)
    for number in range(LAYERS):
        path = here / "farm" / f"vm{number}.add-cow"
        write_overlay(path, "base.raw", size, [(0, size)])
        create(str(path), RunOptions(jobs=0))


def _farm_verify(here: Path, _: int) -> list[Contender]:
    """Equal processes on equal bytes: every cluster is allocated, so b3sum reads the same bytes."""
    (here / "images").write_text("".join(f"{path}\n" for path in sorted(here.glob("farm/*.raw"))))
    each = ("b3sum", "--num-threads", "1")
    peer = ("xargs", "-a", "images", f"-P{PROCESSES}", "-n64", *each)
    return [
        addcow("farm", "verify", "farm", cwd=here),
        command(*peer, cwd=here, name="xargs b3sum"),
    ]


# ---- all of them ----

START = Case(
    name="startup",
    title="addcow info against an empty typer program",
    contenders=_startup("empty.py", name="typer, one empty command"),
    hot=("top.add-cow",),
    target=1.2,
    measure=Measure.COST,
    often=OFTEN,
)

IMPORT = replace(
    START,
    name="startup-import",
    title="addcow info against the import of typer alone",
    contenders=_startup("-c", "import typer", name="python, import typer"),
    target=1.1,
)

CHECK = Case(name="check", title="check, 64k runs", contenders=_look("check"), hot=TWINS)

INFO = Case(name="info", title="info, 64k runs", contenders=_look("info"), hot=TWINS, often=OFTEN)

FLATTEN = Case(
    name="flatten-unsafe",
    title="flatten an empty overlay, no sync",
    contenders=_flatten(UNSAFE, UNSAFE),
    hot=("base.raw",),
    target=2.0,
    limit="making pages of a new file: the ceiling row is a bare loop that does only that, and "
    "copy_file_range (--copy range) takes as long",
)

FLATTEN_CEILING = Case(
    name="ceiling-flatten",
    title="the moving part of flatten alone",
    contenders=_ceiling_of_new(("flatten", *UNSAFE, "new.add-cow"), "base.raw", _around_flatten),
    hot=("base.raw",),
    target=0.9,
)

COMPARE = Case(
    name="compare",
    title="compare two equal raw files, twice the data each",
    contenders=_compare,
    hot=("one.raw", "other.raw"),
    target=1.3,
)

CONVERT = Case(
    name="convert",
    title="convert a chain, no sync",
    contenders=_convert,
    hot=(*TWINS, "base.raw", "all.raw"),
    target=1.3,
    limit="making pages of a new file: the ceiling row is a bare loop that does only that",
)

CONVERT_CEILING = Case(
    name="ceiling-convert",
    title="the moving part of convert alone, with its look for zeros",
    contenders=_ceiling_of_new(
        ("convert", *UNSAFE, "-O", "raw", "top.add-cow", "ours.raw"),
        "all.raw",
        lambda here: _around_copy(here / "all.raw", here / "ours.raw"),
    ),
    hot=("top.add-cow", "top.raw", "base.raw", "all.raw"),
    target=0.9,
)

XFS_COMMIT = Case(
    name="xfs-commit",
    title="commit -d, durable, 16m runs, reflink",
    contenders=_xfs_commit,
    hot=(*TWINS, "peer-base.raw"),
    target=15.0,
)

XFS_FLATTEN = Case(
    name="xfs-flatten",
    title="flatten, durable, 16m runs, reflink",
    contenders=_xfs_flatten,
    hot=("base.raw",),
    target=15.0,
)

SPARSE = Case(
    name="sparse-16t",
    title="commit -d, a quarter of the data in 16 TiB against a small image",
    contenders=_sparse,
    hot=("huge.add-cow", "huge.raw", "small.add-cow", "small.raw"),
    target=1.3,
    measure=Measure.COST,
    often=2,
)

FARM_VERIFY = Case(
    name="farm-verify",
    title="farm verify of 1,000 overlays over one base",
    contenders=_farm_verify,
    hot=("farm",),
    target=0.8,
    limit="the interpreter: reading and hashing take as long as b3sum (4 MiB in 2.8 ms of a busy "
    "processor both), opening, locking and comparing a layer two thirds of that again",
)

#: Space: the files of the stage, and one result at a time.
STAGES = (
    Stage(build=_small_files, cases=(START, IMPORT), room=0),
    Stage(
        build=_farm_files(IMAGES),
        cases=(_farm_case("farm-check", "farm check of 10,000 overlays", 30.0),),
        room=0.5,
    ),
    Stage(
        build=_farm_files(IMAGES // 10),
        cases=(_farm_case("farm-check-1000", "farm check of 1,000 overlays", 8.0),),
        room=0.05,
    ),
    *FARM_STAGES,
    Stage(build=_verified_files, cases=(FARM_VERIFY,), room=1.1),
    Stage(
        build=_commit_files(LONG),
        cases=_commit_cases("16m", LONG, CommitTargets(1.5, 1, 1.2)),
        room=4,
    ),
    Stage(
        build=_commit_files(SHORT),
        cases=(*_commit_cases("64k", SHORT, CommitTargets(2.2, 1.8, 1.4)), CHECK, INFO),
        room=4,
    ),
    Stage(build=_base_file(0), cases=(FLATTEN, FLATTEN_CEILING), room=2),
    Stage(build=_equal_files, cases=(COMPARE,), room=4),
    Stage(build=_chain_files, cases=(CONVERT, CONVERT_CEILING), room=3.5),
    Stage(build=_clone_files, cases=(XFS_COMMIT,), room=5, disk=Disk.XFS),
    Stage(build=_base_file(LONG), cases=(XFS_FLATTEN,), room=2, disk=Disk.XFS),
    Stage(build=_spread_files, cases=(SPARSE,), room=1, disk=Disk.XFS),
    *LIFE_STAGES,
    *FRAGMENT_STAGES,
    *GUEST_STAGES,
)
