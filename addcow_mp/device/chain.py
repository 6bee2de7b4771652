"""Opening a chain: the header's rules, then every file once, then the layers.

Nothing is guessed: formats are what the header says, and a name with a protocol
prefix is refused. All files of a chain are different files by device and inode,
which catches an image that is its own backing under any spelling, and cycles.
Every file is locked as it is opened, in the way that the operation will use it. What can be
refused is refused here, before anything has been changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from addcow_mp.device.access import Access
from addcow_mp.device.files import BACKING, COW, IMAGE, File
from addcow_mp.device.layer import Layer
from addcow_mp.device.locks import (
    READING,
    RESIZING,
    SHARING,
    WRITING,
    Claim,
    Permission,
    lock,
)
from addcow_mp.device.magic import contradicts
from addcow_mp.device.overlay import Overlay
from addcow_mp.device.raw import RawLayer
from addcow_mp.errors import AddcowError, FormatError, ImageError, NotAddcowError, UnsupportedError
from addcow_mp.format.header import (
    ADD_COW,
    BACKING_NAME_LIMIT,
    FIXED_SIZE,
    IMAGE_NAME_LIMIT,
    MAGIC,
    RAW,
    Header,
    format_name,
    violations,
)
from addcow_mp.format.names import path_combine, path_has_protocol, read_string

#: A chain that is longer is a mistake or an attack; every layer costs descriptors.
MAX_DEPTH = 30


class Use(NamedTuple):
    """How one layer's files are used: ``cow``, also a raw layer's only file, and ``image``."""

    cow: Claim
    image: Claim


Uses = Mapping[int, Use]
"""How the layers of a chain are used, by depth; layers not in it are read."""

READ: Uses = {}
#: The overlay itself is written (write, flatten).
WRITE: Uses = {0: Use(WRITING, WRITING)}
#: Overlay and backing are written, and the backing may grow.
COMMIT: Uses = {0: Use(RESIZING, WRITING), 1: Use(RESIZING, RESIZING)}
#: Only the backing is written.
COMMIT_KEEPING: Uses = {1: Use(RESIZING, RESIZING)}


def open_chain(path: str, uses: Uses = READ, access: Access | None = None) -> Overlay:
    """Open and lock the add-cow overlay at ``path`` and all files below it.

    Raises :class:`AddcowError` with nothing left open.
    """
    overlay = open_layer(path, ADD_COW, uses, access)
    assert isinstance(overlay, Overlay)  # noqa: S101 - what that format is opened as
    return overlay


def open_layer(path: str, format_: str, uses: Uses = READ, access: Access | None = None) -> Layer:
    """Open ``path`` as ``raw`` or ``add-cow``; any other format is refused by name."""
    access = (access or Access()).beside(path)
    return _Opening(uses, access).layer(path, format_, 0)


@dataclass
class Names:
    """What a header says of other files: names as stored, formats as words."""

    image: str
    image_format: str
    backing: str | None
    backing_format: str | None


def load_header(cow: File) -> Header:
    """Read the header and refuse it at the first rule that it breaks.

    Raises :class:`NotAddcowError` without the magic, else :class:`FormatError`.
    """
    header = peek_header(cow)
    for rule, problem in violations(header):
        raise FormatError(path=cow.path, problem=problem, rule=rule)
    if cow.length < header.header_size:
        raise _too_short(cow, header.header_size)
    return header


def peek_header(cow: File) -> Header:
    """Read the fixed header of a file that has the magic, legal or not."""
    head = bytearray(min(FIXED_SIZE, cow.length))
    cow.read_into(memoryview(head), 0)
    if bytes(head[: len(MAGIC)]) != MAGIC:
        detail = ", it is empty" if not head else ""
        raise NotAddcowError(path=cow.path, detail=detail)
    if len(head) < FIXED_SIZE:
        raise _too_short(cow, FIXED_SIZE)
    return Header.unpack(bytes(head))


def _too_short(cow: File, wanted: int) -> FormatError:
    problem = f"the file is {cow.length} bytes long, its header needs {wanted}"
    return FormatError(path=cow.path, problem=problem, rule="header")


def load_names(cow: File, header: Header) -> Names:
    """Read the names and formats of a header that :func:`load_header` accepted."""
    return Names(
        image=read_name(cow, header.image_offset, header.image_size, IMAGE_NAME_LIMIT),
        image_format=format_name(header.image_format),
        backing=read_name(cow, header.backing_offset, header.backing_size, BACKING_NAME_LIMIT)
        if header.has_backing
        else None,
        backing_format=format_name(header.backing_format) if header.has_backing else None,
    )


def read_name(cow: File, offset: int, size: int, limit: int) -> str:
    """Read one name; any reason against it is told of the ``.add-cow`` file."""
    try:
        with cow.doing("read its names"):
            return read_string(cow.fd, offset, size, limit)
    except ImageError as error:
        raise FormatError(
            path=cow.path,
            problem=f"{error.fields['path']}: {error.fields['problem']}",
            rule="names",
        ) from error


def resolve(cow_path: str, name: str) -> str:
    """The path that ``name``, stored in ``cow_path``, stands for; protocols are refused."""
    if path_has_protocol(name):
        raise UnsupportedError(
            path=cow_path,
            problem=f"'{name}' names a protocol, not a file; only local files are opened "
            "(a file of that name is written './...')",
        )
    return path_combine(cow_path, name)


@contextmanager
def telling(cow_path: str, name: str, what: str) -> Iterator[str]:
    """Resolve ``name``; an error about that file says that ``cow_path`` names it as ``what``."""
    target = resolve(cow_path, name)
    try:
        yield target
    except AddcowError as error:
        if error.fields.get("path") != target:
            raise
        told = {**error.fields, "path": f"{cow_path}: {what} '{name}'"}
        raise type(error)(**told) from error


def refuse_image_format(cow_path: str, names: Names) -> None:
    """Raise unless the image file is raw: only raw images are read and written."""
    if names.image_format != RAW:
        raise UnsupportedError(
            path=cow_path,
            problem=f"the image file '{names.image}' is {names.image_format}, and only raw image "
            "files are used; convert it to raw first",
        )


@dataclass
class _Opening:
    """The state of one opening: how files are used, and what is open already."""

    uses: Uses
    access: Access
    seen: dict[tuple[int, int], str] = field(default_factory=dict)
    opened: list[File] = field(default_factory=list)

    def layer(self, path: str, format_: str, depth: int) -> Layer:
        try:
            return self._layer(path, format_, depth)
        except BaseException:
            for file in self.opened:
                file.close()
            raise

    def _layer(self, path: str, format_: str, depth: int) -> Layer:
        if format_ == ADD_COW:
            return self.overlay(path, depth)
        if format_ != RAW:
            raise UnsupportedError(
                path=path,
                problem=f"format '{format_}' is not opened here; convert it to raw first",
            )
        return RawLayer(self._open(path, self._use(depth).cow, BACKING))

    def overlay(self, path: str, depth: int) -> Overlay:
        if depth >= MAX_DEPTH:
            raise ImageError(path=path, problem=f"the chain is deeper than {MAX_DEPTH} overlays")
        cow = self._open(path, self._use(depth).cow, COW)
        header = load_header(cow)
        names = load_names(cow, header)
        refuse_image_format(path, names)
        with telling(path, names.image, "image file") as target:
            image = self._open(target, self._use(depth).image, IMAGE if depth == 0 else BACKING)
        return Overlay(cow, image, self._backing(path, header, names, depth))

    def _backing(self, path: str, header: Header, names: Names, depth: int) -> Layer | None:
        if names.backing is None or names.backing_format is None:
            return None
        # With ALL_ALLOCATED the backing may be gone: only a job that writes it needs it.
        if header.all_allocated and depth + 1 not in self.uses:
            return None
        with telling(path, names.backing, "backing file") as target:
            return self._layer(target, names.backing_format, depth + 1)

    def _use(self, depth: int) -> Use:
        return self.uses.get(depth, Use(READING, READING))

    def _open(self, path: str, claim: Claim, role: str) -> File:
        file = open_claimed(self.access, path, claim, role, named=not self.opened)
        self.opened.append(file)
        other = self.seen.setdefault(file.identity, path)
        if other != path or len(self.seen) < len(self.opened):
            raise ImageError(
                path=path,
                problem=f"it is in the chain already, as '{other}'; overlay, image file and "
                "backing file must be different files",
            )
        return file


def open_claimed(access: Access, path: str, claim: Claim, role: str, *, named: bool) -> File:
    """Open one file as ``access`` allows and take its locks.

    ``named`` by the user, it may lie anywhere; named by an image, only beneath a root.
    """
    writable = Permission.WRITE in claim.used
    opener = access.open_named if named else access.open_beneath
    file = opener(path, writable=writable)
    try:
        file.role = role
        lock(file, SHARING if access.share and not writable else claim)
    except BaseException:
        file.close()
        raise
    return file


def refuse_mismatch(file: File, format_: str) -> None:
    """Raise when ``file`` cannot be of the format that a header gives it."""
    if contradicts(file, format_):
        raise ImageError(path=file.path, problem=f"it is declared as {format_}, which it is not")
