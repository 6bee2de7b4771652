"""Tests of manifests that jobs make: commit, flatten, rebase, reset and snapshot.

A new manifest must equal, byte for byte, the one that `manifest create` makes afterwards. Other
tests compare that one with the oracle. Damage is planted as a disk does it: bytes change, and time
stamps do not. The same job on undamaged files says what the guests must see.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from addcow_mp.device.access import Access
from addcow_mp.errors import AddcowError
from addcow_mp.jobs.commit import commit
from addcow_mp.jobs.create import snapshot
from addcow_mp.jobs.flatten import flatten
from addcow_mp.jobs.manifest import create
from addcow_mp.jobs.options import RunOptions
from addcow_mp.jobs.rebase import NewBacking, rebase
from addcow_mp.jobs.report import Report
from addcow_mp.jobs.reset import reset
from addcow_mp.jobs.verify import verify
from support.chains import wild_chain
from support.command import (
    CLUSTER,
    KiB,
    MiB,
    addcow,
    draw,
    draw_raw,
    guest_picture,
    overlay_bytes,
    put,
    succeed,
)
from support.fault_rules import Rules, rule
from support.model import Files, build, read_view
from support.properties import tried
from support.warm import Warm

TOP = "top.add-cow"
BASE = "top-base.add-cow"

#: The largest size of the random chains: several leaves, and rarely more than a group.
MOST = 1 * MiB


# ---- random chains, and jobs on them ----


def run_commit(top: str, options: RunOptions) -> Report:
    return commit(top, options=options)


def run_keeping(top: str, options: RunOptions) -> Report:
    return commit(top, keep=True, options=options)


def run_flatten(top: str, options: RunOptions) -> Report:
    return flatten(top, options=options)


def run_discard(top: str, options: RunOptions) -> Report:
    return flatten(top, discard=True, options=options)


def run_reset(top: str, options: RunOptions) -> Report:
    return reset(top, options=options)


def run_snapshot(top: str, options: RunOptions) -> Report:
    new = os.path.join(os.path.dirname(top), "new.add-cow")
    made = snapshot(top, new, access=options.access, manifest=options.manifests)
    report = Report("snapshot", top)
    report.warnings = made.warnings
    report.manifests_made = [made.manifest] if made.manifest else []
    return report


def run_rebase(top: str, options: RunOptions) -> Report:
    """Rebase onto a disk that resembles the old backing file."""
    return rebase(top, NewBacking("other.raw", "raw"), options=options)


def run_alone(top: str, options: RunOptions) -> Report:
    return rebase(top, NewBacking(""), options=options)


def run_renaming(top: str, options: RunOptions) -> Report:
    """Rebase with -u onto a copy of the old backing file's view."""
    return rebase(top, NewBacking("same.raw", "raw", unsafe=True), options=options)


JOBS: dict[str, Callable[[str, RunOptions], Report]] = {
    "commit": run_commit,
    "commit -d": run_keeping,
    "flatten": run_flatten,
    "discard": run_discard,
    "reset": run_reset,
    "snapshot": run_snapshot,
    "rebase": run_rebase,
    "rebase alone": run_alone,
    "rebase -u": run_renaming,
}
EACH = pytest.mark.parametrize("job", JOBS)

#: --force, and no worker processes: other tests below use workers.
FORCING = RunOptions(jobs=0, access=Access(force=True))


def drawn(seed: int, place: Path) -> Files:
    """Write a random chain into the new directory ``place``."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    rng = random.Random(seed)
    files = build(wild_chain(rng, MOST), str(place))
    if files.backing is not None:
        below = bytearray(read_view(files.backing.path, format_of(files.backing.path)))
        (place / "same.raw").write_bytes(below)
        for _ in range(rng.randrange(3)):
            at = rng.randrange(len(below))
            below[at : at + rng.randrange(100 * KiB)] = b"other"
        (place / "other.raw").write_bytes(below[: rng.choice([len(below), len(below) * 2 // 3])])
    return files


def layers_of(files: Files | None) -> list[Files]:
    return [] if files is None else [files, *layers_of(files.backing)]


def format_of(path: str) -> str:
    return "add-cow" if path.endswith(".add-cow") else "raw"


def top_of(place: Path, job: str) -> str:
    """The layer that is at the top after a job."""
    names = {"discard": "top.raw", "snapshot": "new.add-cow"}
    return str(place / names.get(job, TOP))


def manifests(place: Path) -> dict[str, bytes]:
    assert not list(place.glob("*.part"))
    return {one.name: one.read_bytes() for one in sorted(place.glob("*.manifest"))}


def fresh(place: Path, top: str) -> dict[str, bytes]:
    """The manifests that `manifest create` makes now."""
    for one in place.glob("*.manifest"):
        one.unlink()
    create(top, FORCING, format_=format_of(top))
    return manifests(place)


def record(files: Files) -> None:
    """Make a manifest of every layer, also of layers that the top does not need."""
    for layer in reversed(layers_of(files)):
        create(layer.path, FORCING, format_=format_of(layer.path))
    for name in ("same.raw", "other.raw"):
        path = os.path.join(os.path.dirname(files.path), name)
        if os.path.exists(path):
            create(path, FORCING, format_="raw")


def status(top: str) -> int:
    return verify(top, FORCING, format_=format_of(top)).exit_code


def attempt(job: str, files: Files, options: RunOptions = FORCING) -> Report | None:
    """Run a job; None if it is refused, as without a backing file or with a shorter one."""
    if files.backing is None and job in ("rebase", "rebase -u"):
        return None  # there is nothing that a new backing file could resemble
    with suppress(AddcowError):
        return JOBS[job](files.path, options)
    return None


@pytest.mark.sample(3)
@EACH
@tried(120)
@given(seed=st.integers(0, 1 << 32))
def test_new_manifests_are_those_that_manifest_create_makes(
    tmp_path_factory: pytest.TempPathFactory, job: str, seed: int
) -> None:
    place = tmp_path_factory.mktemp("chain") / "here"
    files = drawn(seed, place)
    record(files)
    before = set(manifests(place))
    report = attempt(job, files)
    if report is None:
        assert set(manifests(place)) == before
        shutil.rmtree(place)
        return
    top = top_of(place, job)
    after = manifests(place)
    assert report.manifests_gone == [f"{files.path}.manifest"] * (job == "discard")
    assert [one for one in report.warnings if "manifest" in one] == []
    wanted = fresh(place, top)
    # Layers that the guest of the top no longer sees keep their manifests.
    assert {name: after[name] for name in wanted} == wanted
    gained = {f"{top}.manifest"} if job in ("discard", "snapshot") else set()
    lost = {f"{TOP}.manifest"} if job == "discard" else set()
    assert set(after) == before - lost | {os.path.basename(one) for one in gained}
    shutil.rmtree(place)


# ---- some of the layers have a manifest, and some data is damaged ----


def reseal(layer: Files) -> None:
    """Write the present sizes and times of the files into a manifest: only data may differ."""
    path = Path(f"{layer.path}.manifest")
    if not path.exists():
        return
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[12:16], "little")
    head = json.loads(content[16 : 16 + length])
    names = {"image": layer.image, **({"cow": layer.path} if "cow" in head["files"] else {})}
    for key, name in names.items():
        state = os.stat(name)
        head["files"][key] = {
            "size": state.st_size,
            "inode": state.st_ino,
            "mtime-ns": state.st_mtime_ns,
            "ctime-ns": state.st_ctime_ns,
        }
    text = json.dumps(head).encode()
    content[12:4096] = len(text).to_bytes(4, "little") + text.ljust(4080, b"\0")
    path.write_bytes(content[:-32] + blake3(content[:-32]).digest())


def flip(path: str, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes([old ^ 4]))


def views(place: Path) -> dict[str, bytes]:
    """What the guest of each layer sees."""
    overlays = [str(one) for one in place.glob("*.add-cow")]
    names = ("top-base.raw", "top.raw")
    raws = [str(place / one) for one in names if (place / one).exists()]
    return {os.path.basename(path): read_view(path, format_of(path)) for path in [*overlays, *raws]}


@pytest.mark.sample(3)
@EACH
@tried(200)
@given(seed=st.integers(0, 1 << 32))
def test_damage_is_never_hidden_and_good_data_never_accused(
    tmp_path_factory: pytest.TempPathFactory, job: str, seed: int
) -> None:
    rng = random.Random(seed)
    both = tmp_path_factory.mktemp("chain")
    damaged, sound = drawn(seed, both / "damaged"), drawn(seed, both / "sound")
    layers = layers_of(damaged)
    record(damaged)
    for layer in layers:
        if rng.random() < 0.2:
            os.unlink(f"{layer.path}.manifest")
    hit = rng.choice(layers)
    size = os.path.getsize(hit.image)
    if size and rng.random() < 0.8:
        flip(hit.image, rng.randrange(size))
    for layer in layers:
        reseal(layer)
    before = status(damaged.path)
    report = attempt(job, damaged)
    assert (attempt(job, sound) is None) == (report is None)
    if report is not None:
        top = os.path.basename(top_of(both / "damaged", job))
        is_same = views(both / "damaged").get(top) == views(both / "sound").get(top)
        after = status(top_of(both / "damaged", job))
        if before == 2 and not is_same:
            assert after != 0, "damage that a manifest told is hidden"
        if before != 2 and views(both / "damaged") == views(both / "sound"):
            assert after != 2, "good data is said to be damaged"
    shutil.rmtree(both)


def two(here: Path, *, cluster: int = 4 * KiB) -> None:
    """An overlay with small clusters over a base, both with a manifest."""
    draw_raw(here / "base.img", "ABCDEFGHABCDEFGH" * 8, cluster=cluster)
    draw(here / TOP, "X-0bY---XX-Z--Y-" * 8, cluster=cluster)
    succeed("manifest", "create", TOP, cwd=here)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("words", "top"),
    [
        (("commit", TOP), TOP),
        (("flatten", TOP), TOP),
        (("flatten", "--discard", TOP), "top.raw"),
        (("farm", "commit", TOP), TOP),
        (("farm", "flatten", TOP), TOP),
    ],
)
def test_damage_before_a_job_is_found_at_its_place_afterwards(
    tmp_path: Path, words: tuple[str, ...], top: str
) -> None:
    two(tmp_path, cluster=CLUSTER)
    for name, at in (("top.raw", 4 * CLUSTER + 7), ("base.img", 6 * CLUSTER + 9)):
        flip(str(tmp_path / name), at)
    reseal(Files(str(tmp_path / TOP), str(tmp_path / "top.raw")))
    reseal(Files(str(tmp_path / "base.img"), str(tmp_path / "base.img")))
    succeed(*words, cwd=tmp_path)
    form = () if top == TOP else ("-f", "raw")
    result = addcow("verify", "--output", "json", *form, top, cwd=tmp_path)
    assert result.status == 2
    places = {one["start"] // CLUSTER for one in result.json["ranges"]}
    assert places == {4, 6}


def is_refused(here: Path, *words: str) -> None:
    """Assert that the job succeeds, and makes no new manifest because of the damage."""
    told = addcow(*words, TOP, cwd=here)
    assert told.status == 0
    (line,) = (one for one in told.stderr.splitlines() if "manifest" in one)
    assert line.startswith(f"addcow: warning: {TOP}: no new manifest is made: ")
    assert line.endswith("differ from what its manifest says")
    assert f"{TOP}.manifest" not in manifests(here)


def test_damage_in_a_leaf_that_mixes_layers_is_not_hidden(tmp_path: Path) -> None:
    """In a commit into an overlay with small clusters, and in a flatten over a base without one."""
    draw_raw(tmp_path / "base.img", "ABCDEFGHABCDEFGH" * 2, cluster=4 * KiB)
    draw(tmp_path / "mid.add-cow", "-M--M---" + "-" * 24, cluster=4 * KiB)
    draw(tmp_path / TOP, "X-0bY---" * 4, "mid.add-cow", backing_format="add-cow", cluster=4 * KiB)
    succeed("manifest", "create", TOP, cwd=tmp_path)
    shutil.copytree(tmp_path, tmp_path / "flat")
    for here in (tmp_path, tmp_path / "flat"):
        flip(str(here / "top.raw"), 4 * 4 * KiB + 3)
        for name, image in (
            (TOP, "top.raw"),
            ("mid.add-cow", "mid.raw"),
            ("base.img", "base.img"),
        ):
            reseal(Files(str(here / name), str(here / image)))
    is_refused(tmp_path, "commit")
    assert list(manifests(tmp_path)) == ["base.img.manifest"]
    (tmp_path / "flat" / "base.img.manifest").unlink()
    is_refused(tmp_path / "flat", "flatten")


def test_damage_of_a_base_beside_what_it_receives_is_not_hidden(tmp_path: Path) -> None:
    """The overlay has no manifest; the rest of the leaves that it changes is compared."""
    two(tmp_path)
    (tmp_path / f"{TOP}.manifest").unlink()
    flip(str(tmp_path / "base.img"), 4 * KiB + 9)
    reseal(Files(str(tmp_path / "base.img"), str(tmp_path / "base.img")))
    is_refused(tmp_path, "commit")
    assert manifests(tmp_path) == {}


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("words", "file", "at"),
    [
        (("commit",), "base.img", 200 * KiB),
        (("commit",), "top.raw", 195 * KiB),
        (("reset",), "base.img", 193 * KiB),
        (("reset",), "base.img", 200 * KiB),
    ],
)
def test_damage_in_the_leaf_where_an_overlay_ends_is_not_hidden(
    tmp_path: Path, words: tuple[str, ...], file: str, at: int
) -> None:
    draw_raw(tmp_path / "base.img", "ABCDEFGH")
    draw(tmp_path / TOP, "X--Y")
    os.truncate(tmp_path / "top.raw", 196 * KiB)
    succeed("manifest", "create", TOP, cwd=tmp_path)
    flip(str(tmp_path / file), at)
    reseal(Files(str(tmp_path / TOP), str(tmp_path / "top.raw")))
    reseal(Files(str(tmp_path / "base.img"), str(tmp_path / "base.img")))
    is_refused(tmp_path, *words)


@pytest.mark.long
def test_lost_data_is_found_where_a_hole_is(tmp_path: Path) -> None:
    """The disk has lost a whole group of leaves: the file has a hole there."""
    size = 48 * MiB
    with (tmp_path / "base.img").open("wb") as file:
        file.write(b"x" * size)
    draw(tmp_path / TOP, "X" + "-" * (size // CLUSTER - 1))
    succeed("manifest", "create", TOP, cwd=tmp_path)
    with (tmp_path / "base.img").open("r+b") as file:
        file.truncate(16 * MiB)
        file.truncate(size)
    reseal(Files(str(tmp_path / "base.img"), str(tmp_path / "base.img")))
    assert addcow("verify", TOP, cwd=tmp_path).status == 2
    succeed("flatten", TOP, cwd=tmp_path)
    result = addcow("verify", "--output", "json", TOP, cwd=tmp_path)
    assert result.status == 2
    found = [one for one in result.json["ranges"] if one["file"].endswith("top.raw")]
    assert [(one["start"], one["length"]) for one in found] == [(16 * MiB, 32 * MiB)]


def test_failed_job_says_which_manifests_are_gone(warm: Warm, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    two(here)
    rules = Rules.write(tmp_path / "rules", rule("data_sync"))
    ended = warm.run("flatten", TOP, cwd=here, rules=rules)
    assert ended.status == 1
    warning, line = ended.stderr.splitlines()
    assert warning.startswith(f"addcow: warning: {TOP}.manifest: it was removed")
    assert line.startswith("addcow: ")


# ---- what is read ----


def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the bytes that this process reads of each file from now on."""
    counted: Counter[str] = Counter()
    preadv, pread = os.preadv, os.pread

    def counting(fd: int, done: int) -> int:
        counted[os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))] += done
        return done

    monkeypatch.setattr(os, "preadv", lambda fd, *more: counting(fd, preadv(fd, *more)))

    def reading(fd: int, length: int, offset: int) -> bytes:
        found = pread(fd, length, offset)
        counting(fd, len(found))
        return found

    monkeypatch.setattr(os, "pread", reading)
    return counted


@pytest.mark.sample(3)
@EACH
def test_no_byte_of_a_disk_is_read_for_a_new_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str
) -> None:
    """A job reads the same bytes of the disks with and without new manifests."""
    told = []
    for manifest in (True, False):
        here = tmp_path / f"{manifest}"
        here.mkdir()
        two(here, cluster=CLUSTER)
        for name in ("same.raw", "other.raw"):
            shutil.copy(here / "base.img", here / name)
            if name == "other.raw":
                put(here / name, 0, b"other")
            create(str(here / name), FORCING, format_="raw")
        with monkeypatch.context() as patched:
            counted = reads(patched)
            report = JOBS[job](str(here / TOP), RunOptions(jobs=0, manifests=manifest))
        assert bool(report.manifests_made) is manifest
        names = ("base.img", "top.raw", "new.raw", "same.raw", "other.raw")
        told.append([counted[name] for name in names])
    assert told[0] == told[1]
    if job in ("commit", "commit -d", "reset", "snapshot", "rebase -u"):
        assert told[0][0] <= 64, "more than its first bytes, which tell the format"


def test_rebase_that_trusts_manifests_reads_no_base_for_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two(tmp_path, cluster=CLUSTER)
    shutil.copy(tmp_path / "base.img", tmp_path / "other.raw")
    put(tmp_path / "other.raw", CLUSTER * 8, b"other")
    create(str(tmp_path / "other.raw"), FORCING, format_="raw")
    new = NewBacking("other.raw", "raw", trusts_manifests=True)
    with monkeypatch.context() as patched:
        counted = reads(patched)
        report = rebase(str(tmp_path / TOP), new, options=RunOptions(jobs=0))
    assert report.manifests_made == [f"{tmp_path / TOP}.manifest"]
    # One cluster is copied up, and the first bytes tell the format.
    assert counted["base.img"] <= CLUSTER + 64
    assert counted["other.raw"] <= 64
    after = manifests(tmp_path)
    assert fresh(tmp_path, str(tmp_path / TOP)) == {
        name: after[name] for name in (f"{TOP}.manifest", "other.raw.manifest")
    }


# ---- workers ----


@pytest.mark.long
@EACH
def test_workers_take_over_digests_and_read_what_is_unknown(tmp_path: Path, job: str) -> None:
    """A sparse base of 1.5 GiB: the manifests of a large chain do not fit the first buffer."""
    rng = random.Random(job)
    size = 1536 * MiB
    for name in ("base.img", "top.raw"):
        with (tmp_path / name).open("wb") as file:
            for at in range(0, size, MiB):
                file.seek(at + 64 * KiB * rng.randrange(16))
                file.write(rng.randbytes(20 * KiB))
            file.truncate(size)
    local = [one for one in range(size // (16 * KiB)) if rng.random() < 0.2]
    content = overlay_bytes(
        image="top.raw", size=size, backing="base.img", cluster=16 * KiB, local=local
    )
    (tmp_path / TOP).write_bytes(content)
    options = RunOptions(jobs=2)
    create(str(tmp_path / TOP), options)
    for name in ("same.raw", "other.raw") if job.startswith("rebase") else ():
        subprocess.run(["cp", "--sparse=always", "base.img", name], cwd=tmp_path, check=True)
        if name == "other.raw":
            put(tmp_path / name, 512 * MiB + 5, b"other")
        create(str(tmp_path / name), options, format_="raw")
    if job == "flatten":
        (tmp_path / "base.img.manifest").unlink()
    if job == "commit":
        (tmp_path / f"{TOP}.manifest").unlink()
    report = JOBS[job](str(tmp_path / TOP), options)
    assert report.manifests_made
    top = top_of(tmp_path, job)
    after = manifests(tmp_path)
    wanted = fresh(tmp_path, top)
    names = [os.path.basename(one) for one in report.manifests_made]
    assert {one: after[one] for one in names} == {one: wanted[one] for one in names}


# ---- layers without a manifest get none ----


def test_only_layers_that_had_a_manifest_get_one(tmp_path: Path) -> None:
    two(tmp_path)
    (tmp_path / "base.img.manifest").unlink()
    told = succeed("commit", "--output", "json", TOP, cwd=tmp_path)
    # The manifest of an overlay refers to that of its base, which does not exist.
    assert told.json["manifests-removed"] == [f"{TOP}.manifest"]
    assert "manifests-made" not in told.json
    assert manifests(tmp_path) == {}


def test_commit_of_an_overlay_without_manifest_keeps_that_of_the_base(tmp_path: Path) -> None:
    two(tmp_path)
    (tmp_path / f"{TOP}.manifest").unlink()
    told = succeed("commit", "--output", "json", TOP, cwd=tmp_path)
    assert told.json["manifests-made"] == ["base.img.manifest"]
    assert "manifests-removed" not in told.json
    succeed("verify", "-f", "raw", "base.img", cwd=tmp_path)
    assert list(manifests(tmp_path)) == ["base.img.manifest"]


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["top.raw", "base.img"])
@pytest.mark.parametrize("words", [("commit",), ("flatten",)])
def test_manifest_of_another_state_is_not_used(
    tmp_path: Path, words: tuple[str, ...], name: str
) -> None:
    two(tmp_path)
    put(tmp_path / name, 5, b"other")
    told = addcow(*words, "--output", "json", TOP, cwd=tmp_path)
    assert told.status == 0
    (line,) = told.stderr.splitlines()
    assert line.startswith(f"addcow: warning: {TOP}: no new manifest is made: ")
    assert "describes another state" in line
    assert f"{TOP}.manifest" in told.json["manifests-removed"]
    assert f"{TOP}.manifest" not in manifests(tmp_path)


# ---- the option, and reports ----

COMMANDS = [
    ("commit", TOP),
    ("commit", "-d", TOP),
    ("flatten", TOP),
    ("flatten", "--discard", TOP),
    ("reset", TOP),
    ("farm", "commit", TOP),
    ("farm", "flatten", TOP),
    ("farm", "reset", TOP),
]


@pytest.mark.sample(2)
@pytest.mark.parametrize("words", COMMANDS)
def test_no_manifest_leaves_them_removed_and_says_so(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    two(tmp_path)
    told = succeed(*words, "--no-manifest", "--output", "json", cwd=tmp_path).json
    (image,) = told.get("images", [told])
    assert f"{TOP}.manifest" in image["manifests-removed"]
    assert "manifests-made" not in image
    assert f"{TOP}.manifest" not in manifests(tmp_path)


@pytest.mark.long
@pytest.mark.sample(2)
@pytest.mark.parametrize("words", COMMANDS)
def test_report_names_new_manifests(tmp_path: Path, words: tuple[str, ...]) -> None:
    two(tmp_path)
    told = succeed(*words, "--output", "json", cwd=tmp_path).json
    (image,) = told.get("images", [told])
    assert set(image["manifests-made"]) == set(manifests(tmp_path)) - (
        set() if "commit" in words else {"base.img.manifest"}
    )
    discards = "--discard" in words
    assert image.get("manifests-removed") == ([f"{TOP}.manifest"] if discards else None)
    top, form = ("top.raw", ("-f", "raw")) if discards else (TOP, ())
    succeed("verify", *form, top, cwd=tmp_path)


@pytest.mark.long
def test_snapshot_gets_a_manifest_if_the_disk_has_one(tmp_path: Path) -> None:
    two(tmp_path)
    before = manifests(tmp_path)
    told = succeed("snapshot", "--output", "json", TOP, "new.add-cow", cwd=tmp_path).json
    assert told["manifests-made"] == ["new.add-cow.manifest"]
    succeed("snapshot", "--no-manifest", TOP, "other.add-cow", cwd=tmp_path)
    assert set(manifests(tmp_path)) == {*before, "new.add-cow.manifest"}
    assert {one: manifests(tmp_path)[one] for one in before} == before
    succeed("verify", "new.add-cow", cwd=tmp_path)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("words", "removed"),
    [
        (("resize", TOP, "+1M"), {f"{TOP}.manifest"}),
        (("qemu", "export", TOP), {f"{TOP}.manifest"}),
        (("check", "-r", "leaks", TOP), {f"{TOP}.manifest"}),
        (("commit", "--no-manifest", TOP), {f"{TOP}.manifest", "base.img.manifest"}),
        (("convert", "-O", "raw", TOP, "new.raw"), {"new.raw.manifest"}),
    ],
)
def test_job_that_removes_a_manifest_says_so(
    tmp_path: Path, words: tuple[str, ...], removed: set[str]
) -> None:
    for form in ("human", "json"):
        here = tmp_path / form
        here.mkdir()
        two(here)
        shutil.copy(here / "base.img.manifest", here / "new.raw.manifest")
        told = succeed(*words, "--output", form, cwd=here)
        if form == "json":
            assert set(told.json["manifests-removed"]) == removed
        else:
            says = {f"Removed the manifest '{one}', which no longer applies." for one in removed}
            assert says <= set(told.lines)
        assert not removed & set(manifests(here))


def test_io_that_writes_says_that_it_removed_the_manifest(tmp_path: Path) -> None:
    two(tmp_path)
    told = succeed("io", "-c", "read 0 4k", TOP, cwd=tmp_path)
    assert told.stderr == ""
    told = succeed("io", "-c", "write 0 4k", TOP, cwd=tmp_path)
    assert f"{TOP}.manifest: it was removed" in told.stderr
    create(str(tmp_path / TOP), FORCING)
    told = succeed("io", "-c", "truncate 4k", TOP, cwd=tmp_path)
    assert f"{TOP}.manifest: it was removed" in told.stderr


@pytest.mark.long
def test_jobs_without_manifests_say_nothing_of_them(tmp_path: Path) -> None:
    two(tmp_path)
    for one in tmp_path.glob("*.manifest"):
        one.unlink()
    for words in (("resize", TOP, "+1M"), ("flatten", TOP)):
        assert "manifest" not in succeed(*words, "--output", "json", cwd=tmp_path).said
        assert "manifest" not in succeed(*words, cwd=tmp_path).said
    assert manifests(tmp_path) == {}


# ---- farms ----


@pytest.mark.sample(1)
@pytest.mark.parametrize("job", ["commit", "flatten", "reset"])
@pytest.mark.parametrize("jobs", ["0", "2"])
def test_scrub_after_a_farm_job_is_clean(tmp_path: Path, job: str, jobs: str) -> None:
    for number in range(4):
        draw_raw(tmp_path / f"base{number}.img", "ABCDEFGH")
        draw(tmp_path / f"a{number}.add-cow", "X-0-Y---", f"base{number}.img")
        below = f"a{number}.add-cow"
        draw(tmp_path / f"b{number}.add-cow", "--Z-W--V", below, backing_format="add-cow")
    succeed("farm", "manifest", "create", ".", cwd=tmp_path)
    before = set(manifests(tmp_path))
    addcow("farm", job, "--jobs", jobs, ".", cwd=tmp_path)
    assert set(manifests(tmp_path)) == before
    succeed("farm", "scrub", "run", "--state", "scrub.db", ".", cwd=tmp_path)
    after = manifests(tmp_path)
    for one in before:
        (tmp_path / one).unlink()
    succeed("farm", "manifest", "create", ".", cwd=tmp_path)
    made = manifests(tmp_path)
    # Flattened overlays need no base any more.
    assert {name: after[name] for name in made} == made


# ---- faults and kills ----

#: The commands that meet a fault at each event.
WALKS: dict[str, tuple[str, ...]] = {
    "commit": ("commit", "--jobs", "0", TOP),
    "flatten": ("flatten", "--jobs", "0", TOP),
    "discard": ("flatten", "--discard", "--jobs", "0", TOP),
    "reset": ("reset", TOP),
}
EVENTS = (
    *("header_write", "bitmap_update", "bitmap_sync", "data_sync", "publish", "punch"),
    *("image_read", "backing_read", "image_write", "backing_write", "directory_sync", "discard"),
    *("bitmap_cut", "bitmap_grow", "manifest_remove", "manifest_write", "manifest_rename"),
)


@pytest.mark.sample(2)
@pytest.mark.parametrize("action", ["error", "kill"])
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("job", WALKS)
def test_manifests_after_a_fault_at_any_event_are_right_or_gone(
    warm: Warm, tmp_path: Path, job: str, event: str, action: str
) -> None:
    original = tmp_path / "original"
    original.mkdir()
    two(original)
    seen = guest_picture(original / TOP, 4 * KiB) if job != "reset" else ""
    for after in count():
        here = tmp_path / f"images-{after}"
        shutil.copytree(original, here, copy_function=shutil.copyfile)
        for layer in ("base.img", TOP):
            image = layer if layer == "base.img" else "top.raw"
            reseal(Files(str(here / layer), str(here / image)))
        rules = Rules.write(tmp_path / "rules", rule(event, action, after=after, once="on"))
        ended = warm.run(*WALKS[job], cwd=here, rules=rules)
        if not rules.struck:
            return
        is_late = event in ("manifest_write", "manifest_rename")
        if action == "error" and is_late:
            assert ended.status == 0, "a job fails because of a manifest"
            assert "no new manifest is made" in ended.stderr
        top = TOP if (here / TOP).exists() else "top.raw"
        assert status(str(here / top)) != 2
        assert status_of_base(here) != 2
        if top == TOP:
            ended = warm.run(*WALKS[job], cwd=here)
            assert ended.status == 0, ended
            top = TOP if (here / TOP).exists() else "top.raw"
        assert status(str(here / top)) != 2
        assert not list(here.glob("*.part")) or action == "kill"
        if seen and top == TOP:
            assert guest_picture(here / TOP, 4 * KiB) == seen
        shutil.rmtree(here)


def status_of_base(here: Path) -> int:
    return verify(str(here / "base.img"), FORCING, format_="raw").exit_code


def test_full_disk_costs_the_manifest_and_not_the_job(warm: Warm, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    here = tmp_path / "here"
    two(here)
    rules = Rules.write(tmp_path / "rules", rule("manifest_write", errno="28"))
    ended = warm.run("flatten", "--output", "json", TOP, cwd=here, rules=rules)
    assert ended.status == 0
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"addcow: warning: {TOP}: no new manifest is made: ")
    assert "No space left" in line
    assert json.loads(ended.stdout)["manifests-removed"] == [f"{TOP}.manifest"]
    assert list(manifests(here)) == ["base.img.manifest"]
