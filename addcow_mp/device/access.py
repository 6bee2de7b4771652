"""Opening files safely: where names may lead, and what may be opened at all.

The file named on the command line is the user's choice. Every name *inside* an image is
somebody else's text, and is opened only beneath the directory in which the first ``.add-cow``
file really lies, or beneath a root that the user gave. What a farm finds in a directory is
somebody else's too: a link there leads no further than names inside images do. A name is opened
relative to its root in one call that refuses to follow any link or to leave the root (openat2),
so that nothing can be exchanged between looking and opening. A path that is spelt straight down
from a root is tried like that at once, and where that succeeds there was nothing to resolve. Any
other is resolved first, links and ``..`` included; if the result lies beneath no root it is
refused, with the directory that the user may allow. Where the kernel has no such call, the opened
file's own path is compared afterwards.

Only regular files are opened, and block devices when allowed. Opening never waits: a
FIFO is refused, not read. Files of /proc and /sys look regular but are not data. A device that
will be written is claimed (O_EXCL), and a file that will be written must not lie beneath a
device in use: see :mod:`addcow_mp.device.holders`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from addcow_mp.device.changeable import is_read_only, why_not_writable
from addcow_mp.device.files import File, cannot_open, kind_of
from addcow_mp.errors import AddcowError, FileError, ImageError, OutsideError

#: Never wait (O_NONBLOCK, for FIFOs), never become a controlling terminal, never inherit.
_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class Access(NamedTuple):
    """What a command may open and how.

    ``roots``: directories beneath which names inside images may lead, besides the first
    file's own. ``files``: those that the user named; any other is opened only beneath a root,
    None = whatever is named is the user's choice. ``allow_device``: block devices too.
    ``share``: do not insist that nobody else writes (``-U``). ``durable``: syncs are carried
    out; without them a power cut can lose data that was announced (``-t unsafe``). ``force``:
    dependants, hard links and first bytes do not matter. ``locking``: take QEMU's image locks
    and heed those of others (``--locking off``: neither).
    ``exclude``: patterns of what is left out wherever files are looked for.
    """

    roots: tuple[str, ...] = ()
    allow_device: bool = False
    share: bool = False
    durable: bool = True
    force: bool = False
    locking: bool = True
    files: frozenset[str] | None = None
    exclude: tuple[str, ...] = ()

    def beside(self, path: str) -> Access:
        """The same, with the directory of ``path``, to which no link leads, as a further root."""
        directory = os.path.dirname(os.path.abspath(path))
        others = (root for root in self.roots if root != directory)
        return self._replace(roots=(directory, *others))

    def open_named(self, path: str, *, writable: bool = False) -> File:
        """Open what the user named: any regular file or allowed device."""
        if self.files is not None and path not in self.files:
            return self.open_beneath(path, writable=writable)
        return self._checked(File(path, _open(path, writable), writable=writable))

    def open_beneath(self, path: str, *, writable: bool = False) -> File:
        """Open what an image named: only beneath a root. Raises :class:`OutsideError`."""
        fd = _open_plain(self.roots, path, writable)
        if fd is None:
            fd = self._open_resolved(path, writable)
        return self._checked(File(path, fd, writable=writable))

    def refuse_unwritable(self, file: File) -> None:
        """Raise what opening ``file``, open for reading, once more for writing would raise.

        The same file, whatever its name leads to by now; nothing of it is changed or locked.
        """
        try:
            fd = os.open(f"/proc/self/fd/{file.fd}", _mode(writable=True))
        except OSError as error:
            raise _refused(file.path, True, error) from error
        self._checked(File(file.path, fd, writable=True)).close()

    def _open_resolved(self, path: str, writable: bool) -> int:
        real = os.path.realpath(path)
        for root in map(os.path.realpath, self.roots):
            relative = _beneath(real, root)
            if relative is not None:
                return _open_in(root, relative, path, writable)
        raise OutsideError(path=path, directory=os.path.dirname(real), roots=_listed(self.roots))

    def _checked(self, file: File) -> File:
        try:
            _refuse_kind(file, self.allow_device)
            if file.writable:
                from addcow_mp.device.holders import refuse_held

                refuse_held(file, locking=self.locking)
        except BaseException:
            file.close()
            raise
        file.durable = self.durable
        return file


def _beneath(path: str, root: str) -> str | None:
    """How ``path`` goes on from ``root``; None when it lies elsewhere."""
    prefix = root.rstrip("/") + "/"
    return path[len(prefix) :] if path.startswith(prefix) else None


def _listed(roots: Sequence[str]) -> str:
    return ", ".join(roots)


def _mode(writable: bool) -> int:
    # O_EXCL claims a block device against mounts and other users; it says nothing to other files.
    return (os.O_RDWR | os.O_EXCL if writable else os.O_RDONLY) | _FLAGS


def _refused(path: str, writable: bool, error: OSError | ValueError) -> AddcowError:
    """The error for a file that could not be opened, in words that say what stands against it."""
    if isinstance(error, OSError) and error.errno == errno.EBUSY and _is_device(path):
        from addcow_mp.device.holders import busy

        return busy(path)
    if isinstance(error, OSError) and writable:
        return FileError(
            path=path,
            action="open it for writing",
            reason=why_not_writable(path, error),
            errno=error.errno,
        )
    return cannot_open(path, "open it", error)


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def _open(path: str, writable: bool) -> int:
    try:
        return os.open(path, _mode(writable))
    except (OSError, ValueError) as error:
        raise _refused(path, writable, error) from error


def _open_plain(roots: Sequence[str], path: str, writable: bool) -> int | None:
    """Open ``path`` if it leads straight down from a root, as nearly all do, without resolving it.

    None when a link or ``..`` is on the way, or anything else stands against it.
    """
    if ".." in path or "\0" in path:
        return None
    full = os.path.abspath(path)
    for root in roots:
        # A relative root is the usual case of a farm; ".." behind a link is not to be cut off.
        relative = None if ".." in root else _beneath(full, os.path.abspath(root))
        if relative is not None:
            try:
                return _open_from(root, relative, writable)
            except OSError:
                return None
    return None


def _open_from(root: str, relative: str, writable: bool) -> int | None:
    """Open beneath the directory ``root``, following no link; None without such a call."""
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _openat2(directory, relative or ".", _mode(writable))
    finally:
        os.close(directory)


def _open_in(root: str, relative: str, path: str, writable: bool) -> int:
    """Open ``path``, resolved to ``relative`` from ``root``, following no link on the way."""
    try:
        fd = _open_from(root, relative, writable)
        return _open_and_compare(os.path.join(root, relative), writable) if fd is None else fd
    except (OSError, ValueError) as error:
        raise _refused(path, writable, error) from error


def _open_and_compare(real: str, writable: bool) -> int:
    """For kernels without openat2: open, then see whether it is what was resolved."""
    fd = os.open(real, _mode(writable) | os.O_NOFOLLOW)
    is_same = False
    try:
        is_same = os.readlink(f"/proc/self/fd/{fd}") == real
    finally:
        if not is_same:
            os.close(fd)
    if not is_same:
        raise OSError(errno.EXDEV, "the path was changed while it was being opened")
    return fd


_OPENAT2 = 437  # the same number on every architecture
_AT_FDCWD = -100
_RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x04, 0x08


def _openat2(directory: int, relative: str, flags: int) -> int | None:
    """Open beneath ``directory`` without following any link; None without such a call."""
    libc, how_type, get_errno = _libc()
    how = how_type(flags, 0, _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH)
    fd: int = libc.syscall(_OPENAT2, directory, os.fsencode(relative), how, 24)
    if fd >= 0:
        return fd
    number: int = get_errno()
    if number in (errno.ENOSYS, errno.EPERM) and not _exists_openat2():
        return None
    raise OSError(number, os.strerror(number))


@cache
def _exists_openat2() -> bool:
    """Whether the call works at all: sandboxes answer EPERM for calls they do not know."""
    libc, how_type, _ = _libc()
    how = how_type(os.O_PATH | os.O_CLOEXEC, 0, 0)
    fd: int = libc.syscall(_OPENAT2, _AT_FDCWD, b"/", how, 24)
    if fd >= 0:
        os.close(fd)
    return fd >= 0


@cache
def _libc() -> tuple[Any, Any, Any]:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    how = ctypes.c_uint64 * 3
    libc.syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, how, ctypes.c_size_t)
    libc.syscall.restype = ctypes.c_long
    return libc, how, ctypes.get_errno


def _refuse_kind(file: File, allow_device: bool) -> None:
    status = file.status
    kind = kind_of(status.st_mode)
    if stat.S_ISBLK(status.st_mode):
        if not allow_device:
            raise ImageError(path=file.path, problem=f"it is {kind}; allow it with --allow-device")
        # A read-only one can be opened for writing, and only each write is refused.
        if file.writable and is_read_only(file):
            raise ImageError(
                path=file.path, problem="it cannot be written: the device is read-only"
            )
    elif not stat.S_ISREG(status.st_mode):
        raise ImageError(path=file.path, problem=f"it is {kind}, not a regular file")
    elif status.st_dev in pseudo_devices():
        raise ImageError(path=file.path, problem="it is a file of the kernel's, not of a disk")


@cache
def pseudo_devices() -> frozenset[int]:
    """The file systems in which regular files are not data."""
    found = set()
    for place in ("/proc", "/sys"):
        if os.path.ismount(place):
            found.add(os.stat(place).st_dev)
    return frozenset(found)
