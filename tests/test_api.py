"""Tests of the public Python functions: which arguments they accept, and what the package ships."""

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import addcow_mp
from addcow_mp.device.access import Access
from addcow_mp.device.copying import CopyOptions
from addcow_mp.jobs.options import RunOptions
from support.command import pair, ran


class _BytesPath:
    """A path object whose name is bytes."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> bytes:
        return os.fsencode(self._path)


#: Ways to spell the path of one file.
SPELLINGS: list[Callable[[Path], Any]] = [str, os.fsencode, Path, _BytesPath]

CALLS: dict[str, Callable[[Any], object]] = {
    "open": addcow_mp.open,
    "create": lambda path: addcow_mp.create(path, size=512),
    "create, backing": lambda path: addcow_mp.create("x", backing=path, backing_format="raw"),
    "create, image": lambda path: addcow_mp.create("x", size=512, image=path),
    "commit": addcow_mp.commit,
    "flatten": addcow_mp.flatten,
    "snapshot": lambda path: addcow_mp.snapshot(path, "x"),
    "snapshot, new": lambda path: addcow_mp.snapshot("x", path),
    "resize": lambda path: addcow_mp.resize(path, 512),
    "convert, source": lambda path: addcow_mp.convert(path, "x"),
    "convert, destination": lambda path: addcow_mp.convert("x", path),
    "check": addcow_mp.check,
    "info": addcow_mp.info,
    "extents": addcow_mp.extents,
}


@pytest.mark.parametrize("spelt", SPELLINGS)
def test_paths_are_accepted_as_str_bytes_and_path_objects(
    tmp_path: Path, spelt: Callable[[Path], Any]
) -> None:
    (tmp_path / "base.img").write_bytes(b"A" * 65536)
    top, image = spelt(tmp_path / "top.add-cow"), spelt(tmp_path / "top.img")
    addcow_mp.create(
        top, backing=spelt(tmp_path / "base.img"), backing_format="raw", image=image, size=65536
    )
    access = addcow_mp.Access(roots=(spelt(tmp_path),))
    with addcow_mp.open(top, writable=True, access=access) as disk:
        disk.write(0, b"B" * 512)
        disk.flush()
    assert addcow_mp.info(top).allocated_clusters == 1
    assert addcow_mp.check(top).exit_code == 0
    assert [one.length for one in addcow_mp.extents(top)] == [65536]
    addcow_mp.convert(top, spelt(tmp_path / "copy.raw"), jobs=0)
    assert (tmp_path / "copy.raw").read_bytes() == b"B" * 512 + b"A" * (65536 - 512)
    assert addcow_mp.commit(top, jobs=0).totals.clusters_moved == 1
    addcow_mp.flatten(top, jobs=0)
    assert addcow_mp.resize(top, "+1k").virtual_size == 65536 + 1024
    assert addcow_mp.resize(top, 512, shrink=True).virtual_size == 512


@pytest.mark.parametrize("wrong", [None, 3, 1.5, ["top.add-cow"], object()])
@pytest.mark.parametrize("name", CALLS)
def test_object_that_is_no_path_is_refused_with_its_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, wrong: object
) -> None:
    if wrong is None and name.startswith("create,"):
        pytest.skip("None leaves the option out")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        TypeError, match=r"^(path|new|backing|image|source|destination): give a str"
    ):
        CALLS[name](wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("roots", ["dir", b"dir", Path("dir"), (3,)])
def test_roots_must_be_a_list_of_paths(tmp_path: Path, roots: Any) -> None:
    path = pair(tmp_path, "A", "-")
    with pytest.raises(TypeError, match=r"^roots: give a"):
        addcow_mp.info(path, access=addcow_mp.Access(roots=roots))


def test_jobs_must_be_a_number_of_processes(tmp_path: Path) -> None:
    path = pair(tmp_path, "A", "X")
    with pytest.raises(TypeError, match=r"^jobs: give a number"):
        addcow_mp.commit(path, jobs="2")  # type: ignore[arg-type]
    with pytest.raises(addcow_mp.UsageError, match="jobs -1"):
        addcow_mp.flatten(path, jobs=-1)


def test_size_must_be_a_number_or_text(tmp_path: Path) -> None:
    path = pair(tmp_path, "A", "X")
    with pytest.raises(TypeError, match=r"^size: give a number or text"):
        addcow_mp.resize(path, 1.5)  # type: ignore[arg-type]
    with pytest.raises(addcow_mp.UsageError, match="invalid size '-1'"):
        addcow_mp.resize(path, -1)


# The package as it is given away


def _tracked() -> list[str]:
    project = Path(__file__).parent.parent
    done = ran(["git", "ls-files"], cwd=project)
    if done.returncode != 0:
        pytest.skip(f"no git repository: {done.stderr.strip()}")
    return done.stdout.splitlines()


def test_source_distribution_contains_every_file() -> None:
    import tomllib

    settings = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    included = settings["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    always = {".gitignore", "pyproject.toml"}
    missing = [
        path
        for path in _tracked()
        if path not in always
        and not any(f"/{path}" == one or f"/{path}".startswith(f"{one}/") for one in included)
    ]
    assert not missing


def test_package_ships_py_typed() -> None:
    assert "addcow_mp/py.typed" in _tracked()
    assert (Path(addcow_mp.__file__).parent / "py.typed").is_file()


@pytest.mark.long
def test_mypy_sees_the_types_of_the_package(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import addcow_mp\nreveal_type(addcow_mp.info(b'x'))\n")
    done = ran(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "script.py"],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done
    assert "addcow_mp.jobs.info.Info" in done.stdout, done


def test_the_settings_of_a_run_reach_a_worker_process_unchanged() -> None:
    options = RunOptions(3, Access(roots=("/srv",), share=True), CopyOptions(rate=7), idle=True)
    assert pickle.loads(pickle.dumps(options)) == options  # noqa: S301
