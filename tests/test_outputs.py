"""Outputs without a reader, and outputs that fail, do not stop a job."""

import fcntl
import json
import os
import socket
import subprocess
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.command import (
    ADDCOW,
    PATIENCE,
    addcow,
    local_clusters,
    pair,
    picture,
    ran,
    refused,
)
from support.processes import until

pytestmark = pytest.mark.sample(1)


def fill(fd: int) -> None:
    """Write until nothing more fits, and leave the descriptor as it was."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_NONBLOCK)
    for piece in (b"~" * 4096, b"~"):
        try:
            while True:
                os.write(fd, piece)
        except BlockingIOError:
            pass
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)


@contextmanager
def full_pipe() -> Iterator[tuple[int, int]]:
    """A pipe that is full, and blocks."""
    reader, writer = os.pipe()
    fill(writer)
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


@contextmanager
def full_socket() -> Iterator[tuple[int, int]]:
    """A socket whose reader does not read."""
    ours, theirs = socket.socketpair()
    fill(theirs.fileno())
    with ours, theirs:
        yield ours.fileno(), theirs.fileno()


def drained(reader: int, process: "subprocess.Popen[bytes]") -> bytes:
    """What comes out of a full pipe until the process has ended, without what filled it."""
    os.set_blocking(reader, False)
    found = bytearray()

    def has_ended() -> bool:
        ended = process.poll() is not None
        try:
            while data := os.read(reader, 1 << 16):
                found.extend(data)
        except BlockingIOError:
            pass
        return ended

    until(has_ended, "the end")
    return bytes(found).lstrip(b"~")


def is_committed(here: Path) -> bool:
    return (
        local_clusters(here / "top.add-cow") == []
        and picture((here / "base.img").read_bytes()) == "XBXD"
    )


@pytest.mark.parametrize("channel", [full_pipe, full_socket])
@pytest.mark.parametrize("words", [("-p",), ("--progress-format", "json"), ("--progress-fd", "N")])
def test_progress_is_dropped_without_a_reader(
    tmp_path: Path, words: tuple[str, ...], channel: Callable[[], object]
) -> None:
    pair(tmp_path, "ABCD", "X-X-")
    with channel() as (_, writer):  # type: ignore[attr-defined]
        options = [str(writer) if word == "N" else word for word in words]
        done = subprocess.run(
            [*ADDCOW, "farm", "commit", *options, "--jobs", "0", "."],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if words[0] == "--progress-fd" else writer,
            pass_fds=[writer],
            timeout=PATIENCE,
            check=False,
        )
    assert done.returncode == 0
    assert b"committed" in done.stdout
    assert is_committed(tmp_path)


def test_progress_reader_gets_whole_lines_and_the_last_one(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "X-X-")
    reader, writer = os.pipe()
    words = ["farm", "commit", "--progress-fd", str(writer), "."]
    done = subprocess.run(
        [*ADDCOW, *words], cwd=tmp_path, pass_fds=[writer], timeout=PATIENCE, check=True
    )
    assert done.returncode == 0
    os.close(writer)
    with os.fdopen(reader) as lines:
        told = [json.loads(line) for line in lines]
    assert told[-1]["images-done"] == told[-1]["images"] == 1


@pytest.mark.parametrize(
    "words",
    [
        ("commit", "-t", "unsafe", "-p", "top.add-cow"),
        ("commit", "--locking", "off", "--jobs", "2", "top.add-cow"),
        ("farm", "commit", "-t", "unsafe", "."),
    ],
)
def test_blocked_stderr_does_not_stop_the_job(tmp_path: Path, words: tuple[str, ...]) -> None:
    pair(tmp_path, "ABCD", "X-X-")
    with full_pipe() as (reader, writer):
        process = subprocess.Popen(
            [*ADDCOW, *words], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=writer
        )
        until(lambda: is_committed(tmp_path), "the job")
        # Its locks are gone, too: another command may write.
        until(lambda: addcow("io", "-c", "length", "top.add-cow", cwd=tmp_path).status == 0, "it")
        assert b"warning: " in drained(reader, process)
        assert process.returncode == 0


@pytest.mark.parametrize("words", [("commit", "top.add-cow"), ("farm", "commit", ".")])
def test_blocked_stdout_does_not_stop_the_job(tmp_path: Path, words: tuple[str, ...]) -> None:
    pair(tmp_path, "ABCD", "X-X-")
    with full_pipe() as (reader, writer):
        process = subprocess.Popen([*ADDCOW, *words], cwd=tmp_path, stdout=writer)
        until(lambda: is_committed(tmp_path), "the job")
        until(lambda: addcow("io", "-c", "length", "top.add-cow", cwd=tmp_path).status == 0, "it")
        assert b"committed" in drained(reader, process)
        assert process.returncode == 0


@pytest.mark.parametrize("words", [("commit", "-p", "top.add-cow"), ("farm", "commit", "-p", ".")])
def test_stopped_terminal_does_not_stop_the_job(tmp_path: Path, words: tuple[str, ...]) -> None:
    pair(tmp_path, "ABCD", "X-X-")
    master, slave = os.openpty()
    try:
        termios.tcflow(slave, termios.TCOOFF)  # what Ctrl-S does
        process = subprocess.Popen(
            [*ADDCOW, *words],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=slave,
            env={**os.environ, "TERM": "xterm"},
        )
        until(lambda: is_committed(tmp_path), "the job")
        termios.tcflow(slave, termios.TCOON)
        shown = drained(master, process)
        assert process.returncode == 0
        assert shown.rfind(b"\x1b[?25h") >= shown.rfind(b"\x1b[?25l")  # the cursor is back
    finally:
        os.close(master)
        os.close(slave)


@pytest.mark.long
def test_nonblocking_output_is_written_completely(tmp_path: Path) -> None:
    """Another program may have made it so: it is a property that all who have it open share."""
    pair(tmp_path, "ABCD" * 2048, "X-X-" * 2048)
    expected = addcow("map", "--output", "json", "top.add-cow", cwd=tmp_path).stdout
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    words = ["map", "--output", "json", "top.add-cow"]
    process = subprocess.Popen([*ADDCOW, *words], cwd=tmp_path, stdout=writer)
    try:
        assert drained(reader, process).decode() == expected
        assert process.returncode == 0
    finally:
        os.close(reader)
        os.close(writer)


# What fails


JOBS = [
    ("commit", "top.add-cow"),
    ("commit", "--output", "json", "top.add-cow"),
    ("flatten", "top.add-cow"),
    ("convert", "-O", "raw", "--output", "json", "top.add-cow", "new.raw"),
    ("create", "-b", "base.img", "-F", "raw", "new.add-cow"),
    ("create", "-f", "raw", "new.raw", "1M"),
    ("manifest", "create", "top.add-cow"),
    ("check", "-r", "all", "top.add-cow"),
    ("io", "-c", "write 64k 64k", "-c", "write 192k 64k", "top.add-cow"),
    ("farm", "commit", "."),
    ("farm", "check", "."),
]


@pytest.mark.parametrize("where", [">/dev/full", "| true"])
@pytest.mark.parametrize("words", JOBS, ids=" ".join)
def test_failed_output_after_a_job_is_reported(
    tmp_path: Path, words: tuple[str, ...], where: str
) -> None:
    pair(tmp_path, "ABCD", "X-X-")
    script = f'set -o pipefail; "$@" {where}'
    done = ran(["bash", "-c", script, "bash", *ADDCOW, *words], cwd=tmp_path)
    if where == "| true" and done.stderr == "":
        return  # it was quicker than `true`
    assert done.returncode == 1
    reason = "No space left on device" if where == ">/dev/full" else "Broken pipe"
    told = f"addcow: the job is done, but its output cannot be written: {reason}\n"
    assert done.stderr == told
    if words[0] == "io":
        assert local_clusters(tmp_path / "top.add-cow") == [0, 1, 2, 3]
    if "commit" in words:
        assert is_committed(tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ("info", "top.add-cow"),
        ("map", "top.add-cow"),
        ("check", "top.add-cow"),
        ("farm", "ls", "."),
        ("--help",),
    ],
)
def test_failed_output_of_a_query_is_reported(tmp_path: Path, words: tuple[str, ...]) -> None:
    pair(tmp_path, "ABCD", "X-X-")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*ADDCOW, *words],
            cwd=tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    told = "addcow: the output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, told)


@pytest.mark.parametrize("words", [(), ("-q",)])
def test_log_that_cannot_be_written_is_reported_once(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    """A limit of the size of files is met as a full disk is."""
    pair(tmp_path, "ABCD", "X-X-")
    (tmp_path / "log").write_bytes(b'{"time": '.ljust(2 << 20, b" "))
    command = [*ADDCOW, "farm", "commit", *words, "--jobs", "0", "--log", "log", "."]
    done = ran(["prlimit", f"--fsize={2 << 20}", *command], cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.count("cannot write the log any more") == 1
    assert len(done.stderr.splitlines()) == 1
    assert is_committed(tmp_path)


@pytest.mark.parametrize("kind", ["fifo", "socket", "directory", "terminal"])
def test_log_must_be_a_regular_file(tmp_path: Path, kind: str) -> None:
    pair(tmp_path, "ABCD", "X-X-")
    log = tmp_path / "log"
    fds: tuple[int, ...] = ()
    listening = socket.socket(socket.AF_UNIX)
    if kind == "fifo":
        os.mkfifo(log)
    elif kind == "socket":
        listening.bind(str(log))
    elif kind == "directory":
        log.mkdir()
    else:
        fds = os.openpty()
        log.symlink_to(os.ttyname(fds[1]))
    line = refused("farm", "commit", "--log", "log", ".", cwd=tmp_path)
    assert "log: " in line
    assert local_clusters(tmp_path / "top.add-cow") == [0, 2]
    listening.close()
    for fd in fds:
        os.close(fd)


def test_log_may_be_dev_null(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "X-X-")
    assert addcow("farm", "commit", "--log", "/dev/null", ".", cwd=tmp_path).status == 0
