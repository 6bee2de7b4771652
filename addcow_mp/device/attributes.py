"""The attributes of files that ``lsattr`` shows and ``chattr`` changes."""

from __future__ import annotations

import errno
import fcntl
import struct

# _IOR('f', 1, long) and _IOW('f', 2, long), of which the kernel uses an int.
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS = 0x80086601, 0x40086602

#: Each write is durable at once (``+S``); only appending is allowed (``+a``); no change (``+i``).
SYNCHRONOUS, APPEND_ONLY, IMMUTABLE = 0x08, 0x20, 0x10


def attributes_of(fd: int) -> int:
    """The attributes of an open file, as bits; 0 where its file system has none."""
    answer = bytearray(8)
    try:
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, answer)
    except OSError:
        return 0
    return int.from_bytes(answer[:4], "little")


def has_attribute(fd: int, attribute: int) -> bool:
    """Whether an open file has ``attribute``."""
    return bool(attributes_of(fd) & attribute)


def set_attribute(fd: int, attribute: int, value: bool) -> bool:
    """Set or clear ``attribute``; false where the file system or the permissions refuse it."""
    return why_not_set(fd, attribute, value) is None


def why_not_set(fd: int, attribute: int, value: bool) -> int | None:
    """Set or clear ``attribute``; the error number when that is refused, None when it is done."""
    attributes = attributes_of(fd)
    wanted = attributes | attribute if value else attributes & ~attribute
    if wanted != attributes:
        try:
            fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("Q", wanted))
        except OSError as error:
            return error.errno
    return None if has_attribute(fd, attribute) == value else errno.EOPNOTSUPP
