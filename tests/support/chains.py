"""Random chains, described in the words of `model`, with the habits of real ones.

Local and other clusters come in runs. Between them lies what a careless reader shows: garbage
in clusters that are not allocated, written zeros, local holes, bits past the end of the bitmap,
bytes after the last whole sector. Each layer has letters of its own, so that no layer's bytes
can pass for those of another.
"""

from __future__ import annotations

import random
from dataclasses import replace

from support.model import SECTOR, KiB, MiB, Overlay, Raw, overlay, raw

CLUSTER_SIZES = [4 * KiB, 8 * KiB, 16 * KiB, 32 * KiB, 64 * KiB, 128 * KiB, 512 * KiB, 2 * MiB]

#: What a cluster of an overlay is: data, not allocated, garbage, zeros, a allocated hole.
LOCAL, GARBAGE, RAW_DATA = "AMPQR", "ampqr", "Z"
WEIGHTS = (5, 4, 2, 1, 1)


def random_cells(rng: random.Random, count: int, depth: int) -> str:
    """Return the picture of ``count`` clusters of the overlay at ``depth``."""
    return _runs(rng, count, f"{LOCAL[depth]}-{GARBAGE[depth]}0.", WEIGHTS)


def random_raw(rng: random.Random, length: int, *, cut: int = 0) -> Raw:
    """Return a raw file of about ``length`` bytes."""
    grain = rng.choice([4 * KiB, 64 * KiB]) if length > 64 * KiB else 4 * KiB
    return raw(_runs(rng, max(1, length // grain), f"{RAW_DATA}-0", (6, 2, 1)), grain, cut)


def _runs(rng: random.Random, count: int, marks: str, weights: tuple[int, ...]) -> str:
    cells = ""
    while len(cells) < count:
        cells += rng.choices(marks, weights)[0] * rng.randint(1, 1 + count // 32)
    return cells[:count]


def even_chain(rng: random.Random, size: int, *, overlays: int) -> Overlay:
    """Return overlays of 16 KiB clusters, all of one size, over a raw file that may be shorter."""
    clusters = size // (16 * KiB)
    below: Overlay | Raw = random_raw(rng, size - rng.choice([0, size // 5]))
    for depth in reversed(range(overlays)):
        below = overlay(random_cells(rng, clusters, depth), below, cluster_size=16 * KiB)
    assert isinstance(below, Overlay)
    return below


def wild_chain(rng: random.Random, most: int, overlays: tuple[int, int] = (1, 3)) -> Overlay:
    """Return one to three overlays of up to ``most`` bytes that differ in everything."""
    length = rng.randrange(8 * KiB, most)
    below = None if rng.random() < 0.1 else random_raw(rng, _near(rng, length), cut=_odd_base(rng))
    chain: Overlay | Raw | None = below
    for depth in reversed(range(rng.randint(*overlays))):
        chain = _wild_overlay(rng, depth, _near(rng, length), chain)
    assert isinstance(chain, Overlay)
    return chain


def _wild_overlay(
    rng: random.Random, depth: int, length: int, backing: Overlay | Raw | None
) -> Overlay:
    size = rng.choice([each for each in CLUSTER_SIZES if each <= max(length // 4, 4 * KiB)])
    cells = random_cells(rng, max(1, length // size), depth)
    chain = overlay(cells, backing, cluster_size=size, cut=_odd(rng))
    if rng.random() < 0.1:
        # The bits may then be stale; all is allocated whatever they say.
        chain = replace(chain, all_allocated=True)
    return replace(chain, stray=rng.random() < 0.3, image_first=rng.random() < 0.3)


def _near(rng: random.Random, length: int) -> int:
    return length * rng.choice([4, 4, 4, 3, 5]) // 4


def _odd(rng: random.Random) -> int:
    return rng.choice([0, 0, 0, 1, SECTOR, 700, 2 * KiB])


def _odd_base(rng: random.Random) -> int:
    """What a base lacks of its last cell: often its length is no multiple of anything."""
    return rng.choice([0, rng.randrange(4 * KiB), rng.randrange(SECTOR), _odd(rng)])


def can_commit_into_some(chain: Overlay) -> bool:
    """Whether some layer below can take all that the guest sees."""
    layer = chain.backing
    while isinstance(layer, Overlay):
        if layer.size >= chain.size:
            return True
        layer = layer.backing
    return layer is not None


def can_commit(chain: Overlay) -> bool:
    """Whether the overlay has a backing file that can take all of it."""
    backing = chain.backing
    return backing is not None and (isinstance(backing, Raw) or backing.size >= chain.size)
