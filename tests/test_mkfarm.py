"""Tests of `addcow farm check` on large farms with known faults.

`tools/mkfarm.py` builds a farm from a seed and says what a check must find. The check finds all
of it and nothing else, and changes nothing.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.command import KiB, addcow, ran, snapshot
from support.seed import SEED

pytestmark = pytest.mark.sample(1)

MKFARM = Path(__file__).parent.parent / "tools" / "mkfarm.py"

FEW = ("--images", "150", "--bases", "4")
# Each of these is a way to check: the default, no workers, two of them.
WAYS = [(), ("--jobs", "0"), ("--jobs", "2")]

# All names that findings can have, but "file": root reads everything.
FINDINGS = {
    *("header", "names", "reserved-bytes", "formats", "image-file", "backing-file"),
    *("missing-file", "same-file", "chain-cycle", "chain", "bitmap-length", "stray-bits", "leaks"),
}
GRAPH_FINDINGS = {"shared-image", "image-as-backing", "chain-cycle"}

# Of ten thousand images on disk; they are sparse, else they would not fit on a disk.
ROOM = 1536 * KiB * KiB


@dataclass(frozen=True)
class Farm:
    """A farm, and what its builder says about it."""

    place: Path
    images: int
    found: dict[str, Any]
    graph: list[dict[str, Any]]


def mkfarm(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return ran([sys.executable, MKFARM, place, *words])


def built(place: Path, *words: str, seed: str = SEED) -> Farm:
    done = mkfarm(place, "--seed", seed, *words)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["seed"] == int(seed)
    return Farm(place, told["images"], told["expected"]["images"], told["expected"]["graph"])


def checked(farm: Farm, *words: str) -> tuple[int, dict[str, Any]]:
    """Check a farm; return the exit status and the report."""
    result = addcow("farm", "check", "--output", "json", *words, ".", cwd=farm.place)
    assert result.stderr == ""
    return result.status, result.json


def findings_of(report: dict[str, Any]) -> dict[str, Any]:
    """What a report says of images that are not clean, as the builder would have said it."""
    return {
        one["filename"].removeprefix("./"): {
            "exit": one["exit"],
            "findings": sorted(finding["name"] for finding in one["findings"]),
        }
        for one in report["images"]
        if one["exit"] or one["findings"]
    }


def graph_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The findings about the graph, each with the overlays whose names are in its message."""
    names = [one["filename"] for one in report["images"]]
    graph = [
        {
            "name": finding["name"],
            "filenames": sorted(n.removeprefix("./") for n in names if n in finding["message"]),
        }
        for finding in report["graph"]
    ]
    return in_order(graph)


def in_order(graph: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(graph, key=lambda one: (one["name"], one["filenames"]))


def expect_all_and_only_what_is_wrong(farm: Farm, *words: str) -> None:
    status, report = checked(farm, *words)
    assert findings_of(report) == farm.found
    assert graph_of(report) == in_order(farm.graph)
    names = [one["filename"] for one in report["images"]]
    assert (len(names), len(set(names))) == (farm.images, farm.images)
    statuses = Counter(one["exit"] for one in farm.found.values())
    assert report["summary"] == {
        "images": farm.images,
        "clean": farm.images - len(farm.found),
        "corrupt": statuses[2],
        "leaking": statuses[3],
        "unexamined": statuses[1],
        "graph-findings": len(farm.graph),
    }
    assert status == (2 if farm.found or farm.graph else 0)


def stamps(directory: Path) -> dict[str, tuple[int, int, int]]:
    """What shows that a file was changed, without reading it."""
    found = ((str(path), path.lstat()) for path in directory.rglob("*"))
    return {name: (one.st_size, one.st_mtime_ns, one.st_ctime_ns) for name, one in found}


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Farm:
    return built(tmp_path_factory.mktemp("farms") / "farm", *FEW, "--faults", "2")


# ---- the check ----


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_farm_check_finds_every_planted_fault_and_no_other(
    farm: Farm, way: tuple[str, ...]
) -> None:
    before = snapshot(farm.place), stamps(farm.place)
    expect_all_and_only_what_is_wrong(farm, *way)
    assert (snapshot(farm.place), stamps(farm.place)) == before


@pytest.mark.long
def test_farm_check_finds_every_variant_of_every_fault(tmp_path: Path) -> None:
    """The same fault has up to five turns, of which a farm with less of them has the first."""
    words = ("--images", "20", "--faults", "6", "--size", "100K", "--cluster", "4K")
    expect_all_and_only_what_is_wrong(built(tmp_path / "farm", *words))


@pytest.mark.long
@pytest.mark.parametrize("words", [(), ("--cluster", "2M", "--size", "20M"), ("--size", "5000")])
def test_farm_check_of_a_farm_without_faults_is_clean(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    farm = built(tmp_path / "farm", *FEW, "--no-faults", *words)
    assert (farm.images, farm.found, farm.graph) == (150, {}, [])
    expect_all_and_only_what_is_wrong(farm)


@pytest.mark.long
def test_farm_check_agrees_with_check_of_each_image(farm: Farm) -> None:
    """Some of the faults, by the command for single images; each of them is a process."""
    for name in random.Random(SEED).sample(sorted(farm.found), 12):
        result = addcow("check", "--root", ".", "--output", "json", name, cwd=farm.place)
        names = sorted(finding["name"] for finding in result.json["findings"])
        assert {name: {"exit": result.status, "findings": names}} == {name: farm.found[name]}


@pytest.mark.long
def test_farm_check_of_ten_thousand_images(tmp_path: Path) -> None:
    farm = built(tmp_path / "farm", "--images", "10000", "--faults", "5")
    assert sum(path.lstat().st_blocks * 512 for path in farm.place.rglob("*")) < ROOM
    before = stamps(farm.place)
    expect_all_and_only_what_is_wrong(farm)
    assert stamps(farm.place) == before


# ---- the farms ----


def test_mkfarm_plants_faults_of_every_kind(farm: Farm) -> None:
    assert {name for one in farm.found.values() for name in one["findings"]} == FINDINGS
    assert {one["name"] for one in farm.graph} == GRAPH_FINDINGS
    assert {one["exit"] for one in farm.found.values()} == {1, 2, 3}
