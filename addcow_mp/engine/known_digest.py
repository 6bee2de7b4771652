"""Makes the records of a new manifest after a job: takes over known digests, reads other leaves.

The covered and the mixed leaves of a layer are found as for any manifest. A leaf whose digest is
not known is read from the layer's own image file. What the guest sees of a mixed leaf is read
through the chain. If a manifest says what the guest saw in a leaf that is read, both must agree.
Otherwise the data is damaged, and a new manifest would hide it.
"""

from __future__ import annotations

from collections.abc import Iterator

from bitarray import bitarray

from addcow_mp.device.layer import Layer
from addcow_mp.device.overlay import Overlay
from addcow_mp.engine.known_leaves import KnownLeaves, KnownView, View
from addcow_mp.engine.layer_digest import (
    LeafHasher,
    hash_leaves,
    is_fully_allocated,
    leaves_touched,
    within_leaves,
)
from addcow_mp.engine.tasks import Task
from addcow_mp.engine.worker import WorkerContext
from addcow_mp.errors import ImageError
from addcow_mp.format.bits import Run, runs
from addcow_mp.format.leaves import (
    DIGEST,
    FAN,
    GROUP,
    LEAF,
    ZERO_BLOCK,
    Group,
    covered_by,
    no_leaves,
    replaced,
)


class KnownLeafHasher(LeafHasher):
    """Makes the records of a task, with the digests in ``known``. Picklable to a worker process."""

    def __init__(self, layer: Layer, known: KnownLeaves) -> None:
        super().__init__(layer)
        self.known = known

    def __reduce__(self) -> tuple[object, ...]:
        return (KnownLeafHasher, (self.layer, self.known))

    def _groups(self, first: int, stop: int) -> Iterator[int]:
        found = super()._groups(first, stop)
        if not is_fully_allocated(self.layer):
            return found
        # A group with a record and no data is hashed too: a hole may be lost data.
        groups = -(-self.layer.size // GROUP)
        return iter(sorted({*found, *self.known.groups(first, min(stop, groups))}))

    def _fill(self, number: int, group: Group, spans: list[Run]) -> None:
        layer, mixed, view = self.layer, group.mixed, self.known.group(number)
        own = (
            covered_by(layer.size, number) if is_fully_allocated(layer) else group.covered & ~mixed
        )
        old, unchanged = self.known.held_mixed(number)
        changed = mixed & leaves_touched(spans, number) & ~unchanged
        wanted = own & ~view.certain | changed
        held = ZERO_BLOCK
        if wanted.any():
            held = self._hasher.held(number, within_leaves(spans, wanted, number), mixed)
            refuse_other(layer, number, held, view, own & view.expected & wanted)
        held = replaced(held, view.digests, own & view.certain)
        group.held = replaced(held, old, mixed & unchanged)
        if mixed.any():
            group.seen = self._seen_or_known(number, view, mixed, changed)

    def _seen_or_known(self, number: int, view: View, mixed: bitarray, changed: bitarray) -> bytes:
        """The digests of what the guest sees in ``mixed`` leaves; ``changed`` leaves are read."""
        wanted = mixed & (~view.certain | changed)
        seen = ZERO_BLOCK
        if wanted.any():
            self._check_cut(number, wanted & ~view.certain)
            seen = self._seen(number, wanted)
            refuse_other(self.layer, number, seen, view, wanted & (view.certain | view.expected))
        return replaced(seen, view.digests, mixed & view.certain)

    def _check_cut(self, number: int, wanted: bitarray) -> None:
        """If the view ends within a leaf, compare the whole leaf of the layers below first."""
        layer, leaf = self.layer, self.layer.size // LEAF
        below = layer.backing if isinstance(layer, Overlay) else None
        if below is None or self.known.below is None or leaf // FAN != number:
            return
        one = no_leaves()
        one[leaf % FAN] = wanted[leaf % FAN]
        check_view(below, self.known.below, number, one, self._buffer)


def check_view(
    layer: Layer, known: KnownView, number: int, leaves: bitarray, buffer: memoryview
) -> None:
    """Read some ``leaves`` of a group through ``layer`` and compare them with what is ``known``.

    Raises :class:`ImageError` for the first leaf that differs.
    """
    view = known.group(number)
    leaves = leaves & (view.certain | view.expected) & covered_by(layer.size, number)
    if leaves.any():
        found = bytearray(ZERO_BLOCK)
        hash_leaves(found, leaves, number, layer.size, layer.read_into, buffer)
        refuse_other(layer, number, bytes(found), view, leaves)


def refuse_other(layer: Layer, number: int, found: bytes, view: View, leaves: bitarray) -> None:
    """Raise :class:`ImageError` for the first of ``leaves`` whose digest is not that of ``view``.

    ``found``: the digests of the leaves of a group, as they were read.
    """
    for leaf in leaves.search(1):
        at = slice(leaf * DIGEST, (leaf + 1) * DIGEST)
        if found[at] != view.digests[at]:
            start = (number * FAN + leaf) * LEAF
            raise unlike_manifest(layer, start, LEAF)


def unlike_manifest(layer: Layer, start: int, length: int) -> ImageError:
    """The error for ``length`` bytes at ``start`` that differ from the manifest of ``layer``."""
    problem = f"{length} bytes at {start} differ from what its manifest says"
    return ImageError(path=layer.path, problem=problem)


# Before a job


class ChangeFinder(LeafHasher):
    """Finds the leaves that the allocated clusters of ``layer`` touch. Picklable to a worker.

    Leaves that they cover in part are read from the backing file and compared with what is
    ``known``: after the job, damage in the rest of such a leaf cannot be found any more.
    """

    def __init__(self, layer: Overlay, known: KnownView) -> None:
        super().__init__(layer)
        self.overlay = layer
        self.known = known

    def __reduce__(self) -> tuple[object, ...]:
        return (ChangeFinder, (self.overlay, self.known))

    def __call__(self, task: Task, worker: WorkerContext) -> list[Run]:  # type: ignore[override]
        """The runs of touched leaves in the groups of ``task``."""
        backing, found = self.overlay.backing, list[Run]()
        assert backing is not None  # noqa: S101 - there is something to change
        for number in self._groups(task.first, task.stop):
            worker.check(self.overlay.path)
            group, spans = self._outline(number)
            touched = leaves_touched(spans, number)
            check_view(backing, self.known, number, touched & group.mixed, self._buffer)
            found += [(number * FAN + a, number * FAN + b) for a, b in runs(touched, 1, 0, FAN)]
        return found
