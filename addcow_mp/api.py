"""The public functions of ``addcow_mp``: one typed call for each job.

Paths may be given as ``str``, ``bytes`` or path objects; anything else raises a
:class:`TypeError` that names the argument. ``jobs`` is the number of worker processes:
None for as many as there are usable processors, 0 for none (the work is done in the calling
process). ``access`` says where names inside images may lead and how files are used; by default
only beneath the directory of the image itself. Workers are spawned, so a script that starts
some must guard its main part with ``if __name__ == "__main__"``, as everything that uses
:mod:`multiprocessing` must.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from addcow_mp.device.access import Access
from addcow_mp.device.chain import READ, open_chain
from addcow_mp.device.extent import Extent
from addcow_mp.device.overlay import Overlay
from addcow_mp.format.header import ADD_COW, DEFAULT_CLUSTER_BITS, RAW

if TYPE_CHECKING:
    from addcow_mp.findings import CheckReport
    from addcow_mp.jobs.create import Created
    from addcow_mp.jobs.info import Info
    from addcow_mp.jobs.options import RunOptions
    from addcow_mp.jobs.report import Report


Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]


def _text(path: Path, argument: str) -> str:
    """Return the path as text. Raises :class:`TypeError`, which names the ``argument``."""
    try:
        return os.fsdecode(path)
    except TypeError:
        wanted = "give a str, bytes or os.PathLike"
        raise TypeError(f"{argument}: {wanted}, not {type(path).__name__}") from None


def _allowed(access: Access | None) -> Access:
    """Return ``access`` with its roots as text."""
    access = Access() if access is None else access
    if isinstance(access.roots, str | bytes | os.PathLike):
        raise TypeError("roots: give a sequence of directories, not one name")
    return access._replace(roots=tuple(_text(root, "roots") for root in access.roots))


def _options(jobs: int | None, access: Access | None) -> RunOptions:
    from addcow_mp.errors import UsageError
    from addcow_mp.jobs.options import RunOptions

    if jobs is not None and not isinstance(jobs, int):
        raise TypeError(f"jobs: give a number or None, not {type(jobs).__name__}")
    if jobs is not None and jobs < 0:
        raise UsageError(message=f"invalid jobs {jobs}: give 0 or more, or None")
    return RunOptions(jobs, _allowed(access))


def open(path: Path, *, writable: bool = False, access: Access | None = None) -> Overlay:  # noqa: A001
    """Open the overlay at ``path`` as the guest's disk: read, write, flush, extents.

    A cluster is read from the image file when its bit is set, else from the backing file, else as
    zeros. A context manager: leaving it flushes and closes.

    The first write raises :class:`DependantsError` when other overlays depend on this one and
    :class:`HardLinksError` when its files have several names, with nothing changed.
    ``Access(force=True)`` allows it, except to an image file that two overlays name.
    """
    if not writable:
        return open_chain(_text(path, "path"), READ, _allowed(access))
    from addcow_mp.jobs.writing import open_for_writing

    return open_for_writing(_text(path, "path"), _allowed(access))


def create(
    path: Path,
    *,
    size: int | None = None,
    backing: Path | None = None,
    backing_format: str | None = None,
    image: Path | None = None,
    image_format: str = RAW,
    cluster_size: int = 1 << DEFAULT_CLUSTER_BITS,
    access: Access | None = None,
) -> Created:
    """Create an overlay; see :func:`addcow_mp.jobs.create.create`.

    Without a backing ALL_ALLOCATED is set: the image file alone is the disk.
    """
    from addcow_mp.jobs.create import create as job

    return job(
        _text(path, "path"),
        size=size,
        backing=None if backing is None else _text(backing, "backing"),
        backing_format=backing_format,
        image=None if image is None else _text(image, "image"),
        image_format=image_format,
        cluster_size=cluster_size,
        access=_allowed(access),
    )


def commit(
    path: Path,
    *,
    keep: bool = False,
    verify: bool = False,
    jobs: int | None = None,
    access: Access | None = None,
) -> Report:
    """Move all allocated clusters into the backing file, clear their bits, free their space.

    ``keep`` leaves overlay and image as they were. ``verify`` reads back from the disk what was
    written, and raises :class:`ReadBackError` if the guest would see anything else. Data is durable
    before bits are cleared, and cleared bits are durable before space is freed.
    """
    from addcow_mp.jobs.commit import commit as job

    return job(_text(path, "path"), keep=keep, verifies=verify, options=_options(jobs, access))


def flatten(
    path: Path,
    *,
    discard: bool = False,
    verify: bool = False,
    jobs: int | None = None,
    access: Access | None = None,
) -> Report:
    """Allocate every cluster, set ALL_ALLOCATED last; ``discard`` removes the overlay file.

    ``verify`` reads back from the disk what was written, before anything is removed, and raises
    :class:`ReadBackError` if the guest would see anything else.
    """
    from addcow_mp.jobs.flatten import flatten as job

    return job(
        _text(path, "path"), discard=discard, verifies=verify, options=_options(jobs, access)
    )


def snapshot(
    path: Path, new: Path, *, backing_format: str = ADD_COW, access: Access | None = None
) -> Created:
    """Create the overlay ``new`` over the disk at ``path``, which stays as it is.

    ``new`` has the same virtual size and cluster size. Its image file is new as well.
    """
    from addcow_mp.jobs.create import snapshot as job

    path, new = _text(path, "path"), _text(new, "new")
    return job(path, new, backing_format=backing_format, access=_allowed(access))


def resize(
    path: Path, size: int | str, *, shrink: bool = False, access: Access | None = None
) -> Report:
    """Give the overlay another virtual size: bytes, or text as ``10G``, ``+1G`` or ``-1G``.

    A new part reads as zeros. A smaller size needs ``shrink``, and no overlay may depend on it.
    """
    from addcow_mp.jobs.resize import resize as job
    from addcow_mp.units import SizeChange, parse_size_change

    if not isinstance(size, int | str):
        raise TypeError(f"size: give a number or text, not {type(size).__name__}")
    change = parse_size_change(size) if isinstance(size, str) else SizeChange(size)
    return job(_text(path, "path"), change, shrink=shrink, access=_allowed(access))


def convert(
    source: Path,
    destination: Path,
    *,
    source_format: str = ADD_COW,
    jobs: int | None = None,
    access: Access | None = None,
) -> Report:
    """Copy the guest's view of ``source`` into the new sparse raw file ``destination``."""
    from addcow_mp.jobs.convert import convert as job

    return job(
        _text(source, "source"),
        _text(destination, "destination"),
        source_format=source_format,
        options=_options(jobs, access),
    )


def check(path: Path, *, access: Access | None = None) -> CheckReport:
    """Check all rules of the format; damage is reported, not raised."""
    from addcow_mp.jobs.check import check as job

    return job(_text(path, "path"), _allowed(access))


def info(path: Path, *, access: Access | None = None) -> Info:
    """Describe the overlay: header, names, sizes, clusters."""
    from addcow_mp.jobs.info import info as job

    return job(_text(path, "path"), _allowed(access))


def extents(path: Path, *, access: Access | None = None) -> Iterator[Extent]:
    """Yield the extents of the guest's view."""
    return _extents(_text(path, "path"), _allowed(access))


def _extents(path: str, access: Access) -> Iterator[Extent]:
    with open_chain(path, READ, access) as disk:
        yield from disk.extents()
