"""``addcow commit``: move the overlay's clusters into its backing file."""

from __future__ import annotations

from typing import Annotated

import typer

from addcow_mp.cli.options import (
    CopyingOptions,
    JobChangeOptions,
    JobProgress,
    OverlayFile,
    Printing,
    Verify,
    Workers,
)


def command(
    *,
    overlay: OverlayFile,
    keep: Annotated[bool, typer.Option("-d", help="leave overlay and image as they are")] = False,
    verify: Verify = False,
    progress: JobProgress,
    workers: Workers,
    printing: Printing,
    copying: CopyingOptions,
    changing: JobChangeOptions,
) -> None:
    """Move the overlay's clusters into its backing file."""
    from addcow_mp.jobs.commit import commit as job

    access = changing.access_for(copying)
    copy_options = copying.copy_options()
    with workers.working(access, copy_options, progress, quiet=printing.quiet) as (options, hooks):
        report = job(overlay.file, keep=keep, verifies=verify, options=options, hooks=hooks)
    printing.report(report, "Image committed.")
