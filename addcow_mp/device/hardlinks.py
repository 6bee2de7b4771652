"""Hard links: files of an overlay that have several names.

The names inside an ``.add-cow`` file mean other files beside each of its own names, and an image
file with a second name may belong to another overlay, which no search would find. Such files are
read with a warning, and written only when the user insists.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable

from addcow_mp.device.files import File
from addcow_mp.errors import HardLinksError


def links_of(file: File) -> int:
    """How many names the file has; a device has one."""
    status = file.status
    return status.st_nlink if stat.S_ISREG(status.st_mode) else 1


def refuse_linked(files: Iterable[File], *, force: bool) -> None:
    """Raise :class:`HardLinksError` for the first of ``files``, to be written, with more names."""
    for file in files:
        if not force and links_of(file) > 1:
            raise HardLinksError(path=file.path, links=links_of(file))


def link_warnings(files: Iterable[File]) -> list[str]:
    """What a reader is told of those of ``files`` that have several names."""
    return [
        f"{file.path}: it has {links_of(file)} hard links; beside another one it may be part of "
        "another image"
        for file in files
        if links_of(file) > 1
    ]
