"""``addcow convert``: the guest's view of an image, as a new raw file."""

from __future__ import annotations

from typing import Annotated

import typer

from addcow_mp.cli.options import (
    CopyingOptions,
    ForceRaw,
    Format,
    JobProgress,
    OnlyRaw,
    Opening,
    OptionGroup,
    Printing,
    Share,
    Workers,
    file_argument,
)


class _Files(OptionGroup):
    """The source and the new file."""

    source: Annotated[str, file_argument("SRC")]
    destination: Annotated[str, file_argument("DST", "a new file")]
    target_format: Annotated[OnlyRaw, typer.Option("-O", help="the new file's format")]
    format: Annotated[Format, typer.Option("-f", "--format", help="what SRC is")] = "add-cow"


def command(
    *,
    files: _Files,
    progress: JobProgress,
    workers: Workers,
    printing: Printing,
    copying: CopyingOptions,
    share: Share = False,
    force: ForceRaw = False,
    opening: Opening,
) -> None:
    """Write the guest's view of SRC into a new sparse raw file."""
    from addcow_mp.jobs.convert import USUAL_SPARSE
    from addcow_mp.jobs.convert import convert as job

    access = opening.access(share=share, durable=copying.durable, force=force, writes=True)
    copy_options = copying.copy_options(usual=USUAL_SPARSE)
    with workers.working(access, copy_options, progress, quiet=printing.quiet) as (options, hooks):
        report = job(
            files.source,
            files.destination,
            source_format=files.format,
            options=options,
            hooks=hooks,
        )
    printing.report(report, "")
