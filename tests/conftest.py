"""What holds for every test: which ones start first, and what Hypothesis does not take for a failure."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")  # how long an example takes depends on what else the machine does


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the slow tests first: one that began last would leave all cores but its own idle."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
