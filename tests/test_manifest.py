"""Tests of manifests and of `verify` through the command line.

Digests are computed here again, from bytes that the oracle reads. The tests know which leaves
they damaged; no other may be named. Chains are random.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
from pathlib import Path
from typing import Any

import pytest

from support.command import (
    ALL_ALLOCATED,
    CLUSTER,
    KiB,
    MiB,
    addcow,
    draw,
    draw_raw,
    io,
    overlay_bytes,
    pair,
    put,
    read_header,
    refused,
    snapshot,
    succeed,
)
from support.fault_rules import Rules, rule
from support.manifests import (
    FAN,
    LEAF,
    digest,
    guest_digest,
    made,
    some_content,
    verified,
    view_of,
    write_sparse,
)
from support.processes import running

pytestmark = pytest.mark.sample(1)

# ---- random chains ----


def some_size(rng: random.Random) -> int:
    common = [0, 512, 4096, LEAF, 3 * LEAF, 300 * LEAF]
    odd = [512 * rng.randrange(1, 3000), 512 * rng.randrange(30000, 70000)]
    return rng.choice([*common, *odd])


def some_chain(here: Path, rng: random.Random) -> Path:
    """Draw a chain; return its topmost overlay."""
    tail = bytes(100 * rng.randrange(3))
    write_sparse(here / "base.img", some_content(rng, some_size(rng)) + tail)
    backing, kind = "base.img", "raw"
    for number in range(rng.randrange(1, 4)):
        size, cluster = some_size(rng), rng.choice([4, 16, 64, 128, 2048]) * KiB
        share = rng.choice([0.1, 0.5, 0.9])
        local = [at for at in range(-(-size // cluster)) if rng.random() < share]
        write_sparse(here / f"o{number}.raw", some_content(rng, size))
        content = overlay_bytes(
            image=f"o{number}.raw",
            size=size,
            backing=backing,
            backing_format=kind,
            cluster=cluster,
            local=local,
            compatible=ALL_ALLOCATED * (rng.random() < 0.1),
        )
        backing, kind = f"o{number}.add-cow", "add-cow"
        (here / backing).write_bytes(content)
    return here / backing


@pytest.mark.parametrize("turn", range(12))
def test_guest_digest_is_that_of_the_guests_view(
    tmp_path: Path, rng: random.Random, turn: int
) -> None:
    top = some_chain(tmp_path, rng)
    jobs = ("--jobs", rng.choice(["0", "0", "2"]))
    found = made(tmp_path, *jobs, name=top.name)
    for name, one in found.items():
        layer = tmp_path / name.removesuffix(".manifest")
        assert one["guest-digest"] == guest_digest(view_of(layer)), (turn, name)
    assert {one["written"] for one in found.values()} == {True}
    again = made(tmp_path, *jobs, name=top.name)
    assert {one["written"] for one in again.values()} == {False}
    before = snapshot(tmp_path)
    told = verified(tmp_path, *jobs, name=top.name)
    assert (told["ranges"], told["findings"]) == ([], [])
    assert snapshot(tmp_path) == before
    succeed("convert", "-O", "raw", top.name, "all.raw", cwd=tmp_path)
    converted = made(tmp_path, "-f", "raw", name="all.raw")["all.raw.manifest"]
    assert converted["guest-digest"] == found[f"{top.name}.manifest"]["guest-digest"]


def leaves_hit(here: Path, rng: random.Random, layers: list[str]) -> set[tuple[str, int, int]]:
    """Flip bits in the data of some layers; return the leaves in which that counts."""
    hit = set()
    for name in layers:
        cow = here / name
        image = cow if cow.suffix == ".img" else here / read_header(cow).image
        length = image.stat().st_size
        # An image file ends with its last whole sector, a raw disk with its last byte.
        size = length if cow == image else length // 512 * 512
        for at in {rng.randrange(size) for _ in range(rng.randrange(4) if size else 0)}:
            with image.open("r+b") as file:
                file.seek(at)
                old = file.read(1)[0]
                file.seek(at)
                file.write(bytes([old ^ 1 << rng.randrange(8)]))
            if cow == image or is_local(cow, at):
                start = at // LEAF * LEAF
                hit.add((image.name, start, min(start + LEAF, length) - start))
    return hit


def is_local(cow: Path, at: int) -> bool:
    header = read_header(cow)
    bitmap = cow.read_bytes()[header.header_size :]
    cluster = at // header.cluster
    return bool(header.compatible & ALL_ALLOCATED or bitmap[cluster // 8] >> cluster % 8 & 1)


def leaves_named(told: dict[str, Any]) -> set[tuple[str, int, int]]:
    """The ranges of a report, leaf by leaf."""
    named = set()
    for one in told["ranges"]:
        stop = one["start"] + one["length"]
        for start in range(one["start"], stop, LEAF):
            named.add((one["file"], start, min(start + LEAF, stop) - start))
    return named


@pytest.mark.parametrize("turn", range(12))
def test_verify_names_every_damaged_leaf_and_no_other(
    tmp_path: Path, rng: random.Random, turn: int
) -> None:
    top = some_chain(tmp_path, rng)
    layers = [name.removesuffix(".manifest") for name in made(tmp_path, name=top.name)]
    hit = leaves_hit(tmp_path, rng, layers)
    told = verified(tmp_path, name=top.name, status=2 if hit else 0)
    assert leaves_named(told) == hit, turn
    names = {one["name"] for one in told["findings"]}
    assert names <= {"changed"}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An overlay over a base, with their manifests."""
    pair(tmp_path, "ABCD", "-X-Y")
    made(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("at", "name", "start"), [(60 * KiB, "header", 0), (CLUSTER + 5, "bitmap", CLUSTER)]
)
def test_verify_names_damage_in_header_and_bitmap(
    here: Path, at: int, name: str, start: int
) -> None:
    put(here / "top.add-cow", at, b"\xff")
    told = verified(here, status=2)
    assert told["ranges"] == [{"file": "top.add-cow", "start": start, "length": CLUSTER}]
    assert name in {one["name"] for one in told["findings"]}


def test_verify_names_a_destroyed_header(here: Path) -> None:
    put(here / "top.add-cow", 0, b"BCOW")
    told = verified(here, status=2)
    assert told["ranges"] == [{"file": "top.add-cow", "start": 0, "length": CLUSTER}]
    assert [one["name"] for one in told["findings"]] == ["header"]


@pytest.mark.long
def test_verify_of_a_damaged_bitmap_reports_no_data(here: Path) -> None:
    """Clusters cease to be allocated and become it: their bytes are what they were."""
    put(here / "top.add-cow", CLUSTER, b"\x05")
    told = verified(here, status=2)
    assert {one["file"] for one in told["ranges"]} == {"top.add-cow"}


@pytest.mark.long
@pytest.mark.parametrize("at", [0, 9, 100, 4096 + 50, -1])
def test_verify_names_a_damaged_manifest(here: Path, at: int) -> None:
    path = here / "base.img.manifest"
    place = at % path.stat().st_size
    put(path, place, bytes([path.read_bytes()[place] ^ 4]))
    told = verified(here, status=2)
    assert told["ranges"] == []
    assert ("manifest", "base.img.manifest") in {
        (one["name"], one["file"]) for one in told["findings"]
    }


NONSENSE: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    7,
    2**63,
    2**64,
    1e300,
    "",
    "xy",
    "0" * 64,
    [],
    [[]],
    {},
]


def nonsense(rng: random.Random, content: bytes) -> bytes:
    """A manifest with some nonsense in it, whose own digest is right nevertheless."""
    raw = bytearray(content[:-32])
    if rng.random() < 0.5:
        (length,) = struct.unpack_from("<I", raw, 12)
        head = json.loads(raw[16 : 16 + length])
        place = head
        while isinstance(place[key := rng.choice(list(place))], dict) and rng.random() < 0.7:
            place = place[key]
        place[key] = rng.choice(NONSENSE)
        if rng.random() < 0.2:
            del place[key]
        text = b"[" * 4000 if rng.random() < 0.05 else json.dumps(head).encode()
        raw[12:4096] = (struct.pack("<I", len(text)) + text).ljust(4084, b"\0")
    for _ in range(rng.randrange(4)):
        at = rng.randrange(4096, len(raw)) if len(raw) > 4096 else 4
        raw[at : at + rng.choice([1, 8, 32])] = rng.randbytes(rng.choice([1, 8, 32]))
    if rng.random() < 0.2:
        del raw[rng.randrange(4096, len(raw) + 1) :]
    return bytes(raw) + digest(bytes(raw))


@pytest.mark.long
@pytest.mark.parametrize("name", ["base.img", "top.add-cow"])
def test_verify_rejects_a_sealed_manifest_with_nonsense(
    here: Path, rng: random.Random, name: str
) -> None:
    path = here / f"{name}.manifest"
    sound = path.read_bytes()
    for _ in range(30):
        path.write_bytes(content := nonsense(rng, sound))
        result = addcow("verify", "--output", "json", "--jobs", "0", "top.add-cow", cwd=here)
        assert result.status in (0, 1, 2), content
        assert "unexpected" not in result.stdout, (content, result)
        assert result.json["layers"]
        made = addcow("manifest", "create", "--jobs", "0", "top.add-cow", cwd=here)
        assert made.status in (0, 1), (content, made)
        assert path.read_bytes() == content


@pytest.mark.long
@pytest.mark.parametrize("length", [0, 5, 4096, 5000])
def test_truncated_manifest_is_rejected(here: Path, length: int) -> None:
    os.truncate(here / "top.add-cow.manifest", min(length, 4200))
    assert "manifest" in {one["name"] for one in verified(here, status=2)["findings"]}
    assert "create --replace" in refused("manifest", "create", "top.add-cow", cwd=here)
    assert made(here, "--replace")["top.add-cow.manifest"]["written"]
    verified(here)


def test_verify_reports_a_layer_without_manifest(here: Path) -> None:
    (here / "base.img.manifest").unlink()
    told = verified(here, status=1)
    assert [(one["name"], one["file"]) for one in told["findings"]] == [("no-manifest", "base.img")]


def test_verify_does_not_read_a_replaced_file(here: Path) -> None:
    shutil.copyfile(here / "base.img", here / "new.img")
    os.replace(here / "new.img", here / "base.img")
    told = verified(here, status=2)
    assert [(one["name"], one["file"]) for one in told["findings"]] == [("replaced", "base.img")]
    assert {one["filename"]: one["bytes"] for one in told["layers"]}["base.img"] == 0


@pytest.mark.long
def test_verify_notices_a_base_replaced_with_its_manifest(here: Path) -> None:
    draw_raw(here / "base.img", "ABCE")
    (here / "base.img.manifest").unlink()
    made(here, "-f", "raw", name="base.img")
    told = verified(here, status=2)
    assert ("backing-replaced", "top.add-cow") in {
        (one["name"], one["file"]) for one in told["findings"]
    }


def test_verify_ignores_a_changed_time(here: Path) -> None:
    os.utime(here / "top.raw")
    told = verified(here)
    assert [(one["name"], one["severity"]) for one in told["findings"]] == [("changed", "note")]


JOBS = {
    "commit": (("commit", "--no-manifest", "top.add-cow"), {"base.img", "top.add-cow"}),
    "commit -d": (("commit", "-d", "--no-manifest", "top.add-cow"), {"base.img", "top.add-cow"}),
    "flatten": (("flatten", "--no-manifest", "top.add-cow"), {"top.add-cow"}),
    "flatten --discard": (
        ("flatten", "--discard", "--no-manifest", "top.add-cow"),
        {"top.add-cow"},
    ),
    "io": (("io", "-c", "write -P 1 0 512", "top.add-cow"), {"top.add-cow"}),
    "check -r": (("check", "-r", "leaks", "top.add-cow"), {"top.add-cow"}),
    "info": (("info", "top.add-cow"), set()),
    "io -r": (("io", "-r", "-c", "read 0 512", "top.add-cow"), set()),
}


@pytest.mark.parametrize("job", JOBS)
def test_command_that_changes_a_layer_removes_its_manifest(tmp_path: Path, job: str) -> None:
    draw_raw(tmp_path / "base.img", "ABCD")
    draw(tmp_path / "top.add-cow", "-Xy-" if job == "check -r" else "-X--")
    made(tmp_path)
    words, changed = JOBS[job]
    succeed(*words, cwd=tmp_path)
    left = {path.name.removesuffix(".manifest") for path in tmp_path.glob("*.manifest")}
    assert left == {"base.img", "top.add-cow"} - changed


@pytest.mark.parametrize("job", ["commit", "flatten"])
def test_manifest_is_removed_before_the_first_write(here: Path, job: str) -> None:
    event = "backing_write" if job == "commit" else "image_write"
    rules = Rules.write(here.parent / "rules", rule(event, "kill"))
    with running(job, "--jobs", "0", "top.add-cow", cwd=here, rules=rules) as command:
        assert command.end().status == -signal.SIGKILL
    assert not (here / "top.add-cow.manifest").exists()


@pytest.mark.long
def test_refused_job_keeps_the_manifest(here: Path) -> None:
    draw(here / "other.add-cow", "-Z--")
    refused("commit", "top.add-cow", cwd=here)
    verified(here)


@pytest.mark.long
@pytest.mark.parametrize("jobs", ["0", "2"])
def test_guest_digest_is_equal_after_flatten_and_commit(tmp_path: Path, jobs: str) -> None:
    pair(tmp_path, "ABCDEFGH", "-X-Y0---")
    before = made(tmp_path)["top.add-cow.manifest"]["guest-digest"]
    shutil.copytree(tmp_path, tmp_path / "twin")
    succeed("flatten", "--jobs", jobs, "top.add-cow", cwd=tmp_path)
    assert made(tmp_path, "--replace")["top.add-cow.manifest"]["guest-digest"] == before
    twin = tmp_path / "twin"
    succeed("commit", "--jobs", jobs, "top.add-cow", cwd=twin)
    after = made(twin, "--replace")
    assert {one["guest-digest"] for one in after.values()} == {before}


@pytest.mark.long
def test_unfinished_draft_is_no_manifest(here: Path) -> None:
    (here / "top.add-cow.manifest").rename(here / "top.add-cow.manifest.part")
    assert verified(here, status=1)["findings"][0]["name"] == "no-manifest"
    assert made(here)["top.add-cow.manifest"]["written"]
    assert not (here / "top.add-cow.manifest.part").exists()


@pytest.mark.long
def test_farm_verify_reports_each_layer(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "ABCD")
    for number in range(5):
        draw(tmp_path / f"vm{number}.add-cow", "-X-Y")
        if number < 4:
            made(tmp_path, name=f"vm{number}.add-cow")
    put(tmp_path / "vm1.raw", CLUSTER + 7, b"!")
    put(tmp_path / "base.img", 7, b"!")
    result = addcow("farm", "verify", "--output", "json", ".", cwd=tmp_path)
    assert result.status == 2
    images = {one["filename"]: one for one in result.json["images"]}
    assert [images[f"./vm{number}.add-cow"]["exit"] for number in range(5)] == [0, 2, 0, 0, 1]
    (base,) = result.json["files"]
    assert (base["exit"], base["bytes"]) == (2, 4 * CLUSTER)
    assert base["ranges"] == [{"file": "./base.img", "start": 0, "length": LEAF}]
    assert result.json["summary"]["bytes"] == (4 + 4 * 2) * CLUSTER
    # All of them once more, for a command without other options.
    assert result.json["ranges"] == [*images["./vm1.add-cow"]["ranges"], *base["ranges"]]
    assert {one["name"] for one in result.json["findings"]} == {"changed", "no-manifest"}


@pytest.mark.long
def test_farm_verify_reports_a_named_raw_file(tmp_path: Path) -> None:
    draw_raw(tmp_path / "alone.img", "AB")
    without = addcow("farm", "verify", "alone.img", cwd=tmp_path)
    assert without.status == 1
    assert "alone.img: it has no manifest" in without.stderr
    made(tmp_path, "-f", "raw", name="alone.img")
    for places in (["alone.img"], [".", "alone.img"], ["alone.img", "alone.img.manifest"]):
        told = succeed("farm", "verify", "--output", "json", *places, cwd=tmp_path).json
        assert [one["bytes"] for one in told["files"]] == [2 * CLUSTER]


def test_farm_verify_reports_the_manifest_of_a_destroyed_overlay(here: Path) -> None:
    put(here / "top.add-cow", 0, b"X")
    result = addcow("farm", "verify", "--output", "json", ".", cwd=here)
    assert result.status == 2
    assert ("./top.add-cow", 2) in {(one["filename"], one["exit"]) for one in result.json["files"]}


@pytest.mark.parametrize("jobs", ["0", "3"])
def test_farm_verify_splits_a_large_layer(tmp_path: Path, rng: random.Random, jobs: str) -> None:
    """More than 256 MiB with something in it; only a little of each group, for quickness."""
    with (tmp_path / "base.img").open("wb") as file:
        for group in range(50):
            file.seek(group * FAN * LEAF + rng.randrange(FAN) * LEAF)
            file.write(rng.randbytes(4096))
        file.truncate(50 * FAN * LEAF)
    made(tmp_path, "--jobs", jobs, "-f", "raw", name="base.img")
    hit = set()
    for group in rng.sample(range(50), 9):
        at = group * FAN * LEAF + rng.randrange(FAN * LEAF)
        put(tmp_path / "base.img", at, b"!")
        hit.add(("base.img", at // LEAF * LEAF, LEAF))
    told = verified(tmp_path, "--jobs", jobs, "-f", "raw", name="base.img", status=2)
    assert leaves_named(told) == hit


@pytest.mark.long
def test_verify_prints_findings_as_lines(here: Path) -> None:
    put(here / "top.raw", CLUSTER, b"!")
    result = addcow("verify", "top.add-cow", cwd=here)
    assert result.status == 2
    assert f"DIFFERS top.raw: {LEAF} bytes at {CLUSTER} differ" in result.lines
    assert addcow("farm", "verify", ".", cwd=here).status == 2


@pytest.mark.long
def test_manifest_of_16_tib_of_holes_is_cheap(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "A")
    os.truncate(tmp_path / "base.img", 8 << 40)
    succeed(
        "create",
        "-b",
        "base.img",
        "-F",
        "raw",
        "-o",
        "cluster_size=2M",
        "top.add-cow",
        cwd=tmp_path,
    )
    io("top.add-cow", "write -P 7 7T 64k", cwd=tmp_path)
    made(tmp_path)
    verified(tmp_path)
    assert (tmp_path / "base.img.manifest").stat().st_size < MiB


# ---- several names ----


@pytest.mark.long
def test_farm_verify_lists_a_layer_with_several_names_once(tmp_path: Path) -> None:
    (tmp_path / "golden").mkdir()
    draw_raw(tmp_path / "golden" / "base.img", "ABCD")
    (tmp_path / "newest.img").symlink_to("base.img")
    (tmp_path / "base.img").symlink_to("golden/base.img")
    draw(tmp_path / "one.add-cow", "-X--", "newest.img")
    draw(tmp_path / "two.add-cow", "-Y--", "golden/base.img")
    assert made(tmp_path, name="one.add-cow")["golden/base.img.manifest"]["written"]
    assert not made(tmp_path, name="two.add-cow")["golden/base.img.manifest"]["written"]
    assert [path.parent.name for path in tmp_path.rglob("base.img.manifest")] == ["golden"]
    verified(tmp_path, name="one.add-cow")
    # A change by one of its names removes the manifests of all names.
    succeed("commit", "--force", "--no-manifest", "one.add-cow", cwd=tmp_path)
    assert not list(tmp_path.rglob("base.img.manifest"))


def test_farm_verify_ignores_links_in_a_cycle(tmp_path: Path) -> None:
    (tmp_path / "a.img").symlink_to("b.img")
    (tmp_path / "b.img").symlink_to("a.img")
    assert "a.img" in refused("verify", "-f", "raw", "a.img", cwd=tmp_path)
    assert "a.img" in refused("manifest", "create", "-f", "raw", "a.img", cwd=tmp_path)


@pytest.mark.parametrize("job", ["commit", "flatten", "io"])
def test_job_removes_the_raw_manifest_of_its_image_file(tmp_path: Path, job: str) -> None:
    draw_raw(tmp_path / "base.img", "ABCD")
    draw(tmp_path / "top.add-cow", "-X--")
    made(tmp_path, "-f", "raw", name="top.raw")
    words = {"io": ("io", "-c", "write -P 1 0 512")}.get(job, (job,))
    succeed(*words, "top.add-cow", cwd=tmp_path)
    assert not (tmp_path / "top.raw.manifest").exists()


@pytest.mark.long
def test_manifest_behind_a_link_outside_is_not_read(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    draw_raw(outside / "base.img", "ABCD")
    draw(inside / "top.add-cow", "-X--", "../outside/base.img")
    made(inside, "--root", str(outside))
    put(outside / "base.img", 0, b"!")
    made(outside, "-f", "raw", "--replace", name="base.img")
    allowed = verified(inside, "--root", str(outside), status=2)
    assert "backing-replaced" in {one["name"] for one in allowed["findings"]}
    without = verified(inside, status=1)
    assert [one["name"] for one in without["findings"]] == ["unexamined"]
    assert "base.img" in without["findings"][0]["file"]


@pytest.mark.long
def test_job_removes_the_manifests_of_both_hard_links(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "ABCD")
    (tmp_path / "same.img").hardlink_to(tmp_path / "base.img")
    draw(tmp_path / "top.add-cow", "-X--")
    made(tmp_path)
    made(tmp_path, "-f", "raw", name="same.img")
    draw_raw(tmp_path / "other.img", "A")
    made(tmp_path, "-f", "raw", name="other.img")
    succeed("commit", "--no-manifest", "top.add-cow", cwd=tmp_path)
    assert [path.name for path in tmp_path.glob("*.manifest")] == ["other.img.manifest"]


@pytest.mark.long
def test_commit_of_nothing_keeps_manifests(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "ABCD")
    draw(tmp_path / "top.add-cow", "----")
    made(tmp_path)
    succeed("commit", "top.add-cow", cwd=tmp_path)
    verified(tmp_path)


@pytest.mark.long
def test_quiet_omits_notes(here: Path) -> None:
    os.utime(here / "top.raw")
    assert succeed("verify", "top.add-cow", cwd=here).lines[0].startswith("NOTE changed")
    for words in (("verify", "-q", "top.add-cow"), ("farm", "verify", "-q", ".")):
        assert succeed(*words, cwd=here).said == ""


# ---- places that cannot be read ----


@pytest.mark.parametrize("jobs", ["0", "2"])
def test_unreadable_leaf_does_not_stop_the_verification(tmp_path: Path, jobs: str) -> None:
    draw_raw(tmp_path / "base.img", "ABCDEFGH" * 4)
    made(tmp_path, "-f", "raw", "--jobs", "0", name="base.img")
    for number in (3, 20):
        put(tmp_path / "base.img", number * CLUSTER, b"!")
    bad = [rule("backing_read", cluster=number) for number in (7, 8, 20)]
    rules = Rules.write(tmp_path / "rules", *bad)
    words = ("verify", "-f", "raw", "--jobs", jobs, "--output", "json", "base.img")
    with running(*words, cwd=tmp_path, rules=rules) as command:
        ended = command.end()
    assert ended.status == 2
    told = json.loads(ended.stdout)
    assert [(one["start"], one["length"]) for one in told["ranges"]] == [(3 * LEAF, LEAF)]
    unread = [one["message"] for one in told["findings"] if one["name"] == "unreadable"]
    reason = "cannot be read: Input/output error"
    assert unread == [
        f"{2 * LEAF} bytes at {7 * LEAF} {reason}",
        f"{LEAF} bytes at {20 * LEAF} {reason}",
    ]
    assert told["layers"][0]["bytes"] == 29 * LEAF


def test_verify_gives_up_on_a_dead_disk(tmp_path: Path) -> None:
    """Each leaf may take as long as the disk tries again and again."""
    draw_raw(tmp_path / "base.img", "A" * 300)
    made(tmp_path, "-f", "raw", "--jobs", "0", name="base.img")
    rules = Rules.write(tmp_path / "rules", rule("backing_read"))
    words = ("verify", "-f", "raw", "--output", "json", "base.img")
    with running(*words, cwd=tmp_path, rules=rules) as command:
        ended = command.end()
    assert ended.status == 1
    assert {one["name"] for one in json.loads(ended.stdout)["findings"]} == {
        "unreadable",
        "unexamined",
    }


# ---- files that are called like manifests ----


NOTES = "nobody's but mine"


CHANGING = {
    "io": ("io", "-c", "write -P 1 0 64k", "top.add-cow"),
    "commit": ("commit", "top.add-cow"),
    "flatten": ("flatten", "--verify", "top.add-cow"),
    "check": ("check", "-r", "leaks", "top.add-cow"),
    "farm": ("farm", "commit", "."),
}


@pytest.mark.parametrize("job", CHANGING)
@pytest.mark.parametrize("name", ["base.img.manifest", "top.add-cow.manifest", "top.raw.manifest"])
def test_file_named_like_a_manifest_is_not_removed(tmp_path: Path, job: str, name: str) -> None:
    draw_raw(tmp_path / "base.img", "ABCD")
    draw(tmp_path / "top.add-cow", "-Xy-")
    (tmp_path / name).write_text(NOTES)
    succeed(*CHANGING[job], cwd=tmp_path)
    assert (tmp_path / name).read_text() == NOTES


@pytest.mark.parametrize("job", CHANGING)
@pytest.mark.parametrize("which", ["image", "backing"])
def test_disk_named_like_a_manifest_is_a_disk(tmp_path: Path, job: str, which: str) -> None:
    """Even one whose guest has written what manifests begin with."""
    name = "top.add-cow.manifest"
    files = {"image": "top.raw", "backing": "base.img", which: name}
    draw_raw(tmp_path / files["backing"], "ABCD")
    (tmp_path / files["image"]).write_bytes(
        b"ADDCOWMF".ljust(2 * CLUSTER, b"x") + bytes(2 * CLUSTER)
    )
    if which == "backing":
        put(tmp_path / name, 0, b"ADDCOWMF")
    content = overlay_bytes(
        image=files["image"], size=4 * CLUSTER, backing=files["backing"], local=[0]
    )
    (tmp_path / "top.add-cow").write_bytes(content)
    seen = view_of(tmp_path / "top.add-cow")
    if job == "io":
        seen = b"\1" * CLUSTER + seen[CLUSTER:]
    succeed(*CHANGING[job], cwd=tmp_path)
    assert view_of(tmp_path / "top.add-cow") == seen


@pytest.mark.parametrize("draft", ["", ".part"])
@pytest.mark.parametrize("which", ["image", "backing", "text", "another name", "overlay"])
@pytest.mark.parametrize("words", [(), ("--replace",)])
def test_manifest_create_overwrites_no_other_file(
    tmp_path: Path, draft: str, which: str, words: tuple[str, ...]
) -> None:
    name = f"top.add-cow.manifest{draft}" if which != "overlay" else f"base.img.manifest{draft}"
    files = {"image": "top.raw", "backing": "base.img", "overlay": "top.add-cow", which: name}
    draw_raw(tmp_path / files["backing"], "ABCD")
    draw_raw(tmp_path / files["image"], "-X--")
    content = overlay_bytes(
        image=files["image"], size=4 * CLUSTER, backing=files["backing"], local=[1]
    )
    (tmp_path / files["overlay"]).write_bytes(content)
    if which == "text":
        (tmp_path / name).write_text(NOTES)
    elif which == "another name":
        (tmp_path / name).hardlink_to(tmp_path / "base.img")
    before = snapshot(tmp_path)
    line = refused("manifest", "create", *words, files["overlay"], cwd=tmp_path)
    assert name in line
    after = snapshot(tmp_path)
    assert {path: after[path] for path in before} == before


@pytest.mark.long
@pytest.mark.parametrize("job", ["create", "convert"])
def test_manifest_of_a_removed_file_is_not_used_for_a_new_one(here: Path, job: str) -> None:
    made(here, "-f", "raw", name="top.raw")
    succeed("convert", "-O", "raw", "top.add-cow", "copy.raw", cwd=here)
    made(here, "-f", "raw", name="copy.raw")
    for name in ("top.add-cow", "top.raw", "copy.raw"):
        (here / name).unlink()
    succeed("create", "-q", "-b", "base.img", "-F", "raw", "top.add-cow", cwd=here)
    if job == "convert":
        succeed("convert", "-O", "raw", "top.add-cow", "copy.raw", cwd=here)
    left = {path.name for path in here.glob("*.manifest")}
    assert left == {"base.img.manifest"} | ({"copy.raw.manifest"} if job == "create" else set())


def test_verify_accepts_a_name_too_long_for_a_manifest(tmp_path: Path) -> None:
    name = "b" * 250
    draw_raw(tmp_path / name, "ABCD")
    draw(tmp_path / "top.add-cow", "-X--", name)
    succeed("commit", "--verify", "top.add-cow", cwd=tmp_path)


@pytest.mark.long
def test_verify_rejects_the_manifest_of_another_kind_of_layer(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "AB")
    made(tmp_path, "-f", "raw", name="base.img")
    told = verified(tmp_path, name="base.img", status=1)
    assert ([one["name"] for one in told["findings"]], told["ranges"]) == (["unexamined"], [])


@pytest.mark.long
def test_farm_verify_reports_a_missing_file_once(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "AB")
    for number in range(3):
        draw(tmp_path / f"{number}.add-cow", "-X")
        made(tmp_path, name=f"{number}.add-cow")
    (tmp_path / "base.img").unlink()
    told = addcow("farm", "verify", "--output", "json", ".", cwd=tmp_path).json
    assert [os.path.basename(one["filename"]) for one in told["files"]] == ["base.img"]


def test_farm_verify_uses_the_hard_link_with_a_manifest(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "AB")
    draw(tmp_path / "vm.add-cow", "-X")
    made(tmp_path, name="vm.add-cow")
    (tmp_path / "alias").hardlink_to(tmp_path / "vm.add-cow")
    told = succeed("farm", "verify", "--output", "json", ".", cwd=tmp_path).json
    assert [one["filename"] for one in told["images"]] == ["./vm.add-cow"]


def tower(here: Path, *backings: str) -> None:
    """Overlays with one allocated cluster, 0.add-cow the first, over these backing files."""
    for number, backing in enumerate(backings):
        (here / f"{number}.raw").write_bytes(bytes([number + 1]) * CLUSTER)
        kind = "raw" if backing == "base.img" else "add-cow"
        content = overlay_bytes(
            image=f"{number}.raw",
            size=CLUSTER,
            backing=backing,
            backing_format=kind,
            local=[0],
        )
        (here / f"{number}.add-cow").write_bytes(content)


@pytest.mark.long
def test_farm_verify_verifies_layers_of_a_chain_that_is_too_deep(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "A")
    tower(tmp_path, *(f"{number}.add-cow" for number in range(1, 35)), "base.img")
    assert "deeper than 30" in refused("manifest", "create", "0.add-cow", cwd=tmp_path)
    made(tmp_path, name="5.add-cow")
    put(tmp_path / "base.img", 7, b"\1")
    told = verified(tmp_path, name="0.add-cow", status=2)
    assert [one["filename"] for one in told["layers"]] == [
        *(f"{number}.add-cow" for number in range(35)),
        "base.img",
    ]
    assert [(one["file"], one["start"]) for one in told["ranges"]] == [("base.img", 0)]
    assert [one["name"] for one in told["findings"]].count("no-manifest") == 5


def test_farm_verify_verifies_layers_of_a_cycle_once(tmp_path: Path) -> None:
    tower(tmp_path, "1.add-cow", "2.add-cow", "0.add-cow")
    told = verified(tmp_path, name="0.add-cow", status=1)
    assert [one["filename"] for one in told["layers"]] == [f"{n}.add-cow" for n in range(3)]
