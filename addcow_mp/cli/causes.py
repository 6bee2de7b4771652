"""The problems of images, a line each, or a line for all problems with one cause.

On a terminal, thousands of equal lines would hide all others. Two problems have one cause if they
are of one class and their messages are equal apart from names and numbers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from addcow_mp.errors import AddcowError
from addcow_mp.farm.result import ImageResult

#: Names that are shown of the images with one problem.
EXAMPLES = 3

#: Fields of errors that name files.
_NAMES = ("path", "directory", "roots", "dependants")

_LEFT_OUT = "..."
_NAMED = re.compile(r"'[^']*'|(?<![\w.])/[^\s;,]+|\d+")


def problem_line(image: ImageResult) -> str:
    """The state of an image, its name and its problem."""
    problem = str(image.problem)
    named = problem if problem.startswith(f"{image.path}:") else f"{image.path}: {problem}"
    return f"{image.state}: {named}"


def lines_by_cause(images: Iterable[ImageResult]) -> Iterator[str]:
    """A line for each cause, in the order of the first image that has it."""
    causes: defaultdict[tuple[str, ...], list[ImageResult]] = defaultdict(list)
    for image in images:
        if image.problem is not None:
            kind, words = type(image.problem).__name__, _without_names(image.problem)
            causes[image.state, kind, words].append(image)
    for (state, _, words), same in causes.items():
        if len(same) == 1:
            yield problem_line(same[0])
            continue
        messages = {str(one.problem).removeprefix(f"{one.path}: ") for one in same}
        message = messages.pop() if len(messages) == 1 else words
        examples = ", ".join(one.path for one in same[:EXAMPLES])
        yield f"{state}: {len(same)} images: {message}; for example {examples}"


def _without_names(error: AddcowError) -> str:
    """The message of an error without the names of files, and without numbers."""
    fields = {key: _LEFT_OUT if key in _NAMES else one for key, one in error.fields.items()}
    text = _NAMED.sub(_LEFT_OUT, error.template.format(**fields))
    return text.removeprefix(f"{_LEFT_OUT}: ")
