"""The ledger of a scrub: what was verified when, what came of it, and where to go on.

One SQLite file, written in short transactions, so that whoever asks meanwhile waits for no more
than one of them, and what a crash takes along is the last second. Layers are known by their real
paths; what is recorded of one is of the manifest that it had, and begins anew when that does.

A *pass* is one round over all layers. Of a layer that was begun in it, *unseen* are the ranges of
leaves that are still to be looked at, *pending* what was found in the others. What was sampled is
no verification, but damage that it found stays until a whole look says otherwise.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from urllib.parse import quote

from addcow_mp.device.discovery import is_gone
from addcow_mp.device.files import cannot_lock, cannot_open, claim_alone
from addcow_mp.errors import FileError, ImageError
from addcow_mp.format.bits import Run
from addcow_mp.jobs.layer_report import Grade, LayerReport, Range, Remark
from addcow_mp.jobs.verify_task import LeafRange
from addcow_mp.units import MAX_SIZE

#: What says that a database is one of these: "ACSC", and the version of its tables.
APPLICATION, VERSION = 0x41435343, 1

#: Seconds between two transactions: what a crash may cost in repeated work.
EVERY = 1.0

#: Seconds to wait for another process's transaction.
PATIENCE = 30

_TABLES = (
    """CREATE TABLE layer (
    path TEXT PRIMARY KEY,
    manifest TEXT,               -- which file it was: inode, size, times
    bytes INTEGER NOT NULL,      -- about what there is to read
    pass INTEGER NOT NULL,       -- the last one in which all of it was looked at
    verified REAL,               -- when: seconds since 1970
    sampled REAL,
    exit INTEGER,                -- of the last look, as that of verify
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

#: How a run is called that has not ended, or was killed.
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
    def last_looked_at(self) -> float:
        """When it was verified or sampled last; 0 = never."""
        return max(self.verified or 0, self.sampled or 0)

    def known(self) -> LayerReport:
        """What the last look has found."""
        found = {"ranges": json.loads(self.ranges), "findings": json.loads(self.findings)}
        return _verdict(self.path, found)

    def begun(self) -> LayerReport:
        """What this pass has found so far."""
        found = json.loads(self.pending) if self.pending else {}
        return _verdict(self.path, found)

    @property
    def spans(self) -> list[Run]:
        """The leaves that this pass has still to look at, as far as it has begun."""
        return [(first, stop) for first, stop in json.loads(self.unseen or "[]")]

    @property
    def is_gone(self) -> bool:
        """Whether there is no such file any more; one that cannot be looked at may be there."""
        return bool(self.gone) or is_gone(self.path)

    def begin(self, layer_report: LayerReport, unseen: list[Run]) -> Entry:
        """The same, looked at but for the leaves ``unseen``."""
        pending = {**_told(layer_report), "bytes": layer_report.bytes_read}
        return self._replace(unseen=json.dumps(unseen), pending=json.dumps(pending))

    def looked_at(self, layer_report: LayerReport) -> Entry:
        """The same with what was found."""
        ranges, findings = map(json.dumps, _told(layer_report).values())
        return self._replace(exit=layer_report.exit_code, ranges=ranges, findings=findings)


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


def _told(layer_report: LayerReport) -> dict[str, object]:
    return {
        "ranges": [one.as_json() for one in layer_report.ranges],
        "findings": [one.as_json() for one in layer_report.remarks],
    }


def _verdict(path: str, told: dict[str, Any]) -> LayerReport:
    ranges = [
        Range(_text(one["file"]), _count(one["start"]), _count(one["length"]))
        for one in told.get("ranges", ())
    ]
    remarks = [
        Remark(
            _text(one["name"]), Grade(one["severity"]), _text(one["file"]), _text(one["message"])
        )
        for one in told.get("findings", ())
    ]
    return LayerReport(path, ranges, remarks, _count(told.get("bytes", 0)))


# What stands in the file: anybody can have written there


def _entry(row: tuple[Any, ...]) -> Entry:
    """The layer of a row. Raises for what cannot have been written by a scrub."""
    entry = Entry(*row)
    _text(entry.path)
    for number in (entry.bytes, entry.pass_, entry.gone, entry.exit or 0):
        _count(number)
    for seconds in (entry.verified or 0, entry.sampled or 0):
        _time(seconds)
    entry.known()
    entry.begun()
    for span in entry.spans:
        LeafRange(0, *map(_count, span))
    return entry


def _record(row: tuple[Any, ...]) -> Record:
    """The run of a row. Raises like :func:`_entry`."""
    run = Record(*row)
    _text(run.result)
    for number in (run.number, run.pass_, run.seed or 0, run.layers, run.bytes, run.different):
        _count(number)
    for seconds in (run.begun, run.ended or 0, run.sample or 0):
        _time(seconds)
    return run


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value <= MAX_SIZE:
        raise TypeError
    return value


def _time(value: object) -> float:
    if not isinstance(value, int | float) or not 0 <= value < LATEST:
        raise TypeError
    return float(value)


class ScrubState:
    """An open ledger. Every method raises :class:`FileError` for what SQLite meets."""

    def __init__(self, path: str, database: sqlite3.Connection) -> None:
        self.path = path
        self._database = database
        self._due: list[tuple[str, tuple[object, ...]]] = []
        self._last = time.monotonic()

    def entries(self) -> dict[str, Entry]:
        """All layers, by their paths."""
        with _saying(self.path, "read it"):
            rows = self._database.execute("SELECT * FROM layer ORDER BY path")
            return {entry.path: entry for entry in map(_entry, rows)}

    def runs(self) -> list[Record]:
        """All runs, in order."""
        with _saying(self.path, "read it"):
            return list(map(_record, self._database.execute("SELECT * FROM run ORDER BY 1")))

    def put(self, *entries: Entry) -> None:
        """Record what is known of layers now."""
        self._due += [_inserting("layer", entry) for entry in entries]

    def put_run(self, run: Record) -> None:
        """Record how far a run has come."""
        self._due.append(_inserting("run", run))

    def remember(self, run: Record, entry: Entry, size: int) -> None:
        """Add a result to the history: ``size`` bytes were read for it."""
        values = (run.number, entry.path, time.time(), entry.exit, size)
        row = (*values, entry.ranges, entry.findings)
        self._due.append(_inserting("history", row))

    @property
    def is_due(self) -> bool:
        """Whether what was recorded has waited long enough."""
        return time.monotonic() - self._last >= EVERY

    def write(self) -> None:
        """Make durable all that was recorded."""
        with _saying(self.path, "write it"), _transaction(self._database):
            for statement, values in self._due:
                self._database.execute(statement, values)
        self._due.clear()
        self._last = time.monotonic()


def _inserting(table: str, row: tuple[object, ...]) -> tuple[str, tuple[object, ...]]:
    # Names of files are bytes: as such they are bound, and as text they are kept.
    bound = tuple(os.fsencode(value) if isinstance(value, str) else value for value in row)
    marks = ", ".join("CAST(? AS TEXT)" if isinstance(one, str) else "?" for one in row)
    return f"INSERT OR REPLACE INTO {table} VALUES ({marks})", bound  # noqa: S608 - no user's words


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            database.execute("ROLLBACK")
        raise


@contextmanager
def _saying(path: str, action: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise FileError(path=path, action=action, reason=str(error)) from error
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        problem = "what stands in it makes no sense; go back to a copy, or name a new file"
        raise ImageError(path=path, problem=problem) from error


# Opening


@contextmanager
def opened(path: str, *, locking: bool = True) -> Iterator[ScrubState]:
    """Open a ledger to be written, made if it is not there; nobody else writes it meanwhile.

    Without ``locking`` the database is used without locks. Raises :class:`ImageError` for a file
    that is something else, in use or cannot be locked, :class:`FileError`.
    """
    with _alone(path, locking=locking), _connected(path, locking=locking) as database:
        if os.stat(path).st_size == 0:
            _make(path, database)
        _refuse_others(path, database)
        yield ScrubState(path, database)


@contextmanager
def read(path: str, *, locking: bool = True) -> Iterator[ScrubState]:
    """Open a ledger to be asked; it may be in use. Raises like :func:`opened`."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise cannot_open(path, "open it", error) from error
    _refuse_kind(path, status)
    if status.st_size == 0:
        raise ImageError(path=path, problem="it is empty: no scrub has remembered anything yet")
    with _connected(path, locking=locking) as database:
        _refuse_others(path, database)
        yield ScrubState(path, database)


@contextmanager
def _alone(path: str, *, locking: bool) -> Iterator[None]:
    """Hold the file against other scrubs.

    The descriptor stays open as long as the database: closing any drops SQLite's own locks.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        fd = os.open(path, flags, 0o644)
    except (OSError, ValueError) as error:
        raise cannot_open(path, "open it", error) from error
    try:
        with _naming(path):
            status = os.fstat(fd)
        _refuse_kind(path, status)
        if not claim_alone(path, fd, locking=locking):
            problem = "another scrub is using it; wait until that has ended"
            raise ImageError(path=path, problem=problem)
        yield
    finally:
        os.close(fd)


@contextmanager
def _naming(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileError.of(path, "look at it", error) from error


def _refuse_kind(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(path=path, problem="it is no regular file; name one that may be written")


@contextmanager
def _connected(path: str, *, locking: bool) -> Iterator[sqlite3.Connection]:
    if locking:
        _refuse_without_locks(path)
    uri = f"file:{quote(os.fsencode(os.path.abspath(path)))}?mode=rw"
    uri += "" if locking else "&nolock=1"
    with _saying(path, "open it"):
        database = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=PATIENCE)
    database.text_factory = os.fsdecode
    try:
        yield database
    finally:
        database.close()


def _refuse_without_locks(path: str) -> None:
    """Raise where the file system has no locks: SQLite would wait, as if another had locked it."""
    try:
        with open(path, "rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise cannot_lock(path, error) from error


def _make(path: str, database: sqlite3.Connection) -> None:
    with _saying(path, "write it"), _transaction(database):
        for statement in _TABLES:
            database.execute(statement)
        database.execute(f"PRAGMA application_id = {APPLICATION}")
        database.execute(f"PRAGMA user_version = {VERSION}")


def _refuse_others(path: str, database: sqlite3.Connection) -> None:
    try:
        (application,) = database.execute("PRAGMA application_id").fetchone()
        (version,) = database.execute("PRAGMA user_version").fetchone()
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise FileError(path=path, action="read it", reason=str(error)) from error
        application, version = 0, 0
    if (application, version) != (APPLICATION, VERSION):
        problem = "it is not what a scrub remembers, or of another version; name another file"
        raise ImageError(path=path, problem=problem)
