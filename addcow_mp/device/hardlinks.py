"""Hard links: files of an overlay that have several names.

A relative name inside an ``.add-cow`` file means a different file beside each of its hard links,
and an image file with a second name may belong to another overlay that no search can find. Such
files are read with a warning, and written only with ``--force``.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable

from addcow_mp.device.files import File
from addcow_mp.errors import HardLinksError


def links_of(file: File) -> int:
    """How many names the file has; a device counts as one."""
    status = file.status
    return status.st_nlink if stat.S_ISREG(status.st_mode) else 1


def refuse_linked(files: Iterable[File], *, force: bool) -> None:
    """Raise :class:`HardLinksError` for the first of ``files`` that has several names."""
    for file in () if force else files:
        links = links_of(file)
        if links > 1:
            raise HardLinksError(path=file.path, links=links)


def link_warnings(files: Iterable[File]) -> list[str]:
    """A warning for each of ``files`` that has several names."""
    return [
        f"{file.path}: it has {links} hard links; through another one it may be part of "
        "another image"
        for file in files
        if (links := links_of(file)) > 1
    ]
