"""Transport mode on the wire: gre and ipip interfaces of VPP's send with the kernel's SAs, or not at all. The peer is scapy."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import pytest
from scapy.layers.inet import GRE, IP
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet

from support.build import LOCAL, LOCAL6, REMOTE, REMOTE6, host_policies
from support.gateway import CLEAR, DROP, LAN, WAN_ADDRESS, Gateway, Stream, Tunnel, bypass, parse, tell, udp
from support.vpp_box import vpp_binary
from support.wire import HOST, PEER
from vppipsec.kernel.text import format_addr
from vppipsec.kernel.xfrm.values import Policy, Sa
from vppipsec.status.summary import sa_view

pytestmark = [pytest.mark.vpp, pytest.mark.skipif(vpp_binary() is None, reason="VPP_BIN does not name a VPP")]

FAR = "10.2.0.9"
BEHIND = udp(FAR)
"""What the LAN sends through the interface."""
ANSWER = udp(HOST, src=FAR)
_UNDER = IP(src=PEER, dst=WAN_ADDRESS)


@dataclass(frozen=True)
class Kind:
    """A kind of interface: VPP's command and name for it, and the protocol of its packets."""

    name: str
    proto: int
    command: str = "create {name} tunnel src {src} dst {dst}{more}"
    ends: tuple[bytes, bytes] = (LOCAL, REMOTE)
    more: str = ""

    @property
    def interface(self) -> str:
        return f"{self.name}0"

    async def make(self, site: Gateway) -> None:
        """Make the interface as others do, with a route through it."""
        src, dst = map(format_addr, self.ends)
        assert (await site.wires.cli(self.command.format(name=self.name, src=src, dst=dst, more=self.more))).strip()
        for line in (
            f"set interface state {self.interface} up",
            f"set interface ip address {self.interface} 10.9.0.1/30",
            f"ip route add 10.2.0.0/24 via {self.interface}",
        ):
            assert not await site.wires.cli(line)

    async def remove(self, site: Gateway) -> None:
        await site.wires.cli(f"ip route del 10.2.0.0/24 via {self.interface}")
        if self.name == "ipip":
            index = (await site.wires.cli("show ipip tunnel")).split("sw-if-idx ")[1].split()[0]
            await site.wires.cli(f"delete ipip tunnel sw_if_index {index}")
        else:
            src, dst = map(format_addr, self.ends)
            await site.wires.cli(self.command.format(name="gre", src=src, dst=dst, more=" del"))

    def wrap(self, packet: Packet) -> Packet:
        """Return a packet as the peer's interface sends it."""
        local, remote = map(format_addr, self.ends)
        outer = IPv6(src=remote, dst=local) if ":" in local else IP(src=remote, dst=local)
        return parse(bytes(outer / GRE() / packet if self.name == "gre" else outer / packet))


GRE_, IPIP = Kind("gre", 47), Kind("ipip", 4)
KINDS = (GRE_, IPIP, replace(GRE_, ends=(LOCAL6, REMOTE6)), replace(IPIP, ends=(LOCAL6, REMOTE6)))


@dataclass(frozen=True)
class Transport(Tunnel):
    """A pair of SAs in transport mode, with policies for one protocol between the two hosts."""

    def pair(self, generation: int = 0) -> tuple[Sa, Sa]:
        inbound, outbound = super().pair(generation)
        return inbound._replace(mode=0), outbound._replace(mode=0)

    def policies(self, proto: int) -> tuple[Policy, ...]:
        """Return the policies for a protocol between the two hosts."""
        return host_policies(proto, self.reqid, self.ends)


def each(story: Callable[[Gateway, Kind], Awaitable[None]], kind: Kind) -> None:
    async def run(site: Gateway) -> None:
        if kind.name == "gre" and not site.wires.box.has_plugin("gre"):
            pytest.skip("this VPP lacks the gre plugin")
        await story(site, kind)

    tell(run)


async def brought(site: Gateway, kind: Kind, sa: Sa | None, *packets: Packet) -> list[str]:
    """Send packets from the peer, encrypted or in clear, and tell what becomes of each."""
    wrap = kind.wrap if sa is None else lambda packet: site.kernel.reads[sa.spi][1].encrypt(kind.wrap(packet))
    return await site._fates(site.wires.wan, packets, wrap)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.name} {format_addr(kind.ends[0])}")
def test_both_ways_through_sas_in_transport_mode_and_never_in_clear(kind: Kind) -> None:
    async def story(site: Gateway, kind: Kind) -> None:
        one = Transport(ends=kind.ends)
        inbound, outbound = one.pair()
        await kind.make(site)
        await site.settle()
        assert await site.fates(BEHIND) == [CLEAR]
        await site.have(*one.policies(kind.proto))
        assert await site.fates(BEHIND) == [DROP]
        await site.have(inbound, outbound)
        assert await site.fates(BEHIND) == [one.name]
        assert await brought(site, kind, inbound, ANSWER) == [LAN]
        assert await brought(site, kind, None, ANSWER) == [DROP]
        assert [row["tunnel"] for row in sa_view(site.engine)] == [kind.interface] * 2
        await site.lose(inbound, outbound)
        assert await site.fates(BEHIND) == [DROP]
        await site.have(*one.pair(1))
        assert await site.fates(BEHIND) == [one.name]
        assert await brought(site, kind, one.pair(1)[0], ANSWER) == [LAN]
        assert site.wires.box.alive

    each(story, kind)


def test_a_rekey_loses_nothing() -> None:
    async def story(site: Gateway, kind: Kind) -> None:
        one = Transport()
        await kind.make(site)
        await site.have(*one.policies(kind.proto), *one.pair())
        stream = Stream(site, BEHIND)
        stream.start()
        await stream.go_on()
        for generation in (1, 2):
            await site.have(*one.pair(generation))
            await stream.go_on()
            await site.lose(*one.pair(generation - 1)[::-1])
        await stream.go_on()
        seen = await stream.end()
        assert [it.number for it in seen] == list(range(stream.sent))
        assert {it.outcome for it in seen} == {one.name}
        assert {it.spi for it in seen} == {one.pair(generation)[1].spi for generation in (0, 1, 2)}
        await site.have(*one.pair(3))
        for generation in (2, 3):  # until the old one is deleted the peer may send with it
            assert await brought(site, kind, one.pair(generation)[0], ANSWER) == [LAN]

    each(story, IPIP)


@pytest.mark.parametrize("kind", KINDS[:2], ids=lambda kind: kind.name)
def test_an_interface_that_comes_late_or_again_is_protected(kind: Kind) -> None:
    async def story(site: Gateway, kind: Kind) -> None:
        one = Transport()
        await site.have(*one.policies(kind.proto), *one.pair())
        assert "no gre or ipip interface between these hosts" in sa_view(site.engine)[0]["reason"]
        for _ in range(2):
            await kind.make(site)
            await site.settle_for(lambda: bool(site.engine.environment.gre_ipip))
            assert await site.fates(BEHIND) == [one.name]
            (inbound,) = [sa for sa in site.kernel.sas.values() if sa.daddr == LOCAL]  # rekeyed: VPP had sent before
            assert await brought(site, kind, inbound, ANSWER) == [LAN]
            await kind.remove(site)
            await site.settle_for(lambda: not site.engine.environment.gre_ipip)
            assert site.wires.box.alive
            assert not site.engine.vpp.gre_ipip
        assert not site.wires.box.cli("show ipsec sa").strip()

    each(story, kind)


def test_a_service_that_comes_back_adopts_what_protects_an_interface() -> None:
    async def story(site: Gateway, kind: Kind) -> None:
        one = Transport()
        await kind.make(site)
        await site.have(*one.policies(kind.proto), *one.pair())
        before = await site.wires.cli("show ipsec protect")
        stream = Stream(site, BEHIND)
        stream.start()
        await stream.go_on()
        await site.kill()
        await stream.go_on()
        site.start()
        await site.settle()
        await stream.go_on()
        seen = await stream.end()
        assert [(it.number, it.outcome) for it in seen] == [(number, one.name) for number in range(stream.sent)]
        assert [it.seq for it in seen] == sorted({it.seq for it in seen})
        assert await site.wires.cli("show ipsec protect") == before

    each(story, IPIP)


def test_restarted_service_blocks_what_other_policies_now_cover() -> None:
    async def story(site: Gateway, kind: Kind) -> None:
        one, other = Transport(), Transport(2)
        await kind.make(site)
        await site.have(*one.policies(kind.proto), *one.pair())
        await site.kill()
        site.kernel.delete(*one.policies(kind.proto), *one.pair())
        site.kernel.add(*other.policies(kind.proto))
        site.start()
        await site.settle()
        assert await site.fates(BEHIND) == [DROP]
        await site.have(*other.pair())
        assert await site.fates(BEHIND) == [other.name]
        assert len(site.engine.vpp.tunnels) == 1

    each(story, IPIP)


def test_the_first_policy_decides_whatever_it_says() -> None:
    async def story(site: Gateway, kind: Kind) -> None:
        one, tunnel = Transport(), Tunnel(2)
        await kind.make(site)
        hosts = f"{WAN_ADDRESS}/32", f"{PEER}/32"
        await site.have(bypass(*hosts, priority=1))
        assert await site.fates(BEHIND) == [CLEAR]
        await site.have(*tunnel.both(*hosts, proto=kind.proto, priority=2), *tunnel.pair())
        assert await site.fates(BEHIND) == [CLEAR]
        await site.lose(bypass(*hosts, priority=1))
        assert await site.fates(BEHIND) == [DROP]
        await site.have(*[replace(it, priority=1) for it in one.policies(kind.proto)], *one.pair())
        assert await site.fates(BEHIND) == [one.name]

    each(story, IPIP)


def test_a_policy_for_another_protocol_leaves_an_interface_alone() -> None:
    async def story(site: Gateway, kind: Kind) -> None:
        one = Transport()
        await kind.make(site)
        await site.have(*one.policies(47 if kind is IPIP else 4), *one.pair())
        assert await site.fates(BEHIND) == [CLEAR]
        assert not site.wires.box.cli("show ipsec sa").strip()

    each(story, IPIP)


def test_uncovered_gre_ipip_is_unprotected_and_sends_once_recreated() -> None:
    async def story(site: Gateway, kind: Kind) -> None:
        one = Transport()
        await kind.make(site)
        await site.have(*one.policies(kind.proto), *one.pair())
        await site.lose(*one.pair(), *one.policies(kind.proto))
        assert not (await site.wires.cli("show ipsec protect")).strip()
        assert not (await site.wires.cli("show ipsec sa")).strip()
        assert await site.fates(BEHIND) == [DROP]  # VPP 26.06 does not undo what a protection did
        assert await brought(site, kind, None, ANSWER) == [LAN]
        await kind.remove(site)
        await kind.make(site)
        assert await site.fates(BEHIND) == [CLEAR]

    each(story, IPIP)


@pytest.mark.parametrize(
    ("more", "reason"), [(" key 7", "it has a key"), (" teb", "it carries Ethernet"), (" erspan 5", "it mirrors ports")]
)
def test_a_gre_interface_that_vpp_cannot_protect_sends_nothing(more: str, reason: str) -> None:
    async def story(site: Gateway, kind: Kind) -> None:
        one = Transport()
        await kind.make(site)
        for line in ("set ip neighbor gre0 10.9.0.2 02:00:00:00:09:09", "ip route add 10.2.0.0/24 via 10.9.0.2 gre0"):
            await site.wires.cli(line)
        await site.wires.cli("ip route del 10.2.0.0/24 via gre0")
        assert await site.fates(BEHIND) in ([CLEAR], [DROP])
        await site.have(*one.policies(kind.proto), *one.pair())
        assert await site.fates(BEHIND) == [DROP]
        assert reason in sa_view(site.engine)[0]["reason"]

    each(story, replace(GRE_, more=more))
