"""Rule files for `ADDCOW_FAULTS`: which event of a command fails, stops or kills.

Rules choose moments, never time: a rule stops a process at a named event, the test sees it
stopped, does what it has to do, and lets it continue or kills it. A rule with `once` leaves a
marker file beside the rule file when it strikes. A walk over "the first, the second, the third
time" knows by that when there is no further time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

VARIABLE = "ADDCOW_FAULTS"


def rule(event: str, action: int | str = "error", **more: int | str) -> str:
    """Return one section of a rule file."""
    words = {"event": event, "action": action, **more}
    return "[inject-error]\n" + "".join(f'{key} = "{value}"\n' for key, value in words.items())


@dataclass(frozen=True)
class Rules:
    """A rule file in a directory of its own, where no other file is looked at."""

    path: Path

    @classmethod
    def write(cls, directory: Path, *sections: str) -> Rules:
        """Write the file; markers of the rules that were there before are taken away."""
        directory.mkdir(exist_ok=True)
        for old in directory.iterdir():
            old.unlink()
        path = directory / "rules"
        path.write_text("\n".join(sections))
        return cls(path)

    @property
    def hits(self) -> list[int]:
        """The numbers of the rules with `once` that have struck."""
        return [int(one.suffix.split("-")[1]) for one in self.path.parent.glob("rules.hit-*")]

    @property
    def struck(self) -> bool:
        """Whether some rule with `once` has struck."""
        return bool(self.hits)


def rules_for(here: Path, *sections: str) -> Rules:
    """Write a rule file beside the directory of a test's images."""
    return Rules.write(here.parent / "rules", *sections)


def stopping_both(event: str, after: int) -> tuple[str, str]:
    """Return rules that stop both workers: the second can only come to its next time."""
    return (
        rule(event, "stop", once="on", after=after),
        rule(event, "stop", once="on", after=after + 1),
    )
