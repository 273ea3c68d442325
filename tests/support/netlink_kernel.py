"""A fake kernel that speaks netlink: its tables and messages are bytes, over a real netlink socket that may overflow."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Awaitable, Callable, Iterable

from support import netlink_encode
from vppipsec.kernel.netlink.messages import NetlinkError
from vppipsec.kernel.xfrm.events import Event
from vppipsec.kernel.xfrm.sad_spd import tunnel_key_of_sa
from vppipsec.kernel.xfrm.socket import XfrmSocket
from vppipsec.kernel.xfrm.values import MsgType, Policy, PolicyId, Sa, SaId

_NETLINK_USERSOCK = 2
_GROUP = 1


class WireKernel(XfrmSocket):
    """Sends changes to a multicast group of NETLINK_USERSOCK, as the kernel does for NETLINK_XFRM.

    It never waits for a reader: messages that the receive buffer cannot hold are lost, and the reader gets ENOBUFS. It
    needs a network namespace of its own.
    """

    def __init__(self, rx_buffer_size: int = 0) -> None:
        ear, self._mouth = (socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_USERSOCK) for _ in range(2))
        ear.bind((0, _GROUP))
        super().__init__(rx_buffer_size, ear)
        self.sas: dict[SaId, Sa] = {}
        self.policies: dict[PolicyId, Policy] = {}
        self.expired: list[SaId] = []
        """SAs whose expiry user space asked for."""
        self.acquired: list[Policy] = []
        """Policies whose SAs user space asked for."""
        self.silent = False
        self.said = 0
        """Messages sent so far."""
        self.dumps = 0
        """Dumps of either kind so far."""
        self.before_dump_ends: Callable[[MsgType], Awaitable[None]] | None = None
        """Awaited after a dump is made and before it is delivered, so that it can become outdated."""

    def say(self, *messages: bytes) -> None:
        """Send messages, unless silent."""
        for message in messages:
            if not self.silent:
                # the group's messages also go to port 0, which nobody has
                with contextlib.suppress(ConnectionRefusedError):
                    self._mouth.sendto(message, (0, _GROUP))
                self.said += 1

    def add(self, *items: Sa | Policy) -> None:
        """Add or update SAs and policies, in order."""
        for item in items:
            if isinstance(item, Sa):
                updated = item.id in self.sas  # it keeps its position
                self.sas[item.id] = item
                self.say(netlink_encode.new_sa(item, updated))
            else:
                updated = self.policies.pop(item.id, None) is not None  # it counts as new
                self.policies[item.id] = item
                self.say(netlink_encode.new_policy(item, updated))

    def delete(self, *items: Sa | Policy) -> None:
        """Delete SAs and policies, in order."""
        for item in items:
            if isinstance(item, Sa):
                del self.sas[item.id]
                self.say(netlink_encode.del_sa(item))
            else:
                del self.policies[item.id]
                self.say(netlink_encode.del_policy(item))

    def flush(self) -> None:
        """Delete all SAs in one go."""
        self.sas.clear()
        self.say(netlink_encode.flush_sas())

    def forget(self, *items: Sa | Policy) -> None:
        """Delete SAs and policies without a message."""
        for item in items:
            if isinstance(item, Sa):
                del self.sas[item.id]
            else:
                del self.policies[item.id]

    async def expire(self, sa: Sa, hard: bool = False) -> None:
        """Receive a soft EXPIRE from user space: the IKE daemon replaces both SAs of the tunnel, make before break."""
        if sa.id not in self.sas:
            raise NetlinkError("the expiry of an SA", errno.ESRCH)
        self.expired.append(sa.id)
        old = [other for other in self.sas.values() if tunnel_key_of_sa(other) == tunnel_key_of_sa(sa)]
        self.add(*(other._replace(spi=other.spi ^ 0x40000000) for other in old))
        self.delete(*old)

    async def acquire(self, policy: Policy) -> None:
        """Receive an ACQUIRE from user space; no IKE daemon reacts to it by itself."""
        self.acquired.append(policy)

    def close(self) -> None:
        """Close both ends."""
        super().close()
        self._mouth.close()

    async def _dump(self, kind: MsgType) -> list[Event]:
        self.dumps += 1
        taken = [memoryview(message) for message in self._tables(kind)]
        if self.before_dump_ends is not None:
            await self.before_dump_ends(kind)
        return await self._decode_dump(kind, taken)

    def _tables(self, kind: MsgType) -> Iterable[bytes]:
        """Return the messages of a dump, newest first."""
        if kind == MsgType.GETSA:
            return [netlink_encode.new_sa(sa) for sa in reversed(self.sas.values())]
        return [netlink_encode.new_policy(policy) for policy in reversed(self.policies.values())]
