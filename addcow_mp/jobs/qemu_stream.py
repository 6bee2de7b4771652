"""Streaming: QEMU makes every cluster of a lent overlay allocated, while its guest runs.

QEMU moves the bytes (its job ``block-stream``); this job starts it, follows it and stops it. At its
end the twin has no backing file any more. The image file alone is not yet the disk: the twin may
say that a cluster is zero where the image file has old data. The way back
(:mod:`addcow_mp.jobs.qemu_import`) settles that.

The job's id in QEMU contains the id of the lending. So a job that this command started and did not
see the end of is recognized: the next run follows it. A job that ends early loses nothing; what was
copied is allocated.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from addcow_mp.device.access import Access
from addcow_mp.device.chain import open_chain
from addcow_mp.device.files import identity_at
from addcow_mp.errors import ImageError, StoppedError
from addcow_mp.jobs.lending import State, lending_of, not_lent
from addcow_mp.jobs.options import NO_HOOKS, Hooks
from addcow_mp.jobs.qemu_monitor import CommandError, Monitor, connected, package
from addcow_mp.jobs.qemu_nodes import Wanted, twin_node

#: Seconds between two looks at the job, if no event comes: often enough for a progress bar.
EVERY = 0.2

#: Below this version QEMU fails an assertion in block-stream on extended entries.
FIRST_FOR_SECTORS = (10, 0)


class Streamed(NamedTuple):
    """How a stream has ended, after ``seconds``.

    ``node``: the node of the twin in QEMU. ``size``: the virtual size in bytes. ``before``: QEMU
    had finished it before this command.
    """

    filename: str
    twin: str
    image: str
    node: str
    size: int
    before: bool
    seconds: float

    def as_json(self) -> dict[str, object]:
        """The public keys."""
        return {
            "operation": "qemu stream",
            "filename": self.filename,
            "twin": self.twin,
            "image": self.image,
            "node": self.node,
            "virtual-size": self.size,
            "streamed-before": self.before,
            "seconds": round(self.seconds, 6),
            "left-to-do": ["addcow", "qemu", "import", "--discard", self.filename],
        }


class _Lent(NamedTuple):
    """What is streamed."""

    path: str
    wanted: Wanted
    size: int
    job: str
    extended: bool


def stream(
    path: str,
    socket: str,
    *,
    rate: int = 0,
    access: Access | None = None,
    hooks: Hooks = NO_HOOKS,
) -> Streamed:
    """Make every cluster of the lent overlay at ``path`` allocated in the running QEMU.

    ``socket``: QEMU's monitor. ``rate``: bytes per second; 0 = no limit. Raises
    :class:`AddcowError`; :class:`StoppedError` when ``hooks`` asked to stop.
    """
    start = time.monotonic()
    package()
    lent = _lent(path, access or Access())
    with connected(socket, hooks.looking) as monitor, _refusals(path):
        _refuse_version(monitor, lent)
        node = twin_node(monitor, lent.wanted)
        if node.has_backing:
            _begin(monitor, lent, node.name, rate)
            _finish(monitor, lent, hooks)
    hooks.progress(lent.size, lent.size)
    seconds = time.monotonic() - start
    twin, image = lent.wanted.path, lent.wanted.image_path
    return Streamed(path, twin, image, node.name, lent.size, not node.has_backing, seconds)


def _lent(path: str, access: Access) -> _Lent:
    """What is lent to QEMU. Raises :class:`ImageError` where that cannot be streamed."""
    with open_chain(path, access=access._replace(share=True), lent=True) as overlay:
        image = overlay.image.file
        lending = lending_of(overlay.cow, overlay.header, image)
        if lending.state is not State.LENT or lending.twin is None or lending.header is None:
            raise not_lent(path, lending)
        if overlay.backing is None:
            raise ImageError(path=path, problem="it has no backing file: there is nothing to copy")
        identity = identity_at(lending.twin)
        if identity is None:
            raise not_lent(path, lending._replace(state=State.TWIN_MISSING))
        wanted = Wanted(lending.twin, identity, image.path, image.identity)
        job = f"addcow-{lending.mark.lent_id:x}"
        return _Lent(path, wanted, overlay.size, job, lending.header.extended)


@contextmanager
def _refusals(path: str) -> Iterator[None]:
    """A block in which QEMU's refusal of a command is an error about ``path``."""
    try:
        yield
    except CommandError as error:
        raise ImageError(path=path, problem=f"QEMU refuses: {error}") from error


def _refuse_version(monitor: Monitor, lent: _Lent) -> None:
    version = monitor.execute("query-version")["qemu"]
    if lent.extended and (version["major"], version["minor"]) < FIRST_FOR_SECTORS:
        first = ".".join(map(str, FIRST_FOR_SECTORS))
        found = f"{version['major']}.{version['minor']}.{version['micro']}"
        raise ImageError(
            path=lent.path,
            problem=f"it was lent with --crash relaxed, and this QEMU {found} would abort; stream "
            f"it in QEMU {first} or later, or take it back and lend it with --crash strict",
        )


def _begin(monitor: Monitor, lent: _Lent, node: str, rate: int) -> None:
    """Start the job, or go on with the one that an earlier command has left."""
    if _running(monitor, lent.job) is None:
        monitor.execute("block-stream", job_id=lent.job, device=node, speed=rate)
    else:
        with suppress(CommandError):  # it has just ended
            monitor.execute("block-job-set-speed", device=lent.job, speed=rate)


def _running(monitor: Monitor, job: str) -> dict[str, Any] | None:
    found: list[dict[str, Any]] = monitor.execute("query-block-jobs")
    return next((one for one in found if one["device"] == job), None)


def _finish(monitor: Monitor, lent: _Lent, hooks: Hooks) -> None:
    """Wait for the end of the job. Raises when it ends before all is allocated."""
    problem, is_stopped = _follow(monitor, lent.job, hooks)
    if problem is not None:
        problem = f"QEMU cannot copy all of it: {problem}; the same command continues"
        raise ImageError(path=lent.path, problem=problem)
    if not twin_node(monitor, lent.wanted).has_backing:
        return
    if is_stopped:
        raise StoppedError(path=lent.path)
    problem = "another program has cancelled the job in QEMU; the same command continues"
    raise ImageError(path=lent.path, problem=problem)


def _follow(monitor: Monitor, job: str, hooks: Hooks) -> tuple[str | None, bool]:
    """Follow the job to its end; the error that QEMU names, and whether it was asked to stop."""
    problem, is_stopped, is_paused = None, False, False
    while (found := _running(monitor, job)) is not None:
        if found["len"]:
            hooks.progress(found["offset"], found["len"])
        if found["status"] == "paused" and not is_paused:
            is_paused = True
            hooks.note("the job is paused in QEMU, and waits for 'job-resume' there")
        if hooks.stopping() and not is_stopped:
            is_stopped = True
            with suppress(CommandError):  # it has just ended
                monitor.execute("job-cancel", id=job)
        problem = _problem(monitor.events(EVERY), job) or problem
    return _problem(monitor.events(0), job) or problem, is_stopped


def _problem(events: list[dict[str, Any]], job: str) -> str | None:
    """The error with which the job has ended, if it is among the events."""
    for event in events:
        data = event.get("data", {})
        if event["event"] == "BLOCK_JOB_COMPLETED" and data.get("device") == job:
            error: str | None = data.get("error")
            return error
    return None
