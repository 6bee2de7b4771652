"""The commands that only look: info, map and check, for people and as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable

from addcow_mp.cli.main import complain, warn
from addcow_mp.device.access import Access
from addcow_mp.device.chain import READ, open_chain
from addcow_mp.device.extent import Extent
from addcow_mp.jobs.findings import CheckReport, Severity
from addcow_mp.jobs.info import Info, RawInfo, chain_info, info
from addcow_mp.units import human_size


def show_info(file: str, access: Access, *, as_json: bool, chain: bool) -> None:
    """Print what is known of ``file``, or of every file of its chain."""
    found = chain_info(file, access) if chain else [info(file, access)]
    for one in found:
        warn(one.warnings if isinstance(one, Info) else [])
    if as_json:
        described = [describe(one) for one in found]
        print(json.dumps(described if chain else described[0], indent=4))
    else:
        print("\n\n".join("\n".join(_lines(one)) for one in found))


def describe(one: Info | RawInfo) -> dict[str, object]:
    """The keys of qemu-img info."""
    if isinstance(one, RawInfo):
        return {
            "filename": one.filename,
            "format": one.format,
            "virtual-size": one.virtual_size,
            "actual-size": one.actual_size,
        }
    backing = {
        "backing-filename": one.names.backing,
        "full-backing-filename": one.full_backing,
        "backing-filename-format": one.names.backing_format,
    }
    return {
        "filename": one.filename,
        "format": "add-cow",
        "virtual-size": one.virtual_size,
        "actual-size": one.actual_size,
        "cluster-size": one.header.cluster_size,
        **(backing if one.names.backing is not None else {}),
        "format-specific": {"type": "add-cow", "data": _specific(one)},
    }


def _specific(one: Info) -> dict[str, object]:
    return {
        "image-filename": one.names.image,
        "full-image-filename": one.full_image,
        "image-format": one.names.image_format,
        "header-size": one.header.header_size,
        "all-allocated": one.header.all_allocated,
        "total-clusters": one.total_clusters,
        "allocated-clusters": one.allocated_clusters,
        "compatible-features": one.header.compatible_features,
    }


def _lines(one: Info | RawInfo) -> Iterable[str]:
    yield f"image: {one.filename}"
    yield f"file format: {one.format if isinstance(one, RawInfo) else 'add-cow'}"
    size = one.virtual_size
    yield "virtual size: " + ("unknown" if size is None else f"{human_size(size)} ({size} bytes)")
    yield f"disk size: {human_size(one.actual_size)}"
    if isinstance(one, RawInfo):
        return
    yield f"cluster_size: {one.header.cluster_size}"
    if one.names.backing is not None:
        actual = (
            "" if one.full_backing == one.names.backing else f" (actual path: {one.full_backing})"
        )
        yield f"backing file: {one.names.backing}{actual}"
        yield f"backing file format: {one.names.backing_format}"
    yield "Format specific information:"
    for key, value in _specific(one).items():
        shown = str(value).lower() if isinstance(value, bool) else value
        yield f"    {key.replace('-', ' ')}: {'unknown' if shown is None else shown}"


def show_map(file: str, access: Access, *, as_json: bool) -> None:
    """Print the extents of the guest's view of ``file``."""
    with open_chain(file, READ, access) as overlay:
        warn(overlay.warnings())
        if as_json:
            print("[" + ",\n".join(_extent(one) for one in overlay.extents()) + "]")
        else:
            paths = [opened.path for opened in overlay.files()]
            _print_table(overlay.extents(), paths)


def _extent(one: Extent) -> str:
    shown: dict[str, int | bool] = {
        "start": one.start,
        "length": one.length,
        "depth": one.depth,
        "present": one.present,
        "zero": one.zero,
        "data": one.data,
    }
    if one.offset is not None:
        shown["offset"] = one.offset
    return json.dumps(shown)


def _print_table(extents: Iterable[Extent], paths: list[str]) -> None:
    """qemu-img's table: only what holds data."""
    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    for one in extents:
        if one.data:
            columns = (_hex(one.start), _hex(one.length), _hex(one.start))
            print("".join(f"{column:<16}" for column in columns) + paths[one.depth])


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"


def show_check(file: str, access: Access, repair: str | None, *, as_json: bool, quiet: bool) -> int:
    """Print what the checks found and mended, and return the exit status."""
    from addcow_mp.jobs.check import check
    from addcow_mp.jobs.repair import repair as mend

    report = (
        check(file, access) if repair is None else mend(file, access, everything=repair == "all")
    )
    if as_json:
        print(json.dumps(report.as_json(), indent=4))
    elif not report.is_addcow:
        return complain(report.findings[0].message, report.exit_code)
    else:
        for line in report.repairs:
            print(f"REPAIRED {line}")
        _print_findings(report)
        if not quiet:
            _print_summary(report)
    return report.exit_code


def _print_findings(report: CheckReport) -> None:
    for finding in report.findings:
        if finding.severity is Severity.CHECK_ERROR:
            print(f"addcow: {finding.name}: {finding.message}", file=sys.stderr)
        else:
            print(f"{finding.severity.value.upper()} {finding.name}: {finding.message}")


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
