"""Tests without room for processes, threads or descriptors."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from support.command import CLUSTER, PATIENCE, MiB, overlay_bytes, ran, read_header, same_content
from support.seccomp import FILTER, refusing, skip_without_filters
from support.seccomp_filter import CALLS

pytestmark = pytest.mark.sample(1)

NO_PROCESS = ["clone:EAGAIN", "clone3:EAGAIN", "fork:EAGAIN", "vfork:EAGAIN"]
SIZE = 160 * MiB  # three tasks


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An overlay with pieces of data all over, half of them local."""
    for name in ("base.img", "top.raw"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(SIZE)
            for at in range(0, SIZE, 4 * MiB):
                os.pwrite(file.fileno(), random.Random(at).randbytes(MiB), at)
    local = [n for n in range(SIZE // CLUSTER) if n % 2]
    cow = overlay_bytes(image="top.raw", size=SIZE, backing="base.img", local=local)
    (tmp_path / "top.add-cow").write_bytes(cow)
    return tmp_path


def no_process() -> list[str]:
    import platform

    known = CALLS.get(platform.machine(), {})
    return [rule for rule in NO_PROCESS if rule.split(":")[0] in known]


WORDS = [
    ("commit", "top.add-cow"),
    ("commit", "--jobs", "0", "top.add-cow"),
    ("commit", "--jobs", "3", "-r", "4G", "--verify", "top.add-cow"),
    ("flatten", "--jobs", "2", "-p", "top.add-cow"),
    ("flatten", "--jobs", "2", "--discard", "top.add-cow"),
    ("compare", "top.add-cow", "top.add-cow"),
    ("convert", "-O", "raw", "--jobs", "2", "top.add-cow", "new.raw"),
    ("manifest", "create", "--jobs", "2", "top.add-cow"),
    ("io", "-c", "aio_write -P 7 0 4k", "-c", "aio_flush", "-c", "read -P 7 0 4k", "top.add-cow"),
    ("farm", "check", "--jobs", "2", "."),
    ("farm", "commit", "--jobs", "2", "."),
    ("farm", "flatten", "--progress-format", "human", "."),
]


@pytest.mark.long
@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_job_without_any_process_or_thread_is_done(here: Path, words: tuple[str, ...]) -> None:
    skip_without_filters()
    result = refusing(no_process(), *words, cwd=here)
    leaks = words[:2] == ("farm", "check")  # garbage under clear bits
    assert result.status == (3 if leaks else 0), result
    if words[0] == "convert":
        same_content("new.raw", "new.raw", cwd=here)


ONCE = """
    import sys, threading
    from multiprocessing import util
    import _posixsubprocess
    real, left = util.spawnv_passfds, [{allowed}]

    def spawn(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return real(*arguments)

    util.spawnv_passfds = spawn
    from addcow_mp.cli.main import run
    if __name__ == "__main__":
        sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.long
@pytest.mark.parametrize("allowed", [0, 1, 2, 3])
def test_job_with_few_processes_is_done(here: Path, allowed: int) -> None:
    """The first one is multiprocessing's own helper."""
    script = here.parent / f"once-{allowed}.py"
    script.write_text(textwrap.dedent(ONCE).format(allowed=allowed))
    words = ["flatten", "--jobs", "3", "top.add-cow"]
    done = ran([sys.executable, str(script), *words], cwd=here)
    assert (done.returncode, done.stderr) == (0, "")
    assert read_header(here / "top.add-cow").compatible == 1


@pytest.mark.long
@pytest.mark.parametrize("limit", [6, 8, 10, 12, 16, 24, 32])
@pytest.mark.parametrize(
    "words",
    [
        ("commit", "--jobs", "4", "top.add-cow"),
        ("flatten", "top.add-cow"),
        ("farm", "commit", "--jobs", "4", "."),
        ("farm", "check", "."),
    ],
    ids=" ".join,
)
def test_command_with_few_descriptors_succeeds_or_fails_in_one_line(
    here: Path, words: tuple[str, ...], limit: int
) -> None:
    def bind() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    done = ran([sys.executable, "-m", "addcow_mp", *words], cwd=here, preexec_fn=bind)
    assert "Traceback" not in done.stderr, done.stderr
    assert "please report" not in done.stdout + done.stderr
    if done.returncode not in (0, 3):
        assert "open files" in done.stdout + done.stderr, done
        # What a farm's check could not look at stands in its list.
        assert len(done.stderr.splitlines()) == (words[:2] != ("farm", "check")), done.stderr


# ---- descriptors where openat2 is missing ----

COUNTING = """
    import os, sys
    import addcow_mp

    def opened():
        return len(os.listdir("/proc/self/fd"))

    def look():
        with addcow_mp.open("top.add-cow") as disk:
            disk.read(0, 512)

    look()
    before = opened()
    for _ in range(20):
        look()
    print(opened() - before, before)
"""


@pytest.mark.long
@pytest.mark.parametrize("answer", ["ENOSYS", "EPERM"])
def test_no_descriptor_leaks_without_openat2(here: Path, answer: str) -> None:
    skip_without_filters()

    def counted(*rules: str) -> list[int]:
        prefix = [sys.executable, str(FILTER), *rules, "--"] if rules else []
        done = subprocess.run(
            [*prefix, sys.executable, "-c", textwrap.dedent(COUNTING)],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
        return [int(word) for word in done.stdout.split()]

    # None for each opening, and none for finding out.
    assert counted(f"openat2:{answer}") == counted()
