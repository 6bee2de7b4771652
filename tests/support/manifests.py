"""Digests of guests computed here, random chains, and the commands that make manifests."""

from __future__ import annotations

import json
import random
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

import oracle
from support.command import (
    ALL_ALLOCATED,
    KiB,
    MiB,
    Result,
    addcow,
    overlay_bytes,
    succeed,
    virtual_size,
)
from support.processes import Ended

#: The size of a sparse layer of many parts.
WIDE = 2048 * MiB

LEAF = 64 * KiB


FAN = 256


def digest(data: bytes) -> bytes:
    return blake3(data).digest()


def guest_digest(view: bytes) -> str:
    """The digest of a view, put together without any shortcut."""
    zero = digest(bytes(LEAF))
    level = [digest(view[at : at + LEAF].ljust(LEAF, b"\0")) for at in range(0, len(view), LEAF)]
    while True:
        nodes = -(-len(level) // FAN) or 1
        level += [zero] * (nodes * FAN - len(level))
        level = [digest(b"".join(level[at : at + FAN])) for at in range(0, nodes * FAN, FAN)]
        zero = digest(zero * FAN)
        if nodes == 1:
            break
    return digest(b"add-cow guest 1\0" + struct.pack("<Q", len(view)) + level[0]).hex()


def view_of(path: Path) -> bytes:
    if path.suffix == ".add-cow":
        return oracle.guest_bytes(str(path))
    return path.read_bytes().ljust(virtual_size(path, "raw"), b"\0")


def some_content(rng: random.Random, size: int) -> bytes:
    content = bytearray(size)
    for _ in range(rng.randrange(6)):
        at, length = rng.randrange(max(1, size)), rng.randrange(1, 200 * KiB)
        length = len(content[at : at + length])
        content[at : at + length] = rng.choice([bytes(length), rng.randbytes(length)])
    return bytes(content)


def write_sparse(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        for at in range(0, len(content), 4 * KiB):
            block = content[at : at + 4 * KiB]
            if block.strip(b"\0"):
                file.seek(at)
                file.write(block)
        file.truncate(len(content))


def made(here: Path, *words: str, name: str = "top.add-cow") -> dict[str, Any]:
    told = succeed("manifest", "create", "--output", "json", *words, name, cwd=here).json
    return {one["filename"]: one for one in told["manifests"]}


def verified(here: Path, *words: str, name: str = "top.add-cow", status: int = 0) -> dict[str, Any]:
    result = addcow("verify", "--output", "json", *words, name, cwd=here)
    assert result.status == status, result
    told: dict[str, Any] = result.json
    return told


def kind(name: str) -> tuple[str, ...]:
    return () if name.endswith(".add-cow") else ("-f", "raw")


def form(name: str) -> str:
    return "add-cow" if name.endswith(".add-cow") else "raw"


def one_line(ended: Ended | Result) -> str:
    assert ended.status == 1, ended
    told = ended.stderr.splitlines()
    (line,) = (one for one in told if not one.startswith("addcow: warning: "))
    assert line.startswith("addcow: "), line
    return line


LENGTHS = [0, 512, 4096, 65536, 1 << 20]


def some_length(rng: random.Random) -> int:
    return rng.choice([*LENGTHS, *(512 * rng.randrange(1, 9000) for _ in LENGTHS)])


def head(path: Path) -> bytes:
    """The JSON object of a manifest."""
    with path.open("rb") as file:
        content = file.read(4096)
    assert content[:8] == b"ADDCOWMF"
    return content[16 : 16 + int.from_bytes(content[12:16], "little")]


@dataclass(frozen=True)
class Layers:
    """A random chain: its layers from the base up, and the lengths of their views."""

    here: Path
    names: tuple[str, ...]

    @classmethod
    def some(cls, here: Path, rng: random.Random, *, longer: bool = False) -> Layers:
        """Draw one, whose base is ``longer`` than all others on demand."""
        count = rng.randrange(2 if longer else 1, 5)
        lengths = [some_length(rng) for _ in range(count)]
        if longer:
            lengths.sort(reverse=True)
            lengths[0] = lengths[1] + 512 * rng.randrange(1, 3000)
        names = ["base.img"]
        tail = bytes(rng.choice([0, 0, 100, 511]))
        write_sparse(here / "base.img", some_content(rng, lengths[0]) + tail)
        for number, size in enumerate(lengths[1:], 1):
            cluster = 4 * KiB << rng.randrange(10)
            share = rng.choice([0, 0.1, 0.5, 0.9, 1])
            local = [at for at in range(-(-size // cluster)) if rng.random() < share]
            write_sparse(here / f"o{number}.raw", some_content(rng, size))
            name = f"o{number}.add-cow"
            (here / name).write_bytes(
                overlay_bytes(
                    image=f"o{number}.raw",
                    size=size,
                    backing=names[-1],
                    backing_format="add-cow" if number > 1 else "raw",
                    cluster=cluster,
                    local=local,
                    compatible=ALL_ALLOCATED * (rng.random() < 0.1),
                )
            )
            names.append(name)
        return cls(here, tuple(names))

    @property
    def top(self) -> str:
        """The uppermost."""
        return self.names[-1]

    def twin(self) -> Layers:
        """The same once more, in a place of its own, without manifests."""
        place = self.here.parent / f"twin {len(list(self.here.parent.iterdir()))}"
        place.mkdir()
        for path in self.here.iterdir():
            if ".manifest" not in path.name:
                subprocess.run(["cp", "--sparse=always", path, place / path.name], check=True)
        return Layers(place, self.names)

    def digest(self, name: str, jobs: str) -> str:
        """What `manifest create` says of a layer; the manifests hold."""
        words = ("--jobs", jobs, *kind(name))
        told = made(self.here, *words, "--replace", name=name)
        assert verified(self.here, *words, name=name)["findings"] == []
        found: str = told[f"{name}.manifest"]["guest-digest"]
        assert json.loads(head(self.here / f"{name}.manifest"))["guest-digest"] == found
        return found

    def converted(self, name: str) -> str:
        """The digest of the raw file that `convert` makes of a layer, computed here."""
        output = self.here.parent / "converted.raw"
        output.unlink(missing_ok=True)
        words = ("convert", *kind(name), "-O", "raw", name, str(output))
        succeed(*words, cwd=self.here)
        return guest_digest(output.read_bytes())
