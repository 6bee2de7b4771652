"""The golden images: facts about files of the reference, and ways to have them.

`golden_facts.json` holds what the reference implementation made: sizes, steps,
header fields, hashes. From it this module can have a case's files in two
ways, and the tests compare both with the same facts:

- `replay` runs the steps through the command line, as a user would;
- `assemble` lays the bytes down by the format's rules alone, with no code of
  the package, for the tests of the oracle;

The module keeps no state but the loaded facts, and asserts nothing about the
package except that the commands of a replay succeed.
"""

import contextlib
import hashlib
import io
import json
import os
import runpy
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KiB = 1024
SECTOR = 512
ROOT = Path(__file__).resolve().parent.parent.parent
LONG_AGO_NS = 1_000_000_000 * 10**9
"""A file time in 2001: whatever is written during a test gets another one."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)

Facts = dict[str, Any]
FACTS: Facts = json.loads(Path(__file__).with_name("golden_facts.json").read_text("utf-8"))
CASES: list[Facts] = FACTS["cases"]
INVALID: Facts = FACTS["invalid"]


@dataclass(frozen=True)
class Result:
    """What a command left behind: exit status, standard output and error."""

    exit: int
    out: str
    err: str


@dataclass
class Replayed:
    """A replayed case: where its files are, and what `create` said and wrote."""

    folder: Path
    stdout: dict[str, str] = field(default_factory=dict)
    created_sha256: dict[str, str] = field(default_factory=dict)


def addcow(*words: str | Path, cwd: Path | None = None) -> Result:
    """Run the command line of this checkout, wherever the test stands."""
    done = subprocess.run(
        [sys.executable, "-m", "addcow_mp", *map(str, words)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def addcow_here(*words: str | Path) -> Result:
    """Run the command line inside this process: the same code, without the start."""
    out, err = io.StringIO(), io.StringIO()
    arguments, handlers = sys.argv, {number: signal.getsignal(number) for number in SIGNALS}
    sys.argv = ["addcow", *map(str, words)]
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_module("addcow_mp", run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = arguments
        for number, handler in handlers.items():  # a command may set its own for its life
            signal.signal(number, handler)
    return Result(status, out.getvalue(), err.getvalue())


def succeed(*words: str | Path, cwd: Path) -> str:
    """Run a step of a replay, which must work, and return what it printed."""
    result = addcow(*words, cwd=cwd)
    assert (result.exit, result.err) == (0, ""), f"{words}: {result}"
    return result.out


# Bytes and hashes


def sha256(data: bytes) -> str:
    """Return the SHA-256 of DATA in hex."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def base_bytes(base: Facts) -> bytes:
    """Return the base image that the facts describe by its rule."""
    return b"".join(sector_bytes(base, sector) for sector in range(base["length"] // SECTOR))


def sector_bytes(base: Facts, sector: int) -> bytes:
    """Return one sector: its tag and number, again and again, or zeros."""
    zero = base["zero_every"]
    if zero is not None and sector // zero["sectors"] % zero["of"] == 0:
        return bytes(SECTOR)
    text = f"{base['tag']}|{sector:08x}|".encode()
    return (text * (SECTOR // len(text) + 1))[:SECTOR]


def expand(runs: Iterable[tuple[int, int]]) -> list[int]:
    """Return every cluster of [first, stop) runs."""
    return [cluster for first, stop in runs for cluster in range(first, stop)]


def top(case: Facts) -> Facts:
    """Return the topmost layer of a case."""
    layer: Facts = case["layers"][-1]
    return layer


def bitmap_bytes(clusters: Iterable[int], length: int) -> bytes:
    """Return a bitmap of LENGTH bytes in which exactly CLUSTERS are set."""
    bits = bytearray(length)
    for cluster in clusters:
        bits[cluster // 8] |= 1 << cluster % 8
    return bytes(bits)


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Return time of change and hash of every file in FOLDER, by name."""
    return {
        path.name: (path.stat().st_mtime_ns, file_sha256(path)) for path in sorted(folder.iterdir())
    }


def copy_files(source: Path, target: Path, names: Iterable[str]) -> Path:
    """Copy files, dated long ago so that any write to one shows in a snapshot."""
    target.mkdir(parents=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
        os.utime(target / name, ns=(LONG_AGO_NS, LONG_AGO_NS))
    return target


# Through the command line


def replay(case: Facts, folder: Path) -> Replayed:
    """Run the steps of CASE in the new folder FOLDER."""
    folder.mkdir(parents=True)
    if case["base"] is not None:
        (folder / case["base"]["file"]).write_bytes(base_bytes(case["base"]))
    replayed = Replayed(folder)
    for layer in case["layers"]:
        create(layer, replayed)
        run_operations(layer, case, folder)
    return replayed


def create(layer: Facts, replayed: Replayed) -> None:
    """Create one layer over an image file that exists, as the reference's steps do."""
    folder, file = replayed.folder, layer["file"]
    with open(folder / layer["image"], "xb") as image:
        image.truncate(layer["size"])
    options = f"image_file={layer['image']}"
    if layer["cluster_size"] != 64 * KiB:  # the default is left to the command
        options += f",cluster_size={layer['cluster_size']}"
    words = ["create", "-f", "add-cow", "-o", options]
    if layer["backing"] is not None:
        words += ["-b", layer["backing"], "-F", layer["backing_format"]]
    replayed.stdout[file] = succeed(*words, file, str(layer["size"]), cwd=folder)
    replayed.created_sha256[file] = file_sha256(folder / file)


def run_operations(layer: Facts, case: Facts, folder: Path) -> None:
    """Do what the facts say was done to LAYER, neighbouring writes in one command."""
    writes: list[Facts] = []
    for operation in layer["ops"]:
        if operation["op"] == "write":
            writes.append(operation)
            continue
        write_patterns(layer, writes, folder)
        writes = []
        edit(operation, layer, case, folder)
    write_patterns(layer, writes, folder)


def write_patterns(layer: Facts, writes: list[Facts], folder: Path) -> None:
    """Write through `addcow io` and check that it says what it wrote."""
    if not writes:
        return
    words = []
    for one in writes:
        words += ["-c", f"write -P {one['pattern']} {one['offset']} {one['length']}"]
    printed = succeed("io", "-f", "add-cow", *words, layer["file"], cwd=folder).splitlines()
    wanted = [
        f"wrote {one['length']}/{one['length']} bytes at offset {one['offset']}" for one in writes
    ]
    assert [line for line in printed if line.startswith("wrote ")] == wanted


def edit(operation: Facts, layer: Facts, case: Facts, folder: Path) -> None:
    """Do one of the steps that are not writes of a guest's pattern."""
    match operation["op"]:
        case "truncate":
            os.truncate(folder / operation["file"], operation["length"])
        case "pwrite":
            patch(folder / operation["file"], operation["edits"])
        case "copy_base":
            import addcow_mp  # here, so that `assemble` does without the package

            with addcow_mp.open(folder / layer["file"], writable=True) as device:
                device.write(0, copied_base(operation, case))
        case other:
            raise AssertionError(f"facts with an unknown operation: {other}")


def copied_base(operation: Facts, case: Facts) -> bytes:
    """Return the base with one range replaced by a pattern."""
    data = bytearray(base_bytes(case["base"]))
    change = operation["with"]
    stop = change["offset"] + change["length"]
    data[change["offset"] : stop] = bytes([change["pattern"]]) * change["length"]
    return bytes(data)


def patch(path: Path, edits: list[tuple[int, str]]) -> None:
    """Lay bytes, given in hex, at offsets of a file."""
    with open(path, "r+b") as file:
        for offset, data in edits:
            file.seek(offset)
            file.write(bytes.fromhex(data))


def invalid_case() -> Facts:
    """Return the good image behind the invalid files in the shape of a case."""
    return {"base": INVALID["base"], "layers": [INVALID["layer"]], "files": INVALID["files"]}


def damage(good: Path, case: Facts, folder: Path) -> Path:
    """Make one of the invalid files, with its base and image, in the new FOLDER."""
    copy_files(good, folder, ["base.img", "top.raw", "good.add-cow"])
    name: str = case["file"]
    path = folder / name
    os.rename(folder / "good.add-cow", path)
    patch(path, case["pwrite"])
    if case["truncate"] is not None:
        os.truncate(path, case["truncate"])
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))
    return path


# By the format's rules, without the package


def assemble(case: Facts, folder: Path) -> Path:
    """Lay down the files of CASE in the new FOLDER, header field by header field."""
    folder.mkdir(parents=True)
    below = b""
    if case["base"] is not None:
        below = base_bytes(case["base"])
        (folder / case["base"]["file"]).write_bytes(below)
    for layer in case["layers"]:
        last = layer is top(case)
        below = assemble_image(layer, case, folder, below)
        header = header_bytes(case["header"] if last else usual_header(layer))
        whole = header + layer_bitmap(layer, len(below))
        length = case["files"][layer["file"]]["length"]
        (folder / layer["file"]).write_bytes(whole[:length])
    name: str = top(case)["file"]
    return folder / name


def layer_bitmap(layer: Facts, size: int) -> bytes:
    """Return the bitmap of a layer of SIZE bytes, as long as the format wants it."""
    cluster_size = layer["cluster_size"]
    clusters = -(-size // cluster_size)
    length = -(-clusters // 8 // cluster_size) * cluster_size or cluster_size
    local = [] if layer["backing"] is None else expand(layer["allocated"])
    return bitmap_bytes(local, length)


def assemble_image(layer: Facts, case: Facts, folder: Path, below: bytes) -> bytes:
    """Write LAYER's image file; return what a guest saw of it before hand edits."""
    view = bytearray(below[: layer["size"]].ljust(layer["size"], b"\0"))
    written: set[int] = set()
    for operation in layer["ops"]:
        if operation["op"] == "truncate" and operation["file"] == layer["image"]:
            view = view.ljust(operation["length"], b"\0")
        for offset, data in guest_writes(operation, case):
            view[offset : offset + len(data)] = data
            last = (offset + len(data) - 1) // layer["cluster_size"]
            written.update(range(offset // layer["cluster_size"], last + 1))
    image = keep_clusters(bytes(view), written, layer["cluster_size"])
    (folder / layer["image"]).write_bytes(image)
    return bytes(view)


def guest_writes(operation: Facts, case: Facts) -> list[tuple[int, bytes]]:
    """Return what a guest writes in one operation: offset and bytes, if any."""
    if operation["op"] == "write":
        return [(operation["offset"], bytes([operation["pattern"]]) * operation["length"])]
    if operation["op"] == "copy_base":
        return [(0, copied_base(operation, case))]
    return []


def keep_clusters(view: bytes, kept: set[int], size: int) -> bytes:
    """Return VIEW with zeros in place of every cluster that is not KEPT."""
    return b"".join(
        view[at : at + size] if at // size in kept else bytes(len(view[at : at + size]))
        for at in range(0, len(view), size)
    )


def usual_header(layer: Facts) -> Facts:
    """Return the header fields of a layer whose names lie where create puts them."""
    at = 76
    backing = layer["backing"] or ""
    return {
        "backing_file_offset": at if backing else 0,
        "backing_file_size": len(backing),
        "image_file_offset": at + len(backing),
        "image_file_size": len(layer["image"]),
        "cluster_bits": layer["cluster_size"].bit_length() - 1,
        "features": 0,
        "compatible_features": 0 if backing else 1,
        "header_size": max(4 * KiB, layer["cluster_size"]),
        "backing_fmt": layer["backing_format"] or "",
        "image_fmt": "raw",
        "backing_file": backing,
        "image_file": layer["image"],
    }


def header_bytes(fields: Facts) -> bytes:
    """Return the header area of an .add-cow file with these fields."""
    area = bytearray(fields["header_size"])
    numbers = ("backing_file_offset", "backing_file_size", "image_file_offset", "image_file_size")
    flags = ("cluster_bits", "features", "compatible_features", "header_size")
    values = [fields[name] for name in numbers + flags]
    formats = [fields[name].encode() for name in ("backing_fmt", "image_fmt")]
    struct.pack_into("<4s5I2QI16s16s", area, 0, b"ACOW", *values, *formats)
    for name in ("backing_file", "image_file"):
        at = fields[f"{name}_offset"]
        area[at : at + fields[f"{name}_size"]] = fields[name].encode()
    return bytes(area)
