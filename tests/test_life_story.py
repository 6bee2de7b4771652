"""Test of the life of a farm: what an administrator does with it after `create`.

Sixty machines of one golden base are used, snapshotted, reset, rebased to a new version of the base
and resized. One is committed two layers down. After every step an independent reader proves that
each guest sees its disk. At the end the farm is checked and verified.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import oracle
from support.command import CLUSTER, addcow, draw_raw, io, succeed

pytestmark = pytest.mark.sample(1)

MACHINES = 60
SIZE = 16 * CLUSTER


class Farm:
    """The machines, and what each guest must see."""

    def __init__(self, here: Path, rng: random.Random) -> None:
        self.here, self.rng = here, rng
        self.seen: dict[str, bytearray] = {}

    def holds(self) -> None:
        """Assert that every guest sees its disk."""
        for name, content in self.seen.items():
            assert oracle.guest_bytes(str(self.here / name)) == content, name

    def create(self, name: str, base: str) -> None:
        """Create a new machine over a raw base."""
        succeed("create", "-q", "-b", base, "-F", "raw", name, cwd=self.here)
        self.seen[name] = bytearray((self.here / base).read_bytes())

    def use(self, name: str) -> None:
        """Write as the guest, at a random place."""
        at = self.rng.randrange(len(self.seen[name]) // 512) * 512
        length = min(self.rng.choice([512, 4096, CLUSTER]), len(self.seen[name]) - at)
        pattern = self.rng.randrange(1, 256)
        io(name, f"write -P {pattern} {at} {length}", cwd=self.here)
        self.seen[name][at : at + length] = bytes([pattern]) * length

    def snapshot(self, name: str, new: str) -> None:
        """Take a snapshot: the overlay ``new`` gets the later writes of the guest."""
        succeed("snapshot", "-q", name, new, cwd=self.here)
        self.seen[new] = bytearray(self.seen[name])

    def resize(self, name: str, change: int) -> None:
        """Change the size by ``change`` bytes; a new part is zeros."""
        succeed("resize", "-q", "--shrink", name, f"{change:+}", cwd=self.here)
        size = len(self.seen[name]) + change
        self.seen[name] = bytearray(bytes(self.seen[name][:size]).ljust(size, b"\0"))


@pytest.mark.long
def test_life_of_a_farm(tmp_path: Path, rng: random.Random) -> None:
    farm, here = Farm(tmp_path, rng), tmp_path
    draw_raw(here / "golden.img", "ABCDEFGHIJKLMNOP")
    draw_raw(here / "golden-2.img", "ABCDxFGHIJKyMNOPQ")
    machines = [f"vm{number:02}.add-cow" for number in range(MACHINES)]
    for name in machines:
        farm.create(name, "golden.img")
        farm.use(name)
    farm.holds()

    tops = {name: f"{name[:4]}-today.add-cow" for name in machines[:20]}
    for name, new in tops.items():
        farm.snapshot(name, new)
        farm.use(new)
    farm.holds()

    for name in machines[40:]:
        farm.use(name)
    succeed("reset", "-q", *machines[40:], cwd=here)
    for name in machines[40:]:
        farm.seen[name] = bytearray((here / "golden.img").read_bytes())
    farm.holds()

    words = ("farm", "rebase", "-q", "-b", "golden-2.img", "--from", "golden.img", ".")
    succeed(*words, cwd=here)
    (here / "golden.img").unlink()
    farm.holds()

    for name in machines[30:40]:
        farm.resize(name, rng.choice([-3, -1, 1, 5]) * CLUSTER + rng.choice([0, 512]))
    farm.holds()

    lowest, middle = machines[0], tops[machines[0]]
    farm.snapshot(middle, "top.add-cow")
    farm.use("top.add-cow")
    succeed("commit", "-q", "-b", lowest, "top.add-cow", cwd=here)
    # The base shows what the top shows; all layers above it show what they showed.
    farm.seen[lowest] = bytearray(farm.seen["top.add-cow"])
    farm.holds()

    told = addcow("farm", "check", "--output", "json", ".", cwd=here)
    assert told.status == 0, told
    succeed("farm", "manifest", "create", "-q", ".", cwd=here)
    succeed("farm", "verify", "-q", ".", cwd=here)
