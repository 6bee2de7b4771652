"""``addcow flatten``: copy the missing clusters into the image file."""

from __future__ import annotations

from functools import partial

from addcow_mp.cli.image_job import ImageJobOptions
from addcow_mp.cli.options import Discard


def command(*, options: ImageJobOptions, discard: Discard = False) -> None:
    """Copy the missing clusters into the image file, which then is the whole disk."""
    from addcow_mp.jobs.flatten import flatten

    options.run(partial(flatten, discard=discard), "Image flattened.")
