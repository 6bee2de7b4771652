"""An errand: one image, and what shall be done with it. Whoever runs it runs the image's own job.

The farm adds nothing to what commit and flatten do, and takes nothing away: each image is opened,
locked, refused or worked on by its own job, with its own checkpoints. What the farm knows already,
the overlays around the image, travels with the errand.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from addcow_mp.device.discovery import NearbyOverlays
from addcow_mp.engine.pool import Pool
from addcow_mp.jobs import commit, flatten
from addcow_mp.jobs.options import Hooks, RunOptions, Shared
from addcow_mp.jobs.report import Estimate, Report


class Operation(StrEnum):
    """What is done with each image."""

    COMMIT = "commit"
    FLATTEN = "flatten"


@dataclass(frozen=True)
class ImageJob:
    """``operation`` on the overlay at ``path``; ``discard`` is flatten's.

    ``verifies``: what was written is read back from the disk, before anything is discarded.
    ``receives``: before it, clusters will be committed into this overlay, so that there is
    something to do although nothing in it is local yet.
    """

    path: str
    operation: Operation
    around: NearbyOverlays
    discard: bool = False
    receives: bool = False
    verifies: bool = False

    def estimate(self, options: RunOptions) -> Estimate | None:
        """What it would do, None for nothing. Raises what it would be refused for."""
        shared = Shared(nearby=self.around)
        if self.operation is Operation.FLATTEN:
            return flatten.estimate(self.path, options, shared, discard=self.discard)
        return commit.estimate(self.path, options, shared, receives=self.receives)

    def run(self, options: RunOptions, hooks: Hooks, pool: Pool | None = None) -> Report:
        """Do it, with the processes of ``pool``. Raises :class:`AddcowError`."""
        shared = Shared(pool, self.around)
        if self.operation is Operation.COMMIT:
            return commit.commit(
                self.path, verifies=self.verifies, options=options, hooks=hooks, shared=shared
            )
        return flatten.flatten(
            self.path,
            discard=self.discard,
            verifies=self.verifies,
            options=options,
            hooks=hooks,
            shared=shared,
        )
