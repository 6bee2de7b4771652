"""Fixtures that several modules share, and what holds for every test: signals, and one seed."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from support import seed
from support.call_trace import Trace, watch_syncs, watch_the_kernel, watch_writes
from support.command import KiB
from support.file_systems import clear, made_disk, mounted
from support.warm import Warm

# A shell that starts the suite in the background, or nohup, ignores these signals, and every
# process of the suite would inherit that.
for _number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        ending = signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL
        signal.signal(_number, ending)


def pytest_configure(config: pytest.Config) -> None:
    """Try properties with few examples where the long walks are left out."""
    for name in ("quick", "full"):
        settings.register_profile(name)
    settings.load_profile("quick" if "not long" in config.option.markexpr else "full")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases outside of the sample of their test as long."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tests.values():
        if sample := cases[0].get_closest_marker("sample"):
            (count,) = sample.args
            kept = {number * len(cases) // count for number in range(count)}
            for number in set(range(len(cases))) - kept:
                cases[number].add_marker(pytest.mark.long)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which seed gives the same random tests again."""
    if terminalreporter.stats.get("failed"):
        terminalreporter.write_line(f"ADDCOW_SEED={seed.SEED} draws the same random tests again")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers of its own for each test, from the seed of the run."""
    return seed.random_for(request.node.name)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """A server that forks for every command."""
    server = Warm(tmp_path_factory.mktemp("outputs"))
    yield server
    server.close()


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def asking(request: pytest.FixtureRequest) -> signal.Signals:
    """A signal that asks a job to stop."""
    number: signal.Signals = request.param
    return number


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Trace:
    """What this process does to files from now on."""
    seen = Trace()
    watch_writes(seen, monkeypatch)
    watch_the_kernel(seen, monkeypatch)
    watch_syncs(seen, monkeypatch)
    return seen


# ---- directories and file systems ----


@pytest.fixture
def clean_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for images; a command there must leave no temporary file."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    (tmp_path / "here").mkdir()
    yield tmp_path / "here"
    left = list(temporary.iterdir())
    shutil.rmtree(tmp_path / "here")  # some of them are large
    assert left == []


@pytest.fixture(scope="module")
def xfs_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    for disk in _mounted("xfs", tmp_path_factory):
        (disk / "one").write_bytes(b"1" * 4 * KiB)
        words = ["cp", "--reflink=always", "one", "two"]
        if subprocess.run(words, cwd=disk, capture_output=True, check=False).returncode:
            pytest.skip("this XFS cannot share blocks")
        yield disk


@pytest.fixture
def xfs(xfs_disk: Path) -> Iterator[Path]:
    yield from fresh(xfs_disk)


@pytest.fixture(scope="module")
def ext4_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from _mounted("ext4", tmp_path_factory)


@pytest.fixture
def ext4(ext4_disk: Path, tmp_path: Path) -> Iterator[Path]:
    yield from fresh(ext4_disk)


def fresh(disk: Path) -> Iterator[Path]:
    """A directory for one test: it is gone afterwards, and its space is free again."""
    here = disk / "here"
    here.mkdir()
    yield here
    clear(here)
    here.rmdir()


def _mounted(kind: str, factory: pytest.TempPathFactory) -> Iterator[Path]:
    for disk in made_disk(kind, factory.mktemp("disk")):
        yield disk.mountpoint


@pytest.fixture(params=["tmpfs", "ext4"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of four MiB, or a little more, for files of the test alone."""
    yield from mounted(request.param, tmp_path)
