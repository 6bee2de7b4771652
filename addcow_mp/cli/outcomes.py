"""A plan, and what has become of each of its images: a line each, or JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from addcow_mp.cli.causes import Problem, tell_causes
from addcow_mp.cli.jsontext import as_document, as_line
from addcow_mp.cli.saying import one_line, say
from addcow_mp.device.discovery import Unexamined
from addcow_mp.farm.plan import Plan, State, Step
from addcow_mp.units import human_size

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
        "operation": step.errand.operation,
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
    target = None if step.prospect is None else step.prospect.target
    room = step.room
    return {
        "target": target,
        "bytes": step.weight,
        "space-needed": room.peak,
        "space-kept": room.kept,
        "space-freed": room.freed,
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
    moved = sum(report.amount.bytes_moved for report in reports)
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
    print(as_document({"images": _images(plan), **_whole(plan)}))


def print_jsonl(plan: Plan, *, quiet: bool) -> None:  # noqa: ARG001
    """Print a line for each image, and one for the farm as a whole."""
    for one in _images(plan):
        print(as_line(one))
    print(as_line(_whole(plan)))


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
        return f"{step.path}: {_PAST[step.errand.operation]}, {_moved(step)}"
    return f"{step.path}: {step.state.replace('-', ' ')}"


def _plan_of(step: Step) -> str:
    into = "" if step.prospect is None else f" into {step.prospect.target}"
    needs = f"needs {human_size(step.room.peak)}, frees {human_size(step.room.freed)}"
    return f"{step.errand.operation} {human_size(step.weight)}{into}; {needs}"


def _moved(step: Step) -> str:
    amount = None if step.report is None else step.report.amount
    return human_size(0 if amount is None else amount.bytes_moved)


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
