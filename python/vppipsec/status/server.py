"""The status socket: a client sends one line of JSON and gets one line of JSON. Root only. No question can harm the service."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vppipsec.kernel.text import parse_addr
from vppipsec.kernel.xfrm.sad_spd import TunnelKey
from vppipsec.status.state import is_connected
from vppipsec.status.summary import (
    NO_FILTER,
    Row,
    SaFilter,
    actual_sad_ids,
    counter_rows,
    detail_rows,
    event_rows,
    sa_rows,
    sync_view,
)
from vppipsec.status.tunnels import acls_of, policy_rows, tunnel_rows
from vppipsec.sync.engine import Engine
from vppipsec.sync.journal import JournalSource
from vppipsec.unix_listener import NotASocket, PathInUse, UnixListener
from vppipsec.vpp.api.errors import VppError, VppUnavailable
from vppipsec.vpp.stats import SaCounters, read_acl_matches, read_sa_counters

log = logging.getLogger(__name__)

MAX_QUESTION_BYTES = 4096
"""Longest question, bytes."""
CLIENT_TIMEOUT_S = 5.0
"""Seconds that a client has to send its question, and to read each portion of the answer."""
MAX_CLIENTS = 32
ROWS_PER_PORTION = 200
"""Rows that are computed at a time, in about 2 ms. Other tasks run in between."""
_T = TypeVar("_T")


class StatusUnavailable(Exception):
    """The service does not answer; the text says so in one line."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question, the peer or SPI that it is restricted to, and whether it asks for details."""

    name: str
    filter: SaFilter = NO_FILTER
    detail: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """An answer that is computed while it is sent: a list of rows, or with `head` an object that has them as `rows`."""

    rows: Iterator[Row]
    head: Row | None = None


StatusAnswer = Row | list[Row] | Listing


class StatusServer:
    """Answers questions about an engine on a unix socket. Only the socket's owner may open it."""

    def __init__(self, engine: Engine, path: str) -> None:
        self.path = path
        self._engine = engine
        self._server: asyncio.Server | None = None
        self._listener: UnixListener | None = None
        self._clients: set[asyncio.Task[Any]] = set()
        self._answers: dict[str, Callable[[Question], Awaitable[StatusAnswer]]] = {
            "show sync": self._sync,
            "show sa": self._sas,
            "show policy": self._policies,
            "show tunnel": self._tunnels,
            "show events": self._events,
            "show counters": self._counters,
            "reset sync": self._reset,
        }

    async def start(self) -> None:
        """Listen. Replaces the socket of an earlier run, but not one that another process serves. Raises OSError."""
        self._listener = _listen(self.path)
        self._server = await asyncio.start_unix_server(
            self._serve, sock=self._listener.socket, limit=MAX_QUESTION_BYTES
        )

    async def stop(self) -> None:
        """Stop listening, disconnect all clients and remove the socket, unless another one has replaced it."""
        if self._server is None or self._listener is None:
            return
        self._listener.release()
        self._server.close()
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        await self._server.wait_closed()

    # Answers

    async def _sync(self, question: Question) -> StatusAnswer:
        return sync_view(self._engine)

    async def _sas(self, question: Question) -> StatusAnswer:
        if not question.detail:
            return Listing(sa_rows(self._engine, question.filter))
        known, counters, problem = await self._read_counters()
        return Listing(detail_rows(self._engine, counters, known, question.filter), {"problem": problem})

    async def _policies(self, question: Question) -> StatusAnswer:
        return Listing(policy_rows(self._engine, question.filter.peer))

    async def _tunnels(self, question: Question) -> StatusAnswer:
        peer = question.filter.peer
        return Listing(tunnel_rows(self._engine, peer, await self._read_denied(peer)))

    async def _events(self, question: Question) -> StatusAnswer:
        return event_rows(self._engine)

    async def _counters(self, question: Question) -> StatusAnswer:
        known, counters, problem = await self._read_counters()
        return Listing(counter_rows(self._engine, counters, known, question.filter), {"problem": problem})

    async def _reset(self, question: Question) -> StatusAnswer:
        self._engine.journal.note(JournalSource.OPERATOR, "asked for everything to be read anew")
        self._engine.request_resync()
        return {"result": "reading the kernel's tables anew"}

    async def _read_counters(self) -> tuple[frozenset[int], SaCounters | None, str]:
        """Return the `sad_id`s that VPP holds, VPP's counters of them, and the reason if there are none."""
        known = actual_sad_ids(self._engine)
        try:
            return known, await self._read_stats(read_sa_counters), ""
        except VppError as error:
            return known, None, str(error)

    async def _read_denied(self, peer: bytes | None) -> dict[TunnelKey, int]:
        """Return how many packets of each tunnel VPP dropped for its selectors. Tunnels without a known number are left out."""
        before = acls_of(self._engine, peer)
        if not before:
            return {}
        denials = {acl.acl_index: acl.denials for acl in before.values()}
        try:
            matches = await self._read_stats(lambda path: read_acl_matches(path, denials))
        except VppError:
            return {}
        after = acls_of(self._engine, peer)
        return {
            key: matches[acl.acl_index]
            for key, acl in before.items()
            if after.get(key) == acl and acl.acl_index in matches
        }

    async def _read_stats(self, read: Callable[[str], Awaitable[_T]]) -> _T:
        """Return counters of the connected VPP. Raises VppError if none is connected, or if the connection changed meanwhile."""
        engine = self._engine
        client = engine.client
        if not is_connected(engine):
            raise VppUnavailable(engine.vpp_problem or "VPP is not connected")
        counters = await read(engine.settings.vpp.stats_socket)
        if engine.client is not client or not is_connected(engine):
            raise VppUnavailable("VPP went away while its counters were read")
        return counters

    # Connections

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            await self._send(writer, await self._answer(reader))
            writer.close()
            async with asyncio.timeout(CLIENT_TIMEOUT_S):
                await writer.wait_closed()
        except (TimeoutError, OSError):
            log.debug("a status client was too slow or went away")
        except asyncio.CancelledError:
            pass  # the service ends; asyncio would log it as an error
        except Exception as error:  # an internal error in an answer affects only the client that asked
            log.error("a mistake in an answer on the status socket: %s", type(error).__name__)
        finally:
            self._clients.discard(task)
            with contextlib.suppress(AttributeError):  # asyncio's transport raises it after its close (Python 3.11)
                writer.transport.abort()  # discards data that a client does not read

    async def _answer(self, reader: asyncio.StreamReader) -> Row | Listing:
        """Read a question and return its answer, or a row with `error`."""
        if len(self._clients) > MAX_CLIENTS:
            return {"error": "too many clients at once"}
        try:
            async with asyncio.timeout(CLIENT_TIMEOUT_S):
                line = await reader.readline()
        except ValueError:
            return {"error": f"the question is longer than {MAX_QUESTION_BYTES} bytes"}
        try:
            question = _parse_question(line)
            answer = self._answers.get(question.name)
        except ValueError as error:
            return {"error": str(error)}
        if answer is None:
            return {"error": f"ask one of: {', '.join(self._answers)}"}
        answered = await answer(question)
        return answered if isinstance(answered, Listing) else {"answer": answered}

    async def _send(self, writer: asyncio.StreamWriter, answer: Row | Listing) -> None:
        """Write an answer as one line. A listing goes out in portions; the service runs in between."""
        if not isinstance(answer, Listing):
            await _write_text(writer, json.dumps(answer))
        else:
            before, after = ("", "") if answer.head is None else (json.dumps(answer.head)[:-1] + ', "rows": ', "}")
            await _write_text(writer, f'{{"answer": {before}[')
            separator = ""
            while portion := list(itertools.islice(answer.rows, ROWS_PER_PORTION)):
                await _write_text(writer, separator + json.dumps(portion)[1:-1])
                separator = ", "
                await asyncio.sleep(0)
            await _write_text(writer, f"]{after}}}")
        await _write_text(writer, "\n")


async def _write_text(writer: asyncio.StreamWriter, text: str) -> None:
    writer.write(text.encode())
    async with asyncio.timeout(CLIENT_TIMEOUT_S):
        await writer.drain()


def _parse_question(line: bytes) -> Question:
    """Return the question in a line of JSON. Raises ValueError with a sentence."""
    try:
        asked = json.loads(line)
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict):
        raise ValueError("the question is not a line of JSON")
    name, peer, spi, detail = (asked.pop(key, default) for key, default in _QUESTION.items())
    if asked:
        raise ValueError(f"a question has {', '.join(_QUESTION)}, and no '{next(iter(asked))}'")
    if not isinstance(name, str):
        raise ValueError("a question says what it asks: 'ask'")
    if not (spi is None or (isinstance(spi, int) and not isinstance(spi, bool) and 0 <= spi < 1 << 32)):
        raise ValueError("'spi' is a number of 32 bits")
    if not isinstance(detail, bool):
        raise ValueError("'detail' is true or false")
    try:
        return Question(name, SaFilter(None if peer is None else parse_addr(str(peer)), spi), detail)
    except ValueError as error:
        raise ValueError("'peer' is an IP address") from error


_QUESTION = {"ask": None, "peer": None, "spi": None, "detail": False}
"""Keys of a question, with their defaults."""


def _listen(path: str) -> UnixListener:
    """Open the status socket. Replaces one that no process serves any more. Raises OSError with a sentence."""
    try:
        Path(path).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        return UnixListener(path, backlog=MAX_CLIENTS)
    except PathInUse as error:
        raise OSError(f"another vpp-ipsecd answers on {path}: end it, or set another status socket") from error
    except NotASocket as error:
        raise OSError(f"{path} is there and is not a socket: remove it, or set another status socket") from error
    except OSError as error:
        raise OSError(f"the status socket {path} cannot be opened: {error.strerror or error}") from error


def ask(
    path: str,
    question: str,
    *,
    peer: str | None = None,
    spi: int | None = None,
    detail: bool = False,
    timeout_s: float = 10.0,
) -> Any:
    """Return the service's answer to a question such as `show sync`, as Python values from JSON.

    `path` is the status socket. `peer` and `spi` restrict the answer. Raises StatusUnavailable with a sentence.
    """
    asked = {"ask": question, "peer": peer, "spi": spi, "detail": detail}
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(timeout_s)
            client.connect(path)
            with contextlib.suppress(BrokenPipeError):  # the service may answer without reading the question
                client.sendall(json.dumps(asked).encode() + b"\n")
            with client.makefile("rb") as stream:
                reply = json.loads(stream.readline())
    except PermissionError as error:
        raise StatusUnavailable(f"{path} is open to root only") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "no answer"
        raise StatusUnavailable(f"vpp-ipsecd does not answer on {path}: {reason}; is the service running?") from error
    if not isinstance(reply, dict) or "answer" not in reply:
        says = reply.get("error", "no answer") if isinstance(reply, dict) else "no answer"
        raise StatusUnavailable(f"vpp-ipsecd: {says}")
    return reply["answer"]
