"""The ``map`` command: extents as qemu-img's table, or as JSON, a line each."""

from __future__ import annotations

from collections.abc import Iterable

from addcow_mp.cli.jsontext import as_line
from addcow_mp.cli.saying import one_line, warn
from addcow_mp.device.access import Access
from addcow_mp.device.chain import READ, open_chain
from addcow_mp.device.extent import Extent


def show_map(file: str, access: Access, *, as_json: bool) -> None:
    """Print the extents of the guest's view of ``file``."""
    with open_chain(file, READ, access) as overlay:
        warn(overlay.warnings())
        if as_json:
            print("[" + ",\n".join(_extent(one) for one in overlay.extents()) + "]")
        else:
            paths = [one_line(opened.path) for opened in overlay.files()]
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
