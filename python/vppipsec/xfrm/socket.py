"""An asyncio socket of NETLINK_XFRM: events in batches, dumps beside them, lost messages told.

Events and dumps have a socket each, so that a dump delays no event. Needs CAP_NET_ADMIN in the network namespace.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from vppipsec.xfrm.events import Event, PolicyAdded, SaAdded, SaDeleted, SaExpired, SasFlushed
from vppipsec.xfrm.request import NLM_F_DUMP_INTR, NetlinkError, dump_request, error_of, expire_request
from vppipsec.xfrm.values import Group, MsgType, Policy, Sa, SaId
from vppipsec.xfrm.wire import HEADER, NLMSG_DONE, NLMSG_ERROR, WireError, decode, split

log = logging.getLogger(__name__)

NETLINK_XFRM = 6
_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_SO_RCVBUFFORCE = 33

EVENT_GROUPS: tuple[Group, ...] = (Group.EXPIRE, Group.SA, Group.POLICY, Group.MIGRATE, Group.MAPPING)
"""What is subscribed to: whatever changes SAs or policies. (ACQUIRE changes neither: its larval SA is no business of ours.)"""
READ_SIZE = 1 << 16
"""Bytes asked of the kernel at a time; an XFRM notification is some 4 KiB at most."""
DUMP_TIMEOUT_S = 30.0
DUMP_TRIES = 5
_ENDS = (MsgType.DELSA.value, MsgType.EXPIRE.value, MsgType.FLUSHSA.value)
_DECODE_AT_ONCE = 500
"""Messages of a dump that are decoded before others get their turn, some 7 ms worth."""


class DumpInterrupted(OSError):
    """The kernel's tables changed under a dump (NLM_F_DUMP_INTR), several times in a row."""


@dataclass(frozen=True, slots=True)
class Overflow:
    """The kernel had more to say than the receive buffer took (ENOBUFS): messages are lost, only a dump helps."""


class XfrmSocket:
    """Events and dumps of one network namespace. Opened and subscribed when it is made; close it with `close`."""

    def __init__(self, rx_buffer_size: int = 0, events: socket.socket | None = None) -> None:
        """Open and subscribe. `rx_buffer_size` in bytes, 0 leaves the system's default.

        `events` may be any socket that gives datagrams of netlink messages, in place of the kernel's.
        Raises PermissionError, or OSError where the kernel has no XFRM.
        """
        self.overflows = 0
        """How often the kernel dropped messages for want of room."""
        self.malformed = 0
        """Messages that could not be decoded; they were left out."""
        self._events = events if events is not None else _open(EVENT_GROUPS)
        self._events.setblocking(False)
        self._seq = itertools.count(1)
        self._dumped: dict[MsgType, dict[bytes, Event]] = {}
        self._digests: dict[SaId, bytes] = {}  # of the SAs in the last dump
        self._readable: asyncio.Future[None] | None = None
        self._complained: set[str] = set()
        if rx_buffer_size:
            self.set_receive_buffer(rx_buffer_size)

    @property
    def port_id(self) -> int:
        """Netlink port of the event socket, 0 for another kind of socket."""
        name = self._events.getsockname()
        return int(name[0]) if isinstance(name, tuple) and len(name) == 2 else 0

    @property
    def receive_buffer(self) -> int:
        """Bytes of receive buffer that the kernel granted (it counts twice what it was asked for, socket(7))."""
        return self._events.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2

    def set_receive_buffer(self, size: int) -> None:
        """Ask for a receive buffer of `size` bytes, beyond net.core.rmem_max where we may; log what is missing."""
        try:
            self._events.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)
        except OSError:
            with contextlib.suppress(OSError):
                self._events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        if self.receive_buffer < size:
            log.warning("the kernel grants %d bytes of netlink receive buffer, not %d", self.receive_buffer, size)

    async def read(self, limit: int) -> list[Event | Overflow]:
        """Wait until there is something and return up to `limit` events, a few more where one datagram holds them.

        After an Overflow nothing comes that is older. A message that cannot be decoded is counted, logged once for each kind
        of complaint, and left out. Raises OSError when the socket itself fails.
        """
        found: list[Event | Overflow] = []
        while not found:
            await self._wait_readable()
            while len(found) < limit:
                try:
                    data = self._events.recv(READ_SIZE)
                except (BlockingIOError, InterruptedError):
                    break
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    self.overflows += 1
                    found.append(Overflow())
                    self._discard()
                    continue
                if not data:
                    raise OSError(errno.EPIPE, "the netlink socket was closed")
                found += self._decode_all(data)
        return found

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
        with _open(()) as asking:
            await asyncio.get_running_loop().sock_sendall(asking, expire_request(sa, hard, next(self._seq)))
            for message in split(await self._answer(asking, "the expiry of an SA")):
                if HEADER.unpack_from(message)[1] == NLMSG_ERROR and (number := error_of(message)):
                    raise NetlinkError("the expiry of an SA", number)

    def close(self) -> None:
        """Close; a pending `read` ends with an OSError."""
        if self._readable is not None and not self._readable.done():
            self._readable.set_exception(OSError(errno.EBADF, "the netlink socket was closed"))
        self._events.close()

    async def _wait_readable(self) -> None:
        loop = asyncio.get_running_loop()
        self._readable = loop.create_future()
        number = self._events.fileno()
        loop.add_reader(number, _wake, self._readable)
        try:
            await self._readable
        finally:
            loop.remove_reader(number)
            self._readable = None

    def _discard(self) -> None:
        """Drop what is queued. It is older than the dump that a loss calls for; read after that, and without what was lost,
        it would bring back what is gone."""
        while True:
            try:
                if not self._events.recv(1):  # of a datagram the rest goes too
                    return
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise

    def _decode_all(self, data: bytes) -> list[Event]:
        events: list[Event] = []
        messages = split(data)
        while True:
            try:
                message = next(messages, None)
                if message is None:
                    return events
                kind = HEADER.unpack_from(message)[1]
                if kind not in (NLMSG_ERROR, NLMSG_DONE):
                    events.append(decode(message, last_words=False))
                    if kind in _ENDS:
                        self._forget(events[-1])
            except WireError as error:
                self._complain(error)

    def _forget(self, event: Event) -> None:
        """Let go of what the last dump said of SAs that are gone, and of their keys with it."""
        match event:
            case SaDeleted(sa_id) | SaExpired(Sa(id=sa_id), hard=True):
                self._dumped.get(MsgType.GETSA, {}).pop(self._digests.pop(sa_id, b""), None)
            case SasFlushed():
                self._dumped.pop(MsgType.GETSA, None)
                self._digests.clear()

    def _complain(self, error: WireError) -> None:
        self.malformed += 1
        text = str(error)
        if text not in self._complained and len(self._complained) < 100:
            self._complained.add(text)
            log.warning("left out a netlink message: %s", text)

    async def _dump(self, kind: MsgType) -> list[Event]:
        for _ in range(DUMP_TRIES):
            with _open(()) as asking:
                _grow(asking)
                await asyncio.get_running_loop().sock_sendall(asking, dump_request(kind, next(self._seq)))
                messages, interrupted = await self._collect(asking, kind)
            if not interrupted:
                return await self._decode_dump(kind, messages)
        raise DumpInterrupted(errno.EAGAIN, "the kernel's tables change faster than they can be read")

    async def _collect(self, asking: socket.socket, kind: MsgType) -> tuple[list[memoryview], bool]:
        """Gather the messages of a dump up to NLMSG_DONE; tell whether the kernel says that it was interrupted."""
        what = f"the dump of {'SAs' if kind == MsgType.GETSA else 'policies'}"
        messages: list[memoryview] = []
        interrupted = False
        while True:
            for message in split(await self._answer(asking, what)):
                _, number, flags, _, _ = HEADER.unpack_from(message)
                interrupted |= bool(flags & NLM_F_DUMP_INTR)
                if number in (NLMSG_DONE, NLMSG_ERROR):
                    reason = error_of(message) if len(message) >= HEADER.size + 4 else 0
                    if reason:
                        raise NetlinkError(what, reason)
                    return messages, interrupted
                messages.append(message)

    async def _answer(self, asking: socket.socket, what: str) -> bytes:
        try:
            async with asyncio.timeout(DUMP_TIMEOUT_S):
                return await asyncio.get_running_loop().sock_recv(asking, READ_SIZE)
        except TimeoutError:
            raise TimeoutError(f"the kernel did not answer {what} within {DUMP_TIMEOUT_S:.0f} s") from None

    async def _decode_dump(self, kind: MsgType, messages: Iterable[memoryview]) -> list[Event]:
        """Decode a dump. What is as it was in the dump before is not decoded again: dumps repeat themselves, bit by bit."""
        before, now = self._dumped.get(kind, {}), {}
        for number, message in enumerate(messages, 1):
            digest = blake2b(message[HEADER.size :], digest_size=16).digest()
            try:
                now[digest] = before.get(digest) or decode(message)
            except WireError as error:
                self._complain(error)
            if number % _DECODE_AT_ONCE == 0:
                await asyncio.sleep(0)
        self._dumped[kind] = now
        if kind == MsgType.GETSA:
            self._digests = {event.sa.id: digest for digest, event in now.items() if isinstance(event, SaAdded)}
        return list(now.values())


def _wake(readable: asyncio.Future[None]) -> None:
    if not readable.done():
        readable.set_result(None)


def _open(groups: Iterable[Group]) -> socket.socket:
    """Open a socket of NETLINK_XFRM with a port of its own, which the kernel chooses, and subscribe it to groups."""
    try:
        made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_XFRM)
    except OSError as error:
        raise OSError(error.errno, f"this kernel has no XFRM netlink: {error.strerror}") from error
    try:
        made.setblocking(False)
        made.bind((0, 0))
        for group in groups:
            made.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
    except PermissionError as error:
        made.close()
        raise PermissionError(error.errno, "reading the kernel's SAs needs CAP_NET_ADMIN") from error
    except OSError:
        made.close()
        raise
    return made


def _grow(asking: socket.socket) -> None:
    """Make room for a dump: the kernel fills 32 KiB at a time and goes on as we read."""
    with contextlib.suppress(OSError):
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
