"""``addcow compare``: qemu-img's sentences, or a list of differing extents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from addcow_mp.cli.jsontext import print_document
from addcow_mp.cli.messages import warn
from addcow_mp.cli.options import (
    Format,
    JobProgress,
    Opening,
    OptionGroup,
    Printing,
    Share,
    Workers,
    file_argument,
)
from addcow_mp.format.bits import merged
from addcow_mp.units import SECTOR, round_down, round_up

if TYPE_CHECKING:
    from addcow_mp.jobs.compare import Compared


class _Sides(OptionGroup):
    """The two images."""

    one: Annotated[str, file_argument("A")]
    other: Annotated[str, file_argument("B")]
    format: Annotated[Format, typer.Option("-f", help="what A is")] = "add-cow"
    other_format: Annotated[Format, typer.Option("-F", help="what B is")] = "add-cow"


def command(
    *,
    sides: _Sides,
    strict: Annotated[
        bool, typer.Option("-s", help="sizes and allocation must be equal too")
    ] = False,
    progress: JobProgress,
    workers: Workers,
    printing: Printing,
    share: Share = False,
    opening: Opening,
) -> None:
    """Compare what the guests of two images see.

    Exit status: 0 the same, 1 they differ, 2 they could not be compared.
    """
    from addcow_mp.jobs.compare import compare as job

    access = opening.access(share=share)
    quiet, as_json = printing.quiet, printing.as_json
    formats = sides.format, sides.other_format
    with workers.working(access, workers.copy_options(), progress, quiet=quiet) as (options, hooks):
        result = job(
            sides.one,
            sides.other,
            formats,
            strict=strict,
            every=as_json,
            options=options,
            hooks=hooks,
        )
    warn(result.warnings)
    if as_json:
        print_document(_as_json(sides.one, sides.other, result))
    elif not quiet:
        print("\n".join(_sentences(result)))
    raise typer.Exit(result.exit_code)


def _as_json(one: str, other: str, result: Compared) -> dict[str, object]:
    # In whole sectors: a raw file, and what differs in it, may end within a sector.
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
    """The first difference; sizes matter only when the common part is equal."""
    first = result.differing[0][0] if result.differing else None
    unequal = result.sizes[0] != result.sizes[1]
    if result.strict and unequal:
        return ["Strict mode: Image size mismatch!"]
    if result.allocation is not None and (first is None or result.allocation <= first):
        return [f"Strict mode: Offset {result.allocation} block status mismatch!"]
    beyond = first is None or first >= min(result.sizes)
    lines = ["Warning: Image size mismatch!"] if unequal and beyond else []
    if first is not None:
        return [*lines, f"Content mismatch at offset {first}!"]
    return [*lines, "Images are identical."]
