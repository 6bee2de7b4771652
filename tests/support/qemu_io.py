"""A qemu-io that is asked one thing after the other, and may be killed at any moment.

It answers each command with a prompt, so a test knows what was done. Two commands at once are more
than it takes from a pipe.

:meth:`QemuIo.hold_flush` stops a flush of a qcow2 file between two steps: tables have been given to
the kernel, and nothing has been made durable yet. For that the node must have been made by
:func:`interruptible`. In this window, which is short otherwise, tables can reach the disk before
the data.
"""

from __future__ import annotations

import copy
import json
import select
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

from support.victim import PATIENCE

PROMPT = b"qemu-io> "
_HELD = "held"


class QemuIo:
    """A running qemu-io. A context manager, which kills it."""

    def __init__(self, *words: str, cwd: Path) -> None:
        self._process = subprocess.Popen(
            ["qemu-io", *words],
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
        )
        self._read()

    def __enter__(self) -> QemuIo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self.kill()

    def ask(self, command: str) -> None:
        """Send a command without waiting for its answer; it must be the last one."""
        assert self._process.stdin is not None
        self._process.stdin.write(command.encode() + b"\n")

    def run(self, command: str) -> None:
        """Run a command to its end."""
        self.ask(command)
        told = self._read()
        assert b"rror" not in told, (command, told)
        assert b"ailed" not in told, (command, told)

    def hold_flush(self) -> None:
        """Let the next flush stop, and all that is durable only after it."""
        self.run(f"break flush_to_disk {_HELD}")

    def wait_until_held(self) -> None:
        """Wait until a flush has stopped."""
        self.run(f"wait_break {_HELD}")

    def kill(self) -> None:
        """Kill it, and wait for its end."""
        self._process.kill()
        self._process.communicate(timeout=PATIENCE)

    def _read(self) -> bytes:
        """What it says until its next prompt."""
        assert self._process.stdout is not None
        told = b""
        while not told.endswith(PROMPT):
            ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
            assert ready, f"qemu-io is silent: {told!r}"
            more = self._process.stdout.read(4096)
            assert more, f"qemu-io has ended: {told!r}"
            told += more
        return told


def interruptible(described: dict[str, Any]) -> str:
    """The name for qemu-io of a qcow2 node (`addcow qemu args`) whose flushes can be held."""
    node = copy.deepcopy(described)
    node.pop("node-name", None)
    node["file"] = {"driver": "blkdebug", "image": node["file"]}
    return "json:" + json.dumps(node)
