#!/usr/bin/env python3
"""An independent reader of add-cow chains: the second opinion of the tests.

It shares no code with the package and is simple on purpose: the header is one struct, the bitmap is
read a byte at a time, the guest's view is put together cluster by cluster with seek and read. It
has no mapping, no cache and no processes, so it cannot be wrong in the same way as the package. It
keeps no state but open files, holds one cluster or one leaf of a digest in memory at a time (except
when the caller asks for bytes), and writes only the OUT of `dump`.

A layer is add-cow or raw. An add-cow layer reads an allocated cluster from its image file, any
other from the layer below, cut at that layer's own size; what no layer holds reads as zeros. All
that the format forbids is refused: a reader that guesses is no judge. It does not check two things:
a short bitmap (it reads as 0, as the format says), and what nothing refers to: bytes between the
names, the format of a backing file that is not there.

It also judges manifests, by docs/manifest.md alone: it computes from the bytes of the layers what a
manifest has to contain, leaf by leaf, and names every difference. It takes no digest from any
manifest. Only this needs a library, `blake3`; the rest runs on plain Python.

Command line: oracle.py size|digest|allocated FILE
              oracle.py dump FILE [OUT]
              oracle.py guest-digest|manifest FILE [--format raw|add-cow]
"""

import argparse
import hashlib
import json
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, BinaryIO, NamedTuple

SECTOR = 512
RAW_PART = 64 * 1024  # a raw layer has no clusters; it is read in parts of this size
FIXED_HEADER = 76
SMALLEST_HEADER = 4096
LONGEST_BACKING_NAME = 1023
LONGEST_IMAGE_NAME = 4095
ALL_ALLOCATED = 1

LEAF = 64 * 1024
FANOUT = 256  # leaves of a group, and children of every node of the guest's tree
DIGEST = 32
BITMAP = 32  # bytes: a bit for each leaf of a group
GUEST_MARK = b"add-cow guest 1\0"
RECORDS_START = 4096
MANIFEST_WORDS = ("guest-digest", "manifest")

# magic, version, length of the head
MANIFEST_LAYOUT = struct.Struct("<8sII")

# magic, backing name offset and size, image name offset and size, cluster bits,
# features, compatible features, header size, backing format, image format
LAYOUT = struct.Struct("<4sIIIIIQQI16s16s")


class OracleError(Exception):
    """The file, or one that its chain needs, is not what the format allows."""


class ManifestError(OracleError):
    """A manifest is so wrong in one place that the rest cannot be read."""


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


class Record(NamedTuple):
    """What a manifest says of one group, by leaf, counted from the first of the image."""

    group: int
    covered: set[int]
    mixed: set[int]
    held: dict[int, bytes]
    seen: dict[int, bytes]


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


def is_read_by_qemu(features: int) -> bool:
    """Tell whether FEATURES say "lent for reading": others may read the file, too."""
    return features >> 62 == 1


def check_numbers(path: str, bits: int, features: int, end: int, length: int) -> None:
    """Refuse an invalid header; END is its header size."""
    if features and not is_read_by_qemu(features):
        raise OracleError(f"{path}: unknown features {features:#x}")
    if not 12 <= bits <= 21:
        raise OracleError(f"{path}: cluster bits {bits}")
    if end != max(SMALLEST_HEADER, 1 << bits):
        raise OracleError(f"{path}: header size {end}")
    if length < end:
        raise OracleError(f"{path}: shorter than its header")


def read_name(file: BinaryIO, path: str, at: int, length: int, end: int, longest: int) -> str:
    """Read a name of LENGTH bytes at AT and give back the path it stands for.

    It is relative to the directory in which the file really lies.
    """
    if at < FIXED_HEADER or length < 1 or at + length > end or length > longest:
        raise OracleError(f"{path}: a name of {length} bytes at {at}")
    file.seek(at)
    name = os.fsdecode(file.read(length))
    if "\0" in name:
        raise OracleError(f"{path}: a name with a NUL in it")
    return os.path.join(os.path.dirname(os.path.realpath(path)), name)


def refuse_protocol(path: str, name: str) -> None:
    """Refuse a path of PATH's directory and a name that is no file's, such as nbd:host:1."""
    here = os.path.join(os.path.dirname(os.path.realpath(path)), "")
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
    """Return IMAGE, whose format must be raw."""
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
        return Layer(file, whole_size(file), RAW_PART, None, 0), None, ""
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


def open_chain(path: str, stack: ExitStack, kind: str = "add-cow") -> list[Layer]:
    """Open PATH, which is of the format KIND, and everything below it, topmost first."""
    layers: list[Layer] = []
    seen: set[tuple[int, int]] = set()
    below: str | None = path
    while below is not None:
        inodes = {inode(os.stat(below))}
        layer, lower, kind = open_layer(below, kind, stack)
        inodes.add(inode(os.fstat(layer.data.fileno())))
        if inodes & seen:
            raise OracleError(f"{path}: a file is used twice, at {below}")
        seen |= inodes
        layers.append(layer)
        below = lower
    return layers


def inode(status: os.stat_result) -> tuple[int, int]:
    """The identity of a file, under any name."""
    return status.st_dev, status.st_ino


def rounded_size(file: BinaryIO) -> int:
    """The size of an overlay with this image file: its whole sectors."""
    return os.fstat(file.fileno()).st_size // SECTOR * SECTOR


def whole_size(file: BinaryIO) -> int:
    """The size of a raw disk: all of its bytes, then zeros up to a whole sector."""
    return -(-os.fstat(file.fileno()).st_size // SECTOR) * SECTOR


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
    parts = []
    for start, stop in cut(offset, offset + length, layers[0].cluster_size if layers else length):
        parts.append(read_part(layers, start, stop - start))
    return b"".join(parts)


def cut(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut [START, STOP) at every multiple of STEP."""
    while start < stop:
        end = min(stop, (start // step + 1) * step)
        yield start, end
        start = end


def read_part(layers: list[Layer], offset: int, length: int) -> bytes:
    """Read a part that lies within one cluster of the topmost layer."""
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
            yield read_part(layers, begin, end - begin)


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
    for part in stream(path):
        total.update(part)
    return total.hexdigest()


def dump(path: str, out: BinaryIO) -> None:
    """Write the guest's view to OUT, byte by byte as a guest reads it."""
    for part in stream(path):
        out.write(part)


def dump_to(path: str, name: str | None) -> None:
    """Dump to the new file NAME, or to standard output."""
    if name is None:
        dump(path, sys.stdout.buffer)
        return
    with open(name, "xb") as out:
        dump(path, out)


def blake3_of(parts: Iterable[bytes]) -> bytes:
    """Return the BLAKE3 of PARTS, one after the other."""
    from blake3 import blake3

    total = blake3()
    for part in parts:
        total.update(part)
    return total.digest()


def blake3_of_file(file: BinaryIO, start: int, stop: int) -> bytes:
    """Return the BLAKE3 of FILE from START to STOP, or to its end if that comes first."""
    file.seek(start)
    return blake3_of(file.read(end - begin) for begin, end in cut(start, stop, LEAF))


def header_bytes(file: BinaryIO, end: int) -> Iterator[bytes]:
    """Yield the header region of FILE, END bytes, without the mark "lent for reading"."""
    file.seek(0)
    raw = bytearray(file.read(end))
    if is_read_by_qemu(struct.unpack_from("<Q", raw, 24)[0]):
        raw[24:32] = bytes(8)
    yield bytes(raw)


def leaf_count(layers: list[Layer]) -> int:
    """Return how many leaves the view of LAYERS has, the last maybe not a whole one."""
    return -(-layers[0].size // LEAF)


def leaf_digest(layers: list[Layer], leaf: int, size: int) -> bytes:
    """Return the digest of a LEAF of what LAYERS show, cut at SIZE and filled with zeros."""
    start = leaf * LEAF
    length = min(LEAF, size - start)
    return blake3_of([read_layers(layers, start, length), bytes(LEAF - length)])


def zero_leaf() -> bytes:
    """Return the digest of a leaf of zeros, which no manifest stores."""
    return blake3_of([bytes(LEAF)])


def nodes(children: Iterator[bytes], zero: bytes) -> Iterator[bytes]:
    """Give the node over each 256 of CHILDREN; ZERO stands for those behind the last."""
    held: list[bytes] = []
    for child in children:
        held.append(child)
        if len(held) == FANOUT:
            yield blake3_of(held)
            held = []
    if held:
        yield blake3_of(held + [zero] * (FANOUT - len(held)))


def topmost_node(leaves: Iterator[bytes], count: int) -> bytes:
    """Return the one node over the COUNT digests of LEAVES."""
    level, zero = leaves, zero_leaf()
    while True:
        level = nodes(level, zero)
        zero = blake3_of([zero] * FANOUT)
        count = -(-count // FANOUT)
        if count <= 1:
            return next(level, zero)


def guest_digest_of(layers: list[Layer]) -> str:
    """Return the guest's digest of what LAYERS show together, in hex."""
    size = layers[0].size
    count = leaf_count(layers)
    leaves = (leaf_digest(layers, leaf, size) for leaf in range(count))
    top = topmost_node(leaves, count)
    return blake3_of([GUEST_MARK, size.to_bytes(8, "little"), top]).hex()


def guest_digest(path: str, kind: str = "add-cow") -> str:
    """Return the guest's digest of PATH, in hex, from the bytes of its chain alone."""
    with ExitStack() as stack:
        return guest_digest_of(open_chain(path, stack, kind))


def is_mixed(layers: list[Layer], leaf: int, local: set[bool]) -> bool:
    """Say whether the topmost layer decides only some of LEAF; LOCAL is of its clusters."""
    if local != {False}:
        return local == {True, False}
    is_cut = (leaf + 1) * LEAF > layers[0].size
    return is_cut and len(layers) > 1 and layers[1].size > layers[0].size


def local_in(layer: Layer, leaf: int) -> set[bool]:
    """Say what the clusters of LAYER in LEAF are: allocated, not allocated, or both."""
    start = leaf * LEAF
    stop = min(start + LEAF, layer.size)
    return {
        is_local(layer, begin // layer.cluster_size)
        for begin, _ in cut(start, stop, layer.cluster_size)
    }


def wanted_record(layers: list[Layer], group: int) -> Record:
    """Work out what a manifest of the topmost of LAYERS has to say of GROUP."""
    record = Record(group, set(), set(), {}, {})
    top, zero = layers[0], zero_leaf()
    for leaf in range(group * FANOUT, min((group + 1) * FANOUT, leaf_count(layers))):
        local = local_in(top, leaf)
        mixed = is_mixed(layers, leaf, local)
        if not mixed and local == {False}:
            continue
        if (
            top.bitmap is not None
        ):  # if everything is allocated, the head says so and not the bitmap
            record.covered.add(leaf)
        record.held[leaf] = leaf_digest([top], leaf, top.size)
        if mixed:
            record.mixed.add(leaf)
            record.seen[leaf] = leaf_digest(layers, leaf, top.size)
    return record._replace(held=without(record.held, zero), seen=without(record.seen, zero))


def without(digests: dict[int, bytes], zero: bytes) -> dict[int, bytes]:
    """Return DIGESTS without those that are ZERO."""
    return {leaf: value for leaf, value in digests.items() if value != zero}


def is_needed(record: Record) -> bool:
    """Say whether a manifest has this record at all."""
    return record.covered != set() or record.held != {}


def read_exactly(file: BinaryIO, length: int, end: int) -> bytes:
    """Read LENGTH bytes of the records, which end at END."""
    start = file.tell()
    if start + length > end:
        raise ManifestError(f"records: cut short at byte {start}")
    return file.read(length)


def read_bits(file: BinaryIO, group: int, end: int) -> list[int]:
    """Read one bitmap of GROUP and return its leaves, ascending."""
    bitmap = read_exactly(file, BITMAP, end)
    return [group * FANOUT + bit for bit in range(FANOUT) if (bitmap[bit // 8] >> bit % 8) & 1]


def read_record(file: BinaryIO, end: int) -> Record:
    """Read the record at which FILE stands."""
    group = int.from_bytes(read_exactly(file, 8, end), "little")
    covered = set(read_bits(file, group, end))
    mixed = set(read_bits(file, group, end))
    held_leaves = read_bits(file, group, end)
    seen_leaves = read_bits(file, group, end)
    held = {leaf: read_exactly(file, DIGEST, end) for leaf in held_leaves}
    seen = {leaf: read_exactly(file, DIGEST, end) for leaf in seen_leaves}
    return Record(group, covered, mixed, held, seen)


def read_records(file: BinaryIO, end: int) -> Iterator[Record]:
    """Give the records, which have to ascend, up to END."""
    last = -1
    at = RECORDS_START
    while at < end:
        file.seek(at)
        record = read_record(file, end)
        if record.group <= last:
            raise ManifestError(f"records: group {record.group} after {last}, at byte {at}")
        last = record.group
        at = file.tell()
        yield record


def digest_faults(what: str, found: dict[int, bytes], wanted: dict[int, bytes]) -> list[str]:
    """Name the leaves whose stored digests are not those wanted."""
    faults = [
        f"{what} digest stored or not: leaf {leaf}" for leaf in sorted(set(found) ^ set(wanted))
    ]
    both = sorted(set(found) & set(wanted))
    return faults + [f"{what} digest: leaf {leaf}" for leaf in both if found[leaf] != wanted[leaf]]


def differences(found: Record, wanted: Record) -> list[str]:
    """Name what FOUND says of a group that is not as WANTED."""
    faults = [f"covered: leaf {leaf}" for leaf in sorted(found.covered ^ wanted.covered)]
    faults += [f"mixed: leaf {leaf}" for leaf in sorted(found.mixed ^ wanted.mixed)]
    faults += digest_faults("held", found.held, wanted.held)
    return faults + digest_faults("seen", found.seen, wanted.seen)


def record_faults(records: Iterator[Record], layers: list[Layer]) -> Iterator[str]:
    """Compare RECORDS with what the topmost of LAYERS needs, group by group."""
    found = next(records, None)
    for group in range(-(-leaf_count(layers) // FANOUT)):
        wanted = wanted_record(layers, group)
        needed = is_needed(wanted)
        present = found is not None and found.group == group
        if needed != present:
            yield f"record {'missing' if needed else 'not needed'}: group {group}"
        if found is not None and found.group == group:
            yield from differences(found, wanted)
            found = next(records, None)
    if found is not None:
        yield f"record behind the end of the image: group {found.group}"


def identity(path: str) -> dict[str, int]:
    """What a manifest says of a file, to tell whether it was touched."""
    status = os.stat(path)
    return {
        "size": status.st_size,
        "inode": status.st_ino,
        "mtime-ns": status.st_mtime_ns,
        "ctime-ns": status.st_ctime_ns,
    }


def wanted_overlay_head(path: str, layers: list[Layer]) -> dict[str, Any]:
    """Work out what only the head of an overlay has to say."""
    header = read_header(path)
    clusters = -(-layers[0].size // header.cluster_size)
    length = -(-clusters // (8 * header.cluster_size)) * header.cluster_size
    end = header.header_size
    head: dict[str, Any] = {"files": {"image": identity(header.image), "cow": identity(path)}}
    head["header-size"] = end
    with open(path, "rb") as cow:
        head["header-digest"] = blake3_of(header_bytes(cow, end)).hex()
        head["bitmap-digest"] = blake3_of_file(cow, end, end + length).hex()
    if len(layers) > 1:
        below = layers[1:]
        head["backing"] = {"guest-digest": guest_digest_of(below), "virtual-size": below[0].size}
    return head


def wanted_head(path: str, kind: str, layers: list[Layer]) -> dict[str, Any]:
    """Work out what the head has to say, but for the number of records."""
    head: dict[str, Any] = {
        "kind": kind,
        "virtual-size": layers[0].size,
        "all-local": layers[0].bitmap is None,
        "guest-digest": guest_digest_of(layers),
    }
    if kind == "raw":
        return head | {"files": {"image": identity(path)}}
    return head | wanted_overlay_head(path, layers)


def object_faults(what: str, found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """Name the keys of the JSON object WHAT, and of those in it, that are not as WANTED."""
    for key in sorted(found.keys() | wanted.keys()):
        name = f"{what}.{json.dumps(key)[1:-1]}"
        if key not in found:
            yield f"{name}: missing"
        elif key not in wanted:
            yield f"{name}: not needed"
        elif isinstance(found[key], dict) and isinstance(wanted[key], dict):
            yield from object_faults(name, found[key], wanted[key])
        elif json.dumps(found[key]) != json.dumps(wanted[key]):
            yield f"{name}: {json.dumps(found[key])}, not {json.dumps(wanted[key])}"


def read_head(file: BinaryIO, length: int) -> dict[str, Any]:
    """Read the head of LENGTH bytes, at which FILE stands, and the zeros behind it."""
    space = RECORDS_START - MANIFEST_LAYOUT.size
    if length > space:
        raise ManifestError(f"length of the head: {length}")
    text = file.read(length)
    if file.read(space - length) != bytes(space - length):
        raise ManifestError(f"no zeros: behind the head of {length} bytes")
    try:
        head = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"no JSON: the head: {error}") from error
    if not isinstance(head, dict):
        raise ManifestError("no JSON object: the head")
    return head


def check_manifest(file: BinaryIO, path: str, kind: str) -> Iterator[str]:
    """Give every difference between the manifest in FILE and the layer PATH."""
    with ExitStack() as stack:
        layers = open_chain(path, stack, kind)
        end = os.fstat(file.fileno()).st_size - DIGEST
        if end < RECORDS_START:
            raise ManifestError("manifest: shorter than its head and its digest")
        if blake3_of_file(file, 0, end) != file.read():
            yield "own digest: the last 32 bytes"
        file.seek(0)
        magic, version, length = MANIFEST_LAYOUT.unpack(file.read(MANIFEST_LAYOUT.size))
        if magic != b"ADDCOWMF" or version != 1:
            raise ManifestError(f"magic and version: {magic!r}, {version}")
        head = read_head(file, length)
        groups = sum(1 for _ in read_records(file, end))
        wanted = wanted_head(path, kind, layers) | {"groups": groups}
        yield from object_faults("head", head, wanted)
        yield from record_faults(read_records(file, end), layers)


def to_the_first_end(file: BinaryIO, path: str, kind: str) -> Iterator[str]:
    """Give the differences; one that makes the rest unreadable is the last."""
    try:
        yield from check_manifest(file, path, kind)
    except ManifestError as error:
        yield str(error)


def manifest_faults(path: str, kind: str = "add-cow") -> list[str]:
    """Return the differences of the manifest beside PATH, a line for each."""
    with open(f"{os.path.realpath(path)}.manifest", "rb") as file:
        return list(to_the_first_end(file, path, kind))


def answer(what: str, path: str, out: str | None, kind: str) -> int:
    """Run one command and return the exit status."""
    if what == "size":
        print(virtual_size(path))
    elif what == "digest":
        print(digest(path))
    elif what == "allocated":
        print(json.dumps(allocated(path)))
    elif what == "dump":
        dump_to(path, out)
    elif what == "guest-digest":
        print(guest_digest(path, kind))
    else:
        return print_faults(manifest_faults(path, kind))
    return 0


def print_faults(faults: list[str]) -> int:
    """Print FAULTS, a line for each, and return the exit status."""
    for fault in faults:
        print(fault)
    return 1 if faults else 0


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="An independent reader of add-cow chains.")
    words = ["size", "digest", "allocated", "dump", *MANIFEST_WORDS]
    parser.add_argument("what", choices=words)
    parser.add_argument("file")
    parser.add_argument("out", nargs="?", help="a new file for dump (default: standard output)")
    parser.add_argument("--format", choices=["raw", "add-cow"], help="what FILE is")
    args = parser.parse_args()
    if args.out is not None and args.what != "dump":
        parser.error("only dump takes an OUT")
    if args.format is not None and args.what not in MANIFEST_WORDS:
        parser.error(f"only {' and '.join(MANIFEST_WORDS)} take a format")
    try:
        return answer(args.what, args.file, args.out, args.format or "add-cow")
    except (OracleError, OSError) as error:
        print(f"oracle: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
