"""``addcow farm ls``: the overlays of a farm, sorted, as a table or as JSON."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from typing import Annotated

import typer

from addcow_mp.cli.listing import NOT_EXAMINED, explain, print_list
from addcow_mp.cli.messages import one_line
from addcow_mp.cli.options import ListPrinting, Opening, Places, Share
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
    """List every overlay: its backing file, its size, and how much of it is allocated.

    Exit status: 0 all examined, 1 something could not be examined, or no given file is an overlay.
    """
    access = opening.access(share=share, exclude=places.exclude)
    found = members(places.listed(), access)
    overlays = _sorted(found.overlays, sort, reverse=reverse)
    hidden = found.places.unexamined
    images = [*map(describe, overlays), *map(_describe_unexamined, hidden)]
    print_list(printing, images, {}, partial(_print_table, overlays, hidden))
    explain(found.places, [one.filename for one in overlays], quiet=printing.quiet)
    raise typer.Exit(found.exit_code)


def _sorted(overlays: list[Member], key: Key, *, reverse: bool) -> list[Member]:
    """In the order asked for; overlays without such a value come last in either order."""
    known = [one for one in overlays if _value(one, key) is not None]
    unknown = [one for one in overlays if _value(one, key) is None]
    return sorted(known, key=lambda one: _value(one, key), reverse=reverse) + unknown  # type: ignore[arg-type,return-value]


def _value(one: Member, key: Key) -> object:
    if key in (Key.name, Key.state):
        return one.filename if key is Key.name else one.state
    return {
        Key.depth: one.depth,
        Key.size: None if one.about is None else one.about.virtual_size,
        Key.local: one.allocated_size,
        Key.percent: one.percent_allocated,
    }[key]


def describe(one: Member) -> dict[str, object]:
    """The public keys of one image, those of qemu-img where it has them."""
    about, percent = one.about, one.percent_allocated
    return {
        "filename": one.filename,
        "backing-filename": None if about is None else about.names.backing,
        "full-backing-filename": None if about is None else about.full_backing,
        "depth": one.depth,
        "virtual-size": None if about is None else about.virtual_size,
        "local-size": one.allocated_size,
        "percent-local": None if percent is None else round(percent, 2),
        "state": one.state,
        **({} if one.problem is None else {"problem": str(one.problem)}),
    }


def _describe_unexamined(one: Unexamined) -> dict[str, object]:
    """The same keys; nothing is known but the reason."""
    known = {"filename": one.path, "state": NOT_EXAMINED, "problem": one.reason}
    return {**dict.fromkeys(_KEYS), **known}


_KEYS = [
    "filename",
    "backing-filename",
    "full-backing-filename",
    "depth",
    "virtual-size",
    "local-size",
    "percent-local",
]


def _print_table(overlays: list[Member], hidden: list[Unexamined]) -> None:
    print(_columns("Virtual size", "Local", "%", "Depth", "State", "Image"))
    for one in overlays:
        print(one_line(_row(one)))
        if one.problem is not None:
            print(f"{'':>12}  {one_line(str(one.problem))}")
    for unknown in hidden:
        print(one_line(_columns("?", "?", "?", "?", NOT_EXAMINED, unknown.path)))
        print(f"{'':>12}  {one_line(unknown.reason)}")


def _row(one: Member) -> str:
    about, percent = one.about, one.percent_allocated
    sizes = (None if about is None else about.virtual_size, one.allocated_size)
    size, allocated = ("?" if each is None else human_size(each) for each in sizes)
    share = "?" if percent is None else f"{percent:.1f}"
    depth = "?" if one.depth is None else str(one.depth)
    over = "" if about is None or about.names.backing is None else f" over {about.names.backing}"
    return _columns(size, allocated, share, depth, one.state, f"{one.filename}{over}")


def _columns(size: str, allocated: str, share: str, depth: str, state: str, name: str) -> str:
    return f"{size:>12}  {allocated:>10}  {share:>5}  {depth:>5}  {state:<15}  {name}"
