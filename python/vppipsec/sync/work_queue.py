"""The queue of tunnels and environment reads that wait for the engine. Every part adds to it; the engine empties it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from vppipsec.kernel.xfrm.sad_spd import TunnelKey


class WorkQueue:
    """Dirty tunnels, and whether the environment may have changed. Its length is the number of tunnels."""

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        """Set when there is something to do."""
        self.environment_dirty = False
        """Whether the whole environment must be read again from VPP."""
        self.changed_interfaces: set[int] = set()
        """Interfaces of VPP that changed."""
        self._dirty: dict[TunnelKey, None] = {}  # a set that keeps order

    def __len__(self) -> int:
        return len(self._dirty)

    def __contains__(self, key: TunnelKey) -> bool:
        return key in self._dirty

    @property
    def is_empty(self) -> bool:
        """True when there is nothing to do."""
        return not self._dirty and not self.environment_dirty and not self.changed_interfaces

    def mark_dirty(self, keys: Iterable[TunnelKey]) -> None:
        """Mark tunnels that may have changed."""
        for key in keys:
            self._dirty[key] = None
        if self._dirty:
            self.wake.set()

    def request_environment_read(self) -> None:
        """Request that the whole environment be read again from VPP."""
        self.environment_dirty = True
        self.wake.set()

    def pop_batch(self, limit: int) -> list[TunnelKey]:
        """Remove and return the tunnels that have waited longest, at most `limit`."""
        keys = list(self._dirty)[:limit]
        for key in keys:
            del self._dirty[key]
        return keys
