"""The attribute of a file that makes each of its writes durable at once (``chattr +S``)."""

from __future__ import annotations

import fcntl
import struct

from addcow_mp.device.files import File

# _IOR('f', 1, long) and _IOW('f', 2, long), of which the kernel uses an int.
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS = 0x80086601, 0x40086602
_SYNCHRONOUS = 0x08


def is_synchronous(file: File) -> bool:
    """Whether the file has the attribute; a file system without attributes has none."""
    try:
        return bool(_flags(file.fd) & _SYNCHRONOUS)
    except OSError:
        return False


def set_synchronous(file: File, value: bool) -> bool:
    """Set or clear the attribute; false where the file system or the permissions refuse it."""
    try:
        flags = _flags(file.fd)
        wanted = flags | _SYNCHRONOUS if value else flags & ~_SYNCHRONOUS
        if wanted != flags:
            fcntl.ioctl(file.fd, _FS_IOC_SETFLAGS, struct.pack("Q", wanted))
        return bool(_flags(file.fd) & _SYNCHRONOUS) == value
    except OSError:
        return False


def _flags(fd: int) -> int:
    answer = bytearray(8)
    fcntl.ioctl(fd, _FS_IOC_GETFLAGS, answer)
    (flags,) = struct.unpack_from("I", answer)
    return int(flags)
