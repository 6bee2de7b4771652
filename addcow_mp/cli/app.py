"""The commands and their options, in qemu-img's words. One function each, no decisions.

What a command needs is imported inside it: a command pays for nothing but itself at
start-up, and several of them are run a thousand times in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from addcow_mp.device.access import Access
    from addcow_mp.device.moving import Manner
    from addcow_mp.jobs.report import Report

Command = Callable[..., None]
Names = TypeVar("Names", str, str | None, list[str] | None)

_COMMANDS: dict[str, Command] = {}

#: Commands with commands of their own, each in a module that is loaded for it alone.
FARM, MANIFEST = "farm", "manifest"


def registering(commands: dict[str, Command]) -> Callable[[str], Callable[[Command], Command]]:
    """What gives functions their places among ``commands``."""

    def command(name: str) -> Callable[[Command], Command]:
        def add(function: Command) -> Command:
            commands[name] = function
            return function

        return add

    return command


command = registering(_COMMANDS)


def build(arguments: Sequence[str]) -> typer.Typer:
    """The application, with the command that ``arguments`` begin with, else with all.

    Reading the options of nine commands takes as long as most of them run.
    """
    app = typer.Typer(
        name="addcow",
        help="Create, inspect, change, commit and flatten add-cow disk images.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback(invoke_without_command=True)(addcow)
    first = arguments[0] if arguments else ""
    known = first in (*_COMMANDS, FARM, MANIFEST)
    for name, function in _COMMANDS.items():
        if not known or name == first:
            app.command(name)(function)
    if not known or first == FARM:
        from addcow_mp.cli.farm import build as build_farm

        app.add_typer(build_farm("".join(arguments[1:2])), name=FARM)
    if not known or first == MANIFEST:
        from addcow_mp.cli.manifest import manifest

        app.add_typer(manifest, name=MANIFEST)
    return app


class Output(StrEnum):
    """How results are printed."""

    human = "human"
    json = "json"


class Format(StrEnum):
    """The formats that are opened natively."""

    addcow = "add-cow"
    raw = "raw"


class OnlyAddcow(StrEnum):
    """The one format of commands that are about overlays."""

    addcow = "add-cow"


class OnlyRaw(StrEnum):
    """The one format that is written by converting."""

    raw = "raw"


class CacheMode(StrEnum):
    """How far written data is pushed."""

    writeback = "writeback"
    none = "none"
    unsafe = "unsafe"


class CopyWay(StrEnum):
    """Ways to move data."""

    auto = "auto"
    clone = "clone"
    range = "range"
    buffer = "buffer"


class Locking(StrEnum):
    """Whether image files are locked."""

    on = "on"
    off = "off"


class Repair(StrEnum):
    """What check may repair."""

    leaks = "leaks"
    all = "all"


def name_of_file(given: Names) -> Names:
    """The name of a file, or several, as given: ``-`` is none, and stands for no stream either."""
    from addcow_mp.errors import UsageError

    for name in [given] if isinstance(given, str) else given or []:
        if name == "-":
            raise UsageError(message="'-' is not a file name here; a file of that name is './-'")
    return given


def _hush(quiet: bool) -> bool:
    from addcow_mp.cli import saying

    saying.hush(quiet=quiet)
    return quiet


File = Annotated[
    str, typer.Argument(metavar="FILE", callback=name_of_file, help="the .add-cow file")
]
AnyFile = Annotated[str, typer.Argument(metavar="FILE", callback=name_of_file, help="the image")]
Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", callback=_hush, help="print nothing but errors")
]
ShowProgress = Annotated[bool, typer.Option("-p", "--progress", help="show progress on stderr")]
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs", min=0, help="worker processes; 0 = in this process  [default: usable CPUs]"
    ),
]
Roots = Annotated[
    list[str] | None,
    typer.Option(
        "--root",
        metavar="DIR",
        help="names inside images may lead beneath DIR too; also ADDCOW_ROOTS=DIR:DIR",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="PATTERN",
        help="leave out what fits PATTERN wherever files are looked for: by name, or by path",
    ),
]
Devices = Annotated[bool, typer.Option("--allow-device", help="open block devices too")]
Share = Annotated[
    bool, typer.Option("-U", "--force-share", help="read although others may be writing")
]
Locks = Annotated[
    Locking,
    typer.Option("--locking", help="off: neither take locks nor heed those of others"),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="change files that other overlays need, or that have several hard links",
    ),
]
ForceRaw = Annotated[
    bool, typer.Option("--force", help="take as raw what begins as another format does")
]
Cache = Annotated[
    CacheMode,
    typer.Option(
        "-t",
        "--cache",
        help="writeback; none: past the page cache, whatever --copy; unsafe: no syncs",
    ),
]
CopyBy = Annotated[CopyWay, typer.Option("--copy", help="pin one way to move data")]
Sparse = Annotated[
    str | None,
    typer.Option(
        "-S",
        metavar="SIZE",
        help="blocks of so many zeros become holes; 0 = do not look; clones only with --copy clone",
    ),
]
Rate = Annotated[
    str | None,
    typer.Option("-r", "--limit-rate", metavar="RATE", help="bytes per second, all workers"),
]
Verify = Annotated[
    bool, typer.Option("--verify", help="read back from the disk what was written, and compare")
]
Idle = Annotated[bool, typer.Option("--idle", help="use the disk only when nobody else does")]
HowToPrint = Annotated[Output, typer.Option("--output", help="human or json")]
OverlayFormat = Annotated[
    OnlyAddcow, typer.Option("-f", "--format", help="format of FILE; never guessed")
]


def addcow(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """Create, inspect, change, commit and flatten add-cow disk images."""
    from addcow_mp import __version__
    from addcow_mp.errors import UsageError

    if version:
        print(f"addcow {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        raise UsageError(message="Missing command; see 'addcow --help'")


@command("create")
def create(
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", callback=name_of_file, help="the file to create"),
    ] = None,
    size: Annotated[
        str | None,
        typer.Argument(metavar="[SIZE]", help="virtual size; default: the image's, or backing's"),
    ] = None,
    format: Annotated[Format, typer.Option("-f", "--format", help="what FILE is")] = Format.addcow,
    backing: Annotated[
        str | None, typer.Option("-b", metavar="FILE", callback=name_of_file, help="backing file")
    ] = None,
    backing_format: Annotated[
        str | None, typer.Option("-F", metavar="FMT", help="the backing file's format")
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option("-o", metavar="KEY=VALUE,...", help="'-o help' lists them")
    ] = None,
    quiet: Quiet = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="take as raw what begins as another format does, and an image file that has "
            "several hard links",
        ),
    ] = False,
    roots: Roots = None,
    exclude: Exclude = None,
    allow_device: Devices = False,
    locking: Locks = Locking.on,
) -> None:
    """Create an overlay, or a raw file with -f raw. Nothing existing is overwritten."""
    from addcow_mp.cli.creating import create as carry_out

    access = access_of(
        roots, allow_device, force=force, locking=locking, writes=True, exclude=exclude
    )
    carry_out(format.value, file, size, backing, backing_format, options or [], access, quiet=quiet)


@command("info")
def info(
    file: File,
    output: HowToPrint = Output.human,
    backing_chain: Annotated[
        bool, typer.Option("--backing-chain", help="every file of the chain")
    ] = False,
    share: Share = False,
    format: OverlayFormat = OnlyAddcow.addcow,
    roots: Roots = None,
    allow_device: Devices = False,
    locking: Locks = Locking.on,
) -> None:
    """Describe an overlay."""
    from addcow_mp.cli.describing import show_info

    access = access_of(roots, allow_device, share=share, locking=locking)
    show_info(file, access, as_json=output is Output.json, chain=backing_chain)


@command("map")
def map_(
    file: File,
    output: HowToPrint = Output.human,
    format: OverlayFormat = OnlyAddcow.addcow,
    share: Share = False,
    roots: Roots = None,
    allow_device: Devices = False,
    locking: Locks = Locking.on,
) -> None:
    """Show which file of the chain holds what."""
    from addcow_mp.cli.mapping import show_map

    access = access_of(roots, allow_device, share=share, locking=locking)
    show_map(file, access, as_json=output is Output.json)


@command("check")
def check(
    file: File,
    output: HowToPrint = Output.human,
    quiet: Quiet = False,
    repair: Annotated[
        Repair | None,
        typer.Option("-r", help="leaks: free them; all: also stray bits, bitmap, header zeros"),
    ] = None,
    share: Share = False,
    format: OverlayFormat = OnlyAddcow.addcow,
    force: Force = False,
    roots: Roots = None,
    exclude: Exclude = None,
    allow_device: Devices = False,
    locking: Locks = Locking.on,
) -> None:
    """Check an overlay against the format's rules.

    Exit status: 0 clean, 1 could not check, 2 corruptions, 3 leaks only, 63 not add-cow.
    """
    from addcow_mp.cli.checking import show_check

    access = access_of(
        roots,
        allow_device,
        share=share,
        force=force,
        locking=locking,
        writes=repair is not None,
        exclude=exclude,
    )
    as_json, mend = output is Output.json, None if repair is None else repair.value
    raise typer.Exit(show_check(file, access, mend, as_json=as_json, quiet=quiet))


@command("verify")
def verify(
    file: AnyFile,
    progress: ShowProgress = False,
    quiet: Quiet = False,
    jobs: Jobs = None,
    output: HowToPrint = Output.human,
    format: Annotated[Format, typer.Option("-f", "--format", help="what FILE is")] = Format.addcow,
    idle: Idle = False,
    share: Share = False,
    roots: Roots = None,
    allow_device: Devices = False,
    locking: Locks = Locking.on,
) -> None:
    """Hold every layer against its manifest, and say which bytes of which file differ.

    Exit status: 0 all as it was, 1 something could not be verified, 2 something differs.
    """
    from addcow_mp.cli.verifying import show_verdicts
    from addcow_mp.cli.working import working
    from addcow_mp.jobs.verify import verify as job

    access = access_of(roots, allow_device, share=share, locking=locking)
    manner = manner_of(CopyWay.auto, CacheMode.writeback, None, None, idle=idle)
    with working(jobs, access, manner, progress=progress and not quiet) as conduct:
        verdicts = job(file, conduct, format_=format.value)
    raise typer.Exit(show_verdicts(file, verdicts, as_json=output is Output.json, quiet=quiet))


@command("convert")
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", callback=name_of_file)],
    destination: Annotated[
        str, typer.Argument(metavar="DST", callback=name_of_file, help="a new file")
    ],
    target_format: Annotated[OnlyRaw, typer.Option("-O", help="the new file's format")],
    format: Annotated[Format, typer.Option("-f", "--format", help="what SRC is")] = Format.addcow,
    progress: ShowProgress = False,
    quiet: Quiet = False,
    jobs: Jobs = None,
    output: HowToPrint = Output.human,
    cache: Cache = CacheMode.writeback,
    copy: CopyBy = CopyWay.auto,
    sparse: Sparse = None,
    rate: Rate = None,
    idle: Idle = False,
    share: Share = False,
    force: ForceRaw = False,
    roots: Roots = None,
    allow_device: Devices = False,
    locking: Locks = Locking.on,
) -> None:
    """Write the guest's view of SRC into a new sparse raw file."""
    from addcow_mp.cli.working import working
    from addcow_mp.jobs.convert import convert as job

    access = access_of(
        roots, allow_device, share=share, cache=cache, force=force, locking=locking, writes=True
    )
    manner = manner_of(copy, cache, sparse, rate, idle=idle, usual="4k")
    with working(jobs, access, manner, progress=progress and not quiet) as conduct:
        report = job(source, destination, source_format=format.value, conduct=conduct)
    _tell(report, "", output, quiet=quiet)


@command("compare")
def compare(
    one: Annotated[str, typer.Argument(metavar="A", callback=name_of_file)],
    other: Annotated[str, typer.Argument(metavar="B", callback=name_of_file)],
    strict: Annotated[
        bool, typer.Option("-s", help="sizes and allocation must be equal too")
    ] = False,
    format: Annotated[Format, typer.Option("-f", help="what A is")] = Format.addcow,
    other_format: Annotated[Format, typer.Option("-F", help="what B is")] = Format.addcow,
    progress: ShowProgress = False,
    quiet: Quiet = False,
    jobs: Jobs = None,
    output: HowToPrint = Output.human,
    idle: Idle = False,
    share: Share = False,
    roots: Roots = None,
    allow_device: Devices = False,
    locking: Locks = Locking.on,
) -> None:
    """Compare what the guests of two images see.

    Exit status: 0 the same, 1 they differ, 2 and more: they could not be compared.
    """
    from addcow_mp.cli.comparing import show_compared
    from addcow_mp.cli.working import working
    from addcow_mp.jobs.compare import compare as job

    access = access_of(roots, allow_device, share=share, locking=locking)
    manner = manner_of(CopyWay.auto, CacheMode.writeback, None, None, idle=idle)
    with working(jobs, access, manner, progress=progress and not quiet) as conduct:
        formats, as_json = (format.value, other_format.value), output is Output.json
        result = job(one, other, formats, strict=strict, every=as_json, conduct=conduct)
    raise typer.Exit(show_compared(one, other, result, as_json=as_json, quiet=quiet))


@command("commit")
def commit(
    file: File,
    keep: Annotated[bool, typer.Option("-d", help="leave overlay and image as they are")] = False,
    verify: Verify = False,
    progress: ShowProgress = False,
    quiet: Quiet = False,
    jobs: Jobs = None,
    output: HowToPrint = Output.human,
    format: OverlayFormat = OnlyAddcow.addcow,
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
    """Move the overlay's clusters into its backing file."""
    from addcow_mp.cli.working import working
    from addcow_mp.jobs.commit import commit as job

    access = access_of(
        roots, allow_device, cache=cache, force=force, locking=locking, writes=True, exclude=exclude
    )
    manner = manner_of(copy, cache, sparse, rate, idle=idle)
    with working(jobs, access, manner, progress=progress and not quiet) as conduct:
        report = job(file, keep=keep, verifies=verify, conduct=conduct)
    _tell(report, "Image committed.", output, quiet=quiet)


@command("flatten")
def flatten(
    file: File,
    discard: Annotated[
        bool, typer.Option("--discard", help="then remove the .add-cow file")
    ] = False,
    verify: Verify = False,
    progress: ShowProgress = False,
    quiet: Quiet = False,
    jobs: Jobs = None,
    output: HowToPrint = Output.human,
    format: OverlayFormat = OnlyAddcow.addcow,
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
    """Bring every cluster into the image file, which then is the whole disk."""
    from addcow_mp.cli.working import working
    from addcow_mp.jobs.flatten import flatten as job

    access = access_of(
        roots, allow_device, cache=cache, force=force, locking=locking, writes=True, exclude=exclude
    )
    manner = manner_of(copy, cache, sparse, rate, idle=idle)
    with working(jobs, access, manner, progress=progress and not quiet) as conduct:
        report = job(file, discard=discard, verifies=verify, conduct=conduct)
    _tell(report, "Image flattened.", output, quiet=quiet)


@command("io")
def io_(
    file: File,
    commands: Annotated[
        list[str] | None,
        typer.Option("-c", "--cmd", metavar="CMD", help="a command; default: from stdin"),
    ] = None,
    read_only: Annotated[bool, typer.Option("-r", "--read-only", help="refuse writes")] = False,
    share: Share = False,
    format: OverlayFormat = OnlyAddcow.addcow,
    force: Force = False,
    roots: Roots = None,
    exclude: Exclude = None,
    allow_device: Devices = False,
    locking: Locks = Locking.on,
) -> None:
    """Read and write as a guest would, with qemu-io's commands."""
    from addcow_mp.cli.exercising import exercise
    from addcow_mp.errors import UsageError

    if share and not read_only:
        raise UsageError(message="-U is for reading only: give -r as well")
    access = access_of(
        roots,
        allow_device,
        share=share,
        force=force,
        locking=locking,
        writes=not read_only,
        exclude=exclude,
    )
    raise typer.Exit(exercise(file, commands, access, read_only=read_only))


def access_of(
    roots: list[str] | None,
    allow_device: bool,
    *,
    share: bool = False,
    cache: CacheMode = CacheMode.writeback,
    force: bool = False,
    locking: Locking = Locking.on,
    writes: bool = False,
    exclude: list[str] | None = None,
) -> Access:
    """What the options and the environment allow a command, which ``writes`` or only looks."""
    import os

    from addcow_mp.cli.saying import warn_early
    from addcow_mp.device.access import Access
    from addcow_mp.errors import UsageError

    if cache is CacheMode.unsafe:
        warn_early(["-t unsafe: nothing is synced, a power cut may lose data whose bits are set"])
    if writes and locking is Locking.off:
        warn_early(
            ["--locking off: no locks are taken or heeded; no other program may use these files"]
        )
    if roots and "" in roots:
        raise UsageError(message="--root '': name a directory; '.' is the current one")
    if exclude and not all(exclude):
        raise UsageError(message="--exclude '': give a pattern of names, or of paths")
    everywhere = [root for root in os.environ.get("ADDCOW_ROOTS", "").split(":") if root]
    return Access(
        roots=(*(roots or ()), *everywhere),
        allow_device=allow_device,
        share=share,
        durable=cache is not CacheMode.unsafe,
        force=force,
        locking=locking is Locking.on,
        exclude=tuple(exclude or ()),
    )


def _tell(report: Report, sentence: str, output: Output, *, quiet: bool) -> None:
    from addcow_mp.cli.saying import warn

    warn(report.warnings)
    if output is Output.json:
        from addcow_mp.cli.jsontext import as_document

        print(as_document(report.as_json()))
    elif sentence and not quiet:
        print(sentence)
        if report.guest_digest is not None:
            print(f"Read back from the disk as it was before: guest digest {report.guest_digest}")


def manner_of(
    copy: CopyWay,
    cache: CacheMode,
    sparse: str | None,
    rate: str | None,
    *,
    idle: bool,
    usual: str = "0",
) -> Manner:
    """How the options want data to be moved; ``usual`` is what -S is where nothing is pinned."""
    from addcow_mp.device.moving import Copy, Manner
    from addcow_mp.errors import UsageError
    from addcow_mp.units import SECTOR, parse_size

    if sparse is None:
        block = parse_size(usual, "-S") if copy in (CopyWay.auto, CopyWay.buffer) else 0
    else:
        block = parse_size(sparse, "-S")
        # Only what is read can be looked at: who asks for it does not get it shared or passed on.
        copy = CopyWay.buffer if block and copy is not CopyWay.clone else copy
    limit = 0 if rate is None else parse_size(rate, "--limit-rate")
    if block % SECTOR:
        raise UsageError(message=f"invalid -S '{sparse}': give a multiple of {SECTOR}, or 0")
    return Manner(Copy(copy.value), cache is CacheMode.none, block, limit, idle)
