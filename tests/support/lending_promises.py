"""What the way out to QEMU and the way back promise, however they end.

Never can both sides write: while QEMU opens the twin, the overlay is marked, and addcow refuses to
change it. No file below is changed, but for the mark of a layer and its twin.

export: when it is done, QEMU opens the twin. However it ended, `qemu import` takes the overlay
back, and its guest then sees what it saw before.

import: it is made for an overlay that is lent and that a guest has written. When it is done, there
is no twin and no mark, and the guest sees what it saw through the twin.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import oracle
from support.command import addcow, succeed
from support.lending import is_enabled, qemu_io, random_session
from support.model import Files, contents, read_file
from support.powercut import make_durable
from support.promises import VIEW, Promise, differs

LENT = 1 << 63


class Lending(Promise):
    """One of the two ways."""

    way: str
    has_jobs = False
    grows = False

    def __init__(self, files: Files, crash: str) -> None:
        super().__init__(files)
        self.crash = crash
        self.here = Path(files.path).parent
        self.layers = list(_overlays(files))
        self.below = contents([path for path in files.below if not path.endswith(".add-cow")])

    def command(self, jobs: int) -> list[str]:  # noqa: ARG002 - there is one process
        crash = ["--crash", self.crash] if self.way == "export" else []
        return ["qemu", self.way, *crash, self.files.link or self.files.path]

    def synced_by_others(self) -> list[str]:
        twins = [str(twin_of(path)) for path in self.layers]
        return [*self.files.everything, *twins, str(self.here)]

    def part_changed(self) -> float:
        """Return how many of the marks and twins have come or gone."""
        there = sum(twin_of(path).exists() + bool(features_of(path)) for path in self.layers)
        part = there / (2 * len(self.layers))
        return part if self.way == "export" else 1 - part

    def _one_writer(self) -> Iterator[str]:
        """Lines when both sides can write. A twin for reading cannot be written by QEMU."""
        for path in self.layers:
            twin = twin_of(path)
            if is_writable(twin) and not features_of(path):
                yield f"{path} is not lent, and QEMU can write its image file through {twin}"
        top = self.layers[0]
        if features_of(top) and addcow("io", "-c", "write 0 0", top, cwd=self.here).status == 0:
            yield f"{top} is lent, and addcow writes it"

    def _below_unchanged(self) -> Iterator[str]:
        for path, was in self.below.items():
            yield from differs(os.path.basename(path), read_file(path), was)

    def _came_back(self) -> Iterator[str]:
        """Lines unless the overlay is its user's again, with the right content."""
        for path in self.layers:
            if features_of(path) or twin_of(path).exists():
                yield f"{path} is still lent"
                return
        yield from differs(VIEW, oracle.guest_bytes(self.files.path), self.view)
        checked = addcow("check", self.files.path, cwd=self.here)
        if checked.status not in (0, 3):
            yield f"check: {checked.said}"


class Export(Lending):
    """The way out, and all the way back by the named command."""

    job = way = "export"

    def _broken(self, done: bool) -> Iterator[str]:
        yield from self._one_writer()
        twin = twin_of(self.files.path)
        if done and not (twin.exists() and is_enabled(twin)):
            yield "it is done, and QEMU cannot open the twin"
        taken = addcow("qemu", "import", self.files.link or self.files.path, cwd=self.here)
        if taken.status:
            yield f"qemu import: {taken.said}"
        yield from self._below_unchanged()
        yield from self._came_back()


class Import(Lending):
    """The way back of an overlay that is lent here, and written by a guest."""

    job = way = "import"

    def __init__(self, files: Files, crash: str, rng: random.Random) -> None:
        super().__init__(files, crash)
        path, content = files.link or files.path, bytearray(self.view)
        succeed("qemu", "export", "--crash", crash, path, cwd=self.here)
        qemu_io(path, *random_session(rng, content), cwd=self.here)
        make_durable(self.here)
        self.view = bytes(content)

    def _broken(self, done: bool) -> Iterator[str]:
        yield from self._one_writer()
        yield from self._below_unchanged()
        if done:
            yield from self._came_back()


def lending_of(words: str, files: Files, rng: random.Random) -> Lending:
    """Return what ``words``, qemu export or qemu import, promise about ``files``."""
    strict = can_be_strict(Path(files.path).parent)
    crash = rng.choice(["strict", "relaxed"]) if strict else "relaxed"
    return Export(files, crash) if words == "export" else Import(files, crash, rng)


def can_be_strict(directory: Path) -> bool:
    """Whether files here can have synchronous writes."""
    path = directory / "strict"
    path.touch()
    try:
        return (
            subprocess.run(["chattr", "+S", path], capture_output=True, check=False).returncode == 0
        )
    finally:
        path.unlink()


def twin_of(path: str) -> Path:
    """The twin of an overlay, whether it is there or not."""
    return Path(path).resolve().with_suffix(".qcow2")


def is_writable(twin: Path) -> bool:
    """Whether QEMU would open this twin for writing."""
    return bool(twin.exists() and is_enabled(twin) and twin.stat().st_mode & 0o222)


def features_of(path: str) -> int:
    """The feature bits in the header: 0 unless the overlay is lent."""
    with open(path, "rb") as file:
        (bits,) = struct.unpack_from("<Q", file.read(32), 24)
    return int(bits)


def _overlays(files: Files) -> Iterator[str]:
    layer: Files | None = files
    while layer is not None and layer.path != layer.image:
        yield layer.path
        layer = layer.backing
