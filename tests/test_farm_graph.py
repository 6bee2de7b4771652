"""Tests of `addcow farm graph`: the tree, JSON, dot and SVG."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from support.command import (
    ALL_ALLOCATED,
    CLUSTER,
    PATIENCE,
    draw,
    draw_raw,
    overlay_bytes,
    put,
    refused,
    snapshot,
    succeed,
    tool,
)

pytestmark = pytest.mark.sample(1)

SVG = "{http://www.w3.org/2000/svg}"
FORMS = ("human", "json", "jsonl", "dot", "svg")
EPOCH = 1_000_000_000_000_000_000


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    """A base, two overlays over it, and one over an overlay, written from the base up."""
    here = tmp_path / "farm"
    here.mkdir()
    draw_raw(here / "base.img", "ABCD")
    draw(here / "one.add-cow", "X---")
    draw(here / "two.add-cow", "XY--")
    draw(here / "three.add-cow", "X---", "two.add-cow", backing_format="add-cow")
    for age, name in enumerate(("base.img", "one", "two", "three")):
        written(here, name, age)
    return here


def written(here: Path, name: str, second: int) -> None:
    """Let the files of ``name``, a raw file or an overlay, be as old as that."""
    names = (name,) if "." in name else (f"{name}.add-cow", f"{name}.raw")
    for each in names:
        os.utime(here / each, ns=(EPOCH, EPOCH + second))


def tree(*words: str, cwd: Path) -> list[str]:
    return succeed("farm", "graph", *words, cwd=cwd).stdout.splitlines()


def graph(*words: str, cwd: Path) -> dict[str, Any]:
    document: dict[str, Any] = succeed("farm", "graph", "--output", "json", *words, cwd=cwd).json
    assert set(document) == {"images", "files", "summary"}
    return document


def marked(document: dict[str, Any]) -> dict[str, list[str]]:
    """The marks of all files that have any."""
    found = [*document["images"], *document["files"]]
    names = [one["filename"] for one in found]
    assert len(names) == len(set(names))
    return {one["filename"].removeprefix("./"): one["marks"] for one in found if one["marks"]}


def marks(*words: str, cwd: Path) -> dict[str, list[str]]:
    return marked(graph(*words, cwd=cwd))


def counted(document: dict[str, Any]) -> dict[str, int]:
    return {key: count for key, count in document["summary"].items() if count}


def page_of(*words: str, cwd: Path) -> ET.Element:
    page = ET.fromstring(  # noqa: S314 - our own
        succeed("farm", "graph", "--output", "svg", *words, cwd=cwd).stdout
    )
    assert page.tag == f"{SVG}svg"
    return page


def picture(*words: str, cwd: Path) -> list[tuple[int, str]]:
    """The rows of the picture: how far from the left, and what is written there."""
    page = page_of(*words, cwd=cwd)
    texts = [row.find(f"{SVG}text") for row in page.iter(f"{SVG}g")]
    return [(int(text.attrib["x"]), "".join(text.itertext())) for text in texts if text is not None]


def digraph(*words: str, cwd: Path) -> str:
    return succeed("farm", "graph", "--output", "dot", *words, cwd=cwd).stdout


# ---- the tree ----


def test_tree_starts_at_files_without_backing(farm: Path) -> None:
    before = snapshot(farm)
    assert tree(".", cwd=farm) == [
        "./base.img  256 KiB  raw",
        "├── ./one.add-cow  256 KiB  25.0% local",
        "└── ./two.add-cow  256 KiB  50.0% local",
        "    └── ./three.add-cow  256 KiB  25.0% local",
    ]
    assert snapshot(farm) == before


def test_tree_lines_pass_nested_overlays(farm: Path) -> None:
    draw(farm / "over.add-cow", "----", "one.add-cow", backing_format="add-cow")
    assert tree(".", cwd=farm)[1:4] == [
        "├── ./one.add-cow  256 KiB  25.0% local",
        "│   └── ./over.add-cow  256 KiB  0.0% local",
        "└── ./two.add-cow  256 KiB  50.0% local",
    ]


def test_graph_json_has_the_keys_of_ls(farm: Path) -> None:
    document = graph(".", cwd=farm)
    images = {one["filename"]: one for one in document["images"]}
    assert list(images) == ["./one.add-cow", "./three.add-cow", "./two.add-cow"]
    assert images["./two.add-cow"] == {
        "filename": "./two.add-cow",
        "image": "two.raw",
        "full-image-filename": "./two.raw",
        "backing-filename": "base.img",
        "full-backing-filename": "./base.img",
        "depth": 0,
        "virtual-size": 4 * CLUSTER,
        "local-size": 2 * CLUSTER,
        "percent-local": 50.0,
        "state": "overlay",
        "overlays": ["./three.add-cow"],
        "marks": [],
    }
    assert document["files"] == [
        {
            "filename": "./base.img",
            "kind": "backing",
            "format": "raw",
            "virtual-size": 4 * CLUSTER,
            "overlays": ["./one.add-cow", "./two.add-cow"],
            "marks": [],
        }
    ]
    assert counted(document) == {"images": 3, "files": 1}
    lines = succeed("farm", "graph", "--output", "jsonl", ".", cwd=farm).stdout.splitlines()
    assert [json.loads(line) for line in lines] == document["images"]


def test_dot_has_an_edge_from_each_overlay_to_its_backing_file(farm: Path) -> None:
    text = digraph(".", cwd=farm)
    assert text.startswith("digraph farm {\n")
    assert [line.strip() for line in text.splitlines() if "->" in line] == [
        '"./one.add-cow" -> "./base.img";',
        '"./three.add-cow" -> "./two.add-cow";',
        '"./two.add-cow" -> "./base.img";',
    ]


def test_svg_has_a_row_for_each_file(farm: Path) -> None:
    assert picture(".", cwd=farm) == [
        (10, "./base.img  256 KiB  raw"),
        (30, "./one.add-cow  256 KiB  25.0% local"),
        (30, "./two.add-cow  256 KiB  50.0% local"),
        (50, "./three.add-cow  256 KiB  25.0% local"),
    ]
    page = page_of(".", cwd=farm)
    assert len(list(page.iter(f"{SVG}path"))) == 3
    tips = [row.findtext(f"{SVG}title", "") for row in page.iter(f"{SVG}g")]
    assert "image file: one.raw" in tips[1].splitlines()
    assert "backing file: base.img" in tips[1].splitlines()
    assert int(page.attrib["height"]) >= 4 * 20
    assert int(page.attrib["width"]) > 50 + len("./three.add-cow  256 KiB  25.0% local") * 7


# ---- who is who ----


def test_graph_identifies_files_by_inode(farm: Path) -> None:
    (farm / "deep").mkdir()
    os.link(farm / "base.img", farm / "deep" / "golden.img")
    (farm / "deep" / "link.img").symlink_to("../base.img")
    draw(farm / "deep" / "hard.add-cow", "X---", "golden.img")
    draw(farm / "deep" / "soft.add-cow", "X---", "link.img")
    draw(farm / "deep" / "far.add-cow", "X---", str(farm / "deep" / ".." / "base.img"))
    os.link(farm / "one.add-cow", farm / "one-again.add-cow")
    document = graph(".", cwd=farm)
    (base,) = document["files"]
    assert [name.rpartition("/")[2] for name in base["overlays"]] == [
        "far.add-cow",
        "hard.add-cow",
        "soft.add-cow",
        "one-again.add-cow",
        "two.add-cow",
    ]
    assert len(tree(".", str(farm), "one.add-cow", cwd=farm)) == 7


def test_graph_of_one_file_shows_its_chain(farm: Path) -> None:
    (farm / "list").write_text("three.add-cow\n")
    assert tree("--from-file", "list", cwd=farm) == [
        "base.img  256 KiB  raw",
        "└── two.add-cow  256 KiB  50.0% local",
        "    └── three.add-cow  256 KiB  25.0% local",
    ]
    document = graph("three.add-cow", cwd=farm)
    assert [one["filename"] for one in document["images"]] == ["three.add-cow"]
    assert [(one["filename"], one["format"], one["overlays"]) for one in document["files"]] == [
        ("base.img", "raw", ["two.add-cow"]),
        ("two.add-cow", "add-cow", ["three.add-cow"]),
    ]


@pytest.mark.long
def test_outside_file_is_not_opened_without_root(farm: Path) -> None:
    outside = farm.parent / "outside"
    outside.mkdir()
    draw_raw(outside / "far.img", "ABCD")
    draw(outside / "far.add-cow", "X---", "far.img")
    top = farm / "top.add-cow"
    draw(top, "----", "../outside/far.add-cow", backing_format="add-cow")
    assert tree(".", cwd=farm)[:2] == [
        "./../outside/far.add-cow  ?  ? local  [unexamined]",
        "└── ./top.add-cow  256 KiB  0.0% local",
    ]
    document = graph(".", cwd=farm)
    assert counted(document)["unexamined"] == 1
    (far,) = (one for one in document["files"] if one["kind"] == "backing" and one["marks"])
    assert "--root" in far["problem"]
    assert tree("--root", "../outside", ".", cwd=farm)[:3] == [
        "./../outside/far.img  256 KiB  raw",
        "└── ./../outside/far.add-cow  256 KiB  25.0% local",
        "    └── ./top.add-cow  256 KiB  0.0% local",
    ]


def test_files_of_other_formats_are_shown_with_their_format(farm: Path) -> None:
    (farm / "disk.qcow2").write_bytes(b"QFI\xfb\0\0\0\3")
    draw(farm / "one.add-cow", "X---", "disk.qcow2", backing_format="qcow2")
    assert tree(".", cwd=farm)[3] == "./disk.qcow2  ?  qcow2"


def test_all_allocated_overlay_has_no_backing_in_the_graph(farm: Path) -> None:
    """Its backing file may be gone; while it is there, it is not unnamed."""
    draw_raw(farm / "old.img", "ABCD")
    draw(farm / "one.add-cow", "XXXX", "old.img", compatible=ALL_ALLOCATED)
    draw(farm / "lone.add-cow", "XXXX", "gone.img", compatible=ALL_ALLOCATED)
    lines = tree(".", cwd=farm)
    assert "./one.add-cow  256 KiB  100.0% local" in lines
    assert "./lone.add-cow  256 KiB  100.0% local" in lines
    assert "./old.img  256 KiB  raw" in lines
    assert marks(".", cwd=farm) == {}


# ---- marks ----


def test_missing_backing_is_shown_as_a_root(farm: Path) -> None:
    draw(farm / "lost.add-cow", "X---", "gone.img")
    draw(farm / "lost-too.add-cow", "X---", f"{farm}/./gone.img")
    lines = tree(".", cwd=farm)
    assert lines[4:] == [
        f"{farm}/./gone.img  ?  raw  [missing-backing]",
        "├── ./lost-too.add-cow  256 KiB  25.0% local  [missing-backing]",
        "└── ./lost.add-cow  256 KiB  25.0% local  [missing-backing]",
    ]
    document = graph(".", cwd=farm)
    (gone,) = (one for one in document["files"] if one["kind"] == "missing")
    assert gone["overlays"] == ["./lost-too.add-cow", "./lost.add-cow"]
    assert counted(document) == {"images": 5, "files": 2, "missing-backing": 2}
    edges = [line for line in digraph(".", cwd=farm).splitlines() if "->" in line]
    assert ["style=dashed" in line for line in edges] == [True, True, False, False, False]
    rows = [text for _, text in picture(".", cwd=farm)]
    assert [text.endswith(" [missing-backing]") for text in rows] == [False] * 4 + [True] * 3


def test_name_with_a_protocol_is_shown_and_not_followed(farm: Path) -> None:
    draw(farm / "net.add-cow", "X---", "nbd:host:10809")
    assert tree(".", cwd=farm)[-2:] == [
        "nbd:host:10809  ?  raw  [missing-backing]",
        "└── ./net.add-cow  256 KiB  25.0% local  [missing-backing]",
    ]


def test_overlay_with_a_missing_image_keeps_its_position(farm: Path) -> None:
    (farm / "two.raw").unlink()
    assert tree(".", cwd=farm)[2:] == [
        "└── ./two.add-cow  ?  ? local  [missing-image]",
        "    └── ./three.add-cow  256 KiB  25.0% local",
    ]
    (two,) = (one for one in graph(".", cwd=farm)["images"] if "two" in one["filename"])
    assert (two["image"], two["full-backing-filename"]) == ("two.raw", "./base.img")


def test_damaged_and_unexamined_overlays_are_marked(farm: Path) -> None:
    put(farm / "one.add-cow", 24, b"\xff")
    (farm / "two.raw").unlink()
    (farm / "two.raw").symlink_to("/etc/passwd")
    assert marks(".", cwd=farm) == {"one.add-cow": ["damaged"], "two.add-cow": ["unexamined"]}
    assert [line.strip("└├─ ") for line in tree(".", cwd=farm)[1:3]] == [
        "./one.add-cow  ?  ? local  [damaged]",
        "./two.add-cow  ?  ? local  [unexamined]",
    ]


def test_truncated_header_is_marked_as_damage(farm: Path) -> None:
    os.truncate(farm / "three.add-cow", 50)
    assert marks(".", cwd=farm) == {"three.add-cow": ["damaged"], "three.raw": ["unnamed"]}


def test_shared_image_is_marked(farm: Path) -> None:
    content = overlay_bytes(image="./one.raw", size=4 * CLUSTER, backing="base.img")
    (farm / "thief.add-cow").write_bytes(content)
    document = graph(".", cwd=farm)
    assert marked(document) == {"one.add-cow": ["shared-image"], "thief.add-cow": ["shared-image"]}
    assert counted(document)["shared-image"] == 2


def test_unnamed_files_are_listed_last(farm: Path) -> None:
    draw_raw(farm / "a-rest.img", "AB")
    (farm / "notes.txt").write_text("x")
    os.link(farm / "notes.txt", farm / "notes-too.txt")
    os.mkfifo(farm / "fifo")
    assert tree(".", cwd=farm)[4:] == [
        "Named by no overlay:",
        "├── ./a-rest.img  128 KiB  [unnamed]",
        "└── ./notes-too.txt  512 B  [unnamed]",
    ]
    document = graph(".", cwd=farm)
    assert counted(document) == {"images": 3, "files": 3, "unnamed": 2}
    assert [one["kind"] for one in document["files"]] == ["unnamed", "backing", "unnamed"]
    assert picture(".", cwd=farm)[-2:] == [
        (30, "./a-rest.img  128 KiB [unnamed]"),
        (30, "./notes-too.txt  512 B [unnamed]"),
    ]


def test_cycle_is_shown_once_with_its_return(farm: Path) -> None:
    draw(farm / "bad.add-cow", "X---", "tail.add-cow", backing_format="add-cow")
    draw(farm / "tail.add-cow", "X---", "bad.add-cow", backing_format="add-cow")
    draw(farm / "above.add-cow", "X---", "tail.add-cow", backing_format="add-cow")
    draw(farm / "own.add-cow", "X---", "own.add-cow", backing_format="add-cow")
    lines = tree(".", cwd=farm)
    assert lines[:4] == [
        "./bad.add-cow  256 KiB  25.0% local  [cycle]",
        "└── ./tail.add-cow  256 KiB  25.0% local  [cycle]",
        "    ├── ./above.add-cow  256 KiB  25.0% local  [cycle]",
        "    └── comes back to ./bad.add-cow  [cycle]",
    ]
    assert lines[-2:] == [
        "./own.add-cow  256 KiB  25.0% local  [cycle]",
        "└── comes back to ./own.add-cow  [cycle]",
    ]
    document = graph(".", cwd=farm)
    assert marked(document) == {
        f"{name}.add-cow": ["cycle"] for name in ("above", "bad", "own", "tail")
    }
    assert counted(document)["cycle"] == 4
    assert '"./own.add-cow" -> "./own.add-cow";' in digraph(".", cwd=farm)
    assert (30, "comes back to ./own.add-cow [cycle]") in picture(".", cwd=farm)


# ---- base-changed ----


def test_base_written_after_its_overlays_is_marked_as_changed(farm: Path) -> None:
    assert marks(".", cwd=farm) == {}
    written(farm, "base.img", 9)
    # What stands on an overlay is told by the overlay: the change came in there.
    assert marks(".", cwd=farm) == {
        "one.add-cow": ["base-changed"],
        "two.add-cow": ["base-changed"],
    }
    assert tree(".", cwd=farm)[1] == "├── ./one.add-cow  256 KiB  25.0% local  [base-changed]"


@pytest.mark.parametrize("newer", ["one.add-cow", "one.raw"])
def test_base_changed_compares_with_the_newest_file_of_the_overlay(farm: Path, newer: str) -> None:
    written(farm, "base.img", 9)
    written(farm, newer, 9)
    assert marks(".", cwd=farm) == {"two.add-cow": ["base-changed"]}


@pytest.mark.parametrize("newer", ["two.add-cow", "two.raw"])
def test_base_changed_of_an_overlay_as_backing(farm: Path, newer: str) -> None:
    written(farm, newer, 9)
    assert marks(".", cwd=farm) == {"three.add-cow": ["base-changed"]}


@pytest.mark.parametrize(("picture_", "flag"), [("----", 0), ("XYZW", ALL_ALLOCATED)])
def test_base_changed_ignores_commit_and_flatten(farm: Path, picture_: str, flag: int) -> None:
    draw(farm / "two.add-cow", picture_, "base.img", compatible=flag)
    written(farm, "two", 9)
    assert marks(".", cwd=farm) == {}


def test_base_changed_ignores_all_allocated_overlays(farm: Path) -> None:
    draw(farm / "one.add-cow", "XYZW", "base.img", compatible=ALL_ALLOCATED)
    written(farm, "one", 1)
    written(farm, "base.img", 9)
    assert marks(".", cwd=farm) == {"two.add-cow": ["base-changed"]}


@pytest.mark.parametrize("job", ["commit", "flatten"])
def test_job_below_leaves_no_base_changed_mark(farm: Path, job: str) -> None:
    """The views over it stay what they were, by whichever file they are served."""
    succeed(job, "--force", "two.add-cow", cwd=farm)
    found = marks(".", cwd=farm)
    assert "three.add-cow" not in found
    assert "two.add-cow" not in found
    assert found == ({"one.add-cow": ["base-changed"]} if job == "commit" else {})


# ---- names ----

AWKWARD = os.fsdecode(b'q"u\\n\n[\x1b]<&>\xff\xe2\x80\xa8.add-cow')


def test_file_name_cannot_forge_a_line_of_the_graph(farm: Path) -> None:
    draw(farm / AWKWARD, "X---")
    lines = tree(".", cwd=farm)
    assert len(lines) == 5
    assert r'├── ./q"u\n\n[\x1b]<&>\udcff\u2028.add-cow  256 KiB  25.0% local' in lines


def test_file_name_cannot_break_out_of_dot_quotes(farm: Path) -> None:
    draw(farm / AWKWARD, "X---")
    (farm / "ends in \\").write_text("x")
    text = digraph(".", cwd=farm)
    awkward = r'"./q\"u\\n\n[\x1b]<&>\udcff\u2028.add-cow"'
    assert f'{awkward} -> "./base.img";' in text
    assert r'label="./q\"u\\n\\n[\\x1b]<&>\\udcff\\u2028.add-cow\n' in text
    assert '"./ends in \\\\" [label="./ends in \\\\\\n512 B\\n[unnamed]"' in text
    strings = r'"(?:[^"\\]|\\.)*"'
    rest = re.sub(strings, "NAME", text)
    assert '"' not in rest
    assert "\\" not in rest
    assert rest.splitlines()[-1] == "}"


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")
def test_graphviz_accepts_the_dot_output(farm: Path) -> None:
    draw(farm / AWKWARD, "X---")
    draw(farm / "lost.add-cow", "X---", "gone.img")
    (farm / "graph.dot").write_text(digraph(".", cwd=farm))
    plain = tool("dot", "-Tplain", "graph.dot", cwd=farm)
    words = [line.split()[0] for line in plain.splitlines()]
    assert (words.count("node"), words.count("edge")) == (7, 5)


def test_svg_is_xml_whatever_the_names(farm: Path) -> None:
    draw(farm / AWKWARD, "X---")
    (farm / "bad\x01\ufffe.img").write_text("x")
    rows = [text for _, text in picture(".", cwd=farm)]
    assert './q"u\\n\\n[\\x1b]<&>\ufffd\\u2028.add-cow  256 KiB  25.0% local' in rows
    assert "./bad\\x01\ufffd.img  512 B [unnamed]" in rows


@pytest.mark.long
@pytest.mark.parametrize("form", ["dot", "svg"])
def test_marks_are_coloured(farm: Path, form: str) -> None:
    plain = succeed("farm", "graph", "--output", form, ".", cwd=farm).stdout
    written(farm, "base.img", 9)
    assert "#c06000" not in plain
    assert "#c06000" in succeed("farm", "graph", "--output", form, ".", cwd=farm).stdout


def test_graph_svg_is_utf8_in_any_locale(farm: Path) -> None:
    (farm / "größe.img").write_text("x")
    done = subprocess.run(
        [sys.executable, "-m", "addcow_mp", "farm", "graph", "--output", "svg", "."],
        cwd=farm,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=PATIENCE,
        check=True,
    )
    page = ET.fromstring(done.stdout)  # noqa: S314 - our own
    assert "größe.img" in "".join(page.itertext())


# ---- many, none, and what cannot be drawn ----


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
def test_graph_draws_a_chain_of_any_length(farm: Path, form: str) -> None:
    """Far longer than could be opened, and than Python could recurse."""
    below = "base.img"
    for number in range(1500):
        name = f"{number:04}.add-cow"
        kind = "raw" if below == "base.img" else "add-cow"
        content = overlay_bytes(
            image=f"{number:04}.raw", size=CLUSTER, backing=below, backing_format=kind, cluster=4096
        )
        (farm / name).write_bytes(content)
        draw_raw(farm / f"{number:04}.raw", "-")
        below = name
    said = succeed("farm", "graph", "--output", form, ".", cwd=farm).stdout
    assert "1499.add-cow" in said
    if form == "human":
        (deepest,) = (line for line in said.splitlines() if "1499.add-cow" in line)
        assert deepest.index("└── ") == 4 * 1499


@pytest.mark.parametrize("form", FORMS)
def test_graph_of_an_empty_farm_is_empty(tmp_path: Path, form: str) -> None:
    said = succeed("farm", "graph", "--output", form, ".", cwd=tmp_path).stdout
    if form in ("human", "jsonl"):
        assert said == ""
    elif form == "json":
        document = json.loads(said)
        assert (document["images"], document["files"]) == ([], [])
        assert set(document["summary"].values()) == {0}
    elif form == "dot":
        assert "->" not in said
    else:
        assert picture(".", cwd=tmp_path) == []


def test_overlay_in_use_keeps_its_position_in_the_graph(farm: Path) -> None:
    with (farm / "two.add-cow").open("rb") as file:
        # A guest that writes: byte 100 + i says "I use permission i", and 1 is write.
        lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 101, 1, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
        assert tree(".", cwd=farm)[2:] == [
            "└── ./two.add-cow  ?  ? local  [unexamined]",
            "    └── ./three.add-cow  256 KiB  25.0% local",
        ]
        assert marks("-U", ".", cwd=farm) == {}


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        ((), 64, "name at least one directory or file"),
        (("nowhere",), 1, "nowhere: no such file or directory"),
        (("--from-file", "nowhere"), 1, "nowhere: No such file or directory"),
        (("--output", "png", "."), 64, "--output"),
    ],
)
def test_invalid_graph_arguments_are_refused(
    farm: Path, words: tuple[str, ...], status: int, told: str
) -> None:
    assert told in refused("farm", "graph", *words, cwd=farm, status=status)
