"""The guest's view over NBD: clients that we did not write read and write it through nbdkit."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from support.availability import missing
from support.command import PATIENCE, addcow, pair, refused, succeed, tool
from support.lending import view
from support.serving import URI, served

KiB = 1024
CLUSTER = 64 * KiB


@pytest.fixture(autouse=True)
def tools() -> None:
    """Skip where nbdkit or its clients are not installed."""
    for name in ("nbdkit", "nbdcopy", "nbdinfo", "qemu-io"):
        if shutil.which(name) is None:
            missing(f"{name} is not installed")


def qemu_io(here: Path, *commands: str) -> None:
    """Run commands of qemu-io over NBD."""
    words = [word for each in commands for word in ("-c", each)]
    told = tool("qemu-io", "-f", "raw", *words, URI, cwd=here)
    assert "rror" not in told, told


def test_clients_read_what_convert_writes_and_keep_its_holes(tmp_path: Path) -> None:
    pair(tmp_path, "A--D", "-B0-")
    content = view("top.add-cow", cwd=tmp_path)
    with served(tmp_path, "--read-only") as server:
        tool("nbdcopy", URI, "copy.raw", cwd=tmp_path)
        assert "is_read_only: true" in tool("nbdinfo", URI, cwd=tmp_path)
    assert server.returncode == 0
    assert (tmp_path / "copy.raw").read_bytes() == content
    assert (tmp_path / "copy.raw").stat().st_blocks * 512 <= 3 * CLUSTER


def test_writes_zeros_and_trims_reach_the_overlay(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "A---")
    content = bytearray(view("top.add-cow", cwd=tmp_path))
    with served(tmp_path) as server:
        trim = f"discard {2 * CLUSTER - 512} {CLUSTER + 1024}"
        qemu_io(tmp_path, "write -P 0x33 4k 512", "write -z 70k 3k", trim, "write -f -P 7 0 4k")
        qemu_io(tmp_path, "read -P 0 128k 64k", "read -P 0x33 4k 512")
    assert server.returncode == 0
    content[0 : 4 * KiB] = b"\7" * 4 * KiB
    content[4 * KiB : 4 * KiB + 512] = b"\x33" * 512
    content[70 * KiB : 73 * KiB] = bytes(3 * KiB)
    content[2 * CLUSTER : 3 * CLUSTER] = bytes(CLUSTER)  # only the whole cluster is trimmed
    assert view("top.add-cow", cwd=tmp_path) == content
    succeed("check", "top.add-cow", cwd=tmp_path)


def test_four_clients_write_side_by_side(tmp_path: Path, rng: random.Random) -> None:
    pair(tmp_path, "ABCDEFGH", "-B--0-G-")
    content = bytearray(view("top.add-cow", cwd=tmp_path))
    sectors = list(range(len(content) // 512))
    rng.shuffle(sectors)
    with served(tmp_path):
        clients = []
        for client in range(4):
            words = []
            for sector in sectors[client:200:4]:
                fill = rng.randrange(1, 256)
                content[sector * 512 : (sector + 1) * 512] = bytes([fill]) * 512
                words += ["-c", f"aio_write -P {fill} {sector * 512} 512"]
            words = ["qemu-io", "-f", "raw", *words, "-c", "aio_flush", "-c", "flush", URI]
            clients.append(subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL))
        assert [one.wait(PATIENCE) for one in clients] == [0] * 4
        tool("nbdcopy", URI, "copy.raw", cwd=tmp_path)
        assert (tmp_path / "copy.raw").read_bytes() == content
    assert view("top.add-cow", cwd=tmp_path) == content


@pytest.mark.long
def test_fio_verifies_random_writes_of_four_connections(tmp_path: Path) -> None:
    pair(tmp_path, "ABCDEFGH" * 16, "-B--0-G-" * 16)
    # Each job has a quarter of the disk, and knows what it wrote there by a sum in each block.
    words = ["--name=random", "--ioengine=nbd", f"--uri={URI}", "--rw=randwrite", "--bs=4k"]
    words += ["--iodepth=16", "--numjobs=4", "--size=2m", "--offset_increment=2m", "--thread"]
    words += ["--verify=crc32c", "--verify_fatal=1", "--randseed=7", "--output=fio.out"]
    with served(tmp_path):
        tool("fio", *words, "--end_fsync=1", cwd=tmp_path)
        tool("nbdcopy", URI, "copy.raw", cwd=tmp_path)
    assert (tmp_path / "copy.raw").read_bytes() == view("top.add-cow", cwd=tmp_path)
    succeed("check", "top.add-cow", cwd=tmp_path)
    with served(tmp_path, "--read-only"):
        tool("fio", *words, "--verify_only=1", cwd=tmp_path)


def test_killed_server_loses_nothing_that_was_flushed(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "A---")
    with served(tmp_path) as server:
        qemu_io(tmp_path, "write -P 0x44 64k 64k", "flush", "write -P 0x55 128k 64k")
        server.kill()
    assert addcow("check", "top.add-cow", cwd=tmp_path).status in (0, 3)
    assert view("top.add-cow", cwd=tmp_path)[CLUSTER : 2 * CLUSTER] == b"\x44" * CLUSTER


def test_overlay_is_locked_while_it_is_served(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "A---")
    with served(tmp_path):
        assert "nbdkit" in refused("commit", "top.add-cow", cwd=tmp_path)
    succeed("commit", "top.add-cow", cwd=tmp_path)


def test_overlay_with_overlays_above_is_served_read_only(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "A---")
    succeed("create", "-F", "add-cow", "-b", "top.add-cow", "above.add-cow", cwd=tmp_path)
    message = refused("serve", "--socket", "s.sock", "top.add-cow", cwd=tmp_path)
    assert "above.add-cow" in message
    with served(tmp_path, "--read-only"):
        tool("nbdinfo", URI, cwd=tmp_path)


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--socket", "s", "--port", "1"], 64, "either a socket or a port"),
        (["--socket", "s", "missing"], 1, "missing"),
    ],
    ids=["socket and port", "no such file"],
)
def test_serve_is_refused_in_one_line(
    tmp_path: Path, options: list[str], status: int, words: str
) -> None:
    pair(tmp_path, "AB", "-B")
    name = [] if "missing" in options else ["top.add-cow"]
    assert words in refused("serve", *options, *name, cwd=tmp_path, status=status)


def test_missing_nbdkit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair(tmp_path, "AB", "-B")
    monkeypatch.setenv("PATH", os.devnull)
    assert "install" in refused("serve", "--socket", "s", "top.add-cow", cwd=tmp_path)
