"""``addcow farm verify``: hold every layer of a farm against its manifest, each once."""

from __future__ import annotations

import typer

from addcow_mp.cli.jsontext import print_document, print_line
from addcow_mp.cli.layer_reports import counts_of, findings_of, layer_of, print_findings, worst
from addcow_mp.cli.options import (
    FarmProgress,
    ListPrinting,
    Opening,
    Places,
    Rate,
    Share,
    Workers,
)
from addcow_mp.cli.reasons import explain
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
    """Hold every layer against its manifest, each once; the exit status is that of the worst.

    Exit status: 0 all as it was, 1 something could not be verified, 2 something differs.
    """
    listed, quiet = places.listed(), printing.quiet
    access = opening.access(share=share, exclude=places.exclude)
    with workers.working(access, workers.copy_options(rate), progress, quiet=quiet) as (
        options,
        hooks,
    ):
        found = farm_verify(listed, options, hooks)
    PRINTERS[printing.output](found, quiet=quiet)
    explain(found.places, [one.path for one in found.all], quiet=quiet)
    raise typer.Exit(worst(found.all))


def _totals(found: FarmLayerReports) -> dict[str, int]:
    counts = counts_of(found.all)
    del counts["layers"]
    read = sum(one.bytes_read for one in found.all)
    return {"images": len(found.images), "files": len(found.files), **counts, "bytes": read}


def _print_farm_json(found: FarmLayerReports, *, quiet: bool) -> None:  # noqa: ARG001 - all alike
    told = {
        "images": [layer_of(one) for one in found.images],
        "files": [layer_of(one) for one in found.files],
        **findings_of(found.all),
        "summary": _totals(found),
    }
    print_document(told)


def _print_farm_jsonl(found: FarmLayerReports, *, quiet: bool) -> None:  # noqa: ARG001
    for one in found.all:
        print_line(layer_of(one))
    print_line({"summary": _totals(found)})


def _print_farm(found: FarmLayerReports, *, quiet: bool) -> None:
    print_findings(found.all, quiet=quiet)
    if not quiet:
        counts = (f"{count} {word}" for word, count in _totals(found).items())
        print(", ".join(counts).replace("-", " "))


#: How to print, by the word for it on the command line.
PRINTERS = {
    "human": _print_farm,
    "json": _print_farm_json,
    "jsonl": _print_farm_jsonl,
}
