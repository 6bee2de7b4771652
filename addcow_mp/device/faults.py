"""Fault points: named events at which a rule makes this program fail on purpose.

They work like QEMU's blkdebug, for tests and for users who want to see the effect of a full disk
before it happens. Every step at which a crash or an error matters has a name in ``EVENTS``
(:mod:`addcow_mp.device.fault_rules`). A rule causes an error, half a write and then an error, or it
stops the process (SIGSTOP, until SIGCONT) or kills it.

Rules come from the file named by the environment variable ``ADDCOW_FAULTS``, which workers inherit,
or from :func:`install`, for this process only::

    [inject-error]
    event = "bitmap_update"     # required
    errno = "28"                # default 5, EIO
    action = "short"            # error (default), short, stop, kill
    after = "3"                 # ignore the first 3 events
    once = "on"                 # once in all processes together; default off
    cluster = "7"               # only requests that touch this cluster of the overlay

Without rules, a fault point costs one test of a variable.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from addcow_mp.device.fault_rules import Rule

VARIABLE = "ADDCOW_FAULTS"

#: Whether there are rules; callers test it before they call a function of this module.
armed = False

_rules: list[Rule] = []

#: The error that follows a short write.
_short_errno = errno.EIO


def install(rules: Iterable[Rule]) -> None:
    """Replace the rules of this process."""
    global armed  # noqa: PLW0603 - one switch for the process is the point
    _rules[:] = rules
    armed = bool(_rules)


def hit(event: str, clusters: tuple[int, int] | None = None) -> None:
    """Apply the rules for ``event``: raise :class:`OSError`, or stop or kill the process."""
    cut(event, 0, clusters)


def cut(event: str, length: int, clusters: tuple[int, int] | None = None) -> int:
    """Apply the rules for a request of ``length`` bytes; returns how many of them to carry out.

    If that is less than ``length``, the caller raises :func:`failure` afterwards.
    """
    global _short_errno  # noqa: PLW0603
    for rule in _rules:
        if rule.applies(event, clusters):
            if rule.action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif rule.action == "stop":
                # To this thread: a signal to the process may reach another one, and this one a
                # moment later.
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
            elif rule.action == "short" and length > 1:
                _short_errno = rule.errno
                return length // 2
            else:
                raise OSError(rule.errno, os.strerror(rule.errno))
    return length


def failure() -> OSError:
    """The error that follows a request cut short by :func:`cut`."""
    return OSError(_short_errno, os.strerror(_short_errno))


if os.environ.get(VARIABLE):
    from addcow_mp.device.fault_rules import load

    install(load(os.environ[VARIABLE]))
