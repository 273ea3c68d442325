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
"""The subscribed groups: all that change SAs or policies. (ACQUIRE changes neither: the model omits its larval SA.)"""
_ENDS = (MsgType.DELSA.value, MsgType.EXPIRE.value, MsgType.FLUSHSA.value)
_DECODE_AT_ONCE = 500
"""Number of messages that are decoded before other tasks get their turn: about 7 ms of work."""


class XfrmSocket(NetlinkSocket[Event]):
    """Events and dumps of one network namespace. The constructor opens and subscribes it; `close` closes it."""

    def __init__(self, rx_buffer_size: int = 0, events: socket.socket | None = None) -> None:
        """Open and subscribe. `rx_buffer_size` is in bytes; 0 keeps the system's default.

        `events` replaces the kernel's socket by any socket that delivers datagrams of netlink messages.
        Raises PermissionError, or OSError if the kernel has no XFRM.
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
        """Expire an SA in the kernel. Soft: the IKE daemon rekeys it. Hard: the kernel deletes it.

        Raises NetlinkError if the kernel refuses, TimeoutError if it does not answer.
        """
        await self._ask(expire_request(sa, hard, next(self._seq)), "the expiry of an SA")

    async def acquire(self, policy: Policy) -> None:
        """Ask the IKE daemon, through the kernel, to set up the SAs of a policy with a template.

        The kernel does not report whether a daemon listens.
        Raises NetlinkError if the kernel refuses, TimeoutError if it does not answer.
        """
        await self._ask(acquire_request(policy, next(self._seq)), "an ACQUIRE")

    async def has_sent(self, sa: Sa) -> bool:
        """Return whether the kernel has sent a packet with an SA.

        Raises NetlinkError if the kernel refuses, for example since it has no such SA. Raises TimeoutError if it does not answer,
        and WireError.
        """
        message = await self._ask(sa_request(sa, next(self._seq)), "a question about an SA")
        event = None if message is None else decode_xfrm(message)
        return isinstance(event, SaAdded) and bool(event.sa.replay is not None and event.sa.replay.oseq)

    async def _ask(self, request: bytes, what: str) -> memoryview | None:
        """Send a request and return the first message of the answer, None if it is only an acknowledgement."""
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
        """Drop the decoded messages of deleted SAs, so that their keys do not stay in memory."""
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
        """Decode a dump. Messages equal to those of the previous dump are not decoded again: most do not change."""
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


def _open_xfrm_socket(groups: Iterable[MulticastGroup]) -> socket.socket:
    """Open a socket of NETLINK_XFRM and subscribe it to groups. Raises PermissionError and OSError with a sentence."""
    try:
        return open_netlink(NETLINK_XFRM, groups)
    except PermissionError as error:
        raise PermissionError(error.errno, "reading the kernel's SAs needs CAP_NET_ADMIN") from error
    except OSError as error:
        raise OSError(error.errno, f"this kernel has no XFRM netlink: {error.strerror}") from error
