"""``addcow snapshot``: a new overlay over a disk."""

from __future__ import annotations

from typing import Annotated

import typer

from addcow_mp.cli.jsontext import print_document
from addcow_mp.cli.messages import one_line, warn
from addcow_mp.cli.options import (
    Exclude,
    ForceRaw,
    Format,
    NoManifest,
    Opening,
    Printing,
    file_argument,
)
from addcow_mp.cli.results import job_is_done
from addcow_mp.jobs.create import Created
from addcow_mp.jobs.create import snapshot as job


def command(
    *,
    file: Annotated[str, file_argument("FILE", "the disk, which stays as it is")],
    new: Annotated[str, file_argument("NEW", "the new .add-cow file; its image file is new too")],
    backing_format: Annotated[
        Format, typer.Option("-F", metavar="FMT", help="format of FILE: add-cow or raw")
    ] = "add-cow",
    printing: Printing,
    force: ForceRaw = False,
    exclude: Exclude = None,
    no_manifest: NoManifest = False,
    opening: Opening,
) -> None:
    """Make a new overlay over a disk: what is written from now on goes there."""
    access = opening.access(force=force, writes=True, exclude=exclude)
    made = job(file, new, backing_format=backing_format, access=access, manifest=not no_manifest)
    job_is_done()
    warn(made.warnings)
    if printing.as_json:
        print_document(_described(new, made, backing_format))
    elif not printing.quiet:
        names = f"backing_file='{made.backing}' image_file='{made.image}'"
        about = f"fmt=add-cow size={made.size} {names} cluster_size={made.cluster_size}"
        print(one_line(f"Formatting '{new}', {about}"))


def _described(new: str, made: Created, backing_format: str) -> dict[str, object]:
    return {
        "operation": "snapshot",
        "filename": new,
        "virtual-size": made.size,
        "cluster-size": made.cluster_size,
        "backing-filename": made.backing,
        "backing-filename-format": backing_format,
        "image-filename": made.image,
        **({} if made.manifest is None else {"manifests-made": [made.manifest]}),
    }
