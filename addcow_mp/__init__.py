"""addcow-mp: a memory-mapped, multiprocess batch tool for add-cow disk images.

This is the public interface. Offsets, lengths and sizes are in bytes, ranges are half-open. Errors
that a user can cause are subclasses of :class:`AddcowError`; the message names the file and what to
do. A module is imported when one of its names is first used, so ``import addcow_mp`` is cheap.

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
        open,  # noqa: A004 - the name that users expect
        resize,
        snapshot,
    )
    from addcow_mp.device.access import Access
    from addcow_mp.device.extent import Extent
    from addcow_mp.device.overlay import Overlay
    from addcow_mp.errors import (
        AddcowError,
        CleanupError,
        CpuLimitJobError,
        DependantsError,
        FileError,
        FormatError,
        GuestRunsError,
        HangupJobError,
        HardLinksError,
        HeldError,
        ImageError,
        InterruptedJobError,
        LentError,
        LockedError,
        ManifestError,
        NoLocksError,
        NotAddcowError,
        NotReadBackError,
        OutsideError,
        RangeError,
        ReadBackError,
        ResourceError,
        RestartsError,
        SpaceError,
        StoppedError,
        SyncError,
        TerminatedJobError,
        TimeLimitError,
        UnfinishedError,
        UnsupportedError,
        UnverifiedError,
        UsageError,
        WorkerError,
    )
    from addcow_mp.format.names import path_combine, path_has_protocol, read_string

_HOMES = {
    **dict.fromkeys(
        (
            "check",
            "commit",
            "convert",
            "create",
            "extents",
            "flatten",
            "info",
            "open",
            "resize",
            "snapshot",
        ),
        "api",
    ),
    "Access": "device.access",
    "Extent": "device.extent",
    "Overlay": "device.overlay",
    **dict.fromkeys(("path_combine", "path_has_protocol", "read_string"), "format.names"),
}

__all__ = ["Access", "Extent", "Overlay"]
__all__ += [
    "check",
    "commit",
    "convert",
    "create",
    "extents",
    "flatten",
    "info",
    "open",
    "resize",
    "snapshot",
]
__all__ += ["path_combine", "path_has_protocol", "read_string"]
__all__ += ["AddcowError", "CleanupError", "CpuLimitJobError", "DependantsError", "FileError"]
__all__ += ["FormatError", "HangupJobError", "HardLinksError", "HeldError", "ImageError"]
__all__ += [
    "GuestRunsError",
    "InterruptedJobError",
    "LentError",
    "LockedError",
    "ManifestError",
    "NoLocksError",
    "NotAddcowError",
]
__all__ += ["NotReadBackError", "OutsideError", "RangeError", "ReadBackError", "ResourceError"]
__all__ += ["RestartsError", "SpaceError", "StoppedError", "SyncError", "TerminatedJobError"]
__all__ += ["TimeLimitError", "UnfinishedError", "UnsupportedError", "UnverifiedError"]
__all__ += ["UsageError", "WorkerError"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name, "errors")
    return getattr(import_module(f"addcow_mp.{home}"), name)
