"""Disks for real guests, and what guests do with them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from tempfile import TemporaryDirectory

import guest
from support.command import MiB, addcow, ran, succeed, tool

#: What a guest does: it deletes a file and writes 8 MiB, which it looks for the next time.
ORDERS = """
if [ -e old ]; then
    rm old
    dd if=/dev/urandom of=new bs=1M count=8 2>/dev/null
    sync
    fstrim /disk
fi
sha256sum kept new
"""


def make_golden(path: Path) -> None:
    """Make a golden image: an ext4 disk with a file to keep and one to delete."""
    with TemporaryDirectory() as files:
        Path(files, "kept").write_bytes(os.urandom(2 * MiB))
        Path(files, "old").write_bytes(os.urandom(4 * MiB))
        guest.make_disk(path, Path(files), 64 * MiB)


def disk_of(overlay: str, *, cwd: Path) -> list[str]:
    """The words with which a machine gets a lent overlay as its disk."""
    return shlex.split(succeed("qemu", "args", overlay, cwd=cwd).stdout)


def sums(printed: str, *files: str) -> list[str]:
    """The checksums that a guest printed of these files, or else of those of its orders."""
    ends = tuple(f"  {name}" for name in files or ("kept", "new"))
    found = [line for line in printed.splitlines() if line.endswith(ends)]
    assert len(found) == len(ends), printed
    return found


def assert_sound(overlay: str, *, cwd: Path) -> None:
    """Let check and e2fsck look at an overlay that a guest has switched off cleanly."""
    assert addcow("check", overlay, cwd=cwd).status == 0
    succeed("convert", "-O", "raw", overlay, "seen.raw", cwd=cwd)
    tool("e2fsck", "-fn", "seen.raw", cwd=cwd)
    (cwd / "seen.raw").unlink()


def sum_in(disk: Path, file: str) -> str:
    """The checksum of a file in a raw disk, which debugfs reads."""
    target = disk.with_name("dumped")
    done = ran(["debugfs", "-R", f'dump {file} "{target}"', disk])
    assert done.returncode == 0, done
    return tool("sha256sum", str(target), cwd=disk.parent).split()[0] + f"  {file}"
