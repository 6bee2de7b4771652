"""Tests of mounted and held devices: jobs do not write them, nor files beneath loop devices.

The devices are real. A refusal names the holder, --force does not override it, and nothing
changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.availability import missing
from support.command import CLUSTER, MiB, addcow, draw_raw, overlay_bytes, ran, refused, succeed
from support.loops import Loops, loops, run

pytestmark = pytest.mark.sample(1)

SIZE = 16 * MiB
ALLOWED = "--allow-device"
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


@pytest.fixture
def made() -> Iterator[Loops]:
    with loops() as made:
        yield made


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A file large enough for a file system."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


def over(here: Path, backing: str, name: str = "vm", size: int = SIZE) -> str:
    """Make an overlay with one allocated cluster over a file or device; returns its name."""
    with (here / f"{name}.raw").open("wb") as image:
        image.write(b"X" * CLUSTER)
        image.truncate(size)
    words = overlay_bytes(image=f"{name}.raw", size=size, backing=backing, local=[0])
    (here / f"{name}.add-cow").write_bytes(words)
    return f"{name}.add-cow"


def on_image(here: Path, image: str, size: int = SIZE) -> str:
    """Make an overlay whose image is a file or device; returns its name."""
    draw_raw(here / "base.img", "ABCD")
    words = overlay_bytes(image=image, size=size, backing="base.img", local=[])
    (here / "on.add-cow").write_bytes(words)
    return "on.add-cow"


def open_to_all(place: Path) -> None:
    """Let every user reach a directory of the test's own."""
    for here in (place, *place.parents):
        if here.stat().st_uid == os.geteuid() and not here.is_mount():
            here.chmod(here.stat().st_mode | 0o755)
        if here.name.startswith("pytest-of-"):
            return


def digest(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def allowed(*words: str) -> list[str]:
    return [*words, ALLOWED, "--root", "/dev"]


@contextmanager
def held_by_python(device: str) -> Iterator[int]:
    """Let another process hold a device as mounts do; yields its pid."""
    code = "import os, sys; os.open(sys.argv[1], os.O_RDWR | os.O_EXCL); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, device], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        try:
            yield process.pid
        finally:
            process.communicate(b"\n")


# Devices


@pytest.mark.parametrize("more", [[], ["--force"], ["-d"], ["--locking", "off"]])
def test_commit_into_a_mounted_device_is_refused(
    tmp_path: Path, disk: Path, made: Loops, more: list[str]
) -> None:
    device = made.bind(disk)
    place = made.ext4(device, tmp_path / "a place")
    (place / "file").write_bytes(b"precious" * 1000)
    run("mount", "-o", "remount,ro", str(place))
    name, before = over(tmp_path, device), digest(device)
    result = addcow(*allowed("commit", *more, name), cwd=tmp_path)
    assert result.status == 1
    line = result.stderr.splitlines()[-1]
    assert f"'{device}': in use: it is mounted on {place}; " in line
    assert digest(device) == before
    assert (place / "file").read_bytes() == b"precious" * 1000


@pytest.mark.long
def test_reading_over_a_mounted_device_is_allowed(tmp_path: Path, disk: Path, made: Loops) -> None:
    device = made.bind(disk)
    made.ext4(device, tmp_path / "place")
    name = over(tmp_path, device)
    for words in ("map", "check", "info --backing-chain", "io -r -c length"):
        assert addcow(*allowed(*words.split(), name), cwd=tmp_path).status == 0
    succeed(*allowed("convert", "-O", "raw", name, "new.raw"), cwd=tmp_path)
    succeed(*allowed("flatten", name), cwd=tmp_path)


def test_disk_with_a_mounted_partition_is_refused(tmp_path: Path, disk: Path, made: Loops) -> None:
    device = made.bind(disk)
    part = made.partition(device, 1, 4 * MiB, 8 * MiB)
    place = made.ext4(part, tmp_path / "place")
    line = refused(*allowed("commit", over(tmp_path, device)), cwd=tmp_path)
    assert f"in use: {part} is mounted on {place}; " in line


def test_partition_beside_a_mounted_one_is_written(tmp_path: Path, disk: Path, made: Loops) -> None:
    device = made.bind(disk)
    made.ext4(made.partition(device, 1, 4 * MiB, 8 * MiB), tmp_path / "place")
    free = made.partition(device, 2, 12 * MiB, 2 * MiB)
    succeed(*allowed("commit", over(tmp_path, free, size=2 * MiB)), cwd=tmp_path)
    assert Path(free).read_bytes()[:CLUSTER] == b"X" * CLUSTER


def test_partition_of_a_held_disk_is_refused(tmp_path: Path, disk: Path, made: Loops) -> None:
    device = made.bind(disk)
    part = made.partition(device, 1, 0, 4 * MiB)
    with held_by_python(device) as pid:
        line = refused(*allowed("commit", over(tmp_path, part, size=4 * MiB)), cwd=tmp_path)
        assert f"(pid {pid}) has {device} open" in line


def test_device_used_as_swap_is_refused(tmp_path: Path, disk: Path, made: Loops) -> None:
    device = made.bind(disk)
    run("mkswap", device)
    run("swapon", device)
    made.later(run, "swapoff", device)
    line = refused(*allowed("commit", over(tmp_path, device)), cwd=tmp_path)
    assert "in use: it is used as swap; " in line


@pytest.mark.long
def test_image_on_a_mounted_device_is_refused(tmp_path: Path, disk: Path, made: Loops) -> None:
    device = made.bind(disk)
    place = made.ext4(device, tmp_path / "place", "-o", "ro")
    name, before = on_image(tmp_path, device), digest(device)
    for words in (["flatten"], ["flatten", "--force"], ["io", "-c", "write 0 64k"]):
        line = refused(*allowed(*words, name), cwd=tmp_path)
        assert f"in use: it is mounted on {place}; " in line
    assert digest(device) == before


@pytest.mark.parametrize("options", [[], ["-t", "none"], ["--verify"]])
@pytest.mark.parametrize("jobs", ["0", "2"])
def test_free_device_is_claimed_and_written(
    tmp_path: Path, disk: Path, made: Loops, options: list[str], jobs: str
) -> None:
    device = made.bind(disk)
    name = over(tmp_path, device)
    succeed(*allowed("commit", "--jobs", jobs, *options, name), cwd=tmp_path)
    run("sync")
    assert disk.read_bytes()[: 2 * CLUSTER] == b"X" * CLUSTER + bytes(CLUSTER)


def test_device_that_is_too_short_is_refused_before_the_first_byte(
    tmp_path: Path, disk: Path, made: Loops
) -> None:
    device = made.bind(disk)
    name, before = over(tmp_path, device, size=SIZE + MiB), digest(disk)
    line = refused(*allowed("commit", name), cwd=tmp_path)
    assert f"{device}: the device is shorter ({SIZE} bytes) than the overlay" in line
    assert digest(disk) == before
    plan = addcow(*allowed("farm", "plan", "commit", name), cwd=tmp_path)
    assert "the device is shorter" in plan.stderr


# Files beneath loop devices


#: Each way to write into the file beneath a mounted loop device.
WRITERS: dict[str, Callable[[Path], list[str]]] = {
    "commit": lambda here: ["commit", over(here, "disk.img")],
    "commit -d": lambda here: ["commit", "-d", "--force", over(here, "disk.img")],
    "flatten": lambda here: ["flatten", "--force", on_image(here, "disk.img")],
    "discard": lambda here: ["flatten", "--discard", on_image(here, "disk.img")],
    "io": lambda here: ["io", "-c", "write 0 64k", on_image(here, "disk.img")],
    "create": lambda _: ["create", "-o", "image_file=disk.img", "new.add-cow", "32M"],
}


@pytest.mark.parametrize("way", WRITERS)
def test_file_beneath_a_mounted_loop_device_is_refused(
    tmp_path: Path, disk: Path, made: Loops, way: str
) -> None:
    device = made.bind(disk)
    # Read-only, so that only the command could change a byte.
    place = made.ext4(device, tmp_path / "place", "-o", "ro")
    words, before = WRITERS[way](tmp_path), digest(disk)
    line = refused(*words, cwd=tmp_path)
    assert f"in use: {device}, a loop device over it, is mounted on {place}; " in line
    assert digest(disk) == before
    assert not (tmp_path / "new.add-cow").exists()


def test_file_beneath_a_loop_device_is_identified_by_inode(
    tmp_path: Path, disk: Path, made: Loops
) -> None:
    device = made.bind(disk)
    made.ext4(device, tmp_path / "place")
    disk.rename(tmp_path / "elsewhere.img")
    assert device in refused("commit", over(tmp_path, "elsewhere.img"), cwd=tmp_path)


def test_file_beneath_a_mounted_partition_is_refused(
    tmp_path: Path, disk: Path, made: Loops
) -> None:
    part = made.partition(made.bind(disk), 1, 4 * MiB, 8 * MiB)
    made.ext4(part, tmp_path / "place")
    assert f"{part}, a loop device over it, is mounted" in refused(
        "commit", over(tmp_path, "disk.img"), cwd=tmp_path
    )


@pytest.mark.long
def test_file_beneath_stacked_loop_devices_is_refused(
    tmp_path: Path, disk: Path, made: Loops
) -> None:
    lower = made.bind(disk)
    upper = made.bind(lower)
    made.ext4(upper, tmp_path / "place")
    for backing in ("disk.img", lower):
        line = refused(*allowed("commit", over(tmp_path, backing)), cwd=tmp_path)
        assert f"{upper}, a loop device over it, is mounted" in line


def test_file_beneath_two_loop_devices_is_refused(tmp_path: Path, disk: Path, made: Loops) -> None:
    one, other = made.bind(disk), made.bind(disk)
    made.ext4(one, tmp_path / "place")
    line = refused(*allowed("commit", over(tmp_path, other)), cwd=tmp_path)
    assert f"{one}, a loop device over it, is mounted" in line


def test_loop_device_over_other_bytes_of_a_file_is_allowed(
    tmp_path: Path, disk: Path, made: Loops
) -> None:
    upper = made.bind(disk, "--offset", str(8 * MiB))
    lower = made.bind(disk, "--sizelimit", str(8 * MiB))
    made.ext4(upper, tmp_path / "place")
    succeed(*allowed("commit", over(tmp_path, lower, size=8 * MiB)), cwd=tmp_path)


def test_loop_device_held_by_another_process_is_refused(
    tmp_path: Path, disk: Path, made: Loops
) -> None:
    device = made.bind(disk)
    with held_by_python(device) as pid:
        line = refused("commit", over(tmp_path, "disk.img"), cwd=tmp_path)
    assert f"{device}, a loop device over it, is held by python" in line
    assert f"(pid {pid})" in line


def test_unused_loop_device_is_allowed(tmp_path: Path, disk: Path, made: Loops) -> None:
    device = made.bind(disk)
    succeed("commit", over(tmp_path, "disk.img"), cwd=tmp_path)
    assert Path(device).read_bytes()[:CLUSTER] == b"X" * CLUSTER


@pytest.mark.long
def test_file_and_its_loop_device_are_one_file(tmp_path: Path, disk: Path, made: Loops) -> None:
    device = made.bind(disk)
    words = overlay_bytes(image="disk.img", size=SIZE, backing=device, local=[0])
    (tmp_path / "vm.add-cow").write_bytes(words)
    before = digest(disk)
    for command in ("commit", "flatten"):
        line = refused(*allowed(command, "vm.add-cow"), cwd=tmp_path)
        assert "its bytes are those of" in line
    assert digest(disk) == before


def test_user_without_devices_finds_holders_by_mounts(
    tmp_path: Path, disk: Path, made: Loops
) -> None:
    if not shutil.which("setpriv"):
        missing("setpriv is not installed")
    made.ext4(made.bind(disk), tmp_path / "place")
    over(tmp_path, "disk.img")
    open_to_all(tmp_path)
    for path in (tmp_path, *tmp_path.glob("*.*")):
        os.chown(path, 65534, 65534)
    done = ran([*NOBODY, sys.executable, "-m", "addcow_mp", "commit", "vm.add-cow"], cwd=tmp_path)
    assert done.returncode == 1
    assert "a loop device over it, is mounted on" in done.stderr


def test_swap_file_is_refused(tmp_path: Path, made: Loops) -> None:
    path = tmp_path / "swap.img"
    path.write_bytes(bytes(SIZE))
    path.chmod(0o600)
    run("mkswap", str(path))
    if subprocess.run(["swapon", str(path)], capture_output=True, check=False).returncode:
        missing("files cannot be used as swap here")
    made.later(run, "swapoff", str(path))
    assert "it is used as swap" in refused("commit", over(tmp_path, "swap.img"), cwd=tmp_path)


def test_farm_plan_refuses_held_files(tmp_path: Path, disk: Path, made: Loops) -> None:
    device = made.bind(disk)
    made.ext4(device, tmp_path / "place")
    over(tmp_path, "disk.img")
    result = addcow("farm", "plan", "commit", "--output", "json", "vm.add-cow", cwd=tmp_path)
    (image,) = json.loads(result.stdout)["images"]
    assert image["state"] == "refused"
    assert f"{device}, a loop device over it, is mounted" in image["problem"]
