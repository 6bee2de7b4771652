"""Tests of `farm scrub` through the command line.

Its findings are compared with those of `farm verify`. What it reads twice is counted in layers,
in reported bytes, and in bytes that the kernel counts. `--limit-rate` slows a run down where a
test acts during it.
"""

from __future__ import annotations

import datetime as dt
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from addcow_mp.errors import AddcowError
from addcow_mp.farm import scrub_state
from support.command import (
    CLUSTER,
    KiB,
    MiB,
    addcow,
    draw,
    draw_raw,
    overlay_bytes,
    patch,
    put,
    ran,
    read_header,
    snapshot,
    tool,
)
from support.fault_rules import Rules, rule
from support.file_systems import fill, mounted, remount
from support.guests import talking
from support.manifests import WIDE, kind, one_line
from support.processes import Ended, Job, running
from support.warm import Warm

pytestmark = pytest.mark.sample(1)

LEAF = 64 * KiB

BOTH = pytest.mark.parametrize("jobs", ["0", "2"])

Told = dict[str, Any]


@dataclass(frozen=True)
class Shop:
    """A farm, the state of its scrub beside it, and a quick way to run commands."""

    here: Path
    state: Path
    warm: Warm

    # ---- making the farm ----

    def overlays(self, count: int, *, clusters: int = 16) -> None:
        """Make a base and so many overlays of it, each of 1 MiB with manifests."""
        draw_raw(self.here / "base.img", "ABCDEFGH" * (clusters // 8))
        for number in range(count):
            draw(self.here / f"vm{number:02}.add-cow", "ZYXW" * (clusters // 4))
            self.manifest(f"vm{number:02}.add-cow")

    def manifest(self, name: str, *words: str) -> None:
        """Make what manifests are missing in a chain."""
        command = ("manifest", "create", "-q", "--jobs", "0", *words, *kind(name), name)
        ended = self.warm.run(*command, cwd=self.here)
        assert ended.status == 0, ended

    # ---- asking ----

    @property
    def words(self) -> tuple[str, ...]:
        """The command line of a run, but for places and other options."""
        return ("farm", "scrub", "run", "--state", str(self.state), "--output", "json")

    def run(
        self,
        *words: str,
        status: int = 0,
        place: str | None = None,
        cwd: Path | None = None,
        rules: Rules | None = None,
    ) -> Told:
        """Run a scrub to its end; returns what it told."""
        command = (*self.words, *words, str(self.here) if place is None else place)
        ended = self.warm.run(*command, cwd=cwd or self.here, rules=rules)
        return told_by(ended, status)

    def status(self) -> Told:
        """What is remembered; asking does not change it."""
        before = files_of(self.state.parent)
        command = ("farm", "scrub", "status", "--state", str(self.state), "--output", "json")
        ended = self.warm.run(*command, cwd=self.here)
        assert files_of(self.state.parent) == before
        told: Told = json.loads(ended.stdout)
        known = {one["exit"] for one in told["layers"]}
        assert ended.status == (2 if 2 in known else 1 if 1 in known else 0), ended
        assert ended.stderr == "", ended
        coverage = told["coverage"]
        assert coverage["layers"] == len(told["layers"])
        seen = [one for one in told["layers"] if one["verified"] is not None]
        assert coverage["verified"] == len(seen)
        assert coverage["never-verified"] == len(told["layers"]) - len(seen)
        times = [moment(one["verified"]) for one in seen]
        assert coverage["oldest"] is None if not times else True
        assert not times or moment(coverage["oldest"]) == min(times)
        return told

    def verified(self) -> dict[str, str | None]:
        """When each layer was verified, by the names of the files."""
        return {os.path.basename(one["filename"]): one["verified"] for one in self.layers()}

    def layers(self) -> list[Told]:
        """What is remembered of layers."""
        found: list[Told] = self.status()["layers"]
        return found

    def verify(self, *words: str) -> tuple[int, dict[str, Told]]:
        """What `farm verify` says of the same farm: its exit status, and layers by name."""
        command = ("farm", "verify", "--output", "json", *words, str(self.here))
        ended = self.warm.run(*command, cwd=self.here)
        told = json.loads(ended.stdout)
        return ended.status, by_name(told["images"] + told["files"])

    @contextmanager
    def running(self, *words: str, rules: Rules | None = None) -> Iterator[Job]:
        """A run of the real command during a block."""
        with running(*self.words, *words, str(self.here), cwd=self.here, rules=rules) as job:
            yield job

    def rules(self, *sections: str) -> Rules:
        """Write rules for faults."""
        return Rules.write(self.here.parent / "rules", *sections)


@pytest.fixture
def shop(tmp_path: Path, warm: Warm) -> Iterator[Shop]:
    for name in ("here", "memory"):
        (tmp_path / name).mkdir()
    yield Shop(tmp_path / "here", tmp_path / "memory" / "state", warm)
    shutil.rmtree(tmp_path / "here")  # some of them are large


def told_by(ended: Ended, status: int) -> Told:
    """What a run told, once its status is this one and its figures are sound."""
    assert ended.status == status, ended
    told: Told = json.loads(ended.stdout)
    summary, layers = told["summary"], told["layers"]
    exits = [one["exit"] for one in layers]
    assert summary["layers"] == len(layers)
    assert summary["as-they-were"] == exits.count(0)
    assert summary["unverified"] == exits.count(1)
    assert summary["different"] == exits.count(2)
    assert summary["bytes"] >= sum(one["bytes"] for one in layers) or status in (75, 130, 143)
    # The name once more as bytes, where it is no text.
    keys = {frozenset(one.keys() - {"filename-base64"}) for one in layers}
    assert keys <= {frozenset(("filename", "exit", "ranges", "findings", "bytes"))}
    assert len({one["filename"] for one in layers}) == len(layers)
    return told


def by_name(layers: list[Told]) -> dict[str, Told]:
    """Layers by name, with what they are said to be and nothing else."""
    keys = ("exit", "ranges", "findings", "bytes")
    return {one["filename"]: {key: one[key] for key in keys} for one in layers}


def names(told: Told) -> list[str]:
    """The files of the layers that a run finished, in its order."""
    return [os.path.basename(one["filename"]) for one in told["layers"]]


def moment(text: str) -> dt.datetime:
    """Read a time, which is in UTC."""
    found = dt.datetime.fromisoformat(text)
    assert found.utcoffset() == dt.timedelta(0), text
    return found


def files_of(directory: Path) -> dict[str, tuple[str, int]]:
    """The files of a directory: their bytes, and the time of their last change."""
    times = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    return {name: (digest, times[name]) for name, digest in snapshot(directory).items()}


def flip(path: Path, at: int) -> None:
    with path.open("rb") as file:
        file.seek(at)
        old = file.read(1)[0]
    put(path, at, bytes([old ^ 0x04]))


# ---- what is found ----


def plant(shop: Shop, rng: random.Random) -> None:
    """Make a farm with damage of each kind, and with layers that nothing is known of."""
    here = shop.here
    draw_raw(here / "base.img", "ABCDEFGH" * 3)
    draw_raw(here / "other.img", "ABCDEFGH")
    shop.manifest("other.img")
    for number in range(8):
        name = f"vm{number}.add-cow"
        draw(here / name, "-X-Y-Z0x" * rng.choice([1, 3]), rng.choice(["base.img", "other.img"]))
        if number < 7:
            shop.manifest(name)
    draw(here / "deep.add-cow", "T--T-T--", "vm0.add-cow", backing_format="add-cow")
    shop.manifest("deep.add-cow")
    (here / "kept").mkdir()
    draw_raw(here / "kept" / "alone.img", "QR")
    shop.manifest("kept/alone.img")
    for name in ("base.img", "vm0.raw", "vm1.raw", "deep.raw", "kept/alone.img"):
        if rng.random() < 0.7:
            for _ in range(rng.randrange(1, 4)):
                flip(here / name, rng.randrange((here / name).stat().st_size))
    flip(here / "vm2.add-cow", 3000)
    flip(here / "vm3.add-cow", CLUSTER)
    path = here / "vm4.add-cow.manifest"
    flip(path, rng.randrange(path.stat().st_size))
    patch(here / "vm5.add-cow", 0, b"BCOW")
    os.utime(here / "vm6.raw")
    os.truncate(here / "other.img.manifest", 100)
    (here / "a note").write_text("not a disk")


@pytest.mark.long
@BOTH
@pytest.mark.parametrize("turn", range(2))
def test_scrub_finds_what_verify_finds(
    shop: Shop, rng: random.Random, turn: int, jobs: str
) -> None:
    plant(shop, rng)
    before = snapshot(shop.here)
    status, expected = shop.verify()
    told = shop.run("--jobs", jobs, status=status)
    assert by_name(told["layers"]) == expected
    assert told["summary"]["left"] == 0
    remembered = {one["filename"]: one for one in shop.layers()}
    assert remembered.keys() == expected.keys()
    for name, one in expected.items():
        keys = ("exit", "ranges", "findings")
        assert {key: remembered[name][key] for key in keys} == {key: one[key] for key in keys}
        named = {finding["name"] for finding in one["findings"]}
        is_unread = one["exit"] == 1 or named & {"manifest", "replaced"}
        assert (remembered[name]["verified"] is None) == bool(is_unread), remembered[name]
        assert remembered[name]["sampled"] is None
    assert snapshot(shop.here) == before


@pytest.mark.long
@pytest.mark.parametrize("words", [("-q",), ("-p", "--idle"), ("-U",)])
def test_scrub_options_do_not_change_the_findings(
    shop: Shop, rng: random.Random, words: tuple[str, ...]
) -> None:
    plant(shop, rng)
    status, expected = shop.verify()
    assert by_name(shop.run(*words, status=status)["layers"]) == expected


@pytest.mark.long
def test_scrub_prints_findings_as_lines(shop: Shop) -> None:
    shop.overlays(2)
    flip(shop.here / "vm01.raw", 5 * CLUSTER)
    words = ("farm", "scrub", "run", "--state", str(shop.state), ".")
    result = addcow(*words, cwd=shop.here)
    assert result.status == 2
    where = shop.here / "vm01.raw"
    assert f"DIFFERS {where}: {LEAF} bytes at {5 * CLUSTER} differ" in result.lines
    assert result.stderr == ""
    status = addcow("farm", "scrub", "status", "--state", str(shop.state), cwd=shop.here)
    assert status.status == 2
    assert f"DIFFERS {where}: {LEAF} bytes at {5 * CLUSTER} differ" in status.lines
    assert len(addcow(*words[:-1], "-q", ".", cwd=shop.here).lines) <= len(result.lines)


def test_scrub_forgets_repaired_damage(shop: Shop) -> None:
    shop.overlays(2)
    flip(shop.here / "vm01.raw", 5 * CLUSTER)
    shop.run(status=2)
    assert {one["exit"] for one in shop.layers()} == {0, 2}
    flip(shop.here / "vm01.raw", 5 * CLUSTER)
    shop.run()
    assert {one["exit"] for one in shop.layers()} == {0}
    assert [one["ranges"] for one in shop.layers()] == [[], [], []]
    assert [one["different"] for one in shop.status()["runs"]] == [1, 0]


def test_scrub_reports_a_layer_in_use_as_verify_does(shop: Shop) -> None:
    tool("qemu-io", "--version", cwd=shop.here)
    shop.overlays(2)
    with talking(shop.here, "qemu-io", "-f", "raw", "vm00.raw"):
        status, expected = shop.verify()
        told = shop.run(status=status)
    assert {one["exit"] for one in expected.values()} == {0, 1}
    found = by_name(told["layers"])
    assert {n: one["exit"] for n, one in found.items()} == {
        n: one["exit"] for n, one in expected.items()
    }
    shop.run()
    assert None not in shop.verified().values()


def test_scrub_reads_names_from_a_file(shop: Shop) -> None:
    shop.overlays(3)
    (shop.here / "list").write_text("vm00.add-cow\nvm02.add-cow\n")
    command = (*shop.words, "--from-file", "list")
    told = told_by(shop.warm.run(*command, cwd=shop.here), 0)
    assert set(names(told)) == {"base.img", "vm00.add-cow", "vm02.add-cow"}


def test_scrub_progress_is_json(shop: Shop) -> None:
    shop.overlays(3)
    command = (*shop.words, "--progress", "json", str(shop.here))
    ended = shop.warm.run(*command, cwd=shop.here)
    told_by(ended, 0)
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    assert lines[-1]["images-done"] == lines[-1]["images"] == 4
    assert lines[-1]["bytes-done"] == lines[-1]["bytes"] == 4 * MiB


@pytest.mark.long
@BOTH
def test_scrub_progress_within_a_layer_counts_bytes(shop: Shop, jobs: str) -> None:
    """A farm of one large base would else be at nothing until it is at its end."""
    with (shop.here / "base.img").open("wb") as file:
        for _ in range(96):
            file.write(b"abcdefgh" * (MiB // 8))
    shop.manifest("base.img")
    command = (*shop.words, "--jobs", jobs, "-r", "64M", "--progress", "json", str(shop.here))
    ended = shop.warm.run(*command, cwd=shop.here)
    told_by(ended, 0)
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    assert any(0 < one["bytes-done"] < one["bytes"] for one in lines if not one["images-done"])
    assert lines[-1]["bytes-done"] == lines[-1]["bytes"] == 96 * MiB


# ---- order ----


def test_scrub_begins_with_the_longest_unverified_layer(shop: Shop) -> None:
    """Each layer in a place of its own, so that each can be verified alone."""
    order = ["d.img", "b.img", "a.img", "e.img", "c.img"]
    for name in order:
        (shop.here / name[0]).mkdir()
        draw_raw(shop.here / name[0] / name, "AB")
        shop.manifest(f"{name[0]}/{name}")
        assert names(shop.run("--jobs", "0", place=str(shop.here / name[0]))) == [name]
    for _ in range(2):
        assert names(shop.run("--jobs", "0")) == order


def test_scrub_begins_with_new_layers(shop: Shop) -> None:
    shop.overlays(4)
    shop.run()
    os.utime(shop.here / "vm02.raw")
    shop.manifest("vm02.add-cow", "--replace")
    draw(shop.here / "new.add-cow", "K" * 16)
    shop.manifest("new.add-cow")
    told = shop.run("--jobs", "0")
    assert set(names(told)[:2]) == {"vm02.add-cow", "new.add-cow"}


@pytest.mark.long
def test_new_layers_do_not_delay_other_layers(shop: Shop) -> None:
    """A farm that grows between runs: what is old is verified as often as without."""
    shop.overlays(2)
    for number in range(3):
        before = shop.verified() if number else {}
        told = shop.run("--jobs", "0")
        assert told["summary"]["left"] == 0
        assert sorted(names(told)) == sorted(snapshot_of_layers(shop))
        assert not {n for n, when in before.items() if shop.verified()[n] == when}
        draw(shop.here / f"new{number}.add-cow", "K" * 16)
        shop.manifest(f"new{number}.add-cow")


# ---- passes ----


@pytest.mark.long
@BOTH
def test_uninterrupted_scrub_run_is_a_whole_round(shop: Shop, jobs: str) -> None:
    shop.overlays(3)
    seen = None
    for number in range(1, 4):
        told = shop.run("--jobs", jobs)
        assert sorted(names(told)) == ["base.img", *(f"vm0{n}.add-cow" for n in range(3))]
        assert told["summary"]["bytes"] == 4 * MiB
        state = shop.status()
        assert (state["coverage"]["pass"], state["coverage"]["pass-left"]) == (number, 0)
        assert len(state["runs"]) == number
        assert state["coverage"]["bytes"] == state["coverage"]["bytes-verified"] == 4 * MiB
        times = shop.verified()
        assert None not in times.values()
        assert seen is None or all(times[n] > seen[n] for n in times)  # type: ignore[operator]
        seen = times
    for one in shop.status()["runs"]:
        assert moment(one["begun"]) <= moment(one["ended"])
        assert (one["result"], one["layers"], one["different"]) == ("complete", 4, 0)
        assert (one["bytes"], one["sample"]) == (4 * MiB, None)


@pytest.mark.long
@BOTH
def test_time_limits_divide_a_round_into_runs(shop: Shop, jobs: str) -> None:
    shop.overlays(9)
    whole, done, total = set(snapshot_of_layers(shop)), [], 0
    for turn in range(40):
        # Longer and longer: a busy machine spends the first ones on starting processes.
        limit = ("--time-limit", f"{0.5 * 1.1**turn:.2f}s", "-r", "10M")
        command = (*shop.words, "--jobs", jobs, *limit, str(shop.here))
        ended = shop.warm.run(*command, cwd=shop.here)
        told = told_by(ended, ended.status)
        done += names(told)
        total += told["summary"]["bytes"]
        left = len(whole) - len(done)
        assert told["summary"]["left"] == left
        state = shop.status()
        assert (state["coverage"]["pass"], state["coverage"]["pass-left"]) == (1, left)
        assert state["runs"][-1]["result"] == ("time-limit" if left else "complete")
        if not left:
            break
        assert ended.status == 75
        assert len(ended.stderr.splitlines()) == 1
        assert ended.stderr.startswith("addcow: ")
    assert ended.status == 0
    assert len(shop.status()["runs"]) > 1, "nothing was cut"
    assert sorted(done) == sorted(whole)
    # What was under way, at most a layer for each worker, may have been read in part twice.
    assert 10 * MiB <= total <= 10 * MiB + len(shop.status()["runs"]) * 2 * MiB
    assert len(shop.run()["layers"]) == 10
    assert shop.status()["coverage"]["pass"] == 2


def snapshot_of_layers(shop: Shop) -> list[str]:
    """The files that have manifests."""
    return [path.name.removesuffix(".manifest") for path in shop.here.glob("*.manifest")]


def test_scrub_with_a_time_limit_of_zero_reads_nothing(shop: Shop) -> None:
    shop.overlays(2)
    told = shop.run("--time-limit", "0", status=75)
    assert (told["summary"]["left"], told["summary"]["bytes"]) == (3, 0)
    assert shop.status()["coverage"]["never-verified"] == len(shop.layers())


@pytest.mark.long
def test_scrub_exits_with_2_for_damage_despite_the_time_limit(shop: Shop) -> None:
    shop.overlays(9)
    for path in [shop.here / "base.img", *shop.here.glob("*.raw")]:
        flip(path, 9)  # whichever comes first
    told = shop.run("--jobs", "0", "--time-limit", "3s", "-r", "1M", status=2)
    assert told["summary"]["left"] > 0
    assert told["summary"]["different"] == len(told["layers"]) > 0


def test_scrub_with_a_long_time_limit_finishes(shop: Shop) -> None:
    shop.overlays(2)
    assert shop.run("--time-limit", "1h")["summary"]["left"] == 0
    assert shop.status()["runs"][-1]["result"] == "complete"


def is_under_way(shop: Shop, least: int) -> Callable[[], bool]:
    """Whether the state shows so many layers that were verified; asked when it has changed."""
    seen = 0

    def look() -> bool:
        nonlocal seen
        with suppress(AssertionError, OSError, ValueError):
            changed = shop.state.stat().st_mtime_ns
            if changed == seen:
                return False
            seen = changed
            words = ("farm", "scrub", "status", "--state", str(shop.state), "--output", "json")
            ended = shop.warm.run(*words, cwd=shop.here)
            if ended.status == 0:
                found: int = json.loads(ended.stdout)["coverage"]["verified"]
                return found >= least
        return False

    return look


SLOW = ("-r", "3M")


@pytest.mark.parametrize(("jobs", "number"), [("0", signal.SIGTERM), ("2", signal.SIGINT)])
def test_stopped_scrub_keeps_finished_layers(shop: Shop, jobs: str, number: signal.Signals) -> None:
    shop.overlays(9)
    with shop.running("--jobs", jobs, *SLOW) as job:
        job.until(is_under_way(shop, 2), "two layers")
        os.killpg(job.pid, number)
        ended = job.end()
        job.all_gone()
    told = told_by(ended, 128 + number)
    assert len(ended.stderr.splitlines()) == 1
    first = names(told)
    assert 2 <= len(first) < 10
    assert told["summary"]["left"] == 10 - len(first)
    state = shop.status()
    assert state["runs"][-1]["result"] == "interrupted"
    assert state["runs"][-1]["ended"] is not None
    assert state["runs"][-1]["layers"] == len(first)
    assert {n for n, when in shop.verified().items() if when} == set(first)
    second = names(shop.run("--jobs", jobs))
    assert sorted(first + second) == sorted(snapshot_of_layers(shop))
    assert [one["result"] for one in shop.status()["runs"]] == ["interrupted", "complete"]
    assert len(shop.run()["layers"]) == 10


@pytest.mark.long
def test_second_interrupt_ends_a_scrub_at_once(shop: Shop) -> None:
    """Its worker hangs, as one does that waits for a sick disk."""
    shop.overlays(2)
    rules = shop.rules(rule("image_read", "stop"))
    with shop.running("--jobs", "1", *SLOW, rules=rules) as job:
        (worker,) = job.stopped()
        assert worker != job.pid
        is_round = job.is_round()
        job.signal(signal.SIGINT)
        job.until(is_round, "it to meet the first one")
        job.signal(signal.SIGINT)
        ended = job.end()
        job.all_gone()
    assert ended.status == 130
    assert ended.stderr == "addcow: interrupted\n"
    assert shop.status()["runs"][-1]["result"] == "interrupted"
    first = {name for name, when in shop.verified().items() if when}
    assert {*first, *names(shop.run())} == set(snapshot_of_layers(shop))


@pytest.mark.parametrize(("jobs", "target"), [("0", "parent"), ("2", "group")])
def test_killed_scrub_keeps_finished_layers(
    shop: Shop, rng: random.Random, jobs: str, target: str
) -> None:
    shop.overlays(9)
    with shop.running("--jobs", jobs, *SLOW) as job:
        job.until(is_under_way(shop, rng.randrange(1, 3)), "some layers")
        if target == "group":
            os.killpg(job.pid, signal.SIGKILL)
        else:
            job.signal(signal.SIGKILL)
        assert job.end().status == -signal.SIGKILL
        job.all_gone()
        assert job.stderr == ""
    state = shop.status()
    last = state["runs"][-1]
    assert (last["result"], last["ended"]) == ("unfinished", None)
    shown = {n: when for n, when in shop.verified().items() if when}
    assert 1 <= len(shown) < 10
    second = names(shop.run("--jobs", jobs))
    assert sorted([*shown, *second]) == sorted(snapshot_of_layers(shop))
    state = shop.status()
    assert (state["coverage"]["pass"], state["coverage"]["pass-left"]) == (1, 0)
    assert {n: shop.verified()[n] for n in shown} == shown, "verified twice"
    assert len(shop.run()["layers"]) == 10


EVENTS = ["header_read", "bitmap_load", "image_read", "backing_read"]


@pytest.mark.long
@pytest.mark.parametrize("event", EVENTS)
def test_scrub_killed_at_any_event_keeps_finished_layers(
    shop: Shop, rng: random.Random, event: str
) -> None:
    shop.overlays(4)
    flip(shop.here / "vm02.raw", 3 * CLUSTER)
    status, expected = shop.verify()
    assert status == 2
    turns = 0
    for number in (0, 1, rng.randrange(2, 6), rng.randrange(6, 12)):
        shop.state.unlink(missing_ok=True)
        rules = shop.rules(rule(event, "kill", once="on", after=number))
        command = (*shop.words, "--jobs", "0", str(shop.here))
        ended = shop.warm.run(*command, cwd=shop.here, rules=rules)
        if not rules.struck:
            break
        turns += 1
        assert ended.status == -signal.SIGKILL
        shown: dict[str, str] = {}
        if shop.state.exists() and shop.state.stat().st_size:
            shown = {n: when for n, when in shop.verified().items() if when}
        told = shop.run(status=2 if "vm02.add-cow" not in shown else 0)
        assert not set(names(told)) & set(shown)
        state = shop.status()
        assert (state["coverage"]["pass"], state["coverage"]["pass-left"]) == (1, 0)
        found = {one["filename"]: one for one in state["layers"]}
        for name, one in expected.items():
            assert (found[name]["exit"], found[name]["ranges"]) == (one["exit"], one["ranges"])
    assert turns


@pytest.mark.long
def test_kills_at_random_moments_do_not_damage_the_state(shop: Shop, rng: random.Random) -> None:
    """Again and again on one state, whenever the parent has read so much."""
    shop.overlays(9)
    order: list[dict[str, str | None]] = []
    for _ in range(5):
        least = rng.randrange(1, 4 * MiB)
        with shop.running("--jobs", "0", "-r", "8M") as job:
            base = read_by(job.pid)
            job.until(
                lambda job=job, base=base, least=least: (  # type: ignore[misc]
                    job.has_ended or read_by(job.pid) - base >= least
                ),
                "some bytes",
            )
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
            job.end()
        if shop.state.exists() and shop.state.stat().st_size:
            order.append(shop.verified())
    shop.run()
    order.append(shop.verified())
    for before, after in itertools.pairwise(order):
        assert all(after[n] is not None for n, when in before.items() if when)
    assert None not in order[-1].values()
    assert shop.status()["coverage"]["pass-left"] == 0


def read_by(pid: int) -> int:
    """The bytes that the kernel has counted for reads of a process and its ended children."""
    with suppress(OSError):
        text = Path(f"/proc/{pid}/io").read_text()
        return int(next(line for line in text.splitlines() if "rchar" in line).split()[1])
    return 1 << 60


# ---- nothing is read twice ----


def counted(shop: Shop, *words: str) -> tuple[int, Told]:
    """Run a scrub to its end; returns the bytes that it and its processes read, and its report."""
    with tempfile.TemporaryFile("w+") as out:
        command = [sys.executable, "-m", "addcow_mp", *shop.words, *words, str(shop.here)]
        process = subprocess.Popen(command, stdout=out, stderr=out)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        read = read_by(process.pid)  # of one that has ended and is not yet forgotten
        process.wait()
        return read, json.loads(os.pread(out.fileno(), 1 << 20, 0).decode().partition("addcow:")[0])


#: What is hashed between two notes of how far a process has come: a group of leaves.
STEP = 16 * MiB


@pytest.mark.long
@pytest.mark.parametrize(("jobs", "target"), [("0", signal.SIGKILL), ("2", signal.SIGTERM)])
def test_scrub_continues_within_a_large_layer(
    shop: Shop, rng: random.Random, jobs: str, target: signal.Signals
) -> None:
    """640 MiB of data, stopped when the state file shows that 256 MiB are verified."""
    size = 640 * MiB
    piece = rng.randbytes(MiB)
    with (shop.here / "base.img").open("wb") as file:
        for number in range(size // MiB):
            file.write(number.to_bytes(8, "little") + piece[8:])
    shop.manifest("base.img")
    flip(shop.here / "base.img", 7 * MiB)
    flip(shop.here / "base.img", 600 * MiB)
    nothing, _ = counted(shop, "--jobs", jobs, "--time-limit", "0")
    with shop.running("--jobs", jobs, "-r", "160M") as job:
        job.until(lambda: bytes_verified(shop) >= 256 * MiB, "256 MiB to be verified")
        os.killpg(job.pid, target)
        job.end()
        job.all_gone()
    state = shop.status()
    assert state["coverage"]["pass-left"] == 1
    assert state["layers"][0]["verified"] is None
    kept = state["coverage"]["bytes-verified"]
    assert 256 * MiB <= kept <= size
    read, told = counted(shop, "--jobs", jobs)
    (layer,) = told["layers"]
    assert layer["exit"] == 2
    assert [one["start"] for one in layer["ranges"]] == [7 * MiB, 600 * MiB]
    # Each process was in the midst of a step, and a worker's start reads modules.
    again = max(1, int(jobs)) * (STEP + 8 * MiB)
    assert read - nothing <= size - kept + again, "it read again what it had verified"
    assert shop.status()["coverage"]["pass-left"] == 0
    assert [one["start"] for one in shop.layers()[0]["ranges"]] == [7 * MiB, 600 * MiB]


@pytest.mark.long
@BOTH
def test_scrub_continues_within_a_sparse_layer_and_keeps_its_damage(
    shop: Shop, rng: random.Random, jobs: str
) -> None:
    """2 GiB with holes, killed at a place that is not among the first parts; damage is kept."""
    with (shop.here / "base.img").open("wb") as file:
        for at in range(0, WIDE, MiB):
            file.seek(at)
            file.write(rng.randbytes(4 * KiB))
        file.truncate(WIDE)
    shop.manifest("base.img")
    hit = [number * 100 * MiB for number in sorted(rng.sample(range(20), 5))]
    for at in hit:
        flip(shop.here / "base.img", at)
    for after in (3, 700):
        rules = shop.rules(rule("backing_read", "kill", once="on", after=after))
        with shop.running("--jobs", jobs, rules=rules) as job:
            job.end()
            job.all_gone()
        shop.status()
    told = shop.run("--jobs", jobs, status=2)
    assert [one["start"] for one in told["layers"][0]["ranges"]] == hit


def wide_layer(shop: Shop) -> None:
    """2 GiB, of which a scrub reads 128 MiB."""
    with (shop.here / "base.img").open("wb") as file:
        for at in range(0, WIDE, MiB):
            file.seek(at)
            file.write(f"{at}".encode().ljust(4 * KiB, b"."))
        file.truncate(WIDE)
    shop.manifest("base.img")


IN_PART = ("--time-limit", "1s", "-r", "48M")


@pytest.mark.long
@BOTH
def test_scrub_reports_damage_of_an_unfinished_layer(shop: Shop, jobs: str) -> None:
    """Who has an hour each night would else hear of it when all nights are over."""
    wide_layer(shop)
    flip(shop.here / "base.img", 3 * MiB)
    told = told_by(shop.warm.run(*shop.words, "--jobs", jobs, *IN_PART, ".", cwd=shop.here), 2)
    assert told["summary"]["left"] == 1
    (layer,) = shop.layers()
    assert layer["verified"] is None
    assert layer["exit"] == 2
    assert leaves_of([layer]) == {"base.img": {3 * MiB // LEAF}}
    assert shop.status()["runs"][-1]["different"] == 1


@pytest.mark.long
def test_scrub_restarts_a_layer_with_a_new_manifest(shop: Shop) -> None:
    wide_layer(shop)
    shop.run("--jobs", "0", *IN_PART, status=75)
    assert 0 < shop.status()["coverage"]["bytes-verified"] < 128 * MiB
    os.utime(shop.here / "base.img")
    shop.manifest("base.img", "--replace")
    assert shop.run("--jobs", "0")["layers"][0]["bytes"] == 128 * MiB
    assert shop.status()["runs"][-1]["bytes"] == 128 * MiB


@pytest.mark.long
def test_scrub_survives_a_killed_worker(shop: Shop) -> None:
    wide_layer(shop)
    flip(shop.here / "base.img", 2047 * MiB)
    with shop.running("--jobs", "2", "-r", "64M") as job:
        job.until(lambda: bool(job.workers()), "a worker")
        base = sum(read_by(pid) for pid in job.workers())
        job.until(lambda: sum(read_by(pid) for pid in job.workers()) > base + MiB, "its work")
        job.signal(signal.SIGKILL, *job.workers())
        ended = job.end()
        job.all_gone()
    assert ended.stderr == ""
    assert leaves_of(told_by(ended, 2)["layers"]) == {"base.img": {2047 * MiB // LEAF}}
    assert shop.status()["runs"][-1]["result"] == "complete"


@BOTH
def test_scrub_retries_a_layer_that_it_could_not_read(shop: Shop, jobs: str) -> None:
    shop.overlays(3)
    rules = shop.rules(rule("backing_read", cluster=9))
    words = ("farm", "verify", "--output", "json", "--jobs", jobs, str(shop.here))
    expected = shop.warm.run(*words, cwd=shop.here, rules=rules)
    told = shop.run("--jobs", jobs, status=expected.status, rules=rules)
    document = json.loads(expected.stdout)
    assert by_name(told["layers"]) == by_name(document["images"] + document["files"])
    assert shop.verified()["base.img"] is None
    assert told["summary"]["left"] == 0
    shop.run("--jobs", jobs)
    assert None not in shop.verified().values()


@pytest.mark.long
def test_kernel_counts_no_byte_read_twice_in_a_round(shop: Shop) -> None:
    shop.overlays(9, clusters=64)
    nothing, _ = counted(shop, "--jobs", "0", "--time-limit", "0")
    total, done = 0, 0
    for _ in range(30):
        read, told = counted(shop, "--jobs", "0", "--time-limit", "0.6s", "-r", "48M")
        total, done = total + read - nothing, done + len(told["layers"])
        if done == 10:
            break
    runs = shop.status()["runs"]
    assert len(runs) > 2
    # In each run, what was under way when it ended may have been read for nothing.
    assert total <= 40 * MiB + len(runs) * 4 * MiB + 10 * MiB
    assert sum(one["layers"] for one in runs) == done == 10


# ---- layers that come and go ----


def test_scrub_status_counts_files_that_no_longer_exist(shop: Shop) -> None:
    shop.overlays(2)
    flip(shop.here / "vm01.raw", 5 * CLUSTER)
    shop.run(status=2)
    (shop.here / "vm01.add-cow").unlink()
    coverage = shop.status()["coverage"]
    assert (coverage["gone"], coverage["layers"], coverage["different"]) == (1, 2, 0)


def test_scrub_status_exits_with_1_for_unverified_layers(shop: Shop) -> None:
    shop.overlays(2)
    (shop.here / "vm01.add-cow.manifest").unlink()
    shop.run(status=1)
    assert shop.status()["coverage"]["unverified"] == 1
    words = ("farm", "scrub", "status", "--state", str(shop.state))
    result = addcow(*words, cwd=shop.here)
    assert result.status == 1
    assert "1 unverified" in result.lines[-1]


def test_scrub_drops_removed_layers_and_adds_new_ones(shop: Shop) -> None:
    shop.overlays(3)
    shop.run()
    for name in ("vm01.add-cow", "vm01.raw", "vm01.add-cow.manifest"):
        (shop.here / name).unlink()
    draw(shop.here / "new.add-cow", "K" * 16)
    shop.manifest("new.add-cow")
    told = shop.run()
    assert "new.add-cow" in names(told)
    assert "vm01.add-cow" not in names(told)
    state = shop.status()
    assert state["coverage"]["gone"] == 1
    assert state["coverage"]["layers"] == 4
    assert "vm01.add-cow" not in shop.verified()


def test_scrub_counts_a_returned_layer_again(shop: Shop) -> None:
    shop.overlays(2)
    shop.run()
    paths = [shop.here / f"vm01{suffix}" for suffix in (".add-cow", ".raw", ".add-cow.manifest")]
    elsewhere = shop.here.parent / "elsewhere"
    elsewhere.mkdir()
    for path in paths:
        path.rename(elsewhere / path.name)
    shop.run()
    assert shop.status()["coverage"]["gone"] == 1
    for path in paths:
        (elsewhere / path.name).rename(path)
    assert "vm01.add-cow" in names(shop.run())
    assert shop.status()["coverage"]["gone"] == 0


def test_removed_layer_does_not_delay_the_round(shop: Shop) -> None:
    shop.overlays(3)
    shop.run("--time-limit", "0", status=75)
    for path in shop.here.glob("vm01*"):
        path.unlink()
    assert shop.run()["summary"]["left"] == 0
    assert shop.status()["coverage"]["pass-left"] == 0


@pytest.mark.long
def test_layer_with_a_new_manifest_is_verified_in_the_same_round(shop: Shop) -> None:
    shop.overlays(6)
    with shop.running("--jobs", "0", *SLOW) as job:
        job.until(is_under_way(shop, 2), "two layers")
        job.signal(signal.SIGTERM)
        first = names(told_by(job.end(), 143))
    again = next(name for name in first if name.startswith("vm"))
    os.utime(shop.here / again.replace(".add-cow", ".raw"))
    shop.manifest(again, "--replace")
    told = shop.run()
    assert again in names(told)
    assert sorted({*first, *names(told)}) == sorted(snapshot_of_layers(shop))
    assert set(names(told)) & set(first) == {again}


def test_scrub_accepts_data_that_a_new_manifest_records(shop: Shop) -> None:
    shop.overlays(2)
    flip(shop.here / "vm01.raw", 3 * CLUSTER)
    shop.run(status=2)
    shop.manifest("vm01.add-cow", "--replace")
    shop.run()
    assert {one["exit"] for one in shop.layers()} == {0}


def test_scrub_reports_a_lost_manifest(shop: Shop) -> None:
    shop.overlays(2)
    shop.run()
    (shop.here / "vm01.add-cow.manifest").unlink()
    told = shop.run(status=1)
    assert told["summary"]["unverified"] == 1
    one = next(one for one in shop.layers() if one["filename"].endswith("vm01.add-cow"))
    assert one["exit"] == 1
    assert [f["name"] for f in one["findings"]] == ["no-manifest"]


def test_scrub_of_an_empty_farm(shop: Shop) -> None:
    told = shop.run()
    assert (told["layers"], told["summary"]["bytes"]) == ([], 0)
    assert shop.status()["coverage"]["layers"] == 0


# ---- names ----

ODD = [b"new\nline", b"caf\xe9 \xff", b"-o", b"a%b'c\"d", "ユニコード".encode(), b" "]


def odd_farm(shop: Shop) -> None:
    for number, name in enumerate(ODD):
        place = shop.here / os.fsdecode(b"d " + name)
        place.mkdir()
        image, cow = os.fsdecode(name + b".raw"), os.fsdecode(name + b".add-cow")
        draw_raw(place / "base.img", "AB")
        draw_raw(place / image, "XY")
        content = overlay_bytes(image=image, size=2 * CLUSTER, backing="base.img", local=[0])
        (place / cow).write_bytes(content)
        shop.manifest(f"./{os.path.relpath(place, shop.here)}/{cow}")
        if number % 2:
            flip(place / image, 77)


@pytest.mark.long
def test_scrub_stores_names_of_any_bytes(shop: Shop) -> None:
    odd_farm(shop)
    status, expected = shop.verify()
    assert status == 2
    assert len(expected) == 2 * len(ODD)
    told = shop.run(status=2)
    assert by_name(told["layers"]) == expected
    assert {one["filename"] for one in shop.layers()} == expected.keys()
    for one in told["layers"]:
        assert os.path.exists(one["filename"])
    shop.run(status=2)
    state = shop.status()
    assert (state["coverage"]["layers"], state["coverage"]["gone"]) == (2 * len(ODD), 0)


@pytest.mark.long
def test_scrub_prints_one_line_for_a_finding_with_any_name(shop: Shop) -> None:
    odd_farm(shop)
    words = ("farm", "scrub", "run", "--state", str(shop.state), ".")
    for command in (words, ("farm", "scrub", "status", "--state", str(shop.state))):
        done = subprocess.run(
            [sys.executable, "-m", "addcow_mp", *command],
            cwd=shop.here,
            capture_output=True,
            check=False,
        )
        assert b"Traceback" not in done.stderr
        marked = [line for line in done.stdout.splitlines() if line.startswith(b"DIFFERS")]
        assert len(marked) == len(ODD) // 2
        assert all(line.endswith(b"differ") for line in marked)


def test_scrub_identifies_a_farm_by_any_path(shop: Shop) -> None:
    shop.overlays(3)
    up = shop.here.parent
    shop.run("--jobs", "0", place="here", cwd=up)
    shop.run("--jobs", "0", place=".", cwd=shop.here)
    shop.run("--jobs", "0", place="../here/", cwd=shop.here)
    relative = (*shop.words[:4], os.path.relpath(shop.state, up), *shop.words[5:], "here")
    told_by(shop.warm.run(*relative, cwd=up), 0)
    state = shop.status()
    assert len(state["runs"]) == 4
    assert state["coverage"]["layers"] == 4
    assert state["coverage"]["gone"] == 0
    assert state["coverage"]["pass"] == 4
    assert all(one["filename"] == os.path.abspath(one["filename"]) for one in state["layers"])


def test_scrub_continues_from_another_working_directory(shop: Shop) -> None:
    shop.overlays(6)
    up = shop.here.parent
    # Time for some of the layers of 1 MiB, not for all of them.
    words = ("--jobs", "0", "--time-limit", "3s", "-r", "1M")
    first = shop.run(*words, status=75, place="here", cwd=up)
    assert first["layers"]
    second = shop.run(place=".", cwd=shop.here)
    assert sorted(names(first) + names(second)) == sorted(snapshot_of_layers(shop))


def test_state_file_within_the_farm_is_not_a_layer(shop: Shop) -> None:
    shop.overlays(2)
    inside = Shop(shop.here, shop.here / "state", shop.warm)
    for _ in range(2):
        assert len(inside.run()["layers"]) == 3
    assert inside.status()["coverage"]["layers"] == 3


# ---- two at a time, and looking meanwhile ----


@BOTH
def test_second_scrub_of_a_state_file_is_refused(shop: Shop, jobs: str) -> None:
    shop.overlays(3)
    rules = shop.rules(rule("backing_read", "stop", once="on", cluster=5))  # not of the first look
    with shop.running("--jobs", jobs, rules=rules) as job:
        stopped = job.stopped()
        before = files_of(shop.state.parent)
        line = one_line(shop.warm.run(*shop.words, str(shop.here), cwd=shop.here))
        assert str(shop.state) in line
        assert files_of(shop.state.parent) == before
        state = shop.status()
        assert len(state["runs"]) == 1
        assert (state["runs"][0]["ended"], state["runs"][0]["result"]) == (None, "unfinished")
        other = Shop(shop.here, shop.state.with_name("other"), shop.warm)
        assert len(other.run()["layers"]) == 4  # another state file is independent
        job.signal(signal.SIGCONT, *stopped)
        told_by(job.end(), 0)
    assert [one["result"] for one in shop.status()["runs"]] == ["complete"]


@pytest.mark.long
def test_concurrent_scrub_runs_agree(shop: Shop) -> None:
    """They may start to make the state at once; who comes second is told so."""
    shop.overlays(2)
    jobs = [Job(*shop.words, str(shop.here), cwd=shop.here) for _ in range(5)]
    try:
        ended = [job.end() for job in jobs]
    finally:
        for job in jobs:
            job.close()
    for one in ended:
        if one.status:
            one_line(one)
        else:
            told_by(one, 0)
    good = [one for one in ended if one.status == 0]
    assert good
    state = shop.status()
    assert [one["result"] for one in state["runs"]] == ["complete"] * len(good)
    assert None not in shop.verified().values()


@pytest.mark.long
def test_scrub_status_works_during_a_run(shop: Shop) -> None:
    shop.overlays(9)
    counts: list[int] = []
    with shop.running("--jobs", "2", "-r", "7M") as job:
        job.until(is_under_way(shop, 1), "the first layer")
        while not job.has_ended and len(counts) < 60:
            words = ("farm", "scrub", "status", "--state", str(shop.state), "--output", "json")
            told = json.loads(shop.warm.run(*words, cwd=shop.here).stdout)
            counts.append(told["coverage"]["verified"])
        told_by(job.end(), 0)
    assert counts == sorted(counts)
    assert shop.status()["coverage"]["verified"] == 10


# ---- states that are none ----

STATES = ["text", "image", "database", "zeros", "cut", "scribbled", "directory", "fifo", "missing"]


def make_state(shop: Shop, what: str) -> None:
    path = shop.state
    if what == "text":
        path.write_text("my shopping list\n")
    elif what == "image":
        draw_raw(path, "ABCD")
    elif what == "database":
        base = sqlite3.connect(path)
        base.execute("CREATE TABLE layers (filename TEXT)")
        base.execute("CREATE TABLE runs (begun TEXT)")
        base.commit()
        base.close()
    elif what == "zeros":
        path.write_bytes(bytes(MiB))
    elif what in ("cut", "scribbled"):
        shop.run()
        content = path.read_bytes()
        half = content[:512] if what == "cut" else content[:100] + b"\xa5" * (len(content) - 100)
        path.write_bytes(half)
    elif what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)


@pytest.mark.parametrize("what", STATES)
def test_scrub_refuses_and_keeps_a_file_that_is_no_state(shop: Shop, what: str) -> None:
    shop.overlays(1)
    make_state(shop, what)
    state = shop.state / "no such directory" / "state" if what == "missing" else shop.state
    before = files_of(shop.state.parent)
    run = ("farm", "scrub", "run", "--state", str(state), str(shop.here))
    status = ("farm", "scrub", "status", "--state", str(state))
    for command in (run, status, (*status, "--output", "json")):
        ended = shop.warm.run(*command, cwd=shop.here)
        assert str(state) in one_line(ended)
        if "json" in command:
            assert str(state) in json.loads(ended.stdout)["error"]
        else:
            assert ended.stdout == ""
        assert files_of(shop.state.parent) == before


@pytest.mark.long
@pytest.mark.parametrize("table", ["layer", "run"])
def test_scrub_refuses_a_damaged_state_file(shop: Shop, rng: random.Random, table: str) -> None:
    """A program that has scribbled in it, or a disk: at worst one line, never a traceback."""
    shop.overlays(1)
    flip(shop.here / "vm00.raw", 5)
    shop.run(status=2)
    content = shop.state.read_bytes()
    with sqlite3.connect(shop.state) as base:
        columns = [row[1] for row in base.execute(f"PRAGMA table_info({table})")]
    base.close()
    values = ["garbage", -1, 1 << 62, b"\xff", 1.5e308, "[]", "{}", "[[1]]", '[{"file": 5}]']
    failed = []
    for column in columns:
        for value in rng.sample(values, 1):
            shop.state.write_bytes(content)
            with suppress(sqlite3.Error), sqlite3.connect(shop.state) as base:
                base.execute(f"UPDATE {table} SET {column} = ?", (value,))  # noqa: S608
            base.close()
            for words in (("status",), ("status", "--output", "json"), ("run", str(shop.here))):
                command = ("farm", "scrub", *words, "--state", str(shop.state))
                try:
                    ended = shop.warm.run(*command, cwd=shop.here)
                except AssertionError as error:
                    failed.append((column, value, words[0], str(error).splitlines()[-1]))
                else:
                    assert ended.status in (0, 1, 2), ended
                    assert len(ended.stderr.splitlines()) <= 1, ended
    assert failed == []


def test_scrub_accepts_an_empty_state_file(shop: Shop) -> None:
    shop.overlays(1)
    shop.state.touch()
    assert len(shop.run()["layers"]) == 2
    assert shop.status()["coverage"]["verified"] == 2


def test_scrub_status_creates_no_state_file(shop: Shop) -> None:
    ended = shop.warm.run("farm", "scrub", "status", "--state", str(shop.state), cwd=shop.here)
    assert str(shop.state) in one_line(ended)
    assert list(shop.state.parent.iterdir()) == []


def test_scrub_follows_a_link_to_a_state_file(shop: Shop) -> None:
    shop.overlays(1)
    shop.run()
    link = Shop(shop.here, shop.state.with_name("link"), shop.warm)
    link.state.symlink_to("state")
    assert len(link.run()["layers"]) == 2
    assert link.state.is_symlink()
    assert len(shop.status()["runs"]) == 2


def test_scrub_status_reads_a_read_only_state_file(tmp_path: Path, shop: Shop) -> None:
    shop.overlays(1)
    mount = mounted("tmpfs", tmp_path)
    place = next(mount)
    try:
        inside = Shop(shop.here, place / "state", shop.warm)
        inside.run()
        remount(place, "ro")
        before = files_of(place)
        assert inside.status()["coverage"]["verified"] == 2
        line = one_line(shop.warm.run(*inside.words, str(shop.here), cwd=shop.here))
        assert str(inside.state) in line
        assert files_of(place) == before
    finally:
        with suppress(StopIteration):
            next(mount)


@pytest.mark.parametrize("leave", [0, 4 * KiB, 16 * KiB])
def test_scrub_refuses_a_state_file_on_a_full_disk(tmp_path: Path, shop: Shop, leave: int) -> None:
    shop.overlays(3)
    before = snapshot(shop.here)
    mount = mounted("tmpfs", tmp_path)
    place = next(mount)
    try:
        inside = Shop(shop.here, place / "state", shop.warm)
        filler = fill(place, leave=leave)
        line = one_line(shop.warm.run(*inside.words, str(shop.here), cwd=shop.here))
        assert str(inside.state) in line
        filler.unlink()
        assert len(inside.run()["layers"]) == 4
        assert inside.status()["coverage"]["pass-left"] == 0
    finally:
        with suppress(StopIteration):
            next(mount)
    assert snapshot(shop.here) == before


def test_disk_that_fills_up_keeps_the_state_file(tmp_path: Path, shop: Shop) -> None:
    shop.overlays(3)
    mount = mounted("tmpfs", tmp_path)
    place = next(mount)
    try:
        inside = Shop(shop.here, place / "state", shop.warm)
        inside.run()
        seen = inside.verified()
        filler = fill(place)
        ended = shop.warm.run(*inside.words, str(shop.here), cwd=shop.here)
        assert str(inside.state) in one_line(ended)
        assert {n: w for n, w in inside.verified().items() if w}.keys() == seen.keys()
        filler.unlink()
        assert len(inside.run()["layers"]) <= 4
        assert inside.status()["coverage"]["pass-left"] == 0
    finally:
        with suppress(StopIteration):
            next(mount)


# ---- samples ----

MANY = 1600


def marked(shop: Shop, leaves: int = MANY) -> list[Path]:
    """A base and an overlay in which every leaf differs, so that what was read can be told."""
    piece = bytes(range(256)) * (LEAF // 256)
    for name in ("base.img", "top.raw"):
        with (shop.here / name).open("wb") as file:
            for number in range(leaves):
                file.write(number.to_bytes(8, "little") + piece[8:])
    cow = overlay_bytes(
        image="top.raw", size=leaves * LEAF, backing="base.img", local=range(leaves)
    )
    (shop.here / "top.add-cow").write_bytes(cow)
    shop.manifest("top.add-cow")
    paths = [shop.here / "base.img", shop.here / "top.raw"]
    for path in paths:
        with path.open("r+b") as file:
            for number in range(leaves):
                file.seek(number * LEAF + 100)
                file.write(b"\xee\xee")
    return paths


def leaves_of(layers: list[Told]) -> dict[str, set[int]]:
    """The leaves that are said to differ, by file."""
    found: dict[str, set[int]] = {}
    for one in layers:
        for each in one["ranges"]:
            numbers = range(each["start"] // LEAF, -(-(each["start"] + each["length"]) // LEAF))
            found.setdefault(os.path.basename(each["file"]), set()).update(numbers)
    return found


@pytest.mark.long
@BOTH
@pytest.mark.parametrize("share", ["2%", "25.5%"])
def test_sample_reads_a_random_share_of_leaves(
    shop: Shop, rng: random.Random, jobs: str, share: str
) -> None:
    marked(shop)
    part = float(share[:-1]) / 100
    seen: dict[str, set[int]] = {"base.img": set(), "top.raw": set()}
    for turn in range(1, 4):
        told = shop.run("--jobs", jobs, "--sample", share, status=2)
        found = leaves_of(told["layers"])
        for one in told["layers"]:
            assert one["bytes"] % LEAF == 0
            # Six times the deviation of so many tosses: it is no chance if this fails.
            assert abs(one["bytes"] / LEAF - part * MANY) <= 6 * (MANY * part) ** 0.5
        assert sum(map(len, found.values())) * LEAF == told["summary"]["bytes"]
        for name, leaves in found.items():
            assert leaves - seen[name], "the same ones again"
            seen[name] |= leaves
            assert min(leaves) < MANY // 3
            assert max(leaves) > MANY * 2 // 3
        assert found["base.img"] != found["top.raw"]
        state = shop.status()
        assert {one["exit"] for one in state["layers"]} == {2}
        assert {one["verified"] for one in state["layers"]} == {None}
        assert None not in {one["sampled"] for one in state["layers"]}
        assert leaves_of(state["layers"]) == seen, f"forgotten in turn {turn}"
        assert state["runs"][-1]["sample"] == pytest.approx(part)
        assert state["runs"][-1]["bytes"] == told["summary"]["bytes"]


def test_sample_reads_no_more_than_it_reports(shop: Shop) -> None:
    marked(shop, 2400)
    nothing, _ = counted(shop, "--jobs", "0", "--time-limit", "0")
    read, told = counted(shop, "--jobs", "0", "--sample", "5%")
    # Header, bitmap and manifests are read in addition.
    extra = sum(p.stat().st_size for p in shop.here.glob("*.manifest")) * 2 + MiB
    assert read - nothing <= told["summary"]["bytes"] + extra


@BOTH
def test_smallest_sample_reads_one_leaf_of_each_layer(shop: Shop, jobs: str) -> None:
    draw_raw(shop.here / "base.img", "A" + "-" * 30 + "B")
    for number, cells in enumerate(("C" + "-" * 31, "-" * 31 + "D", "-" * 10 + "0E" + "-" * 20)):
        draw(shop.here / f"vm{number}.add-cow", cells)
        shop.manifest(f"vm{number}.add-cow")
    draw(shop.here / "empty.add-cow", "-" * 32)
    shop.manifest("empty.add-cow")
    told = shop.run("--jobs", jobs, "--sample", "0.001%")
    read = {os.path.basename(one["filename"]): one["bytes"] for one in told["layers"]}
    assert read.pop("empty.add-cow") == 0
    assert {name: size // LEAF for name, size in read.items()} == dict.fromkeys(read, 1)


@pytest.mark.long
def test_smallest_sample_finds_damage_in_every_leaf(shop: Shop) -> None:
    marked(shop, 300)
    told = shop.run("--sample", "0.001%", status=2)
    assert {name: len(leaves) for name, leaves in leaves_of(told["layers"]).items()} == {
        "base.img": 1,
        "top.raw": 1,
    }


def test_sample_reads_a_layer_of_written_zeros(shop: Shop) -> None:
    (shop.here / "base.img").write_bytes(bytes(MiB))
    shop.manifest("base.img")
    told = shop.run("--sample", "0.001%", place=str(shop.here / "base.img"))
    assert told["summary"]["bytes"] == LEAF


@pytest.mark.long
def test_sample_of_100_percent_finds_everything(shop: Shop, rng: random.Random) -> None:
    plant(shop, rng)
    status, expected = shop.verify()
    told = shop.run("--sample", "100%", status=status)
    assert by_name(told["layers"]) == expected


def test_sample_verifies_header_bitmap_and_manifest(shop: Shop, rng: random.Random) -> None:
    draw_raw(shop.here / "base.img", "AB")
    for number in range(3):
        draw(shop.here / f"vm{number}.add-cow", "-X")
        shop.manifest(f"vm{number}.add-cow")
    flip(shop.here / "vm0.add-cow", 900)
    flip(shop.here / "vm1.add-cow", CLUSTER)
    flip(shop.here / "vm2.add-cow.manifest", 4 * KiB + 60)
    _, expected = shop.verify()
    told = shop.run("--sample", "0.001%", status=2)
    for name, one in by_name(told["layers"]).items():
        assert one["exit"] == expected[name]["exit"], name
        findings = [f["name"] for f in expected[name]["findings"]]
        assert [f["name"] for f in one["findings"]] == findings


def test_sample_does_not_count_as_verification(shop: Shop) -> None:
    shop.overlays(3)
    told = shop.run("--sample", "50%")
    assert len(told["layers"]) == 4
    coverage = shop.status()["coverage"]
    assert (coverage["verified"], coverage["bytes-verified"]) == (0, 0)
    shop.run()
    before = shop.verified()
    shop.run("--sample", "50%")
    assert shop.verified() == before
    assert None not in {one["sampled"] for one in shop.layers()}


@pytest.mark.long
def test_sample_does_not_disturb_a_round(shop: Shop) -> None:
    shop.overlays(6)
    first = shop.run("--jobs", "0", "--time-limit", "3s", "-r", "1M", status=75)
    assert first["layers"]
    assert len(shop.run("--sample", "10%")["layers"]) == 7
    assert shop.status()["coverage"]["pass-left"] == first["summary"]["left"]
    second = shop.run()
    assert sorted(names(first) + names(second)) == sorted(snapshot_of_layers(shop))


@pytest.mark.long
def test_sample_that_misses_damage_does_not_forget_it(shop: Shop) -> None:
    shop.overlays(1, clusters=64)
    flip(shop.here / "vm00.raw", 33 * CLUSTER)
    shop.run(status=2)
    for _ in range(3):
        command = (*shop.words, "--sample", "0.01%", str(shop.here))
        assert shop.warm.run(*command, cwd=shop.here).status in (0, 2)
        assert leaves_of(shop.layers()) == {"vm00.raw": {33}}
        assert sorted(one["exit"] for one in shop.layers()) == [0, 2]


def test_whole_run_forgets_damage_that_was_repaired_after_a_sample(shop: Shop) -> None:
    shop.overlays(1)
    for number in range(16):
        flip(shop.here / "vm00.raw", number * CLUSTER)
    shop.run("--sample", "60%", status=2)
    for number in range(16):
        flip(shop.here / "vm00.raw", number * CLUSTER)
    shop.run()
    assert leaves_of(shop.layers()) == {}
    assert {one["exit"] for one in shop.layers()} == {0}


@pytest.mark.long
def test_sample_can_be_stopped(shop: Shop) -> None:
    shop.overlays(6)
    told = shop.run("--jobs", "0", "--sample", "90%", "--time-limit", "0", status=75)
    assert told["layers"] == []
    assert shop.status()["coverage"]["verified"] == 0
    assert len(shop.run("--sample", "90%")["layers"]) == 7


# ---- rates ----


def test_scrub_rate_applies_to_all_workers_together(shop: Shop) -> None:
    """No time is measured: within its limit it cannot have read more than the rate allows."""
    shop.overlays(9, clusters=64)
    told = shop.run("--jobs", "2", "--time-limit", "1s", "-r", "8M", status=75)
    # A second of it, and what had begun.
    assert told["summary"]["bytes"] <= 8 * MiB + 2 * 8 * MiB
    assert told["summary"]["left"] > 0


# ---- usage ----

USAGE = [
    ("run", "--state", "S"),
    ("run", "."),
    ("run", "--state", "S", "--sample", "0%", "."),
    ("run", "--state", "S", "--sample", "0.0%", "."),
    ("run", "--state", "S", "--sample", "100.1%", "."),
    ("run", "--state", "S", "--sample", "-5%", "."),
    ("run", "--state", "S", "--sample", "5", "."),
    ("run", "--state", "S", "--sample", "%", "."),
    ("run", "--state", "S", "--sample", "nan%", "."),
    ("run", "--state", "S", "--sample", "five%", "."),
    ("run", "--state", "S", "--sample", "\u0665%", "."),
    ("run", "--state", "S", "--sample", "1_0%", "."),
    ("run", "--state", "S", "--time-limit", "soon", "."),
    ("run", "--state", "S", "--time-limit", "-1s", "."),
    ("run", "--state", "S", "--limit-rate", "fast", "."),
    ("run", "--state", "S", "--limit-rate", "-1", "."),
    ("run", "--state", "S", "--jobs", "-1", "."),
    ("run", "--state", "S", "--output", "jsonl", "."),
    ("run", "--state", "S", "--progress-format", "xml", "."),
    ("run", "--state", "S", "--progress-fd", "99", "."),
    ("run", "--state", "S", "--repair", "."),
    ("status",),
    ("status", "--state", "S", "--output", "yaml"),
    ("status", "--state", "S", "."),
    ("begin",),
]


@pytest.mark.parametrize("words", USAGE, ids=" ".join)
def test_invalid_scrub_options_are_usage_errors(shop: Shop, words: tuple[str, ...]) -> None:
    place = [str(shop.state) if word == "S" else word for word in words]
    ended = shop.warm.run("farm", "scrub", *place, cwd=shop.here)
    assert ended.status == 64, ended
    assert ended.stdout == "" or "json" in "".join(words)
    (line,) = ended.stderr.splitlines()
    assert line.startswith("addcow: ")
    assert list(shop.state.parent.iterdir()) == []


def test_scrub_names_a_missing_directory(shop: Shop) -> None:
    command = (*shop.words, str(shop.here / "nowhere"))
    assert "nowhere" in one_line(shop.warm.run(*command, cwd=shop.here))


# ---- streams ----


@pytest.mark.long
@pytest.mark.parametrize("words", ["run --output json", "status"])
@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&-", "2>/dev/full"])
def test_scrub_works_with_closed_streams(shop: Shop, words: str, closed: str) -> None:
    shop.overlays(1)
    flip(shop.here / "vm00.raw", 3)
    shop.run(status=2)
    place = str(shop.here) if words.startswith("run") else ""
    line = f'"$0" -m addcow_mp farm scrub {words} --state "$1" {place} {closed}'
    done = ran(["sh", "-c", line, sys.executable, str(shop.state)], cwd=shop.here)
    assert done.returncode == 2, done
    assert done.stderr == ""
    assert len(shop.status()["runs"]) == 1 + words.startswith("run")


@pytest.mark.long
@pytest.mark.parametrize("words", ["run", "run --output json", "status --output json"])
@pytest.mark.parametrize("where", [">/dev/full", "| true"])
def test_scrub_records_results_that_it_cannot_print(shop: Shop, words: str, where: str) -> None:
    """A pipe without a reader, a full disk: no work is lost, and the message is clear."""
    shop.overlays(4)
    flip(shop.here / "vm00.raw", 3)
    shop.run(status=2)
    place = str(shop.here) if words.startswith("run") else ""
    line = f'"$0" -m addcow_mp farm scrub {words} --state "$1" {place} {where}'
    done = ran(["sh", "-c", line, sys.executable, str(shop.state)], cwd=shop.here)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1, done.stderr
    if where == ">/dev/full":
        assert done.returncode != 0
        assert "No space left" in done.stderr
    runs = shop.status()["runs"]
    assert len(runs) == 1 + words.startswith("run")
    assert runs[-1]["result"] == "complete"


# ---- hostile farms ----


def test_files_that_are_no_manifests_do_not_stop_a_scrub(shop: Shop) -> None:
    shop.overlays(2)
    os.mkfifo(shop.here / "other.img.manifest")
    (shop.here / "dir.img.manifest").mkdir()
    (shop.here / "link.img.manifest").symlink_to("/proc/self/mem")
    (shop.here / "huge.img.manifest").touch()
    os.truncate(shop.here / "huge.img.manifest", 1 << 40)
    with shop.running() as job:
        job.until(lambda: job.has_ended, "the end")
        ended = job.end()
        job.all_gone()
    told = json.loads(ended.stdout)
    found = {os.path.basename(one["filename"]): one["exit"] for one in told["layers"]}
    assert {found[n] for n in ("base.img", "vm00.add-cow", "vm01.add-cow")} == {0}


def test_scrub_does_not_follow_names_that_lead_outside(shop: Shop) -> None:
    secret = shop.here.parent / "secret.img"
    draw_raw(secret, "S")
    draw_raw(shop.here / "top.raw", "X")
    cow = overlay_bytes(image="top.raw", size=CLUSTER, backing="../secret.img", local=[0])
    (shop.here / "top.add-cow").write_bytes(cow)
    status, expected = shop.verify()
    told = shop.run(status=status)
    exits = {os.path.normpath(name): one["exit"] for name, one in expected.items()}
    assert {one["filename"]: one["exit"] for one in told["layers"]} == exits
    assert 0 not in exits.values()
    assert told["summary"]["bytes"] == 0
    assert read_header(shop.here / "top.add-cow").backing == "../secret.img"


# ---- what a stranger found ----


@pytest.mark.long
def test_stopped_sample_records_damage_and_continues(shop: Shop) -> None:
    for name in ("a.img", "b.img", "c.img"):
        draw_raw(shop.here / name, "ABCDEFGH" * 8)
        shop.manifest(name)
        flip(shop.here / name, 0)
    seen: set[str] = set()
    for _ in range(3):
        words = ("--sample", "99%", "--time-limit", "2s", "-r", "1M", "--jobs", "1")
        told = told_by(shop.warm.run(*shop.words, *words, str(shop.here), cwd=shop.here), 2)
        seen |= set(names(told))
        known = {os.path.basename(one["filename"]) for one in shop.layers() if one["exit"] == 2}
        assert known >= seen
    assert seen == {"a.img", "b.img", "c.img"}


@pytest.mark.long
@BOTH
def test_killed_scrub_repeats_one_second_at_any_rate(shop: Shop, jobs: str) -> None:
    """Of a base alone, at so low a rate that sixteen MiB would take a minute."""
    draw_raw(shop.here / "base.img", "ABCDEFGH" * 8)
    shop.manifest("base.img")
    rate = 256 * KiB
    with shop.running("--jobs", jobs, "-r", "256k") as job:
        job.until(lambda: bytes_verified(shop) >= MiB, "a MiB")
        os.killpg(job.pid, signal.SIGKILL)
        job.end()
        job.all_gone()
    kept = shop.status()["coverage"]["bytes-verified"]
    assert kept >= MiB
    read = shop.run()["summary"]["bytes"]
    assert read <= 4 * MiB - kept + 2 * rate


def bytes_verified(shop: Shop) -> int:
    with suppress(AssertionError, KeyError, OSError, ValueError):
        found: int = shop.status()["coverage"]["bytes-verified"]
        return found
    return 0


@pytest.mark.long
def test_scrub_counts_only_bytes_that_it_verified(shop: Shop) -> None:
    draw_raw(shop.here / "base.img", "ABCDEFGH" * 8)
    shop.manifest("base.img")
    limit, total = 0.6, 0
    while shop.status()["coverage"]["pass-left"] if shop.state.exists() else True:
        words = ("--time-limit", f"{limit:.2f}s", "-r", "1500k")
        ended = shop.warm.run(*shop.words, *words, str(shop.here), cwd=shop.here)
        total += json.loads(ended.stdout)["summary"]["bytes"]
        assert shop.status()["coverage"]["bytes-verified"] == total
        limit *= 1.1
    assert total == 4 * MiB


def test_scrub_does_not_verify_a_replaced_layer(shop: Shop) -> None:
    shop.overlays(1)
    shutil.copyfile(shop.here / "base.img", shop.here / "new.img")
    (shop.here / "new.img").rename(shop.here / "base.img")
    shop.run(status=2)
    state = shop.status()
    assert (state["coverage"]["verified"], state["coverage"]["bytes-verified"]) == (1, MiB)
    assert shop.verified()["base.img"] is None


@pytest.mark.long
def test_scrub_reports_damage_when_the_state_file_is_lost(shop: Shop) -> None:
    draw_raw(shop.here / "a.img", "ABCDEFGH")
    draw_raw(shop.here / "b.img", "ABCDEFGH" * 8)
    for name in ("a.img", "b.img"):
        shop.manifest(name)
    flip(shop.here / "a.img", 0)
    with shop.running("--jobs", "0", "-r", "1M") as job:
        job.until(lambda: bytes_verified(shop) > 0, "the first layer")
        shop.state.unlink()
        shop.state.mkdir()
        ended = job.end()
    assert ended.status == 2
    told = json.loads(ended.stdout)
    assert [(one["file"], one["start"]) for one in told["ranges"]] == [
        (str(shop.here / "a.img"), 0)
    ]
    assert "cannot write it" in ended.stderr


def test_scrub_remembers_damage_of_a_layer_that_is_absent(shop: Shop) -> None:
    shop.overlays(1)
    flip(shop.here / "base.img", 0)
    shop.run(status=2)
    for name in ("base.img", "base.img.manifest"):
        (shop.here / name).rename(shop.here.parent / name)
    shop.run(status=1)
    for name in ("base.img", "base.img.manifest"):
        (shop.here.parent / name).rename(shop.here / name)
    (base,) = (one for one in shop.layers() if one["filename"].endswith("base.img"))
    assert base["exit"] == 2
    assert base["ranges"]


# ---- threads ----


def is_locked(state: Path) -> bool:
    """Whether another process finds the database locked."""
    words = (
        "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('BEGIN IMMEDIATE')"
    )
    done = subprocess.run(
        [sys.executable, "-c", words, str(state)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 or "locked" in done.stderr, done
    return done.returncode != 0


def test_state_is_locked_while_a_thread_of_the_same_process_reads_it(tmp_path: Path) -> None:
    state = tmp_path / "state.db"
    with scrub_state.opened(str(state)) as opened:
        opened._database.execute("BEGIN IMMEDIATE")
        assert is_locked(state)
        for call in (scrub_state.read, lambda path: scrub_state.opened(path).__enter__()):
            errors: list[AddcowError] = []

            def run(call: Callable[[str], object] = call, errors: Any = errors) -> None:
                try:
                    call(str(state))
                except AddcowError as error:
                    errors.append(error)

            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            assert is_locked(state)
        assert "another scrub is using it" in str(errors[0])
        opened._database.execute("COMMIT")
    assert not is_locked(state)
