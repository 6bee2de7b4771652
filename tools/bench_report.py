"""The results of the benchmark: as JSON, as a table for readers, and as a chart.

The ratio of a case is made of medians: the fastest peer's by addcow's own (times as fast), or
addcow's by the peer's if the question is what something costs. The JSON document contains every
single run, so that other figures can be computed.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

from addcow_mp.units import human_size
from bench_chart import Bar, chart
from bench_runs import Case, Measure


@dataclass
class Timing:
    """The counted runs of one contender, in seconds."""

    name: str
    command: str
    counted: bool
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The run in the middle."""
        return statistics.median(self.seconds)


@dataclass
class Result:
    """The result of one case: timings, addcow's first, or why there are none."""

    case: Case
    filesystem: str = ""
    timings: list[Timing] = field(default_factory=list)
    skipped: str = ""
    failed: str = ""

    @property
    def peer(self) -> Timing:
        """The fastest peer that counts."""
        return min((one for one in self.timings[1:] if one.counted), key=lambda one: one.median)

    @property
    def speed(self) -> float:
        """How many times as fast as the peer."""
        return self.peer.median / self.timings[0].median

    @property
    def ratio(self) -> float:
        """The figure that the target is about."""
        return self.speed if self.case.measure is Measure.SPEED else 1 / self.speed

    @property
    def target_speed(self) -> float | None:
        """The target, as times as fast."""
        target = self.case.target
        return target if target is None or self.case.measure is Measure.SPEED else 1 / target

    @property
    def reached(self) -> bool | None:
        """Whether the target was reached; None without one."""
        return self.bar().reached

    def bar(self) -> Bar:
        """The bar of this case in the chart."""
        return Bar(self.case.name, self.speed, self.target_speed)

    def as_json(self) -> dict[str, object]:
        """The result as JSON, with every run."""
        entry: dict[str, object] = {
            "case": self.case.name,
            "title": self.case.title,
            "measure": self.case.measure.value,
            "target": self.case.target,
        }
        if not self.timings:
            return {**entry, "skipped": self.skipped or None, "failed": self.failed or None}
        return {
            **entry,
            "ratio": round(self.ratio, 4),
            "reached": self.reached,
            "limit": self.case.limit or None,
            "file-system": self.filesystem,
            "peer": self.peer.name,
            "contenders": [_timing_json(one) for one in self.timings],
        }


def _timing_json(one: Timing) -> dict[str, object]:
    return {
        "name": one.name,
        "command": one.command,
        "counted": one.counted,
        "median": round(one.median, 6),
        "seconds": [round(each, 6) for each in one.seconds],
    }


#: The note in a report with less data than the targets are meant for.
SMALL = (
    "The targets are meant for scale 1. With less data the start-up of the interpreter and of "
    "its workers outweighs the work: such figures show that the bench runs, and little else."
)


@dataclass(frozen=True)
class Setting:
    """How the bench was run: the bytes of guest data, the counted runs, where, on what."""

    data: int
    scale: str
    runs: int
    filesystem: str
    when: str
    machine: dict[str, object]

    @property
    def conditions(self) -> list[str]:
        """What a reader needs to judge the figures."""
        return [
            f"{human_size(self.data)} of guest data (scale {self.scale}); the directory of the "
            f"files is on {self.filesystem}, the xfs cases are on a loop device there.",
            f"One warm-up and {self.runs} counted runs each, the contenders taking turns; short "
            "commands are run more often, and long ones three times. The figures are medians.",
            "Whole processes, timed from outside, start-up included, output discarded; where "
            "start-up is excluded, the table says so.",
            "The page cache is hot: what a case reads has been read just before.",
            "Everything is synced before each run, unless the title says otherwise, sources too: a "
            "source with dirty pages is cloned at a small part of the speed, and a run would pay "
            "for the one before it.",
            *([SMALL] if Fraction(self.scale) < 1 else []),
        ]


# ---- machine and versions ----


def machine() -> dict[str, object]:
    """The machine of the measurement."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "load-at-start": round(os.getloadavg()[0], 2),
    }


def _field(path: str, key: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    found = (line.partition(":")[2].strip() for line in lines if line.startswith(key))
    return next(found, "")


def versions() -> dict[str, str]:
    """The versions of the measured tools."""
    packages = {name: version(name) for name in ("addcow-mp", "bitarray", "typer")}
    return {
        "python": platform.python_version(),
        **packages,
        "qemu-img": _first_line("qemu-img", "--version").removeprefix("qemu-img version "),
        "nbdkit": _first_line("nbdkit", "--version").removeprefix("nbdkit "),
        "fio": _first_line("fio", "--version").removeprefix("fio-"),
        "cp": _first_line("cp", "--version").rpartition(" ")[2],
    }


def _first_line(*arguments: str) -> str:
    try:
        said = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "not installed"
    return said.partition("\n")[0]


# ---- the three documents ----


def write_all(
    directory: Path, name: str, setting: Setting, results: Sequence[Result]
) -> list[Path]:
    """Write NAME.json, NAME.md and NAME.svg into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    texts = {
        "json": json.dumps(_document(setting, results), indent=2) + "\n",
        "md": "\n".join(_markdown(name, setting, results)) + "\n",
        "svg": chart([one.bar() for one in results if one.timings]),
    }
    written = [directory / f"{name}.{suffix}" for suffix in texts]
    for path, text in zip(written, texts.values(), strict=True):
        path.write_text(text, encoding="utf-8")
    return written


def _document(setting: Setting, results: Iterable[Result]) -> dict[str, object]:
    return {
        "when": setting.when,
        "scale": setting.scale,
        "data": setting.data,
        "runs": setting.runs,
        "machine": {**setting.machine, "file-system": setting.filesystem},
        "versions": versions(),
        "conditions": setting.conditions,
        "cases": [one.as_json() for one in results],
    }


def _markdown(name: str, setting: Setting, results: Sequence[Result]) -> Iterator[str]:
    yield "# Bench"
    yield ""
    yield f"{setting.when}, on {_told_machine(setting.machine)}."
    yield ""
    yield ", ".join(f"{what} {number}" for what, number in versions().items()) + "."
    yield ""
    yield from (f"- {each}" for each in setting.conditions)
    yield ""
    yield f"![times as fast as the best peer, by case]({name}.svg)"
    yield ""
    yield from _table(results)
    yield ""
    yield "## Every contender"
    yield ""
    yield from _details(results)


def _told_machine(facts: dict[str, object]) -> str:
    memory = human_size(float(str(facts["memory"])))
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {memory} of memory, Linux {facts['kernel']}, "
        f"with a load of {facts['load-at-start']} at the start"
    )


def _table(results: Iterable[Result]) -> Iterator[str]:
    yield "| case | on | addcow | best peer | | measured | target | reached |"
    yield "|---|---|---:|---|---:|---:|---:|---|"
    for one in results:
        cells = _figures(one) if one.timings else ["", "", told_reason(one), "", ""]
        case = f"**{one.case.name}**: {one.case.title}"
        reached = told_reached(one) + told_limit(one)
        yield f"| {' | '.join([case, *cells, told_target(one), reached])} |"


def _figures(one: Result) -> list[str]:
    ours, peer = _seconds(one.timings[0].median), _seconds(one.peer.median)
    return [one.filesystem, ours, one.peer.name, peer, told_ratio(one)]


def _details(results: Iterable[Result]) -> Iterator[str]:
    yield "| case | command | median | fastest | slowest |"
    yield "|---|---|---:|---:|---:|"
    for result in results:
        for one in result.timings:
            figures = (one.median, min(one.seconds), max(one.seconds))
            note = "" if one.counted else " (shown, not counted)"
            yield (
                f"| {result.case.name} | `{one.command}`{note} "
                f"| {' | '.join(map(_seconds, figures))} |"
            )


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def told_ratio(result: Result) -> str:
    """The ratio as text."""
    what = "times as fast" if result.case.measure is Measure.SPEED else "of its time"
    return f"{result.ratio:.2f} {what}"


def told_target(result: Result) -> str:
    """The target as text."""
    if result.case.target is None:
        return "none set"
    bound = "at least" if result.case.measure is Measure.SPEED else "at most"
    return f"{bound} {result.case.target:g}"


def told_reached(result: Result) -> str:
    """Whether the target was reached, in a word; empty without a target."""
    return {True: "yes", False: "**no**", None: ""}[result.reached if result.timings else None]


def told_limit(result: Result) -> str:
    """What keeps a target that was missed from being reached, as far as it is known."""
    missed = result.timings and result.reached is False
    return f": {result.case.limit}" if missed and result.case.limit else ""


def told_reason(result: Result) -> str:
    """Why there are no figures, in one line; the JSON document has all of it."""
    word, said = ("skipped", result.skipped) if result.skipped else ("failed", result.failed)
    lines = said.splitlines() or [""]
    return f"{word}: " + (lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}")
