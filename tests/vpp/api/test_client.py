"""The client of VPP's API: pipelined, and clear about whatever goes wrong."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from support.lanwan import SETUP_CALLS, make_loopback, set_pair
from support.recorded import PATIENCE_S
from support.rig import KINDS, Rig, play
from vppipsec.vpp.api import client as client_module
from vppipsec.vpp.api.client import VppClient, connect
from vppipsec.vpp.api.errors import VppIncompatible, VppRefused, VppUnavailable, describe_error
from vppipsec.vpp.api.interface import SetInterfaceUp
from vppipsec.vpp.api.ip import RouteLookup
from vppipsec.vpp.api.ipsec import IpsecItfCreate, IpsecItfDelete
from vppipsec.vpp.types import NO_INDEX
from vppstandin.server import StandIn

pytestmark = pytest.mark.versions

with_every_vpp = pytest.mark.parametrize("kind", KINDS)


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await story()

    asyncio.run(bounded())


@with_every_vpp
def test_thousands_in_flight_are_answered_in_order(kind: str) -> None:
    async def story(rig: Rig) -> None:
        client = await rig.admin()
        replies = await client.run([IpsecItfCreate(number) for number in range(2000)])
        assert not any(reply.retval for reply in replies)
        assert len({reply.value for reply in replies}) == 2000
        first, second = await asyncio.gather(
            client.run([SetInterfaceUp(reply.value) for reply in replies[:1000]]),
            client.run([IpsecItfDelete(reply.value) for reply in replies[1000:]]),
        )
        assert [len(first), len(second)] == [1000, 1000]
        assert not any(reply.retval for reply in (*first, *second))
        assert len(await client.dump("ipsec_itf_dump", {"sw_if_index": NO_INDEX})) == 1000

    play(kind, story)


@with_every_vpp
def test_refusals_are_answers_in_a_batch_and_exceptions_of_a_call(kind: str) -> None:
    async def story(rig: Rig) -> None:
        client = await connect(rig.api_socket, also=SETUP_CALLS)
        replies = await client.run([SetInterfaceUp(4711), RouteLookup(bytes(4))])
        assert [reply.retval for reply in replies] == [-2, 0]
        with pytest.raises(
            VppRefused, match=r"VPP refused sw_interface_set_flags: INVALID_SW_IF_INDEX \(-2\)"
        ) as caught:
            await client.call("sw_interface_set_flags", {"sw_if_index": 4711, "flags": 1})
        assert caught.value.retval == -2
        await client.close()
        if rig.standin is not None:
            rig.standin.refused.clear()

    play(kind, story)


def test_details_behind_cursors_are_all_read() -> None:
    async def story(rig: Rig) -> None:
        client = await rig.admin()
        assert await client.stream("lcp_itf_pair_get") == []
        wanted = {await make_loopback(client): f"host{number}" for number in range(5)}
        taps = {await set_pair(client, index, name) for index, name in wanted.items()}
        assert rig.standin is not None
        for portion in (1, 2, 5, None):
            rig.standin.world.linux_cp.portion = portion
            found = await client.stream("lcp_itf_pair_get")
            assert {pair.phy_sw_if_index: pair.host_if_name for pair in found} == wanted
            assert {pair.host_sw_if_index for pair in found} == taps
        rig.standin.world.linux_cp.portion = 0  # as a VPP that gets nowhere
        with pytest.raises(VppUnavailable, match="in circles"):
            await client.stream("lcp_itf_pair_get")
        rig.standin.world.linux_cp.portion = None

    play("standin", story)


@with_every_vpp
def test_vpp_is_left_in_order_as_often_as_one_likes(kind: str) -> None:
    async def story(rig: Rig) -> None:
        for _ in range(24):  # a real VPP hangs when sixteen go without a word
            client = await connect(rig.api_socket)
            await client.close()
        if rig.standin is not None:
            assert rig.standin.requests.count("sockclnt_delete") == 24
        assert (await (await rig.admin()).call("control_ping")).vpe_pid

    play(kind, story)


@with_every_vpp
def test_interface_events_are_told(kind: str) -> None:
    async def story(rig: Rig) -> None:
        seen: list[int] = []
        client = await connect(rig.api_socket, on_event=seen.append, also=SETUP_CALLS)
        await client.call("want_interface_events", {"enable_disable": 1, "pid": 0})
        index = await make_loopback(client)
        async with asyncio.timeout(PATIENCE_S):
            while index not in seen:  # noqa: ASYNC110  # filled by a callback
                await asyncio.sleep(0.01)
        await client.close()

    play(kind, story)


@with_every_vpp
def test_vpp_that_goes_fails_what_waits(kind: str) -> None:
    async def story(rig: Rig) -> None:
        client = await connect(rig.api_socket)
        waiting = asyncio.gather(
            *(client.run([RouteLookup(bytes(4))] * 5000) for _ in range(3)), return_exceptions=True
        )
        await asyncio.sleep(0)
        if rig.box is not None:
            rig.box.kill()
        else:
            assert rig.standin is not None
            await rig.standin.stop()
        assert all(isinstance(outcome, VppUnavailable) for outcome in await waiting)
        await client.closed
        with pytest.raises(VppUnavailable, match="not connected to VPP"):
            await client.run([RouteLookup(bytes(4))])
        with pytest.raises(VppUnavailable):
            await client.call("show_version")
        if rig.box is not None:
            rig.box.start()

    play(kind, story)


def test_nobody_there() -> None:
    async def story() -> None:
        with pytest.raises(VppUnavailable, match=r"^VPP's API socket /nowhere/api.sock cannot be opened: No such file"):
            await connect("/nowhere/api.sock")

    run(story)


def pretender(path: Path, answer: Callable[[bytes], bytes | None]) -> Awaitable[asyncio.Server]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            said = answer(data)
            if said is None:
                break
            writer.write(said)
        writer.close()

    return asyncio.start_unix_server(serve, str(path))


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (None, VppUnavailable),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(64), VppUnavailable),
        (struct.pack(">QII", 0, 1 << 30, 0) + bytes(64), VppUnavailable),
        (struct.pack(">QII", 0, 5, 0) + bytes(64), VppUnavailable),
        (struct.pack(">QII", 0, 64, 0) + bytes(64), VppIncompatible),
    ],
    ids=["closes", "http", "endless", "short", "other-message"],
)
def test_what_is_no_vpp_is_refused(tmp_path: Path, said: bytes | None, error: type[Exception]) -> None:
    async def story() -> None:
        server = await pretender(tmp_path / "api.sock", lambda data: said)
        with pytest.raises(error):
            await connect(str(tmp_path / "api.sock"))
        server.close()

    run(story)


def test_vpp_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "REPLY_TIMEOUT_S", 0.2)

    async def story() -> None:
        server = await pretender(tmp_path / "api.sock", lambda data: b"")
        with pytest.raises(VppUnavailable, match="VPP has not answered for 0 s"):
            await connect(str(tmp_path / "api.sock"))
        server.close()

    run(story)


def test_contexts_start_over_before_they_overflow(tmp_path: Path) -> None:
    async def story() -> None:
        standin = StandIn(str(tmp_path / "api.sock"))
        await standin.start()
        client = await connect(standin.api_socket)
        client._context = (1 << 32) - 3
        assert len(await client.run([RouteLookup(bytes(4))] * 10)) == 10
        assert len(await client.run([RouteLookup(bytes(4))] * 10)) == 10
        await client.close()
        await standin.stop()

    run(story)


def test_answers_out_of_turn_end_the_connection(tmp_path: Path) -> None:
    async def story() -> None:
        standin = StandIn(str(tmp_path / "api.sock"))
        await standin.start()
        client = await connect(standin.api_socket)
        waiting = asyncio.create_task(client.run([RouteLookup(bytes(4))] * 3))
        await asyncio.sleep(0)
        last = client._batches[0].base + 2
        client.data_received(struct.pack(">QIIHIi", 0, 10, 0, 999, last, 0))
        with pytest.raises(VppUnavailable, match="out of order"):
            await waiting
        await standin.stop()

    run(story)


@pytest.mark.parametrize(
    ("retval", "text"), [(-7, "INVALID_VALUE (-7)"), (-162, "LIMIT_EXCEEDED (-162)"), (-9999, "-9999 (-9999)")]
)
def test_error_numbers_have_vpps_names(retval: int, text: str) -> None:
    assert describe_error(retval) == text


def test_connection_is_of_no_use_before_it_is_made() -> None:
    async def story() -> None:
        with pytest.raises(VppUnavailable):
            await VppClient().run([RouteLookup(bytes(4))])

    run(story)
