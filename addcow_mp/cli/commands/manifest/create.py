"""``addcow manifest create``: write a manifest beside each layer that has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from addcow_mp.cli.messages import one_line
from addcow_mp.cli.options import (
    AnyFiles,
    FileFormat,
    ForceRaw,
    JobProgress,
    Opening,
    Printing,
    Share,
    Workers,
)
from addcow_mp.cli.several import print_results, results_of

if TYPE_CHECKING:
    from addcow_mp.jobs.manifest import Made

Replace = Annotated[
    bool, typer.Option("--replace", help="replace existing manifests that do not match")
]


def command(
    *,
    files: AnyFiles,
    replace: Replace = False,
    progress: JobProgress,
    workers: Workers,
    printing: Printing,
    format: FileFormat = "add-cow",
    share: Share = False,
    force: ForceRaw = False,
    opening: Opening,
) -> None:
    """Write a manifest beside each layer of the images that has none."""
    from addcow_mp.jobs.manifest import create as job

    access = opening.access(share=share, force=force, writes=True)
    quiet, copy_options = printing.quiet, workers.copy_options()
    with workers.working(access, copy_options, progress, quiet=quiet) as (options, hooks):

        def work(file: str) -> tuple[str, Sequence[Made]]:
            return file, job(file, options, hooks, format_=format, replaces=replace)

        results = list(results_of(files, work))
    status = print_results(
        results,
        printing,
        is_list=len(files) > 1,
        show=lambda made: None if quiet else _show(made[1]),
        describe=lambda made: _describe(*made),
    )
    raise typer.Exit(status)


def _show(made: Sequence[Made]) -> None:
    for one in made:
        done = "written" if one.written else "kept"
        print(one_line(f"{one.path}: {done}, guest digest {one.guest_digest}"))


def _describe(file: str, made: Sequence[Made]) -> dict[str, object]:
    top = {"filename": file, "guest-digest": made[-1].guest_digest}
    return {**top, "manifests": manifests_json(made)}


def manifests_json(made: Sequence[Made]) -> list[dict[str, object]]:
    """The manifests of a chain with their public keys, the deepest first."""
    return [
        {"filename": one.path, "guest-digest": one.guest_digest, "written": one.written}
        for one in made
    ]
