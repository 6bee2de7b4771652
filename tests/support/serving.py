"""`addcow serve` for tests: it listens on a socket in a directory of the test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.command import ADDCOW, PATIENCE

#: Where the server listens, for clients that run in its directory.
URI = "nbd+unix:///?socket=s.sock"

# Python runs a module of this name at its start, also within nbdkit.
_AT_START = "sitecustomize.py"
_TESTS = Path(__file__).parents[1]
_SPOIL = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from support.small_steps import spoil
spoil({order!r})
"""


@contextmanager
def served(
    here: Path, *options: str, file: str = "top.add-cow", order: str = "right"
) -> Iterator[subprocess.Popen[str]]:
    """Serve an overlay on a socket in ``here``; the server is ended with SIGTERM.

    It syncs in ``order`` (`small_steps`).
    """
    words = [*ADDCOW, "serve", "--socket", "s.sock", *options, file]
    environment = {**os.environ}
    if order != "right":
        environment["PYTHONPATH"] = str(_spoilt(here, order))
    with subprocess.Popen(
        words, cwd=here, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        deadline = time.monotonic() + PATIENCE
        while not _greets(here / "s.sock"):
            assert server.poll() is None, server.communicate()[1]
            assert time.monotonic() < deadline
        try:
            yield server
        finally:
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=PATIENCE)


def _greets(path: Path) -> bool:
    """Whether the server at ``path`` has opened its overlay: it then greets its clients."""
    with socket.socket(socket.AF_UNIX) as client:
        # The path of a test's directory may be longer than a socket's address.
        directory = os.open(path.parent, os.O_PATH)
        try:
            client.connect(f"/proc/self/fd/{directory}/{path.name}")
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        finally:
            os.close(directory)
        client.settimeout(PATIENCE)
        return client.recv(8) == b"NBDMAGIC"


def _spoilt(here: Path, order: str) -> Path:
    """A directory with what puts the syncs of every Python into a wrong order."""
    directory = here / "spoilt"
    directory.mkdir(exist_ok=True)
    text = _SPOIL.format(tests=str(_TESTS), root=str(_TESTS.parent), order=order)
    (directory / _AT_START).write_text(text)
    return directory
