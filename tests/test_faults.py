"""Tests of every fault at every event of each command.

A walk runs a command with a rule for the first, the second, the third ... occurrence of an event
until there is no further one. After each fault:

- the view of every image is the old one; each byte of a changed image is old or new;
- other files are unchanged, no file is shorter, new or missing;
- the command failed with one line, unless the fault killed or stopped it;
- the same command without the fault finishes the job.

A rule strikes once, so a command that retried a failed step would succeed and be detected. "for
good" is a disk that fails from then on.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import oracle
from addcow_mp.device.fault_rules import EVENTS
from support.command import (
    ALL_ALLOCATED,
    USAGE,
    KiB,
    bits,
    draw,
    draw_raw,
    guest,
    guest_picture,
    local_clusters,
    overlay_bytes,
    read_header,
    refused,
    snapshot,
    stored_bytes,
)
from support.fault_rules import Rules, rule
from support.processes import Ended
from support.warm import Warm

pytestmark = pytest.mark.sample(1)

CLUSTER = 4 * KiB
BIG = 16 * KiB
SECTOR = 512

Contents = dict[str, bytes]


# ---- the commands and what they are for ----


@dataclass(frozen=True)
class Operation:
    """A command, its files, the events that it meets, and what it makes of which file.

    `becomes` looks at the files as they are before and tells what each file that changes will
    hold: an overlay's guest's view, a raw file's bytes, None for a file that will be gone.
    `touches` are the files that may be written; `makes` those that may be there afterwards.
    """

    arguments: tuple[str, ...]
    build: Callable[[Path], None]
    becomes: Callable[[Path], dict[str, bytes | None]]
    bits: dict[str, str]
    touches: frozenset[str]
    meets: frozenset[str]
    makes: frozenset[str] = frozenset()
    #: Whether a view is the old one or the new one, and no mixture of both.
    at_once: bool = False


OPENING = {"header_read", "bitmap_load"}
PUBLISHING = {"data_sync", "publish", "bitmap_update", "bitmap_sync"}
RESIZING = OPENING | {"data_sync", "bitmap_update", "bitmap_sync", "resize"}


def view(path: Path) -> bytes:
    """Return what a guest sees, of an overlay or of a raw file."""
    return oracle.guest_bytes(str(path)) if path.suffix == ".add-cow" else path.read_bytes()


def over(top: bytes, bottom: bytes) -> bytes:
    """Return `top` with what `bottom` has behind its end."""
    return top + bottom[len(top) :]


def beside(here: Path) -> None:
    """Make a chain that the command does not touch."""
    draw_raw(here / "foreign.img", "FGH")
    draw(here / "foreign.add-cow", "-N-", "foreign.img", cluster=CLUSTER)


def commit_scene(here: Path) -> None:
    draw_raw(here / "base.img", "ABC-EF", cluster=CLUSTER)
    draw(here / "top.add-cow", "-X0Yg-Z-W-", cluster=CLUSTER)


def stale_scene(here: Path) -> None:
    """Every cluster is allocated, whatever the bits say; the backing is longer, with an odd end."""
    draw_raw(here / "base.img", "ABCDEFGHJKLM", cluster=CLUSTER)
    with (here / "base.img").open("ab") as file:
        file.write(b"odd")
    draw(here / "top.add-cow", "-X0-YZ", cluster=CLUSTER, compatible=ALL_ALLOCATED)


def below_scene(here: Path) -> None:
    """An add-cow backing with larger clusters, which are copied up in part."""
    draw_raw(here / "base.img", "ABCDEFGHJKLMNOPQ", cluster=CLUSTER)
    draw_raw(here / "mid.raw", "-mmm----IJKLmmmm", cluster=CLUSTER)
    (here / "mid.add-cow").write_bytes(
        overlay_bytes(
            image="mid.raw", size=16 * CLUSTER, backing="base.img", cluster=BIG, local=[2]
        )
    )
    draw(
        here / "top.add-cow",
        "--W--X---0--",
        "mid.add-cow",
        backing_format="add-cow",
        cluster=CLUSTER,
    )


def tower_scene(here: Path) -> None:
    """Three overlays over a raw file with an odd end; a commit goes into the file."""
    draw_raw(here / "base.img", "ABC-EF", cluster=CLUSTER)
    with (here / "base.img").open("ab") as file:
        file.write(b"odd")
    draw(here / "low.add-cow", "-l-L---l", cluster=CLUSTER)
    low, mid = ("low.add-cow", "mid.add-cow")
    draw(here / mid, "M---0m--", low, backing_format="add-cow", cluster=CLUSTER)
    draw(here / "top.add-cow", "X---tX-X", mid, backing_format="add-cow", cluster=CLUSTER)


def tower_below_scene(here: Path) -> None:
    """Over a base with larger clusters, which are copied up in part."""
    below_scene(here)
    draw(
        here / "over.add-cow",
        "o-O-----O-o-",
        "mid.add-cow",
        backing_format="add-cow",
        cluster=CLUSTER,
    )
    draw(
        here / "top.add-cow",
        "--W--X---0--",
        "over.add-cow",
        backing_format="add-cow",
        cluster=CLUSTER,
    )


def flatten_scene(here: Path) -> None:
    draw_raw(here / "base.img", "ABC-EF--JKLM", cluster=CLUSTER)
    draw(here / "top.add-cow", "-X0gg-gY--", cluster=CLUSTER)


def tail_scene(here: Path) -> None:
    """The same with bytes behind the virtual size, which are not part of the disk."""
    flatten_scene(here)
    with (here / "top.raw").open("ab") as file:
        file.write(b"tail" * 25)


def growing_scene(here: Path) -> None:
    """The old last cluster is partial, behind it lies a tail, and the backing is longer."""
    draw_raw(here / "base.img", "ABC-EF--JKLMNOP", cluster=CLUSTER)
    draw(here / "top.add-cow", "-X0gg-gYg", cluster=CLUSTER)
    os.truncate(here / "top.raw", 9 * CLUSTER - 2 * SECTOR)
    with (here / "top.raw").open("ab") as file:
        file.write(b"tail" * 25)


def stray_scene(here: Path) -> None:
    """The same with bits that an interrupted shrinking has left."""
    growing_scene(here)
    with (here / "top.add-cow").open("r+b") as file:
        file.seek(CLUSTER + 1)
        file.write(b"\x22")


def shrinking_scene(here: Path) -> None:
    draw_raw(here / "base.img", "ABC-EF--JKLMNOP", cluster=CLUSTER)
    draw(here / "top.add-cow", "-X0gXXXXXXXY", cluster=CLUSTER)


def rebasing_scene(here: Path) -> None:
    """Garbage and holes, a new backing file that is shorter, and one of more data."""
    draw_raw(here / "base.img", "ABC-EF--JKLM", cluster=CLUSTER)
    draw_raw(here / "new.img", "ABZ-EGH-", cluster=CLUSTER)
    draw(here / "top.add-cow", "-X0gg-gY--", cluster=CLUSTER)


def unchanged(here: Path) -> dict[str, bytes | None]:
    return {"top.add-cow": view(here / "top.add-cow")}


def renamed(here: Path) -> dict[str, bytes | None]:
    """Another disk below shows in what is not allocated."""
    now = bytearray(view(here / "new.img").ljust(10 * CLUSTER, b"\0"))
    old = view(here / "top.add-cow")
    for cluster in (1, 2, 7):
        now[cluster * CLUSTER : (cluster + 1) * CLUSTER] = old[
            cluster * CLUSTER : (cluster + 1) * CLUSTER
        ]
    return {"top.add-cow": bytes(now)}


def grown(here: Path) -> dict[str, bytes | None]:
    return {"top.add-cow": view(here / "top.add-cow").ljust(12 * CLUSTER, b"\0")}


def shrunk(here: Path) -> dict[str, bytes | None]:
    size = 5 * CLUSTER - SECTOR
    return {name: view(here / name)[:size] for name in ("top.add-cow", "top.raw")}


def committed(here: Path) -> dict[str, bytes | None]:
    return {"base.img": over(view(here / "top.add-cow"), view(here / "base.img"))}


def committed_below(here: Path) -> dict[str, bytes | None]:
    return {"mid.add-cow": over(view(here / "top.add-cow"), view(here / "mid.add-cow"))}


def flattened(here: Path) -> dict[str, bytes | None]:
    return {"top.raw": view(here / "top.add-cow")}


def discarded(here: Path) -> dict[str, bytes | None]:
    return {"top.add-cow": None, **flattened(here)}


def converted(here: Path) -> dict[str, bytes | None]:
    return {"new.raw": view(here / "top.add-cow")}


def written(here: Path) -> dict[str, bytes | None]:
    now = bytearray(view(here / "top.add-cow"))
    for offset, length, pattern in ((6, 8, 0x58), (17, 2, 0x59), (30, 6, 0)):
        now[offset * KiB : (offset + length) * KiB] = bytes([pattern]) * length * KiB
    return {"top.add-cow": bytes(now)}


OPERATIONS = {
    "commit": Operation(
        ("commit", "--jobs", "0", "top.add-cow"),
        commit_scene,
        committed,
        {"top.add-cow": "." * 10},
        frozenset({"base.img", "top.add-cow", "top.raw"}),
        frozenset(OPENING | PUBLISHING | {"image_read", "backing_read", "backing_write", "punch"}),
    ),
    "commit-stale": Operation(
        ("commit", "--jobs", "0", "top.add-cow"),
        stale_scene,
        committed,
        {"top.add-cow": "." * 6},
        frozenset({"base.img", "top.add-cow", "top.raw"}),
        frozenset(
            OPENING
            | PUBLISHING
            | {"header_write", "image_read", "backing_read", "backing_write", "punch"}
        ),
    ),
    "commit-below": Operation(
        ("commit", "--jobs", "0", "top.add-cow"),
        below_scene,
        committed_below,
        {"top.add-cow": "." * 12, "mid.add-cow": "111."},
        frozenset({"mid.add-cow", "mid.raw", "top.add-cow", "top.raw"}),
        frozenset(
            OPENING
            | PUBLISHING
            | {"image_read", "backing_read", "backing_write", "cow_read", "cow_write", "punch"}
        ),
    ),
    "commit-into": Operation(
        ("commit", "-b", "base.img", "--jobs", "0", "top.add-cow"),
        tower_scene,
        committed,
        {"top.add-cow": "1....1.1", "mid.add-cow": "1...1...", "low.add-cow": "1..111.1"},
        frozenset({"base.img", "low.add-cow", "low.raw"}),
        frozenset(OPENING | PUBLISHING | {"image_read", "backing_read", "backing_write", "punch"}),
    ),
    "commit-into-below": Operation(
        ("commit", "-b", "mid.add-cow", "--jobs", "0", "top.add-cow"),
        tower_below_scene,
        committed_below,
        {"over.add-cow": "..1..1..11..", "mid.add-cow": "111."},
        frozenset({"mid.add-cow", "mid.raw", "over.add-cow", "over.raw"}),
        frozenset(
            OPENING
            | PUBLISHING
            | {"image_read", "backing_read", "backing_write", "cow_read", "cow_write"}
        ),
    ),
    "commit-into-verify": Operation(
        ("commit", "-b", "base.img", "--verify", "--jobs", "0", "top.add-cow"),
        tower_scene,
        committed,
        {"top.add-cow": "1....1.1", "mid.add-cow": "1...1...", "low.add-cow": "1..111.1"},
        frozenset({"base.img", "low.add-cow", "low.raw"}),
        frozenset(
            OPENING
            | PUBLISHING
            | {"image_read", "backing_read", "backing_write", "punch", "read_back"}
        ),
    ),
    "flatten": Operation(
        ("flatten", "--jobs", "0", "top.add-cow"),
        flatten_scene,
        flattened,
        {"top.add-cow": "1" * 10},
        frozenset({"top.add-cow", "top.raw"}),
        frozenset(OPENING | PUBLISHING | {"header_write", "backing_read", "image_write", "punch"}),
    ),
    "discard": Operation(
        ("flatten", "--discard", "--jobs", "0", "top.add-cow"),
        flatten_scene,
        discarded,
        {},
        frozenset({"top.add-cow", "top.raw"}),
        frozenset(
            OPENING
            | PUBLISHING
            | {"header_write", "backing_read", "image_write", "punch", "discard"}
            | {"directory_sync"}
        ),
    ),
    "discard-tail": Operation(
        ("flatten", "--discard", "--jobs", "0", "top.add-cow"),
        tail_scene,
        discarded,
        {},
        frozenset({"top.add-cow", "top.raw"}),
        frozenset(
            OPENING
            | PUBLISHING
            | {"header_write", "backing_read", "image_write", "punch", "image_cut", "discard"}
            | {"directory_sync"}
        ),
    ),
    "rebase": Operation(
        ("rebase", "--jobs", "0", "-b", "new.img", "top.add-cow"),
        rebasing_scene,
        unchanged,
        {"top.add-cow": ".11..11111"},
        frozenset({"top.add-cow", "top.raw"}),
        frozenset(
            OPENING
            | PUBLISHING
            | {"header_write", "backing_read", "image_write", "punch", "directory_sync"}
        ),
        at_once=True,
    ),
    "rebase-none": Operation(
        ("rebase", "--jobs", "0", "-b", "", "top.add-cow"),
        rebasing_scene,
        unchanged,
        {"top.add-cow": "1" * 10},
        frozenset({"top.add-cow", "top.raw"}),
        frozenset(OPENING | PUBLISHING | {"header_write", "backing_read", "image_write", "punch"}),
        at_once=True,
    ),
    "rebase-unsafe": Operation(
        ("rebase", "-u", "-b", "new.img", "top.add-cow"),
        rebasing_scene,
        renamed,
        {"top.add-cow": ".11....1.."},
        frozenset({"top.add-cow"}),
        frozenset(OPENING | {"header_write", "bitmap_sync", "backing_read"}),
        at_once=True,
    ),
    "commit-verify": Operation(
        ("commit", "--verify", "--jobs", "0", "top.add-cow"),
        commit_scene,
        committed,
        {"top.add-cow": "." * 10},
        frozenset({"base.img", "top.add-cow", "top.raw"}),
        frozenset(
            OPENING
            | PUBLISHING
            | {"image_read", "backing_read", "backing_write", "punch", "read_back"}
        ),
    ),
    "discard-verify": Operation(
        ("flatten", "--verify", "--discard", "--jobs", "0", "top.add-cow"),
        flatten_scene,
        discarded,
        {},
        frozenset({"top.add-cow", "top.raw"}),
        frozenset(
            OPENING
            | PUBLISHING
            | {"header_write", "image_read", "backing_read", "image_write", "punch", "discard"}
            | {"directory_sync", "read_back"}
        ),
    ),
    "io": Operation(
        (
            *("io", "-c", "write -P 0x58 6k 8k", "-c", "flush", "-c", "write -P 0x59 17k 2k"),
            *("-c", "write -z 30k 6k", "-c", "flush", "top.add-cow"),
        ),
        flatten_scene,
        written,
        {"top.add-cow": ".1111..11."},
        frozenset({"top.add-cow", "top.raw"}),
        frozenset(
            OPENING
            | (PUBLISHING - {"publish"})
            | {"backing_read", "cow_read", "cow_write", "image_write", "punch"}
        ),
    ),
    "grow": Operation(
        ("resize", "top.add-cow", "48k"),
        growing_scene,
        grown,
        {"top.add-cow": ".11....11111"},
        frozenset({"top.add-cow", "top.raw"}),
        frozenset(RESIZING | {"backing_read", "cow_read", "cow_write", "image_write", "punch"}),
        at_once=True,
    ),
    "grow-stray": Operation(
        ("resize", "top.add-cow", "48k"),
        stray_scene,
        grown,
        {"top.add-cow": ".11....11111"},
        frozenset({"top.add-cow", "top.raw"}),
        frozenset(RESIZING | {"backing_read", "cow_read", "cow_write", "image_write", "punch"}),
        at_once=True,
    ),
    "shrink": Operation(
        ("resize", "--shrink", "top.add-cow", str(5 * CLUSTER - SECTOR)),
        shrinking_scene,
        shrunk,
        {"top.add-cow": ".11.1"},
        frozenset({"top.add-cow", "top.raw"}),
        frozenset(OPENING | {"image_cut", "data_sync", "bitmap_sync"}),
        at_once=True,
    ),
    "convert": Operation(
        ("convert", "-O", "raw", "--jobs", "0", "top.add-cow", "new.raw"),
        flatten_scene,
        converted,
        {},
        frozenset(),
        frozenset(
            OPENING
            | {"create", "image_read", "backing_read", "target_write", "data_sync", "publish"}
            | {"directory_sync"}
        ),
        makes=frozenset({"new.raw"}),
    ),
}

# ---- faults ----

FIRST, EVERY = "at the first time", "at every time"

#: Which way a rule strikes, and at which times each is tried: what a fault leaves behind
#: depends on where it strikes, while its kind is told apart in few places.
FAULTS: dict[str, tuple[str, dict[str, int | str]]] = {
    "EIO": (EVERY, {"errno": errno.EIO, "once": "on"}),
    "kill": (EVERY, {"action": "kill", "once": "on"}),
    "short": (EVERY, {"action": "short", "errno": errno.ENOSPC, "once": "on"}),
    "ENOSPC": (FIRST, {"errno": errno.ENOSPC, "once": "on"}),
    "stop": (FIRST, {"action": "stop", "once": "on"}),
    "for good": (FIRST, {"errno": errno.EIO}),
}


def strikes(event: str, fault: str) -> bool:
    """Say whether a fault is more at this event than another one that is tried there."""
    cut = event.endswith(("_read", "_write")) and not event.startswith("cow_")
    return fault != "short" or cut


WALKS = [
    (name, event, fault)
    for name, operation in OPERATIONS.items()
    for event in EVENTS
    for fault in FAULTS
    if event in operation.meets and strikes(event, fault)
]


@dataclass(frozen=True)
class Scene:
    """The files of one operation before it, and what they are to become."""

    here: Path
    operation: Operation
    digests: dict[str, str]
    times: dict[str, int]
    sizes: dict[str, int]
    views: dict[str, bytes]
    becomes: dict[str, bytes | None]

    @classmethod
    def lay(cls, here: Path, operation: Operation) -> Scene:
        """Make the files again."""
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir()
        beside(here)
        operation.build(here)
        names = sorted(os.listdir(here))
        states = {name: (here / name).stat() for name in names}
        becomes = operation.becomes(here)
        return cls(
            here,
            operation,
            snapshot(here),
            {name: state.st_mtime_ns for name, state in states.items()},
            {name: state.st_size for name, state in states.items()},
            {name: view(here / name) for name in names if name.endswith("add-cow")}
            | {name: view(here / name) for name in becomes if name in names},
            becomes,
        )

    def holds(self, *, made: bool) -> None:
        """Assert what holds at any moment; new files may be there only if `made`."""
        self._nothing_lost(made=made)
        self._others_untouched()
        for name, before in self.views.items():
            if not (self.here / name).exists():
                self._is_finished(name)  # it went because it was not needed any more
            elif name in self.operation.touches:
                after = self.becomes.get(name, before)
                if self.operation.at_once:
                    assert view(self.here / name) in (before, after)
                between(before, view(self.here / name), before if after is None else after)

    def _nothing_lost(self, *, made: bool) -> None:
        now = set(os.listdir(self.here))
        gone = {name for name, content in self.becomes.items() if content is None}
        assert set(self.sizes) - gone <= now
        assert now <= set(self.sizes) | (self.operation.makes if made else set())
        for name in now & set(self.sizes):
            wanted = self.becomes.get(name)
            least = self.sizes[name] if wanted is None else min(self.sizes[name], len(wanted))
            assert (self.here / name).stat().st_size >= least, f"{name} was shortened"

    def _others_untouched(self) -> None:
        now = snapshot(self.here)
        for name in set(self.sizes) - self.operation.touches:
            assert now[name] == self.digests[name], f"{name} was changed"
            assert (self.here / name).stat().st_mtime_ns == self.times[name], f"{name} was written"

    def _is_finished(self, name: str) -> None:
        assert self.becomes[name] is None
        self.is_done()

    def is_done(self) -> None:
        """Assert the right end: every byte, every bit, every freed cluster."""
        for name, content in self.becomes.items():
            if content is None:
                assert not (self.here / name).exists()
            else:
                assert view(self.here / name) == content, f"{name} is not as it should be"
        for name, picture in self.operation.bits.items():
            assert bits(self.here / name) == picture
            if picture == "." * len(picture):
                assert stored_bytes(self.here / "top.raw") == 0
        self._others_untouched()


def between(before: bytes, now: bytes, after: bytes) -> None:
    """Assert that each byte is an old one or a new one; what is missing yet reads as zeros."""
    length = max(len(before), len(after))
    assert min(len(before), len(after)) <= len(now) <= length
    before, now, after = (part.ljust(length, b"\0") for part in (before, now, after))
    for at in range(0, length, SECTOR):
        sector = slice(at, at + SECTOR)
        if now[sector] not in (before[sector], after[sector]):
            rows = zip(before[sector], now[sector], after[sector], strict=True)
            assert all(is_ in (old, new) for old, is_, new in rows), f"at {at}: neither old nor new"


@pytest.mark.parametrize("name", OPERATIONS)
def test_fault_walk_covers_every_event_of_a_command(warm: Warm, tmp_path: Path, name: str) -> None:
    scene = Scene.lay(tmp_path / "here", OPERATIONS[name])
    met = events_met(warm, scene.here, tmp_path / "rules", *scene.operation.arguments)
    assert met == scene.operation.meets
    scene.is_done()


def events_met(warm: Warm, here: Path, rules: Path, *arguments: str) -> set[str]:
    """Run a command that stops at the first time of every event; return those it met."""
    written = Rules.write(rules, *(rule(event, "stop", once="on") for event in EVENTS))
    stops(warm, here, written, *arguments)
    return {EVENTS[number] for number in written.hits}


def stops(warm: Warm, here: Path, rules: Rules, *arguments: str) -> int:
    """Run a command to its end, letting it go on after every stop; return how many there were."""
    command, number = warm.start(*arguments, cwd=here, rules=rules), 0
    while (ended := command.wait()) is None:
        number += 1
        os.kill(command.pid, signal.SIGCONT)
    assert ended.status == 0, ended
    return number


class Times:
    """How often commands meet events; each is counted once."""

    def __init__(self, warm: Warm) -> None:
        self._warm = warm
        self._known: dict[tuple[str, str], int] = {}

    def of(self, name: str, event: str, arguments: tuple[str, ...], here: Path) -> int:
        """Return the number, running the command in `here` unless it is known."""
        if (name, event) not in self._known:
            rules = Rules.write(here.parent / "rules", rule(event, "stop"))
            self._known[name, event] = stops(self._warm, here, rules, *arguments)
        return self._known[name, event]


@pytest.fixture(scope="module")
def times(warm: Warm) -> Times:
    return Times(warm)


def test_every_fault_event_is_reached_by_some_command() -> None:
    walked = {event for _, event, _ in WALKS} | {event for _, event, _ in CREATE_WALKS}
    # test_qemu_lending walks the events of twins, test_reset that of a bitmap that is cut, and
    # test_manifest_follows those of manifests.
    elsewhere = {"twin_write", "twin_link", "twin_unlink", "bitmap_cut"}
    elsewhere |= {"manifest_remove", "manifest_write", "manifest_rename"}
    assert walked | elsewhere == set(EVENTS)


@pytest.mark.sample(16)
@pytest.mark.parametrize(("name", "event", "fault"), WALKS)
def test_command_continues_after_a_fault_at_any_event(
    warm: Warm, times: Times, tmp_path: Path, name: str, event: str, fault: str
) -> None:
    here, operation = tmp_path / "here", OPERATIONS[name]
    which, words = FAULTS[fault]
    Scene.lay(here, operation)
    number = times.of(name, event, operation.arguments, here)
    for after in range(1 if which == FIRST else number):
        scene = Scene.lay(here, operation)
        rules = Rules.write(tmp_path / "rules", rule(event, after=after, **words))
        command = warm.start(*operation.arguments, cwd=here, rules=rules)
        ended = command.wait()
        if ended is None:
            scene.holds(made=True)
            os.kill(command.pid, signal.SIGCONT)
            succeeds(command.end(), scene)
        else:
            fails(ended, scene, killed=fault == "kill")
            go_on(warm, scene)


def succeeds(ended: Ended, scene: Scene) -> None:
    """Assert that a command has done all that it is for, without a word of complaint."""
    assert (ended.status, ended.stderr) == (0, "")
    scene.is_done()


def fails(ended: Ended, scene: Scene, *, killed: bool) -> None:
    """Assert that a command met its fault, and what holds then."""
    if killed:
        assert (ended.status, ended.stderr) == (-signal.SIGKILL, "")
    else:
        says_so(ended, scene)
    scene.holds(made=killed)


def says_so(ended: Ended, scene: Scene) -> None:
    """Assert one line that names a file and ends the command with status 1.

    The commands of `io` go on after one of them has failed to write, which each says itself.
    """
    assert ended.status == 1, ended
    if "write failed: " in ended.stdout and not ended.stderr:
        return
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended
    assert lines[0].startswith("addcow: ")
    directory = (f"{scene.here}: ", "addcow: .: ")
    assert any(name in lines[0] for name in (*scene.sizes, *scene.operation.makes, *directory))


def go_on(warm: Warm, scene: Scene) -> None:
    """Run the command again, without the fault: it does what is left to be done."""
    if snapshot(scene.here) == scene.digests:
        return  # it left all as it was: what the command makes of that is known
    if any(not (scene.here / n).exists() for n, c in scene.becomes.items() if c is None):
        scene.is_done()  # nothing is left to be done
        return
    for leftover in scene.operation.makes & set(os.listdir(scene.here)):
        in_the_way(warm, scene, leftover)
    succeeds(warm.run(*scene.operation.arguments, cwd=scene.here), scene)


def in_the_way(warm: Warm, scene: Scene, leftover: str) -> None:
    """A killed command could not clean up; the next one says what it has left."""
    ended = warm.run(*scene.operation.arguments, cwd=scene.here)
    assert ended.status == 1, ended
    assert f"{leftover}: it exists already" in ended.stderr
    (scene.here / leftover).unlink()


# ---- create: nothing is left behind, nothing that exists is harmed ----


@dataclass(frozen=True)
class Creation:
    """A way to create an overlay: its files, and the picture of what its guest sees."""

    arguments: tuple[str, ...]
    build: Callable[[Path], None]
    shows: str
    meets: frozenset[str]


MAKING = {"header_write", "bitmap_grow", "bitmap_sync", "data_sync", "create", "directory_sync"}

#: The first bytes of a file that is to be taken as raw are looked at.
LOOKING = {"backing_read", "image_read"}


def two_layers(here: Path) -> None:
    draw_raw(here / "base.img", "ABC-EF", cluster=CLUSTER)
    draw(here / "mid.add-cow", "-X----", cluster=CLUSTER)


def image_is_there(here: Path) -> None:
    draw_raw(here / "base.img", "ABC-EF", cluster=CLUSTER)
    draw_raw(here / "old.raw", "K-LM", cluster=CLUSTER)


ON_OLD = ("-o", "cluster_size=4k,image_file=old.raw", "new.add-cow", "32k")

CREATIONS = {
    "new image": Creation(
        ("create", "-b", "mid.add-cow", "-F", "add-cow", "-o", "cluster_size=4k", "new.add-cow"),
        two_layers,
        "AXC0EF",
        frozenset(MAKING | OPENING | LOOKING),
    ),
    "snapshot": Creation(
        ("snapshot", "mid.add-cow", "new.add-cow"),
        two_layers,
        "AXC0EF",
        frozenset(MAKING | OPENING | LOOKING),
    ),
    "old image": Creation(
        ("create", "-b", "base.img", "-F", "raw", *ON_OLD),
        image_is_there,
        "ABC0EF00",
        frozenset(MAKING | LOOKING),
    ),
    "no backing": Creation(
        ("create", *ON_OLD),
        image_is_there,
        "K0LM0000",
        frozenset(MAKING | {"image_read"}),
    ),
}

CREATE_WALKS = [
    (name, event, fault)
    for name, creation in CREATIONS.items()
    for event in EVENTS
    for fault in FAULTS
    if event in creation.meets and strikes(event, fault)
]


@pytest.mark.parametrize("name", CREATIONS)
def test_fault_walk_covers_every_event_of_create(warm: Warm, tmp_path: Path, name: str) -> None:
    creation, here = CREATIONS[name], tmp_path / "here"
    begin(here, creation)
    assert events_met(warm, here, tmp_path / "rules", *creation.arguments) == creation.meets
    is_created(here, creation)


def begin(here: Path, creation: Creation) -> Contents:
    """Make the files again and return what they hold."""
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    creation.build(here)
    return contents(here)


def is_created(here: Path, creation: Creation) -> None:
    """Assert that the new overlay shows what it should, and owns nothing yet."""
    new = here / "new.add-cow"
    assert guest_picture(new, CLUSTER) == creation.shows
    assert view(new) == guest(new, 0, len(creation.shows) * CLUSTER)
    assert local_clusters(new) == []
    header = read_header(new)
    assert (header.cluster, header.header_size) == (CLUSTER, 4 * KiB)
    assert header.compatible == (0 if header.backing else ALL_ALLOCATED)


@pytest.mark.sample(6)
@pytest.mark.parametrize(("name", "event", "fault"), CREATE_WALKS)
def test_fault_in_create_leaves_no_misleading_file(
    warm: Warm, times: Times, tmp_path: Path, name: str, event: str, fault: str
) -> None:
    creation, here = CREATIONS[name], tmp_path / "here"
    which, words = FAULTS[fault]
    begin(here, creation)
    number = times.of(name, event, creation.arguments, here)
    for after in range(1 if which == FIRST else number):
        before = begin(here, creation)
        rules = Rules.write(tmp_path / "rules", rule(event, after=after, **words))
        command = warm.start(*creation.arguments, cwd=here, rules=rules)
        ended = command.wait()
        no_harm(here, before)
        if ended is None:
            os.kill(command.pid, signal.SIGCONT)
            assert command.end().status == 0
            is_created(here, creation)
        elif fault == "kill":
            assert ended.status == -signal.SIGKILL, ended
            create_again(warm, here, creation)
        else:
            refused_in_one_line(ended)
            assert contents(here) == before, "something was left behind"


def refused_in_one_line(ended: Ended) -> str:
    """Assert status 1 and one line, which is returned."""
    assert ended.status == 1, ended
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended
    assert lines[0].startswith("addcow: "), ended
    return lines[0]


def no_harm(here: Path, before: Contents) -> None:
    """Assert that every file that was there still begins with all that it held."""
    for name, content in before.items():
        assert (here / name).read_bytes()[: len(content)] == content, name
    assert set(os.listdir(here)) <= {*before, "new.add-cow", "new.raw"}


def contents(here: Path) -> Contents:
    """Return the bytes of every file."""
    return {name: (here / name).read_bytes() for name in os.listdir(here)}


def create_again(warm: Warm, here: Path, creation: Creation) -> None:
    """A half-made overlay is none to any command; the next create works, or names it."""
    left = here / "new.add-cow"
    if left.exists():
        is_whole = warm.run("map", left.name, cwd=here).status == 0
        if is_whole:
            is_created(here, creation)
        ended = warm.run(*creation.arguments, cwd=here)
        assert left.name in refused_in_one_line(ended)
        left.unlink()
    ended = warm.run(*creation.arguments, cwd=here)
    assert ended.status == 0, ended
    is_created(here, creation)


def test_failed_create_restores_the_length_of_the_disk(warm: Warm, tmp_path: Path) -> None:
    """No view has the bytes after the last whole sector, but a user may need them."""
    draw_raw(tmp_path / "base.img", "AB", cluster=CLUSTER)
    (tmp_path / "old.raw").write_bytes(b"K" * 1000)
    rules = Rules.write(tmp_path / "rules", rule("bitmap_sync"))
    words = (
        *["create", "-b", "base.img", "-F", "raw", "-o", "image_file=old.raw", "new.add-cow"],
        "64k",
    )
    refused_in_one_line(warm.run(*words, cwd=tmp_path, rules=rules))
    assert (tmp_path / "old.raw").read_bytes() == b"K" * 1000


# ---- a sync that fails ----


@pytest.mark.parametrize("name", ["commit", "commit-stale", "commit-below", "flatten", "discard"])
def test_failed_sync_of_data_publishes_nothing(warm: Warm, tmp_path: Path, name: str) -> None:
    scene = Scene.lay(tmp_path / "here", OPERATIONS[name])
    stored = stored_bytes(scene.here / "top.raw")
    # With ALL_ALLOCATED, commit first replaces the flag by bits, which needs no data.
    prepared = [".1111111"] if name == "commit-stale" else []
    bitmaps = {cow: cow.read_bytes() for cow in scene.here.glob("*.add-cow")}
    rules = Rules.write(tmp_path / "rules", rule("data_sync", once="on"))
    ended = warm.run(*scene.operation.arguments, cwd=scene.here, rules=rules)
    said = refused_in_one_line(ended)
    target = {"commit-below": "mid.raw"}.get(name, "base.img" if "commit" in name else "top.raw")
    assert f"{target}: cannot make its data durable: Input/output error" in said
    assert "nothing of this step was published" in said
    for cow, content in bitmaps.items():
        assert prepared or cow.read_bytes() == content, f"{cow.name} was published to"
    if "commit" in name:
        assert stored_bytes(scene.here / "top.raw") == stored, "space was freed"
    scene.holds(made=False)


def test_failed_sync_of_bits_frees_nothing(warm: Warm, tmp_path: Path) -> None:
    scene = Scene.lay(tmp_path / "here", OPERATIONS["commit"])
    image = (scene.here / "top.raw").read_bytes()
    rules = Rules.write(tmp_path / "rules", rule("bitmap_sync", once="on"))
    said = refused_in_one_line(warm.run(*scene.operation.arguments, cwd=scene.here, rules=rules))
    assert "top.add-cow: cannot make its data durable" in said
    assert (scene.here / "top.raw").read_bytes() == image
    go_on(warm, scene)


def test_failed_sync_of_the_backings_bits_keeps_the_overlays_bits(
    warm: Warm, tmp_path: Path
) -> None:
    scene = Scene.lay(tmp_path / "here", OPERATIONS["commit-below"])
    kept = {name: (scene.here / name).read_bytes() for name in ("top.add-cow", "top.raw")}
    rules = Rules.write(tmp_path / "rules", rule("bitmap_sync", once="on"))
    said = refused_in_one_line(warm.run(*scene.operation.arguments, cwd=scene.here, rules=rules))
    assert "mid.add-cow: cannot make its data durable" in said
    assert {name: (scene.here / name).read_bytes() for name in kept} == kept
    go_on(warm, scene)


def test_failed_sync_of_bits_does_not_set_all_allocated(warm: Warm, tmp_path: Path) -> None:
    scene = Scene.lay(tmp_path / "here", OPERATIONS["discard"])
    header = (scene.here / "top.add-cow").read_bytes()[: 4 * KiB]
    rules = Rules.write(tmp_path / "rules", rule("bitmap_sync", once="on"))
    said = refused_in_one_line(warm.run(*scene.operation.arguments, cwd=scene.here, rules=rules))
    assert "top.add-cow: cannot make its data durable" in said
    assert (scene.here / "top.add-cow").read_bytes()[: 4 * KiB] == header
    go_on(warm, scene)


@pytest.mark.parametrize("event", ["data_sync", "bitmap_sync"])
@pytest.mark.parametrize("action", ["error", "kill"])
def test_flushed_data_stays_when_the_next_flush_fails(
    warm: Warm, tmp_path: Path, event: str, action: str
) -> None:
    scene = Scene.lay(tmp_path / "here", OPERATIONS["io"])
    rules = Rules.write(tmp_path / "rules", rule(event, action, after=1, once="on"))
    ended = warm.run(*scene.operation.arguments, cwd=scene.here, rules=rules)
    assert ended.status == (1 if action == "error" else -signal.SIGKILL), ended
    top = scene.here / "top.add-cow"
    assert view(top)[6 * KiB : 14 * KiB] == b"\x58" * 8 * KiB
    assert {1, 2, 3} <= set(local_clusters(top))
    if event == "data_sync":
        # Cluster 7 was allocated: what is written there is there at once, as in a raw disk.
        assert bits(top) == ".111...1.."
        assert view(top)[14 * KiB : 28 * KiB] == scene.views[top.name][14 * KiB : 28 * KiB]
        assert view(top)[32 * KiB :] == scene.views[top.name][32 * KiB :]


# ---- the same with workers ----

IN_A_WORKER = [
    ("commit", "image_read", "top.raw"),
    ("commit", "backing_write", "base.img"),
    ("commit-below", "cow_write", "mid.raw"),
    ("flatten", "backing_read", "base.img"),
    ("flatten", "image_write", "top.raw"),
    ("convert", "target_write", "new.raw"),
]
IN_THE_PARENT = ["data_sync", "publish", "bitmap_update", "bitmap_sync", "punch"]


def with_workers(name: str) -> Operation:
    """Return the operation with two processes."""
    one = OPERATIONS[name]
    words = ["2" if before == "--jobs" else word for before, word in pairs(one.arguments)]
    return replace(one, arguments=tuple(words))


def pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each word with the one before it."""
    return zip(("", *words), words, strict=False)


@pytest.mark.parametrize(("name", "event", "file"), IN_A_WORKER)
def test_worker_error_names_the_cluster(
    warm: Warm, tmp_path: Path, name: str, event: str, file: str
) -> None:
    scene = Scene.lay(tmp_path / "here", with_workers(name))
    rules = Rules.write(tmp_path / "rules", rule(event, once="on"))
    said = refused_in_one_line(warm.run(*scene.operation.arguments, cwd=scene.here, rules=rules))
    clusters = len(view(scene.here / "top.add-cow")) // CLUSTER
    assert f"top.add-cow: clusters 0 to {clusters - 1}: " in said
    assert f"{file}: " in said
    assert said.endswith(": Input/output error")
    scene.holds(made=False)
    go_on(warm, scene)


@pytest.mark.parametrize(("name", "event"), [one[:2] for one in IN_A_WORKER])
def test_job_survives_a_worker_killed_at_any_event(
    warm: Warm, tmp_path: Path, name: str, event: str
) -> None:
    scene = Scene.lay(tmp_path / "here", with_workers(name))
    rules = Rules.write(tmp_path / "rules", rule(event, "kill", once="on"))
    ended = warm.run(*scene.operation.arguments, cwd=scene.here, rules=rules)
    assert rules.struck
    assert (ended.status, ended.stderr) == (0, "")
    scene.is_done()


@pytest.mark.long
@pytest.mark.parametrize("event", IN_THE_PARENT)
@pytest.mark.parametrize("fault", ["EIO", "kill"])
def test_fault_in_the_parent_while_it_publishes(
    warm: Warm, tmp_path: Path, event: str, fault: str
) -> None:
    scene = Scene.lay(tmp_path / "here", with_workers("commit"))
    rules = Rules.write(tmp_path / "rules", rule(event, **FAULTS[fault][1]))
    ended = warm.run(*scene.operation.arguments, cwd=scene.here, rules=rules)
    fails(ended, scene, killed=fault == "kill")
    go_on(warm, scene)


# ---- rule files ----

BAD_RULES = {
    "unknown event": rule("image_wrote"),
    "unknown action": rule("image_write", "explode"),
    "unknown word": rule("image_write", often="yes"),
    "no event": '[inject-error]\naction = "kill"\n',
    "a name for a number": rule("image_write", errno="EIO"),
    "a fraction": rule("image_write", after="1.5"),
    "a cluster that is none": rule("image_write", cluster="first"),
    "a word twice": rule("image_write") + 'event = "punch"\n',
    "no words": "[inject-error]\nimage_write\n",
    "another section": "[inject_error]\nevent = punch\n",
    "no section": "event = punch\n",
    "not on or off": rule("image_write", once="maybe"),
    "no text": "[inject-error]\nevent = \udcff\udcfe\n",
}


@pytest.mark.parametrize("content", BAD_RULES.values(), ids=BAD_RULES)
def test_invalid_rule_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    draw_raw(tmp_path / "base.img", "A")
    draw(tmp_path / "top.add-cow", "X")
    path = tmp_path / "rules"
    path.write_bytes(content.encode(errors="surrogateescape"))
    monkeypatch.setenv("ADDCOW_FAULTS", str(path))
    before = snapshot(tmp_path)
    refused("commit", "top.add-cow", cwd=tmp_path, status=USAGE)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_unreadable_rule_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    draw_raw(tmp_path / "base.img", "A")
    draw(tmp_path / "top.add-cow", "X")
    monkeypatch.setenv("ADDCOW_FAULTS", str(tmp_path / name))
    assert str(tmp_path / name) in refused("commit", "top.add-cow", cwd=tmp_path, status=USAGE)


def test_rules_count_and_choose_clusters(warm: Warm, tmp_path: Path) -> None:
    """`after` lets events go by, `cluster` lets other places go by, `once` lets later ones."""
    scene = Scene.lay(tmp_path / "here", OPERATIONS["io"])
    rules = Rules.write(
        tmp_path / "rules",
        rule("image_write", cluster=5, errno=errno.ENOSPC, once="on"),
        rule("image_write", after=2, errno=errno.EFBIG),
    )
    commands = [f"write -P 1 {4 * cluster}k 4k" for cluster in (0, 5, 5, 6, 8)]
    words = [word for command in commands for word in ("-c", command)]
    ended = warm.run("io", *words, "top.add-cow", cwd=scene.here, rules=rules)
    told = [line for line in ended.stdout.splitlines() if "ops/sec" not in line]
    assert told == [
        "wrote 4096/4096 bytes at offset 0",
        "write failed: No space left on device",
        "wrote 4096/4096 bytes at offset 20480",
        "write failed: File too large",
        "write failed: File too large",
    ]
    assert local_clusters(scene.here / "top.add-cow") == [0, 1, 2, 5, 7]


def test_rules_count_clusters_of_the_overlay_in_every_file(warm: Warm, tmp_path: Path) -> None:
    scene = Scene.lay(tmp_path / "here", OPERATIONS["convert"])
    rules = Rules.write(tmp_path / "rules", rule("target_write", cluster=4))
    ended = warm.run(*scene.operation.arguments, cwd=scene.here, rules=rules)
    assert re.search(rf"new\.raw: cannot write.* at {4 * CLUSTER}: ", refused_in_one_line(ended))
