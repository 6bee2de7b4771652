"""Fault points: named events at which a rule can make this program fail on purpose.

In the spirit of QEMU's blkdebug, for tests and for people who want to see what a full disk
does before it happens to them. Every step at which a crash or an error matters has a name in
``EVENTS`` (:mod:`addcow_mp.device.fault_rules`). A rule says what happens there: an error, half a
write and then an error, a process that stops (SIGSTOP, until SIGCONT) or is killed.

Rules come from a file named by the environment variable ``ADDCOW_FAULTS``, which workers
inherit, or from :func:`install` for this process::

    [inject-error]
    event = "bitmap_update"     # required
    errno = "28"                # default 5, EIO
    action = "short"            # error (default), short, stop, kill
    after = "3"                 # let so many go by first
    once = "on"                 # once in all processes together; default off
    cluster = "7"               # only requests that touch this cluster of the overlay

Without rules a fault point costs one test of a variable.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from addcow_mp.device.fault_rules import Rule

VARIABLE = "ADDCOW_FAULTS"

#: Whether there are rules at all; looked at before anything else is done.
armed = False


_rules: list[Rule] = []


def install(rules: Iterable[Rule]) -> None:
    """Let these rules hold in this process, and no others."""
    global armed  # noqa: PLW0603 - one switch for the process is the point
    _rules[:] = rules
    armed = bool(_rules)


def hit(event: str, clusters: tuple[int, int] | None = None) -> None:
    """Meet ``event``; raises :class:`OSError`, stops or kills the process if a rule says so."""
    cut(event, 0, clusters)


def cut(event: str, length: int, clusters: tuple[int, int] | None = None) -> int:
    """Meet a write of ``length`` bytes; returns how many of them to write before failing.

    Less than ``length`` means: write these, then raise :func:`failure`.
    """
    for rule in _rules:
        if rule.applies(event, clusters):
            if rule.action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif rule.action == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif rule.action == "short" and length > 1:
                failure.number = rule.errno
                return length // 2
            else:
                raise OSError(rule.errno, os.strerror(rule.errno))
    return length


class _Failure:
    """The error that a short write ends with."""

    number = errno.EIO

    def __call__(self) -> OSError:
        return OSError(self.number, os.strerror(self.number))


failure = _Failure()


if os.environ.get(VARIABLE):
    from addcow_mp.device.fault_rules import load

    install(load(os.environ[VARIABLE]))
