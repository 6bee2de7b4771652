"""Chains for jobs of several tasks that hold little data."""

from __future__ import annotations

import hashlib
import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import oracle
from support.command import KiB, MiB, local_clusters, overlay_bytes, stored_bytes, succeed

WIDE_CLUSTER = 256 * KiB


#: A task moves 64 MiB; weights count whole clusters or data in many small pieces as full.
TASK_CLUSTERS = 64 * MiB // WIDE_CLUSTER


BASE_DATA, IMAGE_DATA, ODD = 0, 2, 15


@dataclass(frozen=True)
class Wide:
    """A chain for `commit` or `flatten` that is cut into several tasks and holds little data.

    Of sixteen clusters, the first has 4 KiB of data in the base, the third and the last in the
    image.  The last is the only one that is allocated for flatten and that is not for commit, so
    that both jobs move all others: those are `selected`.  `seen` is the guest's view, digests of
    the clusters that are not zero.
    """

    here: Path
    job: str
    clusters: int
    selected: frozenset[int]
    seen: dict[int, str]

    @classmethod
    def lay(cls, here: Path, job: str, tasks: int = 3) -> Wide:
        """Make the files."""
        clusters = tasks * TASK_CLUSTERS
        for name, places in (("base.img", (BASE_DATA,)), ("top.raw", (IMAGE_DATA, ODD))):
            with (here / name).open("wb") as file:
                file.truncate(clusters * WIDE_CLUSTER)
                for number in (n for n in range(clusters) if n % 16 in places):
                    file.seek(number * WIDE_CLUSTER)
                    file.write(f"{name} {number} ".encode().ljust(4 * KiB, b"."))
        odd = frozenset(range(ODD, clusters, 16))
        selected = frozenset(range(clusters)) - odd
        cow = overlay_bytes(
            image="top.raw",
            size=clusters * WIDE_CLUSTER,
            backing="base.img",
            cluster=WIDE_CLUSTER,
            local=selected if job == "commit" else odd,
        )
        (here / "top.add-cow").write_bytes(cow)
        seen = view(here / "top.add-cow", here / "base.img", here / "top.raw")
        return cls(here, job, clusters, selected, seen)

    @property
    def top(self) -> Path:
        """The overlay."""
        return self.here / "top.add-cow"

    @property
    def target(self) -> Path:
        """The file that receives the data."""
        return self.here / ("base.img" if self.job == "commit" else "top.raw")

    @property
    def source(self) -> Path:
        """The file that the data comes from."""
        return self.here / ("top.raw" if self.job == "commit" else "base.img")

    @property
    def writes(self) -> str:
        """The event of writing into the target."""
        return "backing_write" if self.job == "commit" else "image_write"

    @property
    def reads(self) -> str:
        """The event of reading the source."""
        return "image_read" if self.job == "commit" else "backing_read"

    def moved(self, task: int) -> list[int]:
        """The clusters with data that a task moves."""
        place = IMAGE_DATA if self.job == "commit" else BASE_DATA
        return list(range(task * TASK_CLUSTERS + place, (task + 1) * TASK_CLUSTERS, 16))

    def published(self) -> set[int]:
        """The clusters whose bits say that they are done."""
        local = set(local_clusters(self.top))
        return set(range(self.clusters)) - local if self.job == "commit" else local

    def holds(self) -> None:
        """Assert that the guest sees what it saw, and that no file is shorter."""
        assert view(self.top, self.here / "base.img", self.here / "top.raw") == self.seen
        for name in ("base.img", "top.raw"):
            assert (self.here / name).stat().st_size == self.clusters * WIDE_CLUSTER

    def is_done(self) -> None:
        """Assert that the target alone is the disk, and that the bits say so."""
        self.holds()
        assert view(self.target, self.target) == self.seen
        assert self.published() == set(range(self.clusters))
        if self.job == "commit":
            assert stored_bytes(self.here / "top.raw") == 0

    def again(self) -> None:
        """Run the same command once more, without faults, to its right end."""
        succeed(self.job, "--jobs", "2", "top.add-cow", cwd=self.here)
        self.is_done()


def view(path: Path, *files: Path) -> dict[int, str]:
    """Return digests of what a guest sees in the clusters that are not zero.

    Only where one of the files has data is there anything to see, whatever the bits say.
    """
    with ExitStack() as stack:
        layers = [oracle.open_layer(str(path), "raw", stack)[0]]
        if path.suffix == ".add-cow":
            layers = oracle.open_chain(str(path), stack)
        places = sorted(set().union(*map(clusters_with_data, files)))
        pieces = ((n, oracle.read_layers(layers, n * WIDE_CLUSTER, WIDE_CLUSTER)) for n in places)
        return {n: hashlib.sha256(piece).hexdigest() for n, piece in pieces if piece.strip(b"\0")}


def clusters_with_data(path: Path) -> set[int]:
    """Return the clusters in which a file has anything but holes."""
    found: set[int] = set()
    position = 0
    with path.open("rb") as file, suppress(OSError):  # there is an end, ENXIO, to what is there
        while True:
            start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found |= set(range(start // WIDE_CLUSTER, -(-position // WIDE_CLUSTER)))
    return found
