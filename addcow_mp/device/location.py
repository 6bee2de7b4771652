"""The real path of an open file, and the path that names inside it are relative to.

A relative name in an ``.add-cow`` file is relative to the directory in which that file lies. A
symbolic link to the file does not change its meaning. The path comes from the open descriptor, so
changing a link after the file was opened has no effect.
"""

from __future__ import annotations

import os
from contextlib import suppress

from addcow_mp.format.names import path_has_protocol

#: The kernel appends this to the path of a file whose name was removed.
_REMOVED = " (deleted)"


def absolute(path: str) -> str:
    """What os.path.abspath returns, ten times as fast for a plain path: a job asks for many."""
    plain = path if path.startswith("/") else f"{os.getcwd()}/{path.removeprefix('./')}"
    if "//" in plain or "/." in plain or plain.endswith("/"):
        return os.path.abspath(path)
    return plain


def real_path(fd: int, path: str) -> str:
    """The path without links of the file ``fd``, which was opened as ``path``."""
    with suppress(OSError):  # no /proc, or a path longer than a page
        real = os.readlink(f"/proc/self/fd/{fd}")
        if real.startswith("/") and not (real.endswith(_REMOVED) and _is_removed(fd, real)):
            return real
    return os.path.realpath(path)


def _is_removed(fd: int, real: str) -> bool:
    """Whether ``real`` is not the path of the file; a file's own name may end like that."""
    try:
        return not os.path.samestat(os.stat(real), os.fstat(fd))
    except OSError:
        return True


def base_path(path: str, real: str) -> str:
    """The path that names inside the file at ``path``, which lies at ``real``, are relative to.

    That is ``path`` itself if it contains no link, so that messages show what the user typed.
    """
    plain = absolute(path) == real and not path_has_protocol(path)
    return path if plain else real


def regular_files_in(directory: str) -> list[str]:
    """The paths of the regular files in a directory, in order. Links are left out."""
    with suppress(OSError), os.scandir(directory or ".") as entries:
        names = sorted(one.name for one in entries if one.is_file(follow_symlinks=False))
        return [os.path.join(directory, name) for name in names]
    return []
