"""Tests of threads that share one device: copy-up, flush and readers.

Threads switch often (`sys.setswitchinterval`) and start at a barrier.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

import addcow_mp
from support.model import Content, Files, KiB, MiB, Overlay, Raw, build, read_bits, read_view, view

pytestmark = pytest.mark.sample(2)

THREADS = 4


@pytest.fixture(autouse=True)
def _restless_threads() -> Iterator[None]:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(20e-6)
    yield
    sys.setswitchinterval(usual)


def at_once(*works: Callable[[], None]) -> None:
    """Run the works in a thread each, from one moment on; the first error comes out."""
    barrier = threading.Barrier(len(works))

    def work(index: int) -> None:
        barrier.wait()
        works[index]()

    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(work, index) for index in range(len(works))]:
            done.result()


def garbage_over_data(cluster_size: int, size: int, base_size: int) -> Overlay:
    """Return an overlay without a allocated cluster, its image full of garbage."""
    grain = 4 * KiB
    image = Content("g" * (size // grain), grain)
    return Overlay(
        image,
        backing=Raw(Content("B" * (base_size // grain), grain, cut=700)),
        cluster_size=cluster_size,
    )


def built(chain: Overlay, directory: Path) -> Files:
    return build(chain, str(directory))


# --- Writes that meet in a cluster ----------------------------------------------------------


def cut_apart(rng: random.Random, size: int, pieces: int) -> list[tuple[int, int]]:
    """Return unaligned ranges side by side, of which about one in three is left out."""
    cuts = sorted(rng.sample(range(1, size), pieces - 1))
    every = list(pairwise([0, *cuts, size]))
    return rng.sample(every, len(every) * 2 // 3)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("cluster_size", "pieces"), [(2 * MiB, 60), (2 * MiB, 600), (4 * KiB, 600)]
)
def test_copy_up_never_overwrites_the_data_of_another_thread(
    tmp_path: Path, cluster_size: int, pieces: int, seed: int
) -> None:
    rng = random.Random(seed)
    # The backing ends inside the third 2 MiB cluster, so that one is filled up with zeros.
    chain = garbage_over_data(cluster_size, 7 * MiB, 5 * MiB)
    files, guest = built(chain, tmp_path), view(chain)
    todo = [(start, rng.randbytes(stop - start)) for start, stop in cut_apart(rng, 7 * MiB, pieces)]
    with addcow_mp.open(files.path, writable=True) as device:

        def write_some(mine: list[tuple[int, bytes]]) -> None:
            for start, data in mine:
                device.write(start, data)

        at_once(*(partial(write_some, todo[first::THREADS]) for first in range(THREADS)))
        for start, data in todo:
            guest[start : start + len(data)] = data
        assert device.read(0, device.size) == guest
    assert read_view(files.path) == guest


def test_two_threads_write_a_new_cluster_at_once(tmp_path: Path) -> None:
    """The first and the last bytes of each cluster, written at the same moment."""
    cluster = 2 * MiB
    chain = garbage_over_data(cluster, 8 * MiB, 8 * MiB)
    files, guest = built(chain, tmp_path), view(chain)
    with addcow_mp.open(files.path, writable=True) as device:
        for start in range(0, 8 * MiB, cluster):
            last = start + cluster - 3
            at_once(
                partial(device.write, start, b"abc"),
                partial(device.write, last, b"xyz"),
                partial(device.write_zeroes, start + MiB, 5),
            )
            guest[start : start + 3], guest[last : last + 3] = b"abc", b"xyz"
            guest[start + MiB : start + MiB + 5] = bytes(5)
    assert read_view(files.path) == guest


# --- Flush while others write ---------------------------------------------------------------


def test_flush_returns_after_all_pending_bits_are_written(tmp_path: Path) -> None:
    chain = garbage_over_data(4 * KiB, 8 * MiB, 8 * MiB)
    files = built(chain, tmp_path)
    begun: list[int] = []
    written: list[int] = []
    ended: list[int] = []
    order = random.Random(7).sample(range(chain.clusters), 1500)
    with addcow_mp.open(files.path, writable=True) as device:

        def write_every_other(first: int) -> None:
            try:
                for cluster in order[first::2]:
                    begun.append(cluster)
                    device.write(cluster * 4 * KiB + 9, b"here")
                    written.append(cluster)
            finally:
                ended.append(first)

        def flush_and_look() -> None:
            while len(ended) < 2:
                pending = set(written)
                device.flush()
                in_file = read_bits(files.path)
                assert pending <= in_file
                assert in_file <= set(begun)

        writers = [partial(write_every_other, first) for first in range(2)]
        at_once(*writers, *[flush_and_look] * 3)
        device.flush()
        assert read_bits(files.path) == set(order)
    assert read_bits(files.path) == set(order)


# --- Reads while others write ---------------------------------------------------------------

OLD, NEW, GARBAGE = b"o", b"n", b"g"


@pytest.mark.parametrize("cluster_size", [4 * KiB, 2 * MiB])
def test_reader_sees_old_or_new_data_and_never_garbage(tmp_path: Path, cluster_size: int) -> None:
    size = 4 * MiB
    path = plain_files(tmp_path, cluster_size, size)
    todo = cut_apart(random.Random(3), size, 400)
    written: list[tuple[int, int]] = []
    ended: list[int] = []
    with addcow_mp.open(path, writable=True) as device:

        def write_every_other(first: int) -> None:
            try:
                for start, stop in todo[first::2]:
                    device.write(start, NEW * (stop - start))
                    written.append((start, stop))
            finally:
                ended.append(first)

        def read_some(seed: int) -> None:
            rng = random.Random(seed)
            while len(ended) < 2:
                check_no_garbage(device.read, rng, size)
                start, stop = rng.choice(list(written) or [(0, 0)])
                assert device.read(start, stop - start) == NEW * (stop - start)

        def flush_on_and_on() -> None:
            while len(ended) < 2:
                device.flush()

        writers = [partial(write_every_other, first) for first in range(2)]
        at_once(*writers, partial(read_some, 1), partial(read_some, 2), flush_on_and_on)
    guest = bytearray(OLD * size)
    for start, stop in todo:
        guest[start:stop] = NEW * (stop - start)
    assert read_view(path) == guest


def test_written_cluster_is_never_taken_for_unallocated_during_a_flush(tmp_path: Path) -> None:
    """Its bit moves from memory to the file; it must be seen in one of them at every moment."""
    clusters = 4096
    size = clusters * 4 * KiB
    path = plain_files(tmp_path, 4 * KiB, size)
    ended: list[int] = []
    with addcow_mp.open(path, writable=True, access=addcow_mp.Access(durable=False)) as device:

        def write_and_look(first: int) -> None:
            try:
                for start in range(first * 4 * KiB, size, 3 * 4 * KiB):
                    device.write(start, NEW * 100)
                    for _ in range(4):
                        assert device.read(start, 100) == NEW * 100
                    device.write(start + 200, NEW * 100)
                    assert device.read(start, 300) == NEW * 100 + OLD * 100 + NEW * 100
            finally:
                ended.append(first)

        def flush_on_and_on() -> None:
            while len(ended) < 3:
                device.flush()

        at_once(*(partial(write_and_look, first) for first in range(3)), flush_on_and_on)


def plain_files(directory: Path, cluster_size: int, size: int) -> str:
    """Return an overlay whose layers are each of one letter only, so one byte tells its origin."""
    files = built(garbage_over_data(cluster_size, size, size + 4 * KiB), directory)
    Path(files.image).write_bytes(GARBAGE * size)
    Path(files.below[0]).write_bytes(OLD * size)
    return files.path


def check_no_garbage(read: Callable[[int, int], bytes], rng: random.Random, size: int) -> None:
    """A range anywhere holds nothing but old and new bytes."""
    start = rng.randrange(size)
    data = read(start, min(rng.randrange(256 * KiB), size - start))
    assert data.count(OLD) + data.count(NEW) == len(data)


@pytest.mark.parametrize(
    "access",
    [addcow_mp.Access(share=True), addcow_mp.Access(locking=False)],
    ids=["share", "locking off"],
)
def test_reader_beside_a_writer_sees_what_was_flushed(
    tmp_path: Path, access: addcow_mp.Access
) -> None:
    path = plain_files(tmp_path, 4 * KiB, MiB)
    with (
        addcow_mp.open(path, writable=True) as writer,
        addcow_mp.open(path, access=access) as reader,
    ):
        for start in range(0, MiB, 64 * KiB):
            assert reader.read(start, 3) == OLD * 3
            writer.write(start, NEW)
            writer.flush()
            assert reader.read(start, 3) == NEW + OLD * 2
            assert reader.read(start, 8 * KiB) == NEW + OLD * (8 * KiB - 1)
