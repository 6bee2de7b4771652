"""Reasons why a file cannot be changed or removed, found before the change.

Permission bits are not the only reason: a file can be immutable or append-only (chattr), its file
system or device read-only, and removing a name depends on its directory. The only proof that a file
can be written is to open it (:meth:`addcow_mp.device.access.Access.refuse_unwritable`); this module
explains the kernel's answer. Removing cannot be tried without effect, so its conditions are checked
one by one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from addcow_mp.device.attributes import APPEND_ONLY, IMMUTABLE, attributes_of
from addcow_mp.device.files import File

_BLKROGET = 0x125E

_READING = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def why_not_writable(path: str, error: OSError) -> str:
    """The reason for ``error``, which opening the file at ``path`` for writing has raised."""
    reason = error.strerror or str(error)
    return _attribute(path) or reason if error.errno == errno.EPERM else reason


def why_not_removable(path: str) -> str | None:
    """Why the file that ``path`` leads to cannot be removed; None if it can."""
    path = os.path.realpath(path)
    directory = os.path.dirname(path)
    attribute = _attribute(path)
    if attribute is not None:
        return attribute
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        return f"{_why_not_accessible(directory)}: {directory}"
    if _attribute(directory) is not None:  # an immutable one was not accessible
        return f"its directory is append-only: {directory}; chattr -a ends that"
    if _is_sticky(path, directory):
        return f"it belongs to another user, in a directory with the sticky bit: {directory}"
    return None


def _why_not_accessible(directory: str) -> str:
    try:
        if os.statvfs(directory).f_flag & os.ST_RDONLY:
            return "its file system is mounted read-only"
    except OSError:
        return "its directory cannot be looked at"
    immutable = _attribute(directory) is not None
    return "its directory is immutable" if immutable else "no permission to write its directory"


def _attribute(path: str) -> str | None:
    """The attribute that protects a file from every user, and how to clear it; None if none."""
    try:
        fd = os.open(path, _READING)
    except OSError:
        return None
    try:
        attributes = attributes_of(fd)
    finally:
        os.close(fd)
    if attributes & IMMUTABLE:
        return "it is immutable; chattr -i ends that"
    return "it is append-only; chattr -a ends that" if attributes & APPEND_ONLY else None


def is_read_only(device: File) -> bool:
    """Whether an open block device refuses writes."""
    answer = bytearray(4)
    with device.doing("ask whether it is read-only"):
        fcntl.ioctl(device.fd, _BLKROGET, answer)
    return any(answer)


def _is_sticky(path: str, directory: str) -> bool:
    """Whether the sticky bit of the directory forbids this user to remove the file."""
    try:
        holder, file = os.stat(directory), os.lstat(path)
    except OSError:
        return False
    user = os.geteuid()
    return bool(holder.st_mode & stat.S_ISVTX) and user not in (0, holder.st_uid, file.st_uid)
