"""What manifests were made, and what verifying against them has shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from addcow_mp.cli.jsontext import as_document, as_line
from addcow_mp.cli.saying import one_line, tell
from addcow_mp.jobs.verdict import Grade, Verdict

if TYPE_CHECKING:
    from addcow_mp.farm.verify import FarmVerdict
    from addcow_mp.jobs.manifest import Made

#: Exit statuses of layers, the worst first.
WORST_FIRST = (2, 1, 0)


def show_made(file: str, made: list[Made], *, as_json: bool, quiet: bool) -> None:
    """Print a line for each layer, the deepest first."""
    if as_json:
        layers = [
            {"filename": one.path, "guest-digest": one.guest_digest, "written": one.written}
            for one in made
        ]
        told = {"filename": file, "guest-digest": made[-1].guest_digest, "manifests": layers}
        print(as_document(told))
    elif not quiet:
        for one in made:
            done = "written" if one.written else "kept"
            print(one_line(f"{one.path}: {done}, guest digest {one.guest_digest}"))


def worst(verdicts: list[Verdict]) -> int:
    """The exit status that they add up to."""
    statuses = {one.exit_code for one in verdicts} | {0}
    return next(status for status in WORST_FIRST if status in statuses)


def show_verdicts(file: str, verdicts: list[Verdict], *, as_json: bool, quiet: bool) -> int:
    """Print what was found, and return the exit status."""
    status = worst(verdicts)
    if as_json:
        layers = [
            {"filename": one.path, "exit": one.exit_code, "bytes": one.bytes_read}
            for one in verdicts
        ]
        told = {"filename": file, "exit": status, **findings_of(verdicts), "layers": layers}
        print(as_document(told))
        return status
    print_findings(verdicts, quiet=quiet)
    if not quiet:
        print(_summary(verdicts, status))
    return status


def findings_of(verdicts: list[Verdict]) -> dict[str, object]:
    """Ranges and findings with their public keys."""
    ranges = [part.as_json() for one in verdicts for part in one.ranges]
    findings = [remark.as_json() for one in verdicts for remark in one.remarks]
    return {"ranges": ranges, "findings": findings}


def print_findings(verdicts: list[Verdict], *, quiet: bool = False) -> None:
    """Print a line for each range and each finding; what nobody could look at goes to stderr.

    When ``quiet``, mere notes are left out.
    """
    for one in verdicts:
        for remark in one.remarks:
            if quiet and remark.grade is Grade.NOTE:
                continue
            line = one_line(f"{remark.file}: {remark.message}")
            if remark.grade is Grade.UNVERIFIED:
                tell(f"addcow: {remark.name}: {line}")
            else:
                print(f"{remark.grade.value.upper()} {remark.name}: {line}")
        for part in one.ranges:
            place = f"{part.length} bytes at {part.start} differ"
            print(one_line(f"DIFFERS {part.file}: {place}"))


def _summary(verdicts: list[Verdict], status: int) -> str:
    if status == 0:
        return "All layers are as their manifests say."
    different = sum(1 for one in verdicts if one.exit_code == status)
    what = "differ from their manifests" if status > 1 else "could not be verified"
    return f"{different} of {len(verdicts)} layers {what}."


# A farm


def layer_of(one: Verdict) -> dict[str, object]:
    """What was found of a layer, with its public keys."""
    return {
        "filename": one.path,
        "exit": one.exit_code,
        **findings_of([one]),
        "bytes": one.bytes_read,
    }


def counts_of(verdicts: list[Verdict]) -> dict[str, int]:
    """How many layers there are, and how many of each exit status."""
    statuses = [one.exit_code for one in verdicts]
    return {
        "layers": len(statuses),
        "as-they-were": statuses.count(0),
        "unverified": statuses.count(1),
        "different": statuses.count(2),
    }


def _totals(found: FarmVerdict) -> dict[str, int]:
    counts = counts_of(found.all)
    del counts["layers"]
    read = sum(one.bytes_read for one in found.all)
    return {"images": len(found.images), "files": len(found.files), **counts, "bytes": read}


def _print_farm_json(found: FarmVerdict, *, quiet: bool) -> None:  # noqa: ARG001 - all alike
    told = {
        "images": [layer_of(one) for one in found.images],
        "files": [layer_of(one) for one in found.files],
        **findings_of(found.all),
        "summary": _totals(found),
    }
    print(as_document(told))


def _print_farm_jsonl(found: FarmVerdict, *, quiet: bool) -> None:  # noqa: ARG001
    for one in found.all:
        print(as_line(layer_of(one)))
    print(as_line({"summary": _totals(found)}))


def _print_farm(found: FarmVerdict, *, quiet: bool) -> None:
    print_findings(found.all, quiet=quiet)
    if not quiet:
        counts = (f"{count} {word}" for word, count in _totals(found).items())
        print(", ".join(counts).replace("-", " "))


#: How to print, by the word for it on the command line.
FARM_PRINTERS = {
    "human": _print_farm,
    "json": _print_farm_json,
    "jsonl": _print_farm_jsonl,
}
