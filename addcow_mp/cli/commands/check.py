"""``addcow check``: findings and repairs, for people and as JSON."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

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
from addcow_mp.jobs.check import check
from addcow_mp.jobs.findings import CheckReport, Severity
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
    raise typer.Exit(_show(report, as_json=printing.as_json, quiet=printing.quiet))


def _show(report: CheckReport, *, as_json: bool, quiet: bool) -> int:
    """Print what the checks found and repaired, and return the exit status."""
    warn(report.warnings)
    if as_json:
        print_document(report.as_json())
    elif not report.is_addcow:
        return report_failure(report.findings[0].message, report.exit_code)
    else:
        for line in [] if quiet else report.repairs:
            print(f"REPAIRED {one_line(line)}")
        _print_findings(report)
        if not quiet:
            _print_notes(report)
            _print_summary(report)
    return report.exit_code


def _print_findings(report: CheckReport) -> None:
    for finding in report.findings:
        if finding.severity is Severity.CHECK_ERROR:
            print(f"addcow: {finding.name}: {one_line(finding.message)}", file=sys.stderr)
        else:
            print(f"{finding.severity.value.upper()} {finding.name}: {one_line(finding.message)}")


def _print_notes(report: CheckReport) -> None:
    for note in report.notes:
        print(f"NOTE {one_line(note)}")


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
