"""Tests of an interrupted `manifest create`: kills, errors, full disks, and several at a time.

The chain does not change, so its manifests are known. A manifest that exists after a kill or an
error must be complete. The same command makes the missing ones and leaves no other file. The last
part compares digests of guests with what `convert` writes, before and after jobs.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.command import (
    ALL_ALLOCATED,
    CLUSTER,
    KiB,
    MiB,
    addcow,
    draw,
    draw_raw,
    overlay_bytes,
    ran,
    read_header,
    snapshot,
    succeed,
    virtual_size,
)
from support.fault_rules import Rules, rule, rules_for
from support.file_systems import disks, fill, mounted, remount
from support.manifests import (
    WIDE,
    Layers,
    form,
    kind,
    made,
    one_line,
    verified,
    write_sparse,
)
from support.page_cache import uncache
from support.processes import Ended, Job, memory_of, running
from support.warm import Warm

pytestmark = pytest.mark.sample(1)

BOTH = pytest.mark.parametrize("jobs", ["0", "2"])

CREATE = ("manifest", "create")


@pytest.fixture
def here(clean_here: Path) -> Path:
    return clean_here


# ---- chains whose manifests are known ----


@dataclass(frozen=True)
class Chain:
    """A chain, the whole manifests that belong to its layers, and all else that is there."""

    here: Path
    top: str
    whole: dict[str, bytes]
    rest: dict[str, str]

    @classmethod
    def of(cls, here: Path, top: str) -> Chain:
        """The chain of these files: manifests are made, remembered and taken away."""
        made(here, "--jobs", "0", *kind(top), name=top)
        whole = {path.name: path.read_bytes() for path in sorted(here.glob("*.manifest"))}
        for name in whole:
            (here / name).unlink()
        return cls(here, top, whole, state_of(here))

    @property
    def words(self) -> tuple[str, ...]:
        """The command that makes the manifests, but for options."""
        return (*CREATE, *kind(self.top), self.top)

    def present(self) -> set[str]:
        """The manifests that are there; each has to be whole, and nothing else was changed."""
        state = state_of(self.here)
        drafts = {f"{name}.part" for name in self.whole}
        assert {n: d for n, d in state.items() if n not in drafts | self.whole.keys()} == self.rest
        found = {name for name in self.whole if name in state}
        torn = [name for name in found if (self.here / name).read_bytes() != self.whole[name]]
        assert torn == []
        return found

    def drafts(self) -> list[str]:
        """What is left of manifests that were not finished."""
        return [path.name for path in self.here.glob("*.part")]

    def holds(self) -> None:
        """Assert that what is there is whole, and that verify sees just what is missing."""
        missing = self.whole.keys() - self.present()
        told = verified(
            self.here, "--jobs", "0", *kind(self.top), name=self.top, status=1 if missing else 0
        )
        assert {(one["name"], one["file"]) for one in told["findings"]} == {
            ("no-manifest", name.removesuffix(".manifest")) for name in missing
        }
        assert told["ranges"] == []

    def again(self, *words: str) -> None:
        """Run the same command once more to its end; it keeps what is there and makes the rest."""
        before = self.present()
        told = made(self.here, *words, *kind(self.top), name=self.top)
        assert {name for name, one in told.items() if not one["written"]} == before
        self.is_done()

    def is_done(self) -> None:
        """Assert that all manifests are there, and no drafts."""
        assert self.present() == set(self.whole)
        assert self.drafts() == []
        self.holds()

    def clear(self) -> None:
        """Take away what a command has made."""
        for path in [*self.here.glob("*.manifest"), *self.here.glob("*.part")]:
            path.unlink()


def state_of(here: Path) -> dict[str, str]:
    """Say what must not change: all bytes; of a wide file times, because that many take long."""
    if any(path.stat().st_size >= WIDE for path in here.iterdir()):
        found = ((path.name, path.stat()) for path in here.iterdir())
        return {n: f"{s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}" for n, s in found}
    return snapshot(here)


def three(here: Path) -> Chain:
    """A base and two overlays, with a cluster of each kind over each kind."""
    draw_raw(here / "base.img", "ABCDEFGH-0" * 3)
    draw(here / "mid.add-cow", "-X-Y-0x-XY" * 3)
    draw(here / "top.add-cow", "P--Q--R-y-" * 3, "mid.add-cow", backing_format="add-cow")
    return Chain.of(here, "top.add-cow")


#: Where something is, in a wide file: 4 KiB of each MiB.
STEP = MiB


def wide(here: Path) -> Chain:
    """A base that is large enough for workers to be started, and has little data."""
    with (here / "base.img").open("wb") as file:
        for at in range(0, WIDE, STEP):
            file.seek(at)
            file.write(f"{at} ".encode().ljust(4 * KiB, b"."))
        file.truncate(WIDE)
    return Chain.of(here, "base.img")


# ---- kill -9, at every fault point ----

EVENTS = ["header_read", "bitmap_load", "image_read", "backing_read", "directory_sync"]
EACH = pytest.mark.parametrize("event", EVENTS)

#: More often than any of them is met in a small chain.
OFTEN = 200


def walk(chain: Chain, event: str, action: str, **more: int | str) -> Iterator[Rules]:
    """Rules that strike the first time, the second time...; the chain is cleared after each."""
    for number in range(OFTEN):
        # The last of them is not yet known to strike.
        yield rules_for(chain.here, rule(event, action, once="on", after=number, **more))
        chain.clear()
    pytest.fail("there is no end of it")


@EACH
def test_manifest_killed_while_written_is_never_used(here: Path, warm: Warm, event: str) -> None:
    chain, turns = three(here), 0
    for rules in walk(chain, event, "kill"):
        ended = warm.run(*chain.words, "--jobs", "0", cwd=here, rules=rules)
        if not rules.struck:
            assert ended.status == 0, ended
            break
        assert ended.status == -signal.SIGKILL
        turns += 1
        chain.present()
        if turns <= 3:
            chain.holds()
        ended = warm.run(*chain.words, "--jobs", "0", cwd=here)
        assert ended.status == 0, ended
        assert chain.present() == set(chain.whole)
        assert chain.drafts() == []
    assert turns >= 2
    chain.is_done()


@pytest.mark.long
@BOTH
@EACH
def test_manifest_create_killed_while_reading_leaves_no_partial_manifest(
    here: Path, rng: random.Random, event: str, jobs: str
) -> None:
    """The same with the real command, which may have processes; once for each event."""
    chain = three(here)
    rules = rules_for(here, rule(event, "kill", once="on", after=rng.randrange(2)))
    with running(*chain.words, "--jobs", jobs, cwd=here, rules=rules) as command:
        assert command.end().status == -signal.SIGKILL
        command.all_gone()
    chain.holds()
    chain.again("--jobs", jobs)


@pytest.mark.long
@BOTH
def test_verify_sees_no_manifest_before_it_is_complete(here: Path, jobs: str) -> None:
    chain = three(here)
    rules = rules_for(here, rule("image_read", "stop", once="on"))
    with running(*chain.words, "--jobs", jobs, cwd=here, rules=rules) as command:
        stopped = command.stopped()
        assert "top.add-cow.manifest" not in chain.present()
        chain.holds()
        farm = addcow("farm", "verify", "--output", "json", ".", cwd=here)
        assert farm.status == 1
        assert farm.json["summary"]["unverified"] == 3 - len(chain.present())
        command.signal(signal.SIGCONT, *stopped)
        assert command.end().status == 0
    chain.is_done()


# ---- kill -9, when the draft is there or has grown ----


def length(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return -1


@pytest.mark.long
@BOTH
def test_manifest_create_killed_at_a_random_moment_continues(
    here: Path, rng: random.Random, jobs: str
) -> None:
    chain = wide(here)
    draft = here / "base.img.manifest.part"
    full = len(chain.whole["base.img.manifest"])
    for least in [0, 1, rng.randrange(1, full), rng.randrange(1, full), full]:
        chain.clear()
        with running(*chain.words, "--jobs", jobs, cwd=here) as command:
            command.until(
                lambda least=least: length(draft) >= least or command.has_ended,  # type: ignore[misc]
                "the draft to grow",
            )
            memory = memory_of(command)
            with suppress(ProcessLookupError):
                os.killpg(command.pid, signal.SIGKILL)
            command.all_gone()
        chain.holds()
        assert [name for name in memory if os.path.exists(name)] == []
    chain.again("--jobs", jobs)


@pytest.mark.long
def test_manifest_create_killed_with_its_workers_continues(here: Path, rng: random.Random) -> None:
    chain = wide(here)
    for _ in range(3):
        chain.clear()
        place = rng.randrange(WIDE // 2, WIDE) // STEP * STEP // CLUSTER
        rules = rules_for(here, rule("backing_read", "stop", once="on", cluster=place))
        with running(*chain.words, "--jobs", "2", cwd=here, rules=rules) as command:
            command.stopped()
            memory = memory_of(command)
            os.killpg(command.pid, signal.SIGKILL)
            command.all_gone()
        assert chain.present() == set()
        chain.again("--jobs", "2")
        assert [name for name in memory if os.path.exists(name)] == []


# ---- kill -9 of single processes ----


def stops(chain: Chain) -> Rules:
    """Rules that stop the first process at each of these places, once."""
    places = range(WIDE // 4, WIDE, WIDE // 64)
    sections = (rule("backing_read", "stop", once="on", cluster=at // CLUSTER) for at in places)
    return rules_for(chain.here, *sections)


def stopped_together(command: Job) -> int:
    """Let parent and worker both stop; returns the worker.

    A parent that stops before its worker has got something to do is let go on, to a further place.
    """
    found: list[int] = []

    def look() -> bool:
        assert not command.has_ended, command.stderr
        members = command.members()
        still = [one for one in members if one.state == "T"]
        found[:] = [one.pid for one in still if one.is_worker]
        parent = any(one.pid == command.pid for one in still)
        if parent and not found:
            command.signal(signal.SIGCONT)
            return False
        return parent

    command.until(look, "parent and worker to stop")
    return found[0]


def let_go_on(command: Job) -> bool:
    """Let all that have stopped go on; whether there was one."""
    still = [one.pid for one in command.members() if one.state == "T"]
    for pid in still:
        with suppress(ProcessLookupError):
            command.signal(signal.SIGCONT, pid)
    return bool(still)


def goes_to_its_end(command: Job) -> Ended:
    """Let it go on past all further places, to its end."""
    command.until(lambda: not let_go_on(command) and command.has_ended, "its end")
    return command.end()


@pytest.mark.long
def test_manifest_worker_ends_with_its_parent(here: Path) -> None:
    chain = wide(here)
    with running(*chain.words, "--jobs", "2", cwd=here, rules=stops(chain)) as command:
        stopped_together(command)
        memory = memory_of(command)
        command.signal(signal.SIGKILL)
        assert command.end().status == -signal.SIGKILL
        command.until(lambda: not let_go_on(command) and not command.members(), "all to end")
        assert command.stderr == ""
    assert chain.present() == set()
    chain.holds()
    chain.again("--jobs", "2")
    assert [name for name in memory if os.path.exists(name)] == []


@pytest.mark.long
def test_manifest_create_survives_a_killed_worker(here: Path) -> None:
    chain = wide(here)
    with running(*chain.words, "--jobs", "2", cwd=here, rules=stops(chain)) as command:
        command.signal(signal.SIGKILL, stopped_together(command))
        ended = goes_to_its_end(command)
        command.all_gone()
    assert (ended.status, ended.stderr) == (0, "")
    chain.is_done()


# ---- signals that ask ----


@BOTH
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_manifest_create_leaves_nothing(here: Path, jobs: str, number: int) -> None:
    chain = wide(here)
    rules = rules_for(here, rule("backing_read", "stop", once="on", cluster=WIDE // 2 // CLUSTER))
    with running(*chain.words, "--jobs", jobs, cwd=here, rules=rules) as command:
        command.stopped()
        os.killpg(command.pid, number)  # the way of Ctrl-C
        ended = goes_to_its_end(command)
        command.all_gone()
    assert ended.status == 128 + number
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("addcow: base.img: stopped")
    assert chain.present() == set()
    assert chain.drafts() == []
    chain.again("--jobs", jobs)


# ---- two processes at the same manifest ----


@contextmanager
def held_up(chain: Chain) -> Iterator[tuple[Job, int]]:
    """The command and a process of it, which has stopped while it wrote base.img.manifest."""
    rules = rules_for(chain.here, rule("backing_read", "stop", once="on"))
    with running(*chain.words, "--jobs", "0", cwd=chain.here, rules=rules) as command:
        (stopped,) = command.stopped()
        assert chain.drafts() == ["base.img.manifest.part"]
        yield command, stopped


def waits(command: Job) -> None:
    command.until(lambda: "waiting" in command.stderr, "it to say that it waits")
    command.until(command.is_round(), "it to look again")
    assert command.stderr.splitlines() == [
        "addcow: base.img.manifest: another process is writing it; waiting until that has ended"
    ]


BESIDE = (*CREATE, "--jobs", "0", "--output", "json", "mid.add-cow")


def written(ended: Ended) -> dict[str, bool]:
    told = json.loads(ended.stdout)
    return {one["filename"]: one["written"] for one in told["manifests"]}


@pytest.mark.long
def test_second_manifest_create_waits_and_uses_the_result(here: Path) -> None:
    chain = three(here)
    with held_up(chain) as (first, stopped), running(*BESIDE, cwd=here) as second:
        waits(second)
        first.signal(signal.SIGCONT, stopped)
        assert first.end().status == 0
        ended = second.end()
    assert ended.status == 0
    assert not written(ended)["base.img.manifest"]
    chain.is_done()


@pytest.mark.long
def test_second_manifest_create_takes_over_from_a_killed_one(here: Path) -> None:
    chain = three(here)
    with held_up(chain) as (first, stopped), running(*BESIDE, cwd=here) as second:
        waits(second)
        first.signal(signal.SIGKILL, stopped)
        first.all_gone()
        ended = second.end()
    assert ended.status == 0
    assert written(ended) == {"base.img.manifest": True, "mid.add-cow.manifest": True}
    chain.again("--jobs", "0")


@pytest.mark.long
def test_waiting_manifest_create_can_be_stopped(here: Path) -> None:
    chain = three(here)
    with held_up(chain) as (first, stopped), running(*BESIDE, cwd=here) as second:
        waits(second)
        second.signal(signal.SIGINT)
        ended = second.end()
        assert ended.status == 128 + signal.SIGINT
        assert ended.stderr.splitlines()[1:] == [
            "addcow: base.img: stopped; nothing was lost, the same command starts again"
        ]
        first.signal(signal.SIGCONT, stopped)
        assert first.end().status == 0
    chain.is_done()


@pytest.mark.long
def test_quiet_manifest_create_waits_without_a_message(here: Path) -> None:
    chain = three(here)
    with held_up(chain) as (first, stopped), running(*BESIDE, "-q", cwd=here) as second:
        second.until(lambda: sleeps(second), "it to wait")
        first.signal(signal.SIGCONT, stopped)
        assert (second.end().stderr, first.end().status) == ("", 0)
    chain.is_done()


def sleeps(command: Job) -> bool:
    """Whether the process lets time pass."""
    return "nanosleep" in Path(f"/proc/{command.pid}/wchan").read_text()


# ---- manifests that are replaced ----


@pytest.mark.long
@BOTH
@pytest.mark.parametrize("event", ["image_read", "backing_read", "directory_sync"])
def test_replace_keeps_the_old_manifest_until_the_new_one_is_complete(
    here: Path, rng: random.Random, event: str, jobs: str
) -> None:
    old = three(here)
    for name, content in old.whole.items():
        (here / name).write_bytes(content)
    for name in ("base.img", "mid.raw", "top.raw"):
        os.utime(here / name)  # of another state: their times have changed
    twin = here.parent / "new"
    twin.mkdir()
    rules = rules_for(here, rule(event, "kill", once="on", after=rng.randrange(3)))
    words = (*CREATE, "--replace", "--jobs", jobs, "top.add-cow")
    with running(*words, cwd=here, rules=rules) as command:
        assert command.end().status == -signal.SIGKILL
    cut = {name: (here / name).read_bytes() for name in old.whole}
    told = verified(here)  # none of them is missing, none is torn, and the content is the same
    assert {one["severity"] for one in told["findings"]} <= {"note"}
    succeed(*words, cwd=here)
    assert list(here.glob("*.part")) == []
    for name, content in cut.items():
        assert content in (old.whole[name], (here / name).read_bytes()), name
    assert verified(here)["findings"] == []


# ---- errors ----


ERRORS = ["header_read", "bitmap_load", "image_read", "backing_read"]


@pytest.mark.long
@pytest.mark.parametrize("event", ERRORS)
def test_manifest_create_names_an_unreadable_file(here: Path, warm: Warm, event: str) -> None:
    chain, turns = three(here), 0
    for rules in walk(chain, event, "error"):
        ended = warm.run(*chain.words, "--jobs", "0", cwd=here, rules=rules)
        if not rules.struck:
            break
        turns += 1
        line = one_line(ended)
        assert os.strerror(errno.EIO) in line
        assert re.search(r"(base|mid|top)\.(img|raw|add-cow): ", line), line
        assert ended.stdout == ""
        assert chain.drafts() == []
        missing = chain.whole.keys() - chain.present()
        assert missing, "it could not read and made all of them"
    assert turns >= 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("event", "name"), [("image_read", "top.raw"), ("backing_read", "base.img")]
)
@BOTH
def test_bad_sector_fails_only_its_layer(here: Path, event: str, name: str, jobs: str) -> None:
    chain = three(here)
    rules = rules_for(here, rule(event, cluster=20))  # P in top.raw, A in base.img
    if name == "top.raw":  # below, there is no such cluster
        for layer in ("base.img", "mid.add-cow"):
            made(here, *kind(layer), name=layer)
    with running(*chain.words, "--jobs", jobs, cwd=here, rules=rules) as command:
        line = one_line(command.end())
        command.all_gone()
    assert f"{name}: cannot read" in line
    read = re.search(r"cannot read (\d+) bytes at (\d+)", line)
    assert read
    assert 0 <= 20 * CLUSTER - int(read[2]) < int(read[1])
    chain.holds()
    below = {"base.img.manifest", "mid.add-cow.manifest"} if name == "top.raw" else set()
    assert chain.present() == below
    assert chain.drafts() == []
    chain.again("--jobs", jobs)


@pytest.mark.long
def test_bad_sector_in_a_worker_is_named(here: Path) -> None:
    chain = wide(here)
    place = (WIDE - 300 * MiB) // CLUSTER
    rules = rules_for(here, rule("backing_read", cluster=place))
    with running(*chain.words, "--jobs", "2", cwd=here, rules=rules) as command:
        line = one_line(command.end())
        command.all_gone()
    assert "base.img: cannot read" in line
    assert os.strerror(errno.EIO) in line
    assert (chain.present(), chain.drafts()) == (set(), [])
    chain.again("--jobs", "2")


@pytest.mark.long
def test_failed_sync_is_reported_and_leaves_whole_manifests(here: Path, warm: Warm) -> None:
    chain, turns = three(here), 0
    for rules in walk(chain, "directory_sync", "error"):
        ended = warm.run(*chain.words, "--jobs", "0", cwd=here, rules=rules)
        if not rules.struck:
            break
        turns += 1
        assert "it is there, and may be gone after a power cut" in one_line(ended)
        assert chain.drafts() == []
        chain.holds()
        chain.again("--jobs", "0")
    assert turns == len(chain.whole)


@pytest.mark.long
@BOTH
def test_shrinking_file_gets_no_manifest(here: Path, jobs: str) -> None:
    chain = wide(here)
    rules = rules_for(here, rule("backing_read", "stop", once="on", cluster=WIDE // 2 // CLUSTER))
    with running(*chain.words, "--jobs", jobs, cwd=here, rules=rules) as command:
        stopped = command.stopped()
        os.truncate(here / "base.img", WIDE // 2 - CLUSTER)
        command.signal(signal.SIGCONT, *stopped)
        line = one_line(command.end())
        command.all_gone()
    assert "base.img" in line
    assert {path.name for path in here.iterdir()} == {"base.img"}


# ---- no room, no right ----


def small(here: Path) -> Chain:
    draw_raw(here / "base.img", "A" * 12)
    draw(here / "top.add-cow", "-X" * 6)
    return Chain.of(here, "top.add-cow")


@pytest.mark.long
@BOTH
def test_full_disk_leaves_no_partial_manifest(disk: Path, jobs: str) -> None:
    chain = small(disk)
    filler = fill(disk)
    line = one_line(addcow(*chain.words, "--jobs", jobs, cwd=disk))
    assert "base.img.manifest" in line
    assert os.strerror(errno.ENOSPC) in line
    assert sorted(path.name for path in disk.glob("*.manifest*")) == []
    told = verified(disk, status=1)
    assert {one["name"] for one in told["findings"]} == {"no-manifest"}
    filler.unlink()
    chain.again("--jobs", jobs)


@pytest.mark.long
@pytest.mark.parametrize("leave", [4 * KiB, 8 * KiB, 12 * KiB])
def test_disk_that_fills_up_keeps_whole_manifests(disk: Path, leave: int) -> None:
    chain = small(disk)
    filler = fill(disk, leave=leave)
    line = one_line(addcow(*chain.words, cwd=disk))
    assert ".manifest" in line
    assert os.strerror(errno.ENOSPC) in line
    assert list(disk.glob("*.part")) == []
    for path in disk.glob("*.manifest"):
        assert path.read_bytes() == chain.whole[path.name]
    filler.unlink()
    chain.again()


@pytest.mark.long
def test_full_disk_keeps_the_old_manifest(disk: Path) -> None:
    chain = small(disk)
    made(disk)
    os.utime(disk / "base.img")
    os.utime(disk / "top.raw")
    filler = fill(disk)
    one_line(addcow(*CREATE, "--replace", "top.add-cow", cwd=disk))
    assert {name: (disk / name).read_bytes() for name in chain.whole} == chain.whole
    assert list(disk.glob("*.part")) == []
    verified(disk)
    filler.unlink()
    succeed(*CREATE, "--replace", "top.add-cow", cwd=disk)
    assert verified(disk)["findings"] == []


@pytest.mark.long
def test_read_only_file_system_is_named(tmp_path: Path) -> None:
    mount = mounted("tmpfs", tmp_path)
    with ExitStack() as stack:
        place = next(mount)
        stack.callback(lambda: next(mount, None))
        chain = small(place)
        remount(place, "ro")
        line = one_line(addcow(*chain.words, cwd=place))
        assert "base.img.manifest" in line
        assert os.strerror(errno.EROFS) in line
        assert chain.present() == set()
        assert {one["name"] for one in verified(place, status=1)["findings"]} == {"no-manifest"}
        remount(place, "rw")
        chain.again()
        remount(place, "ro")
        assert verified(place)["findings"] == []


@pytest.mark.long
def test_unwritable_directory_is_named(here: Path) -> None:
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed, and root writes everywhere")
    chain = small(here)
    here.chmod(0o555)
    less = ["setpriv", "--bounding-set", "-dac_override"] if os.geteuid() == 0 else []
    program = [*less, sys.executable, "-m", "addcow_mp", *chain.words]
    try:
        done = ran(program, cwd=here)
    finally:
        here.chmod(0o755)
    line = one_line(Ended(done.returncode, done.stdout, done.stderr))
    assert "base.img.manifest" in line
    assert os.strerror(errno.EACCES) in line
    assert chain.present() == set()
    assert chain.drafts() == []
    chain.again()


# ---- two at a time ----


@pytest.mark.long
def test_second_manifest_create_does_not_wait_forever(here: Path) -> None:
    """What it is told is not what the kernel calls it: who reads this has to know what to do."""
    chain = three(here)
    rules = rules_for(here, rule("image_read", "stop", once="on"))
    with running(*chain.words, "--jobs", "0", cwd=here, rules=rules) as command:
        stopped = command.stopped()
        before = chain.present()
        line = one_line(addcow(*chain.words, "-q", cwd=here))
        assert line.startswith("addcow: top.add-cow.manifest: another process is writing it")
        assert chain.present() == before
        command.signal(signal.SIGCONT, *stopped)
        assert command.end().status == 0
    chain.is_done()


@pytest.mark.long
def test_concurrent_manifest_creates_agree(here: Path) -> None:
    chain = three(here)
    with ExitStack() as stack:
        commands = [stack.enter_context(running(*chain.words, cwd=here)) for _ in range(5)]
        ended = [command.end() for command in commands]
    assert [one.status for one in ended] == [0] * 5
    chain.is_done()


@pytest.mark.long
@BOTH
def test_manifest_creates_over_one_base_run_side_by_side(here: Path, jobs: str) -> None:
    draw_raw(here / "base.img", "ABCDEFGH" * 64)
    names = [f"{number}.add-cow" for number in range(6)]
    for name in names:
        draw(here / name, "X-" * 256)
    with ExitStack() as stack:
        ended = [
            stack.enter_context(
                running(*CREATE, "--jobs", jobs, "--output", "json", name, cwd=here)
            )
            for name in names
        ]
        told = [written(command.end()) for command in ended]
    assert sum(one["base.img.manifest"] for one in told) == 1
    for name in names:
        verified(here, name=name)


@pytest.mark.long
def test_commit_is_refused_while_a_manifest_is_made(here: Path) -> None:
    chain = three(here)
    rules = rules_for(here, rule("image_read", "stop", once="on"))
    with running(*chain.words, "--jobs", "0", cwd=here, rules=rules) as command:
        stopped = command.stopped()
        for job in ("commit", "flatten"):
            assert "in use" in one_line(addcow(job, "top.add-cow", cwd=here))
        command.signal(signal.SIGCONT, *stopped)
        assert command.end().status == 0
    chain.is_done()


# ---- names that are taken by something else ----


@pytest.mark.parametrize("what", ["fifo", "directory", "link"])
@pytest.mark.parametrize("suffix", [".manifest", ".manifest.part"])
def test_manifest_create_refuses_special_files_without_waiting(
    here: Path, what: str, suffix: str
) -> None:
    draw_raw(here / "base.img", "AB")
    victim = here.parent / "victim"
    victim.write_bytes(b"nobody's business")
    path = here / f"base.img{suffix}"
    if what == "fifo":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    else:
        path.symlink_to(victim)
    for words in ((*CREATE, "-f", "raw"), ("verify", "-f", "raw")):
        with running(*words, "base.img", cwd=here) as command:
            command.until(lambda command=command: command.has_ended, words[0])  # type: ignore[misc]
            ended = command.end()
        assert ended.status in (0, 1, 2), ended
    with running("farm", "verify", ".", cwd=here) as command:
        command.until(lambda: command.has_ended, "the farm")
        assert command.end().status in (0, 1, 2)
    assert victim.read_bytes() == b"nobody's business"


# ---- farms with manifests and drafts in them ----

FARM = ["ls", "check", "graph", "plan commit", "plan flatten"]


@pytest.mark.long
@pytest.mark.parametrize("command", FARM)
def test_farm_commands_do_not_list_manifests_as_images(here: Path, command: str) -> None:
    """Nor what a killed one has left: both begin like an overlay, and are none."""
    chain = three(here)
    before = farm_told(here, command)
    for name, content in chain.whole.items():
        (here / name).write_bytes(content)
        (here / f"{name}.part").write_bytes(content[:5000])
    assert farm_told(here, command) == before


def farm_told(here: Path, command: str) -> tuple[int, str, set[str]]:
    """What a farm command ends with, what it complains of, and which files it speaks of."""
    result = addcow("farm", *command.split(), "--output", "json", ".", cwd=here)
    return result.status, result.stderr, set(re.findall(r'"filename": ("[^"]*")', result.stdout))


@pytest.mark.long
def test_farm_jobs_remove_manifests_of_changed_layers(here: Path) -> None:
    for job in ("flatten", "commit"):
        three(here)
        made(here)
        result = addcow("farm", job, "--output", "json", ".", cwd=here)
        assert (result.status, result.stderr) == (0, "")
        assert result.json["summary"]["images"] == 2
        for path in here.glob("*.manifest"):
            path.unlink()


# ---- what guests see, by another way ----

TURNS = pytest.mark.parametrize("turn", range(5))


@TURNS
def test_guest_digest_is_that_of_the_converted_disk(
    here: Path, rng: random.Random, turn: int
) -> None:
    laid = Layers.some(here, rng)
    for name in laid.names:
        jobs = "0" if name != laid.top else rng.choice(["0", "2"])
        assert laid.digest(name, jobs) == laid.converted(name), name


@TURNS
def test_guest_digest_is_equal_after_flatten(here: Path, rng: random.Random, turn: int) -> None:
    laid = Layers.some(here, rng)
    if laid.top == "base.img":
        laid = laid_over(laid)
    seen = laid.converted(laid.top)
    jobs = rng.choice(["0", "2"])
    assert laid.digest(laid.top, jobs) == seen
    succeed("flatten", "--jobs", jobs, laid.top, cwd=here)
    assert laid.digest(laid.top, jobs) == seen
    image = read_header(here / laid.top).image
    assert laid.digest(image, jobs) == seen  # the image file alone is the disk now


def laid_over(laid: Layers) -> Layers:
    """An overlay over a base that has none."""
    size = virtual_size(laid.here / "base.img", "raw")
    write_sparse(laid.here / "o1.raw", bytes(size))
    local = range(1) if size else ()
    content = overlay_bytes(image="o1.raw", size=size, backing="base.img", local=local)
    (laid.here / "o1.add-cow").write_bytes(content)
    return Layers(laid.here, ("base.img", "o1.add-cow"))


@pytest.mark.long
@TURNS
@pytest.mark.parametrize("keep", [(), ("-d",)], ids=["commit", "commit -d"])
def test_guest_digest_is_equal_after_commit(
    here: Path, rng: random.Random, turn: int, keep: tuple[str, ...]
) -> None:
    laid = Layers.some(here, rng)
    if laid.top == "base.img":
        laid = laid_over(laid)
    below = laid.names[-2]
    seen = laid.converted(laid.top)
    jobs = rng.choice(["0", "2"])
    assert laid.digest(laid.top, jobs) == seen
    before = laid.twin()
    result = addcow("commit", *keep, "--jobs", jobs, laid.top, cwd=here)
    sizes = {n: virtual_size(before.here / n, form(n)) for n in (below, laid.top)}
    if result.status:  # only this may be refused, and nothing has happened then
        one_line(result)
        assert form(below) == "add-cow"
        assert sizes[below] < sizes[laid.top], result
        assert laid.digest(laid.top, jobs) == seen
        return
    assert laid.digest(laid.top, jobs) == seen
    if sizes[below] <= sizes[laid.top]:
        assert laid.digest(below, jobs) == seen
    assert laid.converted(laid.top) == seen


@pytest.mark.long
@TURNS
def test_guest_digest_over_a_longer_base_is_equal_after_commit(
    here: Path, rng: random.Random, turn: int
) -> None:
    laid = Layers.some(here, rng, longer=True)
    seen = laid.converted(laid.top)
    assert laid.digest(laid.top, "0") == seen
    while len(laid.names) > 1:
        before = bytes_seen(laid, "base.img")
        succeed("commit", "--jobs", rng.choice(["0", "2"]), laid.top, cwd=here)
        assert laid.digest(laid.top, "0") == seen
        assert laid.converted(laid.top) == seen
        size = virtual_size(here / laid.names[1])
        assert bytes_seen(laid, "base.img")[size:] == before[size:]
        laid = Layers(here, laid.names[:-1])
        seen = laid.converted(laid.top)


def bytes_seen(laid: Layers, name: str) -> bytes:
    return (laid.here / name).read_bytes()


@pytest.mark.long
@TURNS
def test_manifests_are_identical_for_any_number_of_processes(
    here: Path, rng: random.Random, turn: int
) -> None:
    laid = Layers.some(here, rng)
    found: list[dict[str, Any]] = []
    for jobs in ("0", "1", "2"):
        made(here, "--jobs", jobs, *kind(laid.top), name=laid.top)
        paths = list(here.glob("*.manifest"))
        found.append({path.name: path.read_bytes() for path in paths})
        for path in paths:
            path.unlink()
    assert found[0] == found[1] == found[2]
    assert set(found[0]) == {f"{name}.manifest" for name in laid.names} or ALL_ALLOCATED in {
        read_header(here / name).compatible for name in laid.names[1:]
    }


# ---- disks that do not give what they had ----


@pytest.mark.long
@pytest.mark.parametrize("jobs", ["0", "2"])
@pytest.mark.parametrize("words", [("verify", "top.add-cow"), ("farm", "verify", ".")])
def test_unreadable_bitmap_is_named(tmp_path: Path, jobs: str, words: tuple[str, ...]) -> None:
    """Under a mapping it is a signal, which would end a command that takes part itself."""
    with disks(tmp_path, "xfs", "ext4") as (below, upper):
        here = upper.mountpoint
        size = 65536 * MiB  # so that most of the bitmap is not read along with the header
        with (here / "top.raw").open("wb") as image:
            image.truncate(size)
        content = overlay_bytes(image="top.raw", size=size, local=[size // CLUSTER - 1])
        (here / "top.add-cow").write_bytes(content)
        made(here, "--jobs", "0")
        uncache(here / "top.add-cow")
        rules = Rules.write(tmp_path / "rules", rule("bitmap_load", "stop", once="on"))
        command = (*words[:-1], "--output", "json", "--jobs", jobs, words[-1])
        with running(*command, cwd=here, rules=rules) as job:
            (stopped,) = job.stopped()
            below.cut()
            job.signal(signal.SIGCONT, stopped)
            ended = job.end()
    assert ended.status == 1
    findings = json.loads(ended.stdout)["findings"]
    assert [one["name"] for one in findings] == ["unexamined"]
    assert findings[0]["file"].endswith("top.add-cow")
    assert findings[0]["message"].startswith("cannot read")
