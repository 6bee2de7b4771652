"""The file system of an open file, and whether two files can share blocks on it."""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import suppress

from addcow_mp.device.files import File

#: File systems on which two files can always share blocks.
_SHARING = ("btrfs", "bcachefs")

# _IOR('X', 126, struct xfs_fsop_geom): 256 bytes; bit 20 of the flags says that reflinks work.
_XFS_IOC_FSGEOMETRY = 0x8100587E
_GEOMETRY_SIZE, _FLAGS_AT, _REFLINK = 256, 92, 1 << 20


def filesystem_of(file: File) -> str:
    """The type of the file system of an open file; empty if it is unknown."""
    device = file.status.st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with (
        suppress(OSError),
        open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as lines,
    ):
        for line in lines:
            before, _, after = line.partition(" - ")
            if before.split()[2] == wanted:
                return after.split()[0]
    return ""


def can_share(one: File, other: File) -> bool:
    """Whether ``one`` and ``other`` can share blocks, as far as is known."""
    if one.status.st_dev != other.status.st_dev:
        return False
    kind = filesystem_of(one)
    return kind in _SHARING or (kind == "xfs" and _has_reflink(one))


def _has_reflink(file: File) -> bool:
    geometry = bytearray(_GEOMETRY_SIZE)
    try:
        fcntl.ioctl(file.fd, _XFS_IOC_FSGEOMETRY, geometry)
    except OSError:
        return False
    (flags,) = struct.unpack_from("I", geometry, _FLAGS_AT)
    return bool(flags & _REFLINK)
