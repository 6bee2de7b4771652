"""Run addcow while the kernel refuses system calls (`seccomp_filter.py`)."""

import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

from support.availability import missing
from support.command import PATIENCE, Result
from support.seccomp_filter import CALLS

FILTER = Path(__file__).with_name("seccomp_filter.py")


def refusing(
    rules: list[str], *arguments: str, cwd: Path, stdin: str = "", loaded: bool = False
) -> Result:
    """Run addcow bound to the rules, and insist on nothing but that it ends without a traceback.

    ``loaded``: from then on when its modules are loaded.
    """
    skip_without_filters()
    command = ["addcow"] if loaded else [sys.executable, "-m", "addcow_mp"]
    words = [*rules, "--", *command, *arguments]
    done = subprocess.run(
        [sys.executable, str(FILTER), *words],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Result(done.returncode, done.stdout, done.stderr)


@cache
def _why_not() -> str:
    if platform.machine() not in CALLS:
        return f"no numbers of system calls are known for {platform.machine()}"
    words = [sys.executable, str(FILTER), "flock:ENOLCK", "--", "true"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else "seccomp filters cannot be set: " + done.stderr[-200:]


def skip_without_filters() -> None:
    """Skip the test, or fail where nothing may be missing, when filters cannot be had."""
    reason = _why_not()
    if reason:
        missing(reason)
