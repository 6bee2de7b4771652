"""``addcow info``: describe an overlay or every file of its chain."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Annotated, NamedTuple

import typer

from addcow_mp.cli.messages import one_line, warn
from addcow_mp.cli.options import Exclude, Opening, OverlayFiles, Printing, Share
from addcow_mp.cli.several import print_results, results_of
from addcow_mp.device.access import Access
from addcow_mp.jobs.info import ChainLayer, Info, RawInfo, chain_with_users, info
from addcow_mp.units import human_size


def command(
    *,
    overlay: OverlayFiles,
    printing: Printing,
    backing_chain: Annotated[
        bool, typer.Option("--backing-chain", help="every file of the chain")
    ] = False,
    share: Share = False,
    exclude: Exclude = None,
    opening: Opening,
) -> None:
    """Describe overlays."""
    access = opening.access(share=share, exclude=exclude)
    work = partial(_chain if backing_chain else _overlay, access=access)
    files = overlay.files
    following = iter([False] + [True] * len(files))

    def show(one: Described) -> None:
        separator = "\n" if next(following) else ""
        print(separator + one.text)

    status = print_results(
        results_of(files, work),
        printing,
        is_list=len(files) > 1,
        show=show,
        describe=lambda one: one.document,
    )
    raise typer.Exit(status)


class Described(NamedTuple):
    """What is printed of an overlay or of its chain."""

    document: object
    text: str


def _overlay(file: str, access: Access) -> Described:
    found = info(file, access)
    warn(found.warnings)
    return Described(describe(found), "\n".join(map(one_line, _lines(found))))


def _chain(file: str, access: Access) -> Described:
    """Every layer, with its depth and who else stands on it."""
    chain = chain_with_users(file, access)
    warn(chain.warnings)
    documents = [describe(one.about) | _place(one) for one in chain.layers]
    texts = ([*_lines(one.about), *_place_lines(one)] for one in chain.layers)
    return Described(documents, "\n\n".join("\n".join(map(one_line, text)) for text in texts))


def _place(one: ChainLayer) -> dict[str, object]:
    size = one.about.allocated_size
    return {"depth": one.depth, "allocated-size": size, "used-by": one.used_by}


def _place_lines(one: ChainLayer) -> Iterable[str]:
    size = one.about.allocated_size
    yield f"depth: {one.depth}"
    yield "allocated size: " + ("unknown" if size is None else f"{human_size(size)} ({size} bytes)")
    yield f"used by: {', '.join(one.used_by) or 'no other overlay'}"


def describe(one: Info | RawInfo) -> dict[str, object]:
    """The keys of qemu-img info."""
    if isinstance(one, RawInfo):
        return {
            "filename": one.filename,
            "format": one.format,
            "virtual-size": one.virtual_size,
            "actual-size": one.actual_size,
        }
    backing = {
        "backing-filename": one.names.backing,
        "full-backing-filename": one.full_backing,
        "backing-filename-format": one.names.backing_format,
    }
    return {
        "filename": one.filename,
        "format": "add-cow",
        "virtual-size": one.virtual_size,
        "actual-size": one.actual_size,
        "cluster-size": one.header.cluster_size,
        **(backing if one.names.backing is not None else {}),
        "format-specific": {"type": "add-cow", "data": _specific(one)},
    }


def _specific(one: Info) -> dict[str, object]:
    return {
        "image-filename": one.names.image,
        "full-image-filename": one.full_image,
        "image-format": one.names.image_format,
        "header-size": one.header.header_size,
        "all-allocated": one.header.all_allocated,
        "total-clusters": one.total_clusters,
        "allocated-clusters": one.allocated_clusters,
        "compatible-features": one.header.compatible_features,
        **({} if one.lent_to is None else {"lent-to": one.lent_to}),
    }


def _lines(one: Info | RawInfo) -> Iterable[str]:
    yield f"image: {one.filename}"
    yield f"file format: {one.format if isinstance(one, RawInfo) else 'add-cow'}"
    size = one.virtual_size
    yield "virtual size: " + ("unknown" if size is None else f"{human_size(size)} ({size} bytes)")
    yield f"disk size: {human_size(one.actual_size)}"
    if isinstance(one, RawInfo):
        return
    yield f"cluster_size: {one.header.cluster_size}"
    if one.names.backing is not None:
        actual = (
            "" if one.full_backing == one.names.backing else f" (actual path: {one.full_backing})"
        )
        yield f"backing file: {one.names.backing}{actual}"
        yield f"backing file format: {one.names.backing_format}"
    yield "Format specific information:"
    for key, value in _specific(one).items():
        shown = str(value).lower() if isinstance(value, bool) else value
        yield f"    {key.replace('-', ' ')}: {'unknown' if shown is None else shown}"
