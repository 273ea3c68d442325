"""An asyncio client of VPP's binary API: pipelined, with a bounded number of requests in flight.

Framing and handshake follow src/vlibmemory/socket_api.c. A 16-byte header precedes each message; its second field is the
message's length. VPP answers the requests of one connection in order. The client matches answers to requests by context.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vppipsec.vpp.api.codec import SOCKCLNT_CREATE_ID, SOCKCLNT_CREATE_REPLY_ID, Codec, bootstrap_messages
from vppipsec.vpp.api.errors import VppError, VppIncompatible, VppRefused, VppUnavailable
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.types import NO_INDEX

MAX_IN_FLIGHT = 256
"""Most requests of one batch that wait for an answer at a time."""
REPLY_TIMEOUT_S = 60.0
"""Seconds without any answer after which the client closes the connection."""
CLOSE_TIMEOUT_S = 2.0
"""Seconds that VPP has to answer sockclnt_delete."""
MAX_MESSAGE_BYTES = 64 << 20
"""Longest message that the client accepts, bytes. The longest that VPP sends is get_api_json's answer, about 3 MB."""

_FRAME = struct.Struct(">QII")  # unused, length, unused (msgbuf_t)
_HEAD = struct.Struct(">HI")  # _vl_msg_id, context of an answer
_FRAMED_REPLY = struct.Struct(">QIIHIi")  # the header, then _vl_msg_id, context and retval of an answer

_EVENT_LAYOUT = struct.Struct(">HIII")  # _vl_msg_id, client_index, pid, sw_if_index of sw_interface_event

_MORE = -165  # EAGAIN, src/vnet/error.h: more details follow from the cursor on
_MIN_FRAME_BYTES = _FRAMED_REPLY.size - _FRAME.size  # the shortest message from VPP is an answer with a retval

EventHandler = Callable[[int], None]
"""Called with the sw_if_index of an interface that changed."""


class Reply(NamedTuple):
    """Answer to one request: VPP's `retval`, and the number that the request's `read` returns, 0 if there is none."""

    retval: int
    value: int


class _Batch:
    """The requests of one `run`, and their answers so far."""

    __slots__ = ("base", "done", "replies", "requests", "sent")

    def __init__(self, base: int, requests: Sequence[Request], done: asyncio.Future[None]) -> None:
        self.base = base
        self.requests = requests
        self.replies: list[Reply] = []
        self.sent = 0
        self.done = done


class _Call:
    """One call or dump that goes through vpp_papi's serializer."""

    __slots__ = ("details", "done", "name", "stream")

    def __init__(self, name: str, stream: str | None, done: asyncio.Future[tuple[list[bytes], bytes]]) -> None:
        self.name = name
        self.stream = stream
        self.details: list[bytes] = []
        self.done = done


class VppClient(asyncio.Protocol):
    """One connection to one VPP. `connect` makes it. Once `closed` is done it is of no further use."""

    def __init__(self, on_event: EventHandler | None = None, also: Sequence[str] = ()) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the connection is gone, for whatever reason. Never has an exception."""
        self.pid = 0
        """VPP's process number. It differs from one run of VPP to the next."""
        self.version = ""
        """VPP's version, as show_version gives it."""
        self.sent = 0
        """Number of requests sent so far, calls and dumps included."""
        self._on_event = on_event
        self._optional_messages = also
        self._transport: asyncio.Transport | None = None
        self._codec: Codec | None = None
        self._buffer = bytearray()
        self._context = 0
        self._batches: list[_Batch] = []
        self._calls: dict[int, _Call] = {}
        self._handshake: asyncio.Future[bytes] | None = None
        self._silent_since = 0.0
        self._watch: asyncio.TimerHandle | None = None

    # Public

    @property
    def codec(self) -> Codec:
        """The codec of this VPP."""
        if self._codec is None:
            raise VppUnavailable("not connected to VPP")
        return self._codec

    async def run(self, requests: Sequence[Request]) -> list[Reply]:
        """Send requests in order, pipelined, and return their answers in the same order.

        A refusal is in the answer, not an exception. Raises VppUnavailable if the connection closes before all answers came.
        """
        if not requests:
            return []
        self._require_open()
        loop = asyncio.get_running_loop()
        batch = _Batch(self._next_contexts(len(requests)), requests, loop.create_future())
        self._start_waiting()
        self._batches.append(batch)
        try:
            self._send_more(batch)
            await batch.done
        finally:
            self._batches.remove(batch)
        return batch.replies

    async def call(self, message: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Send one message and return its answer as vpp_papi's named tuple.

        Raises VppRefused if VPP's `retval` is not 0, VppUnavailable if the connection closes.
        """
        _, data = await self._start_call(message, None, arguments or {})
        reply = self.codec.unpack(f"{message}_reply", data)
        if reply.retval:
            raise VppRefused(message, reply.retval)
        return reply

    async def dump(self, message: str, arguments: Mapping[str, Any] | None = None) -> list[Any]:
        """Send a dump and return its details as vpp_papi's named tuples. Raises VppUnavailable."""
        stream = self.codec.stream_of(message)
        if stream is None:
            raise ValueError(f"{message} is not a dump")
        raw, _ = await self._start_call(message, stream, arguments or {})
        details = []
        for number, data in enumerate(raw):
            details.append(self.codec.unpack(stream, data))
            if number % 200 == 199:  # vpp_papi takes up to 0.2 ms for one: let other tasks run
                await asyncio.sleep(0)
        return details

    async def stream(self, message: str) -> list[Any]:
        """Request details that VPP sends in portions, each from a cursor on, and return all of them. Raises VppError."""
        details: list[Any] = []
        cursor = NO_INDEX
        seen: set[int] = set()
        while cursor not in seen:
            seen.add(cursor)
            stream = self.codec.stream_of(message)
            raw, last = await self._start_call(message, stream, {"cursor": cursor}, ping=False)
            details += (self.codec.unpack(str(stream), data) for data in raw)
            reply = self.codec.unpack(f"{message}_reply", last)
            if reply.retval not in (0, _MORE):
                raise VppRefused(message, reply.retval)
            if not reply.retval:
                return details
            cursor = reply.cursor
        raise VppUnavailable(f"VPP answers {message} in circles: its cursor came back to {cursor}")

    async def close(self) -> None:
        """Announce the end to VPP (sockclnt_delete) and close the connection. VPP's state stays as it is.

        Without the announcement VPP may mistake the end of a connection for a pause, since it reads errno without an error
        (vl_socket_read_ready). Sixteen such ends keep its main loop busy for good.
        """
        if self._codec is not None and not self.closed.done():
            with contextlib.suppress(VppError, TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._start_call("sockclnt_delete", None, {"index": self.codec.client_index})
        self._fail_all(VppUnavailable("the connection to VPP was closed"))
        await self.closed

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._silent_since = asyncio.get_running_loop().time()
        buffer = self._buffer
        buffer += data
        size = len(buffer)
        offset = 0
        try:
            while size - offset >= _FRAMED_REPLY.size:
                _, length, _, msg_id, context, retval = _FRAMED_REPLY.unpack_from(buffer, offset)
                if not _MIN_FRAME_BYTES <= length <= MAX_MESSAGE_BYTES:
                    raise VppUnavailable(f"VPP sent a message of {length} bytes, which cannot be")
                end = offset + _FRAME.size + length
                if end > size:
                    break
                batch = self._batch_of(msg_id, context)
                if batch is None:
                    self._take_reply(bytes(buffer[offset + _FRAME.size : end]))
                else:
                    request = batch.requests[len(batch.replies)]
                    value = 0
                    if request.reply_field is not None:
                        retval, value = request.read_reply(buffer[offset + _FRAME.size : end], retval)
                    batch.replies.append(Reply(retval, value))
                    if len(batch.replies) == len(batch.requests) and not batch.done.done():
                        batch.done.set_result(None)
                offset = end
        except (VppError, struct.error) as error:
            self._fail_all(
                error if isinstance(error, VppError) else VppUnavailable("VPP sent a message that is cut short")
            )
            return
        del buffer[:offset]
        for batch in self._batches:
            if batch.sent - len(batch.replies) <= MAX_IN_FLIGHT // 2:
                self._send_more(batch)

    def connection_lost(self, error: Exception | None) -> None:
        self._fail_all(VppUnavailable("VPP closed the connection"))
        if not self.closed.done():
            self.closed.set_result(None)

    # Inside

    async def _handshake_messages(self, name: str) -> None:
        """Perform the handshake: message table, definitions, process number and version."""
        messages, _ = bootstrap_messages()
        self._start_waiting()
        self._handshake = asyncio.get_running_loop().create_future()
        self._write(
            bytes(messages["sockclnt_create"].pack({"_vl_msg_id": SOCKCLNT_CREATE_ID, "context": 0, "name": name}))
        )
        answer = await self._handshake
        self._handshake = None
        if int.from_bytes(answer[:2], "big") != SOCKCLNT_CREATE_REPLY_ID:
            raise VppIncompatible("what listens on VPP's API socket does not speak VPP's binary API")
        hello = messages["sockclnt_create_reply"].unpack(answer)[0]
        table = {entry.name: int(entry.index) for entry in hello.message_table}
        request = messages["get_api_json"]
        number = table.get(f"get_api_json_{request.crc[2:]}")
        if number is None:
            raise VppIncompatible("this VPP does not serve its API definitions (get_api_json)")
        self._start_waiting()
        self._handshake = asyncio.get_running_loop().create_future()
        self._write(bytes(request.pack({"_vl_msg_id": number, "client_index": hello.index, "context": 0})))
        answer = await self._handshake
        self._handshake = None
        definitions = messages["get_api_json_reply"].unpack(answer)[0]
        if definitions.retval:
            raise VppRefused("get_api_json", definitions.retval)
        self._codec = Codec(hello.index, table, definitions.json, self._optional_messages)
        self.pid = (await self.call("control_ping")).vpe_pid
        self.version = str((await self.call("show_version")).version)

    def _next_contexts(self, count: int) -> int:
        """Reserve contexts and return the first one. They start over at 1 before they exceed a u32."""
        if self._context + count >= 1 << 32:
            self._context = 0
        base = self._context + 1
        self._context += count
        return base

    def _require_open(self) -> None:
        if self._transport is None or self._transport.is_closing():
            raise VppUnavailable("not connected to VPP")

    def _write(self, message: bytes) -> None:
        assert self._transport is not None
        self._transport.write(_FRAME.pack(0, len(message), 0) + message)
        self.sent += 1
        self._start_watch()

    async def _start_call(
        self, message: str, stream: str | None, arguments: Mapping[str, Any], ping: bool = True
    ) -> tuple[list[bytes], bytes]:
        """Send a call or a dump, and return its details and its last message.

        A control_ping marks the end of a dump, unless the dump has an end of its own (`ping` is False).
        """
        self._require_open()
        context = self._next_contexts(1)
        call = _Call(message, stream, asyncio.get_running_loop().create_future())
        packed = self.codec.pack_call(message, arguments, context)
        self._start_waiting()
        self._calls[context] = call
        try:
            self._write(packed)
            if stream is not None and ping:
                self._write(self.codec.pack_call("control_ping", {}, context))
            return await call.done
        finally:
            self._calls.pop(context, None)

    def _send_more(self, batch: _Batch) -> None:
        room = MAX_IN_FLIGHT - (batch.sent - len(batch.replies))
        unsent = batch.requests[batch.sent : batch.sent + room]
        if not unsent or self._transport is None:
            return
        frames = []
        context = batch.base + batch.sent
        pack = self.codec.pack
        for request in unsent:
            message = pack(request, context)
            frames.append(_FRAME.pack(0, len(message), 0))
            frames.append(message)
            context += 1
        batch.sent += len(unsent)
        self.sent += len(unsent)
        self._transport.write(b"".join(frames))
        self._start_watch()

    def _take_reply(self, message: bytes) -> None:
        """Handle one message from VPP."""
        if self._handshake is not None and not self._handshake.done():
            self._handshake.set_result(message)
            return
        msg_id, context = _HEAD.unpack_from(message)
        if self._codec is not None and msg_id == self._codec.event_id:
            if self._on_event is not None:
                self._on_event(_EVENT_LAYOUT.unpack_from(message)[3])
            return
        call = self._calls.get(context)
        name = self.codec.name_of(msg_id)
        if call is None:
            return  # the caller no longer waits for this answer
        if call.stream is not None and name == call.stream:
            call.details.append(message)
        elif not call.done.done():
            call.done.set_result((call.details, message))

    def _batch_of(self, msg_id: int, context: int) -> _Batch | None:
        """Return the batch that an answer belongs to, None if it belongs to none. Raises VppUnavailable if it is out of order."""
        if self._codec is not None and msg_id == self._codec.event_id:
            return None  # an event has no context; another field is in its place
        for batch in self._batches:
            position = context - batch.base
            if 0 <= position < len(batch.requests):
                if position != len(batch.replies):
                    raise VppUnavailable("VPP answered requests out of order")
                return batch
        return None

    def _waiting(self) -> bool:
        return bool(self._batches or self._calls or self._handshake)

    def _start_waiting(self) -> None:
        """Start to count VPP's silence, unless a request waits already."""
        if not self._waiting():
            self._silent_since = asyncio.get_running_loop().time()

    def _start_watch(self) -> None:
        """Start the timer that detects a VPP that no longer answers."""
        if self._watch is None:
            self._watch = asyncio.get_running_loop().call_later(REPLY_TIMEOUT_S, self._check_stall)

    def _check_stall(self) -> None:
        self._watch = None
        if not self._waiting():
            return
        loop = asyncio.get_running_loop()
        silent = loop.time() - self._silent_since
        if silent >= REPLY_TIMEOUT_S:
            self._fail_all(VppUnavailable(f"VPP has not answered for {silent:.0f} s"))
        else:
            self._watch = loop.call_later(REPLY_TIMEOUT_S - silent, self._check_stall)

    def _fail_all(self, error: VppError) -> None:
        """Fail all waiting requests with `error`, and close the connection."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        waiting: list[asyncio.Future[Any]] = [batch.done for batch in self._batches]
        waiting += [call.done for call in self._calls.values()]
        if self._handshake is not None:
            waiting.append(self._handshake)
        for future in waiting:
            if not future.done():
                future.set_exception(error)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.abort()


async def connect(
    path: str, name: str = "vpp-ipsecd", on_event: EventHandler | None = None, also: Sequence[str] = ()
) -> VppClient:
    """Connect to the VPP whose API socket is at `path`, and read its API definitions.

    `also` names messages that can be called in addition to those that the service uses.

    Raises VppUnavailable if nothing answers there, VppIncompatible if the service cannot use this VPP.
    """
    loop = asyncio.get_running_loop()
    try:
        _, client = await loop.create_unix_connection(lambda: VppClient(on_event, also), path)
    except OSError as error:
        raise VppUnavailable(f"VPP's API socket {path} cannot be opened: {error.strerror or error}") from error
    try:
        await client._handshake_messages(name)
    except BaseException:
        with contextlib.suppress(VppError):
            await client.close()
        raise
    return client
