"""Verify: compare every layer of a chain, or of many, with its manifest.

Layers are distributed in batches to the processes of one scan. A process opens the files of its
batch and compares them (:mod:`addcow_mp.engine.verify_task`). What it leaves, because it is much or
because the job is stopped, is distributed again before anything later: layers are verified in
about the given order.

The processes can start before the layers are known, while a farm is being listed. The bytes to be
read are estimated from the length of the manifests, and corrected by what was read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import ClassVar

from addcow_mp.device.access import Access
from addcow_mp.device.discovery import Identity
from addcow_mp.device.files import identity_at
from addcow_mp.device.headers import load_header, load_names, resolve
from addcow_mp.device.manifest_file import manifest_of
from addcow_mp.engine.layer_state import can_reach
from addcow_mp.engine.leaf_compare import Sample
from addcow_mp.engine.pool import Pool
from addcow_mp.engine.scan import scan_pool
from addcow_mp.engine.verify_task import LayerRef, LeafRange, Verified, VerifyTask, VerifyWork
from addcow_mp.engine.worker import Done, Failed
from addcow_mp.errors import AddcowError, RestartsError
from addcow_mp.findings import LayerReport, Severity, worst
from addcow_mp.format.header import ADD_COW, RAW
from addcow_mp.format.manifest import weight_of_length
from addcow_mp.jobs.options import DEFAULTS, NO_HOOKS, Hooks, RunOptions

#: Layers in one task: enough that the cost of distributing it does not matter.
BATCH = 16

#: Layers for which another process is started at once, without measuring the first ones.
MANY = 128

#: Tasks for each process at the least: so that all end at about the same time.
SHARES = 8


@dataclass(frozen=True)
class VerifyReport:
    """The reports on all layers of a chain, from the top down."""

    exit_statuses: ClassVar = LayerReport.exit_statuses

    filename: str
    layers: list[LayerReport]

    @property
    def exit_code(self) -> int:
        """The status of the worst layer."""
        return worst(one.exit_code for one in self.layers)


def verify(
    path: str,
    options: RunOptions = DEFAULTS,
    hooks: Hooks = NO_HOOKS,
    *,
    format_: str = ADD_COW,
) -> VerifyReport:
    """Verify every layer of the chain of ``path``.

    Raises :class:`AddcowError` when that file cannot be opened, and :class:`RestartsError` when
    ``hooks`` stops it.
    """
    with closing(options.access.open_named(path)) as file:
        access = options.access.beside(file.base)
    chain = list(chain_of(path, format_, access))
    with verifiers(replace(options, access=access), hooks, len(chain)) as running:
        return VerifyReport(path, running.verify(chain))


def chain_of(path: str, format_: str, access: Access) -> Iterator[LayerRef]:
    """The layers of a chain as far down as sound headers lead; a damaged layer is the last.

    Each layer comes once, so a cycle ends. A chain that is too deep to be opened is verified too.
    """
    holder: str | None = None
    seen: set[Identity | str] = set()
    while is_new(path, seen):
        yield LayerRef(path, format_, holder)
        below = _below(path, access, named=holder is None) if format_ == ADD_COW else None
        if below is None:
            return
        holder, path, format_ = below


def is_new(path: str, seen: set[Identity | str]) -> bool:
    """Whether ``seen`` lacks the file at ``path``, or its name if there is no file; adds it."""
    identity = identity_at(path) or os.path.realpath(path)
    if identity in seen:
        return False
    seen.add(identity)
    return True


def _below(path: str, access: Access, *, named: bool) -> tuple[str, str, str] | None:
    """The base path of an overlay's names, and path and format of its backing file.

    None without a backing file that the guest reads.
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


class Remaining:
    """The parts of layers that are still to be verified, and the bytes read so far.

    ``weights``: about how many bytes there are to read of each layer.
    """

    def __init__(self, parts: Iterable[LeafRange], weights: list[int]) -> None:
        #: By the index of the layer, in order.
        self.layers: dict[int, set[LeafRange]] = {}
        for part in parts:
            self.layers.setdefault(part.index, set()).add(part)
        self._expected = weights
        self._read = [0] * len(weights)
        self._finished = self._bytes = 0
        self._total = sum(weights)

    @property
    def parts(self) -> list[LeafRange]:
        """All parts, in order."""
        return [part for parts in self.layers.values() for part in sorted(parts)]

    def enter(self, verified: Verified) -> bool:
        """Enter the result for a part; whether its layer is finished."""
        index, size = verified.part.index, verified.layer_report.bytes_read
        parts = self.layers[index]
        parts.discard(verified.part)
        parts.update(verified.left)
        self._read[index] += size
        self._bytes += size
        expected = max(self._expected[index], self._read[index]) if parts else self._read[index]
        self._total += expected - self._expected[index]
        self._expected[index] = expected
        if not parts:
            del self.layers[index]
            self._finished += 1
        return not parts

    def show(self, hooks: Hooks) -> None:
        """Report the progress in bytes and in layers."""
        hooks.progress(self._bytes, self._total)
        hooks.counted(self._finished, len(self._read))


def _weight(target: LayerRef, access: Access) -> int:
    """About how many bytes there are to read of a layer; 0 without a manifest.

    Digests of zeros are not stored, but a file can hold many written zeros.
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
    """Processes for about so many ``layers``; if there are many, the processes start at once."""
    scan_options = replace(options.scan_options, counts=True, many=layers >= MANY)
    work = VerifyWork(options.access, sample)
    with scan_pool(work, (), scan_options, hooks.stopping) as pool:
        if layers >= MANY and not hooks.stopping():
            pool.start(layers // MANY)
        yield Verifiers(pool, options.access, hooks)


class Verifiers:
    """Distributes parts of layers to processes. Used once."""

    def __init__(self, pool: Pool, access: Access, hooks: Hooks) -> None:
        self._pool = pool
        self._access = access
        self._hooks = hooks
        self._targets: list[LayerRef] = []
        self._numbers = count()

    def verify(self, targets: list[LayerRef]) -> list[LayerReport]:
        """Verify ``targets``; the reports are in their order.

        Raises :class:`RestartsError` when it is stopped.
        """
        reports = [LayerReport(target.path) for target in targets]
        weights = [_weight(target, self._access) for target in targets]
        remaining = Remaining((LeafRange(index) for index in range(len(targets))), weights)
        for verified in self.compare(targets, remaining.parts):
            reports[verified.part.index].join(verified.layer_report)
            remaining.enter(verified)
            remaining.show(self._hooks)
        if remaining.layers:
            raise RestartsError(path=f"{len(targets)} layers")
        return reports

    def compare(self, targets: list[LayerRef], parts: Sequence[LeafRange]) -> Iterator[Verified]:
        """Verify ``parts`` of ``targets``, in about this order; ends early when it is stopped."""
        self._targets = targets
        size = max(1, min(BATCH, len(parts) // (max(1, self._pool.jobs) * SHARES)))
        for result in self._pool.run(self._tasks(parts, size)):
            yield from self._results(result)

    def _tasks(self, parts: Sequence[LeafRange], size: int) -> list[VerifyTask]:
        groups = [tuple(parts[at : at + size]) for at in range(0, len(parts), size)]
        return [
            VerifyTask(
                next(self._numbers),
                0,
                0,
                len(group),
                group,
                tuple(self._targets[part.index] for part in group),
            )
            for group in groups
        ]

    def _results(self, result: Done | Failed) -> list[Verified]:
        """The results of a task; what it left is distributed again."""
        assert isinstance(result.task, VerifyTask)  # noqa: S101 - there are no others
        parts = result.task.parts
        if isinstance(result, Failed):
            if len(parts) == 1:
                report = LayerReport(result.task.targets[0].path)
                report.add("unexamined", Severity.UNVERIFIED, report.path, str(result.error))
                return [Verified(parts[0], report)]
            # One of the parts ended the process; each is tried alone to find it.
            self._pool.add(self._tasks(parts, 1), first=True)
            return []
        found: list[Verified] = result.result
        left = [part for verified in found for part in verified.left]
        again = self._tasks(left, 1) + self._tasks(parts[len(found) :], BATCH)
        self._pool.add(again, first=True)
        return found
