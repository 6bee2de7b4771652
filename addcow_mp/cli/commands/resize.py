"""``addcow resize``: another virtual size for an overlay."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from addcow_mp.cli.options import JobChangeOptions, OverlayFile, Printing
from addcow_mp.units import parse_size_change

#: ``-1G`` as a word of the command line.
_LESS = re.compile(r"-(\d[\d.]*[a-z]?)", re.IGNORECASE | re.ASCII)

#: Stands for the hyphen of a size while the words are parsed: no file name contains it.
_HYPHEN = "\0"


class _Command(TyperCommand):
    """A command that takes ``-1G`` for a size and not for an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words with the hyphens of sizes replaced."""
        return super().parse_args(ctx, [_LESS.sub(_hidden, word, count=1) for word in args])


def _hidden(match: re.Match[str]) -> str:
    is_whole = match.span() == (0, len(match.string))
    return f"{_HYPHEN}{match[1]}" if is_whole else match[0]


SETTINGS = {"cls": _Command}


def command(
    *,
    overlay: OverlayFile,
    size: Annotated[
        str, typer.Argument(metavar="[+|-]SIZE", help="the new size; + or -: so much more or less")
    ],
    shrink: Annotated[
        bool, typer.Option("--shrink", help="allow a smaller size, which deletes what lies behind")
    ] = False,
    printing: Printing,
    changing: JobChangeOptions,
) -> None:
    """Change the virtual size. A new part reads as zeros."""
    from addcow_mp.jobs.resize import resize

    change = parse_size_change(size.replace(_HYPHEN, "-"))
    access = changing.access(force=changing.force, writes=True, exclude=changing.exclude)
    report = resize(overlay.file, change, shrink=shrink, access=access)
    printing.report(report, "Image resized.")
