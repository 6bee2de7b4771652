"""``addcow check``: findings and repairs, for people and as JSON."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from addcow_mp.cli.findings import print_findings
from addcow_mp.cli.jsontext import print_document
from addcow_mp.cli.messages import one_line, report_failure, warn
from addcow_mp.cli.options import (
    Exclude,
    Force,
    Opening,
    OverlayFile,
    Printing,
    Share,
)
from addcow_mp.cli.results import job_is_done
from addcow_mp.findings import CheckReport
from addcow_mp.jobs.check import check
from addcow_mp.jobs.repair import repair as job


class Repair(StrEnum):
    """What check may repair."""

    leaks = "leaks"
    all = "all"


def command(
    *,
    overlay: OverlayFile,
    printing: Printing,
    repair: Annotated[
        Repair | None,
        typer.Option("-r", help="leaks: free them; all: also stray bits, bitmap, header zeros"),
    ] = None,
    share: Share = False,
    force: Force = False,
    exclude: Exclude = None,
    opening: Opening,
) -> None:
    """Check an overlay against the format's rules.

    Exit status: 0 clean, 1 could not check, 2 corruptions, 3 leaks only, 63 not add-cow.
    """
    access = opening.access(share=share, force=force, writes=repair is not None, exclude=exclude)
    if repair is None:
        report = check(overlay.file, access)
    else:
        report = job(overlay.file, access, everything=repair is Repair.all)
        job_is_done()
    warn(report.warnings)
    if printing.as_json:
        print_document(report.as_json())
    elif not report.is_addcow:
        report_failure(report.findings[0].message, report.exit_code)
    else:
        _print(report, quiet=printing.quiet)
    raise typer.Exit(report.exit_code)


def _print(report: CheckReport, *, quiet: bool) -> None:
    for line in [] if quiet else report.repairs:
        print(f"REPAIRED {one_line(line)}")
    print_findings(report.findings)
    if not quiet:
        for note in report.notes:
            print(f"NOTE {one_line(note)}")
        _print_summary(report)


def _print_summary(report: CheckReport) -> None:
    if report.exit_code == 0:
        print("No errors were found on the image.")
    if report.corruptions:
        print(f"\n{report.corruptions} errors were found on the image.")
        print("Data may be corrupted, or further writes to the image may corrupt it.")
    if report.leaks:
        print(f"\n{report.leaks} leaked clusters were found on the image.")
        print("This means waste of disk space, but no harm to data.")
    if report.check_errors:
        print(f"\n{report.check_errors} internal errors have occurred during the check.")
    total, allocated = report.total_clusters, report.allocated_clusters
    if total and allocated is not None:
        print(f"{allocated}/{total} = {100 * allocated / total:.2f}% allocated")
