"""Tests of file systems without locks, and of `--locking off`.

A seccomp filter makes the kernel refuse locks. QEMU's tools are the other program that uses a
file.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from support.command import addcow, draw, draw_raw, picture, refused, succeed
from support.guests import holding
from support.seccomp import refusing
from support.seccomp_filter import F_GETLK, F_OFD_GETLK, F_OFD_SETLK, F_SETLK

pytestmark = pytest.mark.sample(1)

ERRORS = ("ENOLCK", "ENOSYS", "EOPNOTSUPP", "EINVAL")
OFF = ("--locking", "off")

TAKING, TESTING = F_OFD_SETLK, F_OFD_GETLK


def without_locks(error: str, *commands: int) -> list[str]:
    """Return the rules of a file system whose image locks are answered with ``error``."""
    return [f"fcntl/1={one}:{error}" for one in commands or (TAKING, TESTING)]


def without_any(error: str) -> list[str]:
    """Return the same for all kinds of locks that there are."""
    kinds = without_locks(error, TAKING, TESTING, F_SETLK, F_GETLK)
    return [*kinds, f"flock:{error}"]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory with a chain, and a second overlay for the farm."""
    draw_raw(tmp_path / "base.img", "ABCD")
    draw(tmp_path / "vm.add-cow", "-X--", "base.img")
    draw_raw(tmp_path / "other.img", "EFGH")
    draw(tmp_path / "other.add-cow", "Y---", "other.img")
    return tmp_path


#: Every command that opens images, and the exit status without locks.
COMMANDS = [
    ("create -b base.img -F raw new.add-cow", 1),
    ("info vm.add-cow", 1),
    ("info --backing-chain vm.add-cow", 1),
    ("map vm.add-cow", 1),
    ("check vm.add-cow", 1),
    ("check -r all vm.add-cow", 1),
    ("verify vm.add-cow", 1),
    ("convert -O raw vm.add-cow new.raw", 1),
    ("compare vm.add-cow other.add-cow", 2),
    ("commit vm.add-cow", 1),
    ("commit -d vm.add-cow", 1),
    ("flatten vm.add-cow", 1),
    ("io -c flush vm.add-cow", 1),
    ("io -r -c flush vm.add-cow", 1),
    ("manifest create vm.add-cow", 1),
    ("farm ls .", 0),
    ("farm check .", 1),
    ("farm verify .", 1),
    ("farm plan commit .", 1),
    ("farm commit .", 1),
    ("farm flatten --jobs 2 .", 1),
    ("farm scrub run --state scrub.db .", 1),
]


@pytest.mark.parametrize(("words", "status"), COMMANDS)
def test_command_without_locks_names_the_file_and_the_option(
    here: Path, words: str, status: int
) -> None:
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    result = refusing(without_locks("ENOLCK"), *words.split(), cwd=here)
    assert result.status == status, result
    told = [line for line in result.said.splitlines() if os.strerror(errno.ENOLCK) in line]
    assert told, result
    assert all("--locking off" in line for line in told)
    assert all(".add-cow" in line or ".img" in line or ".raw" in line for line in told)
    after = {name: (here / name).read_bytes() for name in before}
    assert after == before
    assert set(os.listdir(here)) <= {*before, "scrub.db"}


@pytest.mark.parametrize("words", [words for words, _ in COMMANDS])
def test_locking_off_does_the_same_as_with_locks(here: Path, words: str) -> None:
    for manifest in ("vm.add-cow", "other.add-cow"):
        if "verify" in words or "scrub" in words:
            succeed("manifest", "create", manifest, cwd=here)
    result = refusing(without_any("ENOLCK"), *words.split(), *OFF, cwd=here)
    assert result.status == (1 if words.startswith("compare") else 0), result


@pytest.mark.parametrize("error", [*ERRORS, "EPERM"])
@pytest.mark.parametrize(
    ("words", "call"),
    [("flatten vm.add-cow", TAKING), ("flatten vm.add-cow", TESTING), ("farm check .", TESTING)],
)
def test_every_errno_that_means_no_locks_is_recognized(
    here: Path, error: str, call: int, words: str
) -> None:
    result = refusing(without_locks(error, call), *words.split(), cwd=here)
    assert result.status == 1, result
    assert f"cannot lock it: {os.strerror(getattr(errno, error))}; " in result.said
    assert "--locking off" in result.said


@pytest.mark.parametrize("error", ["EIO", "ESTALE"])
def test_other_lock_errors_are_reported_as_errors(here: Path, error: str) -> None:
    result = refusing(without_locks(error), "flatten", "vm.add-cow", cwd=here)
    assert result.status == 1
    assert "vm.add-cow: cannot lock it: " in result.stderr
    assert "--locking" not in result.stderr


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    "words", ["info", "map", "check", "compare other.add-cow", "io -r -c flush"]
)
def test_force_share_reads_without_locks(here: Path, error: str, words: str) -> None:
    result = refusing(without_locks(error), *words.split(), "-U", "vm.add-cow", cwd=here)
    assert result.status == (1 if words.startswith("compare") else 0), result
    assert "lock" not in result.said


def test_force_share_takes_its_lock_where_it_can(here: Path) -> None:
    done = refusing(without_locks("ENOLCK", TESTING), "info", "-U", "vm.add-cow", cwd=here)
    assert done.status == 0


@pytest.mark.parametrize("jobs", ["0", "2"])
def test_commit_with_locking_off_warns_and_succeeds(here: Path, jobs: str) -> None:
    result = refusing(without_any("ENOSYS"), "commit", "--jobs", jobs, *OFF, "vm.add-cow", cwd=here)
    assert result.status == 0, result
    (line,) = result.stderr.splitlines()
    assert line.startswith("addcow: warning: --locking off: ")
    assert picture((here / "base.img").read_bytes()) == "AXCD"


@pytest.mark.long
def test_reading_commands_with_locking_off_do_not_warn(here: Path) -> None:
    for words in ("info vm.add-cow", "check vm.add-cow", "farm plan flatten .", "farm check ."):
        assert succeed(*words.split(), *OFF, cwd=here).stderr == ""


@pytest.mark.long
def test_locking_off_ignores_the_locks_of_others(here: Path) -> None:
    with holding("writer", here, "vm.raw"):
        assert "in use" in refused("flatten", "vm.add-cow", cwd=here)
        assert "in use" in addcow("farm", "check", ".", cwd=here).said
        succeed("farm", "check", *OFF, ".", cwd=here)
        succeed("flatten", *OFF, "vm.add-cow", cwd=here)


def test_invalid_value_of_locking_is_refused(here: Path) -> None:
    assert "'on', 'off'" in refused("info", "--locking", "no", "vm.add-cow", cwd=here, status=64)


def test_farm_without_locks_refuses_each_image(here: Path) -> None:
    result = refusing(without_locks("EINVAL"), "farm", "flatten", "--output", "json", ".", cwd=here)
    images = json.loads(result.stdout)["images"]
    assert [one["state"] for one in images] == ["refused", "refused"]
    assert all("--locking off" in one["problem"] for one in images)


@pytest.mark.long
def test_manifest_create_without_flock(here: Path) -> None:
    result = refusing(["flock:ENOLCK"], "manifest", "create", "vm.add-cow", cwd=here)
    assert result.status == 1
    (line,) = result.stderr.splitlines()
    assert "base.img.manifest: cannot lock it: No locks available; " in line
    assert "--locking off" in line
    assert not list(here.glob("*.manifest*.part.*"))
    done = refusing(["flock:ENOLCK"], "manifest", "create", *OFF, "vm.add-cow", cwd=here)
    assert done.status == 0
    succeed("verify", "vm.add-cow", cwd=here)


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "error"),
    [("run --state scrub.db .", "ENOLCK"), ("status --state scrub.db", "EINVAL")],
)
def test_scrub_without_locks_for_its_database(here: Path, words: str, error: str) -> None:
    succeed("manifest", "create", "vm.add-cow", cwd=here)
    succeed("manifest", "create", "other.add-cow", cwd=here)
    succeed("farm", "scrub", "run", "--state", "scrub.db", ".", cwd=here)
    rules = without_locks(error, F_SETLK, F_GETLK)
    result = refusing(rules, "farm", "scrub", *words.split(), cwd=here)
    assert result.status == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("addcow: scrub.db: cannot lock it: ")
    assert "--locking off" in line
    done = refusing(without_any(error), "farm", "scrub", *words.split(), *OFF, cwd=here)
    assert done.status == 0, done
