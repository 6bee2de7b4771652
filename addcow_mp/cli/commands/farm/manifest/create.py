"""``addcow farm manifest create``: a manifest beside each layer of a farm that has none."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import typer

from addcow_mp.cli.commands.manifest.create import Replace, manifests_json
from addcow_mp.cli.findings import print_counts
from addcow_mp.cli.listing import explain, print_list
from addcow_mp.cli.messages import one_line, say
from addcow_mp.cli.options import (
    FarmProgress,
    ForceRaw,
    ListPrinting,
    Opening,
    Places,
    Share,
    Workers,
)

if TYPE_CHECKING:
    from addcow_mp.farm.manifest import FarmManifests, ImageManifests


def command(
    *,
    places: Places,
    replace: Replace = False,
    progress: FarmProgress,
    workers: Workers,
    printing: ListPrinting,
    share: Share = False,
    force: ForceRaw = False,
    opening: Opening,
) -> None:
    """Write a manifest beside each layer of every overlay that has none; a shared base once.

    Exit status: 0 every layer has one, 1 an image failed or could not be examined.
    """
    from addcow_mp.farm.manifest import farm_manifest

    listed, quiet = places.listed(), printing.quiet
    access = opening.access(share=share, force=force, writes=True, exclude=places.exclude)
    with workers.working(access, workers.copy_options(), progress, quiet=quiet) as (options, hooks):
        found = farm_manifest(listed, options, hooks, replaces=replace)
    rest, lines = {"summary": _summary(found)}, partial(_print_lines, found, quiet=quiet)
    print_list(printing, map(_image, found.all), rest, lines)
    explain(found.places, [one.path for one in found.images], quiet=quiet)
    raise typer.Exit(found.exit_code)


def _image(one: ImageManifests) -> dict[str, object]:
    problem = {} if one.problem is None else {"problem": str(one.problem)}
    return {"filename": one.path, "manifests": manifests_json(one.made), **problem}


def _summary(found: FarmManifests) -> dict[str, int]:
    lent = sum(one.is_lent for one in found.images)
    return {
        "images": len(found.images),
        "written": sum(made.written for one in found.images for made in one.made),
        "failed": sum(one.problem is not None and not one.is_lent for one in found.images),
        **({"lent": lent} if lent else {}),
        "not-examined": len(found.places.unexamined),
    }


def _print_lines(found: FarmManifests, *, quiet: bool) -> None:
    for one in found.all:
        if one.problem is not None:
            say(str(one.problem))
        if not quiet and (one.made or one.problem is None):
            written = sum(made.written for made in one.made)
            print(one_line(f"{one.path}: {written} written, {len(one.made) - written} kept"))
    if not quiet:
        print_counts(_summary(found))
