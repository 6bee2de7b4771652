"""``addcow verify``: compare every layer of a chain with its manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from addcow_mp.cli.findings import findings_of, print_layers
from addcow_mp.cli.messages import one_line
from addcow_mp.cli.options import (
    AnyFiles,
    FileFormat,
    JobProgress,
    Opening,
    Printing,
    Rate,
    Share,
    Workers,
)
from addcow_mp.cli.several import print_results, results_of

if TYPE_CHECKING:
    from addcow_mp.jobs.verify import VerifyReport


def command(
    *,
    files: AnyFiles,
    progress: JobProgress,
    workers: Workers,
    rate: Rate = None,
    printing: Printing,
    format: FileFormat = "add-cow",
    share: Share = False,
    opening: Opening,
) -> None:
    """Compare every layer with its manifest, and say which bytes of which file differ.

    Exit status: 0 all as it was, 1 something could not be verified, 2 something differs; of several
    files that of the worst.
    """
    from addcow_mp.jobs.verify import verify as job

    access, quiet = opening.access(share=share), printing.quiet
    copy_options = workers.copy_options(rate)
    is_list = len(files) > 1
    with workers.working(access, copy_options, progress, quiet=quiet) as (options, hooks):
        results = list(results_of(files, lambda file: job(file, options, hooks, format_=format)))
    status = print_results(
        results,
        printing,
        is_list=is_list,
        show=lambda report: _show(report, quiet=quiet, is_named=is_list),
        describe=_describe,
        status=lambda report: report.exit_code,
    )
    raise typer.Exit(status)


def _show(report: VerifyReport, *, quiet: bool, is_named: bool) -> None:
    if is_named and not (quiet and report.exit_code == 0):
        print(one_line(f"{report.filename}:"))
    print_layers(report.layers, quiet=quiet)
    if not quiet:
        print(_summary(report))


def _describe(report: VerifyReport) -> object:
    layers = [
        {"filename": one.path, "exit": one.exit_code, "bytes": one.bytes_read}
        for one in report.layers
    ]
    about = {"filename": report.filename, "exit": report.exit_code}
    return {**about, **findings_of(report.layers), "layers": layers}


def _summary(report: VerifyReport) -> str:
    status = report.exit_code
    if status == 0:
        return "All layers are as their manifests say."
    worst = sum(1 for one in report.layers if one.exit_code == status)
    what = "differ from their manifests" if status > 1 else "could not be verified"
    return f"{worst} of {len(report.layers)} layers {what}."
