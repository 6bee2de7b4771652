"""Tests of the report of a job that fails after it changed something, alone and in a farm."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from support.command import (
    CLUSTER,
    addcow,
    bits,
    guest_picture,
    pair,
    read_header,
    stored_bytes,
    succeed,
)
from support.fault_rules import Rules, rule
from support.processes import running

pytestmark = pytest.mark.sample(1)

#: Where a job fails, and what a single command then says beside the cause.
LATE = [
    ("flatten --discard", "discard", "top.add-cow: flattened; the .add-cow file was not removed: "),
    (
        "flatten --discard",
        "directory_sync",
        "top.add-cow: flattened; the .add-cow file is removed, and may be back after a power cut: ",
    ),
    (
        "flatten",
        "header_write",
        "top.add-cow: every cluster is allocated; ALL_ALLOCATED was not set, the same command "
        "sets it: ",
    ),
    ("flatten --verify", "read_back", "the job is done, but what it wrote was not verified"),
    ("commit", "punch", "what it holds is committed, the same command frees its space"),
    ("commit --verify", "read_back", "the job is done, but what it wrote was not verified"),
]
EACH = pytest.mark.parametrize(("job", "event", "told"), LATE, ids=lambda one: str(one)[:24])
BOTH = pytest.mark.parametrize("jobs", ["0", "2"])


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    pair(tmp_path / "here", "ABCDEFGH", "-X-Y----")
    return tmp_path / "here"


def moved(job: str) -> int:
    return CLUSTER * (2 if job.startswith("commit") else 6)


@EACH
@BOTH
def test_failed_job_reports_what_it_did(
    here: Path, monkeypatch: pytest.MonkeyPatch, job: str, event: str, told: str, jobs: str
) -> None:
    rules = Rules.write(here.parent / "rules", rule(event))
    monkeypatch.setenv("ADDCOW_FAULTS", str(rules.path))
    result = addcow(*job.split(), "--jobs", jobs, "top.add-cow", cwd=here)
    assert result.status == 1, result
    (line,) = result.stderr.splitlines()
    assert told in line
    assert "Input/output error" in line


@EACH
@BOTH
def test_failed_image_of_a_farm_reports_what_was_moved(
    here: Path, monkeypatch: pytest.MonkeyPatch, job: str, event: str, told: str, jobs: str
) -> None:
    rules = Rules.write(here.parent / "rules", rule(event))
    monkeypatch.setenv("ADDCOW_FAULTS", str(rules.path))
    words = ("farm", *job.split(), "--jobs", jobs, "--output", "json", ".")
    result = addcow(*words, cwd=here)
    assert result.status == 1, result
    (image,) = result.json["images"]
    assert image["state"] == "failed"
    assert image["bytes-moved"] == result.json["summary"]["bytes-moved"] == moved(job)
    assert told.removeprefix("top.add-cow: ") in image["problem"]


@BOTH
def test_overlay_replaced_before_its_removal_is_reported_with_the_work(
    here: Path, jobs: str
) -> None:
    """The job is stopped where all is moved; another file takes the name of the overlay."""
    rules = Rules.write(here.parent / "rules", rule("bitmap_sync", "stop", once="on", after=1))
    words = ("farm", "flatten", "--discard", "--jobs", jobs, "--output", "json", ".")
    with running(*words, cwd=here, rules=rules) as run:
        (stopped,) = run.stopped()
        (here / "top.add-cow").rename(here / "old")
        (here / "top.add-cow").write_bytes((here / "old").read_bytes())
        run.signal(signal.SIGCONT, stopped)
        ended = run.end()
    report = json.loads(ended.stdout)
    (image,) = report["images"]
    assert (ended.status, image["state"]) == (1, "failed")
    assert image["bytes-moved"] == moved("flatten")
    assert "flattened; the .add-cow file was not removed: " in image["problem"]
    assert "it was replaced meanwhile" in image["problem"]
    assert (here / "top.add-cow").exists()


@pytest.mark.long
def test_refusal_before_any_change_is_reported_as_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by the system, and when there is nothing left but the removal."""
    succeed("flatten", "top.add-cow", cwd=here)
    rules = Rules.write(here.parent / "rules", rule("data_sync"))
    monkeypatch.setenv("ADDCOW_FAULTS", str(rules.path))
    result = addcow("farm", "flatten", "--discard", "--output", "json", ".", cwd=here)
    (image,) = result.json["images"]
    assert image["state"] == "refused"
    assert "bytes-moved" not in image
    assert read_header(here / "top.add-cow").compatible == 1


@pytest.mark.long
def test_job_that_fails_midway_reports_what_was_moved(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = Rules.write(here.parent / "rules", rule("backing_read", after=2))
    monkeypatch.setenv("ADDCOW_FAULTS", str(rules.path))
    result = addcow("farm", "flatten", "--output", "json", ".", cwd=here)
    (image,) = result.json["images"]
    assert image["state"] == "failed"
    assert image["bytes-moved"] == 2 * CLUSTER or image["bytes-moved"] == 3 * CLUSTER
    assert bits(here / "top.add-cow").count("1") == 2 + image["clusters-moved"]
    assert guest_picture(here / "top.add-cow") == "AXCYEFGH"


@pytest.mark.long
def test_same_command_frees_committed_space(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        rules = Rules.write(here.parent / "rules", rule("punch"))
        patch.setenv("ADDCOW_FAULTS", str(rules.path))
        assert addcow("commit", "top.add-cow", cwd=here).status == 1
    assert bits(here / "top.add-cow") == "........"
    assert os.stat(here / "top.raw").st_blocks
    succeed("commit", "top.add-cow", cwd=here)
    assert stored_bytes(here / "top.raw") == 0
