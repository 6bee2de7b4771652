"""A guest that runs while a test does something else: its console, and QMP to its machine."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import IO, Any

import guest


class QmpError(Exception):
    """What QEMU answers to a command that it refuses."""


class Running:
    """A machine with a guest, or one that has not begun (``-S``)."""

    def __init__(self, process: subprocess.Popen[str], qmp: IO[str]) -> None:
        self.process = process
        self.printed = ""
        self._qmp = qmp
        self._answer()  # the greeting
        self.qmp("qmp_capabilities")

    def wait_for(self, text: str) -> None:
        """Read the guest's console up to a line with ``text``."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed += line
            if text in line:
                return
        raise AssertionError(f"the guest did not print {text!r}:\n{self.printed}")

    def say(self, line: str) -> None:
        """Type a line on the guest's console."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a command of QMP; return what it answers. Raises :class:`QmpError`."""
        self._qmp.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._qmp.flush()
        answer = self._answer()
        if "error" in answer:
            raise QmpError(answer["error"]["desc"])
        return answer["return"]

    def wait_for_event(self, name: str) -> dict[str, Any]:
        """Wait until QEMU tells an event."""
        for line in self._qmp:
            message: dict[str, Any] = json.loads(line)
            if message.get("event") == name:
                return message
        raise AssertionError(f"QEMU ended without {name}")

    def _answer(self) -> dict[str, Any]:
        for line in self._qmp:
            message: dict[str, Any] = json.loads(line)
            if "event" not in message:
                return message
        raise AssertionError("QEMU ended without an answer")


@contextmanager
def running(directory: Path, disk: Sequence[str], orders: str, *options: str) -> Iterator[Running]:
    """Start a guest on a disk; it is killed at the end, unless it is off by then."""
    ours, theirs = socket.socketpair()
    chardev = ("-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "qmp,mode=control")
    with subprocess.Popen(
        [*guest.machine(directory, orders), *disk, *chardev, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[theirs.fileno()],
        text=True,
        errors="replace",
    ) as process:
        theirs.close()
        watchdog = Timer(guest.PATIENCE, process.kill)
        watchdog.start()
        try:
            with ours, ours.makefile("rw") as qmp:
                yield Running(process, qmp)
        finally:
            watchdog.cancel()
            process.kill()
