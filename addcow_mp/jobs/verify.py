"""Verify: every layer of a chain, or of many, held against its manifest.

Layers are dealt out in batches to the processes of one scan. A process opens the files of its
batch and looks at them (:mod:`addcow_mp.jobs.verify_task`). What it leaves, because it is much or
because the job stops, is dealt out again before whatever comes later: layers are looked at in about
the given order.

The processes can be had before the layers are known: they start while a farm is being listed. How
much there is to read is estimated by the length of manifests, and corrected by what was read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import count

from addcow_mp.device.access import Access
from addcow_mp.device.discovery import Identity
from addcow_mp.device.files import identity_at
from addcow_mp.device.headers import load_header, load_names, resolve
from addcow_mp.device.manifest_file import manifest_of
from addcow_mp.engine.pool import Pool
from addcow_mp.engine.scan import scan_pool
from addcow_mp.engine.worker import Done, Failed
from addcow_mp.errors import AddcowError, RestartsError
from addcow_mp.format.header import ADD_COW, RAW
from addcow_mp.format.manifest import weight_of_length
from addcow_mp.jobs.layer_report import Grade, LayerReport
from addcow_mp.jobs.leaf_compare import Sample
from addcow_mp.jobs.options import DEFAULTS, NO_HOOKS, Hooks, RunOptions
from addcow_mp.jobs.verify_task import (
    LayerRef,
    LeafRange,
    Verified,
    VerifyTask,
    VerifyWork,
    can_reach,
)

#: Layers in one task: enough that handing it out costs little against it.
BATCH = 16

#: Layers for which another process is started at once: finding out what the first ones take would
#: take longer.
MANY = 128

#: Tasks for each process at the least: so that all end at about the same time.
SHARES = 8


def verify(
    path: str,
    options: RunOptions = DEFAULTS,
    hooks: Hooks = NO_HOOKS,
    *,
    format_: str = ADD_COW,
) -> list[LayerReport]:
    """Verify every layer of the chain of ``path``, from the top down.

    Raises :class:`AddcowError` when that file cannot be opened, and :class:`RestartsError` when
    ``hooks`` stops it.
    """
    with closing(options.access.open_named(path)) as file:
        access = options.access.beside(file.base)
    chain = list(chain_of(path, format_, access))
    with verifiers(replace(options, access=access), hooks, len(chain)) as crew:
        return crew.verify(chain)


def chain_of(path: str, format_: str, access: Access) -> Iterator[LayerRef]:
    """The layers of a chain as far down as sound headers lead; what is damaged is the last.

    Each is named once: a chain that runs in a circle has an end, and one that is too deep to be
    opened has layers to be verified all the same.
    """
    holder: str | None = None
    met: set[Identity | str] = set()
    while not was_met(path, met):
        yield LayerRef(path, format_, holder)
        below = _below(path, access, named=holder is None) if format_ == ADD_COW else None
        if below is None:
            return
        holder, path, format_ = below


def was_met(path: str, met: set[Identity | str]) -> bool:
    """Whether ``met`` has the file at ``path``, or the name of none, and has it from now on."""
    identity = identity_at(path) or os.path.realpath(path)
    if identity in met:
        return True
    met.add(identity)
    return False


def _below(path: str, access: Access, *, named: bool) -> tuple[str, str, str] | None:
    """What the names of an overlay are relative to, and path and format of its backing file.

    None without one that counts.
    """
    try:
        with closing(access.open_named(path) if named else access.open_beneath(path)) as cow:
            header = load_header(cow)
            names = load_names(cow, header)
            if header.all_allocated or names.backing is None or names.backing_format is None:
                return None
            return cow.base, resolve(cow, names.backing), names.backing_format
    except AddcowError:
        return None


class RemainingLeaves:
    """The parts of layers that are still to be looked at."""

    def __init__(self, parts: Iterable[LeafRange]) -> None:
        #: By the index of the layer, in order.
        self.layers: dict[int, set[LeafRange]] = {}
        for part in parts:
            self.layers.setdefault(part.index, set()).add(part)

    @property
    def parts(self) -> list[LeafRange]:
        """All of them."""
        return [part for parts in self.layers.values() for part in sorted(parts)]

    def take(self, verified: Verified) -> bool:
        """Take note of what was looked at; whether it was the last of its layer."""
        parts = self.layers[verified.part.index]
        parts.discard(verified.part)
        parts.update(verified.left)
        if not parts:
            del self.layers[verified.part.index]
        return not parts


class ReadSoFar:
    """How much was read of layers, of which there are about ``weights`` bytes to read."""

    def __init__(self, weights: list[int]) -> None:
        self._weights = weights
        self._read = [0] * len(weights)
        self._finished = 0
        self._done = 0
        self._total = sum(weights)

    def take(self, verified: Verified, *, is_last: bool) -> None:
        """Take note of what was seen of a layer, ``is_last`` when that was all of it."""
        index, size = verified.part.index, verified.layer_report.bytes_read
        expected = max(self._weights[index], self._read[index])
        self._read[index] += size
        self._done += size
        found = self._read[index] if is_last else max(expected, self._read[index])
        self._total += found - expected
        self._finished += is_last

    def tell(self, hooks: Hooks) -> None:
        """Tell it in bytes and in layers."""
        hooks.progress(self._done, self._total)
        hooks.counted(self._finished, len(self._weights))


def _about(target: LayerRef, access: Access) -> int:
    """About how many bytes there are to read of a layer; 0 without a manifest.

    Digests of zeros are not stored, but a file can be full of them.
    """
    holder = target.holder
    if holder is not None and not can_reach(target.path, access.beside(holder)):
        return 0
    try:
        weight = weight_of_length(os.stat(manifest_of(target.path)).st_size)
        stored = os.stat(target.path).st_blocks * 512 if target.format == RAW else 0
    except OSError:
        return 0
    return max(weight, stored)


# The processes that verify


@contextmanager
def verifiers(
    options: RunOptions, hooks: Hooks, layers: int, sample: Sample | None = None
) -> Iterator[Verifiers]:
    """Processes for about so many ``layers``, whichever these turn out to be.

    Where that is many they are started at once, so that they stand ready when it is known.
    """
    scan_options = replace(options.scan_options, counts=True, many=layers >= MANY)
    work = VerifyWork(options.access, sample)
    with scan_pool(work, (), scan_options, hooks.stopping) as pool:
        if layers >= MANY and not hooks.stopping():
            pool.start(layers // MANY)
        yield Verifiers(pool, options.access, hooks)


class Verifiers:
    """What :func:`verifiers` yields. Used once."""

    def __init__(self, pool: Pool, access: Access, hooks: Hooks) -> None:
        self._pool = pool
        self._access = access
        self._hooks = hooks

    def verify(self, targets: list[LayerRef]) -> list[LayerReport]:
        """Verify ``targets``; verdicts are in their order.

        Raises :class:`RestartsError` when it is stopped.
        """
        layer_reports = [LayerReport(target.path) for target in targets]
        outstanding = RemainingLeaves(LeafRange(index) for index in range(len(targets)))
        read = ReadSoFar([_about(target, self._access) for target in targets])
        for verified in self.look(targets, outstanding.parts):
            layer_reports[verified.part.index].join(verified.layer_report)
            read.take(verified, is_last=outstanding.take(verified))
            read.tell(self._hooks)
        if outstanding.layers:
            raise RestartsError(path=f"{len(targets)} layers")
        return layer_reports

    def look(self, targets: list[LayerRef], parts: Sequence[LeafRange]) -> Iterator[Verified]:
        """Look at ``parts`` of ``targets``, in about this order; ends early when it is stopped."""
        dealing = _Dealing(self._pool, targets, max(1, self._pool.jobs))
        return dealing.all(parts)


class _Dealing:
    """Parcels made of parts, and what becomes of those that are left or failed."""

    def __init__(self, pool: Pool, targets: list[LayerRef], jobs: int) -> None:
        self._pool = pool
        self._targets = targets
        self._jobs = jobs
        self._numbers = count()

    def all(self, parts: Sequence[LeafRange]) -> Iterator[Verified]:
        size = max(1, min(BATCH, len(parts) // (self._jobs * SHARES)))
        for result in self._pool.run(self._parcels(parts, size)):
            yield from self._seen(result)

    def _parcels(self, parts: Sequence[LeafRange], size: int) -> list[VerifyTask]:
        groups = [tuple(parts[at : at + size]) for at in range(0, len(parts), size)]
        return [
            VerifyTask(next(self._numbers), 0, 0, len(group), group, self._targets_of(group))
            for group in groups
        ]

    def _targets_of(self, parts: Sequence[LeafRange]) -> tuple[LayerRef, ...]:
        return tuple(self._targets[part.index] for part in parts)

    def _seen(self, result: Done | Failed) -> list[Verified]:
        """What a task has shown; whatever it left is dealt out."""
        assert isinstance(result.task, VerifyTask)  # noqa: S101 - there are no others
        parts = result.task.parts
        if isinstance(result, Failed):
            if len(parts) == 1:
                return [self._unexamined(parts[0], result.error)]
            # One of them ended its process: which, shows when each is alone.
            self._pool.add(self._parcels(parts, 1), first=True)
            return []
        found: list[Verified] = result.result
        left = [part for verified in found for part in verified.left]
        self._pool.add(
            self._parcels(left, 1) + self._parcels(parts[len(found) :], BATCH), first=True
        )
        return found

    def _unexamined(self, part: LeafRange, error: AddcowError) -> Verified:
        layer_report = LayerReport(self._targets[part.index].path)
        layer_report.remark("unexamined", Grade.UNVERIFIED, layer_report.path, str(error))
        return Verified(part, layer_report)
