"""File systems of a test's own: small ones, ones that can die, and directories nested deep."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from support.availability import missing
from support.command import CLUSTER, PATIENCE, KiB, MiB, tool
from support.powercut import Disk, ToolMissingError, UnavailableError, loop_disk


@contextmanager
def available() -> Iterator[None]:
    """Skip the test where a disk cannot be made, or fail where nothing may be missing."""
    try:
        yield
    except ToolMissingError as error:
        missing(str(error))
    except UnavailableError as error:
        pytest.skip(str(error))


def made_disk(kind: str, directory: Path) -> Iterator[Disk]:
    """A file system on a loop device, for as long as the generator lives."""
    with ExitStack() as stack:
        with available():
            disk = stack.enter_context(loop_disk(kind, directory))
        yield disk


@contextmanager
def disks(directory: Path, *kinds: str) -> Iterator[list[Disk]]:
    """File systems, each in a file on the one before; any of them may die."""
    made: list[Disk] = []
    with ExitStack() as stack:
        with available():
            for kind in kinds:
                manager = loop_disk(kind, made[-1].mountpoint if made else directory)
                made.append(manager.__enter__())
                stack.callback(leave, manager)
        yield made


def leave(manager: AbstractContextManager[Disk]) -> None:
    with suppress(OSError):  # what is on a dead file system cannot be removed from it
        manager.__exit__(None, None, None)


def mounted(kind: str, tmp_path: Path, size: int = 4 * MiB, journal: int = MiB) -> Iterator[Path]:
    """A file system of `size` bytes; an ext4 lies on `journal` bytes more."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    here = tmp_path / "disk"
    here.mkdir()
    if kind == "tmpfs":
        words = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
    else:
        with (tmp_path / "device").open("wb") as device:
            device.truncate(size + journal)
        tool("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", "device", cwd=tmp_path)
        words = ["-t", "ext4", "-o", "loop,noatime", str(tmp_path / "device")]
    done = subprocess.run(["mount", *words, str(here)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a {kind} here: {done.stderr.strip()}")
    try:
        yield here
    finally:
        subprocess.run(["umount", str(here)], check=True)


def free(here: Path) -> int:
    """Return the bytes that are free on the file system."""
    os.sync()  # what is not placed yet is not counted yet
    state = os.statvfs(here)
    return state.f_bfree * state.f_frsize


def fill(here: Path, *, leave: int = 0) -> Path:
    """Take all of the free space but `leave` bytes with a file of its own."""
    path = here / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (CLUSTER, 4 * KiB):
            with suppress(OSError):  # what a file system says is free may be needed by itself
                while free(here) >= leave + size:
                    file.write(b"f" * size)
    return path


def remount(place: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True)


def nest(place: Path, depth: int) -> None:
    """Make directories inside each other, from within: their path may be of any length."""
    script = "import os, sys\nfor _ in range(int(sys.argv[1])): os.mkdir('d'); os.chdir('d')"
    subprocess.run([sys.executable, "-c", script, str(depth)], cwd=place, check=True)


def unnest(place: Path) -> None:
    """Remove them again: what cleans up after tests may not be able to."""
    subprocess.run(["rm", "-rf", "d"], cwd=place, check=True, timeout=PATIENCE)


def clear(here: Path) -> None:
    """Remove all files of a directory."""
    for path in here.iterdir():
        path.unlink()
