"""The digests of leaves that are known before a layer is read: those in old manifests.

A job moves data between layers whose manifests hold the digests of this data. Moving does not
change the digests, so a new manifest takes them over and needs nearly no reading. A digest that is
taken over says what *should* have been moved: data that was damaged before the job differs from the
new manifest as it differed from the old one.

A leaf is *certain* if its digest is known. It is *expected* if a manifest says what the guest saw
there, but the layers below may have changed since. All leaves that are not certain are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from bitarray import bitarray

from addcow_mp.format.bitmap import SparseBits
from addcow_mp.format.leaves import DIGEST, FAN, ZERO_BLOCK, covered_by, no_leaves, replaced
from addcow_mp.format.manifest import Manifest


class KnownLayer(NamedTuple):
    """A layer of ``size`` bytes, and its manifest; None = it has none."""

    size: int
    manifest: Manifest | None


class View(NamedTuple):
    """A group of a view: its 256 digests, and the leaves for which they are certain or expected."""

    digests: bytes
    certain: bitarray
    expected: bitarray

    def with_leaves(self, other: View, leaves: bitarray) -> View:
        """This view with some ``leaves`` of another one."""
        return View(
            replaced(self.digests, other.digests, leaves),
            self.certain & ~leaves | other.certain & leaves,
            self.expected & ~leaves | other.expected & leaves,
        )


@dataclass(frozen=True)
class KnownView:
    """What the guest of a chain sees, by its manifests; ``layers`` from the top down."""

    layers: tuple[KnownLayer, ...]

    def group(self, number: int) -> View:
        """What is known of a group."""
        digests, certain, expected = ZERO_BLOCK, ~no_leaves(), no_leaves()
        is_whole = True
        for size, manifest in reversed(self.layers):
            within = covered_by(size, number)
            if manifest is None:
                digests, certain, expected = ZERO_BLOCK, ~within, no_leaves()
                is_whole = False
                continue
            group = manifest.group(number)
            own = group.covered & ~group.mixed | ~within
            digests = replaced(ZERO_BLOCK, group.guest_block(digests), within)
            certain, expected = certain | own, expected & ~own
            if is_whole:
                certain |= group.mixed
            else:
                certain, expected = certain & ~group.mixed, expected | group.mixed
        return View(digests, certain, expected)

    @property
    def manifests(self) -> list[Manifest]:
        """All manifests, from the top down."""
        return [one.manifest for one in self.layers if one.manifest is not None]

    @property
    def is_complete(self) -> bool:
        """Whether every layer has a manifest."""
        return len(self.manifests) == len(self.layers)

    def leaf(self, leaf: int) -> bytes | None:
        """The digest of one leaf, if it is certain."""
        view, at = self.group(leaf // FAN), leaf % FAN
        return view.digests[at * DIGEST : (at + 1) * DIGEST] if view.certain[at] else None


#: A view of which nothing is known.
UNKNOWN = View(ZERO_BLOCK, no_leaves(), no_leaves())


class Cut(NamedTuple):
    """The ``leaf`` in which an upper layer ends, while the layer below continues.

    ``digest``: of the leaf after the job; None = the job does not change it.
    """

    leaf: int
    digest: bytes | None


@dataclass(frozen=True)
class ChangedLeaves:
    """The leaves of a layer that a job changes, and what they show afterwards.

    ``manifest``: that of the upper layer; the leaves that it covers are changed. ``leaves``: the
    changed leaves, if the upper layer has no manifest. ``view``: what they show; None = unknown.
    """

    manifest: Manifest | None = None
    leaves: SparseBits | None = None
    view: KnownView | None = None
    cut: Cut | None = None

    def bits(self, number: int) -> bitarray:
        """The changed leaves of a group."""
        bits = no_leaves()
        if self.manifest is not None:
            bits |= self.manifest.group(number).covered
        if self.leaves is not None:
            self.leaves.add_to(bits, number * FAN)
        if self.cut is not None and self.cut.leaf // FAN == number:
            bits[self.cut.leaf % FAN] = self.cut.digest is not None
        return bits

    def group(self, number: int) -> View:
        """What is known of the changed leaves of a group."""
        view = UNKNOWN if self.view is None else self.view.group(number)
        if self.cut is None or self.cut.digest is None or self.cut.leaf // FAN != number:
            return view
        one, place = no_leaves(), self.cut.leaf % FAN
        one[place] = 1
        return view.with_leaves(View(self.cut.digest * FAN, one, no_leaves()), one)


@dataclass(frozen=True)
class KnownLeaves:
    """What is known of a layer after a job.

    ``view``: what the guest saw before the job; it sees the same afterwards, except in the
    ``changed`` leaves. ``held``: the old manifest of the layer; its mixed leaves hold the same,
    except the ``changed`` ones. ``below``: what the layers below show.
    """

    view: KnownView
    held: Manifest | None = None
    changed: ChangedLeaves | None = None
    below: KnownView | None = None

    def group(self, number: int) -> View:
        """What is known of what the guest sees in a group."""
        view = self.view.group(number)
        if self.changed is None:
            return view
        return view.with_leaves(self.changed.group(number), self.changed.bits(number))

    def held_mixed(self, number: int) -> tuple[bytes, bitarray]:
        """What unchanged mixed leaves of a group hold: the digests, and which leaves have one."""
        if self.held is None:
            return ZERO_BLOCK, no_leaves()
        group = self.held.group(number)
        changed = no_leaves() if self.changed is None else self.changed.bits(number)
        return group.held, group.mixed & ~changed

    @property
    def is_complete(self) -> bool:
        """Whether nearly all leaves are certain."""
        changed = self.changed
        is_changed_known = changed is None or (changed.view and changed.view.is_complete)
        return self.view.is_complete and bool(is_changed_known)

    def groups(self, first: int, stop: int) -> list[int]:
        """The groups in ``[first, stop)`` with a record in some manifest, in order."""
        return sorted({one for each in self._manifests() for one in each.groups(first, stop)})

    def _manifests(self) -> Iterator[Manifest]:
        yield from self.view.manifests
        if self.changed is not None and self.changed.view is not None:
            yield from self.changed.view.manifests
