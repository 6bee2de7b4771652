"""``addcow verify``: hold every layer of a chain against its manifest."""

from __future__ import annotations

import typer

from addcow_mp.cli.jsontext import print_document
from addcow_mp.cli.layer_reports import findings_of, print_findings, worst
from addcow_mp.cli.options import (
    AnyFile,
    FileFormat,
    Format,
    JobProgress,
    Opening,
    Printing,
    Rate,
    Share,
    Workers,
)
from addcow_mp.jobs.layer_report import LayerReport


def command(
    *,
    file: AnyFile,
    progress: JobProgress,
    workers: Workers,
    rate: Rate = None,
    printing: Printing,
    format: FileFormat = Format.addcow,
    share: Share = False,
    opening: Opening,
) -> None:
    """Hold every layer against its manifest, and say which bytes of which file differ.

    Exit status: 0 all as it was, 1 something could not be verified, 2 something differs.
    """
    from addcow_mp.jobs.verify import verify as job

    access = opening.access(share=share)
    with workers.working(access, workers.copy_options(rate), progress, quiet=printing.quiet) as (
        options,
        hooks,
    ):
        layer_reports = job(file, options, hooks, format_=format.value)
    raise typer.Exit(_show(file, layer_reports, as_json=printing.as_json, quiet=printing.quiet))


def _show(file: str, layer_reports: list[LayerReport], *, as_json: bool, quiet: bool) -> int:
    """Print what was found, and return the exit status."""
    status = worst(layer_reports)
    if as_json:
        layers = [
            {"filename": one.path, "exit": one.exit_code, "bytes": one.bytes_read}
            for one in layer_reports
        ]
        told = {"filename": file, "exit": status, **findings_of(layer_reports), "layers": layers}
        print_document(told)
        return status
    print_findings(layer_reports, quiet=quiet)
    if not quiet:
        print(_summary(layer_reports, status))
    return status


def _summary(layer_reports: list[LayerReport], status: int) -> str:
    if status == 0:
        return "All layers are as their manifests say."
    different = sum(1 for one in layer_reports if one.exit_code == status)
    what = "differ from their manifests" if status > 1 else "could not be verified"
    return f"{different} of {len(layer_reports)} layers {what}."
