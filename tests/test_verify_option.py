"""Tests of `commit --verify` and `flatten --verify`.

The reported digest is compared with one computed here. Then bytes change between the job and the
read-back, at the event `read_back`, and the command must find them. A change on the device below
the file system shows that the read-back does not come from memory.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.command import (
    ALL_ALLOCATED,
    CLUSTER,
    KiB,
    MiB,
    Result,
    addcow,
    bits,
    draw,
    draw_raw,
    guest_picture,
    io,
    local_clusters,
    look,
    overlay_bytes,
    pair,
    put,
    read_header,
    snapshot,
    succeed,
    tool,
    virtual_size,
)
from support.fault_rules import rule, rules_for
from support.file_systems import mounted
from support.guests import opened_for_writing
from support.manifests import Layers, form, guest_digest, made, one_line, view_of
from support.processes import Ended, Process, running
from support.wide import WIDE_CLUSTER, Wide

pytestmark = pytest.mark.sample(1)

WORDS = {
    "commit": ("commit",),
    "commit -d": ("commit", "-d"),
    "flatten": ("flatten",),
    "discard": ("flatten", "--discard"),
}
EACH = pytest.mark.parametrize("job", list(WORDS))
BOTH = pytest.mark.parametrize("jobs", ["0", "2"])
CACHES = pytest.mark.parametrize("cache", ["writeback", "none", "unsafe"])


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def command(job: str, *more: str, top: str = "top.add-cow") -> tuple[str, ...]:
    return (*WORDS[job], "--verify", *more, top)


def target(job: str) -> str:
    """The file that is written, in a pair of base.img and top.add-cow."""
    return "base.img" if job.startswith("commit") else "top.raw"


def met(here: Path, *words: str, meanwhile: Callable[[], object]) -> Ended:
    """Run a command that stops where it begins to read back, so that something may happen there."""
    rules = rules_for(here, rule("read_back", "stop", once="on"))
    with running(*words, cwd=here, rules=rules) as run:
        (stopped,) = run.stopped()
        assert stopped == run.pid
        meanwhile()
        run.signal(signal.SIGCONT)
        ended = run.end()
        run.all_gone()
    return ended


def flip(path: Path, at: int) -> None:
    with path.open("rb") as file:
        file.seek(at)
        old = file.read(1)[0]
    put(path, at, bytes([old ^ 0x10]))


def is_seen(ended: Ended, file: str, at: int) -> None:
    """Assert that it says in one line which file differs, and where about."""
    line = one_line(ended._replace(stderr=without_warning(ended.stderr)))
    assert ended.stdout == ""
    assert line.startswith(f"addcow: {file}: "), line
    place = re.search(r"(\d+) bytes at (\d+)", line)
    assert place, line
    assert 0 <= at - int(place[2]) < int(place[1]), line


def without_warning(stderr: str) -> str:
    """Leave out what `-t unsafe` says of itself."""
    return re.sub("^addcow: warning: -t unsafe: .*\n", "", stderr)


# ---- what is told ----


@EACH
@BOTH
def test_job_with_verify_reports_the_digest(here: Path, job: str, jobs: str) -> None:
    top = pair(here, "ABCDEFGH", "-X-Y0---")
    seen = guest_digest(view_of(top))
    told = succeed(*command(job, "--jobs", jobs, "--output", "json"), cwd=here)
    assert told.json["guest-digest"] == seen
    assert told.stderr == ""
    assert look(here / target(job)) == "AXCY0FGH"


@pytest.mark.long
@EACH
def test_verify_option_adds_only_the_digest_to_the_report(here: Path, job: str) -> None:
    pair(here, "ABCDEFGH", "-X-Y0---")
    shutil.copytree(here, here.parent / "twin")
    plain = succeed(*WORDS[job], "--output", "json", "top.add-cow", cwd=here.parent / "twin").json
    told = succeed(*command(job, "--output", "json"), cwd=here).json
    assert told.keys() - plain.keys() == {"guest-digest"}
    different = {key for key in plain if plain[key] != told[key]}
    assert different <= {"seconds"}
    assert snapshot(here) == snapshot(here.parent / "twin")


@EACH
def test_verify_option_prints_a_second_line(here: Path, job: str) -> None:
    top = pair(here, "ABCDEFGH", "-X-Y0---")
    seen = guest_digest(view_of(top))
    first, second = succeed(*command(job), cwd=here).stdout.splitlines()
    assert first in ("Image committed.", "Image flattened.")
    assert second.startswith("Read back")
    assert seen in second


@EACH
def test_verify_option_with_quiet_prints_nothing(here: Path, job: str) -> None:
    pair(here, "ABCDEFGH", "-X-Y0---")
    told = succeed(*command(job, "-q"), cwd=here)
    assert told.said == ""


@pytest.mark.long
@EACH
@CACHES
@BOTH
def test_verify_option_works_with_every_cache_mode_and_process_count(
    here: Path, job: str, cache: str, jobs: str
) -> None:
    wide = Wide.lay(here, "commit" if job.startswith("commit") else "flatten")
    told = succeed(*command(job, "-t", cache, "--jobs", jobs, "--output", "json"), cwd=here).json
    assert told["guest-digest"] == guest_digest_of(wide)
    if job in ("commit", "flatten"):
        wide.is_done()


def guest_digest_of(wide: Wide) -> str:
    """What a raw file of this view would have, by the command that was tested for that."""
    name = wide.target.name
    found = made(wide.here, "-f", "raw", "--replace", name=name)[f"{name}.manifest"]
    (wide.here / f"{name}.manifest").unlink()
    digest: str = found["guest-digest"]
    return digest


@pytest.mark.long
@pytest.mark.parametrize("turn", range(16))
def test_verify_option_accepts_random_chains(here: Path, rng: random.Random, turn: int) -> None:
    laid = Layers.some(here, rng, longer=rng.random() < 0.5)
    if laid.top == "base.img":
        succeed("create", "-b", "base.img", "-F", "raw", "o1.add-cow", cwd=here)
        laid = Layers(here, ("base.img", "o1.add-cow"))
    job, below = rng.choice(list(WORDS)), laid.names[-2]
    view = view_of(here / laid.top)
    sizes = {n: virtual_size(here / n, form(n)) for n in (below, laid.top)}
    image = read_header(here / laid.top).image
    options = ("--jobs", rng.choice(["0", "2"]), "-t", rng.choice(["writeback", "none", "unsafe"]))
    before = snapshot(here)
    result = addcow(*command(job, *options, "--output", "json", top=laid.top), cwd=here)
    if result.status:  # nothing else may be refused
        one_line(result)
        assert job.startswith("commit")
        assert form(below) == "add-cow"
        assert sizes[below] < sizes[laid.top], result
        assert snapshot(here) == before
        return
    assert result.json["guest-digest"] == guest_digest(view)
    where = here / (below if job.startswith("commit") else image)
    assert view_of(where)[: len(view)] == view
    assert (here / laid.top).exists() == (job != "discard")
    if job != "discard":
        assert view_of(here / laid.top) == view


@EACH
@pytest.mark.parametrize("size", [0, 512, 5 * CLUSTER + 512])
@pytest.mark.parametrize("cluster", [4 * KiB, 2 * MiB])
def test_verify_option_accepts_odd_sizes_and_empty_disks(
    here: Path, job: str, size: int, cluster: int
) -> None:
    with (here / "base.img").open("wb") as file:
        file.write(b"b" * size)
    with (here / "top.raw").open("wb") as file:
        file.write(b"t" * size)
    content = overlay_bytes(
        image="top.raw",
        size=size,
        backing="base.img",
        cluster=cluster,
        local=range(-(-size // cluster // 2)),
    )
    (here / "top.add-cow").write_bytes(content)
    seen = guest_digest(view_of(here / "top.add-cow"))
    told = succeed(*command(job, "--output", "json"), cwd=here).json
    assert told["guest-digest"] == seen


@pytest.mark.long
@pytest.mark.parametrize("job", ["flatten", "discard"])
def test_verify_option_reads_back_a_flat_overlay(here: Path, job: str) -> None:
    top = pair(here, "ABCD", "-X-Y")
    succeed("flatten", "top.add-cow", cwd=here)
    seen = guest_digest(view_of(top))
    assert succeed(*command(job, "--output", "json"), cwd=here).json["guest-digest"] == seen


def test_verify_option_finds_a_changed_flat_overlay(here: Path) -> None:
    pair(here, "ABCD", "-X-Y")
    succeed("flatten", "top.add-cow", cwd=here)
    at = 2 * CLUSTER + 77
    ended = met(here, *command("flatten"), meanwhile=lambda: flip(here / "top.raw", at))
    is_seen(ended, "top.raw", at)


@pytest.mark.long
def test_verify_option_reads_back_a_committed_overlay(here: Path) -> None:
    top = pair(here, "ABCD", "-X-Y")
    seen = guest_digest(view_of(top))
    for _ in range(2):
        told = succeed(*command("commit", "--output", "json"), cwd=here).json
        assert told["guest-digest"] == seen


def test_verify_option_flattens_an_overlay_without_backing(here: Path) -> None:
    """One without a backing file: it is zeros where it is not allocated."""
    draw_raw(here / "top.raw", "xYz")
    cow = overlay_bytes(image="top.raw", size=3 * CLUSTER, local=[1])
    (here / "top.add-cow").write_bytes(cow)
    told = succeed(*command("flatten", "--output", "json"), cwd=here).json
    assert told["guest-digest"] == guest_digest(bytes(CLUSTER) + b"Y" * CLUSTER + bytes(CLUSTER))
    assert look(here / "top.raw") == "0Y0"


# ---- differences ----


@EACH
@BOTH
@pytest.mark.parametrize("at", [0, 3 * CLUSTER + 5, 8 * CLUSTER - 1])
def test_verify_option_finds_a_flipped_byte(here: Path, job: str, jobs: str, at: int) -> None:
    pair(here, "ABCDEFGH", "-X-Y0---")
    path = here / target(job)
    ended = met(here, *command(job, "--jobs", jobs), meanwhile=lambda: flip(path, at))
    is_seen(ended, path.name, at)
    # What the job did stays, and what could still be thrown away is not.
    assert (here / "top.add-cow").exists()
    done = look(path)
    assert [a for a, b in zip(done, "AXCY0FGH", strict=True) if a != b] == ["?"]
    if job == "commit":
        assert bits(here / "top.add-cow") == "........"
    elif job in ("flatten", "discard"):
        assert read_header(here / "top.add-cow").compatible & ALL_ALLOCATED


@EACH
def test_verify_option_reports_a_difference_in_json(here: Path, job: str) -> None:
    pair(here, "ABCD", "-X-Y")
    path = here / target(job)
    words = command(job, "--output", "json", "-q")
    ended = met(here, *words, meanwhile=lambda: flip(path, CLUSTER))
    told = json.loads(ended.stdout)
    assert (told["exit"], told["error"] in ended.stderr) == (1, True)
    is_seen(ended._replace(stdout=""), path.name, CLUSTER)


@pytest.mark.long
@CACHES
@EACH
def test_verify_option_finds_a_flipped_byte_in_a_large_image(
    here: Path, rng: random.Random, job: str, cache: str
) -> None:
    """Where there is data and where there is none, with two processes."""
    wide = Wide.lay(here, "commit" if job.startswith("commit") else "flatten")
    at = rng.randrange(wide.clusters * WIDE_CLUSTER)
    words = command(job, "-t", cache, "--jobs", "2")
    is_seen(met(here, *words, meanwhile=lambda: flip(wide.target, at)), wide.target.name, at)


@EACH
def test_verify_option_finds_data_in_a_hole(here: Path, job: str) -> None:
    """It appears in a part of the disk of which nothing was read before."""
    size = 64 * MiB
    draw_raw(here / "base.img", "A")
    os.truncate(here / "base.img", size)
    draw_raw(here / "top.raw", "-")
    os.truncate(here / "top.raw", size)
    content = overlay_bytes(image="top.raw", size=size, backing="base.img")
    (here / "top.add-cow").write_bytes(content)
    place, file = 32 * MiB + 5, here / target(job)
    ended = met(here, *command(job), meanwhile=lambda: put(file, place, b"new"))
    assert ended.status == 1, ended
    is_seen(ended, target(job), place)


@EACH
def test_verify_option_finds_lost_zeros(here: Path, job: str) -> None:
    """What should be data reads as a hole."""
    pair(here, "ABCD", "-X-Y")
    path = here / target(job)
    ended = met(here, *command(job), meanwhile=lambda: put(path, CLUSTER, bytes(CLUSTER)))
    is_seen(ended, path.name, CLUSTER)


@EACH
def test_verify_option_finds_a_truncated_file(here: Path, job: str) -> None:
    pair(here, "ABCD", "-X-Y")
    path = here / target(job)
    ended = met(here, *command(job), meanwhile=lambda: os.truncate(path, 3 * CLUSTER))
    assert path.name in one_line(ended)
    assert (here / "top.add-cow").exists()


def test_verify_option_ignores_data_after_the_virtual_size(here: Path) -> None:
    top = pair(here, "ABCDEFGH", "-X-Y")
    seen = guest_digest(view_of(top))
    words = command("commit", "--output", "json")
    ended = met(here, *words, meanwhile=lambda: flip(here / "base.img", 4 * CLUSTER))
    assert ended.status == 0, ended
    assert json.loads(ended.stdout)["guest-digest"] == seen
    assert look(here / "base.img")[:4] == "AXCY"


def chain(here: Path) -> None:
    draw_raw(here / "base.img", "ABCDEFGH")
    draw(here / "mid.add-cow", "M--M----")
    draw(here / "top.add-cow", "-T-T--0-", "mid.add-cow", backing_format="add-cow")


@pytest.mark.parametrize("job", ["commit", "commit -d"])
@pytest.mark.parametrize(
    ("name", "at"),
    [("mid.raw", 0), ("mid.raw", CLUSTER + 9), ("base.img", 5 * CLUSTER), ("base.img", CLUSTER)],
)
def test_verify_option_reads_the_view_of_an_add_cow_backing(
    here: Path, job: str, name: str, at: int
) -> None:
    """Whatever layer below shows there: what is covered by another does not matter."""
    chain(here)
    seen = guest_digest(view_of(here / "top.add-cow"))
    words = command(job, "--output", "json")
    ended = met(here, *words, meanwhile=lambda: flip(here / name, at))
    if (name, at) == ("base.img", CLUSTER):
        assert ended.status == 0, ended
        assert json.loads(ended.stdout)["guest-digest"] == seen
        return
    line = one_line(ended)
    assert any(f"addcow: {file}: " in line for file in ("mid.add-cow", "mid.raw", name)), line


@pytest.mark.parametrize("job", ["commit", "commit -d"])
def test_verify_option_finds_lost_bits_of_the_backing(here: Path, job: str) -> None:
    chain(here)
    cow = here / "mid.add-cow"
    ended = met(here, *command(job), meanwhile=lambda: put(cow, CLUSTER, b"\x09"))
    assert "mid." in one_line(ended)
    assert local_clusters(cow) == [0, 3]


@EACH
@BOTH
def test_verify_option_finds_data_lost_during_the_job(here: Path, job: str, jobs: str) -> None:
    """A byte that changes after it was written and before it is synced."""
    pair(here, "ABCDEFGH", "-X-Y0---")
    path, at = here / target(job), (1 if job.startswith("commit") else 5) * CLUSTER + 99
    rules = rules_for(here, rule("data_sync", "stop", once="on"))
    with running(*command(job, "--jobs", jobs), cwd=here, rules=rules) as run:
        stopped = run.stopped()
        flip(path, at)
        run.signal(signal.SIGCONT, *stopped)
        is_seen(run.end(), path.name, at)
    assert (here / "top.add-cow").exists()


# ---- from the disk, not from memory ----


@dataclass(frozen=True)
class Below:
    """An ext4 on a loop device, and its device file."""

    here: Path
    device: Path

    def flip(self, name: str, at: int) -> None:
        """Change a byte of a file where it lies on the device, so that no cache of it knows."""
        with (self.here / name).open("rb") as file:
            size = struct.unpack("i", fcntl.ioctl(file, 2, bytes(4)))[0]  # FIGETBSZ
            block = struct.unpack("i", fcntl.ioctl(file, 1, struct.pack("i", at // size)))[0]
        assert block, "there is nothing on the device"
        flip(self.device, block * size + at % size)


@pytest.fixture
def below(tmp_path: Path) -> Iterator[Below]:
    mount = mounted("ext4", tmp_path)
    yield Below(next(mount), tmp_path / "device")
    with suppress(StopIteration):
        next(mount)


@EACH
@CACHES
@BOTH
def test_verify_option_reads_from_the_disk_and_not_from_memory(
    below: Below, job: str, cache: str, jobs: str
) -> None:
    here = below.here
    pair(here, "ABCDEFGH", "-X-Y-Z--")
    os.sync()
    name, at = target(job), 3 * CLUSTER + 4321
    words = command(job, "-t", cache, "--jobs", jobs, "--copy", "buffer")
    ended = met(here, *words, meanwhile=lambda: below.flip(name, at))
    is_seen(ended, name, at)


@EACH
def test_verify_option_reads_unwritten_data_from_the_disk(below: Below, job: str) -> None:
    """Clusters that were there already: a flattened disk consists of them as well."""
    here = below.here
    pair(here, "ABCDEFGH", "-X-Y-Z--")
    os.sync()
    name, at = target(job), (0 if job.startswith("commit") else 1) * CLUSTER + 5
    is_seen(met(here, *command(job), meanwhile=lambda: below.flip(name, at)), name, at)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
@EACH
def test_verify_option_works_on_small_file_systems(tmp_path: Path, job: str, kind: str) -> None:
    mount = mounted(kind, tmp_path)
    place = next(mount)
    try:
        top = pair(place, "ABCDEFGH", "-X-Y-Z--")
        seen = guest_digest(view_of(top))
        told = succeed(*command(job, "--output", "json"), cwd=place).json
        assert told["guest-digest"] == seen
    finally:
        with suppress(StopIteration):
            next(mount)


# ---- errors ----


@EACH
@BOTH
def test_verify_option_reports_a_failed_read_back(here: Path, job: str, jobs: str) -> None:
    pair(here, "ABCDEFGH", "-X-Y0---")
    rules = rules_for(here, rule("read_back"))
    with running(*command(job, "--jobs", jobs), cwd=here, rules=rules) as run:
        ended = run.end()
        run.all_gone()
    line = one_line(ended)
    assert ended.stdout == ""
    assert "done" in line
    assert "not verified" in line
    assert target(job) in line
    assert look(here / target(job)) == "AXCY0FGH"
    assert (here / "top.add-cow").exists()
    succeed(*command(job), cwd=here)
    assert (here / "top.add-cow").exists() == (job != "discard")


@EACH
def test_read_back_event_occurs_once(here: Path, job: str) -> None:
    pair(here, "ABCD", "-X-Y")
    rules = rules_for(here, rule("read_back", after=1))
    with running(*command(job, "--jobs", "2"), cwd=here, rules=rules) as run:
        assert run.end().status == 0


@EACH
def test_job_without_verify_reads_nothing_back(here: Path, job: str) -> None:
    pair(here, "ABCD", "-X-Y")
    rules = rules_for(here, rule("read_back"))
    with running(*WORDS[job], "top.add-cow", cwd=here, rules=rules) as run:
        ended = run.end()
    assert ended.status == 0
    assert len(ended.stdout.splitlines()) == 1


@EACH
@BOTH
def test_bad_sector_before_the_job_stops_it(here: Path, job: str, jobs: str) -> None:
    """What cannot be read has no digest; then nothing is changed."""
    pair(here, "ABCDEFGH", "-X-Y0---")
    before = snapshot(here)
    rules = rules_for(here, rule("image_read", cluster=3))
    with running(*command(job, "--jobs", jobs), cwd=here, rules=rules) as run:
        line = one_line(run.end())
        run.all_gone()
    assert "top.raw" in line
    assert snapshot(here) == before


@EACH
def test_failed_job_does_not_mention_the_read_back(here: Path, job: str) -> None:
    pair(here, "ABCDEFGH", "-X-Y0---")
    seen = guest_picture(here / "top.add-cow")
    event = "backing_write" if job.startswith("commit") else "image_write"
    with running(*command(job), cwd=here, rules=rules_for(here, rule(event, errno=28))) as run:
        line = one_line(run.end())
    assert "No space left" in line
    assert "verif" not in line
    assert "read back" not in line
    assert guest_picture(here / "top.add-cow") == seen
    succeed(*command(job), cwd=here)


# ---- interruptions ----


@EACH
@BOTH
def test_kill_during_the_read_back_costs_nothing(here: Path, job: str, jobs: str) -> None:
    top = pair(here, "ABCDEFGH", "-X-Y0---")
    seen = guest_digest(view_of(top))
    rules = rules_for(here, rule("read_back", "kill", once="on"))
    with running(*command(job, "--jobs", jobs), cwd=here, rules=rules) as run:
        assert run.end().status == -signal.SIGKILL
        run.all_gone()
    assert guest_picture(top) == "AXCY0FGH"
    assert look(here / target(job)) == "AXCY0FGH"
    told = succeed(*command(job, "--output", "json"), cwd=here).json
    assert told["guest-digest"] == seen
    assert top.exists() == (job != "discard")


@pytest.mark.long
@EACH
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_read_back_can_be_stopped(here: Path, job: str, number: signal.Signals) -> None:
    wide = Wide.lay(here, "commit" if job.startswith("commit") else "flatten")
    rules = rules_for(here, rule("read_back", "stop", once="on"))
    with running(*command(job, "--jobs", "2"), cwd=here, rules=rules) as run:
        run.stopped()
        os.killpg(run.pid, number)
        run.signal(signal.SIGCONT)
        ended = run.end()
        run.all_gone()
    assert ended.status == 128 + number, ended
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""
    assert (here / "top.add-cow").exists()
    wide.holds()
    succeed(*command(job), cwd=here)


@EACH
def test_files_are_locked_during_the_read_back(here: Path, job: str) -> None:
    """A guest that began before the end would be taken for a disk that lies."""
    tool("qemu-io", "--version", cwd=here)
    pair(here, "ABCD", "-X-Y")
    said: list[Result] = []

    def others() -> None:
        said.append(addcow("io", "-c", "write -P 1 0 512", "top.add-cow", cwd=here))
        assert re.search('Failed to get "[a-z ]+" lock', opened_for_writing(here / target(job)))

    assert met(here, *command(job), meanwhile=others).status == 0
    for one in said:
        assert "in use" in one_line(one)


# ---- manifests ----


@pytest.mark.long
@EACH
def test_verify_option_does_to_manifests_what_the_job_does_without_it(here: Path, job: str) -> None:
    pair(here, "ABCD", "-X-Y")
    shutil.copytree(here, here.parent / "twin", copy_function=shutil.copy2)
    for place in (here, here.parent / "twin"):
        made(place)
    succeed(*WORDS[job], "top.add-cow", cwd=here.parent / "twin")
    succeed(*command(job), cwd=here)
    left = [sorted(p.name for p in d.glob("*.manifest*")) for d in (here, here.parent / "twin")]
    assert left[0] == left[1]
    assert left[0]
    for layer in (name.removesuffix(".manifest") for name in left[0]):
        kind = "add-cow" if layer.endswith(".add-cow") else "raw"
        succeed("verify", "-q", "-f", kind, layer, cwd=here)


@pytest.mark.long
@EACH
def test_verify_option_digest_equals_that_of_the_manifest(here: Path, job: str) -> None:
    pair(here, "ABCDEFGH", "-X-Y0---")
    io("top.add-cow", "write -P 0x55 3k 100k", cwd=here)
    seen = made(here)["top.add-cow.manifest"]["guest-digest"]
    told: dict[str, Any] = succeed(*command(job, "--output", "json"), cwd=here).json
    assert told["guest-digest"] == seen
    after = made(here, "-f", "raw", "--replace", name=target(job))
    assert after[f"{target(job)}.manifest"]["guest-digest"] == seen


# ---- many images ----


def farm_of(here: Path, count: int) -> list[str]:
    """Lay pairs in directories of their own; return their overlays' names."""
    for number in range(count):
        (here / f"{number}").mkdir()
        pair(here / f"{number}", "ABCDEFGH", "-X-Y0---")
    return [f"{number}/top.add-cow" for number in range(count)]


def farm_command(job: str, *more: str) -> tuple[str, ...]:
    return ("farm", *WORDS[job], "--verify", "--output", "json", *more, ".")


MANY = pytest.mark.parametrize("job", ["commit", "flatten", "discard"])


@MANY
@BOTH
def test_farm_job_with_verify_reports_the_digest_of_each_image(
    here: Path, job: str, jobs: str
) -> None:
    names = farm_of(here, 5)
    seen = guest_digest(view_of(here / names[0]))
    told = succeed(*farm_command(job, "--jobs", jobs), cwd=here).json
    found = {one["filename"]: one["guest-digest"] for one in told["images"]}
    assert found == {f"./{name}": seen for name in names}
    assert all(look(here / f"{number}" / target(job)) == "AXCY0FGH" for number in range(5))
    assert all((here / name).exists() != (job == "discard") for name in names)


@MANY
def test_farm_job_without_verify_reads_nothing_back(here: Path, job: str) -> None:
    farm_of(here, 2)
    rules = rules_for(here, rule("read_back", once="on"))
    words = ("farm", *WORDS[job], "--output", "json", ".")
    with running(*words, cwd=here, rules=rules) as run:
        ended = run.end()
    assert (ended.status, rules.struck) == (0, False)
    assert all("guest-digest" not in one for one in json.loads(ended.stdout)["images"])


def image_of(pid: int, job: str) -> str:
    """The directory of the image that a process has in its hands."""
    names = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    (found,) = {Path(name).parent.name for name in names if name.endswith(f"/{target(job)}")}
    return found


def one_fails(
    here: Path, names: list[str], job: str, jobs: str, number: int
) -> tuple[str, dict[str, Any]]:
    """Flip a bit of an image before it is read back, and send its process a signal then.

    It alone may have failed; returns its directory, and what was told of all images.
    """
    rules = rules_for(here, rule("read_back", "stop", once="on"))
    with running(*farm_command(job, "--jobs", jobs), cwd=here, rules=rules) as run:
        (stopped,) = run.stopped()
        bad = image_of(stopped, job)
        flip(here / bad / target(job), 3 * CLUSTER + 5)
        run.signal(number, stopped)
        ended = run.end()
        run.all_gone()
    assert ended.status == 1
    told = {one["filename"]: one for one in json.loads(ended.stdout)["images"]}
    states = {name: told[f"./{name}"]["state"] for name in names}
    assert states == {name: "failed" if name.startswith(bad) else "done" for name in names}
    return bad, told


@MANY
@BOTH
def test_farm_job_image_with_a_read_back_difference_fails_alone(
    here: Path, job: str, jobs: str
) -> None:
    names = farm_of(here, 4)
    bad, told = one_fails(here, names, job, jobs, signal.SIGCONT)
    problem = told[f"./{bad}/top.add-cow"]["problem"]
    assert f"{bad}/{target(job)}: what was read back differs" in problem
    # Nothing of it was thrown away.
    assert (here / bad / "top.add-cow").exists()


@pytest.mark.long
def test_farm_job_reads_a_split_image_back(here: Path) -> None:
    """So large that it is shared out among the processes, beside small ones."""
    names = farm_of(here, 3)
    (here / "big").mkdir()
    with (here / "big" / "base.img").open("wb") as base:
        for number in range(300):
            base.write(struct.pack("<I", number + 1) * (MiB // 4))
    size = (here / "big" / "base.img").stat().st_size
    with (here / "big" / "top.raw").open("wb") as image:
        image.truncate(size)
    content = overlay_bytes(image="top.raw", size=size, backing="base.img", local=())
    (here / "big" / "top.add-cow").write_bytes(content)
    told = succeed(*farm_command("discard", "--jobs", "2"), cwd=here).json
    found = {one["filename"]: one for one in told["images"]}
    assert all("guest-digest" in one for one in found.values())
    with (here / "big" / "base.img").open("rb") as base:
        assert found["./big/top.add-cow"]["guest-digest"] == guest_digest(base.read())
    assert not any((here / name).exists() for name in (*names, "big/top.add-cow"))


def test_stopped_farm_job_reports_unverified_images(here: Path) -> None:
    farm_of(here, 1)
    rules = rules_for(here, rule("read_back", "stop", once="on"))
    with running(*farm_command("flatten", "--jobs", "1"), cwd=here, rules=rules) as run:
        (stopped,) = run.stopped()
        run.signal(signal.SIGTERM)
        run.until(lambda: run.has_met(signal.SIGTERM), "the signal")
        run.until(run.is_round(), "it to tell its worker")
        run.signal(signal.SIGCONT, stopped)
        ended = run.end()
        run.all_gone()
    assert ended.status == 128 + signal.SIGTERM
    assert ended.stderr.startswith("addcow: 0 of 1 images left, 1 done and not verified: stopped")
    assert json.loads(ended.stdout)["images"][0]["state"] == "stopped"
    assert look(here / "0" / "top.raw") == "AXCY0FGH"


# ---- limits ----


@pytest.mark.long
@EACH
@BOTH
def test_read_back_counts_against_the_rate(here: Path, job: str, jobs: str) -> None:
    """Once before the job and once after it; moving alone would take a quarter of a second."""
    pair(here, "A" * 16, "-X" * 8)
    begun = time.monotonic()
    succeed(*command(job, "--jobs", jobs, "-r", "2M"), cwd=here)
    assert time.monotonic() - begun >= 1


@BOTH
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_limited_read_back_stops_soon(here: Path, jobs: str, number: signal.Signals) -> None:
    """It would take two minutes to read the disk before the job."""
    pair(here, "A" * 32, "-X" * 16)
    words = command("flatten", "--jobs", jobs, "-r", "16K")
    with running(*words, cwd=here) as run:
        run.until(lambda: is_at_work(run.members()), "it to read")
        run.signal(number)
        ended = run.end()
        run.all_gone()
    assert ended.status == 128 + number
    assert bits(here / "top.add-cow") == ".1" * 16


def is_at_work(processes: list[Process]) -> bool:
    """Whether one of them has the disk open."""
    with suppress(OSError):
        opened = [fd for one in processes for fd in Path(f"/proc/{one.pid}/fd").iterdir()]
        return any(os.readlink(fd).endswith("/base.img") for fd in opened)
    return False


# ---- what stands in the way ----


@BOTH
def test_refused_image_does_not_hinder_the_read_back_of_another(here: Path, jobs: str) -> None:
    """The refused job had the file mapped that another job reads back."""
    draw_raw(here / "base.img", "ABCD")
    draw(here / "a.add-cow", "-X--", "base.img")
    draw(here / "b.add-cow", "--Y-", "a.add-cow", backing_format="add-cow")
    draw(here / "other.add-cow", "---Z", "base.img")
    words = ("farm", "commit", "--verify", "--jobs", jobs, "--output", "json", ".")
    told = {one["filename"]: one for one in addcow(*words, cwd=here).json["images"]}
    assert told["./a.add-cow"]["state"] == "refused"
    assert told["./b.add-cow"]["state"] == "done", told["./b.add-cow"]
    assert guest_picture(here / "b.add-cow") == "AXYD"


@pytest.mark.parametrize("job", ["flatten", "discard"])
def test_image_whose_read_back_worker_was_killed_fails(here: Path, job: str) -> None:
    """Done once more, there is nothing to do, and what is there is what is there."""
    names = farm_of(here, 2)
    bad, _ = one_fails(here, names, job, "1", signal.SIGKILL)
    assert (here / bad / "top.add-cow").exists()


@EACH
@BOTH
def test_verify_option_finds_a_file_that_has_grown(here: Path, job: str, jobs: str) -> None:
    pair(here, "ABCD", "-X-Y")
    name = "base.img" if job == "commit -d" else "top.raw"
    path, size = here / name, 4 * CLUSTER
    ended = met(here, *command(job, "--jobs", jobs), meanwhile=lambda: os.truncate(path, 2 * size))
    line = one_line(ended)
    assert f"{name}: it is {2 * size} bytes large, and was {size}" in line
    assert (here / "top.add-cow").exists()
