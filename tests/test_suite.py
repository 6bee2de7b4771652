"""Rules for the tests themselves."""

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def imported(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", sorted(HERE.rglob("*.py")), ids=lambda path: path.name)
def test_no_module_imports_a_test_module(path: Path) -> None:
    assert {name for name in imported(path) if name.startswith("test_")} == set()
