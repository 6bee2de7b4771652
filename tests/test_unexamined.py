"""Tests of files and directories that cannot be examined.

They are in every list with the reason, and everything else is done. Commands run without root's
right to read everything. Excluded files are not examined. Jobs that change a base are refused
where an unexamined file may be a dependant.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.command import (
    PATIENCE,
    Result,
    addcow,
    bits,
    draw,
    draw_raw,
    guest_picture,
    look,
    put,
    ran,
    refused,
    succeed,
)
from support.file_systems import nest, unnest

pytestmark = pytest.mark.sample(1)

NOBODY = 65534
DENIED, DEAD = "Permission denied", "not connected"


def bound(*words: str, cwd: Path) -> Result:
    """Run addcow so that permissions hold for root too."""
    less: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            if os.environ.get("CI") == "true":
                pytest.fail("setpriv is not installed")
            pytest.skip("setpriv is not installed, and root reads everything")
        less = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    done = ran([*less, sys.executable, "-m", "addcow_mp", *words], cwd=cwd)
    assert "Traceback" not in done.stderr, done.stderr
    return Result(done.returncode, done.stdout, done.stderr)


def hide(path: Path, mode: int) -> None:
    """Give ``path`` to another user, or where that cannot be done take its rights away."""
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
        path.chmod(mode)
    else:
        path.chmod(mode & 0o044)


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Path]:
    """Two overlays of a base each, in directories of their own."""
    here = tmp_path / "farm"
    for name in ("one", "two"):
        (here / name).mkdir(parents=True)
        draw_raw(here / name / "base.img", "ABCD")
        draw(here / name / "top.add-cow", "X---")
    yield here
    for path in here.glob("*/"):
        if path.is_dir() and not path.is_symlink() and not os.path.ismount(path):
            path.chmod(0o755)


# ---- what cannot be looked at ----


def lock(here: Path, _: Callable[[Path], None]) -> str:
    (here / "lost+found").mkdir()
    draw(here / "lost+found" / "x.add-cow", "X---")
    hide(here / "lost+found", 0o700)
    return "lost+found"


def list_only(here: Path, _: Callable[[Path], None]) -> str:
    (here / "theirs").mkdir()
    draw(here / "theirs" / "x.add-cow", "X---")
    hide(here / "theirs", 0o744)
    return "theirs/x.add-cow"


def list_only_below(here: Path, _: Callable[[Path], None]) -> str:
    (here / "theirs" / "deep").mkdir(parents=True)
    hide(here / "theirs", 0o744)
    return "theirs/deep"


def lock_file(here: Path, _: Callable[[Path], None]) -> str:
    draw(here / "theirs.add-cow", "X---")
    hide(here / "theirs.add-cow", 0o600)
    return "theirs.add-cow"


def let_mount_die(here: Path, kill_mount: Callable[[Path], None]) -> str:
    (here / "mount").mkdir()
    kill_mount(here / "mount")
    return "mount"


@pytest.fixture
def kill_mount(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Mounts mergerfs at a directory, and kills it."""
    mounted: list[Path] = []

    def mount(place: Path) -> None:
        if os.geteuid() != 0 or shutil.which("mergerfs") is None:
            if os.environ.get("CI") == "true":
                pytest.fail("mergerfs and root are needed")
            pytest.skip("mergerfs is not installed, or may not mount")
        (tmp_path / "branch").mkdir()
        server = subprocess.Popen(["mergerfs", "-f", str(tmp_path / "branch"), str(place)])
        end = time.monotonic() + PATIENCE
        while not os.path.ismount(place) and server.poll() is None and time.monotonic() < end:
            os.sched_yield()
        if not os.path.ismount(place):
            pytest.skip("mergerfs could not be mounted")
        mounted.append(place)
        assert os.listdir(place) == []  # it has begun to serve
        server.kill()
        server.wait()
        with pytest.raises(OSError, match=DEAD):
            os.stat(place)

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


KINDS: dict[str, tuple[Callable[[Path, Callable[[Path], None]], str], str]] = {
    "a directory of another owner": (lock, DENIED),
    "a file in a directory that can only be listed": (list_only, DENIED),
    "a directory in one that can only be listed": (list_only_below, DENIED),
    "a file of another owner": (lock_file, DENIED),
    "a dead mount": (let_mount_die, DEAD),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)

LISTS = ("human", "json", "jsonl")
#: In this order: the last ones take manifests away.
COMMANDS = {
    "ls": LISTS,
    "graph": (*LISTS, "dot", "svg"),
    "check": LISTS,
    "verify": LISTS,
    "scrub run --state ../state": ("human", "json"),
    "plan flatten": LISTS,
    "plan commit": LISTS,
    "commit --force": LISTS,
    "flatten --force": LISTS,
}


@EVERY_KIND
def test_unexamined_file_is_in_every_list_with_its_reason(
    farm: Path, kind: str, kill_mount: Callable[[Path], None]
) -> None:
    make, reason = KINDS[kind]
    hidden = make(farm, kill_mount)
    for name in ("one", "two"):
        succeed("manifest", "create", "-q", f"{name}/top.add-cow", cwd=farm)
    for command, forms in COMMANDS.items():
        for form in forms:
            told = bound("farm", *command.split(), "--output", form, ".", cwd=farm)
            assert told.status == 1, (command, form, told)
            lines = told.said if form == "human" else told.stdout
            assert f"./{hidden}" in lines or str(farm / hidden) in lines, (command, form, told)
            assert reason in lines, (command, form, told)
            if form != "human":  # for people, what is sound is no line of a check
                assert "one/top" in lines
                assert "two/top" in lines
    assert bits(farm / "one" / "top.add-cow") == "1111"
    assert guest_picture(farm / "two" / "top.add-cow") == "XBCD"


@EVERY_KIND
def test_excluded_file_is_in_no_list(
    farm: Path, kind: str, kill_mount: Callable[[Path], None]
) -> None:
    hidden = KINDS[kind][0](farm, kill_mount)
    for name in ("one", "two"):
        succeed("manifest", "create", "-q", f"{name}/top.add-cow", cwd=farm)
    words = ("--exclude", "nothing", "--exclude", hidden.partition("/")[0])
    for command, forms in COMMANDS.items():
        told = bound("farm", *command.split(), "--output", forms[1], *words, ".", cwd=farm)
        assert told.status == 0, (command, told)
        assert hidden not in told.said, (command, told)


def test_unreadable_directory_is_reported_and_the_others_are_done(farm: Path) -> None:
    lock(farm, lambda _: None)
    told = bound("farm", "flatten", "two", "lost+found", "one", cwd=farm)
    assert told.status == 1
    assert "not-examined: lost+found: Permission denied" in told.stderr
    assert told.lines[-1].endswith("2 done, 1 not examined")


def test_dead_mount_given_as_directory_is_reported(
    farm: Path, kill_mount: Callable[[Path], None]
) -> None:
    let_mount_die(farm, kill_mount)
    told = addcow("farm", "ls", "mount", "one", cwd=farm)
    assert told.status == 1
    assert DEAD in told.stdout
    assert "one/top.add-cow" in told.stdout


def test_corruption_outranks_an_unexamined_file(farm: Path) -> None:
    lock(farm, lambda _: None)
    put(farm / "one" / "top.add-cow", 64 * 1024, b"\xff")
    assert bound("farm", "check", ".", cwd=farm).status == 2
    assert bound("farm", "check", "--exclude", "one", ".", cwd=farm).status == 1


@pytest.mark.long
def test_difference_outranks_an_unexamined_file(farm: Path) -> None:
    lock(farm, lambda _: None)
    succeed("manifest", "create", "-q", "one/top.add-cow", cwd=farm)
    base = farm / "one" / "base.img"
    times = base.stat()
    put(base, 0, b"?")
    os.utime(base, ns=(times.st_atime_ns, times.st_mtime_ns))
    words = ("--exclude", "two", ".")
    assert bound("farm", "scrub", "run", "--state", "../s", *words, cwd=farm).status == 2


def test_farm_check_counts_unexamined_files(farm: Path) -> None:
    lock(farm, lambda _: None)
    document = bound("farm", "check", "--output", "json", ".", cwd=farm).json
    assert document["summary"]["images"] == 2
    assert document["summary"]["unexamined"] == 1
    (one,) = (one for one in document["images"] if one["exit"])
    assert (one["filename"], one["exit"]) == ("./lost+found", 1)
    assert one["findings"] == [
        {"name": "not-examined", "severity": "check-error", "message": DENIED}
    ]


def test_farm_log_has_unexamined_files(farm: Path) -> None:
    lock(farm, lambda _: None)
    bound("farm", "flatten", "--log", "../log", ".", cwd=farm)
    events = [json.loads(line) for line in (farm.parent / "log").read_text().splitlines()]
    (event,) = (one for one in events if one["event"] == "not-examined")
    assert (event["filename"], event["problem"]) == ("./lost+found", DENIED)


@pytest.mark.long
def test_directory_with_a_path_too_long_is_reported(farm: Path) -> None:
    nest(farm, 2100)
    try:
        told = addcow("farm", "ls", "--output", "json", ".", cwd=farm)
    finally:
        unnest(farm)
    (one,) = (one for one in told.json["images"] if one["state"] == "not-examined")
    assert (told.status, len(told.json["images"])) == (1, 3)
    assert one["filename"].startswith("./d/d/d/")
    assert one["problem"] == "File name too long"


def test_unreadable_backing_is_not_called_missing(farm: Path) -> None:
    (farm / "theirs").mkdir()
    draw_raw(farm / "theirs" / "base.img", "ABCD")
    draw(farm / "one" / "top.add-cow", "X---", str(farm / "theirs" / "base.img"))
    hide(farm / "theirs", 0o700)
    told = bound("farm", "ls", "--output", "json", "one", cwd=farm)
    (one,) = told.json["images"]
    assert (told.status, one["state"]) == (1, "unexamined")
    assert DENIED in one["problem"]


# ---- places that are not there ----


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_directory_is_reported_and_the_others_are_done(farm: Path, command: str) -> None:
    told = addcow("farm", *command.split(), "nowhere", "no*where", "one", cwd=farm)
    assert told.status == 1
    for place in ("nowhere", "no*where"):
        assert place in told.said
    assert "no such file or directory" in told.said
    assert "one/top.add-cow" in told.said or "1 clean" in told.said


def test_only_missing_directories_cost_one_line(farm: Path) -> None:
    line = refused("farm", "ls", "nowhere", "no*where", cwd=farm)
    assert "nowhere: no such file or directory, and 1 more" in line


@pytest.mark.long
def test_pattern_reports_directories_that_it_could_not_read(farm: Path) -> None:
    lock(farm, lambda _: None)
    for pattern in ("lost+found/*.add-cow", "*/*.add-cow", "**/*.add-cow", "l*/x.add-cow"):
        told = bound("farm", "ls", pattern, "one", cwd=farm)
        assert told.status == 1, pattern
        assert "lost+found" in told.stdout
        assert DENIED in told.stdout


@pytest.mark.long
def test_patterns_match_as_in_a_shell(farm: Path) -> None:
    (farm / ".hidden").mkdir()
    draw(farm / ".hidden" / "top.add-cow", "----", "../one/base.img")
    for pattern, names in {
        "*/top.add-cow": ["one/top.add-cow", "two/top.add-cow"],
        "o??/*.add-cow": ["one/top.add-cow"],
        "[t]wo": ["two/top.add-cow"],
        "**/top.add-cow": ["one/top.add-cow", "two/top.add-cow"],
        ".h*/*": [".hidden/top.add-cow"],
        f"{farm}/t*/top.*cow": [f"{farm}/two/top.add-cow"],
    }.items():
        told = addcow("farm", "ls", "--output", "json", "--root", ".", pattern, cwd=farm).json
        assert [one["filename"] for one in told["images"]] == names, pattern


# ---- the graph ----


def kinds(document: dict[str, Any]) -> dict[str, str]:
    return {one["filename"]: one["kind"] for one in document["files"]}


@EVERY_KIND
def test_no_file_is_unnamed_while_a_file_is_unexamined(
    farm: Path, kind: str, kill_mount: Callable[[Path], None]
) -> None:
    hidden = KINDS[kind][0](farm, kill_mount)
    (farm / "stray.img").write_bytes(b"x")
    told = bound("farm", "graph", "--output", "json", ".", cwd=farm)
    assert kinds(told.json)["./stray.img"] == "not-examined"
    assert kinds(told.json)[f"./{hidden}"] == "not-examined"
    assert '"unnamed": 0' in told.stdout
    words = ("--exclude", hidden.partition("/")[0], ".")
    told = bound("farm", "graph", "--output", "json", *words, cwd=farm)
    assert (told.status, kinds(told.json)["./stray.img"]) == (0, "unnamed")


def test_no_file_is_unnamed_while_an_outside_overlay_is_unexamined(farm: Path) -> None:
    (farm / "stray.img").write_bytes(b"x")
    draw(farm.parent / "outside.add-cow", "----", "farm/stray.img")
    draw(farm / "top.add-cow", "----", "../outside.add-cow", backing_format="add-cow")
    told = addcow("farm", "graph", "--output", "json", ".", cwd=farm)
    assert kinds(told.json)["./stray.img"] == "not-examined"
    told = addcow("farm", "graph", "--output", "json", "--root", "..", ".", cwd=farm)
    found = {Path(name).name: kind for name, kind in kinds(told.json).items()}
    assert found["stray.img"] == "backing"


# ---- what is excluded ----

PATTERNS = {
    "deep": {"a", "b"},
    "deep/": {"a", "b"},
    "d*": {"a", "b"},
    "a.add-cow": {"b", "c"},
    "a.add-cow/": {"a", "b", "c"},
    "?.add-cow": set(),
    "deep/c.add-cow": {"a", "b"},
    "other/c.add-cow": {"a", "b", "c"},
    "./deep": {"a", "b"},
    "./c.add-cow": {"a", "b", "c"},
    "{here}/deep": {"a", "b"},
    "{here}/*": set(),
    "{link}/deep/": {"a", "b"},
    "*/deep/*": {"a", "b"},
    "[ab].add-cow": {"c"},
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_exclude_patterns_match_names_and_paths(tmp_path: Path, pattern: str) -> None:
    here, link = tmp_path / "farm", tmp_path / "link"
    (here / "deep").mkdir(parents=True)
    link.symlink_to(here)
    for name in ("a", "b", "deep/c"):
        draw_raw(here / f"{name}.img", "ABCD")
        draw(here / f"{name}.add-cow", "X---", f"{Path(name).name}.img")
    words = ("--exclude", pattern.format(here=here, link=link))
    for place in (".", str(here), str(link)):
        told = addcow("farm", "ls", "--output", "json", *words, place, cwd=here)
        found = {Path(one["filename"]).stem for one in told.json["images"]}
        assert found == PATTERNS[pattern], place


def test_exclude_applies_to_given_directories_by_name(farm: Path) -> None:
    """A shell's pattern has named them."""
    told = succeed("farm", "ls", "--output", "json", "--exclude", "two", "one", "two/", cwd=farm)
    assert [one["filename"] for one in told.json["images"]] == ["one/top.add-cow"]
    assert len(succeed("farm", "ls", "--exclude", "farm", ".", cwd=farm).lines) == 3


def test_exclude_pattern_may_have_any_bytes(farm: Path) -> None:
    name = os.fsdecode(b"\xff:x.add-cow")
    draw(farm / "one" / name, "X---")
    assert succeed("farm", "ls", "--exclude", name, "one", cwd=farm).stdout.count("add-cow") == 1
    assert succeed("farm", "ls", "--exclude", "*:*", "one", cwd=farm).stdout.count("add-cow") == 1


def test_empty_exclude_pattern_is_a_usage_error(farm: Path) -> None:
    assert "--exclude" in refused("farm", "ls", "--exclude", "", ".", cwd=farm, status=64)


# ---- dependants ----


def test_commit_is_refused_while_a_directory_beneath_a_root_is_unreadable(farm: Path) -> None:
    lock(farm, lambda _: None)
    told = bound("farm", "commit", ".", cwd=farm)
    assert told.status == 1
    assert told.stderr.count("lost+found: overlays cannot be looked for there") == 2
    assert "--exclude" in told.stderr
    assert look(farm / "one" / "base.img") == "ABCD"
    assert bound("farm", "commit", "--exclude", "lost+found", ".", cwd=farm).status == 0
    assert look(farm / "one" / "base.img") == "XBCD"


def test_flatten_is_done_while_a_directory_beneath_a_root_is_unreadable(farm: Path) -> None:
    lock(farm, lambda _: None)
    told = bound("farm", "flatten", "--discard", ".", cwd=farm)
    assert "refused" in told.stderr
    told = bound("farm", "flatten", ".", cwd=farm)
    assert (told.status, bits(farm / "one" / "top.add-cow")) == (1, "1111")
    assert "refused" not in told.said


@pytest.mark.parametrize("job", ["commit", "flatten"])
def test_unreadable_file_refuses_only_images_of_its_directory(farm: Path, job: str) -> None:
    """Their files can be opened by name, and other names there cannot be seen."""
    hide(farm / "one", 0o711)
    if os.geteuid() != 0:
        (farm / "one").chmod(0o311)
    words = ("one/top.add-cow", "two/top.add-cow")
    told = bound("farm", job, *words, cwd=farm)
    assert told.status == 1
    assert told.stderr.count("refused") == 1
    assert f"{farm / 'one'}: overlays cannot be looked for there" in told.stderr
    assert guest_picture(farm / "two" / "top.add-cow") == "XBCD"
    assert bits(farm / "two" / "top.add-cow") == ("...." if job == "commit" else "1111")
    assert bits(farm / "one" / "top.add-cow") == "1..."


def test_job_of_one_image_checks_for_unreadable_files(farm: Path) -> None:
    lock(farm, lambda _: None)
    words = ("--root", ".", "one/top.add-cow")
    told = bound("commit", *words, cwd=farm)
    assert (told.status, told.stderr.count("\n")) == (1, 1)
    assert "lost+found: overlays cannot be looked for there" in told.stderr
    assert look(farm / "one" / "base.img") == "ABCD"
    assert bound("commit", "--exclude", "lost+found", *words, cwd=farm).status == 0
    assert look(farm / "one" / "base.img") == "XBCD"
    assert bound("flatten", "--root", ".", "two/top.add-cow", cwd=farm).status == 0
    assert bound("commit", "--force", "--root", ".", "two/top.add-cow", cwd=farm).status == 0


@pytest.mark.long
def test_dead_mount_beneath_a_root_refuses_a_commit(
    farm: Path, kill_mount: Callable[[Path], None]
) -> None:
    let_mount_die(farm, kill_mount)
    assert DEAD in refused("commit", "--root", ".", "one/top.add-cow", cwd=farm)
    succeed("commit", "--root", ".", "--exclude", "mount/", "one/top.add-cow", cwd=farm)


# ---- why a list is empty ----


def test_named_file_that_is_no_overlay_is_reported(farm: Path) -> None:
    (farm / "q.qcow2").write_bytes(b"QFI\xfb\0\0\0\3" + bytes(5000))
    for command in ("ls", "check", "plan flatten", "flatten", "commit"):
        told = addcow("farm", *command.split(), "q.qcow2", cwd=farm)
        assert (told.status, told.stderr) == (1, "addcow: q.qcow2: not an add-cow file\n"), command
    told = addcow("farm", "ls", "q.qcow2", "one/top.add-cow", cwd=farm)
    assert (told.status, told.stderr) == (0, "addcow: q.qcow2: not an add-cow file\n")


def test_many_named_files_that_are_no_overlays_are_one_line(farm: Path) -> None:
    names = [f"{number}.img" for number in range(9)]
    for name in names:
        (farm / name).write_bytes(b"x")
    told = addcow("farm", "ls", *names, "one", cwd=farm)
    line = "addcow: 0.img, 1.img, 2.img and 6 more: not add-cow files\n"
    assert (told.status, told.stderr) == (0, line)


@pytest.mark.parametrize("links", [0, 1, 2])
@pytest.mark.parametrize("command", ["ls", "graph", "check", "verify", "plan commit", "flatten"])
def test_directory_without_overlays_is_reported(farm: Path, command: str, links: int) -> None:
    (farm / "none").mkdir()
    for number in range(links):
        (farm / "none" / f"link-{number}").symlink_to(farm / "one")
    told = addcow("farm", *command.split(), "none", cwd=farm)
    assert told.status == 0
    line = told.stderr.rstrip("\n")
    assert line.startswith("addcow: none: no add-cow overlay there")
    assert line.endswith(
        {
            0: "there",
            1: "1 symbolic link to a directory is not followed",
            2: "2 symbolic links to directories are not followed",
        }[links]
    )


def test_empty_directory_is_not_reported_beside_a_list(farm: Path) -> None:
    (farm / "none").mkdir()
    assert succeed("farm", "ls", "none", "one", cwd=farm).stderr == ""
    assert succeed("farm", "check", "-q", "none", cwd=farm).said == ""


# ---- what a scrub remembers ----


@pytest.mark.long
def test_unreadable_layer_is_not_counted_as_gone(farm: Path) -> None:
    words = ("farm", "scrub", "run", "--state", "../state", ".")
    for name in ("one", "two"):
        succeed("manifest", "create", "-q", f"{name}/top.add-cow", cwd=farm)
    assert bound(*words, cwd=farm).status == 0
    hide(farm / "one", 0o700)
    assert bound(*words, cwd=farm).status == 1
    status = ("farm", "scrub", "status", "--state", "../state", "--output", "json")
    assert succeed(*status, cwd=farm).json["coverage"]["gone"] == 0


@pytest.mark.long
def test_link_cycle_leads_to_no_file(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "A")
    draw(tmp_path / "top.add-cow", "X", "base.img")
    (tmp_path / "round").symlink_to("round")
    for words in (("ls",), ("check",), ("graph",), ("plan", "flatten")):
        assert "round" not in succeed("farm", *words, ".", cwd=tmp_path).said
