"""The engine asks for the SAs of what a stand-in counts as dropped, and sends no request more for tunnels that are up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

from support.build import LOCAL6, REMOTE6, make_policy, make_sa, sa_in, sa_out
from support.fake_routes import FakeRoutes
from support.recorded import PATIENCE_S
from support.rig import Rig, rig
from vppipsec.kernel.text import parse_addr
from vppipsec.kernel.xfrm.values import Algorithm
from vppipsec.sync.ike.acquire import COUNTER_POLL_S
from vppstandin.fib import Net, TableKey
from vppstandin.stats import StatsServer


@dataclass
class Counting:
    """A rig whose stand-in counts what the test says that it drops."""

    rig: Rig
    stats: StatsServer
    routes: FakeRoutes

    def fibs(self) -> Iterator[tuple[int, TableKey, Net]]:
        """Yield the routes of our source that drop: stats_index, table and prefix."""
        assert self.rig.standin is not None
        source = self.rig.engine.vpp.route_source
        for key, fib in self.rig.standin.world.fibs.items():
            for net, paths in fib.of_source(source):
                if all(path.kind == 2 for path in paths):
                    yield fib.entries[net].stats_index, key, net

    def drop(self, prefix: str, packets: int = 1) -> None:
        """Let VPP count packets that it drops, which it does by one route."""
        address, length = prefix.split("/")
        (index,) = [index for index, _, net in self.fibs() if net == Net(parse_addr(address), int(length))]
        self.stats.segment.count_route(index, packets)

    async def look(self) -> None:
        """Let time pass in which the counters are looked at twice, and see that they have been where a tunnel waits."""
        acquires = self.rig.engine.acquires
        read, reads = acquires._read_packets, 0

        async def counted(indices: Sequence[int]) -> Sequence[int]:
            nonlocal reads
            found = await read(indices)
            reads += 1
            return found

        acquires._read_packets = counted
        await asyncio.sleep(2.5 * COUNTER_POLL_S)
        async with asyncio.timeout(PATIENCE_S):
            while acquires._waiting and reads < 2:  # noqa: ASYNC110  # nothing tells of it
                await asyncio.sleep(0.01)
        acquires._read_packets = read

    async def until_asked(self, number: int) -> None:
        """Wait until so many ACQUIREs were raised."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.rig.kernel.acquired) < number:  # noqa: ASYNC110  # a list has no event
                await asyncio.sleep(0.01)


def tell(story: Callable[[Counting], Awaitable[None]]) -> None:
    async def run() -> None:
        routes = FakeRoutes()
        async with asyncio.timeout(PATIENCE_S), rig("standin", routes=routes) as made:
            assert made.standin is not None
            stats = StatsServer(made.standin.world, made.settings.vpp.stats_socket)
            stats.start()
            with contextlib.ExitStack() as stack:
                stack.callback(stats.stop)
                await story(Counting(made, stats, routes))

    asyncio.run(run())


def test_tunnel_that_a_packet_asks_for_comes_up_and_goes_as_any() -> None:
    async def story(made: Counting) -> None:
        kernel = made.rig.kernel
        policy = make_policy()
        kernel.add(policy)
        made.rig.start()
        await made.rig.settle()
        await made.look()
        assert kernel.acquired == []
        made.drop("10.2.0.0/24", 3)
        await made.until_asked(1)
        assert kernel.acquired == [policy]
        assert made.rig.engine.counters.acquires == 1
        kernel.add(sa_in(1), sa_out(2))
        await made.rig.settle()
        assert list(made.fibs()) == []
        kernel.delete(sa_out(2), sa_in(1))
        await made.rig.settle()
        assert len(list(made.fibs())) == 1
        kernel.delete(policy)
        await made.rig.settle()
        assert list(made.fibs()) == []
        assert kernel.acquired == [policy]

    tell(story)


def test_only_dropped_packets_raise_an_acquire_in_both_families() -> None:
    async def story(made: Counting) -> None:
        kernel = made.rig.kernel
        six = make_policy(src="fd01::/64", dst="fd02::/64", reqid=2, ends=(LOCAL6, REMOTE6))
        host = make_policy(src="0.0.0.0/0", dst="10.4.0.9/32", reqid=3)
        kernel.add(make_policy(), six, host, make_policy(dst="10.5.0.0/24", reqid=4))
        made.rig.start()
        await made.rig.settle()
        assert len(list(made.fibs())) == 4
        await made.look()
        made.drop("fd02::/64")
        await made.until_asked(1)
        made.drop("10.4.0.9/32")
        await made.until_asked(2)
        await made.look()
        assert kernel.acquired == [six, host]

    tell(story)


def test_a_vti_s_child_is_asked_for_when_its_route_drops() -> None:
    async def story(made: Counting) -> None:
        child = make_policy(src="0.0.0.0/0", dst="0.0.0.0/0", if_id=7)
        narrow = make_policy(src="0.0.0.0/0", dst="10.7.1.0/24", reqid=2, if_id=7, priority=900)
        made.routes.link("vti7", 7)
        made.routes.add("10.7.0.0/16", "vti7")
        made.rig.kernel.add(child, narrow)
        made.rig.start()
        await made.rig.settle()
        await made.look()
        made.drop("10.7.0.0/16")
        await made.until_asked(1)
        made.drop("10.7.1.0/24")
        await made.until_asked(2)
        assert made.rig.kernel.acquired == [child, narrow]

    tell(story)


def test_route_over_two_vtis_raises_acquires_for_both() -> None:
    async def story(made: Counting) -> None:
        children = [make_policy(src="0.0.0.0/0", dst="0.0.0.0/0", reqid=number, if_id=number) for number in (7, 8)]
        for number in (7, 8):
            made.routes.link(f"vti{number}", number)
        made.routes.add("10.7.0.0/16", "vti7", "vti8")
        made.rig.kernel.add(*children)
        made.rig.start()
        await made.rig.settle()
        await made.look()
        made.drop("10.7.0.0/16")
        await made.until_asked(2)
        assert made.rig.kernel.acquired == children
        made.rig.kernel.add(sa_in(1, reqid=7, if_id=7), sa_out(2, reqid=7, if_id=7))
        await made.rig.settle()
        assert list(made.fibs()) == []  # what was the other's share goes there as well

    tell(story)


def test_what_vpp_cannot_carry_or_reach_or_shall_drop_is_not_asked_for() -> None:
    async def story(made: Counting) -> None:
        kernel = made.rig.kernel
        unknown = Algorithm("cbc(camellia)", bytes(16))
        kernel.add(
            make_policy(reqid=2, dst="10.3.0.0/24"),
            make_sa(3, reqid=2, aead=None, crypt=unknown),
            make_policy(reqid=3, dst="10.4.0.0/24", ends=(parse_addr("198.51.100.1"), parse_addr("198.51.100.2"))),
            make_policy(reqid=4, dst="10.5.0.0/24", ends=(parse_addr("192.0.2.1"), parse_addr("203.0.113.9"))),
            make_policy(reqid=5, dst="10.6.0.0/24", action=1),
        )
        made.rig.start()
        await made.rig.settle()
        assert list(made.fibs()) == []
        await made.look()
        assert made.rig.engine.acquires._waiting == set()

    tell(story)


def test_service_that_comes_back_knows_the_counters_of_what_it_finds() -> None:
    async def story(made: Counting) -> None:
        policy = make_policy()
        made.rig.kernel.add(policy)
        made.rig.start()
        await made.rig.settle()
        await made.look()
        made.drop("10.2.0.0/24", 100)
        await made.until_asked(1)
        await made.rig.restart_engine()
        await made.rig.settle()
        await made.look()
        assert made.rig.kernel.acquired == [policy]
        made.drop("10.2.0.0/24")
        await made.until_asked(2)

    tell(story)


def test_tunnels_whose_sas_are_there_cost_no_request_more() -> None:
    async def story(made: Counting) -> None:
        assert made.rig.standin is not None
        tunnels = 20
        for number in range(1, tunnels + 1):
            made.rig.kernel.add(
                make_policy(dst=f"10.2.{number}.0/24", reqid=number),
                sa_in(2 * number, reqid=number),
                sa_out(2 * number + 1, reqid=number),
            )
        made.rig.start()
        await made.rig.settle()
        assert made.rig.standin.requests.count("ip_route_add_del_v2") == tunnels
        before = len(made.rig.standin.requests)
        await made.look()
        asked = made.rig.standin.requests[before:]
        assert "ip_route_add_del_v2" not in asked

    tell(story)
