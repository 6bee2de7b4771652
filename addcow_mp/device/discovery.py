"""Discovery: the files in directories, and what could not be looked at, with the reason.

Directories are listed one by one. A directory, a file or a link that the system does not let us
look at is part of the answer: it may hold what is sought, so no caller may take it for nothing.
Only regular files count, and links to them. Links to directories are counted and not followed;
links that lead nowhere, sockets, FIFOs and devices are no images.

What the user excludes is not looked at and not in the answer, and excluded directories are not
entered. A pattern without a slash is matched with the name of each file and directory that is
met, one with a slash with its whole path, or with as many names at the end of that as the pattern
has; ``*`` in it stands for slashes too. With a slash at its end it is for directories alone.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import translate
from functools import lru_cache

from addcow_mp.device.access import pseudo_devices

#: Answers that mean that nothing is there, and not that it is hidden from us.
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)

#: Directories whose real paths are remembered: those that are being listed.
REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class Unexamined:
    """A directory or a file that could not be looked at.

    ``absent``: nothing is there any more, or a link that leads in circles.
    """

    path: str
    reason: str
    is_directory: bool = False
    absent: bool = False

    @classmethod
    def of(
        cls, path: str, error: OSError | ValueError, *, is_directory: bool = False
    ) -> Unexamined:
        """What ``error`` says of ``path``; a NUL byte in it is a ValueError."""
        number = error.errno if isinstance(error, OSError) else errno.EINVAL
        reason = getattr(error, "strerror", None) or str(error)
        return cls(path, reason, is_directory, number in ABSENT)


def is_gone(path: str) -> bool:
    """Whether nothing has this name; what cannot be looked at is not gone."""
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ENOTDIR)
    return False


# What is left out


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
    """A path as it was met, as an absolute one, and without links on the way."""
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
        whole = _anchored(text.rstrip("/") or "/")
        self._names = 0 if whole.startswith("/") else whole.count("/") + 1
        self._regexes = [re.compile(translate(one)) for one in {whole, _without_links(whole)}]

    def matches(self, spellings: tuple[str, ...], *, is_directory: bool) -> bool:
        if self._only_directories and not is_directory:
            return False
        if self._names == 1:
            return self._fits(os.path.basename(spellings[0]))
        return any(self._fits(one) or self._fits(self._end_of(one)) for one in spellings)

    def _fits(self, text: str) -> bool:
        return any(regex.match(text) for regex in self._regexes)

    def _end_of(self, path: str) -> str:
        return "/".join(path.split("/")[-self._names :]) if self._names else path


def _anchored(text: str) -> str:
    """A pattern that begins with ``./`` or ``../`` as an absolute one."""
    directory, rest = "", text
    while rest.startswith(("./", "../")):
        first, _, rest = rest.partition("/")
        directory = os.path.join(directory, first)
    if not directory:
        return text
    return glob.escape(os.path.abspath(directory)).rstrip("/") + "/" + rest


def _without_links(pattern: str) -> str:
    """A pattern of absolute paths, the directories that it begins with without links."""
    if not pattern.startswith("/"):
        return pattern
    directory, slash, _ = re.split(r"[*?[]", pattern, maxsplit=1)[0].rpartition("/")
    return glob.escape(os.path.realpath(directory + slash)).rstrip("/") + pattern[len(directory) :]


# Directories


@dataclass(slots=True)
class Listing:
    """What one directory holds.

    ``linked``: links to files; ``links``: how many links to directories, which are not followed.
    ``changed``: when it was changed last, in nanoseconds; None when it could not be listed.
    """

    files: list[str] = field(default_factory=list)
    linked: list[str] = field(default_factory=list)
    directories: list[str] = field(default_factory=list)
    links: int = 0
    unexamined: list[Unexamined] = field(default_factory=list)
    changed: int | None = None


def listing(directory: str, excluded: Exclusions) -> Listing:
    """What lies in ``directory``; nothing where the kernel shows files of its own."""
    found = Listing()
    try:
        status = os.stat(directory)
        if status.st_dev not in pseudo_devices():
            with os.scandir(directory) as entries:
                for entry in entries:
                    _enter(entry, found, excluded)
        found.changed = status.st_mtime_ns
    except OSError as error:
        if not excluded.matches(directory):
            found.unexamined.append(Unexamined.of(directory, error, is_directory=True))
    return found


def _enter(entry: os.DirEntry[str], found: Listing, excluded: Exclusions) -> None:
    try:
        if excluded and excluded.matches(entry.path, is_directory=_is_directory(entry)):
            return
        if entry.is_symlink():
            _enter_link(entry, found)
        elif entry.is_file(follow_symlinks=False):
            found.files.append(entry.path)
        elif entry.is_dir(follow_symlinks=False):
            found.directories.append(entry.path)
    except OSError as error:
        found.unexamined.append(Unexamined.of(entry.path, error))


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return True  # a mount that is dead, most likely


def _enter_link(entry: os.DirEntry[str], found: Listing) -> None:
    try:
        status = entry.stat()
    except OSError as error:
        if error.errno not in ABSENT:
            found.unexamined.append(Unexamined.of(entry.path, error))
        return
    if stat.S_ISDIR(status.st_mode):
        found.links += 1
    elif stat.S_ISREG(status.st_mode) and status.st_dev not in pseudo_devices():
        found.linked.append(entry.path)


def listings(directory: str, excluded: Exclusions, *, deep: bool) -> Iterator[Listing]:
    """What lies in ``directory``, and with ``deep`` in all directories below it."""
    waiting = [directory]
    while waiting:
        one = listing(waiting.pop(), excluded)
        yield one
        if deep:
            waiting += reversed(one.directories)


# Patterns for places


def fitting(pattern: str, unexamined: list[Unexamined]) -> list[str]:
    """The paths that fit a shell's pattern, in order; ``**`` is any number of directories.

    Directories in which could not be looked for them go to ``unexamined``.
    """
    found = ["/" if pattern.startswith("/") else ""]
    for part in filter(None, pattern.split("/")):
        found = [one for base in found for one in _fitting_in(base, part, unexamined)]
    return sorted(set(found) - {""})


def _fitting_in(base: str, part: str, unexamined: list[Unexamined]) -> list[str]:
    if not glob.has_magic(part):
        return _there(os.path.join(base, part), unexamined)
    if part == "**":
        return [base, *_below(base, unexamined)]
    regex = re.compile(translate(part))
    names = [name for name in _names_in(base, unexamined) if regex.match(name)]
    return [os.path.join(base, one) for one in names if part[0] == "." or one[0] != "."]


def _there(path: str, unexamined: list[Unexamined]) -> list[str]:
    try:
        os.lstat(path)
    except (OSError, ValueError) as error:
        one = Unexamined.of(path, error)
        unexamined += [] if one.absent else [one]
        return []
    return [path]


def _names_in(directory: str, unexamined: list[Unexamined]) -> list[str]:
    try:
        return os.listdir(directory or ".")
    except OSError as error:
        one = Unexamined.of(directory or ".", error, is_directory=True)
        unexamined += [] if one.absent else [one]
        return []


def _below(base: str, unexamined: list[Unexamined]) -> Iterator[str]:
    """All directories below ``base``, but hidden ones, as paths that go on from it."""
    prefix = "" if base else "./"
    for one in listings(base or ".", exclusions((".*",)), deep=True):
        unexamined += [each for each in one.unexamined if each.is_directory]
        yield from (path.removeprefix(prefix) for path in one.directories)
