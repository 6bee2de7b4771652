"""Mutations: deliberate faults in the code, each of which named tests must catch.

A test suite that passes proves little until it is seen to fail. Each entry of :data:`MUTATIONS`
replaces one piece of source text by a faulty one in a copy of the project, and runs the tests that
guard that rule. A mutation is *caught* when one of them fails. It *survives* when all pass: then a
rule of the project has no test. A mutation whose source text does not stand exactly once in its
file is an error: the code has changed, and the entry has to follow.

``make mutate`` runs all of them, as many at a time as there are processors. The named tests are
first run on the unchanged copy, where all of them must pass.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mutations import MUTATIONS, Mutation

PROJECT = Path(__file__).resolve().parent.parent

#: What a copy of the project needs to run its tests.
COPIED = ("addcow_mp", "tests", "tools", "docs", "pyproject.toml", "README.md", "Makefile")

#: Seconds after which the tests of one mutation count as failed: a mutation may well hang them.
PATIENCE = 240


@dataclass(frozen=True)
class Outcome:
    """What became of one mutation: ``caught``, ``survived`` or ``error``."""

    mutation: Mutation
    word: str
    seconds: float
    detail: str = ""


def copy_project(target: Path) -> None:
    """Copy the files that tests need into the directory ``target``."""
    ignored = shutil.ignore_patterns("__pycache__", ".hypothesis", "*.egg-info")
    for name in COPIED:
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=ignored)
        else:
            shutil.copy2(source, target / name)


def run_tests(copy: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Run ``tests`` on the package in ``copy``; pytest's exit status and its last lines."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    # Long walks too: with the option a test fails at the first case that catches the fault.
    command = [*pytest, "-m", "not slow", *tests]
    try:
        done = subprocess.run(
            command,
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {PATIENCE} s"
    return done.returncode, "\n".join(done.stdout.splitlines()[-4:])


def apply(copy: Path, mutation: Mutation) -> None:
    """Change the copy. Raises :class:`ValueError` when the text does not stand exactly once."""
    path = copy / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file}: the text stands {text.count(mutation.old)} times")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def try_mutation(mutation: Mutation) -> Outcome:
    """Apply one mutation to a fresh copy and run the tests that guard its rule."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as directory:
        copy = Path(directory)
        copy_project(copy)
        try:
            apply(copy, mutation)
        except (OSError, ValueError) as error:
            return Outcome(mutation, "error", 0.0, str(error))
        status, detail = run_tests(copy, mutation.tests)
    word = {0: "survived", 1: "caught"}.get(status, "error")
    return Outcome(mutation, word, time.monotonic() - start, detail)


def check_unchanged(mutations: Sequence[Mutation]) -> str | None:
    """Run all named tests on an unchanged copy; what failed, or None."""
    tests = sorted({test for mutation in mutations for test in mutation.tests})
    with tempfile.TemporaryDirectory(prefix="unchanged-") as directory:
        copy_project(Path(directory))
        workers = ["-n", str(os.cpu_count() or 1)]
        status, detail = run_tests(Path(directory), [*workers, *tests])
    return detail if status else None


def report(outcomes: Sequence[Outcome]) -> int:
    """Print a line for each outcome; the exit status is 1 unless all were caught."""
    for one in outcomes:
        print(f"{one.word:<9} {one.seconds:6.1f} s  {one.mutation.name}")
        if one.word != "caught":
            print(f"          {one.mutation.file}: {one.detail}")
    missed = sum(1 for one in outcomes if one.word != "caught")
    print(f"{len(outcomes) - missed} of {len(outcomes)} mutations caught")
    return 1 if missed else 0


def main() -> int:
    """Run the mutations whose names contain one of the given words, by default all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of names; default: all mutations")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--skip-unchanged", action="store_true")
    options = parser.parse_args()
    wanted = [
        one for one in MUTATIONS if not options.names or any(n in one.name for n in options.names)
    ]
    failed = None if options.skip_unchanged else check_unchanged(wanted)
    if failed is not None:
        print(f"the tests fail on the unchanged project:\n{failed}", file=sys.stderr)
        return 2
    with ThreadPoolExecutor(options.jobs) as threads:
        return report(list(threads.map(try_mutation, wanted)))


if __name__ == "__main__":
    sys.exit(main())
