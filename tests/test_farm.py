"""Tests of `addcow farm ls` and `farm check` on farms made by hand.

The farms have hard links, misleading suffixes, missing files, damaged headers and cycles.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from support.command import (
    CLUSTER,
    addcow,
    draw,
    draw_raw,
    overlay_bytes,
    put,
    refused,
    snapshot,
    succeed,
)

pytestmark = pytest.mark.sample(1)


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    """A base, two overlays over it, and one over an overlay, in a directory of its own."""
    here = tmp_path / "farm"
    (here / "deep" / "deeper").mkdir(parents=True)
    draw_raw(here / "base.img", "ABCD")
    draw(here / "one.add-cow", "X---", "base.img")
    draw(here / "two.add-cow", "XY--", "base.img")
    deep = here / "deep" / "deeper" / "three.add-cow"
    draw(deep, "----", "../../two.add-cow", backing_format="add-cow")
    return here


def images(*words: str, cwd: Path) -> dict[str, dict[str, Any]]:
    listed = succeed("farm", "ls", "--output", "json", *words, cwd=cwd).json["images"]
    names = [one["filename"] for one in listed]
    assert len(names) == len(set(names))
    return {one["filename"]: one for one in listed}


def test_farm_ls_lists_every_overlay_with_its_backing(farm: Path) -> None:
    before = snapshot(farm)
    found = images(".", cwd=farm)
    assert {name: (one["depth"], one["state"]) for name, one in found.items()} == {
        "./one.add-cow": (0, "overlay"),
        "./two.add-cow": (0, "overlay"),
        "./deep/deeper/three.add-cow": (1, "overlay"),
    }
    assert found["./two.add-cow"] == {
        "filename": "./two.add-cow",
        "backing-filename": "base.img",
        "full-backing-filename": "./base.img",
        "depth": 0,
        "virtual-size": 4 * CLUSTER,
        "local-size": 2 * CLUSTER,
        "percent-local": 50.0,
        "state": "overlay",
    }
    assert snapshot(farm) == before


def test_farm_ls_finds_overlays_by_content(farm: Path) -> None:
    (farm / "one.add-cow").rename(farm / "one.txt")
    (farm / "base.add-cow").write_bytes(b"not one")
    assert set(images(".", cwd=farm)) == {
        "./one.txt",
        "./two.add-cow",
        "./deep/deeper/three.add-cow",
    }


def test_farm_ls_lists_a_hard_linked_overlay_once(farm: Path) -> None:
    os.link(farm / "one.add-cow", farm / "also.add-cow")
    (farm / "link.add-cow").symlink_to("one.add-cow")
    assert set(images(".", "two.add-cow", str(farm), cwd=farm)) == {
        "./also.add-cow",
        "./two.add-cow",
        "./deep/deeper/three.add-cow",
    }


@pytest.mark.parametrize("words", [("*.add-cow",), ("one.add-cow", "two.add-cow")])
def test_farm_accepts_files_and_patterns(farm: Path, words: tuple[str, ...]) -> None:
    assert set(images(*words, cwd=farm)) == {"one.add-cow", "two.add-cow"}


def test_farm_reads_names_from_a_file_or_stdin(farm: Path) -> None:
    (farm / "list").write_text("one.add-cow\ntwo.add-cow\n")
    assert set(images("--from-file", "list", cwd=farm)) == {"one.add-cow", "two.add-cow"}
    words = ("farm", "ls", "--output", "jsonl", "--from-file", "-", "two.add-cow")
    result = addcow(*words, cwd=farm, stdin="one.add-cow\n")
    lines = [json.loads(line)["filename"] for line in result.stdout.splitlines()]
    assert (result.status, lines) == (0, ["one.add-cow", "two.add-cow"])


def bite_tail(here: Path) -> None:
    draw(here / "bad.add-cow", "X---", "tail.add-cow", backing_format="add-cow")
    draw(here / "tail.add-cow", "X---", "bad.add-cow", backing_format="add-cow")


def lose_backing(here: Path) -> None:
    draw(here / "bad.add-cow", "X---", "nowhere.img")


def lose_image(here: Path) -> None:
    draw(here / "bad.add-cow", "X---", "base.img")
    (here / "bad.raw").unlink()


def damage(here: Path) -> None:
    draw(here / "bad.add-cow", "X---", "base.img")
    put(here / "bad.add-cow", 24, b"\xff")


def lead_out(here: Path) -> None:
    draw_raw(here.parent / "outside.raw", "A")
    content = overlay_bytes(image="../outside.raw", size=CLUSTER, backing="base.img")
    (here / "bad.add-cow").write_bytes(content)


def stand_alone(here: Path) -> None:
    draw_raw(here / "bad.raw", "ABCD")
    (here / "bad.add-cow").write_bytes(overlay_bytes(image="bad.raw", size=4 * CLUSTER))


STATES = {
    "cycle": bite_tail,
    "missing-backing": lose_backing,
    "missing-image": lose_image,
    "damaged": damage,
    "unexamined": lead_out,
    "standalone": stand_alone,
}


@pytest.mark.parametrize("state", STATES)
def test_farm_ls_shows_the_problem_of_an_overlay(farm: Path, state: str) -> None:
    STATES[state](farm)
    found = images(".", cwd=farm)
    assert found["./bad.add-cow"]["state"] == state
    known = state in ("cycle", "missing-backing", "standalone")
    assert ("problem" in found["./bad.add-cow"]) != known
    assert found["./one.add-cow"]["state"] == "overlay"
    table = succeed("farm", "ls", ".", cwd=farm).stdout
    (line,) = (line for line in table.splitlines() if "  ./bad.add-cow" in line and state in line)
    assert known != line.lstrip().startswith("?")


def test_farm_ls_examines_outside_files_with_root(farm: Path) -> None:
    lead_out(farm)
    assert images("--root", "..", ".", cwd=farm)["./bad.add-cow"]["state"] == "overlay"


KEYS = {
    "name": ["deep/deeper/three", "one", "two"],
    "local": ["deep/deeper/three", "one", "two"],
    "percent": ["deep/deeper/three", "one", "two"],
    "depth": ["one", "two", "deep/deeper/three"],
}


@pytest.mark.parametrize("key", KEYS)
def test_farm_ls_sorts(farm: Path, key: str) -> None:
    lose_image(farm)
    wanted = [f"./{name}.add-cow" for name in KEYS[key]]
    there = [name for name in images(".", "--sort", key, cwd=farm) if "bad" not in name]
    assert there == wanted
    back = list(images(".", "--sort", key, "--reverse", cwd=farm))
    if key in ("local", "percent"):  # of the bad one that is not known
        assert back == [*reversed(wanted), "./bad.add-cow"]


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        ((), 64, "name at least one directory or file"),
        (("nowhere",), 1, "nowhere: no such file or directory"),
        (("*.nothing",), 1, "*.nothing: no such file or directory"),
        (("--from-file", "nowhere"), 1, "nowhere: No such file or directory"),
        (("--sort", "colour", "."), 64, "--sort"),
    ],
)
def test_farm_ls_reports_a_directory_that_it_cannot_list(
    farm: Path, words: tuple[str, ...], status: int, told: str
) -> None:
    assert told in refused("farm", "ls", *words, cwd=farm, status=status)


def test_farm_ls_of_an_empty_farm_is_empty(tmp_path: Path) -> None:
    assert images(".", cwd=tmp_path) == {}


def test_file_name_cannot_forge_a_line_of_farm_ls(farm: Path) -> None:
    (farm / "one.add-cow").rename(farm / "o\nn\x1be.add-cow")
    lines = succeed("farm", "ls", ".", cwd=farm).stdout.splitlines()
    assert len(lines) == 4
    assert any(line.endswith(r"  ./o\nn\x1be.add-cow over base.img") for line in lines)


# ---- check ----


def checked(*words: str, cwd: Path, status: int) -> dict[str, Any]:
    result = addcow("farm", "check", "--output", "json", *words, cwd=cwd)
    assert result.status == status, result
    report: dict[str, Any] = result.json
    return report


JOBS = pytest.mark.parametrize("jobs", [(), ("--jobs", "0"), ("--jobs", "2")])


@JOBS
def test_farm_check_of_a_clean_farm(farm: Path, jobs: tuple[str, ...]) -> None:
    before = snapshot(farm)
    report = checked(*jobs, ".", cwd=farm, status=0)
    assert [(one["filename"], one["exit"], one["findings"]) for one in report["images"]] == [
        ("./deep/deeper/three.add-cow", 0, []),
        ("./one.add-cow", 0, []),
        ("./two.add-cow", 0, []),
    ]
    assert report["graph"] == []
    assert report["summary"] == {
        "images": 3,
        "clean": 3,
        "corrupt": 0,
        "leaking": 0,
        "unexamined": 0,
        "graph-findings": 0,
    }
    assert snapshot(farm) == before


@pytest.mark.long
@JOBS
def test_farm_check_reports_each_image_as_check_does(farm: Path, jobs: tuple[str, ...]) -> None:
    """Three parcels of images, of which some leak, some are corrupt, some cannot be looked at."""
    for number in range(90):
        name = f"more-{number:02}"
        draw(farm / f"{name}.add-cow", "X-y-" if number % 9 == 1 else "X---", "base.img")
        if number % 9 == 2:
            put(farm / f"{name}.add-cow", CLUSTER, b"\xff")  # bits of clusters that there are not
        if number % 9 == 3:
            (farm / f"{name}.raw").unlink()
            (farm / f"{name}.raw").symlink_to("/etc/passwd")
    report = checked(*jobs, ".", cwd=farm, status=2)
    assert len(report["images"]) == 93
    for one in report["images"]:
        alone = addcow("check", "--root", ".", "--output", "json", one["filename"], cwd=farm)
        assert (one["exit"], one["findings"]) == (alone.status, alone.json["findings"])
    summary = report["summary"]
    assert [summary[key] for key in ("clean", "corrupt", "leaking", "unexamined")] == [
        63,
        10,
        10,
        10,
    ]


@pytest.mark.parametrize(
    ("pictures", "status"),
    [(["X---", "X-y-"], 3), (["X-y-", "?"], 1), (["?", "!"], 2), (["X-y-", "!"], 2)],
)
def test_farm_check_exits_with_the_status_of_the_worst_image(
    farm: Path, pictures: list[str], status: int
) -> None:
    for number, picture in enumerate(pictures):
        path = farm / f"more-{number}.add-cow"
        draw(path, "X---" if picture in "?!" else picture, "base.img")
        if picture == "?":
            path.with_suffix(".raw").unlink()
            path.with_suffix(".raw").symlink_to("/etc/passwd")
        elif picture == "!":
            put(path, CLUSTER, b"\xff")
    assert checked(".", cwd=farm, status=status)["summary"]["images"] == 5


def test_farm_check_finds_an_image_of_two_overlays(farm: Path) -> None:
    content = overlay_bytes(image="one.raw", size=4 * CLUSTER, backing="base.img")
    (farm / "thief.add-cow").write_bytes(content)
    report = checked(".", cwd=farm, status=2)
    (finding,) = report["graph"]
    assert (finding["name"], finding["severity"]) == ("shared-image", "corruption")
    assert "./one.add-cow, ./thief.add-cow" in finding["message"]
    # No image can know that of itself: to the thief, what the other has written is a leak.
    assert [report["summary"][key] for key in ("clean", "leaking")] == [3, 1]


def test_farm_check_finds_an_image_used_as_a_backing_file(farm: Path) -> None:
    draw(farm / "wrong.add-cow", "X---", "one.raw")
    report = checked(".", cwd=farm, status=2)
    (finding,) = report["graph"]
    assert finding["name"] == "image-as-backing"
    assert "./one.add-cow" in finding["message"]
    assert "./wrong.add-cow" in finding["message"]


def test_farm_check_reports_a_cycle_once(farm: Path) -> None:
    bite_tail(farm)
    draw(farm / "above.add-cow", "X---", "bad.add-cow", backing_format="add-cow")
    draw(farm / "own.add-cow", "X---", "own.add-cow", backing_format="add-cow")
    report = checked(".", cwd=farm, status=2)
    circles = {one["message"].rpartition(": ")[2] for one in report["graph"]}
    assert {one["name"] for one in report["graph"]} == {"chain-cycle"}
    assert circles == {"./bad.add-cow, ./tail.add-cow", "./own.add-cow"}
    guilty = {one["filename"] for one in report["images"] if one["findings"]}
    assert guilty == {"./above.add-cow", "./bad.add-cow", "./own.add-cow", "./tail.add-cow"}


def test_farm_check_finds_a_truncated_header(farm: Path) -> None:
    os.truncate(farm / "one.add-cow", 50)
    report = checked(".", cwd=farm, status=2)
    (one,) = (one for one in report["images"] if one["filename"] == "./one.add-cow")
    assert [finding["name"] for finding in one["findings"]] == ["header"]
    assert images(".", cwd=farm)["./one.add-cow"]["state"] == "damaged"


@pytest.mark.long
def test_farm_ignores_backups_of_a_repair(farm: Path) -> None:
    put(farm / "one.add-cow", CLUSTER, b"\xff")
    assert addcow("check", "-r", "all", "one.add-cow", cwd=farm).status == 0
    assert (farm / "one.add-cow.backup-1").exists()
    assert checked(".", cwd=farm, status=0)["summary"]["images"] == 3
    assert len(images(".", cwd=farm)) == 3
    (farm / "one.add-cow").unlink()  # then it is all that is left
    assert "./one.add-cow.backup-1" in images(".", cwd=farm)


@pytest.mark.long
def test_farm_check_prints_findings_with_the_image(farm: Path) -> None:
    draw(farm / "leaky.add-cow", "X-y-", "base.img")
    result = addcow("farm", "check", ".", cwd=farm)
    assert result.status == 3
    finding, summary = result.lines
    assert finding.startswith("./leaky.add-cow: LEAK leaks: 1 clusters that are not allocated")
    assert summary == "4 images, 3 clean, 0 corrupt, 1 leaking, 0 unexamined, 0 graph findings"
    assert addcow("farm", "check", "-q", ".", cwd=farm).lines == [finding]


def test_farm_check_progress_ends_with_all_images(farm: Path) -> None:
    """Many files come before the first image."""
    (farm / "a").mkdir()
    for number in range(300):
        (farm / "a" / str(number)).touch()
    result = addcow("farm", "check", "--jobs", "0", "--progress", "json", ".", cwd=farm)
    last = json.loads(result.stderr.splitlines()[-1])
    assert (last["images-done"], last["images"]) == (3, 3)


def test_farm_check_of_an_empty_farm_is_clean(tmp_path: Path) -> None:
    assert checked(".", cwd=tmp_path, status=0)["images"] == []
