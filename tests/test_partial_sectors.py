"""Tests of raw disks that do not end with a whole sector: no byte is lost.

The oracle and qemu-img say what a chain with such a disk shows.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from support.command import overlay_bytes, tool
from support.fault_rules import Rules, rule
from support.processes import Ended
from support.warm import Warm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import oracle

pytestmark = pytest.mark.sample(1)

KiB = 1024
MiB = 1024 * KiB
CLUSTER = 64 * KiB
SECTOR = 512

#: Lengths that are no multiple of a sector, of a block, of a cluster.
TAILS = [1, 102, 511, 4 * KiB + 1, 5 * KiB - 1, CLUSTER - 1, CLUSTER + 4 * KiB + 300]
each_tail = pytest.mark.parametrize("tail", TAILS)
WAYS = {
    "auto": (),
    "clone": ("--copy", "clone"),
    "range": ("--copy", "range"),
    "map": ("--copy", "map"),
    "buffer": ("--copy", "buffer"),
    "direct": ("-t", "none"),
    "sparse": ("-S", "4k"),
    "unsafe": ("-t", "unsafe"),
    "slow": ("-r", "1G"),
}


def noise(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def padded(data: bytes, size: int = 0) -> bytes:
    """The disk that a raw file of these bytes is."""
    return data.ljust(max(size, -(-len(data) // SECTOR) * SECTOR), b"\0")


def overlay(  # what the image holds is a cluster of noise for each local one
    here: Path, name: str, size: int, below: str, form: str = "raw", local: tuple[int, ...] = ()
) -> dict[int, bytes]:
    """Make an overlay by hand; return what its clusters hold."""
    held = {cluster: noise(CLUSTER, 7 + cluster + len(name)) for cluster in local}
    with (here / f"{name}.raw").open("wb") as image:
        image.truncate(size)
        for cluster, data in held.items():
            image.seek(cluster * CLUSTER)
            image.write(data[: size - cluster * CLUSTER])
    content = overlay_bytes(
        image=f"{name}.raw", size=size, backing=below, backing_format=form, local=local
    )
    (here / f"{name}.add-cow").write_bytes(content)
    return held


def with_clusters(view: bytes, held: dict[int, bytes]) -> bytes:
    seen = bytearray(view)
    for cluster, data in held.items():
        start = cluster * CLUSTER
        seen[start : start + CLUSTER] = data[: len(view) - start]
    return bytes(seen)


def done(ended: Ended, status: int = 0) -> Ended:
    assert ended.status == status, ended
    return ended


# ---- commit ----


@pytest.mark.parametrize("jobs", ["0", "1", "2"])
@pytest.mark.parametrize("verify", [(), ("--verify",)], ids=["", "verify"])
def test_commit_of_a_longer_overlay_keeps_the_tail(
    warm: Warm, tmp_path: Path, jobs: str, verify: tuple[str, ...]
) -> None:
    base = noise(MiB + 102)
    (tmp_path / "base.img").write_bytes(base)
    held = overlay(tmp_path, "top", 2 * MiB, "base.img", local=(24,))
    wanted = with_clusters(base.ljust(2 * MiB, b"\0"), held)
    assert oracle.guest_bytes(str(tmp_path / "top.add-cow")) == wanted
    done(warm.run("commit", "--jobs", jobs, *verify, "top.add-cow", cwd=tmp_path))
    assert (tmp_path / "base.img").read_bytes() == wanted
    assert oracle.guest_bytes(str(tmp_path / "top.add-cow")) == wanted


@each_tail
@pytest.mark.parametrize("local", [(), (15,), (16,), (17, 20), (0, 16, 31)])
def test_commit_keeps_bytes_that_it_does_not_write(
    warm: Warm, tmp_path: Path, tail: int, local: tuple[int, ...]
) -> None:
    base = noise(MiB + tail)
    (tmp_path / "base.img").write_bytes(base)
    held = overlay(tmp_path, "top", 2 * MiB, "base.img", local=local)
    wanted = with_clusters(base.ljust(2 * MiB, b"\0"), held)
    done(warm.run("commit", "--jobs", "0", "top.add-cow", cwd=tmp_path))
    assert (tmp_path / "base.img").read_bytes() == wanted


@each_tail
@pytest.mark.parametrize("size", [512, MiB, MiB + 512, MiB + CLUSTER])
def test_commit_never_shortens_a_longer_base(
    warm: Warm, tmp_path: Path, tail: int, size: int
) -> None:
    base = noise(MiB + tail)
    (tmp_path / "base.img").write_bytes(base)
    last = (size - 1) // CLUSTER
    held = overlay(tmp_path, "top", size, "base.img", local=(last,))
    wanted = with_clusters(base.ljust(size, b"\0")[:size], held) + base[size:]
    done(warm.run("commit", "--jobs", "0", "--verify", "top.add-cow", cwd=tmp_path))
    assert (tmp_path / "base.img").read_bytes() == wanted


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("job", ["commit", "commit -d", "flatten", "convert"])
def test_every_copy_method_keeps_the_tail(
    warm: Warm,
    xfs: Path,
    job: str,
    way: str,
) -> None:
    base = noise(2 * MiB + 4 * KiB + 102)
    (xfs / "base.img").write_bytes(base)
    below, form, held = "base.img", "raw", {}
    if "commit" not in job:
        below, form = "mid.add-cow", "add-cow"
        held = overlay(xfs, "mid", 3 * MiB, "base.img", local=(2, 30))
    held |= overlay(xfs, "top", 3 * MiB, below, form, local=(32, 40))
    wanted = with_clusters(base.ljust(3 * MiB, b"\0"), held)
    assert oracle.guest_bytes(str(xfs / "top.add-cow")) == wanted
    result = {"convert": "new.raw", "flatten": "top.raw"}.get(job, "base.img")
    words, target = job.split(), tuple[str, ...]()
    if job == "convert":
        words, target = ["convert", "-O", "raw"], ("new.raw",)
    done(warm.run(*words, "--jobs", "0", *WAYS[way], "top.add-cow", *target, cwd=xfs))
    assert (xfs / result).read_bytes() == wanted


@each_tail
def test_commit_into_a_middle_overlay_copies_the_tail_up(
    warm: Warm, tmp_path: Path, tail: int
) -> None:
    base = noise(MiB + tail)
    (tmp_path / "base.img").write_bytes(base)
    overlay(tmp_path, "mid", 2 * MiB, "base.img")
    content = overlay_bytes(
        image="top.raw",
        size=2 * MiB,
        backing="mid.add-cow",
        backing_format="add-cow",
        cluster=4 * KiB,
        local=(257 + tail // (4 * KiB),),  # the cluster behind the one with the base's last bytes
    )
    (tmp_path / "top.add-cow").write_bytes(content)
    (tmp_path / "top.raw").write_bytes(noise(2 * MiB, 5))
    wanted = oracle.guest_bytes(str(tmp_path / "top.add-cow"))
    assert wanted[: len(base)] == base
    done(warm.run("commit", "--jobs", "0", "--verify", "top.add-cow", cwd=tmp_path))
    assert oracle.guest_bytes(str(tmp_path / "mid.add-cow")) == wanted
    assert (tmp_path / "base.img").read_bytes() == base


# ---- flatten, convert, compare, looking ----


@each_tail
def test_flatten_and_convert_copy_the_tail_from_every_depth(
    warm: Warm, tmp_path: Path, tail: int
) -> None:
    base = noise(MiB + tail)
    (tmp_path / "base.img").write_bytes(base)
    held = overlay(tmp_path, "low", 2 * MiB + CLUSTER, "base.img", local=(20,))
    held |= overlay(tmp_path, "mid", 2 * MiB, "low.add-cow", "add-cow", local=(1,))
    held |= overlay(tmp_path, "top", 2 * MiB + 512, "mid.add-cow", "add-cow", local=(2,))
    wanted = with_clusters(base.ljust(2 * MiB + 512, b"\0"), held)
    done(warm.run("convert", "-O", "raw", "--jobs", "0", "top.add-cow", "new.raw", cwd=tmp_path))
    assert (tmp_path / "new.raw").read_bytes() == wanted
    done(warm.run("compare", "-F", "raw", "top.add-cow", "new.raw", cwd=tmp_path))
    done(warm.run("flatten", "--jobs", "0", "--verify", "top.add-cow", cwd=tmp_path))
    assert (tmp_path / "top.raw").read_bytes() == wanted
    assert (tmp_path / "base.img").read_bytes() == base


@each_tail
def test_image_data_after_the_tail_is_not_shown(warm: Warm, tmp_path: Path, tail: int) -> None:
    base = noise(MiB + tail)
    (tmp_path / "base.img").write_bytes(base)
    overlay(tmp_path, "top", 2 * MiB, "base.img")
    (tmp_path / "top.raw").write_bytes(b"\xee" * 2 * MiB)  # garbage in what is not allocated
    done(warm.run("flatten", "--jobs", "0", "top.add-cow", cwd=tmp_path))
    assert (tmp_path / "top.raw").read_bytes() == base.ljust(2 * MiB, b"\0")


@each_tail
def test_convert_of_a_raw_disk_with_a_tail_equals_qemu_img(
    warm: Warm, tmp_path: Path, tail: int
) -> None:
    (tmp_path / "disk.raw").write_bytes(noise(tail))
    ended = done(warm.run("convert", "-f", "raw", "-O", "raw", "disk.raw", "new.raw", cwd=tmp_path))
    assert "not copied" not in ended.stderr
    assert (tmp_path / "new.raw").read_bytes() == padded(noise(tail))
    tool("qemu-img", "compare", "-f", "raw", "-F", "raw", "disk.raw", "new.raw", cwd=tmp_path)
    done(warm.run("compare", "-f", "raw", "-F", "raw", "disk.raw", "new.raw", cwd=tmp_path))


@each_tail
def test_map_of_a_tail_equals_qemu_img(warm: Warm, tmp_path: Path, tail: int) -> None:
    (tmp_path / "base.img").write_bytes(noise(CLUSTER + tail))
    overlay(tmp_path, "top", 4 * CLUSTER, "base.img")
    tool(
        "qemu-img",
        "create",
        "-f",
        "qcow2",
        "-b",
        "base.img",
        "-F",
        "raw",
        "q",
        "256k",
        cwd=tmp_path,
    )
    theirs = json.loads(tool("qemu-img", "map", "--output=json", "q", cwd=tmp_path))
    ours = json.loads(done(warm.run("map", "--output", "json", "top.add-cow", cwd=tmp_path)).stdout)
    keys = ("start", "length", "depth", "zero", "data", "present")
    assert [[one[key] for key in keys] for one in ours] == [
        [one[key] for key in keys] for one in theirs
    ]


def test_sizes_of_raw_disks_are_rounded_up_everywhere(warm: Warm, tmp_path: Path) -> None:
    (tmp_path / "base.img").write_bytes(noise(300))
    done(warm.run("create", "-b", "base.img", "-F", "raw", "top.add-cow", cwd=tmp_path))
    assert (tmp_path / "top.raw").stat().st_size == 512
    assert oracle.guest_bytes(str(tmp_path / "top.add-cow")) == padded(noise(300))
    words = ("info", "--backing-chain", "--output", "json", "top.add-cow")
    infos = json.loads(done(warm.run(*words, cwd=tmp_path)).stdout)
    assert [one["virtual-size"] for one in infos] == [512, 512]
    (tmp_path / "other.img").write_bytes(noise(700))
    graph = json.loads(
        done(warm.run("farm", "graph", "--output", "json", ".", cwd=tmp_path)).stdout
    )
    sizes = {os.path.basename(one["filename"]): one["virtual-size"] for one in graph["files"]}
    assert sizes == {"base.img": 512, "other.img": 1024}


# ---- create over a disk ----


def test_create_over_a_disk_keeps_its_tail(warm: Warm, tmp_path: Path) -> None:
    disk = noise(1_000_000)
    (tmp_path / "disk.raw").write_bytes(disk)
    done(warm.run("manifest", "create", "-f", "raw", "disk.raw", cwd=tmp_path))
    done(warm.run("create", "-o", "image_file=disk.raw", "top.add-cow", cwd=tmp_path))
    assert (tmp_path / "disk.raw").read_bytes() == disk + bytes(448)
    assert oracle.guest_bytes(str(tmp_path / "top.add-cow")) == disk + bytes(448)
    assert not (tmp_path / "disk.raw.manifest").exists()


@pytest.mark.parametrize("event", ["data_sync", "directory_sync", "bitmap_sync", "header_write"])
def test_failed_create_restores_the_disk(warm: Warm, tmp_path: Path, event: str) -> None:
    (tmp_path / "disk.raw").write_bytes(noise(1_000_000))
    rules = Rules.write(tmp_path / "rules", rule(event))
    words = ("create", "-o", "image_file=disk.raw", "top.add-cow")
    done(warm.run(*words, cwd=tmp_path, rules=rules), 1)
    assert (tmp_path / "disk.raw").read_bytes() == noise(1_000_000)
    assert not (tmp_path / "top.add-cow").exists()


def test_create_refuses_a_size_that_drops_bytes(warm: Warm, tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(noise(1000))
    words = ("create", "-o", "image_file=disk.raw", "top.add-cow")
    ended = done(warm.run(*words, "512", cwd=tmp_path), 1)
    assert "it is larger (1000 bytes) than the size asked for (512)" in ended.stderr
    assert (tmp_path / "disk.raw").read_bytes() == noise(1000)
    done(warm.run(*words, "1000", cwd=tmp_path))
    assert (tmp_path / "disk.raw").read_bytes() == padded(noise(1000))


# ---- the image file's own tail, and its end ----


def hidden(here: Path, count: int = 100) -> bytes:
    """An overlay whose image has ``count`` bytes behind its virtual size; what its guest sees."""
    (here / "base.img").write_bytes(noise(MiB + 102))
    held = overlay(here, "top", 2 * MiB, "base.img", local=(31,))
    with (here / "top.raw").open("ab") as image:
        image.write(b"\xdd" * count)
    return with_clusters(noise(MiB + 102).ljust(2 * MiB, b"\0"), held)


def test_check_reports_image_data_after_the_virtual_size(warm: Warm, tmp_path: Path) -> None:
    hidden(tmp_path)
    ended = done(warm.run("check", "top.add-cow", cwd=tmp_path))
    assert "top.raw: its last 100 bytes, from 2097152 on, are not part of the disk" in ended.stdout
    report = json.loads(
        done(warm.run("check", "--output", "json", "top.add-cow", cwd=tmp_path)).stdout
    )
    assert report["findings"] == []
    assert len(report["notes"]) == 1


@pytest.mark.parametrize("farm", [(), ("farm",)], ids=["one", "farm"])
@pytest.mark.parametrize("before", [(), ("flatten", "top.add-cow")], ids=["", "flat already"])
def test_discard_leaves_exactly_the_guests_disk(
    warm: Warm, tmp_path: Path, farm: tuple[str, ...], before: tuple[str, ...]
) -> None:
    wanted = hidden(tmp_path)
    if before:
        done(warm.run(*before, cwd=tmp_path))
        assert (tmp_path / "top.raw").read_bytes() == wanted + b"\xdd" * 100
        done(warm.run("manifest", "create", "-f", "raw", "top.raw", cwd=tmp_path))
    done(warm.run(*farm, "flatten", "--discard", "top.add-cow", cwd=tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["base.img", "top.raw"]
    assert (tmp_path / "top.raw").read_bytes() == wanted


@pytest.mark.parametrize("action", ["error", "kill"])
@pytest.mark.parametrize("event", ["image_cut", "data_sync", "discard"])
def test_interrupted_discard_keeps_the_disk(
    warm: Warm, tmp_path: Path, event: str, action: str
) -> None:
    for after in range(4):
        here = tmp_path / str(after)
        here.mkdir()
        wanted = hidden(here)
        rules = Rules.write(here / "rules", rule(event, action=action, after=after, once="on"))
        words = ("flatten", "--discard", "--jobs", "0", "top.add-cow")
        warm.start(*words, cwd=here, rules=rules).end()
        if (here / "top.add-cow").exists():
            assert oracle.guest_bytes(str(here / "top.add-cow")) == wanted
            done(warm.run(*words, cwd=here))
        assert (here / "top.raw").read_bytes() == wanted
        shutil.rmtree(here)


def test_discard_does_not_shorten_an_image_that_others_use(warm: Warm, tmp_path: Path) -> None:
    wanted = hidden(tmp_path)
    done(warm.run("flatten", "top.add-cow", cwd=tmp_path))
    overlay(tmp_path, "above", 3 * MiB, "top.raw")
    ended = done(warm.run("flatten", "--discard", "top.add-cow", cwd=tmp_path), 1)
    assert "above.add-cow" in ended.stderr
    assert (tmp_path / "top.raw").read_bytes() == wanted + b"\xdd" * 100


# ---- manifests ----


def sealed(path: Path, change: dict[str, object]) -> None:
    """Change what the head of a manifest says, and seal it."""
    content = path.read_bytes()
    head = json.loads(content[16:4096].rstrip(b"\0")) | change
    text = json.dumps(head).encode()
    body = (content[:12] + len(text).to_bytes(4, "little") + text).ljust(4096, b"\0")
    body += content[4096:-32]
    path.write_bytes(body + blake3(body).digest())


def head_of(path: Path) -> dict[str, Any]:
    head: dict[str, Any] = json.loads(path.read_bytes()[16:4096].rstrip(b"\0"))
    return head


def as_it_was_made(warm: Warm, here: Path) -> None:
    """Give base.img and top.add-cow the manifests that were made when sizes were rounded down."""
    done(warm.run("manifest", "create", "top.add-cow", cwd=here))
    base = (here / "base.img").read_bytes()
    (here / "whole").write_bytes(base[: len(base) // SECTOR * SECTOR])
    done(warm.run("manifest", "create", "-f", "raw", "whole", cwd=here))
    old = head_of(here / "whole.manifest")
    files = head_of(here / "base.img.manifest")["files"]
    (here / "whole.manifest").rename(here / "base.img.manifest")
    sealed(here / "base.img.manifest", {"files": files})
    below = {"guest-digest": old["guest-digest"], "virtual-size": old["virtual-size"]}
    sealed(here / "top.add-cow.manifest", {"backing": below})
    (here / "whole").unlink()


def findings(warm: Warm, here: Path, status: int, *words: str) -> list[tuple[str, str]]:
    ended = done(warm.run("verify", "--output", "json", *words, cwd=here), status)
    return [(one["name"], one["file"]) for one in json.loads(ended.stdout)["findings"]]


@each_tail
def test_manifest_with_the_size_rounded_down_is_stale(
    warm: Warm, tmp_path: Path, tail: int
) -> None:
    (tmp_path / "base.img").write_bytes(noise(CLUSTER + tail))
    overlay(tmp_path, "top", 3 * CLUSTER, "base.img", local=(2,))
    as_it_was_made(warm, tmp_path)
    base, top = ("stale", "base.img.manifest"), ("stale", "top.add-cow.manifest")
    assert findings(warm, tmp_path, 1, "top.add-cow") == [base]
    assert findings(warm, tmp_path, 1, "-f", "raw", "base.img") == [base]
    assert "--replace" in warm.run("verify", "top.add-cow", cwd=tmp_path).stderr
    done(warm.run("farm", "verify", ".", cwd=tmp_path), 1)
    again = ("manifest", "create", "-f", "raw", "base.img")
    told = done(warm.run(*again, cwd=tmp_path), 1).stderr
    assert "--replace" in told
    assert "last, partial sector" in told
    done(warm.run(*again, "--replace", cwd=tmp_path))
    assert findings(warm, tmp_path, 1, "top.add-cow") == [top]
    done(warm.run("manifest", "create", "top.add-cow", cwd=tmp_path), 1)
    done(warm.run("manifest", "create", "--replace", "top.add-cow", cwd=tmp_path))
    assert findings(warm, tmp_path, 0, "top.add-cow") == []


def test_verify_finds_damage_beside_a_tail(warm: Warm, tmp_path: Path) -> None:
    (tmp_path / "base.img").write_bytes(noise(CLUSTER + 102))
    overlay(tmp_path, "top", 3 * CLUSTER, "base.img", local=(2,))
    done(warm.run("manifest", "create", "top.add-cow", cwd=tmp_path))
    with (tmp_path / "base.img").open("r+b") as file:
        file.seek(CLUSTER + 101)
        file.write(bytes([noise(CLUSTER + 102)[-1] ^ 1]))
    ended = done(warm.run("verify", "--output", "json", "top.add-cow", cwd=tmp_path), 2)
    ranges = [(one["start"], one["length"]) for one in json.loads(ended.stdout)["ranges"]]
    assert ranges == [(CLUSTER, 102)]


@each_tail
@pytest.mark.parametrize("job", ["flatten", "convert", "commit"])
def test_guest_digest_covers_the_tail(warm: Warm, tmp_path: Path, tail: int, job: str) -> None:
    (tmp_path / "base.img").write_bytes(noise(CLUSTER + tail))
    overlay(tmp_path, "top", 3 * CLUSTER, "base.img", local=(2,))
    done(warm.run("manifest", "create", "top.add-cow", cwd=tmp_path))
    for name, kind in (("base.img", "raw"), ("top.add-cow", "add-cow")):
        assert findings(warm, tmp_path, 0, "-f", kind, name) == []
        assert oracle.manifest_faults(str(tmp_path / name), kind) == []
    told = head_of(tmp_path / "top.add-cow.manifest")["guest-digest"]
    assert told == oracle.guest_digest(str(tmp_path / "top.add-cow"))
    words = {"convert": ("convert", "-O", "raw", "top.add-cow", "new.raw")}.get(
        job, (job, "top.add-cow")
    )
    done(warm.run(*words, cwd=tmp_path))
    disk = {"convert": "new.raw", "flatten": "top.raw", "commit": "base.img"}[job]
    done(warm.run("manifest", "create", "-f", "raw", disk, cwd=tmp_path))
    assert head_of(tmp_path / f"{disk}.manifest")["guest-digest"] == told
