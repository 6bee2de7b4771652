"""Tests of the division of work into tasks, and of the surveys of allocated data.

Tasks are adjacent, cover every cluster, and begin at aligned clusters. No task is much heavier
than asked for. The surveys are compared with a plain scan of sparse files.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import addcow_mp
from addcow_mp import Overlay
from addcow_mp.engine.allocation import (
    alignment,
    allocated_stretches,
    data_stretches,
    unallocated_stretches,
)
from addcow_mp.engine.tasks import TASK_BYTES, Stretch, Task, cut
from addcow_mp.format.geometry import Geometry
from addcow_mp.jobs.options import Hooks, RunOptions
from support.command import ALL_ALLOCATED, GiB, KiB, MiB, overlay_bytes
from support.properties import tried

PROPERTY = tried(100)

LIMIT = 1000
BLOCK = 4 * KiB

# ---- tasks ----


@dataclass(frozen=True)
class Plan:
    """Stretches as a survey gives them: in order, aligned, some over the limit."""

    stretches: list[Stretch]
    clusters: int
    aligned: int


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    aligned = draw(st.sampled_from([8, 16, 4096]))
    gaps = draw(st.lists(st.integers(0, 5), max_size=30))
    weights = st.integers(1, LIMIT) | st.just(LIMIT) | st.integers(LIMIT, 3 * LIMIT)
    stretches, position = [], 0
    for gap in gaps:
        first = position + gap * aligned
        position = first + aligned * draw(st.integers(1, 3))
        stretches.append(Stretch(first, position, draw(weights)))
    # The last stretch may reach past the last cluster, but does not begin behind it.
    last = stretches[-1].first + 1 if stretches else 0
    return Plan(stretches, last + draw(st.integers(0, 10 * aligned)), aligned)


@PROPERTY
@given(plans())
def test_tasks_are_adjacent_and_cover_every_cluster(plan: Plan) -> None:
    tasks = cut(plan.stretches, plan.clusters, LIMIT)
    borders = [0, *(task.stop for task in tasks)]
    assert [task.first for task in tasks] == borders[:-1]
    assert borders[-1] == plan.clusters
    assert all(task.first < task.stop for task in tasks)
    assert [task.number for task in tasks] == list(range(len(tasks)))


@PROPERTY
@given(plans())
def test_tasks_begin_at_aligned_clusters(plan: Plan) -> None:
    tasks = cut(plan.stretches, plan.clusters, LIMIT)
    assert all(task.first % plan.aligned == 0 for task in tasks)


def inside(task: Task, stretches: list[Stretch]) -> list[Stretch]:
    return [one for one in stretches if task.first <= one.first < task.stop]


@PROPERTY
@given(plans())
def test_each_stretch_belongs_to_one_task(plan: Plan) -> None:
    tasks = cut(plan.stretches, plan.clusters, LIMIT)
    for task in tasks:
        own = inside(task, plan.stretches)
        assert task.weight == sum(one.weight for one in own)
        assert all(one.stop <= task.stop or task is tasks[-1] for one in own)
    assert sum(task.weight for task in tasks) == sum(one.weight for one in plan.stretches)


@PROPERTY
@given(plans())
def test_tasks_are_as_light_and_few_as_possible(plan: Plan) -> None:
    tasks = cut(plan.stretches, plan.clusters, LIMIT)
    assert all(task.weight <= LIMIT or len(inside(task, plan.stretches)) == 1 for task in tasks)
    for one, other in itertools.pairwise(tasks):
        assert one.weight + inside(other, plan.stretches)[0].weight > LIMIT


@pytest.mark.parametrize("clusters", [1, 7, 8, 2**40])
def test_one_task_covers_all_without_work(clusters: int) -> None:
    assert cut([], clusters) == [Task(0, 0, clusters, 0)]


def test_empty_disk_has_no_tasks() -> None:
    assert cut([], 0) == []


def test_first_task_begins_at_the_start_of_the_disk() -> None:
    tasks = cut([Stretch(800, 808, 5), Stretch(1600, 1608, 6)], 10_000, 10)
    assert tasks == [Task(0, 0, 1600, 5), Task(1, 1600, 10_000, 6)]


# ---- alignment ----

SIZES = [1 << bits for bits in range(12, 22)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("other", [0, *SIZES])
def test_tasks_share_no_byte_of_any_bitmap(size: int, other: int) -> None:
    clusters = alignment(size, other)
    assert clusters % 8 == 0
    assert clusters * size % (8 * max(size, other)) == 0
    # And no more than that: half of it would be too little for one of the two.
    assert clusters == 8 or clusters * size == 8 * other


# ---- surveys ----


def blocks(path: str) -> set[int]:
    """The blocks of a file that are not in a hole, by asking for each one."""
    fd, found = os.open(path, os.O_RDONLY), set()
    try:
        for number in range(-(-os.fstat(fd).st_size // BLOCK)):
            try:
                if os.lseek(fd, number * BLOCK, os.SEEK_DATA) == number * BLOCK:
                    found.add(number)
            except OSError:  # ENXIO: nothing but a hole is left
                break
        return found
    finally:
        os.close(fd)


def weight_of(found: set[int], geometry: Geometry, stretch: Stretch) -> int:
    """Bytes of those blocks within the stretch."""
    start, stop = geometry.span(stretch.first, stretch.stop)
    return sum(start <= number * BLOCK < stop for number in found) * BLOCK


@dataclass(frozen=True)
class Disk:
    """An overlay over a raw backing, both with a few data, on files of ``size`` bytes."""

    size: int
    cluster: int
    image: tuple[int, ...] = ()
    backing: tuple[int, ...] = ()
    local: tuple[int, ...] = ()
    compatible: int = 0

    def make(self, directory: Path) -> Path:
        for name, places in (("top.raw", self.image), ("base.img", self.backing)):
            with (directory / name).open("wb", buffering=0) as file:
                file.truncate(self.size)
                for place in places:
                    os.pwrite(file.fileno(), b"x" * BLOCK, place)
        content = overlay_bytes(
            image="top.raw",
            size=self.size,
            backing="base.img",
            cluster=self.cluster,
            local=self.local,
            compatible=self.compatible,
        )
        (directory / "top.add-cow").write_bytes(content)
        return directory / "top.add-cow"


def scattered(seed: int, size: int, cluster: int) -> Disk:
    """A disk with data at a few places, and some clusters local, with and without data."""
    rng = random.Random(seed)

    def some(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(size // BLOCK) * BLOCK for _ in range(count))

    image = some(12)
    local = {place // cluster for place in image[::2]} | {rng.randrange(size // cluster)}
    return Disk(size, cluster, image, some(12), tuple(sorted(local)))


DISKS = [
    *(
        scattered(seed, 400 * MiB + seed * BLOCK, size)
        for seed, size in enumerate([4 * KiB, 64 * KiB, 2 * MiB])
    ),
    Disk(300 * MiB, 64 * KiB),
    Disk(300 * MiB, 64 * KiB, image=(0, 300 * MiB - BLOCK), local=(0, 4799)),
    Disk(300 * MiB, 64 * KiB, backing=(64 * MiB - BLOCK, 64 * MiB, 128 * MiB)),
    Disk(300 * MiB, 2 * MiB, backing=tuple(range(0, 2 * MiB, 2 * BLOCK))),
    Disk(BLOCK, 2 * MiB, image=(0,), local=(0,)),
    Disk(0, 64 * KiB),
]
DISK_NAMES = ["4k", "64k", "2M", "empty", "ends", "borders", "broken", "tiny", "none"]


@pytest.fixture(params=DISKS, ids=DISK_NAMES)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Disk, Overlay]]:
    """A disk and its overlay, opened."""
    made: Disk = request.param
    with addcow_mp.open(made.make(tmp_path)) as overlay:
        yield made, overlay


def assert_well_formed(stretches: list[Stretch], geometry: Geometry) -> None:
    """Assert what a plan relies on."""
    assert all(one.stop <= other.first for one, other in itertools.pairwise(stretches))
    for one in stretches:
        assert one.first % alignment(geometry.cluster_size) == 0
        assert one.stop % alignment(geometry.cluster_size) == 0
        assert one.first < geometry.clusters
        start, stop = geometry.span(one.first, one.stop)
        assert 0 < one.weight <= stop - start + geometry.cluster_size
        assert one.weight <= TASK_BYTES


def covered(stretches: list[Stretch]) -> Callable[[int], bool]:
    return lambda cluster: any(one.first <= cluster < one.stop for one in stretches)


def test_data_stretches_contain_all_data_of_all_files(disk: tuple[Disk, Overlay]) -> None:
    made, overlay = disk
    files, geometry = list(overlay.files()), overlay.geometry
    stretches = list(data_stretches(files, geometry, alignment(made.cluster)))
    assert_well_formed(stretches, geometry)
    found = [blocks(file.path) for file in files]
    for one in stretches:
        weights = [weight_of(each, geometry, one) for each in found]
        assert 0 < sum(weights) <= one.weight or one.weight == TASK_BYTES
    is_covered = covered(stretches)
    assert all(is_covered(block * BLOCK // made.cluster) for each in found for block in each)


def test_allocated_stretches_weigh_the_allocated_clusters(disk: tuple[Disk, Overlay]) -> None:
    made, overlay = disk
    stretches = list(allocated_stretches(overlay, alignment(made.cluster)))
    assert_well_formed(stretches, overlay.geometry)
    for one in stretches:
        local = sum(one.first <= cluster < one.stop for cluster in made.local)
        assert one.weight == local * made.cluster
    assert all(map(covered(stretches), made.local))


def test_missing_stretches_contain_the_clusters_of_a_flatten(disk: tuple[Disk, Overlay]) -> None:
    made, overlay = disk
    stretches = list(unallocated_stretches(overlay, alignment(made.cluster)))
    assert_well_formed(stretches, overlay.geometry)
    data = {
        block * BLOCK // made.cluster for file in overlay.files() for block in blocks(file.path)
    }
    assert all(map(covered(stretches), data - set(made.local)))
    for one in stretches:
        assert any(one.first <= cluster < one.stop for cluster in data)
        missing = range(one.first, min(one.stop, overlay.geometry.clusters))
        assert one.weight <= len(set(missing) - set(made.local)) * made.cluster


def test_all_allocated_image_is_surveyed_by_its_data(tmp_path: Path) -> None:
    made = Disk(300 * MiB, 64 * KiB, image=(200 * MiB,), compatible=ALL_ALLOCATED)
    with addcow_mp.open(made.make(tmp_path)) as overlay:
        stretches = list(allocated_stretches(overlay, 8))
    assert stretches == [Stretch(3072, 4096, BLOCK)]


def test_fragmented_data_counts_as_full(tmp_path: Path) -> None:
    places = tuple(range(0, 64 * BLOCK, 2 * BLOCK))
    made = Disk(300 * MiB, 64 * KiB, backing=places)
    with addcow_mp.open(made.make(tmp_path)) as overlay:
        stretches = list(unallocated_stretches(overlay, 8))
    assert stretches == [Stretch(0, 1024, TASK_BYTES)]


def test_stretches_begin_at_the_alignment(tmp_path: Path) -> None:
    made = scattered(7, 400 * MiB, 4 * KiB)
    with addcow_mp.open(made.make(tmp_path)) as overlay:
        for survey in (allocated_stretches, unallocated_stretches):
            for one in survey(overlay, alignment(4 * KiB, 2 * MiB)):
                assert one.first % 4096 == one.stop % 4096 == 0


def test_large_empty_disk_is_surveyed_quickly(tmp_path: Path) -> None:
    made = Disk(900 * GiB, 2 * MiB, image=(899 * GiB,), local=(899 * 512,))
    with addcow_mp.open(made.make(tmp_path)) as overlay:
        assert list(allocated_stretches(overlay, 8)) == [
            Stretch(899 * 512, 899 * 512 + 32, 2 * MiB)
        ]
        assert list(unallocated_stretches(overlay, 8)) == [
            Stretch(899 * 512, 899 * 512 + 32, BLOCK)
        ]


# ---- as a job shows it ----


def test_survey_progress_counts_bytes_to_the_end(tmp_path: Path) -> None:
    from addcow_mp.jobs.flatten import flatten

    made = Disk(300 * MiB, 64 * KiB, backing=(0, 100 * MiB, 200 * MiB))
    told: list[tuple[int, int]] = []
    hooks = Hooks(lambda done, total: told.append((done, total)))
    flatten(str(made.make(tmp_path)), options=RunOptions(0), hooks=hooks)
    assert {total for _, total in told} == {3 * BLOCK}
    assert told[-1] == (3 * BLOCK, 3 * BLOCK)
    assert told == sorted(told)
