"""``addcow commit``: move the overlay's clusters into its backing file."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from addcow_mp.cli.image_job import ImageJobOptions


def command(
    *,
    options: ImageJobOptions,
    keep: Annotated[bool, typer.Option("-d", help="leave overlay and image as they are")] = False,
) -> None:
    """Move the overlay's clusters into its backing file."""
    from addcow_mp.jobs.commit import commit

    options.run(partial(commit, keep=keep), "Image committed.")
