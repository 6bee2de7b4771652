"""Replaces the name of the backing file in a header.

After any interruption the header names the old or the new backing file, with its format:

1. The new name is written to the first unused range of the header region that has room; sync.
2. The fixed header is written, in one write; sync.
3. The bytes of the old name become zeros; sync.

An interrupted run may leave bytes that no name uses. No reader looks at them. ``check`` reports
them as a leak, and the next run clears them.
"""

from __future__ import annotations

from collections.abc import Iterator

from addcow_mp.device.overlay import Overlay
from addcow_mp.errors import ImageError
from addcow_mp.format.header import Header


def name_of_backing(overlay: Overlay) -> bytes:
    """The name of the backing file as the header stores it; empty if there is none."""
    held = bytearray(overlay.header.backing_size)
    overlay.cow.read_into(memoryview(held), overlay.header.backing_offset)
    return bytes(held)


def refuse_no_room(overlay: Overlay, name: bytes) -> None:
    """Raise :class:`ImageError` unless the header region has room for another backing name."""
    if name != name_of_backing(overlay):
        _place_for(overlay, name)


def has_leftovers(overlay: Overlay) -> bool:
    """Whether an unused byte of the header region is not zero."""
    return any(any(held) for _, held in _unused(overlay))


def name_backing(overlay: Overlay, name: bytes, format_: str) -> None:
    """Let the header name another backing file, durably. Raises :class:`AddcowError`."""
    place = overlay.header.backing_offset
    if name != name_of_backing(overlay):
        place = _place_for(overlay, name)
        overlay.cow.write(name, place)
        overlay.cow.sync()
    _replace(overlay, overlay.header.with_backing(place, len(name), format_))


def drop_backing(overlay: Overlay, *, whole: bool) -> None:
    """Let the header name no backing file, durably. Raises :class:`AddcowError`.

    ``whole``: every cluster is allocated, and ALL_ALLOCATED is set by the same write. Otherwise
    clusters that are not allocated read as zeros afterwards.
    """
    header = overlay.header.with_backing(0, 0, "")
    _replace(overlay, header.with_all_allocated(True) if whole else header)


def _replace(overlay: Overlay, header: Header) -> None:
    overlay.write_header(header)
    if clear_unused(overlay):
        overlay.cow.sync()


def clear_unused(overlay: Overlay) -> bool:
    """Set the unused bytes of the header region to zeros; returns whether some were not."""
    changed = False
    for start, held in _unused(overlay):
        if any(held):
            overlay.cow.write(bytes(len(held)), start)
            changed = True
    return changed


def _unused(overlay: Overlay) -> Iterator[tuple[int, bytes]]:
    """Each unused range of the header region: its offset and its bytes."""
    for start, stop in overlay.header.unused_ranges():
        held = bytearray(stop - start)
        overlay.cow.read_into(memoryview(held), start)
        yield start, bytes(held)


def _place_for(overlay: Overlay, name: bytes) -> int:
    """The offset of a new backing name; the old one must stay until the header is written."""
    unused = overlay.header.unused_ranges()
    places = [start for start, stop in unused if stop - start >= len(name)]
    if not places:
        raise ImageError(
            path=overlay.path,
            problem=f"its header has no room for another name of {len(name)} bytes; "
            "use a shorter one",
        )
    return places[0]
