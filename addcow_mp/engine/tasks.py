"""Cutting the cluster range into tasks: pure, no file is touched here.

A survey of the image says where there is something to do, as *stretches* with a
weight in bytes. Tasks are cut from them so that each has about as many bytes to
move, whatever the virtual size: nothing-to-do between two stretches is folded into
a task and costs nothing. Tasks lie side by side and together cover every cluster.

Tasks begin at multiples of ``alignment`` clusters, which the job chooses so that no
two tasks share a byte of any bitmap nor a cluster of any layer that is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from addcow_mp.units import MiB

#: Bytes a task should move: long enough that handing it out costs nothing against
#: it, short enough that work spreads evenly and a crash repeats little.
TASK_BYTES = 64 * MiB


@dataclass(frozen=True, slots=True)
class Task:
    """The clusters ``[first, stop)``, to be done by one worker; ``weight`` in bytes."""

    number: int
    first: int
    stop: int
    weight: int


@dataclass(frozen=True, slots=True)
class Stretch:
    """Clusters ``[first, stop)``, aligned, with about ``weight`` bytes to move."""

    first: int
    stop: int
    weight: int


def cut(stretches: Iterable[Stretch], clusters: int, limit: int = TASK_BYTES) -> list[Task]:
    """Tasks over ``[0, clusters)``, each with about ``limit`` bytes, in order.

    ``stretches`` are in order, begin at aligned clusters, and weigh at most ``limit``
    each or are not divisible.
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
    """Where each task begins and what it weighs."""
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
    """Tasks over ``count`` equal things, ``size`` of them in each; their weight is how many."""
    return [
        Task(number, first, min(first + size, count), min(size, count - first))
        for number, first in enumerate(range(0, count, size))
    ]
