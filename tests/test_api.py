"""Tests of the public Python functions: which arguments they accept, and what the package ships."""

import ast
import inspect
import os
import pickle
import pydoc
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import addcow_mp
import api_reference
from addcow_mp.api import arguments
from addcow_mp.cli.app import _GROUPS
from addcow_mp.device.access import Access
from addcow_mp.device.copying import CopyOptions
from addcow_mp.jobs.options import RunOptions
from support.command import CLUSTER, draw_raw, guest, pair, ran


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
    "commit, base": lambda path: addcow_mp.commit("x", base=path),
    "flatten": addcow_mp.flatten,
    "snapshot": lambda path: addcow_mp.snapshot(path, "x"),
    "snapshot, new": lambda path: addcow_mp.snapshot("x", path),
    "resize": lambda path: addcow_mp.resize(path, 512),
    "create_raw": lambda path: addcow_mp.create_raw(path, 512),
    "chain_info": addcow_mp.chain_info,
    "repair": addcow_mp.repair,
    "compare": lambda path: addcow_mp.compare(path, "x"),
    "compare, other": lambda path: addcow_mp.compare("x", path),
    "verify": addcow_mp.verify,
    "manifest_create": addcow_mp.manifest_create,
    "rebase": lambda path: addcow_mp.rebase(path, None),
    "rebase, backing": lambda path: addcow_mp.rebase("x", path, unsafe=True),
    "reset": addcow_mp.reset,
    "commit_estimate": addcow_mp.commit_estimate,
    "flatten_estimate": addcow_mp.flatten_estimate,
    "rebase_estimate": lambda path: addcow_mp.rebase_estimate(path, None),
    "reset_estimate": addcow_mp.reset_estimate,
    "drop": addcow_mp.drop,
    "qemu_export": addcow_mp.qemu_export,
    "qemu_import": addcow_mp.qemu_import,
    "qemu_args": addcow_mp.qemu_args,
    "qemu_status": addcow_mp.qemu_status,
    "qemu_stream": lambda path: addcow_mp.qemu_stream(path, "x"),
    "qemu_stream, socket": lambda path: addcow_mp.qemu_stream("x", path),
    "farm_scrub_status": addcow_mp.farm_scrub_status,
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
    if wrong is None and name.startswith(("create,", "rebase,", "commit,")):
        pytest.skip("None leaves the option out")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        TypeError,
        match=r"^(path|new|backing|image|source|destination|one|other|qmp|state|base): give a str",
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


README = Path(__file__).parents[1] / "README.md"


def example() -> str:
    """The example of README."""
    section = README.read_text("utf-8").partition("## From Python")[2]
    return section.partition("```python\n")[2].partition("```")[0]


RIGHT = """
import os
from pathlib import Path

import addcow_mp
from addcow_mp import *

about: addcow_mp.Info = addcow_mp.info(b"vm.add-cow")
size: int | None = about.virtual_size


def is_late() -> bool:
    return os.getpid() == 1


def log(event: addcow_mp.Event) -> None:
    if isinstance(event, addcow_mp.ImageResult):
        print(event.path, event.state)


report: addcow_mp.Report = addcow_mp.flatten(
    Path("vm.add-cow"), discard=True, stopping=is_late, time_limit=7200, copy="clone", rate=1 << 20
)
access = addcow_mp.Access(roots=("/srv",))
result: addcow_mp.FarmResult = farm_commit(
    ["/srv", Path("more")], jobs=4, log=log, on_error="stop", counted=print, access=access
)
moved: int = sum(one.report.totals.bytes_moved for one in result.images if one.report)
different: list[tuple[int, int]] = compare("a", "b", strict=True, every=True).differing
worst: int = farm_verify("/srv", rate=None).exit_code
state: addcow_mp.ScrubStatus = farm_scrub_status("state.db")
"""

#: Each line with the word "wrong" must be refused.
WRONG = """
import addcow_mp

addcow_mp.commit(5)  # wrong
addcow_mp.commit("vm.add-cow", jobs="4")  # wrong
addcow_mp.commit("vm.add-cow", progress=len)  # wrong
addcow_mp.commit("vm.add-cow", time_limit="2h")  # wrong
addcow_mp.commit("vm.add-cow", copy="rsync")  # wrong
addcow_mp.commit("vm.add-cow", prgress=print)  # wrong
addcow_mp.verify("vm.add-cow", copy="clone")  # wrong
addcow_mp.farm_plan(".", "drop")  # wrong
addcow_mp.farm_check(".", log=print)  # wrong
text: str = addcow_mp.info("vm.add-cow").virtual_size  # wrong
addcow_mp.farm_ls(".").images  # wrong
addcow_mp.nothing  # wrong
"""


def test_mypy_accepts_right_calls_and_the_example_of_readme_and_refuses_wrong_ones(
    tmp_path: Path,
) -> None:
    for name, text in (("right", RIGHT), ("wrong", WRONG), ("readme", example())):
        (tmp_path / f"{name}.py").write_text(text)
    # The package is found where it is installed, by its py.typed, without this project's settings.
    words = ["-m", "mypy", "--strict", "--config-file", os.devnull, "--cache-dir", str(tmp_path)]
    done = ran([sys.executable, *words, "right.py", "wrong.py", "readme.py"], cwd=tmp_path)
    refused = {
        line.partition(": error:")[0] for line in done.stdout.splitlines() if ": error:" in line
    }
    wrong = {f"wrong.py:{at}" for at, line in enumerate(WRONG.splitlines(), 1) if "wrong" in line}
    assert refused == wrong, done


def test_example_of_readme_runs(tmp_path: Path) -> None:
    draw_raw(tmp_path / "golden.img", "A" * 64)
    (tmp_path / "example.py").write_text(example())
    done = ran([sys.executable, "-W", "error", "example.py"], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].endswith(f"of {CLUSTER} bytes")
    assert lines[-3:] == [
        f"{CLUSTER} bytes went down into vm1",
        "./today.add-cow clean",
        "./vm1.add-cow clean",
    ]
    assert guest(tmp_path / "vm1.add-cow", 2 << 20, 5) == b"today"


# Names

NAMES: list[str] = vars(addcow_mp)["__all__"]


def commands() -> Iterator[str]:
    """Every command, by its words."""
    for place, group in _GROUPS.items():
        for name in group.members:
            if f"{place}.{name}".lstrip(".") not in _GROUPS:
                yield " ".join([*place.split("."), name]).strip()


#: Commands whose functions are not called like them; `serve` replaces the process.
CALLED: dict[str, str] = {"map": "extents", "io": "open", "serve": "open"}


@pytest.mark.parametrize("command", list(commands()))
def test_every_command_has_a_function(command: str) -> None:
    name = CALLED.get(command, command.replace(" ", "_"))
    assert name in NAMES, f"add {name} to addcow_mp/api"
    assert callable(getattr(addcow_mp, name))


def test_help_and_dir_and_star_import_show_every_public_name() -> None:
    assert {*NAMES, "__version__"} <= set(dir(addcow_mp))
    assert sorted(NAMES) == NAMES == sorted(addcow_mp._HOMES)
    found: dict[str, object] = {}
    exec("from addcow_mp import *", found)  # noqa: S102
    assert set(NAMES) <= set(found)
    text = pydoc.plain(pydoc.render_doc(addcow_mp))
    assert [name for name in NAMES if not re.search(rf"\b{name}\b", text)] == []
    (signature,) = re.findall(r"^    farm_commit\((.*)\)", text, re.MULTILINE)
    for keyword in ("verify", "progress", "stopping", "time_limit", "jobs", "rate", "log"):
        assert f"{keyword}: " in signature
    assert "Whether" not in signature


def test_pydoc_of_a_function_says_its_keywords_and_what_it_does() -> None:
    done = ran([sys.executable, "-m", "pydoc", "addcow_mp.commit"])
    assert done.returncode == 0, done
    assert "time_limit: 'float | None' = None" in done.stdout
    assert "Move all allocated clusters into the backing file" in done.stdout


def test_every_public_name_is_described() -> None:
    for name in NAMES:
        value = getattr(addcow_mp, name)
        if callable(value) and name not in ("AnyPath", "Event"):
            assert value.__doc__, name
            assert not value.__doc__.startswith(f"{name}("), f"{name} has only a signature"


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        addcow_mp.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_type_checkers_see_the_names_that_exist() -> None:
    tree = ast.parse(Path(addcow_mp.__file__).read_text("utf-8"))
    imports = [one for one in ast.walk(tree) if isinstance(one, ast.ImportFrom)]
    seen = {
        alias.asname: one.module
        for one in imports
        for alias in one.names
        if one.module is not None and one.module.startswith("addcow_mp")
    }
    assert seen == {name: f"addcow_mp.{home}" for name, home in addcow_mp._HOMES.items()}


def test_reference_page_has_every_public_name() -> None:
    text = (README.parent / "docs" / "api.md").read_text("utf-8")
    assert text == api_reference.reference(), "run tools/api_reference.py"
    assert [name for name in NAMES if f"`{name}`" not in text] == []


def test_shared_keywords_are_described_in_the_order_of_signatures() -> None:
    described = re.findall(r"^``(\w+)``$", arguments.__doc__ or "", re.MULTILINE)
    assert described == list(arguments.DEFAULTS)
    assert set(described) == set(arguments.FarmCopying.__annotations__)
    shown = list(inspect.signature(addcow_mp.farm_flatten).parameters)
    assert shown == ["places", "discard", "verify", *described]


def test_the_settings_of_a_run_reach_a_worker_process_unchanged() -> None:
    options = RunOptions(3, Access(roots=("/srv",), share=True), CopyOptions(rate=7), idle=True)
    assert pickle.loads(pickle.dumps(options)) == options  # noqa: S301
