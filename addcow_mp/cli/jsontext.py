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
from collections.abc import Iterator

SUFFIX = "-base64"


def as_document(value: object) -> str:
    """``value`` as a JSON document for people and programs."""
    return json.dumps(with_bytes(value), indent=4)


def as_line(value: object) -> str:
    """``value`` as one line of JSON."""
    return json.dumps(with_bytes(value))


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
