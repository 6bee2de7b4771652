"""Where an open file really lies, and which path the names inside it are relative to.

A relative name in an ``.add-cow`` file is relative to the directory in which that file really
lies. A symbolic link to the file changes nothing: one file means the same by every path. The
system is asked about the open descriptor, not about the path again: a link that is changed
after the opening has no effect.
"""

from __future__ import annotations

import os
from contextlib import suppress

from addcow_mp.format.names import path_has_protocol

#: The system appends this to the path of a file whose name was removed.
_REMOVED = " (deleted)"


def real_path(fd: int, path: str) -> str:
    """The path without links of the file that was opened under ``path`` as ``fd``."""
    with suppress(OSError):  # no /proc, or a path that is longer than a page
        real = os.readlink(f"/proc/self/fd/{fd}")
        if real.startswith("/") and not (real.endswith(_REMOVED) and _is_removed(fd, real)):
            return real
    return os.path.realpath(path)


def _is_removed(fd: int, real: str) -> bool:
    """Whether ``real``, as the system gives it, is not the path of the file; it may end like it."""
    try:
        return not os.path.samestat(os.stat(real), os.fstat(fd))
    except OSError:
        return True


def base_path(path: str, real: str) -> str:
    """What names inside the file at ``path``, which lies at ``real``, are relative to.

    That is ``path`` itself where no link is on the way, so that messages show what the user typed.
    """
    plain = os.path.abspath(path) == real and not path_has_protocol(path)
    return path if plain else real
