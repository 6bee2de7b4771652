"""Functions on one image, or on two: one typed call for each command."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, Unpack

from addcow_mp.api.arguments import (
    AnyPath,
    Changing,
    Copying,
    Reading,
    Working,
    allowed,
    check_format,
    check_number,
    new_backing,
    one_of,
    public,
    text,
    working,
)
from addcow_mp.device.access import Access
from addcow_mp.device.chain import READ, open_chain
from addcow_mp.device.extent import Extent
from addcow_mp.device.overlay import Overlay
from addcow_mp.format.header import ADD_COW, DEFAULT_CLUSTER_BITS, RAW

if TYPE_CHECKING:
    from addcow_mp.findings import CheckReport
    from addcow_mp.jobs.compare import Compared
    from addcow_mp.jobs.create import Created
    from addcow_mp.jobs.info import ChainInfo, Info
    from addcow_mp.jobs.manifest import Made
    from addcow_mp.jobs.report import Report
    from addcow_mp.jobs.verify import VerifyReport


def open(path: AnyPath, *, writable: bool = False, access: Access | None = None) -> Overlay:  # noqa: A001
    """Open the overlay at ``path`` as the guest's disk: read, write, flush, extents.

    A cluster is read from the image file if its bit is set, else from the backing file; without a
    backing file it reads as zeros. The result is a context manager: its end flushes and closes.

    The first write raises :class:`DependantsError` when other overlays depend on this one and
    :class:`HardLinksError` when its files have several hard links. Nothing is changed then.
    ``Access(force=True)`` allows the write, except to an image file that two overlays name.
    """
    if not writable:
        return open_chain(text(path, "path"), READ, allowed(access))
    from addcow_mp.jobs.writing import open_for_writing

    return open_for_writing(text(path, "path"), allowed(access))


# New files


def create(
    path: AnyPath,
    *,
    size: int | None = None,
    backing: AnyPath | None = None,
    backing_format: str | None = None,
    image: AnyPath | None = None,
    image_format: str = RAW,
    cluster_size: int = 1 << DEFAULT_CLUSTER_BITS,
    access: Access | None = None,
) -> Created:
    """Create the overlay ``path``; nothing that exists is overwritten.

    ``size``: the virtual size in bytes; None = the image file's length, else the backing file's
    size. ``backing`` needs its ``backing_format``, ``raw`` or ``add-cow``; without a backing file
    ALL_ALLOCATED is set, and the image file alone is the disk. ``image``: the image file, with its
    data if it exists; None = ``path`` with the suffix ``.raw``. ``cluster_size``: bytes, a power of
    two from 4 KiB to 2 MiB.
    """
    from addcow_mp.jobs.create import create as job

    check_number("size", size)
    return job(
        text(path, "path"),
        size=size,
        backing=None if backing is None else text(backing, "backing"),
        backing_format=backing_format,
        image=None if image is None else text(image, "image"),
        image_format=image_format,
        cluster_size=cluster_size,
        access=allowed(access),
    )


def create_raw(path: AnyPath, size: int) -> int:
    """Create a new sparse raw file; returns its size: ``size`` bytes, rounded up to 512."""
    from addcow_mp.jobs.create import create_raw as job

    check_number("size", size)
    return job(text(path, "path"), size)


def snapshot(
    path: AnyPath,
    new: AnyPath,
    *,
    backing_format: str = ADD_COW,
    manifest: bool = True,
    access: Access | None = None,
) -> Created:
    """Create the overlay ``new`` over the disk at ``path``, which stays as it is.

    ``new`` has the same virtual size and cluster size. Its image file is new as well.
    ``backing_format``: the format of ``path``, ``raw`` or ``add-cow``. ``manifest``: ``new`` gets a
    manifest if the disk has one.
    """
    from addcow_mp.jobs.create import snapshot as job

    path, new = text(path, "path"), text(new, "new")
    return job(path, new, backing_format=backing_format, access=allowed(access), manifest=manifest)


@public
def convert(
    source: AnyPath,
    destination: AnyPath,
    *,
    source_format: str = ADD_COW,
    **keywords: Unpack[Copying],
) -> Report:
    """Copy the guest's view of ``source`` into the new sparse raw file ``destination``.

    When it is stopped or fails, the new file is removed.
    """
    from addcow_mp.jobs.convert import USUAL_SPARSE
    from addcow_mp.jobs.convert import convert as job

    source, destination = text(source, "source"), text(destination, "destination")
    with working(keywords, usual=USUAL_SPARSE) as (options, hooks):
        return job(source, destination, source_format=source_format, options=options, hooks=hooks)


# Reading


def info(path: AnyPath, *, access: Access | None = None) -> Info:
    """Describe the overlay: header, names, sizes, clusters."""
    from addcow_mp.jobs.info import info as job

    return job(text(path, "path"), allowed(access))


def chain_info(path: AnyPath, *, access: Access | None = None) -> ChainInfo:
    """Describe every layer of the overlay's chain, and say which other overlays stand on each.

    Other overlays are searched beside the files of the chain and beneath the roots of ``access``.
    """
    from addcow_mp.jobs.info import chain_with_users as job

    return job(text(path, "path"), allowed(access))


def extents(path: AnyPath, *, access: Access | None = None) -> Iterator[Extent]:
    """Yield the extents of the guest's view: the ranges of bytes, and the files that hold them.

    The chain stays open, and locked for reading, until the last extent is yielded.
    """
    return _extents(text(path, "path"), allowed(access))


def _extents(path: str, access: Access) -> Iterator[Extent]:
    with open_chain(path, READ, access) as disk:
        yield from disk.extents()


def check(path: AnyPath, *, access: Access | None = None) -> CheckReport:
    """Check all rules of the format; damage is reported, not raised."""
    from addcow_mp.jobs.check import check as job

    return job(text(path, "path"), allowed(access))


def repair(
    path: AnyPath, what: Literal["leaks", "all"] = "leaks", *, access: Access | None = None
) -> CheckReport:
    """Check, repair what can be repaired without guessing, and check again.

    ``leaks``: data in clusters that are not allocated is freed, and header bytes that no name uses
    are cleared. ``all``: stray bits, and a file that ends inside its bitmap, are repaired too; the
    old header and bitmap are copied to the file ``backup`` of the report first.
    """
    from addcow_mp.jobs.repair import repair as job

    one_of("repair", what, ("leaks", "all"))
    return job(text(path, "path"), allowed(access), everything=what == "all")


@public
def compare(
    one: AnyPath,
    other: AnyPath,
    *,
    one_format: str = ADD_COW,
    other_format: str = ADD_COW,
    strict: bool = False,
    every: bool = False,
    **keywords: Unpack[Working],
) -> Compared:
    """Compare what the guests of two images see. The rest of a longer one must be zeros.

    ``strict``: sizes and the places of data must be equal too. ``every``: find all differences, not
    only the first. Raises :class:`CompareError` when an image cannot be read.
    """
    from addcow_mp.jobs.compare import compare as job

    paths, formats = (text(one, "one"), text(other, "other")), (one_format, other_format)
    check_format("one_format", one_format)
    check_format("other_format", other_format)
    with working(keywords) as (options, hooks):
        return job(*paths, formats, strict=strict, every=every, options=options, hooks=hooks)


@public
def verify(
    path: AnyPath, *, file_format: str = ADD_COW, **keywords: Unpack[Reading]
) -> VerifyReport:
    """Compare every layer of the image with its manifest; differences are reported, not raised."""
    from addcow_mp.jobs.verify import verify as job

    path = text(path, "path")
    check_format("file_format", file_format)
    with working(keywords) as (options, hooks):
        return job(path, options, hooks, format_=file_format)


@public
def manifest_create(
    path: AnyPath,
    *,
    replace: bool = False,
    file_format: str = ADD_COW,
    **keywords: Unpack[Working],
) -> list[Made]:
    """Write a manifest beside each layer of the image that has none; the deepest comes first.

    ``replace``: existing manifests that do not describe these files are replaced. Without it they
    raise :class:`ManifestError`.
    """
    from addcow_mp.jobs.manifest import create as job

    path = text(path, "path")
    check_format("file_format", file_format)
    with working(keywords) as (options, hooks):
        return job(path, options, hooks, format_=file_format, replaces=replace)


# Changing


@public
def commit(
    path: AnyPath,
    *,
    keep: bool = False,
    base: AnyPath | None = None,
    verify: bool = False,
    **keywords: Unpack[Changing],
) -> Report:
    """Move all allocated clusters into the backing file, clear their bits, free their space.

    ``keep``: the overlay and its image file stay as they were. ``base``: a layer further down the
    chain gets what the guest sees; give its path, or its name in the chain. Then the overlay and
    its image file stay as well, and so do the views of all other overlays above ``base``.
    ``verify`` reads back from the disk what was written, and raises :class:`ReadBackError` if the
    guest would see anything else. Data is durable before bits are cleared, and cleared bits are
    durable before space is freed. After a stop the same call continues; with ``keep`` or ``base``
    it starts again. If the changed layers have manifests, new ones are made from them, unless
    ``base`` is given.
    """
    path = text(path, "path")
    into = None if base is None else text(base, "base")
    with working(keywords) as (options, hooks):
        if into is not None:
            from addcow_mp.jobs.commit_base import commit_into

            return commit_into(path, into, verifies=verify, options=options, hooks=hooks)
        from addcow_mp.jobs.commit import commit as job

        return job(path, keep=keep, verifies=verify, options=options, hooks=hooks)


@public
def flatten(
    path: AnyPath,
    *,
    discard: bool = False,
    verify: bool = False,
    **keywords: Unpack[Changing],
) -> Report:
    """Allocate every cluster, set ALL_ALLOCATED last; ``discard`` removes the overlay file.

    ``verify`` reads back from the disk what was written, before anything is removed, and raises
    :class:`ReadBackError` if the guest would see anything else. After a stop the same call
    continues. If the overlay has a manifest, a new one is made from it.
    """
    from addcow_mp.jobs.flatten import flatten as job

    path = text(path, "path")
    with working(keywords) as (options, hooks):
        return job(path, discard=discard, verifies=verify, options=options, hooks=hooks)


@public
def rebase(
    path: AnyPath,
    backing: AnyPath | None,
    *,
    backing_format: str | None = None,
    unsafe: bool = False,
    trust_manifests: bool = False,
    verify: bool = False,
    **keywords: Unpack[Changing],
) -> Report:
    """Give the overlay another backing file; its guest sees the same disk.

    Clusters in which the old and the new backing file differ are copied first. ``backing``: the
    path of the new backing file; None = none, so every cluster is copied. ``backing_format``:
    ``raw`` or ``add-cow``; None = the format of the old backing file. ``unsafe``: only the name
    changes, and the guest sees what the new file holds. ``trust_manifests``: manifests say where
    the files differ, and their data is not compared. ``verify`` reads back from the disk what the
    guest sees. After a stop the same call continues. If the overlay has a manifest, a new one is
    made from it.
    """
    from addcow_mp.jobs.rebase import rebase as job

    path = text(path, "path")
    new = new_backing(backing, backing_format, unsafe=unsafe, trust_manifests=trust_manifests)
    with working(keywords) as (options, hooks):
        return job(path, new, verifies=verify, options=options, hooks=hooks)


def resize(
    path: AnyPath, size: int | str, *, shrink: bool = False, access: Access | None = None
) -> Report:
    """Give the overlay another virtual size: bytes, or text like ``10G``, ``+1G`` or ``-1G``.

    A new part reads as zeros. A smaller size needs ``shrink``, and is refused while other overlays
    depend on the disk.
    """
    from addcow_mp.jobs.resize import resize as job
    from addcow_mp.units import SizeChange, parse_size_change

    if not isinstance(size, int | str):
        raise TypeError(f"size: give a number or text, not {type(size).__name__}")
    change = parse_size_change(size) if isinstance(size, str) else SizeChange(size)
    return job(text(path, "path"), change, shrink=shrink, access=allowed(access))


def reset(path: AnyPath, *, manifest: bool = True, access: Access | None = None) -> Report:
    """Let the overlay show its backing file again; what its guest has written is lost.

    An overlay on which another one stands is refused. ``reset_estimate`` says what would be done.
    ``manifest``: if the overlay has a manifest, a new one is made.
    """
    from addcow_mp.jobs.options import RunOptions
    from addcow_mp.jobs.reset import reset as job

    options = RunOptions(0, allowed(access), manifests=manifest)
    return job(text(path, "path"), options=options)


def drop(path: AnyPath, *, access: Access | None = None) -> Report:
    """Remove the ``.add-cow`` file of an overlay whose image file is the whole disk.

    It is refused unless every cluster is allocated and no other overlay needs the file.
    """
    from addcow_mp.jobs.drop import drop as job
    from addcow_mp.jobs.options import RunOptions

    return job(text(path, "path"), options=RunOptions(0, allowed(access)))
