"""Tests of what a farm plan refuses: files that the job could not write.

The immutable files, read-only mounts, devices and owners are real. The job must refuse the same
and change nothing.
"""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.another_user import as_nobody
from support.command import (
    CLUSTER,
    MiB,
    addcow,
    draw,
    draw_raw,
    overlay_bytes,
    snapshot,
    succeed,
)
from support.loops import Loops, loops, run

pytestmark = pytest.mark.sample(1)


@pytest.fixture
def made() -> Iterator[Loops]:
    with loops() as made:
        yield made


@pytest.fixture
def farm(tmp_path: Path, made: Loops) -> Path:
    """An ext4 of its own with one overlay in it, ``vm`` over ``base.img``."""
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(64 * MiB)
    here = made.ext4(made.bind(disk), tmp_path / "farm")
    draw_raw(here / "base.img", "ABCD")
    draw(here / "vm.add-cow", "-X--", "base.img")
    return here


def chattr(made: Loops, flag: str, path: Path) -> None:
    run("chattr", f"+{flag}", str(path))
    made.later(run, "chattr", f"-{flag}", str(path))


def planned(operation: str, *words: str, cwd: Path) -> tuple[int, str, str]:
    """Return exit status, state and problem of the one image that is planned for."""
    result = addcow("farm", "plan", operation, "--output", "json", *words, cwd=cwd)
    (image,) = json.loads(result.stdout)["images"]
    return result.status, image["state"], image.get("problem", "")


#: What each job writes.
WRITTEN = {
    "commit": ("vm.add-cow", "vm.raw", "base.img"),
    "flatten": ("vm.add-cow", "vm.raw"),
}
CASES = [(job, name) for job, names in WRITTEN.items() for name in names]


@pytest.mark.long
@pytest.mark.parametrize(("flag", "told"), [("i", "immutable"), ("a", "append-only")])
@pytest.mark.parametrize(("job", "name"), CASES)
def test_plan_refuses_immutable_and_append_only_files(
    farm: Path, made: Loops, job: str, name: str, flag: str, told: str
) -> None:
    chattr(made, flag, farm / name)
    before = snapshot(farm)
    status, state, problem = planned(job, ".", cwd=farm)
    assert (status, state) == (1, "refused")
    assert name in problem
    assert f"cannot open it for writing: it is {told}; chattr -{flag} ends that" in problem
    result = addcow("farm", job, ".", cwd=farm)
    assert result.status == 1
    assert told in result.stderr
    assert told in addcow(job, "vm.add-cow", cwd=farm).stderr
    assert snapshot(farm) == before


@pytest.mark.long
def test_plan_flatten_accepts_an_immutable_base(farm: Path, made: Loops) -> None:
    chattr(made, "i", farm / "base.img")
    assert planned("flatten", ".", cwd=farm) == (0, "ready", "")
    succeed("farm", "flatten", ".", cwd=farm)


@pytest.mark.parametrize("job", WRITTEN)
def test_plan_refuses_a_read_only_mount(farm: Path, job: str) -> None:
    run("mount", "-o", "remount,ro", str(farm))
    status, state, problem = planned(job, ".", cwd=farm)
    assert (status, state) == (1, "refused")
    assert "cannot open it for writing: Read-only file system" in problem


@pytest.mark.long
def test_plan_with_nothing_to_do_accepts_a_read_only_mount(farm: Path) -> None:
    succeed("flatten", "vm.add-cow", cwd=farm)
    run("mount", "-o", "remount,ro", str(farm))
    assert planned("flatten", ".", cwd=farm) == (0, "nothing-to-do", "")


@pytest.mark.long
@pytest.mark.parametrize(("more", "told"), [((), "read-only"), (("-x",), "is shorter")])
def test_plan_refuses_a_device_that_is_read_only_or_too_short(
    tmp_path: Path, made: Loops, more: tuple[str, ...], told: str
) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(MiB if more else 4 * CLUSTER + 4 * MiB))
    device = made.bind(disk, *(() if more else ("--read-only",)))
    draw_raw(tmp_path / "vm.raw", "X---" + "-" * 28)
    words = overlay_bytes(image="vm.raw", size=32 * CLUSTER, backing=device, local=[0])
    (tmp_path / "vm.add-cow").write_bytes(words)
    allowed = ("--allow-device", "--root", "/dev", "vm.add-cow")
    status, state, problem = planned("commit", *allowed, cwd=tmp_path)
    assert (status, state) == (1, "refused")
    assert told in problem
    assert addcow("farm", "commit", *allowed, cwd=tmp_path).status == 1


@pytest.mark.long
def test_plan_discard_refuses_an_immutable_directory(farm: Path, made: Loops) -> None:
    place = farm / "place"
    place.mkdir()
    draw_raw(place / "base.img", "ABCD")
    draw(place / "vm.add-cow", "-X--", "base.img")
    for flag, told in (("a", "append-only"), ("i", "immutable")):
        run("chattr", f"+{flag}", str(place))
        try:
            status, state, problem = planned("flatten", "--discard", "place", cwd=farm)
            assert (status, state) == (1, "refused")
            assert f"cannot be removed: its directory is {told}" in problem
            assert planned("flatten", "place", cwd=farm) == (0, "ready", "")
        finally:
            run("chattr", f"-{flag}", str(place))


def test_plan_refuses_a_manifest_that_cannot_be_removed(farm: Path, made: Loops) -> None:
    succeed("manifest", "create", "vm.add-cow", cwd=farm)
    chattr(made, "i", farm / "vm.add-cow.manifest")
    status, state, problem = planned("flatten", ".", cwd=farm)
    assert (status, state) == (1, "refused")
    assert "vm.add-cow.manifest: cannot remove it" in problem
    assert "it is immutable" in problem


# As another user


def a_farm(here: Path, count: int = 1) -> Path:
    """Make overlays of their own bases in a directory that anybody may write."""
    here.mkdir()
    for number in range(count):
        draw_raw(here / f"base{number}.img", "ABCD")
        draw(here / f"vm{number}.add-cow", "-X--", f"base{number}.img")
    return here


@pytest.mark.parametrize("job", WRITTEN)
def test_plan_refuses_files_of_another_owner(tmp_path: Path, job: str) -> None:
    here = a_farm(tmp_path / "farm")
    done = as_nobody("farm", "plan", job, "--output", "json", ".", cwd=here)
    (image,) = json.loads(done.stdout)["images"]
    assert (done.returncode, image["state"]) == (1, "refused")
    assert "cannot open it for writing: Permission denied" in image["problem"]


def test_plan_discard_refuses_a_sticky_directory(tmp_path: Path) -> None:
    here = a_farm(tmp_path / "farm")
    for path in here.iterdir():
        path.chmod(0o666)
    here.chmod(0o1777)
    done = as_nobody("farm", "plan", "flatten", "--discard", ".", cwd=here)
    assert done.returncode == 1
    assert "it belongs to another user, in a directory with the sticky bit" in done.stderr


@pytest.mark.long
def test_plan_discard_refuses_a_directory_of_another_owner(tmp_path: Path) -> None:
    here = a_farm(tmp_path / "farm")
    for path in here.iterdir():
        path.chmod(0o666)
    done = as_nobody("farm", "plan", "flatten", "--discard", ".", cwd=here)
    assert done.returncode == 1
    assert "cannot be removed: no permission to write its directory" in done.stderr
    assert as_nobody("farm", "plan", "flatten", ".", cwd=here).returncode == 0


# Exit status, and what is told of many


def test_plan_with_a_ready_image_exits_with_0(tmp_path: Path) -> None:
    here = a_farm(tmp_path / "farm", 2)
    (here / "base0.img").unlink()
    result = addcow("farm", "plan", "commit", ".", cwd=here)
    assert result.status == 0
    assert "1 ready, 1 refused" in result.stdout
    (here / "base1.img").unlink()
    assert addcow("farm", "plan", "commit", ".", cwd=here).status == 1
    assert addcow("farm", "commit", "--dry-run", ".", cwd=here).status == 1


def on_a_terminal(*words: str, cwd: Path) -> tuple[int, str]:
    """Run addcow with a terminal for its stderr; returns its status and what that shows."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "addcow_mp", *words],
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:
            pass  # how a terminal reports that its other side is closed
        os.close(ours)
    return process.returncode, shown.decode()


def remove_bases(here: Path) -> None:
    for path in here.glob("base*.img"):
        path.unlink()


def take_images(here: Path) -> None:
    for path in here.glob("vm*.raw"):
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (remove_bases, "cannot open it: No such file or directory"),
        (take_images, "cannot open it: No such file or directory"),
    ],
)
@pytest.mark.parametrize("job", [["plan", "commit"], ["commit", "--dry-run"], ["commit"]])
def test_plan_prints_one_line_for_refusals_of_one_cause(
    tmp_path: Path, spoil: Callable[[Path], None], told: str, job: list[str]
) -> None:
    here = a_farm(tmp_path / "farm", 7)
    spoil(here)
    (here / "vm6.add-cow").write_bytes(b"ACOW")
    status, shown = on_a_terminal("farm", *job, ".", cwd=here)
    assert status == 1
    lines = shown.splitlines()
    assert len(lines) == 2, shown
    (many,) = [line for line in lines if "6 images" in line]
    assert f"refused: 6 images: {told}; for example ./vm0.add-cow, ./vm1" in many
    assert "./vm2.add-cow" in many
    assert "./vm3.add-cow" not in many
    assert any("vm6.add-cow" in line for line in lines)
    # Elsewhere there is a line for each, and JSON has all of them.
    result = addcow("farm", *job, ".", cwd=here)
    assert len(result.stderr.splitlines()) == 7
    images = json.loads(addcow("farm", *job, "--output", "json", ".", cwd=here).stdout)["images"]
    assert len([one for one in images if "problem" in one]) == 7


def test_plan_names_the_file_that_refuses_many_images(tmp_path: Path) -> None:
    here = tmp_path / "farm"
    here.mkdir()
    for number in range(4):
        draw(here / f"vm{number}.add-cow", "-X--", "base.img")
    _, shown = on_a_terminal("farm", "plan", "flatten", ".", cwd=here)
    (line,) = shown.splitlines()
    assert "refused: 4 images: backing file 'base.img': cannot open it: " in line
