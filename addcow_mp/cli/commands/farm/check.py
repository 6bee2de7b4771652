"""``addcow farm check``: the checks of every overlay and of the farm as a whole."""

from __future__ import annotations

from functools import partial

import typer

from addcow_mp.cli.findings import print_counts
from addcow_mp.cli.listing import explain, print_list
from addcow_mp.cli.messages import one_line
from addcow_mp.cli.options import (
    FarmProgress,
    ListPrinting,
    Opening,
    Places,
    Share,
    Workers,
)
from addcow_mp.farm.check import Checked, FarmReport, farm_check
from addcow_mp.findings import Finding


def command(
    *,
    places: Places,
    progress: FarmProgress,
    workers: Workers,
    printing: ListPrinting,
    share: Share = False,
    opening: Opening,
) -> None:
    """Check every overlay, and the farm as a whole; the exit status is that of the worst.

    Exit status: 0 clean, 1 could not check, 2 corruptions, 3 leaks only.
    """
    listed, quiet = places.listed(), printing.quiet
    access = opening.access(share=share, exclude=places.exclude)
    with workers.working(access, workers.copy_options(), progress, quiet=quiet) as (options, hooks):
        report = farm_check(listed, options, hooks)
    lines = partial(_print_lines, report, quiet=quiet)
    print_list(printing, map(_image, report.all), _whole(report), lines)
    explain(report.found, [one.path for one in report.images], quiet=quiet)
    raise typer.Exit(report.exit_code)


def _summary(report: FarmReport) -> dict[str, int]:
    return {
        "images": len(report.images),
        "clean": report.count(0),
        **({"lent": report.lent} if report.lent else {}),
        "corrupt": report.count(2),
        "leaking": report.count(3),
        "unexamined": report.count(1),
        "graph-findings": len(report.graph),
    }


def _image(one: Checked) -> dict[str, object]:
    findings = [finding.as_json() for finding in one.findings]
    return {"filename": one.path, "exit": one.exit_code, "findings": findings}


def _whole(report: FarmReport) -> dict[str, object]:
    """The result for the farm as a whole."""
    graph = [finding.as_json() for finding in report.graph]
    return {"graph": graph, "summary": _summary(report)}


def _print_lines(report: FarmReport, *, quiet: bool) -> None:
    """Print a line for each finding, and the summary."""
    for image in report.all:
        for finding in image.findings:
            print(one_line(f"{image.path}: {_line(finding)}"))
    for finding in report.graph:
        print(one_line(_line(finding)))
    if not quiet:
        print_counts(_summary(report))


def _line(finding: Finding) -> str:
    return f"{finding.severity.value.upper()} {finding.name}: {finding.message}"
