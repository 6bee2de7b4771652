"""Farm manifest: a manifest beside each layer of a farm that has none, each layer once.

Every image is one task: a process makes the manifests of its chain from the bottom up
(:mod:`addcow_mp.jobs.manifest`). Where overlays share a base, one process writes the base's
manifest, and the others wait for it and use it. An image with much to read is done by all
processes together, after the others. An image that fails does not end the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

from addcow_mp.device.chain import open_chain
from addcow_mp.device.discovery import Named
from addcow_mp.device.overlay import Overlay
from addcow_mp.engine.scan import ScanHooks, scan
from addcow_mp.engine.tasks import Task, equal_tasks
from addcow_mp.engine.worker import Failed, WorkerContext
from addcow_mp.errors import AddcowError, ImageError, LentError, StoppedError
from addcow_mp.farm.places import Found, files_of, overlays_of
from addcow_mp.format.header import ADD_COW, RAW
from addcow_mp.jobs.manifest import Made, create
from addcow_mp.jobs.options import DEFAULTS, NO_HOOKS, Hooks, RunOptions
from addcow_mp.units import MiB

#: Images with more bytes to read are done by all processes together: others can help for longer
#: than it takes to distribute the work.
LARGE = 256 * MiB


@dataclass(frozen=True)
class ImageManifests:
    """The overlay at ``path``: the manifests of its chain, or why they could not be made."""

    path: str
    made: tuple[Made, ...] = ()
    problem: AddcowError | None = None

    @property
    def is_lent(self) -> bool:
        """Whether QEMU uses the image, so that it gets no manifest."""
        return isinstance(self.problem, LentError)


@dataclass(frozen=True)
class FarmManifests:
    """All images in order of paths, and what else was found in the places."""

    exit_statuses: ClassVar = {
        0: "every layer has a manifest",
        1: "an image failed or a place could not be examined, or the given files are no overlays",
    }

    images: list[ImageManifests]
    places: Found = field(repr=False)

    @property
    def all(self) -> list[ImageManifests]:
        """The images, and what could not be examined."""
        hidden = (
            ImageManifests(one.path, problem=ImageError(path=one.path, problem=one.reason))
            for one in self.places.unexamined
        )
        return [*self.images, *hidden]

    @property
    def exit_code(self) -> int:
        """1 when an image failed, a place was not examined, or the given files are no overlays."""
        failed = any(one.problem is not None for one in self.all)
        return int(failed or (not self.images and bool(self.places.named)))


@dataclass(frozen=True)
class _Work:
    """Does a task: the manifests of one image. Picklable to a worker process."""

    paths: list[str]
    options: RunOptions
    replaces: bool

    def __call__(self, task: Task, worker: WorkerContext) -> ImageManifests:
        hooks = Hooks(stopping=worker.must_stop)
        return _of_image(self.paths[task.first], self.options, hooks, self.replaces)


def _of_image(path: str, options: RunOptions, hooks: Hooks, replaces: bool) -> ImageManifests:
    try:
        return ImageManifests(path, tuple(create(path, options, hooks, replaces=replaces)))
    except StoppedError:
        raise
    except LentError as error:
        return _below_lent(path, options, hooks, replaces, error)
    except AddcowError as error:
        return ImageManifests(path, problem=error.without_traceback())


def _below_lent(
    path: str, options: RunOptions, hooks: Hooks, replaces: bool, lent: LentError
) -> ImageManifests:
    """The manifests of the layers below an overlay that is lent, which gets none itself."""
    try:
        with open_chain(path, access=options.access._replace(share=True), lent=True) as overlay:
            below = overlay.backing
            name = None if below is None else below.path
            beneath = options.access.beside(overlay.cow.real)
            format_ = ADD_COW if isinstance(below, Overlay) else RAW
        if name is None:
            return ImageManifests(path, problem=lent.without_traceback())
        # What a base begins with was the question when the overlay was made, and is none here.
        access = beneath._replace(force=True, files=frozenset())
        options = replace(options, access=access)
        made = create(name, options, hooks, format_=format_, replaces=replaces)
        return ImageManifests(path, tuple(made), lent.without_traceback())
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
    """Make the manifests of all overlays in ``places`` and of the layers below them.

    ``replaces`` existing ones that do not match. Raises :class:`ImageError` when none of the places
    is there, and :class:`RestartsError` when ``hooks`` stops it.
    """
    with hooks.looking():
        there = files_of(places, options.access)
        overlays = overlays_of(there.files, there.unexamined)
    options = replace(options, access=there.access)
    paths = sorted(one.path for one in overlays)
    large = sorted(one.path for one in overlays if _stored_bytes(one) > LARGE)
    small = sorted(set(paths) - set(large))
    done: dict[str, ImageManifests] = {}

    def enter(one: ImageManifests) -> None:
        done[one.path] = one
        hooks.counted(len(done), len(paths))

    for one in _small_ones(small, options, hooks, replaces):
        enter(one)
    for path in large:
        enter(_of_image(path, options, hooks, replaces))
    return FarmManifests([done[path] for path in paths], there)


def _stored_bytes(one: Named) -> int:
    """The bytes that an overlay's own image file occupies."""
    try:
        return os.stat(one.image_path or "").st_blocks * 512
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
