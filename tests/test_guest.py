"""A real guest on a lent overlay: Linux in QEMU mounts it, writes, deletes and switches itself off.

What it wrote is looked for in the raw disk that is left at the end, by a guest that boots from it
alone.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import guest
from support.availability import missing
from support.command import ADDCOW, addcow, draw_raw, ran, refused, snapshot, succeed
from support.machines import ORDERS, assert_sound, disk_of, make_golden, sum_in, sums
from support.monitor import Qemu, RefusalError, need
from support.processes import until
from support.running import console, running

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    """Skip where QEMU, or something that its guest consists of, is not installed."""
    for name in guest.lacking():
        missing(f"a guest needs {name}")


# README, word by word


def commands(number: int) -> Iterator[tuple[str, str]]:
    """The commands in a block of `Run it` in README, and what it says that each prints."""
    section = README.read_text("utf-8").partition("\n## Run it\n")[2].partition("\n## ")[0]
    block = re.findall(r"```console\n(.*?)```", section, re.DOTALL)[number]
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, printed = part.partition("\n")
        yield command, printed


def user(directory: Path, orders: str) -> dict[str, str]:
    """The environment of a user who has addcow, and a QEMU whose guests need no boot loader."""
    programs = directory / "programs"
    programs.mkdir()
    machine = [str(shutil.which("qemu-system-x86_64")), *guest.machine(programs, orders)[1:]]
    for name, words in (("qemu-system-x86_64", machine), ("addcow", ADDCOW)):
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        (programs / name).chmod(0o755)
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}


def test_commands_of_run_it_in_readme_run_a_guest_from_golden_image_to_raw_disk(
    tmp_path: Path,
) -> None:
    here, shell, booted = tmp_path / "images", user(tmp_path, ORDERS), []
    here.mkdir()
    make_golden(here / "golden.img")
    for command, printed in commands(0):
        if "file=vm1.raw" in command:
            (here / "golden.img").rename(tmp_path / "away")
            assert [one.name for one in here.iterdir()] == ["vm1.raw"]
        told = _run(command, here, shell)
        if "qemu-system" in command:
            assert guest.DONE in told
            booted.append(sums(told))
        else:
            assert told == printed, command
        if "qemu import" in command:
            assert_sound("vm1.add-cow", cwd=here)
    assert len(booted) == 2
    assert booted[0] == booted[1] == [sum_in(here / "vm1.raw", name) for name in ("kept", "new")]


def _run(command: str, here: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=here,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=guest.PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done
    return done.stdout


# Other ways


@pytest.mark.long
def test_guest_finds_in_the_flattened_disk_what_it_wrote_through_a_relaxed_twin_of_a_chain(
    tmp_path: Path,
) -> None:
    here = tmp_path / "it's a farm, 1"
    here.mkdir()
    make_golden(here / "golden.img")
    succeed("create", "-b", "golden.img", "-F", "raw", "middle.add-cow", cwd=here)
    succeed("create", "-b", "middle.add-cow", "-F", "add-cow", "top.add-cow", cwd=here)
    succeed("qemu", "export", "--crash", "relaxed", "top.add-cow", cwd=here)
    written = sums(guest.boot(tmp_path, disk_of("top.add-cow", cwd=here), ORDERS))
    succeed("qemu", "import", "top.add-cow", cwd=here)
    assert_sound("top.add-cow", cwd=here)
    succeed("flatten", "--discard", "top.add-cow", cwd=here)
    (here / "top.raw").rename(tmp_path / "alone.raw")
    shutil.rmtree(here)
    assert sums(guest.boot(tmp_path, guest.raw_disk(f"{tmp_path}/alone.raw"), ORDERS)) == written


#: A guest that writes without a pause until it is told to stop.
BUSY = (
    ORDERS
    + """
( while [ ! -e enough ]; do dd if=/dev/urandom of=busy bs=64k count=16 2>/dev/null; sync; done ) &
echo "guest: ready"
read answer
touch enough
wait
sha256sum busy
"""
)


@pytest.mark.long
def test_commands_of_readme_stream_a_disk_while_its_guest_writes(tmp_path: Path) -> None:
    need("qemu-system-x86_64")
    here, shell = tmp_path / "images", user(tmp_path, BUSY)
    here.mkdir()
    make_golden(here / "golden.img")
    _lend(here, "vm1.add-cow")
    (start, _), (stream, _), (take_back, _) = commands(1)
    with console(["bash", "-c", start], here, shell) as machine:
        machine.wait_for("guest: ready")
        assert "the guest goes on" in _run(stream, here, shell)
        machine.say("enough")
        machine.wait_for_end()
    _run(take_back, here, shell)
    assert {one.name for one in here.iterdir()} - {"vm1.qmp"} == {"golden.img", "vm1.raw"}
    (here / "golden.img").rename(tmp_path / "away")
    found = guest.boot(tmp_path, guest.raw_disk(f"{here}/vm1.raw"), f"{ORDERS}sha256sum busy")
    assert sums(found, "kept", "new", "busy") == sums(machine.printed, "kept", "new", "busy")


#: A guest that stays: what it flushed stands on its disk, and it goes on writing when told to.
STAYING = (
    ORDERS
    + """
sync
echo "guest: ready"
read answer
dd if=/dev/urandom of=more bs=1M count=8 2>/dev/null
sync
"""
)


@pytest.mark.long
def test_guest_that_was_paused_cannot_write_again_after_import(tmp_path: Path) -> None:
    make_golden(tmp_path / "golden.img")
    _lend(tmp_path, "top.add-cow")
    with running(tmp_path, disk_of("top.add-cow", cwd=tmp_path), STAYING) as (machine, qemu):
        machine.wait_for("guest: ready")
        qemu.execute("stop")
        _assert_import_names(machine.process.pid, cwd=tmp_path)
        # Where it has migrated to somewhere else, QEMU lets go of the files but for one lock.
        _migrate_away(qemu, "exec:cat >/dev/null")
        _assert_import_names(machine.process.pid, cwd=tmp_path)
        succeed(*["qemu", "import", "--locking", "off", "--force", "top.add-cow"], cwd=tmp_path)
        before = _files(tmp_path)
        with pytest.raises(RefusalError, match="run 'addcow qemu import'"):
            qemu.execute("cont")
        machine.say("go on")
        assert not qemu.execute("query-status")["running"]
        assert _files(tmp_path) == before
    _assert_holds(tmp_path, sums(machine.printed))


def _lend(here: Path, overlay: str) -> None:
    succeed("create", "-b", "golden.img", "-F", "raw", overlay, cwd=here)
    succeed("qemu", "export", overlay, cwd=here)


def _assert_import_names(pid: int, *, cwd: Path) -> None:
    before = _files(cwd)
    message = refused("qemu", "import", "top.add-cow", cwd=cwd)
    assert f"qemu-system-x86 (pid {pid})" in message
    assert _files(cwd) == before


def _files(here: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in here.glob("top.*")}


def _migrate_away(qemu: Qemu, target: str) -> None:
    """Migrate a paused guest: its machine stays behind without its disk."""
    qemu.execute("migrate", uri=target)
    until(lambda: qemu.execute("query-migrate")["status"] == "completed", "the migration to end")


def _assert_holds(here: Path, written: list[str]) -> None:
    """Check that an overlay of a guest that did not end holds what the guest flushed."""
    assert addcow("check", "top.add-cow", cwd=here).status == 0
    succeed("convert", "-O", "raw", "top.add-cow", "seen.raw", cwd=here)
    assert ran(["e2fsck", "-fp", here / "seen.raw"]).returncode <= 1  # 1: the journal is replayed
    assert [sum_in(here / "seen.raw", name) for name in ("kept", "new")] == written


# A machine that has not begun holds its disk too


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """A directory with a lent overlay that a machine holds, and the machine's pid."""
    here = tmp_path_factory.mktemp("held")
    draw_raw(here / "golden.img", "ABCDEFGH")
    for name in ("middle", "other"):
        succeed("create", "-b", "golden.img", "-F", "raw", f"{name}.add-cow", cwd=here)
        succeed("io", "-c", "write 0 64k", f"{name}.add-cow", cwd=here)
    for name in ("top", "second"):
        backing = ("-b", "middle.add-cow", "-F", "add-cow")
        succeed("create", *backing, f"{name}.add-cow", cwd=here)
        succeed("io", "-c", "write 64k 64k", f"{name}.add-cow", cwd=here)
    succeed("qemu", "export", "top.add-cow", cwd=here)
    work = tmp_path_factory.mktemp("machine")
    with running(work, disk_of("top.add-cow", cwd=here), "", "-S") as (machine, _):
        yield here, machine.process.pid


@pytest.mark.long
def test_machine_that_waits_for_a_migration_cannot_write_after_import(tmp_path: Path) -> None:
    draw_raw(tmp_path / "golden.img", "ABCD")
    _lend(tmp_path, "top.add-cow")
    disk = disk_of("top.add-cow", cwd=tmp_path)
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    with running(source, disk, "", "-S") as (_, qemu):
        _migrate_away(qemu, f"exec:cat >{source}/state")
    with running(target, disk, "", "-incoming", "defer") as (machine, qemu):
        # It holds no lock until the migration ends.
        succeed("qemu", "import", "top.add-cow", cwd=tmp_path)
        before = _files(tmp_path)
        qemu.execute("migrate-incoming", uri=f"exec:cat {source}/state")
        until(lambda: qemu.execute("query-status")["status"] != "inmigrate", "the migration to end")
        # QEMU takes the disk out of the machine, which can then go on without it.
        machine.wait_for("run 'addcow qemu import'")
        qemu.execute("cont")
        qemu.execute("human-monitor-command", command_line='qemu-io addcow0 "write 0 64k"')
        machine.wait_for("No medium found")
        assert _files(tmp_path) == before


CHANGING = (
    *("commit", "commit --force", "commit -d", "flatten", "flatten --force --discard"),
    *("check -r all", "check -r leaks --force", "io -c 'write 0 4k'", "io --force -c 'write 0 4k'"),
    *("manifest create", "farm commit", "farm flatten --force"),
    *("qemu import", "qemu import --adopt", "qemu import --discard", "qemu export"),
    *("qemu import --abandon --force", "serve --socket s", "create x.add-cow -F add-cow -b"),
)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "words",
    [
        *(f"{words} top.add-cow" for words in CHANGING),
        *("create --force x.add-cow -F raw -b top.raw", "convert -O raw top.add-cow x.raw"),
        # a layer below it, and the golden image
        *("flatten middle.add-cow", "commit middle.add-cow", "check -r all middle.add-cow"),
        *("io -c 'write 0 4k' middle.add-cow", "qemu import middle.add-cow"),
        *("qemu export middle.add-cow", "commit second.add-cow", "commit --force second.add-cow"),
        *("commit other.add-cow", "commit --force other.add-cow"),
    ],
)
def test_command_that_would_change_what_a_machine_uses_is_refused_and_names_it(
    held: tuple[Path, int], words: str
) -> None:
    here, pid = held
    before = snapshot(here)
    result = addcow(*shlex.split(words), cwd=here)
    assert result.status == 1
    assert f"qemu-system-x86 (pid {pid})" in result.stderr, result
    assert snapshot(here) == before
