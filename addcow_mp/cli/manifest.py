"""The ``manifest`` commands: their options."""

from __future__ import annotations

from typing import Annotated

import typer

from addcow_mp.cli.app import (
    AnyFile,
    CacheMode,
    CopyWay,
    Devices,
    ForceRaw,
    Format,
    HowToPrint,
    Idle,
    Jobs,
    Locking,
    Locks,
    Output,
    Quiet,
    Roots,
    Share,
    ShowProgress,
    access_of,
    manner_of,
)

manifest = typer.Typer(help="Write down what images hold.", rich_markup_mode=None)


@manifest.callback()
def _manifest() -> None:
    """Write down what images hold."""


@manifest.command("create")
def create(
    file: AnyFile,
    replace: Annotated[
        bool, typer.Option("--replace", help="make anew what is there and of another state")
    ] = False,
    progress: ShowProgress = False,
    quiet: Quiet = False,
    jobs: Jobs = None,
    output: HowToPrint = Output.human,
    format: Annotated[Format, typer.Option("-f", "--format", help="what FILE is")] = Format.addcow,
    idle: Idle = False,
    share: Share = False,
    force: ForceRaw = False,
    roots: Roots = None,
    allow_device: Devices = False,
    locking: Locks = Locking.on,
) -> None:
    """Write a manifest beside each layer of FILE that has none."""
    from addcow_mp.cli.verifying import show_made
    from addcow_mp.cli.working import working
    from addcow_mp.jobs.manifest import create as job

    access = access_of(roots, allow_device, share=share, force=force, locking=locking, writes=True)
    manner = manner_of(CopyWay.auto, CacheMode.writeback, None, None, idle=idle)
    shown = progress and not quiet
    with working(jobs, access, manner, progress=shown, quiet=quiet) as conduct:
        made = job(file, conduct, format_=format.value, replaces=replace)
    show_made(file, made, as_json=output is Output.json, quiet=quiet)
