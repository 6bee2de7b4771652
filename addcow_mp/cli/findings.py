"""Findings and reports on layers, as lines and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from addcow_mp.cli.messages import one_line, write_line
from addcow_mp.findings import Finding, LayerReport, Severity


def print_findings(findings: Iterable[Finding], *, quiet: bool = False) -> None:
    """Print a line for each finding; what could not be examined goes to stderr.

    When ``quiet``, notes are left out.
    """
    for one in findings:
        text = one_line(one.message if one.file is None else f"{one.file}: {one.message}")
        if one.severity in (Severity.CHECK_ERROR, Severity.UNVERIFIED):
            write_line(f"addcow: {one.name}: {text}")
        elif not (quiet and one.severity is Severity.NOTE):
            print(f"{one.severity.value.upper()} {one.name}: {text}")


def print_layers(reports: Iterable[LayerReport], *, quiet: bool = False) -> None:
    """Print a line for each finding and each differing range of some layers."""
    for report in reports:
        print_findings(report.findings, quiet=quiet)
        for part in report.ranges:
            place = f"{part.length} bytes at {part.start} differ"
            print(one_line(f"DIFFERS {part.file}: {place}"))


def findings_of(reports: Sequence[LayerReport]) -> dict[str, object]:
    """All ranges and findings of some layers, with their public keys."""
    ranges = [part.as_json() for one in reports for part in one.ranges]
    findings = [finding.as_json() for one in reports for finding in one.findings]
    return {"ranges": ranges, "findings": findings}


def counts_of(reports: Sequence[LayerReport]) -> dict[str, int]:
    """The number of layers, of those that are lent, and of the others by exit status."""
    statuses = [one.exit_code for one in reports if not one.is_lent]
    lent = len(reports) - len(statuses)
    return {
        "layers": len(reports),
        "as-they-were": statuses.count(0),
        "unverified": statuses.count(1),
        "different": statuses.count(2),
        **({"lent": lent} if lent else {}),
    }


def print_counts(counts: dict[str, int]) -> None:
    """Print some numbers, with their keys as words, in one line."""
    print(", ".join(f"{count} {key}" for key, count in counts.items()).replace("-", " "))
