"""Tests of what a command imports at its start (`-X importtime`)."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from support.command import PATIENCE, addcow, pair, ran, refused, succeed

pytestmark = pytest.mark.sample(2)

Loads = Callable[..., set[str]]

# Nothing that only looks needs these: processes, progress bars, validation, tests, networks.
HEAVY = {
    *("multiprocessing", "concurrent", "asyncio", "queue", "pickle", "tempfile"),
    *("rich", "pydantic", "markdown_it", "pygments", "hypothesis", "pytest", "_pytest"),
    *("logging", "unittest", "socket", "ssl", "http", "email", "xml", "sqlite3", "decimal"),
}

# Packages of this tool that only jobs need.
ENGINE = {
    "addcow_mp.engine",
    "addcow_mp.cli.working",
    "addcow_mp.cli.exercising",
    "addcow_mp.jobs.transfer_job",
    "addcow_mp.jobs.commit",
    "addcow_mp.jobs.flatten",
    "addcow_mp.jobs.convert",
}


def loaded(here: Path, *arguments: str) -> list[str]:
    """Every module that a command loads, in all its processes."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=here,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    lines = (line for line in done.stderr.splitlines() if line.startswith("import time:"))
    names = [line.rpartition("|")[2].strip() for line in lines]
    assert "site" in names, done.stderr
    return names


@pytest.fixture(scope="module")
def addcow_loads(tmp_path_factory: pytest.TempPathFactory) -> Loads:
    """The modules that an `addcow` command loads, over a new pair of images each."""

    @cache
    def found(*arguments: str) -> set[str]:
        here = tmp_path_factory.mktemp("here")
        pair(here, "ABC", "-X-")
        return set(loaded(here, "-m", "addcow_mp", *arguments))

    return found


def of(packages: set[str], names: set[str]) -> set[str]:
    """Those of the names that are among the packages, or lie in them."""
    return {
        name for name in names if any(f"{name}.".startswith(f"{package}.") for package in packages)
    }


@pytest.fixture
def here(tmp_path: Path) -> Path:
    pair(tmp_path, "ABC", "-X-")
    return tmp_path


LOOKING = [
    ["info", "top.add-cow"],
    ["info", "--backing-chain", "--output", "json", "top.add-cow"],
    ["map", "top.add-cow"],
    ["check", "top.add-cow"],
]
TALKING = [["--help"], ["--version"], ["commit", "--help"]]
MAKING = [["create", "-f", "raw", "new.raw", "1M"], ["create", "new.add-cow", "1M"]]
IO = [["io", "-r", "-c", "read 0 1k", "top.add-cow"], ["io", "-c", "write 0 1k", "top.add-cow"]]
WORKING = [
    ["commit", "--jobs", "0", "top.add-cow"],
    ["flatten", "--jobs", "0", "top.add-cow"],
    ["convert", "-O", "raw", "--jobs", "0", "top.add-cow", "new.raw"],
]


@pytest.mark.parametrize("command", [*LOOKING, *TALKING, *MAKING, *IO], ids=" ".join)
def test_command_loads_no_heavy_modules(addcow_loads: Loads, command: list[str]) -> None:
    assert of(HEAVY, addcow_loads(*command)) == set()


@pytest.mark.parametrize("command", [*LOOKING, *TALKING, *MAKING], ids=" ".join)
def test_only_jobs_load_the_engine(addcow_loads: Loads, command: list[str]) -> None:
    assert of(ENGINE, addcow_loads(*command)) == set()


@pytest.mark.parametrize("command", WORKING, ids=" ".join)
def test_job_without_workers_loads_no_multiprocessing(
    addcow_loads: Loads, command: list[str]
) -> None:
    assert of(HEAVY, addcow_loads(*command)) == set()


@pytest.mark.parametrize("command", [*TALKING, *MAKING], ids=" ".join)
def test_command_that_opens_no_image_loads_no_ctypes(
    addcow_loads: Loads, command: list[str]
) -> None:
    assert of({"ctypes"}, addcow_loads(*command)) == set()


def test_command_loads_only_its_own_module(addcow_loads: Loads) -> None:
    modules = {
        "info": "addcow_mp.jobs.info",
        "check": "addcow_mp.jobs.check",
        "commit": "addcow_mp.jobs.commit",
        "flatten": "addcow_mp.jobs.flatten",
    }
    for command, own in modules.items():
        options = ["--jobs", "0"] if command in ("commit", "flatten") else []
        found = addcow_loads(command, *options, "top.add-cow")
        others = {"addcow_mp.jobs.commit", "addcow_mp.jobs.flatten", "addcow_mp.jobs.check"} - {own}
        assert own in found
        assert found & others == set()


def test_importing_the_package_loads_none_of_its_modules(here: Path) -> None:
    found = set(loaded(here, "-c", "import addcow_mp; print(addcow_mp.__version__)"))
    assert of({"addcow_mp"}, found) == {"addcow_mp"}
    assert of(HEAVY | {"typer", "bitarray", "ctypes"}, found) == set()


def test_public_name_loads_only_the_modules_it_needs(here: Path) -> None:
    code = "import addcow_mp, sys; addcow_mp.FormatError; print(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True
    )
    assert of({"addcow_mp"}, set(done.stdout.split())) == {"addcow_mp", "addcow_mp.errors"}


def test_python_interface_for_reading_loads_no_command_line(here: Path) -> None:
    code = "from addcow_mp import open; open('top.add-cow').close()"
    found = set(loaded(here, "-c", code))
    assert "addcow_mp.device.files" in found
    assert of({"typer", "addcow_mp.cli", "addcow_mp.engine"} | HEAVY, found) == set()


def test_workers_do_not_load_the_command_line(here: Path) -> None:
    found = loaded(here, "-m", "addcow_mp", "commit", "--jobs", "2", "top.add-cow")
    assert found.count("multiprocessing.spawn") >= 1
    assert found.count("typer") == found.count("addcow_mp.cli") == 1
    assert of({"rich", "pydantic", "hypothesis"}, set(found)) == set()


# ---- the two ways to start it ----


def installed(here: Path, *arguments: str) -> tuple[int, str, str]:
    """Run the command that pip has put beside this Python."""
    command = Path(sys.executable).with_name("addcow")
    if not command.exists():
        if os.environ.get("CI") == "true":
            pytest.fail("addcow is not installed beside this Python")
        pytest.skip("addcow is not installed beside this Python")
    done = ran([command, *arguments], cwd=here)
    return done.returncode, done.stdout, done.stderr


SAME = [
    [],
    ["--help"],
    ["--version"],
    *([name, "--help"] for name in ("create", "info", "map", "check", "commit", "flatten", "io")),
    ["info", "top.add-cow"],
    ["map", "--output", "json", "top.add-cow"],
    ["check", "base.img"],
    ["info", "missing.add-cow"],
    ["commit", "--jobs", "x", "top.add-cow"],
    ["nonsense"],
]


@pytest.mark.parametrize("command", SAME, ids=" ".join)
def test_module_and_installed_command_print_the_same(here: Path, command: list[str]) -> None:
    by_module = addcow(*command, cwd=here)
    assert (by_module.status, by_module.stdout, by_module.stderr) == installed(here, *command)


def test_help_lists_every_command(here: Path) -> None:
    told = succeed("--help", cwd=here).stdout
    for name in (
        "create",
        "info",
        "map",
        "check",
        "convert",
        "commit",
        "flatten",
        "resize",
        "snapshot",
        "io",
    ):
        assert f"  {name} " in told
        text = succeed(name, "--help", cwd=here).stdout
        assert f"Usage: addcow {name} [OPTIONS]" in text
        assert "Traceback" not in text


def test_missing_command_points_to_the_help(here: Path) -> None:
    assert "see 'addcow --help'" in refused(cwd=here, status=64)


def test_version_option_prints_the_package_version(here: Path) -> None:
    import addcow_mp

    assert succeed("--version", cwd=here).stdout == f"addcow {addcow_mp.__version__}\n"
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'\nversion = "{addcow_mp.__version__}"\n' in text
