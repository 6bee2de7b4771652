"""JSON output: one document, or one object a line.

File names are bytes, and JSON is text. A name that is not UTF-8 appears with an escape for each
invalid byte (a lone surrogate, U+DC80 to U+DCFF), which few programs turn back into the byte. So
the key ``KEY-base64`` beside such a ``KEY`` holds the bytes. A list of names has a list of the same
length beside it.
"""

from __future__ import annotations

import json
import os
from binascii import b2a_base64
from collections.abc import Iterator, Sequence

from addcow_mp.cli import results

SUFFIX = "-base64"


def as_line(value: object) -> str:
    """``value`` as one line of JSON."""
    return json.dumps(with_bytes(value))


def print_line(value: object) -> None:
    """Print ``value`` as one line of JSON."""
    print(as_line(value))


def print_document(value: object) -> None:
    """Print ``value`` as the only JSON document of this command."""
    results.document_is_printed()
    print(json.dumps(with_bytes(value), indent=4))


def print_failure(form: str, message: str, status: int, path: str | None) -> None:
    """Print why the command failed, in the ``form`` of its output.

    ``jsonl``: one more line; ``json``: the document, unless it is printed already.
    """
    failure = failure_json(message, status, path)
    if form == "jsonl":
        print_line(failure)
    elif form == "json" and not results.is_document_printed():
        print_document(failure)


def failure_json(message: str, status: int, path: object | None) -> dict[str, object]:
    """Why a command failed, or its work on one of several files."""
    about = {} if path is None else {"filename": path}
    return {"error": message, **about, "exit": status}


def form_of(arguments: Sequence[str]) -> str:
    """The value of ``--output`` on a command line that may be invalid."""
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
    """``value`` with ``KEY-base64`` beside each ``KEY`` whose text is not the name's bytes."""
    if isinstance(value, dict):
        return dict(_entries(value))
    if isinstance(value, list | tuple):
        return [with_bytes(one) for one in value]
    return value


def _entries(items: dict[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in items.items():
        yield key, with_bytes(value)
        names = list(value) if isinstance(value, list | tuple) else [value]
        texts = [one for one in names if isinstance(one, str)]
        if len(texts) == len(names) and not all(map(_is_text, texts)):
            encoded = list(map(_base64, texts))
            yield key + SUFFIX, encoded[0] if isinstance(value, str) else encoded


def _is_text(name: str) -> bool:
    """Whether the bytes of ``name`` are its text in UTF-8."""
    if name.isascii():
        return True
    try:
        return name.encode() == os.fsencode(name)
    except UnicodeEncodeError:  # the escape of a byte, or a character that the locale lacks
        return False


def _base64(name: str) -> str:
    try:
        raw = os.fsencode(name)
    except UnicodeEncodeError:
        raw = name.encode("utf-8", "backslashreplace")
    return b2a_base64(raw, newline=False).decode()
