"""The lab's scenarios as tests: one guest runs the selected ones, and each has a result of its own."""

from __future__ import annotations

import pytest
import scenarios
from kernels import ESP
from reports import Report, chosen, guest_with, run_scenarios, scenarios_of

LIMIT_S = 900.0
"""Time limit for all scenarios, s; more than the slowest machine needs."""

pytestmark = [
    pytest.mark.lab,
    pytest.mark.slow,
    pytest.mark.xdist_group("lab"),  # one guest for all scenarios, and no two guests at a time
    pytest.mark.timeout(LIMIT_S + 300),
]


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Report:
    """Run the selected scenarios in a guest. Skips where no kind of guest works here."""
    return run_scenarios(guest_with(ESP), "scenarios.py", chosen(request), LIMIT_S)


@pytest.mark.parametrize("scenario", scenarios_of(scenarios))
def test_in_the_lab(scenario: str, report: Report) -> None:
    report.check(scenario)
