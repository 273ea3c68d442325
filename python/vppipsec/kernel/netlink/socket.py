"""A netlink socket for asyncio and any netlink protocol: events in batches, dumps, and a report of lost messages.

Each dump has a socket of its own, so that it delays no event.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from vppipsec.kernel.netlink.messages import NLM_F_DUMP_INTR, NetlinkError, error_of
from vppipsec.kernel.netlink.wire import HEADER, NLMSG_DONE, NLMSG_ERROR, WireError, messages_in

log = logging.getLogger(__name__)

_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_NETLINK_DROP_MEMBERSHIP = 2
_SO_RCVBUFFORCE = 33

_LENGTH_TYPE_FLAGS = struct.Struct("=IHH")  # of struct nlmsghdr
_LAST = (NLMSG_DONE, NLMSG_ERROR)

READ_SIZE = 1 << 16
"""Bytes of one read. A notification has at most about 4 KiB, a part of a dump 32 KiB."""
DUMP_TIMEOUT_S = 30.0
DUMP_TRIES = 5

EventT = TypeVar("EventT")


class DumpInterrupted(OSError):
    """The kernel's tables changed during a dump (NLM_F_DUMP_INTR)."""


@dataclass(frozen=True, slots=True)
class Overflow:
    """The receive buffer was full (ENOBUFS). Messages are lost, so the reader needs a dump."""


class NetlinkSocket(ABC, Generic[EventT]):
    """Events of one network namespace. The caller opens and subscribes the socket; `close` closes it."""

    def __init__(self, events: socket.socket, rx_buffer_size: int = 0) -> None:
        """`events` delivers datagrams of netlink messages. `rx_buffer_size` is in bytes; 0 keeps the system's default."""
        self.overflows = 0
        """How often the receive buffer was full."""
        self.malformed = 0
        """Number of messages that could not be decoded and were skipped."""
        self._events = events
        self._events.setblocking(False)
        self._seq = itertools.count(1)
        self._readable: asyncio.Future[None] | None = None
        self._has_logged: set[str] = set()
        if rx_buffer_size:
            self.set_receive_buffer(rx_buffer_size)

    @abstractmethod
    def _decode_event(self, message: memoryview) -> EventT | None:
        """Decode a message; return None for one without interest. Raises WireError."""

    @property
    def port_id(self) -> int:
        """Netlink port of the event socket, 0 if it is no netlink socket."""
        name = self._events.getsockname()
        return int(name[0]) if isinstance(name, tuple) and len(name) == 2 else 0

    @property
    def receive_buffer(self) -> int:
        """Size of the receive buffer that the kernel granted, bytes. (The kernel reports twice the requested size, socket(7).)"""
        return self._events.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2

    def set_receive_buffer(self, size: int) -> None:
        """Request a receive buffer of `size` bytes, beyond net.core.rmem_max if permitted. Log a smaller grant."""
        try:
            self._events.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)
        except OSError:
            with contextlib.suppress(OSError):
                self._events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        if self.receive_buffer < size:
            log.warning("the kernel grants %d bytes of netlink receive buffer, not %d", self.receive_buffer, size)

    async def read(self, limit: int) -> list[EventT | Overflow]:
        """Wait for events and return up to `limit` of them, a few more if one datagram holds them.

        No event after an Overflow is older than it. A message that cannot be decoded is counted and skipped; each error text is
        logged once. Raises OSError if the socket itself fails.
        """
        found: list[EventT | Overflow] = []
        while not found:
            await self._wait_readable()
            found = self.queued(limit)
        return found

    def queued(self, limit: int) -> list[EventT | Overflow]:
        """Return the events that `read` would, without waiting. The list is empty if none are queued."""
        found: list[EventT | Overflow] = []
        for _ in range(limit):  # datagrams without interest count too, so that other tasks get their turn
            if len(found) >= limit:
                break
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

    def close(self) -> None:
        """Close the event socket. A pending `read` raises OSError."""
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
        """Drop the queued messages.

        They are older than the dump that follows a loss. Applied after it, they would restore objects whose deletion was lost.
        """
        while True:
            try:
                if not self._events.recv(1):  # the kernel drops the rest of the datagram
                    return
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise

    def _decode_all(self, data: bytes) -> list[EventT]:
        events: list[EventT] = []
        messages = messages_in(data)
        while True:
            try:
                message = next(messages, None)
                if message is None:
                    return events
                if HEADER.unpack_from(message)[1] not in (NLMSG_ERROR, NLMSG_DONE):
                    event = self._decode_event(message)
                    if event is not None:
                        events.append(event)
            except WireError as error:
                self._log_malformed(error)

    def _log_malformed(self, error: WireError) -> None:
        self.malformed += 1
        text = str(error)
        if text not in self._has_logged and len(self._has_logged) < 100:
            self._has_logged.add(text)
            log.warning("left out a netlink message: %s", text)


def _wake(readable: asyncio.Future[None]) -> None:
    if not readable.done():
        readable.set_result(None)


def open_netlink(protocol: int, groups: Iterable[int]) -> socket.socket:
    """Open a socket with a port of the kernel's choice, and subscribe it to multicast groups. Raises OSError."""
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    try:
        made.setblocking(False)
        made.bind((0, 0))
        for group in groups:
            subscribe(made, group)
    except OSError:
        made.close()
        raise
    return made


def subscribe(to: socket.socket, group: int, wanted: bool = True) -> None:
    """Subscribe a netlink socket to a multicast group, or unsubscribe it. Raises OSError."""
    to.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP if wanted else _NETLINK_DROP_MEMBERSHIP, group)


async def dump(asking: socket.socket, request: bytes, what: str) -> AsyncIterator[list[bytes]]:
    """Send a dump request and yield the messages of the answer, one list for each read, up to NLMSG_DONE.

    `what` names the dump in errors. Raises DumpInterrupted at the end if the kernel's tables changed during the dump.
    Raises NetlinkError if the kernel refuses, TimeoutError if it does not answer, and WireError.
    """
    with contextlib.suppress(OSError):  # the kernel sends 32 KiB at a time and continues as the socket is read
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    await asyncio.get_running_loop().sock_sendall(asking, request)
    interrupted = False
    last = None
    while last is None:
        messages, flags, last = _cut(await answer(asking, what))
        interrupted |= bool(flags & NLM_F_DUMP_INTR)
        if last is not None and len(last) >= HEADER.size + 4 and (reason := error_of(last)):
            raise NetlinkError(what, reason)
        if messages:
            yield messages
    if interrupted:
        raise DumpInterrupted(errno.EAGAIN, "the kernel's tables change faster than they can be read")


def _cut(data: bytes) -> tuple[list[bytes], int, bytes | None]:
    """Return the messages of a part of a dump, all their flags, and the message that ends the dump or None.

    Like `messages_in`, but fast: a table may have a million routes. Raises WireError.
    """
    messages: list[bytes] = []
    flags = offset = 0
    size = len(data)
    unpack = _LENGTH_TYPE_FLAGS.unpack_from
    while offset + HEADER.size <= size:
        length, kind, flag = unpack(data, offset)
        if length < HEADER.size or offset + length > size:
            raise WireError(f"a netlink message claims {length} bytes; {size - offset} are there")
        flags |= flag
        message = data[offset : offset + length]
        if kind in _LAST:
            return messages, flags, message
        messages.append(message)
        offset += (length + 3) & ~3
    return messages, flags, None


async def whole_dump(open_socket: Callable[[], socket.socket], request: bytes, what: str) -> list[bytes]:
    """Return the messages of a consistent dump, from a socket of its own.

    Retries an interrupted dump, DUMP_TRIES times in all. Raises the exceptions of `dump`.
    """
    for tries_left in reversed(range(DUMP_TRIES)):
        messages: list[bytes] = []
        try:
            with open_socket() as asking:
                async for part in dump(asking, request, what):
                    messages += part
            break
        except DumpInterrupted:
            if not tries_left:
                raise
    return messages


async def answer(asking: socket.socket, what: str) -> bytes:
    """Return the bytes of one read. `what` names the request in errors. Raises OSError, and TimeoutError without an answer."""
    try:
        async with asyncio.timeout(DUMP_TIMEOUT_S):
            return await asyncio.get_running_loop().sock_recv(asking, READ_SIZE)
    except TimeoutError:
        raise TimeoutError(f"the kernel did not answer {what} within {DUMP_TIMEOUT_S:.0f} s") from None
