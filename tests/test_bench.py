"""Tests of `make bench` on a few megabytes.

No figure is judged. Every case runs or is skipped with the reason, a peer that does not do its
job is detected, and no file is left.
"""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from bench_cases import STAGES
from bench_report import Result, Timing, told_limit, told_ratio
from bench_runs import Case, Measure
from support.command import PATIENCE, ran, tool
from support.golden import ROOT

XFS = ["xfs-commit", "xfs-flatten", "sparse-16t"]
XFS += ["xfs-strict-fresh", "xfs-strict-written", "xfs-relaxed-fresh", "xfs-relaxed-written"]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    tool("qemu-img", "--version", cwd=tmp_path)
    if not Path(sys.executable).with_name("addcow").exists():
        pytest.skip("addcow is not installed beside this Python")
    (tmp_path / "files").mkdir()
    return tmp_path


def words(here: Path, *cases: str) -> list[str]:
    chosen = [word for case in cases for word in ("--only", case)]
    places = ["--dir", str(here / "files"), "--output", str(here / "told")]
    bench = str(ROOT / "tools" / "bench.py")
    return [sys.executable, bench, *places, "--scale", "1/2048", "--runs", "1", *chosen]


def bench(here: Path, *cases: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """Run some cases; ``path`` is a directory of programs that come before the system's."""
    return ran(
        words(here, *cases), env={**os.environ, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    )


def told(here: Path) -> dict[str, Any]:
    """What the JSON document says, by case."""
    document = json.loads((here / "told" / "bench.json").read_text())
    return {one["case"]: one for one in document["cases"]}


def all_cases() -> list[Case]:
    return [case for stage in STAGES for case in stage.cases]


@pytest.mark.slow
def test_bench_measures_and_reports_every_case_without_a_loop_device(here: Path) -> None:
    cases = [case.name for case in all_cases() if case.name not in XFS]
    done = bench(here, *cases)
    assert done.returncode == 0, done
    found = told(here)
    assert list(found) == cases
    table = (here / "told" / "bench.md").read_text()
    drawing = (here / "told" / "bench.svg").read_text()
    labels = [element.text for element in ET.fromstring(drawing).iter() if element.text]  # noqa: S314
    for name, one in found.items():
        assert len(one["contenders"]) >= 2, one
        assert all(each["seconds"] and each["median"] > 0 for each in one["contenders"])
        assert one["reached"] in ((None,) if one["target"] is None else (True, False))
        assert f"| **{name}**: " in table
        assert name in labels
    assert list((here / "files").iterdir()) == []


@pytest.mark.slow
def test_bench_skips_xfs_cases_with_the_reason(here: Path) -> None:
    done = bench(here, *XFS)
    assert done.returncode == 0, done
    for one in told(here).values():
        assert one.get("file-system") == "xfs" or one["skipped"], one
    if os.geteuid() != 0:
        assert all("root" in one["skipped"] for one in told(here).values())
    assert str(here) not in Path("/proc/self/mountinfo").read_text()
    assert list((here / "files").iterdir()) == []


def impostor(here: Path, behaviour: str) -> str:
    """A directory with a qemu-img that behaves so when asked to commit, else as the real one."""
    real = shutil.which("qemu-img")
    directory = here / "bin"
    directory.mkdir()
    program = directory / "qemu-img"
    program.write_text(f'#!/bin/sh\n[ "$1" = commit ] && {behaviour}\nexec {real} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(directory)


@pytest.mark.long
def test_bench_detects_a_peer_that_does_nothing(here: Path) -> None:
    done = bench(here, "commit-64k-unsafe", "check", path=impostor(here, "exit 0"))
    assert done.returncode == 1, done
    assert "peer-base.raw" in told(here)["commit-64k-unsafe"]["failed"]
    assert told(here)["check"]["ratio"] > 0


def test_interrupted_bench_leaves_no_files(here: Path) -> None:
    running = subprocess.Popen(words(here), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + PATIENCE
    while not list((here / "files").glob("*/*/top.add-cow")):
        assert time.monotonic() < deadline, "it never began"
        assert running.poll() is None, running.stderr
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=PATIENCE)
    assert running.returncode == 130
    assert b"Traceback" not in said
    assert list((here / "files").iterdir()) == []


def test_unknown_bench_case_is_refused_with_the_known_ones(here: Path) -> None:
    done = bench(here, "commit-17m")
    assert done.returncode == 1
    assert "no such case: commit-17m" in done.stderr
    assert "commit-16m-unsafe" in done.stderr
    assert not (here / "told").exists()


# ---- how figures are made of runs ----


def result(
    ours: list[float], *peers: tuple[list[float], bool], measure: Measure, target: float
) -> Result:
    case = Case(name="x", title="X", contenders=lambda *_: [], target=target, measure=measure)
    timings = [Timing("addcow", "addcow x", counted=True, seconds=ours)]
    timings += [Timing("peer", "peer x", counted=known, seconds=runs) for runs, known in peers]
    return Result(case, "ext4", timings)


def test_bench_compares_with_the_median_of_the_fastest_peer() -> None:
    peers = ([5.0, 3.0, 90.0], True), ([7.0, 7.0, 1.0], True), ([0.1, 0.1, 0.1], False)
    one = result([2.0, 1.0, 80.0], *peers, measure=Measure.SPEED, target=2.5)
    assert one.ratio == 2.5
    assert one.reached
    assert told_ratio(one) == "2.50 times as fast"


def test_bench_names_the_limit_of_a_missed_target_only() -> None:
    for target, told in ((2.0, ": the disk"), (1.0, "")):
        one = result([2.0], ([3.0], True), measure=Measure.SPEED, target=target)
        assert told_limit(replace(one, case=replace(one.case, limit="the disk"))) == told
