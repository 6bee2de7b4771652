"""A real command with all the processes that it starts.

`Job` answers "which processes are there, and what becomes of them?". The command runs in a
process group of its own: whatever it starts, orphans included, is found by that group in /proc,
and whatever a test leaves behind is killed by its number.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from support.command import PATIENCE
from support.fault_rules import VARIABLE, Rules

#: Between two looks at /proc, which has no way to wait for another's child to stop.
LOOK_AGAIN = 0.004


class Ended(NamedTuple):
    """How a command ended: a negative status is the signal that killed it."""

    status: int
    stdout: str
    stderr: str


class Process(NamedTuple):
    """A line of /proc: the state is a letter, T for stopped."""

    pid: int
    state: str
    command: str

    @property
    def is_worker(self) -> bool:
        """Whether it is a worker, as opposed to Python's own tracker of resources."""
        return "spawn_main" in self.command


class Job:
    """A running command with all that it starts."""

    def __init__(self, *arguments: str, cwd: Path, rules: Rules | None = None) -> None:
        self._out, self._err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "addcow_mp", *arguments],
            cwd=cwd,
            env={**os.environ, VARIABLE: "" if rules is None else str(rules.path)},
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            start_new_session=True,
        )
        self._end = os.pidfd_open(self._process.pid)

    @property
    def pid(self) -> int:
        """The number of the parent, and of the group."""
        return self._process.pid

    @property
    def stderr(self) -> str:
        """What all its processes have complained of so far."""
        return os.pread(self._err.fileno(), 1 << 20, 0).decode()

    def members(self) -> list[Process]:
        """The processes of the group that have not ended."""
        return [one for one in _group(self.pid) if one.state not in "ZX"]

    def workers(self) -> list[int]:
        """The numbers of the workers that have not ended."""
        return [one.pid for one in self.members() if one.is_worker]

    def stopped(self, count: int = 1) -> list[int]:
        """Wait until ``count`` processes have stopped; return their numbers."""
        found: list[int] = []

        def look() -> bool:
            assert not self.has_ended, f"it ended without stopping: {self.stderr}"
            found[:] = [one.pid for one in self.members() if one.state == "T"]
            return len(found) >= count

        self.until(look, f"{count} processes to stop")
        return found

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Look until the condition holds; fail when it does not within all patience."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"waited too long for {what}: {self.stderr}"
            select.select([self._end], [], [], LOOK_AGAIN)

    @property
    def has_ended(self) -> bool:
        """Whether the parent has ended."""
        return bool(select.select([self._end], [], [], 0)[0])

    def signal(self, number: int, *pids: int) -> None:
        """Send a signal to processes of the job, to the parent when none is named."""
        for pid in pids or (self.pid,):
            os.kill(pid, number)

    def has_met(self, number: int) -> bool:
        """Whether the parent has met this signal once: it catches only the first."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
        return not int(caught.split()[1], 16) >> (number - 1) & 1

    def is_round(self) -> Callable[[], bool]:
        """Return what says whether the parent, which waits by turns, has gone round since now."""
        before = self._rests()
        return lambda: self._rests() >= before + 2

    def _rests(self) -> int:
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    def end(self) -> Ended:
        """Wait for the parent's end."""
        status = self._process.wait(PATIENCE)
        assert "Traceback" not in self.stderr, self.stderr
        return Ended(status, os.pread(self._out.fileno(), 1 << 20, 0).decode(), self.stderr)

    def all_gone(self) -> None:
        """Wait until no process of the job is left."""
        self._process.wait(PATIENCE)
        self.until(lambda: not self.members(), "the last process to end")
        assert "Traceback" not in self.stderr, self.stderr

    def close(self) -> None:
        """Kill what is left, by number."""
        while left := self.members():
            for one in left:
                with suppress(ProcessLookupError):
                    os.kill(one.pid, signal.SIGKILL)
            self._process.wait(PATIENCE)
        os.close(self._end)
        self._out.close()
        self._err.close()


@contextmanager
def running(*arguments: str, cwd: Path, rules: Rules | None = None) -> Iterator[Job]:
    """Run a command during the block; nothing of it is left afterwards."""
    job = Job(*arguments, cwd=cwd, rules=rules)
    try:
        yield job
    finally:
        job.close()


def _group(number: int) -> Iterator[Process]:
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it may end while it is looked at
            stat = Path(f"/proc/{entry}/stat").read_text(errors="replace")
            state, _, group = stat[stat.rindex(")") + 1 :].split()[:3]
            if int(group) == number:
                command = Path(f"/proc/{entry}/cmdline").read_text(errors="replace")
                yield Process(int(entry), state, command)


def shared_memory(pid: int) -> set[str]:
    """Return the files in memory, by name, that a process has mapped."""
    maps = Path(f"/proc/{pid}/maps").read_text("utf-8", "replace")
    return set(re.findall(r"/dev/shm/\S+", maps))  # noqa: S108 - where the kernel has it


def memory_of(job: Job) -> set[str]:
    """Return the named files in memory that processes of a job have mapped."""
    found: set[str] = set()
    for one in job.members():
        with suppress(OSError):
            found |= shared_memory(one.pid)
    return found


def until(condition: Callable[[], bool], what: str) -> None:
    """Look until the condition holds; fail when it does not within all patience."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited too long for {what}"
        time.sleep(LOOK_AGAIN)
