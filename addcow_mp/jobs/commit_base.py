"""Commit into a layer further down: BASE then shows what FILE shows, and other views stay.

::

    FILE -> layers between -> OVER -> BASE -> layers below

FILE, the layers between and the layers below stay as they are, as with ``commit -d``. Only OVER,
the layer directly above BASE, gets clusters. If OVER is FILE, the job is ``commit -d``.

*Covered* are the bytes of FILE's view that do not come from BASE: those of a cluster that is
allocated in a layer above BASE, and zeros where a layer above BASE has ended
(:mod:`addcow_mp.engine.covered`). The commit changes only these bytes of BASE. OVER shows them
where it has no cluster of its own, and all layers above read from OVER, not from BASE. So OVER
first gets what BASE holds there. The order is:

1. The manifests of BASE and OVER are removed, and their directories are synced.
2. Each missing cluster of OVER with a covered byte is copied up as a whole. At each checkpoint:
   data, sync, bits, sync. BASE is not changed before all of these clusters are allocated.
3. OVER's image file and its ``.add-cow`` file are synced once more. A killed run may have left
   bits that are in memory and not on the disk, and step 2 skips the clusters of these bits.
4. A shorter raw BASE grows. The covered bytes are written into BASE. At each checkpoint: data,
   sync; then the bits of an add-cow BASE, sync.

So only the view of BASE depends on the bytes that step 4 writes, and step 4 reads nothing from
BASE. After an interruption the same command finishes the job. Step 2 continues where it stopped.
Step 4 starts again, since nothing records what it has copied. By then OVER's new clusters are
covered as a whole. Where another layer has smaller clusters, or ends within one, step 4 writes into
the rest of them what BASE holds already.

No space is freed. OVER takes at most the size of what is covered, in its own clusters.

The job is refused if other overlays stand on BASE, because their views would change. Overlays that
stand on OVER or on a layer between keep their views.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from addcow_mp.device.access import Access
from addcow_mp.device.chain import Use, Uses, open_chain
from addcow_mp.device.files import identity_at
from addcow_mp.device.hardlinks import link_warnings, refuse_linked
from addcow_mp.device.layer import Layer
from addcow_mp.device.layers import Below, layer_at, layers_below, overlays_above, own_files
from addcow_mp.device.locks import READING, RESIZING, WRITING
from addcow_mp.device.overlay import Overlay, refuse_short
from addcow_mp.device.raw import RawLayer
from addcow_mp.engine.allocation import alignment
from addcow_mp.engine.covered import CoveredClusters, ViewAbove
from addcow_mp.engine.space import SpaceNeeded, refuse_without_space
from addcow_mp.engine.targets import RawTarget
from addcow_mp.engine.tasks import Task, cut
from addcow_mp.engine.transfer_plan import TransferPlan
from addcow_mp.errors import ImageError
from addcow_mp.jobs import commit as commit_job
from addcow_mp.jobs.dependants import refuse_dependants
from addcow_mp.jobs.flatten import refuse_no_room_for_bits
from addcow_mp.jobs.narrowing import narrow_image, refuse_unnarrowable
from addcow_mp.jobs.options import ALONE, DEFAULTS, NO_HOOKS, Hooks, RunOptions, Shared
from addcow_mp.jobs.readback import Proof, reading_back
from addcow_mp.jobs.report import Estimate, Outcome, Report, reporting
from addcow_mp.jobs.transfer_job import estimated, move, refuse_unwritable


class _Levels(NamedTuple):
    """The layers of an open chain that matter; ``base`` lies at ``depth``, ``over`` above it."""

    top: Overlay
    over: Overlay
    base: Layer
    depth: int


def commit_into(
    path: str,
    base: str,
    *,
    verifies: bool = False,
    options: RunOptions = DEFAULTS,
    hooks: Hooks = NO_HOOKS,
    shared: Shared = ALONE,
) -> Report:
    """Commit the overlay at ``path`` into ``base``, a layer of its chain; the overlay stays.

    ``base``: a path, or a name as the chain stores it. ``verifies``: ``base`` and the layer above
    it are read back from the disk. Raises :class:`AddcowError`. A refused commit changes nothing.
    """
    with reporting("commit", path) as report:
        found = _find(path, base, options.access)
        if found.depth > 1:
            with open_chain(path, _uses(found.depth), options.access) as top:
                _commit(_levels(top, found), report, options, hooks, shared, verifies=verifies)
            return report
    return commit_job.commit(
        path, keep=True, verifies=verifies, options=options, hooks=hooks, shared=shared
    )


def estimate(path: str, base: str, options: RunOptions, shared: Shared = ALONE) -> Estimate | None:
    """Return what a commit into ``base`` would do; None when there is nothing to do.

    Raises the error with which the commit would be refused.
    """
    found = _find(path, base, options.access)
    if found.depth == 1:
        return commit_job.estimate(path, options, shared, keep=True)
    uses = {depth: Use(READING, READING) for depth in range(1, found.depth + 1)}
    with open_chain(path, uses, options.access) as top:
        levels = _levels(top, found)
        plans = _plans(levels, options, shared, Report("commit", path))
        written = [levels.over.cow, levels.over.image.file, *own_files(levels.base)]
        for plan in plans:
            refuse_unwritable(plan, written, options.access)
        refuse_unnarrowable(levels.over)
        refuse_without_space(plans, options.copy_options, 1)
        changes = bool(plans[-1].changed)
        return _sum([estimated(plan, options) for plan in plans]) if changes else None


def _sum(estimates: list[Estimate]) -> Estimate:
    """Return the estimate of all steps, which are carried out one after the other."""
    spaces = [one.space for one in estimates]
    space = SpaceNeeded(sum(one.peak for one in spaces), sum(one.kept for one in spaces))
    return replace(estimates[-1], weight=sum(one.weight for one in estimates), space=space)


# The layers


def _find(path: str, base: str, access: Access) -> Below:
    """Find the layer that ``base`` names, by its file or by its name in the chain."""
    wanted = identity_at(base)
    if wanted is not None and wanted == identity_at(path):
        problem = f"it is the overlay '{path}' itself; name a layer below it"
        raise ImageError(path=base, problem=problem)
    found: list[Below] = []
    for layer in layers_below(path, access):
        is_file = wanted is not None and layer.identity == wanted
        if is_file or layer.name == base:
            found.append(layer)
        if is_file:
            break  # what lies below may be missing, and is not needed then
    if not found:
        problem = f"it is no layer below '{path}'; 'addcow info --backing-chain' lists them"
        raise ImageError(path=base, problem=problem)
    if len(found) > 1:
        names = " and ".join(f"'{one.path}'" for one in found)
        problem = f"it names several layers below '{path}': {names}; give the whole path of one"
        raise ImageError(path=base, problem=problem)
    return found[0]


def _uses(depth: int) -> Uses:
    """The uses of the layers: the layer at ``depth`` and the one above it are written."""
    reading = {number: Use(READING, READING) for number in range(1, depth - 1)}
    return {**reading, depth - 1: Use(WRITING, WRITING), depth: Use(RESIZING, RESIZING)}


def _levels(top: Overlay, found: Below) -> _Levels:
    over, base = layer_at(top, found.depth - 1), layer_at(top, found.depth)
    # The chain was not locked while its headers were read.
    if (
        not isinstance(over, Overlay)
        or base is None
        or own_files(base)[0].identity != found.identity
    ):
        problem = "its chain was changed while it was opened; run the command again"
        raise ImageError(path=top.path, problem=problem)
    return _Levels(top, over, base, found.depth)


# The plan


def _plans(
    levels: _Levels, options: RunOptions, shared: Shared, report: Report
) -> list[TransferPlan]:
    """Return what is moved: up into ``over`` first, then down into ``base``.

    Raises :class:`AddcowError` if the commit must not be done.
    """
    _refuse(levels, options.access, shared)
    top, _, base, depth = levels
    view = ViewAbove(top, depth)
    grows = isinstance(base, RawLayer) and base.held < top.size
    changes = grows or next(view.runs(0, view.geometry.clusters), None) is not None
    down = TransferPlan(
        view,
        commit_job.target_in(base),
        _tasks(view, base.cluster_size if isinstance(base, Overlay) else 0),
        changed=_changed(levels) if changes else (),
        prepare=partial(_prepare, levels),
        restarts=True,
    )
    up = _copying_up(levels, report)
    return [down] if up is None else [up, down]


def _changed(levels: _Levels) -> tuple[Layer, ...]:
    """Return the layers whose manifests become invalid."""
    # The manifest of ``over`` also describes the layers below, unless all clusters are allocated.
    return (levels.base,) if levels.over.all_allocated else (levels.base, levels.over)


def _copying_up(levels: _Levels, report: Report) -> TransferPlan | None:
    """Return what is copied up into ``over``; None if nothing is missing.

    Raises :class:`SpaceError` if the whole bitmap does not fit on its file system.
    """
    top, over, _, depth = levels
    clusters = CoveredClusters(top, depth - 1)
    if next(clusters.runs(0, over.geometry.clusters), None) is None:
        return None
    refuse_no_room_for_bits(over)
    return TransferPlan(
        clusters,
        RawTarget(over.image.file),
        _tasks(clusters),
        bit=1,
        prepare=partial(narrow_image, over, report),
    )


def _tasks(selection: CoveredClusters | ViewAbove, other_cluster_size: int = 0) -> list[Task]:
    geometry = selection.geometry
    aligned = alignment(geometry.cluster_size, other_cluster_size)
    return cut(selection.stretches(aligned), geometry.clusters)


def _refuse(levels: _Levels, access: Access, shared: Shared) -> None:
    top, over, base, depth = levels
    for overlay in overlays_above(top, depth):
        refuse_short(overlay)
    commit_job.accepted_base(top, base)
    if not access.force:
        commit_job.refuse_overlay_as_raw(base)
    # Overlays on ``over`` keep their views. Other users of its image file do not.
    changed = [*own_files(base), over.image.file]
    refuse_dependants(top, changed, access, around=shared.nearby, can_force_lent=False)
    # Hard links of a raw backing file are allowed: no rule depends on its name.
    written = [over.cow, over.image.file, *(own_files(base) if isinstance(base, Overlay) else [])]
    refuse_linked(written, force=access.force)


# The work


def _commit(
    levels: _Levels,
    report: Report,
    options: RunOptions,
    hooks: Hooks,
    shared: Shared,
    *,
    verifies: bool,
) -> None:
    plans = _plans(levels, options, shared, report)
    with _reading_back(levels, options, hooks, report, verifies=verifies) as job_hooks:
        move(plans, report, options, job_hooks, shared.pool)
        report.outcome = Outcome.DONE
        if isinstance(levels.base, RawLayer):
            # With several hard links, overlays in other directories may depend on it.
            report.warnings += link_warnings([levels.base.file])


@contextmanager
def _reading_back(
    levels: _Levels, options: RunOptions, hooks: Hooks, report: Report, *, verifies: bool
) -> Iterator[Hooks]:
    """Read back after the work: ``base`` shows what ``top`` shows, and ``over`` what it showed."""
    top, over, base, _ = levels
    committed = Proof(base, base, (base,)) if verifies else None
    kept = Proof(over, over, (over,)) if verifies else None
    with (
        reading_back(top, committed, options, hooks, report) as outer,
        reading_back(over, kept, options, outer, report) as inner,
    ):
        yield inner


def _prepare(levels: _Levels) -> None:
    """Sync ``over`` and let ``base`` grow, before the first byte of ``base`` is written."""
    levels.over.image.file.sync()
    levels.over.cow.sync()
    if isinstance(levels.base, RawLayer):
        levels.base.grow(levels.top.size)
