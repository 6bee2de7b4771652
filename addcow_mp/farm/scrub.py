"""Scrub: verify the layers of a farm again and again, the longest-unverified first.

A run continues where the last one ended, and ends when every layer was verified in this pass, or
when it is stopped. Layers that were never verified come first, then those whose last verification
is the oldest. A pass verifies no layer twice. A layer with a new manifest was never verified.

With a *sample* only a random part of the leaves is read, of every layer. That is no verification
and leaves the pass as it is, but many samples find what is widespread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import ClassVar

from addcow_mp.device.manifest_file import manifest_of
from addcow_mp.engine.leaf_compare import Sample
from addcow_mp.engine.verify_task import LayerRef, LeafRange, Verified
from addcow_mp.errors import AddcowError, ManifestError, StoppedError, TimeLimitError
from addcow_mp.farm.places import Found
from addcow_mp.farm.scrub_state import Entry, Record, ScrubState, opened
from addcow_mp.farm.verify import FarmFiles
from addcow_mp.findings import DIFFERENT, UNVERIFIED, LayerReport, worst
from addcow_mp.format.bits import Run
from addcow_mp.format.manifest import FileState, read_head, weight_of
from addcow_mp.jobs.options import Hooks, RunOptions
from addcow_mp.jobs.verify import Remaining, verifiers

#: How a run has ended, as it is stored.
COMPLETE, TIME_LIMIT, INTERRUPTED, FAILED = "complete", "time-limit", "interrupted", "failed"


@dataclass
class Scrubbed:
    """The result of a run: the reports on layers that it has finished or found damaged.

    ``bytes_read``: includes layers that were not finished. ``left``: the number of layers of the
    pass that were not finished. ``problem``: what ended the run early.
    """

    exit_statuses: ClassVar = {
        **LayerReport.exit_statuses,
        TimeLimitError.exit_code: "the time limit was reached, and no layer differs",
    }

    layer_reports: list[LayerReport] = field(default_factory=list)
    bytes_read: int = 0
    left: int = 0
    problem: AddcowError | None = None
    places: Found | None = None

    @property
    def exit_code(self) -> int:
        """The status of the worst layer, unless the problem outranks it."""
        if self.problem is not None and self.is_problem_worst:
            return self.problem.exit_code
        return worst(one.exit_code for one in self.layer_reports)

    @property
    def is_problem_worst(self) -> bool:
        """Whether the problem outranks the reports; a stop always does, others not a difference."""
        if type(self.problem) is StoppedError:
            return True
        return all(one.exit_code != DIFFERENT for one in self.layer_reports)


def scrub(
    places: Iterable[str],
    scrub_state: str,
    options: RunOptions,
    hooks: Hooks,
    *,
    share: float | None = None,
    is_late: Callable[[], bool] = lambda: False,
) -> Scrubbed:
    """Verify what is due of the layers in ``places``, and store it in the file ``scrub_state``.

    ``share``: the size of a sample; 1 is everything, None no sample. No further part is begun once
    ``is_late`` or ``hooks`` stops it. Raises :class:`ImageError` when none of the places is there,
    and for a file that is no scrub state.
    """
    with hooks.looking():
        files = FarmFiles(map(os.path.realpath, places), options.access)
        images, others = files.layers()
        targets = {os.path.realpath(one.path): one for one in (*images, *others)}
    with opened(scrub_state, locking=files.access.locking) as state:
        known, runs = state.entries(), state.runs()
        entries = {path: _current(path, known.get(path)) for path in targets}
        gone = (one._replace(gone=1) for one in known.values() if one.is_gone)
        state.put(*entries.values(), *gone)
        selection = _Pass(entries, runs) if share is None else _Sampling(entries, runs, share)
        run = Record(len(runs) + 1, selection.pass_, time.time())
        if selection.sample is not None:
            run = run._replace(sample=selection.sample.share, seed=selection.sample.seed)
        running = _Run(state, run, selection, targets)
        scrubbed = running.result(replace(options, access=files.access), hooks, is_late)
    scrubbed.layer_reports += files.unexamined()
    scrubbed.places = files.found
    return scrubbed


# What a run verifies, and what the results mean


class _Pass:
    """Verifies all leaves that this pass has not verified; a new pass if there are none."""

    sample: Sample | None = None

    def __init__(self, entries: dict[str, Entry], runs: list[Record]) -> None:
        self.pass_ = max((run.pass_ for run in runs), default=1)
        #: The layers in the order in which they are verified.
        self.order = self._ordered(entries, runs)

    def _ordered(self, entries: dict[str, Entry], runs: list[Record]) -> list[Entry]:
        is_over = [run.result == COMPLETE for run in runs if run.sample is None][-1:] == [True]
        if is_over or all(entry.pass_ == self.pass_ for entry in entries.values()):
            self.pass_ += 1
        due = (entry for entry in entries.values() if entry.pass_ < self.pass_)
        # Of layers that are equally old, those that were begun come first.
        return sorted(due, key=lambda one: (one.verified or 0, not one.unseen, one.path))

    def parts(self, number: int, entry: Entry) -> list[LeafRange]:
        """What is to be verified of the layer with this ``number`` in the order."""
        return [LeafRange(number, *span) for span in entry.spans] or [LeafRange(number)]

    def weight(self, entry: Entry) -> int:
        """About how many bytes of the layer are to be read."""
        return max(0, entry.bytes - entry.begun().bytes_read)

    def earlier(self, entry: Entry) -> LayerReport:
        """The report of earlier runs that this one completes."""
        return entry.begun()

    def partial(self, entry: Entry, report: LayerReport, unseen: list[Run]) -> Entry:
        """The entry of a layer that was verified except for the leaves ``unseen``."""
        return _with_damage(entry, report).begin(report, unseen)

    def finished(self, entry: Entry, report: LayerReport) -> Entry:
        """The entry of a layer that was verified to its end."""
        entry = entry._replace(pass_=self.pass_, unseen=None, pending=None)
        if report.exit_code == UNVERIFIED or not report.was_compared:
            return _merged(entry, report)
        return entry.with_result(report)._replace(verified=time.time())


class _Sampling(_Pass):
    """Reads a random part of every layer; the pass stays as it is."""

    def __init__(self, entries: dict[str, Entry], runs: list[Record], share: float) -> None:
        from random import SystemRandom

        super().__init__(entries, runs)
        self._share = share
        self.sample = Sample(share, SystemRandom().getrandbits(48))

    def _ordered(self, entries: dict[str, Entry], runs: list[Record]) -> list[Entry]:  # noqa: ARG002
        return sorted(entries.values(), key=lambda one: (one.last_read, one.path))

    def parts(self, number: int, entry: Entry) -> list[LeafRange]:  # noqa: ARG002
        return [LeafRange(number)]

    def weight(self, entry: Entry) -> int:
        return round(entry.bytes * self._share)

    def earlier(self, entry: Entry) -> LayerReport:
        return LayerReport(entry.path)

    def partial(self, entry: Entry, report: LayerReport, unseen: list[Run]) -> Entry:  # noqa: ARG002
        # The next run draws other leaves, and begins with layers that were read earlier.
        return _with_damage(entry, report)._replace(sampled=time.time())

    def finished(self, entry: Entry, report: LayerReport) -> Entry:
        return _merged(entry, report)._replace(sampled=time.time())


def _with_damage(entry: Entry, report: LayerReport) -> Entry:
    """The entry with damage that was found before the end of a layer, which may take nights."""
    return _merged(entry, report) if report.exit_code == DIFFERENT else entry


def _merged(entry: Entry, report: LayerReport) -> Entry:
    """The entry after an incomplete verification: damage that was known remains."""
    if entry.exit == DIFFERENT:
        report = replace(report, path=entry.path)
        report.join(entry.known())
    return entry.with_result(report)


class _Run:
    """A ``run`` over the layers in ``targets``, whose results are stored as they come."""

    def __init__(
        self, state: ScrubState, run: Record, selection: _Pass, targets: dict[str, LayerRef]
    ) -> None:
        self._state = state
        self._run = run
        self._selection = selection
        self._entries = selection.order
        self._targets = [targets[entry.path] for entry in self._entries]
        self._reports = [selection.earlier(entry) for entry in self._entries]
        self._read = [0] * len(self._entries)
        parts = (selection.parts(number, entry) for number, entry in enumerate(self._entries))
        weights = [selection.weight(entry) for entry in self._entries]
        self._remaining = Remaining((part for some in parts for part in some), weights)
        self._result = Scrubbed()
        self._different: set[int] = set()

    def result(self, options: RunOptions, hooks: Hooks, is_late: Callable[[], bool]) -> Scrubbed:
        """Verify what is due until it is done or stopped."""
        self._write()
        ending, result = FAILED, self._result
        try:
            self._verify(options, replace(hooks, stopping=lambda: hooks.stopping() or is_late()))
            ending, result.problem = self._ending(hooks)
        except KeyboardInterrupt:  # a second one, which ends it at once
            ending = INTERRUPTED
            raise
        except AddcowError as error:  # the results so far are reported all the same
            result.problem = error.without_traceback()
        finally:
            unfinished = self._remaining.layers.keys()
            result.left = len(unfinished)
            result.layer_reports += map(self._report, sorted(self._different & unfinished))
            self._run = self._run._replace(ended=time.time(), result=ending)
            try:
                self._write()
            except AddcowError as error:
                if result.problem is None or isinstance(result.problem, StoppedError):
                    result.problem = error.without_traceback()
        return result

    def _report(self, number: int) -> LayerReport:
        """The report on a layer, with the bytes that this run has read."""
        path, read = self._entries[number].path, self._read[number]
        return replace(self._reports[number], path=path, bytes_read=read)

    def _ending(self, hooks: Hooks) -> tuple[str, AddcowError | None]:
        """How the run has ended, and the error that says so."""
        left = len(self._remaining.layers)
        if not left:
            return COMPLETE, None
        if hooks.stopping():
            return INTERRUPTED, StoppedError(path=f"{left} layers left")
        message = "the time limit was reached; the same command continues from there"
        return TIME_LIMIT, TimeLimitError(message=f"{left} layers left: {message}")

    def _verify(self, options: RunOptions, hooks: Hooks) -> None:
        parts = self._remaining.parts
        with verifiers(options, hooks, len(parts), self._selection.sample) as running:
            for verified in running.compare(self._targets, parts):
                self._enter(verified)
                self._remaining.show(hooks)
                if self._state.is_due:
                    self._write()

    def _write(self) -> None:
        self._state.put_run(self._run)
        self._state.write()

    def _enter(self, verified: Verified) -> None:
        """Enter the result for a part of a layer."""
        number, size = verified.part.index, verified.layer_report.bytes_read
        entry, report = self._entries[number], self._reports[number]
        report.join(verified.layer_report)
        self._read[number] += size
        self._result.bytes_read += size
        if report.exit_code == DIFFERENT:
            self._different.add(number)
        read, different = self._result.bytes_read, len(self._different)
        self._run = self._run._replace(bytes=read, different=different)
        if self._remaining.enter(verified):
            entry = self._selection.finished(entry, report)
            self._result.layer_reports.append(self._report(number))
            self._run = self._run._replace(layers=self._run.layers + 1)
            self._state.remember(self._run, entry, self._read[number])
        else:
            left = sorted(self._remaining.layers[number])
            unseen = [(one.first, one.stop) for one in left]
            entry = self._selection.partial(entry, report, unseen)
        self._entries[number] = entry
        self._state.put(entry)


def _current(path: str, known: Entry | None) -> Entry:
    """The entry of a layer; a new one if it has another manifest than the known one."""
    manifest = manifest_of(path)
    try:
        # Without the ctime, which a change of owner or mode changes too.
        identity = " ".join(map(str, FileState.of(os.stat(manifest))[:3]))
    except OSError:
        identity = None
    if known is not None and identity in (None, known.manifest):
        return known._replace(gone=0)
    weight = 0
    if identity is not None:
        with suppress(OSError, ManifestError):
            weight = weight_of(manifest, read_head(manifest))
    return Entry(path, identity, weight)
