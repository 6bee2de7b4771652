"""Magic numbers of formats: used to contradict a header, never to choose a format.

The guest writes the first bytes of a raw file, so they prove nothing about its format. But a file
that is declared to be of some format must begin with that format's magic.
"""

from __future__ import annotations

from addcow_mp.device.files import File
from addcow_mp.errors import ImageError

#: The bytes that a file of each format begins with.
MAGICS = {
    "add-cow": b"ACOW",
    # qcow and qcow2 share the beginning; qcow's includes the version, so it is tested first.
    "qcow": b"QFI\xfb\x00\x00\x00\x01",
    "qcow2": b"QFI\xfb\x00\x00\x00",
    "qed": b"QED\x00",
    "vmdk": b"KDMV",
    "vhdx": b"vhdxfile",
    "luks": b"LUKS\xba\xbe",
    "parallels": b"WithoutFreeSpace",
    "cow": b"OOOM",
}

_ANY = tuple(MAGICS.values())

#: How many first bytes are needed to know any magic.
LONGEST_MAGIC = max(map(len, MAGICS.values()))


def _head(file: File) -> bytes:
    view = memoryview(bytearray(min(LONGEST_MAGIC, file.length)))
    file.read_into(view, 0)
    return bytes(view)


def resembles(file: File) -> str | None:
    """The format whose magic ``file`` begins with, if any."""
    return magic_of(_head(file))


def magic_of(first: bytes) -> str | None:
    """The format whose magic the bytes ``first`` of a file begin with, if any."""
    if not first.startswith(_ANY):
        return None
    return next((name for name, magic in MAGICS.items() if first.startswith(magic)), None)


def refuse_as_raw(file: File) -> None:
    """Raise if a file that the user calls raw begins with the magic of another format.

    It may still be raw, with guest data that begins like that; a check reports it too.
    """
    seems = resembles(file)
    if seems is not None:
        raise ImageError(
            path=file.path,
            problem=f"it is called raw, but begins as {seems} does; give its real format, or use "
            "--force if it is a raw disk whose data begins like that",
        )


def contradicts(file: File, format_: str) -> bool:
    """Whether ``format_`` has a magic that ``file`` does not begin with."""
    magic = MAGICS.get(format_)
    return magic is not None and not _head(file).startswith(magic)
