"""``addcow manifest create``: write a manifest beside each layer that has none."""

from __future__ import annotations

from typing import Annotated

import typer

from addcow_mp.cli.jsontext import print_document
from addcow_mp.cli.messages import one_line
from addcow_mp.cli.options import (
    AnyFile,
    FileFormat,
    ForceRaw,
    Format,
    JobProgress,
    Opening,
    Printing,
    Share,
    Workers,
)
from addcow_mp.jobs.manifest import Made
from addcow_mp.jobs.manifest import create as job


def command(
    *,
    file: AnyFile,
    replace: Annotated[
        bool, typer.Option("--replace", help="replace existing manifests that do not match")
    ] = False,
    progress: JobProgress,
    workers: Workers,
    printing: Printing,
    format: FileFormat = Format.addcow,
    share: Share = False,
    force: ForceRaw = False,
    opening: Opening,
) -> None:
    """Write a manifest beside each layer of FILE that has none."""
    access = opening.access(share=share, force=force, writes=True)
    with workers.working(access, workers.copy_options(), progress, quiet=printing.quiet) as (
        options,
        hooks,
    ):
        made = job(file, options, hooks, format_=format.value, replaces=replace)
    _show(file, made, as_json=printing.as_json, quiet=printing.quiet)


def _show(file: str, made: list[Made], *, as_json: bool, quiet: bool) -> None:
    """Print a line for each layer, the deepest first."""
    if as_json:
        layers = [
            {"filename": one.path, "guest-digest": one.guest_digest, "written": one.written}
            for one in made
        ]
        told = {"filename": file, "guest-digest": made[-1].guest_digest, "manifests": layers}
        print_document(told)
    elif not quiet:
        for one in made:
            done = "written" if one.written else "kept"
            print(one_line(f"{one.path}: {done}, guest digest {one.guest_digest}"))
