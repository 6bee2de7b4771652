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

from addcow_mp.device.access import Access
from addcow_mp.device.sidecar import manifest_of
from addcow_mp.errors import ManifestError
from addcow_mp.farm.ledger import Entry, Ledger, Record, opened
from addcow_mp.farm.verify import layers_in
from addcow_mp.format.manifest import FileState, read_head, weight_of
from addcow_mp.jobs.looking import Part, Sample, Seen, Target
from addcow_mp.jobs.report import Conduct
from addcow_mp.jobs.verdict import Verdict
from addcow_mp.jobs.verify import Outstanding, looked_at

#: How a run has ended, in the ledger's words.
COMPLETE, TIME_LIMIT, INTERRUPTED, FAILED = "complete", "time-limit", "interrupted", "failed"

#: Exit statuses of layers.
UNVERIFIED, DIFFERENT = 1, 2


@dataclass
class Scrubbed:
    """What a run has found: ``verdicts`` of the layers that it has finished.

    ``bytes_read`` were read, those of layers that were not finished included; ``left`` layers of
    the pass were not looked at to their ends.
    """

    verdicts: list[Verdict] = field(default_factory=list)
    bytes_read: int = 0
    left: int = 0


def scrub(
    places: Iterable[str],
    ledger: str,
    conduct: Conduct,
    *,
    share: float | None = None,
    is_late: Callable[[], bool] = lambda: False,
) -> Scrubbed:
    """Verify what is due of the layers in ``places``, and remember it in the file ``ledger``.

    ``share`` of 1 is everything; None = no sample. No further part is begun once it ``is_late``
    or ``conduct`` stops it. Raises :class:`ImageError` for a place that is not there and for a
    file that is no ledger.
    """
    targets, access = _targets(places, conduct.access)
    with opened(ledger) as book:
        return _Round(book, targets, share).run(replace(conduct, access=access), is_late)


def _targets(places: Iterable[str], access: Access) -> tuple[dict[str, Target], Access]:
    """The layers by their real paths."""
    images, files, access = layers_in(map(os.path.abspath, places), access)
    return {os.path.realpath(one.path): one for one in (*images, *files)}, access


class _Round:
    """One run over the layers in ``targets``."""

    def __init__(self, book: Ledger, targets: dict[str, Target], share: float | None) -> None:
        self._book = book
        self._sample = None if share is None else _sample(share)
        known, runs = book.entries(), book.runs()
        self._entries = {path: _current(path, known.get(path)) for path in targets}
        self._gone = [one._replace(gone=1) for path, one in known.items() if _is_gone(path)]
        pass_ = max((run.pass_ for run in runs), default=1)
        if self._sample is None and not self._due(pass_):
            pass_ += 1
        sample = self._sample
        self._run = Record(
            len(runs) + 1,
            pass_,
            time.time(),
            sample=None if sample is None else sample.share,
            seed=None if sample is None else sample.seed,
        )
        #: In the order in which they are looked at, which numbers them.
        self._order = self._due(pass_)
        self._targets = [targets[path] for path in self._order]
        self._found = [self._beginning(path) for path in self._order]
        self._read = [0] * len(self._order)
        self._outstanding = Outstanding(
            part for number, path in enumerate(self._order) for part in self._parts(number, path)
        )
        self._result = Scrubbed()

    def _due(self, pass_: int) -> list[str]:
        """The layers to be looked at, the longest-unverified first."""
        if self._sample is not None:
            return sorted(
                self._entries, key=lambda path: (self._entries[path].last_looked_at, path)
            )
        due = (entry for entry in self._entries.values() if entry.pass_ < pass_)
        # What was begun goes first among its equals.
        ordered = sorted(due, key=lambda one: (one.verified or 0, not one.unseen, one.path))
        return [entry.path for entry in ordered]

    def _parts(self, number: int, path: str) -> list[Part]:
        """What is to be looked at of a layer: all, or what was left of it."""
        spans = [] if self._sample is not None else self._entries[path].spans
        return [Part(number, *span) for span in spans] or [Part(number)]

    def _beginning(self, path: str) -> Verdict:
        return Verdict(path) if self._sample is not None else self._entries[path].begun()

    def run(self, conduct: Conduct, is_late: Callable[[], bool]) -> Scrubbed:
        """Look at what is due, as long as that is allowed."""
        self._book.put(*self._entries.values(), *self._gone)
        self._book.put_run(self._run)
        self._book.write()
        ending = FAILED
        try:
            bounded = replace(conduct, stopping=lambda: conduct.stopping() or is_late())
            self._look(bounded)
            ending = self._ending(conduct)
        finally:
            self._end(ending)
        return self._result

    def _look(self, conduct: Conduct) -> None:
        total = len(self._order)
        for seen in looked_at(self._targets, self._outstanding.parts, conduct, self._sample):
            self._take(seen)
            conduct.progress(total - len(self._outstanding.layers), total)
            if self._book.is_due:
                self._book.put_run(self._run)
                self._book.write()

    def _ending(self, conduct: Conduct) -> str:
        if not self._outstanding.layers:
            return COMPLETE
        return INTERRUPTED if conduct.stopping() else TIME_LIMIT

    def _end(self, ending: str) -> None:
        self._result.left = len(self._outstanding.layers)
        self._run = self._run._replace(ended=time.time(), result=ending)
        self._book.put_run(self._run)
        self._book.write()

    def _take(self, seen: Seen) -> None:
        """Enter what was seen of a part of a layer."""
        number = seen.part.index
        self._found[number].join(seen.verdict)
        self._read[number] += seen.verdict.bytes_read
        self._result.bytes_read += seen.verdict.bytes_read
        self._run = self._run._replace(bytes=self._result.bytes_read)
        path = self._order[number]
        if self._outstanding.take(seen):
            self._finish(self._entries[path], self._found[number], self._read[number])
        elif self._sample is None:
            unseen = [(one.first, one.stop) for one in sorted(self._outstanding.layers[number])]
            self._enter(self._entries[path].begin(self._found[number], unseen))

    def _finish(self, entry: Entry, found: Verdict, size: int) -> None:
        """Enter what was found of a whole layer."""
        self._result.verdicts.append(replace(found, path=entry.path, bytes_read=size))
        if self._sample is not None:
            if entry.exit == DIFFERENT:  # not seen again is not mended
                found.join(entry.known())
            entry = entry.looked_at(found)._replace(sampled=time.time())
        else:
            seen = entry.verified if found.exit_code == UNVERIFIED else time.time()
            entry = entry.looked_at(found)._replace(
                verified=seen, pass_=self._run.pass_, unseen=None, pending=None
            )
        self._enter(entry)
        different = self._run.different + (found.exit_code == DIFFERENT)
        self._run = self._run._replace(layers=self._run.layers + 1, different=different)
        self._book.remember(self._run, entry, size)

    def _enter(self, entry: Entry) -> None:
        self._entries[entry.path] = entry
        self._book.put(entry)


def _sample(share: float) -> Sample:
    from random import SystemRandom

    return Sample(share, SystemRandom().getrandbits(48))


def _current(path: str, known: Entry | None) -> Entry:
    """What is known of a layer, if that is of the manifest that it has now."""
    sidecar = manifest_of(path)
    try:
        # Without the ctime, which a change of owner or mode moves as well.
        identity = " ".join(map(str, FileState.of(os.stat(sidecar))[:3]))
    except OSError:
        identity = None
    if known is not None and known.manifest == identity:
        return known._replace(gone=0)
    return Entry(path, identity, 0 if identity is None else _weight(sidecar))


def _weight(sidecar: str) -> int:
    try:
        return weight_of(sidecar, read_head(sidecar))
    except (OSError, ManifestError):
        return 0


def _is_gone(path: str) -> bool:
    return not os.path.lexists(path)
