"""On the wires of a real VPP: what becomes of the fragments of a datagram, of which only the first one tells its ports."""

from __future__ import annotations

import pytest
from scapy.layers.inet import IP, fragment
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment, fragment6
from scapy.packet import Packet, Raw

from support.build import LOCAL, LOCAL6, REMOTE6
from support.gateway import CLEAR, DROP, PEER_B, Gateway, Tunnel, block, bypass, ping, tell, udp
from support.vpp_box import vpp_binary
from vppipsec.kernel.text import parse_addr

pytestmark = [pytest.mark.vpp, pytest.mark.skipif(vpp_binary() is None, reason="VPP_BIN does not name a VPP")]

ONE, TWO = Tunnel(1), Tunnel(2, (LOCAL, parse_addr(PEER_B)))
ONE6 = Tunnel(1, (LOCAL6, REMOTE6))
HERE, THERE = "10.1.0.0/24", "10.2.0.0/24"
FAR, FAR6 = "10.2.0.9", "fd02::9"
UDP = 17
FRAGMENT_BYTES = 1200
FAMILIES = pytest.mark.parametrize(
    ("tunnel", "here", "there", "far"),
    [(ONE, HERE, THERE, FAR), (ONE6, "fd01::/64", "fd02::/64", FAR6)],
    ids=("ip4", "ip6"),
)
PAYLOAD = bytes(number % 251 for number in range(3000))


def pieces_of(packet: Packet, ident: int) -> list[Packet]:
    """Return the fragments of a datagram of 3,000 bytes."""
    if isinstance(packet, IPv6):
        whole = IPv6(src=packet.src, dst=packet.dst) / IPv6ExtHdrFragment(id=ident) / packet.payload / Raw(PAYLOAD)
        found = fragment6(whole, FRAGMENT_BYTES)
    else:
        packet.id = ident
        found = fragment(packet / Raw(PAYLOAD), FRAGMENT_BYTES)
    assert len(found) == 3
    return [type(packet)(bytes(piece)) for piece in found]


def place_of(packet: Packet) -> tuple[int, int] | None:
    """Return the datagram that a fragment is of, and where in it; None for what is no fragment."""
    if isinstance(packet, IP) and (packet.frag or packet.flags.MF):
        return packet.id, packet.frag
    if isinstance(packet, IPv6) and IPv6ExtHdrFragment in packet:
        return packet[IPv6ExtHdrFragment].id, packet[IPv6ExtHdrFragment].offset
    return None


async def outcomes_of_pieces(site: Gateway, packet: Packet, ident: int = 4711) -> list[str]:
    """Send the fragments of a datagram from the LAN and tell what becomes of each."""
    first = len(site.ear.frames)
    pieces = pieces_of(packet, ident)
    for piece in pieces:
        site.wires.lan.send(piece)
    await site.quiet()
    found: dict[tuple[int, int], list[str]] = {}
    sent = {place_of(piece): bytes(piece.payload) for piece in pieces}
    for passed in site.passed(first):
        place = place_of(passed.inner)
        if place in sent:
            assert place is not None
            assert bytes(passed.inner.payload) == sent[place]
            found.setdefault(place, []).append(passed.outcome)
    return ["+".join(found.get(place, [DROP])) for place in sent if place is not None]


@FAMILIES
def test_all_fragments_go_where_a_policy_for_addresses_says(tunnel: Tunnel, here: str, there: str, far: str) -> None:
    async def story(site: Gateway) -> None:
        await site.settle()
        assert await outcomes_of_pieces(site, udp(far)) == [CLEAR] * 3
        await site.have(tunnel.out(here, there))
        assert await outcomes_of_pieces(site, udp(far)) == [DROP] * 3
        await site.open(tunnel)
        assert await outcomes_of_pieces(site, udp(far)) == [tunnel.name] * 3
        await site.have(tunnel.out(here, there, proto=UDP))
        await site.lose(tunnel.out(here, there))
        assert await outcomes_of_pieces(site, udp(far)) == [tunnel.name] * 3

    tell(story)


@FAMILIES
def test_fragments_without_ports_are_encrypted_as_any_port(tunnel: Tunnel, here: str, there: str, far: str) -> None:
    async def story(site: Gateway) -> None:
        await site.have(*tunnel.pair(), tunnel.out(here, there, proto=UDP, dport=53))
        assert await outcomes_of_pieces(site, udp(far, 53)) == [tunnel.name] * 3
        assert await outcomes_of_pieces(site, udp(far, 54)) == [CLEAR, tunnel.name, tunnel.name]

    tell(story)


def test_fragments_take_the_first_tunnel_of_their_protocol() -> None:
    async def story(site: Gateway) -> None:
        await site.have(*ONE.pair(), *TWO.pair())
        await site.have(ONE.out(HERE, THERE, proto=UDP, dport=53, priority=100), TWO.out(HERE, THERE))
        assert await outcomes_of_pieces(site, udp(FAR, 53)) == [ONE.name] * 3
        assert await outcomes_of_pieces(site, udp(FAR, 54)) == [TWO.name, ONE.name, ONE.name]

    tell(story)


@FAMILIES
def test_port_bypass_lets_no_fragment_of_another_port_out_unencrypted(
    tunnel: Tunnel, here: str, there: str, far: str
) -> None:
    async def story(site: Gateway) -> None:
        out = tunnel.out(here, there)
        await site.have(*tunnel.pair(), out, bypass(here, there, proto=UDP, dport=53, priority=100))
        assert await site.fates(udp(far, 53), udp(far, 54)) == [CLEAR, tunnel.name]
        assert await outcomes_of_pieces(site, udp(far, 54)) == [tunnel.name] * 3
        assert await outcomes_of_pieces(site, udp(far, 53)) == [CLEAR, tunnel.name, tunnel.name]
        await site.lose(out)
        assert await outcomes_of_pieces(site, udp(far, 54)) == [CLEAR] * 3, "no policy is left that they are for"

    tell(story)


def test_fragments_before_an_echo_bypass_follow_policies_without_ports() -> None:
    async def story(site: Gateway) -> None:
        await site.have(
            *ONE.pair(),
            *TWO.pair(),
            ONE.out("10.1.0.0/16", "10.2.0.0/16", priority=2000),
            bypass(HERE, THERE, proto=1, sport=8, priority=9),
        )
        assert await site.fates(ping(FAR), ping(FAR, is_reply=True)) == [CLEAR, ONE.name]
        assert await outcomes_of_pieces(site, ping(FAR, is_reply=True)) == [ONE.name] * 3
        await site.have(TWO.out(HERE, THERE, priority=1001), block(HERE, "10.2.0.9/32", proto=1, priority=1000))
        assert await outcomes_of_pieces(site, ping(FAR)) == [CLEAR, DROP, DROP]

    tell(story)

    tell(story)
