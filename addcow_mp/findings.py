"""Findings: what a check or a verification reports, and the exit status that this leads to.

A finding has a name, a severity and a message. The exit status of a report is that of its worst
finding, and the exit status of many reports is that of the worst report. It is decided here and
in the reports that are built on it, nowhere else.

``CORRUPTION`` (a rule of the format is broken), ``LEAK`` (data in clusters that are not allocated)
and ``CHECK_ERROR`` (something could not be examined) come from a check of an image. ``DAMAGE``
(content differs), ``UNVERIFIED`` (content could not be compared) and ``NOTE`` come from comparing
a layer with its manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from itertools import groupby
from typing import ClassVar

from addcow_mp.format.bits import merged

#: Exit statuses of a check or a verification, the worst first; 63: it is not an add-cow file.
WORST_FIRST = (2, 1, 63, 3, 0)

#: Exit statuses of a layer.
UNVERIFIED, DIFFERENT = 1, 2

#: Findings on layers of which nothing was compared.
_NOT_COMPARED = {
    *("manifest", "no-manifest", "replaced", "stale", "unexamined", "not-examined"),
    "lent",
}


def worst(statuses: Iterable[int]) -> int:
    """The worst of some exit statuses; 0 if there are none."""
    return min(statuses, key=WORST_FIRST.index, default=0)


class Severity(Enum):
    """How bad a finding is."""

    CORRUPTION = "corruption"
    DAMAGE = "damage"
    CHECK_ERROR = "check-error"
    UNVERIFIED = "unverified"
    LEAK = "leak"
    NOTE = "note"

    @property
    def exit_code(self) -> int:
        """The exit status of a command with such a finding and no worse one."""
        return _EXIT_CODES[self]


_EXIT_CODES = {
    Severity.CORRUPTION: 2,
    Severity.DAMAGE: 2,
    Severity.CHECK_ERROR: 1,
    Severity.UNVERIFIED: 1,
    Severity.LEAK: 3,
    Severity.NOTE: 0,
}


@dataclass(frozen=True)
class Finding:
    """One finding; ``count`` is the number of clusters or bits that it is about.

    ``file``: the file that it is about, where that is not the image that was checked. ``bars``:
    the image must not be opened, not even for a repair.
    """

    name: str
    severity: Severity
    message: str
    count: int = 1
    bars: bool = True
    file: str | None = None

    def as_json(self) -> dict[str, str]:
        """The finding with its public keys."""
        file = {} if self.file is None else {"file": self.file}
        severity = self.severity.value
        return {"name": self.name, "severity": severity, **file, "message": self.message}


@dataclass
class CheckReport:
    """All findings on one image.

    ``warnings``: lines for the user that break no rule. ``notes``: facts that are no fault.
    ``is_lent``: QEMU uses it. ``repairs``: what was repaired; ``backup``: the file with the old
    header and bitmap. ``manifests_removed``: the manifests of what a repair has changed.
    """

    exit_statuses: ClassVar = {
        0: "no errors were found",
        1: "something could not be checked",
        2: "corruptions were found",
        3: "only leaks were found",
        63: "not an add-cow file",
    }

    filename: str
    findings: list[Finding] = field(default_factory=list)
    total_clusters: int | None = None
    allocated_clusters: int | None = None
    is_addcow: bool = True
    warnings: list[str] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)
    backup: str | None = None
    leaks_fixed: int = 0
    corruptions_fixed: int = 0
    notes: list[str] = field(default_factory=list)
    is_lent: bool = False
    manifests_removed: list[str] = field(default_factory=list)

    def _count(self, severity: Severity) -> int:
        return sum(one.count for one in self.findings if one.severity is severity)

    @property
    def check_errors(self) -> int:
        """The number of things that could not be examined."""
        return self._count(Severity.CHECK_ERROR)

    @property
    def corruptions(self) -> int:
        """The number of broken rules."""
        return self._count(Severity.CORRUPTION)

    @property
    def leaks(self) -> int:
        """The number of clusters that hold data although they are not allocated."""
        return self._count(Severity.LEAK)

    @property
    def exit_code(self) -> int:
        """0 clean, 1 could not check, 2 corruptions, 3 leaks only, 63 not an add-cow file."""
        return worst(one.severity.exit_code for one in self.findings) if self.is_addcow else 63

    def as_json(self) -> dict[str, object]:
        """The report with the keys of qemu-img check, and the findings."""
        return {
            "filename": self.filename,
            "format": "add-cow",
            "check-errors": self.check_errors,
            "corruptions": self.corruptions,
            "leaks": self.leaks,
            "total-clusters": self.total_clusters,
            "allocated-clusters": self.allocated_clusters,
            "findings": [finding.as_json() for finding in self.findings],
            **({"notes": self.notes} if self.notes else {}),
            **(self._repaired() if self.repairs else {}),
            **({"manifests-removed": self.manifests_removed} if self.manifests_removed else {}),
        }

    def _repaired(self) -> dict[str, object]:
        return {
            "corruptions-fixed": self.corruptions_fixed,
            "leaks-fixed": self.leaks_fixed,
            "repairs": self.repairs,
            "backup": self.backup,
        }


@dataclass(frozen=True, order=True)
class Range:
    """The bytes ``[start, start + length)`` of ``file`` that differ from the manifest."""

    file: str
    start: int
    length: int

    def as_json(self) -> dict[str, str | int]:
        """The range with its public keys."""
        return {"file": self.file, "start": self.start, "length": self.length}


@dataclass
class LayerReport:
    """The result of comparing a layer with its manifest; ``bytes_read`` were compared."""

    exit_statuses: ClassVar = {
        0: "every layer is as its manifest says",
        1: "a layer could not be verified",
        2: "a layer differs",
    }

    path: str
    ranges: list[Range] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    bytes_read: int = 0

    @property
    def exit_code(self) -> int:
        """0 unchanged, 1 not verified, 2 different."""
        found = worst(one.severity.exit_code for one in self.findings)
        return DIFFERENT if self.ranges else found

    @property
    def is_lent(self) -> bool:
        """Whether it is an overlay that is lent to QEMU: its content is not compared."""
        return any(one.name == "lent" for one in self.findings)

    @property
    def was_compared(self) -> bool:
        """Whether the content was compared with the manifest."""
        return all(one.name not in _NOT_COMPARED for one in self.findings)

    def add(self, name: str, severity: Severity, file: str, message: str) -> None:
        """Add a finding on ``file``."""
        self.findings.append(Finding(name, severity, message, file=file))

    def join(self, other: LayerReport) -> None:
        """Add what was found in another part of the same layer."""
        self.ranges = list(_joined({*self.ranges, *other.ranges}))
        self.findings += [one for one in other.findings if one not in self.findings]
        self.bytes_read += other.bytes_read

    def as_json(self) -> dict[str, object]:
        """The report with its public keys."""
        return {
            "filename": self.path,
            "exit": self.exit_code,
            "ranges": [one.as_json() for one in self.ranges],
            "findings": [one.as_json() for one in self.findings],
            "bytes": self.bytes_read,
        }


def _joined(ranges: Iterable[Range]) -> Iterator[Range]:
    """``ranges`` in order, adjacent ones joined."""
    for file, group in groupby(sorted(ranges), key=lambda one: one.file):
        spans = merged((one.start, one.start + one.length) for one in group)
        yield from (Range(file, start, stop - start) for start, stop in spans)
