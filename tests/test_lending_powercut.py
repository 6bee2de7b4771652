"""Tests of power cuts and kills on the way out to QEMU and on the way back, on ext4 and XFS.

Another process syncs files at random moments, the twin and the directory among them. Afterwards
never can both QEMU and addcow write, and `qemu import` finishes with the right content. The same
cuts must catch ways whose syncs are left out.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from support.availability import missing
from support.chains import even_chain
from support.command import succeed
from support.file_systems import made_disk
from support.lending_promises import Lending, lending_of
from support.model import MiB, build
from support.powercut import EVENTS, Disk, Moment, lose_power, make_durable
from support.victim import Victim

SIZE = 1 * MiB

#: Cuts after which a missing sync must have been noticed, unless others have synced each time.
PATIENT_CUTS = 20


@pytest.fixture(scope="module", params=["ext4", "xfs"])
def disk(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Disk]:
    yield from made_disk(request.param, tmp_path_factory.mktemp("disk"))


@pytest.fixture(autouse=True)
def tools() -> None:
    """Skip where a tool is not installed."""
    for name in ("qemu-io", "chattr"):
        if shutil.which(name) is None:
            missing(f"{name} is not installed")


def tell(story: str) -> None:
    print(story)  # noqa: T201 - shown with a failure


def promise_on(place: Path, rng: random.Random, way: str) -> Lending:
    """What a way promises about a random chain of three layers, which is durable."""
    files = build(even_chain(rng, SIZE, overlays=2), str(place))
    promise = lending_of(way, files, rng)
    make_durable(place)
    return promise


def finish(promise: Lending) -> None:
    """Take the overlay back, and look at the result."""
    if promise.way == "import":
        succeed(*promise.command(0), cwd=promise.here)
        assert promise.broken(done=True) == []


@pytest.mark.sample(3)
@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("way", ["export", "import"])
def test_power_cut_never_lets_both_write(
    disk: Disk, rng: random.Random, tmp_path: Path, way: str, number: int
) -> None:
    with disk.directory() as place:
        promise = promise_on(place, rng, way)
        moment = Moment.draw(rng, promise, by_event=bool(number % 3))
        cut = lose_power(disk, promise, moment, rng, tmp_path, jobs=0)
        tell(cut.story)
        assert promise.broken(done=cut.done) == [], cut.story
        finish(promise)


@pytest.mark.long
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("way", ["export", "import"])
def test_kill_at_a_random_moment_never_lets_both_write(
    rng: random.Random, tmp_path: Path, way: str, number: int
) -> None:
    place, scratch = tmp_path / "place", tmp_path / "scratch"
    place.mkdir()
    scratch.mkdir()
    promise, part = promise_on(place, rng, way), rng.random()
    with Victim(promise.command(0), scratch, order="right") as victim:
        for _ in victim.watch(tick=0):
            if promise.part_changed() >= part:
                break
        victim.linger(rng.choice([0, 0.003]) * rng.random())
        status = victim.kill_parent()
    assert promise.broken(done=status == 0) == []
    finish(promise)


@pytest.mark.long
@pytest.mark.parametrize(
    ("way", "order", "moment"),
    [
        # The twin is enabled before the mark is durable; cut when all is done.
        ("export", "never:top.add-cow", Moment("header_write", after=99)),
        # The mark is cleared before the twin is disabled; cut before the twin is removed.
        ("import", "never:top.qcow2", Moment("twin_unlink")),
    ],
    ids=["export", "import"],
)
def test_power_cuts_catch_a_way_without_a_sync(
    disk: Disk, rng: random.Random, tmp_path: Path, way: str, order: str, moment: Moment
) -> None:
    for _ in range(PATIENT_CUTS):
        with disk.directory() as place:
            promise = promise_on(place, rng, way)
            cut = lose_power(disk, promise, moment, rng, tmp_path, jobs=0, order=order)
            tell(cut.story)
            if any("QEMU can write" in line for line in promise.broken(done=cut.done)):
                return
    pytest.fail(f"{PATIENT_CUTS} cuts did not notice {order}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "event"), [(way, event) for way in ("export", "import") for event in EVENTS[way]]
)
def test_power_cut_at_every_event_never_lets_both_write(
    disk: Disk, rng: random.Random, tmp_path: Path, way: str, event: str
) -> None:
    for after in count():
        with disk.directory() as place:
            promise = promise_on(place, rng, way)
            moment = Moment(event, after=after, rounds=rng.randint(1, 4))
            cut = lose_power(disk, promise, moment, rng, tmp_path, jobs=0)
            tell(cut.story)
            assert promise.broken(done=cut.done) == [], cut.story
            finish(promise)
        if cut.done:
            return  # the event does not occur that often
