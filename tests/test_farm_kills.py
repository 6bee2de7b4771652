"""Tests of interrupted farm jobs: kills, signals, full disks, guests and power cuts.

After any of them every guest's view is unchanged, the same command does the remaining images, and
finished images are not done again. A failure of one image does not affect the others. Moments are
random (in finished images and milliseconds) or chosen by fault rules.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

import oracle
from support.command import (
    ALL_ALLOCATED,
    CLUSTER,
    KiB,
    MiB,
    addcow,
    draw,
    draw_raw,
    local_clusters,
    overlay_bytes,
    read_header,
    snapshot,
    stored_bytes,
    tool,
)
from support.fault_rules import Rules, rule, rules_for, stopping_both
from support.file_systems import free, made_disk, mounted
from support.guests import talking
from support.model import Files
from support.powercut import (
    Disk,
    Moment,
    lose_power,
    make_durable,
)
from support.processes import Ended, Job, memory_of, running
from support.promises import Promise
from support.wide import Wide

pytestmark = pytest.mark.sample(1)

WORDS = {"commit": ("commit",), "flatten": ("flatten",), "discard": ("flatten", "--discard")}
EACH = pytest.mark.parametrize("job", list(WORDS))
BOTH = pytest.mark.parametrize("job", ["commit", "flatten"])

# A limit that nothing here reaches: only workers keep to it, so that they do all the work.
BY_WORKERS = ("--jobs", "2", "-r", "16G")

# Seconds within which what has been killed or asked to stop must be over.
SOON = 2.0

CHECKPOINT = 512 * MiB
TASK = 64 * MiB


# ---- farms ----


@dataclass(frozen=True)
class Farm:
    """Chains in one directory; each is its overlays from the top down, and a raw base.

    ``seen`` are the digests of what guests see in each overlay.
    """

    here: Path
    chains: tuple[tuple[str, ...], ...]
    seen: dict[str, str]

    @classmethod
    def lay(
        cls,
        here: Path,
        rng: random.Random,
        *,
        chains: int = 10,
        depth: int = 3,
        clusters: int = 12,
        cluster: int = CLUSTER,
    ) -> Farm:
        """Make chains with data, garbage, zeros and holes in every layer."""
        laid = []
        for number in range(chains):
            draw_raw(here / f"c{number:02}.img", cells(rng, "ABC-0", clusters), cluster=cluster)
            below, kind = f"c{number:02}.img", "raw"
            names: list[str] = []
            for layer in range(depth):
                name = f"c{number:02}-{layer}.add-cow"
                # The first is data in any case: every image has something to do.
                some = "DE"[layer % 2] + cells(rng, "FGHxy--0", clusters - 1)
                draw(here / name, some, below, backing_format=kind, cluster=cluster)
                names.insert(0, name)
                below, kind = name, "add-cow"
            laid.append(tuple(names))
        return cls.of(here, laid)

    @classmethod
    def of(cls, here: Path, chains: list[tuple[str, ...]]) -> Farm:
        """The farm of these chains, as they are now."""
        seen = {name: oracle.digest(str(here / name)) for names in chains for name in names}
        return cls(here, tuple(chains), seen)

    @property
    def overlays(self) -> list[str]:
        """The names of all overlays."""
        return [name for names in self.chains for name in names]

    def guests(self, job: str) -> list[str]:
        """The overlays whose view stays."""
        return [names[0] for names in self.chains] if job == "commit" else self.overlays

    def base(self, name: str) -> Path:
        """The raw base of the chain of an overlay."""
        return self.here / f"{name.partition('.')[0].partition('-')[0]}.img"

    def holds(self, job: str) -> None:
        """Assert that every guest sees what it saw; discarded ones run on the image alone."""
        lost = [name for name in self.guests(job) if self._view(name) != self.seen[name]]
        assert lost == []

    def _view(self, name: str) -> str:
        path = self.here / name
        if path.exists():
            return oracle.digest(str(path))
        return digest(path.with_suffix(".raw"))

    def _is_last(self, name: str, finished: list[str]) -> bool:
        """Whether nothing will be committed into this overlay any more."""
        chain = next(names for names in self.chains if name in names)
        return set(chain[: chain.index(name)]) <= set(finished)

    def is_done(self, job: str, *, but: tuple[str, ...] = ()) -> None:
        """Assert that the job has done all that it is for, ``but`` for some overlays."""
        self.holds(job)
        undone = [n for n in self.overlays if n not in but and not self._has_ended(job, n)]
        assert undone == []
        if job == "commit":
            tops = [names[0] for names in self.chains if not set(names) & set(but)]
            assert [n for n in tops if digest(self.base(n)) != self.seen[n]] == []

    def _has_ended(self, job: str, name: str) -> bool:
        path = self.here / name
        image = path.with_suffix(".raw")
        if job == "commit":
            return not local_clusters(path) and stored_bytes(image) == 0
        whole = digest(image) == self.seen[name]
        if job == "discard":
            return whole and not path.exists()
        return whole and bool(read_header(path).compatible & ALL_ALLOCATED)

    def times(self, names: list[str]) -> dict[str, tuple[int, int] | None]:
        """When the files of some overlays were changed; None for those that are gone."""
        paths = (p for n in names for p in (self.here / n, (self.here / n).with_suffix(".raw")))
        return {path.name: changed(path) for path in paths}

    def again(self, job: str, finished: list[str] | None = None) -> dict[str, dict[str, Any]]:
        """Run the same command to its end; what was ``finished`` before is left alone."""
        done = finished or []
        finished = [name for name in done if job != "commit" or self._is_last(name, done)]
        before = self.times(finished)
        told = told_by(farm(job, cwd=self.here), 0)
        assert self.times(finished) == before
        assert {one["state"] for one in told.values()} <= {"done", "nothing-to-do"}
        repeated = [n for n in finished if n in told and told[n]["state"] != "nothing-to-do"]
        assert repeated == []
        assert not told.keys() & set(finished) or job != "discard"
        self.is_done(job)
        return told


def thirty(here: Path, rng: random.Random) -> Farm:
    """A farm of thirty images."""
    return Farm.lay(here, rng, chains=10, depth=3)


def cells(rng: random.Random, marks: str, count: int) -> str:
    return "".join(rng.choices(marks, k=count))


def digest(path: Path) -> str:
    """Return the digest of a raw file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed(path: Path) -> tuple[int, int] | None:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime_ns, path.stat().st_ctime_ns
    return None


def command(job: str, *more: str) -> tuple[str, ...]:
    """Return the command line for a farm, which tells what it did in JSON."""
    return ("farm", *WORDS[job], "--output", "json", *more, ".")


def farm(job: str, *more: str, cwd: Path) -> Ended:
    """Run it to its end, without faults."""
    result = addcow(*command(job, *more), cwd=cwd)
    return Ended(result.status, result.stdout, result.stderr)


def told_by(ended: Ended, status: int) -> dict[str, dict[str, Any]]:
    """Return what a command said of each overlay, once its status is this one."""
    assert ended.status == status, ended
    document = json.loads(ended.stdout)
    told = {os.path.basename(one["filename"]): one for one in document["images"]}
    assert len(told) == document["summary"]["images"]
    counted = Counter(one["state"] for one in told.values())
    given = {key: document["summary"][key] for key in counted}
    assert given == counted
    return told


def states(told: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: one["state"] for name, one in told.items()}


def in_state(told: dict[str, dict[str, Any]], *wanted: str) -> list[str]:
    return [name for name, one in told.items() if one["state"] in wanted]


# ---- accidents ----


@dataclass(frozen=True)
class Journal:
    """The log of a farm command, outside the farm."""

    path: Path

    def names(self, event: str) -> list[str]:
        """The overlays of which this is told so far, in whole lines."""
        text = self.path.read_text() if self.path.exists() else ""
        lines = (json.loads(line) for line in text.split("\n")[:-1])
        return [os.path.basename(one["filename"]) for one in lines if one["event"] == event]

    @property
    def finished(self) -> list[str]:
        """The overlays that are done."""
        return self.names("image-done")

    @property
    def has_begun(self) -> bool:
        """Whether the plan is made."""
        return self.path.exists() and "farm-begun" in self.path.read_text()


def wait_for(seconds: float, job: Job) -> None:
    """Let a job run for so long, or to its end."""
    end = time.monotonic() + seconds
    job.until(lambda: time.monotonic() >= end or job.has_ended, "some time to pass")


def at_work(job: Job, here: Path) -> list[int]:
    """Return the workers that have a file of the farm open."""
    return [pid for pid in job.workers() if any(here in Path(p).parents for p in opened_by(pid))]


def opened_by(pid: int) -> list[str]:
    found = []
    with suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


def parted(job: Job) -> Ended:
    """Wait for the end of a job that was killed, perhaps while it started a process."""
    try:
        return job.end()
    except AssertionError:
        if without_orphans(job.stderr):
            raise
        return Ended(-signal.SIGKILL, "", "")


def gone_soon(job: Job) -> None:
    """Assert that no process of a job lives on for long."""
    end = time.monotonic() + SOON
    job.until(lambda: not job.members(), "the last process to end")
    assert time.monotonic() < end, "it lives on without its parent"


def without_orphans(stderr: str) -> str:
    """Leave out what a process says that was starting: there is a test of that alone."""
    return re.sub(r"Traceback (?:.*\n)*?EOFError: Ran out of input\n", "", stderr)


def interrupt(
    laid: Farm, job: str, target: str, rng: random.Random, words: tuple[str, ...]
) -> None:
    """Kill a process, or ask for a stop, at a random moment; then check, and run it again."""
    journal = Journal(laid.here.parent / "log")
    journal.path.unlink(missing_ok=True)
    count, linger = rng.randrange(len(laid.overlays)), rng.choice([0, 0, 0.004, 0.02])
    print(f"{job} {words}, {target}: {count} done and {linger} s")  # noqa: T201
    with running(*command(job, *words, "--log", str(journal.path)), cwd=laid.here) as run:
        run.until(
            lambda: run.has_ended or (journal.has_begun and len(journal.finished) >= count),
            "so many images",
        )
        wait_for(linger, run)
        memory = memory_of(run)
        strike(run, target, laid.here)
        ended = parted(run)
        finished = journal.finished
        if rng.random() < 0.5:  # else the same command comes at once
            laid.holds(job)
        judge(laid, job, target, ended)
        laid.again(job, finished)
        gone_soon(run)
        assert [name for name in memory if os.path.exists(name)] == []
        assert target in ("INT", "TERM") or without_orphans(run.stderr) == ""


def strike(run: Job, target: str, here: Path) -> None:
    """Do it to those who are still there."""
    with suppress(ProcessLookupError):
        if target == "parent":
            run.signal(signal.SIGKILL)
        elif target == "group":
            os.killpg(run.pid, signal.SIGKILL)
        elif target == "worker":
            run.until(lambda: run.has_ended or bool(at_work(run, here)), "a worker at work")
            for pid in at_work(run, here)[:1]:
                run.signal(signal.SIGKILL, pid)
        elif target == "INT":  # Ctrl-C reaches all of them
            os.killpg(run.pid, signal.SIGINT)
        else:
            run.signal(signal.SIGTERM)


def judge(laid: Farm, job: str, target: str, ended: Ended) -> None:
    """Assert that the command ended as it should, struck or already over."""
    if target in ("parent", "group"):
        assert ended.status in (0, -signal.SIGKILL), ended
    elif target == "worker":
        assert set(states(told_by(ended, 0)).values()) == {"done"}, ended
        laid.is_done(job)
    elif ended.status:
        number = signal.Signals[f"SIG{target}"]
        if ended.status == -number:  # it had told already that all is done
            assert set(states(told_by(ended, -number)).values()) == {"done"}, ended
        else:
            is_told_to_stop(ended, number)


def is_told_to_stop(ended: Ended, number: signal.Signals) -> dict[str, dict[str, Any]]:
    """Assert that it stopped when asked to, and says what is left; return what it told."""
    told = told_by(ended, 128 + number)
    assert set(states(told).values()) <= {"done", "nothing-to-do", "stopped", "not-begun"}
    left = len(in_state(told, "stopped", "not-begun"))
    assert left > 0
    assert ended.stderr == (
        f"addcow: {left} of {len(told)} images left: stopped; finished work is kept, "
        "the same command continues from there\n"
    )
    return told


# ---- at random moments ----

ROUNDS = 2


@pytest.mark.long
@EACH
@pytest.mark.parametrize("target", ["parent", "worker", "group", "INT", "TERM"])
def test_farm_job_continues_after_a_kill_at_any_moment(
    here: Path, rng: random.Random, job: str, target: str
) -> None:
    for number in range(ROUNDS if target in ("parent", "worker", "group") else 1):
        place = here / str(number)
        place.mkdir()
        words = BY_WORKERS if target == "worker" else rng.choice([(), BY_WORKERS, ("--jobs", "0")])
        interrupt(thirty(place, rng), job, target, rng, words)
        shutil.rmtree(place)


# ---- workers ----


def lone(here: Path, rng: random.Random, count: int = 6) -> Farm:
    """A small farm without chains of overlays; one image alone has a cluster number 20."""
    laid = Farm.lay(here, rng, chains=count, depth=1)
    draw_raw(here / "d00.img", "ABC-" * 6)
    draw(here / "d00-0.add-cow", "D-" * 10 + "-" * 4, "d00.img")
    return Farm.of(here, [*laid.chains, ("d00-0.add-cow",)])


ODD_ONE, ODD_PLACE = "d00-0.add-cow", {"commit": 18, "flatten": 21, "discard": 21}
WRITES = {"commit": "backing_write", "flatten": "image_write", "discard": "image_write"}

# Where a worker may be killed once, and how often that goes by before.
KILLING = [
    *(("commit", event) for event in ("image_read", "backing_write", "data_sync", "bitmap_update")),
    *(("commit", event) for event in ("bitmap_sync", "punch")),
    *(("flatten", event) for event in ("backing_read", "image_write", "data_sync", "publish")),
    *(("flatten", event) for event in ("bitmap_update", "bitmap_sync", "header_write")),
    *(("discard", event) for event in ("image_write", "header_write", "discard")),
    ("discard", "directory_sync"),
]


@pytest.mark.parametrize(("job", "event"), KILLING)
def test_farm_job_survives_a_worker_killed_once(
    here: Path, rng: random.Random, job: str, event: str
) -> None:
    laid = lone(here, rng)
    rules = rules_for(here, rule(event, "kill", once="on", after=rng.randrange(3)))
    with running(*command(job, "--jobs", "2"), cwd=here, rules=rules) as run:
        told = told_by(run.end(), 0)
        assert run.stderr == ""
        gone_soon(run)
    assert rules.struck
    assert states(told) == dict.fromkeys(laid.overlays, "done")
    laid.is_done(job)


@pytest.mark.long
@EACH
def test_image_that_kills_each_worker_fails_alone(here: Path, rng: random.Random, job: str) -> None:
    laid = lone(here, rng)
    rules = rules_for(here, rule(WRITES[job], "kill", cluster=ODD_PLACE[job]))
    with running(*command(job, "--jobs", "2"), cwd=here, rules=rules) as run:
        told = told_by(run.end(), 1)
        gone_soon(run)
    failed = told.pop(ODD_ONE)
    assert failed["state"] == "failed"
    assert "a worker process ended with signal SIGKILL" in failed["problem"]
    assert set(states(told).values()) == {"done"}
    laid.is_done(job, but=(ODD_ONE,))
    laid.again(job, list(told))


@pytest.mark.long
@EACH
def test_stopped_workers_end_with_their_parent(here: Path, rng: random.Random, job: str) -> None:
    """The parent does not wait for a stopped worker, and no lock of a worker is in the way."""
    laid = lone(here, rng)
    stop = (rule(WRITES[job], "stop", once="on", after=after) for after in (0, 1))
    with running(*command(job, "--jobs", "2"), cwd=here, rules=rules_for(here, *stop)) as run:
        run.stopped(2)
        run.signal(signal.SIGKILL)
        assert run.end().status == -signal.SIGKILL
        laid.again(job)
        gone_soon(run)


@pytest.mark.long
@BOTH
def test_farm_job_survives_a_worker_killed_at_its_start(
    here: Path, rng: random.Random, job: str
) -> None:
    laid = thirty(here, rng)
    with running(*command(job, *BY_WORKERS), cwd=here) as run:
        run.until(lambda: bool(run.workers()), "the first worker to start")
        run.signal(signal.SIGKILL, run.workers()[0])
        told = told_by(run.end(), 0)
    assert states(told) == dict.fromkeys(laid.overlays, "done")
    laid.is_done(job)


# ---- large images ----


@dataclass(frozen=True)
class Large:
    """A large image of real data: all of it is moved, into a file without any."""

    path: Path
    target: Path
    size: int
    sum: int

    @classmethod
    def lay(cls, here: Path, job: str, size: int) -> Large:
        """Make the files."""
        image, base = here / "large.raw", here / "large.img"
        full, empty = (image, base) if job == "commit" else (base, image)
        with full.open("wb") as file:
            for number in range(size // MiB):
                file.write(number.to_bytes(4, "big") * (MiB // 4))
        with empty.open("wb") as file:
            file.truncate(size)
        cow = overlay_bytes(
            image=image.name,
            size=size,
            backing=base.name,
            local=range(size // CLUSTER) if job == "commit" else (),
        )
        (here / "large.add-cow").write_bytes(cow)
        return cls(here / "large.add-cow", empty, size, sum_of(raw_pieces(full)))

    @property
    def arrived(self) -> int:
        """Bytes that the target has got; where it is preallocated, a little more."""
        return stored_bytes(self.target)

    def published(self, job: str) -> int:
        """Bytes of clusters of which the bits say that they are done."""
        local = len(local_clusters(self.path)) * CLUSTER
        return self.size - local if job == "commit" else local

    def holds(self) -> None:
        """Assert that the guest sees what it saw."""
        assert sum_of(oracle.stream(str(self.path))) == self.sum

    def is_done(self) -> None:
        """Assert that the target alone is the disk."""
        assert sum_of(raw_pieces(self.target)) == self.sum
        self.holds()


def raw_pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(MiB):
            yield piece


def sum_of(pieces: Iterator[bytes]) -> int:
    """Return a checksum that is soon made of much."""
    total = 0
    for piece in pieces:
        total = zlib.crc32(piece, total)
    return total


@pytest.mark.long
@BOTH
@pytest.mark.parametrize("target", ["parent", "group", "worker"])
def test_split_image_continues_after_a_kill_at_any_moment(
    here: Path, rng: random.Random, job: str, target: str
) -> None:
    large, laid = Large.lay(here, job, 300 * MiB), Farm.lay(here, rng, chains=4, depth=1)
    journal, part = Journal(here.parent / "log"), rng.randrange(280 * MiB)
    print(f"at {part} bytes")  # noqa: T201
    words = command(job, "--jobs", "2", "--log", str(journal.path))
    with running(*words, cwd=here) as run:
        run.until(lambda: run.has_ended or large.arrived > part, "so many bytes")
        strike(run, target, here) if target != "worker" else kill_a_splitter(run, here)
        ended = run.end()
        assert run.stderr == ""
        finished = journal.finished
        told = told_by(ended if target == "worker" else farm(job, cwd=here), 0)
        gone_soon(run)
    assert set(states(told).values()) <= {"done", "nothing-to-do"}
    assert [name for name in finished if told[name]["state"] == "done" and target != "worker"] == []
    large.is_done()
    laid.is_done(job)


def kill_a_splitter(run: Job, here: Path) -> None:
    """Kill a worker that has files open, unless all is over."""
    run.until(lambda: run.has_ended or bool(at_work(run, here)), "a worker at work")
    with suppress(ProcessLookupError):
        for pid in at_work(run, here)[:1]:
            run.signal(signal.SIGKILL, pid)


@pytest.mark.long
@BOTH
def test_killed_farm_job_repeats_at_most_one_checkpoint(here: Path, job: str) -> None:
    large = Large.lay(here, job, 1100 * MiB)
    with running(*command(job, "--jobs", "2"), cwd=here) as run:
        run.until(lambda: run.has_ended or large.arrived > 900 * MiB, "so many bytes")
        run.signal(signal.SIGKILL)
        assert run.end().status == -signal.SIGKILL
        gone_soon(run)
    arrived, published = large.arrived, large.published(job)
    told = told_by(farm(job, cwd=here), 0)["large.add-cow"]
    assert told["state"] == "done"
    assert told["bytes-moved"] == large.size - published
    # What both processes are at counts neither as done nor as repeated.
    assert arrived - published <= CHECKPOINT + 2 * TASK
    large.is_done()


@pytest.mark.long
@BOTH
def test_split_image_that_kills_each_worker_fails_alone(
    here: Path, rng: random.Random, job: str
) -> None:
    wide, laid = Wide.lay(here, job, tasks=6), Farm.lay(here, rng, chains=4, depth=1)
    place = wide.moved(3)[5]
    rules = rules_for(here, rule(wide.writes, "kill", cluster=place))
    with running(*command(job, "--jobs", "2"), cwd=here, rules=rules) as run:
        told = told_by(run.end(), 1)
        gone_soon(run)
    assert states(told) == {**dict.fromkeys(laid.overlays, "done"), "top.add-cow": "failed"}
    laid.is_done(job)
    wide.holds()
    assert place not in wide.published()
    times = laid.times(laid.overlays)
    assert told_by(farm(job, cwd=here), 0)["top.add-cow"]["state"] == "done"
    assert laid.times(laid.overlays) == times
    wide.is_done()


# ---- asked to stop ----


@pytest.mark.long
@EACH
def test_stopped_farm_job_reports_the_remaining_images(
    here: Path, rng: random.Random, job: str, asking: signal.Signals
) -> None:
    laid, journal = thirty(here, rng), Journal(here.parent / "log")
    rules = rules_for(here, *stopping_both(WRITES[job], rng.randrange(8, 14)))
    words = command(job, "--jobs", "2", "--log", str(journal.path))
    with running(*words, cwd=here, rules=rules) as run:
        workers = run.stopped(2)
        finished = journal.finished
        run.signal(asking)
        run.signal(signal.SIGCONT, *workers)
        told = is_told_to_stop(run.end(), asking)
        gone_soon(run)
    assert set(finished) <= set(in_state(told, "done"))
    assert sorted(journal.finished) == sorted(in_state(told, "done"))
    assert sorted(journal.names("image-left")) == sorted(in_state(told, "not-begun"))
    assert in_state(told, "not-begun")
    laid.holds(job)
    laid.again(job, in_state(told, "done"))


@pytest.mark.long
@BOTH
def test_signal_to_the_whole_group_stops_a_farm_job(
    here: Path, rng: random.Random, job: str, asking: signal.Signals
) -> None:
    """Ctrl-C reaches workers, and so does the SIGTERM of timeout(1) and of systemd."""
    laid = thirty(here, rng)
    rules = rules_for(here, *stopping_both(WRITES[job], 8))
    with running(*command(job, "--jobs", "2"), cwd=here, rules=rules) as run:
        workers = run.stopped(2)
        os.killpg(run.pid, asking)
        run.signal(signal.SIGCONT, *workers)
        ended = run.end()
        gone_soon(run)
    laid.holds(job)
    told = is_told_to_stop(ended, asking)
    laid.again(job, in_state(told, "done"))


@pytest.mark.long
@BOTH
def test_signal_to_the_group_while_workers_start_stops_a_farm_job(
    here: Path, rng: random.Random, job: str, asking: signal.Signals
) -> None:
    laid = thirty(here, rng)
    with running(*command(job, *BY_WORKERS), cwd=here) as run:
        run.until(lambda: bool(run.workers()), "the first worker to start")
        os.killpg(run.pid, asking)
        ended = run.end()
        gone_soon(run)
    laid.holds(job)
    told = is_told_to_stop(ended, asking)
    laid.again(job, in_state(told, "done"))


def goes_on(run: Job) -> bool:
    """Let what has stopped go on; tell whether the parent has ended."""
    with suppress(ProcessLookupError):
        run.signal(signal.SIGCONT, *(one.pid for one in run.members() if one.state == "T"))
    return run.has_ended


@pytest.mark.long
@BOTH
def test_stop_of_a_split_image_keeps_finished_clusters(
    here: Path, rng: random.Random, job: str, asking: signal.Signals
) -> None:
    wide, laid = Wide.lay(here, job, tasks=8), Farm.lay(here, rng, chains=20, depth=1)
    places = [wide.moved(task)[3] for task in range(2, 8)]
    stops = (rule(wide.writes, "stop", once="on", cluster=place) for place in places)
    with running(*command(job, "--jobs", "2"), cwd=here, rules=rules_for(here, *stops)) as run:
        run.stopped(2)
        run.signal(asking)
        run.until(lambda: goes_on(run), "its end")
        told = is_told_to_stop(run.end(), asking)
        gone_soon(run)
    assert told["top.add-cow"]["state"] == "stopped"
    wide.holds()
    laid.holds(job)
    done = wide.published() & wide.selected
    assert done & set(places)
    assert done != wide.selected
    finished = [name for name in in_state(told, "done") if name in laid.overlays]
    times = laid.times(finished)
    again = told_by(farm(job, cwd=here), 0)
    assert laid.times(finished) == times
    assert again["top.add-cow"]["state"] == "done"
    assert again["top.add-cow"]["clusters-moved"] < len(wide.moved(0)) * 8
    wide.is_done()
    laid.is_done(job)


@pytest.mark.long
@BOTH
@pytest.mark.parametrize("size", [MiB, 260 * MiB], ids=["small", "large"])
def test_farm_job_with_a_low_rate_stops_soon(
    here: Path, rng: random.Random, job: str, size: int
) -> None:
    asking = rng.choice([signal.SIGINT, signal.SIGTERM])
    large, laid = Large.lay(here, job, size), Farm.lay(here, rng, chains=4, depth=1)
    with running(*command(job, "--jobs", "2", "-r", "64k"), cwd=here) as run:
        run.until(lambda: bool(at_work(run, here)), "a worker at work")
        wait_for(rng.random(), run)
        begun = time.monotonic()
        run.signal(asking)
        told = is_told_to_stop(run.end(), asking)
        assert time.monotonic() - begun < SOON
        gone_soon(run)
    assert size == MiB or told["large.add-cow"]["state"] == "stopped"
    assert in_state(told, "stopped")
    large.holds()
    laid.holds(job)
    assert set(states(told_by(farm(job, cwd=here), 0)).values()) <= {"done", "nothing-to-do"}
    large.is_done()
    laid.is_done(job)


@pytest.mark.long
def test_farm_job_stopped_while_planning_changes_nothing(
    here: Path, rng: random.Random, asking: signal.Signals
) -> None:
    laid = thirty(here, rng)
    before = snapshot(here)
    rules = rules_for(here, rule("bitmap_load", "stop", once="on", after=5))
    with running(*command("commit", "--jobs", "2"), cwd=here, rules=rules) as run:
        stopped = run.stopped()
        run.signal(asking)
        run.signal(signal.SIGCONT, *stopped)
        ended = run.end()
        gone_soon(run)
    assert ended.status == 128 + asking
    assert len(ended.stderr.splitlines()) == 1, ended
    assert ("interrupted" if asking == signal.SIGINT else "stopped") in ended.stderr
    assert snapshot(here) == before
    laid.again("commit")


# ---- disks that are too small ----


@pytest.fixture
def here(clean_here: Path) -> Path:
    return clean_here


@pytest.fixture(params=["tmpfs", "ext4"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB, or a little more, for files of the test alone."""
    for place in mounted(request.param, tmp_path, 24 * MiB, 4 * MiB):
        if request.param == "ext4":
            keep_nothing(place)
        yield place


def keep_nothing(place: Path) -> None:
    """Let an ext4 give away the blocks too that it calls free and keeps for itself."""
    device = os.stat(place).st_dev
    name = os.path.basename(
        os.path.realpath(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    )
    Path(f"/sys/fs/ext4/{name}/reserved_clusters").write_text("0")


def fill(here: Path, *, leave: int = 0) -> Path:
    """Take all of the free space but ``leave`` bytes with a file of its own."""
    path = here / "filler"
    with path.open("wb") as file:
        size = free(here) - leave
        while size >= BLOCK:
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size)
            except OSError:
                size //= 2
            size = min(size, free(here) - leave) // BLOCK * BLOCK
    return path


BLOCK = 4 * KiB


def takers(here: Path, job: str, needs: list[int]) -> Farm:
    """Overlays that take so many blocks each, in the order of a plan, of 64 that they move."""
    chains: list[tuple[str, ...]] = []
    for number, need in enumerate(needs):
        name, base = f"t{number:02}-0.add-cow", f"t{number:02}.img"
        held = (64 - need) * "a" + need * "-"
        full = cells(random.Random(number), "ABCDE", 64)
        if job == "commit":
            draw_raw(here / base, held.upper(), cluster=BLOCK)
            draw(here / name, full, base, cluster=BLOCK)
        else:
            draw_raw(here / base, full, cluster=BLOCK)
            draw(here / name, held, base, cluster=BLOCK)
        chains.append((name,))
    return Farm.of(here, chains)


def accounts(laid: Farm, needs: list[int], room: int) -> dict[str, tuple[int, int]]:
    """Reckon which images do not fit: what each needs, and what those before it leave."""
    refused = {}
    for name, need in zip(laid.overlays, needs, strict=True):
        if need * BLOCK > room:
            refused[name] = need * BLOCK, room
        else:
            room -= need * BLOCK
    return refused


def are_told(told: dict[str, dict[str, Any]], figures: dict[str, tuple[int, int]]) -> None:
    """Assert that these images and no others are refused, with these figures."""
    assert set(in_state(told, "refused")) == figures.keys()
    for name, (needed, room) in figures.items():
        said = f"{needed} bytes of free space are needed and {room} are free"
        assert said in told[name]["problem"]


FLAT = pytest.mark.parametrize("job", ["flatten", "discard"])
JOBS = pytest.mark.parametrize("jobs", ["0", "2"])


@pytest.mark.long
@FLAT
@JOBS
def test_farm_job_refuses_images_that_do_not_fit_and_does_smaller_ones(
    disk: Path, job: str, jobs: str
) -> None:
    needs = [40, 8, 60, 16, 64, 60, 2, 0, 30, 1]
    laid = takers(disk, job, needs)
    filler = fill(disk, leave=135 * BLOCK)
    figures = accounts(laid, needs, free(disk))
    assert [*figures] == [laid.overlays[4], laid.overlays[5], laid.overlays[8]]
    plan = ("farm", "plan", *WORDS[job], "--output", "json", ".")
    planned = told_by(Ended(*astuple(addcow(*plan, cwd=disk))), 0)
    are_told(planned, figures)
    before, times = snapshot(disk), laid.times([*figures])
    told = told_by(farm(job, "--jobs", jobs, cwd=disk), 1)
    are_told(told, figures)
    assert len(in_state(told, "done")) == len(needs) - len(figures)
    laid.is_done(job, but=tuple(figures))
    assert laid.times([*figures]) == times
    names = [file for name in figures for file in (name, name.replace(".add-cow", ".raw"))]
    after = snapshot(disk)
    assert {name: after[name] for name in names} == {name: before[name] for name in names}
    filler.unlink()
    assert sorted(in_state(laid.again(job, in_state(told, "done")), "done")) == sorted(figures)


@pytest.mark.long
@JOBS
def test_commit_that_does_not_fit_does_not_affect_others(disk: Path, jobs: str) -> None:
    """What they give back may be room enough for it next time."""
    needs = [40, 8, 60, 64, 0, 20]
    laid = takers(disk, "commit", needs)
    fill(disk, leave=20 * BLOCK)
    # Each that is done gives back 64 blocks in its image.
    figures = {laid.overlays[0]: (40 * BLOCK, free(disk))}
    plan = ("farm", "plan", "commit", "--output", "json", ".")
    are_told(told_by(Ended(*astuple(addcow(*plan, cwd=disk))), 0), figures)
    times = laid.times([*figures])
    told = told_by(farm("commit", "--jobs", jobs, cwd=disk), 1)
    are_told(told, figures)
    assert len(in_state(told, "done")) == len(needs) - 1
    assert laid.times([*figures]) == times
    laid.is_done("commit", but=tuple(figures))
    assert in_state(laid.again("commit", in_state(told, "done")), "done") == [*figures]


@pytest.mark.long
@JOBS
def test_commits_that_free_their_space_fit_one_after_another(
    disk: Path, rng: random.Random, jobs: str
) -> None:
    laid = takers(disk, "commit", [64] * 12)
    fill(disk, leave=100 * BLOCK)
    room = free(disk)
    assert room < 2 * 64 * BLOCK
    plan = ("farm", "plan", "commit", "--output", "json", ".")
    document = addcow(*plan, cwd=disk).json
    assert document["filesystems"][0]["peak"] <= document["filesystems"][0]["free"]
    told = told_by(farm("commit", "--jobs", jobs, cwd=disk), 0)
    assert states(told) == dict.fromkeys(laid.overlays, "done")
    laid.is_done("commit")


@JOBS
def test_commits_down_a_chain_need_space_once(disk: Path, rng: random.Random, jobs: str) -> None:
    """What the top brings moves on from overlay to overlay."""
    draw_raw(disk / "s.img", 64 * "-", cluster=BLOCK)
    below, kind = "s.img", "raw"
    names: list[str] = []
    for layer in range(6):
        name = f"s-{layer}.add-cow"
        marks = 64 * "-" if layer < 5 else 64 * "X"
        draw(disk / name, marks, below, backing_format=kind, cluster=BLOCK)
        names.insert(0, name)
        below, kind = name, "add-cow"
    laid = Farm.of(disk, [tuple(names)])
    fill(disk, leave=90 * BLOCK)
    assert free(disk) < 2 * 64 * BLOCK
    told = told_by(farm("commit", "--jobs", jobs, cwd=disk), 0)
    assert states(told) == dict.fromkeys(names, "done")
    laid.is_done("commit")


@pytest.mark.long
@EACH
def test_full_disk_of_one_image_fails_only_that_image(
    here: Path, rng: random.Random, job: str
) -> None:
    laid = lone(here, rng)
    place = ODD_PLACE[job]
    rules = rules_for(here, rule(WRITES[job], errno=errno.ENOSPC, cluster=place))
    with running(*command(job, "--jobs", "2"), cwd=here, rules=rules) as run:
        told = told_by(run.end(), 1)
    failed = told.pop(ODD_ONE)
    assert failed["state"] == "failed"
    assert "No space left on device" in failed["problem"]
    assert set(states(told).values()) == {"done"}
    laid.is_done(job, but=(ODD_ONE,))
    laid.again(job, list(told))


@pytest.mark.long
@FLAT
def test_disk_filled_by_another_program_fails_images_that_need_space(
    disk: Path, tmp_path: Path, job: str
) -> None:
    needs = [16, 0] * 8
    laid = takers(disk, job, needs)
    fill(disk, leave=16 * 10 * BLOCK).rename(disk / "old")
    assert free(disk) > 16 * 8 * BLOCK
    rules = Rules.write(tmp_path / "rules", *stopping_both("image_write", 0))
    with running(*command(job, "--jobs", "2"), cwd=disk, rules=rules) as run:
        workers = run.stopped(2)
        filler = fill(disk)
        run.signal(signal.SIGCONT, *workers)
        told = told_by(run.end(), 1)
        gone_soon(run)
    ended = {name: one["problem"] for name, one in told.items() if "problem" in one}
    modest = [name for name, need in zip(laid.overlays, needs, strict=True) if not need]
    assert set(ended).isdisjoint(modest)
    assert ended
    for name, problem in ended.items():
        assert told[name]["state"] in ("failed", "refused")
        assert "No space left on device" in problem or "bytes of free space are needed" in problem
    assert set(in_state(told, "done")) == set(laid.overlays) - set(ended)
    laid.holds(job)
    laid.is_done(job, but=tuple(ended))
    filler.unlink()
    laid.again(job, in_state(told, "done"))


# ---- errors ----

ERRORS = [
    *(("commit", event) for event in ("image_read", "backing_write", "data_sync")),
    *(("commit", event) for event in ("publish", "bitmap_update", "bitmap_sync", "punch")),
    *(("flatten", event) for event in ("backing_read", "image_write", "data_sync", "publish")),
    *(("flatten", event) for event in ("bitmap_update", "bitmap_sync", "header_write")),
    *(("discard", event) for event in ("data_sync", "discard", "directory_sync")),
]


@pytest.mark.parametrize(("job", "event"), ERRORS)
def test_error_fails_one_image_and_keeps_every_guests_view(
    here: Path, rng: random.Random, job: str, event: str
) -> None:
    laid = Farm.lay(here, rng, chains=4, depth=3)
    jobs = rng.choice(["0", "2"])
    action = rng.choice(["error", "short"]) if event.endswith("write") else "error"
    after = rng.choice([0, 1, 5])
    once = {"once": "on"} if rng.random() < 0.7 else {}
    rules = rules_for(here, rule(event, action, after=after, **once))
    print(f"--jobs {jobs}, {rules.path.read_text()}")  # noqa: T201
    with running(*command(job, "--jobs", jobs), cwd=here, rules=rules) as run:
        told = told_by(run.end(), 1)
        gone_soon(run)
    failed = in_state(told, "failed")
    assert len(failed) == 1 if once else failed
    # What was not discarded keeps those beneath it.
    beneath = {n for names in laid.chains for n in names if set(names) & set(failed)}
    assert set(in_state(told, "refused")) <= (beneath if job == "discard" else set())
    assert set(states(told).values()) <= {"done", "failed", "refused"}
    laid.holds(job)
    laid.again(job, in_state(told, "done"))


@pytest.mark.long
@BOTH
@pytest.mark.parametrize("event", ["data_sync", "bitmap_sync", "write"])
def test_error_in_a_split_image_fails_only_that_image(
    here: Path, rng: random.Random, job: str, event: str
) -> None:
    wide = Wide.lay(here, job, tasks=5)
    place = {"cluster": wide.moved(4)[3]} if event == "write" else {}
    named = wide.writes if event == "write" else event
    once_only = rng.choice([{"once": "on"}, {}])
    rules = rules_for(here, rule(named, **place, **once_only))
    with running(*command(job, "--jobs", "2"), cwd=here, rules=rules) as run:
        told = told_by(run.end(), 1)
        gone_soon(run)
    assert states(told) == {"top.add-cow": "failed"}
    wide.holds()
    if event.endswith("sync"):
        done = wide.published() & wide.selected
        assert event == "bitmap_sync" or not done, "published, although the data is not durable"
    assert states(told_by(farm(job, cwd=here), 0)) == {"top.add-cow": "done"}
    wide.is_done()


# ---- in use ----


@BOTH
@pytest.mark.parametrize("suffix", [".raw", ".add-cow"])
def test_image_in_use_by_a_guest_is_refused(
    here: Path, rng: random.Random, job: str, suffix: str
) -> None:
    tool("qemu-io", "--version", cwd=here)
    laid = lone(here, rng)
    file = ODD_ONE.replace(".add-cow", suffix)
    times = laid.times([ODD_ONE])
    with talking(here, "qemu-io", "-f", "raw", file) as pid:
        told = told_by(farm(job, cwd=here), 1)
    refused = told.pop(ODD_ONE)
    assert refused["state"] == "refused"
    assert re.search(rf"{file}'?: in use: qemu-io \(pid {pid}\)", refused["problem"])
    assert set(states(told).values()) == {"done"}
    assert laid.times([ODD_ONE]) == times
    laid.is_done(job, but=(ODD_ONE,))
    assert in_state(laid.again(job, list(told)), "done") == [ODD_ONE]


@BOTH
def test_image_in_use_within_a_chain_keeps_every_guests_view(
    here: Path, rng: random.Random, job: str
) -> None:
    tool("qemu-io", "--version", cwd=here)
    laid = Farm.lay(here, rng, chains=3, depth=3)
    with talking(here, "qemu-io", "-f", "raw", "c01-1.raw"):
        told = told_by(farm(job, cwd=here), 1)
        laid.holds(job)
    assert told["c01-1.add-cow"]["state"] == "refused"
    others = [name for name in laid.overlays if not name.startswith("c01")]
    assert {told[name]["state"] for name in others} == {"done"}
    assert set(states(told).values()) <= {"done", "refused"}
    laid.again(job, others)


@pytest.mark.long
@BOTH
def test_image_of_a_guest_started_after_the_plan_is_refused(
    here: Path, rng: random.Random, job: str
) -> None:
    tool("qemu-io", "--version", cwd=here)
    laid = lone(here, rng, count=20)
    times = laid.times([ODD_ONE])
    rules = rules_for(here, *stopping_both(WRITES[job], 0))
    with running(*command(job, "--jobs", "2"), cwd=here, rules=rules) as run:
        workers = run.stopped(2)
        with talking(here, "qemu-io", "-f", "raw", ODD_ONE.replace(".add-cow", ".raw")):
            run.signal(signal.SIGCONT, *workers)
            told = told_by(run.end(), 1)
    refused = told.pop(ODD_ONE)
    assert refused["state"] == "refused"
    assert "in use: qemu-io" in refused["problem"]
    assert set(states(told).values()) == {"done"}
    assert laid.times([ODD_ONE]) == times
    laid.again(job, list(told))


# ---- power cuts ----


@dataclass(frozen=True)
class Several(Files):
    """The files of many chains; the path is their directory."""

    names: tuple[str, ...] = ()

    @property
    def everything(self) -> list[str]:
        """The files of all chains."""
        return list(self.names)


class FarmPromise(Promise):
    """What a farm command promises: every guest's view, and when it says so, that all is done."""

    word: ClassVar[str]

    def __init__(self, laid: Farm) -> None:
        self.laid = laid
        names = tuple(str(path) for path in laid.here.iterdir())
        self.files = Several(str(laid.here), str(laid.here), names=names)
        self._local = self._count()

    def command(self, jobs: int) -> list[str]:
        return ["farm", *WORDS[self.word], "--jobs", str(jobs), self.files.path]

    def part_changed(self) -> float:
        """What has been set or cleared of all bits, about."""
        all_of_them = len(self.laid.overlays) * CLUSTERS
        goal = self._local if self.word == "commit" else all_of_them - self._local
        with suppress(OSError):
            return abs(self._count() - self._local) / goal
        return 1.0  # discarded

    def _count(self) -> int:
        return sum(len(local_clusters(self.laid.here / name)) for name in self.laid.overlays)


class FarmCommit(FarmPromise):
    job, word = "commit", "commit"


class FarmFlatten(FarmPromise):
    job, word = "flatten", "flatten"


class FarmDiscard(FarmPromise):
    job, word, options = "flatten", "discard", ("--discard",)


PROMISES: dict[str, type[FarmPromise]] = {
    "commit": FarmCommit,
    "flatten": FarmFlatten,
    "discard": FarmDiscard,
}
CLUSTERS = 24


@pytest.fixture(scope="module", params=["ext4", "xfs"])
def mains(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Disk]:
    """A file system whose power can be cut."""
    yield from made_disk(request.param, tmp_path_factory.mktemp("mains"))


@EACH
@pytest.mark.parametrize("by_event", [True, False], ids=["event", "clock"])
def test_power_cut_of_a_farm_job_loses_nothing(
    mains: Disk, rng: random.Random, tmp_path: Path, job: str, by_event: bool
) -> None:
    with mains.directory() as place:
        laid = Farm.lay(place, rng, chains=5, depth=2, clusters=CLUSTERS, cluster=16 * KiB)
        make_durable(place)
        promise = PROMISES[job](laid)
        jobs = rng.choice([0, 2])
        # The processes share what happens, and each image is small: events come to each less often.
        moment = Moment.draw(rng, promise, by_event=by_event, scale=0.2)
        order = rng.choice(["right", "right:waiting"])
        cut = lose_power(mains, promise, moment, rng, tmp_path, jobs=jobs, order=order)
        print(cut.story)  # noqa: T201 - shown with a failure
        laid.holds(job)
        if cut.done:
            laid.is_done(job)
        laid.again(job)
        if job != "discard":
            assert addcow("farm", "check", ".", cwd=place).status == 0


@EACH
def test_farm_job_finishes_a_chain_in_one_run(here: Path, rng: random.Random, job: str) -> None:
    """Who stands above an overlay has been flattened and discarded when its turn comes."""
    laid = Farm.lay(here, rng, chains=3, depth=3)
    told = told_by(farm(job, cwd=here), 0)
    assert states(told) == dict.fromkeys(laid.overlays, "done")
    laid.is_done(job)
