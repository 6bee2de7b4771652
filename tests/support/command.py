"""Run addcow the way a shell does, and make its files by hand.

The tests of the command line know nothing of the package: they start the command, look at
what it printed, and read the files it left with the few lines below, which say the format
once more in their own words. A fault shared by the package's writer and reader is then still
seen.

Images are drawn as strings, one character a cluster: a letter is a cluster full of that
byte, "0" is a cluster of written zeros, "-" is a hole (in an overlay: not allocated). A small
letter in an overlay is garbage, bytes in the image file under a clear bit, which no guest may
ever see.
"""

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from support.availability import missing

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
TiB = 1024 * GiB

CLUSTER = 64 * KiB
ALL_ALLOCATED = 1
USAGE = 64
# Well beyond what any command here needs, and far below what a user waits for.
PATIENCE = 60.0

#: How a test starts addcow with its own streams.
ADDCOW = [sys.executable, "-m", "addcow_mp"]

_HEADER = struct.Struct("<4sIIIIIQQI16s16s")
_PROMPT = re.compile(r"^(?:[\w-]+> )+", re.MULTILINE)


@dataclass(frozen=True)
class Result:
    """What a command left behind in the shell."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The printed JSON document; all of stdout has to be that document."""
        return json.loads(self.stdout)

    @property
    def lines(self) -> list[str]:
        """The lines of stdout, prompts taken off."""
        return _PROMPT.sub("", self.stdout).splitlines()

    @property
    def said(self) -> str:
        """Everything printed, whichever stream it took."""
        return self.stdout + self.stderr


def ran(words: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; return its status and what it printed."""
    return subprocess.run(  # noqa: PLW1510 - the caller looks at the status
        words, capture_output=True, text=True, timeout=PATIENCE, **options
    )


def addcow(*arguments: str, cwd: Path, stdin: str = "") -> Result:
    """Run addcow and insist on nothing but that it ends, and without a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "addcow_mp", *arguments],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Result(done.returncode, done.stdout, done.stderr)


def succeed(*arguments: str, cwd: Path, stdin: str = "") -> Result:
    """Run addcow and insist on success."""
    result = addcow(*arguments, cwd=cwd, stdin=stdin)
    assert result.status == 0, result
    return result


def refused(*arguments: str, cwd: Path, status: int = 1) -> str:
    """Run addcow, insist on this exit status and one line of explanation, and return that."""
    result = addcow(*arguments, cwd=cwd)
    assert result.status == status, result
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("addcow: "), lines
    return lines[0]


def io(name: str, *commands: str, cwd: Path) -> Result:
    """Run commands in one `addcow io` and insist on success."""
    return succeed("io", *(word for each in commands for word in ("-c", each)), name, cwd=cwd)


def tool(name: str, *arguments: str, cwd: Path) -> str:
    """Run a tool of the system, insisting on success; skip where it is not installed."""
    if shutil.which(name) is None:
        missing(f"{name} is not installed")
    done = subprocess.run(
        [name, *arguments], cwd=cwd, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done
    return done.stdout


def same_content(one: str, other: str, *, cwd: Path) -> None:
    """Let qemu-img compare two raw files; it insists on nothing but the guest's bytes."""
    tool("qemu-img", "compare", "-f", "raw", "-F", "raw", one, other, cwd=cwd)


# ---- the format, in the words of these tests ----


class Header(NamedTuple):
    """The fixed header and the two names, as they stand in the file."""

    backing: str
    image: str
    cluster: int
    features: int
    compatible: int
    header_size: int
    backing_format: str
    image_format: str


def bitmap_length(size: int, cluster: int) -> int:
    """Return how long the bitmap is: a bit a cluster, in whole clusters of the file."""
    clusters = -(-size // cluster)
    return -(-clusters // (8 * cluster)) * cluster


def overlay_bytes(
    *,
    image: str,
    size: int,
    backing: str = "",
    backing_format: str = "raw",
    cluster: int = CLUSTER,
    local: Iterable[int] = (),
    compatible: int = 0,
) -> bytes:
    """Return the whole .add-cow file that such an overlay is."""
    header_size = max(4 * KiB, cluster)
    names = os.fsencode(backing), os.fsencode(image)
    fixed = _HEADER.pack(
        b"ACOW",
        76 if backing else 0,
        len(names[0]),
        76 + len(names[0]),
        len(names[1]),
        cluster.bit_length() - 1,
        0,
        compatible,
        header_size,
        backing_format.encode() if backing else b"",
        b"raw",
    )
    bitmap = bytearray(bitmap_length(size, cluster))
    for number in local:
        bitmap[number // 8] |= 1 << number % 8
    return (fixed + b"".join(names)).ljust(header_size, b"\0") + bitmap


def read_header(path: Path) -> Header:
    """Read the header of an .add-cow file."""
    content = path.read_bytes()
    magic, b_at, b_size, i_at, i_size, bits, features, compatible, header_size, b_fmt, i_fmt = (
        _HEADER.unpack_from(content)
    )
    assert magic == b"ACOW"
    return Header(
        os.fsdecode(content[b_at : b_at + b_size]),
        os.fsdecode(content[i_at : i_at + i_size]),
        1 << bits,
        features,
        compatible,
        header_size,
        b_fmt.rstrip(b"\0").decode(),
        i_fmt.rstrip(b"\0").decode(),
    )


def local_clusters(path: Path) -> list[int]:
    """Return the clusters whose bit is set, stray bits past the end included."""
    bitmap = path.read_bytes()[read_header(path).header_size :]
    used = ((at, byte) for at, byte in enumerate(bitmap) if byte)
    return [8 * at + bit for at, byte in used for bit in range(8) if byte >> bit & 1]


def patch(path: Path, offset: int, data: bytes) -> None:
    """Overwrite some bytes of a file and nothing else."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def put(path: Path, offset: int, data: bytes) -> None:
    """Overwrite some bytes, checking that this changes them."""
    with path.open("rb") as file:
        file.seek(offset)
        assert file.read(len(data)) != data, "the damage would not be one"
    patch(path, offset, data)


def virtual_size(path: Path, kind: str = "add-cow") -> int:
    """Return the length of the guest's view: of the image file its whole sectors, of raw all."""
    if kind == "raw":
        return -(-path.stat().st_size // 512) * 512
    return (path.parent / read_header(path).image).stat().st_size // 512 * 512


def guest(path: Path, offset: int, length: int, kind: str = "add-cow") -> bytes:
    """Return what a guest reads there: the format's rule, cluster by cluster, and no more."""
    inside = max(0, min(length, virtual_size(path, kind) - offset))
    content = _raw(path, offset, inside) if kind == "raw" else _layers(path, offset, inside)
    return content.ljust(length, b"\0")


def _raw(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def _layers(path: Path, offset: int, length: int) -> bytes:
    header, local = read_header(path), set(local_clusters(path))
    answer = bytearray()
    while len(answer) < length:
        at = offset + len(answer)
        piece = min(length - len(answer), header.cluster - at % header.cluster)
        if header.compatible & ALL_ALLOCATED or at // header.cluster in local:
            answer += guest(path.parent / header.image, at, piece, header.image_format)
        elif header.backing:
            answer += guest(path.parent / header.backing, at, piece, header.backing_format)
        else:
            answer += bytes(piece)
    return bytes(answer)


# ---- pictures ----


def draw_raw(path: Path, picture: str, *, cluster: int = CLUSTER) -> None:
    """Make the raw file of a picture."""
    with path.open("wb") as file:
        for number, mark in enumerate(picture):
            if mark != "-":
                file.seek(number * cluster)
                file.write(_byte(mark) * cluster)
        file.truncate(len(picture) * cluster)


def draw(
    path: Path,
    picture: str,
    backing: str = "base.img",
    *,
    backing_format: str = "raw",
    cluster: int = CLUSTER,
    compatible: int = 0,
) -> None:
    """Make the overlay of a picture, with an image file beside it that ends in .raw."""
    image = path.with_suffix(".raw")
    draw_raw(image, picture, cluster=cluster)
    local = [at for at, mark in enumerate(picture) if mark == "0" or mark.isupper()]
    path.write_bytes(
        overlay_bytes(
            image=image.name,
            size=len(picture) * cluster,
            backing=backing,
            backing_format=backing_format,
            cluster=cluster,
            local=local,
            compatible=compatible,
        )
    )


def pair(directory: Path, base: str, top: str) -> Path:
    """Make base.img and top.add-cow over it; return the overlay's path."""
    draw_raw(directory / "base.img", base)
    draw(directory / "top.add-cow", top)
    return directory / "top.add-cow"


def picture(content: bytes, cluster: int = CLUSTER) -> str:
    """Return the picture of some bytes: "0" for zeros, "?" where a cluster is of no one byte."""
    pieces = (content[at : at + cluster] for at in range(0, len(content), cluster))
    return "".join(_mark(piece) for piece in pieces)


def look(path: Path, cluster: int = CLUSTER) -> str:
    """Return the picture of a raw file."""
    return picture(path.read_bytes(), cluster)


def guest_picture(path: Path, cluster: int = CLUSTER) -> str:
    """Return the picture of what a guest sees in an overlay."""
    return picture(guest(path, 0, virtual_size(path)), cluster)


def bits(path: Path) -> str:
    """Return the bitmap of an overlay as a picture: "1" for local, "." for not."""
    local = local_clusters(path)
    count = -(-virtual_size(path) // read_header(path).cluster)
    assert all(number < count for number in local), "bits past the last cluster"
    return "".join("1" if number in local else "." for number in range(count))


def snapshot(directory: Path) -> dict[str, str]:
    """Return a digest of everything in a directory, to say what did not change."""
    return {
        str(path.relative_to(directory)): _digest(path) for path in sorted(directory.rglob("*"))
    }


def stored_bytes(path: Path) -> int:
    """Return how many bytes a file occupies on the disk."""
    return path.stat().st_blocks * 512


def _digest(path: Path) -> str:
    if path.is_symlink():
        return f"-> {path.readlink()}"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no plain file"


def _byte(mark: str) -> bytes:
    return b"\0" if mark == "0" else mark.encode()


def _mark(piece: bytes) -> str:
    if piece.count(piece[:1]) != len(piece):
        return "?"
    return "0" if piece[0] == 0 else chr(piece[0])
