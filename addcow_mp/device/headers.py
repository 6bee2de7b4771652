"""Headers of open files: read and checked, and the files that they name.

Nothing is guessed: formats are those of the header, and a name with a protocol prefix is refused.
An error about a file says which ``.add-cow`` file names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

from addcow_mp.device.access import Access
from addcow_mp.device.files import File
from addcow_mp.device.locks import SHARING, Claim, Permission, lock
from addcow_mp.device.magic import contradicts
from addcow_mp.errors import (
    AddcowError,
    FormatError,
    ImageError,
    NotAddcowError,
    UnsupportedError,
)
from addcow_mp.format.header import (
    BACKING_NAME_LIMIT,
    FIXED_SIZE,
    IMAGE_NAME_LIMIT,
    MAGIC,
    RAW,
    Header,
    Violation,
    format_name,
    violations,
)
from addcow_mp.format.names import path_combine, path_has_protocol, read_string

#: A longer chain is a mistake or an attack; every layer needs descriptors.
MAX_DEPTH = 30


class Names(NamedTuple):
    """The files that a header names: names as stored, formats as text."""

    image: str
    image_format: str
    backing: str | None
    backing_format: str | None


def load_header(cow: File) -> Header:
    """Read the header and refuse the first rule that it breaks.

    Raises :class:`NotAddcowError` without the magic, else :class:`FormatError`.
    """
    header = peek_header(cow)
    broken = _first_violation(header)
    if broken is not None:
        raise FormatError(path=cow.path, problem=broken.problem, rule=broken.rule)
    if cow.length < header.header_size:
        raise _too_short(cow, header.header_size)
    return header


@lru_cache(maxsize=64)
def _first_violation(header: Header) -> Violation | None:
    """The first rule that ``header`` breaks; overlays of a farm often have equal headers."""
    return next(violations(header), None)


def peek_header(cow: File) -> Header:
    """Read the fixed header, valid or not, of a file that has the magic."""
    head = bytearray(min(FIXED_SIZE, cow.length))
    cow.read_into(memoryview(head), 0)
    if bytes(head[: len(MAGIC)]) != MAGIC:
        raise NotAddcowError(path=cow.path, detail="" if head else ", it is empty")
    if len(head) < FIXED_SIZE:
        raise _too_short(cow, FIXED_SIZE)
    return Header.unpack(bytes(head))


def _too_short(cow: File, needed: int) -> FormatError:
    problem = f"the file is {cow.length} bytes long, its header needs {needed}"
    return FormatError(path=cow.path, problem=problem, rule="header")


def load_names(cow: File, header: Header) -> Names:
    """Read the names and formats of a header that :func:`load_header` returned."""
    image = read_name(cow, header.image_offset, header.image_size, IMAGE_NAME_LIMIT)
    image_format = format_name(header.image_format)
    if not header.has_backing:
        return Names(image, image_format, None, None)
    backing = read_name(cow, header.backing_offset, header.backing_size, BACKING_NAME_LIMIT)
    return Names(image, image_format, backing, format_name(header.backing_format))


def read_name(cow: File, offset: int, size: int, limit: int) -> str:
    """Read one name as :func:`read_string` does. Raises :class:`FormatError` about ``cow``."""
    try:
        with cow.doing("read its names"):
            return read_string(cow.fd, offset, size, limit)
    except ImageError as error:
        problem = f"{error.fields['path']}: {error.fields['problem']}"
        raise FormatError(path=cow.path, problem=problem, rule="names") from error


def refuse_protocol(cow_path: str, name: str) -> None:
    """Raise if ``name``, stored in the file at ``cow_path``, has a protocol prefix."""
    if path_has_protocol(name):
        raise UnsupportedError(
            path=cow_path,
            problem=f"'{name}' names a protocol, not a file; only files are opened "
            "(a file of that name is written './...')",
        )


def resolve(cow: File, name: str) -> str:
    """The path that ``name``, stored in ``cow``, stands for; protocols are refused."""
    refuse_protocol(cow.path, name)
    return path_combine(cow.base, name)


@contextmanager
def errors_naming(cow: File, name: str, what: str) -> Iterator[str]:
    """Resolve ``name``; errors of the block about its path say that ``cow`` names it ``what``."""
    target = resolve(cow, name)
    try:
        yield target
    except AddcowError as error:
        if error.fields.get("path") != target:
            raise
        fields = {**error.fields, "path": f"{cow.path}: {what} '{name}'"}
        raise type(error)(**fields) from error


def refuse_image_format(cow_path: str, names: Names) -> None:
    """Raise unless the image file is raw: no other format is read and written."""
    if names.image_format != RAW:
        raise UnsupportedError(
            path=cow_path,
            problem=f"the image file '{names.image}' is {names.image_format}, and only raw image "
            "files are used; convert it to raw first",
        )


def open_claimed(
    access: Access,
    path: str,
    claim: Claim,
    role: str,
    *,
    named: bool,
    check: Callable[[File], None] = lambda _: None,
) -> File:
    """Open a file as ``access`` allows, and take its locks.

    A file ``named`` by the user may lie anywhere; one named by an image only beneath a root.
    ``check`` may raise before the locks are taken, which a file opened twice would not get.
    """
    opener = access.open_named if named else access.open_beneath
    file = opener(path, writable=Permission.WRITE in claim.used)
    try:
        file.role = role
        check(file)
        take_locks(file, claim, access)
    except BaseException:
        file.close()
        raise
    return file


def take_locks(file: File, claim: Claim, access: Access) -> None:
    """Take the locks of ``claim`` on ``file``, if ``access`` wants locks."""
    if access.locking:
        lock(file, SHARING if access.share and not file.writable else claim)


def refuse_mismatch(file: File, format_: str) -> None:
    """Raise if ``file`` cannot be of the format that a header states."""
    if contradicts(file, format_):
        raise ImageError(path=file.path, problem=f"it is declared as {format_}, which it is not")


def short_bitmap_warning(cow_path: str) -> list[str]:
    """The warning about a file that ends inside its bitmap."""
    return [
        f"{cow_path}: the file ends inside its bitmap, missing bits read as 0; "
        "it can be read but not written"
    ]
