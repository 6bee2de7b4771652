"""Sends objects that own open files to worker processes, with the files' descriptors.

multiprocessing itself sends the first object, when a process starts. Later objects go through the
pipe of the process: the kernel passes descriptors behind the pickled object, so no path is opened
twice and locks stay with the open file. An error in unpickling is returned, not raised: it does not
end the process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from addcow_mp.errors import AddcowError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


class UnstartedError(AddcowError):
    """A worker process ended or met an error before it was ready for its first task."""

    template = "a worker process could not start: {cause}"


class Packed:
    """An object on its way to a process that is starting.

    It is pickled while the process starts, which is when descriptors can be passed, and unpickled
    where an error can be reported.
    """

    def __init__(self, content: object) -> None:
        self._content = content

    def __reduce__(self) -> tuple[object, ...]:
        from multiprocessing.reduction import ForkingPickler

        return (Received, (bytes(ForkingPickler.dumps(self._content)),))


class Received:
    """The pickled object in the process that received it."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def unpacked(self) -> Any | UnstartedError:
        """Return the object, or the error of a file that it needs."""
        import pickle

        try:
            return pickle.loads(self._content)  # noqa: S301 - the parent wrote it
        except (AddcowError, OSError) as error:
            return UnstartedError(cause=str(error))


# To a process that is running


@dataclass(frozen=True)
class Lent:
    """The message that object ``number`` and so many descriptors follow in the pipe."""

    number: int
    packed: Received
    descriptors: int

    def unpacked(self, pipe: Connection) -> Any | UnstartedError:
        """Receive the descriptors and unpickle the object; close descriptors that it left."""
        _received_fds[:] = _receive(pipe, self.descriptors)
        try:
            return self.packed.unpacked()
        finally:
            for fd in _received_fds:
                if fd != _TAKEN:
                    os.close(fd)
            _received_fds.clear()


def lend(pipe: Connection, number: int, content: object) -> None:
    """Send ``content`` to the process at the other end. Raises :class:`OSError` when it died."""
    import socket
    from multiprocessing import context
    from multiprocessing.reduction import ForkingPickler

    collector: Any = _Collector()
    context.set_spawning_popen(collector)
    try:
        pickled = bytes(ForkingPickler.dumps(content))
    finally:
        context.set_spawning_popen(None)
    pipe.send(Lent(number, Received(pickled), len(collector.fds)))
    if collector.fds:
        with socket.socket(fileno=os.dup(pipe.fileno())) as channel:
            socket.send_fds(channel, [b"."], collector.fds)


def _receive(pipe: Connection, count: int) -> list[int]:
    import socket

    if not count:
        return []
    with socket.socket(fileno=os.dup(pipe.fileno())) as channel:
        _, fds, _, _ = socket.recv_fds(channel, 1, count)
    for fd in fds:
        os.set_inheritable(fd, False)
    return list(fds)


class _Collector:
    """Collects the descriptors of an object while it is pickled, as a starting process does."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def duplicate_for_child(self, fd: int) -> int:
        """Add ``fd`` to those that are sent, and return its number among them."""
        self.fds.append(fd)
        return len(self.fds) - 1

    def DupFd(self, number: int) -> _SentFd:  # noqa: N802 - multiprocessing's name
        """Return what replaces the descriptor in the pickled object."""
        return _SentFd(number)


@dataclass(frozen=True)
class _SentFd:
    number: int

    def detach(self) -> int:
        """Return the descriptor in the receiving process; the caller owns it from then on."""
        fd, _received_fds[self.number] = _received_fds[self.number], _TAKEN
        return fd


_TAKEN = -1

#: The descriptors of the object that is being unpickled.
_received_fds: list[int] = []
