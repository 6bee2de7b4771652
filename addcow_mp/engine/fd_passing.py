"""Delivery: how a work reaches a process, with the descriptors that it needs.

A process that is being started is handed its first work by multiprocessing itself. Later ones
go through its pipe: descriptors behind the pickled words, as the kernel passes them from process
to process, so that no path is opened twice and locks stay with the file that is open.
What goes wrong in unpacking is told in words at the other end; it does not end the process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from addcow_mp.errors import AddcowError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from addcow_mp.engine.tasks import Task


class Work(Protocol):
    """What a worker does with a task; ``slot`` numbers the worker."""

    def __call__(self, task: Task, slot: int) -> object:
        """Do ``task``; what is returned crosses to the parent."""


class UnstartedError(AddcowError):
    """A worker process ended, or met an error, before it was ready for its first task."""

    template = "a worker process could not start: {cause}"


class PackedWork:
    """Work on its way to a process that is being started.

    Packed at that moment, as descriptors must be; unpacked where an error in it can be told.
    """

    def __init__(self, work: Work) -> None:
        self._work = work

    def __reduce__(self) -> tuple[object, ...]:
        from multiprocessing.reduction import ForkingPickler

        return (ReceivedWork, (bytes(ForkingPickler.dumps(self._work)),))


class ReceivedWork:
    """The same at the other end."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def unpacked(self) -> Work | UnstartedError:
        """The work, or what a file had against its being unpacked."""
        import pickle

        try:
            work: Work = pickle.loads(self._content)  # noqa: S301 - the parent's own words
        except (AddcowError, OSError) as error:
            return UnstartedError(cause=str(error))
        return work


# To a process that is running


@dataclass(frozen=True)
class LentWork:
    """Word of work ``number``, packed; so many descriptors follow."""

    number: int
    packed: ReceivedWork
    descriptors: int

    def received(self, pipe: Connection) -> Work | UnstartedError:
        """Take the descriptors and unpack the work; those that it did not take are closed."""
        _arrived[:] = _receive(pipe, self.descriptors)
        try:
            return self.packed.unpacked()
        finally:
            for fd in filter(_is_left, _arrived):
                os.close(fd)
            _arrived.clear()


def lend(pipe: Connection, number: int, work: Work) -> None:
    """Send ``work`` to the process at the other end. Raises :class:`OSError` when it has died."""
    import socket
    from multiprocessing import context
    from multiprocessing.reduction import ForkingPickler

    envelope: Any = _Envelope()
    context.set_spawning_popen(envelope)
    try:
        content = bytes(ForkingPickler.dumps(work))
    finally:
        context.set_spawning_popen(None)
    pipe.send(LentWork(number, ReceivedWork(content), len(envelope.fds)))
    if envelope.fds:
        with socket.socket(fileno=os.dup(pipe.fileno())) as channel:
            socket.send_fds(channel, [b"."], envelope.fds)


def _receive(pipe: Connection, count: int) -> list[int]:
    import socket

    if not count:
        return []
    with socket.socket(fileno=os.dup(pipe.fileno())) as channel:
        _, fds, _, _ = socket.recv_fds(channel, 1, count)
    for fd in fds:
        os.set_inheritable(fd, False)
    return list(fds)


class _Envelope:
    """Collects descriptors that are packed, as the start of a process would."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def duplicate_for_child(self, fd: int) -> int:
        """Note that ``fd`` is to be sent; its number among the others."""
        self.fds.append(fd)
        return len(self.fds) - 1

    def DupFd(self, number: int) -> _Arriving:  # noqa: N802 - multiprocessing's name
        """What stands for the descriptor in the pickled words."""
        return _Arriving(number)


@dataclass(frozen=True)
class _Arriving:
    number: int

    def detach(self) -> int:
        """The descriptor, at the other end; it is the caller's from here on."""
        fd, _arrived[self.number] = _arrived[self.number], _TAKEN
        return fd


_TAKEN = -1

#: The descriptors of the work that is being unpacked.
_arrived: list[int] = []


def _is_left(fd: int) -> bool:
    return fd != _TAKEN
