"""The bench cases of rebase and reset.

A rebase compares two backing files of equal size, in which one of a hundred clusters differs, and
copies these clusters. qemu-img does the same with a qcow2 overlay. In *cold* cases both files are
dropped from the page cache first. In cases where all is equal, shared blocks on the disk (XFS) or
manifests prove it: addcow reads nothing, and qemu-img reads both files. A reset of many overlays is
compared with the creation of as many new qcow2 overlays, which gives the same result.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import addcow_mp
from addcow_mp.units import GiB, MiB
from bench_files import (
    CLUSTER,
    NEW,
    OLD,
    BenchError,
    forget,
    noise,
    remove,
    tool,
    warm,
    write_overlay,
    write_raw,
    write_sparse,
)
from bench_runs import ADDCOW, PROCESSES, Around, Case, Contender, Disk, Stage, addcow, command

FULL = 4 * GiB

#: One of this many clusters differs.
DIFFERING = 100

#: The number of overlays that are reset at full scale, and the bytes that each of them holds.
OVERLAYS, HELD = 1000, 1 * MiB

BASES = ("old.raw", "new.raw")


def _two_versions(here: Path, total: int) -> None:
    """Write a base, and a new version of it in which some clusters differ."""
    write_raw(here / "old.raw", total, [(0, total)], OLD)
    shutil.copyfile(here / "old.raw", here / "new.raw")
    with (here / "new.raw").open("r+b", buffering=0) as file:
        for start in range(0, total, DIFFERING * CLUSTER):
            file.seek(start)
            file.write(noise(start, CLUSTER, NEW))


def _two_names(here: Path, total: int) -> None:
    """Write a base and a clone of it, each with a manifest."""
    write_raw(here / "old.raw", total, [(0, total)], OLD)
    tool("cp", "--reflink=auto", "old.raw", "new.raw", cwd=here)
    for name in BASES:
        tool(ADDCOW, "manifest", "create", "-q", "-f", "raw", name, cwd=here)


def _prepared(here: Path, *, is_cold: bool, make: Callable[[], None]) -> Callable[[], None]:
    def prepare() -> None:
        make()
        os.sync()
        for name in BASES:
            (forget if is_cold else warm)(here / name)

    return prepare


def _rebase(*ours: str, is_cold: bool) -> Callable[[Path, int], list[Contender]]:
    def contenders(here: Path, _: int) -> list[Contender]:
        overlay, qcow2 = here / "vm.add-cow", here / "vm.qcow2"

        def make_overlay() -> None:
            remove(overlay, here / "vm.raw")
            addcow_mp.create(overlay, backing="old.raw", backing_format="raw")

        def make_qcow2() -> None:
            remove(qcow2)
            words = ("create", "-q", "-f", "qcow2", "-b", "old.raw", "-F", "raw", "vm.qcow2")
            tool("qemu-img", *words, cwd=here)

        def verify(shown: Path, format_: str) -> None:
            words = ("compare", "-q", "-f", format_, "-F", "raw", shown, here / "old.raw")
            tool("qemu-img", *words)

        def verify_overlay() -> None:
            tool(ADDCOW, "convert", "-q", "-O", "raw", "vm.add-cow", "shown.raw", cwd=here)
            verify(here / "shown.raw", "raw")
            remove(here / "shown.raw")

        own = Around(_prepared(here, is_cold=is_cold, make=make_overlay), verify_overlay)
        other = Around(
            _prepared(here, is_cold=is_cold, make=make_qcow2), lambda: verify(qcow2, "qcow2")
        )
        theirs = ("qemu-img", "rebase", "-q", "-f", "qcow2", "-b", "new.raw", "-F", "raw")
        return [
            addcow("rebase", "-q", *ours, "-b", "new.raw", "vm.add-cow", cwd=here, around=own),
            command(*theirs, "vm.qcow2", cwd=here, name="qemu-img rebase", around=other),
        ]

    return contenders


def _case(name: str, title: str, target: float, *ours: str, is_cold: bool, limit: str = "") -> Case:
    return Case(
        name=f"rebase-{name}",
        title=title,
        contenders=_rebase(*ours, is_cold=is_cold),
        hot=() if is_cold else BASES,
        target=target,
        limit=limit,
    )


# ---- reset ----


def _overlay(number: int) -> str:
    """The name of an overlay without its suffix; all have the same length."""
    return f"vm-{number:05}"


def _count(total: int) -> int:
    return max(4, OVERLAYS * total // FULL)


def _used_overlays(here: Path, total: int) -> None:
    """Write overlays of one base, and a list of names for as many qcow2 overlays."""
    (here / "farm").mkdir()
    (here / "peer").mkdir()
    size = 4 * HELD
    write_raw(here / "farm" / "base.raw", size, [(0, size)], OLD)
    first = here / "farm" / f"{_overlay(0)}.add-cow"
    write_overlay(first, "base.raw", size, [(0, HELD)])
    content = first.read_bytes()
    for number in range(1, _count(total)):
        own = content.replace(_overlay(0).encode(), _overlay(number).encode())
        write_sparse(here / "farm" / f"{_overlay(number)}.add-cow", own)
        write_raw(here / "farm" / f"{_overlay(number)}.raw", size, [(0, HELD)], NEW)
    tool("cp", "-a", "--sparse=always", "farm", "kept", cwd=here)
    (here / "kept" / "base.raw").unlink()
    names = [f"peer/vm-{number}.qcow2" for number in range(_count(total))]
    (here / "images").write_text("\n".join(names))


def _reset(here: Path, total: int) -> list[Contender]:
    image = here / "farm" / f"{_overlay(_count(total) - 1)}.raw"

    def use_again() -> None:
        tool("cp", "-a", "--sparse=always", "kept/.", "farm", cwd=here)
        os.sync()

    def verify() -> None:
        if image.stat().st_blocks * 512 >= HELD:
            raise BenchError(f"{image.name} still holds data")

    def clear() -> None:
        remove(*(here / "peer").iterdir())
        os.sync()

    create = ("qemu-img", "create", "-q", "-f", "qcow2", "-b", "../farm/base.raw", "-F", "raw")
    each = ("xargs", "-a", "images", f"-P{PROCESSES}", "-n1")
    around = Around(before=clear)
    return [
        addcow("farm", "reset", "-q", "farm", cwd=here, around=Around(use_again, verify)),
        command(*each, *create, cwd=here, name="xargs qemu-img create", around=around),
    ]


LIFE_STAGES = (
    Stage(
        build=_two_versions,
        cases=(
            _case("cached", "rebase, 1 % differs, cached", 1.3, is_cold=False),
            _case("cold", "rebase, 1 % differs, dropped from memory", 2.0, is_cold=True),
        ),
        room=3,
    ),
    Stage(
        build=_two_names,
        cases=(
            _case(
                "manifests",
                "rebase, all equal by manifests, dropped from memory",
                10.0,
                "--trust-manifests",
                is_cold=True,
            ),
        ),
        room=3,
    ),
    Stage(
        build=_two_names,
        cases=(_case("shared", "rebase, all equal by shared blocks", 10.0, is_cold=True),),
        room=2,
        disk=Disk.XFS,
    ),
    Stage(
        build=_used_overlays,
        cases=(
            Case(
                name="farm-reset",
                title="farm reset of 1,000 overlays with 1 MiB each",
                contenders=_reset,
                hot=("farm",),
                target=5.0,
            ),
        ),
        room=1,
    ),
)
