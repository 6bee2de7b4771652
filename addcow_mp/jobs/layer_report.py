"""What verifying a layer says: which bytes differ, and what else is to be known of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from itertools import groupby

from addcow_mp.format.bits import merged

#: Remarks on layers of which nothing was read: there is nothing to hold them against.
NOT_COMPARED = ("manifest", "no-manifest", "replaced", "stale", "unexamined", "not-examined")


class Grade(Enum):
    """What a remark means."""

    NOTE = "note"
    UNVERIFIED = "unverified"
    DAMAGE = "damage"


@dataclass(frozen=True)
class Remark:
    """Something about ``file`` that is no range of bytes of it."""

    name: str
    grade: Grade
    file: str
    message: str

    def as_json(self) -> dict[str, str]:
        """The remark with its public keys."""
        severity = self.grade.value
        return {
            "name": self.name,
            "severity": severity,
            "file": self.file,
            "message": self.message,
        }


@dataclass(frozen=True)
class Range:
    """Bytes ``[start, start + length)`` of ``file`` that are not what they were."""

    file: str
    start: int
    length: int

    def as_json(self) -> dict[str, str | int]:
        """The range with its public keys."""
        return {"file": self.file, "start": self.start, "length": self.length}


@dataclass
class LayerReport:
    """What was found about one layer, and how many bytes of it were compared."""

    path: str
    ranges: list[Range] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    bytes_read: int = 0

    @property
    def exit_code(self) -> int:
        """0 as it was, 1 not verified, 2 different."""
        grades = {remark.grade for remark in self.remarks}
        if self.ranges or Grade.DAMAGE in grades:
            return 2
        return 1 if Grade.UNVERIFIED in grades else 0

    @property
    def was_compared(self) -> bool:
        """Whether the content was held against the manifest, whatever came of it."""
        return not any(remark.name in NOT_COMPARED for remark in self.remarks)

    def remark(self, name: str, grade: Grade, file: str, message: str) -> None:
        """Add a remark."""
        self.remarks.append(Remark(name, grade, file, message))

    def join(self, other: LayerReport) -> None:
        """Add what was found in another part of the same layer."""
        self.ranges = list(joined({*self.ranges, *other.ranges}))
        self.remarks += [one for one in other.remarks if one not in self.remarks]
        self.bytes_read += other.bytes_read


def joined(ranges: Iterable[Range]) -> Iterator[Range]:
    """``ranges`` in order of files and places, those that touch as one."""
    for file, group in groupby(sorted(ranges, key=_place), key=lambda one: one.file):
        spans = merged((one.start, one.start + one.length) for one in group)
        yield from (Range(file, start, stop - start) for start, stop in spans)


def _place(one: Range) -> tuple[str, int]:
    return one.file, one.start
