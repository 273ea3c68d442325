"""On the wires of a real VPP: each packet goes where the kernel's outbound policies say, in their order."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace

import pytest
from scapy.layers.inet6 import (
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
)
from scapy.packet import Packet
from scapy.utils6 import in6_getnsma

from support.build import LOCAL, LOCAL6, REMOTE6
from support.gateway import (
    CLEAR,
    DROP,
    LAN,
    LAN_ADDRESS,
    LAN_ADDRESS6,
    PEER_B,
    PEER_B6,
    WAN_ADDRESS,
    Frame,
    Gateway,
    Tunnel,
    block,
    bypass,
    ping,
    tcp,
    tell,
    udp,
)
from support.recorded import PATIENCE_S
from support.vpp_box import vpp_binary
from support.wire import HOST, HOST6, LAN_MAC
from vppipsec.conf.settings import OffloadSettings
from vppipsec.kernel.text import parse_addr
from vppipsec.sync.desired.policy_layers import PlacementKind

pytestmark = [pytest.mark.vpp, pytest.mark.skipif(vpp_binary() is None, reason="VPP_BIN does not name a VPP")]

ONE, TWO = Tunnel(1), Tunnel(2, (LOCAL, parse_addr(PEER_B)))
ONE6, TWO6 = Tunnel(1, (LOCAL6, REMOTE6)), Tunnel(2, (LOCAL6, parse_addr(PEER_B6)))
HERE, THERE = "10.1.0.0/24", "10.2.0.0/24"
FAR = "10.2.0.9"
ICMP, TCP, UDP, ICMP6 = 1, 6, 17, 58


@pytest.mark.parametrize(
    ("tunnel", "here", "there", "inside", "outside", "far", "elsewhere"),
    [
        (ONE, HERE, THERE, "10.1.0.77", "10.1.1.2", FAR, "10.3.0.9"),
        (ONE6, "fd01::/64", "fd02::/64", "fd01::77", "fd01:0:0:1::2", "fd02::9", "fd03::9"),
    ],
    ids=("ip4", "ip6"),
)
def test_only_what_the_local_prefix_holds_is_encrypted(
    tunnel: Tunnel, here: str, there: str, inside: str, outside: str, far: str, elsewhere: str
) -> None:
    async def story(site: Gateway) -> None:
        packets = udp(far), udp(far, src=inside), udp(far, src=outside), udp(elsewhere)
        await site.settle()
        assert await site.fates(*packets) == [CLEAR] * 4
        await site.have(tunnel.out(here, there))
        assert await site.fates(*packets) == [DROP, DROP, CLEAR, CLEAR]
        await site.open(tunnel)
        assert await site.fates(*packets) == [tunnel.name, tunnel.name, CLEAR, CLEAR]
        await site.lose(tunnel.out(here, there))
        assert await site.fates(*packets) == [CLEAR] * 4

    tell(story)


FAMILIES = pytest.mark.parametrize(
    ("tunnel", "here", "there", "far"),
    [(ONE, HERE, THERE, FAR), (ONE6, "fd01::/64", "fd02::/64", "fd02::9")],
    ids=("ip4", "ip6"),
)


@FAMILIES
def test_only_the_protocol_and_port_of_a_policy_are_encrypted(tunnel: Tunnel, here: str, there: str, far: str) -> None:
    async def story(site: Gateway) -> None:
        await site.have(*tunnel.pair(), tunnel.out(here, there, proto=UDP, dport=53))
        packets = udp(far, 53), udp(far, 54), udp(far, sport=53), tcp(far, 53), ping(far)
        assert await site.fates(*packets) == [tunnel.name, CLEAR, CLEAR, CLEAR, CLEAR]

    tell(story)


@FAMILIES
def test_only_the_icmp_type_of_a_policy_is_encrypted(tunnel: Tunnel, here: str, there: str, far: str) -> None:
    async def story(site: Gateway) -> None:
        proto, kind = (ICMP6, 128) if tunnel is ONE6 else (ICMP, 8)
        await site.have(*tunnel.pair(), tunnel.out(here, there, proto=proto, sport=kind))
        packets = ping(far), ping(far, is_reply=True), udp(far, 0, sport=kind)
        assert await site.fates(*packets) == [tunnel.name, CLEAR, CLEAR]

    tell(story)


def test_of_the_policies_that_match_a_packet_the_first_by_priority_counts() -> None:
    async def story(site: Gateway) -> None:
        await site.open(ONE, TWO)
        await site.have(
            bypass(HERE, THERE, proto=UDP, dport=123, priority=900),
            TWO.out(HERE, THERE, priority=200),
            ONE.out(HERE, THERE, proto=TCP, priority=100),
            block(HERE, THERE, proto=UDP, dport=9, priority=50),
            bypass(HERE, THERE, proto=UDP, dport=5353, priority=50),
        )
        packets = tcp(FAR), udp(FAR), ping(FAR), udp(FAR, 9), tcp(FAR, 9), udp(FAR, 5353), udp(FAR, 123)
        expected = [ONE.name, TWO.name, TWO.name, DROP, ONE.name, CLEAR, TWO.name]
        assert await site.fates(*packets) == expected

    tell(story)


@pytest.mark.parametrize("wide_first", [False, True], ids=["narrow first", "wide first"])
def test_nested_destinations_follow_policy_priority(wide_first: bool) -> None:
    async def story(site: Gateway) -> None:
        await site.open(ONE, TWO)
        await site.have(
            ONE.out(HERE, "10.2.0.0/16", priority=100 if wide_first else 200),
            TWO.out(HERE, "10.2.1.0/24", priority=200 if wide_first else 100),
        )
        inner = ONE.name if wide_first else TWO.name
        assert await site.fates(udp("10.2.0.9"), udp("10.2.1.9"), udp("10.3.0.9")) == [ONE.name, inner, CLEAR]

    tell(story)


def test_longer_route_within_a_policy_takes_none_of_its_packets() -> None:
    async def story(site: Gateway) -> None:
        assert not await site.wires.cli(f"ip route add 10.2.0.0/25 via {PEER_B} host-wan0")
        await site.have(*ONE.pair(), ONE.out(HERE, THERE))
        assert not await site.wires.cli(f"ip route add 10.2.0.8/29 via {PEER_B} host-wan0")
        assert await site.fates(udp(FAR), udp("10.2.0.200")) == [ONE.name] * 2
        await site.lose(ONE.out(HERE, THERE))
        assert await site.fates(udp(FAR), udp("10.2.0.200")) == [CLEAR] * 2

    tell(story)


def test_a_policy_for_one_host_is_a_route() -> None:
    async def story(site: Gateway) -> None:
        await site.have(*ONE.pair(), ONE.out("0.0.0.0/0", "10.2.0.9/32"))
        assert await site.fates(udp(FAR), tcp(FAR, src="10.8.0.2"), udp("10.2.0.8")) == [ONE.name, ONE.name, CLEAR]
        assert [place and place.kind for _, place in site.engine.steering.outbound_policies()] == [PlacementKind.ROUTE]
        assert not await site.wires.cli("show abf policy")
        await site.lose(*ONE.pair())
        assert await site.fates(udp(FAR), tcp(FAR, src="10.8.0.2"), udp("10.2.0.8")) == [DROP, DROP, CLEAR]

    tell(story)


def test_default_destination_spares_esp_and_packets_to_the_router() -> None:
    async def story(site: Gateway) -> None:
        await site.have(*ONE.pair(), *ONE.both(HERE, "0.0.0.0/0"))
        packets = udp(FAR), udp("198.51.100.9"), udp(PEER_B), ping(LAN_ADDRESS), ping(WAN_ADDRESS)
        assert await site.fates(*packets, udp(FAR, src="10.8.0.2")) == [*[ONE.name] * 3, LAN, LAN, CLEAR]
        back = udp("10.1.0.2", src=FAR), udp("10.1.0.2", src="198.51.100.9")
        assert await site.brought(ONE, *back) == [LAN, LAN]

    tell(story)


def test_two_tunnels_for_everything_share_the_lan_by_source() -> None:
    async def story(site: Gateway) -> None:
        assert not await site.wires.cli(f"set ip neighbor host-lan0 10.1.0.200 {LAN_MAC}")
        await site.have(*ONE.pair(), *TWO.pair())
        await site.have(*ONE.both("10.1.0.0/25", "0.0.0.0/0"), *TWO.both("10.1.0.128/25", "0.0.0.0/0"))
        packets = udp(FAR), udp(FAR, src="10.1.0.200"), udp(FAR, src="10.1.1.2"), ping(LAN_ADDRESS)
        assert await site.fates(*packets) == [ONE.name, TWO.name, CLEAR, LAN]
        assert await site.brought(ONE, udp(HOST, src=FAR), udp("10.1.0.200", src=FAR)) == [LAN, DROP]
        assert await site.brought(TWO, udp("10.1.0.200", src=FAR), udp(HOST, src=FAR)) == [LAN, DROP]
        assert await site.brought(ONE, udp(HOST, src="10.1.0.200")) == [TWO.name]  # it is for the other policy
        await site.lose(*TWO.pair())
        assert await site.fates(*packets) == [ONE.name, DROP, CLEAR, LAN]

    tell(story)


def test_neighbours_are_found_while_everything_of_ip6_is_to_be_encrypted() -> None:
    async def story(site: Gateway) -> None:
        await site.have(*ONE6.pair(), *ONE6.both("fd01::/64", "::/0"))
        packets = udp("fd02::9"), udp("2001:db8:9::9"), udp(PEER_B6), ping(LAN_ADDRESS6)
        assert await site.fates(*packets, udp("fd02::9", src="fd08::2")) == [*[ONE6.name] * 3, LAN, CLEAR]
        first = len(site.ear.frames)
        site.wires.lan.send(_solicit(HOST6, LAN_ADDRESS6))
        await site.hears(lambda frame: _tells_of(frame, LAN_ADDRESS6), first)
        new = "fd01::88"
        first = len(site.ear.frames)
        assert await site.brought(ONE6, udp(new, src="fd02::9")) == [DROP]  # VPP has to ask for its address first
        question = (await site.hears(lambda frame: _asks_for(frame, new), first)).packet
        site.wires.lan.send(_advertise(new, question.src))
        assert await site.brought(ONE6, udp(new, src="fd02::9")) == [LAN]

    tell(story)


def _solicit(src: str, target: str) -> Packet:
    tunnel = in6_getnsma(socket.inet_pton(socket.AF_INET6, target))
    message = ICMPv6ND_NS(tgt=target) / ICMPv6NDOptSrcLLAddr(lladdr=LAN_MAC)
    return IPv6(src=src, dst=socket.inet_ntop(socket.AF_INET6, tunnel), hlim=255) / message


def _advertise(src: str, dst: str) -> Packet:
    return IPv6(src=src, dst=dst, hlim=255) / ICMPv6ND_NA(tgt=src, R=0, S=1) / ICMPv6NDOptDstLLAddr(lladdr=LAN_MAC)


def _tells_of(frame: Frame, target: str) -> bool:
    return frame.data[12:14] == b"\x86\xdd" and ICMPv6ND_NA in frame.packet and frame.packet[ICMPv6ND_NA].tgt == target


def _asks_for(frame: Frame, target: str) -> bool:
    return frame.data[12:14] == b"\x86\xdd" and ICMPv6ND_NS in frame.packet and frame.packet[ICMPv6ND_NS].tgt == target


def test_a_packet_from_one_spoke_for_another_one_leaves_encrypted() -> None:
    async def story(site: Gateway) -> None:
        await site.open(ONE, TWO)
        spoke_one, spoke_two = "10.2.0.0/24", "10.3.0.0/24"
        await site.have(*ONE.both(spoke_two, spoke_one), *TWO.both(spoke_one, spoke_two))
        packets = udp("10.3.0.9", src=FAR), udp("10.3.0.9", src="10.4.0.9"), udp("10.4.0.9", src=FAR)
        assert await site.brought(ONE, *packets) == [TWO.name, DROP, DROP]
        assert await site.brought(TWO, udp(FAR, src="10.3.0.9"), udp("10.3.0.9", src=FAR)) == [ONE.name, DROP]
        await site.lose(*TWO.pair())
        assert await site.brought(ONE, *packets) == [DROP] * 3
        await site.have(*TWO.pair(1))
        assert await site.brought(ONE, *packets) == [TWO.name, DROP, DROP]

    tell(story)


@pytest.mark.parametrize("enforced", [True, False])
def test_decrypted_packets_are_checked_by_protocol_and_ports(enforced: bool) -> None:
    async def story(site: Gateway) -> None:
        await site.have(*ONE.pair(), *ONE.both(HERE, THERE, proto=UDP, dport=53))
        answers = udp(HOST, 1000, FAR, sport=53), udp(HOST, 53, FAR, sport=54), tcp(HOST, 53, FAR)
        outside = DROP if enforced else LAN
        assert await site.brought(ONE, *answers) == [LAN, outside, outside]

    tell(story, OffloadSettings(selector_enforcement=enforced))


def test_selector_enforcement_switches_without_a_restart() -> None:
    async def story(site: Gateway) -> None:
        await site.have(*ONE.pair(), *ONE.both(HERE, THERE))
        stranger = udp(HOST, src="10.3.0.9")
        assert await site.brought(ONE, stranger) == [DROP]
        for enforced, outcome in ((False, LAN), (True, DROP)):
            site.engine.reload(replace(site.settings, offload=OffloadSettings(selector_enforcement=enforced)))
            async with asyncio.timeout(PATIENCE_S):
                while site.engine.environment.snapshot.enforce_selectors is not enforced:  # noqa: ASYNC110  # there is no event for it
                    await asyncio.sleep(0.001)
            await site.settle()
            assert await site.brought(ONE, stranger) == [outcome]

    tell(story)
