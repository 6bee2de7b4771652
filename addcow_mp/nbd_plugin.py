"""The plugin with which nbdkit serves an overlay: its guest's view as a network block device.

``addcow serve`` starts nbdkit with this file. The overlay is opened once for all connections, with
its locks, before the first one is accepted, and is closed after the last one. Requests of all
connections run in threads of one process: the overlay is made for that. A flush makes durable what
any connection has written before, so a client may use several connections for one disk.

The options come as one JSON object in the parameter ``options``: ``file``, ``writable``, the fields
of :class:`addcow_mp.Access`, and the Unix socket on which nbdkit listens, if it is one: the plugin
removes it at its end. nbdkit calls the functions below by their names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

import addcow_mp
from addcow_mp.cli.listening import remove_socket

API_VERSION = 2

_options: dict[str, Any] = {}
_opened: list[addcow_mp.Overlay] = []


@cache
def _nbdkit() -> Any:
    """The constants of nbdkit: a module that exists only within its process."""
    return import_module("nbdkit")


def thread_model() -> int:
    """Let requests run in parallel."""
    return int(_nbdkit().THREAD_MODEL_PARALLEL)


def config(key: str, value: str) -> None:
    """Take a parameter of the command line."""
    if key != "options":
        raise RuntimeError(f"unknown parameter {key}")
    _options.update(json.loads(value))


def get_ready() -> None:
    """Open the overlay, before a client is answered."""
    try:
        _open()
    except BaseException:
        _remove_socket()  # nbdkit ends, and does not call `cleanup`
        raise


def _open() -> None:
    access = addcow_mp.Access(**{key: _plain(value) for key, value in _options["access"].items()})
    file, writable = _options["file"], _options["writable"]
    _opened.append(addcow_mp.open(file, writable=writable, access=access))


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def cleanup() -> None:
    """Flush and close the overlay after the last connection, and remove the socket."""
    try:
        while _opened:
            _opened.pop().close()
    finally:
        _remove_socket()


def _remove_socket() -> None:
    if _options.get("socket"):
        remove_socket(**_options["socket"])


def open(readonly: bool) -> addcow_mp.Overlay:  # noqa: A001 - the name that nbdkit calls
    """Give a connection the overlay."""
    return _opened[0]


def get_size(disk: addcow_mp.Overlay) -> int:
    """The virtual size in bytes."""
    return disk.size


def can_write(disk: addcow_mp.Overlay) -> bool:
    """Whether the overlay was opened for writing."""
    return bool(_options["writable"])


def can_multi_conn(disk: addcow_mp.Overlay) -> bool:
    """One flush covers the writes of all connections."""
    return True


def can_flush(disk: addcow_mp.Overlay) -> bool:
    """Flushing is supported."""
    return True


def can_fua(disk: addcow_mp.Overlay) -> int:
    """A write with FUA is flushed before its answer."""
    return int(_nbdkit().FUA_NATIVE)


def can_trim(disk: addcow_mp.Overlay) -> bool:
    """Trimming is supported."""
    return True


def can_zero(disk: addcow_mp.Overlay) -> bool:
    """Writing zeros is supported."""
    return True


def can_fast_zero(disk: addcow_mp.Overlay) -> bool:
    """Zeros are not promised to be faster than data: a partial cluster is copied up first."""
    return False


def can_extents(disk: addcow_mp.Overlay) -> bool:
    """Clients can ask where the disk holds data."""
    return True


def pread(disk: addcow_mp.Overlay, buffer: bytearray, offset: int, flags: int) -> None:
    """Fill ``buffer`` with the guest's bytes at ``offset``."""
    disk.read_into(memoryview(buffer), offset)


def pwrite(disk: addcow_mp.Overlay, buffer: bytearray, offset: int, flags: int) -> None:
    """Write ``buffer`` at ``offset``."""
    disk.write(offset, buffer)
    _flush_if_asked(disk, flags)


def flush(disk: addcow_mp.Overlay, flags: int) -> None:
    """Make all earlier writes durable."""
    disk.flush()


def zero(disk: addcow_mp.Overlay, count: int, offset: int, flags: int) -> None:
    """Make ``count`` bytes at ``offset`` read as zeros."""
    disk.write_zeroes(offset, count)
    _flush_if_asked(disk, flags)


def trim(disk: addcow_mp.Overlay, count: int, offset: int, flags: int) -> None:
    """Free whole clusters of the range: they then read as zeros. Other bytes stay as they are."""
    disk.discard(offset, count)
    _flush_if_asked(disk, flags)


def extents(
    disk: addcow_mp.Overlay, count: int, offset: int, flags: int
) -> Iterator[tuple[int, int, int]]:
    """Say of which kind the bytes ``[offset, offset + count)`` are: offset, length, type."""
    constants = _nbdkit()
    hole = int(constants.EXTENT_HOLE | constants.EXTENT_ZERO)
    for one in disk.extents(offset, min(offset + count, disk.size)):
        yield one.start, one.length, hole if one.zero else 0


def _flush_if_asked(disk: addcow_mp.Overlay, flags: int) -> None:
    if flags and flags & _nbdkit().FLAG_FUA:
        disk.flush()
