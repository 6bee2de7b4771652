"""Scrub: verify the layers of a farm again and again, the longest-unverified first.

A run goes on where the last one ended, however that was, and ends when every layer was looked at
in this pass, or when it shall. Layers that were never verified come first, then those whose last
verification is the longest ago; whatever a pass has looked at it does not look at again. A layer
whose manifest was made anew was never verified.

With a *sample* only a random part of the leaves is read, of every layer: no verification, but
enough of them find what is widespread. It leaves the pass where it is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

from addcow_mp.device.manifest_file import manifest_of
from addcow_mp.errors import AddcowError, ManifestError
from addcow_mp.farm.places import Found
from addcow_mp.farm.scrub_state import Entry, Record, ScrubState, opened
from addcow_mp.farm.verify import FarmFiles
from addcow_mp.format.bits import Run
from addcow_mp.format.manifest import FileState, read_head, weight_of
from addcow_mp.jobs.layer_report import LayerReport
from addcow_mp.jobs.leaf_compare import Sample
from addcow_mp.jobs.options import Hooks, RunOptions
from addcow_mp.jobs.verify import ReadSoFar, RemainingLeaves, verifiers
from addcow_mp.jobs.verify_task import LayerRef, LeafRange, Verified

#: How a run has ended, in the ledger's words.
COMPLETE, TIME_LIMIT, INTERRUPTED, FAILED = "complete", "time-limit", "interrupted", "failed"

#: Exit statuses of layers.
UNVERIFIED, DIFFERENT = 1, 2


@dataclass
class Scrubbed:
    """What a run has found: ``layer_reports`` of layers that it has finished, or found damaged.

    ``bytes_read`` were read, those of layers that were not finished included; ``left`` layers of
    the pass were not looked at to their ends. ``problem`` ended the run.
    """

    layer_reports: list[LayerReport] = field(default_factory=list)
    bytes_read: int = 0
    left: int = 0
    problem: AddcowError | None = None
    places: Found | None = None


def scrub(
    places: Iterable[str],
    scrub_state: str,
    options: RunOptions,
    hooks: Hooks,
    *,
    share: float | None = None,
    is_late: Callable[[], bool] = lambda: False,
) -> Scrubbed:
    """Verify what is due of the layers in ``places``, and remember it in the file ``scrub_state``.

    ``share`` of 1 is everything; None = no sample. No further part is begun once it ``is_late``
    or ``hooks`` stops it. Raises :class:`ImageError` when none of the places is there and for a
    file that is no ledger.
    """
    with hooks.looking():
        files = FarmFiles(map(os.path.realpath, places), options.access)
        targets = _targets(files)
    with opened(scrub_state, locking=files.access.locking) as book:
        known, runs = book.entries(), book.runs()
        entries = {path: _current(path, known.get(path)) for path in targets}
        book.put(
            *entries.values(), *(one._replace(gone=1) for one in known.values() if one.is_gone)
        )
        way = _Whole(entries, runs) if share is None else _Sampled(entries, runs, share)
        run = Record(len(runs) + 1, way.pass_, time.time())
        if way.sample is not None:
            run = run._replace(sample=way.sample.share, seed=way.sample.seed)
        scrubbed = _Round(book, run, way, targets).run(
            replace(options, access=files.access), hooks, is_late
        )
    scrubbed.layer_reports += files.unexamined()
    scrubbed.places = files.found
    return scrubbed


def _targets(files: FarmFiles) -> dict[str, LayerRef]:
    """The layers by their real paths."""
    images, others = files.layers()
    return {os.path.realpath(one.path): one for one in (*images, *others)}


# What is looked at, and what that means


class _Way(Protocol):
    """Which layers a run looks at, at what of them, and what it makes of that."""

    pass_: int
    sample: Sample | None
    order: list[Entry]
    """The layers, in the order in which they are looked at."""

    def parts(self, number: int, entry: Entry) -> list[LeafRange]:
        """What is to be looked at of the layer that has this ``number`` in the order."""

    def weight(self, entry: Entry) -> int:
        """About how many bytes of the layer are to be read."""

    def beginning(self, entry: Entry) -> LayerReport:
        """What earlier runs have found of what this one completes."""

    def partly(self, entry: Entry, found: LayerReport, unseen: list[Run]) -> Entry:
        """What is known of a layer that was looked at but for the leaves ``unseen``."""

    def wholly(self, entry: Entry, found: LayerReport) -> Entry:
        """What is known of a layer that was looked at to its end."""


class _Whole:
    """Everything of what this pass has not looked at yet; a new pass when that is nothing."""

    sample: Sample | None = None

    def __init__(self, entries: dict[str, Entry], runs: list[Record]) -> None:
        self.pass_ = _last_pass(runs)
        is_over = [run.result == COMPLETE for run in runs if run.sample is None][-1:] == [True]
        if is_over or all(entry.pass_ == self.pass_ for entry in entries.values()):
            self.pass_ += 1
        due = (entry for entry in entries.values() if entry.pass_ < self.pass_)
        # What was begun goes first among its equals.
        self.order = sorted(due, key=lambda one: (one.verified or 0, not one.unseen, one.path))

    def parts(self, number: int, entry: Entry) -> list[LeafRange]:
        return [LeafRange(number, *span) for span in entry.spans] or [LeafRange(number)]

    def weight(self, entry: Entry) -> int:
        return max(0, entry.bytes - entry.begun().bytes_read)

    def beginning(self, entry: Entry) -> LayerReport:
        return entry.begun()

    def partly(self, entry: Entry, found: LayerReport, unseen: list[Run]) -> Entry:
        # Damage is known at once: the end of a large layer may be nights away.
        known = _remembering(entry, found) if found.exit_code == DIFFERENT else entry
        return known.begin(found, unseen)

    def wholly(self, entry: Entry, found: LayerReport) -> Entry:
        entry = entry._replace(pass_=self.pass_, unseen=None, pending=None)
        if found.exit_code == UNVERIFIED or not found.was_compared:
            return _remembering(entry, found)
        return entry.looked_at(found)._replace(verified=time.time())


class _Sampled:
    """A random part of every layer; the pass stays where it is."""

    sample: Sample | None

    def __init__(self, entries: dict[str, Entry], runs: list[Record], share: float) -> None:
        from random import SystemRandom

        self.pass_ = _last_pass(runs)
        self._share = share
        self.sample = Sample(share, SystemRandom().getrandbits(48))
        self.order = sorted(entries.values(), key=lambda one: (one.last_looked_at, one.path))

    def parts(self, number: int, entry: Entry) -> list[LeafRange]:  # noqa: ARG002
        return [LeafRange(number)]

    def weight(self, entry: Entry) -> int:
        return round(entry.bytes * self._share)

    def beginning(self, entry: Entry) -> LayerReport:
        return LayerReport(entry.path)

    def partly(self, entry: Entry, found: LayerReport, unseen: list[Run]) -> Entry:  # noqa: ARG002
        # The next run draws others, and begins with layers whose turn was longer ago.
        known = _remembering(entry, found) if found.exit_code == DIFFERENT else entry
        return known._replace(sampled=time.time())

    def wholly(self, entry: Entry, found: LayerReport) -> Entry:
        return _remembering(entry, found)._replace(sampled=time.time())


def _last_pass(runs: list[Record]) -> int:
    return max((run.pass_ for run in runs), default=1)


def _remembering(entry: Entry, found: LayerReport) -> Entry:
    """What is known after a look that may have missed something: damage is not mended by that."""
    if entry.exit == DIFFERENT:
        found = replace(found, path=entry.path)
        found.join(entry.known())
    return entry.looked_at(found)


class _Round:
    """A ``run`` over the layers in ``targets``, entered in the ledger as it goes."""

    def __init__(
        self, book: ScrubState, run: Record, way: _Way, targets: dict[str, LayerRef]
    ) -> None:
        self._book = book
        self._run = run
        self._way = way
        self._entries = way.order
        self._targets = [targets[entry.path] for entry in way.order]
        self._found = [way.beginning(entry) for entry in way.order]
        self._read = [0] * len(way.order)
        parts = (way.parts(number, entry) for number, entry in enumerate(way.order))
        self._outstanding = RemainingLeaves(part for some in parts for part in some)
        self._so_far = ReadSoFar([way.weight(entry) for entry in way.order])
        self._result = Scrubbed()
        self._different: set[int] = set()

    def run(self, options: RunOptions, hooks: Hooks, is_late: Callable[[], bool]) -> Scrubbed:
        """Look at what is due, as long as that is allowed."""
        self._write()
        ending = FAILED
        try:
            bounded = replace(hooks, stopping=lambda: hooks.stopping() or is_late())
            self._look(options, bounded)
            ending = self._ending(hooks)
        except KeyboardInterrupt:  # a second one, which ends it at once
            ending = INTERRUPTED
            raise
        except AddcowError as error:  # what was found is told all the same
            self._result.problem = error.without_traceback()
        finally:
            self._result.left = len(self._outstanding.layers)
            self._result.layer_reports += self._unfinished()
            self._run = self._run._replace(ended=time.time(), result=ending)
            self._write_last()
        return self._result

    def _write_last(self) -> None:
        try:
            self._write()
        except AddcowError as error:
            self._result.problem = self._result.problem or error.without_traceback()

    def _unfinished(self) -> list[LayerReport]:
        """What this run has found of layers in which it found damage, and not their ends."""
        numbers = sorted(self._different & self._outstanding.layers.keys())
        return [self._told(number) for number in numbers]

    def _told(self, number: int) -> LayerReport:
        path, read = self._entries[number].path, self._read[number]
        return replace(self._found[number], path=path, bytes_read=read)

    def _ending(self, hooks: Hooks) -> str:
        if not self._outstanding.layers:
            return COMPLETE
        return INTERRUPTED if hooks.stopping() else TIME_LIMIT

    def _look(self, options: RunOptions, hooks: Hooks) -> None:
        parts = self._outstanding.parts
        with verifiers(options, hooks, len(parts), self._way.sample) as crew:
            for verified in crew.look(self._targets, parts):
                self._take(verified)
                self._so_far.tell(hooks)
                if self._book.is_due:
                    self._write()

    def _write(self) -> None:
        self._book.put_run(self._run)
        self._book.write()

    def _take(self, verified: Verified) -> None:
        """Enter what was seen of a part of a layer."""
        number, size = verified.part.index, verified.layer_report.bytes_read
        entry, found = self._entries[number], self._found[number]
        found.join(verified.layer_report)
        self._read[number] += size
        self._result.bytes_read += size
        if found.exit_code == DIFFERENT:
            self._different.add(number)
        self._run = self._run._replace(
            bytes=self._result.bytes_read, different=len(self._different)
        )
        is_last = self._outstanding.take(verified)
        self._so_far.take(verified, is_last=is_last)
        if is_last:
            entry = self._way.wholly(entry, found)
            self._finish(entry, self._told(number))
        else:
            left = sorted(self._outstanding.layers[number])
            entry = self._way.partly(entry, found, [(one.first, one.stop) for one in left])
        self._entries[number] = entry
        self._book.put(entry)

    def _finish(self, entry: Entry, found: LayerReport) -> None:
        """Enter what this run has found of a whole layer."""
        self._result.layer_reports.append(found)
        self._run = self._run._replace(layers=self._run.layers + 1)
        self._book.remember(self._run, entry, found.bytes_read)


# What is known of layers


def _current(path: str, known: Entry | None) -> Entry:
    """What is known of a layer, if that is of the manifest that it has now."""
    sidecar = manifest_of(path)
    try:
        # Without the ctime, which a change of owner or mode moves as well.
        identity = " ".join(map(str, FileState.of(os.stat(sidecar))[:3]))
    except OSError:
        identity = None
    if known is not None and identity in (None, known.manifest):
        return known._replace(gone=0)
    return Entry(path, identity, 0 if identity is None else _weight(sidecar))


def _weight(sidecar: str) -> int:
    try:
        return weight_of(sidecar, read_head(sidecar))
    except (OSError, ManifestError):
        return 0
