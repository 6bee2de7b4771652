"""What a check says: findings by name and severity, and the exit status they add up to."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Severity(Enum):
    """How bad a finding is."""

    CHECK_ERROR = "check-error"
    CORRUPTION = "corruption"
    LEAK = "leak"


@dataclass(frozen=True)
class Finding:
    """What the check ``name`` found; ``count`` is how many of it there are.

    ``bars`` says that with it the image may not be opened, not even for a repair.
    """

    name: str
    severity: Severity
    message: str
    count: int = 1
    bars: bool = True

    def as_json(self) -> dict[str, object]:
        """The finding with its public keys."""
        return {"name": self.name, "severity": self.severity.value, "message": self.message}


@dataclass
class CheckReport:
    """All findings on one image, and their number by severity."""

    filename: str
    findings: list[Finding] = field(default_factory=list)
    total_clusters: int | None = None
    allocated_clusters: int | None = None
    is_addcow: bool = True
    #: What the user should know although no rule is broken: one line each.
    warnings: list[str] = field(default_factory=list)
    #: What was mended, and the file that holds header and bitmap as they were before.
    repairs: list[str] = field(default_factory=list)
    backup: str | None = None
    leaks_fixed: int = 0
    corruptions_fixed: int = 0
    #: What is worth knowing and no fault.
    notes: list[str] = field(default_factory=list)

    def _count(self, severity: Severity) -> int:
        return sum(one.count for one in self.findings if one.severity is severity)

    @property
    def check_errors(self) -> int:
        """How many things could not be looked at."""
        return self._count(Severity.CHECK_ERROR)

    @property
    def corruptions(self) -> int:
        """How many rules are broken."""
        return self._count(Severity.CORRUPTION)

    @property
    def leaks(self) -> int:
        """How many clusters hold data although they are not local."""
        return self._count(Severity.LEAK)

    @property
    def exit_code(self) -> int:
        """0 clean, 1 could not check, 2 corruptions, 3 leaks only, 63 not an add-cow file."""
        if not self.is_addcow:
            return 63
        if self.corruptions:
            return 2
        if self.check_errors:
            return 1
        return 3 if self.leaks else 0

    def as_json(self) -> dict[str, object]:
        """The report with qemu-img check's keys, and the findings."""
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
        }

    def _repaired(self) -> dict[str, object]:
        return {
            "corruptions-fixed": self.corruptions_fixed,
            "leaks-fixed": self.leaks_fixed,
            "repairs": self.repairs,
            "backup": self.backup,
        }
