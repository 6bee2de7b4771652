"""Tests of QEMU's image locks, in both directions.

A chain of two overlays over a raw file stands for every case. The lock bytes that a stopped job
holds (in /proc) are compared with a table. Then qemu-io and qemu-nbd hold one file and each
command refuses or works, and addcow holds the chain and qemu-io is refused.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

import pytest

from addcow_mp.device.fault_rules import EVENTS
from support.command import (
    PATIENCE,
    MiB,
    Result,
    addcow,
    draw,
    draw_raw,
    guest_picture,
    ran,
    refused,
    snapshot,
    stored_bytes,
    succeed,
    tool,
)
from support.golden import addcow_here
from support.guests import HOLDERS, ended, holding, qemu_may, talking
from support.processes import shared_memory

pytestmark = pytest.mark.sample(1)

TOP, TOP_IMAGE, MID, MID_IMAGE, BASE = (
    "top.add-cow",
    "top.raw",
    "mid.add-cow",
    "mid.raw",
    "base.img",
)
FILES = (TOP, TOP_IMAGE, MID, MID_IMAGE, BASE)

# Bytes 100 + i: I use permission i. Bytes 200 + i: I do not share it.
# 0 consistent read, 1 write, 2 write unchanged, 3 resize.
SHARING = {100}
READING = {100, 201, 203}
WRITING = {100, 101, 200, 201, 202, 203}
RESIZING = {100, 101, 103, 200, 201, 202, 203}

Held = dict[str, set[int]]

READ: Held = dict.fromkeys(FILES, READING)
READ_SHARING: Held = dict.fromkeys(FILES, SHARING)
WRITE: Held = {**READ, TOP: WRITING, TOP_IMAGE: WRITING}
#: Before the .add-cow file is removed, the image is cut to the virtual size.
DISCARD: Held = {**WRITE, TOP_IMAGE: RESIZING}
COMMIT: Held = {
    TOP: RESIZING,
    TOP_IMAGE: WRITING,
    MID: RESIZING,
    MID_IMAGE: RESIZING,
    BASE: READING,
}
RESIZE: Held = {**READ, TOP: RESIZING, TOP_IMAGE: RESIZING}
COMMIT_MID: Held = {MID: RESIZING, MID_IMAGE: WRITING, BASE: RESIZING}
COMMIT_KEEPING: Held = {**READ, MID: RESIZING, MID_IMAGE: RESIZING}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory with the chain. The last cluster of the image is garbage: check reads it."""
    draw_raw(tmp_path / BASE, "ABCDEF")
    draw(tmp_path / MID, "-M-M--")
    draw(tmp_path / TOP, "-X-X-x", MID, backing_format="add-cow")
    return tmp_path


# ---- what a process holds ----


def held(pid: int, here: Path) -> Held:
    """Return the lock bytes that a process holds, by the name of the file in ``here``."""
    found: Held = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            path = Path(os.readlink(f"/proc/{pid}/fd/{fd}"))
            text = Path(f"/proc/{pid}/fdinfo/{fd}").read_text("ascii")
        except FileNotFoundError:  # the descriptor that listed the directory
            continue
        if path.parent == here:
            ranges = re.findall(r"^lock:.* OFDLCK .* (\d+) (\d+)$", text, re.MULTILINE)
            for first, last in ranges:
                found.setdefault(path.name, set()).update(range(int(first), int(last) + 1))
    return found


def is_locked(path: Path) -> bool:
    """Whether anybody at all holds a lock on the file."""
    status = path.stat()
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    return f" {device}:{status.st_ino} " in Path("/proc/locks").read_text("ascii")


# ---- addcow, stopped or kept open ----


def python(*words: str) -> list[str]:
    return [sys.executable, "-u", "-m", "addcow_mp", *words]


def rules(here: Path, events: tuple[str, ...]) -> dict[str, str]:
    """Return an environment in which a job stops whenever it meets one of the events."""
    path = here / "rules"
    path.write_text("".join(f'[inject-error]\nevent = "{e}"\naction = "stop"\n' for e in events))
    return {**os.environ, "ADDCOW_FAULTS": str(path)}


@contextmanager
def job(
    here: Path, *words: str, events: tuple[str, ...] = EVENTS
) -> Iterator[subprocess.Popen[bytes]]:
    """Run addcow so that it stops at ``events``, in a process group of its own."""
    with subprocess.Popen(
        python(*words),
        cwd=here,
        env=rules(here, events),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        # What never stops and never ends is killed, and is then seen to have been.
        watchdog = Timer(PATIENCE, os.killpg, (process.pid, signal.SIGKILL))
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)


def next_stop(process: subprocess.Popen[bytes]) -> bool:
    """Wait until the process stops; False when it has ended instead."""
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        return True
    process.returncode = os.waitstatus_to_exitcode(status)
    return False


def stops(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Give control at each stop of the process, until it ends."""
    while next_stop(process):
        yield
        os.kill(process.pid, signal.SIGCONT)


# ---- QEMU ----


# ---- the table, byte by byte ----


OPERATIONS: dict[str, tuple[tuple[str, ...], Held]] = {
    "info": (("info", TOP), {TOP: READING, TOP_IMAGE: READING}),
    "info chain": (("info", "--backing-chain", TOP), READ),
    "map": (("map", TOP), READ),
    "check": (("check", TOP), READ),
    "convert": (("convert", "--jobs", "0", "-O", "raw", TOP, "new.raw"), READ),
    "read": (("io", "-r", "-c", "read 0 384k", TOP), READ),
    "map -U": (("map", "-U", TOP), READ_SHARING),
    "check -U": (("check", "-U", TOP), READ_SHARING),
    "convert -U": (("convert", "-U", "--jobs", "0", "-O", "raw", TOP, "new.raw"), READ_SHARING),
    "read -U": (("io", "-r", "-U", "-c", "read 0 384k", TOP), READ_SHARING),
    "write": (("io", "-c", "write 0 4k", "-c", "flush", TOP), WRITE),
    "flatten": (("flatten", "--jobs", "0", TOP), WRITE),
    "discard": (("flatten", "--discard", "--jobs", "0", TOP), DISCARD),
    "commit": (("commit", "--jobs", "0", TOP), COMMIT),
    "resize": (("resize", TOP, "+4k"), RESIZE),
    "commit -d": (("commit", "-d", "--jobs", "0", TOP), COMMIT_KEEPING),
    "commit into raw": (("commit", "--force", "--jobs", "0", MID), COMMIT_MID),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_file_is_locked_as_the_table_says(here: Path, name: str) -> None:
    words, table = OPERATIONS[name]
    seen: Held = {}
    with job(here, *words) as process:
        for _ in stops(process):
            now = {file: held for file, held in held(process.pid, here).items() if file in FILES}
            assert now == {file: table[file] for file in now}
            seen.update(now)
    assert process.returncode == (3 if name.startswith("check") else 0)
    # Of raw files info asks no more than the length: there is no event to stop at.
    quiet = (TOP_IMAGE, MID_IMAGE, BASE) if name.startswith("info") else ()
    assert set(table) - set(quiet) <= set(seen)


def test_repair_takes_the_locks_of_a_writer(here: Path) -> None:
    with job(here, "check", "-r", "leaks", TOP, events=("punch",)) as process:
        assert next_stop(process)
        assert held(process.pid, here) == WRITE
        os.kill(process.pid, signal.SIGCONT)
        assert not next_stop(process)
    assert process.returncode == 0


@pytest.mark.parametrize("name", ["flatten", "commit"])
def test_workers_hold_the_locks_of_their_parent(here: Path, name: str) -> None:
    with job(here, name, "--jobs", "1", TOP, events=("image_read", "backing_read")) as process:
        worker = stopped_child(process)
        assert held(worker, here) == held(process.pid, here) == OPERATIONS[name][1]


# ---- QEMU holds, addcow asks ----


# A repair looks before it changes anything, and is refused as a reader first.
COMMANDS: dict[str, tuple[tuple[str, ...], tuple[Held, ...]]] = {
    "info": (("info",), ({TOP: READING, TOP_IMAGE: READING},)),
    "info chain": (("info", "--backing-chain"), (READ,)),
    "map": (("map",), (READ,)),
    "check": (("check",), (READ,)),
    "convert": (("convert", "-O", "raw"), (READ,)),
    "read": (("io", "-r", "-c", "read 0 4k"), (READ,)),
    "write": (("io", "-c", "write 0 4k"), (WRITE,)),
    "repair": (("check", "-r", "leaks"), (READ, WRITE)),
    "flatten": (("flatten",), (WRITE,)),
    "commit": (("commit",), (COMMIT,)),
}

USES_WRITE = "uses the permission 'write'"
USES_READ = "uses the permission 'consistent read'"
KEEPS_WRITE = "does not share the permission 'write'"
KEEPS_RESIZE = "does not share the permission 'resize'"

# What keeps addcow from using a file in some way while such a holder has it. Who only reads
# and shares everything keeps no process from reading; an nbd export does not share resizing.
CONFLICTS: dict[str, dict[frozenset[int], str]] = {
    "reader": {frozenset(WRITING): USES_READ, frozenset(RESIZING): USES_READ},
    "writer": {
        frozenset(READING): USES_WRITE,
        frozenset(WRITING): USES_READ,
        frozenset(RESIZING): USES_READ,
    },
    "nbd reader": {frozenset(WRITING): USES_READ, frozenset(RESIZING): KEEPS_RESIZE},
    "nbd writer": {
        frozenset(READING): USES_WRITE,
        frozenset(WRITING): USES_READ,
        frozenset(RESIZING): KEEPS_RESIZE,
    },
    "guest's disk": {
        frozenset(READING): USES_WRITE,
        frozenset(WRITING): KEEPS_WRITE,
        frozenset(RESIZING): KEEPS_WRITE,
    },
    "guest's backing": {frozenset(WRITING): KEEPS_WRITE, frozenset(RESIZING): KEEPS_WRITE},
}


def conflict_of(kind: str, file: str, command: str) -> str | None:
    """Return what the refusal has to say of the holder; None when there is no reason for one."""
    claims = (frozenset(table.get(file, ())) for table in COMMANDS[command][1])
    return next((CONFLICTS[kind][claim] for claim in claims if claim in CONFLICTS[kind]), None)


def ask(here: Path, name: str) -> Result:
    """Run one of the commands on the top overlay, in this process."""
    command, *options = COMMANDS[name][0]
    new = [str(here / f"{name}.new")] if command == "convert" else []
    done = addcow_here(command, *options, here / TOP, *new)
    return Result(done.exit, done.out, done.err)


@pytest.mark.sample(4)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", HOLDERS)
def test_file_held_by_qemu_is_refused_or_shared(here: Path, kind: str, file: str) -> None:
    with holding(kind, here, file) as holder:
        for name in COMMANDS:
            conflict = conflict_of(kind, file, name)
            before = snapshot(here)
            result = ask(here, name)
            if conflict is None:
                assert result.status in (0, 3), (name, result)
                continue
            assert result.status == 1, (name, result)
            (line,) = result.stderr.splitlines()
            assert f"{file}" in line
            assert f"in use: {holder} {conflict}; try again later" in line
            assert snapshot(here) == before, name


@pytest.mark.parametrize("file", FILES)
def test_force_share_reads_what_a_guest_is_writing(here: Path, file: str) -> None:
    with holding("writer", here, file):
        for command in (
            ("info", "--backing-chain"),
            ("map",),
            ("check",),
            ("io", "-r", "-c", "map"),
        ):
            done = addcow_here(command[0], "-U", *command[1:], here / TOP)
            assert (done.exit, done.err) == (3 if command[0] == "check" else 0, ""), command
        succeed("convert", "-U", "-O", "raw", TOP, "new.raw", cwd=here)
    assert (here / "new.raw").read_bytes()[: 64 * 1024] == b"A" * (64 * 1024)


@pytest.mark.parametrize("command", ["commit", "flatten", "create"])
def test_force_share_is_refused_by_commands_that_write(here: Path, command: str) -> None:
    before = snapshot(here)
    refused(command, "-U", TOP, cwd=here, status=64)
    refused("io", "-U", "-c", "write 0 4k", TOP, cwd=here, status=64)
    assert snapshot(here) == before


def test_repair_refuses_an_image_in_use(here: Path) -> None:
    with holding("writer", here, TOP_IMAGE) as holder:
        before = snapshot(here)
        line = refused("check", "-U", "-r", "leaks", TOP, cwd=here)
        assert f"in use: {holder}" in line
        assert snapshot(here) == before


def test_create_refuses_a_backing_that_is_being_written(here: Path) -> None:
    with holding("writer", here, BASE) as holder:
        before = snapshot(here)
        line = refused("create", "-b", BASE, "-F", "raw", "new.add-cow", cwd=here)
        assert BASE in line
        assert f"in use: {holder} {USES_WRITE}" in line
        assert snapshot(here) == before
    with holding("reader", here, BASE):
        succeed("create", "-b", BASE, "-F", "raw", "new.add-cow", cwd=here)


def test_create_refuses_an_image_in_use(here: Path) -> None:
    draw_raw(here / "own.raw", "Q")
    words = ("create", "-o", "image_file=own.raw", "new.add-cow", str(MiB))
    with holding("reader", here, "own.raw") as holder:
        before = snapshot(here)
        assert f"in use: {holder} {USES_READ}" in refused(*words, cwd=here)
        assert snapshot(here) == before
    succeed(*words, cwd=here)


@pytest.mark.long
def test_file_is_free_after_its_holder_ended(here: Path) -> None:
    with holding("nbd writer", here, MID_IMAGE):
        refused("commit", TOP, cwd=here)
    assert not any(is_locked(here / file) for file in FILES)
    succeed("commit", TOP, cwd=here)


# ---- addcow holds, QEMU asks ----

# Per file: may QEMU read it, may QEMU write it?
NOTHING, ONLY_READING, ALL = (False, False), (True, False), (True, True)

# While a reader has the chain; a reader with -U; a writer; a commit.
LETS = {
    "read": dict.fromkeys(FILES, ONLY_READING),
    "read -U": dict.fromkeys(FILES, ALL),
    "write": {**dict.fromkeys(FILES, ONLY_READING), TOP: NOTHING, TOP_IMAGE: NOTHING},
    "commit": {**dict.fromkeys(FILES, NOTHING), BASE: ONLY_READING},
}


def assert_lets(here: Path, lets: dict[str, tuple[bool, bool]]) -> None:
    seen = {file: (qemu_may(here, file, "-r"), qemu_may(here, file)) for file in FILES}
    assert seen == lets


@pytest.mark.parametrize(
    ("name", "options"), [("read", ("-r",)), ("read -U", ("-r", "-U")), ("write", ())]
)
def test_qemu_is_refused_files_that_addcow_io_holds(
    here: Path, name: str, options: tuple[str, ...]
) -> None:
    with talking(here, *python("io", *options, TOP)):
        assert_lets(here, LETS[name])
    assert_lets(here, dict.fromkeys(FILES, ALL))


@pytest.mark.parametrize(
    ("name", "words", "event"),
    [
        ("commit", ("commit", TOP), "data_sync"),
        ("write", ("flatten", TOP), "data_sync"),
        ("write", ("flatten", "--discard", TOP), "discard"),
        ("read", ("convert", "-O", "raw", TOP, "new.raw"), "target_write"),
    ],
)
def test_qemu_is_refused_files_that_a_job_holds(
    here: Path, name: str, words: tuple[str, ...], event: str
) -> None:
    with job(here, *words, events=(event,)) as process:
        assert next_stop(process)
        assert_lets(here, LETS[name])
        for _ in range(10):  # it may meet the event again before it ends
            os.kill(process.pid, signal.SIGCONT)
            if not next_stop(process):
                break
    assert process.returncode == 0


def test_guest_cannot_start_on_the_target_of_a_commit(here: Path) -> None:
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", MID_IMAGE, "-F", "raw", "vm", cwd=here)
    # By force: the guest's qcow2 file depends on the target.
    with job(here, "commit", "--force", TOP, events=("data_sync",)) as process:
        assert next_stop(process)
        done = ran(["qemu-io", "-f", "qcow2", "-c", "length", "vm"], cwd=here)
    assert done.returncode == 1
    assert re.search(r"Failed to get .*lock", done.stderr), done.stderr
    assert MID_IMAGE in done.stderr


# ---- addcow beside addcow ----


@pytest.mark.long
def test_readers_share_files_and_exclude_writers(here: Path) -> None:
    before = snapshot(here)
    with talking(here, *python("io", "-r", TOP)) as pid:
        for name in ("info", "info chain", "map", "check", "read"):
            assert ask(here, name).status in (0, 3), name
        for words in (("commit", TOP), ("flatten", TOP), ("io", "-c", "write 0 4k", TOP)):
            line = refused(*words, cwd=here)
            assert TOP in line
            assert f"(pid {pid})" in line
        assert f"(pid {pid})" in refused("commit", "--force", MID, cwd=here)
    assert snapshot(here) == before


def test_writer_excludes_all_but_force_share(here: Path) -> None:
    with talking(here, *python("io", TOP)) as pid:
        before = snapshot(here)
        for command in COMMANDS:
            result = ask(here, command)
            assert result.status == 1, command
            assert f"(pid {pid}) does not share the permission 'consistent read'" in result.stderr
        assert snapshot(here) == before
        for command in ("info", "map", "check"):
            assert addcow(command, "-U", TOP, cwd=here).status in (0, 3)


def test_two_overlays_of_one_base_are_written_side_by_side(here: Path) -> None:
    draw(here / "other.add-cow", "Q-----", MID, backing_format="add-cow")
    with talking(here, *python("io", TOP)):
        succeed("flatten", "other.add-cow", cwd=here)
    assert guest_picture(here / "other.add-cow") == "QMCMEF"


# ---- what a kill leaves behind ----


def stopped_child(process: subprocess.Popen[bytes]) -> int:
    """Wait for a child of the job that is stopped, and return its pid."""
    descriptor = os.pidfd_open(process.pid)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    try:
        # The job's end is what would end the wait early; there is no event for a grandchild.
        while not poll.poll(5):
            found = [
                pid for pid, parent, state in processes() if (parent, state) == (process.pid, "T")
            ]
            if found:
                return found[0]
    finally:
        os.close(descriptor)
    raise AssertionError("the job ended without a worker that stopped")


def processes() -> Iterator[tuple[int, int, str]]:
    """Give pid, parent and state of every process."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, parent = stat.rpartition(")")[2].split()[:2]
        yield int(pid), int(parent), state


@pytest.mark.long
@pytest.mark.parametrize("words", [("commit",), ("flatten",)])
@pytest.mark.parametrize("jobs", ["0", "1"])
def test_killed_job_leaves_no_lock(here: Path, words: tuple[str, ...], jobs: str) -> None:
    view = guest_picture(here / TOP)
    with job(here, *words, "--jobs", jobs, TOP, events=("image_read", "backing_read")) as process:
        worker = stopped_child(process) if jobs != "0" else process.pid
        assert jobs != "0" or next_stop(process)
        assert is_locked(here / BASE)
        gone, memory = ended(worker), shared_memory(worker)
        os.killpg(process.pid, signal.SIGKILL)
        assert gone()
        assert process.wait() == -signal.SIGKILL
    assert_lets(here, dict.fromkeys(FILES, ALL))
    assert not any(is_locked(here / file) for file in FILES)
    assert guest_picture(here / TOP) == view
    succeed(*words, TOP, cwd=here)
    assert guest_picture(here / TOP) == view
    left = [name for name in memory if os.path.exists(name)]
    for name in left:  # no other code would remove it
        os.unlink(name)
    assert left == []


@pytest.mark.long
def test_no_lock_is_free_while_an_orphaned_worker_lives(here: Path) -> None:
    with job(here, "commit", "--jobs", "1", TOP, events=("image_read",)) as process:
        worker = stopped_child(process)
        gone = ended(worker)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert held(worker, here) == COMMIT
        assert not qemu_may(here, MID_IMAGE, "-r")
        os.kill(worker, signal.SIGCONT)
        assert gone()
    assert_lets(here, dict.fromkeys(FILES, ALL))
    succeed("commit", TOP, cwd=here)
    assert stored_bytes(here / TOP_IMAGE) == 0
