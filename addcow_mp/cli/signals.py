"""Signals that stop a command: the first one in an orderly way, a second one at once.

The first signal ends a command by an exception, through every clean-up. A job that changes files is
*asked* to stop instead: it publishes its finished work. SIGXCPU is repeated every second until the
hard limit kills the process; after the first one it is ignored, because it would interrupt the
publishing. A SIGHUP that was ignored when the command began (nohup) stays ignored.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from addcow_mp.errors import (
    CpuLimitJobError,
    HangupJobError,
    InterruptedJobError,
    StoppedError,
    TerminatedJobError,
)

_ERRORS: dict[int, type[StoppedError]] = {
    signal.SIGHUP: HangupJobError,
    signal.SIGINT: InterruptedJobError,
    signal.SIGTERM: TerminatedJobError,
    signal.SIGXCPU: CpuLimitJobError,
}

#: Signals that stop a job even if the caller has them ignored.
_ALWAYS = (signal.SIGINT, signal.SIGTERM)

#: Signals received since the command began, in order.
_received: list[int] = []


@contextmanager
def raising() -> Iterator[None]:
    """A block that the first signal ends by :class:`KeyboardInterrupt`; for a whole command."""
    _received.clear()
    with _handled(_interrupt, always=()):
        yield


def description() -> str:
    """How the first signal ended the command, in words."""
    number = _received[0] if _received else signal.SIGINT
    if number == signal.SIGINT:
        return "interrupted"
    return f"stopped by {signal.Signals(number).name}"


def status() -> int:
    """The exit status of a command that the first signal ended."""
    return 128 + (_received[0] if _received else signal.SIGINT)


def by_signal(error: StoppedError) -> StoppedError:
    """``error`` in the class of the received signal; unchanged if there was none."""
    kind = _ERRORS.get(_received[0]) if _received else None
    return error if kind is None else kind(message=str(error))


def _record(number: int, _: FrameType | None = None) -> None:
    """Record a signal; the next one of its kind ends the process."""
    _received.append(number)
    if number == signal.SIGXCPU:
        signal.signal(number, signal.SIG_IGN)
    elif number == signal.SIGINT:
        signal.signal(number, signal.default_int_handler)
    else:
        signal.signal(number, signal.SIG_DFL)


def _interrupt(number: int, _: FrameType | None) -> None:
    if number == signal.SIGXCPU and number in _received:
        return
    _record(number)
    raise KeyboardInterrupt


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """The signals received in the block; the first one asks the job to stop."""
    _received.clear()
    with _handled(_record):
        yield _received


@contextmanager
def interruptible() -> Iterator[None]:
    """A block within :func:`stop_requests` that changes nothing: the first signal ends it."""
    with _handled(_interrupt):
        if _received:
            raise KeyboardInterrupt
        yield


@contextmanager
def _handled(handler: signal._HANDLER, always: tuple[int, ...] = _ALWAYS) -> Iterator[None]:
    """Handle the signals that the caller has not ignored, and those in ``always``."""
    old = {number: signal.getsignal(number) for number in _ERRORS}
    changed = [one for one in _ERRORS if one in always or old[one] is not signal.SIG_IGN]
    for number in changed:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in changed:
            repeats = number == signal.SIGXCPU and number in _received
            signal.signal(number, signal.SIG_IGN if repeats else old[number])
