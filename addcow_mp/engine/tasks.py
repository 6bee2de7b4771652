"""Cuts the cluster range into tasks. No file is read here.

Stretches of clusters with data, weighed in bytes, come from :mod:`addcow_mp.engine.allocation`.
Each task has about as many bytes to move, whatever the virtual size; what lies between two
stretches is part of a task and costs nothing. Tasks are adjacent and cover every cluster.

Tasks begin at multiples of an alignment that the job chooses, so that no two tasks share a byte of
any bitmap or a cluster of any layer that is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from addcow_mp.units import MiB

#: Bytes that a task moves: enough that dealing it out costs little, and few enough that work
#: spreads evenly.
TASK_BYTES = 64 * MiB


@dataclass(frozen=True, slots=True)
class Task:
    """The clusters ``[first, stop)``, done by one process; ``weight`` in bytes."""

    number: int
    first: int
    stop: int
    weight: int

    def divided(self) -> list[Task]:
        """The tasks that are tried again when the process of this one has died."""
        return [self]


@dataclass(frozen=True, slots=True)
class Stretch:
    """The aligned clusters ``[first, stop)``, with about ``weight`` bytes to move."""

    first: int
    stop: int
    weight: int


def cut(stretches: Iterable[Stretch], clusters: int, limit: int = TASK_BYTES) -> list[Task]:
    """Return tasks over ``[0, clusters)``, each with about ``limit`` bytes, in order.

    ``stretches`` are in order and begin at aligned clusters. One that weighs more than ``limit`` is
    not divided.
    """
    cuts = list(_cuts(stretches, limit))
    firsts = [0, *(first for first, _ in cuts[1:])]
    stops = [*firsts[1:], clusters]
    weights = [weight for _, weight in cuts] or [0]
    return [
        Task(number, first, stop, weight)
        for number, (first, stop, weight) in enumerate(zip(firsts, stops, weights, strict=True))
        if first < stop
    ]


def _cuts(stretches: Iterable[Stretch], limit: int) -> Iterator[tuple[int, int]]:
    """Yield where each task begins and what it weighs."""
    first, weight = None, 0
    for stretch in stretches:
        if first is not None and weight + stretch.weight > limit:
            yield first, weight
            first, weight = None, 0
        first = stretch.first if first is None else first
        weight += stretch.weight
    if first is not None:
        yield first, weight


def equal_tasks(count: int, size: int) -> list[Task]:
    """Return tasks over ``count`` equal items, ``size`` in each; the weight is their number."""
    return [
        Task(number, first, min(first + size, count), min(size, count - first))
        for number, first in enumerate(range(0, count, size))
    ]
