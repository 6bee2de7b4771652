"""Tests of file modes: new files are readable by no more users than the files of the chain."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.command import CLUSTER, draw, draw_raw
from support.processes import Ended
from support.warm import Warm

pytestmark = pytest.mark.sample(1)

GROUP = 4321  # no group has it, so that a test run by root can give files to it


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    before = os.umask(0o022)
    server = Warm(tmp_path_factory.mktemp("outputs"))
    os.umask(before)
    yield server
    server.close()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def chain(here: Path, *, base: int = 0o644, top: int = 0o644) -> None:
    draw_raw(here / "base.img", "ABCD")
    draw(here / "top.add-cow", "-X--", "base.img")
    (here / "base.img").chmod(base)
    (here / "top.raw").chmod(top)


def done(ended: Ended, status: int = 0) -> Ended:
    assert ended.status == status, ended
    return ended


#: The mode of a base, and that of what is made of it: by its own group, and by another one.
MODES = [
    (0o644, 0o644, 0o644),
    (0o600, 0o600, 0o600),
    (0o400, 0o600, 0o600),
    (0o640, 0o640, 0o600),
    (0o660, 0o640, 0o600),
    (0o604, 0o600, 0o600),
    (0o755, 0o644, 0o644),
]
each_mode = pytest.mark.parametrize(("base", "same", "other"), MODES)


@pytest.mark.long
@pytest.mark.parametrize("group", ["same", "another"])
@each_mode
def test_new_files_are_no_more_readable_than_the_base(
    warm: Warm, tmp_path: Path, base: int, same: int, other: int, group: str
) -> None:
    draw_raw(tmp_path / "base.img", "ABCD")
    if group == "another":
        if os.geteuid() != 0:
            pytest.skip("only root can give files to another group")
        os.chown(tmp_path / "base.img", -1, GROUP)
    (tmp_path / "base.img").chmod(base)
    wanted = same if group == "same" else other
    done(warm.run("create", "-b", "base.img", "-F", "raw", "top.add-cow", cwd=tmp_path))
    done(warm.run("manifest", "create", "top.add-cow", cwd=tmp_path))
    done(warm.run("convert", "-O", "raw", "top.add-cow", "new.raw", cwd=tmp_path))
    done(warm.run("convert", "-f", "raw", "-O", "raw", "base.img", "copy.raw", cwd=tmp_path))
    made = ["top.raw", "new.raw", "copy.raw", "base.img.manifest", "top.add-cow.manifest"]
    assert {name: mode(tmp_path / name) for name in made} == dict.fromkeys(made, wanted)
    assert mode(tmp_path / "top.add-cow") == 0o644  # names and bits


def test_new_files_are_no_more_readable_than_the_most_restrictive_file(
    warm: Warm, tmp_path: Path
) -> None:
    chain(tmp_path, top=0o600)
    draw(tmp_path / "above.add-cow", "--Y-", "top.add-cow", backing_format="add-cow")
    done(warm.run("convert", "-O", "raw", "above.add-cow", "new.raw", cwd=tmp_path))
    words = ("create", "-b", "above.add-cow", "-F", "add-cow", "more.add-cow")
    done(warm.run(*words, cwd=tmp_path))
    done(warm.run("manifest", "create", "above.add-cow", cwd=tmp_path))
    for name in ("new.raw", "more.raw", "top.add-cow.manifest", "above.add-cow.manifest"):
        assert mode(tmp_path / name) == 0o600, name
    assert mode(tmp_path / "base.img.manifest") == 0o644  # of the base alone


@pytest.mark.parametrize("farm", [(), ("farm",)], ids=["one", "farm"])
@pytest.mark.parametrize(
    ("base", "image", "wanted"),
    [
        (0o600, 0o644, 0o600),
        (0o600, 0o666, 0o600),
        (0o640, 0o664, 0o660),
        (0o640, 0o640, 0o640),
        (0o644, 0o666, 0o666),
        (0o600, 0o600, 0o600),
        (0o644, 0o600, 0o600),
    ],
)
def test_flatten_restricts_the_mode_of_an_image_and_says_so(
    warm: Warm, tmp_path: Path, base: int, image: int, wanted: int, farm: tuple[str, ...]
) -> None:
    chain(tmp_path, base=base, top=image)
    ended = done(warm.run(*farm, "flatten", "top.add-cow", cwd=tmp_path))
    assert mode(tmp_path / "top.raw") == wanted
    told = "top.raw: more users could read it than its backing file"
    assert (told in ended.stderr) == (image != wanted), ended
    assert (tmp_path / "top.raw").read_bytes()[:CLUSTER] == b"A" * CLUSTER


def test_backup_is_no_more_readable_than_the_chain(warm: Warm, tmp_path: Path) -> None:
    chain(tmp_path)
    with (tmp_path / "top.add-cow").open("r+b") as file:
        file.seek(CLUSTER)
        file.write(b"\xf2")  # bits past the last cluster
    (tmp_path / "top.add-cow").chmod(0o600)
    done(warm.run("check", "-r", "all", "top.add-cow", cwd=tmp_path))
    assert mode(tmp_path / "top.add-cow.backup-1") == 0o600


def test_old_draft_of_a_manifest_is_restricted(warm: Warm, tmp_path: Path) -> None:
    chain(tmp_path, base=0o600)
    (tmp_path / "base.img.manifest.part").write_bytes(b"ADDCOWMP")
    (tmp_path / "base.img.manifest.part").chmod(0o644)
    done(warm.run("manifest", "create", "-f", "raw", "base.img", cwd=tmp_path))
    assert mode(tmp_path / "base.img.manifest") == 0o600
