"""Tests of every error class: its fields and message, and a scenario in which a user causes it.

A class without a scenario here fails a test. Every error is one line that names the file, has an
exit status, and survives pickling. The last part tests hostile input and failing outputs: they
cost one line.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pickle
import pkgutil
import re
import resource
import signal
import string
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import addcow_mp
from addcow_mp import AddcowError
from addcow_mp.cli.main import run
from addcow_mp.device import holders, holes
from addcow_mp.device.files import File
from addcow_mp.engine import checkpoints
from addcow_mp.engine.pool import Pool
from addcow_mp.engine.tasks import Task
from addcow_mp.engine.worker import Failed, Work, WorkerContext
from addcow_mp.jobs.commit import commit as commit_job
from addcow_mp.jobs.compare import compare as compare_job
from addcow_mp.jobs.options import Hooks, RunOptions
from addcow_mp.jobs.qemu_import import take_back
from support.command import (
    CLUSTER,
    PATIENCE,
    KiB,
    addcow,
    bits,
    draw,
    draw_raw,
    guest_picture,
    look,
    overlay_bytes,
    pair,
    put,
    ran,
    refused,
    snapshot,
    succeed,
)
from support.fault_rules import Rules, rule
from support.loops import loops
from support.processes import running

pytestmark = pytest.mark.sample(2)

#: A job in this process alone, and hooks that stop it at once.
ALONE, STOPPING = RunOptions(0), Hooks(stopping=lambda: True)

# ---- all of them ----


def every_error() -> list[type[AddcowError]]:
    """The error classes of all modules of the package."""
    for module in pkgutil.walk_packages(addcow_mp.__path__, "addcow_mp."):
        import_module(module.name)
    return sorted(below(AddcowError), key=lambda kind: (kind.__module__, kind.__name__))


def below(kind: type[AddcowError]) -> set[type[AddcowError]]:
    """A class and all that derive from it, of this package."""
    own = {kind} if kind.__module__.startswith("addcow_mp.") else set()
    return own.union(*(below(each) for each in kind.__subclasses__()))


def by_name(kind: object) -> str:
    return kind.__name__ if isinstance(kind, type) else ""


ERRORS = every_error()
each_error = pytest.mark.parametrize("kind", ERRORS, ids=by_name)


def assert_sound(error: AddcowError) -> None:
    """Assert what every error promises."""
    text = str(error)
    assert text.strip()
    assert "\n" not in text
    assert "{" not in text
    assert error.exit_code in range(1, 256)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        copy = pickle.loads(pickle.dumps(error, protocol))  # noqa: S301 - our own
        assert type(copy) is type(error)
        assert copy.fields == error.fields
        assert str(copy) == text
        assert copy.exit_code == error.exit_code


def fields_of(kind: type[AddcowError]) -> dict[str, str]:
    """A value for each field of the template."""
    names = [name for _, name, _, _ in string.Formatter().parse(kind.template) if name]
    return {name: f"<the {name}>" for name in names}


@each_error
def test_error_message_shows_its_fields(kind: type[AddcowError]) -> None:
    fields = fields_of(kind)
    error = kind(**fields)
    assert error.fields == fields
    assert all(value in str(error) for value in fields.values())
    assert_sound(error)


@each_error
def test_error_keeps_fields_that_its_message_does_not_show(kind: type[AddcowError]) -> None:
    error = kind(**fields_of(kind), errno=5, extra=("any", b"thing"))
    assert error.fields["errno"] == 5
    assert_sound(error)


@each_error
def test_error_message_may_contain_braces(kind: type[AddcowError]) -> None:
    fields = dict.fromkeys(fields_of(kind), "{0}{path}{")
    assert "{0}{path}{" in str(kind(**fields))


@pytest.mark.parametrize("kind", ERRORS, ids=by_name)
def test_error_class_has_a_docstring(kind: type[AddcowError]) -> None:
    assert (kind.__doc__ or "").strip()


def test_public_errors_are_those_of_the_errors_module_and_two_of_jobs() -> None:
    public = {name for name in addcow_mp._HOMES if name.endswith("Error")}
    of_the_module = {each.__name__ for each in ERRORS if each.__module__ == "addcow_mp.errors"}
    assert public == of_the_module | {"CompareError", "UnstartedError"}


def test_system_error_keeps_its_text() -> None:
    error = addcow_mp.FileError.of("a.img", "read it", OSError(errno.EIO, "Input/output error"))
    assert str(error) == "a.img: cannot read it: Input/output error"
    assert error.fields["errno"] == errno.EIO
    bare = addcow_mp.FileError.of("a.img", "read it", OSError("no words"))
    assert str(bare) == "a.img: cannot read it: no words"
    assert_sound(bare)


# ---- how a user meets them ----


def usage_error(here: Path) -> None:
    addcow_mp.create(here / "top.add-cow")


def image_error(here: Path) -> None:
    addcow_mp.open(here)


def not_addcow_error(here: Path) -> None:
    draw_raw(here / "base.img", "A")
    addcow_mp.open(here / "base.img")


def format_error(here: Path) -> None:
    put(pair(here, "AB", "-X"), 20, b"\1")
    addcow_mp.open(here / "top.add-cow")


def unsupported_error(here: Path) -> None:
    draw(here / "top.add-cow", "-X", backing="nbd:localhost")
    addcow_mp.open(here / "top.add-cow")


def file_error(here: Path) -> None:
    addcow_mp.open(here / "missing.add-cow")


def sync_error(here: Path) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fdatasync", fail)
        addcow_mp.commit(pair(here, "AB", "-X"), jobs=0)


def range_error(here: Path) -> None:
    with addcow_mp.open(pair(here, "AB", "-X")) as disk:
        disk.read(CLUSTER, CLUSTER + 1)


def worker_error(here: Path) -> None:
    top = pair(here, "ABC", "--X")
    with largest_file(2 * CLUSTER):
        addcow_mp.commit(top, jobs=0)


def unended_error(here: Path) -> None:
    from addcow_mp.jobs.flatten import flatten

    top = pair(here, "ABC", "-X-")
    other = here / "other"
    other.write_bytes(b"the file of another program")

    def replace(done: int, total: int) -> None:
        if other.exists():
            other.rename(top)

    flatten(str(top), discard=True, options=ALONE, hooks=Hooks(replace))


def resource_error(here: Path) -> None:
    from addcow_mp.engine.done_map import DoneMap

    lowest_free = os.dup(0)
    os.close(lowest_free)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        DoneMap.create((8,), 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def begins_anew_error(here: Path) -> None:
    commit_job(str(pair(here, "ABC", "XXX")), keep=True, options=ALONE, hooks=STOPPING)


def stopped_error(here: Path) -> None:
    from addcow_mp.jobs.commit import commit

    commit(str(pair(here, "AB", "-X")), options=ALONE, hooks=STOPPING)


def unfinished_error(here: Path) -> None:
    from addcow_mp.jobs.convert import convert

    convert(str(pair(here, "AB", "-X")), str(here / "new.raw"), options=ALONE, hooks=STOPPING)


def interrupted_error(here: Path) -> None:
    stopped_by(signal.SIGINT, here)


def terminated_error(here: Path) -> None:
    stopped_by(signal.SIGTERM, here)


def hangup_error(here: Path) -> None:
    stopped_by(signal.SIGHUP, here)


def cpu_limit_error(here: Path) -> None:
    stopped_by(signal.SIGXCPU, here)


def time_limit_error(here: Path) -> None:
    from addcow_mp.farm.farm_job import FarmJob, run_farm_job
    from addcow_mp.farm.image_job import JobSpec, Operation

    pair(here, "AB", "-X")
    job = FarmJob(JobSpec(Operation.COMMIT), is_late=lambda: True)
    problem = run_farm_job([str(here)], job, ALONE).problem
    assert problem is not None
    raise problem


def manifest_error(here: Path) -> None:
    from addcow_mp.jobs.manifest import create

    top = pair(here, "AB", "-X")
    create(str(top), ALONE)
    put(here / "base.img.manifest", 100, b"\xff")
    create(str(top), ALONE)


def flattened(here: Path, once_done: Callable[[], None], stopping: list[bool]) -> None:
    """Flatten and verify; something happens when all is moved and nothing was read back."""
    from addcow_mp.jobs.flatten import flatten

    top = pair(here, "ABC", "X--")
    happenings = iter([once_done])

    def progress(done: int, total: int) -> None:
        if 0 < total - done == read and done > read:
            next(happenings, lambda: None)()

    # What is read before is as much as what is read after.
    read = 3 * CLUSTER
    hooks = Hooks(progress, lambda: bool(stopping))
    flatten(str(top), verifies=True, options=ALONE, hooks=hooks)


def read_back_error(here: Path) -> None:
    flattened(here, lambda: put(here / "top.raw", CLUSTER, b"!"), [])


def not_read_back_error(here: Path) -> None:
    stopping: list[bool] = []
    flattened(here, lambda: stopping.append(True), stopping)


def unverified_error(here: Path) -> None:
    flattened(here, lambda: os.unlink(here / "top.add-cow"), [])


def stopped_by(number: int, here: Path) -> None:
    from addcow_mp.cli.working import working
    from addcow_mp.jobs.commit import commit

    with working((None, None)) as hooks:
        os.kill(os.getpid(), number)
        commit(str(pair(here, "AB", "-X")), options=ALONE, hooks=hooks)


def outside_error(here: Path) -> None:
    (here / "sub").mkdir()
    draw_raw(here / "base.img", "A")
    draw(here / "sub" / "top.add-cow", "-X", backing="../base.img")
    addcow_mp.open(here / "sub" / "top.add-cow")


def locked_error(here: Path) -> None:
    top = pair(here, "AB", "-X")
    with addcow_mp.open(top, writable=True):
        addcow_mp.commit(top, jobs=0)


def guest_runs_error(here: Path) -> None:
    top = pair(here, "AB", "-X")
    with addcow_mp.open(top, writable=True):
        take_back(str(top))


def held_error(here: Path) -> None:
    top = pair(here, "AB", "-X")
    with loops() as made:
        fd = os.open(made.bind(here / "base.img"), os.O_RDONLY | os.O_EXCL)
        made.later(os.close, fd)
        holders.forget_loops()
        addcow_mp.commit(top, jobs=0)


def no_locks_error(here: Path) -> None:
    top = pair(here, "AB", "-X")

    def without_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "fcntl", without_locks)
        addcow_mp.commit(top, jobs=0)


def lent_error(tmp_path: Path) -> None:
    pair(tmp_path, "AB", "-X")
    succeed("qemu", "export", "top.add-cow", cwd=tmp_path)
    addcow_mp.commit(str(tmp_path / "top.add-cow"))


def hard_links_error(here: Path) -> None:
    top = pair(here, "AB", "-X")
    os.link(top, here / "again.add-cow")
    addcow_mp.flatten(top, jobs=0)


def dependants_error(here: Path) -> None:
    top = pair(here, "AB", "-X")
    draw(here / "other.add-cow", "-Y")
    addcow_mp.commit(top, jobs=0)


def space_error(here: Path) -> None:
    fstatvfs = os.fstatvfs

    def full(fd: int) -> os.statvfs_result:
        status = list(fstatvfs(fd))
        status[3] = status[4] = 1  # f_bfree, f_bavail
        return os.statvfs_result(status)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fstatvfs", full)
        addcow_mp.commit(pair(here, "--", "XY"), jobs=0)


def compare_error(here: Path) -> None:
    from addcow_mp.jobs.compare import compare

    missing = str(here / "missing.add-cow")
    compare(missing, missing, ("add-cow", "add-cow"), options=ALONE)


class _Killed:
    def __call__(self, task: Task, worker: WorkerContext) -> object:  # noqa: ARG002
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


class _Faulty:
    def __call__(self, task: Task, worker: WorkerContext) -> object:  # noqa: ARG002
        raise ZeroDivisionError("division by zero")


class _Stillborn(_Faulty):
    def __reduce__(self) -> tuple[Any, ...]:
        return (os._exit, (3,))


def failing(work: Work, jobs: int) -> None:
    with Pool(work, jobs) as pool:
        for result in pool.run([Task(0, 0, 8, 1)]):
            if isinstance(result, Failed):
                raise result.error


SCENARIOS: dict[str, Callable[[Path], None]] = {
    "UsageError": usage_error,
    "ImageError": image_error,
    "NotAddcowError": not_addcow_error,
    "FormatError": format_error,
    "UnsupportedError": unsupported_error,
    "FileError": file_error,
    "SyncError": sync_error,
    "RangeError": range_error,
    "WorkerError": worker_error,
    "StoppedError": stopped_error,
    "RestartsError": begins_anew_error,
    "CleanupError": unended_error,
    "ResourceError": resource_error,
    "UnfinishedError": unfinished_error,
    "InterruptedJobError": interrupted_error,
    "TerminatedJobError": terminated_error,
    "HangupJobError": hangup_error,
    "CpuLimitJobError": cpu_limit_error,
    "TimeLimitError": time_limit_error,
    "ManifestError": manifest_error,
    "ReadBackError": read_back_error,
    "NotReadBackError": not_read_back_error,
    "UnverifiedError": unverified_error,
    "OutsideError": outside_error,
    "LockedError": locked_error,
    "GuestRunsError": guest_runs_error,
    "NoLocksError": no_locks_error,
    "HeldError": held_error,
    "DependantsError": dependants_error,
    "HardLinksError": hard_links_error,
    "LentError": lent_error,
    "SpaceError": space_error,
    "CompareError": compare_error,
    "DiedError": lambda _: failing(_Killed(), 1),
    "UnexpectedError": lambda _: failing(_Faulty(), 0),
    "UnstartedError": lambda _: failing(_Stillborn(), 1),
}

EXIT_CODES = {
    "UsageError": 64,
    "CompareError": 2,
    "InterruptedJobError": 130,
    "TerminatedJobError": 143,
    "HangupJobError": 129,
    "CpuLimitJobError": 152,
    "TimeLimitError": 75,
}

# Of these the text says where, or it is put into one that does.
NO_PATH = {
    "ResourceError",
    "UsageError",
    "TimeLimitError",
    "DiedError",
    "UnexpectedError",
    "UnstartedError",
}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file be written beyond ``size``: the system answers as a full disk does."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@pytest.mark.parametrize("kind", [each for each in ERRORS if each is not AddcowError], ids=by_name)
def test_every_error_can_be_caused_by_a_user(tmp_path: Path, kind: type[AddcowError]) -> None:
    scenario = SCENARIOS.get(kind.__name__)
    assert scenario is not None, f"{kind.__name__} needs a scenario in this module"
    with pytest.raises(AddcowError) as caught:
        scenario(tmp_path)
    error = caught.value
    assert type(error) is kind, str(error)
    assert error.exit_code == EXIT_CODES.get(kind.__name__, 1)
    assert kind.__name__ in NO_PATH or str(tmp_path) in str(error)
    assert_sound(error)


def test_worker_error_names_its_clusters(tmp_path: Path) -> None:
    with pytest.raises(addcow_mp.WorkerError) as caught:
        worker_error(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'top.add-cow'}: clusters 0 to 2: {tmp_path / 'base.img'}:")
    assert "File too large" in text
    assert guest_picture(tmp_path / "top.add-cow") == "ABX"


def test_refused_command_changes_nothing(tmp_path: Path) -> None:
    top = pair(tmp_path, "AB", "-X")
    put(top, 24, b"\1")
    before = snapshot(tmp_path)
    for job in (addcow_mp.commit, addcow_mp.flatten, addcow_mp.open):
        with pytest.raises(addcow_mp.FormatError):
            job(top)
    assert snapshot(tmp_path) == before


# ---- other ways to fail ----


def test_file_truncated_while_it_is_read_is_reported(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABC", "-XY")
    with addcow_mp.open(top) as disk:
        os.truncate(tmp_path / "top.raw", CLUSTER)
        with pytest.raises(addcow_mp.FileError, match="was it cut short meanwhile"):
            disk.read(2 * CLUSTER, 1)


def test_backing_truncated_while_it_is_read_is_reported(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABC", "---")
    with addcow_mp.open(top) as disk:
        os.truncate(tmp_path / "base.img", CLUSTER)
        with pytest.raises(addcow_mp.FileError, match="was it cut short meanwhile"):
            disk.read(2 * CLUSTER, 1)


@pytest.mark.parametrize("length", [1, CLUSTER, 3 * CLUSTER - 1])
def test_write_that_does_not_fit_is_reported(tmp_path: Path, length: int) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    with addcow_mp.open(top, writable=True) as disk:
        with largest_file(length), pytest.raises(addcow_mp.FileError, match="File too large"):
            disk.write(0, b"y" * 3 * CLUSTER)
        assert disk.read(0, 3 * CLUSTER)[2 * CLUSTER :] == b"C" * CLUSTER
    assert bits(top) == ".1."


def test_bitmap_that_does_not_fit_is_reported(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    with addcow_mp.open(top, writable=True) as disk:
        disk.write(0, b"y")
        with largest_file(CLUSTER), pytest.raises(addcow_mp.FileError, match="write its bitmap"):
            disk.flush()
        with pytest.raises(addcow_mp.FileError, match="an earlier flush failed"):
            disk.write(0, b"z")
    assert bits(top) == ".1."


def test_device_opened_for_reading_refuses_writes(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    with addcow_mp.open(top) as disk:
        with pytest.raises(addcow_mp.ImageError, match="it is open for reading only"):
            disk.write(0, b"x")
        with pytest.raises(addcow_mp.ImageError, match="it is open for reading only"):
            disk.write_zeroes(0, 1)


def test_exception_in_the_with_block_publishes_nothing(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABC", "---")

    def fail() -> None:
        with addcow_mp.open(top, writable=True) as disk:
            disk.write(0, b"x" * CLUSTER)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert bits(top) == "..."


def test_failed_open_leaks_no_descriptor(tmp_path: Path) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    (tmp_path / "base.img").unlink()
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(addcow_mp.FileError):
            addcow_mp.open(top, writable=True)
        with pytest.raises(addcow_mp.FileError):
            addcow_mp.commit(top, jobs=0)
    # Fewer when what another test left behind has gone meanwhile.
    assert len(os.listdir("/proc/self/fd")) <= len(before)


def test_discard_does_not_remove_a_replaced_overlay(tmp_path: Path) -> None:
    with pytest.raises(addcow_mp.CleanupError, match="replaced meanwhile, and is not removed"):
        unended_error(tmp_path)
    assert (tmp_path / "top.add-cow").read_bytes() == b"the file of another program"
    assert look(tmp_path / "top.raw") == "AXC"


# ---- what is refused before anything is done ----


def deep(here: Path, count: int) -> Path:
    """A chain of so many overlays over base.img; returns the uppermost."""
    draw_raw(here / "base.img", "A")
    below, format_ = "base.img", "raw"
    for number in range(count):
        draw(here / f"{number}.add-cow", "-", below, backing_format=format_)
        below, format_ = f"{number}.add-cow", "add-cow"
    return here / below


def test_info_and_check_report_a_cycle(tmp_path: Path) -> None:
    draw(tmp_path / "one.add-cow", "-", "two.add-cow", backing_format="add-cow")
    draw(tmp_path / "two.add-cow", "-", "one.add-cow", backing_format="add-cow")
    said = refused("info", "--backing-chain", "one.add-cow", cwd=tmp_path)
    assert "comes back to this file" in said
    report = addcow_mp.check(tmp_path / "one.add-cow")
    assert [one.name for one in report.findings] == ["chain-cycle"]


@pytest.mark.long
@pytest.mark.parametrize("format_", ["qcow2", "vmdk", "luks"])
def test_backing_of_another_format_is_refused_by_name(tmp_path: Path, format_: str) -> None:
    draw_raw(tmp_path / "base.img", "A")
    draw(tmp_path / "top.add-cow", "-", backing_format=format_)
    for command in ("map", "commit", "flatten"):
        assert f"format '{format_}'" in refused(command, "top.add-cow", cwd=tmp_path)
    assert addcow("info", "top.add-cow", cwd=tmp_path).status == 0


def test_check_reports_a_damaged_backing(tmp_path: Path) -> None:
    top = deep(tmp_path, 2)
    put(tmp_path / "0.add-cow", 20, b"\1")
    findings = addcow_mp.check(top).findings
    assert [one.name for one in findings] == ["backing-file"]
    assert "cluster_bits is 1" in findings[0].message
    assert "cluster_bits is 1" in refused("map", top.name, cwd=tmp_path)


def test_check_reports_a_backing_that_is_no_overlay(tmp_path: Path) -> None:
    top = deep(tmp_path, 2)
    put(tmp_path / "0.add-cow", 0, b"XCOW")
    assert [one.name for one in addcow_mp.check(top).findings] == ["backing-file"]


def test_info_describes_an_overlay_without_its_backing(tmp_path: Path) -> None:
    draw(tmp_path / "top.add-cow", "-X", backing="missing.img")
    assert addcow_mp.info(tmp_path / "top.add-cow").names.backing == "missing.img"
    refused("info", "--backing-chain", "top.add-cow", cwd=tmp_path)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"size": -1}, "invalid size -1"),
        ({"size": 1 << 63}, "give 0 to 8 EiB"),
        ({"size": 512, "cluster_size": 5000}, "give a power of two"),
        ({"size": 512, "cluster_size": 2048}, "from 4k to 2048k"),
        ({"size": 512, "backing_format": "raw"}, "needs a backing file"),
        ({"backing": "base.img"}, "needs its format, which is never guessed"),
        ({"backing": "base.img", "backing_format": "qcow2"}, "'qcow2' is not supported"),
        ({"backing": "", "backing_format": "raw"}, "names no file"),
        ({"size": 512, "image": "a\0b"}, "names no file"),
        ({"size": 512, "image": "nbd:x"}, "names a protocol"),
        ({"size": 512, "image_format": "qcow2"}, "the image file is raw"),
        ({"size": 512, "image": "top.add-cow"}, "the same file"),
        ({"size": 512, "image": "base.img/x"}, "Not a directory"),
        ({"size": 512, "image": "x" * 300}, "File name too long"),
        ({"size": 512, "image": "."}, "a directory, not a regular file"),
        ({"backing": "base.img", "backing_format": "raw", "image": "base.img"}, "same file"),
    ],
)
def test_refused_create_leaves_nothing(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    draw_raw(tmp_path / "base.img", "A")
    before = snapshot(tmp_path)
    with pytest.raises(AddcowError) as caught:
        addcow_mp.create(tmp_path / "top.add-cow", **options)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert snapshot(tmp_path) == before


def test_create_refuses_an_image_of_the_backing_chain(tmp_path: Path) -> None:
    top = pair(tmp_path, "AB", "-X")
    for image in ("top.raw", "base.img"):
        with pytest.raises(addcow_mp.ImageError, match="the backing chain uses this file"):
            addcow_mp.create(
                tmp_path / "new.add-cow", backing=top, backing_format="add-cow", image=image
            )


def test_create_stores_a_path_with_a_colon(tmp_path: Path) -> None:
    draw_raw(tmp_path / "a:b.img", "A")
    addcow_mp.create(
        tmp_path / "top.add-cow", backing="./a:b.img", backing_format="raw", image="./c:d.raw"
    )
    names = addcow_mp.info(tmp_path / "top.add-cow").names
    assert (names.backing, names.image) == ("./a:b.img", "./c:d.raw")
    assert guest_picture(tmp_path / "top.add-cow") == "A"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["create", "-f", "raw", "new.raw"], "a raw file needs a size"),
        (["create", "-f", "raw", "-b", "x", "new.raw", "1M"], "a raw file has no such options"),
        (["create", "-b", "x", "-o", "backing_file=y", "new.add-cow"], "contradict each other"),
        (["create", "-o", "size=1", "new.add-cow"], "unknown option 'size=1'"),
        (["create", "new.add-cow", "9E"], "more than 8 EiB"),
        (["create", "new.add-cow", "much"], "invalid size 'much'"),
        (["create"], "Missing argument 'FILE'"),
    ],
)
def test_invalid_command_line_exits_with_64(
    tmp_path: Path, arguments: list[str], told: str
) -> None:
    assert told in refused(*arguments, cwd=tmp_path, status=64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("alloc 100", "offset 100 is not sector aligned"),
        ("read 0 512 512", "one offset and one length"),
        ("write -z -P 1 0 512", "cannot be specified at the same time"),
        ("read -P 256 0 512", "256 is not a valid pattern byte"),
        ("read -s 1 0 512", "-s and -l need a pattern"),
        ("read -P 1 -s 513 0 512", "exceeds end of read data"),
        ("read x 512", "non-numeric length argument -- x"),
        ("read -x 0 512", "option -x not recognized"),
        ("flush now", "bad argument count 1 to flush"),
        ("nonsense", 'command "nonsense" not found'),
    ],
)
def test_invalid_io_command_is_reported_and_the_next_one_runs(
    tmp_path: Path, command: str, told: str
) -> None:
    pair(tmp_path, "AB", "-X")
    result = addcow("io", "-c", command, "-c", "length", "top.add-cow", cwd=tmp_path)
    assert result.status == 1
    assert told in result.stderr
    assert result.lines == ["128 KiB"]


def test_io_help_lists_its_commands(tmp_path: Path) -> None:
    pair(tmp_path, "AB", "-X")
    said = addcow("io", "-c", "help", "-c", "?", "top.add-cow", cwd=tmp_path).stdout
    for word in ("read", "write", "aio_flush", "alloc", "map", "quit"):
        assert word in said


@pytest.mark.long
def test_short_bitmap_is_read_with_a_warning_and_not_written(tmp_path: Path) -> None:
    top = pair(tmp_path, "AB", "-X")
    os.truncate(top, CLUSTER)
    for command in (["info"], ["map"], ["io", "-r", "-c", "read -P 0x42 64k 64k"]):
        result = addcow(*command, "top.add-cow", cwd=tmp_path)
        assert result.status == 0
        assert "warning" in result.stderr
        assert "the file ends inside its bitmap" in result.stderr
    before = snapshot(tmp_path)
    for command in (["commit"], ["flatten"]):
        assert "inside its bitmap" in refused(*command, "top.add-cow", cwd=tmp_path)
    assert snapshot(tmp_path) == before


# ---- file systems that can do less ----


def test_extents_have_a_readable_repr(tmp_path: Path) -> None:
    pair(tmp_path, "A-C", "X--")
    os.truncate(tmp_path / "top.raw", 4 * CLUSTER)
    top = tmp_path / "top.add-cow"
    assert [repr(one) for one in addcow_mp.extents(top)] == [
        "Extent(0, 65536, depth=0, data)",
        "Extent(65536, 65536, depth=1, zero)",
        "Extent(131072, 65536, depth=1, data)",
        "Extent(196608, 65536, depth=0, absent)",
    ]


@pytest.fixture
def plain_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that knows no holes: it neither finds nor makes them."""
    lseek = os.lseek

    def without_holes(fd: int, position: int, whence: int) -> int:
        if whence in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return lseek(fd, position, whence)

    monkeypatch.setattr(os, "lseek", without_holes)
    monkeypatch.setattr(holes, "punch", lambda *_: False)


@pytest.mark.usefixtures("plain_files")
@pytest.mark.parametrize("top", ["-X0-", "bX-b", "----", "XXXX"])
def test_jobs_give_the_same_result_without_support_for_holes(tmp_path: Path, top: str) -> None:
    path = pair(tmp_path, "AB-D", top)
    wanted = guest_picture(path)
    local = addcow_mp.info(path).allocated_clusters
    assert local == sum(mark in "X0" for mark in top)
    addcow_mp.convert(path, tmp_path / "new.raw", jobs=0)
    assert look(tmp_path / "new.raw") == wanted
    addcow_mp.flatten(path, jobs=0)
    assert look(tmp_path / "top.raw") == wanted
    addcow_mp.commit(path, jobs=0)
    assert look(tmp_path / "base.img") == wanted
    assert bits(path) == "...."


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("map", "top.raw"),
        ("map", "base.img"),
        ("commit", "top.raw"),
        ("flatten", "top.raw"),
        ("flatten", "base.img"),
        ("check", "top.raw"),
        ("convert", "top.raw"),
    ],
)
def test_failed_seek_for_data_names_the_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    command: str,
    name: str,
) -> None:
    lseek = os.lseek

    def failing(fd: int, position: int, whence: int) -> int:
        if whence == os.SEEK_DATA and os.readlink(f"/proc/self/fd/{fd}").endswith(name):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return lseek(fd, position, whence)

    top = str(pair(tmp_path, "ABC", "-X-"))
    monkeypatch.setattr(os, "lseek", failing)
    options = {"convert": ["-O", "raw", "--jobs", "0", top, str(tmp_path / "new.raw")]}
    status = run([command, *options.get(command, [top])])
    complaint = capfd.readouterr().err
    assert (status, complaint.count("\n")) == (1, 1)
    assert str(tmp_path / name) in complaint
    assert "Input/output error" in complaint


@pytest.mark.parametrize(
    ("number", "kind", "told"),
    [
        (errno.ENOLCK, addcow_mp.NoLocksError, "cannot lock it: No locks available"),
        (errno.EAGAIN, addcow_mp.LockedError, "in use"),
    ],
)
def test_file_that_cannot_be_locked_is_not_opened(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: type[AddcowError],
    told: str,
) -> None:
    usual = fcntl.fcntl

    def without_locks(fd: int, command: int, *rest: Any) -> Any:
        unlocks = struct.pack("h", fcntl.F_UNLCK)
        if command == fcntl.F_OFD_SETLK and not rest[0].startswith(unlocks):
            raise OSError(number, os.strerror(number))
        return usual(fd, command, *rest)

    top = pair(tmp_path, "ABC", "-X-")
    before = snapshot(tmp_path)
    monkeypatch.setattr(fcntl, "fcntl", without_locks)
    for job in (addcow_mp.open, addcow_mp.commit, addcow_mp.flatten):
        with pytest.raises(kind, match=told):
            job(top)
    assert snapshot(tmp_path) == before


def test_failed_close_names_the_file(tmp_path: Path) -> None:
    file = File.create(str(tmp_path / "new"))
    os.close(file.fd)  # a file system that had kept a failed write back would answer like this
    with pytest.raises(addcow_mp.FileError, match="new: cannot close it: Bad file descriptor"):
        file.close()
    file.close()


def test_punch_of_a_device_or_read_only_file(tmp_path: Path) -> None:
    with open("/dev/null", "r+b") as null:
        assert holes.punch(null.fileno(), 0, 4096) is False
    (tmp_path / "file").write_bytes(b"x" * 4096)
    with (tmp_path / "file").open("rb") as reader, pytest.raises(OSError, match="Bad file"):
        holes.punch(reader.fileno(), 0, 4096)
    assert (tmp_path / "file").read_bytes() == b"x" * 4096


def test_failed_punch_is_reported_and_harmless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    top = pair(tmp_path, "ABC", "-X-")
    monkeypatch.setattr(holes, "punch", fail)
    with pytest.raises(addcow_mp.FileError, match="cannot free"):
        addcow_mp.commit(top, jobs=0)
    assert (guest_picture(top), bits(top)) == ("AXC", "...")
    monkeypatch.undo()
    addcow_mp.commit(top, jobs=0)
    assert look(tmp_path / "top.raw") == "000"


def test_package_has_only_its_public_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = addcow_mp.nonsense  # type: ignore[attr-defined]
    assert all(hasattr(addcow_mp, name) for name in addcow_mp._HOMES)


def test_aborted_job_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from addcow_mp.jobs.commit import commit

    fdatasync, gone = os.fdatasync, threading.Event()

    def slow(fd: int) -> None:
        gone.wait(1)  # the disk takes its time
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", slow)
    monkeypatch.setattr(checkpoints, "CHECKPOINT_BYTES", 1)
    top, size = tmp_path / "top.add-cow", 2048 * CLUSTER
    draw_raw(tmp_path / "base.img", "A")
    draw_raw(tmp_path / "top.raw", "X")
    for path in ("base.img", "top.raw"):
        os.truncate(tmp_path / path, size)
    top.write_bytes(
        overlay_bytes(image="top.raw", size=size, backing="base.img", local=range(2048))
    )
    begun = threading.Event()

    def progress(done: int, total: int) -> None:
        # After the second task, when the checkpoint of the first one is under way.
        if begun.is_set():
            raise KeyboardInterrupt
        begun.set()

    with pytest.raises(KeyboardInterrupt):
        commit(str(top), options=ALONE, hooks=Hooks(progress))
    left = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    gone.set()
    for thread in left:
        thread.join()
    assert left == []


# ---- in one line, whatever happens ----


def test_file_name_with_a_newline_is_reported_in_one_line(tmp_path: Path) -> None:
    assert r"two\nlines" in refused("info", "two\nlines", cwd=tmp_path)


def test_backing_name_with_a_newline_is_reported_in_one_line(tmp_path: Path) -> None:
    draw(tmp_path / "top.add-cow", "-X", backing="two\nlines")
    assert r"two\nlines" in refused("map", "top.add-cow", cwd=tmp_path)


def test_finding_with_a_newline_in_a_name_is_one_line(tmp_path: Path) -> None:
    draw(tmp_path / "top.add-cow", "-X", backing="two\nlines")
    result = addcow("check", "-q", "top.add-cow", cwd=tmp_path)
    assert result.status == 2
    assert len(result.lines) == 1


STRANGE = {
    "not-utf-8": os.fsdecode(b"disk-\xff.raw"),
    "umlaut": "dïsk.raw",
    "escape": "disk\x1b[31m.raw",
}
STRICT = ["utf-8:strict", "ascii:strict", "latin-1:strict"]


@pytest.mark.parametrize("encoding", STRICT)
@pytest.mark.parametrize("name", STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize("command", ["info", "map", "check"])
def test_name_that_the_encoding_lacks_is_printed_with_escapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str, encoding: str
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    draw_raw(tmp_path / "base.img", "A")
    draw_raw(tmp_path / name, "X")
    content = overlay_bytes(image=name, size=CLUSTER, backing="base.img", local=[0])
    (tmp_path / "top.add-cow").write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-m", "addcow_mp", command, "top.add-cow"],
        cwd=tmp_path,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.stderr == b""
    assert done.returncode == 0


@pytest.mark.long
def test_closed_pipe_ends_map_without_a_message(tmp_path: Path) -> None:
    pair(tmp_path, "AB" * 2000, "-X" * 2000)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "addcow_mp", "map", "top.add-cow"],
        cwd=tmp_path,
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=PATIENCE,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_interrupt_is_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "preadv", interrupted)
    assert run(["info", str(pair(tmp_path, "AB", "-X"))]) == 130
    assert capsys.readouterr().err == "addcow: interrupted\n"


def test_lack_of_memory_is_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(os, "preadv", exhausted)
    assert run(["info", str(pair(tmp_path, "AB", "-X"))]) == 1
    told = capsys.readouterr().err
    assert told.startswith("addcow: out of memory")
    assert told.count("\n") == 1


def test_short_reads_and_writes_are_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, preadv = os.pwrite, os.preadv

    def read_partly(fd: int, views: list[memoryview], offset: int) -> int:
        return preadv(fd, [views[0][: 4 * KiB + 1]], offset)

    def partly(fd: int, data: bytes | memoryview, offset: int) -> int:
        return pwrite(fd, memoryview(data)[: 4 * KiB - 1], offset)

    monkeypatch.setattr(os, "pwrite", partly)
    monkeypatch.setattr(os, "preadv", read_partly)
    top = pair(tmp_path, "ABC", "-XY")
    addcow_mp.commit(top, jobs=0)
    assert look(tmp_path / "base.img") == "AXY"
    with addcow_mp.open(top, writable=True) as disk:
        disk.write(0, b"Z" * 2 * CLUSTER)
    assert guest_picture(top) == "ZZY"


@pytest.mark.parametrize("command", ["info", "map", "check", "flatten", "commit", "convert"])
def test_control_characters_in_a_name_are_escaped(tmp_path: Path, command: str) -> None:
    """Whatever is said of files, in whichever stream, has no control character in it."""
    image, backing = "disk\x1b[31m\x07.raw", "gone\x9b31m\x7f.img"
    draw_raw(tmp_path / image, "X-")
    content = overlay_bytes(image=image, size=2 * CLUSTER, backing=backing, local=[0])
    (tmp_path / "top.add-cow").write_bytes(content)
    words = ["convert", "-O", "raw"] if command == "convert" else [command]
    told = addcow(*words, "top.add-cow", *["new.raw"] * (command == "convert"), cwd=tmp_path)
    assert not any(ord(one) < 32 or 127 <= ord(one) < 160 for one in told.said.replace("\n", ""))
    if command != "info":
        assert r"gone\x9b31m\x7f.img" in told.said


def test_removal_without_a_durable_directory_is_reported(tmp_path: Path) -> None:
    top = pair(tmp_path, "AB", "-X")
    rules = Rules.write(tmp_path / "rules", rule("directory_sync", "error"))
    with running("flatten", "--discard", "top.add-cow", cwd=tmp_path, rules=rules) as job:
        ended = job.end()
    assert ended.status == 1
    assert "the .add-cow file is removed, and may be back after a power cut" in ended.stderr
    assert os.strerror(errno.EIO) in ended.stderr
    assert not top.exists()
    assert look(tmp_path / "top.raw") == "AX"


def test_create_with_an_empty_image_takes_the_size_of_the_backing(tmp_path: Path) -> None:
    """A create that was killed in its first moments leaves one; the next one makes it whole."""
    draw_raw(tmp_path / "base.img", "ABC")
    (tmp_path / "top.raw").touch()
    succeed("create", "-b", "base.img", "-F", "raw", "top.add-cow", cwd=tmp_path)
    assert (tmp_path / "top.raw").stat().st_size == 3 * CLUSTER
    assert guest_picture(tmp_path / "top.add-cow") == "ABC"


def test_create_with_an_empty_image_and_no_backing_needs_a_size(tmp_path: Path) -> None:
    (tmp_path / "top.raw").touch()
    assert "give a size" in refused("create", "top.add-cow", cwd=tmp_path, status=64)
    assert not (tmp_path / "top.add-cow").exists()


def test_dead_file_system_is_reported_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XFS, shut down, answers even a look at an open file with an error."""
    top = addcow_mp.open(pair(tmp_path, "AB", "-X"))

    def dead(_: int) -> os.stat_result:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fstat", dead)
    with pytest.raises(addcow_mp.FileError, match=r"top\.raw: cannot look at it"):
        _ = top.image.file.length
    with pytest.raises(addcow_mp.FileError, match=r"top\.add-cow: cannot look at its bitmap"):
        list(top.bitmap.data_runs())
    monkeypatch.undo()
    top.close()


# ---- streams that are closed or full ----


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "2>/dev/full"])
@pytest.mark.parametrize("command", ["info top", "flatten -p top", "commit -q top", "info gone"])
def test_closed_standard_streams_are_no_failure(tmp_path: Path, command: str, closed: str) -> None:
    """Least of all for an image to be opened as the stream that complaints go to."""
    pair(tmp_path, "ABC", "-X-")
    words = f'"$0" -m addcow_mp {command}.add-cow {closed}'
    done = ran(["sh", "-c", words, sys.executable], cwd=tmp_path)
    assert done.returncode == ("gone" in command)
    assert "Traceback" not in done.stderr
    picture = {"flatten": ("AXC", "111"), "commit": ("AXC", "...")}
    shown = picture.get(command.split(maxsplit=1)[0], ("AXC", ".1."))
    assert (guest_picture(tmp_path / "top.add-cow"), bits(tmp_path / "top.add-cow")) == shown


def test_name_in_an_image_cannot_forge_a_line_of_info(tmp_path: Path) -> None:
    draw(tmp_path / "top.add-cow", "-X", backing="base\nvirtual size: 9 TiB")
    lines = addcow("info", "top.add-cow", cwd=tmp_path).lines
    assert [line for line in lines if line.startswith("virtual size")] == [
        "virtual size: 128 KiB (131072 bytes)"
    ]


def test_empty_root_is_refused(tmp_path: Path) -> None:
    pair(tmp_path, "ABC", "-X-")
    assert "--root ''" in refused("info", "--root", "", "top.add-cow", cwd=tmp_path, status=64)


def test_discard_that_cannot_remove_is_refused_before_any_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = pair(tmp_path, "ABC", "-X-")
    before = snapshot(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    with pytest.raises(addcow_mp.ImageError, match="leave --discard out"):
        addcow_mp.flatten(top, discard=True)
    assert snapshot(tmp_path) == before


def documented_statuses() -> dict[str, set[str]]:
    """Return the exit statuses of each command in docs/errors.md."""
    text = (Path(__file__).parent.parent / "docs" / "errors.md").read_text()
    statuses: dict[str, set[str]] = {}
    for command, status in re.findall(r"^\| `([a-z ]+)` \| (\d+) \|", text, re.MULTILINE):
        statuses.setdefault(command, set()).add(status)
    return statuses


def statuses_in_help(command: str) -> set[str]:
    module = import_module(f"addcow_mp.cli.commands.{command.replace(' ', '.')}")
    sentence = module.command.__doc__.partition("Exit status:")[2]
    return set(re.findall(r"\b\d+\b", sentence))


def test_help_and_documentation_give_the_same_exit_statuses() -> None:
    documented = documented_statuses()
    assert {command: statuses_in_help(command) for command in documented} == documented


def stopped_commit(here: Path) -> None:
    commit_job(str(here / "top.add-cow"), keep=True, options=ALONE, hooks=STOPPING)


def stopped_compare(here: Path) -> None:
    names = str(here / "top.add-cow"), str(here / "base.img")
    compare_job(*names, ("add-cow", "raw"), options=ALONE, hooks=STOPPING)


@pytest.mark.parametrize("job", [stopped_commit, stopped_compare])
def test_stopped_command_without_checkpoints_says_so(
    tmp_path: Path, job: Callable[[Path], None]
) -> None:
    pair(tmp_path, "ABC", "XXX")
    with pytest.raises(addcow_mp.StoppedError, match="the same command starts again"):
        job(tmp_path)
