"""Tests on a file system without shared mappings (mergerfs with cache.files=off).

The results are compared with those on an ordinary file system.
"""

import mmap
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from addcow_mp.format.bits import READ_BYTES, MappedBits
from addcow_mp.format.manifest import FileBytes
from support.command import KiB, MiB, addcow, draw_raw, ran, refused, same_content, succeed, tool

pytestmark = pytest.mark.sample(1)


def _unavailable(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A mergerfs over two directories, which goes again."""
    top = tmp_path_factory.mktemp("mergerfs")
    if shutil.which("mergerfs") is None:
        _unavailable("mergerfs is not installed")
    branches = [top / "one", top / "two"]
    for path in (*branches, top / "pool"):
        path.mkdir()
    words = ["mergerfs", "-o", "cache.files=off", ":".join(map(str, branches)), str(top / "pool")]
    done = ran(words)
    if done.returncode != 0:
        _unavailable(f"mergerfs cannot be mounted: {done.stderr.strip()}")
    try:
        yield top / "pool"
    finally:
        subprocess.run(["umount", str(top / "pool")], check=True, timeout=60)


@pytest.fixture
def pool(mount: Path) -> Iterator[Path]:
    """An empty directory there, in which shared mappings are refused."""
    here = mount / "here"
    here.mkdir()
    (here / "probe").write_bytes(b"probe")
    with (here / "probe").open("rb") as file:
        try:
            mmap.mmap(file.fileno(), 5, prot=mmap.PROT_READ).close()
        except OSError:
            (here / "probe").unlink()
        else:
            _unavailable("this mergerfs has shared mappings")
    yield here
    shutil.rmtree(here)


def begin(here: Path) -> None:
    """Make a base, and an overlay of it that holds something."""
    draw_raw(here / "base.img", "ABCDEFGH" * 4)
    succeed("create", "-b", "base.img", "-F", "raw", "top.add-cow", cwd=here)
    words = ("write -P 0x51 64k 200k", "write -P 0x52 1M 4k", "flush", "read -P 0x52 1M 4k")
    cwd = [word for each in words for word in ("-c", each)]
    succeed("io", *cwd, "top.add-cow", cwd=here)


def contents(here: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in here.iterdir() if one.suffix != ".manifest"}


JOBS = [
    ("commit", "--jobs", "0", "top.add-cow"),
    ("commit", "-d", "--jobs", "2", "top.add-cow"),
    ("flatten", "--jobs", "2", "top.add-cow"),
    ("flatten", "--discard", "--jobs", "0", "top.add-cow"),
    ("convert", "-O", "raw", "--jobs", "2", "top.add-cow", "new.raw"),
    ("farm", "commit", "."),
    ("farm", "flatten", "--discard", "."),
    ("check", "-r", "all", "top.add-cow"),
]


@pytest.mark.parametrize("words", JOBS, ids=" ".join)
def test_job_without_shared_mappings_has_the_same_result(
    pool: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    for here in (pool, tmp_path):
        begin(here)
        succeed(*words, cwd=here)
    assert contents(pool) == contents(tmp_path)


@pytest.mark.long
def test_reading_commands_without_shared_mappings_print_the_same(
    pool: Path, tmp_path: Path
) -> None:
    for here in (pool, tmp_path):
        begin(here)
        succeed("convert", "-O", "raw", "top.add-cow", "new.raw", cwd=here)
    for words in (
        ("map", "top.add-cow"),
        ("map", "--output", "json", "top.add-cow"),
        ("check", "top.add-cow"),
        ("compare", "--jobs", "2", "-F", "raw", "top.add-cow", "new.raw"),
        ("compare", "--jobs", "2", "--output", "json", "-F", "raw", "top.add-cow", "base.img"),
        ("farm", "ls", "."),
        ("farm", "graph", "."),
        ("farm", "check", "."),
    ):
        there, found = (addcow(*words, cwd=place) for place in (tmp_path, pool))
        assert found == there
    succeed("farm", "plan", "flatten", ".", cwd=pool)
    assert "allocated clusters: 5" in succeed("info", "top.add-cow", cwd=pool).stdout
    same_content("new.raw", str(tmp_path / "new.raw"), cwd=pool)


@pytest.mark.long
def test_manifests_without_shared_mappings_are_made_and_verified(pool: Path) -> None:
    begin(pool)
    succeed("manifest", "create", "top.add-cow", cwd=pool)
    succeed("manifest", "create", "top.add-cow", cwd=pool)
    succeed("verify", "top.add-cow", cwd=pool)
    succeed("farm", "verify", "--jobs", "2", ".", cwd=pool)
    with (pool / "base.img").open("r+b") as file:
        file.seek(100 * KiB)
        file.write(b"!")
    result = addcow("farm", "scrub", "run", "--state", "state", ".", cwd=pool)
    assert result.status == 2
    assert any("base.img: 65536 bytes at 65536 differ" in line for line in result.lines)
    assert addcow("farm", "scrub", "status", "--state", "state", cwd=pool).status == 2


@pytest.mark.parametrize("job", ["commit", "flatten"])
def test_verify_option_without_shared_mappings_is_refused_before_any_change(
    pool: Path, job: str
) -> None:
    begin(pool)
    before = contents(pool)
    line = refused(job, "--verify", "top.add-cow", cwd=pool)
    assert "does not say what is in memory" in line
    assert "leave out --verify" in line
    assert contents(pool) == before


def test_bitmap_without_shared_mappings_shows_written_bits(pool: Path) -> None:
    path = pool / "bits"
    size = 3 * READ_BYTES + 5
    with path.open("w+b") as file:
        file.truncate(size)
        bits = MappedBits(file.fileno(), 0, size * 8, str(path))
        assert list(bits.runs(0, size * 8)) == []
        for at in (0, READ_BYTES - 1, READ_BYTES, size - 1):
            os.pwrite(file.fileno(), b"\x81", at)
            assert bits.any(at * 8, at * 8 + 1)
            assert list(bits.runs(at * 8 + 3, at * 8 + 8)) == [(at * 8 + 7, at * 8 + 8)]
        assert bits.count(0, size * 8) == 8
        assert list(bits.runs(0, size * 8)) == [
            (0, 1),
            (7, 8),
            (READ_BYTES * 8 - 8, READ_BYTES * 8 - 7),
            (READ_BYTES * 8 - 1, READ_BYTES * 8 + 1),
            (READ_BYTES * 8 + 7, READ_BYTES * 8 + 8),
            (size * 8 - 8, size * 8 - 7),
            (size * 8 - 1, size * 8),
        ]


def test_manifest_without_shared_mappings_is_read(pool: Path) -> None:
    data = bytes(range(256)) * 16
    (pool / "data").write_bytes(data)
    with (pool / "data").open("rb") as file:
        content = FileBytes(file.fileno(), len(data) - 3, "data")
    assert len(content) == len(data) - 3
    for part in (slice(0, 16), slice(100, 5000), slice(None, -32), slice(4090, None)):
        assert content[part] == data[:-3][part]


@pytest.mark.long
def test_e2fsck_accepts_a_disk_flattened_without_shared_mappings(pool: Path) -> None:
    (pool / "disk.img").touch()
    os.truncate(pool / "disk.img", 16 * MiB)
    tool("mkfs.ext4", "-q", "-F", "disk.img", cwd=pool)
    succeed("create", "-b", "disk.img", "-F", "raw", "vm.add-cow", cwd=pool)
    succeed("flatten", "--discard", "vm.add-cow", cwd=pool)
    tool("e2fsck", "-fn", "vm.raw", cwd=pool)
    assert not (pool / "vm.add-cow").exists()
