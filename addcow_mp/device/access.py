"""Opening files safely: which paths and which kinds of files may be opened.

The file named on the command line is the user's choice. Names *inside* an image come from others:
they are opened only beneath the directory in which the first ``.add-cow`` file lies (links
resolved), or beneath a root that the user gave. The same holds for links in the directories of a
farm.

Such a name is opened relative to its root with openat2, which refuses links and paths that leave
the root, so the path cannot be exchanged between check and open. A path that is spelt straight down
from a root is opened at once. Any other path is resolved first, links and ``..`` included; if the
result lies beneath no root, the error names the directory that the user may allow. On a kernel
without openat2, the path of the opened file is compared afterwards.

Only regular files are opened, and block devices if allowed. Opening never blocks: a FIFO is
refused. Files of /proc and /sys look regular but are no data. A device that will be written is
claimed (O_EXCL), and a file that will be written must not lie beneath a device in use: see
:mod:`addcow_mp.device.holders`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from addcow_mp.device.changeable import is_read_only, why_not_writable
from addcow_mp.device.files import File, cannot_open, identity_at, is_device, kind_of
from addcow_mp.device.location import absolute
from addcow_mp.device.syscalls import openat2
from addcow_mp.errors import AddcowError, FileError, ImageError, OutsideError

#: Never block (O_NONBLOCK, for FIFOs), never get a controlling terminal, never be inherited.
_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class Access(NamedTuple):
    """What a command may open and how.

    ``roots``: directories beneath which names inside images may lead, in addition to the first
    file's own. ``allow_device``: block devices too. ``share``: other programs may write meanwhile
    (``-U``). ``durable``: carry out syncs; without them a power cut can lose published data
    (``-t unsafe``). ``force``: ignore dependants, hard links and first bytes. ``locking``: take
    QEMU's image locks and respect those of others. ``files``: paths that the user named; any other
    path is opened only beneath a root; None = every path counts as named. ``exclude``: patterns of
    files to leave out of every search.
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
        """This access with the directory of ``path``, a path without links, as a further root."""
        directory = absolute(path).rpartition("/")[0] or "/"
        others = (root for root in self.roots if root != directory)
        return self._replace(roots=(directory, *others))

    def naming(self, path: str) -> Access:
        """This access with ``path`` as one more file that the user named."""
        return self if self.files is None else self._replace(files=self.files | {path})

    def open_named(self, path: str, *, writable: bool = False) -> File:
        """Open a file that the user named: any regular file or allowed device."""
        if self.files is not None and path not in self.files:
            return self.open_beneath(path, writable=writable)
        try:
            fd = os.open(path, _mode(writable))
        except (OSError, ValueError) as error:
            raise _refused(path, writable, error) from error
        return self._checked(File(path, fd, writable=writable))

    def open_beneath(self, path: str, *, writable: bool = False) -> File:
        """Open a file that an image names: only beneath a root. Raises :class:`OutsideError`."""
        fd = _open_plain(self.roots, path, writable)
        if fd is None:
            fd = self._open_resolved(path, writable)
        return self._checked(File(path, fd, writable=writable))

    def refuse_unwritable(self, file: File) -> None:
        """Raise the error of opening ``file``, which is open for reading, for writing.

        The open file itself is opened again, wherever its path leads by now. Nothing is changed or
        locked.
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
                try:
                    fd = _open_from(root, relative, writable)
                    return _open_and_compare(real, writable) if fd is None else fd
                except (OSError, ValueError) as error:
                    raise _refused(path, writable, error) from error
        directory = os.path.dirname(real)
        raise OutsideError(path=path, directory=directory, roots=", ".join(self.roots))

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


def _mode(writable: bool) -> int:
    # O_EXCL claims a block device against mounts and other users; other files ignore it.
    return (os.O_RDWR | os.O_EXCL if writable else os.O_RDONLY) | _FLAGS


def _refused(path: str, writable: bool, error: OSError | ValueError) -> AddcowError:
    """The error for a file that could not be opened, with the reason."""
    if isinstance(error, OSError) and error.errno == errno.EBUSY:
        identity = identity_at(path)
        if identity is not None and is_device(identity):
            from addcow_mp.device.holders import busy

            return busy(path)
    if isinstance(error, OSError) and writable:
        reason = why_not_writable(path, error)
        return FileError(path=path, action="open it for writing", reason=reason, errno=error.errno)
    return cannot_open(path, "open it", error)


def _beneath(path: str, root: str) -> str | None:
    """The path from ``root`` to ``path``; None if it lies elsewhere."""
    prefix = root.rstrip("/") + "/"
    return path[len(prefix) :] if path.startswith(prefix) else None


def _open_plain(roots: Sequence[str], path: str, writable: bool) -> int | None:
    """Open ``path`` without resolving it if it leads straight down from a root, as most do.

    None if it contains a link or ``..``, or cannot be opened.
    """
    if ".." in path or "\0" in path:
        return None
    full = absolute(path)
    for root in roots:
        # absolute() would drop ".." behind a link; relative roots are usual in a farm.
        relative = None if ".." in root else _beneath(full, absolute(root))
        if relative is not None:
            try:
                return _open_from(root, relative, writable)
            except OSError:
                return None
    return None


def _open_from(root: str, relative: str, writable: bool) -> int | None:
    """Open beneath the directory ``root``, following no link; None without openat2."""
    if relative and "/" not in relative:
        return os.open(os.path.join(root, relative), _mode(writable) | os.O_NOFOLLOW)
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return openat2(directory, relative or ".", _mode(writable))
    finally:
        os.close(directory)


def _open_and_compare(real: str, writable: bool) -> int:
    """Without openat2: open the resolved path, then compare the opened file's path with it."""
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


def _refuse_kind(file: File, allow_device: bool) -> None:
    status = file.first_status
    if stat.S_ISBLK(status.st_mode):
        if not allow_device:
            problem = "it is a block device; allow it with --allow-device"
            raise ImageError(path=file.path, problem=problem)
        # The kernel opens a read-only device for writing, and refuses only the writes.
        if file.writable and is_read_only(file):
            raise ImageError(
                path=file.path, problem="it cannot be written: the device is read-only"
            )
    elif not stat.S_ISREG(status.st_mode):
        problem = f"it is {kind_of(status.st_mode)}, not a regular file"
        raise ImageError(path=file.path, problem=problem)
    elif status.st_dev in pseudo_devices():
        raise ImageError(path=file.path, problem="it is a file of the kernel's, not of a disk")


@cache
def pseudo_devices() -> frozenset[int]:
    """The file systems whose regular files are not data: /proc and /sys."""
    return frozenset(os.stat(one).st_dev for one in ("/proc", "/sys") if os.path.ismount(one))
