"""The files that the benchmark works on, and the file systems that they lie on.

The data is noise without zeros, and no two runs of it are equal, so no tool can skip work and a run
at a wrong place is noticed. Overlays are made by the package, their qcow2 twins from the same image
file: `qemu-img convert` copies all but holes, and an unsafe rebase adds the backing file.
Both have the same virtual size, the same allocated clusters of the same size, and backing files
with the same content.

*Hot* files have just been read; *cold* ones have been dropped from the page cache, so that files
which a case does not use take no memory. This works only for data that is on disk, so everything is
synced first.

XFS comes from a loop device, which only root can make. It bypasses the page cache of the file
system below (direct I/O), so that nothing is cached twice and a sync means the same there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import addcow_mp
from addcow_mp.units import GiB, KiB, MiB

Run = tuple[int, int]
"""The bytes [start, stop)."""

#: What a backing file held before and what an overlay has over it: two kinds of noise.
OLD, NEW = 0, 1

CLUSTER = 64 * KiB

#: Blocks of the file system: what is empty of them becomes a hole.
BLOCK = 4 * KiB

#: One request of making files: no run is longer.
LONGEST = 16 * MiB

_STEP = 1 * MiB

#: A prime number: adjacent places begin far from each other in the noise.
_STRIDE = 8191


class BenchError(Exception):
    """Something that the benchmark needs has failed; the text says what."""


class CannotError(BenchError):
    """Something that the benchmark needs does not exist here: its cases are skipped."""


def tool(*arguments: str | Path, cwd: Path | None = None) -> str:
    """Run a tool, raise if it fails, return its output."""
    done = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = " ".join(map(str, arguments))
        raise BenchError(f"{words}: exit status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


# ---- content ----


def alternating(total: int, run: int, gap: int | None = None) -> list[Run]:
    """Runs of ``run`` bytes, ``total`` in all and at least one, each followed by a gap."""
    step = run + (run if gap is None else gap)
    return [(index * step, index * step + run) for index in range(max(1, total // run))]


@cache
def _noise() -> memoryview:
    return memoryview(os.urandom(2 * LONGEST))


def noise(start: int, length: int, kind: int) -> memoryview:
    """The bytes that a file of this kind holds in a run that begins at ``start``."""
    at = (start // 512 + kind) * _STRIDE % LONGEST
    return _noise()[at : at + length]


def write_raw(path: Path, size: int, runs: Iterable[Run], kind: int) -> None:
    """Make a raw file with data in ``runs`` and holes elsewhere."""
    with path.open("wb", buffering=0) as file:
        file.truncate(size)
        for start, stop in runs:
            os.pwrite(file.fileno(), noise(start, stop - start, kind), start)


def write_overlay(path: Path, backing: str, size: int, runs: Iterable[Run]) -> None:
    """Make an overlay over the raw file ``backing`` beside it, allocated in ``runs``."""
    addcow_mp.create(path, size=size, backing=backing, backing_format="raw")
    unsynced = addcow_mp.Access(durable=False)
    with addcow_mp.open(path, writable=True, access=unsynced) as disk:
        for start, stop in runs:
            disk.write(start, noise(start, stop - start, NEW))


def write_qcow2(path: Path, backing: str, image: Path) -> None:
    """Make the qcow2 twin of an overlay whose image file is ``image``."""
    convert = ("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", f"cluster_size={CLUSTER}")
    tool(*convert, image, path)
    tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", backing, path)


def write_chain(here: Path, total: int, run: int) -> None:
    """Make a base and an overlay whose runs alternate, the same as qcow2, and the view as raw."""
    runs = alternating(total, run, 0)
    size = runs[-1][1]
    write_raw(here / "base.raw", size, runs[::2], OLD)
    write_overlay(here / "top.add-cow", "base.raw", size, runs[1::2])
    write_qcow2(here / "top.qcow2", "base.raw", here / "top.raw")
    tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", here / "top.qcow2", here / "all.raw")


def write_many_qcow2(here: Path, backing: str, count: int) -> None:
    """Make ``count`` empty qcow2 overlays over ``backing``, and a list of their names."""
    directory = here / "qcow2"
    directory.mkdir()
    first = directory / "vm-0.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", f"../{backing}", first)
    content = first.read_bytes()
    for number in range(1, count):
        write_sparse(directory / f"vm-{number}.qcow2", content)
    names = [f"qcow2/vm-{number}.qcow2" for number in range(count)]
    (here / "images").write_text("\n".join(names))


def write_sparse(path: Path, content: bytes) -> None:
    """Write a file whose empty blocks are holes, as qemu-img leaves them."""
    with path.open("wb") as file:
        for start in range(0, len(content), BLOCK):
            block = content[start : start + BLOCK]
            if block.strip(b"\0"):
                file.seek(start)
                file.write(block)
        file.truncate(len(content))


def same(one: Path, other: Path, other_format: str = "raw") -> None:
    """Raise unless ``other`` shows the content of the raw file ``one``."""
    tool("qemu-img", "compare", "-q", "-f", "raw", "-F", other_format, one, other)


def remove(*paths: Path) -> None:
    """Remove files that may or may not exist."""
    for path in paths:
        path.unlink(missing_ok=True)


# ---- the page cache ----


def warm_only(directory: Path, hot: Iterable[str]) -> None:
    """Sync everything, then let the page cache hold the ``hot`` files and no others of these.

    A hot directory stands for all files below it; files in directories are not forgotten.
    """
    os.sync()
    names = set(hot)
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.name not in names:
            forget(path)
    for name in names:
        place = directory / name
        below = place.rglob("*") if place.is_dir() else [place]
        for path in below:
            if path.is_file():
                warm(path)


def forget(path: Path) -> None:
    """Drop the file from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def warm(path: Path) -> None:
    """Read what the file holds, once; nothing is read from holes."""
    buffer = memoryview(bytearray(_STEP))
    fd = os.open(path, os.O_RDONLY)
    try:
        for start, stop in _data(fd):
            for at in range(start, stop, _STEP):
                os.preadv(fd, [buffer], at)
    finally:
        os.close(fd)


def _data(fd: int) -> Iterator[Run]:
    stop = 0
    while True:
        try:
            start = os.lseek(fd, stop, os.SEEK_DATA)
        except OSError:  # ENXIO: no data behind this
            return
        stop = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, stop


# ---- file systems ----


def filesystem_of(directory: Path) -> str:
    """The type of the file system that ``directory`` is on."""
    return tool("df", "--output=fstype", directory).split()[-1]


def free_space(directory: Path) -> int:
    """Bytes that can be written there."""
    return shutil.disk_usage(directory).free


@contextmanager
def xfs(directory: Path, size: int) -> Iterator[Path]:
    """A new XFS with reflink, ``size`` bytes large, mounted beneath ``directory``.

    Raises :class:`CannotError` where that cannot be had.
    """
    _refuse_without_loop()
    file, mounted = directory / "xfs.img", directory / "xfs"
    with file.open("wb") as made:
        made.truncate(size + GiB)
    try:
        tool("mkfs.xfs", "-q", "-K", "-m", "reflink=1", file)
        mounted.mkdir()
        with _attached(file) as device:
            _mount(device, mounted)
            try:
                yield mounted
            finally:
                _unmount(mounted)
        mounted.rmdir()
    finally:
        remove(file)


def _unmount(directory: Path) -> None:
    """Unmount and remove the file system, even if an interrupted process still uses it."""
    _first_of(("umount", directory), ("umount", "--lazy", directory))


def _refuse_without_loop() -> None:
    if os.geteuid() != 0:
        raise CannotError("XFS on a loop device is for root only")
    for name in ("mkfs.xfs", "losetup", "mount", "umount"):
        if shutil.which(name) is None:
            raise CannotError(f"{name} is not installed")


@contextmanager
def _attached(file: Path) -> Iterator[str]:
    attach = ("losetup", "--find", "--show")
    try:
        device = _first_of(*((*attach, *how, file) for how in (("--direct-io=on",), ())))
    except BenchError as error:
        raise CannotError(f"no loop device: {error}") from error
    try:
        yield device.strip()
    finally:
        tool("losetup", "--detach", device.strip())


def _first_of(*commands: tuple[str | Path, ...]) -> str:
    """The output of the first of these commands that succeeds."""
    for command in commands[:-1]:
        try:
            return tool(*command)
        except BenchError:
            continue
    return tool(*commands[-1])


def _mount(device: str, directory: Path) -> None:
    try:
        tool("mount", "-t", "xfs", device, directory)
    except BenchError as error:
        raise CannotError(f"XFS cannot be mounted: {error}") from error
