"""``addcow create``: a new overlay, or a raw file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Annotated

import typer

from addcow_mp.cli.messages import one_line, warn
from addcow_mp.cli.options import (
    Exclude,
    FileFormat,
    Format,
    Opening,
    OptionGroup,
    Quiet,
    file_argument,
    name_of_file,
)
from addcow_mp.cli.results import job_is_done
from addcow_mp.device.access import Access
from addcow_mp.errors import UsageError
from addcow_mp.jobs.create import (
    DEFAULT_CLUSTER_SIZE,
    create_raw,
    default_image,
    refuse_existing,
)
from addcow_mp.jobs.create import create as job
from addcow_mp.units import parse_size

OPTIONS = {
    "backing_file": "File name of a base image",
    "backing_fmt": "Format of the base image: raw or add-cow",
    "image_file": "File name of the image file (default: FILE with .raw for its suffix)",
    "image_fmt": "Format of the image file: raw",
    "cluster_size": "Cluster size, a power of two from 4k to 2M (default: 64k)",
}


class _Backing(OptionGroup):
    """The backing file and other properties of the new overlay."""

    backing: Annotated[
        str | None, typer.Option("-b", metavar="FILE", callback=name_of_file, help="backing file")
    ] = None
    backing_format: Annotated[
        str | None, typer.Option("-F", metavar="FMT", help="the backing file's format")
    ] = None
    options: Annotated[
        list[str] | None, typer.Option("-o", metavar="KEY=VALUE,...", help="'-o help' lists them")
    ] = None

    @property
    def asks_for_help(self) -> bool:
        """Whether the options are to be listed."""
        return any(option in ("help", "?") for option in self.options or [])

    def chosen(self) -> dict[str, str]:
        """All options by their names in ``-o``. Raises :class:`UsageError`."""
        given = {"backing_file": self.backing, "backing_fmt": self.backing_format}
        named = {key: value for key, value in given.items() if value is not None}
        return _merged(parse_options(self.options or []), named)


def command(
    *,
    file: Annotated[str | None, file_argument("FILE", "the file to create")] = None,
    size: Annotated[
        str | None,
        typer.Argument(metavar="[SIZE]", help="virtual size; default: the image's, or backing's"),
    ] = None,
    format: FileFormat = Format.addcow,
    backing: _Backing,
    quiet: Quiet = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="take as raw what begins as another format does, and an image file that has "
            "several hard links",
        ),
    ] = False,
    exclude: Exclude = None,
    opening: Opening,
) -> None:
    """Create an overlay, or a raw file with -f raw. Nothing existing is overwritten."""
    access = opening.access(force=force, writes=True, exclude=exclude)
    if backing.asks_for_help:
        _print_options()
        return
    if file is None:
        raise UsageError(message="Missing argument 'FILE'; see 'addcow create --help'")
    refuse_existing(file)
    bytes_ = None if size is None else parse_size(size)
    chosen = backing.chosen()
    if format is Format.raw:
        _create_raw(file, bytes_, chosen, quiet=quiet)
    else:
        _create_overlay(file, bytes_, chosen, access, quiet=quiet)


def _print_options() -> None:
    print("Supported options:")
    for name, meaning in OPTIONS.items():
        print(f"  {name:<16} - {meaning}")


def parse_options(texts: Iterable[str]) -> dict[str, str]:
    """Read ``key=value,key=value``; a comma inside a value is written twice."""
    found: dict[str, str] = {}
    for text in texts:
        for part in re.findall(r"(?:[^,]|,,)+", text):
            key, equals, value = part.replace(",,", ",").partition("=")
            if not equals or key not in OPTIONS:
                raise UsageError(
                    message=f"unknown option '{part}' in -o; the options are {', '.join(OPTIONS)}"
                )
            if value == "-" and key.endswith("_file"):
                problem = f"-o {part}: '-' is not a file name here; a file of that name is './-'"
                raise UsageError(message=problem)
            found[key] = value
    return found


def _merged(options: dict[str, str], given: dict[str, str]) -> dict[str, str]:
    for key, value in given.items():
        if options.get(key, value) != value:
            raise UsageError(
                message=f"'{value}' and -o {key}={options[key]} contradict each other; give one"
            )
    return {**options, **given}


def _create_raw(file: str, size: int | None, options: dict[str, str], *, quiet: bool) -> None:
    if options:
        raise UsageError(message=f"{', '.join(options)}: a raw file has no such options")
    if size is None:
        raise UsageError(message=f"{file}: a raw file needs a size")
    create_raw(file, size)
    job_is_done()
    if not quiet:
        print(one_line(f"Formatting '{file}', fmt=raw size={size}"))


def _create_overlay(
    file: str, size: int | None, options: dict[str, str], access: Access, *, quiet: bool
) -> None:
    cluster = options.get("cluster_size")
    cluster_size = DEFAULT_CLUSTER_SIZE if cluster is None else parse_size(cluster, "cluster_size")
    made = job(
        file,
        size=size,
        backing=options.get("backing_file"),
        backing_format=options.get("backing_fmt"),
        image=options.get("image_file"),
        image_format=options.get("image_fmt", "raw"),
        cluster_size=cluster_size,
        access=access,
    )
    job_is_done()
    warn(made.warnings)
    if not quiet:
        shown = {"image_file": os.path.basename(default_image(file)), **options}
        names = "".join(
            f" {key}='{shown[key]}'" for key in ("backing_file", "image_file") if key in shown
        )
        told = f"fmt=add-cow size={made.size}{names} cluster_size={cluster_size}"
        print(one_line(f"Formatting '{file}', {told}"))
