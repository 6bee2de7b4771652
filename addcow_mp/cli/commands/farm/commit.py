"""``addcow farm commit``: commit every overlay into its backing file, the deepest chains first."""

from __future__ import annotations

from addcow_mp.cli.farm_job import FarmJobOptions
from addcow_mp.farm.image_job import Operation


def command(*, options: FarmJobOptions) -> None:
    """Commit every overlay into its backing file, the deepest chains first.

    The same command run again does only what is left. Exit status: 0 all done, 1 some image was
    refused or failed, 75 the time limit was reached.
    """
    options.run(Operation.COMMIT)
