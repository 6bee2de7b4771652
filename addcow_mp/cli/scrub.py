"""The ``farm scrub`` commands: their options."""

from __future__ import annotations

from typing import Annotated

import typer

from addcow_mp.cli.app import (
    CacheMode,
    CopyWay,
    Devices,
    Exclude,
    HowToPrint,
    Idle,
    Jobs,
    Locking,
    Locks,
    Output,
    Quiet,
    Rate,
    Roots,
    Share,
    access_of,
    manner_of,
    name_of_file,
)
from addcow_mp.cli.farm import (
    FromFile,
    NulSeparated,
    Places,
    ProgressFd,
    ProgressForm,
    ShowBar,
    TimeLimit,
    all_places,
    form_of,
)

scrub = typer.Typer(help="Verify a farm bit by bit, and remember it.", rich_markup_mode=None)

StateFile = Annotated[
    str,
    typer.Option(
        "--state",
        metavar="FILE",
        callback=name_of_file,
        help="what is remembered, an SQLite database",
    ),
]


@scrub.callback()
def _scrub() -> None:
    """Verify a farm bit by bit, and remember it."""


@scrub.command("run")
def run(
    state: StateFile,
    places: Places = None,
    from_file: FromFile = None,
    null: NulSeparated = False,
    time_limit: TimeLimit = None,
    rate: Rate = None,
    sample: Annotated[
        str | None,
        typer.Option("--sample", metavar="P%", help="read only so much of each layer, at random"),
    ] = None,
    bar: ShowBar = False,
    progress: ProgressForm = None,
    progress_fd: ProgressFd = None,
    quiet: Quiet = False,
    jobs: Jobs = None,
    output: HowToPrint = Output.human,
    idle: Idle = False,
    share: Share = False,
    roots: Roots = None,
    exclude: Exclude = None,
    allow_device: Devices = False,
    locking: Locks = Locking.on,
) -> None:
    """Hold layers against their manifests, the longest-unverified first.

    The same command goes on where the last one ended. Exit status: 0 all as it was, 1 something
    could not be verified, 2 something differs, 75 the time limit was reached.
    """
    from addcow_mp.cli.scrubbing import Wishes, carry_out

    access = access_of(roots, allow_device, share=share, locking=locking, exclude=exclude)
    wishes = Wishes(
        state,
        sample=sample,
        time_limit=time_limit,
        form=form_of(bar, progress, quiet=quiet),
        progress_fd=progress_fd,
        quiet=quiet,
        as_json=output is Output.json,
        jobs=jobs,
        manner=manner_of(CopyWay.auto, CacheMode.writeback, None, rate, idle=idle),
    )
    carry_out(all_places(places, from_file, null=null), access, wishes)


@scrub.command("status")
def status(
    state: StateFile, output: HowToPrint = Output.human, locking: Locks = Locking.on
) -> None:
    """Say what was verified, when, and what came of it.

    Exit status: 0 nothing amiss is known, 1 something could not be verified, 2 something differs.
    """
    from addcow_mp.cli.scrubbing import show_status

    as_json = output is Output.json
    raise typer.Exit(show_status(state, as_json=as_json, locking=locking is Locking.on))
