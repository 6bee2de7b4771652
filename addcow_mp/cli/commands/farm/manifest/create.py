"""``addcow farm manifest create``: a manifest beside each layer of a farm that has none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from addcow_mp.cli.jsontext import print_document, print_line
from addcow_mp.cli.messages import one_line, say
from addcow_mp.cli.options import (
    FarmProgress,
    ForceRaw,
    Listing,
    ListPrinting,
    Opening,
    Places,
    Share,
    Workers,
)
from addcow_mp.cli.reasons import explain

if TYPE_CHECKING:
    from addcow_mp.farm.manifest import FarmManifests, ImageManifests


def command(
    *,
    places: Places,
    replace: Annotated[
        bool, typer.Option("--replace", help="replace existing manifests that do not match")
    ] = False,
    progress: FarmProgress,
    workers: Workers,
    printing: ListPrinting,
    share: Share = False,
    force: ForceRaw = False,
    opening: Opening,
) -> None:
    """Write a manifest beside each layer of every overlay that has none; a shared base once.

    Exit status: 0 every layer has one, 1 some image failed or could not be looked at.
    """
    from addcow_mp.farm.manifest import farm_manifest

    listed, quiet = places.listed(), printing.quiet
    access = opening.access(share=share, force=force, writes=True, exclude=places.exclude)
    with workers.working(access, workers.copy_options(), progress, quiet=quiet) as (options, hooks):
        found = farm_manifest(listed, options, hooks, replaces=replace)
    _show(found, printing)
    said = explain(found.places, [one.path for one in found.images], quiet=quiet)
    raise typer.Exit(found.exit_code or int(said))


def _show(found: FarmManifests, printing: ListPrinting) -> None:
    if printing.output is Listing.human:
        _print_lines(found, quiet=printing.quiet)
    elif printing.output is Listing.json:
        print_document({"images": [_image(one) for one in _all(found)], "summary": _summary(found)})
    else:
        for one in _all(found):
            print_line(_image(one))
        print_line({"summary": _summary(found)})


def _all(found: FarmManifests) -> list[ImageManifests]:
    from addcow_mp.errors import ImageError
    from addcow_mp.farm.manifest import ImageManifests

    hidden = (
        ImageManifests(one.path, problem=ImageError(path=one.path, problem=one.reason))
        for one in found.places.unexamined
    )
    return [*found.images, *hidden]


def _image(one: ImageManifests) -> dict[str, object]:
    layers = [
        {"filename": made.path, "guest-digest": made.guest_digest, "written": made.written}
        for made in one.made
    ]
    problem = {} if one.problem is None else {"problem": str(one.problem)}
    return {"filename": one.path, "manifests": layers, **problem}


def _summary(found: FarmManifests) -> dict[str, int]:
    failed = sum(one.problem is not None for one in found.images)
    return {
        "images": len(found.images),
        "written": found.written,
        "failed": failed,
        "not-examined": len(found.places.unexamined),
    }


def _print_lines(found: FarmManifests, *, quiet: bool) -> None:
    for one in _all(found):
        if one.problem is not None:
            say(str(one.problem))
        elif not quiet:
            written = sum(made.written for made in one.made)
            print(one_line(f"{one.path}: {written} written, {len(one.made) - written} kept"))
    if not quiet:
        counts = (f"{count} {word}" for word, count in _summary(found).items())
        print(", ".join(counts).replace("-", " "))
