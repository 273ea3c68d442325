"""A kernel for tests: what it holds is set by the test, and told to whoever follows it as netlink would."""

from __future__ import annotations

import asyncio

from vppipsec.xfrm.events import Event, PolicyAdded, PolicyDeleted, SaAdded, SaDeleted
from vppipsec.xfrm.socket import Overflow
from vppipsec.xfrm.values import Policy, PolicyId, Sa, SaId


class FakeKernel:
    """Behaves as `XfrmSocket` towards the engine. Changes are announced unless told otherwise."""

    def __init__(self) -> None:
        self.sas: dict[SaId, Sa] = {}
        self.policies: dict[PolicyId, Policy] = {}
        self.silent = False
        self._queue: asyncio.Queue[Event | Overflow] = asyncio.Queue()

    def add(self, *items: Sa | Policy) -> None:
        """Add or update SAs and policies, in order."""
        for item in items:
            if isinstance(item, Sa):
                self.sas[item.id] = item  # an update keeps its place
                self.tell(SaAdded(item))
            else:
                self.policies[item.id] = item
                self.tell(PolicyAdded(item))

    def delete(self, *items: Sa | Policy) -> None:
        """Delete SAs and policies, in order."""
        for item in items:
            if isinstance(item, Sa):
                del self.sas[item.id]
                self.tell(SaDeleted(item.id, item))
            else:
                del self.policies[item.id]
                self.tell(PolicyDeleted(item.id))

    def tell(self, event: Event | Overflow) -> None:
        """Announce something."""
        if not self.silent:
            self._queue.put_nowait(event)

    @property
    def pending(self) -> int:
        """Number of events that were announced and not read yet."""
        return self._queue.qsize()

    def forget_listener(self) -> None:
        """Drop what was announced and not read, as the kernel does when a socket closes."""
        self._queue = asyncio.Queue()

    async def read(self, limit: int) -> list[Event | Overflow]:
        found = [await self._queue.get()]
        while len(found) < limit and not self._queue.empty():
            found.append(self._queue.get_nowait())
        return found

    async def dump_sas(self) -> list[Sa]:
        return list(reversed(self.sas.values()))

    async def dump_policies(self) -> list[Policy]:
        return list(self.policies.values())
