"""An asyncio socket of NETLINK_XFRM: events and dumps of SAs and policies.

Needs CAP_NET_ADMIN in the network namespace.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable
from hashlib import blake2b

from vppipsec.kernel.netlink.messages import NetlinkError, dump_request, error_of
from vppipsec.kernel.netlink.socket import NetlinkSocket, answer, open_netlink, whole_dump
from vppipsec.kernel.netlink.socket import Overflow as Overflow  # callers take it from here
from vppipsec.kernel.netlink.wire import HEADER, NLMSG_ERROR, WireError, messages_in
from vppipsec.kernel.xfrm.events import Event, PolicyAdded, SaAdded, SaDeleted, SaExpired, SasFlushed
from vppipsec.kernel.xfrm.messages import acquire_request, expire_request, sa_request
from vppipsec.kernel.xfrm.values import MsgType, MulticastGroup, Policy, Sa, SaId
from vppipsec.kernel.xfrm.wire import decode_xfrm

NETLINK_XFRM = 6

EVENT_GROUPS: tuple[MulticastGroup, ...] = (
    MulticastGroup.EXPIRE,
    MulticastGroup.SA,
    MulticastGroup.POLICY,
    MulticastGroup.MIGRATE,
    MulticastGroup.MAPPING,
)
"""What is subscribed to: whatever changes SAs or policies. (ACQUIRE changes neither: its larval SA is no business of ours.)"""
_ENDS = (MsgType.DELSA.value, MsgType.EXPIRE.value, MsgType.FLUSHSA.value)
_DECODE_AT_ONCE = 500
"""Messages of a dump that are decoded before others get their turn, some 7 ms worth."""


class XfrmSocket(NetlinkSocket[Event]):
    """Events and dumps of one network namespace. Opened and subscribed when it is made; close it with `close`."""

    def __init__(self, rx_buffer_size: int = 0, events: socket.socket | None = None) -> None:
        """Open and subscribe. `rx_buffer_size` in bytes, 0 leaves the system's default.

        `events` may be any socket that gives datagrams of netlink messages, in place of the kernel's.
        Raises PermissionError, or OSError where the kernel has no XFRM.
        """
        super().__init__(_open_xfrm_socket(EVENT_GROUPS) if events is None else events, rx_buffer_size)
        self._dumped_sas: dict[MsgType, dict[bytes, Event]] = {}
        self._digests: dict[SaId, bytes] = {}  # of the SAs in the last dump

    async def dump_sas(self) -> list[Sa]:
        """Return all SAs, newest first. Raises OSError and TimeoutError with a sentence."""
        return [event.sa for event in await self._dump(MsgType.GETSA) if isinstance(event, SaAdded)]

    async def dump_policies(self) -> list[Policy]:
        """Return all policies. Raises OSError and TimeoutError with a sentence."""
        return [event.policy for event in await self._dump(MsgType.GETPOLICY) if isinstance(event, PolicyAdded)]

    async def expire(self, sa: Sa, hard: bool = False) -> None:
        """Tell the kernel that an SA has expired: softly, so that the IKE daemon rekeys it, or for good.

        Raises NetlinkError where the kernel refuses, TimeoutError where it does not answer.
        """
        await self._ask(expire_request(sa, hard, next(self._seq)), "the expiry of an SA")

    async def acquire(self, policy: Policy) -> None:
        """Ask the IKE daemon, through the kernel, for the SAs of a policy with a template; whether one listens is not told.

        Raises NetlinkError where the kernel refuses, TimeoutError where it does not answer.
        """
        await self._ask(acquire_request(policy, next(self._seq)), "an ACQUIRE")

    async def has_sent(self, sa: Sa) -> bool:
        """Tell whether the kernel has sent with an SA so far.

        Raises NetlinkError where the kernel refuses, as it does where it has no such SA, TimeoutError where it does not answer,
        and WireError.
        """
        message = await self._ask(sa_request(sa, next(self._seq)), "a question about an SA")
        text = None if message is None else decode_xfrm(message)
        return isinstance(text, SaAdded) and bool(text.sa.replay is not None and text.sa.replay.oseq)

    async def _ask(self, request: bytes, what: str) -> memoryview | None:
        """Ask the kernel something, and return what it tells first if it does not acknowledge alone."""
        with _open_xfrm_socket(()) as asking:
            await asyncio.get_running_loop().sock_sendall(asking, request)
            for message in messages_in(await answer(asking, what)):
                if HEADER.unpack_from(message)[1] != NLMSG_ERROR:
                    return message
                if number := error_of(message):
                    raise NetlinkError(what, number)
        return None

    def _decode_event(self, message: memoryview) -> Event:
        event = decode_xfrm(message, last_words=False)
        if HEADER.unpack_from(message)[1] in _ENDS:
            self._drop_digests(event)
        return event

    def _drop_digests(self, event: Event) -> None:
        """Let go of what the last dump said of SAs that are gone, and of their keys with it."""
        match event:
            case SaDeleted(sa_id) | SaExpired(Sa(id=sa_id), hard=True):
                self._dumped_sas.get(MsgType.GETSA, {}).pop(self._digests.pop(sa_id, b""), None)
            case SasFlushed():
                self._dumped_sas.pop(MsgType.GETSA, None)
                self._digests.clear()

    async def _dump(self, kind: MsgType) -> list[Event]:
        what = f"the dump of {'SAs' if kind == MsgType.GETSA else 'policies'}"
        messages = await whole_dump(lambda: _open_xfrm_socket(()), dump_request(kind, next(self._seq)), what)
        return await self._decode_dump(kind, messages)

    async def _decode_dump(self, kind: MsgType, messages: Iterable[bytes | memoryview]) -> list[Event]:
        """Decode a dump. What is as it was in the dump before is not decoded again: dumps repeat themselves, bit by bit."""
        before, now = self._dumped_sas.get(kind, {}), {}
        for number, message in enumerate(messages, 1):
            digest = blake2b(message[HEADER.size :], digest_size=16).digest()
            try:
                now[digest] = before.get(digest) or decode_xfrm(message)
            except WireError as error:
                self._log_malformed(error)
            if number % _DECODE_AT_ONCE == 0:
                await asyncio.sleep(0)
        self._dumped_sas[kind] = now
        if kind == MsgType.GETSA:
            self._digests = {event.sa.id: digest for digest, event in now.items() if isinstance(event, SaAdded)}
        return list(now.values())


def _open_xfrm_socket(tunnels: Iterable[MulticastGroup]) -> socket.socket:
    """Open a socket of NETLINK_XFRM and subscribe it to groups."""
    try:
        return open_netlink(NETLINK_XFRM, tunnels)
    except PermissionError as error:
        raise PermissionError(error.errno, "reading the kernel's SAs needs CAP_NET_ADMIN") from error
    except OSError as error:
        raise OSError(error.errno, f"this kernel has no XFRM netlink: {error.strerror}") from error
