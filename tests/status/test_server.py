"""The status socket: whatever a client does costs that client alone, and two services do not share a socket."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.build import make_policy, sa_in, sa_out
from support.fake_kernel import FakeKernel
from support.recorded import PATIENCE_S
from vppipsec.conf.settings import Settings
from vppipsec.status import server as status_socket
from vppipsec.status.server import (
    MAX_CLIENTS,
    MAX_QUESTION_BYTES,
    ROWS_PER_PORTION,
    StatusServer,
    StatusUnavailable,
    ask,
)
from vppipsec.status.summary import sa_rows
from vppipsec.status.tunnels import policy_rows, tunnel_rows
from vppipsec.sync.engine import Engine

MANY = 20 * ROWS_PER_PORTION


def an_engine(sas: int = 2) -> Engine:
    """Return an engine that is not at work, and knows of SAs in the kernel."""
    engine = Engine(Settings(), FakeKernel())
    model = [sa_in(spi, 1 + spi // 2) if spi % 2 else sa_out(spi, 1 + spi // 2) for spi in range(sas)]
    engine.model.replace(model, [make_policy(reqid=1 + n, dst=f"10.{n >> 8}.{n & 255}.0/24") for n in range(sas // 2)])
    return engine


def serve(
    path: Path, story: Callable[[StatusServer, str], Awaitable[None]], sas: int = 2, timeout_s: float = PATIENCE_S
) -> None:
    """Run a story beside a status server."""

    async def run() -> None:
        server = StatusServer(an_engine(sas), str(path))
        await server.start()
        try:
            async with asyncio.timeout(timeout_s):
                await story(server, str(path))
        finally:
            await server.stop()

    asyncio.run(run())


async def raw(path: str, line: bytes) -> Any:
    """Send bytes and return what JSON makes of the answer."""
    reader, writer = await asyncio.open_unix_connection(path, limit=1 << 24)
    try:
        writer.write(line)
        return json.loads(await reader.readline())
    finally:
        writer.close()


async def asked(path: str, question: str = "show sync", **about: Any) -> Any:
    return await asyncio.to_thread(ask, path, question, **about)


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110  # any condition; the caller has a time limit
        await asyncio.sleep(0.01)


def is_cut_off(client: socket.socket) -> bool:
    """Tell whether the service has closed its end."""
    try:
        client.sendall(b"x")
    except ConnectionError:
        return True
    return False


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "status.sock"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"\n", "the question is not a line of JSON"),
        (b"show sync\n", "the question is not a line of JSON"),
        (b"\xff\xfe\n", "the question is not a line of JSON"),
        (b"[]\n", "the question is not a line of JSON"),
        (b"[" * (MAX_QUESTION_BYTES - 10) + b"\n", "the question is not a line of JSON"),
        (b"x" * (3 * MAX_QUESTION_BYTES) + b"\n", f"the question is longer than {MAX_QUESTION_BYTES} bytes"),
        (b"x" * (100 * MAX_QUESTION_BYTES), f"the question is longer than {MAX_QUESTION_BYTES} bytes"),
        (b"{}\n", "a question says what it asks: 'ask'"),
        (b'{"ask": 7}\n', "a question says what it asks: 'ask'"),
        (b'{"ask": ["show sync"]}\n', "a question says what it asks: 'ask'"),
        (b'{"ask": "show sync", "of": 1}\n', "a question has ask, peer, spi, detail, and no 'of'"),
        (b'{"ask": "show sa", "peer": "there"}\n', "'peer' is an IP address"),
        (b'{"ask": "show sa", "peer": 7.5}\n', "'peer' is an IP address"),
        (b'{"ask": "show sa", "spi": "7"}\n', "'spi' is a number of 32 bits"),
        (b'{"ask": "show sa", "spi": true}\n', "'spi' is a number of 32 bits"),
        (b'{"ask": "show sa", "spi": -1}\n', "'spi' is a number of 32 bits"),
        (b'{"ask": "show sa", "spi": 4294967296}\n', "'spi' is a number of 32 bits"),
        (b'{"ask": "show sa", "detail": 1}\n', "'detail' is true or false"),
        (
            b'{"ask": "show keys"}\n',
            "ask one of: show sync, show sa, show policy, show tunnel, show events, show counters, reset sync",
        ),
    ],
)
def test_bad_question_gets_an_error_and_the_next_one_an_answer(path: Path, line: bytes, says: str) -> None:
    async def story(server: StatusServer, at: str) -> None:
        assert await raw(at, line) == {"error": says}
        assert (await asked(at))["kernel"]["sas"] == 2

    serve(path, story)


def test_a_question_may_come_in_pieces(path: Path) -> None:
    async def story(server: StatusServer, at: str) -> None:
        reader, writer = await asyncio.open_unix_connection(at)
        for piece in (b'{"ask":', b' "show', b' sync"}', b"\n"):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)
        assert "answer" in json.loads(await reader.readline())
        writer.close()

    serve(path, story)


def test_a_client_that_says_nothing_is_sent_away_and_holds_nobody_up(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_socket, "CLIENT_TIMEOUT_S", 0.2)

    async def story(server: StatusServer, at: str) -> None:
        reader, writer = await asyncio.open_unix_connection(at)
        assert (await asked(at))["kernel"]["sas"] == 2
        assert await reader.read() == b""
        writer.close()
        await until(lambda: not server._clients)

    serve(path, story)


def test_client_that_does_not_read_is_disconnected(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_socket, "CLIENT_TIMEOUT_S", 0.2)

    async def story(server: StatusServer, at: str) -> None:
        deaf = socket.socket(socket.AF_UNIX)
        deaf.connect(at)
        deaf.sendall(b'{"ask": "show sa"}\n')
        await until(lambda: len(server._clients) == 1)
        assert len(await asked(at, "show sa")) == MANY
        await until(lambda: not server._clients)
        await until(lambda: is_cut_off(deaf))
        deaf.close()

    serve(path, story, sas=MANY)


def test_a_client_that_goes_while_it_is_answered_leaves_no_trace(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def story(server: StatusServer, at: str) -> None:
        for _ in range(20):
            client = socket.socket(socket.AF_UNIX)
            client.connect(at)
            client.sendall(b'{"ask": "show sa"}\n')
            await until(lambda: len(server._clients) == 1)
            client.close()
            await until(lambda: not server._clients)
        assert len(await asked(at, "show sa")) == MANY

    serve(path, story, sas=MANY)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_many_clients_at_once_are_served_and_too_many_are_told_so(path: Path) -> None:
    async def story(server: StatusServer, at: str) -> None:
        silent = [await asyncio.open_unix_connection(at) for _ in range(MAX_CLIENTS)]
        await until(lambda: len(server._clients) == MAX_CLIENTS)
        with pytest.raises(StatusUnavailable, match="vpp-ipsecd: too many clients at once"):
            await asked(at)
        for reader, writer in silent:
            writer.write(b'{"ask": "show sync"}\n')
            assert json.loads(await reader.readline())["answer"]["kernel"]["sas"] == 2
            writer.close()
        await until(lambda: not server._clients)
        assert (await asked(at))["kernel"]["sas"] == 2

    serve(path, story)


def test_error_in_an_answer_costs_its_client_and_logs_no_text(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def mistaken(engine: Engine) -> Any:
        raise KeyError("distinctive-key")

    def half(engine: Engine, wanted: Any) -> Iterator[Any]:
        yield {"spi": "0x00000001"}
        raise KeyError("distinctive-key")

    async def story(server: StatusServer, at: str) -> None:
        for question in ("show sync", "show sa"):
            with pytest.raises(StatusUnavailable, match="no answer"):
                await asked(at, question)
        assert len(await asked(at, "show tunnel")) == 1

    monkeypatch.setattr(status_socket, "sync_view", mistaken)
    monkeypatch.setattr(status_socket, "sa_rows", half)
    serve(path, story)
    assert caplog.messages.count("a mistake in an answer on the status socket: KeyError") == 2
    assert "distinctive" not in caplog.text


def test_a_long_answer_lets_others_have_their_turn_between_its_portions(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(server: StatusServer, at: str) -> None:
        turns, seen = 0, []

        def counted(engine: Engine, wanted: Any) -> Iterator[Any]:
            for row in sa_rows(engine, wanted):
                seen.append(turns)
                yield row

        monkeypatch.setattr(status_socket, "sa_rows", counted)
        task = asyncio.create_task(asked(at, "show sa"))
        while not task.done():
            turns += 1
            await asyncio.sleep(0)
        rows = await task
        assert len({row["spi"] for row in rows}) == len(rows) == MANY
        portions = [seen[i : i + ROWS_PER_PORTION] for i in range(0, MANY, ROWS_PER_PORTION)]
        assert all(first[-1] < second[0] for first, second in itertools.pairwise(portions))

    serve(path, story, sas=MANY)


@pytest.mark.parametrize("rows_of", [sa_rows, tunnel_rows, policy_rows])
def test_the_world_may_change_between_two_portions(rows_of: Callable[[Engine], Iterator[Any]]) -> None:
    engine = an_engine(40)
    rows = rows_of(engine)
    first = next(rows)
    engine.model.replace([sa_out(99, 50), sa_in(98, 50)], [make_policy(reqid=50)])
    engine.tunnels.clear()
    rest = list(rows)
    assert all(row.keys() == first.keys() for row in rest)


def test_end_of_the_service_sends_clients_away_and_removes_the_socket(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> bytes:
        server = StatusServer(an_engine(), str(path))
        await server.start()
        reader, writer = await asyncio.open_unix_connection(str(path))
        await until(lambda: len(server._clients) == 1)
        await server.stop()
        left = await reader.read()
        writer.close()
        return left

    assert asyncio.run(run()) == b""
    assert not path.exists()
    assert caplog.text == ""


def test_stop_before_start_does_nothing(path: Path) -> None:
    asyncio.run(StatusServer(an_engine(), str(path)).stop())
    assert not path.parent.exists()


def test_only_the_owner_may_open_the_socket(path: Path) -> None:
    async def story(server: StatusServer, at: str) -> None:
        assert stat.S_IMODE(os.stat(at).st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) & 0o022 == 0

    before = os.umask(0)
    try:
        serve(path, story)
        assert os.umask(0) == 0  # it is as it was before
    finally:
        os.umask(before)


def test_a_socket_that_an_earlier_run_left_is_replaced(path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()

    async def story(server: StatusServer, at: str) -> None:
        assert (await asked(at))["kernel"]["sas"] == 2

    serve(path, story)


def test_a_second_service_does_not_take_the_socket_of_a_live_one(path: Path) -> None:
    async def story(server: StatusServer, at: str) -> None:
        second = StatusServer(an_engine(), at)
        with pytest.raises(OSError, match=f"another vpp-ipsecd answers on {at}: end it, or set another status socket"):
            await second.start()
        await second.stop()
        assert (await asked(at))["kernel"]["sas"] == 2

    serve(path, story)


def test_one_that_is_too_busy_to_answer_is_alive_too(path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(path))
        busy.listen(0)
        waiting.connect(str(path))  # fills the backlog
        with pytest.raises(OSError, match="another vpp-ipsecd answers"):
            asyncio.run(StatusServer(an_engine(), str(path)).start())


def test_a_file_that_is_no_socket_stays(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("precious")
    with pytest.raises(OSError, match="is there and is not a socket: remove it, or set another status socket"):
        asyncio.run(StatusServer(an_engine(), str(path)).start())
    assert path.read_text() == "precious"


def test_a_place_where_no_socket_can_be_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    where = tmp_path / "file" / "status.sock"
    with pytest.raises(OSError, match=f"^the status socket {where} cannot be opened: "):
        asyncio.run(StatusServer(an_engine(), str(where)).start())


def test_a_socket_that_another_has_put_in_its_place_is_not_removed(path: Path) -> None:
    async def run() -> None:
        first, second = (StatusServer(an_engine(), str(path)) for _ in range(2))
        await first.start()
        os.unlink(path)
        await second.start()
        await first.stop()
        assert (await asked(str(path)))["kernel"]["sas"] == 2
        await second.stop()

    asyncio.run(run())
    assert not path.exists()


def listener_that_says(path: Path, answer: bytes) -> Callable[[], Awaitable[Any]]:
    """Return what asks somebody who is not the service."""

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(answer)
        writer.close()

    async def run() -> Any:
        server = await asyncio.start_unix_server(serve_one, str(path))
        try:
            return await asked(str(path))
        finally:
            server.close()

    return run


@pytest.mark.parametrize("answer", [b"", b"nonsense\n", b"[1]\n", b"7\n", b'{"ans', b"{}\n", b"\xff\n"])
def test_an_answer_that_is_none_is_said_in_one_line(tmp_path: Path, answer: bytes) -> None:
    with pytest.raises(StatusUnavailable, match="no answer") as failure:
        asyncio.run(listener_that_says(tmp_path / "s", answer)())  # type: ignore[arg-type]  # a coroutine
    assert "\n" not in str(failure.value)


def test_nobody_there_is_said_with_the_reason(tmp_path: Path) -> None:
    where = tmp_path / "s"
    with pytest.raises(StatusUnavailable) as failure:
        ask(str(where), "show sync")
    assert str(failure.value) == (
        f"vpp-ipsecd does not answer on {where}: No such file or directory; is the service running?"
    )


def test_a_service_that_hangs_is_given_up(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.bind(str(tmp_path / "s"))
        hanging.listen()
        with pytest.raises(StatusUnavailable, match="no answer; is the service running"):
            ask(str(tmp_path / "s"), "show sync", timeout_s=0.05)


def test_who_may_not_ask_is_told_who_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(StatusUnavailable, match=r"/s is open to root only$"):
        ask(str(tmp_path / "s"), "show sync")
