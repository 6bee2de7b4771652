"""Functions that lend overlays to QEMU and take them back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Unpack

from addcow_mp.api.arguments import (
    AnyPath,
    Stoppable,
    allowed,
    one_of,
    public,
    text,
    working,
)
from addcow_mp.device.access import Access

if TYPE_CHECKING:
    from addcow_mp.jobs.qemu_args import QemuArgs
    from addcow_mp.jobs.qemu_export import Exported
    from addcow_mp.jobs.qemu_status import LendingStatus
    from addcow_mp.jobs.qemu_stream import Streamed
    from addcow_mp.jobs.report import Report


def qemu_export(
    path: AnyPath,
    qcow2: AnyPath | None = None,
    *,
    crash: Literal["strict", "relaxed"] = "strict",
    absolute_data_file: bool = False,
    access: Access | None = None,
) -> Exported:
    """Lend the overlay to QEMU, which uses it through the new file ``qcow2`` beside it.

    Nothing is copied. ``qcow2``: None = ``path`` with the suffix ``.qcow2``. ``crash``: with
    ``strict``, a power cut of the host does the same harm as with a plain disk; ``relaxed`` is
    faster, but after a power cut, data that the guest wrote without a flush may read as zeros.
    ``absolute_data_file``: the qcow2 file names the image file by its absolute path, so a copy of
    the qcow2 file writes into the original image file.
    """
    from addcow_mp.jobs.qemu_export import export as job

    one_of("crash", crash, ("strict", "relaxed"))
    return job(
        text(path, "path"),
        None if qcow2 is None else text(qcow2, "qcow2"),
        relaxed=crash == "relaxed",
        absolute_data_file=absolute_data_file,
        access=allowed(access),
    )


def qemu_import(
    path: AnyPath,
    *,
    discard: bool = False,
    adopt: bool = False,
    abandon: bool = False,
    access: Access | None = None,
) -> Report:
    """Take the overlay back from QEMU; also finish an interrupted export or import.

    ``discard``: remove the ``.add-cow`` file if every cluster is allocated. ``adopt``: accept a
    copy of the ``.add-cow`` or qcow2 file as the original. ``abandon``: give up what the guest has
    written, if the qcow2 file is lost; it needs ``Access(force=True)``. Raises
    :class:`GuestRunsError` while a program has the disk open.
    """
    from addcow_mp.jobs.qemu_import import ImportOptions, take_back

    options = ImportOptions(discard=discard, adopt=adopt, abandon=abandon)
    return take_back(text(path, "path"), options, access=allowed(access))


def qemu_args(path: AnyPath, *, access: Access | None = None) -> QemuArgs:
    """Return the arguments for QEMU, its monitor or libvirt that open a lent overlay."""
    from addcow_mp.jobs.qemu_args import qemu_args as job

    return job(text(path, "path"), allowed(access))


def qemu_status(path: AnyPath, *, access: Access | None = None) -> LendingStatus:
    """Say whether the overlay is lent to QEMU, and which program has it open."""
    from addcow_mp.jobs.qemu_status import status as job

    return job(text(path, "path"), allowed(access))


@public
def qemu_stream(
    path: AnyPath,
    qmp: AnyPath,
    *,
    rate: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **keywords: Unpack[Stoppable],
) -> Streamed:
    """Make every cluster of a lent overlay allocated while its guest runs; QEMU copies.

    ``qmp``: the Unix socket of QEMU's monitor. ``rate``: bytes per second. ``progress``: called
    with the bytes done and all bytes. A stop loses nothing, and the same call continues. It needs
    the package ``qemu.qmp``: ``pip install 'addcow-mp[qemu]'``. It runs an event loop of asyncio,
    so a coroutine must call it with ``asyncio.to_thread``.
    """
    from addcow_mp.jobs.qemu_stream import stream as job

    path, socket = text(path, "path"), text(qmp, "qmp")
    with working({**keywords, "rate": rate, "progress": progress}) as (options, hooks):
        limit = options.copy_options.rate
        return job(path, socket, rate=limit, access=options.access, hooks=hooks)
