"""Tests of file names that are not UTF-8, in JSON, logs, lists of names and graphs."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from support.command import PATIENCE, addcow, draw, draw_raw, refused, succeed

pytestmark = pytest.mark.sample(1)

BYTES = b"b\xff\xfe"
BASE, TOP = os.fsdecode(BYTES + b".img"), os.fsdecode(BYTES + b".add-cow")


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    """A base and an overlay whose names are not UTF-8, and an overlay whose name is."""
    here = tmp_path / "farm"
    here.mkdir()
    draw_raw(here / BASE, "ABCD")
    draw(here / TOP, "X---", BASE)
    draw(here / "plain.add-cow", "X---", BASE)
    return here


def pairs(value: Any) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Every string in a document: the object that holds it, its key, and the string."""
    if isinstance(value, dict):
        for key, each in value.items():
            for one in each if isinstance(each, list) else [each]:
                if isinstance(one, str):
                    yield value, key, one
            yield from pairs(each)
    elif isinstance(value, list):
        for each in value:
            yield from pairs(each)


def assert_bytes_beside(text: str) -> None:
    """Insist that each name that is not text has its bytes beside it, and no other has."""
    met = 0
    for line in [text] if text.startswith(("{\n", "[\n")) else text.splitlines():
        for holder, key, name in pairs(json.loads(line)):
            escaped = re.search("[\udc80-\udcff]", name) is not None
            if isinstance(holder[key], list):
                if escaped:
                    decoded = [base64.b64decode(one) for one in holder[f"{key}-base64"]]
                    assert decoded == [os.fsencode(one) for one in holder[key]]
            elif escaped:
                assert base64.b64decode(holder[f"{key}-base64"]) == os.fsencode(name)
            elif not key.endswith("-base64"):
                assert f"{key}-base64" not in holder
            met += escaped
    assert met


COMMANDS = [
    ("info", "--output", "json", TOP),
    ("info", "--output", "json", "--backing-chain", TOP),
    ("check", "--output", "json", TOP),
    ("compare", "--output", "json", TOP, TOP),
    ("verify", "--output", "json", TOP),
    ("manifest", "create", "--output", "json", TOP),
    ("commit", "--force", "--output", "json", TOP),
    ("flatten", "--output", "json", TOP),
    ("convert", "-O", "raw", "--output", "json", TOP, "new.raw"),
    *(
        ("farm", *words.split(), "--output", form, ".")
        for words in ("ls", "graph", "check", "verify", "plan flatten", "commit", "flatten")
        for form in ("json", "jsonl")
    ),
    ("farm", "scrub", "run", "--state", "state", "--output", "json", "."),
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words).replace(TOP, "TOP"))
def test_json_has_the_bytes_of_a_name_that_is_not_utf8(farm: Path, words: tuple[str, ...]) -> None:
    assert_bytes_beside(addcow(*words, cwd=farm).stdout)


@pytest.mark.long
def test_scrub_stores_names_as_bytes(farm: Path) -> None:
    succeed("manifest", "create", "-q", TOP, cwd=farm)
    addcow("farm", "scrub", "run", "--state", "state", ".", cwd=farm)
    said = addcow("farm", "scrub", "status", "--state", "state", "--output", "json", cwd=farm)
    assert said.status == 1  # of the layers that have no manifest nothing is known
    assert_bytes_beside(said.stdout)


def test_log_has_the_bytes_of_a_name_that_is_not_utf8(farm: Path) -> None:
    succeed("farm", "flatten", "--log", "log", ".", cwd=farm)
    assert_bytes_beside((farm / "log").read_text())


def test_json_has_no_bytes_for_a_name_that_is_utf8(farm: Path) -> None:
    (farm / "größe.add-cow").write_bytes((farm / "plain.add-cow").read_bytes())
    said = succeed("farm", "ls", "--output", "json", "größe.add-cow", cwd=farm)
    (one,) = said.json["images"]
    assert one["filename"] == "größe.add-cow"
    assert "filename-base64" not in one
    assert base64.b64decode(one["backing-filename-base64"]) == os.fsencode(BASE)


# ---- lists of names ----

TAKING_PLACES = ["ls", "graph", "check", "verify", "plan flatten", "commit --force", "flatten"]
TAKING_PLACES += ["scrub run --state state"]


@pytest.mark.parametrize("words", TAKING_PLACES)
def test_list_of_names_may_be_separated_by_nul(farm: Path, words: str) -> None:
    line_break = "two\nlines.add-cow"
    draw(farm / line_break, "X---", BASE)
    (farm / "list").write_bytes(b"\0".join(map(os.fsencode, (TOP, line_break, ""))))
    form = "json" if "scrub" in words else "jsonl"
    options = ("--output", form, "-0", "--from-file", "list")
    said = addcow("farm", *words.split(), *options, cwd=farm).stdout
    assert json.dumps(TOP)[1:-1] in said
    assert json.dumps(line_break)[1:-1] in said
    assert '"plain.add-cow"' not in said


def test_nul_separated_list_is_read_from_stdin(farm: Path) -> None:
    words = ("farm", "ls", "--output", "jsonl", "--null", "--from-file", "-")
    done = subprocess.run(
        [sys.executable, "-m", "addcow_mp", *words],
        cwd=farm,
        input=os.fsencode(f"{TOP}\0plain.add-cow\0"),
        capture_output=True,
        timeout=PATIENCE,
        check=True,
    )
    names = [json.loads(line)["filename"] for line in done.stdout.splitlines()]
    assert names == [TOP, "plain.add-cow"]


def test_option_0_needs_a_list_of_names(farm: Path) -> None:
    assert "--from-file" in refused("farm", "ls", "-0", ".", cwd=farm, status=64)


# ---- pictures ----

SVG, XML = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/XML/1998/namespace}"


def test_graph_labels_keep_blanks(farm: Path) -> None:
    name = "  two  blanks .add-cow  "
    draw(farm / name, "X---", BASE)
    page = ET.fromstring(  # noqa: S314 - our own
        succeed("farm", "graph", "--output", "svg", name, cwd=farm).stdout
    )
    labels = list(page.iter(f"{SVG}text"))
    assert any((label.text or "").startswith(f"{name}  256 KiB") for label in labels)
    assert {label.get(f"{XML}space") for label in labels} == {"preserve"}
    assert f'label="{name}\\n' in succeed("farm", "graph", "--output", "dot", name, cwd=farm).stdout


# ---- roots ----


def test_root_directory_may_have_any_name(farm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = farm / "overlays"
    here.mkdir()
    draw(here / "top.add-cow", "X---", f"../{BASE}")
    assert "--root" in refused("map", "overlays/top.add-cow", cwd=farm)
    odd = farm.rename(farm.with_name(os.fsdecode(b"far\xffm")))
    monkeypatch.setenv("ADDCOW_ROOTS", f"/nowhere:{odd}")
    succeed("map", "overlays/top.add-cow", cwd=odd)
    colon = odd.rename(odd.with_name("a:b"))
    monkeypatch.setenv("ADDCOW_ROOTS", "")
    succeed("map", "--root", str(colon), "overlays/top.add-cow", cwd=colon)
