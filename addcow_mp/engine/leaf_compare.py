"""Finds the leaves of a layer that differ from its manifest.

The manifest says which leaves belong to the layer alone, so a damaged bitmap can neither hide nor
report differences there. Only leaves that mix layers need the bits; if the bits differ, these
leaves remain unverified. A leaf that cannot be read remains unverified too, and the others are
still compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from bitarray import bitarray

from addcow_mp.device.layer import Layer
from addcow_mp.device.overlay import Overlay
from addcow_mp.engine.layer_digest import Hasher, bytes_of, file_of, within_leaves
from addcow_mp.errors import FileError
from addcow_mp.findings import LayerReport, Range, Severity
from addcow_mp.format.bits import Run, merged
from addcow_mp.format.leaves import DIGEST, FAN, GROUP, LEAF, ZERO_BLOCK, Group, no_leaves
from addcow_mp.format.manifest import Manifest

if TYPE_CHECKING:
    from random import Random

#: Unreadable leaves after which a layer is given up: a disk that has failed would take for ever.
BAD_LEAVES = 64


@dataclass(frozen=True)
class Sample:
    """Only this ``share`` of the leaves is read, chosen at random by ``seed``.

    At least one leaf is read of each layer that holds any.
    """

    share: float
    seed: int

    def chosen(self, path: str, number: int) -> bitarray:
        """The leaves of a group to be read."""
        draw = self._random(f"{path} {number}").random
        return bitarray((draw() < self.share for _ in range(FAN)), endian="little")

    def one_of(self, path: str, count: int) -> int:
        """A number below ``count``."""
        return self._random(path).randrange(count)

    def _random(self, text: str) -> Random:
        from random import Random

        return Random(f"{self.seed} {text}")  # noqa: S311 - no secret


class LeafComparison:
    """Compares the leaves of a layer with those of its manifest."""

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
        #: Whether the bitmap says truly what is allocated in leaves that mix layers.
        self.has_sound_bits = True
        self._hasher = Hasher(layer, spend, buffer)
        #: Bytes of the image file that were read and compared.
        self.bytes_compared = 0
        self._differing: list[int] = []
        self._unreadable: dict[int, str] = {}
        self._last: tuple[int, Group] | None = None
        #: A leaf that is read whatever else the sample chooses.
        self._certain = None if sample is None else self._certain_leaf(sample)

    def _certain_leaf(self, sample: Sample) -> int | None:
        """A leaf with data according to the manifest, else the first one with data now."""
        path, numbers = self.layer.path, list(self.manifest.records)
        first = sample.one_of(path, len(numbers)) if numbers else 0
        for number in numbers[first:] + numbers[:first]:
            group = self._group(number)
            zeros, held = ZERO_BLOCK[:DIGEST], group.held
            holding = [
                leaf
                for leaf in group.covered.search(1)
                if held[leaf * DIGEST : (leaf + 1) * DIGEST] != zeros
            ]
            # A leaf of this layer alone is read even if the bitmap differs.
            leaves = [leaf for leaf in holding if not group.mixed[leaf]] or holding
            if leaves:
                return number * FAN + leaves[sample.one_of(path, len(leaves))]
        data = next(file_of(self.layer).data_runs(0, self.layer.size), None)
        return None if data is None else data[0] // LEAF

    def groups(self, first: int, stop: int) -> list[int]:
        """The groups of the leaves ``[first, stop)`` with data in the manifest or in the file."""
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
        """Compare the leaves ``[first, stop)`` of a group.

        Leaves that cannot be read are noted; too many of them are an error.
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
        """The manifest's entry for a group; the last one is kept."""
        if self._last is None or self._last[0] != number:
            self._last = number, self.manifest.group(number)
        return self._last[1]

    def _compare(self, number: int, first: int, stop: int) -> None:
        expected, base = self._group(number), number * FAN
        wanted = self._wanted(number)
        wanted[: first - base] = 0
        wanted[stop - base :] = 0
        own = expected.covered & ~expected.mixed & wanted
        mixed = expected.covered & expected.mixed & wanted
        if not self.has_sound_bits:
            mixed.setall(0)
        before = self._hasher.bytes_read
        found = self._hasher.held(number, self._spans(number, own, mixed), mixed)
        self.bytes_compared += self._hasher.bytes_read - before
        if found != expected.held:
            for leaf in (own | mixed).search(1):
                at = slice(leaf * DIGEST, (leaf + 1) * DIGEST)
                if found[at] != expected.held[at]:
                    self._differing.append(base + leaf)

    def _wanted(self, number: int) -> bitarray:
        """The leaves of a group that the sample chooses; all without a sample."""
        if self.sample is None:
            return ~no_leaves()
        chosen = self.sample.chosen(self.layer.path, number)
        if self._certain is not None and self._certain // FAN == number:
            chosen[self._certain - number * FAN] = 1
        return chosen

    def _spans(self, number: int, own: bitarray, mixed: bitarray) -> list[Run]:
        """The bytes of a group that are to be read."""
        spans = [(start, min(stop, self.layer.size)) for start, stop in bytes_of(own, number)]
        return (
            spans + within_leaves(self._allocated(number), mixed, number) if mixed.any() else spans
        )

    def _allocated(self, number: int) -> list[Run]:
        """The bytes of a group that the bitmap calls allocated; ALL_ALLOCATED does not count."""
        assert isinstance(self.layer, Overlay)  # noqa: S101 - nothing else mixes layers
        start, stop = number * GROUP, min((number + 1) * GROUP, self.layer.size)
        geometry = self.layer.geometry
        first, last = geometry.touched(start, stop)
        return [geometry.span(*run) for run in self.layer.bitmap.runs(1, first, last)]

    def add_to(self, report: LayerReport) -> None:
        """Add what differs and what could not be read to a report."""
        report.ranges += self._ranges_of(self._differing)
        report.bytes_read = self.bytes_compared
        for place in self._ranges_of(self._unreadable):
            reason = self._unreadable[place.start // LEAF]
            message = f"{place.length} bytes at {place.start} cannot be read: {reason}"
            report.add("unreadable", Severity.UNVERIFIED, place.file, message)

    def _ranges_of(self, leaves: Iterable[int]) -> list[Range]:
        """Some leaves of the file as ranges, clipped to its length."""
        file = file_of(self.layer)
        parts = merged((leaf, leaf + 1) for leaf in leaves)
        spans = ((first * LEAF, min(stop * LEAF, file.length)) for first, stop in parts)
        return [Range(file.path, start, stop - start) for start, stop in spans]
