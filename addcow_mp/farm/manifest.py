"""Farm manifest: a manifest beside each layer of a farm that has none, each layer once.

Every image is one task: a process makes the manifests of its chain from the bottom up
(:mod:`addcow_mp.jobs.manifest`). Overlays that share a base meet at the base's manifest: one
process writes it, the others wait for it and take it. An image with much to read is done by all
processes together, after the others. An image that fails does not end the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from addcow_mp.engine.scan import ScanHooks, scan
from addcow_mp.engine.tasks import Task, equal_tasks
from addcow_mp.engine.worker import Failed, WorkerContext
from addcow_mp.errors import AddcowError, StoppedError
from addcow_mp.farm.places import Found, files_of, overlays_of
from addcow_mp.jobs.manifest import Made, create
from addcow_mp.jobs.options import DEFAULTS, NO_HOOKS, Hooks, RunOptions
from addcow_mp.units import MiB

#: Images with more bytes to read are done by all processes together: others can help for longer
#: than it takes to hand out the work.
LARGE = 256 * MiB


@dataclass(frozen=True)
class ImageManifests:
    """The overlay at ``path``: the manifests of its chain, or why they could not be made."""

    path: str
    made: tuple[Made, ...] = ()
    problem: AddcowError | None = None


@dataclass(frozen=True)
class FarmManifests:
    """All images in order of paths, and what else was found in the places."""

    images: list[ImageManifests]
    places: Found = field(repr=False)

    @property
    def written(self) -> int:
        """Manifests that were written."""
        return sum(one.written for image in self.images for one in image.made)

    @property
    def exit_code(self) -> int:
        """1 when an image failed or a place could not be looked at."""
        failed = any(image.problem is not None for image in self.images)
        return 1 if failed or self.places.unexamined else 0


@dataclass(frozen=True)
class _Work:
    """The work of a task: the manifests of one image. Picklable to a worker process."""

    paths: list[str]
    options: RunOptions
    replaces: bool

    def __call__(self, task: Task, worker: WorkerContext) -> ImageManifests:
        path, hooks = self.paths[task.first], Hooks(stopping=worker.must_stop)
        return _of_image(path, self.options, hooks, replaces=self.replaces)


def _of_image(path: str, options: RunOptions, hooks: Hooks, *, replaces: bool) -> ImageManifests:
    try:
        return ImageManifests(path, tuple(create(path, options, hooks, replaces=replaces)))
    except StoppedError:
        raise
    except AddcowError as error:
        return ImageManifests(path, problem=error.without_traceback())


def farm_manifest(
    places: Iterable[str],
    options: RunOptions = DEFAULTS,
    hooks: Hooks = NO_HOOKS,
    *,
    replaces: bool = False,
) -> FarmManifests:
    """Make the manifests of all overlays in ``places`` and of what they stand on.

    ``replaces`` existing ones that do not match. Raises :class:`ImageError` when none of the places
    is there, and :class:`RestartsError` when ``hooks`` stops it.
    """
    with hooks.looking():
        there = files_of(places, options.access)
        paths = sorted(one.path for one in overlays_of(there.files, there.unexamined))
    options = replace(options, access=there.access)
    large = [path for path in paths if _bytes_of(path) > LARGE]
    small = [path for path in paths if path not in set(large)]
    done: dict[str, ImageManifests] = {}
    found = (
        *_small_ones(small, options, hooks, replaces),
        *_large_ones(large, options, hooks, replaces),
    )
    for one in found:
        done[one.path] = one
        hooks.counted(len(done), len(paths))
    return FarmManifests([done[path] for path in paths], there)


def _bytes_of(path: str) -> int:
    """About how many bytes there are to read beside an overlay's base."""
    try:
        return os.stat(os.path.splitext(path)[0] + ".raw").st_blocks * 512
    except OSError:
        return 0


def _small_ones(
    paths: list[str], options: RunOptions, hooks: Hooks, replaces: bool
) -> Iterator[ImageManifests]:
    def failed(result: Failed) -> ImageManifests:
        return ImageManifests(paths[result.task.first], problem=result.error)

    work = _Work(paths, replace(options, jobs=0), replaces)
    scan_hooks = ScanHooks(f"{len(paths)} images", failed, hooks.stopping)
    scan_options = replace(options.scan_options, counts=True)
    for _, one in scan(work, equal_tasks(len(paths), 1), scan_options, scan_hooks):
        yield one


def _large_ones(
    paths: list[str], options: RunOptions, hooks: Hooks, replaces: bool
) -> Iterator[ImageManifests]:
    for path in paths:
        yield _of_image(path, options, hooks, replaces=replaces)
