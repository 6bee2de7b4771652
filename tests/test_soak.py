"""Tests of `make soak`: a short run, and a run that finds a broken promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.powercut import UnavailableError, loop_disk

SOAK = Path(__file__).parent.parent / "tools" / "soak.py"

# A wrong order is found within the first few cases.
ENOUGH = 90.0


def soak(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SOAK, "--keep", place, *words],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=2 * ENOUGH,
        check=False,
    )


def test_soak_reports_the_survived_cases(tmp_path: Path) -> None:
    done = soak(tmp_path, "--minutes", "0.05")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("seed ")
    assert "accidents survived" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_soak_stops_at_a_broken_promise_and_keeps_the_files(tmp_path: Path) -> None:
    try:
        with loop_disk("ext4", tmp_path):
            pass
    except UnavailableError as error:
        pytest.skip(str(error))
    keep = tmp_path / "keep"
    keep.mkdir()
    done = soak(keep, "--minutes", str(ENOUGH / 60), "--seed", "wrong", "--order", "never:*")
    assert done.returncode == 1, done.stdout + done.stderr
    (case,) = keep.iterdir()
    number = case.name.removeprefix("soak-wrong-")
    assert f"again with: --seed wrong --case {number}" in done.stdout
    assert str(case) in done.stdout
    steps = (case / "steps.txt").read_text()
    assert "power cut" in steps
    assert steps.strip() in done.stdout
    assert (case / "top.raw").exists()
