"""The public functions, as ``addcow_mp`` shows them: small, typed, one call each.

Paths may be given as ``str`` or path objects. ``jobs`` is the number of worker processes:
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
from addcow_mp.device.chain import READ, WRITE, open_chain
from addcow_mp.device.extent import Extent
from addcow_mp.device.overlay import Overlay
from addcow_mp.format.header import ADD_COW, DEFAULT_CLUSTER_BITS, RAW

if TYPE_CHECKING:
    from addcow_mp.jobs.create import Created
    from addcow_mp.jobs.findings import CheckReport
    from addcow_mp.jobs.info import Info
    from addcow_mp.jobs.report import Conduct, Report


def _conduct(jobs: int | None, access: Access | None) -> Conduct:
    from addcow_mp.jobs.report import Conduct

    return Conduct(jobs, access=access or Access())


Path = str | os.PathLike[str]


def open(path: Path, *, writable: bool = False, access: Access | None = None) -> Overlay:  # noqa: A001
    """Open the overlay at ``path`` as the guest's disk: read, write, flush, extents.

    A cluster is read from the image file when its bit is set, else from the backing, else
    as zeros. A context manager: leaving it flushes and closes.
    """
    return open_chain(os.fspath(path), WRITE if writable else READ, access)


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
        os.fspath(path),
        size=size,
        backing=None if backing is None else os.fspath(backing),
        backing_format=backing_format,
        image=None if image is None else os.fspath(image),
        image_format=image_format,
        cluster_size=cluster_size,
        access=access,
    )


def commit(
    path: Path,
    *,
    keep: bool = False,
    verify: bool = False,
    jobs: int | None = None,
    access: Access | None = None,
) -> Report:
    """Move all local clusters into the backing file, clear their bits, free their space.

    ``keep`` leaves overlay and image as they were; ``verify`` reads back from the disk what was
    written and raises :class:`ReadBackError` if it shows the guest anything else. Backing data
    is durable before bits are cleared, and cleared bits are durable before space is freed.
    """
    from addcow_mp.jobs.commit import commit as job

    return job(os.fspath(path), keep=keep, verifies=verify, conduct=_conduct(jobs, access))


def flatten(
    path: Path,
    *,
    discard: bool = False,
    verify: bool = False,
    jobs: int | None = None,
    access: Access | None = None,
) -> Report:
    """Make every cluster local, set ALL_ALLOCATED last; ``discard`` removes the overlay file.

    ``verify`` reads back from the disk what was written, before anything is removed, and raises
    :class:`ReadBackError` if it shows the guest anything else.
    """
    from addcow_mp.jobs.flatten import flatten as job

    return job(os.fspath(path), discard=discard, verifies=verify, conduct=_conduct(jobs, access))


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
        os.fspath(source),
        os.fspath(destination),
        source_format=source_format,
        conduct=_conduct(jobs, access),
    )


def check(path: Path, *, access: Access | None = None) -> CheckReport:
    """Run every check of the format's rules; damage is reported, not raised."""
    from addcow_mp.jobs.check import check as job

    return job(os.fspath(path), access)


def info(path: Path, *, access: Access | None = None) -> Info:
    """Describe the overlay: header, names, sizes, clusters."""
    from addcow_mp.jobs.info import info as job

    return job(os.fspath(path), access)


def extents(path: Path, *, access: Access | None = None) -> Iterator[Extent]:
    """What the guest's view is made of, from its beginning to its end."""
    with open(path, access=access) as disk:
        yield from disk.extents()
