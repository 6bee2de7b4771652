"""Tests of power cuts under a guest that writes: through a twin, and over NBD.

A sector that was flushed is there. Any other is old or new. QEMU gives no such promise for the data
of a twin by itself (docs/qemu.md): a *strict* twin has it because its image file was prepared. The
cuts come while QEMU's tables are durable and its data is not: a flush is held between the two.

There is one exception, which docs/qemu.md names: a sector that was made zero in QEMU's tables, and
then written and not flushed, may show what it held before the zeros. Synchronous writes have none.
"""

from __future__ import annotations

import os
import random
import select
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

import oracle
from support.availability import missing
from support.chains import random_cells, random_raw
from support.command import addcow, succeed, tool
from support.file_systems import made_disk
from support.lending import seen_by_qemu
from support.model import Files, KiB, MiB, Overlay, Raw, build, overlay, view
from support.powercut import Adversary, Disk, make_durable, sync
from support.qemu_io import QemuIo, interruptible
from support.sectors import DISCARD, Sectors, random_request
from support.serving import URI, served

SIZE = 4 * MiB
CLUSTER = 64 * KiB

#: Most requests write; with -z they make zeros, with -u those may free space.
VERBS = ("write", "write", "write", "write", "write -z", "write -z -u")

#: Cuts after which a twin over an image that was not prepared must have lost something.
PATIENT_CUTS = 20


@pytest.fixture(scope="module", params=["ext4", "xfs"])
def disk(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Disk]:
    yield from made_disk(request.param, tmp_path_factory.mktemp("disk"))


@pytest.fixture(autouse=True)
def tools() -> None:
    """Skip where a tool is not installed."""
    for name in ("qemu-io", "qemu-img", "nbdkit"):
        if shutil.which(name) is None:
            missing(f"{name} is not installed")


def tell(story: str) -> None:
    print(story)  # noqa: T201 - shown with a failure


class Lent(NamedTuple):
    """An overlay that is lent, and what its guest has asked for."""

    files: Files
    sectors: Sectors
    node: str
    unallocated: list[int]

    @property
    def twin(self) -> str:
        """The qcow2 file."""
        return os.path.splitext(self.files.path)[0] + ".qcow2"


def chain_on(place: Path, rng: random.Random) -> tuple[Files, bytes]:
    """Make an overlay with garbage where nothing is allocated; its content.

    It lies over a raw base, often with another overlay between, or over nothing.
    """
    chain: Raw | Overlay | None = random_raw(rng, SIZE) if rng.random() < 0.8 else None
    for depth in reversed(range(rng.choice([1, 1, 2]))):
        chain = overlay(random_cells(rng, SIZE // CLUSTER, depth), chain, cluster_size=CLUSTER)
    assert isinstance(chain, Overlay)
    return build(chain, str(place)), bytes(view(chain))


def lend(place: Path, rng: random.Random, crash: str) -> Lent:
    """Make an overlay and lend it."""
    files, content = chain_on(place, rng)
    unallocated = sorted(set(range(SIZE // CLUSTER)) - set(oracle.allocated(files.path)))
    words = ["qemu", "export", "--crash", crash, "--output", "json", files.path]
    told = succeed(*words, cwd=place).json
    described = succeed("qemu", "args", "--output", "json", files.path, cwd=place).json
    make_durable(place)
    sectors = Sectors(content, keeps_hidden=told["protection"] != "synchronous")
    return Lent(files, sectors, interruptible(described), unallocated)


def write_until_the_cut(disk: Disk, lent: Lent, rng: random.Random, cache: str) -> None:
    """Let a guest write, and cut the power while its tables are durable and its data is not."""
    with QemuIo("-t", cache, lent.node, cwd=disk.mountpoint) as guest:
        with Adversary([*lent.files.own, lent.twin], rng):
            write_and_flush(guest, lent.sectors, rng, rng.randrange(30))
            guest.hold_flush()
            write(guest, lent.sectors, rng, rng.randrange(1, 8))
            request = random_request(rng, len(lent.sectors), ("write",))
            lent.sectors.ask(request)
            guest.run(request.line(asynchronous=True, durable=True))
            guest.wait_until_held()
            sync(lent.twin)
            disk.cut()
        guest.kill()
    disk.recover()


def write_and_flush(guest: QemuIo, sectors: Sectors, rng: random.Random, count: int) -> None:
    """Write, and flush after every fifth request or so."""
    for _ in range(count):
        write(guest, sectors, rng, 1)
        if rng.random() < 0.2:
            guest.run("flush")
            sectors.flush()


def write(guest: QemuIo, sectors: Sectors, rng: random.Random, count: int) -> None:
    """Send requests, each after the answer to the one before."""
    for _ in range(count):
        request = random_request(rng, len(sectors), VERBS)
        sectors.ask(request)
        guest.run(request.line())


def view_after_import(lent: Lent, place: Path) -> bytes:
    """Take an overlay back; what its guest reads then, as it did before."""
    before = seen_by_qemu(lent.files.path, cwd=place)
    succeed("qemu", "import", lent.files.path, cwd=place)
    assert addcow("check", lent.files.path, cwd=place).status in (0, 3)
    assert oracle.guest_bytes(lent.files.path) == before
    return before


@pytest.mark.sample(2)
@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_power_cut_under_a_strict_twin_loses_nothing(
    disk: Disk, rng: random.Random, cache: str, number: int
) -> None:
    with disk.directory() as place:
        lent = lend(place, rng, "strict")
        write_until_the_cut(disk, lent, rng, cache)
        assert lent.sectors.lost(view_after_import(lent, place)) == []


@pytest.mark.sample(1)
@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_power_cut_under_a_relaxed_twin_loses_only_what_was_not_flushed(
    disk: Disk, rng: random.Random, cache: str, number: int
) -> None:
    with disk.directory() as place:
        lent = lend(place, rng, "relaxed")
        write_until_the_cut(disk, lent, rng, cache)
        assert lent.sectors.lost(view_after_import(lent, place), unflushed=False) == []


@pytest.mark.long
def test_power_cuts_catch_a_plain_twin_over_an_image_that_was_not_prepared(
    disk: Disk, rng: random.Random
) -> None:
    for _ in range(PATIENT_CUTS):
        with disk.directory() as place:
            lent = lend(place, rng, "strict")
            undo_preparation(lent, place)
            write_until_the_cut(disk, lent, rng, "writeback")
            lost = lent.sectors.lost(view_after_import(lent, place))
        if lost:
            assert any("not written" in line for line in lost), "only what was written was lost"
            assert any(r"\x00\x00" in line for line in lost)
            return
    pytest.fail(f"{PATIENT_CUTS} cuts noticed nothing")


def undo_preparation(lent: Lent, place: Path) -> None:
    """Make the image file what it would be without any care for power cuts."""
    tool("chattr", "-S", lent.files.image, cwd=place)
    for cluster in lent.unallocated:
        where = ["--offset", str(cluster * CLUSTER), "--length", str(CLUSTER)]
        tool("fallocate", "--punch-hole", *where, lent.files.image, cwd=place)
    sync(lent.files.image)


# ---- over NBD ----


def serve_until_the_cut(
    disk: Disk, files: Files, sectors: Sectors, rng: random.Random, scratch: Path, order: str
) -> None:
    """Let up to three clients write to one server, and cut the power."""
    with ExitStack() as stack:
        server = stack.enter_context(served(scratch, file=files.path, order=order))
        count = rng.randint(1, 3)
        clients = [stack.enter_context(QemuIo("-f", "raw", URI, cwd=scratch)) for _ in range(count)]
        with Adversary(files.own, rng):
            use_in_turn(clients, sectors, rng, rng.randrange(10, 50))
            for client in clients:  # these are under way when the power fails
                request = random_request(rng, len(sectors), VERBS)
                sectors.ask(request)
                client.ask(request.line())
            select.select([], [], [], rng.uniform(0, 0.01))
            disk.cut()
        for client in clients:
            client.kill()
        server.kill()
    disk.recover()


def use_in_turn(clients: list[QemuIo], sectors: Sectors, rng: random.Random, count: int) -> None:
    """Send requests by any of the clients; a flush of one counts for what all have written."""
    for _ in range(count):
        client, durable = rng.choice(clients), rng.random() < 0.1
        request = random_request(rng, len(sectors), ("write",) if durable else (*VERBS, DISCARD))
        sectors.ask(request)
        client.run(request.line(durable=durable))
        if durable:
            sectors.flush(request)
        if rng.random() < 0.2:
            rng.choice(clients).run("flush")
            sectors.flush()


def lost_by(files: Files, sectors: Sectors, place: Path) -> list[str]:
    """What is lost of an overlay that was served; it is clean, or leaks."""
    assert addcow("check", files.path, cwd=place).status in (0, 3)
    return sectors.lost(oracle.guest_bytes(files.path))


@pytest.mark.sample(1)
@pytest.mark.parametrize("number", range(4))
def test_power_cut_under_a_server_loses_nothing_that_was_flushed(
    disk: Disk, rng: random.Random, tmp_path: Path, number: int
) -> None:
    with disk.directory() as place:
        files, content = chain_on(place, rng)
        sectors = Sectors(content)
        make_durable(place)
        serve_until_the_cut(disk, files, sectors, rng, tmp_path, "right")
        assert lost_by(files, sectors, place) == []


@pytest.mark.long
@pytest.mark.parametrize("pattern", ["top.raw", "top.add-cow"])
def test_power_cuts_catch_a_server_that_does_not_sync(
    disk: Disk, rng: random.Random, tmp_path: Path, pattern: str
) -> None:
    for _ in range(PATIENT_CUTS):
        with disk.directory() as place:
            files, content = chain_on(place, rng)
            sectors = Sectors(content)
            make_durable(place)
            serve_until_the_cut(disk, files, sectors, rng, tmp_path, f"never:{pattern}")
            if lost_by(files, sectors, place):
                return
    pytest.fail(f"{PATIENT_CUTS} cuts noticed nothing")


@pytest.mark.sample(1)
def test_flush_of_one_connection_makes_writes_of_another_durable(
    disk: Disk, rng: random.Random, tmp_path: Path
) -> None:
    with disk.directory() as place:
        files, content = chain_on(place, rng)
        sectors = Sectors(content)
        make_durable(place)
        with served(tmp_path, file=files.path) as server:
            with (
                QemuIo("-f", "raw", URI, cwd=tmp_path) as writer,
                QemuIo("-f", "raw", URI, cwd=tmp_path) as flusher,
            ):
                write(writer, sectors, rng, 8)
                flusher.run("flush")
                sectors.flush()
                disk.cut()
            server.kill()
        disk.recover()
        assert lost_by(files, sectors, place) == []
