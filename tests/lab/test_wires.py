"""What the lab shows on wires, as tests: a real VPP with linux-cp beside a kernel with ESP, in the guest of QEMU's."""

from __future__ import annotations

import pytest
import wirescenarios
from qemu import Qemu
from reports import Report, chosen, run_scenarios, scenarios_of

LIMIT_S = 900.0
"""More than the slowest machine should need for all scenarios, s."""

pytestmark = [
    pytest.mark.lab,
    pytest.mark.vpp,
    pytest.mark.timeout(LIMIT_S + 60),
    pytest.mark.skipif(Qemu.obstacle() is not None, reason=str(Qemu.obstacle())),
]


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Report:
    """Boot the guest and run the scenarios that this session has selected."""
    return run_scenarios(Qemu(memory_mb=4096), "wirescenarios.py", chosen(request), LIMIT_S)


@pytest.mark.parametrize("scenario", scenarios_of(wirescenarios))
def test_on_the_wires(scenario: str, report: Report) -> None:
    report.check(scenario)
