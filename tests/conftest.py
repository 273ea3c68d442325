"""Settings for every test: the order in which tests start, and the limits of Hypothesis."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")  # the time of an example depends on the machine's other load


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start long tests first: a long test that starts last would leave all other cores idle."""
    items.sort(key=lambda item: not takes_long(item))


def takes_long(item: pytest.Item) -> bool:
    """Return whether a test is slow, or one of the lab's, the first of which boots it."""
    return any(item.get_closest_marker(name) for name in ("slow", "lab"))
