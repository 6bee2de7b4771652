"""Problems with one cause, told together: on a terminal thousands of equal lines hide all others.

Two problems have one cause when they are of one kind and say the same, names and numbers apart.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from addcow_mp.errors import AddcowError

#: Names that are shown of those that have one problem.
EXAMPLES = 3

#: Fields of errors that name files.
_NAMES = ("path", "directory", "roots", "dependants")

_LEFT_OUT = "..."
_NAMED = re.compile(r"'[^']*'|(?<![\w.])/[^\s;,]+|\d+")


class Problem(NamedTuple):
    """What is wrong with the image ``name``, in the words of ``line``."""

    name: str
    line: str
    state: str
    error: AddcowError


def tell_causes(problems: Iterable[Problem], tell: Callable[[str], None]) -> None:
    """Tell of each problem, and of those with one cause in one line, in the order of the first."""
    causes: defaultdict[tuple[str, ...], list[Problem]] = defaultdict(list)
    for one in problems:
        causes[one.state, type(one.error).__name__, _without_names(one.error)].append(one)
    for same in causes.values():
        tell(same[0].line if len(same) == 1 else _together(same))


def _together(same: list[Problem]) -> str:
    first = same[0]
    told = {str(one.error).removeprefix(f"{one.name}: ") for one in same}
    said = told.pop() if len(told) == 1 else _without_names(first.error)
    examples = ", ".join(one.name for one in same[:EXAMPLES])
    return f"{first.state}: {len(same)} images: {said}; for example {examples}"


def _without_names(error: AddcowError) -> str:
    """What an error says, with all that names a file, and numbers, left out."""
    kept = {key: _LEFT_OUT if key in _NAMES else one for key, one in error.fields.items()}
    text = _NAMED.sub(_LEFT_OUT, error.template.format(**kept))
    return text.removeprefix(f"{_LEFT_OUT}: ")
