"""Tests of signals: the first one stops a command, which keeps finished work."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

import addcow_mp
from support.command import ADDCOW, CLUSTER, PATIENCE, addcow, local_clusters, pair
from support.processes import running, until

pytestmark = pytest.mark.sample(1)

SIGNALS = [signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGXCPU]


def large(here: Path) -> None:
    """Make an overlay that takes some seconds at 1 MiB a second."""
    pair(here, "A" * 256, "X" * 256)


def goes_on(here: Path) -> None:
    """Allocated clusters still have their data, and the same command finishes the job."""
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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
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
