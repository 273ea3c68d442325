"""VPP's counters from its stats segment: the stand-in's and a real VPP's are read alike, also by vpp_papi's own reader."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import struct
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from vpp_papi.vpp_stats import VPPStats

from support.build import ENV, make_policy, sa_in, sa_out
from support.lanwan import SETUP_CALLS, make_loopback
from support.recorded import PATIENCE_S
from support.vpp_box import VppBox, vpp_binary
from vppipsec.kernel.xfrm.sad_spd import KernelModel
from vppipsec.sync.desired.tunnel import translate
from vppipsec.vpp import stats
from vppipsec.vpp.api.acl import AclAddReplace, AclDel
from vppipsec.vpp.api.client import Reply, connect
from vppipsec.vpp.api.errors import VppIncompatible, VppUnavailable
from vppipsec.vpp.api.ip import RouteAddDel
from vppipsec.vpp.api.ipsec import SadEntryAdd, SadEntryDel
from vppipsec.vpp.stats import SaTraffic, read_acl_matches, read_route_packets, read_sa_counters
from vppipsec.vpp.types import NO_INDEX, Prefix, Rule, SaSpec, everything
from vppstandin.server import StandIn
from vppstandin.stats import SA_ERRORS, StatsSegment, StatsServer

pytestmark = pytest.mark.versions

NOTHING = SaTraffic(0, 0, {})
BASE = 0x7F0000000000


def inbound(spi: int) -> SaSpec:
    model = KernelModel()
    model.replace([sa_out(1), sa_in(spi)], [make_policy()])
    ((key, tunnel),) = model.tunnels.items()
    made = translate(key, tunnel, ENV).tunnel
    assert made is not None
    return made.inbound[0]


def with_standin(story: Callable[[StandIn, StatsServer], Awaitable[None]], threads: int = 1) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory(prefix="stats-") as directory:
            standin = StandIn(f"{directory}/api.sock")
            server = StatsServer(standin.world, f"{directory}/stats.sock", threads)
            server.start()
            await standin.start()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await story(standin, server)
            finally:
                await standin.stop()
                server.stop()

    asyncio.run(run())


async def add_sas(standin: StandIn, count: int) -> list[int]:
    """Add SAs numbered from 1; return their stat_index."""
    client = await connect(standin.api_socket)
    replies = await client.run([SadEntryAdd(number, inbound(number)) for number in range(1, count + 1)])
    await client.close()
    return [reply.value for reply in replies]


@pytest.mark.parametrize("threads", [1, 3])
def test_counts_are_summed_over_threads_and_include_errors(threads: int) -> None:
    async def story(standin: StandIn, server: StatsServer) -> None:
        first, second = await add_sas(standin, 2)
        for thread in range(threads):
            server.segment.count(second, 2, 300, thread, replay=1, lost=thread)
        counters = await read_sa_counters(server.path)
        assert counters.of_sa(first) == NOTHING
        lost = sum(range(threads))
        errors = {"replay": threads} | ({"lost": lost} if lost else {})
        assert counters.of_sa(second) == SaTraffic(2 * threads, 300 * threads, errors)
        assert counters.of_sa(4000) is None

    with_standin(story, threads)


def test_before_the_first_sa_there_are_no_counters() -> None:
    async def story(standin: StandIn, server: StatsServer) -> None:
        assert (await read_sa_counters(server.path)).of_sa(0) is None

    with_standin(story)


def test_papis_own_reader_reads_the_stand_ins_segment() -> None:
    async def story(standin: StandIn, server: StatsServer) -> None:
        indices = await add_sas(standin, 200)  # more than the first vector takes
        theirs = VPPStats(server.path)
        await asyncio.to_thread(theirs.connect)
        server.segment.count(indices[199], 5, 600, integ_error=4)
        assert sorted(theirs.ls("/net/ipsec/sa")) == sorted(
            ["/net/ipsec/sa", *(f"/net/ipsec/sa/err/{name}" for name in SA_ERRORS)]
        )
        usage = theirs["/net/ipsec/sa"]
        assert (usage[0][199]["packets"], usage[0][199]["bytes"], usage[0][0]["packets"]) == (5, 600, 0)
        assert theirs["/net/ipsec/sa/err/integ_error"][:, 199].sum() == 4
        assert theirs["/sys/heartbeat"] == 0
        theirs.disconnect()

    with_standin(story)


def test_counters_keep_counting_and_survive_growth() -> None:
    async def story(standin: StandIn, server: StatsServer) -> None:
        segment = server.segment
        segment.start(0)
        segment.count(0, 1, 100, runt=1)
        segment.start(1000)
        segment.count(0, 1, 50)
        assert (await read_sa_counters(server.path)).of_sa(0) == SaTraffic(2, 150, {"runt": 1})

    with_standin(story)


def test_an_index_that_is_used_again_begins_at_zero() -> None:
    async def story(standin: StandIn, server: StatsServer) -> None:
        (index,) = await add_sas(standin, 1)
        server.segment.count(index, 7, 700, replay=7)
        client = await connect(standin.api_socket)
        replies = await client.run([SadEntryDel(1), SadEntryAdd(9, inbound(9))])
        await client.close()
        assert replies[1].value == index
        assert (await read_sa_counters(server.path)).of_sa(index) == NOTHING

    with_standin(story)


def test_sas_that_were_there_before_are_counted_too() -> None:
    async def story(standin: StandIn, server: StatsServer) -> None:
        (index,) = await add_sas(standin, 1)
        late = StatsServer(standin.world, server.path + "2")
        late.start()
        assert (await read_sa_counters(late.path)).of_sa(index) == NOTHING
        late.stop()

    with_standin(story)


def rules(permitted: int) -> tuple[Rule, ...]:
    """Return so many rules that permit, and one that denies the rest."""
    anything = everything(False)
    return (*(Rule(True, Prefix(bytes((10, n, 0, 0)), 16), anything) for n in range(permitted)), DENY)


DENY = Rule(False, everything(False), everything(False))


async def put_acls(standin: StandIn, *acls: AclAddReplace | AclDel) -> list[Reply]:
    client = await connect(standin.api_socket)
    replies = await client.run(acls)
    await client.close()
    return replies


@pytest.mark.parametrize("threads", [1, 3])
def test_acl_matches_sum_the_requested_rules_over_threads(threads: int) -> None:
    async def story(standin: StandIn, server: StatsServer) -> None:
        await put_acls(standin, *(AclAddReplace(NO_INDEX, "tag", rules(number)) for number in (0, 1, 12, 0)))
        for thread in range(threads):
            for rule in range(12):
                server.segment.count_matches(2, rule, 1000 + rule, 64000, thread)
            server.segment.count_matches(2, 12, 5, 300, thread)
            server.segment.count_matches(1, 1, 1 + thread, 60, thread)
        assert await read_acl_matches(server.path, {0: [0], 1: [1], 2: [12]}) == {
            0: 0,
            1: sum(range(threads + 1)),
            2: 5 * threads,
        }
        assert await read_acl_matches(server.path, {2: [0, 12], 7: [0]}) == {2: 1005 * threads}
        assert await read_acl_matches(server.path, {}) == {}

    with_standin(story, threads)


def test_matches_of_a_rule_that_vpp_does_not_count_are_not_known() -> None:
    async def story(standin: StandIn, server: StatsServer) -> None:
        assert await read_acl_matches(server.path, {0: [0]}) == {}
        await put_acls(standin, AclAddReplace(NO_INDEX, "tag", rules(2)))
        assert await read_acl_matches(server.path, {0: [2]}) == {0: 0}
        assert await read_acl_matches(server.path, {0: [2, 50]}) == {}

    with_standin(story)


def test_acl_matches_restart_with_new_rules_or_a_reused_index() -> None:
    async def story(standin: StandIn, server: StatsServer) -> None:
        for change in (
            (AclAddReplace(NO_INDEX, "tag", rules(3)),),
            (AclAddReplace(0, "tag", rules(9)),),
            (AclAddReplace(0, "tag", rules(1)),),
            (AclDel(0), AclAddReplace(NO_INDEX, "other", rules(1))),
        ):
            assert (await put_acls(standin, *change))[-1].value == 0
            numbers = range(len(standin.world.acls[0].rules))
            assert await read_acl_matches(server.path, {0: numbers}) == {0: 0}
            for number in numbers:
                server.segment.count_matches(0, number, 7)
            assert await read_acl_matches(server.path, {0: numbers}) == {0: 7 * len(numbers)}

    with_standin(story)


def test_sas_and_acls_by_the_thousand_are_counted_side_by_side() -> None:
    async def story(standin: StandIn, server: StatsServer) -> None:
        await put_acls(standin, *(AclAddReplace(NO_INDEX, "tag", rules(1)) for _ in range(2000)))
        (index,) = await add_sas(standin, 1)
        server.segment.count(index, 3, 300)
        for number in range(0, 2000, 7):
            server.segment.count_matches(number, 1, number + 1)
        matches = await read_acl_matches(server.path, {number: [1] for number in range(2000)})
        assert matches == {number: 0 if number % 7 else number + 1 for number in range(2000)}
        assert (await read_sa_counters(server.path)).of_sa(index) == SaTraffic(3, 300, {})

    with_standin(story)


def test_acls_that_were_there_before_are_counted_too() -> None:
    async def story(standin: StandIn, server: StatsServer) -> None:
        await put_acls(standin, AclAddReplace(NO_INDEX, "tag", rules(4)))
        late = StatsServer(standin.world, server.path + "2")
        late.start()
        assert await read_acl_matches(late.path, {0: [4]}) == {0: 0}
        late.stop()

    with_standin(story)


def test_reading_waits_until_vpp_has_moved_its_counters() -> None:
    async def story(standin: StandIn, server: StatsServer) -> None:
        server.segment.start(0)
        server.segment.hold(True)
        reading = asyncio.create_task(read_sa_counters(server.path))
        await asyncio.sleep(0.02)
        assert not reading.done()
        server.segment.hold(False)
        assert (await reading).of_sa(0) == NOTHING

    with_standin(story)


def test_a_vpp_that_died_while_it_moved_its_counters_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "MAX_READ_TRIES", 3)

    async def story(standin: StandIn, server: StatsServer) -> None:
        server.segment.hold(True)
        with pytest.raises(VppUnavailable, match="changes its stats segment"):
            await read_sa_counters(server.path)

    with_standin(story)


def test_a_change_during_the_copy_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(standin: StandIn, server: StatsServer) -> None:
        segment = server.segment
        segment.start(0)
        segment.count(0, 1, 100)
        plain = stats._Segment.by_thread
        moves = [1, 1]

        def disturbed(reading: stats._Segment, pointer: int, element_bytes: int) -> object:
            copied = plain(reading, pointer, element_bytes)
            if moves:
                segment.start(100 * len(moves) ** 9 + moves.pop())  # grows while it is read
            return copied

        monkeypatch.setattr(stats._Segment, "by_thread", disturbed)
        assert (await read_sa_counters(server.path)).of_sa(0) == SaTraffic(1, 100, {})
        assert moves == []

    with_standin(story)


def test_nobody_on_the_socket_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(VppUnavailable, match=r"stats\.sock cannot be read: No such file or directory; is `statseg`"):
        asyncio.run(read_sa_counters(str(tmp_path / "stats.sock")))


def test_a_vpp_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "STATS_TIMEOUT_S", 0.05)
    path = str(tmp_path / "stats.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        with pytest.raises(VppUnavailable, match="does not answer"):
            asyncio.run(read_sa_counters(path))


def segment_of(version: int = 2, directory: int = BASE + 4096, length: int = 1, pointer: int = 0) -> bytes:
    """Return a segment with one entry, the SAs' combined counter."""
    head = struct.pack("@QQQQQ", version, BASE, 1, 0, directory).ljust(4088, b"\0")
    entry = struct.pack("@IQ128s", 3, pointer, b"/net/ipsec/sa")
    return (head + struct.pack("@II", length, 0) + entry).ljust(8192, b"\0")


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (b"", VppIncompatible, "is not a stats segment"),
        (b"short", VppIncompatible, "too short"),
        (segment_of(version=3), VppIncompatible, "layout 3"),
        (segment_of(directory=BASE - 1), VppUnavailable, "all the time"),
        (segment_of(directory=BASE + 8193), VppUnavailable, "all the time"),
        (segment_of(directory=1 << 63), VppUnavailable, "all the time"),
        (segment_of(length=0xFFFFFFFF), VppUnavailable, "all the time"),
        (segment_of(pointer=BASE + 16), VppUnavailable, "all the time"),
        (segment_of(pointer=BASE + 4096), VppUnavailable, "all the time"),
    ],
)
def test_a_segment_that_makes_no_sense_is_refused_not_believed(
    content: bytes, error: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats, "MAX_READ_TRIES", 2)

    async def story(standin: StandIn, server: StatsServer) -> None:
        os.ftruncate(server.segment.fd, 0)
        os.pwrite(server.segment.fd, content, 0)
        with pytest.raises(error, match=says):
            await read_sa_counters(server.path)
        os.ftruncate(server.segment.fd, mmap.PAGESIZE)

    with_standin(story)


def test_an_empty_counter_is_no_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(standin: StandIn, server: StatsServer) -> None:
        os.ftruncate(server.segment.fd, 0)
        os.pwrite(server.segment.fd, segment_of(), 0)
        assert (await read_sa_counters(server.path)).of_sa(0) is None

    with_standin(story)


def dropped(number: int, is_add: bool = True) -> RouteAddDel:
    return RouteAddDel(NO_INDEX, Prefix(bytes((10, number, 0, 0)), 16), 0, is_add)


@pytest.mark.parametrize("threads", [1, 3])
def test_packets_of_routes_are_summed_over_threads_in_the_order_asked_for(threads: int) -> None:
    async def story(standin: StandIn, server: StatsServer) -> None:
        client = await connect(standin.api_socket)
        indices = [reply.value for reply in await client.run([dropped(number) for number in range(200)])]
        assert await read_route_packets(server.path, indices) == [0] * 200
        for thread in range(threads):
            server.segment.count_route(indices[7], 2, 100, thread)
            server.segment.count_route(indices[150], 1 + thread, 50, thread)
        asked = [indices[150], 1_000_000, indices[7], indices[8]]
        assert await read_route_packets(server.path, asked) == [sum(range(threads + 1)), 0, 2 * threads, 0]
        assert await read_route_packets(server.path, []) == []
        changed, _, added = await client.run([dropped(7), dropped(7, False), dropped(201)])
        assert changed.value == added.value == indices[7]  # the counter of a route that went is given anew
        assert await read_route_packets(server.path, [added.value]) == [0]
        late = StatsServer(standin.world, server.path + "2")
        late.start()
        assert await read_route_packets(late.path, indices) == [0] * 200
        late.stop()
        await client.close()

    with_standin(story, threads)


def test_packets_of_routes_are_found_behind_names_that_end_alike() -> None:
    async def story(standin: StandIn, server: StatsServer) -> None:
        server.segment._validate("/of/net/route/to", 9)
        client = await connect(standin.api_socket)
        (reply,) = await client.run([dropped(1)])
        server.segment.count_route(reply.value, 5)
        assert await read_route_packets(server.path, [reply.value]) == [5]
        await client.close()

    with_standin(story)


def test_segment_refuses_what_it_has_no_room_for() -> None:
    segment = StatsSegment()
    with pytest.raises(MemoryError, match="full"):
        segment.start(1_000_000)
    segment.close()


@pytest.mark.vpp
@pytest.mark.skipif(vpp_binary() is None, reason="VPP_BIN does not name a VPP")
def test_a_real_vpps_counters_are_read_and_are_those_that_papi_reads() -> None:
    async def run(box: VppBox) -> None:
        path = str(box.dir / "stats.sock")
        assert (await read_sa_counters(path)).of_sa(0) is None
        client = await connect(box.api_socket, also=SETUP_CALLS)
        await make_loopback(client, "192.0.2.1/24")
        replies = await client.run([SadEntryAdd(number, inbound(number)) for number in range(1, 301)])
        counters = await read_sa_counters(path)
        assert all(counters.of_sa(reply.value) == NOTHING for reply in replies)
        theirs = VPPStats(path)
        await asyncio.to_thread(theirs.connect)
        errors = {name.rpartition("/")[2] for name in theirs.ls("/net/ipsec/sa/err/")}
        assert errors == set(SA_ERRORS)
        assert len(theirs["/net/ipsec/sa"][0]) >= 300
        await client.run([AclAddReplace(NO_INDEX, "tag", rules(number % 5)) for number in range(300)])
        wanted = {number: [number % 5] for number in range(300)}
        assert await read_acl_matches(path, {**wanted, 300: [0]}) == dict.fromkeys(wanted, 0)
        assert set(theirs.ls("/acl/")) == {f"/acl/{number}/matches" for number in wanted}
        assert {len(theirs[name][0]) for name in theirs.ls("/acl/")} == {2, 3, 4, 5, 6}
        added = [reply.value for reply in await client.run([dropped(number) for number in range(100)])]
        assert len(set(added)) == 100
        assert len(theirs["/net/route/to"][0]) > max(added)
        assert await read_route_packets(path, added) == [0] * 100
        changed, _, again = await client.run([dropped(7), dropped(7, False), dropped(201)])
        assert changed.value == again.value == added[7]
        theirs.disconnect()
        await client.close()

    with VppBox() as box:
        asyncio.run(run(box))
