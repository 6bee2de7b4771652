"""JSON for programs: a document, or one object a line.

The name of a file is bytes, and JSON is text. Where a value is a name that is not UTF-8, its text
has an escape for each byte that is none (a lone surrogate, U+DC80 to U+DCFF), which few programs
turn back into the byte. So ``KEY-base64`` stands beside every such ``KEY`` and holds the bytes
themselves. A list of names has a list of the same length beside it.
"""

from __future__ import annotations

import json
import os
from binascii import b2a_base64
from collections.abc import Iterator, Sequence

from addcow_mp.cli import results

SUFFIX = "-base64"


def as_document(value: object) -> str:
    """``value`` as a JSON document for people and programs."""
    return json.dumps(with_bytes(value), indent=4)


def as_line(value: object) -> str:
    """``value`` as one line of JSON."""
    return json.dumps(with_bytes(value))


def print_document(value: object) -> None:
    """Print ``value`` as the one JSON document of this command."""
    results.document_is_printed()
    print(as_document(value))


def print_line(value: object) -> None:
    """Print ``value`` as one line of JSON."""
    print(as_line(value))


def print_failure(form: str, message: str, status: int, path: str | None) -> None:
    """Print why the command failed, unless its document is printed already.

    With ``jsonl`` the failure is one line more.
    """
    about = {} if path is None else {"filename": path}
    failure = {"error": message, **about, "exit": status}
    if form == "jsonl":
        print_line(failure)
    elif form == "json" and not results.is_document_printed():
        print_document(failure)


def form_of(arguments: Sequence[str]) -> str:
    """The value of ``--output`` on a command line, which may be one that cannot be parsed."""
    form = ""
    for number, word in enumerate(arguments):
        if word == "--":
            break
        if word.startswith("--output="):
            form = word.partition("=")[2]
        elif word == "--output":
            form = "".join(arguments[number + 1 : number + 2])
    return form


def with_bytes(value: object) -> object:
    """``value``, with ``KEY-base64`` beside each ``KEY`` whose text stands for other bytes."""
    if isinstance(value, dict):
        return dict(_entries(value))
    if isinstance(value, list | tuple):
        return [with_bytes(one) for one in value]
    return value


def _entries(items: dict[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in items.items():
        yield key, with_bytes(value)
        names = _strings(value)
        if not all(map(_is_text, names)):
            each = list(map(_base64, names))
            yield key + SUFFIX, each[0] if isinstance(value, str) else each


def _strings(value: object) -> list[str]:
    """``value`` if it is a string or a list of nothing but strings, as a list."""
    if isinstance(value, str):
        return [value]
    listed = list(value) if isinstance(value, list | tuple) else []
    names = [one for one in listed if isinstance(one, str)]
    return names if len(names) == len(listed) else []


def _is_text(name: str) -> bool:
    """Whether the bytes of ``name`` are its text in UTF-8."""
    if name.isascii():
        return True
    try:
        return name.encode() == os.fsencode(name)
    except UnicodeEncodeError:  # the escape of a byte, or a character the locale does not have
        return False


def _base64(name: str) -> str:
    try:
        raw = os.fsencode(name)
    except UnicodeEncodeError:
        raw = name.encode("utf-8", "backslashreplace")
    return b2a_base64(raw, newline=False).decode()
