"""Tests of power cuts during commit, flatten and writes, at random moments, on ext4 and XFS.

Another process syncs files of the chain during the job. After the cut the log is replayed, an
independent reader checks what the job promises, and the same command finishes. The same cuts must
catch jobs whose syncs are in a wrong order (support/small_steps.py).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import oracle
from support.chains import even_chain
from support.command import addcow, succeed, tool
from support.file_systems import made_disk
from support.model import SECTOR, Files, KiB, MiB, build, overlay, raw, view
from support.powercut import (
    SIZE_OF_EVENTS,
    Disk,
    Moment,
    lose_power,
    make_durable,
)
from support.promises import (
    VIEW,
    Commit,
    CommitInto,
    Flatten,
    Promise,
    Rebase,
    Reset,
    Resize,
    promise_of,
)
from support.victim import PATIENCE, Victim

pytestmark = pytest.mark.sample(1)

# Enough for about fifteen checkpoints, with a few holes punched at each.
SIZE = 8 * MiB
SCALE = SIZE / SIZE_OF_EVENTS
CLUSTER = 16 * KiB

# Cuts after which a wrong order must have been noticed. One in four notices the rarest, on a
# busy machine one in ten; that none of so many does is bad luck once in hundreds of runs.
PATIENT_CUTS = 60

MANY_CUTS = int(os.environ.get("ADDCOW_CUTS", "300"))
RANDOM_JOBS = ["commit", "commit", "commit -d", "flatten", "flatten", "flatten --discard", "io"]
RANDOM_JOBS += ["reset", "commit -b"]


@pytest.fixture(scope="module", params=["ext4", "xfs"])
def disk(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Disk]:
    yield from made_disk(request.param, tmp_path_factory.mktemp("disk"))


def tell(story: str) -> None:
    print(story)  # noqa: T201 - shown with a failure


def chain_on(place: Path, rng: random.Random, overlays: int) -> Files:
    """Make a random chain in ``place``, durable, and see that it is what it is meant to be."""
    chain = even_chain(rng, SIZE, overlays=overlays)
    files = build(chain, str(place))
    make_durable(place)
    assert oracle.guest_bytes(files.path) == view(chain)
    return files


def finish(promise: Promise, place: Path) -> None:
    """Run the same command again, without any accident, and look at the result."""
    if not os.path.exists(promise.files.path):
        return  # discarded, and rightly so, as has been seen
    promise = promise.again()
    result = succeed(*promise.command(2), cwd=place, stdin=promise.stdin)
    assert promise.broken(done=True, stdout=result.stdout) == []
    if type(promise) is Commit:
        assert promise.leftovers() == -1
    if type(promise) in (Commit, Flatten, Reset):
        assert addcow("check", promise.files.path, cwd=place).status == 0


def cut_and_finish(
    disk: Disk, rng: random.Random, scratch: Path, words: str, *, overlays: int, by_event: bool
) -> None:
    with disk.directory() as place:
        promise = promise_of(words, chain_on(place, rng, overlays), rng)
        moment = Moment.draw(rng, promise, by_event=by_event, scale=SCALE)
        jobs, order = rng.choice([0, 2]), rng.choice(["right", "right:waiting"])
        cut = lose_power(disk, promise, moment, rng, scratch, jobs=jobs, order=order)
        tell(cut.story)
        assert promise.broken(done=cut.done, stdout=cut.stdout) == [], cut.story
        finish(promise, place)


@pytest.mark.parametrize("by_event", [True, False], ids=["event", "clock"])
@pytest.mark.parametrize(
    ("words", "overlays"),
    [
        *(("commit", 1), ("commit", 2), ("commit -b", 2), ("commit -b", 3)),
        *(("flatten", 2), ("io", 1), ("reset", 1), ("reset", 2)),
    ],
)
def test_power_cut_loses_nothing(
    disk: Disk, rng: random.Random, tmp_path: Path, words: str, overlays: int, by_event: bool
) -> None:
    cut_and_finish(disk, rng, tmp_path, words, overlays=overlays, by_event=by_event)


@pytest.mark.long
@pytest.mark.parametrize(
    "order",
    [
        "late:top-base.raw",  # bits of the layer above the base before their data is durable
        "never:top-base.raw",
        "never:top-base.add-cow",  # the base changes before those bits are durable
    ],
)
def test_power_cuts_catch_a_wrong_order_of_commit_b(
    disk: Disk, rng: random.Random, tmp_path: Path, order: str
) -> None:
    for number in range(PATIENT_CUTS):
        with disk.directory() as place:
            promise = CommitInto(chain_on(place, rng, 2), 2)
            moment = Moment.draw(rng, promise, by_event=bool(number % 2), scale=SCALE)
            cut = lose_power(disk, promise, moment, rng, tmp_path, jobs=0, order=order)
            tell(cut.story)
            broken = promise.broken(done=cut.done)
        if any(line.startswith(VIEW) for line in broken):
            return
    pytest.fail(f"{PATIENT_CUTS} cuts did not notice {order}")


def to_be_resized(place: Path, rng: random.Random) -> Files:
    """An overlay with a partial last cluster over a longer base, durable."""
    base, cells = raw("Z" * 128, CLUSTER), "MM--m-M" * 9 + rng.choice("-mM")
    files = build(overlay(cells, base, cluster_size=CLUSTER, cut=5 * KiB), str(place))
    make_durable(place)
    return files


def new_size(rng: random.Random, size: int, *, grows: bool) -> int:
    if grows:
        return size + rng.randint(1, 100 * CLUSTER // SECTOR) * SECTOR
    return rng.randrange(1, size // SECTOR) * SECTOR


@pytest.mark.parametrize("grows", [True, False], ids=["grow", "shrink"])
def test_power_cut_during_resize_leaves_the_old_disk_or_the_new_one(
    disk: Disk, rng: random.Random, tmp_path: Path, grows: bool
) -> None:
    for _ in range(3):
        with disk.directory() as place:
            files = to_be_resized(place, rng)
            size = oracle.virtual_size(files.path)
            promise = Resize(files, new_size(rng, size, grows=grows))
            moment = Moment.draw(rng, promise, by_event=True)
            cut = lose_power(disk, promise, moment, rng, tmp_path, jobs=0)
            tell(cut.story)
            assert promise.broken(done=cut.done) == [], cut.story
            finish(promise, place)


def to_be_rebased(place: Path, rng: random.Random) -> Rebase:
    """A durable chain, and a new backing file that was not synced."""
    files = build(even_chain(rng, SIZE, overlays=1), str(place))
    make_durable(place)
    assert files.backing is not None
    new = bytearray(Path(files.backing.image).read_bytes())
    for at in range(0, len(new), 3 * CLUSTER):
        part = new[at : at + CLUSTER]
        new[at : at + len(part)] = rng.choice([b"N", b"N", b"\0"]) * len(part)
    return Rebase(files, bytes(new))


@pytest.mark.parametrize("by_event", [True, False], ids=["event", "clock"])
def test_power_cut_during_rebase_leaves_the_same_disk(
    disk: Disk, rng: random.Random, tmp_path: Path, by_event: bool
) -> None:
    for _ in range(2):
        with disk.directory() as place:
            promise = to_be_rebased(place, rng)
            moment = Moment.draw(rng, promise, by_event=by_event, scale=SCALE)
            cut = lose_power(disk, promise, moment, rng, tmp_path, jobs=rng.choice([0, 2]))
            tell(cut.story)
            assert promise.broken(done=cut.done) == [], cut.story
            promise.make_way()  # the power may fail before the job makes it durable
            finish(promise, place)


@pytest.mark.long
@pytest.mark.parametrize(
    "order",
    [
        "never:top.raw",  # bits set before the data that was copied up is durable
        "late:top.raw",
        "never:new.raw",  # clusters stay unallocated over bytes that are only in memory
    ],
)
def test_power_cuts_catch_a_wrong_order_of_rebase(
    disk: Disk, rng: random.Random, tmp_path: Path, order: str
) -> None:
    if (disk.kind, order) == ("xfs", "never:new.raw"):
        pytest.skip("on XFS the search for shared blocks writes both files to the disk")
    for number in range(PATIENT_CUTS):
        with disk.directory() as place:
            promise = to_be_rebased(place, rng)
            moment = Moment.draw(rng, promise, by_event=bool(number % 2), scale=SCALE)
            cut = lose_power(disk, promise, moment, rng, tmp_path, jobs=0, order=order)
            tell(cut.story)
            if promise.broken(done=cut.done):
                return
    pytest.fail(f"{PATIENT_CUTS} cuts did not notice {order}")


@pytest.mark.long
@pytest.mark.parametrize(
    ("grows", "order"),
    [
        (True, "never:top.raw"),  # bits set before the data that was copied up is durable
        (False, "late:top.raw"),  # bits cleared before the image has its new length
    ],
)
def test_power_cuts_catch_a_wrong_order_of_resize(
    disk: Disk, rng: random.Random, tmp_path: Path, grows: bool, order: str
) -> None:
    for _ in range(PATIENT_CUTS):
        with disk.directory() as place:
            files = to_be_resized(place, rng)
            size = oracle.virtual_size(files.path)
            promise = Resize(files, new_size(rng, size, grows=grows))
            moment = Moment.draw(rng, promise, by_event=True)
            cut = lose_power(disk, promise, moment, rng, tmp_path, jobs=0, order=order)
            tell(cut.story)
            if promise.broken(done=cut.done):
                return
    pytest.fail(f"{PATIENT_CUTS} cuts did not notice {order}")


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "overlays", "order"),
    [
        ("flatten", 1, "late:top.raw"),  # bits set before the data they announce is durable
        ("flatten", 2, "never:top.raw"),
        ("commit", 1, "late:top-base.raw"),  # bits cleared before the data has arrived
        ("commit", 1, "never:top-base.raw"),
        ("commit", 1, "late:top.add-cow"),  # space freed before the cleared bits are durable
        ("commit", 2, "never:top-base.add-cow"),  # the backing's own bits not made durable
        ("io", 1, "late:top.raw"),
        ("io", 1, "never:top.raw"),
        ("reset", 1, "never:top.add-cow"),  # space freed before the bitmap is cleared durably
    ],
)
def test_power_cuts_catch_a_wrong_order(
    disk: Disk, rng: random.Random, tmp_path: Path, words: str, overlays: int, order: str
) -> None:
    for number in range(PATIENT_CUTS):
        with disk.directory() as place:
            promise = promise_of(words, chain_on(place, rng, overlays), rng)
            promise.copy_options = ()
            moment = Moment.draw(rng, promise, by_event=bool(number % 2), scale=SCALE)
            cut = lose_power(disk, promise, moment, rng, tmp_path, jobs=0, order=order)
            tell(cut.story)
            broken = promise.broken(done=cut.done, stdout=cut.stdout)
        if any(line.startswith(VIEW) for line in broken):
            return
        assert broken == [], "something else is wrong"
    pytest.fail(f"{PATIENT_CUTS} cuts did not notice {order}")


# ---- what has been said to be done is there when the power fails in the next moment ----


def done_and_cut(disk: Disk, scratch: Path, *words: str, order: str = "right") -> None:
    with Victim(words, scratch, order=order) as victim:
        assert victim.wait() == 0, victim.stderr
    disk.cut()
    disk.recover()


def base_on(place: Path) -> bytes:
    base = raw("AB-C" * 16, 64 * 1024)
    build(base, str(place), "base")
    make_durable(place)
    return bytes(view(base))


def create(place: Path) -> list[str]:
    return ["create", "-b", "base.raw", "-F", "raw", str(place / "new.add-cow")]


def test_created_overlay_survives_a_power_cut(disk: Disk, tmp_path: Path) -> None:
    with disk.directory() as place:
        content = base_on(place)
        done_and_cut(disk, tmp_path, *create(place))
        assert oracle.guest_bytes(str(place / "new.add-cow")) == content


@pytest.mark.long
def test_overlay_created_without_syncs_is_lost(disk: Disk, tmp_path: Path) -> None:
    """The test above would notice, unless another process syncs the whole machine just then."""
    for _ in range(PATIENT_CUTS):
        with disk.directory() as place:
            base_on(place)
            done_and_cut(disk, tmp_path, *create(place), order="never:*")
            if [path.name for path in place.iterdir()] == ["base.raw"]:
                return
    pytest.fail("what was never synced is there all the same, each time")


@pytest.mark.long
@pytest.mark.parametrize("words", ["convert", "commit", "flatten", "flatten --discard"])
def test_finished_job_survives_a_power_cut(
    disk: Disk, rng: random.Random, tmp_path: Path, words: str
) -> None:
    with disk.directory() as place:
        promise = promise_of(words, chain_on(place, rng, 2), rng)
        done_and_cut(disk, tmp_path, *promise.command(2))
        assert promise.broken(done=True) == []


# ---- the disks themselves ----

KILLED = """
import os, signal, sys
from pathlib import Path
from support.powercut import loop_disk

with loop_disk(sys.argv[1], Path(sys.argv[2])) as disk:
    assert os.path.ismount(disk.mountpoint)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_test_leaves_no_loop_device(disk: Disk, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # Returns when the last holder of the pipe has ended, which is the one that tidies up.
    done = subprocess.run(
        [sys.executable, "-c", KILLED, disk.kind, tmp_path],
        capture_output=True,
        env=environment,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not os.path.ismount(tmp_path / disk.kind)
    assert str(tmp_path) not in tool("losetup", "-a", cwd=tmp_path)


# ---- long ----


@pytest.mark.slow
def test_many_power_cuts_lose_nothing(disk: Disk, rng: random.Random, tmp_path: Path) -> None:
    for number in range(MANY_CUTS):
        words, overlays = rng.choice(RANDOM_JOBS), rng.randint(1, 3)
        cut_and_finish(disk, rng, tmp_path, words, overlays=overlays, by_event=bool(number % 2))
