"""Tests of `--idle`: every process with an open image has the idle priority.

The processes are examined while they work; fault rules would keep the parent out of the work.
"""

from __future__ import annotations

import ctypes
import os
import platform
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from support.command import CLUSTER, PATIENCE, MiB, draw, draw_raw, overlay_bytes, succeed

pytestmark = pytest.mark.sample(1)

_IOPRIO_GET = {"x86_64": 252, "aarch64": 31}
_IDLE = 3


def priority_class(pid: int) -> int:
    """The class of input and output priority of a process."""
    number = _IOPRIO_GET.get(platform.machine())
    if number is None:
        pytest.skip(f"the number of ioprio_get on {platform.machine()} is not known")
    return int(ctypes.CDLL(None, use_errno=True).syscall(number, 1, pid)) >> 13


def members(group: int) -> Iterator[int]:
    """The processes of a group."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.getpgid(int(name)) == group:
                yield int(name)


def opened(pid: int) -> set[str]:
    """The kinds of files of images that a process has open."""
    found = set()
    with suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                found.add(os.path.splitext(os.readlink(f"/proc/{pid}/fd/{fd}"))[1])
    return found & {".img", ".raw", ".add-cow"}


def classes_of(*words: str, cwd: Path) -> set[int]:
    """The classes of all processes of a command at moments at which they have an image open."""
    process = subprocess.Popen(
        [sys.executable, "-m", "addcow_mp", *words],
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    found = set()
    while process.poll() is None:
        for pid in members(process.pid):
            before, seen, after = opened(pid), priority_class(pid), opened(pid)
            if before and after:  # one that has ended is of no class
                found.add(seen)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr
    assert found, "no process was seen at work"
    return found


SINGLE = [
    ("commit", "--jobs", "0"),
    ("commit", "--verify"),
    ("flatten",),
    ("flatten", "--jobs", "2"),
    ("compare", "-F", "raw", "base.img"),
    ("convert", "-O", "raw", "new.raw"),
    ("manifest", "create"),
]


def lay(here: Path) -> None:
    content = random.Random(3).randbytes(48 * MiB)
    (here / "base.img").write_bytes(content)
    (here / "top.raw").write_bytes(content)
    local = range(0, len(content) // CLUSTER, 2)
    cow = overlay_bytes(image="top.raw", size=len(content), backing="base.img", local=local)
    (here / "top.add-cow").write_bytes(cow)


@pytest.mark.parametrize("words", SINGLE, ids=" ".join)
def test_idle_option_applies_to_every_process(tmp_path: Path, words: tuple[str, ...]) -> None:
    lay(tmp_path)
    job = words[: 2 if words[0] == "manifest" else 1]
    last = [word for word in words if word.endswith((".raw", ".img"))]
    options = [word for word in words[len(job) :] if word not in last]
    line = (*job, "--idle", *options, "top.add-cow", *last)
    assert classes_of(*line, cwd=tmp_path) == {_IDLE}


@pytest.mark.long
def test_processes_are_not_idle_without_the_option(tmp_path: Path) -> None:
    lay(tmp_path)
    assert _IDLE not in classes_of("commit", "top.add-cow", cwd=tmp_path)


FARM = [("check",), ("check", "--jobs", "0"), ("commit", "--dry-run"), ("commit",), ("verify",)]


@pytest.mark.long
@pytest.mark.parametrize("words", FARM, ids=" ".join)
def test_idle_option_applies_to_farm_commands(tmp_path: Path, words: tuple[str, ...]) -> None:
    for number in range(150):
        draw_raw(tmp_path / f"{number}.img", "AB-D")
        draw(tmp_path / f"{number}-top.add-cow", "-X-Y", f"{number}.img")
        if words == ("verify",) and number < 20:
            succeed("manifest", "create", "-q", f"{number}-top.add-cow", cwd=tmp_path)
    places = [f"{n}-top.add-cow" for n in range(20)] if words == ("verify",) else ["."]
    line = ("farm", words[0], "--idle", *words[1:], *places)
    assert classes_of(*line, cwd=tmp_path) == {_IDLE}
