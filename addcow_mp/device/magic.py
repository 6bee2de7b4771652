"""First bytes by which formats are known, to contradict a header, never to choose a format.

A raw file may begin with any bytes, because its guest writes them; what it begins with
decides nothing. But an image that is declared to be of some format and lacks that
format's magic is not what its header says.
"""

from __future__ import annotations

from addcow_mp.device.files import File
from addcow_mp.errors import ImageError

#: Format names, with the bytes that a file of that format begins with.
MAGICS = {
    "add-cow": b"ACOW",
    # The older format's version makes it the longer of the two: it is looked for first.
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

#: As many of the first bytes as any magic needs.
LONGEST_MAGIC = max(map(len, MAGICS.values()))


def head(file: File) -> bytes:
    """As many of the first bytes as any magic needs."""
    view = memoryview(bytearray(min(LONGEST_MAGIC, file.length)))
    file.read_into(view, 0)
    return bytes(view)


def resembles(file: File) -> str | None:
    """The format whose magic ``file`` begins with, if any."""
    return magic_of(head(file))


def magic_of(first: bytes) -> str | None:
    """The format whose magic a file has that begins with the bytes ``first``, if any."""
    if not first.startswith(_ANY):
        return None
    return next((name for name, magic in MAGICS.items() if first.startswith(magic)), None)


def refuse_as_raw(file: File) -> None:
    """Raise for a file that a user calls raw and that begins as another format does.

    It may be raw: then its guest's data begins like that. A check reports it either way.
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
    return magic is not None and not head(file).startswith(magic)
