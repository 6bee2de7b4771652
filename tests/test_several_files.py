"""Tests of commands that take several files: each alone, then all of them in one list."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.command import addcow, draw, draw_raw, put, succeed

NAMES = ("a.add-cow", "b.add-cow")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    draw_raw(tmp_path / "base.img", "AB")
    for name, picture in (("a", "X-"), ("b", "-y")):  # b has a leak
        draw(tmp_path / f"{name}.add-cow", picture)
    return tmp_path


COMMANDS = [("info",), ("info", "--backing-chain"), ("check",), ("manifest", "create"), ("verify",)]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_several_files_are_a_list_of_what_each_file_is_alone(
    here: Path, words: tuple[str, ...]
) -> None:
    succeed("manifest", "create", *NAMES, cwd=here)
    alone = [addcow(*words, "--output", "json", name, cwd=here) for name in NAMES]
    both = addcow(*words, "--output", "json", *NAMES, cwd=here)
    assert both.json == [one.json for one in alone]
    assert both.status == max(one.status for one in alone)
    texts = [addcow(*words, name, cwd=here).stdout for name in NAMES]
    text = addcow(*words, *NAMES, cwd=here).stdout
    assert text.index(texts[0]) < text.index(texts[1], len(texts[0]))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_file_that_fails_is_one_line_and_the_others_go_on(
    here: Path, words: tuple[str, ...]
) -> None:
    succeed("manifest", "create", *NAMES, cwd=here)
    result = addcow(*words, "--output", "json", "a.add-cow", "gone", "b.add-cow", cwd=here)
    assert result.status == 1
    assert len(result.json) == 3
    if words != ("check",):  # its report says that the file could not be checked
        assert len(result.stderr.splitlines()) == 1
        assert "gone" in result.stderr


@pytest.mark.parametrize(
    ("files", "status"),
    [
        (("a", "a"), 0),
        (("a", "b"), 3),
        (("b", "base"), 63),
        (("base", "gone"), 1),
        (("gone", "bad", "b"), 2),
    ],
    ids=str,
)
def test_check_ends_with_the_status_of_the_worst_file(
    here: Path, files: tuple[str, ...], status: int
) -> None:
    draw(here / "bad.add-cow", "X-")
    put(here / "bad.add-cow", 64 * 1024, b"\xff")
    names = [f"{name}.img" if name == "base" else f"{name}.add-cow" for name in files]
    assert addcow("check", *names, cwd=here).status == status


def test_check_repairs_every_file(here: Path) -> None:
    draw(here / "c.add-cow", "-z")
    succeed("check", "-r", "leaks", *NAMES, "c.add-cow", cwd=here)
    succeed("check", *NAMES, "c.add-cow", cwd=here)
