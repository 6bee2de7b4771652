"""``addcow farm check``: the checks of every overlay and of the farm as a whole."""

from __future__ import annotations

import typer

from addcow_mp.cli.jsontext import print_document, print_line
from addcow_mp.cli.messages import one_line
from addcow_mp.cli.options import FarmProgress, ListPrinting, Opening, Places, Share, Workers
from addcow_mp.cli.reasons import explain
from addcow_mp.farm.check import Checked, FarmReport, farm_check


def command(
    *,
    places: Places,
    progress: FarmProgress,
    workers: Workers,
    printing: ListPrinting,
    share: Share = False,
    opening: Opening,
) -> None:
    """Check every overlay, and the farm as a whole; the exit status is that of the worst."""
    listed, quiet = places.listed(), printing.quiet
    access = opening.access(share=share, exclude=places.exclude)
    with workers.working(access, workers.copy_options(), progress, quiet=quiet) as (options, hooks):
        report = farm_check(listed, options, hooks)
    PRINTERS[printing.output](report, quiet=quiet)
    said = explain(report.found, [one.path for one in report.images], quiet=quiet)
    raise typer.Exit(report.exit_code or int(said))


def _summary(report: FarmReport) -> dict[str, int]:
    return {
        "images": len(report.images),
        "clean": report.count(0),
        "corrupt": report.count(2),
        "leaking": report.count(3),
        "unexamined": report.count(1),
        "graph-findings": len(report.graph),
    }


def _image(one: Checked) -> dict[str, object]:
    findings = [finding.as_json() for finding in one.findings]
    return {"filename": one.path, "exit": one.exit_code, "findings": findings}


def _whole(report: FarmReport) -> dict[str, object]:
    """What is said of the farm, and of no image by itself."""
    graph = [finding.as_json() for finding in report.graph]
    return {"graph": graph, "summary": _summary(report)}


def print_json(report: FarmReport, *, quiet: bool) -> None:  # noqa: ARG001 - all print in one manner
    """Print one document."""
    images = [_image(one) for one in report.all]
    print_document({"images": images, **_whole(report)})


def print_jsonl(report: FarmReport, *, quiet: bool) -> None:  # noqa: ARG001
    """Print a line for each image, and one for the farm as a whole."""
    for one in report.all:
        print_line(_image(one))
    print_line(_whole(report))


def print_lines(report: FarmReport, *, quiet: bool) -> None:
    """A line for each finding, in words that can be searched for, and one for all."""
    for image in report.all:
        for finding in image.findings:
            told = f"{finding.severity.value.upper()} {finding.name}: {finding.message}"
            print(one_line(f"{image.path}: {told}"))
    for finding in report.graph:
        print(one_line(f"{finding.severity.value.upper()} {finding.name}: {finding.message}"))
    if not quiet:
        counts = (f"{count} {word}" for word, count in _summary(report).items())
        print(", ".join(counts).replace("-", " "))


#: How to print, by the word for it on the command line.
PRINTERS = {"human": print_lines, "json": print_json, "jsonl": print_jsonl}
