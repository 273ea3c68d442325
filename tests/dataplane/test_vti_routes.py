"""Packets along the kernel's routes over VTIs, on the wires of a real VPP: encrypted where a route says so, else in clear."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import NamedTuple

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.ipsec import ESP
from scapy.packet import Packet, Raw

from support.build import make_policy
from support.esp import CASES, SPI_OUT, Case, kernel_sa, scapy_sa
from support.fake_kernel import FakeKernel
from support.fake_routes import FakeRoutes
from support.netns import in_new_netns
from support.recorded import PATIENCE_S
from support.vpp_box import vpp_binary
from support.wire import HOST, HOST6, PEER, Router, router
from vppipsec.conf.settings import NetlinkSettings, Settings, VppSettings
from vppipsec.kernel.route.wire import KernelPath
from vppipsec.kernel.xfrm.values import Policy, PolicyDir, Sa
from vppipsec.sync.engine import Engine
from vppipsec.sync.ike.acquire import COUNTER_POLL_S
from vppipsec.vpp import inventory
from vppipsec.vpp.api.client import VppClient

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
        async with asyncio.timeout(PATIENCE_S):
            while self.kernel.pending or self.routes.pending:  # noqa: ASYNC110  # a queue has no event for being empty
                await asyncio.sleep(0.001)
            await self.engine.wait_in_sync()

    def send(self, dst: str, sport: int = 1000) -> Packet | None:
        """Send a packet of the LAN host, and return what VPP makes of it on the WAN, None where it makes nothing."""
        return self.ask(packet(HOST, dst, sport))

    def ask(self, sent: Packet) -> Packet | None:
        """Do so with any packet from the LAN."""
        self.wires.lan.send(sent)
        return self.wires.wan.receive(
            lambda seen: isinstance(seen, IP | IPv6) and (ESP in seen or seen.dst == sent.dst), 0.5
        )


def packet(src: str, dst: str, sport: int = 1000) -> Packet:
    return IP(bytes(IP(src=src, dst=dst) / UDP(sport=sport, dport=2000) / Raw(b"a secret")))


def child(number: int, if_id: int, remote: str = "0.0.0.0/0") -> list[Sa | Policy]:
    """Return the SAs and policies of a VTI's child; `number` tells its SPIs and its reqid from others'."""
    sas = [kernel_sa(GCM, inbound) for inbound in (True, False)]
    next_hops = {
        PolicyDir.OUT: ("0.0.0.0/0", remote),
        PolicyDir.IN: (remote, "0.0.0.0/0"),
        PolicyDir.FWD: (remote, "0.0.0.0/0"),
    }
    return [
        *(sa._replace(spi=sa.spi + number - 1, reqid=number, if_id=if_id) for sa in sas),
        *(make_policy(way, *ends, reqid=number, if_id=if_id) for way, ends in next_hops.items()),
    ]


class Takes(NamedTuple):
    """What a child takes, of either family."""

    src: str
    dst: str
    proto: int = 0
    dport: int = 0


def selected(number: int, if_id: int, what: Takes, priority: int) -> list[Sa | Policy]:
    """Do so for a child whose outbound policy selects so much, and lets everything in."""
    sas, policies = child(number, if_id)[:2], child(number, if_id)[2:]
    (out,) = (policy for policy in policies if isinstance(policy, Policy) and policy.direction == PolicyDir.OUT)
    wide = make_policy(PolicyDir.OUT, what.src, what.dst, reqid=number, if_id=if_id, priority=priority)
    mask = 0xFFFF if what.dport else 0
    selector = replace(wide.selector, proto=what.proto, dport=what.dport, dport_mask=mask)
    return [*sas, replace(wide, selector=selector), *(policy for policy in policies if policy is not out)]


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
        async with asyncio.timeout(PATIENCE_S), story() as made:
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


def told(seen: Packet | None) -> str:
    """Return what became of a packet: the SPI that it left with, `clear`, or `drop`."""
    if seen is None:
        return "drop"
    return f"{seen[ESP].spi:#x}" if ESP in seen else "clear"


def test_vti_children_are_selected_by_all_selectors() -> None:
    where = {
        1: Takes("10.1.0.0/24", "10.2.0.0/16"),
        2: Takes("10.1.0.2/32", "10.2.0.0/16", 17, 2000),
        3: Takes("0.0.0.0/0", "10.2.8.0/24", 1),
    }

    async def tell(made: Story) -> None:
        made.routes.link("vti7", 7)
        made.routes.add("10.0.0.0/8", "vti7")
        made.routes.add("fd00::/8", "vti7")
        made.kernel.add(*selected(1, 7, where[1], 3), *selected(2, 7, where[2], 2), *selected(3, 7, where[3], 1))
        made.kernel.add(*selected(4, 7, Takes("fd01::/64", "fd02::/64"), 4))
        await made.settle()
        one, two, three, four = (f"{SPI_OUT + number:#x}" for number in range(4))
        seen = made.send("10.2.0.9")
        assert told(seen) == two
        assert seen is not None
        (sa,) = (sa for sa in made.kernel.sas.values() if sa.spi == SPI_OUT + 1)
        inner = scapy_sa(GCM, sa).decrypt(seen)
        assert (inner.ttl, inner[UDP].payload.load) == (63, b"a secret"), "it was forwarded once"
        assert told(made.ask(IP(src=HOST, dst="10.2.0.9") / UDP(sport=1000, dport=2001))) == one
        assert told(made.ask(IP(src="10.1.0.3", dst="10.2.0.9") / UDP(sport=1000, dport=2000))) == one
        assert told(made.ask(IP(src=HOST, dst="10.2.0.9") / TCP(sport=1000, dport=2000))) == one
        assert told(made.ask(IP(src=HOST, dst="10.2.8.9") / ICMP())) == three
        assert told(made.ask(IP(src="10.7.0.3", dst="10.2.8.9") / ICMP())) == three
        assert told(made.ask(IP(src="10.7.0.3", dst="10.2.8.9") / UDP())) == "drop", "no child takes it"
        assert told(made.ask(IP(src=HOST, dst="10.3.0.9") / UDP())) == "drop"
        assert told(made.ask(IP(src=HOST, dst="198.51.100.1") / UDP())) == "clear", "it is not routed over the VTI"
        assert told(made.ask(IPv6(src=HOST6, dst="fd02::9") / UDP())) == four
        assert told(made.ask(IPv6(src="fd77::9", dst="fd02::9") / UDP())) == "drop"

        made.kernel.delete(*selected(2, 7, where[2], 2)[:2])
        await made.settle()
        assert told(made.send("10.2.0.9")) == "drop", "its SA is not there, and it is nobody else's"
        made.kernel.delete(*selected(2, 7, where[2], 2)[2:])
        await made.settle()
        assert told(made.send("10.2.0.9")) == one

    play(tell)


def test_route_over_a_vti_and_another_link_is_shared_as_in_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, link = inventory.read_interfaces, 77

    async def with_link(client: VppClient) -> inventory.InterfaceIndexes:
        """Pretend that linux-cp gives the kernel the WAN: the VPP of this machine may not be able to."""
        found = await read(client)
        return replace(found, links={link: found.up[-1]})

    monkeypatch.setattr(inventory, "read_interfaces", with_link)

    async def tell(made: Story) -> None:
        made.kernel.add(*child(1, 7))
        made.routes.link("wan", ifindex=link)
        made.routes.link("vti7", 7)
        made.routes.add("10.2.0.0/16", "vti7", KernelPath(link, ip_address(PEER).packed))
        await made.settle()
        flows = {sport: told(made.send("10.2.0.9", sport)) for sport in range(1000, 1000 + FLOWS)}
        assert set(flows.values()) == {f"{SPI_OUT:#x}", "clear"}
        made.kernel.delete(*child(1, 7)[:2])
        await made.settle()
        after = {sport: told(made.send("10.2.0.9", sport)) for sport in range(1000, 1000 + FLOWS)}
        assert after == {sport: "clear" if way == "clear" else "drop" for sport, way in flows.items()}

    play(tell)


def test_what_is_routed_over_a_vti_without_a_tunnel_raises_an_acquire() -> None:
    async def tell(made: Story) -> None:
        policies = [item for item in child(1, 7) if isinstance(item, Policy)]
        made.kernel.add(*policies)
        made.routes.link("vti7", 7)
        made.routes.add("10.2.0.0/16", "vti7")
        await made.settle()
        assert made.send("10.3.0.9") is not None
        await asyncio.sleep(2 * COUNTER_POLL_S)
        assert made.kernel.acquired == []
        assert made.send("10.2.0.9") is None
        async with asyncio.timeout(PATIENCE_S):
            while not made.kernel.acquired:  # noqa: ASYNC110  # a list has no event
                await asyncio.sleep(0.01)
        assert made.kernel.acquired == [policy for policy in policies if policy.direction == PolicyDir.OUT]

    play(tell)
