"""Tests of special file names, and of files that begin like another format."""

from pathlib import Path

import pytest

from support.command import MiB, addcow, draw, draw_raw, pair, refused, succeed

pytestmark = pytest.mark.sample(1)

MAGICS = {"qcow2": b"QFI\xfb\0\0\0\3", "luks": b"LUKS\xba\xbe\0\1", "add-cow": b"ACOW"}


def disguised(path: Path, seems: str) -> None:
    """Make a file of 1 MiB that begins as another format does."""
    path.write_bytes(MAGICS[seems].ljust(MiB, b"\0"))


@pytest.mark.parametrize("seems", MAGICS)
@pytest.mark.parametrize(
    "words",
    [
        ("-b", "disk", "-F", "raw"),
        ("-o", "image_file=disk"),
        ("-o", "backing_file=disk,backing_fmt=raw"),
    ],
)
def test_create_refuses_a_raw_backing_that_begins_like_another_format(
    tmp_path: Path, words: tuple[str, ...], seems: str
) -> None:
    disguised(tmp_path / "disk", seems)
    before = (tmp_path / "disk").read_bytes()
    line = refused("create", *words, "top.add-cow", cwd=tmp_path)
    assert "disk: it is called raw" in line
    assert seems in line
    assert "--force" in line
    assert [one.name for one in tmp_path.iterdir()] == ["disk"]
    assert (tmp_path / "disk").read_bytes() == before
    succeed("create", "--force", *words, "top.add-cow", cwd=tmp_path)
    assert addcow("check", "top.add-cow", cwd=tmp_path).status == 2


def test_create_refuses_a_chain_on_such_a_backing(tmp_path: Path) -> None:
    disguised(tmp_path / "disk", "qcow2")
    succeed("create", "--force", "-b", "disk", "-F", "raw", "mid.add-cow", cwd=tmp_path)
    line = refused("create", "-b", "mid.add-cow", "-F", "add-cow", "top.add-cow", cwd=tmp_path)
    assert "begins as qcow2" in line
    assert not (tmp_path / "top.add-cow").exists()


@pytest.mark.long
@pytest.mark.parametrize("job", ["convert", "manifest"])
def test_overlay_given_as_raw_is_refused(tmp_path: Path, job: str) -> None:
    pair(tmp_path, "A", "X")
    words = {
        "convert": ("convert", "-f", "raw", "-O", "raw", "top.add-cow", "new.raw"),
        "manifest": ("manifest", "create", "-f", "raw", "top.add-cow"),
    }[job]
    before = {one.name for one in tmp_path.iterdir()}
    assert "begins as add-cow does" in refused(*words, cwd=tmp_path)
    assert {one.name for one in tmp_path.iterdir()} == before
    succeed(*words, "--force", cwd=tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("1M",),
        ("-o", "cluster_size=3"),
        ("nonsense",),
        ("-b", "missing", "-F", "raw"),
        ("-b", "missing"),
        ("-f", "raw"),
        ("-f", "raw", "nonsense"),
        ("-o", "image_fmt=qcow2"),
        ("-o", "image_file="),
    ],
)
def test_create_refuses_an_existing_file(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "top.add-cow").write_bytes(b"something")
    place = 0 if words in ((), ("1M",), ("nonsense",)) else 2
    line = refused("create", *words[:place], "top.add-cow", *words[place:], cwd=tmp_path)
    assert "top.add-cow: it exists already" in line
    assert (tmp_path / "top.add-cow").read_bytes() == b"something"


DASHES = [
    ("create", "-", "1M"),
    ("create", "-b", "-", "-F", "raw", "new.add-cow"),
    ("create", "-o", "image_file=-", "new.add-cow", "1M"),
    ("create", "-o", "backing_file=-,backing_fmt=raw", "new.add-cow", "1M"),
    ("info", "-"),
    ("map", "-"),
    ("check", "-"),
    ("verify", "-"),
    ("io", "-c", "length", "-"),
    ("commit", "-"),
    ("flatten", "-"),
    ("convert", "-O", "raw", "top.add-cow", "-"),
    ("convert", "-O", "raw", "-", "new.raw"),
    ("compare", "-", "top.add-cow"),
    ("compare", "top.add-cow", "-"),
    ("manifest", "create", "-"),
    ("farm", "ls", "-"),
    ("farm", "check", ".", "-"),
    ("farm", "commit", "--log", "-", "."),
    ("farm", "scrub", "run", "--state", "-", "."),
    ("farm", "scrub", "status", "--state", "-"),
]


@pytest.mark.parametrize("words", DASHES, ids=" ".join)
def test_dash_is_not_a_file_name(tmp_path: Path, words: tuple[str, ...]) -> None:
    pair(tmp_path, "A", "X")
    before = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
    line = refused(*words, cwd=tmp_path, status=64)
    assert "'-' is not a file name" in line
    assert "./-" in line
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == before


def test_file_called_dash_can_be_named_with_a_path(tmp_path: Path) -> None:
    pair(tmp_path, "A", "X")
    succeed("convert", "-O", "raw", "top.add-cow", "./-", cwd=tmp_path)
    succeed("compare", "-F", "raw", "top.add-cow", "./-", cwd=tmp_path)


# -q


@pytest.mark.parametrize(
    "words",
    [
        ("commit", "-t", "unsafe", "top.add-cow"),
        ("flatten", "-t", "unsafe", "top.add-cow"),
        ("convert", "-t", "unsafe", "-O", "raw", "top.add-cow", "new.raw"),
        ("farm", "commit", "-t", "unsafe", "top.add-cow"),
        ("farm", "flatten", "-t", "unsafe", "top.add-cow"),
        ("verify", "top.add-cow"),
        ("farm", "verify", "top.add-cow"),
        ("check", "-r", "all", "top.add-cow"),
        ("compare", "top.add-cow", "top.add-cow"),
        ("farm", "check", "."),
        ("manifest", "create", "top.add-cow"),
    ],
    ids=" ".join,
)
def test_quiet_prints_no_warnings(tmp_path: Path, words: tuple[str, ...]) -> None:
    draw_raw(tmp_path / "base.img", "ABCD")
    draw(tmp_path / "top.add-cow", "X--X")
    if "verify" in words:
        succeed("manifest", "create", "top.add-cow", cwd=tmp_path)
        (tmp_path / "base.img").touch()
    if words[0] == "check":
        with (tmp_path / "top.add-cow").open("r+b") as file:
            file.seek(65536)
            file.write(b"\xff")
    where = 2 if words[0] == "farm" else 1
    if words[:2] == ("manifest", "create"):
        where = 2
    result = addcow(*words[:where], "-q", *words[where:], cwd=tmp_path)
    assert (result.status, result.said) == (0, ""), result
