"""``addcow check``: findings and repairs, for people and as JSON."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from addcow_mp.cli.findings import print_findings
from addcow_mp.cli.messages import one_line, print_manifests_gone, report_failure, warn
from addcow_mp.cli.options import (
    Exclude,
    Force,
    Opening,
    OverlayFiles,
    Printing,
    Share,
)
from addcow_mp.cli.results import job_is_done
from addcow_mp.cli.several import print_results, results_of
from addcow_mp.findings import CheckReport
from addcow_mp.jobs.check import check
from addcow_mp.jobs.repair import repair as job


class Repair(StrEnum):
    """What check may repair."""

    leaks = "leaks"
    all = "all"


def command(
    *,
    overlay: OverlayFiles,
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
    """Check overlays against the format's rules.

    Exit status: 0 clean, 1 could not check, 2 corruptions, 3 leaks only, 63 not add-cow; of several
    files that of the worst.
    """
    access = opening.access(share=share, force=force, writes=repair is not None, exclude=exclude)
    is_list = len(overlay.files) > 1

    def work(file: str) -> CheckReport:
        if repair is None:
            report = check(file, access)
        else:
            report = job(file, access, everything=repair is Repair.all)
            job_is_done()
        warn(report.warnings)
        return report

    status = print_results(
        results_of(overlay.files, work),
        printing,
        is_list=is_list,
        show=lambda report: _show(report, quiet=printing.quiet, is_named=is_list),
        describe=CheckReport.as_json,
        status=lambda report: report.exit_code,
    )
    raise typer.Exit(status)


def _show(report: CheckReport, *, quiet: bool, is_named: bool) -> None:
    if not report.is_addcow:
        report_failure(report.findings[0].message, report.exit_code)
        return
    if is_named and not (quiet and report.exit_code == 0):
        print(one_line(f"{report.filename}:"))
    _print(report, quiet=quiet)


def _print(report: CheckReport, *, quiet: bool) -> None:
    for line in [] if quiet else report.repairs:
        print(f"REPAIRED {one_line(line)}")
    if not quiet:
        print_manifests_gone(report.manifests_removed)
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
