"""Prints lists in one shape: ``images`` and what is said of all of them together.

JSON is one document, ``jsonl`` a line for each image and one for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from addcow_mp.cli.jsontext import print_document, print_line
from addcow_mp.cli.options import ListPrinting

#: The state of what could not be examined.
NOT_EXAMINED = "not-examined"


def print_list(
    printing: ListPrinting,
    images: Iterable[Mapping[str, object]],
    rest: Mapping[str, object],
    print_lines: Callable[[], None],
) -> None:
    """Print ``images`` and the ``rest`` as JSON; for people call ``print_lines``."""
    if printing.output == "human":
        print_lines()
    elif printing.output == "json":
        print_document({"images": list(images), **rest})
    else:
        for one in images:
            print_line(one)
        if rest:
            print_line(rest)


def print_counts(counts: Mapping[str, int]) -> None:
    """Print counts in one line, each before its key."""
    print(", ".join(f"{count} {key}" for key, count in counts.items()).replace("-", " "))
