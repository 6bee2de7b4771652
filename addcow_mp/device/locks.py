"""QEMU's image locks: a running guest and this tool refuse each other's files.

A user of a file holds read locks of its open file description on single bytes: 100 + i
says "I use permission i", 200 + i says "I do not share permission i". Nobody takes write
locks; others are noticed by *testing* for one. So: first take all own bytes, then test
200 + i for each permission used and 100 + i for each not shared; on a conflict everything
is released. Two that race may both fail, never both succeed, so a conflict is tried again
a few times with random pauses.

The locks belong to the open file description: duplicates of the descriptor, in workers
too, hold them until the last is closed. POSIX locks are never used on these files.

A file system without such locks is refused, with the way out: whether the file is in use cannot
be known there. Reading with -U does not ask for that, and goes on without locks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from contextlib import suppress
from enum import IntEnum
from functools import cache, partial
from typing import NamedTuple

from addcow_mp.device.files import File, cannot_lock
from addcow_mp.errors import LockedError

_USED, _UNSHARED = 100, 200

#: First and number of the bytes that anybody locks, with room for permissions to come.
_ALL_BYTES = 100, 200

#: Tries before a conflict is believed, and the longest pause between two, in seconds:
#: a racer that also failed has let go by then.
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
    """The permissions that one operation uses on a file and those it shares with others."""

    used: frozenset[Permission]
    shared: frozenset[Permission]


#: Reading: nobody may change the file meanwhile.
READING = Claim(_READ, _ALL - {Permission.WRITE, Permission.RESIZE})
#: Reading with -U: whatever others do.
SHARING = Claim(_READ, _ALL)
#: Writing: alone.
WRITING = Claim(_READ | {Permission.WRITE}, frozenset())
#: Writing and changing the length or what the length means: alone.
RESIZING = Claim(_READ | {Permission.WRITE, Permission.RESIZE}, frozenset())


def lock(file: File, claim: Claim) -> None:
    """Take the locks of ``claim`` on ``file``.

    Raises :class:`LockedError` on a conflict, :class:`NoLocksError` where there are no locks.
    """
    file.let_go = partial(unlock, file)
    if claim == SHARING:
        # It tells others that the file is read, where they can be told; nothing depends on it.
        with suppress(OSError):
            _set(file.fd, fcntl.F_RDLCK, _USED + Permission.CONSISTENT_READ)
        return
    conflict = _try(file, claim)
    for _ in range(TRIES - 1):
        if conflict is not None:
            time.sleep(PAUSE * os.urandom(1)[0] / 255)
            conflict = _try(file, claim)
    if conflict is None:
        return
    permission, byte = conflict
    holder = holder_of(file, byte)
    verb = "does not share" if byte >= _UNSHARED else "uses"
    raise LockedError(
        path=file.path,
        holder=holder or "another process",
        verb=verb,
        permission=permission.name.lower().replace("_", " "),
    )


def is_available(fd: int, claim: Claim) -> bool:
    """Whether nobody stands against ``claim`` at this moment; nothing is taken.

    For a look so short that holding the locks meanwhile would say no more than this.
    """
    if not _is_held(fd, *_ALL_BYTES):
        return True
    return _conflict(fd, claim.used, _ALL - claim.shared) is None


def is_locked(fd: int) -> bool:
    """Whether another user holds any of the locks; where there are none, no."""
    with suppress(OSError):
        return _is_held(fd, *_ALL_BYTES)
    return False


def unlock(file: File) -> None:
    """Let go of all locks; the descriptor's duplicates, if any, let go with it."""
    _set(file.fd, fcntl.F_UNLCK, *_ALL_BYTES)


def _try(file: File, claim: Claim) -> tuple[Permission, int] | None:
    """Take the locks, or take none and say which permission and byte stand against them."""
    unshared = _ALL - claim.shared
    try:
        for permission in claim.used:
            _set(file.fd, fcntl.F_RDLCK, _USED + permission)
        for permission in unshared:
            _set(file.fd, fcntl.F_RDLCK, _UNSHARED + permission)
        # Nearly always nobody else has any lock, which one question tells.
        if not _is_held(file.fd, *_ALL_BYTES):
            return None
        conflict = _conflict(file.fd, claim.used, unshared)
    except OSError as error:
        with suppress(OSError):  # what could not be locked cannot be unlocked either
            unlock(file)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return Permission.CONSISTENT_READ, _USED
        raise cannot_lock(file.path, error) from error
    if conflict is not None:
        unlock(file)
    return conflict


def _conflict(
    fd: int, used: frozenset[Permission], unshared: frozenset[Permission]
) -> tuple[Permission, int] | None:
    for base, permissions in ((_UNSHARED, used), (_USED, unshared)):
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
def _flock(kind: int, start: int, length: int = 1) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0)


def holder_of(file: File, byte: int) -> str | None:
    """Name and pid of a process that holds a lock on ``byte``, where /proc tells."""
    for pid in other_processes():
        if _holds(pid, file, byte):
            return process_name(pid)
    return None


def other_processes() -> list[str]:
    """The numbers of all processes but this one, as /proc has them; none where it is missing."""
    own = str(os.getpid())
    with suppress(OSError):
        return [pid for pid in os.listdir("/proc") if pid.isdigit() and pid != own]
    return []


def _holds(pid: str, file: File, byte: int) -> bool:
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            status = os.stat(f"/proc/{pid}/fd/{fd}")
            if (status.st_dev, status.st_ino) == file.identity and _covers(pid, fd, byte):
                return True
    except OSError:
        pass  # it has ended meanwhile, or is not ours to look at
    return False


def _covers(pid: str, fd: str, byte: int) -> bool:
    """Whether the lock lines of this descriptor (".. OFDLCK .. first last") cover ``byte``."""
    with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii", errors="replace") as lines:
        for line in lines:
            words = line.split()
            if words[:1] == ["lock:"] and "OFDLCK" in words:
                first, last = words[-2:]
                if int(first) <= byte and (last == "EOF" or byte <= int(last)):
                    return True
    return False


def process_name(pid: str) -> str:
    """A process as people know it."""
    name = "a process"
    with suppress(OSError), open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
        name = file.read().strip()
    return f"{name} (pid {pid})"
