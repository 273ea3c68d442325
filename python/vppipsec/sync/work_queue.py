"""What is to be looked at again, and by whom it was woken: all who learn of something say so here, and one works it off."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from vppipsec.kernel.xfrm.sad_spd import GroupKey


class Todo:
    """Groups that may have changed, and what of VPP's surroundings may have; its length is the number of the groups."""

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        """Set when there is something to do."""
        self.surroundings = False
        """Whether VPP is to be asked again about all that tunnels depend on."""
        self.interfaces: set[int] = set()
        """Interfaces of VPP that changed."""
        self._dirty: dict[GroupKey, None] = {}  # a set that keeps order

    def __len__(self) -> int:
        return len(self._dirty)

    def __contains__(self, key: GroupKey) -> bool:
        return key in self._dirty

    @property
    def done(self) -> bool:
        """True when there is nothing to do."""
        return not self._dirty and not self.surroundings and not self.interfaces

    def soil(self, keys: Iterable[GroupKey]) -> None:
        """Mark groups as perhaps changed."""
        for key in keys:
            self._dirty[key] = None
        if self._dirty:
            self.wake.set()

    def look_around(self) -> None:
        """Have VPP asked again about all that tunnels depend on."""
        self.surroundings = True
        self.wake.set()

    def take(self, most: int) -> list[GroupKey]:
        """Return the groups that have waited longest, at most so many, which then wait no more."""
        keys = list(self._dirty)[:most]
        for key in keys:
            del self._dirty[key]
        return keys
