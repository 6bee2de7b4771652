#!/usr/bin/env python3
"""An independent reader of add-cow chains: the second opinion of the tests.

It shares no code with the package and is dull on purpose: the header is one
struct, the bitmap is read a byte at a time, the guest's view is put together
cluster by cluster with seek and read. No mapping, no cache, no processes, no
cleverness that could be wrong in the same way as the thing it judges. It keeps
no state but open files, holds one cluster in memory at a time (except where
the caller asks for bytes), and never writes, but for the OUT of `dump`.

A layer is add-cow or raw. An add-cow layer answers a cluster from its image
file when the cluster is local, else from the layer below, cut at that layer's
own size; whatever no layer holds reads as zeros. Anything the format forbids is
refused: a reader that guesses is no judge. Two things it knowingly does not do:
it does not complain about a short bitmap (it reads as 0 there, as the format
says) and it does not look at what nothing points at: bytes between the names,
the format of a backing that is not there.

Command line: oracle.py size|digest|allocated|dump FILE [OUT]
"""

import argparse
import hashlib
import json
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import BinaryIO, NamedTuple

SECTOR = 512
RAW_PIECE = 64 * 1024  # a raw layer has no clusters; it is read in pieces of this size
FIXED_HEADER = 76
SMALLEST_HEADER = 4096
LONGEST_BACKING_NAME = 1023
LONGEST_IMAGE_NAME = 4095
ALL_ALLOCATED = 1

# magic, backing name offset and size, image name offset and size, cluster bits,
# features, compatible features, header size, backing format, image format
LAYOUT = struct.Struct("<4sIIIIIQQI16s16s")


class OracleError(Exception):
    """The file, or one that its chain needs, is not what the format allows."""


class Header(NamedTuple):
    """What the header of one .add-cow file says, names decoded."""

    backing: str | None
    backing_format: str
    image: str
    cluster_size: int
    all_allocated: bool
    header_size: int


class Layer(NamedTuple):
    """One open layer. A raw layer has no bitmap: all of it is in its file."""

    data: BinaryIO
    size: int
    cluster_size: int
    bitmap: BinaryIO | None
    bitmap_start: int


def read_header(path: str) -> Header:
    """Read the header of the .add-cow file PATH, or say which rule it breaks."""
    with open(path, "rb") as file:
        raw = file.read(FIXED_HEADER)
        if len(raw) < FIXED_HEADER or raw[:4] != b"ACOW":
            raise OracleError(f"{path}: not an add-cow file")
        fields = LAYOUT.unpack(raw)
        (_, b_at, b_len, i_at, i_len, bits, features, compatible, end, b_fmt, i_fmt) = fields
        check_numbers(path, bits, features, end, os.fstat(file.fileno()).st_size)
        image = read_name(file, path, i_at, i_len, end, LONGEST_IMAGE_NAME)
        backing = None
        if b_at != 0 or b_len != 0:
            backing = read_name(file, path, b_at, b_len, end, LONGEST_BACKING_NAME)
    refuse_protocol(path, image)
    if backing is not None and not compatible & ALL_ALLOCATED:
        refuse_protocol(path, backing)
    b_format = read_format(path, b_fmt, may_be_empty=backing is None)
    image = checked_image(path, image, i_fmt)
    return Header(backing, b_format, image, 1 << bits, compatible & ALL_ALLOCATED != 0, end)


def check_numbers(path: str, bits: int, features: int, end: int, length: int) -> None:
    """Refuse what no add-cow file may say; END is the header size it gives."""
    if features != 0:
        raise OracleError(f"{path}: unknown features {features:#x}")
    if not 12 <= bits <= 21:
        raise OracleError(f"{path}: cluster bits {bits}")
    if end != max(SMALLEST_HEADER, 1 << bits):
        raise OracleError(f"{path}: header size {end}")
    if length < end:
        raise OracleError(f"{path}: shorter than its header")


def read_name(file: BinaryIO, path: str, at: int, length: int, end: int, longest: int) -> str:
    """Read a name of LENGTH bytes at AT and give back the path it stands for."""
    if at < FIXED_HEADER or length < 1 or at + length > end or length > longest:
        raise OracleError(f"{path}: a name of {length} bytes at {at}")
    file.seek(at)
    name = os.fsdecode(file.read(length))
    if "\0" in name:
        raise OracleError(f"{path}: a name with a NUL in it")
    return os.path.join(os.path.dirname(path), name)


def refuse_protocol(path: str, name: str) -> None:
    """Refuse a path of PATH's directory and a name that is no file's, such as nbd:host:1."""
    here = os.path.join(os.path.dirname(path), "")
    if ":" in name.removeprefix(here).split("/", maxsplit=1)[0]:
        raise OracleError(f"{path}: {name!r} is not a path")


def read_format(path: str, field: bytes, *, may_be_empty: bool) -> str:
    """Decode one of the two 16-byte format names."""
    name, nul, rest = field.partition(b"\0")
    if nul == b"" or rest.strip(b"\0") != b"":
        raise OracleError(f"{path}: a format name without its zeros: {field!r}")
    if name == b"" and not may_be_empty:
        raise OracleError(f"{path}: an empty format name")
    return name.decode("ascii", "backslashreplace")


def checked_image(path: str, image: str, field: bytes) -> str:
    """Give back IMAGE, whose format must be raw."""
    image_format = read_format(path, field, may_be_empty=False)
    if image_format != "raw":
        raise OracleError(f"{path}: image format {image_format}")
    return image


def open_until_done(path: str, stack: ExitStack) -> BinaryIO:
    """Open PATH for reading; STACK closes it."""
    return stack.enter_context(open(path, "rb"))


def open_layer(path: str, kind: str, stack: ExitStack) -> tuple[Layer, str | None, str]:
    """Open one layer; also give the name and format of the one below, if any."""
    if kind == "raw":
        file = open_until_done(path, stack)
        return Layer(file, rounded_size(file), RAW_PIECE, None, 0), None, ""
    if kind != "add-cow":
        raise OracleError(f"{path}: format {kind} is beyond this reader")
    header = read_header(path)
    image = open_until_done(header.image, stack)
    if header.all_allocated:
        # Backing and bitmap are not consulted: the image is a raw file on its own.
        return Layer(image, rounded_size(image), header.cluster_size, None, 0), None, ""
    bitmap = open_until_done(path, stack)
    layer = Layer(image, rounded_size(image), header.cluster_size, bitmap, header.header_size)
    return layer, header.backing, header.backing_format


def open_chain(path: str, stack: ExitStack) -> list[Layer]:
    """Open PATH and everything below it, topmost first."""
    layers: list[Layer] = []
    seen: set[tuple[int, int]] = set()
    below: str | None = path
    kind = "add-cow"
    while below is not None:
        met = {inode(os.stat(below))}
        layer, lower, kind = open_layer(below, kind, stack)
        met.add(inode(os.fstat(layer.data.fileno())))
        if met & seen:
            raise OracleError(f"{path}: a file is used twice, at {below}")
        seen |= met
        layers.append(layer)
        below = lower
    return layers


def inode(status: os.stat_result) -> tuple[int, int]:
    """What tells one file from another, however its name is spelled."""
    return status.st_dev, status.st_ino


def rounded_size(file: BinaryIO) -> int:
    """The size a guest sees of a raw file: whole sectors."""
    return os.fstat(file.fileno()).st_size // SECTOR * SECTOR


def is_local(layer: Layer, cluster: int) -> bool:
    """Say whether LAYER itself holds CLUSTER."""
    if layer.bitmap is None:
        return True
    layer.bitmap.seek(layer.bitmap_start + cluster // 8)
    byte = layer.bitmap.read(1)
    if byte == b"":
        return False
    return (byte[0] >> (cluster % 8)) & 1 == 1


def read_layers(layers: list[Layer], offset: int, length: int) -> bytes:
    """Read LENGTH bytes at OFFSET of what LAYERS show together."""
    pieces = []
    for start, stop in cut(offset, offset + length, layers[0].cluster_size if layers else length):
        pieces.append(read_piece(layers, start, stop - start))
    return b"".join(pieces)


def cut(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut [START, STOP) at every multiple of STEP."""
    while start < stop:
        end = min(stop, (start // step + 1) * step)
        yield start, end
        start = end


def read_piece(layers: list[Layer], offset: int, length: int) -> bytes:
    """Read a piece that lies within one cluster of the topmost layer."""
    if not layers or offset >= layers[0].size:
        return bytes(length)
    top = layers[0]
    inside = min(length, top.size - offset)
    if is_local(top, offset // top.cluster_size):
        top.data.seek(offset)
        data = top.data.read(inside)
    else:
        data = read_layers(layers[1:], offset, inside)
    return data + bytes(length - len(data))


def stream(path: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Give the guest's view from START to STOP, at most a cluster at a time."""
    with ExitStack() as stack:
        layers = open_chain(path, stack)
        size = layers[0].size
        last = size if stop is None else stop
        if not 0 <= start <= last <= size:
            raise OracleError(f"{path}: [{start}, {last}) is not within its {size} bytes")
        for begin, end in cut(start, last, layers[0].cluster_size):
            yield read_piece(layers, begin, end - begin)


def guest_bytes(path: str, start: int = 0, stop: int | None = None) -> bytes:
    """Return what a guest reads from START to STOP (default: the end)."""
    return b"".join(stream(path, start, stop))


def virtual_size(path: str) -> int:
    """Return the size of the disk that a guest sees, in bytes."""
    with open(read_header(path).image, "rb") as image:
        return rounded_size(image)


def allocated(path: str) -> list[int]:
    """Return the numbers of the clusters that PATH's own image holds."""
    with ExitStack() as stack:
        layer, _, _ = open_layer(path, "add-cow", stack)
        clusters = -(-layer.size // layer.cluster_size)
        return [cluster for cluster in range(clusters) if is_local(layer, cluster)]


def digest(path: str) -> str:
    """Return the SHA-256 of the guest's view, in hex."""
    total = hashlib.sha256()
    for piece in stream(path):
        total.update(piece)
    return total.hexdigest()


def dump(path: str, out: BinaryIO) -> None:
    """Write the guest's view to OUT, byte by byte as a guest reads it."""
    for piece in stream(path):
        out.write(piece)


def dump_to(path: str, name: str | None) -> None:
    """Dump to the new file NAME, or to standard output."""
    if name is None:
        dump(path, sys.stdout.buffer)
        return
    with open(name, "xb") as out:
        dump(path, out)


def answer(what: str, path: str, out: str | None) -> None:
    """Do one of the command line's words."""
    if what == "size":
        print(virtual_size(path))
    elif what == "digest":
        print(digest(path))
    elif what == "allocated":
        print(json.dumps(allocated(path)))
    else:
        dump_to(path, out)


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="An independent reader of add-cow chains.")
    parser.add_argument("what", choices=["size", "digest", "allocated", "dump"])
    parser.add_argument("file")
    parser.add_argument("out", nargs="?", help="a new file for dump (default: standard output)")
    args = parser.parse_args()
    if args.out is not None and args.what != "dump":
        parser.error("only dump takes an OUT")
    try:
        answer(args.what, args.file, args.out)
    except (OracleError, OSError) as error:
        print(f"oracle: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
