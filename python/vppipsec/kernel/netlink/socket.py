"""A netlink socket for asyncio, of whatever protocol: events in batches, dumps beside them, lost messages told.

Events and dumps have a socket each, so that a dump delays no event.
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
"""Bytes asked of the kernel at a time; a notification is some 4 KiB at most, part of a dump 32 KiB."""
DUMP_TIMEOUT_S = 30.0
DUMP_TRIES = 5

EventT = TypeVar("EventT")


class DumpInterrupted(OSError):
    """The kernel's tables changed under a dump (NLM_F_DUMP_INTR), several times in a row."""


@dataclass(frozen=True, slots=True)
class Overflow:
    """The kernel had more to say than the receive buffer took (ENOBUFS): messages are lost, only a dump helps."""


class NetlinkSocket(ABC, Generic[EventT]):
    """Events of one network namespace. Opened and subscribed when it is made; close it with `close`."""

    def __init__(self, events: socket.socket, rx_buffer_size: int = 0) -> None:
        """Take a socket that gives datagrams of netlink messages. `rx_buffer_size` in bytes, 0 leaves the system's default."""
        self.overflows = 0
        """How often the kernel dropped messages for want of room."""
        self.malformed = 0
        """Messages that could not be decoded; they were left out."""
        self._events = events
        self._events.setblocking(False)
        self._seq = itertools.count(1)
        self._readable: asyncio.Future[None] | None = None
        self._has_logged: set[str] = set()
        if rx_buffer_size:
            self.set_receive_buffer(rx_buffer_size)

    @abstractmethod
    def _decode_event(self, message: memoryview) -> EventT | None:
        """Decode what the kernel tells, None for what is of no interest. Raises WireError."""

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

    async def read(self, limit: int) -> list[EventT | Overflow]:
        """Wait until there is something and return up to `shortage` events, a few more where one datagram holds them.

        After an Overflow nothing comes that is older. A message that cannot be decoded is counted, logged once for each kind
        of complaint, and left out. Raises OSError when the socket itself fails.
        """
        found: list[EventT | Overflow] = []
        while not found:
            await self._wait_readable()
            found = self.queued(limit)
        return found

    def queued(self, limit: int) -> list[EventT | Overflow]:
        """Return what `read` would, without waiting: nothing where nothing has come."""
        found: list[EventT | Overflow] = []
        for _ in range(limit):  # datagrams may hold nothing of interest: others get their turn all the same
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


def open_netlink(protocol: int, tunnels: Iterable[int]) -> socket.socket:
    """Open a socket with a port of its own, which the kernel chooses, and subscribe it to groups. Raises OSError."""
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    try:
        made.setblocking(False)
        made.bind((0, 0))
        for tunnel in tunnels:
            subscribe(made, tunnel)
    except OSError:
        made.close()
        raise
    return made


def subscribe(to: socket.socket, tunnel: int, wanted: bool = True) -> None:
    """Have the messages of a group sent to a netlink socket, or no longer."""
    to.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP if wanted else _NETLINK_DROP_MEMBERSHIP, tunnel)


async def dump(asking: socket.socket, request: bytes, what: str) -> AsyncIterator[list[bytes]]:
    """Send a dump request and yield the messages of the answer, those of one read at a time, up to NLMSG_DONE.

    `action` names the dump in errors. Raises DumpInterrupted at the end of a dump under which the kernel's tables changed,
    NetlinkError where the kernel refuses, TimeoutError where it does not answer, and WireError.
    """
    with contextlib.suppress(OSError):  # the kernel fills 32 KiB at a time and goes on as we read
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
    """Return the messages of a part of a dump, their flags taken together, and the message that ends the dump, if there is one.

    As `messages_in`, but fast: a table may have a million routes.
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
    """Return the messages of a dump that nothing changed under, on a socket of its own. Raises as `dump` does."""
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
    """Return what one read gives. `action` names the question in errors. Raises OSError, and TimeoutError where nothing comes."""
    try:
        async with asyncio.timeout(DUMP_TIMEOUT_S):
            return await asyncio.get_running_loop().sock_recv(asking, READ_SIZE)
    except TimeoutError:
        raise TimeoutError(f"the kernel did not answer {what} within {DUMP_TIMEOUT_S:.0f} s") from None
