"""Prints lists of images in one shape, and explains empty ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from addcow_mp.cli.jsontext import print_document, print_line
from addcow_mp.cli.messages import say
from addcow_mp.cli.options import ListPrinting
from addcow_mp.farm.places import Found, reasons_for_nothing

#: The state of what could not be examined.
NOT_EXAMINED = "not-examined"


def print_list(
    printing: ListPrinting,
    images: Iterable[Mapping[str, object]],
    rest: Mapping[str, object],
    print_lines: Callable[[], None],
) -> None:
    """Print ``images`` and the ``rest``, what concerns all of them.

    JSON is one document, or a line for each image and one for the rest. For people,
    ``print_lines`` is called.
    """
    if printing.output == "human":
        print_lines()
    elif printing.output == "json":
        print_document({"images": list(images), **rest})
    else:
        for one in images:
            print_line(one)
        if rest:
            print_line(rest)


def explain(found: Found, listed: Collection[str], *, quiet: bool = False) -> None:
    """Say on stderr why places have no overlays but ``listed``.

    With ``quiet``, only if files were given and none of them is an overlay, which is an error.
    """
    if not quiet or (found.named and not listed):
        for line in reasons_for_nothing(found, listed):
            say(line)
