"""The stand-in's socket: VPP's handshake, message table, definitions and framing (src/vlibmemory/socket_api.c)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import struct
from collections.abc import Callable
from importlib import resources
from typing import Any

from vpp_papi.vpp_papi import VPPApiJSONFiles

from vppipsec.standin.world import Death, Refusal, World

_FRAME = struct.Struct(">QII")
_HEAD = struct.Struct(">HII")  # _vl_msg_id, client_index, context of a request
_CREATE_HEAD = struct.Struct(">HI")  # sockclnt_create has no client_index
_SOCKCLNT_CREATE_ID = 15
_FIRST_ID = 16
_MAX_MESSAGE = 1 << 20
_READ = 1 << 16

Fault = Callable[[str, Any], int | None]
"""May look at each request before it is handled, and answer it with an error number instead."""


def definitions() -> str:
    """Return the API definitions as VPP serves them: a JSON array."""
    return json.dumps([json.loads(resources.files("vppipsec.standin").joinpath("api.json").read_text())])


class StandIn:
    """A stand-in within a running event loop. `start`, use, `stop`; `world` is what it keeps."""

    def __init__(self, api_socket: str, fault: Fault | None = None) -> None:
        self.api_socket = api_socket
        self.world = World()
        self.requests: list[str] = []
        """Names of the requests so far, dumps and calls included."""
        self.refused: list[str] = []
        """What was refused so far: message and number."""
        self.death: str | None = None
        """Why it died, where it did. It then answers nobody any more."""
        self.died = asyncio.Event()
        self._fault = fault
        self._text = definitions()
        self._messages, self._services = VPPApiJSONFiles.process_json_array_str(self._text)
        names = sorted(name for name in self._messages if name != "sockclnt_create")
        self._ids = {"sockclnt_create": _SOCKCLNT_CREATE_ID, "sockclnt_create_reply": _FIRST_ID}
        self._ids |= {name: _FIRST_ID + 1 + i for i, name in enumerate(n for n in names if n not in self._ids)}
        self._names = {number: name for name, number in self._ids.items()}
        self._server: asyncio.Server | None = None
        self._clients: dict[int, asyncio.StreamWriter] = {}
        self._followers: set[int] = set()
        self._next_client = 1
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen. Raises OSError."""
        self._unlink()
        self._server = await asyncio.start_unix_server(self._accept, self.api_socket)

    async def stop(self) -> None:
        """Close everything; what it keeps is gone with it, as VPP's would be."""
        if self._server is not None:
            self._server.close()
        for writer in self._clients.values():
            writer.transport.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._unlink()

    def forget(self) -> None:
        """Become a VPP that was never asked anything; for use between `stop` and `start`."""
        self.world = World()
        self.requests, self.refused = [], []
        self.death = None
        self.died.clear()

    def _unlink(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.api_socket)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        number = self._next_client
        self._next_client += 1
        self._clients[number] = writer
        try:
            await self._serve(number, reader, writer)
        except (OSError, asyncio.IncompleteReadError, struct.error):
            pass  # the client went away, or sent what VPP drops a client for
        finally:
            self._clients.pop(number, None)
            self._followers.discard(number)
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        buffer = bytearray()
        while self.death is None:
            data = await reader.read(_READ)
            if not data:
                return
            buffer += data
            offset = 0
            out: list[bytes] = []
            while len(buffer) - offset >= _FRAME.size:
                length = _FRAME.unpack_from(buffer, offset)[1]
                if length > _MAX_MESSAGE:
                    return
                end = offset + _FRAME.size + length
                if end > len(buffer):
                    break
                try:
                    self._handle(number, bytes(buffer[offset + _FRAME.size : end]), out)
                except Death as death:
                    self._die(str(death))
                    return
                offset = end
            del buffer[:offset]
            writer.write(b"".join(_FRAME.pack(0, len(message), 0) + message for message in out))
            self._tell_followers()
            await writer.drain()

    def _die(self, reason: str) -> None:
        """Do as a process does that was hit by a signal: everything closes, without a word."""
        self.death = reason
        if self._server is not None:
            self._server.close()
        for writer in self._clients.values():
            with contextlib.suppress(OSError):
                writer.transport.abort()
        self.died.set()

    def _handle(self, number: int, message: bytes, out: list[bytes]) -> None:
        msg_id = int.from_bytes(message[:2], "big")
        name = self._names.get(msg_id)
        if name is None or name not in self._services:
            return  # VPP logs it and goes on
        self.requests.append(name)
        if name == "sockclnt_create":
            out.append(self._hello(number, _CREATE_HEAD.unpack_from(message)[1]))
            return
        context = _HEAD.unpack_from(message)[2]
        if name == "get_api_json":
            out.append(self._pack("get_api_json_reply", context, {"retval": 0, "json": self._text}))
            return
        if name == "sockclnt_delete":
            out.append(self._pack("sockclnt_delete_reply", context, {"response": 0}))
            return
        request = self._messages[name].unpack(message, ntc=True)[0]
        if name == "want_interface_events":
            self._followers.add(number)
        service = self._services[name]
        try:
            if self._fault is not None and (retval := self._fault(name, request)) is not None:
                raise Refusal(retval)
            answer = self.world.handle(name, request)
        except Refusal as refusal:
            self.refused.append(f"{name}: {refusal.retval}")
            out.append(self._refuse(service["reply"], context, refusal.retval))
            return
        if isinstance(answer, list):
            details = service.get("stream_msg", service["reply"])
            out += [self._pack(details, context, fields) for fields in answer]
        else:
            out.append(self._pack(service["reply"], context, {"retval": 0} | answer))

    def _hello(self, number: int, context: int) -> bytes:
        table = [{"index": i, "name": f"{n}_{self._messages[n].crc[2:]}"} for n, i in sorted(self._ids.items())]
        fields = {"response": 0, "index": number, "count": len(table), "message_table": table}
        return self._pack("sockclnt_create_reply", context, fields)

    def _refuse(self, reply: str, context: int, retval: int) -> bytes:
        """Pack a refusal. Interface and statistics numbers are ~0 then, as VPP has them."""
        unset = dict.fromkeys(("sw_if_index", "stat_index", "stats_index"), 4294967295)
        known = self._messages[reply].field_by_name
        return self._pack(reply, context, {"retval": retval} | {f: v for f, v in unset.items() if f in known})

    def _pack(self, name: str, context: int, fields: dict[str, Any]) -> bytes:
        return bytes(self._messages[name].pack({"_vl_msg_id": self._ids[name], "context": context, **fields}))

    def _tell_followers(self) -> None:
        """Send interface events to those who asked for them."""
        events, self.world.events = self.world.events, []
        for sw_if_index, flags, deleted in events:
            fields = {"client_index": 0, "pid": 0, "sw_if_index": sw_if_index, "flags": flags, "deleted": deleted}
            event = self._messages["sw_interface_event"].pack({"_vl_msg_id": self._ids["sw_interface_event"], **fields})
            for number in self._followers:
                if number in self._clients:
                    self._clients[number].write(_FRAME.pack(0, len(event), 0) + bytes(event))
