"""Rules for fault points, and the files that contain them.

This is apart from :mod:`addcow_mp.device.faults`, which every process imports, because hardly any
process has rules.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from addcow_mp.errors import UsageError

#: Every event, roughly in the order in which they happen in a job.
EVENTS = (
    *("header_read", "header_write"),
    *("bitmap_load", "bitmap_update", "bitmap_cut", "bitmap_grow", "bitmap_sync"),
    *("image_read", "image_write", "backing_read", "backing_write", "target_write"),
    *("cow_read", "cow_write"),
    *("data_sync", "publish", "punch", "image_cut", "resize", "discard"),
    *("create", "directory_sync", "read_back"),
    *("manifest_remove", "manifest_write", "manifest_rename"),
    *("twin_write", "twin_link", "twin_unlink"),
)

ACTIONS = ("error", "short", "stop", "kill")


@dataclass
class Rule:
    """What happens at ``event``; the file ``marker`` makes ``once`` hold in all processes."""

    event: str
    action: str = "error"
    errno: int = errno.EIO
    after: int = 0
    once: bool = False
    cluster: int | None = None
    marker: str | None = None
    _seen: int = 0
    _used: bool = False

    def __post_init__(self) -> None:
        if self.event not in EVENTS or self.action not in ACTIONS:
            raise UsageError(
                message=f"fault rule: unknown event '{self.event}' or action '{self.action}'; "
                f"events are {', '.join(EVENTS)}; actions are {', '.join(ACTIONS)}"
            )

    def applies(self, event: str, clusters: tuple[int, int] | None) -> bool:
        """Whether this rule applies now; counts the events that ``after`` skips."""
        if event != self.event or self._used:
            return False
        if self.cluster is not None and not (
            clusters and clusters[0] <= self.cluster < clusters[1]
        ):
            return False
        self._seen += 1
        return self._seen > self.after and self._use()

    def _use(self) -> bool:
        """Whether no process has used this rule, if it holds only once."""
        self._used = self.once
        if not self.once or self.marker is None:
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
            sections = _sections(file.read())
        return [_rule(_keys(one), f"{path}.hit-{n}") for n, one in enumerate(sections)]
    except (OSError, Error, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(message=f"{path}: not a rule file: {reason}") from error


def _sections(text: str) -> list[str]:
    before, *sections = text.split("[inject-error]")
    if not sections or any(line.strip() and line[0] != "#" for line in before.splitlines()):
        raise ValueError("it has to begin with [inject-error]")
    return sections


def _keys(text: str) -> dict[str, str]:
    """Keys and values of one section; ``text`` is everything after its heading."""
    from configparser import ConfigParser

    parser = ConfigParser(inline_comment_prefixes=("#",), interpolation=None)
    parser.read_string("[rule]\n" + text)
    if parser.sections() != ["rule"]:
        raise ValueError("it has sections of other names than [inject-error]")
    return {key: value.strip('"') for key, value in parser["rule"].items()}


def _rule(keys: dict[str, str], marker: str) -> Rule:
    unknown = set(keys) - {"event", "action", "errno", "after", "once", "cluster"}
    if "event" not in keys or unknown:
        raise ValueError(f"a rule needs an event, and has no {', '.join(unknown) or 'other words'}")
    return Rule(
        keys["event"],
        keys.get("action", "error"),
        errno=int(keys.get("errno", str(errno.EIO)), 0),
        after=int(keys.get("after", "0"), 0),
        once=("off", "on").index(keys.get("once", "off")) == 1,
        cluster=int(keys["cluster"], 0) if "cluster" in keys else None,
        marker=marker,
    )
