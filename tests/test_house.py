"""The house rules that no other check knows: how long modules and functions are, and what tests import."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.launch import ROOT
from tpimpi.compute.formats import FORMATS
from tpimpi.models.architectures import ARCHITECTURES

MODULE_LINES, FUNCTION_LINES = 400, 60

# Longer ones, each with its reason; what no longer needs to stand here fails the test.
LONG_MODULES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}


def _modules(*folders: str) -> Iterator[tuple[str, str]]:
    """The path from the root, and the text, of every Python file in the folders."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def _functions(text: str) -> Iterator[tuple[str, int]]:
    """The name and the number of lines, from def to the last, of every function."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def test_no_module_is_longer_than_a_reader_can_hold() -> None:
    long = {path: len(text.splitlines()) for path, text in _modules("src", "bench", "tests")}
    long = {path: lines for path, lines in long.items() if lines > MODULE_LINES}
    assert set(long) == set(LONG_MODULES), {path: long.get(path) for path in set(long) ^ set(LONG_MODULES)}


def test_no_function_is_longer_than_a_screen() -> None:
    long = {
        f"{path}:{name}": lines
        for path, text in _modules("src", "bench", "tests")
        for name, lines in _functions(text)
        if lines > FUNCTION_LINES
    }
    assert set(long) == set(LONG_FUNCTIONS), {name: long.get(name) for name in set(long) ^ set(LONG_FUNCTIONS)}


def test_tests_share_by_tests_support_alone() -> None:
    for path, text in _modules("tests"):
        found = re.findall(r"^\s*(?:from|import) ((?:tests\.)?(?:\w+\.)*(?:test_\w+|conftest))\b", text, re.MULTILINE)
        assert not found, f"{path} imports {found}: move what they share to tests/support"


@pytest.mark.parametrize("folder", ["src", "bench", "tests"])
def test_nothing_is_imported_by_a_changed_search_path(folder: str) -> None:
    trick = re.compile(r"sys\.path\.(?:insert|append|extend)|syspath_" + "prepend")
    # A staying rank runs a program as Python does, which puts its folder first.
    allowed = {"tests/support/worker.py"}
    found = [path for path, text in _modules(folder) if trick.search(text) and path not in allowed]
    assert not found


def test_every_module_is_imported_by_the_short_suite() -> None:
    """By a test or what it shares, or by a module that is: one that nothing imports is tested by nothing."""
    source = Path("src/tpimpi")
    names = {}
    for path, text in _modules("src/tpimpi"):
        parts = Path(path).relative_to(source.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = text
    reached = {"tpimpi.__main__", *FORMATS.modules, *ARCHITECTURES.modules}  # tests go through all of these
    left = [*(text for _, text in _modules("tests")), *(names[name] for name in reached)]
    while left:
        for name in _imported(left.pop()) & (names.keys() - reached):
            reached.add(name)
            left.append(names[name])
    assert names.keys() == reached, names.keys() - reached


def _imported(text: str) -> set[str]:
    """Modules that are imported anywhere in the text, and the packages around them; a program in a string counts too."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found | {name.rpartition(".")[0] for name in found}
