"""Other users of the storage of a file that will be written: mounts, swap, mappings, loop devices.

The kernel knows exclusive users of block devices (mounts, device mapper, md, swap, programs that
opened the device with O_EXCL), for a disk and its partitions together. A device to be written is
opened with O_EXCL; this module only finds the name of the holder when that fails.

The file beneath a loop device has no such protection: writing it, or another device over the same
file, destroys what is mounted. So each loop device and each of its partitions is followed down to
the file or disk that holds its bytes, through any number of loop devices. If it overlaps the
storage of a file to be written and is in use, the file is refused. A loop device that is bound but
not in use is no obstacle: nothing of it stays in a cache after its last user has closed it.

Loop devices are looked up at most ten times a second. A mount made while a job runs is not noticed.
Programs that open a loop device without O_EXCL and without locks cannot be found, and storage is
not followed through device mapper and md, which claim what they lie on.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from addcow_mp.device.files import File, device_identity, identity_of, is_device
from addcow_mp.device.locks import is_locked, open_files, other_processes, process_name
from addcow_mp.errors import HeldError, ImageError
from addcow_mp.units import MAX_SIZE, SECTOR

#: Seconds for which found loop devices and swap files are reused: long enough that a farm of
#: thousands looks a few hundred times, too short for a user to bind and mount something.
REUSED = 0.1

#: The kernel allows no cycles of loop devices; deeper stacks are not followed.
MAX_DEPTH = 16

# struct loop_info64: device, inode, device of a device, offset, size limit, and much more.
_LOOP_GET_STATUS64 = 0x4C05
_STATUS_SIZE, _STATUS = 232, struct.Struct("QQQQQ")

_READING = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class Storage(NamedTuple):
    """Where the bytes of a file or device lie: in ``[start, stop)`` of the file ``identity``."""

    identity: tuple[int, int]
    start: int = 0
    stop: int = MAX_SIZE

    def part(self, start: int, length: int) -> Storage:
        """A part of it; a ``length`` of 0 means all of the rest."""
        first = self.start + start
        return Storage(self.identity, first, min(self.stop, first + (length or MAX_SIZE)))

    def overlaps(self, other: Storage) -> bool:
        """Whether they have bytes in common."""
        same_file = self.identity == other.identity
        return same_file and max(self.start, other.start) < min(self.stop, other.stop)


class Node(NamedTuple):
    """A loop device, or a partition of one; ``divided`` if it has partitions itself."""

    name: str
    disk: str
    device: int
    storage: Storage
    divided: bool


class _Found(NamedTuple):
    """Loop devices and swap files, and when they were found."""

    time: float
    nodes: tuple[Node, ...]
    swap_files: frozenset[tuple[int, int]]


_found: list[_Found] = []


def refuse_held(file: File, *, locking: bool = True) -> None:
    """Raise :class:`HeldError` if another user has the storage of ``file``, to be written."""
    status = file.first_status
    found = _look_up()
    if identity_of(status) in found.swap_files:
        raise HeldError(path=file.path, holder="it is used as swap")
    if not found.nodes:
        return
    own, disk = storage_of(status), _disk_of(status)
    for node in found.nodes:
        if node.disk != disk and node.storage.overlaps(own):
            user = _user_of(node, locking=locking)
            if user is not None:
                holder = f"/dev/{node.name}, a loop device over it, {user}"
                raise HeldError(path=file.path, holder=holder)


def refuse_same_storage(file: File, others: list[File]) -> None:
    """Raise if a device gives ``file`` and one of the ``others`` the same bytes."""
    own = storage_of(file.status)
    for other in others:
        if other is not file and storage_of(other.status).overlaps(own):
            raise ImageError(
                path=file.path,
                problem=f"its bytes are those of '{other.path}', which is in the chain already; "
                "overlay, image file and backing file must be different files",
            )


def busy(path: str) -> HeldError:
    """The error for the block device at ``path``, which could not be opened with O_EXCL."""
    holder = "the kernel or another program holds the device"
    with suppress(OSError):
        device = os.stat(path).st_rdev
        names = {number: f"/dev/{name}" for name, number in _relatives(device)} | {device: "it"}
        for number, name in names.items():
            user = _named_user(number) or _mounted_elsewhere(number)
            if user is not None:
                return HeldError(path=path, holder=f"{name} {user}")
        for number, name in names.items():
            process = _process_with({number})
            if process is not None:
                return HeldError(path=path, holder=f"{process} has {name} open")
    return HeldError(path=path, holder=holder)


# Where bytes lie


def storage_of(status: os.stat_result) -> Storage:
    """The storage of a file or block device with this ``status``."""
    if stat.S_ISBLK(status.st_mode):
        return _device_storage(status.st_rdev)
    return Storage(identity_of(status))


def _device_storage(device: int, depth: int = 0) -> Storage:
    here, itself = _sys(device), Storage(device_identity(device))
    if depth >= MAX_DEPTH:
        return itself
    if _is_partition(here):
        start, length = (_number(f"{here}/{name}") * SECTOR for name in ("start", "size"))
        disk = _device_at(os.path.dirname(os.path.realpath(here)))
        return _device_storage(disk, depth + 1).part(start, length)
    if os.path.exists(f"{here}/loop"):
        return _loop_storage(os.path.basename(os.path.realpath(here)), depth) or itself
    return itself


def _loop_storage(name: str, depth: int = 0) -> Storage | None:
    """The storage of a loop device; None if it is not bound."""
    answer = bytearray(_STATUS_SIZE)
    try:
        fd = _open_node(name, _READING)
        try:
            fcntl.ioctl(fd, _LOOP_GET_STATUS64, answer)
        finally:
            os.close(fd)
    except OSError as error:
        return None if error.errno == errno.ENXIO else _loop_storage_by_path(name, depth)
    device, inode, below, offset, limit = _STATUS.unpack_from(answer)
    base = _device_storage(below, depth + 1) if below else Storage((device, inode))
    return base.part(offset, limit)


def _loop_storage_by_path(name: str, depth: int) -> Storage | None:
    """The same for a device that cannot be opened: by the path that sysfs shows."""
    here = f"/sys/block/{name}/loop"
    try:
        with open(f"{here}/backing_file", "rb") as file:
            status = os.stat(file.read().rstrip(b"\n").removesuffix(b" (deleted)"))
        offset, limit = (_number(f"{here}/{one}") for one in ("offset", "sizelimit"))
    except OSError:
        return None
    block = stat.S_ISBLK(status.st_mode)
    base = _device_storage(status.st_rdev, depth + 1) if block else Storage(identity_of(status))
    return base.part(offset, limit)


# Loop devices


def forget_loops() -> None:
    """Look up loop devices again at the next call, however soon."""
    _found.clear()


def _look_up() -> _Found:
    now = time.monotonic()
    # Another thread may clear the list at any time.
    for one in _found[:]:
        if now - one.time <= REUSED:
            return one
    swap_files = frozenset(one for one in _swap() if not is_device(one))
    found = _Found(now, tuple(_nodes()), swap_files)
    _found[:] = [found]
    return found


def _nodes() -> Iterator[Node]:
    """All bound loop devices, and their partitions."""
    for disk in _listed("/sys/block"):
        here = f"/sys/block/{disk}"
        if disk.startswith("loop") and os.path.exists(f"{here}/loop/backing_file"):
            # A partition has the name of its disk at the beginning: few of these are looked at.
            names = (one for one in _listed(here) if one.startswith(disk))
            parts = [one for one in names if _is_partition(f"{here}/{one}")]
            with suppress(OSError):
                storage = _loop_storage(disk)
                if storage is not None:
                    yield Node(disk, disk, _device_at(here), storage, bool(parts))
                for part in parts:
                    device = _device_at(f"{here}/{part}")
                    yield Node(part, disk, device, _device_storage(device), divided=False)


def _user_of(node: Node, *, locking: bool) -> str | None:
    """The use of a device, as a verb phrase; None if it is not in use."""
    user = _named_user(node.device)
    if user is not None or node.divided:
        return user
    try:
        fd = _open_node(node.name, _READING | os.O_EXCL)
    except OSError as error:
        if error.errno != errno.EBUSY:
            return None
        process = _process_with({number for _, number in _relatives(node.device)})
        by = "" if process is None else f" by {process}"
        return _mounted_elsewhere(node.device) or f"is held{by}"
    try:
        return "is in use by another program" if locking and is_locked(fd) else None
    finally:
        os.close(fd)


def _disk_of(status: os.stat_result) -> str | None:
    """The name of the disk that a block device is, or is a partition of."""
    if not stat.S_ISBLK(status.st_mode):
        return None
    here = os.path.realpath(_sys(status.st_rdev))
    return os.path.basename(os.path.dirname(here) if _is_partition(here) else here)


# Users of one device


def _named_user(device: int) -> str | None:
    """The use of a device that the kernel knows: a mount, a mapping or swap."""
    place = _mounted_at(device, "/proc/self/mountinfo")
    if place is not None:
        return f"is mounted on {place}"
    holders = _listed(f"{_sys(device)}/holders")
    if holders:
        return f"is held by {', '.join(map(_mapping, sorted(holders)))}"
    return "is used as swap" if device_identity(device) in _swap() else None


def _mapping(name: str) -> str:
    """The path of a holder; device mapper gives its devices names."""
    with suppress(OSError), open(f"/sys/block/{name}/dm/name", encoding="utf-8") as file:
        return f"/dev/mapper/{file.read().strip()}"
    return f"/dev/{name}"


def _mounted_at(device: int, table: str) -> str | None:
    """Where a file system of this device is mounted, according to the file ``table``."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError), open(table, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            words, source = before.split(), after.split()[1:2]
            if words[2] == number or (words[2].startswith("0:") and _is_source(source, device)):
                return _unescaped(words[4])
    return None


def _is_source(source: list[str], device: int) -> bool:
    """Whether a file system with a device number of its own, like btrfs, lies on the device."""
    if not source or not source[0].startswith("/"):
        return False
    with suppress(OSError):
        status = os.stat(_unescaped(source[0]))
        return stat.S_ISBLK(status.st_mode) and status.st_rdev == device
    return False


def _mounted_elsewhere(device: int) -> str | None:
    """The mount of a device in another mount namespace, with a process of that namespace."""
    seen: set[str] = set()
    for pid in other_processes():
        with suppress(OSError):
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace not in seen:
                seen.add(namespace)
                place = _mounted_at(device, f"/proc/{pid}/mountinfo")
                if place is not None:
                    return f"is mounted on {place} for {process_name(pid)}"
    return None


def _process_with(devices: set[int]) -> str | None:
    """A process that has one of the devices open."""
    for pid, _, status in open_files():
        if stat.S_ISBLK(status.st_mode) and status.st_rdev in devices:
            return process_name(pid)
    return None


def _swap() -> Iterator[tuple[int, int]]:
    """The files and devices that are used as swap."""
    with suppress(OSError), open("/proc/swaps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file.readlines()[1:]:
            with suppress(OSError):
                yield identity_of(os.stat(_unescaped(line.split()[0])))


# sysfs and /dev


def _relatives(device: int) -> list[tuple[str, int]]:
    """Name and number of the device, of its partitions, and of the disk that it is a part of."""
    here = os.path.realpath(_sys(device))
    parts = [f"{here}/{one}" for one in _listed(here)]
    places = [here, *filter(_is_partition, parts)]
    if _is_partition(here):
        places.append(os.path.dirname(here))
    return [(os.path.basename(one), _device_at(one)) for one in places]


def _sys(device: int) -> str:
    return f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"


def _is_partition(place: str) -> bool:
    """Whether a directory of sysfs describes a partition."""
    return os.path.exists(f"{place}/partition")


def _device_at(place: str) -> int:
    """The number of the device that a directory of sysfs describes."""
    with open(f"{place}/dev", encoding="ascii") as file:
        major, minor = map(int, file.read().split(":"))
    return os.makedev(major, minor)


def _number(path: str) -> int:
    with open(path, encoding="ascii") as file:
        return int(file.read())


def _open_node(name: str, flags: int) -> int:
    """Open /dev/``name``, if it is the device that sysfs describes under this name."""
    fd = os.open(f"/dev/{name}", flags)
    if os.fstat(fd).st_rdev != _device_at(f"/sys/class/block/{name}"):
        os.close(fd)
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
    return fd


def _listed(directory: str) -> list[str]:
    with suppress(OSError):
        return os.listdir(directory)
    return []


def _unescaped(path: str) -> str:
    r"""A path of a table in /proc, where blanks and the like are octal, as in ``\040``."""
    head, *parts = path.split("\\")
    return head + "".join(chr(int(one[:3], 8)) + one[3:] for one in parts)
