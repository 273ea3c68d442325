"""The lab's scenarios as tests: the guest is booted once, runs those that were asked for, and each is told here by itself."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as xml
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import scenarios
from guest import HERE, Guest, GuestError, lab_environment, obstacle

SCENARIOS = [name for name in vars(scenarios) if name.startswith("test_")]
LIMIT_S = 600.0
"""More than the slowest machine should need for all scenarios, s."""
_OPTIONS = (
    *("-q", "--color=no", "-p", "no:cacheprovider", "-p", "no:cov", "-o", "addopts="),
    *("-o", "junit_logging=all", "-o", "junit_log_passing_tests=false"),
)
"""For pytest in the guest: nothing of how this session is run; and in the report, what a scenario that failed has printed."""

pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(LIMIT_S + 60),
    pytest.mark.skipif(obstacle() is not None, reason=str(obstacle())),
]


@dataclass(frozen=True)
class Report:
    """What the guest says: of each scenario its failures, none where it passed; and why it came no further, if it did not."""

    failures: Mapping[str, list[str]]
    trouble: str


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Report:
    """Boot the guest and run the scenarios that this session has selected."""
    chosen = [item.callspec.params["scenario"] for item in request.session.items if item.path == request.path]
    names = [f"{HERE / 'scenarios.py'}::{name}" for name in chosen]
    trouble = ""
    with Guest() as guest:
        path = guest.directory / "report.xml"
        try:
            guest.run(
                [sys.executable, "-m", "pytest", *_OPTIONS, f"--junitxml={path}", *names], lab_environment(), LIMIT_S
            )
        except GuestError as error:
            trouble = str(error)
        return Report(_read(path), trouble)


def _read(path: Path) -> dict[str, list[str]]:
    """Read pytest's report. Parametrised scenarios are gathered under their function's name."""
    failures: dict[str, list[str]] = {}
    if path.exists():
        for case in xml.parse(path).iter("testcase"):
            told = failures.setdefault(case.attrib["name"].split("[")[0], [])
            if any(case.find(kind) is not None for kind in ("failure", "error", "skipped")):
                told.append("\n".join(part.text or part.attrib.get("message", "") for part in case))
    return failures


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_in_the_lab(scenario: str, report: Report) -> None:
    if scenario not in report.failures:
        pytest.fail(f"the guest did not come to it: {report.trouble or 'see what it printed'}", pytrace=False)
    if report.failures[scenario]:
        pytest.fail("\n".join(report.failures[scenario]), pytrace=False)
