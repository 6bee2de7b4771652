"""``addcow verify``: compare every layer of a chain with its manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from addcow_mp.cli.findings import findings_of, print_layers
from addcow_mp.cli.jsontext import print_document
from addcow_mp.cli.options import (
    AnyFile,
    FileFormat,
    JobProgress,
    Opening,
    Printing,
    Rate,
    Share,
    Workers,
)

if TYPE_CHECKING:
    from addcow_mp.jobs.verify import VerifyReport


def command(
    *,
    file: AnyFile,
    progress: JobProgress,
    workers: Workers,
    rate: Rate = None,
    printing: Printing,
    format: FileFormat = "add-cow",
    share: Share = False,
    opening: Opening,
) -> None:
    """Compare every layer with its manifest, and say which bytes of which file differ.

    Exit status: 0 all as it was, 1 something could not be verified, 2 something differs.
    """
    from addcow_mp.jobs.verify import verify as job

    access, quiet = opening.access(share=share), printing.quiet
    copy_options = workers.copy_options(rate)
    with workers.working(access, copy_options, progress, quiet=quiet) as (options, hooks):
        report = job(file, options, hooks, format_=format)
    if printing.as_json:
        _print_json(report)
    else:
        print_layers(report.layers, quiet=quiet)
        if not quiet:
            print(_summary(report))
    raise typer.Exit(report.exit_code)


def _print_json(report: VerifyReport) -> None:
    layers = [
        {"filename": one.path, "exit": one.exit_code, "bytes": one.bytes_read}
        for one in report.layers
    ]
    about = {"filename": report.filename, "exit": report.exit_code}
    print_document({**about, **findings_of(report.layers), "layers": layers})


def _summary(report: VerifyReport) -> str:
    status = report.exit_code
    if status == 0:
        return "All layers are as their manifests say."
    worst = sum(1 for one in report.layers if one.exit_code == status)
    what = "differ from their manifests" if status > 1 else "could not be verified"
    return f"{worst} of {len(report.layers)} layers {what}."
