"""Names that a user gives for the files of an overlay: which file is meant, what is stored.

A relative name is sought beside the overlay, as in qemu-img, then in the working directory, as
a hand types it. Where both exist and are different files the name is refused. What was typed
relative is stored relative to the directory in which the overlay really lies, with ``..`` where
needed, so that a directory can be moved as a whole. What was typed absolute is stored as typed.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from addcow_mp.device.files import identity_at
from addcow_mp.device.headers import refuse_protocol
from addcow_mp.errors import ImageError, UsageError
from addcow_mp.format.names import path_has_protocol


class Located(NamedTuple):
    """A file that a name was found to mean: an absolute ``path``, and the name to be stored."""

    path: str
    name: str

    def stored(self, overlay: str, what: str, limit: int) -> bytes:
        """The name as bytes of a header. Raises when they are not below ``limit``."""
        raw = os.fsencode(self.name)
        if len(raw) >= limit:
            raise ImageError(
                path=overlay,
                problem=f"the {what} file's name has {len(raw)} bytes, the limit is {limit - 1}",
            )
        return raw


def home_of(overlay: str) -> str:
    """The directory in which ``overlay`` really lies, or will."""
    return os.path.dirname(os.path.realpath(overlay))


def locate(overlay: str, name: str) -> Located:
    """The file that ``name``, typed by a user, means for the file ``overlay``."""
    if not name or "\0" in name:
        told = "an empty file name or one with a NUL byte names no file"
        raise UsageError(message=f"{overlay}: {told}")
    refuse_protocol(overlay, name)
    if name.startswith("/"):
        return Located(name, name)
    return beside(overlay, _sought(overlay, name))


def beside(overlay: str, path: str) -> Located:
    """The file at ``path`` by a name relative to the directory of ``overlay``."""
    path = plain(path)
    name = os.path.relpath(path, home_of(overlay))
    return Located(path, f"./{name}" if path_has_protocol(name) else name)


def _sought(overlay: str, name: str) -> str:
    places = [os.path.join(home_of(overlay), name), os.path.join(os.getcwd(), name)]
    there = [one for one in places if os.path.lexists(one) and not os.path.isdir(one)]
    if len(there) > 1 and not _is_same(*there):
        told = f"'{name}' may mean {there[0]} or {there[1]}; give the absolute path of one of them"
        raise ImageError(path=overlay, problem=told)
    likely = there or [one for one in places if os.path.isdir(os.path.dirname(one))]
    return (likely or places)[0]


def _is_same(one: str, other: str) -> bool:
    identity = identity_at(one)
    return plain(one) == plain(other) or (identity is not None and identity == identity_at(other))


def plain(path: str) -> str:
    """``path`` without ``..`` and links in its directories; a link as last part stays."""
    directory, name = os.path.split(path)
    return os.path.join(os.path.realpath(directory), name)
