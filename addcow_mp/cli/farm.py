"""The ``farm`` commands: their options, and what they print. They look at many images at once."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from addcow_mp.cli.app import (
    Devices,
    HowToPrint,
    Idle,
    Jobs,
    Output,
    Quiet,
    Roots,
    Share,
    ShowProgress,
    access_of,
)

if TYPE_CHECKING:
    from addcow_mp.farm.check import FarmReport
    from addcow_mp.farm.members import Member

farm = typer.Typer(help="Look at many images at once.", rich_markup_mode=None)


@farm.callback()
def _farm() -> None:
    """Look at many images at once."""


class Listing(StrEnum):
    """How a list is printed."""

    human = "human"
    json = "json"
    jsonl = "jsonl"


class Drawing(StrEnum):
    """How a graph is drawn."""

    human = "human"
    json = "json"
    jsonl = "jsonl"
    dot = "dot"
    svg = "svg"


class Key(StrEnum):
    """What a list is sorted by."""

    name = "name"
    depth = "depth"
    size = "size"
    local = "local"
    percent = "percent"
    state = "state"


Places = Annotated[
    list[str] | None, typer.Argument(metavar="PLACE...", help="directories, files, patterns")
]
FromFile = Annotated[
    str | None,
    typer.Option("--from-file", metavar="FILE", help="further places, one a line; - is stdin"),
]


@farm.command("ls")
def ls(
    places: Places = None,
    from_file: FromFile = None,
    sort: Annotated[Key, typer.Option("--sort", help="the order of the lines")] = Key.name,
    reverse: Annotated[bool, typer.Option("--reverse", help="the other way round")] = False,
    output: Annotated[Listing, typer.Option("--output", help="how to print")] = Listing.human,
    share: Share = False,
    roots: Roots = None,
    allow_device: Devices = False,
) -> None:
    """List every overlay: what it stands on, how large it is, how much of it is local."""
    from addcow_mp.farm.members import members

    found = members(_all_places(places, from_file), access_of(roots, allow_device, share=share))
    _PRINTERS[output](_sorted(found, sort, reverse=reverse))


@farm.command("graph")
def graph(
    places: Places = None,
    from_file: FromFile = None,
    output: Annotated[Drawing, typer.Option("--output", help="how to draw")] = Drawing.human,
    share: Share = False,
    roots: Roots = None,
    allow_device: Devices = False,
) -> None:
    """Draw who backs whom, what is missing, and what nobody names."""
    from addcow_mp.cli.drawing import DRAWERS
    from addcow_mp.farm.graph import farm_graph

    access = access_of(roots, allow_device, share=share)
    DRAWERS[output](farm_graph(_all_places(places, from_file), access))


@farm.command("check")
def check(
    places: Places = None,
    from_file: FromFile = None,
    progress: ShowProgress = False,
    quiet: Quiet = False,
    jobs: Jobs = None,
    output: HowToPrint = Output.human,
    idle: Idle = False,
    share: Share = False,
    roots: Roots = None,
    allow_device: Devices = False,
) -> None:
    """Check every overlay, and the farm as a whole; the exit status is that of the worst."""
    from addcow_mp.cli.working import working
    from addcow_mp.device.moving import Manner
    from addcow_mp.farm.check import farm_check

    listed = _all_places(places, from_file)
    access = access_of(roots, allow_device, share=share)
    with working(jobs, access, Manner(idle=idle), progress=progress and not quiet) as conduct:
        report = farm_check(listed, conduct)
    if output is Output.json:
        _print_report_as_json(report)
    else:
        _print_report(report, quiet=quiet)
    raise typer.Exit(report.exit_code)


def _all_places(places: list[str] | None, from_file: str | None) -> list[str]:
    from addcow_mp.errors import UsageError

    listed = [*(places or ()), *(_lines_of(from_file) if from_file is not None else ())]
    if not listed:
        raise UsageError(message="name at least one directory or file; see 'addcow farm --help'")
    return listed


def _lines_of(path: str) -> list[str]:
    """The lines of a file of names; a name is bytes, whatever the locale."""
    import os
    import sys

    if path == "-":
        content = sys.stdin.buffer.read()
    else:
        with open(path, "rb") as file:
            content = file.read()
    return [os.fsdecode(line) for line in content.split(b"\n") if line]


def _sorted(found: list[Member], key: Key, *, reverse: bool) -> list[Member]:
    """In the order asked for; what has no such value is behind all that do, in either order."""
    values = {id(one): _value(one, key) for one in found}
    known = [one for one in found if values[id(one)] is not None]
    known.sort(key=lambda one: values[id(one)], reverse=reverse)  # type: ignore[arg-type,return-value]
    return known + [one for one in found if values[id(one)] is None]


def _value(one: Member, key: Key) -> object:
    values: dict[Key, object] = {
        Key.name: one.filename,
        Key.depth: one.depth,
        Key.size: None if one.about is None else one.about.virtual_size,
        Key.local: one.local_size,
        Key.percent: one.percent_local,
        Key.state: one.state,
    }
    return values[key]


# Printing


def describe(one: Member) -> dict[str, object]:
    """The keys of one image, in qemu-img's manner."""
    about = one.about
    return {
        "filename": one.filename,
        "backing-filename": None if about is None else about.names.backing,
        "full-backing-filename": None if about is None else about.full_backing,
        "depth": one.depth,
        "virtual-size": None if about is None else about.virtual_size,
        "local-size": one.local_size,
        "percent-local": None if one.percent_local is None else round(one.percent_local, 2),
        "state": one.state,
        **({} if one.problem is None else {"problem": str(one.problem)}),
    }


def _print_json(found: list[Member]) -> None:
    import json

    print(json.dumps({"images": [describe(one) for one in found]}, indent=4))


def _print_jsonl(found: list[Member]) -> None:
    import json

    for one in found:
        print(json.dumps(describe(one)))


def _print_table(found: list[Member]) -> None:
    from addcow_mp.cli.saying import one_line

    print(f"{'Virtual size':>12}  {'Local':>10}  {'%':>5}  {'Depth':>5}  {'State':<15}  Image")
    for one in found:
        print(one_line(_row(one)))
        if one.problem is not None:
            print(f"{'':>12}  {one_line(str(one.problem))}")


def _row(one: Member) -> str:
    from addcow_mp.units import human_size

    size = None if one.about is None else one.about.virtual_size
    shown = ["?" if each is None else human_size(each) for each in (size, one.local_size)]
    percent = "?" if one.percent_local is None else f"{one.percent_local:.1f}"
    depth = "?" if one.depth is None else str(one.depth)
    backing = one.about.names.backing if one.about is not None else None
    over = f" over {backing}" if backing is not None else ""
    columns = f"{shown[0]:>12}  {shown[1]:>10}  {percent:>5}  {depth:>5}  {one.state:<15}"
    return f"{columns}  {one.filename}{over}"


def _summary(report: FarmReport) -> dict[str, int]:
    return {
        "images": len(report.images),
        "clean": report.count(0),
        "corrupt": report.count(2),
        "leaking": report.count(3),
        "unexamined": report.count(1),
        "graph-findings": len(report.graph),
    }


def _print_report_as_json(report: FarmReport) -> None:
    import json

    images = [
        {
            "filename": one.path,
            "exit": one.exit_code,
            "findings": [finding.as_json() for finding in one.findings],
        }
        for one in report.images
    ]
    graph = [finding.as_json() for finding in report.graph]
    print(json.dumps({"images": images, "graph": graph, "summary": _summary(report)}, indent=4))


def _print_report(report: FarmReport, *, quiet: bool) -> None:
    """A line for each finding, in words that can be searched for, and one for all."""
    from addcow_mp.cli.saying import one_line

    for image in report.images:
        for finding in image.findings:
            told = f"{finding.severity.value.upper()} {finding.name}: {finding.message}"
            print(one_line(f"{image.path}: {told}"))
    for finding in report.graph:
        print(one_line(f"{finding.severity.value.upper()} {finding.name}: {finding.message}"))
    if not quiet:
        counts = (f"{count} {word}" for word, count in _summary(report).items())
        print(", ".join(counts).replace("-", " "))


_PRINTERS = {
    Listing.human: _print_table,
    Listing.json: _print_json,
    Listing.jsonl: _print_jsonl,
}
