"""Commit and flatten of a whole farm from the command line: planned, watched, and reported."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import typer

from addcow_mp.cli import signals
from addcow_mp.cli.limit import Limit
from addcow_mp.cli.outcomes import NOT_EXAMINED, PRINTERS, describe_unexamined
from addcow_mp.cli.reasons import explain
from addcow_mp.cli.saying import warn
from addcow_mp.cli.watching import watching
from addcow_mp.cli.working import working
from addcow_mp.device.access import Access
from addcow_mp.device.moving import Manner
from addcow_mp.engine.delivery import UnstartedError
from addcow_mp.errors import AddcowError, StoppedError, TimeLimitError
from addcow_mp.farm.errand import Operation
from addcow_mp.farm.plan import Plan, State, Step, plan
from addcow_mp.farm.work import carry_out as work
from addcow_mp.jobs.report import Conduct, Reach


@dataclass(frozen=True)
class Wishes:
    """What the options ask for; ``output`` and ``form`` are words of the command line."""

    operation: str
    output: str
    discard: bool = False
    verifies: bool = False
    dry_run: bool = False
    stops_at_error: bool = False
    time_limit: str | None = None
    form: str | None = None
    progress_fd: int | None = None
    log: str | None = None
    quiet: bool = False
    jobs: int | None = None
    manner: Manner = field(default_factory=Manner)


def carry_out(places: list[str], access: Access, wishes: Wishes) -> None:
    """Plan it, do it unless that is all, print what has become of each image, and exit."""
    limit = Limit(wishes.time_limit)
    with working(wishes.jobs, access, wishes.manner, progress=False) as conduct:
        # Planning has no limit: it says what is left.
        with conduct.looking():
            made = plan(
                places,
                Operation(wishes.operation),
                conduct,
                discard=wishes.discard,
                verifies=wishes.verifies,
            )
        problem: AddcowError | None = None
        if not wishes.dry_run:
            bounded = replace(conduct, stopping=lambda: conduct.stopping() or limit.is_reached)
            problem = _work(made, bounded, wishes)
        problem = problem or _what_stopped_it(made, conduct, limit)
    PRINTERS[wishes.output](made, quiet=wishes.quiet)
    said = explain(made.places, [step.path for step in made.steps], quiet=wishes.quiet)
    if problem is not None:
        raise problem
    raise typer.Exit(1 if said or made.unexamined else _exit_code(made))


def _exit_code(made: Plan) -> int:
    """1 when something went wrong, or when all that there is to do is refused."""
    refused = made.count(State.REFUSED)
    if made.is_carried_out:
        return 1 if refused or made.count(State.FAILED) else 0
    return 1 if refused and not made.count(State.READY) else 0


def _work(made: Plan, conduct: Conduct, wishes: Wishes) -> UnstartedError | None:
    """Carry the plan out; what kept processes from being started is returned, to be told last."""
    problem = None
    with watching(wishes.form, wishes.progress_fd, wishes.log, conduct.progress) as (watch, log):
        log.write("farm-begun", operation=wishes.operation, images=len(made.steps))
        for one in made.unexamined:
            log.write(NOT_EXAMINED, **describe_unexamined(one, made))
        try:
            work(made, conduct, stops_at_error=wishes.stops_at_error, watch=watch)
        except UnstartedError as error:
            problem = error
        finally:
            counts = {str(state): made.count(state) for state in State if made.count(state)}
            log.write("farm-ended", operation=wishes.operation, **counts)
    for step in made.steps:
        warn([] if step.report is None else step.report.warnings)
    return problem


def _is_done(step: Step) -> bool:
    """Whether an image that was stopped lacks nothing but its being read back."""
    return step.report is not None and step.report.reach is Reach.DONE


def _what_stopped_it(made: Plan, conduct: Conduct, limit: Limit) -> AddcowError | None:
    """What kept images from being done; None when nothing did, or an error that has been told."""
    if not made.count(State.STOPPED) and not made.count(State.LEFT):
        return None
    left = made.count(State.STOPPED) + made.count(State.LEFT)
    done = sum(1 for step in made.steps if step.state is State.STOPPED and _is_done(step))
    named = f"{left - done} of {len(made.steps)} images left"
    named += f", {done} done and not verified" if done else ""
    if conduct.stopping():
        return signals.as_met(StoppedError(path=named))
    if limit.is_reached:
        told = "the time limit was reached; what was finished is kept, the same command goes on"
        return TimeLimitError(message=f"{named}: {told} from there")
    return None
