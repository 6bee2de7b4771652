"""Lend overlays to QEMU in tests: use them through their twins with qemu-io and qemu-img."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

from support import model
from support.command import addcow, succeed, tool

KiB = 1024
SECTOR = 512


def node(overlay: str, *, cwd: Path) -> str:
    """What qemu-io and qemu-img take for a lent overlay: all files of its chain by name."""
    described: dict[str, Any] = succeed("qemu", "args", "--output", "json", overlay, cwd=cwd).json
    described.pop("node-name")
    return "json:" + json.dumps(described)


def qemu_io(overlay: str, *commands: str, cwd: Path) -> str:
    """Run commands of qemu-io on a lent overlay."""
    words = [word for each in commands for word in ("-c", each)]
    told = tool("qemu-io", *words, node(overlay, cwd=cwd), cwd=cwd)
    assert "rror" not in told, told
    return told


def seen_by_qemu(overlay: str, *, cwd: Path) -> bytes:
    """What a guest reads through the twin of a lent overlay."""
    tool("qemu-img", "convert", "-O", "raw", node(overlay, cwd=cwd), "seen.out", cwd=cwd)
    content = (cwd / "seen.out").read_bytes()
    (cwd / "seen.out").unlink()
    return content


def view(overlay: str, *, cwd: Path) -> bytes:
    """What a guest reads in an overlay that is not lent."""
    succeed("convert", "-O", "raw", overlay, "view.out", cwd=cwd)
    content = (cwd / "view.out").read_bytes()
    (cwd / "view.out").unlink()
    return content


def features(path: Path) -> int:
    """The feature bits in the header of an overlay: 0 unless it is lent."""
    (bits,) = struct.unpack_from("<Q", path.read_bytes(), 24)
    return int(bits)


def patch_features(path: Path, *, set_: int, clear: int) -> None:
    """Set and clear feature bits in the header of an overlay."""
    with path.open("r+b") as file:
        file.seek(24)
        file.write(struct.pack("<Q", features(path) & ~clear | set_))


def is_enabled(twin: Path) -> bool:
    """Whether QEMU opens a qcow2 file: the highest of its incompatible features is clear."""
    return not twin.read_bytes()[72] & 0x80


def twins(directory: Path) -> dict[str, bool]:
    """The qcow2 files of a directory, and whether QEMU opens each."""
    return {one.name: is_enabled(one) for one in sorted(directory.glob("*.qcow2"))}


def refuses(*arguments: str, cwd: Path) -> bool:
    """Whether a command is refused."""
    return addcow(*arguments, cwd=cwd).status != 0


# Random overlays and sessions


def random_layer(rng: random.Random, depth: int = 0) -> model.Overlay:
    """An overlay of any small size and cluster size, over anything, with garbage in holes."""
    cluster = rng.choice([4, 8, 16, 32, 64, 128]) * KiB
    cells = "".join(rng.choice("--AAB0.xy") for _ in range(rng.randrange(1, 20)))
    return model.overlay(
        cells,
        _random_backing(rng, depth),
        cluster_size=cluster,
        cut=rng.choice([0, SECTOR, rng.randrange(cluster)]),
    )


def _random_backing(rng: random.Random, depth: int) -> model.Layer | None:
    chance = rng.random()
    if chance < 0.4 and depth < 2:
        return random_layer(rng, depth + 1)
    if chance > 0.95:
        return None
    cells = "".join(rng.choice("-CDE0") for _ in range(rng.randrange(30)))
    return model.raw(cells, rng.choice([4, 16, 64]) * KiB, rng.choice([0, rng.randrange(3000)]))


def random_session(rng: random.Random, content: bytearray) -> list[str]:
    """Commands of qemu-io in whole sectors; ``content`` becomes what a guest then reads."""
    commands, sectors = [], len(content) // SECTOR
    for _ in range(rng.randrange(10) if sectors else 0):
        start = rng.randrange(sectors) * SECTOR
        length = min(len(content) - start, rng.choice([1, 8, 128, rng.randrange(1, 200)]) * SECTOR)
        verb = rng.choice(["write -P {}", "write -P {}", "write -z", "write -z -u", "read"])
        fill = 0 if "-z" in verb else rng.randrange(1, 256)
        if verb != "read":
            content[start : start + length] = bytes([fill]) * length
        commands.append(f"{verb.format(fill)} {start} {length}")
    return commands
