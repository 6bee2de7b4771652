"""Signals that stop a command: the first one in good order, a second one at once.

Where nothing has been begun that a stop could harm, the first one ends the command as an exception,
through every clean-up. A job is *asked* to stop instead: it publishes what is finished. A limit of
processor time repeats its signal every second until the hard limit kills: those after the first are
ignored, for they would interrupt the publishing. A hangup that was ignored when the command began
(nohup) stays ignored.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from addcow_mp.errors import (
    CpuLimitJobError,
    HangupJobError,
    InterruptedJobError,
    StoppedError,
    TerminatedJobError,
)

_MEANINGS: dict[int, type[StoppedError]] = {
    signal.SIGHUP: HangupJobError,
    signal.SIGINT: InterruptedJobError,
    signal.SIGTERM: TerminatedJobError,
    signal.SIGXCPU: CpuLimitJobError,
}

#: Those that are met even if whoever started the command has them ignored.
_ALWAYS = (signal.SIGINT, signal.SIGTERM)

#: How signals were handled before that.
_before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

#: Signals met since the command began, in order.
_met: list[int] = []


def begin() -> None:
    """From now on the first signal ends the command as :class:`KeyboardInterrupt`."""
    _met.clear()
    for number in _MEANINGS:
        _before[number] = signal.getsignal(number)
        if _before[number] is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def end() -> None:
    """From now on every signal does what it did before the command began."""
    for number, handler in _before.items():
        repeats = number == signal.SIGXCPU and number in _met
        signal.signal(number, signal.SIG_IGN if repeats else handler)
    _before.clear()


def words() -> str:
    """What is said of a command that the first signal ended."""
    number = _met[0] if _met else signal.SIGINT
    return "interrupted" if number == signal.SIGINT else f"stopped by {_name(number)}"


def status() -> int:
    """The exit status of such a command."""
    return 128 + (_met[0] if _met else signal.SIGINT)


def by_signal(error: StoppedError) -> StoppedError:
    """The same error, with the meaning of the signal that was met, if one was."""
    kind = _MEANINGS.get(_met[0]) if _met else None
    return error if kind is None else kind(message=str(error))


def _name(number: int) -> str:
    return signal.Signals(number).name


def _note(number: int) -> None:
    """Take note of a signal; the next one of its kind ends the process."""
    _met.append(number)
    if number == signal.SIGXCPU:
        signal.signal(number, signal.SIG_IGN)
    elif number == signal.SIGINT:
        signal.signal(number, signal.default_int_handler)
    else:
        signal.signal(number, signal.SIG_DFL)


def _interrupt(number: int, _: FrameType | None) -> None:
    if number == signal.SIGXCPU and number in _met:
        return
    _note(number)
    raise KeyboardInterrupt


def _ask(number: int, _: FrameType | None) -> None:
    _note(number)


@contextmanager
def asking() -> Iterator[list[int]]:
    """Signals met in the block: the first asks a job to stop."""
    _met.clear()
    with _handled(_ask):
        yield _met


@contextmanager
def interrupting() -> Iterator[None]:
    """Within :func:`asking`, a block that the first signal may end anywhere: it changes nothing."""
    with _handled(_interrupt):
        if _met:
            raise KeyboardInterrupt
        yield


@contextmanager
def _handled(handler: signal._HANDLER) -> Iterator[None]:
    old = {number: signal.getsignal(number) for number in _MEANINGS}
    taken = [
        number for number in _MEANINGS if number in _ALWAYS or old[number] is not signal.SIG_IGN
    ]
    for number in taken:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, old[number])
