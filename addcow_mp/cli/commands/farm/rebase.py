"""``addcow farm rebase``: another backing file for every overlay of a base."""

from __future__ import annotations

from typing import Annotated

import typer

from addcow_mp.cli.farm_job import FarmJobOptions
from addcow_mp.cli.options import name_of_file
from addcow_mp.cli.rebasing import NewBackingOptions
from addcow_mp.farm.image_job import Operation


def command(
    *,
    options: FarmJobOptions,
    backing: NewBackingOptions,
    base: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="OLD",
            callback=name_of_file,
            help="only overlays that stand on this backing file",
        ),
    ] = None,
) -> None:
    """Give every overlay of a base another backing file; the guests see the same disks.

    Both backing files are compared once. NEW and the files below it are left out. The same command
    run again does only what is left. Exit status: 0 all done, 1 some image was refused or failed,
    75 the time limit was reached.
    """
    options.run(Operation.REBASE, backing=backing.new_backing(by_path=True), base=base)
