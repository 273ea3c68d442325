"""The lab's scenarios as tests: the guest is booted once, runs those that were asked for, and each is told here by itself."""

from __future__ import annotations

import pytest
import scenarios
from reports import Report, chosen, run_scenarios, scenarios_of
from uml import Uml

LIMIT_S = 600.0
"""More than the slowest machine should need for all scenarios, s."""

pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(LIMIT_S + 60),
    pytest.mark.skipif(Uml.obstacle() is not None, reason=str(Uml.obstacle())),
]


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Report:
    """Boot the guest and run the scenarios that this session has selected."""
    return run_scenarios(Uml(), "scenarios.py", chosen(request), LIMIT_S)


@pytest.mark.parametrize("scenario", scenarios_of(scenarios))
def test_in_the_lab(scenario: str, report: Report) -> None:
    report.check(scenario)
