"""Property test of the life of images: random jobs, one after the other, on a small farm.

The model holds what each guest sees, and which file stands on which. After every job an independent
reader reads each view. A job that the model calls impossible must be refused and change nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
)

import addcow_mp
import oracle
from addcow_mp import AddcowError
from support.model import SECTOR, KiB
from support.properties import tried

pytestmark = pytest.mark.sample(1)

CLUSTERS = [4 * KiB, 8 * KiB, 64 * KiB]

#: The largest size of a raw base, in sectors.
MOST = 200


def padded(content: bytes | bytearray, size: int) -> bytearray:
    """``content`` cut to ``size``, or continued with zeros."""
    return bytearray(bytes(content[:size]).ljust(size, b"\0"))


class Life(RuleBasedStateMachine):
    """Bases and overlays in one directory."""

    overlays = Bundle("overlays")

    def __init__(self) -> None:
        super().__init__()
        self._home = tempfile.TemporaryDirectory()
        self.here = Path(self._home.name)
        #: What each file shows; of a raw base all of its bytes.
        self.seen: dict[str, bytearray] = {}
        #: What each overlay stands on.
        self.below: dict[str, str | None] = {}
        #: Overlays that do not look at their backing file.
        self.whole: set[str] = set()

    def teardown(self) -> None:
        """Remove the files."""
        self._home.cleanup()

    # What the model knows

    def users(self, name: str) -> set[str]:
        """The overlays that name a file as their backing file."""
        return {one for one, below in self.below.items() if below == name}

    def chain(self, name: str) -> list[str]:
        """The layers below an overlay, from the top down."""
        found: list[str] = []
        below = self.below[name]
        while below is not None:
            found.append(below)
            below = self.below.get(below)
        return found

    def path(self, name: str) -> Path:
        """Where a file lies."""
        return self.here / name

    def does(self, job: Callable[[], object], *, possible: bool) -> bool:
        """Do a job if it is possible, else assert that it is refused; returns ``possible``."""
        if possible:
            job()
            return True
        with pytest.raises(AddcowError):
            job()
        return False

    def new_name(self) -> str:
        """A name that no file has."""
        return f"{len(self.below) + len(self.seen):03}.add-cow"

    # Making

    @initialize(
        target=overlays,
        lengths=st.lists(st.integers(1, MOST * SECTOR), min_size=2, max_size=2),
        clusters=st.lists(st.sampled_from(CLUSTERS), min_size=3, max_size=3),
    )
    def begin(self, lengths: list[int], clusters: list[int]) -> object:
        """Make two bases that are equal in part, and three overlays."""
        for number, length in enumerate(lengths):
            name = f"base-{number}.img"
            content = b"".join(b"%7d\n" % at for at in range(0, length, 8))[:length]
            if number:
                middle = length // 2
                content = (
                    content[:middle] + b"\1" * min(9000, length - middle) + content[middle + 9000 :]
                )
            self.path(name).write_bytes(content[:length])
            self.seen[name] = bytearray(content[:length])
        return multiple(
            *(self._create(f"base-{one % 2}.img", size) for one, size in enumerate(clusters))
        )

    def _create(self, base: str, cluster: int) -> str:
        name = self.new_name()
        addcow_mp.create(self.path(name), backing=base, backing_format="raw", cluster_size=cluster)
        size = -(-len(self.seen[base]) // SECTOR) * SECTOR
        self.seen[name], self.below[name] = padded(self.seen[base], size), base
        return name

    @rule(target=overlays, base=st.sampled_from([0, 1]), cluster=st.sampled_from(CLUSTERS))
    def create(self, base: int, cluster: int) -> str:
        """Create one more overlay of a base."""
        return self._create(f"base-{base}.img", cluster)

    @rule(target=overlays, name=overlays)
    def snapshot(self, name: str) -> str:
        """Create a new overlay over another one."""
        new = self.new_name()
        addcow_mp.snapshot(self.path(name), self.path(new))
        self.seen[new], self.below[new] = bytearray(self.seen[name]), name
        return new

    # Changing

    @rule(
        name=overlays, at=st.integers(0, MOST), count=st.integers(1, 90), fill=st.integers(0, 255)
    )
    def write(self, name: str, at: int, count: int, fill: int) -> None:
        """Write as a guest; refused if other overlays stand on the overlay."""
        size = len(self.seen[name])
        start = min(at * SECTOR, size)
        data = bytes([fill]) * min(count * SECTOR, size - start)

        def job() -> None:
            with addcow_mp.open(self.path(name), writable=True) as disk:
                disk.write(start, data)

        if data and self.does(job, possible=not self.users(name)):
            self.seen[name][start : start + len(data)] = data

    @rule(name=overlays, jobs=st.sampled_from([0, 0, 0, 1]))
    def flatten(self, name: str, jobs: int) -> None:
        """Allocate every cluster."""
        addcow_mp.flatten(self.path(name), jobs=jobs)
        self.whole.add(name)

    @rule(name=overlays, jobs=st.sampled_from([0, 0, 0, 1]))
    def commit(self, name: str, jobs: int) -> None:
        """Commit into the backing file; refused if another overlay stands on that file."""
        below = self.below[name]
        possible = below is not None and self.users(below) == {name}
        if possible and below in self.below:
            possible = len(self.seen[below]) >= len(self.seen[name])
        if self.does(lambda: addcow_mp.commit(self.path(name), jobs=jobs), possible=possible):
            assert below is not None
            self.seen[below][: len(self.seen[name])] = self.seen[name]
            self.whole.discard(name)

    @rule(name=overlays, depth=st.integers(1, 3), jobs=st.sampled_from([0, 0, 0, 1]))
    def commit_into(self, name: str, depth: int, jobs: int) -> None:
        """Commit into a layer further down; every other view stays."""
        layers = [name, *self.chain(name)]
        looks_below = [one not in self.whole for one in layers[:depth]]
        if depth >= len(layers) or not all(looks_below):
            return
        base, over = layers[depth], layers[depth - 1]
        possible = self.users(base) == {over}
        if possible and base in self.below:
            possible = len(self.seen[base]) >= len(self.seen[name])
        into = self.path(base)
        if self.does(
            lambda: addcow_mp.commit(self.path(name), base=into, jobs=jobs), possible=possible
        ):
            self.seen[base][: len(self.seen[name])] = self.seen[name]

    @rule(name=overlays, other=overlays | st.sampled_from(["base-0.img", "base-1.img"]),
          jobs=st.sampled_from([0, 0, 0, 1]))  # fmt: skip
    def rebase(self, name: str, other: str, jobs: int) -> None:
        """Change the backing file; refused if the new one stands on the overlay."""
        is_circle = other == name or (other in self.below and name in self.chain(other))
        format_ = "add-cow" if other in self.below else "raw"

        def job() -> None:
            addcow_mp.rebase(self.path(name), self.path(other), backing_format=format_, jobs=jobs)

        if self.does(job, possible=not is_circle):
            self.below[name] = other

    @rule(name=overlays)
    def rebase_to_nothing(self, name: str) -> None:
        """Remove the backing file from the header."""
        addcow_mp.rebase(self.path(name), None)
        self.below[name] = None
        self.whole.add(name)

    @rule(name=overlays, sectors=st.integers(1, 2 * MOST))
    def resize(self, name: str, sectors: int) -> None:
        """Change the size; a smaller one is refused if other overlays stand on the overlay."""
        size = sectors * SECTOR
        possible = size >= len(self.seen[name]) or not self.users(name)
        if self.does(
            lambda: addcow_mp.resize(self.path(name), size, shrink=True), possible=possible
        ):
            self.seen[name] = padded(self.seen[name], size)

    @rule(name=overlays)
    def reset(self, name: str) -> None:
        """Reset to the backing file; refused if other overlays stand on the overlay."""
        below = self.below[name]
        possible = below is not None and not self.users(name) and name not in self.whole
        if self.does(lambda: addcow_mp.reset(self.path(name)), possible=possible):
            assert below is not None
            self.seen[name] = padded(self.seen[below], len(self.seen[name]))

    @invariant()
    def every_guest_sees_its_disk(self) -> None:
        """Every view equals that of the model."""
        for name, content in self.seen.items():
            if name in self.below:
                assert oracle.guest_bytes(str(self.path(name))) == content, name
            elif self.path(name).exists():
                held = self.path(name).read_bytes()
                assert held == content, name


@pytest.mark.long
def test_random_lives_of_images() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Life, settings=tried(60))
