"""Leaf by leaf: which leaves of a layer do not hold what its manifest says that they held.

The manifest says which leaves are the layer's own: a bitmap that was damaged can neither hide data
nor accuse sound data. Only leaves that mix layers need the bits; where those are wrong, these
leaves remain unverified. So does a leaf that the disk does not give; the others are looked at all
the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from bitarray import bitarray

from addcow_mp.device.layer import Layer
from addcow_mp.device.overlay import Overlay
from addcow_mp.engine.layer_digest import Hasher, file_of
from addcow_mp.errors import FileError
from addcow_mp.format.bits import Run, merged, runs
from addcow_mp.format.manifest import DIGEST, FAN, GROUP, LEAF, ZERO_BLOCK, Group, Manifest
from addcow_mp.jobs.layer_report import Range

#: Leaves that cannot be read before a layer is given up: a disk that is gone would take for ever.
BAD_LEAVES = 64


@dataclass(frozen=True)
class Sample:
    """Only so large a ``share`` of leaves is read, chosen at random anew for each ``seed``.

    However small the share, at least one leaf is read of a layer that holds any.
    """

    share: float
    seed: int

    def chosen(self, path: str, number: int) -> bitarray:
        """The leaves of a group to be read."""
        from random import Random

        draw = Random(f"{self.seed} {path} {number}").random  # noqa: S311 - no secret
        return bitarray((draw() < self.share for _ in range(FAN)), endian="little")

    def one_of(self, path: str, numbers: list[int]) -> int:
        """The place of one of these numbers, of which there is at least one."""
        from random import Random

        return Random(f"{self.seed} {path}").randrange(len(numbers))  # noqa: S311 - no secret


class LeafComparison:
    """The leaves of a layer beside those of its manifest, and which of them differ."""

    def __init__(
        self,
        layer: Layer,
        manifest: Manifest,
        sample: Sample | None,
        spend: Callable[[int], None],
        buffer: memoryview,
    ) -> None:
        self.layer = layer
        self.manifest = manifest
        self.sample = sample
        #: Whether the bitmap can be asked what is local in leaves that mix layers.
        self.trusted = True
        self._hasher = Hasher(layer, spend, buffer)
        #: What was read of the image and compared.
        self.bytes_compared = 0
        self._differing: list[int] = []
        self._unreadable: dict[int, str] = {}
        self._last: tuple[int, Group] | None = None
        #: The leaf that is read whatever else a sample chooses.
        self._certain = None if sample is None else self._certain_leaf(sample)

    def _certain_leaf(self, sample: Sample) -> int | None:
        """A leaf that held something, in a group chosen at random, or that holds something now."""
        path, numbers = self.layer.path, list(self.manifest.records)
        first = sample.one_of(path, numbers) if numbers else 0
        for number in numbers[first:] + numbers[:first]:
            group = self._group(number)
            holding = [leaf for leaf in group.covered.search(1) if _holds(group, leaf)]
            # A leaf of this layer alone is read even where the bitmap cannot be trusted.
            leaves = [leaf for leaf in holding if not group.mixed[leaf]] or holding
            if leaves:
                return number * FAN + leaves[sample.one_of(path, leaves)]
        data = next(file_of(self.layer).data_runs(0, self.layer.size), None)
        return None if data is None else data[0] // LEAF

    def groups(self, first: int, stop: int) -> list[int]:
        """The groups of the leaves ``[first, stop)`` that hold something, or did."""
        first, stop = first // FAN, -(-stop // FAN)
        numbers = {number for number in self.manifest.records if first <= number < stop}
        if self.manifest.head.all_local:
            start, end = first * GROUP, min(stop * GROUP, self.layer.size)
            for here, there in file_of(self.layer).data_runs(start, end):
                numbers.update(range(here // GROUP, -(-there // GROUP)))
        return sorted(numbers)

    def steps(self, number: int, first: int, stop: int, most: int) -> Iterator[Run]:
        """``[first, stop)`` of a group, cut into parts with at most ``most`` leaves to read."""
        base = number * FAN
        covered = self._group(number).covered[first - base : stop - base]
        cuts = [first + leaf for leaf in list(covered.search(1))[most::most]]
        yield from pairwise((first, *cuts, stop))

    def compare(self, number: int, first: int, stop: int) -> None:
        """Find those of the leaves ``[first, stop)`` of a group that do not hold what they held.

        Those that the disk does not give are noted, unless they are too many.
        """
        try:
            self._compare(number, first, stop)
        except FileError as error:
            if len(self._unreadable) >= BAD_LEAVES:
                raise
            if stop - first == 1:
                self._unreadable[first] = error.fields["reason"]
                return
            for leaf in range(first, stop):
                self.compare(number, leaf, leaf + 1)

    def _group(self, number: int) -> Group:
        """What the manifest says of a group; the last one is kept."""
        if self._last is None or self._last[0] != number:
            self._last = number, self.manifest.group(number)
        return self._last[1]

    def _compare(self, number: int, first: int, stop: int) -> None:
        was, base = self._group(number), number * FAN
        within = bitarray(FAN, endian="little")
        within[first - base : stop - base] = 1
        own, mixed = was.covered & ~was.mixed & within, was.covered & was.mixed & within
        if not self.trusted:
            mixed.setall(0)
        if self.sample is not None:
            chosen = self.sample.chosen(self.layer.path, number)
            if self._certain is not None and self._certain // FAN == number:
                chosen[self._certain - base] = 1
            own, mixed = own & chosen, mixed & chosen
        before = self._hasher.bytes_read
        now = self._hasher.held(number, self._spans(number, own, mixed), mixed)
        self.bytes_compared += self._hasher.bytes_read - before
        if now != was.held:
            places = range(0, FAN * DIGEST, DIGEST)
            counted = own | mixed
            self._differing += [
                base + leaf
                for leaf, at in enumerate(places)
                if counted[leaf] and now[at : at + DIGEST] != was.held[at : at + DIGEST]
            ]

    def _spans(self, number: int, own: bitarray, mixed: bitarray) -> list[Run]:
        """The bytes of a group that are to be read."""
        base = number * FAN
        spans = [
            ((base + first) * LEAF, min((base + last) * LEAF, self.layer.size))
            for first, last in runs(own, 1, 0, FAN)
        ]
        if mixed.any():
            spans += _parts_in(self._local(number), mixed, base)
        return spans

    def _local(self, number: int) -> list[Run]:
        """What the bitmap calls local in a group, whatever a damaged header says besides."""
        assert isinstance(self.layer, Overlay)  # noqa: S101 - nothing else mixes layers
        start, stop = number * GROUP, min((number + 1) * GROUP, self.layer.size)
        geometry = self.layer.geometry
        first, last = geometry.touched(start, stop)
        return [geometry.span(*run) for run in self.layer.bitmap.runs(1, first, last)]

    def ranges(self) -> list[Range]:
        """Whole leaves of the file that differ, joined and clipped to it."""
        return self._places(self._differing)

    def unreadable(self) -> Iterator[tuple[Range, str]]:
        """Where the disk did not give what the file holds, and what is said of it."""
        for place in self._places(self._unreadable):
            reason = self._unreadable[place.start // LEAF]
            yield place, f"{place.length} bytes at {place.start} cannot be read: {reason}"

    def _places(self, leaves: Iterable[int]) -> list[Range]:
        file = file_of(self.layer)
        parts = merged((leaf, leaf + 1) for leaf in leaves)
        spans = ((first * LEAF, min(stop * LEAF, file.length)) for first, stop in parts)
        return [Range(file.path, start, stop - start) for start, stop in spans]


def _holds(group: Group, leaf: int) -> bool:
    """Whether the manifest says that a leaf of the group is other than zeros."""
    return group.held[leaf * DIGEST : (leaf + 1) * DIGEST] != ZERO_BLOCK[:DIGEST]


def _parts_in(spans: list[Run], mixed: bitarray, base: int) -> list[Run]:
    """The parts of ``spans`` in leaves that are mixed."""
    leaves = [
        ((base + first) * LEAF, (base + last) * LEAF) for first, last in runs(mixed, 1, 0, FAN)
    ]
    return [
        (max(start, first), min(stop, last))
        for first, last in leaves
        for start, stop in spans
        if start < last and first < stop
    ]
