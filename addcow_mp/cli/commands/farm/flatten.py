"""``addcow farm flatten``: copy the missing clusters of every overlay into its image file."""

from __future__ import annotations

from addcow_mp.cli.farm_job import FarmJobOptions
from addcow_mp.cli.options import Discard
from addcow_mp.farm.image_job import Operation


def command(*, options: FarmJobOptions, discard: Discard = False) -> None:
    """Copy the missing clusters of every overlay into its image file, the deepest chains first.

    The same command run again does only what is left. Exit status: 0 all done, 1 some image was
    refused or failed, 75 the time limit was reached.
    """
    options.run(Operation.FLATTEN, discard=discard)
