"""An image job: one overlay of a farm, and what is done with it.

It runs the image's own commit, flatten, rebase or reset, with its own locks, refusals and
checkpoints. The farm only adds what it already knows: the overlays around the image. An image job
is frozen and can be pickled to another process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from addcow_mp.device.discovery import NearbyOverlays
from addcow_mp.device.files import sync_directory
from addcow_mp.engine.pool import Pool
from addcow_mp.errors import AddcowError
from addcow_mp.jobs import commit, flatten, rebase, reset
from addcow_mp.jobs.options import Hooks, RunOptions, Shared
from addcow_mp.jobs.rebase import NewBacking
from addcow_mp.jobs.report import Estimate, Report


class Operation(StrEnum):
    """What is done with each image."""

    COMMIT = "commit"
    FLATTEN = "flatten"
    REBASE = "rebase"
    RESET = "reset"


@dataclass(frozen=True)
class JobSpec:
    """What is done with every image of a farm.

    ``discard``: a flatten then removes the ``.add-cow`` file. ``verifies``: what was written is
    read back from the disk, before anything is removed. ``stops_at_error``: no image begins after
    one was refused or has failed. ``backing``: the backing file that a rebase gives to overlays
    that stand on ``base``; None = on the only one that there is.
    """

    operation: Operation
    discard: bool = False
    verifies: bool = False
    stops_at_error: bool = False
    backing: NewBacking | None = None
    base: str | None = None

    @property
    def new_backing(self) -> NewBacking:
        """The backing file of a rebase."""
        assert self.backing is not None  # noqa: S101 - the spec of a rebase
        return self.backing


@dataclass(frozen=True)
class ImageJob:
    """``spec`` for the overlay at ``path``.

    ``nearby``: the overlays around its files. ``receives``: earlier jobs commit clusters into this
    overlay, so it will have something to commit even if no cluster is allocated yet. ``layers``:
    the number of layers in its chain.
    """

    path: str
    spec: JobSpec
    nearby: NearbyOverlays
    receives: bool = False
    layers: int = 1

    def estimate(self, options: RunOptions) -> Estimate | AddcowError | None:
        """What it would do, or why it would be refused; None if there is nothing to do."""
        shared = Shared(nearby=self.nearby)
        try:
            if self.spec.operation is Operation.FLATTEN:
                return flatten.estimate(self.path, options, shared, discard=self.spec.discard)
            if self.spec.operation is Operation.RESET:
                return reset.estimate(self.path, options, shared)
            if self.spec.operation is Operation.REBASE:
                return rebase.estimate(self.path, self.spec.new_backing, options, shared)
            return commit.estimate(self.path, options, shared, receives=self.receives)
        except AddcowError as error:
            return error.without_traceback()

    def run(self, options: RunOptions, hooks: Hooks, pool: Pool | None = None) -> Report:
        """Run the job, with the processes of ``pool``. Raises :class:`AddcowError`."""
        if self.spec.operation is Operation.RESET:
            return reset.reset(self.path, options=options, shared=Shared(nearby=self.nearby))
        job: Callable[..., Report] = commit.commit
        if self.spec.operation is Operation.FLATTEN:
            job = partial(flatten.flatten, discard=self.spec.discard)
        elif self.spec.operation is Operation.REBASE:
            job = partial(rebase.rebase, backing=self.spec.new_backing)
        shared, verifies = Shared(pool, self.nearby), self.spec.verifies
        return job(self.path, verifies=verifies, options=options, hooks=hooks, shared=shared)

    @property
    def is_discarded(self) -> bool:
        """Whether the overlay is already removed, which is the last step of its job."""
        return self.spec.discard and not os.path.exists(self.path)

    def finish_discard(self) -> Report:
        """Finish a job whose process died after it removed the overlay."""
        sync_directory(os.path.realpath(self.path))
        return Report(self.spec.operation, self.path)
