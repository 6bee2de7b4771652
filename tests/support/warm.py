"""A server that runs commands quickly: hundreds of them, each with a fault of its own.

`Warm` answers "what is left on the disk after a fault at this place?". The server loads the
package once and forks for every command (`warm_server.py`), which then runs as
`python -m addcow_mp` does, with its own rules, directory and output. The server waits for it in
the kernel and reports when it stops and how it ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from support.fault_rules import Rules
from support.processes import Ended

SERVER = Path(__file__).with_name("warm_server.py")


class Command:
    """A command forked by the server."""

    def __init__(self, pid: int, answers: Iterator[str], outputs: tuple[Path, Path]) -> None:
        self.pid = pid
        self._answers = answers
        self._outputs = outputs
        self._has_ended = False

    def wait(self) -> Ended | None:
        """Wait until it ends, or stops itself, which is None."""
        answer = next(self._answers).strip()
        if answer == "stopped":
            return None
        self._has_ended = True
        out, err = (path.read_text() for path in self._outputs)
        assert "Traceback" not in err, err
        return Ended(int(answer), out, err)

    def end(self) -> Ended:
        """Wait until it ends; it must not stop."""
        ended = self.wait()
        assert ended is not None, "it stopped"
        return ended

    def abandon(self) -> None:
        """Kill what a test that failed has left."""
        while not self._has_ended:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


class Warm:
    """The server; one command at a time."""

    def __init__(self, outputs: Path) -> None:
        self._outputs = outputs / "stdout", outputs / "stderr"
        self._command: Command | None = None
        self._server = subprocess.Popen(
            [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, *arguments: str, cwd: Path, rules: Rules | None = None) -> Command:
        """Begin a command."""
        self._clear()
        for path in self._outputs:
            path.unlink(missing_ok=True)  # what a killed one leaves running may still write there
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        faults = "" if rules is None else str(rules.path)
        request = [str(cwd), faults, *map(str, self._outputs), *arguments]
        print(json.dumps(request), file=self._server.stdin, flush=True)
        answers = iter(self._server.stdout)
        self._command = Command(int(next(answers)), answers, self._outputs)
        return self._command

    def _clear(self) -> None:
        if self._command is not None:
            self._command.abandon()

    def run(self, *arguments: str, cwd: Path, rules: Rules | None = None) -> Ended:
        """Run a command to its end."""
        return self.start(*arguments, cwd=cwd, rules=rules).end()

    def close(self) -> None:
        """End the server."""
        self._clear()
        self._server.communicate()
