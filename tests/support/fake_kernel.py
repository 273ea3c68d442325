"""A fake kernel: the test sets its tables, and followers get the changes as over netlink."""

from __future__ import annotations

import asyncio
import errno

from support.build import NOT_USED
from vppipsec.kernel.netlink.messages import NetlinkError
from vppipsec.kernel.xfrm.events import Event, PolicyAdded, PolicyDeleted, SaAdded, SaDeleted, SaExpired
from vppipsec.kernel.xfrm.sad_spd import tunnel_key_of_sa
from vppipsec.kernel.xfrm.socket import Overflow
from vppipsec.kernel.xfrm.values import Policy, PolicyId, Sa, SaId


class FakeKernel:
    """A substitute for `XfrmSocket`. Changes are announced unless the test says otherwise."""

    def __init__(self) -> None:
        self.sas: dict[SaId, Sa] = {}
        self._known: set[SaId] = set()
        self.policies: dict[PolicyId, Policy] = {}
        self.silent = False
        self.expired: list[SaId] = []
        """SAs whose expiry user space asked for."""
        self.acquired: list[Policy] = []
        """Policies whose SAs user space asked for."""
        self.places: dict[PolicyId, int] = {}
        """The service's order of policies. An unchanged policy, added again, keeps its position until the next dump."""
        self.sent: set[SaId] = set()
        """SAs with which the kernel has sent since it announced their sequence numbers."""
        self.says_nothing_of: set[SaId] = set()
        self.rekeys_when_asked = True
        self._queue: asyncio.Queue[Event | Overflow] = asyncio.Queue()

    def add(self, *items: Sa | Policy) -> None:
        """Add or update SAs and policies, in order."""
        for item in items:
            if isinstance(item, Sa):
                updated = item.id in self.sas  # it keeps its position
                self._known.add(item.id)
                self.sas[item.id] = item
                self.changed(SaAdded(item, updated))
            else:
                before = self.policies.pop(item.id, None)  # it counts as new
                self.policies[item.id] = item
                if before != item:
                    self.places[item.id] = max(self.places.values(), default=0) + 1
                self.changed(PolicyAdded(item, before is not None))

    def delete(self, *items: Sa | Policy) -> None:
        """Delete SAs and policies, in order."""
        for item in items:
            if isinstance(item, Sa):
                del self.sas[item.id]
                self.changed(SaDeleted(item.id, item))
            else:
                del self.policies[item.id]
                self.changed(PolicyDeleted(item.id))

    def changed(self, event: Event) -> None:
        """Announce a change that was made."""
        self.tell(event)

    def tell(self, event: Event | Overflow) -> None:
        """Announce an event."""
        if not self.silent:
            self._queue.put_nowait(event)

    async def expire(self, sa: Sa, hard: bool = False) -> None:
        """Receive an EXPIRE from user space.

        A soft one makes the IKE daemon, where there is one, rekey as charon does.
        """
        if sa.id not in self.sas:
            raise NetlinkError("the expiry of an SA", errno.ESRCH)
        self.expired.append(sa.id)
        if hard:
            del self.sas[sa.id]
            self.changed(SaExpired(sa, hard=True))
        elif self.rekeys_when_asked:
            self.rekey(sa)

    async def has_sent(self, sa: Sa) -> bool:
        """Return whether the kernel has sent with an SA."""
        if sa.id not in self.sas or sa.id in self.says_nothing_of:
            raise NetlinkError("a question about an SA", errno.ESRCH)
        return sa.id in self.sent

    async def acquire(self, policy: Policy) -> None:
        """Receive an ACQUIRE from user space; no IKE daemon reacts to it by itself."""
        self.acquired.append(policy)

    def rekey(self, sa: Sa) -> None:
        """Replace both SAs of the tunnel that an SA belongs to, make before break."""
        old = [other for other in self.sas.values() if tunnel_key_of_sa(other) == tunnel_key_of_sa(sa)]
        inbound_first = sorted(old, key=lambda other: other.replay_window == 0)
        for other in inbound_first:
            self.add(self._successor(other))
        self.delete(*old)

    def _successor(self, sa: Sa) -> Sa:
        """Return an SA's successor after a rekey: unused, with the same keys and therefore a new SPI."""
        found = sa._replace(usage=NOT_USED, replay=None)
        while found.id in self._known:
            found = found._replace(spi=found.spi + (0x40000000 if found.spi < 0x40000000 else 0x00100000))
        return found

    @property
    def pending(self) -> int:
        """Number of events that were announced and not read yet."""
        return self._queue.qsize()

    def forget_listener(self) -> None:
        """Discard announced events that were not read, as the kernel does when a socket closes."""
        self._queue = asyncio.Queue()

    async def read(self, limit: int) -> list[Event | Overflow]:
        found = [await self._queue.get()]
        while len(found) < limit and not self._queue.empty():
            found.append(self._queue.get_nowait())
        return found

    async def dump_sas(self) -> list[Sa]:
        return list(reversed(self.sas.values()))

    async def dump_policies(self) -> list[Policy]:
        self.places = {policy_id: number for number, policy_id in enumerate(self.policies)}
        return list(reversed(self.policies.values()))
