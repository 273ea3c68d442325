"""Markers say when and with what a test runs: slow tests start first, those marked `versions` run with Debian 12's packages too.

The rule for `versions`: a test module is marked if it imports one of the packages that the second environment pins, itself or
through another module of the tests. Each module of the project that imports one is imported by a marked test module, without
another module of the project between them.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

from support.recorded import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
PACKAGES = {requirement.split("==")[0] for requirement in PROJECT["tox"]["env"]["debian12"]["deps"]}
"""The packages of which Debian 12's version is installed for the tests that are marked."""
ROOTS = [ROOT / place for place in PROJECT["pytest"]["ini_options"]["pythonpath"]]


@cache
def imported(path: Path) -> set[str]:
    """Return the names of all modules that a file may import; of `from a import b` both `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def packages_of(names: Iterable[str]) -> set[str]:
    """Return those of the packages that modules are from."""
    return {name.split(".")[0] for name in names} & PACKAGES


def is_marked(path: Path) -> bool:
    """Tell whether all tests of a file are marked."""
    marks = [
        node.value
        for node in ast.parse(path.read_bytes()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    return any("pytest.mark.versions" in ast.unparse(each) for each in marks)


def through_tests(path: Path) -> set[str]:
    """Return the names of the modules that a test file imports, itself or through other files of the tests."""
    names, files = set[str](), [path]
    for file in files:
        names |= (new := imported(file) - names)
        found = (place / f"{name}.py" for name in new for place in (file.parent, *ROOTS[1:]))
        files += [each for each in found if each.is_file() and each not in files]
    return names


TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
IMPORTERS = sorted(path for path in (ROOT / "python").rglob("*.py") if packages_of(imported(path)))


def test_what_takes_long_starts_first(request: pytest.FixtureRequest) -> None:
    long = [any(item.get_closest_marker(name) for name in ("slow", "lab")) for item in request.session.items]
    assert long == sorted(long, reverse=True)


def test_there_are_packages_and_modules_that_import_them() -> None:
    assert packages_of(name for path in (*IMPORTERS, *TESTS) for name in through_tests(path)) == PACKAGES


def test_every_test_module_that_imports_one_of_the_packages_is_marked() -> None:
    missing = [str(path) for path in TESTS if packages_of(through_tests(path)) and not is_marked(path)]
    assert not missing


@pytest.mark.parametrize("path", IMPORTERS, ids=lambda path: path.stem)
def test_every_module_that_imports_one_of_the_packages_is_under_marked_tests(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT / "python").with_suffix("").parts)
    assert [test for test in TESTS if is_marked(test) and module in imported(test)]
