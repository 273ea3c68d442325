"""The scenarios on wires as tests: a real VPP with linux-cp, and a kernel with ESP, xfrm interfaces and vhost-net."""

from __future__ import annotations

import pytest
import wirescenarios
from kernels import ESP, VHOST_NET, XFRM_INTERFACE
from reports import Report, chosen, guest_with, run_scenarios, scenarios_of

from support.vpp_box import vpp_binary

LIMIT_S = 1800.0
"""Time limit for all scenarios, s; more than the slowest machine needs."""

pytestmark = [
    pytest.mark.lab,
    pytest.mark.xdist_group("lab"),  # one guest for all scenarios, and no two guests at a time
    pytest.mark.vpp,
    pytest.mark.timeout(LIMIT_S + 300),
    pytest.mark.skipif(vpp_binary() is None, reason="VPP_BIN does not name a VPP"),
]


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Report:
    """Run the selected scenarios in a guest. Skips where no kind of guest works here."""
    guest = guest_with(ESP, XFRM_INTERFACE, VHOST_NET, memory_mb=4096)
    return run_scenarios(guest, "wirescenarios.py", chosen(request), LIMIT_S)


@pytest.mark.parametrize("scenario", scenarios_of(wirescenarios))
def test_on_the_wires(scenario: str, report: Report) -> None:
    report.check(scenario)
