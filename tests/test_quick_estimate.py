"""Tests of the quick estimate: it says what the full estimate says, or leaves the image to it."""

from __future__ import annotations

import fcntl
import os
import random
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from addcow_mp.device.access import Access
from addcow_mp.farm.image_job import JobSpec, Operation
from addcow_mp.farm.plain import NotPlainError
from addcow_mp.farm.plan import Plan, plan
from addcow_mp.farm.quick_estimate import QuickEstimates
from addcow_mp.jobs.options import RunOptions
from support.command import KiB, addcow, draw, draw_raw, ran
from support.file_systems import made_disk
from support.golden import ROOT
from support.seed import SEED

#: Those of which there are quick estimates.
SPECS = {one.value: JobSpec(one) for one in Operation if one is not Operation.REBASE}
EACH = pytest.mark.parametrize("operation", SPECS)


def made_plan(here: Path, operation: str) -> tuple[Plan, RunOptions]:
    """The plan of a farm, and the options with which an image of it is estimated."""
    options = RunOptions(jobs=0, access=Access())
    made = plan([str(here)], SPECS[operation], options)
    return made, RunOptions(jobs=0, access=made.access)


def compared(here: Path, operation: str) -> tuple[int, int]:
    """Compare both estimates of each image; return how many are plain, and how many are not."""
    made, options = made_plan(here, operation)
    quick, plain, others = QuickEstimates(options), 0, 0
    for step in made.steps:
        full = step.image_job.estimate(options)
        try:
            told = quick.of(step.image_job)
        except NotPlainError:
            others += 1
        else:
            assert told == full, step.path
            plain += 1
    return plain, others


@pytest.fixture(params=["here", pytest.param("xfs", marks=pytest.mark.long)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory for a farm; on XFS, long runs are cloned."""
    if request.param == "here":
        yield tmp_path
        return
    for disk in made_disk("xfs", tmp_path):
        (disk.mountpoint / "farm").mkdir()
        yield disk.mountpoint / "farm"


def lay(here: Path, rng: random.Random, count: int = 40) -> None:
    """Overlays over bases of their own: any bits, any data and holes, shorter and longer bases."""
    for number in range(count):
        size = rng.choice([1, 3, 20, 40])
        draw_raw(here / f"{number}.img", "".join(rng.choices("AB-", k=rng.randint(1, size + 2))))
        picture = rng.choice(["X" * size, "-" * size, "".join(rng.choices("Xb0-", k=size))])
        draw(here / f"{number}.add-cow", picture, f"{number}.img")
        if rng.random() < 0.3:
            with (here / f"{number}.img").open("ab") as base:
                base.write(b"tail" * rng.randint(1, 200))


@EACH
def test_quick_estimate_of_plain_images_is_that_of_the_job(
    place: Path, rng: random.Random, operation: str
) -> None:
    lay(place, rng)
    assert compared(place, operation) == (40, 0)


@EACH
def test_quick_estimate_of_any_image_is_right_or_none(tmp_path: Path, operation: str) -> None:
    words = ("--images", "60", "--bases", "4", "--seed", SEED)
    done = ran([sys.executable, ROOT / "tools" / "mkfarm.py", tmp_path / "farm", *words])
    assert done.returncode == 0
    plain, others = compared(tmp_path / "farm", operation)
    assert others > 0
    assert plain > 0 or operation == "commit"  # siblings refuse each other's commits


def hard_link(here: Path) -> None:
    os.link(here / "vm.raw", here / "other.raw")


def link(here: Path) -> None:
    (here / "vm.raw").rename(here / "moved.raw")
    (here / "vm.raw").symlink_to("moved.raw")


def manifest(here: Path) -> None:
    (here / "vm.raw.manifest").write_bytes(b"")


def directory(here: Path) -> None:
    (here / "vm.raw").unlink()
    (here / "vm.raw").mkdir()


def fifo(here: Path) -> None:
    (here / "vm.raw").unlink()
    os.mkfifo(here / "vm.raw")


def partial_sector(here: Path) -> None:
    with (here / "vm.raw").open("ab") as image:
        image.write(b"x")


def short_bitmap(here: Path) -> None:
    os.truncate(here / "vm.add-cow", 64 * KiB)


def lent(here: Path) -> None:
    with (here / "vm.add-cow").open("r+b") as cow:
        cow.seek(24)
        cow.write((1 << 63 | 5).to_bytes(8, "little"))


def large(here: Path) -> None:
    """More than a task moves, in either direction."""
    draw_raw(here / "vm.img", "A" * 2200)
    draw(here / "vm.add-cow", "X" * 1100 + "-" * 1100, "vm.img")


UNUSUAL: list[Callable[[Path], None]] = [
    *(hard_link, link, manifest, directory, fifo, partial_sector, short_bitmap, lent, large),
]


@EACH
@pytest.mark.parametrize("change", UNUSUAL, ids=lambda change: change.__name__)
def test_quick_estimate_leaves_unusual_images_to_the_job(
    tmp_path: Path, operation: str, change: Callable[[Path], None]
) -> None:
    draw_raw(tmp_path / "vm.img", "ABCD")
    draw(tmp_path / "vm.add-cow", "-XY-", "vm.img")
    assert compared(tmp_path, operation) == (1, 0)
    change(tmp_path)
    # A reset moves nothing, however large the image.
    is_plain = (operation, change) == (Operation.RESET, large)
    assert compared(tmp_path, operation) == ((1, 0) if is_plain else (0, 1))


@EACH
@pytest.mark.parametrize("name", ["vm.add-cow", "vm.raw", "vm.img"])
def test_plan_refuses_a_file_that_a_guest_writes(tmp_path: Path, operation: str, name: str) -> None:
    draw_raw(tmp_path / "vm.img", "ABCD")
    draw(tmp_path / "vm.add-cow", "-XY-", "vm.img")
    with (tmp_path / name).open("r+b") as guest:
        # A guest that writes: permission 1 at byte 101, and it shares neither 1 nor 3.
        for byte in (100, 101, 201, 203):
            lock = (fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
            fcntl.fcntl(guest.fileno(), fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", *lock))
        result = addcow("farm", "plan", operation, ".", cwd=tmp_path)
        assert result.status == 1
        assert "in use" in result.stderr
    assert addcow("farm", "plan", operation, ".", cwd=tmp_path).status == 0


def test_clusters_of_other_sizes_are_estimated(tmp_path: Path) -> None:
    for bits in (12, 16, 21):
        draw_raw(tmp_path / f"{bits}.img", "AB" * 40)
        draw(tmp_path / f"{bits}.add-cow", "-X", f"{bits}.img", cluster=1 << bits)
    for operation in SPECS:
        assert compared(tmp_path, operation) == (3, 0)
