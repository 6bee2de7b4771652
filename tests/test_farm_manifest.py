"""Tests of `addcow farm manifest create`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.command import CLUSTER, addcow, draw, draw_raw, put, refused, succeed

CREATE = ("farm", "manifest", "create")
COUNT = 6


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    """Overlays in one directory over a base in another; one of them in a chain of two."""
    (tmp_path / "bases").mkdir()
    (tmp_path / "farm").mkdir()
    draw_raw(tmp_path / "bases" / "golden.img", "ABCD")
    for number in range(COUNT):
        base = str(tmp_path / "bases" / "golden.img")
        draw(tmp_path / "farm" / f"vm{number}.add-cow", "X---", base)
    draw(tmp_path / "farm" / "top.add-cow", "-Y--", "vm0.add-cow", backing_format="add-cow")
    return tmp_path


def run(farm: Path, *words: str, status: int = 0) -> Any:
    root = ("--root", str(farm / "bases"))
    result = addcow(*CREATE, *root, "--output", "json", *words, "farm", cwd=farm)
    assert result.status == status, result
    return result.json


@pytest.mark.parametrize("jobs", ["0", "1", "2"])
def test_farm_manifest_create_reads_a_shared_base_once(farm: Path, jobs: str) -> None:
    told = run(farm, "--jobs", jobs)
    assert told["summary"] == {
        "images": COUNT + 1,
        "written": COUNT + 2,
        "failed": 0,
        "not-examined": 0,
    }
    made = [one for image in told["images"] for one in image["manifests"]]
    bases = [one for one in made if one["filename"].endswith("golden.img.manifest")]
    assert sum(one["written"] for one in bases) == 1
    succeed("farm", "verify", "--root", "bases", "farm", cwd=farm)
    assert [one.name for one in (farm / "bases").iterdir()].count("golden.img.manifest") == 1


@pytest.mark.long
def test_second_farm_manifest_create_writes_nothing(farm: Path) -> None:
    run(farm)
    before = {one: one.stat().st_mtime_ns for one in farm.rglob("*.manifest")}
    assert run(farm)["summary"]["written"] == 0
    assert {one: one.stat().st_mtime_ns for one in farm.rglob("*.manifest")} == before


def test_farm_manifest_create_continues_after_a_failed_image(farm: Path) -> None:
    succeed("manifest", "create", "-q", "--root", "../bases", "vm3.add-cow", cwd=farm / "farm")
    put(farm / "farm" / "vm3.raw", 0, b"changed by another program")
    told = run(farm, status=1)
    problems = {one["filename"]: one.get("problem") for one in told["images"]}
    assert [name for name, problem in problems.items() if problem] == ["farm/vm3.add-cow"]
    assert "--replace" in str(problems["farm/vm3.add-cow"])
    assert told["summary"]["failed"] == 1
    assert run(farm, "--replace")["summary"] == {
        "images": COUNT + 1,
        "written": 1,
        "failed": 0,
        "not-examined": 0,
    }
    succeed("farm", "verify", "--root", "bases", "farm", cwd=farm)


def test_base_outside_the_roots_is_refused_for_each_image(farm: Path) -> None:
    result = addcow(*CREATE, "farm", cwd=farm)
    assert result.status == 1
    assert result.stderr.count("use --root") == COUNT + 1
    assert not list(farm.rglob("*.manifest"))


def test_farm_manifest_create_progress_counts_images(farm: Path) -> None:
    words = (*CREATE, "-q", "--root", "bases", "--progress-format", "json", "farm")
    last = json.loads(succeed(*words, cwd=farm).stderr.splitlines()[-1])
    assert (last["images-done"], last["images"]) == (COUNT + 1, COUNT + 1)


def test_farm_manifest_create_refuses_a_missing_directory(tmp_path: Path) -> None:
    assert "no such file or directory" in refused(*CREATE, "nowhere", cwd=tmp_path)


@pytest.mark.long
def test_farm_manifest_create_splits_a_large_image(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "A")
    succeed("create", "-q", "-b", "base.img", "-F", "raw", "vm.add-cow", "400M", cwd=tmp_path)
    with (tmp_path / "vm.raw").open("r+b") as image:
        for start in range(0, 300, 10):
            image.seek(start << 20)
            image.write(b"data" * (CLUSTER // 4) * 160)
    result = succeed(*CREATE, "--output", "json", ".", cwd=tmp_path)
    assert result.json["summary"]["written"] == 2
