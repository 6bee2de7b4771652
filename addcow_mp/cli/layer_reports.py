"""What verifying layers against their manifests has found, as lines and as JSON."""

from __future__ import annotations

from addcow_mp.cli.messages import one_line, write_line
from addcow_mp.jobs.layer_report import Grade, LayerReport

#: Exit statuses of layers, the worst first.
WORST_FIRST = (2, 1, 0)


def worst(layer_reports: list[LayerReport]) -> int:
    """The exit status that they add up to."""
    statuses = {one.exit_code for one in layer_reports} | {0}
    return next(status for status in WORST_FIRST if status in statuses)


def findings_of(layer_reports: list[LayerReport]) -> dict[str, object]:
    """Ranges and findings with their public keys."""
    ranges = [part.as_json() for one in layer_reports for part in one.ranges]
    findings = [remark.as_json() for one in layer_reports for remark in one.remarks]
    return {"ranges": ranges, "findings": findings}


def print_findings(layer_reports: list[LayerReport], *, quiet: bool = False) -> None:
    """Print a line for each range and each finding; what nobody could look at goes to stderr.

    When ``quiet``, mere notes are left out.
    """
    for one in layer_reports:
        for remark in one.remarks:
            if quiet and remark.grade is Grade.NOTE:
                continue
            line = one_line(f"{remark.file}: {remark.message}")
            if remark.grade is Grade.UNVERIFIED:
                write_line(f"addcow: {remark.name}: {line}")
            else:
                print(f"{remark.grade.value.upper()} {remark.name}: {line}")
        for part in one.ranges:
            place = f"{part.length} bytes at {part.start} differ"
            print(one_line(f"DIFFERS {part.file}: {place}"))


def layer_of(one: LayerReport) -> dict[str, object]:
    """What was found of a layer, with its public keys."""
    return {
        "filename": one.path,
        "exit": one.exit_code,
        **findings_of([one]),
        "bytes": one.bytes_read,
    }


def counts_of(layer_reports: list[LayerReport]) -> dict[str, int]:
    """How many layers there are, and how many of each exit status."""
    statuses = [one.exit_code for one in layer_reports]
    return {
        "layers": len(statuses),
        "as-they-were": statuses.count(0),
        "unverified": statuses.count(1),
        "different": statuses.count(2),
    }
