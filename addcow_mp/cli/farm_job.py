"""A job for every image of a farm: planned, done, logged, printed.

``farm plan``, ``farm commit`` and ``farm flatten`` share it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Annotated

import typer

from addcow_mp.cli import signals
from addcow_mp.cli.causes import Problem, tell_causes
from addcow_mp.cli.jsontext import print_document, print_line
from addcow_mp.cli.limit import Limit
from addcow_mp.cli.log import Log
from addcow_mp.cli.messages import one_line, say, warn
from addcow_mp.cli.options import ListPrinting, OnError, OptionGroup, TimeLimit, name_of_file
from addcow_mp.cli.reasons import explain
from addcow_mp.device.discovery import Unexamined
from addcow_mp.engine.fd_passing import UnstartedError
from addcow_mp.errors import AddcowError, StoppedError, TimeLimitError
from addcow_mp.farm.executor import Watch
from addcow_mp.farm.executor import execute as work
from addcow_mp.farm.image_job import Operation
from addcow_mp.farm.plan import Plan, State, Step, plan
from addcow_mp.farm.tally import Tally
from addcow_mp.jobs.options import Hooks, RunOptions
from addcow_mp.jobs.report import Reach
from addcow_mp.units import human_size


class FarmRun(OptionGroup):
    """How a plan is carried out, or whether."""

    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be done")] = False
    on_error: Annotated[
        OnError,
        typer.Option("--on-error", help="skip: the others go on; stop: begin nothing more"),
    ] = OnError.skip
    time_limit: TimeLimit = None
    log: Annotated[
        str | None,
        typer.Option(
            "--log",
            metavar="FILE",
            callback=name_of_file,
            help="append a JSON object for each event to a regular file",
        ),
    ] = None


@dataclass(frozen=True)
class FarmJob:
    """What is done with every image, and how."""

    operation: Operation
    run: FarmRun
    discard: bool = False
    verifies: bool = False


@dataclass(frozen=True)
class Outcome:
    """A plan, carried out or not, and the error that ended the command early."""

    plan: Plan
    problem: AddcowError | None


def carry_out(places: list[str], job: FarmJob, options: RunOptions, hooks: Hooks) -> Outcome:
    """Plan the job, and do it unless the options ask for the plan alone."""
    limit = Limit(job.run.time_limit)
    # Planning has no time limit: the plan says what is left.
    with hooks.looking():
        made = plan(
            places,
            job.operation,
            options,
            hooks,
            discard=job.discard,
            verifies=job.verifies,
        )
    problem: AddcowError | None = None
    if not job.run.dry_run:
        bounded = replace(hooks, stopping=lambda: hooks.stopping() or limit.is_reached)
        problem = _work(made, job, options, bounded)
    return Outcome(made, problem or _what_stopped_it(made, hooks, limit))


def tell(outcome: Outcome, printing: ListPrinting) -> None:
    """Print what became of each image, and exit."""
    made = outcome.plan
    PRINTERS[printing.output](made, quiet=printing.quiet)
    said = explain(made.places, [step.path for step in made.steps], quiet=printing.quiet)
    if outcome.problem is not None:
        raise outcome.problem
    raise typer.Exit(1 if said or made.unexamined else _exit_code(made))


def _exit_code(made: Plan) -> int:
    """1 when something went wrong, or when all that there is to do is refused."""
    refused = made.count(State.REFUSED)
    if made.is_carried_out:
        return 1 if refused or made.count(State.FAILED) else 0
    return 1 if refused and not made.count(State.READY) else 0


def _work(made: Plan, job: FarmJob, options: RunOptions, hooks: Hooks) -> UnstartedError | None:
    """Carry the plan out; what kept processes from being started is returned, to be told last."""
    problem = None
    with closing(Log(job.run.log)) as log:
        log.write("farm-begun", operation=job.operation, images=len(made.steps))
        for one in made.unexamined:
            log.write(NOT_EXAMINED, **describe_unexamined(one, made))
        try:
            work(
                made,
                options,
                hooks,
                stops_at_error=job.run.on_error is OnError.stop,
                watch=_Watching(log, hooks),
            )
        except UnstartedError as error:
            problem = error
        finally:
            counts = {str(state): made.count(state) for state in State if made.count(state)}
            log.write("farm-ended", operation=job.operation, **counts)
    for step in made.steps:
        warn([] if step.report is None else step.report.warnings)
    return problem


def _is_done(step: Step) -> bool:
    """Whether an image that was stopped lacks nothing but its being read back."""
    return step.report is not None and step.report.reach is Reach.DONE


def _what_stopped_it(made: Plan, hooks: Hooks, limit: Limit) -> AddcowError | None:
    """What kept images from being done; None when nothing did, or an error that has been told."""
    if not made.count(State.STOPPED) and not made.count(State.LEFT):
        return None
    left = made.count(State.STOPPED) + made.count(State.LEFT)
    done = sum(1 for step in made.steps if step.state is State.STOPPED and _is_done(step))
    named = f"{left - done} of {len(made.steps)} images left"
    named += f", {done} done and not verified" if done else ""
    if hooks.stopping():
        return signals.by_signal(StoppedError(path=named))
    if limit.is_reached:
        told = "the time limit was reached; finished work is kept, the same command continues"
        return TimeLimitError(message=f"{named}: {told} from there")
    return None


class _Watching(Watch):
    """Logs what happens, and tells the progress."""

    def __init__(self, log: Log, hooks: Hooks) -> None:
        self._log = log
        self._hooks = hooks

    def begun(self, step: Step) -> None:
        """Log it."""
        self._log.write("image-begun", filename=step.path, operation=step.image_job.operation)

    def ended(self, step: Step) -> None:
        """Log what became of an image."""
        self._log.write(f"image-{_EVENTS[step.state]}", **describe(step))

    def progress(self, tally: Tally) -> None:
        """Tell it."""
        self._hooks.progress(tally.bytes_done, tally.bytes)
        self._hooks.counted(tally.images_done, tally.images)


_EVENTS = {
    State.IDLE: "idle",
    State.REFUSED: "refused",
    State.DONE: "done",
    State.FAILED: "failed",
    State.STOPPED: "stopped",
    State.LEFT: "left",
}


# Printing

_PAST = {"commit": "committed", "flatten": "flattened"}

#: States in the order in which a summary counts them, where there are any.
_COUNTED = (
    State.READY,
    State.DONE,
    State.IDLE,
    State.REFUSED,
    State.FAILED,
    State.STOPPED,
    State.LEFT,
)


def describe(step: Step) -> dict[str, object]:
    """The public keys of one image: what is planned, or what was done."""
    return {
        "filename": step.path,
        "operation": step.image_job.operation,
        "state": step.state,
        **(_planned(step) if step.state is State.READY else _done(step)),
        **({} if step.problem is None else {"problem": str(step.problem)}),
    }


#: What is said of what could not be looked at.
NOT_EXAMINED = "not-examined"


def describe_unexamined(one: Unexamined, plan: Plan) -> dict[str, object]:
    """The public keys of what could not be looked at."""
    about = {"filename": one.path, "operation": plan.operation, "state": NOT_EXAMINED}
    return {**about, "problem": one.reason}


def _images(plan: Plan) -> list[dict[str, object]]:
    hidden = [describe_unexamined(one, plan) for one in plan.unexamined]
    return [*map(describe, plan.steps), *hidden]


def _planned(step: Step) -> dict[str, object]:
    target = None if step.estimate is None else step.estimate.target
    space = step.space
    return {
        "target": target,
        "bytes": step.weight,
        "space-needed": space.peak,
        "space-kept": space.kept,
        "space-freed": space.freed,
    }


def _done(step: Step) -> dict[str, object]:
    if step.report is None:
        return {}
    told = step.report.as_json()
    kept = ("bytes-moved", "clusters-moved", "bytes-zeroed", "clusters-zeroed", "seconds")
    return {key: told[key] for key in (*kept, "guest-digest") if key in told}


def _summary(plan: Plan) -> dict[str, object]:
    counts = {str(state): plan.count(state) for state in _COUNTED}
    counts |= {NOT_EXAMINED: len(plan.unexamined)} if plan.unexamined else {}
    if not plan.is_carried_out:
        done = (State.DONE, State.FAILED, State.STOPPED, State.LEFT)
        counts = {name: count for name, count in counts.items() if name not in done}
        return {"images": len(plan.steps), **counts, "bytes": plan.weight}
    counts.pop(State.READY)
    reports = [step.report for step in plan.steps if step.report is not None]
    moved = sum(report.totals.bytes_moved for report in reports)
    return {"images": len(plan.steps), **counts, "bytes-moved": moved}


def _whole(plan: Plan) -> dict[str, object]:
    filesystems = [
        {"path": one.path, "free": one.free, "peak": one.peak, "kept": one.kept}
        for one in plan.filesystems
    ]
    return {
        **({} if plan.is_carried_out else {"filesystems": filesystems}),
        "summary": _summary(plan),
    }


def print_json(plan: Plan, *, quiet: bool) -> None:  # noqa: ARG001 - all print in one manner
    """Print one document, images in the order of the plan."""
    print_document({"images": _images(plan), **_whole(plan)})


def print_jsonl(plan: Plan, *, quiet: bool) -> None:  # noqa: ARG001
    """Print a line for each image, and one for the farm as a whole."""
    for one in _images(plan):
        print_line(one)
    print_line(_whole(plan))


def print_lines(plan: Plan, *, quiet: bool) -> None:
    """Print a line for each image and a summary; what went wrong goes to stderr.

    A terminal is told of all images with one problem in one line.
    """
    in_short = sys.stderr.isatty()
    problems: list[Problem] = []
    for step in plan.steps:
        if step.problem is not None and step.state is not State.STOPPED:
            problems.append(Problem(step.path, _told(step), step.state, step.problem))
            if not in_short:
                say(_told(step))
        elif not quiet:
            print(one_line(_told(step)))
    if in_short:
        tell_causes(problems, say)
    for one in plan.unexamined:
        say(f"{NOT_EXAMINED}: {one.path}: {one.reason}")
    if not quiet:
        print("\n".join(map(one_line, _totals(plan))))


def _told(step: Step) -> str:
    """What is said of one image."""
    if step.problem is not None:
        problem = str(step.problem)
        named = problem if problem.startswith(f"{step.path}:") else f"{step.path}: {problem}"
        return f"{step.state}: {named}"
    if step.state is State.READY:
        return f"{step.path}: {_plan_of(step)}"
    if step.report is not None:
        return f"{step.path}: {_PAST[step.image_job.operation]}, {_moved(step)}"
    return f"{step.path}: {step.state.replace('-', ' ')}"


def _plan_of(step: Step) -> str:
    into = "" if step.estimate is None else f" into {step.estimate.target}"
    needs = f"needs {human_size(step.space.peak)}, frees {human_size(step.space.freed)}"
    return f"{step.image_job.operation} {human_size(step.weight)}{into}; {needs}"


def _moved(step: Step) -> str:
    totals = None if step.report is None else step.report.totals
    return human_size(0 if totals is None else totals.bytes_moved)


def _totals(plan: Plan) -> Iterator[str]:
    if not plan.is_carried_out:
        for one in plan.filesystems:
            yield (
                f"file system of {one.path}: {human_size(one.free)} free, at most "
                f"{human_size(one.peak)} needed, {_change(one.kept)}"
            )
    counts = [
        f"{plan.count(state)} {state.replace('-', ' ')}" for state in _COUNTED if plan.count(state)
    ]
    counts += [f"{len(plan.unexamined)} not examined"] if plan.unexamined else []
    yield f"{len(plan.steps)} images{': ' if counts else ''}{', '.join(counts)}"


def _change(kept: int) -> str:
    """What the file system has less of afterwards, or more."""
    return f"{human_size(abs(kept))} {'taken' if kept >= 0 else 'freed'} in the end"


#: How to print, by the word for it on the command line.
PRINTERS = {"human": print_lines, "json": print_json, "jsonl": print_jsonl}
