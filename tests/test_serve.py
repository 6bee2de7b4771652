"""The guest's view over NBD: clients that we did not write read and write it through nbdkit."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from addcow_mp import nbd_plugin
from support.availability import missing
from support.command import ADDCOW, PATIENCE, addcow, pair, refused, succeed, tool
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


def test_writes_that_no_client_flushed_are_kept_when_the_server_ends(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "A---")
    content = b"\x44" * 4 * CLUSTER
    (tmp_path / "new.raw").write_bytes(content)
    with served(tmp_path) as server:
        tool("nbdcopy", "new.raw", URI, cwd=tmp_path)  # it sends no flush
    assert server.returncode == 0
    assert view("top.add-cow", cwd=tmp_path) == content
    succeed("check", "top.add-cow", cwd=tmp_path)


def contents(here: Path) -> dict[str, bytes]:
    """The bytes of every image in ``here``."""
    return {name: (here / name).read_bytes() for name in os.listdir(here) if "." in name}


def test_read_only_server_refuses_writes_and_changes_nothing(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "A-0-")
    before = contents(tmp_path)
    (tmp_path / "other").write_bytes(bytes([7]) * 4 * CLUSTER)
    with served(tmp_path, "--read-only"):
        for words in (
            ["nbdcopy", "other", URI],
            ["qemu-io", "-f", "raw", "-c", "write -P 7 0 64k", "-c", "discard 0 64k", URI],
        ):
            done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode != 0
            assert "read-only" in done.stderr or "Permission denied" in done.stderr
    assert contents(tmp_path) == before


def test_lent_overlay_is_refused_and_the_socket_not_made(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "A---")
    succeed("qemu", "export", "top.add-cow", cwd=tmp_path)
    assert "lent" in refused("serve", "--socket", "s.sock", "top.add-cow", cwd=tmp_path)
    assert not (tmp_path / "s.sock").exists()


def test_served_overlay_is_not_served_twice(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "A---")
    with served(tmp_path):
        message = refused("serve", "--socket", "other.sock", "top.add-cow", cwd=tmp_path)
        assert "in use" in message
        assert not (tmp_path / "other.sock").exists()


def test_socket_is_removed_when_the_server_ends(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "A---")
    for _ in range(2):
        with served(tmp_path, "--read-only") as server:
            assert (tmp_path / "s.sock").is_socket()
        assert server.returncode == 0
        assert not (tmp_path / "s.sock").exists()


def test_socket_of_another_server_is_not_removed_at_the_end(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "A---")
    with served(tmp_path, "--read-only"):
        (tmp_path / "s.sock").rename(tmp_path / "moved.sock")
        with served(tmp_path, "--read-only"):
            pass
        assert not (tmp_path / "s.sock").exists()
        (tmp_path / "s.sock").write_text("another file")
    assert (tmp_path / "s.sock").read_text() == "another file"


def test_socket_that_a_killed_server_left_is_replaced(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "A---")
    with served(tmp_path) as server:
        server.kill()
        server.wait(PATIENCE)
        assert (tmp_path / "s.sock").is_socket()
        with served(tmp_path):
            qemu_io(tmp_path, "read -P 0 0 0")
    assert not (tmp_path / "s.sock").exists()


def test_socket_with_a_server_is_refused_and_the_server_goes_on(tmp_path: Path) -> None:
    pair(tmp_path, "ABCD", "A---")
    with served(tmp_path, "--read-only"):
        words = ("serve", "--socket", "s.sock", "--read-only", "top.add-cow")
        message = refused(*words, cwd=tmp_path)
        assert "s.sock: another server listens there" in message
        tool("nbdinfo", URI, cwd=tmp_path)


@pytest.mark.parametrize("kind", ["queue is full", "datagrams"])
def test_socket_of_another_program_is_refused_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    pair(tmp_path, "AB", "-B")
    monkeypatch.chdir(tmp_path)
    full = kind == "queue is full"
    other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM if full else socket.SOCK_DGRAM)
    with other, socket.socket(socket.AF_UNIX) as client:
        other.bind("s")
        if full:
            other.listen(0)
            client.connect("s")
        message = refused("serve", "--socket", "s", "top.add-cow", cwd=tmp_path)
        assert "s: another server listens there" in message
        assert (tmp_path / "s").is_socket()


def test_server_that_cannot_open_its_overlay_removes_the_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The overlay has gone after the command has looked at it.
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        found = (tmp_path / "s").stat()
        which = {"path": str(tmp_path / "s"), "which": [found.st_dev, found.st_ino]}
        options = {"file": "gone.add-cow", "writable": True, "access": {}, "socket": which}
        words = ["nbdkit", "-f", "--unix", "n", "python", nbd_plugin.__file__]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [*words, f"options={json.dumps(options)}"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    assert done.returncode == 1
    assert "gone.add-cow" in done.stderr
    assert not (tmp_path / "s").exists()


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_path_that_is_no_socket_is_refused_and_kept(tmp_path: Path, kind: str) -> None:
    pair(tmp_path, "AB", "-B")
    path = tmp_path / "s"
    if kind == "file":
        path.write_text("mine")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    before = path.lstat()
    message = refused("serve", "--socket", "s", "top.add-cow", cwd=tmp_path)
    assert "s: it exists and is no socket" in message
    assert path.lstat().st_ino == before.st_ino


def test_port_in_use_is_named_in_one_line(tmp_path: Path) -> None:
    pair(tmp_path, "AB", "-B")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        message = refused("serve", "--port", port, "top.add-cow", cwd=tmp_path)
    assert f"port {port} of 127.0.0.1: another program listens there" in message


@pytest.mark.sample(1)
@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1"])
def test_port_is_served_at_the_address(tmp_path: Path, address: str) -> None:
    pair(tmp_path, "ABCD", "A---")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.create_server((address, 0), family=family) as free:
            port = free.getsockname()[1]
    except OSError as error:
        missing(f"{address}: {error}")
    words = [*ADDCOW, "serve", "--port", str(port), "--bind", address, "--read-only"]
    with subprocess.Popen([*words, "top.add-cow"], cwd=tmp_path) as server:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection((address, port)).close()
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
        host = f"[{address}]" if ":" in address else address
        tool("nbdcopy", f"nbd://{host}:{port}", "copy.raw", cwd=tmp_path)
        server.terminate()
        assert server.wait(PATIENCE) == 0
    assert (tmp_path / "copy.raw").read_bytes() == view("top.add-cow", cwd=tmp_path)


@pytest.mark.sample(1)
@pytest.mark.parametrize("rate", ["0", "1", "7.9E"])
def test_extreme_rates_are_served(tmp_path: Path, rate: str) -> None:
    pair(tmp_path, "AB", "-B")
    with served(tmp_path, "-r", rate) as server:
        tool("nbdinfo", "--size", URI, cwd=tmp_path)
    assert server.returncode == 0


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--socket", "s", "--port", "1"], 64, "either a socket or a port"),
        (["--socket", "s", "missing"], 1, "missing"),
        (["--socket", ""], 64, "--socket ''"),
        (["--socket", "s" * 108], 64, "at most 107"),
        (["--socket", "no/s"], 1, "no/s: its directory does not exist"),
        (["--socket", "base.img/s"], 1, "base.img/s: cannot listen on it"),
        (["--port", "0"], 64, "--port"),
        (["--port", "-5"], 64, "--port"),
        (["--port", "65536"], 64, "--port"),
        (["--port", "99999"], 64, "--port"),
        (["--port", "nbd"], 64, "--port"),
        (["--bind", ""], 64, "--bind ''"),
        (["--bind", "192.0.2.1"], 1, "--bind 192.0.2.1: this machine has no such address"),
        (["--bind", "2001:db8::1"], 1, "--bind 2001:db8::1: "),
        (["--bind", "no such name"], 1, "--bind no such name: no address of this machine"),
        (["--bind", "a..b"], 1, "--bind a..b: no address of this machine"),
        (["-r", "-1"], 64, "--limit-rate"),
    ],
)
def test_serve_is_refused_in_one_line(
    tmp_path: Path, options: list[str], status: int, words: str
) -> None:
    pair(tmp_path, "AB", "-B")
    before = set(os.listdir(tmp_path))
    name = [] if "missing" in options else ["top.add-cow"]
    assert words in refused("serve", *options, *name, cwd=tmp_path, status=status)
    assert set(os.listdir(tmp_path)) == before


def test_socket_in_a_directory_without_permission_is_refused(tmp_path: Path) -> None:
    pair(tmp_path, "AB", "-B")
    message = refused("serve", "--socket", "/proc/s", "top.add-cow", cwd=tmp_path)
    assert "/proc/s: " in message


def test_longest_path_of_a_socket_is_served(tmp_path: Path) -> None:
    pair(tmp_path, "AB", "-B")
    words = [*ADDCOW, "serve", "--socket", "s" * 107, "top.add-cow"]
    with subprocess.Popen(words, cwd=tmp_path) as server:
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / ("s" * 107)).exists():
            assert time.monotonic() < deadline
        tool("nbdinfo", f"nbd+unix:///?socket={'s' * 107}", cwd=tmp_path)
        server.terminate()
        assert server.wait(PATIENCE) == 0


def test_missing_nbdkit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair(tmp_path, "AB", "-B")
    monkeypatch.setenv("PATH", os.devnull)
    assert "install" in refused("serve", "--socket", "s", "top.add-cow", cwd=tmp_path)
