"""Tests of the order on disk in a farm job: images are done side by side, each in its own order."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from addcow_mp.device import holes
from addcow_mp.farm.farm_job import FarmJob, run_farm_job
from addcow_mp.farm.image_job import JobSpec, Operation
from addcow_mp.farm.plan import State
from addcow_mp.jobs.options import RunOptions
from support.call_trace import Call, Trace, frees_after_bits, judge
from support.command import PATIENCE, bits, draw, draw_raw, guest_picture, look

COUNT = 12
COMMIT, FLATTEN = JobSpec(Operation.COMMIT), JobSpec(Operation.FLATTEN)


def farm(here: Path) -> list[str]:
    """Overlays that each have a base of their own."""
    names = [f"vm{number:02}" for number in range(COUNT)]
    for name in names:
        draw_raw(here / f"{name}.img", "ABCD")
        draw(here / f"{name}.add-cow", "-XY-", f"{name}.img")
    return names


def states(here: Path, spec: JobSpec) -> dict[str, State]:
    """The state of each image after a job in this process."""
    result = run_farm_job([str(here)], FarmJob(spec), RunOptions(jobs=0))
    return {Path(image.path).stem: image.state for image in result.images}


def own_calls(trace: Trace, name: str) -> list[Call]:
    """The calls on the files of one image."""
    return [call for call in trace.calls if call.file.startswith(f"{name}.")]


def test_each_image_of_a_farm_commit_keeps_its_order(tmp_path: Path, trace: Trace) -> None:
    names = farm(tmp_path)
    assert states(tmp_path, COMMIT) == dict.fromkeys(names, State.DONE)
    for name in names:
        calls = own_calls(trace, name)
        assert Trace(calls).story() == [
            *(f"data {name}.img", f"sync {name}.img"),
            *(f"bits {name}.add-cow", f"sync {name}.add-cow", f"free {name}.raw"),
        ]
        assert [call.file for call in calls if call.word == "sync"] == [
            *(f"{name}.img", f"{name}.add-cow")
        ]
        overlay = tmp_path / f"{name}.add-cow"
        assert judge(calls, overlay, {0: f"{name}.img"}) == 2
        assert frees_after_bits(calls, overlay, f"{name}.raw")
        assert look(tmp_path / f"{name}.img") == "AXYD"


def test_each_image_of_a_farm_flatten_keeps_its_order(tmp_path: Path, trace: Trace) -> None:
    names = farm(tmp_path)
    assert states(tmp_path, FLATTEN) == dict.fromkeys(names, State.DONE)
    for name in names:
        calls = own_calls(trace, name)
        assert Trace(calls).story() == [
            *(f"data {name}.raw", f"sync {name}.raw"),
            *(f"bits {name}.add-cow", f"sync {name}.add-cow"),
            *(f"header {name}.add-cow", f"sync {name}.add-cow"),
        ]
        assert [call.file for call in calls if call.word == "sync"] == [
            *(f"{name}.raw", f"{name}.add-cow", f"{name}.add-cow")
        ]
        assert judge(calls, tmp_path / f"{name}.add-cow", {1: f"{name}.raw"}) == 2
        assert look(tmp_path / f"{name}.raw") == "AXYD"


@pytest.mark.parametrize("call", ["sync", "punch"])
def test_images_of_a_farm_wait_for_the_disk_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Each call waits until every image is there: one after the other, none would return."""
    names = farm(tmp_path)
    place, attribute = {"sync": (os, "fdatasync"), "punch": (holes, "punch")}[call]
    real, meeting = getattr(place, attribute), threading.Barrier(COUNT)

    def met(*arguments: int) -> object:
        meeting.wait(PATIENCE)
        return real(*arguments)

    monkeypatch.setattr(place, attribute, met)
    assert states(tmp_path, COMMIT) == dict.fromkeys(names, State.DONE)
    assert all(look(tmp_path / f"{name}.img") == "AXYD" for name in names)


def test_failed_sync_is_that_of_one_image_of_a_farm(tmp_path: Path, trace: Trace) -> None:
    names = farm(tmp_path)
    trace.to_be("vm03.img", "vm07.add-cow")
    bad = {"vm03", "vm07"}
    told = states(tmp_path, COMMIT)
    assert told == {name: State.FAILED if name in bad else State.DONE for name in names}
    assert sorted(trace.failed) == ["vm03.img", "vm07.add-cow"]
    assert bits(tmp_path / "vm03.add-cow") == ".11."
    assert not [call for call in own_calls(trace, "vm03") if call.word in ("bits", "free")]
    assert not [call for call in own_calls(trace, "vm07") if call.word == "free"]
    trace.failing.clear()
    assert all(guest_picture(tmp_path / f"{name}.add-cow") == "AXYD" for name in names)
    again = states(tmp_path, COMMIT)
    assert [again[name] for name in sorted(bad)] == [State.DONE, State.DONE]
    assert all(look(tmp_path / f"{name}.img") == "AXYD" for name in names)
