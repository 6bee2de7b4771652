"""Tests of everything that fuzzing found, and of the fuzzer itself.

Each file of tests/fuzz_finds is a small directory of images with the reason why it was kept. They
run in another process, because a find may hang or kill it. A new find needs only its file.
"""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fuzz
import oracle
from support.golden import ROOT

pytestmark = pytest.mark.sample(1)

# Nothing takes longer than what the examination itself allows.
PATIENCE = 120.0
FINDS = sorted(fuzz.FINDS.glob("*.json"))

TOP = "{box}/top.add-cow"


def load(name: str) -> fuzz.Scene:
    return fuzz.Scene.from_json((fuzz.FINDS / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def replayed() -> dict[str, str]:
    """What the examination says of every file, as far as it came."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "fuzz.py"), "--replay", *map(str, FINDS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("path", FINDS, ids=lambda path: str(path.stem))
def test_no_stored_scene_shows_a_fault(path: Path, replayed: dict[str, str]) -> None:
    # Of a scene that kills the process nothing is said, and of those behind it neither.
    assert replayed.get(str(path), "the process ended before it was done") == "no fault"


def test_every_first_scene_is_stored() -> None:
    assert len(FINDS) >= 10


@pytest.mark.parametrize("path", FINDS, ids=lambda path: str(path.stem))
def test_scene_keeps_its_reason_when_saved(path: Path) -> None:
    scene = fuzz.Scene.from_json(path.read_text())
    assert scene.why
    assert fuzz.Scene.from_json(scene.as_json()) == scene


# ---- the examination sees what it is there to see ----


@pytest.mark.parametrize(
    ("name", "command", "told"),
    [
        ("names-lead-out", ("map", "--root", "{outside}", TOP), "which lies outside"),
        ("directory-link-leads-out", ("map", "--root", "{outside}", TOP), "which lies outside"),
        ("partial-everything", ("io", "-c", "write 0 4k", TOP), "a file was changed"),
        ("partial-everything", ("check", "-r", "all", TOP), "a file was changed"),
    ],
)
def test_fuzzer_detects_a_fault(name: str, command: tuple[str, ...], told: str) -> None:
    assert told in str(fuzz.examine(load(name), [command]))


def test_fuzzer_detects_a_wrong_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "guest_bytes", lambda _: b"something else")
    assert "than the guest's view" in str(fuzz.examine(load("partial-everything")))


def test_fuzzer_detects_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "PATIENCE", 1)
    monkeypatch.setattr(fuzz, "run", lambda _: signal.pause())
    assert "it took more than 1 seconds" in str(fuzz.examine(load("partial-everything")))


@pytest.mark.parametrize(
    ("status", "out", "err"),
    [
        (1, "", ""),
        (1, "", "Traceback (most recent call last):\n"),
        (1, "", "addcow: unexpected error; please report it\n"),
        (1, "", "addcow: one\ntwo\n"),
        (70, "", "addcow: something\n"),
        (-11, "", ""),
    ],
)
def test_fuzzer_detects_a_bad_end(
    status: int, out: str, err: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "run", lambda _: fuzz.Outcome(status, out, err))
    assert fuzz.examine(load("partial-everything"), [("info", TOP)]) is not None


def test_fuzzer_finds_shrinks_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that any overlay with a header of 64 KiB shows, hunted from a fixed seed."""
    monkeypatch.setattr(fuzz, "examine", _fault)
    search = fuzz.Search(math.inf, tmp_path, tmp_path / "pending")
    search.round(1)
    assert search.known == {"a large header"}
    (find,) = tmp_path.glob("find-*.json")
    scene = fuzz.Scene.from_json(find.read_text())
    assert scene.why == "a large header"
    assert len(scene.entries) == 3  # one overlay, its image file, its backing file


def _fault(scene: fuzz.Scene) -> str | None:
    top = scene.entries[0]
    return "a large header" if top.length >= 64 * fuzz.KiB else None
