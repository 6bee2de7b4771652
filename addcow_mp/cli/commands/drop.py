"""``addcow drop``: remove the .add-cow files of overlays whose image files are whole disks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from addcow_mp.cli.messages import one_line, print_manifests_gone
from addcow_mp.cli.options import JobChangeOptions, OverlayFiles, Printing
from addcow_mp.cli.several import change_each, print_results

if TYPE_CHECKING:
    from addcow_mp.farm.shared_search import SharedSearch
    from addcow_mp.jobs.options import RunOptions
    from addcow_mp.jobs.report import Report


def command(*, overlay: OverlayFiles, printing: Printing, changing: JobChangeOptions) -> None:
    """Remove the .add-cow files of overlays with every cluster allocated; their image files stay.

    A file that is refused is one line, and the others go on. Exit status: 0 all done, 1 some file
    was refused or failed.
    """
    from addcow_mp.jobs.drop import drop

    files = overlay.files

    def work(path: str, options: RunOptions, search: SharedSearch) -> Report:
        report = drop(path, options=options, shared=search.shared(path))
        search.removed(path)
        return report

    results = change_each(files, work, changing, quiet=printing.quiet)

    def show(report: Report) -> None:
        if not printing.quiet:
            alone = len(files) == 1
            print("Image dropped." if alone else one_line(f"{report.filename}: dropped"))
            print_manifests_gone(report.manifests_gone)

    def describe(report: Report) -> object:
        return report.as_json()

    status = print_results(results, printing, is_list=len(files) > 1, show=show, describe=describe)
    raise typer.Exit(status)
