"""Run addcow as another user than the one who runs the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from support.availability import missing
from support.command import ran

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def as_nobody(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run addcow as the user without rights, who can reach ``cwd``."""
    if os.geteuid() or not shutil.which("setpriv"):
        missing("running as another user needs root and setpriv")
    for here in (cwd, *cwd.parents):
        if here.name.startswith("pytest") or "pytest-of" in str(here):
            here.chmod(here.stat().st_mode | 0o055)
    return ran([*NOBODY, sys.executable, "-m", "addcow_mp", *words], cwd=cwd)
