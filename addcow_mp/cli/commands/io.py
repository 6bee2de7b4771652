"""``addcow io``: qemu-io's commands on the guest's view of an overlay.

Each command line is split at blanks. Its first word is the command; options are those of getopt.
The output is that of qemu-io in the version that add-cow was proposed for. A command that fails
says so and makes the exit status 1; the next one runs. Large requests are carried out in parts.

``aio_read`` and ``aio_write`` run in threads of their own, beside later commands. Their results are
printed in the order of the requests, at the latest by ``aio_flush``, by ``quit`` or at the end.
"""

from __future__ import annotations

import errno
import getopt
import os
import string
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated

import typer

from addcow_mp.cli.messages import say, warn
from addcow_mp.cli.options import Exclude, Force, Opening, OverlayFile, Share
from addcow_mp.cli.results import job_is_done
from addcow_mp.device.access import Access
from addcow_mp.device.chain import READ, open_chain
from addcow_mp.device.hardlinks import link_warnings
from addcow_mp.device.overlay import Overlay
from addcow_mp.errors import AddcowError, RangeError, UsageError
from addcow_mp.jobs.writing import open_for_writing
from addcow_mp.units import MAX_SIZE, SECTOR, KiB, MiB, parse_size

#: Bytes of one request in memory at a time; limits what `write 0 100G` needs.
STEP = 4 * MiB

#: Bytes that a dump shows as characters.
_SHOWN = (string.ascii_letters + string.digits).encode()

#: The value of written bytes without -P.
DEFAULT_PATTERN = 0xCD

#: Options of the commands that read or write, as getopt takes them.
_OPTIONS = {
    "read": "Cl:P:qs:v",
    "write": "CP:quz",
    "readv": "CP:qv",
    "writev": "CP:q",
    "aio_read": "CP:qv",
    "aio_write": "CP:quz",
    "discard": "Cq",
}

_SHORT = {
    "r": "read",
    "w": "write",
    "f": "flush",
    "l": "length",
    "a": "alloc",
    "?": "help",
    "d": "discard",
    "t": "truncate",
}

_HELP = """\
read [-Cqv] [-P pattern [-s off] [-l len]] off len
write [-Cqzu] [-P pattern] off len
readv, writev, aio_read, aio_write [-Cqvzu] [-P pattern] off len [len..]
discard [-Cq] off len
truncate off
aio_flush, flush, length, map, alloc off [sectors], quit"""


def command(
    *,
    overlay: OverlayFile,
    commands: Annotated[
        list[str] | None,
        typer.Option("-c", "--cmd", metavar="CMD", help="a command; default: from stdin"),
    ] = None,
    read_only: Annotated[bool, typer.Option("-r", "--read-only", help="refuse writes")] = False,
    share: Share = False,
    force: Force = False,
    exclude: Exclude = None,
    opening: Opening,
) -> None:
    """Read and write as a guest would, with qemu-io's commands."""
    if share and not read_only:
        raise UsageError(message="-U is for reading only: give -r as well")
    access = opening.access(share=share, force=force, writes=not read_only, exclude=exclude)
    raise typer.Exit(_run(overlay.file, commands, access, read_only=read_only))


def _run(path: str, commands: list[str] | None, access: Access, *, read_only: bool) -> int:
    """Run the commands, or those on standard input, and return the exit status."""
    opening = open_chain(path, READ, access) if read_only else open_for_writing(path, access)
    with opening as disk:
        # A refused write says more about hard links than a warning, which comes last if needed.
        later = [] if read_only else link_warnings([disk.cow, disk.image.file])
        warn([one for one in disk.warnings() if one not in later])
        session = _Session(disk)
        for line in commands if commands is not None else _lines():
            if not session.run(line):
                break
        session.wait()
        warn([] if session.was_refused else later)
        removed = "it was removed, as it no longer applies"
        warn([f"{path}: {removed}" for path in disk.manifests_removed])
    job_is_done()
    return session.status


def _lines() -> Iterator[str]:
    """The lines of standard input; with a prompt if it is a terminal."""
    if sys.stdin.isatty():
        with suppress(EOFError):
            while True:
                yield input("addcow> ")
        return
    # Not with input(), which can miss an interrupt. Like it, print results before waiting.
    sys.stdout.flush()
    while line := sys.stdin.readline():
        yield line.removesuffix("\n")
        sys.stdout.flush()


class _RefusedError(Exception):
    """A command line is invalid; the text says why."""


@dataclass
class _Request:
    """One read or write, its options, and its result."""

    word: str
    offset: int = 0
    length: int = 0
    pattern: int | None = None
    check_from: int = 0
    check_length: int = 0
    zeroes: bool = False
    dump: bool = False
    quiet: bool = False
    terse: bool = False
    output: list[str] = field(default_factory=list)
    failed: bool = False
    #: Why this overlay must not be changed at all.
    refusal: str = ""

    @property
    def writes(self) -> bool:
        """Whether this changes the disk."""
        return "write" in self.word or self.word == "discard"

    def carry_out(self, disk: Overlay) -> None:
        """Read or write, and store the report, or the system's words for the failure."""
        start = time.perf_counter()
        try:
            _check_range(disk, self.offset, self.length)
            if self.writes:
                self._write(disk)
            else:
                self._read(disk)
        except AddcowError as error:
            self.output.append(f"{self.word} failed: {_reason(error, disk)}")
            self.failed = True
        else:
            if not (self.quiet or self.refusal):
                self.output += self._report(time.perf_counter() - start)

    def _write(self, disk: Overlay) -> None:
        if self.length:
            disk.check_writable()
            try:
                disk.check_permission()
            except AddcowError as error:
                self.refusal, self.failed = str(error), True
                return
        if self.word == "discard":
            disk.discard(self.offset, self.length)
            return
        if self.zeroes:
            disk.write_zeroes(self.offset, self.length)
            return
        pattern = DEFAULT_PATTERN if self.pattern is None else self.pattern
        data = memoryview(bytes([pattern]) * min(STEP, self.length))
        for start in range(0, self.length, STEP):
            disk.write(self.offset + start, data[: self.length - start])

    def _read(self, disk: Overlay) -> None:
        for start in range(0, self.length, STEP):
            data = disk.read(self.offset + start, min(STEP, self.length - start))
            self.failed |= not self._matches(data, start)
            if self.dump and not self.quiet:
                self.output += _hexdump(data, self.offset + start)
        if self.failed:
            place = f"offset {self.offset + self.check_from}, {self.check_length} bytes"
            self.output.insert(0, f"Pattern verification failed at {place}")

    def _matches(self, data: bytes, start: int) -> bool:
        if self.pattern is None:
            return True
        first = max(0, self.check_from - start)
        last = max(first, min(len(data), self.check_from + self.check_length - start))
        return data.count(self.pattern, first, last) == last - first

    def _report(self, seconds: float) -> list[str]:
        seconds = max(seconds, 1e-6)
        rate, operations = self.length / seconds, 1 / seconds
        if self.terse:
            return [f"{self.length},1,{_clock(seconds)},{rate:.3f},{operations:.3f}"]
        verb = {"discard": "discard"}.get(self.word, "wrote" if self.writes else "read")
        return [
            f"{verb} {self.length}/{self.length} bytes at offset {self.offset}",
            f"{_size(self.length)}, 1 ops; {_duration(seconds)} "
            f"({_size(rate)}/sec and {operations:.4f} ops/sec)",
        ]


class _Session:
    """Runs commands on one disk."""

    def __init__(self, disk: Overlay) -> None:
        self.disk = disk
        self.status = 0
        self.was_refused = False
        self._running: deque[tuple[threading.Thread, _Request]] = deque()
        self._commands: dict[str, Callable[[str, list[str]], None]] = {
            **dict.fromkeys(_OPTIONS, self._request),
            "aio_flush": self._aio_flush,
            "flush": self._flush,
            "length": self._length,
            "truncate": self._truncate,
            "map": self._map,
            "alloc": self._alloc,
            "help": lambda *_: print(_HELP),
        }

    def run(self, line: str) -> bool:
        """Run one line; False if it was ``quit``."""
        while self._running and not self._running[0][0].is_alive():
            self._print(self._running.popleft()[1])
        word, *arguments = line.split() or [""]
        if word in ("quit", "q"):
            return False
        name = _SHORT.get(word, word)
        try:
            if name in self._commands:
                self._commands[name](name if name in _OPTIONS else word, arguments)
            elif word:
                self._refuse(f'command "{word}" not found')
        except _RefusedError as refusal:
            self._refuse(str(refusal))
        except getopt.GetoptError as error:
            self._refuse(f"{word}: {error.msg}")
        return True

    def wait(self) -> None:
        """Wait for the requests in threads, and print their results."""
        while self._running:
            thread, request = self._running.popleft()
            thread.join()
            self._print(request)

    def _refuse(self, text: str) -> None:
        sys.stdout.flush()
        print(text, file=sys.stderr)
        self.status = 1

    def _print(self, request: _Request) -> None:
        for line in request.output:
            print(line)
        if request.refusal:
            self.was_refused = True
            sys.stdout.flush()
            say(request.refusal)
        self.status |= request.failed

    # Commands

    def _request(self, word: str, arguments: list[str]) -> None:
        request = _parse_request(word, arguments)
        if word.startswith("aio_"):
            thread = threading.Thread(target=request.carry_out, args=(self.disk,))
            try:
                thread.start()
            except RuntimeError:  # no room for a thread: carried out like the others
                self.wait()
            else:
                self._running.append((thread, request))
                return
        request.carry_out(self.disk)
        self._print(request)

    def _aio_flush(self, word: str, arguments: list[str]) -> None:
        _check_count(word, arguments, 0, 0)
        self.wait()

    def _flush(self, word: str, arguments: list[str]) -> None:
        _check_count(word, arguments, 0, 0)
        self.disk.flush()

    def _length(self, word: str, arguments: list[str]) -> None:
        _check_count(word, arguments, 0, 0)
        print(_size(self.disk.size))

    def _truncate(self, word: str, arguments: list[str]) -> None:
        from addcow_mp.jobs.resize import truncate

        _check_count(word, arguments, 1, 1)
        size = _number(arguments[0], "length")
        if size % SECTOR:
            raise _RefusedError(f"The new size must be a multiple of {SECTOR}")
        self.wait()
        try:
            truncate(self.disk, size)
        except AddcowError as error:
            self.status, self.was_refused = 1, True
            sys.stdout.flush()
            say(str(error))

    def _map(self, word: str, arguments: list[str]) -> None:
        _check_count(word, arguments, 0, 0)
        total = self.disk.size // SECTOR
        for start, stop, allocated in self.disk.layout(0, self.disk.size):
            sectors, left = (stop - start) // SECTOR, total - start // SECTOR
            state = "    allocated" if allocated else "not allocated"
            print(
                f"[{start: 24d}] {sectors: 8d}/{left: 8d} sectors {state} "
                f"at offset {_size(start)} ({int(allocated)})"
            )

    def _alloc(self, word: str, arguments: list[str]) -> None:
        _check_count(word, arguments, 1, 2)
        offset = _number(arguments[0], "offset")
        if offset % SECTOR:
            raise _RefusedError(f"offset {offset} is not sector aligned")
        sectors = _number(arguments[1], "length") if len(arguments) > 1 else 1
        stop = min(offset + sectors * SECTOR, self.disk.size)
        parts = list(self.disk.layout(offset, stop)) if offset < stop else []
        held = sum(last - first for first, last, allocated in parts if allocated) // SECTOR
        seen = sum(last - first for first, last, _ in parts) // SECTOR
        print(f"{held}/{seen} sectors allocated at offset {_size(offset)}")


# Parsing a command line


def _parse_request(word: str, arguments: list[str]) -> _Request:
    given, rest = getopt.gnu_getopt(arguments, _OPTIONS[word])
    _check_count(word, rest, 2, None)
    if len(rest) > 2 and word in ("read", "write", "discard"):  # noqa: PLR2004 - an offset and a length
        raise _RefusedError(f"{word}: one offset and one length; see 'help'")
    chosen = dict(given)
    request = _Request(
        word,
        offset=_number(rest[0], "length"),
        length=sum(_number(text, "length") for text in rest[1:]),
        pattern=_pattern(chosen["-P"]) if "-P" in chosen else None,
        check_from=_number(chosen.get("-s", "0"), "length"),
        zeroes="-z" in chosen,
        dump="-v" in chosen,
        quiet="-q" in chosen,
        terse="-C" in chosen,
    )
    if request.pattern is None and ("-s" in chosen or "-l" in chosen):
        raise _RefusedError("-s and -l need a pattern: -P")
    left = request.length - request.check_from
    request.check_length = _number(chosen["-l"], "length") if "-l" in chosen else left
    if not 0 <= request.check_length <= left:
        raise _RefusedError("pattern verification range exceeds end of read data")
    if "-u" in chosen and not request.zeroes:
        raise _RefusedError("-u requires -z to be specified")
    if request.zeroes and request.pattern is not None:
        raise _RefusedError("-z and -P cannot be specified at the same time")
    return request


def _check_count(word: str, arguments: list[str], least: int, most: int | None) -> None:
    number = len(arguments)
    if number >= least and (most is None or number <= most):
        return
    wanted = f"{least}" if most == least else f"between {least} and {most}"
    wanted = f"at least {least}" if most is None else wanted
    raise _RefusedError(f"bad argument count {number} to {word}, expected {wanted} arguments")


def _number(text: str, what: str) -> int:
    try:
        return parse_size(text)
    except UsageError:
        raise _RefusedError(f"non-numeric {what} argument -- {text}") from None


def _pattern(text: str) -> int:
    with suppress(ValueError):
        if (value := int(text, 0)) in range(256):
            return value
    raise _RefusedError(f"{text} is not a valid pattern byte")


# Results


def _check_range(disk: Overlay, offset: int, length: int) -> None:
    """Refuse a request as a whole that would fail in a later part."""
    if offset + length > min(disk.size, MAX_SIZE):
        raise RangeError(path=disk.path, offset=offset, length=length, size=disk.size)


def _reason(error: AddcowError, disk: Overlay) -> str:
    if isinstance(error, RangeError):
        return os.strerror(errno.EIO)
    if not disk.cow.writable and "errno" not in error.fields:
        return os.strerror(errno.EPERM)
    reason = error.fields.get("reason")
    return str(reason) if reason is not None else str(error)


def _hexdump(data: bytes, offset: int) -> Iterable[str]:
    for start in range(0, len(data), 16):
        row = data[start : start + 16]
        text = "".join(chr(byte) if byte in _SHOWN else "." for byte in row)
        yield f"{offset + start:08x}:  {row.hex(' ')}  {text}"


def _size(value: float) -> str:
    """Bytes with a binary unit and three decimals, none if they are zero."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    power = max((p for p in range(len(units)) if value >= KiB**p), default=0)
    number = f"{value / KiB**power:.3f}" if power else f"{value:f}"
    whole, _, fraction = number.partition(".")
    return f"{whole if fraction.startswith('000') else number} {units[power]}"


def _duration(seconds: float) -> str:
    return f"{int(seconds * 10000) / 10000:.4f} sec" if seconds < 1 else _clock(seconds)


def _clock(seconds: float) -> str:
    whole, hundredths = divmod(int(seconds * 100), 100)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}.{hundredths:02d}"
