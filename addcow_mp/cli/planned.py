"""The output of ``--dry-run``: what a job on one overlay would do."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from addcow_mp.cli.messages import one_line
from addcow_mp.units import human_size

if TYPE_CHECKING:
    from addcow_mp.jobs.report import Estimate


class Planned(NamedTuple):
    """What ``operation`` would do with the overlay at ``path``; None = nothing."""

    path: str
    operation: str
    estimate: Estimate | None

    def as_json(self) -> dict[str, object]:
        """The plan as a JSON object; sizes in bytes."""
        known = {"filename": self.path, "operation": self.operation}
        if self.estimate is None:
            return {**known, "state": "nothing-to-do"}
        space = self.estimate.space
        return {
            **known,
            "state": "ready",
            "bytes": self.estimate.weight,
            "space-needed": space.peak,
            "space-kept": space.kept,
            "space-freed": space.freed,
        }

    @property
    def line(self) -> str:
        """The plan as one line of text."""
        if self.estimate is None:
            return one_line(f"{self.path}: nothing to do")
        moved, space = self.estimate.weight, self.estimate.space
        parts = [
            f"{what} {human_size(size)}"
            for what, size in (
                ("copies", moved),
                ("takes", space.peak),
                ("frees", space.freed),
            )
            if size
        ]
        return one_line(
            "; ".join([f"{self.path}: {self.operation}", ", ".join(parts)]).rstrip("; ")
        )
