"""Rules for a file that becomes a backing file.

A raw file that begins with the first bytes of another format most likely has that format. The image
file of an overlay is not a disk: in clusters that are not allocated its content is undefined. Both
are refused without ``--force``.
"""

from __future__ import annotations

import os

from addcow_mp.device.discovery import named_by
from addcow_mp.device.files import identity_at
from addcow_mp.device.layer import Layer
from addcow_mp.device.magic import refuse_as_raw
from addcow_mp.errors import ImageError
from addcow_mp.jobs.naming import home_of


def refuse_disguised(layer: Layer) -> None:
    """Raise :class:`ImageError` if a raw file of the chain begins like another format."""
    for file in layer.files():
        refuse_as_raw(file)


def refuse_image_as_backing(backing: str) -> None:
    """Raise :class:`ImageError` if ``backing`` is the image file of an overlay and no whole disk.

    Only one overlay is examined: the one whose image file has this name by default. A search would
    read all headers of a directory for each new overlay; ``farm check`` finds the others.
    """
    owner = named_by(os.path.splitext(backing)[0] + ".add-cow")
    if owner is None or owner.image is None or owner.image != identity_at(backing):
        return
    if owner.is_lent or not owner.all_allocated:
        raise ImageError(
            path=backing,
            problem=f"it is the image file of {owner.path}, and not a whole disk; use "
            f"-b {owner.path} -F add-cow, or --force",
        )


def roots_needed(path: str, image: str, backing: str | None) -> list[str]:
    """Return a warning if users of the overlay at ``path`` must allow more directories."""
    own = home_of(path)
    named = (os.path.realpath(one) for one in (image, backing) if one is not None)
    outside = [os.path.dirname(one) for one in named if not one.startswith(own.rstrip("/") + "/")]
    if not outside:
        return []
    roots = " ".join(f"--root {one}" for one in dict.fromkeys(outside))
    return [f"{path}: it names files outside its directory; its users will need {roots}"]
