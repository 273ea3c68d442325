"""Runs scenarios in one guest, and returns pytest's result of each."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as xml
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from guest import HERE, Guest, GuestError, compile_modules, lab_environment
from kernels import find

_OPTIONS = (
    *("-q", "--color=no", "-p", "no:cacheprovider", "-p", "no:cov", "-o", "addopts="),
    *("-o", "junit_logging=all", "-o", "junit_log_passing_tests=false", "-o", "timeout=300"),
)
"""Options for pytest in the guest.

They replace those of this session, and add a failed scenario's output to the report.
"""


def scenarios_of(module: ModuleType) -> list[str]:
    """Return the names of a module's scenarios."""
    return [name for name in vars(module) if name.startswith("test_")]


def chosen(request: pytest.FixtureRequest) -> list[str]:
    """Return the selected scenarios of a test file that is parametrised by them."""
    return [item.callspec.params["scenario"] for item in request.session.items if item.path == request.path]


def guest_with(*needs: str, memory_mb: int = 2048) -> Guest:
    """Return a guest of the first kind whose kernel has all of `needs`, and print which.

    Skips where no kind works here.
    """
    found = find(needs)
    print(found)
    if found.kind is None:
        pytest.skip("no kernel for the lab: " + "; ".join(found.reasons))
    return found.guest(memory_mb)


@dataclass(frozen=True)
class Report:
    """The guest's result: the failures of each scenario, none where it passed; and why the run ended early, if it did."""

    failures: Mapping[str, list[str]]
    trouble: str

    def check(self, scenario: str) -> None:
        """Fail if a scenario failed."""
        if scenario not in self.failures:
            pytest.fail(f"the guest did not come to it: {self.trouble or 'see what it printed'}", pytrace=False)
        if self.failures[scenario]:
            pytest.fail("\n".join(self.failures[scenario]), pytrace=False)


def run_scenarios(guest: Guest, file: str, names: Sequence[str], limit_s: float) -> Report:
    """Start the guest and run some scenarios of a file. It ends after them, or after `limit_s` seconds."""
    trouble = ""
    compile_modules()
    with guest:
        path = guest.directory / "report.xml"
        wanted = [f"{HERE / file}::{name}" for name in names]
        try:
            guest.run(
                [sys.executable, "-m", "pytest", *_OPTIONS, f"--junitxml={path}", *wanted], lab_environment(), limit_s
            )
        except GuestError as error:
            trouble = str(error)
        return Report(_read(path), trouble)


def _read(path: Path) -> dict[str, list[str]]:
    """Read pytest's report. Parametrised scenarios are grouped by their function's name."""
    failures: dict[str, list[str]] = {}
    if path.exists():
        for case in xml.parse(path).iter("testcase"):
            told = failures.setdefault(case.attrib["name"].split("[")[0], [])
            if any(case.find(kind) is not None for kind in ("failure", "error", "skipped")):
                told.append("\n".join(part.text or part.attrib.get("message", "") for part in case))
    return failures
