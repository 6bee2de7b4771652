"""The state of a scrub: what was verified when, with which result, and where to continue.

It is one SQLite file, written in short transactions: a reader waits for one of them at most, and a
crash loses the last second. Layers are known by their real paths. An entry belongs to the manifest
that the layer had; a layer with a new manifest gets a new entry.

A *pass* is one round over all layers. For a layer that was begun in it, *unseen* are the ranges of
leaves that are left, and *pending* is what was found in the others. A sample is no verification,
but damage that it found stays until the layer is verified.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple
from urllib.parse import quote

from addcow_mp.device.discovery import Identity, is_gone
from addcow_mp.device.files import (
    cannot_lock,
    cannot_open,
    claim_alone,
    identity_at,
    identity_of,
)
from addcow_mp.errors import FileError, ImageError
from addcow_mp.findings import LayerReport, Range, Severity, worst
from addcow_mp.format.bits import Run
from addcow_mp.units import MAX_SIZE

#: Marks a database as a scrub state: "ACSC", and the version of its tables.
APPLICATION, VERSION = 0x41435343, 1

#: Seconds between two transactions: what a crash may cost in repeated work.
EVERY = 1.0

#: Seconds to wait for another process's transaction.
PATIENCE = 30

#: Files that scrubs of this process have open. SQLite's locks belong to the process: closing such
#: a file once would drop them in the middle of a transaction.
_in_use: set[Identity] = set()

#: Held while a file is opened, or closed, that a scrub of another thread may have open.
_opening = threading.Lock()

_TABLES = (
    """CREATE TABLE layer (
    path TEXT PRIMARY KEY,
    manifest TEXT,               -- which file it was: inode, size, times
    bytes INTEGER NOT NULL,      -- about what there is to read
    pass INTEGER NOT NULL,       -- the last one in which all of it was verified
    verified REAL,               -- when: seconds since 1970
    sampled REAL,
    exit INTEGER,                -- of the last time, as that of verify
    ranges TEXT NOT NULL,
    findings TEXT NOT NULL,
    unseen TEXT,                 -- [[first leaf, stop], ...] when begun in this pass
    pending TEXT,
    gone INTEGER NOT NULL
) WITHOUT ROWID""",
    """CREATE TABLE run (
    number INTEGER PRIMARY KEY,
    pass INTEGER NOT NULL,
    begun REAL NOT NULL,
    ended REAL,
    result TEXT NOT NULL,
    sample REAL,
    seed INTEGER,
    layers INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    different INTEGER NOT NULL
)""",
    """CREATE TABLE history (
    run INTEGER NOT NULL REFERENCES run,
    path TEXT NOT NULL,
    time REAL NOT NULL,
    exit INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    ranges TEXT NOT NULL,
    findings TEXT NOT NULL
)""",
    "CREATE INDEX history_of ON history (path, time)",
)

#: No time of ours is later, in seconds since 1970: the year 5138.
LATEST = 1e11

#: The result of a run that has not ended, or was killed.
UNFINISHED = "unfinished"


class Entry(NamedTuple):
    """What is known of a layer; the columns of its table, in their order."""

    path: str
    manifest: str | None = None
    bytes: int = 0
    pass_: int = 0
    verified: float | None = None
    sampled: float | None = None
    exit: int | None = None
    ranges: str = "[]"
    findings: str = "[]"
    unseen: str | None = None
    pending: str | None = None
    gone: int = 0

    @property
    def last_read(self) -> float:
        """When it was last verified or sampled; 0 = never."""
        return max(self.verified or 0, self.sampled or 0)

    def known(self) -> LayerReport:
        """The last result."""
        found = {"ranges": json.loads(self.ranges), "findings": json.loads(self.findings)}
        return _report(self.path, found)

    def begun(self) -> LayerReport:
        """What this pass has found so far."""
        return _report(self.path, json.loads(self.pending or "{}"))

    @property
    def spans(self) -> list[Run]:
        """The leaves that are left of a layer that was begun in this pass."""
        return [(first, stop) for first, stop in json.loads(self.unseen or "[]")]

    @property
    def is_gone(self) -> bool:
        """Whether the file does not exist any more; one that cannot be examined may exist."""
        return bool(self.gone) or is_gone(self.path)

    def begin(self, report: LayerReport, unseen: list[Run]) -> Entry:
        """The entry after all leaves but ``unseen`` were verified."""
        found = report.as_json()
        pending = {key: found[key] for key in ("ranges", "findings", "bytes")}
        return self._replace(unseen=json.dumps(unseen), pending=json.dumps(pending))

    def with_result(self, report: LayerReport) -> Entry:
        """The entry with a new result."""
        found = report.as_json()
        ranges, findings = json.dumps(found["ranges"]), json.dumps(found["findings"])
        return self._replace(exit=report.exit_code, ranges=ranges, findings=findings)

    @classmethod
    def of(cls, row: tuple[Any, ...]) -> Entry:
        """The entry in a row of the table. Raises for what no scrub has written."""
        entry = cls(*row)
        _text(entry.path)
        leaves = [leaf for first, stop in entry.spans for leaf in (first, stop)]
        _check_counts(entry.bytes, entry.pass_, entry.gone, entry.exit or 0, *leaves)
        _check_times(entry.verified or 0, entry.sampled or 0)
        entry.known()
        entry.begun()
        return entry


class Record(NamedTuple):
    """A run of the scrub; the columns of its table, in their order."""

    number: int
    pass_: int
    begun: float
    ended: float | None = None
    result: str = UNFINISHED
    sample: float | None = None
    seed: int | None = None
    layers: int = 0
    bytes: int = 0
    different: int = 0

    @classmethod
    def of(cls, row: tuple[Any, ...]) -> Record:
        """The run in a row of the table. Raises for what no scrub has written."""
        run = cls(*row)
        _text(run.result)
        counts = (run.number, run.pass_, run.seed or 0, run.layers, run.bytes, run.different)
        _check_counts(*counts)
        _check_times(run.begun, run.ended or 0, run.sample or 0)
        return run


@dataclass(frozen=True)
class ScrubStatus:
    """What a scrub state says of the layers that still exist, and of all runs."""

    exit_statuses: ClassVar = {
        0: "no layer is known to differ",
        1: "a layer could not be verified",
        2: "a layer differs",
    }

    layers: list[Entry]
    gone: int
    runs: list[Record]

    @property
    def exit_code(self) -> int:
        """The status of the worst layer."""
        return worst(one.known().exit_code for one in self.layers)


# The file may hold anything that another program has written


def _report(path: str, stored: dict[str, Any]) -> LayerReport:
    report = LayerReport(path, bytes_read=stored.get("bytes", 0))
    for one in stored.get("ranges", ()):
        report.ranges.append(Range(_text(one["file"]), one["start"], one["length"]))
    for one in stored.get("findings", ()):
        name, file, message = (_text(one[key]) for key in ("name", "file", "message"))
        report.add(name, Severity(one["severity"]), file, message)
    lengths = (one.length for one in report.ranges)
    _check_counts(report.bytes_read, *(one.start for one in report.ranges), *lengths)
    return report


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _check_counts(*values: object) -> None:
    if not all(type(one) is int and 0 <= one <= MAX_SIZE for one in values):
        raise TypeError


def _check_times(*values: object) -> None:
    if not all(isinstance(one, int | float) and 0 <= one < LATEST for one in values):
        raise TypeError


class ScrubState:
    """An open scrub state. Every method raises :class:`FileError` for errors of SQLite."""

    def __init__(self, path: str, database: sqlite3.Connection) -> None:
        self._path = path
        self._database = database
        self._due: list[tuple[str, tuple[object, ...]]] = []
        self._last = time.monotonic()

    def entries(self) -> dict[str, Entry]:
        """All layers, by their paths."""
        with _errors_naming(self._path, "read it"):
            rows = self._database.execute("SELECT * FROM layer ORDER BY path")
            return {entry.path: entry for entry in map(Entry.of, rows)}

    def runs(self) -> list[Record]:
        """All runs, in order."""
        with _errors_naming(self._path, "read it"):
            return list(map(Record.of, self._database.execute("SELECT * FROM run ORDER BY 1")))

    def put(self, *entries: Entry) -> None:
        """Store entries with the next transaction."""
        self._due += [_insert("layer", entry) for entry in entries]

    def put_run(self, run: Record) -> None:
        """Store a run with the next transaction."""
        self._due.append(_insert("run", run))

    def remember(self, run: Record, entry: Entry, size: int) -> None:
        """Add a result to the history; ``size`` bytes were read for it."""
        values = (run.number, entry.path, time.time(), entry.exit, size)
        self._due.append(_insert("history", (*values, entry.ranges, entry.findings)))

    @property
    def is_due(self) -> bool:
        """Whether the last transaction is long enough ago."""
        return time.monotonic() - self._last >= EVERY

    def write(self) -> None:
        """Make everything durable in one transaction."""
        with _transaction(self._path, self._database):
            for statement, values in self._due:
                self._database.execute(statement, values)
        self._due.clear()
        self._last = time.monotonic()


def _insert(table: str, row: tuple[object, ...]) -> tuple[str, tuple[object, ...]]:
    # Names of files are bytes: they are bound as bytes and stored as text.
    bound = tuple(os.fsencode(value) if isinstance(value, str) else value for value in row)
    marks = ", ".join("CAST(? AS TEXT)" if isinstance(one, str) else "?" for one in row)
    return f"INSERT OR REPLACE INTO {table} VALUES ({marks})", bound  # noqa: S608 - no user's words


@contextmanager
def _transaction(path: str, database: sqlite3.Connection) -> Iterator[None]:
    with _errors_naming(path, "write it"):
        database.execute("BEGIN IMMEDIATE")
        try:
            yield
            database.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                database.execute("ROLLBACK")
            raise


@contextmanager
def _errors_naming(path: str, action: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise FileError(path=path, action=action, reason=str(error)) from error
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        problem = "its content is invalid; restore it from a backup, or name a new file"
        raise ImageError(path=path, problem=problem) from error


# Opening


@contextmanager
def opened(path: str, *, locking: bool = True) -> Iterator[ScrubState]:
    """Open a scrub state for writing, or create it; no other process writes it meanwhile.

    Without ``locking`` the database is used without locks. Raises :class:`ImageError` for a file
    that is something else, in use or cannot be locked, :class:`FileError`.
    """
    with _alone(path, locking=locking), _connected(path, locking=locking) as database:
        if os.stat(path).st_size == 0:
            with _transaction(path, database):
                for statement in _TABLES:
                    database.execute(statement)
                database.execute(f"PRAGMA application_id = {APPLICATION}")
                database.execute(f"PRAGMA user_version = {VERSION}")
        _refuse_others(path, database)
        yield ScrubState(path, database)


def read(path: str, *, locking: bool = True) -> ScrubStatus:
    """Read a scrub state, which may be in use. Raises like :func:`opened`."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise cannot_open(path, "open it", error) from error
    _refuse_kind(path, status)
    if status.st_size == 0:
        raise ImageError(path=path, problem="it is empty: no scrub has stored anything yet")
    with _connected(path, locking=locking) as database:
        _refuse_others(path, database)
        state = ScrubState(path, database)
        entries, runs = state.entries().values(), state.runs()
    layers = [one for one in entries if not one.is_gone]
    return ScrubStatus(layers, len(entries) - len(layers), runs)


@contextmanager
def _alone(path: str, *, locking: bool) -> Iterator[None]:
    """Lock the file against other scrubs.

    The descriptor stays open as long as the database: closing any drops SQLite's own locks.
    """
    with _opening:
        fd = None if identity_at(path) in _in_use else _claimed(path, locking=locking)
        if fd is None:
            problem = "another scrub is using it; wait until that has ended"
            raise ImageError(path=path, problem=problem)
        identity = identity_of(os.fstat(fd))
        _in_use.add(identity)
    try:
        yield
    finally:
        with _opening:
            os.close(fd)
            _in_use.discard(identity)


def _claimed(path: str, *, locking: bool) -> int | None:
    """The file, locked against other processes; None if one has locked it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        fd = os.open(path, flags, 0o644)
    except (OSError, ValueError) as error:
        raise cannot_open(path, "open it", error) from error
    try:
        _refuse_kind(path, os.fstat(fd))
        if claim_alone(path, fd, locking=locking):
            if locking:
                _try_lock(path, fd)
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _refuse_kind(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(path=path, problem="it is no regular file; name one that may be written")


@contextmanager
def _connected(path: str, *, locking: bool) -> Iterator[sqlite3.Connection]:
    if locking:
        _refuse_without_locks(path)
    uri = f"file:{quote(os.fsencode(os.path.abspath(path)))}?mode=rw"
    uri += "" if locking else "&nolock=1"
    with _errors_naming(path, "open it"):
        database = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=PATIENCE)
    database.text_factory = os.fsdecode
    try:
        yield database
    finally:
        database.close()


def _refuse_without_locks(path: str) -> None:
    """Raise where the file system has no locks: SQLite would wait as for another process."""
    with _opening:
        if identity_at(path) in _in_use:
            return  # it was tried before, and closing the file would drop SQLite's locks
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise cannot_open(path, "open it", error) from error
        try:
            _try_lock(path, fd)
        finally:
            os.close(fd)


def _try_lock(path: str, fd: int) -> None:
    """Raise where the file system has no locks of the kind that SQLite uses."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 1)
        fcntl.lockf(fd, fcntl.LOCK_UN, 1)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise cannot_lock(path, error) from error


def _refuse_others(path: str, database: sqlite3.Connection) -> None:
    try:
        (application,) = database.execute("PRAGMA application_id").fetchone()
        (version,) = database.execute("PRAGMA user_version").fetchone()
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise FileError(path=path, action="read it", reason=str(error)) from error
        application, version = 0, 0
    if (application, version) != (APPLICATION, VERSION):
        problem = "it is no scrub state, or of another version; name another file"
        raise ImageError(path=path, problem=problem)
