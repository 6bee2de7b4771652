"""Tests of hostile images: which files their names may open, and what their numbers may cost.

Names open only regular files beneath the overlay's directory or a root, and block devices when
allowed. Numbers are checked before they cost memory or time. A refusal is one line that says how
to allow it. The kernel reports which files are opened (inotify).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.command import (
    CLUSTER,
    PATIENCE,
    GiB,
    KiB,
    MiB,
    Result,
    TiB,
    addcow,
    bits,
    draw,
    draw_raw,
    guest_picture,
    io,
    local_clusters,
    look,
    overlay_bytes,
    patch,
    ran,
    refused,
    snapshot,
    succeed,
    tool,
)
from support.golden import addcow_here
from watch import Watch

pytestmark = pytest.mark.sample(1)

TOP, BASE, IMAGE = "top.add-cow", "base.img", "top.raw"
SIZE = 3 * CLUSTER

READERS: tuple[tuple[str, ...], ...] = (
    ("info", "--backing-chain"),
    ("map",),
    ("check",),
    ("convert", "-O", "raw"),
    ("io", "-r", "-c", "read 0 4k"),
)
WRITERS: tuple[tuple[str, ...], ...] = (
    ("io", "-c", "write 0 4k"),
    ("check", "-r", "all"),
    ("flatten",),
    ("flatten", "--discard", "--force"),
    ("commit",),
    ("commit", "-d", "--force"),
)


def write_overlay(
    path: Path, *, image: str = IMAGE, backing: str = BASE, backing_format: str = "raw"
) -> None:
    """Write an overlay with its middle cluster local, naming whatever is asked for."""
    content = overlay_bytes(
        image=image, size=SIZE, backing=backing, backing_format=backing_format, local=[1]
    )
    path.write_bytes(content)


def run(here: Path, command: tuple[str, ...], *options: str) -> Result:
    """Run one command on the overlay of ``here``, in this process."""
    verb, *rest = command
    new = [str(here / "new.raw")] if verb == "convert" else []
    if new:
        (here / "new.raw").unlink(missing_ok=True)
    done = addcow_here(verb, *options, *rest, here / TOP, *new)
    return Result(done.exit, done.out, done.err)


def sole_line(result: Result) -> str:
    """Insist on a refusal in one line and return it."""
    assert result.status == 1, result
    (line,) = result.stderr.splitlines()
    assert line.startswith("addcow: "), line
    return line


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """Let a command that waits for ever fail its test, also within this process."""

    def ring(*_: object) -> None:
        pytest.fail(f"nothing came of it in {PATIENCE} seconds")

    old = signal.signal(signal.SIGALRM, ring)
    signal.alarm(int(PATIENCE))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


# ---- names that lead out ----


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """A directory with a sound overlay, and beside it one that names must not reach."""
    (tmp_path / "outside").mkdir()
    draw_raw(tmp_path / "outside" / "secret.img", "SSS")
    here = tmp_path / "box"
    (here / "sub").mkdir(parents=True)
    draw_raw(here / BASE, "ABC")
    draw(here / TOP, "-X-")
    return here


def secret(box: Path) -> Path:
    return box.parent / "outside" / "secret.img"


def parent(_: Path) -> str:
    return "../outside/secret.img"


def long_way(_: Path) -> str:
    return ".//sub/../sub/.././../outside/../outside/secret.img"


def absolute(box: Path) -> str:
    return str(secret(box))


def link(box: Path) -> str:
    (box / "link").symlink_to("../outside/secret.img")
    return "link"


def absolute_link(box: Path) -> str:
    (box / "link").symlink_to(secret(box))
    return "./link"


def linked_directory(box: Path) -> str:
    (box / "sub" / "dir").symlink_to("../../outside")
    return "sub/dir/secret.img"


def back_out_of_link(box: Path) -> str:
    # As text this stays inside; for the kernel ".." is the parent of where the link leads.
    (box / "dir").symlink_to("../outside/deeper")
    (box.parent / "outside" / "deeper").mkdir()
    return "dir/../secret.img"


def link_by_link(box: Path) -> str:
    (box / "one").symlink_to("sub/two")
    (box / "sub" / "two").symlink_to("../three")
    (box / "three").symlink_to(secret(box))
    return "one"


def through_proc(_: Path) -> str:
    return "/proc/self/cwd/../outside/secret.img"


def through_root(box: Path) -> str:
    return f"/proc/self/root{secret(box)}"


WAYS_OUT = (
    *(parent, long_way, absolute, link, absolute_link, linked_directory),
    *(back_out_of_link, link_by_link, through_proc, through_root),
)

way_out = pytest.mark.parametrize("way", WAYS_OUT)


@way_out
@pytest.mark.parametrize("spot", ["image", "backing"])
def test_names_open_files_beneath_the_overlays_directory_only(
    box: Path, way: Callable[[Path], str], spot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(box)
    write_overlay(box / TOP, **{spot: way(box)})
    before = snapshot(box.parent)
    with Watch(str(secret(box))) as watch:
        for command in (*READERS, *WRITERS):
            line = sole_line(run(box, command))
            assert f"--root {box.parent / 'outside'}" in line, command
        assert watch.events() == []
        assert snapshot(box.parent) == before
        watch.events()  # those of the snapshot
        assert run(box, ("map",), "--root", str(box.parent / "outside")).status == 0
        assert watch.events()


@way_out
def test_backing_may_open_no_more_than_the_overlay(
    box: Path, way: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(box)
    write_overlay(box / TOP, backing="mid.add-cow", backing_format="add-cow")
    draw(box / "mid.add-cow", "---", way(box))
    with Watch(str(secret(box))) as watch:
        for command in (*READERS, *WRITERS):
            assert "--root" in sole_line(run(box, command)), command
        assert watch.events() == []


def test_info_does_not_describe_an_outside_image(box: Path) -> None:
    write_overlay(box / TOP, image="../outside/secret.img")
    line = sole_line(run(box, ("info",)))
    assert f"--root {box.parent / 'outside'}" in line


def test_info_of_the_overlay_alone_opens_no_backing(box: Path) -> None:
    write_overlay(box / TOP, backing="../outside/secret.img")
    with Watch(str(secret(box))) as watch:
        assert run(box, ("info",)).status == 0
        assert watch.events() == []


def test_links_within_the_directory_are_followed(box: Path) -> None:
    (box / "link").symlink_to("sub/../base.img")
    (box / "all").symlink_to(".")
    write_overlay(box / TOP, image="all/all/top.raw", backing="all/link")
    for command in (*READERS, *WRITERS[:1], *WRITERS[3:4]):
        assert run(box, command).status == 0, command


# ---- roots ----


@way_out
def test_root_allows_files_beneath_it(
    box: Path, way: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(box)
    write_overlay(box / TOP, backing=way(box))
    for root in (str(secret(box).parent), "../outside", "./../outside/", "/"):
        result = run(box, ("convert", "-O", "raw"), "--root", root)
        assert result.status == 0, (root, result)
        assert look(box / "new.raw") == "SXS"
    (box / "new.raw").unlink()
    monkeypatch.setenv("ADDCOW_ROOTS", f"/nowhere::{secret(box).parent}")
    assert run(box, ("map",)).status == 0
    assert run(box, ("commit", "--force")).status == 0
    assert look(secret(box)) == "SXS"


def test_several_roots_and_a_link_to_a_root(box: Path) -> None:
    write_overlay(box / TOP, backing="../outside/secret.img")
    (box.parent / "way").symlink_to("outside")
    roots = ("--root", str(box / "sub"), "--root", "/nowhere", "--root", str(box.parent / "way"))
    assert run(box, ("map",), *roots).status == 0
    assert "--root" in sole_line(run(box, ("map",), *roots[:4]))


def test_root_is_not_a_prefix_of_a_name(box: Path) -> None:
    (box.parent / "out").mkdir()
    write_overlay(box / TOP, backing="../outside/secret.img")
    assert "--root" in sole_line(run(box, ("map",), "--root", str(box.parent / "out")))
    assert "--root" in sole_line(run(box, ("map",), "--root", str(secret(box))))


def test_chain_beneath_a_root_continues_there(box: Path) -> None:
    bases = box.parent / "outside"
    draw_raw(bases / "golden.img", "GHI")
    draw(bases / "mid.add-cow", "--M", "golden.img")
    write_overlay(box / TOP, backing="../outside/mid.add-cow", backing_format="add-cow")
    assert "--root" in sole_line(run(box, ("map",)))
    for command in READERS:
        assert run(box, command, "--root", str(bases)).status == 0, command
    assert look(box / "new.raw") == "GXM"
    assert run(box, ("commit",), "--root", str(bases)).status == 0
    assert guest_picture(bases / "mid.add-cow") == "GXM"


def test_link_in_a_root_does_not_lead_out_of_it(box: Path) -> None:
    inner = box.parent / "outside" / "inner"
    inner.mkdir()
    draw(inner / "mid.add-cow", "---", "../secret.img")
    write_overlay(box / TOP, backing="../outside/inner/mid.add-cow", backing_format="add-cow")
    line = sole_line(run(box, ("map",), "--root", str(inner)))
    assert f"--root {inner.parent}" in line


@pytest.mark.parametrize("backing", ["../outside/secret.img", "outside link"])
def test_create_names_the_root_that_users_need(box: Path, backing: str) -> None:
    (box / "outside link").symlink_to("../outside/secret.img")
    done = addcow("create", "-b", backing, "-F", "raw", "new.add-cow", cwd=box)
    assert done.status == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("addcow: warning: new.add-cow: ")
    root = f"--root {box.parent / 'outside'}"
    assert root in line
    assert root in refused("map", "new.add-cow", cwd=box)
    succeed("map", *root.split(maxsplit=1), "new.add-cow", cwd=box)


def test_create_names_no_root_for_files_beneath_it(box: Path) -> None:
    done = addcow("create", "-b", BASE, "-F", "raw", "new.add-cow", cwd=box)
    assert (done.status, done.stderr) == (0, "")


def test_create_names_the_root_of_an_image_elsewhere(box: Path) -> None:
    images = box.parent / "images"
    images.mkdir()
    options = f"image_file={images}/new.raw"
    words = ("create", "-b", str(secret(box)), "-F", "raw", "-o", options, "new.add-cow")
    line = addcow(*words, cwd=box).stderr
    assert f"--root {images} --root {secret(box).parent}" in line
    roots = ("--root", str(images), "--root", str(secret(box).parent))
    io_words = ("io", *roots, "-c", "write -P 0x58 64k 64k", "new.add-cow")
    succeed(*io_words, cwd=box)
    assert look(images / "new.raw") == "0X0"


@pytest.mark.long
def test_name_replaced_by_a_link_opens_nothing_outside(box: Path) -> None:
    """While one thread exchanges a link as fast as it can, no open ends up outside."""
    write_overlay(box / TOP, backing="turning")
    inside, out, turning = (box / name for name in ("inside", "out", "turning"))
    stop = threading.Event()

    def turn() -> None:
        while not stop.is_set():
            for new, target in ((inside, BASE), (out, "../outside/secret.img")):
                new.symlink_to(target)
                new.replace(turning)

    turning.symlink_to(BASE)
    thread = threading.Thread(target=turn)
    with Watch(str(secret(box))) as watch:
        thread.start()
        statuses = {run(box, ("map",)).status for _ in range(150)}
        stop.set()
        thread.join()
        assert statuses <= {0, 1}
        assert watch.events() == []


# ---- what is no disk ----


def fifo(place: Path) -> None:
    os.mkfifo(place)


def directory(place: Path) -> None:
    place.mkdir()


def local_socket(place: Path) -> None:
    descriptor = os.open(place.parent, os.O_PATH)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"/proc/self/fd/{descriptor}/{place.name}")
    finally:
        os.close(descriptor)


def endless_device(place: Path) -> None:
    try:
        os.mknod(place, 0o600 | 0o020000, os.makedev(1, 5))  # as /dev/zero
        os.close(os.open(place, os.O_RDONLY))
    except PermissionError:
        pytest.skip("device nodes cannot be made and used here")


def link_to_itself(place: Path) -> None:
    place.symlink_to(place.name)


ODD = (fifo, directory, local_socket, endless_device, link_to_itself)

odd = pytest.mark.parametrize("make", ODD)


@odd
@pytest.mark.parametrize("name", [IMAGE, BASE])
def test_only_regular_files_are_opened(box: Path, make: Callable[[Path], None], name: str) -> None:
    (box / name).unlink()
    make(box / name)
    before = snapshot(box)
    for command in (*READERS, *WRITERS):
        assert name in sole_line(run(box, command)), command
    assert snapshot(box) == before


@pytest.mark.long
@odd
def test_overlay_must_be_a_regular_file(box: Path, make: Callable[[Path], None]) -> None:
    (box / TOP).unlink()
    make(box / TOP)
    for command in (*READERS, *WRITERS):
        assert TOP in sole_line(run(box, command)), command
    for words in (("convert", "-O", "raw", TOP, "new.raw"), ("create", TOP, "1M")):
        assert TOP in refused(*words, cwd=box)
    assert TOP in refused("convert", "-f", "raw", "-O", "raw", TOP, "new.raw", cwd=box)
    assert not (box / "new.raw").exists()


@pytest.mark.long
@odd
def test_create_refuses_files_that_are_not_regular(box: Path, make: Callable[[Path], None]) -> None:
    make(box / "odd")
    before = snapshot(box)
    for words in (("-b", "odd", "-F", "raw"), ("-o", "image_file=odd")):
        assert "odd" in refused("create", *words, "new.add-cow", "1M", cwd=box)
    assert "odd" in refused("convert", "-O", "raw", TOP, "odd", cwd=box)
    assert snapshot(box) == before


@pytest.mark.parametrize(
    "name", ["/proc/version", "/proc/self/mem", "/proc/kmsg", "/sys/kernel/profiling"]
)
@pytest.mark.parametrize("spot", ["image", "backing"])
def test_files_of_proc_are_refused(box: Path, name: str, spot: str) -> None:
    write_overlay(box / TOP, **{spot: name})
    for command in READERS:
        result = run(box, command, "--root", "/proc", "--root", "/sys")
        assert result.status in (1, 2), result
        assert name in result.said
    assert "kernel" in refused("info", "/proc/version", cwd=box)


@pytest.mark.parametrize("root", ["/proc", "/sys", "/dev"])
def test_proc_as_a_root_is_not_searched(box: Path, root: str) -> None:
    succeed("commit", "--root", root, TOP, cwd=box)
    assert look(box / BASE) == "AXC"


PROTOCOLS = (
    *("nbd:localhost:10809", "nbd://localhost/x", "json:{}", 'json:{"driver":"null-co"}'),
    *("http://127.0.0.1/x", "fd:0", "file:base.img", "fat:rw:sub", "blkdebug::base.img", ":"),
)


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("spot", ["image", "backing"])
def test_names_with_a_protocol_are_refused(box: Path, name: str, spot: str) -> None:
    if "/" not in name:
        draw_raw(box / name, "PPP")
    write_overlay(box / TOP, **{spot: name})
    before = snapshot(box)
    for command in (*READERS, *WRITERS):
        assert "protocol" in sole_line(run(box, command)), command
    assert snapshot(box) == before
    if "/" not in name:
        write_overlay(box / TOP, **{spot: f"./{name}"})
        assert run(box, ("map",)).status == 0


# ---- block devices ----


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    """A loop device of six clusters: "DEFGHI"."""
    draw_raw(tmp_path / "disk", "DEFGHI")
    if os.geteuid() != 0 or shutil.which("losetup") is None:
        pytest.skip("loop devices need root and losetup")
    made = ran(["losetup", "--find", "--show", "disk"], cwd=tmp_path)
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    yield made.stdout.strip()
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


def disk(device: str) -> str:
    """Return the picture of what a device holds."""
    with open(device, "rb") as file:
        content = file.read()
    marks = (content[at] or ord("0") for at in range(0, len(content), CLUSTER))
    return "".join(map(chr, marks))


DEVICE = ("--allow-device", "--root", "/dev")


def test_block_devices_need_allow_device(tmp_path: Path, device: str) -> None:
    draw_raw(tmp_path / BASE, "ABC")
    for spot in ("image", "backing"):
        write_overlay(tmp_path / TOP, **{spot: device})
        draw_raw(tmp_path / IMAGE, "-X-")
        for command in READERS[:3]:
            assert "--root /dev" in sole_line(run(tmp_path, command))
            line = sole_line(run(tmp_path, command, "--root", "/dev"))
            assert "--allow-device" in line
            assert run(tmp_path, command, *DEVICE).status in (0, 3)
    assert "--allow-device" in refused("info", device, cwd=tmp_path)


def test_commit_into_a_device(tmp_path: Path, device: str) -> None:
    draw(tmp_path / TOP, "-X-0-Z", device)
    succeed("commit", *DEVICE, TOP, cwd=tmp_path)
    assert disk(device) == "DXF0HZ"
    assert bits(tmp_path / TOP) == "......"


def test_commit_does_not_grow_a_device(tmp_path: Path, device: str) -> None:
    draw(tmp_path / TOP, "-X-0-ZY", device)
    before = snapshot(tmp_path)
    assert device in refused("commit", *DEVICE, TOP, cwd=tmp_path)
    assert disk(device) == "DEFGHI"
    assert snapshot(tmp_path) == before


@pytest.mark.long
def test_flatten_and_convert_over_a_device(tmp_path: Path, device: str) -> None:
    draw(tmp_path / TOP, "-X-0-Z", device)
    succeed("convert", *DEVICE, "-O", "raw", TOP, "new.raw", cwd=tmp_path)
    assert look(tmp_path / "new.raw") == "DXF0HZ"
    succeed("flatten", *DEVICE, TOP, cwd=tmp_path)
    assert look(tmp_path / IMAGE) == "DXF0HZ"
    assert disk(device) == "DEFGHI"


@pytest.mark.long
@pytest.mark.parametrize("jobs", ["0", "2"])
def test_device_as_image(tmp_path: Path, device: str, jobs: str) -> None:
    draw_raw(tmp_path / BASE, "AB-")
    content = overlay_bytes(image=device, size=6 * CLUSTER, backing=BASE, local=[1, 3])
    (tmp_path / TOP).write_bytes(content)
    succeed("io", *DEVICE, "-c", "write -P 0x57 320k 64k", TOP, cwd=tmp_path)
    succeed("convert", *DEVICE, "-O", "raw", TOP, "new.raw", cwd=tmp_path)
    assert look(tmp_path / "new.raw") == "AE0G0W"
    succeed("flatten", *DEVICE, "--jobs", jobs, "--discard", TOP, cwd=tmp_path)
    assert disk(device) == "AE0G0W"


@pytest.mark.parametrize("jobs", ["0", "2"])
def test_commit_from_a_device(tmp_path: Path, device: str, jobs: str) -> None:
    draw_raw(tmp_path / BASE, "AB-")
    content = overlay_bytes(image=device, size=6 * CLUSTER, backing=BASE, local=[1, 3])
    (tmp_path / TOP).write_bytes(content)
    succeed("commit", *DEVICE, "--jobs", jobs, TOP, cwd=tmp_path)
    assert look(tmp_path / BASE) == "AE0G00"
    assert local_clusters(tmp_path / TOP) == []


def test_device_as_image_and_backing_is_refused(tmp_path: Path, device: str) -> None:
    (tmp_path / "alias").symlink_to(device)
    write_overlay(tmp_path / TOP, image=device, backing="alias")
    for command in (("map",), ("io", "-c", "write 0 4k"), ("flatten",), ("commit",)):
        assert "different files" in sole_line(run(tmp_path, command, *DEVICE)), command
    assert disk(device) == "DEFGHI"


def test_image_as_its_own_backing_is_refused(box: Path) -> None:
    (box / "alias").hardlink_to(box / IMAGE)
    write_overlay(box / TOP, backing="alias")
    before = snapshot(box)
    for command in (("map",), ("io", "-c", "write 0 4k"), ("flatten",), ("commit",)):
        assert "different files" in sole_line(run(box, command)), command
    assert snapshot(box) == before


# ---- raw files with another format's first bytes ----

MAGICS = {
    "qcow2": b"QFI\xfb\x00\x00\x00\x03",
    "qcow": b"QFI\xfb\x00\x00\x00\x01",
    "add-cow": b"ACOW",
    "vmdk": b"KDMV\x01\x00\x00\x00",
    "vhdx": b"vhdxfile",
    "luks": b"LUKS\xba\xbe\x00\x01",
}


@pytest.mark.parametrize("format_", MAGICS)
@pytest.mark.parametrize("name", [IMAGE, BASE])
def test_raw_file_is_raw_whatever_it_begins_with(box: Path, format_: str, name: str) -> None:
    draw(box / TOP, "X--" if name == IMAGE else "-X-")
    patch(box / name, 0, MAGICS[format_])
    assert run(box, ("convert", "-O", "raw")).status == 0
    head = (box / "new.raw").read_bytes()[:16]
    assert head == MAGICS[format_].ljust(16, b"X" if name == IMAGE else b"A")
    for command in (("info", "--backing-chain"), ("map",), ("io", "-r", "-c", "read 0 64k")):
        assert run(box, command).status == 0
    checked = addcow("check", "--output", "json", TOP, cwd=box)
    (finding,) = checked.json["findings"]
    assert finding["name"] == "formats"
    assert name in finding["message"]
    assert f"as {format_} does" in finding["message"]


def test_data_of_a_guest_does_not_choose_a_format(box: Path) -> None:
    """A guest turns its raw disk into a qcow2 file that names a file of the host."""
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", str(secret(box)), "-F", "raw",
         "evil", "192k", cwd=box)  # fmt: skip
    evil = (box / "evil").read_bytes()[:SIZE].ljust(SIZE, b"\0")
    (box / "evil.disk").write_bytes(evil)
    (box / IMAGE).write_bytes(evil)
    content = overlay_bytes(image=IMAGE, size=SIZE, backing="evil.disk", local=[0])
    (box / TOP).write_bytes(content)
    with Watch(str(secret(box))) as watch:
        for command in (*READERS, ("flatten",), ("commit", "--force")):
            assert run(box, command).status in (0, 2), command
        assert watch.events() == []
    assert (box / IMAGE).read_bytes()[:CLUSTER] in (evil[:CLUSTER], bytes(CLUSTER))
    assert (box / "evil.disk").read_bytes() == evil


# ---- depth ----

SMALL = 4 * KiB


def deep(here: Path, depth: int, *, base: bool) -> None:
    """Make a chain of so many overlays, over a raw file or over nothing."""
    draw_raw(here / BASE, "AB", cluster=SMALL)
    for level in range(depth):
        last = level == depth - 1
        draw(
            here / (f"{level}.add-cow" if level else TOP),
            "--",
            (BASE if base else "") if last else f"{level + 1}.add-cow",
            backing_format="raw" if last else "add-cow",
            cluster=SMALL,
        )


@pytest.mark.long
@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("depth", [29, 30])
def test_chain_of_thirty_overlays_works(tmp_path: Path, depth: int, base: bool) -> None:
    deep(tmp_path, depth, base=base)
    for command in READERS:
        assert run(tmp_path, command).status == 0, command
    assert look(tmp_path / "new.raw", SMALL) == ("AB" if base else "00")
    chain = json.loads(run(tmp_path, ("info", "--backing-chain", "--output", "json")).stdout)
    assert len(chain) == depth + base
    succeed("flatten", TOP, cwd=tmp_path)
    assert look(tmp_path / IMAGE, SMALL) == ("AB" if base else "00")


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("depth", [31, 200])
def test_deeper_chain_is_refused(tmp_path: Path, depth: int, base: bool) -> None:
    deep(tmp_path, depth, base=base)
    before = snapshot(tmp_path)
    for command in (*READERS, *WRITERS):
        result = run(tmp_path, command)
        assert result.status == (2 if command[0] == "check" else 1), (command, result)
        assert "deeper than 30" in result.said
    assert snapshot(tmp_path) == before


def test_create_makes_no_chain_too_deep_to_open(tmp_path: Path) -> None:
    deep(tmp_path, 30, base=True)
    words = ("create", "-b", TOP, "-F", "add-cow", "higher.add-cow")
    made = addcow(*words, cwd=tmp_path)
    if made.status == 0:  # then it has to be of use
        succeed("map", "higher.add-cow", cwd=tmp_path)
    else:
        assert "deeper than 30" in made.stderr


# ---- names that a terminal or a locale does not like ----


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [b"\xff\xfe.img", b"a\nb", b"\x1b[31mred", "é\u202e".encode(), b" "]
)
def test_file_names_may_have_any_bytes(
    box: Path, name: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")  # as in any locale but C
    shutil.copy(box / BASE, box / os.fsdecode(name))
    write_overlay(box / TOP, backing=os.fsdecode(name))
    for command in (*READERS[:4], *WRITERS[:1]):
        new = ("new.raw",) if command[0] == "convert" else ()
        done = subprocess.run(
            [sys.executable, "-m", "addcow_mp", *command, TOP, *new],
            cwd=box,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b""), command
    assert look(box / "new.raw") == "AXC"


# ---- numbers ----

#: Address space for a command: well above what Python and its libraries take.
ADDRESSES = 1 * GiB
#: Resident memory: the same.
RESIDENT = 200 * MiB


#: Run by Python: addcow within ``sys.argv[1]`` bytes of address space, and at the end what it took
#: of memory, in KiB, into the descriptor ``sys.argv[2]``. The peak that wait4 would tell is also
#: that of the process which started it, before it became another.
LIMITED = """
import os, re, resource, runpy, sys
addresses, fd = map(int, sys.argv[1:3])
del sys.argv[1:3]
resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))
sys.argv[0] = "addcow"
try:
    runpy.run_module("addcow_mp", run_name="__main__")
finally:
    own = re.search(rb"VmHWM:\\s*([0-9]+)", open("/proc/self/status", "rb").read())[1]
    others = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    os.write(fd, b"%d" % max(int(own), others))
"""


def bounded(here: Path, *words: str, addresses: int = ADDRESSES) -> Result:
    """Run addcow with little address space; insist on an answer and on little memory."""
    peak, written = os.pipe()
    try:
        limited = [sys.executable, "-c", LIMITED, str(addresses), str(written), *words]
        done = ran(limited, cwd=here, pass_fds=(written,))
        os.close(written)
        memory = int(os.read(peak, 100)) * KiB
    finally:
        os.close(peak)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode >= 0, f"ended by signal {-done.returncode}"
    assert memory < RESIDENT
    return Result(done.returncode, done.stdout, done.stderr)


HUGE = 2**32 - 1
#: Where the numbers of the header stand, in words of 4 bytes, and what is put there.
NUMBERS = {
    "backing offset": (4, (1, 75, CLUSTER - 1, CLUSTER, 2**31, HUGE)),
    "backing size": (8, (0, 1024, 2**31, HUGE)),
    "image offset": (12, (0, 75, CLUSTER - 1, 2**31, HUGE - 7, HUGE)),
    "image size": (16, (0, 4096, 2**31, HUGE)),
    "cluster bits": (20, (0, 11, 22, 31, 32, 63, 64, 2**31, HUGE)),
    "header size": (40, (0, 76, 4096, 2 * CLUSTER, 2**31, HUGE)),
}


@pytest.mark.parametrize("field", NUMBERS)
def test_header_numbers_are_checked_before_they_cost_anything(box: Path, field: str) -> None:
    at, values = NUMBERS[field]
    sound = (box / TOP).read_bytes()
    for value in values:
        (box / TOP).write_bytes(sound)
        patch(box / TOP, at, struct.pack("<I", value))
        before = snapshot(box)
        for command in (*READERS, *WRITERS):
            result = run(box, command)
            assert result.status == (2 if command[0] == "check" else 1), (value, command, result)
        assert snapshot(box) == before
    patch(box / TOP, at, struct.pack("<I", values[-1]))
    for command in (("map",), ("check",), ("flatten",)):
        assert bounded(box, *command, TOP).status in (1, 2)


@pytest.mark.long
def test_header_with_all_numbers_at_their_largest_is_refused(box: Path) -> None:
    patch(box / TOP, 4, b"\xff" * 40)
    for command in (("info",), ("map",), ("check",), ("commit",)):
        assert bounded(box, *command, TOP).status in (1, 2)


@pytest.mark.long
def test_names_at_the_end_of_four_gigabytes_are_read(box: Path) -> None:
    """Names that lie where the numbers say, in a file that is long enough for them."""
    struct_at = 2**32 - 4096
    os.truncate(box / TOP, 2**33)
    patch(box / TOP, struct_at, b"top.raw")
    patch(box / TOP, 12, struct.pack("<II", struct_at, 7))
    patch(box / TOP, 40, struct.pack("<I", HUGE))
    for command in (("info",), ("map",), ("check",)):
        assert bounded(box, *command, TOP).status in (1, 2)


def make_sparse(here: Path, size: int, cluster: int) -> None:
    """Make an overlay of such a size with one allocated cluster; it takes kilobytes of disk."""
    for name in (BASE, IMAGE):
        (here / name).touch()
        try:
            os.truncate(here / name, size)
        except OSError as error:
            pytest.skip(f"no file of {size} bytes can be made here: {error.strerror}")
    words = ("create", "-b", BASE, "-F", "raw", "-o", f"image_file={IMAGE},cluster_size={cluster}")
    succeed(*words, TOP, cwd=here)


@pytest.mark.long
def test_sparse_image_of_16_tib_costs_little_memory(tmp_path: Path) -> None:
    """Its bitmap is half a gigabyte of zeros, which need not be looked at."""
    make_sparse(tmp_path, 16 * TiB - 4 * KiB, 4 * KiB)
    for command in READERS:
        new = ("new.raw",) if command[0] == "convert" else ()
        assert bounded(tmp_path, *command, TOP, *new, addresses=4 * GiB).status == 0, command
    assert bounded(tmp_path, "commit", TOP, addresses=4 * GiB).status == 0


LARGEST = 2**63 - 512  # what is left of 8 EiB when lengths are signed and sectors whole


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    """A file system whose files can be nearly 8 EiB long."""
    if os.geteuid() != 0 or shutil.which("mkfs.xfs") is None:
        pytest.skip("files of 8 EiB need XFS on a loop device: root and xfsprogs")
    with (tmp_path / "xfs.img").open("wb") as file:
        file.truncate(400 * MiB)
    here = tmp_path / "xfs"
    here.mkdir()
    subprocess.run(["mkfs.xfs", "-q", "xfs.img"], cwd=tmp_path, check=True, capture_output=True)
    words = ["mount", "-o", "loop", "xfs.img", "xfs"]
    made = ran(words, cwd=tmp_path)
    if made.returncode:
        pytest.skip(f"XFS cannot be mounted: {made.stderr.strip()}")
    yield here
    subprocess.run(["umount", str(here)], check=True)


@pytest.mark.long
@pytest.mark.parametrize("cluster", [2 * MiB, 64 * KiB])
def test_last_sector_of_8_eib_is_written(xfs: Path, cluster: int) -> None:
    make_sparse(xfs, LARGEST, cluster)
    last = LARGEST - 512
    io(TOP, f"write -P 0x5a {last} 512", "write -P 0x41 0 512", "flush", cwd=xfs)
    said = io(TOP, f"read -P 0x5a {last} 512", f"read -P 0 {last - 512} 512", cwd=xfs).lines
    assert f"read 512/512 bytes at offset {last}" in said
    number = last // cluster
    with (xfs / TOP).open("rb") as file:
        header = max(4 * KiB, cluster)
        assert os.pread(file.fileno(), 1, header + number // 8) == bytes([1 << number % 8])
        assert os.pread(file.fileno(), 1, header) == b"\1"
    with (xfs / IMAGE).open("rb") as file:
        assert os.pread(file.fileno(), 512, last) == b"\x5a" * 512
    assert "Input/output error" in addcow("io", "-c", f"write {LARGEST} 512", TOP, cwd=xfs).said
    described = succeed("info", "--output", "json", TOP, cwd=xfs).json
    assert described["virtual-size"] == LARGEST
    assert described["format-specific"]["data"]["total-clusters"] == number + 1
    assert described["format-specific"]["data"]["allocated-clusters"] == 2
    assert succeed("check", "--output", "json", TOP, cwd=xfs).json["allocated-clusters"] == 2


@pytest.mark.long
def test_map_of_8_eib(xfs: Path) -> None:
    make_sparse(xfs, LARGEST, 2 * MiB)
    io(TOP, f"write -P 0x5a {LARGEST - 512} 512", "flush", cwd=xfs)
    extents = succeed("map", "--output", "json", TOP, cwd=xfs).json
    assert extents[-1]["start"] + extents[-1]["length"] == LARGEST
    local = next(each["start"] for each in extents if each["depth"] == 0)
    assert local == LARGEST // (2 * MiB) * 2 * MiB


@pytest.mark.long
def test_commit_of_8_eib(xfs: Path) -> None:
    make_sparse(xfs, LARGEST, 2 * MiB)
    io(TOP, f"write -P 0x5a {LARGEST - 512} 512", "write -P 0x41 0 512", "flush", cwd=xfs)
    succeed("commit", TOP, cwd=xfs)
    with (xfs / BASE).open("rb") as file:
        assert os.pread(file.fileno(), 512, LARGEST - 512) == b"\x5a" * 512
        assert os.pread(file.fileno(), 512, 0) == b"\x41" * 512


@pytest.mark.long
def test_flatten_whose_bits_do_not_fit_is_refused_at_once(xfs: Path) -> None:
    """Setting every bit fills the holes of the bitmap: that is known before the first byte."""
    make_sparse(xfs, 512 * TiB, 64 * KiB)
    before = [(path.name, path.stat().st_blocks, path.stat().st_mtime_ns) for path in xfs.iterdir()]
    assert "free" in refused("flatten", TOP, cwd=xfs)
    after = [(path.name, path.stat().st_blocks, path.stat().st_mtime_ns) for path in xfs.iterdir()]
    assert after == before


@pytest.mark.long
def test_sizes_past_8_eib_are_refused(tmp_path: Path) -> None:
    for size in ("8E", "9E", str(2**63), str(2**64), "99999999999999999999999"):
        refused("create", "new.add-cow", size, cwd=tmp_path, status=64)
    refused("create", "new.add-cow", "8E", cwd=tmp_path, status=64)
    assert list(tmp_path.iterdir()) == []


# ---- anything at all ----


@pytest.mark.long
@pytest.mark.parametrize("seed", range(8))
def test_random_bytes_after_the_magic_are_refused_in_one_line(box: Path, seed: int) -> None:
    """The seed stands in the name of the test. `make fuzz` looks further."""
    rng = random.Random(seed)
    for _ in range(12):
        (box / TOP).write_bytes(b"ACOW" + rng.randbytes(rng.choice((10, 72, 200, 5000, 70000))))
        before = snapshot(box)
        for command in READERS:
            assert run(box, command).status in (1, 2), command
        assert snapshot(box) == before
