"""Packets that get too long by ESP: whoever sent them is told what fits, or they are cut before they are encrypted."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scapy.layers.inet import ICMP, IP, UDP, fragment
from scapy.layers.inet6 import ICMPv6PacketTooBig, IPv6
from scapy.layers.ipsec import ESP
from scapy.packet import Packet, Raw

from support.build import LOCAL, LOCAL6, REMOTE, REMOTE6
from support.fake_routes import FakeRoutes
from support.gateway import Gateway, Tunnel, parse, tell
from support.vpp_box import vpp_binary
from support.wire import HOST, HOST6
from vppipsec.kernel.xfrm.values import Sa

pytestmark = [pytest.mark.vpp, pytest.mark.skipif(vpp_binary() is None, reason="VPP_BIN does not name a VPP")]

FAR, FAR6 = "10.2.0.9", "fd02::9"


def of(length: int, df: bool = False) -> Packet:
    return IP(bytes(IP(src=HOST, dst=FAR, flags="DF" if df else 0) / UDP(sport=1, dport=2) / Raw(bytes(length - 28))))


def of6(length: int) -> Packet:
    return IPv6(bytes(IPv6(src=HOST6, dst=FAR6) / UDP(sport=1, dport=2) / Raw(bytes(length - 48))))


async def sent_for(site: Gateway, packet: Packet) -> tuple[list[Packet], list[Packet]]:
    """Send a packet from the LAN; return what VPP sends to the peer, and what it answers. It has IPv6's own words besides."""
    first = len(site.ear.frames)
    site.wires.lan.send(packet)
    await site.quiet()
    frames = [frame for frame in site.ear.frames[first:] if frame.data[12:14] in (b"\x08\x00", b"\x86\xdd")]
    to_peer = [
        frame.packet for frame in frames if frame.wire is site.wires.wan and not frame.packet.dst.startswith("ff02:")
    ]
    answers = [frame.packet for frame in frames if frame.wire is site.wires.lan]
    return to_peer, [it for it in answers if it.dst in (HOST, HOST6)]


class Vti(Tunnel):
    """A tunnel into which routes over a VTI lead."""

    def pair(self, generation: int = 0) -> tuple[Sa, Sa]:
        inbound, outbound = super().pair(generation)
        return inbound._replace(if_id=7), outbound._replace(if_id=7)

    async def open(self, site: Gateway, link_mtu: int) -> None:
        """Have it over a link whose longest packets are so long."""
        assert site.routes is not None
        assert not await site.wires.cli(f"set interface mtu packet {link_mtu} host-wan0")
        policies = [*self.both("0.0.0.0/0", "0.0.0.0/0"), *self.both("::/0", "::/0")]
        site.kernel.add(*self.pair(), *(replace(policy, if_id=7) for policy in policies))
        site.routes.link("vti7", 7)
        site.routes.add("10.2.0.0/16", "vti7")
        site.routes.add("fd02::/64", "vti7")
        await site.settle()


def lengths(packets: list[Packet]) -> list[int]:
    return [len(packet) for packet in packets]


@pytest.mark.parametrize(
    ("ends", "longest"), [((LOCAL, REMOTE), 1446), ((LOCAL6, REMOTE6), 1426)], ids=["over IPv4", "over IPv6"]
)
def test_what_must_not_be_cut_is_reported_too_long_where_esp_would_not_fit(
    ends: tuple[bytes, bytes], longest: int
) -> None:
    async def story(site: Gateway) -> None:
        await Vti(ends=ends).open(site, 1500)
        for packet in (of(longest), of(longest, df=True), of6(longest)):
            esp, answers = await sent_for(site, packet)
            assert (lengths(esp), answers) == ([1500], [])
            assert ESP in esp[0]
        esp, (answer,) = await sent_for(site, of(longest + 1, df=True))
        assert (esp, answer[ICMP].type, answer[ICMP].code, answer[ICMP].nexthopmtu) == ([], 3, 4, longest)
        esp, (answer,) = await sent_for(site, of6(longest + 1))
        assert (esp, answer[ICMPv6PacketTooBig].mtu) == ([], longest)

    tell(story, routes=FakeRoutes())


def test_what_may_be_cut_is_cut_before_it_is_encrypted() -> None:
    async def story(site: Gateway) -> None:
        await Vti().open(site, 1500)
        esp, answers = await sent_for(site, of(1447))
        assert answers == []
        assert max(lengths(esp)) <= 1500
        read = [site.kernel.reads[it[ESP].spi][1].decrypt(it) for it in esp]
        assert sorted((it.frag, it.flags.MF) for it in read) == [(0, True), (read[0].frag + read[1].frag, False)]
        assert sum(len(it) - 20 for it in read) == 1427

    tell(story, routes=FakeRoutes())


def test_a_link_shorter_than_ipv6_asks_for_takes_ipv6_all_the_same() -> None:
    async def story(site: Gateway) -> None:
        await Vti().open(site, 1200)
        esp, answers = await sent_for(site, of6(1280))
        assert answers == []
        assert len(esp) > 1  # ESP in fragments, as the kernel sends it
        assert all(len(it) <= 1200 for it in esp)
        _, (answer,) = await sent_for(site, of6(1281))
        assert answer[ICMPv6PacketTooBig].mtu == 1280
        _, (answer,) = await sent_for(site, of(1147, df=True))
        assert answer[ICMP].nexthopmtu == 1146

    tell(story, routes=FakeRoutes())


def test_esp_that_comes_in_fragments_is_decrypted() -> None:
    async def story(site: Gateway) -> None:
        one = Tunnel()
        await site.have(*one.pair(), *one.both("10.1.0.0/24", "10.2.0.0/24"))
        inner = IP(src=FAR, dst=HOST) / UDP(sport=1, dport=2) / Raw(bytes(1400))
        whole = site.kernel.reads[one.pair()[0].spi][1].encrypt(parse(bytes(inner)))
        first = len(site.ear.frames)
        for part in fragment(IP(bytes(whole)), 700):
            site.wires.wan.send(part)
        await site.quiet()
        arrived = [frame.packet for frame in site.ear.frames[first:] if frame.wire is site.wires.lan]
        assert [len(it) for it in arrived if it.haslayer(UDP)] == [1428]

    tell(story)


def test_packets_by_rules_are_fragmented_not_reported_too_long() -> None:
    async def story(site: Gateway) -> None:
        assert not await site.wires.cli("set interface mtu packet 1500 host-wan0")
        one = Tunnel()
        await site.have(*one.pair(), one.out("10.1.0.0/24", "10.2.0.0/24"))
        esp, answers = await sent_for(site, of(1447, df=True))
        assert (lengths(esp)[0], len(esp), answers) == (1500, 2, [])

    tell(story)
