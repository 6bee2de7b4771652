"""Prints the plan or the result of a farm job."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

from addcow_mp.cli.causes import lines_by_cause, problem_line
from addcow_mp.cli.listing import NOT_EXAMINED, print_list
from addcow_mp.cli.messages import one_line, say
from addcow_mp.cli.options import ListPrinting
from addcow_mp.device.discovery import Unexamined
from addcow_mp.farm.image_job import Operation
from addcow_mp.farm.plan import FileSystem, State, Step
from addcow_mp.farm.result import FarmResult, ImageResult
from addcow_mp.jobs.report import Report
from addcow_mp.units import human_size

#: The states of a plan that is not carried out, and those of a result, as they are counted.
_PLANNED = (State.READY, State.IDLE, State.REFUSED, State.LENT)
_RESULTS = (
    State.DONE,
    State.IDLE,
    State.REFUSED,
    State.LENT,
    State.FAILED,
    State.STOPPED,
    State.LEFT,
)

_PAST = {
    Operation.COMMIT: "committed",
    Operation.FLATTEN: "flattened",
    Operation.REBASE: "rebased",
    Operation.RESET: "reset",
}


def print_result(result: FarmResult, printing: ListPrinting) -> None:
    """Print ``result`` in the form that ``printing`` asks for."""
    operation = result.plan.spec.operation
    hidden = (describe_unexamined(one, operation) for one in result.plan.unexamined)
    images = [*map(describe, result.images), *hidden]
    lines = partial(_print_lines, result, quiet=printing.quiet)
    print_list(printing, images, _rest(result), lines)


# JSON


def describe(image: ImageResult) -> dict[str, object]:
    """The public keys of one image: what is planned, or what was done."""
    return {
        "filename": image.path,
        "operation": image.step.image_job.spec.operation,
        "state": image.state,
        **(_planned(image.step) if image.state is State.READY else _done(image)),
        **({} if image.problem is None else {"problem": str(image.problem)}),
    }


def describe_unexamined(one: Unexamined, operation: Operation) -> dict[str, object]:
    """The public keys of what could not be examined."""
    known = {"filename": one.path, "operation": operation, "state": NOT_EXAMINED}
    return {**known, "problem": one.reason}


def _planned(step: Step) -> dict[str, object]:
    return {
        "target": None if step.estimate is None else step.estimate.target,
        "bytes": step.weight,
        "space-needed": step.space.peak,
        "space-kept": step.space.kept,
        "space-freed": step.space.freed,
    }


def _done(image: ImageResult) -> dict[str, object]:
    if image.report is None:
        return {}
    report = image.report.as_json()
    keys = ("bytes-moved", "clusters-moved", "bytes-zeroed", "clusters-zeroed", "seconds")
    optional = ("bytes-freed", "guest-digest", "manifests-made", "manifests-removed")
    return {key: report[key] for key in (*keys, *optional) if key in report}


def _rest(result: FarmResult) -> dict[str, object]:
    """The keys of the farm as a whole."""
    plan, states = result.plan, _RESULTS if result.is_carried_out else _PLANNED
    summary: dict[str, object] = {
        "images": len(result.images),
        **{
            str(state): count
            for state in states
            if (count := result.count(state)) or state is not State.LENT
        },
        **({NOT_EXAMINED: len(plan.unexamined)} if plan.unexamined else {}),
    }
    if result.is_carried_out:
        return {"summary": {**summary, "bytes-moved": sum(map(_bytes_moved, result.images))}}
    filesystems = [
        {"path": one.path, "free": one.free, "peak": one.peak, "kept": one.kept}
        for one in plan.filesystems
    ]
    return {"filesystems": filesystems, "summary": {**summary, "bytes": plan.weight}}


def _bytes_moved(image: ImageResult) -> int:
    return 0 if image.report is None else image.report.totals.bytes_moved


# Lines


def _print_lines(result: FarmResult, *, quiet: bool) -> None:
    """Print a line for each image and a summary; problems go to stderr.

    On a terminal, all images with one problem share a line.
    """
    problems = []
    for image in result.images:
        if image.problem is not None and image.state is not State.STOPPED:
            problems.append(image)
        elif not quiet:
            print(one_line(_line(image)))
    is_terminal = sys.stderr.isatty()
    for line in lines_by_cause(problems) if is_terminal else map(problem_line, problems):
        say(line)
    for one in result.plan.unexamined:
        say(f"{NOT_EXAMINED}: {one.path}: {one.reason}")
    if not quiet:
        for line in _totals(result):
            print(one_line(line))


def _line(image: ImageResult) -> str:
    step, operation = image.step, image.step.image_job.spec.operation
    if image.problem is not None:
        return problem_line(image)
    if image.state is State.READY and operation is Operation.RESET:
        return f"{step.path}: {operation}; frees {human_size(step.space.freed)}"
    if image.state is State.READY:
        into = "" if step.estimate is None else f" into {step.estimate.target}"
        needs = f"needs {human_size(step.space.peak)}, frees {human_size(step.space.freed)}"
        return f"{step.path}: {operation} {human_size(step.weight)}{into}; {needs}"
    if image.report is not None:
        gone = "; its manifest was removed" if image.report.manifests_gone else ""
        return f"{step.path}: {_PAST[operation]}, {_amount(image.report)}{gone}"
    return f"{step.path}: {image.state.replace('-', ' ')}"


def _amount(report: Report) -> str:
    if report.bytes_freed is not None:
        return f"{human_size(report.bytes_freed)} freed"
    return human_size(report.totals.bytes_moved)


def _totals(result: FarmResult) -> Iterator[str]:
    if not result.is_carried_out:
        yield from map(_needs, result.plan.filesystems)
    counts = {state.replace("-", " "): result.count(state) for state in (State.READY, *_RESULTS)}
    counts["not examined"] = len(result.plan.unexamined)
    words = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    yield f"{len(result.images)} images{': ' if words else ''}{words}"


def _needs(one: FileSystem) -> str:
    end = f"{human_size(abs(one.kept))} {'taken' if one.kept >= 0 else 'freed'} in the end"
    needed = f"at most {human_size(one.peak)} needed"
    return f"file system of {one.path}: {human_size(one.free)} free, {needed}, {end}"
