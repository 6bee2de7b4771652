"""Check that retired words do not come back: in code, comments, docstrings, messages and docs.

``make lint`` runs it. Each entry of the table gives a pattern and the word to use. A line that has
to keep a retired word, such as a key of JSON output, ends with ``words: keep``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

#: Pattern and replacement. Patterns match whole words; case counts.
RETIRED = {
    r"[Ll]ocal (clusters?|bytes|data|share|ones)": "allocated",
    r"(is|are|becomes?|becoming|was|were|made|make|makes) local": "allocated",
    r"Pieces?|pieces": "Extent, extents",
    r"Conduct|conduct": "RunOptions and Hooks",
    r"Manner|manner": "CopyOptions",
    r"Mover|Prospect|Errands?|errands?": "Copier, Estimate, ImageJob",
    r"Wishes": "the job's options",
    r"Tally|Amount": "Progress, Totals",
    r"Verdicts?|verdicts?|Remarks?|Grade": "LayerReport, Finding, Severity",
    r"[Nn]eighbours?": "dependency index",
    r"[Gg]lances?": "quick check",
    r"[Ll]edgers?": "scrub state",
    r"[Aa]genda": "scheduler",
    r"[Ss]idecars?": "manifest file",
    r"[Nn]obody|[Ww]hoever|[Ss]omebody": "name the process, the program or the user",
    r"[Mm]end(s|ed|ing)?": "repair, fix",
    r"(make|makes|made|making|begin|begins|began|begun) anew": "replace, start again",
    r"what it is that": "name the thing",
    r"go back to a copy": "restore from a backup",
    r"does not get on|gets? on": "makes no progress, makes progress",
    r"besides": "also, in addition",
    r"foresee|foreseen": "estimate",
    r"anew": "again, or replace",
    r"in vain": "say why it is useless",
    r"[Hh]eeds?|lest|hitherto|whom|alike": "rewrite the sentence",
    r"[Tt]hereby|[Tt]hereof|[Tt]herein|[Ww]hereupon": "rewrite the sentence",
    r"shall": "must, will, or the present tense",
}

#: What is not checked: history, measurements, and this list.
EXEMPT = ("CHANGELOG.md", "docs/bench/", "tools/words.py", "tests/")

_SUFFIXES = (".py", ".md", ".toml", ".sh")
_PATTERNS = [(re.compile(rf"\b(?:{pattern})\b"), say) for pattern, say in RETIRED.items()]


def checked_files() -> list[Path]:
    """The files of the repository that are checked."""
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout
    names = (name for name in listed.splitlines() if name.endswith(_SUFFIXES))
    return [Path(name) for name in names if not name.startswith(EXEMPT)]


def findings(path: Path) -> list[str]:
    """One line for each retired word in the file at ``path``."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.endswith("words: keep"):
            continue
        for pattern, say in _PATTERNS:
            match = pattern.search(line)
            if match is not None:
                found.append(f"{path}:{number}: '{match[0]}' is retired; say: {say}")
    return found


def main() -> int:
    """Print every finding; the exit status is 1 when there is one."""
    found = [line for path in checked_files() for line in findings(path) if path.exists()]
    print("\n".join(found[:200]))
    print(f"{len(found)} retired words" if found else "No retired words.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
