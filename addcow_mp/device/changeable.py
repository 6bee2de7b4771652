"""What stands against changing a file, asked for before it is needed.

Permission bits are the least of it: a file can be immutable or append-only (chattr), its file
system or device read-only, and whether a name can be removed is a matter of its directory. The
proof that a file can be written is opening it for writing, which
:meth:`addcow_mp.device.access.Access.refuse_unwritable` does; here is what the kernel's answer
means, and what removing takes, for which there is no harmless try.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from addcow_mp.device.files import File

# _IOR('f', 1, long), of which the kernel fills an int.
_FS_IOC_GETFLAGS = 0x80086601
_BLKROGET = 0x125E
_APPEND_ONLY, _IMMUTABLE = 0x20, 0x10

_LOOKING = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def why_not_writable(path: str, error: OSError) -> str:
    """What ``error``, met in opening the file at ``path`` for writing, means."""
    reason = error.strerror or str(error)
    if error.errno == errno.EPERM:
        return _attribute(path) or reason
    return reason


def why_not_removable(path: str) -> str | None:
    """Why the name of the file that ``path`` leads to cannot be removed; None when it can."""
    path = os.path.realpath(path)
    directory = os.path.dirname(path)
    attribute = _attribute(path)
    if attribute is not None:
        return attribute
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        return f"{_closed(directory)}: {directory}"
    if _attribute(directory) is not None:  # an immutable one was not accessible
        return f"its directory is append-only: {directory}; chattr -a ends that"
    if _is_others(path, directory):
        return f"it belongs to another user, in a directory with the sticky bit: {directory}"
    return None


def _closed(directory: str) -> str:
    """Why a directory may not be written."""
    try:
        if os.statvfs(directory).f_flag & os.ST_RDONLY:
            return "its file system is mounted read-only"
    except OSError:
        return "its directory cannot be looked at"
    immutable = _attribute(directory) is not None
    return "its directory is immutable" if immutable else "no permission to write its directory"


def _attribute(path: str) -> str | None:
    """The attribute of a file that keeps everybody from changing it, and what ends that."""
    try:
        fd = os.open(path, _LOOKING)
    except OSError:
        return None
    try:
        answer = bytearray(8)
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, answer)
    except OSError:
        return None  # a file system without such attributes
    finally:
        os.close(fd)
    (flags,) = struct.unpack_from("I", answer)
    if flags & _IMMUTABLE:
        return "it is immutable; chattr -i ends that"
    return "it is append-only; chattr -a ends that" if flags & _APPEND_ONLY else None


def is_read_only(device: File) -> bool:
    """Whether an open block device takes no writes."""
    answer = bytearray(4)
    with device.doing("ask whether it is read-only"):
        fcntl.ioctl(device.fd, _BLKROGET, answer)
    return any(answer)


def _is_others(path: str, directory: str) -> bool:
    """Whether the sticky bit of the directory keeps this user from removing the file."""
    try:
        holder, file = os.stat(directory), os.lstat(path)
    except OSError:
        return False
    user = os.geteuid()
    return bool(holder.st_mode & stat.S_ISVTX) and user not in (0, holder.st_uid, file.st_uid)
