"""The file system of an open file, and whether two files can share blocks on it."""

from __future__ import annotations

import fcntl
import struct
from functools import lru_cache

from addcow_mp.device.files import File
from addcow_mp.device.mounts import filesystem_type

#: File systems on which two files can always share blocks.
_SHARING = ("btrfs", "bcachefs")

# _IOR('X', 126, struct xfs_fsop_geom): 256 bytes; bit 20 of the flags says that reflinks work.
_XFS_IOC_FSGEOMETRY = 0x8100587E
_GEOMETRY_SIZE, _FLAGS_AT, _REFLINK = 256, 92, 1 << 20


def filesystem_of(file: File) -> str:
    """The type of the file system of an open file; empty if it is unknown."""
    return filesystem_type(file.first_status.st_dev)


def likely_filesystem_of(file: File) -> str:
    """The same, as a hint: looked up once for each device.

    The number of a device that is unmounted may be given to another one.
    """
    return _known_type_on(file.first_status.st_dev)


@lru_cache(maxsize=64)
def _known_type_on(device: int) -> str:
    return filesystem_type(device)


def can_share(one: File, other: File) -> bool:
    """Whether ``one`` and ``other`` can share blocks, as far as is known."""
    if one.first_status.st_dev != other.first_status.st_dev:
        return False
    kind = likely_filesystem_of(one)
    return kind in _SHARING or (kind == "xfs" and _has_reflink(one))


def _has_reflink(file: File) -> bool:
    geometry = bytearray(_GEOMETRY_SIZE)
    try:
        fcntl.ioctl(file.fd, _XFS_IOC_FSGEOMETRY, geometry)
    except OSError:
        return False
    (flags,) = struct.unpack_from("I", geometry, _FLAGS_AT)
    return bool(flags & _REFLINK)
