"""Rules for fault points: what they say, and the files they are read from.

Apart from :mod:`addcow_mp.device.faults`, which every operation passes, because nearly no
process ever has a rule.
"""

from __future__ import annotations

import errno
import os
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
    "image_cut",
    "discard",
    "create",
    "directory_sync",
    "read_back",
)

ACTIONS = ("error", "short", "stop", "kill")


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


def load(path: str) -> list[Rule]:
    """Read a rule file. Raises :class:`UsageError`."""
    from configparser import Error

    try:
        with open(path, encoding="utf-8") as file:
            before, *sections = file.read().split("[inject-error]")
        _refuse_other_sections(before, sections)
        return [_rule(_words(text), f"{path}.hit-{n}") for n, text in enumerate(sections)]
    except (OSError, Error, ValueError, TypeError) as error:
        told = " ".join(str(error).split())
        raise UsageError(message=f"{path}: not a rule file: {told}") from error


def _refuse_other_sections(before: str, sections: list[str]) -> None:
    if not sections or any(line.strip() and line[0] != "#" for line in before.splitlines()):
        raise ValueError("it has to begin with [inject-error]")


def _words(text: str) -> dict[str, str]:
    """The words of one section, which is all that follows its heading."""
    from configparser import ConfigParser

    parser = ConfigParser(inline_comment_prefixes=("#",), interpolation=None)
    parser.read_string("[rule]\n" + text)
    if parser.sections() != ["rule"]:
        raise ValueError("it has sections of other names than [inject-error]")
    return {key: value.strip('"') for key, value in parser["rule"].items()}


def _rule(given: dict[str, str], marker: str) -> Rule:
    unknown = set(given) - {"event", "action", "errno", "after", "once", "cluster"}
    if "event" not in given or unknown:
        raise ValueError(f"a rule needs an event, and has no {', '.join(unknown) or 'other words'}")
    return Rule(
        given["event"],
        given.get("action", "error"),
        errno=int(given.get("errno", str(errno.EIO)), 0),
        after=int(given.get("after", "0"), 0),
        once=("off", "on").index(given.get("once", "off")) == 1,
        cluster=int(given["cluster"], 0) if "cluster" in given else None,
        marker=marker,
    )
