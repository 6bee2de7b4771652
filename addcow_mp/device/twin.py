"""Twins: the qcow2 file beside an overlay through which QEMU uses it.

A twin holds metadata only (:mod:`addcow_mp.format.qcow2`). It lies in the directory in which the
``.add-cow`` file really lies, so that one search finds it. The overlay's header has a mark with a
random id, and the twin has the same id: see :mod:`addcow_mp.jobs.lending` for what the two say
together.

The data file's name in a twin cannot be opened, unless the user wants an absolute one. A relative
name would be resolved against QEMU's working directory, and an absolute one makes QEMU write into
the original when a farm is copied. The command line gives the data file instead.

A new twin is written without a name and linked when it is durable: a twin with a name is whole.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import blake2b
from typing import NamedTuple

from addcow_mp.device import faults
from addcow_mp.device.access import Access
from addcow_mp.device.files import (
    TWIN,
    File,
    identity_at,
    it_exists,
    sync_directory,
)
from addcow_mp.device.headers import open_claimed
from addcow_mp.device.location import regular_files_in
from addcow_mp.device.locks import RESIZING, Claim, holder_of_conflict
from addcow_mp.device.syscalls import birth_time
from addcow_mp.errors import FileError, ImageError, LentError
from addcow_mp.format.bits import Run
from addcow_mp.format.header import Header as CowHeader
from addcow_mp.format.names import path_has_protocol
from addcow_mp.format.qcow2 import (
    MAGIC,
    Header,
    Read,
    damaged_mark,
    named_backing,
    read_header,
)
from addcow_mp.format.qcow2_entries import Qcow2Error
from addcow_mp.format.qcow2_read import Extent, extents
from addcow_mp.format.qcow2_write import Image, chunks
from addcow_mp.units import KiB

#: A layer that is lent for reading has a twin that QEMU cannot open for writing.
READ_ONLY_MODE = 0o444

#: Bytes in which the extensions of a header lie, unless a program has added many.
HEADER_ROOM = 4 * KiB

#: A security label, which libvirt and SELinux compare.
_LABEL = "security.selinux"


class Identity(NamedTuple):
    """Inode and birth time (nanoseconds, 0 = unknown) of a file: a copy of it has others."""

    inode: int
    birth: int

    @classmethod
    def of(cls, file: File) -> Identity:
        """Those of an open file."""
        return cls(file.status.st_ino, birth_time(file.fd))


def data_file_name(lent_id: int) -> bytes:
    """A name that nothing can be opened under, and that says what to do."""
    return b"/dev/null/add-cow:%x:give-data-file" % lent_id


def default_twin(path: str) -> str:
    """The path of the twin when none is given: ``.qcow2`` for the suffix of ``path``."""
    return os.path.splitext(path)[0] + ".qcow2"


class Twin:
    """An open twin. Closing it is the caller's."""

    def __init__(self, file: File, header: Header) -> None:
        self.file = file
        self.header = header

    @classmethod
    def open(cls, access: Access, path: str, claim: Claim) -> Twin:
        """Open and lock the twin at ``path``. Raises :class:`AddcowError`."""
        file = open_claimed(access, path, claim, TWIN, named=False)
        try:
            return cls(file, _checked(path, lambda: read_header(_reader(file), file.length)))
        except BaseException:
            file.close()
            raise

    @property
    def path(self) -> str:
        """The file's path."""
        return self.file.path

    def extents(self) -> Iterator[Extent]:
        """What its tables say, from 0 to its size. Raises :class:`ImageError`."""
        try:
            yield from extents(self.header, _reader(self.file), self.file.length)
        except Qcow2Error as error:
            raise ImageError(path=self.path, problem=str(error)) from error

    def disable(self) -> None:
        """Let QEMU refuse the file from now on, durably."""
        self._change(self.header.disabling())
        self.header = self.header.with_disabled(True)

    def enable(self) -> None:
        """Let QEMU open the file from now on, durably."""
        self._change(self.header.enabling())
        self.header = self.header.with_disabled(False)

    def _change(self, change: tuple[int, bytes]) -> None:
        offset, data = change
        self.file.write(data, offset)
        self.file.sync()

    def remove(self) -> None:
        """Remove the file's name, durably."""
        remove_twin(self.path)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def remove_twin(path: str) -> None:
    """Remove the name of the twin at ``path``, durably. Raises :class:`FileError`."""
    try:
        if faults.armed:
            faults.hit("twin_unlink")
        os.unlink(path)
    except OSError as error:
        raise FileError.of(path, "remove it", error) from error
    sync_directory(path)


def _reader(file: File) -> Read:
    def read(offset: int, count: int) -> bytes:
        with file.doing(f"read {count} bytes at {offset}"):
            return os.pread(file.fd, count, offset)

    return read


def _checked(path: str, read: Callable[[], Header]) -> Header:
    try:
        return read()
    except Qcow2Error as error:
        raise ImageError(path=path, problem=str(error)) from error


# Finding


def twins_in(directory: str) -> Iterator[tuple[str, Header]]:
    """The twins in a directory: their paths and headers. What cannot be read is none."""
    for path in regular_files_in(directory):
        header = twin_header(path)
        if header is not None and header.mark is not None:
            yield path, header


def twin_header(path: str) -> Header | None:
    """The header of the qcow2 file with an external data file at ``path``; None when it is none."""
    with suppress(OSError, ValueError):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return None
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            if os.pread(fd, len(MAGIC), 0) == MAGIC:
                return read_header(lambda at, count: os.pread(fd, count, at), status.st_size)
        finally:
            os.close(fd)
    return None


def damaged_twin(directory: str, lent_id: int) -> tuple[str, str] | None:
    """The twin with this id whose header cannot be read, and the reason; None if there is none."""
    for path in regular_files_in(directory):
        with suppress(OSError), open(path, "rb") as file:
            mark = damaged_mark(file.read(HEADER_ROOM))
            if mark is not None and mark.lent_id == lent_id:
                return path, _header_problem(file.fileno())
    return None


def _header_problem(fd: int) -> str:
    try:
        read_header(lambda at, count: os.pread(fd, count, at), os.fstat(fd).st_size)
    except Qcow2Error as error:
        return f"{error}; undo what has changed it, or restore it from a backup"
    return "it is in use"


def is_twin(path: str) -> bool:
    """Whether the file at ``path`` is a twin."""
    header = twin_header(path)
    return header is not None and header.mark is not None


class Qcow2Names(NamedTuple):
    """The files that a qcow2 file uses: the name of its backing file, and a twin's image file."""

    backing: str | None = None
    image: tuple[int, int] | None = None


def qcow2_names(fd: int) -> Qcow2Names:
    """What an open qcow2 file names. Raises :class:`OSError`."""
    status = os.fstat(fd)
    name = named_backing(lambda at, count: os.pread(fd, count, at))
    backing = None if name is None or path_has_protocol(name) else name
    with suppress(Qcow2Error):
        header = read_header(lambda at, count: os.pread(fd, count, at), status.st_size)
        if header.mark is not None and not header.disabled:
            return Qcow2Names(backing, (status.st_dev, header.mark.image_inode))
    return Qcow2Names(backing)


def holder_name(header: CowHeader, path: str | None) -> str:
    """The holder of an overlay with this ``header`` and the twin at ``path``, in words."""
    suffix = " for reading" if header.lent_for_reading else ""
    if path is None:
        return f"QEMU{suffix}, and the qcow2 file that it is used through is not beside it"
    above = ", for overlays above it, which come back first" if suffix else ""
    return f"QEMU{suffix} through '{path}'{above}"


def lent_error(path: str, header: CowHeader, twin: str | None) -> LentError:
    """The error for the lent overlay at ``path``; it names the program that has its twin open."""
    user = None if twin is None else user_of(twin)
    opened = "" if user is None else f", which {user} has open"
    return LentError(path=path, holder=holder_name(header, twin) + opened)


def other_data_file(twin: Header, image: tuple[int, int]) -> str | None:
    """The data file that a twin names, unless it is ``image`` or the name that cannot be opened.

    ``image``: the identity of the image file.

    A program that is given nothing but the twin writes into that file.
    """
    mark, name = twin.mark, os.fsdecode(twin.data_file)
    if not name or (mark is not None and twin.data_file == data_file_name(mark.lent_id)):
        return None
    is_image = os.path.isabs(name) and identity_at(name) == image
    return None if is_image else name


def user_of(twin: str) -> str | None:
    """The program that has a twin open, as far as its locks tell."""
    try:
        file = File(twin, os.open(twin, os.O_RDONLY | os.O_CLOEXEC), writable=False)
    except OSError:
        return None
    try:
        return holder_of_conflict(file, RESIZING)
    finally:
        file.close()


def twin_of(base: str, header: CowHeader) -> str | None:
    """The twin of an overlay with this ``header`` at ``base``; None if it is missing."""
    for path, twin in twins_in(os.path.dirname(base)):
        if twin.mark is not None and twin.mark.lent_id == header.lent_id:
            return path
    return None


# Making


def directory_number(directory: str) -> int:
    """A number by which a twin knows a directory again; a renamed one has another."""
    return int.from_bytes(blake2b(os.fsencode(directory), digest_size=8).digest(), "big")


def mark_used_in(directory: str, path: str, header: Header) -> None:
    """Note durably that an overlay in ``directory`` uses the layer's twin at ``path``.

    One write of 8 bytes, which QEMU does not look at: programs may have the twin open for reading.
    """
    number = directory_number(directory)
    if header.used_elsewhere and header.used_only_in(number):
        return
    make_writable(path)
    offset, data = header.marking_used_in(number)
    file = File(path, os.open(path, os.O_RDWR | os.O_CLOEXEC), writable=True)
    file.role = TWIN
    try:
        file.write(data, offset)
        file.sync()
    finally:
        file.close()
    make_read_only(path)


def make_writable(path: str) -> None:
    """Let the owner write a twin."""
    with suppress(OSError):  # opening it says what is wrong
        os.chmod(path, stat.S_IMODE(os.stat(path).st_mode) | stat.S_IWUSR)


def make_read_only(path: str) -> None:
    """Take away the permission to write a twin."""
    os.chmod(path, stat.S_IMODE(os.stat(path).st_mode) & READ_ONLY_MODE)


def make_twin(
    path: str, header: Header, runs: Callable[[], Iterator[Run]], *, like: File, mode: int = 0o7777
) -> Identity:
    """Write the twin of ``header`` and the allocated ``runs`` of bytes at ``path``, durably.

    It gets owner, group, mode and label of ``like``; ``mode``: at most these permission bits. It
    never replaces a file. Returns its identity, which also stands in its mark.
    """
    file = File(path, _nameless(path), writable=True)
    file.role, file.durable = TWIN, like.durable
    try:
        own = Identity.of(file)
        mark = header.mark
        if mark is not None:
            mark = mark._replace(twin_inode=own.inode, twin_birth=own.birth)
        _write(file, Image(header._replace(mark=mark), runs))
        _make_like(file, like, mode)
        file.sync(attributes=True)
        _link(file)
    finally:
        file.close()
    sync_directory(path)
    return own


def _write(file: File, image: Image) -> None:
    try:
        for offset, data in chunks(image):
            file.write(data, offset)
    except Qcow2Error as error:
        raise ImageError(path=file.path, problem=str(error)) from error


def _nameless(path: str) -> int:
    """A new file without a name in the directory of ``path``."""
    directory = os.path.dirname(path) or "."
    try:
        if faults.armed:
            faults.hit("create")
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        problem = f"it cannot be made: {error.strerror}"
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR):
            problem += "; the file system has no files without a name (O_TMPFILE)"
        raise ImageError(path=path, problem=problem) from error


def refuse_other_owner(path: str, like: File) -> None:
    """Raise unless this user can make a twin at ``path`` that has the owner of ``like``."""
    file = File(path, _nameless(path), writable=True)
    try:
        _chown_like(file, like)
    except OSError as error:
        owner = f"{like.status.st_uid}:{like.status.st_gid}"
        raise ImageError(
            path=like.path,
            problem=f"a new file beside it cannot get its owner and group ({owner}): "
            f"{error.strerror}; only its owner can lend it (and set chattr +S), or root: run the "
            "command as one of them",
        ) from error
    finally:
        file.close()


def _chown_like(file: File, like: File) -> None:
    status = like.status
    if (status.st_uid, status.st_gid) != (file.status.st_uid, file.status.st_gid):
        os.fchown(file.fd, status.st_uid, status.st_gid)


def _make_like(file: File, like: File, mode: int) -> None:
    status = like.status
    with file.doing("give it the owner of the image file"):
        _chown_like(file, like)
        os.fchmod(file.fd, stat.S_IMODE(status.st_mode) & mode)
    with suppress(OSError):  # no labels here
        os.setxattr(file.fd, _LABEL, os.getxattr(like.fd, _LABEL))


def _link(file: File) -> None:
    directory, name = os.path.split(file.path)
    try:
        if faults.armed:
            faults.hit("twin_link")
        place = os.open(directory or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # With a directory descriptor the call follows the link in /proc to the file itself.
            os.link(f"/proc/self/fd/{file.fd}", name, dst_dir_fd=place, follow_symlinks=True)
        finally:
            os.close(place)
    except FileExistsError as error:
        raise it_exists(file.path) from error
    except OSError as error:
        raise ImageError(
            path=file.path, problem=f"it cannot be given its name: {error.strerror}"
        ) from error
