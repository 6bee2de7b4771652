"""Exclusions: the files and directories that the user leaves out of a search.

A pattern without a slash is matched with the name of each file and directory. A pattern with a
slash is matched with the whole path, or with as many names at the end of the path as the pattern
has; ``*`` also matches slashes. A pattern that ends with a slash matches directories only.
"""

from __future__ import annotations

import glob
import os
import re
from fnmatch import translate
from functools import lru_cache

#: Real paths of directories that are remembered: those that are being listed.
REMEMBERED = 64


class Exclusions:
    """The patterns of what is left out."""

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self._patterns = [_Pattern(one) for one in patterns]

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def matches(self, path: str, *, is_directory: bool = True) -> bool:
        """Whether the file or directory at ``path`` is left out."""
        if not self._patterns:
            return False
        spellings = _spellings(path)
        return any(one.matches(spellings, is_directory=is_directory) for one in self._patterns)


@lru_cache(maxsize=REMEMBERED)
def exclusions(patterns: tuple[str, ...]) -> Exclusions:
    """The exclusions of these patterns."""
    return Exclusions(patterns)


def _spellings(path: str) -> tuple[str, ...]:
    """The path as given, as an absolute path, and without links in its directory."""
    plain = os.path.normpath(path)
    full = os.path.abspath(plain)
    directory, name = os.path.split(full)
    return plain, full, os.path.join(_real(directory), name)


@lru_cache(maxsize=REMEMBERED)
def _real(directory: str) -> str:
    return os.path.realpath(directory)


class _Pattern:
    def __init__(self, text: str) -> None:
        self._only_directories = text.endswith("/")
        whole = _absolute(text.rstrip("/") or "/")
        self._names = 0 if whole.startswith("/") else whole.count("/") + 1
        self._regexes = [re.compile(translate(one)) for one in {whole, _without_links(whole)}]

    def matches(self, spellings: tuple[str, ...], *, is_directory: bool) -> bool:
        if self._only_directories and not is_directory:
            return False
        if self._names == 1:
            return self._matches(os.path.basename(spellings[0]))
        return any(self._matches(one) or self._matches(self._end_of(one)) for one in spellings)

    def _matches(self, text: str) -> bool:
        return any(regex.match(text) for regex in self._regexes)

    def _end_of(self, path: str) -> str:
        return "/".join(path.split("/")[-self._names :]) if self._names else path


def _absolute(text: str) -> str:
    """A pattern that begins with ``./`` or ``../`` as an absolute one; others unchanged."""
    directory, rest = "", text
    while rest.startswith(("./", "../")):
        first, _, rest = rest.partition("/")
        directory = os.path.join(directory, first)
    if not directory:
        return text
    return glob.escape(os.path.abspath(directory)).rstrip("/") + "/" + rest


def _without_links(pattern: str) -> str:
    """An absolute pattern with the links in its leading directories resolved."""
    if not pattern.startswith("/"):
        return pattern
    directory, slash, _ = re.split(r"[*?[]", pattern, maxsplit=1)[0].rpartition("/")
    return glob.escape(os.path.realpath(directory + slash)).rstrip("/") + pattern[len(directory) :]
