"""``addcow map``: extents as qemu-img's table, or as JSON, one a line."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from addcow_mp.cli.jsontext import as_line
from addcow_mp.cli.messages import one_line, warn
from addcow_mp.cli.options import Opening, OverlayFile, Printing, Share
from addcow_mp.device.chain import READ, open_chain
from addcow_mp.device.extent import Extent, ExtentKind

#: Lines that are printed at once.
LINES = 1024


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


def _flags(kind: ExtentKind) -> str:
    one = Extent(0, 0, 0, kind)
    return as_line({"present": one.present, "zero": one.zero, "data": one.data})[1:-1]


#: The keys that an extent's kind decides: a fragmented disk has many extents, and few kinds.
_FLAGS = {kind: _flags(kind) for kind in ExtentKind}


def _extent(one: Extent) -> str:
    start, stop, depth, kind = one
    offset = "" if kind is ExtentKind.ABSENT else f', "offset": {start}'
    numbers = f'"start": {start}, "length": {stop - start}, "depth": {depth}'
    return f"{{{numbers}, {_FLAGS[kind]}{offset}}}"


def _print_table(extents: Iterable[Extent], paths: list[str]) -> None:
    """qemu-img's table: only what holds data."""
    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    rows = (_row(one, paths) for one in extents if one.kind is ExtentKind.DATA)
    while lines := list(islice(rows, LINES)):
        print("\n".join(lines))


def _row(one: Extent, paths: list[str]) -> str:
    start, stop, depth, _ = one
    offset = f"{_hex(start):<16}"
    return f"{offset}{_hex(stop - start):<16}{offset}{paths[depth]}"


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"
