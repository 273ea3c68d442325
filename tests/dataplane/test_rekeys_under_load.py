"""A real VPP under traffic both ways while its SAs are replaced every 3 s: nothing lost, nothing in clear, no replay.

For 12 s; VPPIPSEC_LONG=1 makes it 60 s.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from dataclasses import dataclass

import pytest
from scapy.layers.inet import IP
from scapy.layers.ipsec import SecurityAssociation
from scapy.packet import Packet, Raw

from support.gateway import LAN, MARK, Gateway, Stream, Tunnel, peers_sa, tell, udp
from support.vpp_box import vpp_binary
from support.wire import HOST
from vppipsec.kernel.xfrm.values import Sa
from vppipsec.vpp.stats import read_sa_counters

pytestmark = [
    pytest.mark.vpp,
    pytest.mark.slow,
    pytest.mark.skipif(vpp_binary() is None, reason="VPP_BIN does not name a VPP"),
]

TUNNEL = Tunnel()
FAR = "10.2.0.9"
REKEYS = 20 if os.environ.get("VPPIPSEC_LONG") else 4
EVERY_S = 3.0
NEGOTIATION_S = 0.1
"""From when the router has the new SAs until the peer sends on them, and from then until both delete the old ones."""
PAUSE_S = 0.01
BACK_FROM = 1 << 32
"""Numbers of the packets that the peer sends, unlike those that it gets."""


@dataclass
class Peer:
    """Sends packets to the LAN host through the tunnel, again and again, on the SA that it was told of last."""

    site: Gateway
    sends: SecurityAssociation
    sent: int = 0
    last: Packet | None = None

    async def talk(self) -> None:
        """Send until cancelled."""
        for number in itertools.count():
            self.last = self.sends.encrypt(_back(number))
            self.site.wires.wan.send(self.last)
            self.sent = number + 1
            await asyncio.sleep(PAUSE_S)


def _back(number: int) -> Packet:
    return IP(bytes(udp(HOST, src=FAR) / Raw(MARK + (BACK_FROM + number).to_bytes(8, "big"))))


async def errors_of(site: Gateway, *sas: Sa) -> dict[int, dict[str, int]]:
    """Return what VPP counted as errors of SAs, by SPI."""
    counters = await read_sa_counters(site.settings.vpp.stats_socket)
    actual = {sa.spec.spi: sa for state in site.engine.tunnels.values() for sa in state.actual.sas.values()}
    found = {sa.spi: counters.of_sa(actual[sa.spi].stat_index) for sa in sas}
    assert all(usage is not None and usage.packets > 10 for usage in found.values())
    return {spi: dict(usage.errors) for spi, usage in found.items() if usage is not None and usage.errors}


@pytest.mark.timeout(REKEYS * EVERY_S + 60)
def test_rekeys_every_3_s_under_traffic_lose_and_leak_nothing() -> None:
    async def story(site: Gateway) -> None:
        old = TUNNEL.pair()
        await site.have(*TUNNEL.both("10.1.0.0/24", "10.2.0.0/24"), *old)
        stream, peer = Stream(site, udp(FAR), PAUSE_S), Peer(site, peers_sa(old[0]))
        first = len(site.ear.frames)
        stream.start()
        talk = asyncio.create_task(peer.talk())
        for generation in range(1, REKEYS + 1):
            await asyncio.sleep(EVERY_S - 2 * NEGOTIATION_S)
            new = TUNNEL.pair(generation)
            site.kernel.add(*new, *TUNNEL.both("10.1.0.0/24", "10.2.0.0/24"))
            await asyncio.sleep(NEGOTIATION_S)
            peer.sends = peers_sa(new[0])
            await asyncio.sleep(NEGOTIATION_S)
            assert await errors_of(site, old[0]) == {}
            await site.lose(*old[::-1])
            old = new
        await stream.go_on(20)
        assert await errors_of(site, *old) == {}
        talk.cancel()
        out = await stream.end()
        assert peer.last is not None
        site.wires.wan.send(peer.last)
        await site.quiet()
        assert await errors_of(site, *old) == {old[0].spi: {"replay": 1}}  # so that is what would have been counted
        there = [seen for seen in out if seen.outcome != LAN]
        assert stream.sent > 100
        assert {seen.outcome for seen in there} == {TUNNEL.name}
        assert [seen.number for seen in there] == list(range(stream.sent))
        assert len({seen.spi for seen in there}) == REKEYS + 1
        for spi in {seen.spi for seen in there}:
            seqs = [seen.seq for seen in there if seen.spi == spi]
            assert seqs == list(range(1, len(seqs) + 1))
        back = [seen.number - BACK_FROM for seen, _ in site.read(first) if seen.outcome == LAN]
        assert back == list(range(peer.sent))
        assert site.kernel.expired == []

    tell(story, limit_s=REKEYS * EVERY_S + 30)
