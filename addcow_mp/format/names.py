"""Names inside an image: which are paths, what they are relative to, how they are read.

A name with a protocol prefix (``nbd:...``, ``json:...``: a colon before the
first slash) is not a path. A relative name is relative to the directory of the
file that holds it. Names are bytes on disk, without a terminator; in Python they
are ``str`` by the file system's encoding, so that any name survives a round trip.
"""

from __future__ import annotations

import os

from addcow_mp.errors import ImageError


def path_has_protocol(path: str) -> bool:
    """Whether ``path`` starts with a protocol: a colon stands before any slash."""
    colon = path.find(":")
    return colon >= 0 and "/" not in path[:colon]


def path_combine(base_path: str, name: str) -> str:
    """Resolve ``name`` as stored in the file ``base_path``.

    An absolute name stands for itself. A relative one replaces what follows the
    last slash of ``base_path``, or, where that has none, what follows its protocol
    prefix (or all of it). Nothing is normalised: ``..`` stays as it is.
    """
    if name.startswith("/"):
        return name
    kept = base_path.rfind("/") + 1
    if path_has_protocol(base_path):
        kept = max(kept, base_path.index(":") + 1)
    return base_path[:kept] + name


def read_string(fd: int, offset: int, length: int, limit: int) -> str:
    """Read the ``length`` bytes at ``offset`` of descriptor ``fd`` as a name.

    ``limit`` is the size of the reference's buffer, which also holds the
    terminating NUL: ``length`` must be below it. Raises :class:`ImageError` when
    it is not, when the file ends early, or when a NUL stands inside the name.
    """
    if not 0 <= length < limit:
        raise ImageError(
            path=f"name at byte {offset}", problem=f"{length} bytes exceed {limit - 1}"
        )
    raw = os.pread(fd, length, offset)
    if len(raw) != length:
        raise ImageError(path=f"name at byte {offset}", problem="the file ends inside it")
    if b"\0" in raw:
        raise ImageError(path=f"name at byte {offset}", problem="it contains a NUL byte")
    return os.fsdecode(raw)
