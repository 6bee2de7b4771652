"""Every promise of README has a test that `make test` runs.

promises.txt quotes README and names the tests. These are failures here: a quote that no longer
stands in README, a test that does not exist, a test that only `make test-all` runs, and a line of
README's table of promises without a quote.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
README = " ".join((HERE.parent / "README.md").read_text("utf-8").split())


def promises() -> dict[str, list[str]]:
    """The tests of each promise, by the words of README."""
    found: dict[str, list[str]] = {}
    for line in (HERE / "promises.txt").read_text("utf-8").splitlines():
        if line.startswith("    "):
            found[[*found][-1]].append(line.strip())
        elif line and not line.startswith("#"):
            found[line] = []
    return found


PROMISES = promises()


@cache
def functions_in(module: str) -> dict[str, ast.FunctionDef]:
    """The test functions of a module, by name."""
    tree = ast.parse((HERE / f"test_{module}.py").read_text("utf-8"))
    return {one.name: one for one in tree.body if isinstance(one, ast.FunctionDef)}


def is_long(test: ast.FunctionDef) -> bool:
    """Whether `make test` leaves all cases of a test out."""
    marks = {ast.unparse(one) for one in test.decorator_list}
    return bool(marks & {"pytest.mark.long", "pytest.mark.slow"})


@pytest.mark.parametrize("quote", PROMISES)
def test_promise_stands_in_readme_and_make_test_runs_its_tests(quote: str) -> None:
    assert quote in README, "README does not say that any more"
    assert PROMISES[quote], "no test is named"
    for name in PROMISES[quote]:
        module, _, test = name.partition("::")
        assert f"test_{test}" in functions_in(module), f"{name} does not exist"
        assert not is_long(functions_in(module)[f"test_{test}"]), f"make test does not run {name}"


def test_every_promise_of_the_table_is_quoted() -> None:
    rows = re.search(r"\| promise \| how it is tested \| \|---\|---\| (.*?\|) [^|]+##", README)
    assert rows is not None
    for row in rows[1].split(" | | "):
        promise = row.strip("| ").partition(" | ")[0]
        assert any(quote in promise or promise in quote for quote in PROMISES), promise
