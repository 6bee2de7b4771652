"""``addcow map``: extents as qemu-img's table, or as JSON, one a line."""

from __future__ import annotations

from collections.abc import Iterable

from addcow_mp.cli.jsontext import as_line
from addcow_mp.cli.messages import one_line, warn
from addcow_mp.cli.options import Opening, OverlayFile, Printing, Share
from addcow_mp.device.chain import READ, open_chain
from addcow_mp.device.extent import Extent


def command(
    *,
    overlay: OverlayFile,
    printing: Printing,
    share: Share = False,
    opening: Opening,
) -> None:
    """Show which file of the chain holds what."""
    with open_chain(overlay.file, READ, opening.access(share=share)) as disk:
        warn(disk.warnings())
        if printing.as_json:
            print("[" + ",\n".join(_extent(one) for one in disk.extents()) + "]")
        else:
            paths = [one_line(opened.path) for opened in disk.files()]
            _print_table(disk.extents(), paths)


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
    return as_line(shown)


def _print_table(extents: Iterable[Extent], paths: list[str]) -> None:
    """qemu-img's table: only what holds data."""
    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    for one in extents:
        if one.data:
            columns = (_hex(one.start), _hex(one.length), _hex(one.start))
            print("".join(f"{column:<16}" for column in columns) + paths[one.depth])


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"
