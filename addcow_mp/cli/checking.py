"""The ``check`` command: findings and repairs, for people and as JSON."""

from __future__ import annotations

import sys

from addcow_mp.cli.jsontext import as_document
from addcow_mp.cli.results import job_is_done
from addcow_mp.cli.saying import complain, one_line, warn
from addcow_mp.device.access import Access
from addcow_mp.jobs.check import check
from addcow_mp.jobs.findings import CheckReport, Severity
from addcow_mp.jobs.repair import repair as mend


def show_check(file: str, access: Access, repair: str | None, *, as_json: bool, quiet: bool) -> int:
    """Print what the checks found and mended, and return the exit status."""
    report = (
        check(file, access) if repair is None else mend(file, access, everything=repair == "all")
    )
    if repair is not None:
        job_is_done()
    warn(report.warnings)
    if as_json:
        print(as_document(report.as_json()))
    elif not report.is_addcow:
        return complain(report.findings[0].message, report.exit_code)
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
