"""The farm's scheduler with an executor of our own: order and results do not depend on the pool."""

from __future__ import annotations

from pathlib import Path

import pytest

from addcow_mp.errors import AddcowError
from addcow_mp.farm.executor import Executor, Finished
from addcow_mp.farm.farm_job import FarmJob, run_farm_job
from addcow_mp.farm.image_job import ImageJob, JobSpec, Operation
from addcow_mp.farm.plan import State
from addcow_mp.jobs.options import Hooks, RunOptions
from support.command import draw, draw_raw, look


class LastFirst:
    """Runs jobs in this process, the one that was submitted last before all others."""

    capacity = 8

    def __init__(self, options: RunOptions, hooks: Hooks, spec: JobSpec) -> None:
        assert not spec.verifies
        self.options, self.hooks = options, hooks
        self.waiting: list[tuple[int, ImageJob]] = []
        self.ran: list[str] = []
        self.is_closed = False

    def submit(self, number: int, job: ImageJob, weight: int) -> None:
        assert weight > 0
        self.waiting.append((number, job))

    def finished(self) -> list[Finished]:
        number, job = self.waiting.pop()
        self.ran.append(Path(job.path).stem)
        try:
            return [Finished(number, job.run(RunOptions(0, self.options.access), self.hooks))]
        except AddcowError as error:
            return [Finished(number, error)]

    def stop(self, *, interrupt: bool) -> list[int]:  # noqa: ARG002
        dropped = [number for number, _ in self.waiting]
        self.waiting.clear()
        return dropped

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    """Two chains of two overlays, each on a base of its own."""
    for name in "ab":
        draw_raw(tmp_path / f"{name}.img", "ABCD")
        draw(tmp_path / f"{name}1.add-cow", "X---", f"{name}.img")
        draw(tmp_path / f"{name}2.add-cow", "-Y--", f"{name}1.add-cow", backing_format="add-cow")
    return tmp_path


def test_another_executor_meets_each_overlay_before_its_backing_file(farm: Path) -> None:
    made: list[LastFirst] = []

    def engine(options: RunOptions, hooks: Hooks, spec: JobSpec) -> Executor:
        made.append(LastFirst(options, hooks, spec))
        return made[0]

    job = FarmJob(JobSpec(Operation.COMMIT))
    result = run_farm_job([str(farm)], job, RunOptions(0), engine=engine)
    assert result.exit_code == 0
    assert [image.state for image in result.images] == [State.DONE] * 4
    assert made[0].ran == ["b2", "b1", "a2", "a1"]
    assert made[0].is_closed
    assert [look(farm / f"{name}.img") for name in "ab"] == ["XYCD", "XYCD"]


def test_a_stop_leaves_what_was_submitted_and_not_begun(farm: Path) -> None:
    stopping: list[bool] = []

    class OneOnly(LastFirst):
        def finished(self) -> list[Finished]:
            stopping.append(True)
            return super().finished()

    hooks = Hooks(stopping=lambda: bool(stopping))
    job = FarmJob(JobSpec(Operation.COMMIT))
    result = run_farm_job([str(farm)], job, RunOptions(0), hooks, engine=OneOnly)
    states = {Path(image.path).stem: image.state for image in result.images}
    # A job that is asked to stop before it moves anything is stopped; the others never began.
    assert states == {"a2": State.LEFT, "b2": State.STOPPED, "a1": State.LEFT, "b1": State.LEFT}
    assert result.problem is not None
    assert [look(farm / f"{name}.img") for name in "ab"] == ["ABCD", "ABCD"]
