"""addcow-mp: a memory-mapped, multiprocess batch tool for add-cow disk images.

This is the public interface: a function for each command of the command line, with the name of the
command (``farm_check`` is ``addcow farm check``). Some have names of their own: ``extents`` is
``addcow map``, ``chain_info`` is ``addcow info --backing-chain``, ``repair`` is
``addcow check -r``, ``create_raw`` is ``addcow create -f raw``, ``commit_estimate`` and the like
are ``--dry-run``, and ``open`` does what ``addcow io`` does.

Paths are ``str``, ``bytes`` or path objects. Offsets, lengths and sizes are in bytes, times in
seconds, ranges are half-open. ``access`` says where names inside images may lead and how files are
used: an :class:`Access`.

Errors that a user can cause are subclasses of :class:`AddcowError`: one line that names the file
and says what to do. A refusal comes before the first change. ``report`` of an error is what the job
has done before it. A stopped job publishes its finished work and raises :class:`StoppedError`, at a
time limit :class:`TimeLimitError`; the same call continues.

Nothing is printed, and no signal handler is installed. Functions may be called by any thread, and
by several at a time: two that use the same image refuse each other, as two commands do. A script
with a job that starts processes must guard its main part with ``if __name__ == "__main__":``, as
:mod:`multiprocessing` requires.

A module is imported when one of its names is first used, so ``import addcow_mp`` is cheap.

>>> import addcow_mp
>>> with addcow_mp.open("disk.add-cow", writable=True) as disk:  # doctest: +SKIP
...     disk.write(0, b"boot")
...     disk.flush()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Type checkers read this block; the table below it says the same at run time.
# isort: off
if TYPE_CHECKING:
    from addcow_mp.api.arguments import (
        AnyPath as AnyPath,
    )
    from addcow_mp.api.estimates import (
        commit_estimate as commit_estimate,
        flatten_estimate as flatten_estimate,
        rebase_estimate as rebase_estimate,
        reset_estimate as reset_estimate,
    )
    from addcow_mp.api.farm import (
        farm_check as farm_check,
        farm_commit as farm_commit,
        farm_flatten as farm_flatten,
        farm_graph as farm_graph,
        farm_ls as farm_ls,
        farm_manifest_create as farm_manifest_create,
        farm_plan as farm_plan,
        farm_rebase as farm_rebase,
        farm_reset as farm_reset,
        farm_scrub_run as farm_scrub_run,
        farm_scrub_status as farm_scrub_status,
        farm_verify as farm_verify,
    )
    from addcow_mp.api.images import (
        chain_info as chain_info,
        check as check,
        commit as commit,
        compare as compare,
        convert as convert,
        create as create,
        create_raw as create_raw,
        drop as drop,
        extents as extents,
        flatten as flatten,
        info as info,
        manifest_create as manifest_create,
        open as open,  # noqa: A004 - the name that users expect
        rebase as rebase,
        repair as repair,
        reset as reset,
        resize as resize,
        snapshot as snapshot,
        verify as verify,
    )
    from addcow_mp.api.qemu import (
        qemu_args as qemu_args,
        qemu_export as qemu_export,
        qemu_import as qemu_import,
        qemu_status as qemu_status,
        qemu_stream as qemu_stream,
    )
    from addcow_mp.device.access import (
        Access as Access,
    )
    from addcow_mp.device.extent import (
        Extent as Extent,
        ExtentKind as ExtentKind,
    )
    from addcow_mp.device.overlay import (
        Overlay as Overlay,
    )
    from addcow_mp.engine.done_map import (
        Totals as Totals,
    )
    from addcow_mp.engine.fd_passing import (
        UnstartedError as UnstartedError,
    )
    from addcow_mp.errors import (
        AddcowError as AddcowError,
        CleanupError as CleanupError,
        CpuLimitJobError as CpuLimitJobError,
        DependantsError as DependantsError,
        FileError as FileError,
        FormatError as FormatError,
        GuestRunsError as GuestRunsError,
        HangupJobError as HangupJobError,
        HardLinksError as HardLinksError,
        HeldError as HeldError,
        ImageError as ImageError,
        InterruptedJobError as InterruptedJobError,
        LentError as LentError,
        LockedError as LockedError,
        ManifestError as ManifestError,
        NoLocksError as NoLocksError,
        NotAddcowError as NotAddcowError,
        NotReadBackError as NotReadBackError,
        OutsideError as OutsideError,
        RangeError as RangeError,
        ReadBackError as ReadBackError,
        ResourceError as ResourceError,
        RestartsError as RestartsError,
        SpaceError as SpaceError,
        StoppedError as StoppedError,
        SyncError as SyncError,
        TerminatedJobError as TerminatedJobError,
        TimeLimitError as TimeLimitError,
        UnfinishedError as UnfinishedError,
        UnsupportedError as UnsupportedError,
        UnverifiedError as UnverifiedError,
        UsageError as UsageError,
        WorkerError as WorkerError,
    )
    from addcow_mp.farm.check import (
        Checked as Checked,
        FarmReport as FarmReport,
    )
    from addcow_mp.farm.farm_job import (
        Event as Event,
    )
    from addcow_mp.farm.file_graph import (
        FileGraph as FileGraph,
    )
    from addcow_mp.farm.manifest import (
        FarmManifests as FarmManifests,
        ImageManifests as ImageManifests,
    )
    from addcow_mp.farm.members import (
        Member as Member,
        Members as Members,
    )
    from addcow_mp.farm.plan import (
        Plan as Plan,
        Step as Step,
    )
    from addcow_mp.farm.result import (
        FarmResult as FarmResult,
        ImageResult as ImageResult,
    )
    from addcow_mp.farm.scrub import (
        Scrubbed as Scrubbed,
    )
    from addcow_mp.farm.scrub_state import (
        ScrubStatus as ScrubStatus,
    )
    from addcow_mp.farm.verify import (
        FarmLayerReports as FarmLayerReports,
    )
    from addcow_mp.findings import (
        CheckReport as CheckReport,
        Finding as Finding,
        LayerReport as LayerReport,
        Range as Range,
        Severity as Severity,
    )
    from addcow_mp.format.names import (
        path_combine as path_combine,
        path_has_protocol as path_has_protocol,
        read_string as read_string,
    )
    from addcow_mp.jobs.compare import (
        CompareError as CompareError,
        Compared as Compared,
    )
    from addcow_mp.jobs.create import (
        Created as Created,
    )
    from addcow_mp.jobs.info import (
        ChainInfo as ChainInfo,
        ChainLayer as ChainLayer,
        Info as Info,
        RawInfo as RawInfo,
    )
    from addcow_mp.jobs.manifest import (
        Made as Made,
    )
    from addcow_mp.jobs.qemu_args import (
        QemuArgs as QemuArgs,
    )
    from addcow_mp.jobs.qemu_export import (
        Exported as Exported,
    )
    from addcow_mp.jobs.qemu_status import (
        LendingStatus as LendingStatus,
    )
    from addcow_mp.jobs.qemu_stream import (
        Streamed as Streamed,
    )
    from addcow_mp.engine.space import (
        SpaceNeeded as SpaceNeeded,
    )
    from addcow_mp.jobs.report import (
        Estimate as Estimate,
        Outcome as Outcome,
        Report as Report,
    )
    from addcow_mp.jobs.verify import (
        VerifyReport as VerifyReport,
    )

# isort: on

#: The public names, by the module that defines them.
_NAMES = {
    "api.arguments": "AnyPath",
    "api.estimates": "commit_estimate flatten_estimate rebase_estimate reset_estimate",
    "api.farm": (
        "farm_check farm_commit farm_flatten farm_graph farm_ls farm_manifest_create "
        "farm_plan farm_rebase farm_reset farm_scrub_run farm_scrub_status farm_verify"
    ),
    "api.images": (
        "chain_info check commit compare convert create create_raw drop extents flatten info "
        "manifest_create open rebase repair reset resize snapshot verify"
    ),
    "api.qemu": "qemu_args qemu_export qemu_import qemu_status qemu_stream",
    "device.access": "Access",
    "device.extent": "Extent ExtentKind",
    "device.overlay": "Overlay",
    "engine.done_map": "Totals",
    "engine.fd_passing": "UnstartedError",
    "engine.space": "SpaceNeeded",
    "errors": (
        "AddcowError CleanupError CpuLimitJobError DependantsError FileError FormatError "
        "GuestRunsError HangupJobError HardLinksError HeldError ImageError "
        "InterruptedJobError LentError LockedError ManifestError NoLocksError NotAddcowError "
        "NotReadBackError OutsideError RangeError ReadBackError ResourceError RestartsError "
        "SpaceError StoppedError SyncError TerminatedJobError TimeLimitError UnfinishedError "
        "UnsupportedError UnverifiedError UsageError WorkerError"
    ),
    "farm.check": "Checked FarmReport",
    "farm.farm_job": "Event",
    "farm.file_graph": "FileGraph",
    "farm.manifest": "FarmManifests ImageManifests",
    "farm.members": "Member Members",
    "farm.plan": "Plan Step",
    "farm.result": "FarmResult ImageResult",
    "farm.scrub": "Scrubbed",
    "farm.scrub_state": "ScrubStatus",
    "farm.verify": "FarmLayerReports",
    "findings": "CheckReport Finding LayerReport Range Severity",
    "format.names": "path_combine path_has_protocol read_string",
    "jobs.compare": "CompareError Compared",
    "jobs.create": "Created",
    "jobs.info": "ChainInfo ChainLayer Info RawInfo",
    "jobs.manifest": "Made",
    "jobs.qemu_args": "QemuArgs",
    "jobs.qemu_export": "Exported",
    "jobs.qemu_status": "LendingStatus",
    "jobs.qemu_stream": "Streamed",
    "jobs.report": "Estimate Outcome Report",
    "jobs.verify": "VerifyReport",
}

_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}

if not TYPE_CHECKING:  # a type checker would take the list for empty, and accept any name
    __all__ = sorted(_HOMES)  # noqa: PLE0605

    def __getattr__(name: str) -> Any:
        from importlib import import_module

        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"addcow_mp.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
