"""The result of a farm job: what was done with each image, and the exit status."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from addcow_mp.errors import AddcowError
from addcow_mp.farm.plan import Plan, State, Step, refused_state
from addcow_mp.jobs.report import Outcome, Report


@dataclass(frozen=True)
class ImageResult:
    """The state of one image, why it is refused or failed, and the report of its job."""

    step: Step
    state: State
    problem: AddcowError | None = None
    report: Report | None = None

    @classmethod
    def planned(cls, step: Step) -> Self:
        """The result of a step that was not run."""
        return cls(step, step.state, step.problem)

    @classmethod
    def of(cls, step: Step, outcome: Report | AddcowError) -> Self:
        """The result of a step whose job ended with ``outcome``."""
        if isinstance(outcome, Report):
            return cls(step, State.DONE, report=outcome)
        report = outcome.report
        if report is None:  # its process died
            return cls(step, State.FAILED, outcome)
        if report.outcome is Outcome.REFUSED:
            return cls(step, refused_state(outcome), outcome)
        is_stopped = report.outcome in (Outcome.STOPPED, Outcome.NOT_READ_BACK)
        return cls(step, State.STOPPED if is_stopped else State.FAILED, outcome, report)

    @property
    def path(self) -> str:
        """The path of the overlay."""
        return self.step.path

    @property
    def has_failed(self) -> bool:
        """Whether the image was refused, is lent, or has failed."""
        return self.state in (State.REFUSED, State.LENT, State.FAILED)

    @property
    def lacks_verifying(self) -> bool:
        """Whether the job was stopped after its work, before all of it was read back."""
        return self.report is not None and self.report.outcome is Outcome.NOT_READ_BACK


@dataclass(frozen=True)
class FarmResult:
    """The results of all images of a plan, in its order.

    ``problem``: the error that ended the job before all images were done.
    """

    exit_statuses: ClassVar = {
        0: "every image is done, or has nothing to do",
        1: "an image was refused, failed or not examined, or the given files are no overlays",
        75: "the time limit was reached",
    }

    plan: Plan
    images: tuple[ImageResult, ...]
    is_carried_out: bool = True
    problem: AddcowError | None = None

    @property
    def _has_overlays(self) -> bool:
        """Whether the places hold overlays, also if none of them stands on the base of a rebase."""
        return bool(self.images or self.plan.dependency_index.farm)

    def count(self, state: State) -> int:
        """How many images are in ``state``."""
        return sum(image.state is state for image in self.images)

    @property
    def exit_code(self) -> int:
        """The status of the problem, or 1 if an image was refused, failed or not examined.

        A plan that was not carried out fails only if every image with something to do is refused.
        """
        if self.problem is not None:
            return self.problem.exit_code
        if self.plan.unexamined or (self.plan.places.named and not self._has_overlays):
            return 1
        if self.is_carried_out:
            return int(any(image.has_failed for image in self.images))
        refused = self.count(State.REFUSED) + self.count(State.LENT)
        return int(refused > 0 and not self.count(State.READY))
