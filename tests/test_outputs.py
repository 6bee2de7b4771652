"""Nothing outside stops a job but a signal: readers that do not read, outputs that fail."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import addcow_mp
from support.command import CLUSTER, PATIENCE, addcow, local_clusters, pair, picture, refused
from support.processes import LOOK_AGAIN, running

ADDCOW = [sys.executable, "-m", "addcow_mp"]


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that has to happen."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(LOOK_AGAIN)


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
    done = subprocess.run(
        ["bash", "-c", script, "bash", *ADDCOW, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
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
    "words", [("info", "top.add-cow"), ("map", "top.add-cow"), ("farm", "ls", "."), ("--help",)]
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
    done = subprocess.run(
        ["prlimit", f"--fsize={2 << 20}", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
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


# Signals


SIGNALS = [signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGXCPU]


def large(here: Path) -> None:
    """Make an overlay that takes some seconds at 1 MiB a second."""
    pair(here, "A" * 256, "X" * 256)


def goes_on(here: Path) -> None:
    """What is local still has its data, and the same command again finishes the job."""
    left = local_clusters(here / "top.add-cow")
    base = (here / "base.img").read_bytes()
    done = [cluster for cluster in range(256) if cluster not in left]
    assert all(base[at * CLUSTER : (at + 1) * CLUSTER] == b"X" * CLUSTER for at in done)
    assert left, "it was not stopped"
    assert addcow("commit", "top.add-cow", cwd=here).status == 0
    assert (here / "base.img").read_bytes() == b"X" * 256 * CLUSTER


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("jobs", ["0", "2"])
def test_first_signal_stops_a_commit_that_keeps_its_work(
    tmp_path: Path, number: int, jobs: str
) -> None:
    large(tmp_path)
    with running("commit", "-r", "1M", "--jobs", jobs, "top.add-cow", cwd=tmp_path) as job:
        job.until(lambda: (tmp_path / "base.img").read_bytes()[:1] == b"X", "the first cluster")
        job.signal(number, job.pid)
        ended = job.end()
    assert ended.status == 128 + number
    assert "finished work is kept" in ended.stderr
    goes_on(tmp_path)


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_stops_a_convert_that_leaves_nothing(tmp_path: Path, number: int) -> None:
    large(tmp_path)
    words = ("convert", "-O", "raw", "-r", "1M", "--jobs", "1", "top.add-cow", "new.raw")
    with running(*words, cwd=tmp_path) as job:
        job.until((tmp_path / "new.raw").exists, "the new file")
        job.signal(number, job.pid)
        ended = job.end()
    assert ended.status == 128 + number
    assert not (tmp_path / "new.raw").exists()


def test_repeated_sigxcpu_stops_a_commit_that_keeps_its_work(tmp_path: Path) -> None:
    large(tmp_path)
    with running("commit", "-r", "1M", "--jobs", "1", "top.add-cow", cwd=tmp_path) as job:
        job.until(lambda: (tmp_path / "base.img").read_bytes()[:1] == b"X", "the first cluster")
        for _ in range(5):
            job.signal(signal.SIGXCPU, job.pid)
            job.until(lambda: job.has_ended or job.has_met(signal.SIGXCPU), "the signal")
        ended = job.end()
    assert ended.status == 152
    goes_on(tmp_path)


def test_sigxcpu_of_a_worker_stops_the_job(tmp_path: Path) -> None:
    large(tmp_path)
    with running("commit", "-r", "1M", "--jobs", "1", "top.add-cow", cwd=tmp_path) as job:
        job.until(lambda: (tmp_path / "base.img").read_bytes()[:1] == b"X", "the first cluster")
        for _ in range(3):
            if not job.has_ended:
                job.signal(signal.SIGXCPU, *job.workers())
        ended = job.end()
    assert ended.status == 152
    assert "finished work is kept" in ended.stderr
    goes_on(tmp_path)


@pytest.mark.parametrize("words", [("commit",), ("flatten",)])
def test_ignored_hangup_stays_ignored(tmp_path: Path, words: tuple[str, ...]) -> None:
    pair(tmp_path, "A" * 64, "X" * 64)
    process = subprocess.Popen(
        ["env", "--ignore-signal=HUP", *ADDCOW, *words, "-r", "4M", "--jobs", "1", "top.add-cow"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    )
    ignored = 1 << (signal.SIGHUP - 1)
    until(lambda: b"addcow_mp" in Path(f"/proc/{process.pid}/cmdline").read_bytes(), "it")

    def mask(key: str) -> int:
        text = Path(f"/proc/{process.pid}/status").read_text()
        return int(next(line.split()[1] for line in text.splitlines() if line.startswith(key)), 16)

    until(lambda: bool(mask("SigCgt") & 1 << (signal.SIGTERM - 1)), "its handlers")
    assert mask("SigIgn") & ignored
    process.send_signal(signal.SIGHUP)
    assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "words", [("farm", "commit", "--from-file", "list"), ("io", "top.add-cow")]
)
def test_first_signal_ends_a_command_that_waits_for_input(
    tmp_path: Path, number: int, words: tuple[str, ...]
) -> None:
    """Waiting for a list of places, or for a command."""
    pair(tmp_path, "AB", "-X")
    os.mkfifo(tmp_path / "list")
    process = subprocess.Popen(
        ["env", "--default-signal=INT,HUP", *ADDCOW, *words],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )

    def handled() -> bool:
        text = Path(f"/proc/{process.pid}/status").read_text()
        line = next(line for line in text.splitlines() if line.startswith("SigCgt"))
        return bool(int(line.split()[1], 16) & 1 << (signal.SIGTERM - 1))

    until(handled, "its handlers")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number
    assert len(stderr.splitlines()) == 1, stderr
    assert local_clusters(tmp_path / "top.add-cow") == [1]


def test_hangup_of_the_terminal_stops_a_commit(tmp_path: Path) -> None:
    """The group gets SIGHUP, and stderr gives EIO from then on."""
    large(tmp_path)
    master, slave = os.openpty()
    process = subprocess.Popen(
        # It makes the terminal of its standard input the one that controls it.
        ["setsid", "--ctty", *ADDCOW, "commit", "-p", "-r", "1M", "--jobs", "1", "top.add-cow"],
        cwd=tmp_path,
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    until(lambda: (tmp_path / "base.img").read_bytes()[:1] == b"X", "the first cluster")
    os.close(master)
    assert process.wait(PATIENCE) == 129
    goes_on(tmp_path)


def test_public_errors_have_the_exit_codes_of_signals() -> None:
    assert addcow_mp.HangupJobError.exit_code == 129
    assert addcow_mp.CpuLimitJobError.exit_code == 152
