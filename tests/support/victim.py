"""A command that will not be allowed to end by itself.

It runs in a session of its own, so that all its processes can be found: the parent, its
workers, and the helper that Python's multiprocessing keeps to release shared memory. Whoever
ends a victim spares that helper, which then tidies up what the others left behind and goes.

Output goes to files: it is there whatever became of the process, and nothing has to be read
while the command runs. Nothing here sleeps or waits without an end.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

SMALL_STEPS = Path(__file__).with_name("small_steps.py")

# Far beyond what any command here needs. Only a hang takes so long.
PATIENCE = 60.0

# Milliseconds between two looks at a running victim.
TICK = 3


class Process(NamedTuple):
    """One process of a victim; ``state`` as in /proc, where T is stopped."""

    pid: int
    state: str


class Hang(Exception):  # noqa: N818 - what it is, not what it does
    """Something did not happen within all patience."""


class Victim:
    """A running addcow in small steps, synced in ``order``, under fault ``rules``."""

    def __init__(
        self, words: Sequence[str], scratch: Path, *, stdin: str = "", rules: str = "", order: str
    ) -> None:
        self.words = words
        self._output, self._errors = scratch / "stdout", scratch / "stderr"
        (scratch / "stdin").write_text(stdin)
        (scratch / "rules").write_text(rules)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if rules:
            environment["ADDCOW_FAULTS"] = str(scratch / "rules")
        with (
            open(scratch / "stdin", "rb") as source,
            open(self._output, "wb") as output,
            open(self._errors, "wb") as errors,
        ):
            self._process = subprocess.Popen(
                [sys.executable, str(SMALL_STEPS), order, *words],
                stdin=source,
                stdout=output,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )

    def __enter__(self) -> Victim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self.destroy()

    # Looking

    @property
    def pid(self) -> int:
        """The parent's number."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status; negative for a signal, None while it runs."""
        return self._process.poll()

    @property
    def stdout(self) -> str:
        """What has been printed so far."""
        return self._output.read_text()

    @property
    def stderr(self) -> str:
        """What it has complained about so far."""
        return self._errors.read_text(errors="replace")

    def processes(self) -> list[Process]:
        """The parent and its workers, as far as they live."""
        return [one for one in _session(self.pid) if not _is_tracker(one.pid)]

    @property
    def workers(self) -> list[Process]:
        """The living processes that the parent has started for its work."""
        return [one for one in self.processes() if one.pid != self.pid]

    @property
    def stopped(self) -> bool:
        """Whether a rule has stopped one of its processes."""
        return any(one.state in "Tt" for one in self.processes())

    def watch(self, tick: float = TICK) -> Iterator[None]:
        """Come back every ``tick`` milliseconds until the parent has ended."""
        deadline = time.monotonic() + PATIENCE
        with _opened(self.pid) as fd:
            while self.status is None and not (fd is not None and _ended(fd, tick)):
                if time.monotonic() > deadline:
                    raise Hang(f"{self} runs on and on")
                yield

    def linger(self, seconds: float) -> None:
        """Let it run for so long, or until its parent has ended."""
        with _opened(self.pid) as fd:
            if fd is not None:
                select.select([fd], [], [], seconds)

    # Ending

    def wait(self) -> int:
        """Wait until it has ended by itself, workers included; return its status."""
        for _ in self.watch():
            pass
        status = self._process.wait(PATIENCE)
        self._wait_for_the_rest()
        return status

    def kill_parent(self) -> int:
        """Kill the parent alone and wait for the others, who must end by themselves."""
        self._process.kill()
        status = self._process.wait(PATIENCE)
        self._wait_for_the_rest()
        return status

    def destroy(self) -> None:
        """Kill all that is left of it."""
        while left := self.processes():
            for one in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one.pid, signal.SIGKILL)
            self._process.wait(PATIENCE)
            for one in left:
                _wait_for(one.pid)
        self._process.wait(PATIENCE)
        self._wait_for_the_rest()

    def _wait_for_the_rest(self) -> None:
        while left := _session(self.pid):
            for one in left:
                _wait_for(one.pid)

    def __str__(self) -> str:
        return f"addcow {' '.join(self.words)} (pid {self.pid})"


def _session(leader: int) -> list[Process]:
    """The living processes of a session."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                # Behind the command's name, which may hold anything.
                state, _, _, session = file.read().rpartition(")")[2].split()[:4]
            if int(session) == leader and state not in "ZX":
                found.append(Process(int(name), state))
    return found


def _is_tracker(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return b"resource_tracker" in file.read()
    return False


@contextlib.contextmanager
def _opened(pid: int) -> Iterator[int | None]:
    """A descriptor of the process; None when it has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _ended(fd: int, milliseconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(milliseconds))


def _wait_for(pid: int) -> None:
    with _opened(pid) as fd:
        if fd is not None and not _ended(fd, PATIENCE * 1000):
            raise Hang(f"process {pid} lives on without its parent")
