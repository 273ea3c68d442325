"""What holds for every test: which ones start first, and what Hypothesis does not take for a failure."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")  # how long an example takes depends on what else the machine does


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start what takes long first: what began last would leave all cores but its own idle."""
    items.sort(key=lambda item: not takes_long(item))


def takes_long(item: pytest.Item) -> bool:
    """Tell whether a test is slow, or one of the lab's, the first of which boots it."""
    return any(item.get_closest_marker(name) for name in ("slow", "lab"))
