"""``addcow manifest create``: write a manifest beside each layer that has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from addcow_mp.cli.jsontext import print_document
from addcow_mp.cli.messages import one_line
from addcow_mp.cli.options import (
    AnyFile,
    FileFormat,
    ForceRaw,
    JobProgress,
    Opening,
    Printing,
    Share,
    Workers,
)

if TYPE_CHECKING:
    from addcow_mp.jobs.manifest import Made

Replace = Annotated[
    bool, typer.Option("--replace", help="replace existing manifests that do not match")
]


def command(
    *,
    file: AnyFile,
    replace: Replace = False,
    progress: JobProgress,
    workers: Workers,
    printing: Printing,
    format: FileFormat = "add-cow",
    share: Share = False,
    force: ForceRaw = False,
    opening: Opening,
) -> None:
    """Write a manifest beside each layer of FILE that has none."""
    from addcow_mp.jobs.manifest import create as job

    access = opening.access(share=share, force=force, writes=True)
    quiet, copy_options = printing.quiet, workers.copy_options()
    with workers.working(access, copy_options, progress, quiet=quiet) as (options, hooks):
        made = job(file, options, hooks, format_=format, replaces=replace)
    if printing.as_json:
        top = {"filename": file, "guest-digest": made[-1].guest_digest}
        print_document({**top, "manifests": manifests_json(made)})
    elif not quiet:
        for one in made:
            done = "written" if one.written else "kept"
            print(one_line(f"{one.path}: {done}, guest digest {one.guest_digest}"))


def manifests_json(made: Sequence[Made]) -> list[dict[str, object]]:
    """The manifests of a chain with their public keys, the deepest first."""
    return [
        {"filename": one.path, "guest-digest": one.guest_digest, "written": one.written}
        for one in made
    ]
