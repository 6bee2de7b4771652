"""The ``compare`` command: qemu-img's sentences, or a list of differing extents."""

from __future__ import annotations

from addcow_mp.cli.jsontext import as_document
from addcow_mp.cli.saying import warn
from addcow_mp.format.bits import merged
from addcow_mp.jobs.compare import Compared
from addcow_mp.units import SECTOR, round_down, round_up


def show_compared(one: str, other: str, result: Compared, *, as_json: bool, quiet: bool) -> int:
    """Print what came of comparing two images; the exit status: 0 the same, 1 not."""
    warn(result.warnings)
    if as_json:
        print(as_document(_as_json(one, other, result)))
    elif not quiet:
        print("\n".join(_sentences(result)))
    return 0 if result.same else 1


def _as_json(one: str, other: str, result: Compared) -> dict[str, object]:
    # In whole sectors: a raw file may end within one, and with it what differs.
    sectors = merged(
        (round_down(start, SECTOR), round_up(stop, SECTOR)) for start, stop in result.differing
    )
    extents = [{"start": start, "length": stop - start} for start, stop in sectors]
    return {
        "filenames": [one, other],
        "virtual-sizes": list(result.sizes),
        "identical": result.same,
        "strict": result.strict,
        "allocation-differs-at": result.allocation,
        "complete": result.complete,
        "differing-extents": extents,
    }


def _sentences(result: Compared) -> list[str]:
    """What differs first, by offset; sizes are spoken of once what both have is equal."""
    first = result.differing[0][0] if result.differing else None
    unequal = result.sizes[0] != result.sizes[1]
    if result.strict and unequal:
        return ["Strict mode: Image size mismatch!"]
    if result.allocation is not None and (first is None or result.allocation <= first):
        return [f"Strict mode: Offset {result.allocation} block status mismatch!"]
    beyond = first is None or first >= min(result.sizes)
    said = ["Warning: Image size mismatch!"] if unequal and beyond else []
    if first is not None:
        return [*said, f"Content mismatch at offset {first}!"]
    return [*said, "Images are identical."]
