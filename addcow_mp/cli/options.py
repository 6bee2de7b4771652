"""The options of all commands, each declared once.

Options that several commands share form a *group*: a class with annotated attributes. A command
takes a group as one parameter; a group may contain other groups. :func:`expanded` makes the
attributes options of the command line and passes the filled group to the command. So an option has
the same name, meaning and help text everywhere, and the signature of a command shows only its own
options.

A group also turns its options into the arguments of a job: access to files, copy options, printing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_type_hints

import typer

from addcow_mp.cli import messages
from addcow_mp.errors import UsageError

if TYPE_CHECKING:
    from addcow_mp.device.access import Access
    from addcow_mp.device.copying import CopyOptions
    from addcow_mp.jobs.options import Hooks, RunOptions
    from addcow_mp.jobs.report import Report

Names = TypeVar("Names", str, str | None, list[str] | None)


# Groups


class OptionGroup:
    """Options that several commands share: annotated attributes and their defaults."""

    def __init__(self, **values: object) -> None:
        self.__dict__.update(values)


def expanded(command: Callable[..., Any]) -> Callable[..., Any]:
    """``command`` with the options of its groups as parameters of their own."""
    hints = get_type_hints(command, include_extras=True)
    parameters: list[Parameter] = []
    for parameter in signature(command).parameters.values():
        hint = hints[parameter.name]
        if _is_group(hint):
            parameters += _members(hint)
        else:
            parameters.append(parameter.replace(annotation=hint, kind=Parameter.KEYWORD_ONLY))

    def call(**given: Any) -> Any:
        groups = {name: _filled(hint, given) for name, hint in hints.items() if _is_group(hint)}
        return command(**given, **groups)

    call.__doc__ = command.__doc__
    call.__annotations__ = {one.name: one.annotation for one in parameters}
    call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return call


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, OptionGroup)


def _hints(group: type[OptionGroup]) -> dict[str, Any]:
    """The options of a group and the groups in it; other attributes are no options."""
    hints = get_type_hints(group, include_extras=True)
    return {
        name: hint
        for name, hint in hints.items()
        if _is_group(hint) or hasattr(hint, "__metadata__")
    }


def _members(group: type[OptionGroup]) -> Iterator[Parameter]:
    """The options of ``group`` and of the groups in it."""
    for name, hint in _hints(group).items():
        if _is_group(hint):
            yield from _members(hint)
        else:
            default = getattr(group, name, Parameter.empty)
            yield Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _filled(group: type[OptionGroup], given: dict[str, Any]) -> OptionGroup:
    """``group`` with its options, which are taken out of ``given``."""
    values = {
        name: _filled(hint, given) if _is_group(hint) else given.pop(name)
        for name, hint in _hints(group).items()
    }
    return group(**values)


# Choices

Output = Literal["human", "json"]
Listing = Literal["human", "json", "jsonl"]
ProgressForm = Literal["human", "json"]
CacheMode = Literal["writeback", "none", "unsafe"]
CopyChoice = Literal["auto", "clone", "range", "buffer", "map"]
Locking = Literal["on", "off"]
OnError = Literal["skip", "stop"]

#: The formats that are opened natively.
Format = Literal["add-cow", "raw"]
#: The format of commands about overlays.
OnlyAddcow = Literal["add-cow"]
#: The format that convert writes.
OnlyRaw = Literal["raw"]


# Callbacks


def name_of_file(given: Names) -> Names:
    """The name of a file, or several, as given. Raises :class:`UsageError` for ``-`` and none."""
    for name in [given] if isinstance(given, str) else given or []:
        if not name:
            raise UsageError(message="'' is not a file name; name a file")
        if name == "-":
            raise UsageError(message="'-' is not a file name here; a file of that name is './-'")
    return given


def _set_quiet(quiet: bool) -> bool:
    messages.set_quiet(quiet=quiet)
    return quiet


def file_argument(metavar: str, help_: str = "") -> Any:
    """An argument that names a file."""
    return typer.Argument(metavar=metavar, callback=name_of_file, help=help_)


# Single options

Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", callback=_set_quiet, help="print nothing but errors")
]
LockingOption = Annotated[
    Locking, typer.Option("--locking", help="off: take no locks and ignore those of others")
]

File = Annotated[str, file_argument("FILE", "the .add-cow file")]
Files = Annotated[list[str], file_argument("FILE...", "the .add-cow files")]
AnyFiles = Annotated[list[str], file_argument("FILE...", "the images")]
AnyFile = Annotated[str, file_argument("FILE", "the image")]
OverlayFormat = Annotated[
    OnlyAddcow, typer.Option("-f", "--format", help="format of FILE; never guessed")
]
FileFormat = Annotated[Format, typer.Option("-f", "--format", help="format of FILE")]
Force = Annotated[
    bool,
    typer.Option(
        "--force", help="change files that other overlays need, or that have several hard links"
    ),
]
ForceRaw = Annotated[
    bool, typer.Option("--force", help="accept a raw file that begins like another format")
]
Share = Annotated[
    bool, typer.Option("-U", "--force-share", help="read although others may be writing")
]
Verify = Annotated[
    bool, typer.Option("--verify", help="read back from the disk what was written, and compare")
]
Rate = Annotated[
    str | None,
    typer.Option("-r", "--limit-rate", metavar="RATE", help="bytes per second, all workers"),
]
TimeLimit = Annotated[
    str | None,
    typer.Option("--time-limit", metavar="TIME", help="stop after 90s, 30m, 2h; the rest is left"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="only say what would be done")]
Discard = Annotated[bool, typer.Option("--discard", help="then remove the .add-cow file")]
NoManifest = Annotated[
    bool,
    typer.Option("--no-manifest", help="make no new manifests in place of those that are removed"),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="PATTERN",
        help="files to leave out of searches: a name, or a path with a slash",
    ),
]
StateFile = Annotated[
    str,
    typer.Option(
        "--state", metavar="FILE", callback=name_of_file, help="the results, an SQLite database"
    ),
]


# Opening files


class Opening(OptionGroup):
    """Which files a command may open, and whether it locks them."""

    roots: Annotated[
        list[str] | None,
        typer.Option(
            "--root",
            metavar="DIR",
            help="names inside images may lead beneath DIR too; also ADDCOW_ROOTS=DIR:DIR",
        ),
    ] = None
    allow_device: Annotated[bool, typer.Option("--allow-device", help="open block devices too")] = (
        False
    )
    locking: LockingOption = "on"

    def access(
        self,
        *,
        share: bool = False,
        force: bool = False,
        durable: bool = True,
        writes: bool = False,
        exclude: list[str] | None = None,
    ) -> Access:
        """What the options and the environment allow; ``writes``: warn about missing locks."""
        from addcow_mp.device.access import Access

        if self.roots and "" in self.roots:
            raise UsageError(message="--root '': name a directory; '.' is the current one")
        if exclude and not all(exclude):
            raise UsageError(message="--exclude '': give a pattern of names, or of paths")
        if not durable:
            messages.warn_early(
                "-t unsafe: nothing is synced, a power cut may lose data whose bits are set"
            )
        if writes and self.locking == "off":
            messages.warn_early(
                "--locking off: locks are neither taken nor respected; "
                "no other program may use these files"
            )
        environment = filter(None, os.environ.get("ADDCOW_ROOTS", "").split(":"))
        return Access(
            roots=(*(self.roots or ()), *environment),
            allow_device=self.allow_device,
            share=share,
            durable=durable,
            force=force,
            locking=self.locking == "on",
            exclude=tuple(exclude or ()),
        )


class OverlayFile(OptionGroup):
    """The overlay that a command is about."""

    file: File
    format: OverlayFormat = "add-cow"


class OverlayFiles(OptionGroup):
    """The overlays that a command is about."""

    files: Files
    format: OverlayFormat = "add-cow"


# Printing


class Printing(OptionGroup):
    """How one result is printed."""

    output: Annotated[Output, typer.Option("--output", help="human or json")] = "human"
    quiet: Quiet = False

    @property
    def as_json(self) -> bool:
        """Whether the result is printed as JSON."""
        return self.output == "json"

    def report(self, report: Report, sentence: str) -> None:
        """Print the result of a job: its ``sentence``, or its report as JSON."""
        from addcow_mp.cli.jsontext import print_document

        messages.warn(report.warnings)
        if self.as_json:
            print_document(report.as_json())
        elif not self.quiet:
            if sentence:
                print(sentence)
            messages.print_manifests_gone(report.manifests_gone)
            if report.guest_digest is not None:
                digest = report.guest_digest
                print(f"Read back from the disk as it was before: guest digest {digest}")


class ListPrinting(OptionGroup):
    """How a list is printed."""

    output: Annotated[Listing, typer.Option("--output", help="human, json or jsonl")] = "human"
    quiet: Quiet = False


# Doing work


class CopyingOptions(OptionGroup):
    """How data is copied, and whether it is synced."""

    cache: Annotated[
        CacheMode,
        typer.Option(
            "-t",
            "--cache",
            help="writeback; none: past the page cache, whatever --copy; unsafe: no syncs",
        ),
    ] = "writeback"
    copy: Annotated[
        CopyChoice,
        typer.Option(
            "--copy",
            help="pin one method of copying; map: from a mapping of the source, seldom faster",
        ),
    ] = "auto"
    sparse: Annotated[
        str | None,
        typer.Option(
            "-S",
            metavar="SIZE",
            help="blocks of so many zeros become holes; 0 = do not look; clones only with "
            "--copy clone",
        ),
    ] = None
    rate: Rate = None

    @property
    def durable(self) -> bool:
        """Whether syncs are carried out."""
        return self.cache != "unsafe"

    def copy_options(self, *, usual: int = 0) -> CopyOptions:
        """How to copy; ``usual`` is the default of -S for *auto* and *buffer*."""
        from addcow_mp.device.copying import CopyOptions
        from addcow_mp.units import parse_size

        block = None if self.sparse is None else parse_size(self.sparse, "-S")
        direct, rate = self.cache == "none", rate_of(self.rate)
        return CopyOptions.chosen(self.copy, block, direct=direct, rate=rate, usual=usual)


def rate_of(text: str | None) -> int:
    """Bytes per second; 0 = no limit."""
    from addcow_mp.units import parse_size

    return 0 if text is None else parse_size(text, "--limit-rate")


def time_limit(text: str | None) -> Callable[[], bool]:
    """A function that says whether the time limit, which begins now, is over."""
    from addcow_mp.jobs.options import late_after
    from addcow_mp.units import parse_duration

    return late_after(None if text is None else parse_duration(text, "--time-limit"))


class ChangeOptions(Opening):
    """Which files a job may change."""

    force: Force = False
    exclude: list[str] | None = None

    def access_for(
        self, copying: CopyingOptions, *, writes: bool = True, exclude: list[str] | None = None
    ) -> Access:
        """What the options allow a job that copies with ``copying``."""
        return self.access(
            force=self.force,
            durable=copying.durable,
            writes=writes,
            exclude=exclude or self.exclude,
        )


class JobChangeOptions(ChangeOptions):
    """The same for one image, with files to leave out of the search for other overlays."""

    exclude: Exclude = None


class Workers(OptionGroup):
    """Worker processes, and their disk priority."""

    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", min=0, help="worker processes; 0 = in this process  [default: usable CPUs]"
        ),
    ] = None
    idle: Annotated[
        bool, typer.Option("--idle", help="use the disk only when no other program does")
    ] = False

    def copy_options(self, rate: str | None = None) -> CopyOptions:
        """The options of a command that only reads."""
        from addcow_mp.device.copying import CopyOptions

        return CopyOptions(rate=rate_of(rate))

    @contextmanager
    def working(
        self,
        access: Access,
        copy_options: CopyOptions,
        progress: ProgressOptions,
        *,
        quiet: bool = False,
    ) -> Iterator[tuple[RunOptions, Hooks]]:
        """The settings and hooks of a job that shows ``progress``; signals stop the job."""
        from addcow_mp.cli.working import working
        from addcow_mp.jobs.options import RunOptions

        options = RunOptions(self.jobs, access, copy_options, idle=self.idle)
        shown, counts = progress.chosen(quiet=quiet), progress.counts_images
        with working(shown, idle=self.idle, counts_images=counts, quiet=quiet) as hooks:
            yield options, hooks


class ProgressOptions(OptionGroup):
    """Whether, how and where progress is shown."""

    counts_images = False

    bar: Annotated[bool, typer.Option("-p", help="show progress on stderr")] = False
    form: Annotated[
        ProgressForm | None,
        typer.Option("--progress-format", help="progress for users, or as JSON lines"),
    ] = None
    progress_fd: Annotated[
        int | None,
        typer.Option(
            "--progress-fd", metavar="N", min=0, help="write progress to N, as JSON lines"
        ),
    ] = None

    #: The former meanings of ``--progress``, which are options of the groups below.
    old_bar: bool = False
    old_form: ProgressForm | None = None

    def chosen(self, *, quiet: bool) -> tuple[str | None, int | None]:
        """The form of progress, None for no progress, and the descriptor it is written to."""
        form = self.form or self.old_form
        if form is None and (self.bar or self.old_bar) and not quiet:
            form = "human"
        return form, self.progress_fd


class JobProgress(ProgressOptions):
    """The same for one image; ``--progress`` is the former name of ``-p``."""

    old_bar: Annotated[bool, typer.Option("--progress", hidden=True)] = False


class FarmProgress(ProgressOptions):
    """The same for a farm; ``--progress`` is the former name of ``--progress-format``."""

    counts_images = True

    old_form: Annotated[ProgressForm | None, typer.Option("--progress", hidden=True)] = None


# Farms


class Places(OptionGroup):
    """Where a farm's images are, and what is left out."""

    places: Annotated[
        list[str] | None, file_argument("PLACE...", "directories, files, patterns")
    ] = None
    from_file: Annotated[
        str | None,
        typer.Option("--from-file", metavar="FILE", help="more places, one a line; - is stdin"),
    ] = None
    null: Annotated[
        bool,
        typer.Option("-0", "--null", help="names in --from-file end with NUL, as of find -print0"),
    ] = False
    exclude: Exclude = None

    def listed(self) -> list[str]:
        """All places that are named. Raises :class:`UsageError` for none."""
        if self.null and self.from_file is None:
            raise UsageError(message="-0 is about the names in --from-file: give both")
        separator = b"\0" if self.null else b"\n"
        read = [] if self.from_file is None else _names_in(self.from_file, separator)
        listed = [*(self.places or ()), *read]
        if not listed:
            raise UsageError(
                message="name at least one directory or file; see 'addcow farm --help'"
            )
        return listed


def _names_in(path: str, separator: bytes) -> list[str]:
    """The names in a file; a name is bytes, whatever the locale."""
    if path == "-":
        content = sys.stdin.buffer.read()
    else:
        with open(path, "rb") as file:
            content = file.read()
    return [os.fsdecode(name) for name in content.split(separator) if name]
