"""The status socket: one line of JSON asks, one line of JSON answers. Root only; nothing that is asked can harm the service."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vppipsec.status.view import sa_view, sync_view
from vppipsec.sync.engine import Engine

log = logging.getLogger(__name__)

MAX_QUESTION = 4096
"""Longest question, bytes."""
PATIENCE_S = 5.0
"""How long a client may take to ask, and to read, seconds."""
MAX_CLIENTS = 32


class StatusUnavailable(Exception):
    """The service does not answer; the text says so in one line."""


class StatusServer:
    """Answers questions about an engine on a unix socket that only its owner may open."""

    def __init__(self, engine: Engine, path: str) -> None:
        self.path = path
        self._engine = engine
        self._server: asyncio.Server | None = None
        self._clients = 0
        self._answers: dict[str, Callable[[], Any]] = {
            "show sync": lambda: sync_view(engine),
            "show sa": lambda: sa_view(engine),
            "reset sync": self._reset,
        }

    async def start(self) -> None:
        """Listen. A socket that an earlier run left is replaced. Raises OSError."""
        Path(self.path).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        before = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._serve, self.path, limit=MAX_QUESTION)
        finally:
            os.umask(before)

    async def stop(self) -> None:
        """Stop listening and remove the socket."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)

    def _reset(self) -> dict[str, str]:
        self._engine.request_resync()
        return {"result": "reading the kernel's tables anew"}

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients += 1
        try:
            async with asyncio.timeout(PATIENCE_S):
                answer = await self._answer(reader)
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (TimeoutError, OSError):
            log.debug("a status client was too slow or went away")
        finally:
            self._clients -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> dict[str, Any]:
        if self._clients > MAX_CLIENTS:
            return {"error": "too many clients"}
        try:
            line = await reader.readline()
            question = json.loads(line)
        except (ValueError, RecursionError):  # too long, not UTF-8, not JSON, or nested beyond reason
            return {"error": "the question is not a line of JSON"}
        name = question.get("ask") if isinstance(question, dict) else None
        answer = self._answers.get(name) if isinstance(name, str) else None
        if answer is None:
            return {"error": f"ask one of: {', '.join(self._answers)}"}
        return {"answer": answer()}


def ask(path: str, question: str, timeout_s: float = 10.0) -> Any:
    """Ask the service behind a status socket, such as `show sync`. Raises StatusUnavailable with a sentence."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(timeout_s)
            client.connect(path)
            client.sendall(json.dumps({"ask": question}).encode() + b"\n")
            with client.makefile("rb") as stream:
                reply = json.loads(stream.readline())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "no answer"
        raise StatusUnavailable(f"vpp-ipsecd does not answer on {path}: {reason}; is the service running?") from error
    if "answer" not in reply:
        raise StatusUnavailable(f"vpp-ipsecd: {reply.get('error', 'no answer')}")
    return reply["answer"]
