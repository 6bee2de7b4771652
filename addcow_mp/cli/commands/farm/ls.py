"""``addcow farm ls``: the overlays of a farm, sorted, as a table or as JSON."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated

import typer

from addcow_mp.cli.jsontext import print_document, print_line
from addcow_mp.cli.messages import one_line
from addcow_mp.cli.options import ListPrinting, Opening, Places, Share
from addcow_mp.cli.reasons import explain
from addcow_mp.device.discovery import Unexamined
from addcow_mp.farm.members import Member, members
from addcow_mp.units import human_size


class Key(StrEnum):
    """What the list is sorted by."""

    name = "name"
    depth = "depth"
    size = "size"
    local = "local"
    percent = "percent"
    state = "state"


def command(
    *,
    places: Places,
    sort: Annotated[Key, typer.Option("--sort", help="the order of the lines")] = Key.name,
    reverse: Annotated[bool, typer.Option("--reverse", help="the other way round")] = False,
    printing: ListPrinting,
    share: Share = False,
    opening: Opening,
) -> None:
    """List every overlay: what it stands on, how large it is, how much of it is allocated."""
    access = opening.access(share=share, exclude=places.exclude)
    found, there = members(places.listed(), access)
    PRINTERS[printing.output](in_order(found, sort, reverse=reverse), there.unexamined)
    said = explain(there, [one.filename for one in found], quiet=printing.quiet)
    raise typer.Exit(1 if said or there.unexamined or any(one.is_hidden for one in found) else 0)


def in_order(found: list[Member], key: str, *, reverse: bool) -> list[Member]:
    """In the order asked for; what has no such value is behind all that do, in either order."""
    values = {id(one): _value(one, key) for one in found}
    known = [one for one in found if values[id(one)] is not None]
    known.sort(key=lambda one: values[id(one)], reverse=reverse)  # type: ignore[arg-type,return-value]
    return known + [one for one in found if values[id(one)] is None]


def _value(one: Member, key: str) -> object:
    values: dict[str, object] = {
        "name": one.filename,
        "depth": one.depth,
        "size": None if one.about is None else one.about.virtual_size,
        "local": one.allocated_size,
        "percent": one.percent_allocated,
        "state": one.state,
    }
    return values[key]


def describe(one: Member) -> dict[str, object]:
    """The keys of one image, in qemu-img's manner."""
    about = one.about
    return {
        "filename": one.filename,
        "backing-filename": None if about is None else about.names.backing,
        "full-backing-filename": None if about is None else about.full_backing,
        "depth": one.depth,
        "virtual-size": None if about is None else about.virtual_size,
        "local-size": one.allocated_size,
        "percent-local": None if one.percent_allocated is None else round(one.percent_allocated, 2),
        "state": one.state,
        **({} if one.problem is None else {"problem": str(one.problem)}),
    }


def describe_unexamined(one: Unexamined) -> dict[str, object]:
    """The keys of what could not be looked at: those of an image of which nothing is known."""
    unknown = dict.fromkeys(_NUMBERS)
    return {"filename": one.path, **unknown, "state": NOT_EXAMINED, "problem": one.reason}


NOT_EXAMINED = "not-examined"

#: What is known of an image and of nothing else.
_NUMBERS = ["backing-filename", "full-backing-filename", "depth", "virtual-size", "local-size"]
_NUMBERS += ["percent-local"]


def _print_json(found: list[Member], unexamined: list[Unexamined]) -> None:
    print_document({"images": _all(found, unexamined)})


def _print_jsonl(found: list[Member], unexamined: list[Unexamined]) -> None:
    for one in _all(found, unexamined):
        print_line(one)


def _all(found: list[Member], unexamined: list[Unexamined]) -> list[dict[str, object]]:
    return [*map(describe, found), *map(describe_unexamined, unexamined)]


def _print_table(found: list[Member], unexamined: list[Unexamined]) -> None:
    print(f"{'Virtual size':>12}  {'Local':>10}  {'%':>5}  {'Depth':>5}  {'State':<15}  Image")
    for one in found:
        print(one_line(_row(one)))
        if one.problem is not None:
            print(f"{'':>12}  {one_line(str(one.problem))}")
    for hidden in unexamined:
        columns = f"{'?':>12}  {'?':>10}  {'?':>5}  {'?':>5}  {NOT_EXAMINED:<15}"
        print(one_line(f"{columns}  {hidden.path}"))
        print(f"{'':>12}  {one_line(hidden.reason)}")


def _row(one: Member) -> str:
    size = None if one.about is None else one.about.virtual_size
    shown = ["?" if each is None else human_size(each) for each in (size, one.allocated_size)]
    percent = "?" if one.percent_allocated is None else f"{one.percent_allocated:.1f}"
    depth = "?" if one.depth is None else str(one.depth)
    backing = one.about.names.backing if one.about is not None else None
    over = f" over {backing}" if backing is not None else ""
    columns = f"{shown[0]:>12}  {shown[1]:>10}  {percent:>5}  {depth:>5}  {one.state:<15}"
    return f"{columns}  {one.filename}{over}"


#: How to print, by the word for it on the command line.
PRINTERS: dict[str, Callable[[list[Member], list[Unexamined]], None]] = {
    "human": _print_table,
    "json": _print_json,
    "jsonl": _print_jsonl,
}
