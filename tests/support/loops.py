"""Loop devices, partitions and mounts for tests: real ones, and none is left behind."""

import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from support.availability import missing

_BLKPG, _ADD_PARTITION, _DELETE_PARTITION = 0x1269, 1, 2


def run(*words: str) -> str:
    """Run a tool of the system and insist on success."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    return done.stdout


class Loops:
    """Makes devices and mounts; all of them go when the stack is closed, the last one first."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def bind(self, path: Path | str, *options: str) -> str:
        """Bind a loop device to a file or device; returns its path."""
        words = ["losetup", "--find", "--show", *options, str(path)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            missing(f"a loop device cannot be set up: {done.stderr.strip()}")
        device = done.stdout.strip()
        self._stack.callback(run, "losetup", "--detach", device)
        return device

    def partition(self, device: str, number: int, start: int, length: int) -> str:
        """Make a partition of a loop device known to the kernel; returns its path."""
        self._change_partition(device, _ADD_PARTITION, number, start, length)
        self._stack.callback(self._change_partition, device, _DELETE_PARTITION, number, 0, 0)
        return f"{device}p{number}"

    def _change_partition(self, device: str, what: int, *numbers: int) -> None:
        number, start, length = numbers
        content = struct.pack("qqi", start, length, number).ljust(152, b"\0")
        buffer = ctypes.create_string_buffer(content, 152)
        request = struct.pack("iiiP", what, 0, 152, ctypes.addressof(buffer))
        with open(device, "rb") as disk:
            fcntl.ioctl(disk, _BLKPG, request)

    def ext4(self, device: str, place: Path, *options: str) -> Path:
        """Make an ext4 on the device and mount it; returns where."""
        run("mkfs.ext4", "-q", "-F", device)
        return self.mount(device, place, *options)

    def mount(self, device: str, place: Path, *options: str) -> Path:
        """Mount a device."""
        place.mkdir(exist_ok=True)
        run("mount", *options, device, str(place))
        self._stack.callback(run, "umount", str(place))
        return place

    def later(self, call: Callable[..., object], *words: object) -> None:
        """Undo something else when the test has ended."""
        self._stack.callback(call, *words)


@contextmanager
def loops() -> Iterator[Loops]:
    """Yield what makes loop devices; skips where they cannot be had."""
    if os.geteuid() != 0 or not shutil.which("losetup") or not shutil.which("mkfs.ext4"):
        missing("loop devices need root, losetup and mkfs.ext4")
    with ExitStack() as stack:
        yield Loops(stack)
