"""Resolves the names that a user gives for the files of an overlay: which file, what is stored.

A relative name is looked up beside the overlay, as in qemu-img, then in the working directory. A
name that means different files there is refused. It is stored relative to the real directory of the
overlay, with ``..`` where needed, so that a directory can be moved as a whole. An absolute name is
stored as typed.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from addcow_mp.device.files import identity_at
from addcow_mp.device.headers import refuse_protocol
from addcow_mp.errors import ImageError, UsageError
from addcow_mp.format.names import path_has_protocol


class Located(NamedTuple):
    """The file that a name means: its absolute ``path``, and the name to be stored."""

    path: str
    name: str

    def stored(self, overlay: str, what: str, limit: int) -> bytes:
        """Return the name as bytes of a header. Raises when it has ``limit`` bytes or more."""
        raw = os.fsencode(self.name)
        if len(raw) >= limit:
            raise ImageError(
                path=overlay,
                problem=f"the {what} file's name has {len(raw)} bytes, the limit is {limit - 1}",
            )
        return raw


def home_of(overlay: str) -> str:
    """Return the real directory of ``overlay``, which need not exist yet."""
    return os.path.dirname(os.path.realpath(overlay))


def locate(overlay: str, name: str) -> Located:
    """Return the file that ``name``, typed by a user, means for the file ``overlay``."""
    if not name or "\0" in name:
        problem = "an empty file name or one with a NUL byte names no file"
        raise UsageError(message=f"{overlay}: {problem}")
    refuse_protocol(overlay, name)
    if name.startswith("/"):
        return Located(name, name)
    return beside(overlay, _existing(overlay, name))


def beside(overlay: str, path: str) -> Located:
    """Return the file at ``path``, with a name relative to the directory of ``overlay``."""
    path = plain(path)
    name = os.path.relpath(path, home_of(overlay))
    return Located(path, f"./{name}" if path_has_protocol(name) else name)


def _existing(overlay: str, name: str) -> str:
    """Return the path of the file, or where it is most likely to appear."""
    places = [os.path.join(home_of(overlay), name), os.path.join(os.getcwd(), name)]
    there = [one for one in places if os.path.lexists(one) and not os.path.isdir(one)]
    if len(there) > 1 and not _is_same(*there):
        both = f"'{name}' may mean {there[0]} or {there[1]}"
        raise ImageError(path=overlay, problem=f"{both}; give the absolute path of one of them")
    likely = there or [one for one in places if os.path.isdir(os.path.dirname(one))]
    return (likely or places)[0]


def _is_same(one: str, other: str) -> bool:
    identity = identity_at(one)
    return plain(one) == plain(other) or (identity is not None and identity == identity_at(other))


def plain(path: str) -> str:
    """Return ``path`` without ``..`` and links in its directories; its last part may be a link."""
    directory, name = os.path.split(path)
    return os.path.join(os.path.realpath(directory), name)
