"""Tests of what a job costs: it grows with the data and not with the virtual size.

The same data is spread over 4 GiB and over 16 TiB (on XFS). A job must make about the same number
of system calls, and must run with 64 MiB of private memory (RLIMIT_DATA) and a limited address
space.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import addcow_mp
from addcow_mp.cli.main import run
from support.command import CLUSTER, GiB, KiB, MiB, Result, TiB, pair, ran, succeed
from support.file_systems import made_disk
from support.model import bitmap_length, disk_usage, pack_header

pytestmark = pytest.mark.sample(1)

SMALL, HUGE = 4 * GiB, 16 * TiB
PIECE = 4 * KiB
COUNT = 300

#: Private memory of any process, and its address space: an empty command takes 60 MiB of it,
#: the bitmap of 16 TiB and the marks of a job 32 MiB each.
PRIVATE, MAPPED = 64 * MiB, 256 * MiB


# ---- images ----


@pytest.fixture(scope="module")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    for disk in made_disk("xfs", tmp_path_factory.mktemp("disk")):
        yield disk.mountpoint


def sparse(path: Path, size: int, pieces: dict[int, bytes]) -> None:
    """Make a file of holes with a few pieces of data."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, piece in pieces.items():
            file.seek(offset)
            file.write(piece)


def data_of(path: Path) -> dict[int, bytes]:
    """Return the pieces of 4 KiB of a file that are not zero, looking only where data is."""
    found: dict[int, bytes] = {}
    with path.open("rb") as file:
        fd, at, end = file.fileno(), 0, path.stat().st_size
        while at < end:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:  # nothing but a hole is left
                break
            for place in range(at, os.lseek(fd, at, os.SEEK_HOLE), PIECE):
                piece = os.pread(fd, PIECE, place)
                if any(piece):
                    found[place] = piece
                at = place + PIECE
    return found


class Strewn(NamedTuple):
    """An overlay whose disk holds a little here and there, half of it in the image."""

    here: Path
    size: int
    local: dict[int, bytes]
    below: dict[int, bytes]

    @classmethod
    def lay(cls, here: Path, size: int, cluster: int = CLUSTER) -> Strewn:
        """Make the files; the last piece is in the last cluster."""
        places = [(size - cluster) * n // (COUNT - 1) // cluster * cluster for n in range(COUNT)]
        pieces = {at: f"{n} at {at}".encode().ljust(PIECE, b".") for n, at in enumerate(places)}
        local, below = dict([*pieces.items()][1::2]), dict([*pieces.items()][::2])
        sparse(here / "base.img", size, below)
        sparse(here / "top.raw", size, local)
        header = pack_header("top.raw", "base.img", "raw", cluster_size=cluster)
        bits: Counter[int] = Counter()
        for at in local:
            bits[len(header) + at // cluster // 8] |= 1 << at // cluster % 8
        written = {at: bytes([value]) for at, value in bits.items()}
        sparse(here / "top.add-cow", len(header) + bitmap_length(size, cluster), written)
        with (here / "top.add-cow").open("r+b") as file:
            file.write(header)
        return cls(here, size, local, below)

    @property
    def seen(self) -> dict[int, bytes]:
        """What the guest sees."""
        return {**self.local, **self.below}

    def holds(self, name: str, pieces: dict[int, bytes]) -> None:
        """Insist on what a file holds, and that it takes no more than that."""
        path = self.here / name
        assert data_of(path) == pieces
        assert path.stat().st_size == self.size
        assert disk_usage(str(path)) <= len(pieces) * PIECE + MiB

    def converted(self) -> None:
        """Insist on the new file, and that nothing else has changed; remove it."""
        self.holds("new.raw", self.seen)
        self.unchanged()
        (self.here / "new.raw").unlink()

    def kept(self) -> None:
        """Insist on what commit -d leaves."""
        self.holds("base.img", self.seen)
        self.holds("top.raw", self.local)

    def committed(self) -> None:
        """Insist on what commit leaves."""
        self.holds("base.img", self.seen)
        self.holds("top.raw", {})
        bitmap = (self.here / "top.add-cow").read_bytes()[CLUSTER:]
        assert bitmap.count(0) == len(bitmap)

    def flattened(self) -> None:
        """Insist on what flatten leaves."""
        self.holds("top.raw", self.seen)
        self.holds("base.img", self.below)
        with (self.here / "top.add-cow").open("rb") as file:
            header, bitmap = file.read(CLUSTER), file.read()
        assert header[32] & 1
        assert bitmap.count(0xFF) == self.size // CLUSTER // 8
        assert len(bitmap) == bitmap_length(self.size, CLUSTER)

    def unchanged(self) -> None:
        """Insist that the chain is what it was."""
        self.holds("top.raw", self.local)
        self.holds("base.img", self.below)


@pytest.fixture
def here(xfs: Path) -> Iterator[Path]:
    directory = xfs / "here"
    directory.mkdir()
    yield directory
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


#: Every command, and what must be true after it.
COMMANDS: dict[str, Callable[[Strewn], None]] = {
    "info top.add-cow": Strewn.unchanged,
    "map top.add-cow": Strewn.unchanged,
    "check top.add-cow": Strewn.unchanged,
    "compare top.add-cow top.add-cow": Strewn.unchanged,
    "convert -O raw top.add-cow new.raw": Strewn.converted,
    "commit -d top.add-cow": Strewn.kept,
    "commit top.add-cow": Strewn.committed,
    "flatten top.add-cow": Strewn.flattened,
}
LOOKING = list(COMMANDS)[:3]
WORKING = list(COMMANDS)[3:]


# ---- they work ----


def test_info_of_16_tib_is_cheap(here: Path) -> None:
    strewn = Strewn.lay(here, HUGE)
    told = succeed("info", "--output", "json", "top.add-cow", cwd=here).json
    assert told["virtual-size"] == HUGE
    numbers = told["format-specific"]["data"].values()
    assert HUGE // CLUSTER in numbers
    assert len(strewn.local) in numbers


def test_map_of_16_tib_is_cheap(here: Path) -> None:
    strewn = Strewn.lay(here, HUGE)
    told = succeed("map", "--output", "json", "top.add-cow", cwd=here).json
    data = [(one["start"], one["length"], one["depth"]) for one in told if one["data"]]
    assert data == sorted((at, PIECE, int(at in strewn.below)) for at in strewn.seen)
    assert sum(one["length"] for one in told) == HUGE


def test_check_of_16_tib_is_cheap(here: Path) -> None:
    strewn = Strewn.lay(here, HUGE)
    assert "No errors were found" in succeed("check", "top.add-cow", cwd=here).stdout
    # A bit of the last cluster but one, which then is allocated and a hole.
    with (here / "top.raw").open("r+b") as file:
        file.seek(HUGE - 2 * CLUSTER)
        file.write(b"leaked")
    assert strewn.size == HUGE
    found = addcow_mp.check(here / "top.add-cow")
    assert (found.leaks, found.corruptions) == (1, 0)


@pytest.mark.parametrize("jobs", ["0", "2"])
@pytest.mark.parametrize("command", WORKING)
def test_jobs_on_16_tib_are_cheap(here: Path, command: str, jobs: str) -> None:
    """And that in little memory, each process of them."""
    strewn = Strewn.lay(here, HUGE)
    succeeds_within(here, command, "--jobs", jobs)
    COMMANDS[command](strewn)


# ---- memory ----


def confined(private: int, mapped: int) -> list[str]:
    """Return the words in front of a command that may take so much memory in each process."""
    limits = f"ulimit -d {private // KiB} && ulimit -v {mapped // KiB}"
    return ["sh", "-c", f'{limits} && exec "$@"', "sh"]


def python(front: list[str], here: Path, *words: str) -> Result:
    """Run this Python behind other words."""
    done = ran([*front, sys.executable, *words], cwd=here, env={**os.environ, "LC_ALL": "C"})
    return Result(done.returncode, done.stdout, done.stderr)


def succeeds_within(
    here: Path, command: str, *options: str, private: int = PRIVATE, mapped: int = MAPPED
) -> None:
    """Run a command in so much memory and insist on success."""
    verb, *rest = command.split()
    words = ["-m", "addcow_mp", verb, *options, *rest]
    result = python(confined(private, mapped), here, *words)
    assert (result.status, result.stderr) == (0, "")


@pytest.mark.parametrize("wants", ["bytearray(66 << 20)", "mmap.mmap(-1, 258 << 20)"])
def test_memory_limit_of_these_tests_works(tmp_path: Path, wants: str) -> None:
    assert python([], tmp_path, "-c", f"import mmap; {wants}").status == 0
    limited = python(confined(PRIVATE, MAPPED), tmp_path, "-c", f"import mmap; {wants}")
    assert limited.status == 1
    assert limited.stderr.splitlines()[-1].startswith(("MemoryError", "OSError"))


@pytest.mark.parametrize("command", LOOKING)
def test_reading_commands_take_little_memory(here: Path, command: str) -> None:
    strewn = Strewn.lay(here, HUGE)
    succeeds_within(here, command)
    COMMANDS[command](strewn)


SMALLEST = 4 * KiB


@pytest.mark.parametrize("command", [one for one in COMMANDS if not one.startswith("flatten")])
def test_smallest_clusters_take_little_memory(here: Path, command: str) -> None:
    """A bit for each of 4 billion clusters: 512 MiB, of which only what is set may be touched."""
    strewn = Strewn.lay(here, HUGE, SMALLEST)
    assert most_resident(here, *command.split()) <= PRIVATE
    if "commit top" not in command:
        COMMANDS[command](strewn)


def most_resident(here: Path, *command: str) -> int:
    """Run a command; return the most that it had in memory, shared pages included.

    It is started by a small process: until it becomes another program, a new process counts
    what that one has.
    """
    code = """if True:
        import resource, subprocess, sys
        subprocess.run([sys.executable, "-m", "addcow_mp", *sys.argv[1:]], stdout=2, check=True)
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
        """
    result = python([], here, "-c", code, *command)
    assert result.status == 0, result
    return int(result.stdout) * KiB


def test_bitmap_is_mapped_through_a_window(here: Path) -> None:
    Strewn.lay(here, HUGE, SMALLEST)
    succeeds_within(here, "info top.add-cow")


def test_large_files_are_compared_through_windows(here: Path) -> None:
    """Two files of 64 MiB, in 100 MiB of address space."""
    with (here / "base.img").open("wb") as file:
        for number in range(64):
            file.write(bytes([number + 1]) * MiB)
    shutil.copy(here / "base.img", here / "copy.img")
    succeeds_within(
        here, "compare -f raw -F raw base.img copy.img", "--jobs", "0", mapped=100 * MiB
    )


# ---- calls ----

#: Calls that look at files or move data. What is done by way of ctypes is not among them.
CALLS = ("lseek", "pread", "preadv", "pwrite", "fstat", "fdatasync", "ftruncate", "open")


def calls_of(command: str, here: Path) -> Counter[str]:
    """Run a command in this process; return how often it called what."""
    made: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for name in CALLS:
            patch.setattr(os, name, counted(name, getattr(os, name), made))
        verb, *rest = command.split()
        in_process = [] if verb in ("info", "map", "check") else ["--jobs", "0"]
        assert run([verb, *in_process, *rest]) == 0
    return made


def counted(name: str, call: Callable[..., Any], made: Counter[str]) -> Callable[..., Any]:
    def passed_on(*arguments: Any, **more: Any) -> Any:
        made[name] += 1
        return call(*arguments, **more)

    return passed_on


def total_calls(here: Path, command: str, size: int) -> int:
    """Make the files in that size, run the command, see that it did its work, count its calls."""
    strewn = Strewn.lay(here, size)
    made = calls_of(command, here)
    COMMANDS[command](strewn)
    return sum(made.values())


@pytest.mark.parametrize("command", COMMANDS)
def test_system_calls_do_not_grow_with_the_virtual_size(here: Path, command: str) -> None:
    """From 1 TiB on every local piece has a page of bitmap of its own: all else is equal."""
    few, many = (total_calls(here, command, size) for size in (TiB, HUGE))
    assert COUNT // 2 < few < 60 * COUNT
    assert many <= 1.1 * few


@pytest.mark.parametrize(
    "command",
    COMMANDS,
)
def test_system_calls_grow_with_the_data(here: Path, command: str) -> None:
    """In 4 GiB all bits are in two pages of bitmap, in 16 TiB each is in one of its own.

    A page may cost some calls: where it begins and ends, once for each time it is looked at.
    """
    few, many = (total_calls(here, command, size) for size in (SMALL, HUGE))
    assert many <= 1.5 * few + 16 * COUNT // 2


# ---- start-up ----

#: Parts that only some commands are for.
MOVES = {"addcow_mp.engine.transfer", "addcow_mp.engine.publisher", "addcow_mp.jobs.transfer_job"}
JOBS = {f"addcow_mp.jobs.{name}" for name in ("commit", "flatten", "convert", "create", "check")}
PROCESSES = {"multiprocessing", "concurrent.futures", "pickle", "socket", "tempfile", "rich"}


def loaded(here: Path, *words: str) -> set[str]:
    """Return the modules that a command loads."""
    result = python([], here, "-X", "importtime", "-m", "addcow_mp", *words)
    lines = result.stderr.splitlines()
    return {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


def test_compare_loads_only_modules_that_it_uses(tmp_path: Path) -> None:
    pair(tmp_path, "AB", "-B")
    found = loaded(tmp_path, "compare", "--jobs", "0", "-F", "raw", "top.add-cow", "base.img")
    assert "addcow_mp.engine.compare" in found
    assert found & (JOBS | PROCESSES | {"addcow_mp.jobs.transfer_job"}) == set()


@pytest.mark.parametrize(
    "words", [["info", "top.add-cow"], ["map", "top.add-cow"], ["check", "top.add-cow"]]
)
def test_reading_commands_load_no_compare_or_transfer_modules(
    tmp_path: Path, words: list[str]
) -> None:
    pair(tmp_path, "AB", "-B")
    found = loaded(tmp_path, *words)
    assert "addcow_mp.device.overlay" in found or words[0] == "info"
    assert found & (MOVES | {"addcow_mp.engine.compare", "addcow_mp.jobs.compare"}) == set()
    assert not any(name.startswith("addcow_mp.engine") for name in found)


def test_transfer_jobs_load_no_compare_modules(tmp_path: Path) -> None:
    pair(tmp_path, "AB", "-B")
    found = loaded(tmp_path, "commit", "--jobs", "0", "top.add-cow")
    assert found >= MOVES
    assert found & {"addcow_mp.engine.compare", "addcow_mp.jobs.compare"} == set()
