"""Tests of `addcow check -r`: what it repairs, what it reports, and what it leaves unchanged.

Each repair is compared with the bytes that it may change. An independent reader checks the
guest's view before and after. inotify shows that the backup is complete before the first change.
"""

from __future__ import annotations

import fcntl
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import oracle
from support.command import (
    ALL_ALLOCATED,
    CLUSTER,
    KiB,
    TiB,
    addcow,
    bits,
    draw,
    draw_raw,
    local_clusters,
    look,
    overlay_bytes,
    pair,
    patch,
    put,
    refused,
    stored_bytes,
    succeed,
)
from support.golden import LONG_AGO_NS, addcow_here, snapshot
from watch import CHANGED, CLOSED, CREATED, Watch

pytestmark = pytest.mark.sample(1)

TOP, IMAGE, BASE, BACKUP = "top.add-cow", "top.raw", "base.img", "top.add-cow.backup-1"

#: A place in the header region that no name uses.
RESERVED = 300


def age(here: Path) -> None:
    """Date every file long ago, so that any change of one shows in a snapshot."""
    for path in here.iterdir():
        os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))


def repair(here: Path, what: str, *options: str, status: int = 0) -> list[str]:
    """Repair, insist on this status and on silence on stderr, and return what was printed."""
    done = addcow("check", "-r", what, *options, TOP, cwd=here)
    assert (done.status, done.stderr) == (status, ""), done
    return done.lines


def repair_json(here: Path, what: str, status: int = 0) -> dict[str, Any]:
    """The same, with the report as JSON."""
    done = addcow("check", "-r", what, "--output", "json", TOP, cwd=here)
    assert (done.status, done.stderr) == (status, ""), done
    report: dict[str, Any] = done.json
    return report


def view(here: Path) -> bytes:
    return oracle.guest_bytes(str(here / TOP))


def checked(here: Path) -> int:
    return addcow("check", TOP, cwd=here).status


# ---- leaks ----


@pytest.mark.long
@pytest.mark.parametrize("what", ["leaks", "all"])
def test_repair_frees_leaks_and_changes_nothing_else(tmp_path: Path, what: str) -> None:
    pair(tmp_path, "ABCDEF", "xX-y0Z")
    before, cow, stored = (
        view(tmp_path),
        (tmp_path / TOP).read_bytes(),
        stored_bytes(tmp_path / IMAGE),
    )
    assert checked(tmp_path) == 3
    lines = repair(tmp_path, what)
    assert lines[0] == "REPAIRED leaks: 2 clusters were freed in the image file"
    assert "No errors were found on the image." in lines
    assert look(tmp_path / IMAGE) == "0X000Z"
    assert stored_bytes(tmp_path / IMAGE) <= stored - 2 * CLUSTER
    assert (tmp_path / TOP).read_bytes() == cow
    assert view(tmp_path) == before
    assert checked(tmp_path) == 0
    assert not (tmp_path / BACKUP).exists()


def test_repair_reports_freed_leaks_in_json(tmp_path: Path) -> None:
    pair(tmp_path, "ABCDEF", "xX-y0Z")
    report = repair_json(tmp_path, "leaks")
    assert report["repairs"] == ["leaks: 2 clusters were freed in the image file"]
    assert (report["leaks-fixed"], report["corruptions-fixed"]) == (2, 0)
    assert (report["leaks"], report["findings"], report["backup"]) == (0, [], None)


def test_repair_frees_a_leak_in_a_partial_last_cluster(tmp_path: Path) -> None:
    pair(tmp_path, "AB", "Xy")
    length = CLUSTER + 3 * KiB + 100  # a hundred bytes that no guest can see
    os.truncate(tmp_path / IMAGE, length)
    repair(tmp_path, "leaks")
    image = (tmp_path / IMAGE).read_bytes()
    assert image == b"X" * CLUSTER + bytes(3 * KiB) + b"y" * 100


def test_repair_frees_leaks_despite_other_damage(tmp_path: Path) -> None:
    pair(tmp_path, "ABC", "-Xy")
    put(tmp_path / TOP, CLUSTER + 1, b"\1")
    cow = (tmp_path / TOP).read_bytes()
    lines = repair(tmp_path, "leaks", status=2)
    assert lines[0] == "REPAIRED leaks: 1 clusters were freed in the image file"
    assert any(line.startswith("CORRUPTION stray-bits") for line in lines)
    assert look(tmp_path / IMAGE) == "0X0"
    assert (tmp_path / TOP).read_bytes() == cow
    assert checked(tmp_path) == 2


def test_repair_frees_leaks_of_a_disk_that_begins_like_another_format(tmp_path: Path) -> None:
    """What a guest writes at the start of its disk is its own affair."""
    pair(tmp_path, "ABC", "X-y")
    put(tmp_path / IMAGE, 0, b"QFI\xfb\0\0\0\3")
    lines = repair(tmp_path, "leaks", status=2)
    assert lines[0] == "REPAIRED leaks: 1 clusters were freed in the image file"
    assert any("begins as qcow2 does" in line for line in lines)
    assert look(tmp_path / IMAGE)[1:] == "00"


def test_repair_allocates_every_cluster_with_all_allocated(tmp_path: Path) -> None:
    draw_raw(tmp_path / BASE, "ABC")
    draw(tmp_path / TOP, "xyz", compatible=ALL_ALLOCATED)
    age(tmp_path)
    before = snapshot(tmp_path)
    repair(tmp_path, "all")
    assert snapshot(tmp_path) == before


# ---- what "all" repairs in addition ----


def stray(here: Path) -> str:
    put(here / TOP, CLUSTER, bytes([0b1100_0010]))  # cluster 1 is allocated; there are only 6
    put(here / TOP, CLUSTER + 9, b"\xff")
    return "stray-bits: 10 bits past the last cluster were cleared"


def short(here: Path) -> str:
    os.truncate(here / TOP, CLUSTER + 1)
    return (
        f"bitmap-length: the file was extended with zeros from {CLUSTER + 1} to {2 * CLUSTER} bytes"
    )


def reserved(here: Path) -> str:
    put(here / TOP, RESERVED, b"secret")
    put(here / TOP, CLUSTER - 1, b"!")
    return "reserved-bytes: header bytes that no name uses were zeroed"


Damage = Callable[[Path], object]
DAMAGES = (stray, short, reserved)


@pytest.mark.long
@pytest.mark.parametrize("damage", DAMAGES)
def test_repair_all_repairs_each_damage(tmp_path: Path, damage: Damage) -> None:
    pair(tmp_path, "ABCDEF", "-X----")
    whole = (tmp_path / TOP).read_bytes()
    sentence = damage(tmp_path)
    age(tmp_path)
    broken, before, image = (tmp_path / TOP).read_bytes(), view(tmp_path), snapshot(tmp_path)[IMAGE]
    assert checked(tmp_path) == (3 if damage is reserved else 2)
    lines = repair(tmp_path, "all")
    assert lines[:2] == [
        f"REPAIRED header and bitmap were copied to {BACKUP} first",
        f"REPAIRED {sentence}",
    ]
    assert (tmp_path / BACKUP).read_bytes() == broken
    assert view(tmp_path) == before
    assert snapshot(tmp_path)[IMAGE] == image
    assert checked(tmp_path) == 0
    assert (tmp_path / TOP).read_bytes() == whole


def test_repair_all_repairs_all_damage_at_once(tmp_path: Path) -> None:
    pair(tmp_path, "ABCDEF", "xX----")
    sentences = [damage(tmp_path) for damage in (stray, reserved)]
    before = view(tmp_path)
    report = repair_json(tmp_path, "all")
    assert report["backup"] == BACKUP
    assert (report["leaks-fixed"], report["corruptions-fixed"]) == (
        1,
        1,
    )  # reserved bytes are neither
    assert report["repairs"][0] == f"header and bitmap were copied to {BACKUP} first"
    assert set(report["repairs"][1:]) == {
        *sentences,
        "leaks: 1 clusters were freed in the image file",
    }
    assert (report["corruptions"], report["check-errors"], report["leaks"]) == (0, 0, 0)
    assert view(tmp_path) == before


def test_repair_leaks_keeps_corruptions(tmp_path: Path) -> None:
    pair(tmp_path, "ABCDEF", "-X----")
    stray(tmp_path)
    age(tmp_path)
    before = snapshot(tmp_path)
    lines = repair(tmp_path, "leaks", status=2)
    assert not any(line.startswith("REPAIRED") for line in lines)
    assert snapshot(tmp_path) == before


def test_repair_clears_reserved_bytes_around_names(tmp_path: Path) -> None:
    draw_raw(tmp_path / BASE, "AB")
    draw_raw(tmp_path / IMAGE, "-X")
    content = bytearray(overlay_bytes(image="", size=2 * CLUSTER, local=[1]))
    names = {200: b"top.raw", 4000: b"base.img"}
    for at, name in names.items():
        content[at : at + len(name)] = name
    struct.pack_into("<4I", content, 4, 4000, 8, 200, 7)
    content[44:47] = b"raw"
    (tmp_path / TOP).write_bytes(content)
    assert checked(tmp_path) == 0
    for at in (76, 199, 207, 3999, 4008, CLUSTER - 1):
        put(tmp_path / TOP, at, b"#")
    repair(tmp_path, "all")
    assert (tmp_path / TOP).read_bytes() == bytes(content)


# ---- a bitmap that was cut off ----


def cut_off(here: Path) -> None:
    """An image of 12 clusters whose file ends behind the bits of the first 8."""
    pair(here, "ABCDEFGHIJKL", "-Xx-----PQ-R")
    os.truncate(here / TOP, CLUSTER + 1)


@pytest.mark.long
def test_repair_does_not_free_data_whose_bits_are_missing(tmp_path: Path) -> None:
    cut_off(tmp_path)
    before = view(tmp_path)
    lines = repair(tmp_path, "all", status=3)
    assert "REPAIRED leaks: 1 clusters were freed in the image file" in lines
    assert look(tmp_path / IMAGE) == "0X000000PQ0R"
    assert bits(tmp_path / TOP) == ".X..........".replace("X", "1")
    assert view(tmp_path) == before
    assert checked(tmp_path) == 3
    repair(tmp_path, "leaks")
    assert look(tmp_path / IMAGE) == "0X0000000000"
    assert view(tmp_path) == before


def test_repair_leaks_does_not_free_data_past_a_short_bitmap(tmp_path: Path) -> None:
    cut_off(tmp_path)
    repair(tmp_path, "leaks", status=2)
    assert look(tmp_path / IMAGE) == "0X000000PQ0R"
    assert (tmp_path / TOP).stat().st_size == CLUSTER + 1


@pytest.mark.long
@pytest.mark.parametrize("length", [CLUSTER, CLUSTER + 1, 2 * CLUSTER - 1])
def test_repaired_bitmap_can_be_written(tmp_path: Path, length: int) -> None:
    pair(tmp_path, "ABC", "-X-")
    os.truncate(tmp_path / TOP, length)
    local = local_clusters(tmp_path / TOP)
    assert "ends inside its bitmap" in refused("flatten", TOP, cwd=tmp_path)
    repair(tmp_path, "all", status=0 if local else 3)
    assert (tmp_path / TOP).stat().st_size == 2 * CLUSTER
    assert local_clusters(tmp_path / TOP) == local
    succeed("flatten", TOP, cwd=tmp_path)
    assert look(tmp_path / IMAGE) == ("AXC" if local else "ABC")


def test_repair_keeps_a_huge_bitmap_sparse(tmp_path: Path) -> None:
    for name in (BASE, IMAGE):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 3 * TiB)
    header = overlay_bytes(image=IMAGE, size=0, backing=BASE)
    (tmp_path / TOP).write_bytes(header)
    put(tmp_path / TOP, RESERVED, b"#")
    repair(tmp_path, "all")
    assert (tmp_path / TOP).stat().st_size == CLUSTER + 3 * TiB // CLUSTER // 8
    assert stored_bytes(tmp_path / TOP) <= 2 * CLUSTER
    assert stored_bytes(tmp_path / BACKUP) <= 2 * CLUSTER


# ---- the backup ----


def test_backup_is_complete_before_the_first_change(tmp_path: Path) -> None:
    pair(tmp_path, "ABCDEF", "xX----")
    stray(tmp_path)
    reserved(tmp_path)
    with Watch(str(tmp_path), mask=CREATED | CHANGED | CLOSED) as watch:
        repair(tmp_path, "all")
        events = watch.events()
    order = [(event.what, os.path.basename(event.path)) for event in events]
    whole = order.index(("closed", BACKUP))
    assert order[0] == ("created", BACKUP)
    assert {name for what, name in order[:whole]} == {BACKUP}
    assert {name for what, name in order[whole:] if what == "changed"} == {TOP, IMAGE}


@pytest.mark.long
@pytest.mark.parametrize("event", ["data_sync", "directory_sync", "create"])
def test_repair_changes_nothing_without_a_durable_backup(
    tmp_path: Path, event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair(tmp_path, "ABCDEF", "xX----")
    stray(tmp_path)
    age(tmp_path)
    before = snapshot(tmp_path)
    faults = tmp_path.parent / f"{tmp_path.name}-faults"
    faults.write_text(f'[inject-error]\nevent = "{event}"\nonce = "on"\n')
    monkeypatch.setenv("ADDCOW_FAULTS", str(faults))
    refused("check", "-r", "all", TOP, cwd=tmp_path)
    after = snapshot(tmp_path)
    after.pop(BACKUP, None)
    assert after == before
    monkeypatch.delenv("ADDCOW_FAULTS")
    repair(tmp_path, "all")


def test_backup_never_replaces_another_file(tmp_path: Path) -> None:
    pair(tmp_path, "ABCDEF", "-X----")
    (tmp_path / BACKUP).symlink_to("nowhere")
    (tmp_path / "top.add-cow.backup-2").write_bytes(b"kept")
    reserved(tmp_path)
    broken = (tmp_path / TOP).read_bytes()
    assert repair_json(tmp_path, "all")["backup"] == "top.add-cow.backup-3"
    assert (tmp_path / "top.add-cow.backup-3").read_bytes() == broken
    assert (tmp_path / "top.add-cow.backup-2").read_bytes() == b"kept"
    assert not (tmp_path / "nowhere").exists()


def test_restored_backup_is_the_old_image(tmp_path: Path) -> None:
    cut_off(tmp_path)
    before = view(tmp_path)
    repair(tmp_path, "all", status=3)
    os.replace(tmp_path / BACKUP, tmp_path / TOP)
    assert (tmp_path / TOP).stat().st_size == CLUSTER + 1
    assert view(tmp_path) == before


# ---- what is left alone ----


def bad_header(here: Path) -> None:
    put(here / TOP, 24, b"\1")


def bad_name(here: Path) -> None:
    put(here / TOP, 16, b"\xff\xff")


def other_format(here: Path) -> None:
    put(here / TOP, 60, b"qed")


def no_image(here: Path) -> None:
    (here / IMAGE).unlink()


def no_backing(here: Path) -> None:
    (here / BASE).unlink()


def same_file(here: Path) -> None:
    (here / BASE).unlink()
    (here / BASE).hardlink_to(here / IMAGE)


def no_header(here: Path) -> None:
    os.truncate(here / TOP, CLUSTER - 1)


def no_overlay(here: Path) -> None:
    put(here / TOP, 0, b"QFI\xfb")


@pytest.mark.parametrize("what", ["leaks", "all"])
@pytest.mark.parametrize(
    "damage",
    [bad_header, bad_name, other_format, no_image, no_backing, same_file, no_header, no_overlay],
)
def test_repair_leaves_other_damage_unchanged(tmp_path: Path, damage: Damage, what: str) -> None:
    pair(tmp_path, "ABCDEF", "xX----")
    stray(tmp_path)
    reserved(tmp_path)
    damage(tmp_path)
    age(tmp_path)
    before, fresh = snapshot(tmp_path), addcow("check", TOP, cwd=tmp_path)
    done = addcow("check", "-r", what, TOP, cwd=tmp_path)
    assert fresh.status in (1, 2, 63)
    assert (done.status, done.said) == (fresh.status, fresh.said)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("what", ["leaks", "all"])
def test_repair_does_not_change_a_clean_image(tmp_path: Path, what: str) -> None:
    pair(tmp_path, "ABCDEF", "-X0---")
    age(tmp_path)
    before = snapshot(tmp_path)
    lines = repair(tmp_path, what)
    assert lines[0] == "No errors were found on the image."
    assert (
        "repairs" not in repair_json(tmp_path, what) or not repair_json(tmp_path, what)["repairs"]
    )
    assert snapshot(tmp_path) == before


@pytest.mark.long
def test_repair_refuses_an_image_in_use(tmp_path: Path) -> None:
    pair(tmp_path, "ABCDEF", "xX----")
    stray(tmp_path)
    age(tmp_path)
    before = snapshot(tmp_path)
    with (tmp_path / IMAGE).open("rb") as holder:
        # Consistent read, in use: readers are allowed, a writer is not.
        lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 100, 1, 0)
        fcntl.fcntl(holder, fcntl.F_OFD_SETLK, lock)
        assert checked(tmp_path) == 2
        for what in ("leaks", "all"):
            assert "in use" in refused("check", "-r", what, TOP, cwd=tmp_path)
        assert snapshot(tmp_path) == before
    repair(tmp_path, "all")


def test_invalid_value_of_r_is_a_usage_error(tmp_path: Path) -> None:
    pair(tmp_path, "AB", "xX")
    refused("check", "-r", "everything", TOP, cwd=tmp_path, status=64)
    refused("check", "-r", "", TOP, cwd=tmp_path, status=64)
    assert look(tmp_path / IMAGE) == "xX"


# ---- damage at random ----


def damage_at_random(here: Path, rng: random.Random) -> None:
    """Draw an image of up to 20 clusters and do any of the damage that can be repaired."""
    size = rng.randint(1, 20)
    pair(
        here,
        "".join(rng.choice("ABC-") for _ in range(rng.randint(1, 20))),
        "".join(rng.choice("XYxy0-") for _ in range(size)),
    )
    if rng.random() < 0.5:
        os.truncate(here / IMAGE, size * CLUSTER - rng.randrange(CLUSTER))
    if rng.random() < 0.5:
        patch(here / TOP, rng.randrange(100, CLUSTER), rng.randbytes(1))
    if rng.random() < 0.5:
        patch(here / TOP, CLUSTER + rng.randint(-(-size // 8), CLUSTER - 8), rng.randbytes(8))
    if rng.random() < 0.3:
        os.truncate(here / TOP, CLUSTER + rng.randint(0, 8))


@pytest.mark.parametrize("seed", range(40))
def test_repair_of_random_damage_keeps_the_guests_view(tmp_path: Path, seed: int) -> None:
    damage_at_random(tmp_path, random.Random(seed))
    before, broken, length = view(tmp_path), (tmp_path / TOP).read_bytes(), len(view(tmp_path))
    first = addcow_here("check", "-r", "all", tmp_path / TOP)
    assert first.exit in (0, 3), first
    assert view(tmp_path) == before
    backups = [path.read_bytes() for path in tmp_path.glob("*.backup-*")]
    assert backups == [broken] * ("REPAIRED header and bitmap" in first.out)
    second = addcow_here("check", "-r", "all", tmp_path / TOP)
    assert second.exit == 0, second
    assert view(tmp_path) == before
    clusters = -(-length // CLUSTER)
    assert set(local_clusters(tmp_path / TOP)) == {bit for bit in bits_of(broken) if bit < clusters}


def bits_of(cow: bytes) -> set[int]:
    """Return every bit that is set in the bitmap of a whole file."""
    return {
        8 * at + bit for at, byte in enumerate(cow[CLUSTER:]) for bit in range(8) if byte >> bit & 1
    }
