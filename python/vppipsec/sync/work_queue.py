"""What is to be looked at again, and by whom it was woken: all who learn of something say so here, and one works it off."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from vppipsec.kernel.xfrm.sad_spd import TunnelKey


class WorkQueue:
    """Groups that may have changed, and what of VPP's surroundings may have; its length is the number of the groups."""

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        """Set when there is something to do."""
        self.environment_dirty = False
        """Whether VPP is to be asked again about all that tunnels depend on."""
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
        """Mark groups as perhaps changed."""
        for key in keys:
            self._dirty[key] = None
        if self._dirty:
            self.wake.set()

    def request_environment_read(self) -> None:
        """Have VPP asked again about all that tunnels depend on."""
        self.environment_dirty = True
        self.wake.set()

    def pop_batch(self, limit: int) -> list[TunnelKey]:
        """Return the groups that have waited longest, at most so many, which then wait no more."""
        keys = list(self._dirty)[:limit]
        for key in keys:
            del self._dirty[key]
        return keys
