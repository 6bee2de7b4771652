"""What a file must be that becomes a backing file.

A raw file of which the first bytes are those of another format is most likely that format. The
image file of an overlay is no disk: what it holds in clusters that are not allocated is undefined.
Both are refused, unless forced.
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
    """Refuse a chain with a raw file that begins as another format does."""
    for file in layer.files():
        refuse_as_raw(file)


def refuse_image_as_backing(backing: str) -> None:
    """Refuse a raw backing file that is the image file of an overlay, unless it is a whole disk.

    Only the overlay is examined whose image file has this name by default. A search would read all
    headers of a directory for each new overlay; ``farm check`` finds the others.
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
    """Return a warning about directories that users of the overlay at ``path`` must allow."""
    own = home_of(path)
    named = (os.path.realpath(one) for one in (image, backing) if one is not None)
    outside = [os.path.dirname(one) for one in named if not one.startswith(own.rstrip("/") + "/")]
    if not outside:
        return []
    roots = " ".join(f"--root {one}" for one in dict.fromkeys(outside))
    return [f"{path}: it names files outside its directory; its users will need {roots}"]
