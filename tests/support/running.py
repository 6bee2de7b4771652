"""A guest that runs while a test does something else: its console, and a monitor of its machine."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Timer

import guest
from support.monitor import Qemu
from support.processes import until


class Console:
    """The serial line of a machine."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.printed = ""

    def wait_for(self, text: str) -> None:
        """Read what the guest prints up to a line with ``text``."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed += line
            if text in line:
                return
        raise AssertionError(f"the guest did not print {text!r}:\n{self.printed}")

    def say(self, line: str) -> None:
        """Type a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def wait_for_end(self) -> None:
        """Wait until the guest has done its orders and the machine is off."""
        self.wait_for(guest.DONE)
        assert self.process.wait(guest.PATIENCE) == 0


@contextmanager
def console(
    words: Sequence[str], here: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Console]:
    """Run a command that starts a machine; all its processes are killed at the end."""
    with subprocess.Popen(
        words,
        cwd=here,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
        errors="replace",
    ) as process:

        def kill() -> None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        watchdog = Timer(guest.PATIENCE, kill)
        watchdog.start()
        try:
            yield Console(process)
        finally:
            watchdog.cancel()
            kill()


@contextmanager
def running(
    directory: Path, disk: Sequence[str], orders: str, *options: str
) -> Iterator[tuple[Console, Qemu]]:
    """Start a machine on a disk; with ``-S`` its guest has not begun."""
    monitor = ("-qmp", "unix:own,server=on,wait=off")
    words = [*guest.machine(directory, orders), *disk, *monitor, *options]
    with console(words, directory) as machine:
        ended = machine.process.poll
        until(lambda: (directory / "own").exists() or ended() is not None, "the monitor to listen")
        with Qemu(machine.process, directory / "own") as qemu:
            yield machine, qemu
