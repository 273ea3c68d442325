"""The stand-in's socket: VPP's handshake, message table, definitions and framing (src/vlibmemory/socket_api.c)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from importlib import resources
from typing import Any

from vpp_papi.vpp_papi import VPPApiJSONFiles

from vppipsec.unix_listener import UnixListener
from vppstandin.base import Death, Portion, Refusal
from vppstandin.world import World

_FRAME = struct.Struct(">QII")
_HEAD = struct.Struct(">HII")  # _vl_msg_id, client_index, context of a request
_CREATE_HEAD = struct.Struct(">HI")  # sockclnt_create has no client_index
_SOCKCLNT_CREATE_ID = 15
_CREATE_REPLY_ID = 16
_MAX_MESSAGE = 1 << 20
_READ = 1 << 16
_INDEXES = ("sw_if_index", "stat_index", "stats_index", "host_sw_if_index", "vif_index")


class End(Enum):
    """What ends after a request is handled, before VPP answers it."""

    CONNECTION = "the connection"
    VPP = "VPP, as by kill -9"


@dataclass(frozen=True, slots=True)
class Busy:
    """VPP is busy before it handles a request. It has one thread, so no client gets an answer meanwhile."""

    seconds: float


Fault = Callable[[str, Any], int | End | Busy | None]
"""Called with each request before it is handled; returns what happens to it. A number is the error that VPP answers."""

RequestHook = Callable[[str, Any, int], None]
"""Called after each request is handled, with its message, its fields and the `retval` of the answer."""


def definitions() -> str:
    """Return the API definitions in the form that VPP serves: a JSON array."""
    return json.dumps([json.loads(resources.files("vppstandin").joinpath("api.json").read_text())])


@dataclass(slots=True)
class _Client:
    """One connection, and its answers that are not written yet."""

    number: int
    writer: asyncio.StreamWriter
    answers: list[bytes] = field(default_factory=list)

    def flush(self) -> None:
        answers, self.answers = self.answers, []
        self.writer.write(b"".join(_FRAME.pack(0, len(message), 0) + message for message in answers))


class StandIn:
    """A stand-in in the running event loop. Call `start`, use it, call `stop`. `world` is its state."""

    def __init__(self, api_socket: str, fault: Fault | None = None) -> None:
        self.api_socket = api_socket
        self.world = World()
        self.requests: list[str] = []
        """Names of the requests so far, dumps and calls included."""
        self.refused: list[str] = []
        """Refusals so far: message and error number."""
        self.death: str | None = None
        """Why it died, None while it lives. A dead stand-in answers no client."""
        self.died = asyncio.Event()
        self.watch: RequestHook | None = None
        self._fault = fault
        self._text = definitions()
        self._messages, self._services = VPPApiJSONFiles.process_json_array_str(self._text)
        names = sorted(name for name in self._messages if name != "sockclnt_create")
        self._ids = {"sockclnt_create": _SOCKCLNT_CREATE_ID, "sockclnt_create_reply": _CREATE_REPLY_ID}
        # numbers have no gaps, as in VPP: vpp_papi 2.3 assumes that the highest equals their count
        free = (number for number in itertools.count(1) if number not in (_SOCKCLNT_CREATE_ID, _CREATE_REPLY_ID))
        self._ids |= {name: next(free) for name in names if name not in self._ids}
        self._names = {number: name for name, number in self._ids.items()}
        self._listener: UnixListener | None = None
        self._server: asyncio.Server | None = None
        self._clients: dict[int, asyncio.StreamWriter] = {}
        self._followers: set[int] = set()
        self._next_client = 1
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """Listen. Replaces the socket of a dead process. Raises OSError, also if another process serves the socket."""
        self._listener = UnixListener(self.api_socket)
        self._server = await asyncio.start_unix_server(self._accept, sock=self._listener.socket)

    async def stop(self) -> None:
        """Stop listening, and close all connections."""
        if self._listener is not None:
            self._listener.release()
        if self._server is not None:
            self._server.close()
        for writer in self._clients.values():
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def forget(self) -> None:
        """Reset to the state of a VPP that has just started. Use it between `stop` and `start`."""
        self.world = World()
        self.requests, self.refused = [], []
        self.death = None
        self.died.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        number = self._next_client
        self._next_client += 1
        self._clients[number] = writer
        try:
            await self._serve(_Client(number, writer), reader)
        except (OSError, asyncio.IncompleteReadError, struct.error, asyncio.CancelledError):
            pass  # the client closed the connection, or sent data for which VPP closes it, or the stand-in stops
        finally:
            self._clients.pop(number, None)
            self._followers.discard(number)
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, client: _Client, reader: asyncio.StreamReader) -> None:
        buffer = bytearray()
        while data := await reader.read(_READ):
            buffer += data
            async with self._turn:
                is_alive = await self._take(client, buffer)
            if not is_alive:
                return
            await client.writer.drain()

    async def _take(self, client: _Client, buffer: bytearray) -> bool:
        """Handle all complete messages in the buffer. Returns whether the connection goes on."""
        offset = 0
        while self.death is None and len(buffer) - offset >= _FRAME.size:
            length = _FRAME.unpack_from(buffer, offset)[1]
            if length > _MAX_MESSAGE:
                return False
            end = offset + _FRAME.size + length
            if end > len(buffer):
                break
            try:
                what_ends = await self._handle(client, bytes(buffer[offset + _FRAME.size : end]))
            except Death as death:
                self._die(str(death))
                return False
            if what_ends is not None:
                client.flush()
                if what_ends is End.VPP:
                    self._die("it was killed")
                client.writer.transport.abort()
                return False
            offset = end
        del buffer[:offset]
        client.flush()
        self._send_events()
        return self.death is None

    def _die(self, reason: str) -> None:
        """Close everything without an answer, as a process does after a fatal signal."""
        self.death = reason
        if self._server is not None:
            self._server.close()
        for writer in self._clients.values():
            with contextlib.suppress(OSError):
                writer.transport.abort()
        self.died.set()

    async def _handle(self, client: _Client, message: bytes) -> End | None:
        """Handle a request. Returns what ends with it, None if nothing does."""
        msg_id = int.from_bytes(message[:2], "big")
        name = self._names.get(msg_id)
        if name is None or name not in self._services:
            return None  # VPP logs it and goes on
        self.requests.append(name)
        if name == "sockclnt_create":
            client.answers.append(self._hello(client.number, _CREATE_HEAD.unpack_from(message)[1]))
            return None
        context = _HEAD.unpack_from(message)[2]
        if name == "get_api_json":
            client.answers.append(self._pack("get_api_json_reply", context, {"retval": 0, "json": self._text}))
            return None
        if name == "sockclnt_delete":
            client.answers.append(self._pack("sockclnt_delete_reply", context, {"response": 0}))
            return None
        request = self._messages[name].unpack(message, ntc=True)[0]
        happens = self._fault(name, request) if self._fault is not None else None
        if isinstance(happens, Busy):
            client.flush()
            await asyncio.sleep(happens.seconds)
        if name == "want_interface_events":
            self._followers.add(client.number)
        before = len(client.answers)
        retval = self._answer(client, name, request, context, happens if isinstance(happens, int) else 0)
        if self.watch is not None:
            self.watch(name, request, retval)
        if not isinstance(happens, End):
            return None
        del client.answers[before:]
        return happens

    def _answer(self, client: _Client, name: str, request: Any, context: int, refusal: int) -> int:
        """Execute a request or refuse it, and return the `retval` of the answer."""
        service = self._services[name]
        try:
            if refusal:
                raise Refusal(refusal)
            answer = self.world.handle(name, request)
        except Refusal as refused:
            self.refused.append(f"{name}: {refused.retval}")
            client.answers.append(self._refuse(service["reply"], context, refused))
            return refused.retval
        if isinstance(answer, list | Portion):
            details = service.get("stream_msg", service["reply"])
            found = answer.details if isinstance(answer, Portion) else answer
            client.answers += [self._pack(details, context, fields) for fields in found]
            if isinstance(answer, Portion):
                end = {"retval": answer.retval, "cursor": answer.cursor}
                client.answers.append(self._pack(service["reply"], context, end))
        else:
            client.answers.append(self._pack(service["reply"], context, {"retval": 0} | answer))
        return 0

    def _hello(self, number: int, context: int) -> bytes:
        table = [{"index": i, "name": f"{n}_{self._messages[n].crc[2:]}"} for n, i in sorted(self._ids.items())]
        fields = {"response": 0, "index": number, "count": len(table), "message_table": table}
        return self._pack("sockclnt_create_reply", context, fields)

    def _refuse(self, reply: str, context: int, refused: Refusal) -> bytes:
        """Return a packed refusal. Interface and statistics indexes in it are ~0, as in VPP."""
        unset = dict.fromkeys(_INDEXES, 4294967295)
        known = self._messages[reply].field_by_name
        more = {name: value for name, value in (unset | refused.fields).items() if name in known}
        return self._pack(reply, context, {"retval": refused.retval} | more)

    def _pack(self, name: str, context: int, fields: dict[str, Any]) -> bytes:
        return bytes(self._messages[name].pack({"_vl_msg_id": self._ids[name], "context": context, **fields}))

    def _send_events(self) -> None:
        """Send interface events to the clients that requested them."""
        events, self.world.events = self.world.events, []
        for sw_if_index, flags, deleted in events:
            fields = {"client_index": 0, "pid": 0, "sw_if_index": sw_if_index, "flags": flags, "deleted": deleted}
            event = self._messages["sw_interface_event"].pack({"_vl_msg_id": self._ids["sw_interface_event"], **fields})
            for number in self._followers:
                if number in self._clients:
                    self._clients[number].write(_FRAME.pack(0, len(event), 0) + bytes(event))
