"""What this process does to files, call by call, and whether the order was right.

The system calls are carried out as always and noted down on the way. A *story* is the list of
them in few words, "data base.img" for any number of writes, "sync base.img" for a sync that had
something to do. The *judge* knows the rule alone: when a bit changes in the file, the last write
of the cluster that it speaks of lies before a sync that began after it and has ended.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from addcow_mp.device import holes
from support.command import CLUSTER, MiB, read_header

FICLONERANGE = 0x4020940D


class Call(NamedTuple):
    """A call that changed a file, or a sync of it: bytes ``[start, stop)``, where they matter."""

    word: str
    file: str
    start: int = 0
    stop: int = 0
    old: bytes = b""
    new: bytes = b""


@dataclass
class Trace:
    """The calls so far, in the order in which they ended; a sync counts from its beginning."""

    calls: list[Call] = field(default_factory=list)
    failing: set[str] = field(default_factory=set)
    failed: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, call: Call) -> None:
        """Note a call, unless it is about memory that only looks like a file."""
        if not call.file.startswith("memfd:"):
            with self.lock:
                self.calls.append(call)

    def story(self) -> list[str]:
        """The calls in few words: repetitions and syncs of unchanged files are left out."""
        told: list[str] = []
        changed = set()
        for word, file, *_ in self.calls:
            needless = file not in changed and not file.endswith("/")
            if word == "synced" or (word == "sync" and needless):
                continue
            changed.discard(file) if word == "sync" else changed.add(file)
            if told[-1:] != [f"{word} {file}"]:
                told.append(f"{word} {file}")
        return told

    def to_be(self, *names: str) -> set[str]:
        """Let syncs of these files fail."""
        self.failing |= set(names)
        return self.failing


def name_of(fd: int) -> str:
    """The name of an open file; a directory's ends in a slash."""
    path = os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)")
    return os.path.basename(path) + "/" * os.path.isdir(path)


def kind(name: str, offset: int, fd: int) -> str:
    """What bytes at ``offset`` of a file are."""
    if not name.endswith(".add-cow"):
        return "data"
    region = int.from_bytes(os.pread(fd, 4, 40), "little") or 1 << 62
    return "header" if offset < region else "bits"


def watch_writes(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, ftruncate, unlink = os.pwrite, os.ftruncate, os.unlink

    def watched_pwrite(fd: int, data: bytes, offset: int) -> int:
        name = name_of(fd)
        old = os.pread(fd, len(data), offset) if name.endswith(".add-cow") else b""
        word = kind(name, offset, fd)
        done = pwrite(fd, data, offset)
        new = bytes(data)[:done] if old else b""
        trace.note(Call(word, name, offset, offset + done, old, new))
        return done

    def watched_ftruncate(fd: int, length: int) -> None:
        ftruncate(fd, length)
        trace.note(Call("length", name_of(fd)))

    def watched_unlink(path: str, **options: Any) -> None:
        unlink(path, **options)
        trace.note(Call("remove", os.path.basename(path)))

    monkeypatch.setattr(os, "pwrite", watched_pwrite)
    monkeypatch.setattr(os, "ftruncate", watched_ftruncate)
    monkeypatch.setattr(os, "unlink", watched_unlink)


def watch_the_kernel(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Watch what moves bytes or space without a write."""
    punch, copy_file_range, ioctl = holes.punch, os.copy_file_range, fcntl.ioctl

    def watched_punch(fd: int, start: int, stop: int) -> bool:
        done = punch(fd, start, stop)
        trace.note(Call("free", name_of(fd), start, stop))
        return done

    def watched_copy(here: int, there: int, count: int, *offsets: int) -> int:
        done = copy_file_range(here, there, count, *offsets)
        trace.note(Call("data", name_of(there), offsets[-1], offsets[-1] + done))
        return done

    def watched_ioctl(fd: int, request: int, *rest: Any) -> Any:
        done = ioctl(fd, request, *rest)
        if request == FICLONERANGE:
            trace.note(Call("data", name_of(fd), 0, 1 << 62))
        return done

    monkeypatch.setattr(holes, "punch", watched_punch)
    monkeypatch.setattr(os, "copy_file_range", watched_copy)
    monkeypatch.setattr(fcntl, "ioctl", watched_ioctl)


def watch_syncs(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    def watched(sync: Callable[[int], None]) -> Callable[[int], None]:
        def call(fd: int) -> None:
            name = name_of(fd)
            if name in trace.failing or (name.endswith("/") and "/" in trace.failing):
                trace.failed.append(name)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            trace.note(Call("sync", name))
            sync(fd)
            trace.note(Call("synced", name))

        return call

    monkeypatch.setattr(os, "fdatasync", watched(os.fdatasync))
    monkeypatch.setattr(os, "fsync", watched(os.fsync))


def changed_bits(call: Call, region: int) -> list[tuple[int, int]]:
    """Clusters whose bit a call changes, with the new bit."""
    found = []
    for at, (old, new) in enumerate(zip(call.old, call.new, strict=True)):
        base = 8 * (call.start - region + at)
        found += [(base + b, new >> b & 1) for b in range(8) if (old ^ new) >> b & 1]
    return found


def durable_before(calls: list[Call], file: str, span: tuple[int, int], now: int) -> bool:
    """Whether a whole sync lies between the last write into that span and ``now``."""
    last = -1
    for at, call in enumerate(calls[:now]):
        touches = call.start < span[1] and span[0] < call.stop
        if call.file == file and call.word in ("data", "free") and touches:
            last = at
    syncs = [call.word for call in calls[last + 1 : now] if call.file == file]
    return last < 0 or ("sync" in syncs and "synced" in syncs[syncs.index("sync") :])


def judge(calls: list[Call], overlay: Path, data: dict[int, str]) -> int:
    """Hold each changed bit against the file that the new value speaks of; count them."""
    header, judged = read_header(overlay), 0
    for now, call in enumerate(calls):
        if (call.word, call.file) != ("bits", overlay.name):
            continue
        for cluster, value in changed_bits(call, header.header_size):
            span = (cluster * header.cluster, (cluster + 1) * header.cluster)
            assert durable_before(calls, data[value], span, now), (cluster, value)
            judged += 1
    return judged


def frees_after_bits(calls: list[Call], overlay: Path, image: str) -> bool:
    """Whether space of the image is freed only after all of its bits are durably clear."""
    region, cluster = read_header(overlay).header_size, read_header(overlay).cluster
    dirty: dict[int, bool] = {}
    for call in calls:
        if (call.word, call.file) == ("bits", overlay.name):
            dirty |= {number: True for number, _ in changed_bits(call, region)}
        elif (call.word, call.file) == ("synced", overlay.name):
            dirty = dict.fromkeys(dirty, False)
        elif (call.word, call.file) == ("free", image):
            first, stop = call.start // cluster, -(-call.stop // cluster)
            if any(dirty.get(number, False) for number in range(first, stop)):
                return False
    return True


def broken(path: Path, size: int, offset: int) -> None:
    """A file with small pieces of data in each 64 MiB: so many that it counts as full."""
    with path.open("wb", buffering=0) as file:
        file.truncate(size)
        for part in range(offset, size, 64 * MiB):
            for piece in range(20):
                os.pwrite(file.fileno(), b"x" * 4096, part + piece * 2 * CLUSTER)
