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

    def chosen(self) -> dict[str, str]:
        """All options by their names in ``-o``. Raises :class:`UsageError`."""
        chosen = _parse_options(self.options or [])
        for key, value in (("backing_file", self.backing), ("backing_fmt", self.backing_format)):
            if value is not None and chosen.setdefault(key, value) != value:
                problem = f"'{value}' and -o {key}={chosen[key]} contradict each other"
                raise UsageError(message=f"{problem}; give one")
        return chosen


def command(
    *,
    file: Annotated[str | None, file_argument("FILE", "the file to create")] = None,
    size: Annotated[
        str | None,
        typer.Argument(metavar="[SIZE]", help="virtual size; default: the image's, or backing's"),
    ] = None,
    format: FileFormat = "add-cow",
    backing: _Backing,
    quiet: Quiet = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="accept a raw file that begins like another format, an image file with "
            "several hard links, and one of another overlay as backing file",
        ),
    ] = False,
    exclude: Exclude = None,
    opening: Opening,
) -> None:
    """Create an overlay, or a raw file with -f raw. Existing files are never overwritten."""
    access = opening.access(force=force, writes=True, exclude=exclude)
    if any(option in ("help", "?") for option in backing.options or []):
        print("Supported options:")
        for name, meaning in OPTIONS.items():
            print(f"  {name:<16} - {meaning}")
        return
    if file is None:
        raise UsageError(message="Missing argument 'FILE'; see 'addcow create --help'")
    refuse_existing(file)
    number = None if size is None else parse_size(size)
    create = _create_raw if format == "raw" else _create_overlay
    line = create(file, number, backing.chosen(), access)
    if not quiet:
        print(one_line(f"Formatting '{file}', {line}"))


def _parse_options(texts: Iterable[str]) -> dict[str, str]:
    """Parse ``key=value,key=value``; a comma inside a value is doubled."""
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


def _create_raw(file: str, size: int | None, options: dict[str, str], _: Access) -> str:
    """Create a raw file; returns its properties as text."""
    if options:
        raise UsageError(message=f"{', '.join(options)}: a raw file has no such options")
    if size is None:
        raise UsageError(message=f"{file}: a raw file needs a size")
    create_raw(file, size)
    job_is_done()
    return f"fmt=raw size={size}"


def _create_overlay(file: str, size: int | None, options: dict[str, str], access: Access) -> str:
    """Create an overlay; returns its properties as text."""
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
    shown = {"image_file": os.path.basename(default_image(file)), **options}
    names = "".join(
        f" {key}='{shown[key]}'" for key in ("backing_file", "image_file") if key in shown
    )
    return f"fmt=add-cow size={made.size}{names} cluster_size={cluster_size}"
