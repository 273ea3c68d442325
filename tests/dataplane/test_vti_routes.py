"""Packets along the kernel's routes over VTIs, on the wires of a real VPP: encrypted where a route says so, else in clear."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.ipsec import ESP
from scapy.packet import Packet, Raw
from test_esp import CASES, SPI_OUT, Case, kernel_sa, scapy_sa

from build import make_policy
from fakeroutes import FakeRoutes
from kernel import FakeKernel
from netns import in_new_netns
from vppbox import vpp_binary
from vppipsec.conf.settings import NetlinkSettings, Settings, VppSettings
from vppipsec.sync.acquires import LOOK_S
from vppipsec.sync.engine import Engine
from vppipsec.xfrm.values import Policy, PolicyDir, Sa
from wire import HOST, PEER, Router, router

pytestmark = [pytest.mark.vpp, pytest.mark.skipif(vpp_binary() is None, reason="VPP_BIN does not name a VPP")]

GCM: Case = CASES[0]
FLOWS = 40
"""So many that both tunnels of a route get some."""


@dataclass
class Story:
    """What a test works with."""

    wires: Router
    kernel: FakeKernel
    routes: FakeRoutes
    engine: Engine

    async def settle(self) -> None:
        """Wait until all that the kernel said is in VPP."""
        async with asyncio.timeout(20):
            while self.kernel.pending or self.routes.pending:  # noqa: ASYNC110  # a queue has no event for being empty
                await asyncio.sleep(0.001)
            await self.engine.wait_in_sync()

    def send(self, dst: str, sport: int = 1000) -> Packet | None:
        """Send a packet of the LAN host, and return what VPP makes of it on the WAN, None where it makes nothing."""
        self.wires.lan.send(packet(HOST, dst, sport))
        return self.wires.wan.receive(lambda seen: isinstance(seen, IP) and (ESP in seen or seen.dst == dst), 0.5)


def packet(src: str, dst: str, sport: int = 1000) -> Packet:
    return IP(bytes(IP(src=src, dst=dst) / UDP(sport=sport, dport=2000) / Raw(b"a secret")))


def child(number: int, if_id: int, remote: str = "0.0.0.0/0") -> list[Sa | Policy]:
    """Return the SAs and policies of a VTI's child; `number` tells its SPIs and its reqid from others'."""
    sas = [kernel_sa(GCM, inbound) for inbound in (True, False)]
    ways = {
        PolicyDir.OUT: ("0.0.0.0/0", remote),
        PolicyDir.IN: (remote, "0.0.0.0/0"),
        PolicyDir.FWD: (remote, "0.0.0.0/0"),
    }
    return [
        *(sa._replace(spi=sa.spi + number - 1, reqid=number, if_id=if_id) for sa in sas),
        *(make_policy(way, *ends, reqid=number, if_id=if_id) for way, ends in ways.items()),
    ]


@contextlib.asynccontextmanager
async def story() -> AsyncIterator[Story]:
    async with router() as wires:
        await wires.cli(f"ip route add 0.0.0.0/0 via {PEER} host-wan0")
        vpp = VppSettings(api_socket=wires.box.api_socket, stats_socket=str(wires.box.dir / "stats.sock"))
        settings = Settings(vpp=vpp, netlink=NetlinkSettings(batch_delay_ms=0))
        kernel, routes = FakeKernel(), FakeRoutes()
        engine = Engine(settings, kernel, routes=routes)
        work = asyncio.create_task(engine.run())
        try:
            yield Story(wires, kernel, routes, engine)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


def play(tell: Callable[[Story], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), story() as made:
            await tell(made)

    in_new_netns(lambda: asyncio.run(run()))


def test_what_is_routed_over_a_vti_leaves_encrypted_and_all_else_does_not() -> None:
    async def tell(made: Story) -> None:
        inbound, outbound, *policies = child(1, 7)
        assert isinstance(inbound, Sa)
        assert isinstance(outbound, Sa)
        made.kernel.add(inbound, outbound, *policies)
        made.routes.link("vti7", 7)
        await made.settle()
        in_clear = made.send("10.2.0.9")
        assert in_clear is not None
        assert ESP not in in_clear, "a policy of a VTI does nothing by itself, though it is for everything"

        made.routes.add("10.2.0.0/16", "vti7")
        await made.settle()
        reader, writer = scapy_sa(GCM, outbound), scapy_sa(GCM, inbound)
        for number in (1, 2):
            seen = made.send("10.2.0.9")
            assert seen is not None, await made.wires.cli("show error")
            assert (seen.dst, seen[ESP].spi, seen[ESP].seq) == (PEER, outbound.spi, number)
            inner = reader.decrypt(seen)
            assert (inner.src, inner.dst, inner[UDP].payload.load) == (HOST, "10.2.0.9", b"a secret")
            made.wires.wan.send(writer.encrypt(packet("10.2.0.9", HOST)))
            back = made.wires.lan.receive(lambda found: isinstance(found, IP) and found.dst == HOST)
            assert back is not None, await made.wires.cli("show error")
            assert (back.src, back[UDP].payload.load) == ("10.2.0.9", b"a secret")
        elsewhere = made.send("10.3.0.9")
        assert elsewhere is not None
        assert ESP not in elsewhere

        made.kernel.delete(inbound, outbound)
        await made.settle()
        assert made.send("10.2.0.9") is None, "the route is still there, and its tunnel is not"
        made.routes.delete("10.2.0.0/16")
        await made.settle()
        again = made.send("10.2.0.9")
        assert again is not None
        assert ESP not in again

    play(tell)


def test_two_vtis_share_the_flows_of_a_route() -> None:
    async def tell(made: Story) -> None:
        made.kernel.add(*child(1, 7), *child(2, 8))
        made.routes.link("vti7", 7)
        made.routes.link("vti8", 8)
        made.routes.add("10.2.0.0/16", "vti7", "vti8")
        await made.settle()
        spis = set()
        for sport in range(1000, 1000 + FLOWS):
            seen = made.send("10.2.0.9", sport)
            assert seen is not None
            assert ESP in seen
            spis.add(seen[ESP].spi)
        assert spis == {SPI_OUT, SPI_OUT + 1}

        made.kernel.delete(*child(1, 7))
        await made.settle()
        for sport in range(1000, 1000 + FLOWS):
            seen = made.send("10.2.0.9", sport)
            assert seen is not None
            assert seen[ESP].spi == SPI_OUT + 1

    play(tell)


def test_children_of_a_vti_take_what_is_theirs() -> None:
    async def tell(made: Story) -> None:
        made.kernel.add(*child(1, 7, "10.2.1.0/24"), *child(2, 7, "10.2.2.0/24"))
        made.routes.link("vti7", 7)
        made.routes.add("10.2.0.0/16", "vti7")
        await made.settle()
        for dst, spi in (("10.2.1.9", SPI_OUT), ("10.2.2.9", SPI_OUT + 1)):
            seen = made.send(dst)
            assert seen is not None
            assert seen[ESP].spi == spi
        assert made.send("10.2.3.9") is None, "it goes into the VTI, and no child takes it"

    play(tell)


def test_what_is_routed_over_a_vti_without_a_tunnel_raises_an_acquire() -> None:
    async def tell(made: Story) -> None:
        policies = [item for item in child(1, 7) if isinstance(item, Policy)]
        made.kernel.add(*policies)
        made.routes.link("vti7", 7)
        made.routes.add("10.2.0.0/16", "vti7")
        await made.settle()
        assert made.send("10.3.0.9") is not None
        await asyncio.sleep(2 * LOOK_S)
        assert made.kernel.acquired == []
        assert made.send("10.2.0.9") is None
        async with asyncio.timeout(20):
            while not made.kernel.acquired:  # noqa: ASYNC110  # a list has no event
                await asyncio.sleep(0.01)
        assert made.kernel.acquired == [policy for policy in policies if policy.direction == PolicyDir.OUT]

    play(tell)
