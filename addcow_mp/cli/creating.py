"""The ``create`` command: its ``-o`` options and the line it prints."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from addcow_mp.cli.results import job_is_done
from addcow_mp.cli.saying import one_line, warn
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


def create(
    format_: str,
    file: str | None,
    size: str | None,
    backing: str | None,
    backing_format: str | None,
    options: list[str],
    access: Access,
    *,
    quiet: bool,
) -> None:
    """Create ``file`` and print what was made."""
    if any(option in ("help", "?") for option in options):
        _print_options()
        return
    if file is None:
        raise UsageError(message="Missing argument 'FILE'; see 'addcow create --help'")
    refuse_existing(file)
    bytes_ = None if size is None else parse_size(size)
    given = {"backing_file": backing, "backing_fmt": backing_format}
    chosen = _merged(parse_options(options), {k: v for k, v in given.items() if v is not None})
    if format_ == "raw":
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
