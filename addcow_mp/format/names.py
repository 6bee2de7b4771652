"""Names of files inside an image: protocols, relative names, and how names are read.

A name with a protocol prefix (``nbd:...``, ``json:...``: a colon before the first slash) is not a
path. A relative name is relative to the directory of the file that holds it. Names are bytes on
disk, without a terminator; in Python they are ``str`` in the file system's encoding, so any name
survives a round trip.
"""

from __future__ import annotations

import os

from addcow_mp.errors import ImageError


def path_has_protocol(path: str) -> bool:
    """Whether ``path`` starts with a protocol: it has a colon before any slash."""
    colon = path.find(":")
    return colon >= 0 and "/" not in path[:colon]


def path_combine(base_path: str, name: str) -> str:
    """Resolve ``name`` as stored in the file ``base_path``.

    An absolute name is returned unchanged. A relative name replaces everything after the last
    slash of ``base_path``; without a slash, everything after its protocol prefix, if any. The
    result is not normalised: ``..`` stays.
    """
    if name.startswith("/"):
        return name
    kept = base_path.rfind("/") + 1
    if path_has_protocol(base_path):
        kept = max(kept, base_path.index(":") + 1)
    return base_path[:kept] + name


def read_string(fd: int, offset: int, length: int, limit: int) -> str:
    """Read the ``length`` bytes at ``offset`` of descriptor ``fd`` as a name.

    ``limit`` is the size of the reference implementation's buffer, which also holds a terminating
    NUL: ``length`` must be below it. Raises :class:`ImageError` if it is not, if the file ends
    before the name does, or if the name contains a NUL.
    """
    if not 0 <= length < limit:
        problem = f"{length} bytes exceed {limit - 1}"
    elif len(raw := os.pread(fd, length, offset)) != length:
        problem = "the file ends inside it"
    elif b"\0" in raw:
        problem = "it contains a NUL byte"
    else:
        return os.fsdecode(raw)
    raise ImageError(path=f"name at byte {offset}", problem=problem)
