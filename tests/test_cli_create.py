"""Tests of `addcow create`: its output, the files it makes, and what it refuses.

Every file is compared with bytes that the tests put together. A refused create leaves no file and
changes none.
"""

import os
from pathlib import Path

import pytest

from support.command import (
    ALL_ALLOCATED,
    CLUSTER,
    USAGE,
    GiB,
    KiB,
    MiB,
    TiB,
    addcow,
    draw,
    draw_raw,
    guest_picture,
    look,
    overlay_bytes,
    read_header,
    refused,
    snapshot,
    stored_bytes,
    succeed,
    tool,
)

pytestmark = pytest.mark.sample(1)

BASE = ("-b", "base.img", "-F", "raw")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory with base.img, four clusters of data."""
    draw_raw(tmp_path / "base.img", "ABCD")
    return tmp_path


def refused_untouched(*arguments: str, cwd: Path, status: tuple[int, ...] = (1,)) -> str:
    """Refuse a create, with nothing in the directory changed, added or gone."""
    before = snapshot(cwd)
    result = addcow("create", *arguments, cwd=cwd)
    assert result.status in status, result
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("addcow: ")
    assert snapshot(cwd) == before
    return result.stderr


# ---- what it prints and writes ----


@pytest.mark.parametrize(
    "options",
    [
        ("-b", "base.img", "-F", "raw"),
        ("-f", "add-cow", "-b", "base.img", "-F", "raw"),
        ("-o", "backing_file=base.img,backing_fmt=raw"),
        ("-o", "backing_file=base.img", "-o", "backing_fmt=raw"),
        ("-o", "image_file=top.raw,image_fmt=raw,cluster_size=64K", "-b", "base.img", "-F", "raw"),
    ],
)
def test_create_options_and_o_option_make_the_same_file(
    here: Path, options: tuple[str, ...]
) -> None:
    before = (here / "base.img").stat()
    result = succeed("create", *options, "top.add-cow", "1M", cwd=here)
    assert result.stdout == (
        "Formatting 'top.add-cow', fmt=add-cow size=1048576 backing_file='base.img'"
        " image_file='top.raw' cluster_size=65536\n"
    )
    assert (here / "top.add-cow").read_bytes() == overlay_bytes(
        image="top.raw", size=MiB, backing="base.img"
    )
    assert (here / "top.raw").read_bytes() == bytes(MiB)
    assert stored_bytes(here / "top.raw") == 0
    after = (here / "base.img").stat()
    assert (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size)


def test_create_options_may_follow_the_file(here: Path) -> None:
    first = succeed("create", "top.add-cow", "1M", *BASE, cwd=here)
    assert "backing_file='base.img'" in first.stdout
    assert (here / "top.raw").stat().st_size == MiB


def test_create_without_a_backing_sets_all_allocated(tmp_path: Path) -> None:
    result = succeed("create", "top.add-cow", "1M", cwd=tmp_path)
    assert result.stdout == (
        "Formatting 'top.add-cow', fmt=add-cow size=1048576 image_file='top.raw'"
        " cluster_size=65536\n"
    )
    assert (tmp_path / "top.add-cow").read_bytes() == overlay_bytes(
        image="top.raw", size=MiB, compatible=ALL_ALLOCATED
    )


def test_create_quiet_prints_nothing(here: Path) -> None:
    result = succeed("create", "-q", *BASE, "top.add-cow", "1M", cwd=here)
    assert result.said == ""
    assert (here / "top.add-cow").exists()


@pytest.mark.parametrize("file", [(), ("top.add-cow", "1M")])
def test_create_help_lists_the_options_and_creates_nothing(
    tmp_path: Path, file: tuple[str, ...]
) -> None:
    listed = succeed("create", "-o", "help", *file, cwd=tmp_path).stdout
    for option in ("backing_file", "backing_fmt", "image_file", "image_fmt", "cluster_size"):
        assert option in listed
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(
    ("cluster", "size", "length"),
    [
        (4 * KiB, 128 * MiB, 8192),
        (4 * KiB, 128 * MiB + 512, 12288),
        (4 * KiB, GiB, 36864),
        (4 * KiB, TiB, 33558528),
        (64 * KiB, 0, 65536),
        (64 * KiB, GiB, 131072),
        (64 * KiB, TiB, 2162688),
        (2 * MiB, TiB, 4194304),
    ],
)
def test_created_file_has_the_length_of_header_and_bitmap(
    tmp_path: Path, cluster: int, size: int, length: int
) -> None:
    result = succeed(
        "create", "-o", f"cluster_size={cluster}", "top.add-cow", str(size), cwd=tmp_path
    )
    assert result.stdout.endswith(f" cluster_size={cluster}\n")
    assert f" size={size} " in result.stdout
    assert (tmp_path / "top.add-cow").stat().st_size == length
    assert (tmp_path / "top.raw").stat().st_size == size
    assert stored_bytes(tmp_path / "top.raw") == 0


@pytest.mark.parametrize(
    ("said", "cluster"), [("4k", 4 * KiB), ("128K", 128 * KiB), ("2M", 2 * MiB)]
)
def test_cluster_size_takes_suffixes(here: Path, said: str, cluster: int) -> None:
    options = f"backing_file=base.img,backing_fmt=raw,cluster_size={said}"
    succeed("create", "-o", options, "top.add-cow", "1M", cwd=here)
    assert (here / "top.add-cow").read_bytes() == overlay_bytes(
        image="top.raw", size=MiB, backing="base.img", cluster=cluster
    )


# ---- names ----


@pytest.mark.parametrize(
    ("file", "image"),
    [
        ("disk.add-cow", "disk.raw"),
        ("disk", "disk.raw"),
        ("disk.v2.add-cow", "disk.v2.raw"),
        ("below/disk.cow", "disk.raw"),
    ],
)
def test_default_image_stands_beside_the_file(tmp_path: Path, file: str, image: str) -> None:
    (tmp_path / "below").mkdir()
    succeed("create", file, "64K", cwd=tmp_path)
    path = tmp_path / file
    assert read_header(path).image == image
    assert (path.parent / image).stat().st_size == 64 * KiB


def test_relative_names_are_stored_relative(here: Path) -> None:
    (here / "images").mkdir()
    base, image = "./base.img", "images/../images//top.img"
    options = f"backing_file={base},backing_fmt=raw,image_file={image}"
    result = succeed("create", "-o", options, "top.add-cow", cwd=here)
    assert f"backing_file='{base}' image_file='{image}'" in result.stdout
    header = read_header(here / "top.add-cow")
    assert (header.backing, header.image) == ("base.img", "images/top.img")


def test_absolute_names_are_stored_as_typed(here: Path) -> None:
    for name in ("overlays", "images"):
        (here / name).mkdir()
    base, image = f"/{here}/./base.img", str(here / "overlays" / ".." / "images" / "top.raw")
    options = f"backing_file={base},backing_fmt=raw,image_file={image}"
    succeed("create", "-o", options, str(here / "overlays" / "top.add-cow"), cwd=here)
    header = read_header(here / "overlays" / "top.add-cow")
    assert (header.backing, header.image) == (base, image)
    assert guest_picture(here / "overlays" / "top.add-cow") == "ABCD"


def test_doubled_commas_stand_for_one(tmp_path: Path) -> None:
    draw_raw(tmp_path / "a,b.img", "AB")
    options = "backing_file=a,,b.img,backing_fmt=raw,image_file=c,,,,d.raw"
    succeed("create", "-o", options, "top.add-cow", cwd=tmp_path)
    header = read_header(tmp_path / "top.add-cow")
    assert (header.backing, header.image) == ("a,b.img", "c,,d.raw")
    assert (tmp_path / "c,,d.raw").stat().st_size == 2 * CLUSTER


# ---- sizes ----


@pytest.mark.parametrize(
    ("said", "size"),
    [
        ("512", 512),
        ("64k", 64 * KiB),
        ("64K", 64 * KiB),
        ("1M", MiB),
        ("1.5G", 3 * GiB // 2),
        ("2T", 2 * TiB),
    ],
)
def test_size_takes_suffixes(tmp_path: Path, said: str, size: int) -> None:
    result = succeed("create", "top.add-cow", said, cwd=tmp_path)
    assert f" size={size} " in result.stdout
    assert (tmp_path / "top.raw").stat().st_size == size


@pytest.mark.parametrize("said", ["12x", "1.5.5M", "abc", "", "-1"])
def test_create_with_an_invalid_size_is_a_usage_error(tmp_path: Path, said: str) -> None:
    refused_untouched("top.add-cow", said, cwd=tmp_path, status=(USAGE,))


def test_size_defaults_to_the_backings_whole_sectors(here: Path) -> None:
    os.truncate(here / "base.img", 3 * CLUSTER + 512 + 100)
    result = succeed("create", *BASE, "top.add-cow", cwd=here)
    assert f" size={3 * CLUSTER + 1024} " in result.stdout
    assert (here / "top.raw").stat().st_size == 3 * CLUSTER + 1024


def test_size_defaults_to_an_add_cow_backings_view(here: Path) -> None:
    draw(here / "mid.add-cow", "--X---")
    succeed("create", "-b", "mid.add-cow", "-F", "add-cow", "top.add-cow", cwd=here)
    assert read_header(here / "top.add-cow").backing_format == "add-cow"
    assert guest_picture(here / "top.add-cow") == "ABXD00"


def test_size_defaults_to_the_images_first(here: Path) -> None:
    draw_raw(here / "top.raw", "------")
    result = succeed("create", *BASE, "top.add-cow", cwd=here)
    assert f" size={6 * CLUSTER} " in result.stdout
    assert guest_picture(here / "top.add-cow") == "ABCD00"


def test_create_without_any_size_is_refused(tmp_path: Path) -> None:
    message = refused_untouched("top.add-cow", cwd=tmp_path, status=(1, USAGE))
    assert "size" in message.lower()


# ---- what was there before ----


def test_create_uses_an_existing_image_as_the_disk(tmp_path: Path) -> None:
    draw_raw(tmp_path / "disk.img", "AB-D")
    succeed("create", "-o", "image_file=disk.img", "disk.add-cow", cwd=tmp_path)
    assert look(tmp_path / "disk.img") == "AB0D"
    assert guest_picture(tmp_path / "disk.add-cow") == "AB0D"


@pytest.mark.parametrize("size", [(), ("256K",), ("128K",), ("0",)])
def test_create_never_shrinks_or_overwrites_an_existing_image(
    here: Path, size: tuple[str, ...]
) -> None:
    draw_raw(here / "top.raw", "WXYZ")
    addcow("create", *BASE, "top.add-cow", *size, cwd=here)
    assert look(here / "top.raw") == "WXYZ"


def test_existing_file_is_refused(here: Path) -> None:
    draw(here / "top.add-cow", "-X--")
    assert "top.add-cow" in refused_untouched(*BASE, "top.add-cow", "1M", cwd=here)
    assert "base.img" in refused_untouched("base.img", "1M", cwd=here)


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_create_compares_image_and_backing_by_inode(here: Path, link: object) -> None:
    assert callable(link)
    link(here / "base.img", here / "other.img")
    refused_untouched(*BASE, "-o", "image_file=other.img", "top.add-cow", cwd=here)
    refused_untouched(*BASE, "-o", "image_file=./base.img", "top.add-cow", cwd=here)
    assert look(here / "base.img") == "ABCD"


@pytest.mark.parametrize(
    "arguments",
    [
        (*BASE, "top.raw"),
        (*BASE, "-o", "image_file=./top.add-cow", "top.add-cow"),
        ("-b", "top.add-cow", "-F", "raw", "top.add-cow", "1M"),
    ],
)
def test_create_refuses_one_file_in_two_roles(here: Path, arguments: tuple[str, ...]) -> None:
    refused_untouched(*arguments, cwd=here)


# ---- refusals ----


@pytest.mark.parametrize("name", ["nbd:localhost:10809", "json:{}", "file:base.img"])
def test_create_refuses_names_with_a_protocol(here: Path, name: str) -> None:
    draw_raw(here / name, "PQ")
    backing = refused_untouched("-b", name, "-F", "raw", "top.add-cow", "1M", cwd=here)
    image = refused_untouched("-o", f"image_file={name}", "top.add-cow", "1M", cwd=here)
    assert name in backing
    assert name in image


@pytest.mark.parametrize("options", [("-b", "base.img"), ("-o", "backing_file=base.img")])
def test_backing_needs_its_format(here: Path, options: tuple[str, ...]) -> None:
    message = refused_untouched(*options, "top.add-cow", cwd=here, status=(1, USAGE))
    assert "format" in message


@pytest.mark.parametrize("size", ["2K", "4M", "5000", "0"])
def test_cluster_size_is_a_power_of_two_from_4k_to_2m(here: Path, size: str) -> None:
    message = refused_untouched(
        *BASE, "-o", f"cluster_size={size}", "top.add-cow", cwd=here, status=(1, USAGE)
    )
    assert "cluster" in message


@pytest.mark.parametrize("size", ["-4096", "big", "64X"])
def test_cluster_size_is_a_size(here: Path, size: str) -> None:
    message = refused_untouched(
        *BASE, "-o", f"cluster_size={size}", "top.add-cow", cwd=here, status=(1, USAGE)
    )
    assert f"'{size}'" in message


@pytest.mark.parametrize("option", ["bogus=1", "backing_file", "=x", "preallocation=full"])
def test_create_with_an_unknown_option_is_a_usage_error(here: Path, option: str) -> None:
    refused_untouched(*BASE, "-o", option, "top.add-cow", cwd=here, status=(USAGE,))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("-b", "gone.img", "-F", "raw"), "gone.img"),
        (("-b", "folder", "-F", "raw"), "folder"),
        (("-b", "base.img", "-F", "add-cow"), "base.img"),
        (("-b", "base.img", "-F", "nosuch"), "nosuch"),
        ((*BASE, "-o", "image_file=gone/top.raw"), "gone"),
        ((*BASE, "-o", "image_file=folder"), "folder"),
        ((*BASE, "-o", "image_fmt=qcow2"), "qcow2"),
    ],
)
def test_failed_create_names_the_cause_and_leaves_nothing(
    here: Path, options: tuple[str, ...], named: str
) -> None:
    (here / "folder").mkdir()
    message = refused_untouched(*options, "top.add-cow", "1M", cwd=here, status=(1, USAGE))
    assert named in message


def test_file_in_a_missing_directory_leaves_no_image(here: Path) -> None:
    options = f"image_file={here}/top.raw"
    refused_untouched(*BASE, "-o", options, "gone/top.add-cow", "1M", cwd=here)


def test_backing_names_end_at_1023_bytes(tmp_path: Path) -> None:
    below = Path(*["d" * 250] * 4)
    (tmp_path / below).mkdir(parents=True)
    # 4 * 250 and 4 slashes are 1004 bytes: a name of 19 is the last that fits.
    fits, too_long = str(below / ("b" * 19)), str(below / ("b" * 20))
    for name in (fits, too_long):
        draw_raw(tmp_path / name, "A")
    message = refused_untouched("-b", too_long, "-F", "raw", "top.add-cow", cwd=tmp_path)
    assert "1023" in message
    succeed("create", "-b", fits, "-F", "raw", "top.add-cow", cwd=tmp_path)
    assert read_header(tmp_path / "top.add-cow").backing == fits


def test_names_have_to_fit_into_the_header(tmp_path: Path) -> None:
    image = Path(*["i" * 250] * 12) / ("i" * 200)
    backing = Path(*["b" * 250] * 3) / ("b" * 250)
    (tmp_path / backing).parent.mkdir(parents=True)
    (tmp_path / image).parent.mkdir(parents=True)
    draw_raw(tmp_path / backing, "A")
    options = f"backing_file={backing},backing_fmt=raw,image_file={image}"
    # 3212 and 1003 bytes of names: too many for a header of 4 KiB, not for one of 8.
    refused_untouched("-o", f"{options},cluster_size=4k", "top.add-cow", cwd=tmp_path)
    succeed("create", "-o", f"{options},cluster_size=8k", "top.add-cow", cwd=tmp_path)
    header = read_header(tmp_path / "top.add-cow")
    assert (header.backing, header.image) == (str(backing), str(image))


def test_size_beyond_the_file_system_leaves_nothing(tmp_path: Path) -> None:
    trial = tmp_path / "trial"
    trial.touch()
    try:
        os.truncate(trial, 1024 * TiB)
    except OSError:
        trial.unlink()
    else:
        pytest.skip("this file system holds a file of 1 PiB")
    assert "top.raw" in refused_untouched("top.add-cow", str(1024 * TiB), cwd=tmp_path)


# ---- create -f raw ----


def test_create_raw_makes_a_sparse_file(tmp_path: Path) -> None:
    result = succeed("create", "-f", "raw", "x.raw", "1M", cwd=tmp_path)
    assert result.stdout == "Formatting 'x.raw', fmt=raw size=1048576\n"
    assert (tmp_path / "x.raw").read_bytes() == bytes(MiB)
    assert stored_bytes(tmp_path / "x.raw") == 0
    assert '"format": "raw"' in tool("qemu-img", "info", "--output=json", "x.raw", cwd=tmp_path)


@pytest.mark.long
def test_create_raw_refuses_options_of_an_overlay(here: Path) -> None:
    refused_untouched("-f", "raw", "base.img", "1M", cwd=here)
    refused_untouched("-f", "raw", *BASE, "x.raw", "1M", cwd=here, status=(1, USAGE))
    refused_untouched("-f", "raw", "x.raw", cwd=here, status=(1, USAGE))


def test_create_refuses_other_formats_by_name(tmp_path: Path) -> None:
    assert "qcow2" in refused("create", "-f", "qcow2", "x.qcow2", "1M", cwd=tmp_path, status=USAGE)
    assert snapshot(tmp_path) == {}
