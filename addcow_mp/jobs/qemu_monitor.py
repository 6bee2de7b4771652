"""A connection to a running QEMU, through the socket of its QMP monitor.

The package qemu.qmp speaks the protocol. It is an optional dependency, and it is asynchronous: it
is imported, and its event loop runs, only within the calls of :class:`Monitor`, each of which waits
for its answer. Waiting is limited, so that a QEMU that hangs costs an error and no patience.

A monitor has one client at a time. A second one is connected by the kernel and gets no greeting.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib import import_module
from typing import Any

from addcow_mp.errors import ImageError

#: Seconds until the greeting. QEMU sends it at once, unless it has another client.
GREETING = 5.0

#: Seconds until an answer. QEMU answers while a guest runs; storage that hangs can delay it.
ANSWER = 60.0

#: The events of jobs.
EVENTS = ("JOB_STATUS_CHANGE", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")

#: What SO_PEERCRED returns: process, user and group.
_CREDENTIALS = struct.Struct("3i")


class CommandError(Exception):
    """QEMU refused a command; the text is QEMU's."""


def package() -> Any:
    """The module ``qemu.qmp``. Raises :class:`ImageError` where it is not installed."""
    try:
        return import_module("qemu.qmp")
    except ImportError as error:
        problem = "it is not installed; pip install 'addcow-mp[qemu]'"
        raise ImageError(path="qemu.qmp", problem=problem) from error


@contextmanager
def connected(
    path: str, waiting: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Iterator[Monitor]:
    """The monitor behind the Unix socket at ``path``. Raises :class:`ImageError`.

    ``waiting``: a context around the wait for the greeting, which may be interrupted.
    """
    qmp = package()
    with _connection(path) as connection:
        with waiting():
            readable = select.select([connection], [], [], GREETING)[0]
        if not readable:
            raise _busy(path)
        process = _CREDENTIALS.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )[0]
        monitor = Monitor(path, qmp, process)
        try:
            monitor.greet(connection)
            yield monitor
        finally:
            monitor.close()


def _connection(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # A connection that has to wait is refused: the queue of a busy monitor is short.
    connection.setblocking(False)
    try:
        connection.connect(path)
    except BlockingIOError as error:
        connection.close()
        raise _busy(path) from error
    except OSError as error:
        connection.close()
        reason = error.strerror or str(error)
        problem = f"cannot connect to QEMU: {reason}; give the socket of its option -qmp"
        raise ImageError(path=path, problem=problem) from error
    return connection


def _busy(path: str) -> ImageError:
    return ImageError(
        path=path,
        problem="QEMU does not answer: another program uses this monitor, or it is none; give "
        "QEMU one more -qmp option, with a socket of its own",
    )


class Monitor:
    """A QEMU that executes commands and reports events. ``process``: its process, if it listens."""

    def __init__(self, path: str, qmp: Any, process: int) -> None:
        self._path = path
        self._qmp = qmp
        self.process = process
        self._loop = asyncio.new_event_loop()
        self._client = qmp.QMPClient("addcow")
        # A guest may cause others by the thousand.
        self._client.events.names = set(EVENTS)

    def greet(self, connection: socket.socket) -> None:
        """Begin the session. Raises :class:`ImageError`."""
        try:
            self._run(self._client.connect(connection), GREETING)
        # The package asserts that the connection does not end just after the greeting.
        except (self._qmp.QMPError, AssertionError, TimeoutError) as error:
            problem = "it is no QMP monitor of QEMU; give the socket of its option -qmp"
            raise ImageError(path=self._path, problem=problem) from error

    def execute(self, command: str, **arguments: object) -> Any:
        """The answer to a command. Raises :class:`CommandError` and :class:`ImageError`.

        An underscore in the name of an argument stands for a hyphen.
        """
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            return self._run(self._client.execute(command, given), ANSWER)
        except self._qmp.ExecuteError as error:
            raise CommandError(str(error)) from error
        except self._qmp.QMPError as error:
            problem = "QEMU has ended or has closed this connection; what it has copied is kept"
            raise ImageError(path=self._path, problem=problem) from error
        except TimeoutError as error:
            problem = f"QEMU has not answered '{command}' for {ANSWER:.0f} seconds"
            raise ImageError(path=self._path, problem=problem) from error

    def events(self, seconds: float) -> list[dict[str, Any]]:
        """Wait for an event, for at most so many seconds; all events that have come."""
        events = self._client.events
        found = []
        with suppress(TimeoutError):
            found.append(dict(self._run(events.get(), seconds)))
        while not events.empty():
            found.append(dict(self._run(events.get(), ANSWER)))
        return found

    def close(self) -> None:
        """End the session; QEMU and its jobs go on."""
        with suppress(Exception):  # why it has ended is known already
            self._run(self._client.disconnect(), GREETING)
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        if left:
            self._loop.run_until_complete(asyncio.wait(left))
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Any], seconds: float) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(work, seconds))
