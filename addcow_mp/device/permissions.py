"""Who may read a new file: only users who may read every file that its data comes from.

A new image file, a converted disk and a manifest hold data, or digests of data, of the files of a
chain. A user who may not read one of these must not read the data in the new file either. Files are
compared by their permission bits: a new file gets the usual mode without the bits that one of its
sources lacks.

Group bits count only if the group is the same. If the groups differ, or if an access control list
changes the meaning of the group bits, a source that not everybody may read gives its group nothing.
The owner of a new file is the user who runs the command and has read all sources.

A file is created with the fewest bits while it is empty, and gets more only then.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

#: Permission bits of new files, before the umask.
USUAL_MODE = 0o644
PRIVATE_MODE = 0o600

_ACL = "system.posix_acl_access"


class Readers(NamedTuple):
    """The users other than the owner who may read: everybody, or a ``group``, or none."""

    everybody: bool = True
    group: int | None = None

    @property
    def mode(self) -> int:
        """The permission bits with which to create a file for these readers."""
        return USUAL_MODE if self.everybody else PRIVATE_MODE


EVERYBODY = Readers()


def readers_of(descriptors: Iterable[int]) -> Readers:
    """The users who may read all of these open files."""
    groups: set[int | None] = set()
    for fd in descriptors:
        status = os.fstat(fd)
        allowed = status.st_mode & (stat.S_IRGRP | stat.S_IROTH)
        if allowed != stat.S_IRGRP | stat.S_IROTH:
            by_group = allowed == stat.S_IRGRP and not _has_acl(fd)
            groups.add(status.st_gid if by_group else None)
    if not groups:
        return EVERYBODY
    return Readers(everybody=False, group=groups.pop() if len(groups) == 1 else None)


def set_readers(fd: int, readers: Readers) -> None:
    """Set the permission bits of the new, empty, own file ``fd`` for ``readers``."""
    if readers.everybody:
        return
    status = os.fstat(fd)
    mode = PRIVATE_MODE
    if status.st_gid == readers.group and not _has_acl(fd):
        mode |= stat.S_IRGRP & ~_umask()
    if stat.S_IMODE(status.st_mode) != mode:
        os.fchmod(fd, mode)


def narrowed_mode(fd: int, readers: Readers) -> int | None:
    """The mode with which only ``readers`` may read the file ``fd``; None if it has that already.

    The mode never allows more than before.
    """
    if readers.everybody:
        return None
    status = os.fstat(fd)
    mode = wanted = stat.S_IMODE(status.st_mode)
    if mode & stat.S_IROTH:
        wanted &= ~stat.S_IRWXO
    if mode & stat.S_IRGRP and (status.st_gid != readers.group or _has_acl(fd)):
        wanted &= ~stat.S_IRWXG
    return wanted if wanted != mode else None


def narrow(fd: int, readers: Readers) -> bool:
    """Forbid all others than ``readers`` to read the file ``fd``; whether its mode changed."""
    wanted = narrowed_mode(fd, readers)
    if wanted is not None:
        os.fchmod(fd, wanted)
    return wanted is not None


def _has_acl(fd: int) -> bool:
    """Whether the group bits are the mask of an access control list."""
    with suppress(OSError):  # no list, or a file system without lists
        return bool(os.getxattr(fd, _ACL))
    return False


def _umask() -> int:
    """The umask, read without changing it, as os.umask() would; all bits if it is unknown."""
    with suppress(OSError, ValueError), open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith(b"Umask:"):
                return int(line.split()[1], 8)
    return 0o777
