"""addcow-mp: a memory-mapped, multiprocess batch tool for add-cow disk images.

The public interface. Offsets, lengths and sizes are in bytes, ranges are half-open, and
every error that a user can cause is an :class:`AddcowError` whose text names the file and
the mend. Modules are loaded when a name is first used, so that importing this package
costs nothing.

>>> import addcow_mp
>>> with addcow_mp.open("disk.add-cow", writable=True) as disk:  # doctest: +SKIP
...     disk.write(0, b"boot")
...     disk.flush()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from addcow_mp.api import (
        check,
        commit,
        convert,
        create,
        extents,
        flatten,
        info,
        open,  # noqa: A004 - addcow_mp.open() is the name that people try
    )
    from addcow_mp.device.access import Access
    from addcow_mp.device.extent import Extent
    from addcow_mp.device.overlay import Overlay
    from addcow_mp.errors import (
        AddcowError,
        BeginsAnewError,
        CpuLimitJobError,
        DependantsError,
        FileError,
        FormatError,
        HangupJobError,
        HardLinksError,
        HeldError,
        ImageError,
        InterruptedJobError,
        LockedError,
        ManifestError,
        NoLocksError,
        NotAddcowError,
        NotReadBackError,
        OutsideError,
        RangeError,
        ReadBackError,
        ResourceError,
        SpaceError,
        StoppedError,
        SyncError,
        TerminatedJobError,
        TimeLimitError,
        UnendedError,
        UnfinishedError,
        UnsupportedError,
        UnverifiedError,
        UsageError,
        WorkerError,
    )
    from addcow_mp.format.names import path_combine, path_has_protocol, read_string

_HOMES = {
    "addcow_mp.api": (
        *("check", "commit", "convert", "create", "extents", "flatten", "info", "open"),
    ),
    "addcow_mp.device.access": ("Access",),
    "addcow_mp.device.extent": ("Extent",),
    "addcow_mp.device.overlay": ("Overlay",),
    "addcow_mp.errors": (
        *("AddcowError", "DependantsError", "FileError", "FormatError", "ImageError"),
        *("HardLinksError", "HeldError", "LockedError", "NoLocksError", "NotAddcowError"),
        *("OutsideError", "RangeError", "SpaceError"),
        *("StoppedError", "SyncError", "UnfinishedError", "UnsupportedError", "UsageError"),
        *("CpuLimitJobError", "HangupJobError", "ResourceError", "UnendedError"),
        *("BeginsAnewError", "InterruptedJobError", "TerminatedJobError", "TimeLimitError"),
        *("ManifestError", "NotReadBackError", "ReadBackError", "UnverifiedError", "WorkerError"),
    ),
    "addcow_mp.format.names": ("path_combine", "path_has_protocol", "read_string"),
}

__all__ = [
    "Access",
    "AddcowError",
    "BeginsAnewError",
    "CpuLimitJobError",
    "DependantsError",
    "Extent",
    "FileError",
    "FormatError",
    "HangupJobError",
    "HardLinksError",
    "HeldError",
    "ImageError",
    "InterruptedJobError",
    "LockedError",
    "ManifestError",
    "NoLocksError",
    "NotAddcowError",
    "NotReadBackError",
    "OutsideError",
    "Overlay",
    "RangeError",
    "ReadBackError",
    "ResourceError",
    "SpaceError",
    "StoppedError",
    "SyncError",
    "TerminatedJobError",
    "TimeLimitError",
    "UnendedError",
    "UnfinishedError",
    "UnsupportedError",
    "UnverifiedError",
    "UsageError",
    "WorkerError",
    "check",
    "commit",
    "convert",
    "create",
    "extents",
    "flatten",
    "info",
    "open",
    "path_combine",
    "path_has_protocol",
    "read_string",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
