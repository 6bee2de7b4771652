"""Tests of names inside an image: what each means, and how it is read from a file.

A colon before the first slash is a protocol. A relative name is relative to the directory of the
file that holds it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from addcow_mp import ImageError, path_combine, path_has_protocol, read_string
from support.command import draw, draw_raw, guest_picture, overlay_bytes, refused, succeed
from support.properties import tried

PROPERTY = tried(100)

# No NUL and no slash: what may stand between two slashes of a path.
PARTS = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=9)


@pytest.mark.parametrize("name", [":", "::", ":/", "a:", "a:b", "nbd:host/x", "json:{}", "é:b"])
def test_name_with_a_colon_before_any_slash_has_a_protocol(name: str) -> None:
    assert path_has_protocol(name)


@pytest.mark.parametrize("name", ["", "a", "/", "./a:b", "a/b:c", "/a:b", "/:", "../x:", "a/:"])
def test_other_names_are_paths(name: str) -> None:
    assert not path_has_protocol(name)


@pytest.mark.parametrize(
    ("base", "name", "meant"),
    [
        ("dir/top.add-cow", "base.img", "dir/base.img"),
        ("dir/top.add-cow", "sub/base.img", "dir/sub/base.img"),
        ("dir/top.add-cow", "../base.img", "dir/../base.img"),
        ("dir/top.add-cow", "./a:b", "dir/./a:b"),
        ("/top.add-cow", "base.img", "/base.img"),
        ("a//b", "c", "a//c"),
        ("dir/", "base.img", "dir/base.img"),
        ("dir/top.add-cow", "", "dir/"),
    ],
)
def test_relative_name_is_relative_to_the_directory(base: str, name: str, meant: str) -> None:
    assert path_combine(base, name) == meant


@pytest.mark.parametrize("base", ["top.add-cow", ""])
@pytest.mark.parametrize("name", ["base.img", "sub/base.img", "./a:b", ""])
def test_name_without_a_directory_is_unchanged(base: str, name: str) -> None:
    assert path_combine(base, name) == name


@pytest.mark.parametrize("base", ["", "top.add-cow", "dir/top.add-cow", "nbd:host", "nbd:h/x", ":"])
@pytest.mark.parametrize("name", ["/", "/base.img", "//x", "/a:b"])
def test_absolute_name_is_unchanged(base: str, name: str) -> None:
    assert path_combine(base, name) == name


@pytest.mark.parametrize(
    ("base", "meant"),
    [
        ("nbd:host", "nbd:x"),
        ("nbd:host/export", "nbd:host/x"),
        ("fat:/dir/top", "fat:/dir/x"),
        (":", ":x"),
        ("a:b:c", "a:x"),
        ("./a:b", "./x"),
        ("a/b:c", "a/x"),
    ],
)
def test_protocol_of_the_base_is_kept(base: str, meant: str) -> None:
    assert path_combine(base, "x") == meant


@PROPERTY
@given(st.lists(PARTS, min_size=1, max_size=3), st.lists(PARTS, min_size=1, max_size=3))
def test_names_are_joined_as_paths(base: list[str], name: list[str]) -> None:
    holder = "./" + "/".join(base)
    relative = "/".join(name)
    assert path_combine(holder, relative) == os.path.join(os.path.dirname(holder), relative)


# ---- reading ----


@contextmanager
def holding(path: Path, content: bytes) -> Iterator[int]:
    """A descriptor of a file with this content."""
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def test_name_is_read_at_its_offset(tmp_path: Path) -> None:
    with holding(tmp_path / "file", b"....base.imgtop.raw....") as fd:
        assert read_string(fd, 4, 8, 1024) == "base.img"
        assert read_string(fd, 12, 7, 1024) == "top.raw"
        assert read_string(fd, 19, 4, 1024) == "...."
        assert read_string(fd, 3, 0, 1024) == ""


def test_name_may_have_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    raw = bytes(range(1, 256))
    with holding(tmp_path / "file", raw) as fd:
        assert os.fsencode(read_string(fd, 0, len(raw), 1024)) == raw


@pytest.mark.parametrize("limit", [2, 1024, 4096])
def test_name_and_its_terminator_fit_into_the_limit(tmp_path: Path, limit: int) -> None:
    with holding(tmp_path / "file", b"n" * 5000) as fd:
        assert read_string(fd, 0, limit - 1, limit) == "n" * (limit - 1)
        with pytest.raises(ImageError, match=f"{limit} bytes exceed {limit - 1}"):
            read_string(fd, 0, limit, limit)


@pytest.mark.parametrize(("offset", "length"), [(0, 9), (7, 2), (8, 1), (100, 1)])
def test_truncated_name_is_refused(tmp_path: Path, offset: int, length: int) -> None:
    with (
        holding(tmp_path / "file", b"base.img") as fd,
        pytest.raises(ImageError, match=f"byte {offset}: the file ends inside it"),
    ):
        read_string(fd, offset, length, 1024)


@pytest.mark.parametrize("name", [b"\0", b"\0x", b"x\0", b"base\0.img"])
def test_name_with_a_nul_is_refused(tmp_path: Path, name: bytes) -> None:
    with (
        holding(tmp_path / "file", name) as fd,
        pytest.raises(ImageError, match="it contains a NUL byte"),
    ):
        read_string(fd, 0, len(name), 1024)


# ---- as a user meets them ----


@pytest.mark.parametrize("name", ["a:b.img", ":", "nbd:localhost"])
def test_backing_with_a_protocol_is_refused_with_advice(tmp_path: Path, name: str) -> None:
    draw_raw(tmp_path / name, "A")
    draw(tmp_path / "top.add-cow", "-", backing=name)
    said = refused("map", "top.add-cow", cwd=tmp_path)
    assert f"'{name}' names a protocol" in said
    assert "'./...'" in said


@pytest.mark.parametrize("name", ["a:b.img", ":", "nbd:localhost"])
def test_name_after_dot_slash_is_a_file(tmp_path: Path, name: str) -> None:
    draw_raw(tmp_path / name, "A")
    draw(tmp_path / "top.add-cow", "-", backing=f"./{name}")
    succeed("io", "-r", "-c", "read -P 0x41 0 64k", "top.add-cow", cwd=tmp_path)


def test_names_are_relative_to_the_file_that_holds_them(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    draw_raw(tmp_path / "sub" / "base.img", "A")
    draw(tmp_path / "sub" / "top.add-cow", "-")
    assert guest_picture(tmp_path / "sub" / "top.add-cow") == "A"
    succeed("io", "-r", "-c", "read -P 0x41 0 64k", "sub/top.add-cow", cwd=tmp_path)


def test_name_outside_every_character_set_is_opened(tmp_path: Path) -> None:
    name = os.fsdecode(b"disk-\xff\xfe.raw")
    draw_raw(tmp_path / name, "A")
    content = overlay_bytes(image=name, size=64 * 1024, local=[0])
    (tmp_path / "top.add-cow").write_bytes(content)
    succeed("io", "-r", "-c", "read -P 0x41 0 64k", "top.add-cow", cwd=tmp_path)
