"""Fault points: named events at which a rule can make this program fail on purpose.

In the spirit of QEMU's blkdebug, for tests and for people who want to see what a full disk
does before it happens to them. Every step at which a crash or an error matters has a name
in :data:`EVENTS`; a rule says what happens there: an error, half a write and then an error,
a process that stops (SIGSTOP, until somebody continues it) or is killed.

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
from dataclasses import dataclass

from addcow_mp.errors import UsageError

#: Every event, in about the order in which a job meets them.
EVENTS = (
    "header_read",
    "header_write",
    "bitmap_load",
    "bitmap_update",
    "bitmap_sync",
    "image_read",
    "image_write",
    "backing_read",
    "backing_write",
    "target_write",
    "cow_read",
    "cow_write",
    "data_sync",
    "publish",
    "punch",
    "discard",
    "create",
    "directory_sync",
)

ACTIONS = ("error", "short", "stop", "kill")

VARIABLE = "ADDCOW_FAULTS"

#: Whether there are rules at all; looked at before anything else is done.
armed = False


@dataclass
class Rule:
    """What happens at ``event``; ``marker`` is a file that makes ``once`` hold in all processes."""

    event: str
    action: str = "error"
    errno: int = errno.EIO
    after: int = 0
    once: bool = False
    cluster: int | None = None
    marker: str | None = None
    _seen: int = 0
    _spent: bool = False

    def __post_init__(self) -> None:
        if self.event not in EVENTS or self.action not in ACTIONS:
            raise UsageError(
                message=f"fault rule: unknown event '{self.event}' or action '{self.action}'; "
                f"events are {', '.join(EVENTS)}; actions are {', '.join(ACTIONS)}"
            )

    def applies(self, event: str, clusters: tuple[int, int] | None) -> bool:
        """Whether this rule strikes now; counts the events that it lets go by."""
        if event != self.event or self._spent:
            return False
        if self.cluster is not None and not (
            clusters and clusters[0] <= self.cluster < clusters[1]
        ):
            return False
        self._seen += 1
        return self._seen > self.after and self._take()

    def _take(self) -> bool:
        if not self.once:
            return True
        self._spent = True
        if self.marker is None:
            return True
        try:
            os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
        except FileExistsError:
            return False
        return True


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


def load(path: str) -> list[Rule]:
    """Read a rule file. Raises :class:`UsageError`."""
    from configparser import ConfigParser, Error

    rules = []
    try:
        with open(path, encoding="utf-8") as file:
            sections = file.read().split("[inject-error]")[1:]
        for number, text in enumerate(sections):
            parser = ConfigParser(inline_comment_prefixes=("#",))
            parser.read_string("[rule]\n" + text)
            given = {key: value.strip('"') for key, value in parser["rule"].items()}
            rules.append(_rule(given, f"{path}.hit-{number}"))
    except (OSError, Error, ValueError, TypeError) as error:
        raise UsageError(
            message=f"{path}: not a rule file: {' '.join(str(error).split())}"
        ) from error
    return rules


def _rule(given: dict[str, str], marker: str) -> Rule:
    unknown = set(given) - {"event", "action", "errno", "after", "once", "cluster"}
    if "event" not in given or unknown:
        raise ValueError(f"a rule needs an event, and has no {', '.join(unknown) or 'other words'}")
    return Rule(
        given["event"],
        given.get("action", "error"),
        errno=int(given.get("errno", str(errno.EIO)), 0),
        after=int(given.get("after", "0"), 0),
        once=given.get("once", "off") in ("on", "true", "1"),
        cluster=int(given["cluster"], 0) if "cluster" in given else None,
        marker=marker,
    )


if os.environ.get(VARIABLE):
    install(load(os.environ[VARIABLE]))
