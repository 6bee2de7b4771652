"""The ``farm`` commands: their options, and what they print. They look at many images at once."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from addcow_mp.cli.app import (
    Cache,
    CacheMode,
    Command,
    CopyBy,
    CopyWay,
    Devices,
    Exclude,
    Force,
    Idle,
    Jobs,
    Locking,
    Locks,
    Quiet,
    Rate,
    Roots,
    Share,
    Sparse,
    Verify,
    access_of,
    manner_of,
    name_of_file,
    registering,
)

_COMMANDS: dict[str, Command] = {}


command = registering(_COMMANDS)


def build(name: str) -> typer.Typer:
    """The ``farm`` commands: the one of this ``name``, else all."""
    farm = typer.Typer(help=_farm.__doc__, rich_markup_mode=None)
    farm.callback()(_farm)
    for one, function in _COMMANDS.items():
        if name not in (*_COMMANDS, "scrub") or one == name:
            farm.command(one)(function)
    if name not in _COMMANDS:
        from addcow_mp.cli.scrub import scrub

        farm.add_typer(scrub, name="scrub")
    return farm


def _farm() -> None:
    """Look at many images at once, and work on them."""


class Listing(StrEnum):
    """How a list is printed."""

    human = "human"
    json = "json"
    jsonl = "jsonl"


class Drawing(StrEnum):
    """How a graph is drawn."""

    human = "human"
    json = "json"
    jsonl = "jsonl"
    dot = "dot"
    svg = "svg"


class Key(StrEnum):
    """What a list is sorted by."""

    name = "name"
    depth = "depth"
    size = "size"
    local = "local"
    percent = "percent"
    state = "state"


class Operation(StrEnum):
    """What is done with each image."""

    commit = "commit"
    flatten = "flatten"


class OnError(StrEnum):
    """What an image that is refused or fails means for the others."""

    skip = "skip"
    stop = "stop"


class ProgressIn(StrEnum):
    """How progress is told."""

    human = "human"
    json = "json"


Places = Annotated[
    list[str] | None,
    typer.Argument(metavar="PLACE...", callback=name_of_file, help="directories, files, patterns"),
]
FromFile = Annotated[
    str | None,
    typer.Option("--from-file", metavar="FILE", help="further places, one a line; - is stdin"),
]
NulSeparated = Annotated[
    bool, typer.Option("-0", "--null", help="names in --from-file end with NUL, as of find -print0")
]
HowToList = Annotated[Listing, typer.Option("--output", help="human, json or jsonl")]
ShowBar = Annotated[bool, typer.Option("-p", help="show progress on stderr")]
ProgressForm = Annotated[
    ProgressIn | None, typer.Option("--progress", help="progress for people, or JSON lines")
]
ProgressFd = Annotated[
    int | None,
    typer.Option("--progress-fd", metavar="N", min=0, help="progress goes there, as JSON lines"),
]
LogFile = Annotated[
    str | None,
    typer.Option(
        "--log",
        metavar="FILE",
        callback=name_of_file,
        help="append a JSON object for each event to a regular file",
    ),
]
TimeLimit = Annotated[
    str | None,
    typer.Option("--time-limit", metavar="TIME", help="stop after 90s, 30m, 2h; the rest is left"),
]
AtError = Annotated[
    OnError, typer.Option("--on-error", help="skip: the others go on; stop: begin nothing more")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="only say what would be done")]
Discard = Annotated[bool, typer.Option("--discard", help="flatten: then remove the .add-cow files")]


@command("ls")
def ls(
    places: Places = None,
    from_file: FromFile = None,
    null: NulSeparated = False,
    sort: Annotated[Key, typer.Option("--sort", help="the order of the lines")] = Key.name,
    reverse: Annotated[bool, typer.Option("--reverse", help="the other way round")] = False,
    output: HowToList = Listing.human,
    share: Share = False,
    roots: Roots = None,
    exclude: Exclude = None,
    allow_device: Devices = False,
    locking: Locks = Locking.on,
) -> None:
    """List every overlay: what it stands on, how large it is, how much of it is local."""
    from addcow_mp.cli.listing import PRINTERS, in_order
    from addcow_mp.cli.reasons import explain
    from addcow_mp.farm.members import members

    access = access_of(roots, allow_device, share=share, locking=locking, exclude=exclude)
    found, there = members(all_places(places, from_file, null=null), access)
    PRINTERS[output](in_order(found, sort, reverse=reverse), there.unexamined)
    said = explain(there, [one.filename for one in found])
    raise typer.Exit(1 if said or there.unexamined or any(one.is_hidden for one in found) else 0)


@command("graph")
def graph(
    places: Places = None,
    from_file: FromFile = None,
    null: NulSeparated = False,
    output: Annotated[Drawing, typer.Option("--output", help="how to draw")] = Drawing.human,
    share: Share = False,
    roots: Roots = None,
    exclude: Exclude = None,
    allow_device: Devices = False,
    locking: Locks = Locking.on,
) -> None:
    """Draw who backs whom, what is missing, and what nobody names."""
    from addcow_mp.cli.drawing import DRAWERS
    from addcow_mp.cli.reasons import explain
    from addcow_mp.farm.graph import farm_graph

    access = access_of(roots, allow_device, share=share, locking=locking, exclude=exclude)
    drawn = farm_graph(all_places(places, from_file, null=null), access)
    DRAWERS[output](drawn)
    explain(drawn.places, [node.path for node in drawn.nodes])
    raise typer.Exit(0 if drawn.is_whole else 1)


@command("check")
def check(
    places: Places = None,
    from_file: FromFile = None,
    null: NulSeparated = False,
    bar: ShowBar = False,
    progress: ProgressForm = None,
    progress_fd: ProgressFd = None,
    quiet: Quiet = False,
    jobs: Jobs = None,
    output: HowToList = Listing.human,
    idle: Idle = False,
    share: Share = False,
    roots: Roots = None,
    exclude: Exclude = None,
    allow_device: Devices = False,
    locking: Locks = Locking.on,
) -> None:
    """Check every overlay, and the farm as a whole; the exit status is that of the worst."""
    from addcow_mp.cli import verdicts
    from addcow_mp.cli.progressing import counting
    from addcow_mp.cli.reasons import explain
    from addcow_mp.cli.working import working
    from addcow_mp.device.moving import Manner
    from addcow_mp.farm.check import farm_check

    listed = all_places(places, from_file, null=null)
    access = access_of(roots, allow_device, share=share, locking=locking, exclude=exclude)
    form = form_of(bar, progress, quiet=quiet)
    with (
        working(jobs, access, Manner(idle=idle), progress=False) as conduct,
        counting(form, progress_fd, conduct) as counted,
    ):
        report = farm_check(listed, counted)
    verdicts.PRINTERS[output](report, quiet=quiet)
    said = explain(report.found, [one.path for one in report.images], quiet=quiet)
    raise typer.Exit(report.exit_code or int(said))


@command("verify")
def verify(
    places: Places = None,
    from_file: FromFile = None,
    null: NulSeparated = False,
    bar: ShowBar = False,
    progress: ProgressForm = None,
    progress_fd: ProgressFd = None,
    quiet: Quiet = False,
    jobs: Jobs = None,
    output: HowToList = Listing.human,
    idle: Idle = False,
    share: Share = False,
    roots: Roots = None,
    exclude: Exclude = None,
    allow_device: Devices = False,
    locking: Locks = Locking.on,
) -> None:
    """Hold every layer against its manifest, each once; the exit status is that of the worst.

    Exit status: 0 all as it was, 1 something could not be verified, 2 something differs.
    """
    from addcow_mp.cli.progressing import counting
    from addcow_mp.cli.reasons import explain
    from addcow_mp.cli.verifying import FARM_PRINTERS, worst
    from addcow_mp.cli.working import working
    from addcow_mp.device.moving import Manner
    from addcow_mp.farm.verify import farm_verify

    listed = all_places(places, from_file, null=null)
    access = access_of(roots, allow_device, share=share, locking=locking, exclude=exclude)
    form = form_of(bar, progress, quiet=quiet)
    with (
        working(jobs, access, Manner(idle=idle), progress=False) as conduct,
        counting(form, progress_fd, conduct) as counted,
    ):
        found = farm_verify(listed, counted)
    FARM_PRINTERS[output](found, quiet=quiet)
    explain(found.places, [one.path for one in found.all], quiet=quiet)
    raise typer.Exit(worst(found.all))


@command("plan")
def plan(
    operation: Annotated[Operation, typer.Argument(metavar="commit|flatten")],
    places: Places = None,
    from_file: FromFile = None,
    null: NulSeparated = False,
    discard: Discard = False,
    quiet: Quiet = False,
    jobs: Jobs = None,
    output: HowToList = Listing.human,
    force: Force = False,
    roots: Roots = None,
    exclude: Exclude = None,
    allow_device: Devices = False,
    locking: Locks = Locking.on,
) -> None:
    """Say what a commit or flatten of every overlay would do, in which order, and what it needs."""
    from addcow_mp.cli.farming import Wishes, carry_out

    if discard and operation is Operation.commit:
        raise typer.BadParameter("--discard is for flatten")
    access = access_of(roots, allow_device, force=force, locking=locking, exclude=exclude)
    wishes = Wishes(operation, output, discard=discard, dry_run=True, quiet=quiet, jobs=jobs)
    carry_out(all_places(places, from_file, null=null), access, wishes)


@command("commit")
def commit(
    places: Places = None,
    from_file: FromFile = None,
    null: NulSeparated = False,
    verify: Verify = False,
    dry_run: DryRun = False,
    on_error: AtError = OnError.skip,
    time_limit: TimeLimit = None,
    bar: ShowBar = False,
    progress: ProgressForm = None,
    progress_fd: ProgressFd = None,
    log: LogFile = None,
    quiet: Quiet = False,
    jobs: Jobs = None,
    output: HowToList = Listing.human,
    cache: Cache = CacheMode.writeback,
    copy: CopyBy = CopyWay.auto,
    sparse: Sparse = None,
    rate: Rate = None,
    idle: Idle = False,
    force: Force = False,
    roots: Roots = None,
    exclude: Exclude = None,
    allow_device: Devices = False,
    locking: Locks = Locking.on,
) -> None:
    """Commit every overlay into its backing file, the deepest chains first.

    The same command run again does only what is left. Exit status: 0 all done, 1 some image was
    refused or failed, 75 the time limit was reached.
    """
    from addcow_mp.cli.farming import Wishes, carry_out

    access = access_of(
        roots,
        allow_device,
        cache=cache,
        force=force,
        locking=locking,
        writes=not dry_run,
        exclude=exclude,
    )
    wishes = Wishes(
        Operation.commit,
        output,
        verifies=verify,
        dry_run=dry_run,
        stops_at_error=on_error is OnError.stop,
        time_limit=time_limit,
        form=form_of(bar, progress, quiet=quiet),
        progress_fd=progress_fd,
        log=log,
        quiet=quiet,
        jobs=jobs,
        manner=manner_of(copy, cache, sparse, rate, idle=idle),
    )
    carry_out(all_places(places, from_file, null=null), access, wishes)


@command("flatten")
def flatten(
    places: Places = None,
    from_file: FromFile = None,
    null: NulSeparated = False,
    discard: Discard = False,
    verify: Verify = False,
    dry_run: DryRun = False,
    on_error: AtError = OnError.skip,
    time_limit: TimeLimit = None,
    bar: ShowBar = False,
    progress: ProgressForm = None,
    progress_fd: ProgressFd = None,
    log: LogFile = None,
    quiet: Quiet = False,
    jobs: Jobs = None,
    output: HowToList = Listing.human,
    cache: Cache = CacheMode.writeback,
    copy: CopyBy = CopyWay.auto,
    sparse: Sparse = None,
    rate: Rate = None,
    idle: Idle = False,
    force: Force = False,
    roots: Roots = None,
    exclude: Exclude = None,
    allow_device: Devices = False,
    locking: Locks = Locking.on,
) -> None:
    """Bring every cluster of every overlay into its image file, the deepest chains first.

    The same command run again does only what is left. Exit status: 0 all done, 1 some image was
    refused or failed, 75 the time limit was reached.
    """
    from addcow_mp.cli.farming import Wishes, carry_out

    access = access_of(
        roots,
        allow_device,
        cache=cache,
        force=force,
        locking=locking,
        writes=not dry_run,
        exclude=exclude,
    )
    wishes = Wishes(
        Operation.flatten,
        output,
        discard=discard,
        verifies=verify,
        dry_run=dry_run,
        stops_at_error=on_error is OnError.stop,
        time_limit=time_limit,
        form=form_of(bar, progress, quiet=quiet),
        progress_fd=progress_fd,
        log=log,
        quiet=quiet,
        jobs=jobs,
        manner=manner_of(copy, cache, sparse, rate, idle=idle),
    )
    carry_out(all_places(places, from_file, null=null), access, wishes)


def form_of(bar: bool, progress: ProgressIn | None, *, quiet: bool) -> str | None:
    """How progress is shown: as asked for, by -p for people; -q spares them."""
    if progress is not None:
        return progress.value
    return "human" if bar and not quiet else None


def all_places(places: list[str] | None, from_file: str | None, *, null: bool) -> list[str]:
    """The places that are named, here or in a file of them. Raises :class:`UsageError` for none."""
    from addcow_mp.errors import UsageError

    if null and from_file is None:
        raise UsageError(message="-0 says how names stand in a file of them: name it, --from-file")
    listed = [*(places or ()), *(() if from_file is None else _names_in(from_file, null=null))]
    if not listed:
        raise UsageError(message="name at least one directory or file; see 'addcow farm --help'")
    return listed


def _names_in(path: str, *, null: bool) -> list[str]:
    """The names in a file of them; a name is bytes, whatever the locale."""
    import os
    import sys

    if path == "-":
        content = sys.stdin.buffer.read()
    else:
        with open(path, "rb") as file:
            content = file.read()
    return [os.fsdecode(name) for name in content.split(b"\0" if null else b"\n") if name]
