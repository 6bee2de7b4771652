"""``addcow flatten``: bring every cluster into the image file."""

from __future__ import annotations

from addcow_mp.cli.options import (
    CopyingOptions,
    Discard,
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
    discard: Discard = False,
    verify: Verify = False,
    progress: JobProgress,
    workers: Workers,
    printing: Printing,
    copying: CopyingOptions,
    changing: JobChangeOptions,
) -> None:
    """Bring every cluster into the image file, which then is the whole disk."""
    from addcow_mp.jobs.flatten import flatten as job

    access = changing.access_for(copying)
    copy_options = copying.copy_options()
    with workers.working(access, copy_options, progress, quiet=printing.quiet) as (options, hooks):
        report = job(overlay.file, discard=discard, verifies=verify, options=options, hooks=hooks)
    printing.report(report, "Image flattened.")
