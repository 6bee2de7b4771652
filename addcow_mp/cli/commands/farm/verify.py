"""``addcow farm verify``: compare every layer of a farm with its manifest, each once."""

from __future__ import annotations

import typer

from addcow_mp.cli.findings import counts_of, findings_of, print_counts, print_layers
from addcow_mp.cli.jsontext import print_document, print_line
from addcow_mp.cli.listing import explain
from addcow_mp.cli.options import (
    FarmProgress,
    Listing,
    ListPrinting,
    Opening,
    Places,
    Rate,
    Share,
    Workers,
)
from addcow_mp.farm.verify import FarmLayerReports, farm_verify


def command(
    *,
    places: Places,
    progress: FarmProgress,
    workers: Workers,
    rate: Rate = None,
    printing: ListPrinting,
    share: Share = False,
    opening: Opening,
) -> None:
    """Compare every layer with its manifest, each once; the exit status is that of the worst.

    Exit status: 0 all as it was, 1 something could not be verified, 2 something differs.
    """
    listed, quiet = places.listed(), printing.quiet
    access = opening.access(share=share, exclude=places.exclude)
    copy_options = workers.copy_options(rate)
    with workers.working(access, copy_options, progress, quiet=quiet) as (options, hooks):
        found = farm_verify(listed, options, hooks)
    _print(found, printing.output, quiet=quiet)
    explain(found.places, [one.path for one in found.all], quiet=quiet)
    raise typer.Exit(found.exit_code)


def _print(found: FarmLayerReports, output: Listing, *, quiet: bool) -> None:
    if output == "human":
        print_layers(found.all, quiet=quiet)
        if not quiet:
            print_counts(_totals(found))
        return
    images, files = ([one.as_json() for one in some] for some in (found.images, found.files))
    if output == "json":
        layers = {"images": images, "files": files, **findings_of(found.all)}
        print_document({**layers, "summary": _totals(found)})
    else:
        for one in (*images, *files, {"summary": _totals(found)}):
            print_line(one)


def _totals(found: FarmLayerReports) -> dict[str, int]:
    counts = counts_of(found.all)
    del counts["layers"]
    read = sum(one.bytes_read for one in found.all)
    return {"images": len(found.images), "files": len(found.files), **counts, "bytes": read}
