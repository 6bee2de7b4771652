"""QEMU's image locks: a running guest and this tool refuse each other's files.

A user of a file holds read locks of its open file description on single bytes: byte 100 + i means
"I use permission i", byte 200 + i means "I do not share permission i". No program takes write
locks; a *test* for one finds the locks of others. So :func:`lock` first takes all its bytes, then
tests 200 + i for each permission it uses and 100 + i for each that it does not share, and releases
everything on a conflict. Of two programs that race, both may fail but never both succeed, so a
conflict is tried again a few times with random pauses.

The locks belong to the open file description: duplicates of the descriptor, in workers too, hold
them until the last one is closed. POSIX locks are never used on these files.

A file system without such locks is refused, because other users cannot be detected there. Reading
with -U does not need to detect them, and continues without locks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from enum import IntEnum
from functools import cache, partial
from typing import NamedTuple

from addcow_mp.device.files import File, cannot_lock, identity_of
from addcow_mp.errors import LockedError
from addcow_mp.format.bits import merged

_USED, _UNSHARED = 100, 200

#: The first lock byte, and their number, with room for future permissions.
_ALL_BYTES = 100, 200

#: Attempts before a conflict is reported, and the longest pause between two, in seconds: a program
#: that raced and failed too has released its locks by then.
TRIES, PAUSE = 5, 0.02


class Permission(IntEnum):
    """What a user of a file may do with it."""

    CONSISTENT_READ = 0
    WRITE = 1
    WRITE_UNCHANGED = 2
    RESIZE = 3


_ALL = frozenset(Permission)
_READ = frozenset({Permission.CONSISTENT_READ})


class Claim(NamedTuple):
    """The permissions that an operation uses on a file, and those that it shares with others."""

    used: frozenset[Permission]
    shared: frozenset[Permission]


#: Reading: no other program may change the file.
READING = Claim(_READ, _ALL - {Permission.WRITE, Permission.RESIZE})
#: Reading with -U: other programs may do anything.
SHARING = Claim(_READ, _ALL)
#: Writing, with no other user.
WRITING = Claim(_READ | {Permission.WRITE}, frozenset())
#: Writing and changing the length, or the meaning of the length, with no other user.
RESIZING = Claim(_READ | {Permission.WRITE, Permission.RESIZE}, frozenset())


def lock(file: File, claim: Claim) -> None:
    """Take the locks of ``claim`` on ``file``.

    Raises :class:`LockedError` on a conflict, :class:`NoLocksError` if there are no locks.
    """
    file.release_locks = partial(unlock, file)
    if claim == SHARING:
        # This shows others that the file is read; nothing depends on it.
        with suppress(OSError):
            _set(file.fd, fcntl.F_RDLCK, _USED + Permission.CONSISTENT_READ)
        return
    conflict = _try(file, claim)
    for _ in range(TRIES - 1):
        if conflict is not None:
            time.sleep(PAUSE * os.urandom(1)[0] / 255)
            conflict = _try(file, claim)
    if conflict is not None:
        permission, byte = conflict
        raise LockedError(
            path=file.path,
            holder=_holder(file, byte) or "another process",
            verb="does not share" if byte >= _UNSHARED else "uses",
            permission=permission.name.lower().replace("_", " "),
        )
    file.excludes_writers = Permission.WRITE not in claim.shared


def is_available(fd: int, claim: Claim) -> bool:
    """Whether no lock conflicts with ``claim`` at this moment; takes no lock.

    For a check so short that holding the locks during it would prove no more.
    """
    return not _is_held(fd, *_ALL_BYTES) or _conflict(fd, claim) is None


def is_locked(fd: int) -> bool:
    """Whether another user holds any of the locks; False if there are no locks."""
    with suppress(OSError):
        return _is_held(fd, *_ALL_BYTES)
    return False


def holder_of_conflict(file: File, claim: Claim) -> str | None:
    """Name and pid of a process whose locks conflict with ``claim``; None when there is none."""
    with suppress(OSError):
        conflict = _conflict(file.fd, claim)
        if conflict is not None:
            return _holder(file, conflict[1]) or "another process"
    return None


def narrow(file: File, claim: Claim) -> None:
    """Release the locks that ``claim`` does not need; the others are held throughout."""
    for permission in _ALL:
        for base, kept in ((_USED, claim.used), (_UNSHARED, _ALL - claim.shared)):
            if permission not in kept:
                _set(file.fd, fcntl.F_UNLCK, base + permission)


def unlock(file: File) -> None:
    """Release all locks, of the descriptor and of its duplicates."""
    _set(file.fd, fcntl.F_UNLCK, *_ALL_BYTES)


def _try(file: File, claim: Claim) -> tuple[Permission, int] | None:
    """Take all locks and return None, or take none and return the conflict."""
    try:
        for first, length in _bytes_of(claim):
            _set(file.fd, fcntl.F_RDLCK, first, length)
        # Usually there is no other lock at all, which one call tells.
        if not _is_held(file.fd, *_ALL_BYTES):
            return None
        conflict = _conflict(file.fd, claim)
    except OSError as error:
        with suppress(OSError):  # where locking fails, unlocking may fail too
            unlock(file)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return Permission.CONSISTENT_READ, _USED
        raise cannot_lock(file.path, error) from error
    if conflict is not None:
        unlock(file)
    return conflict


@cache
def _bytes_of(claim: Claim) -> tuple[tuple[int, int], ...]:
    """The bytes that are locked, adjacent ones together: first byte and length.

    All bytes of used permissions precede those of unshared ones.
    """
    bytes_ = [_USED + one for one in sorted(claim.used)]
    bytes_ += [_UNSHARED + one for one in sorted(_ALL - claim.shared)]
    return tuple((first, stop - first) for first, stop in merged((at, at + 1) for at in bytes_))


def _conflict(fd: int, claim: Claim) -> tuple[Permission, int] | None:
    """A permission that another user's lock denies, and the byte of that lock."""
    for base, permissions in ((_UNSHARED, claim.used), (_USED, _ALL - claim.shared)):
        for permission in sorted(permissions):
            if _is_held(fd, base + permission):
                return permission, base + permission
    return None


def _set(fd: int, kind: int, start: int, length: int = 1) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(kind, start, length))


def _is_held(fd: int, start: int, length: int = 1) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, start, length))
    kind: int = struct.unpack(_FLOCK, answer)[0]
    return kind != fcntl.F_UNLCK


_FLOCK = "hhqqi4x"


@cache
def _flock(kind: int, start: int, length: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0)


def _holder(file: File, byte: int) -> str | None:
    """Name and pid of a process that holds a lock on ``byte``, if /proc shows one."""
    identity = file.identity
    for pid, fd, status in open_files():
        with suppress(OSError):
            if identity_of(status) == identity and _is_locked_by(pid, fd, byte):
                return process_name(pid)
    return None


def _is_locked_by(pid: str, fd: str, byte: int) -> bool:
    """Whether a descriptor has a lock on ``byte``: a line "lock: .. OFDLCK .. first last"."""
    with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii", errors="replace") as lines:
        for words in map(str.split, lines):
            if words[:1] == ["lock:"] and "OFDLCK" in words:
                first, last = words[-2:]
                if int(first) <= byte and (last == "EOF" or byte <= int(last)):
                    return True
    return False


def open_files() -> Iterator[tuple[str, str, os.stat_result]]:
    """The files that other processes have open: pid, descriptor and status."""
    for pid in other_processes():
        with suppress(OSError):  # it has ended, or belongs to another user
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    yield pid, fd, os.stat(f"/proc/{pid}/fd/{fd}")


def other_processes() -> list[str]:
    """The pids of all other processes in /proc; none without /proc."""
    own = str(os.getpid())
    with suppress(OSError):
        return [pid for pid in os.listdir("/proc") if pid.isdigit() and pid != own]
    return []


def process_name(pid: str) -> str:
    """The name and pid of a process, for messages."""
    name = "a process"
    with suppress(OSError), open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
        name = file.read().strip()
    return f"{name} (pid {pid})"
