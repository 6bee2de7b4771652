"""``addcow reset``: overlays go back to their backing files."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from addcow_mp.cli.messages import one_line, print_manifests_gone, warn
from addcow_mp.cli.options import DryRun, JobChangeOptions, NoManifest, OverlayFiles, Printing
from addcow_mp.cli.planned import Planned
from addcow_mp.cli.several import change_each, print_results
from addcow_mp.units import human_size

if TYPE_CHECKING:
    from addcow_mp.farm.shared_search import SharedSearch
    from addcow_mp.jobs.options import RunOptions
    from addcow_mp.jobs.report import Report


def command(
    *,
    overlay: OverlayFiles,
    dry_run: DryRun = False,
    printing: Printing,
    changing: JobChangeOptions,
    no_manifest: NoManifest = False,
) -> None:
    """Let overlays show their backing files again; what their guests have written is lost.

    An overlay that another one stands on is refused, also with --force. A file that is refused is
    one line, and the others go on. Exit status: 0 all done, 1 some file was refused or failed.
    """
    from addcow_mp.jobs.reset import estimate, reset

    files, quiet = overlay.files, printing.quiet

    def work(path: str, options: RunOptions, search: SharedSearch) -> Report | Planned:
        shared = search.shared(path)
        if dry_run:
            return Planned(path, "reset", estimate(path, options, shared))
        report = reset(path, options=replace(options, manifests=not no_manifest), shared=shared)
        warn(report.warnings)
        return report

    results = change_each(files, work, changing, quiet=quiet, writes=not dry_run)

    def show(one: Report | Planned) -> None:
        _show(one, printing, is_alone=len(files) == 1)

    def describe(one: Report | Planned) -> object:
        return one.as_json()

    status = print_results(results, printing, is_list=len(files) > 1, show=show, describe=describe)
    raise typer.Exit(status)


def _show(result: Report | Planned, printing: Printing, *, is_alone: bool) -> None:
    if printing.quiet:
        return
    if isinstance(result, Planned):
        print(result.line)
        return
    freed = human_size(result.bytes_freed or 0)
    print("Image reset." if is_alone else one_line(f"{result.filename}: reset, {freed} freed"))
    print_manifests_gone(result.manifests_gone)
