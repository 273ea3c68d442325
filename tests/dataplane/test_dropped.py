"""On the wire: what VPP drops for want of an SA raises an ACQUIRE, once, for the policy that it is for."""

from __future__ import annotations

import asyncio

import pytest

from support.build import LOCAL6, REMOTE6
from support.gateway import CLEAR, DROP, Gateway, Tunnel, block, tell, udp
from support.recorded import PATIENCE_S
from support.vpp_box import vpp_binary
from vppipsec.sync.ike.acquire import COUNTER_POLL_S

pytestmark = [
    pytest.mark.vpp,
    pytest.mark.skipif(vpp_binary() is None, reason="VPP_BIN does not name a VPP"),
]

ONE, TWO, THREE, SIX = Tunnel(), Tunnel(2), Tunnel(3), Tunnel(6, (LOCAL6, REMOTE6))
HERE, THERE = "10.1.0.0/24", "10.2.0.0/24"
LOOKS = 2


async def looked_at(site: Gateway) -> None:
    """Let the counters be looked at some more times."""
    await asyncio.sleep(LOOKS * COUNTER_POLL_S)


async def asked(site: Gateway, number: int) -> None:
    """Wait until so many ACQUIREs were raised, and look whether more follow."""
    async with asyncio.timeout(PATIENCE_S):
        while len(site.kernel.acquired) < number:  # noqa: ASYNC110  # a list has no event
            await asyncio.sleep(0.01)
    await looked_at(site)
    assert len(site.kernel.acquired) == number


@pytest.mark.parametrize(
    ("tunnel", "here", "there", "packet", "other"),
    [
        (ONE, HERE, THERE, udp("10.2.0.9"), udp("10.2.0.9", src="10.7.0.2")),
        (ONE, "0.0.0.0/0", "10.2.0.9/32", udp("10.2.0.9"), udp("10.2.0.8")),
        (SIX, "fd01::/64", "fd02::/64", udp("fd02::9"), udp("fd02::9", src="fd07::2")),
    ],
    ids=["ip4", "host route", "ip6"],
)
def test_packet_without_an_sa_raises_one_acquire_until_the_tunnel_is_up(
    tunnel: Tunnel, here: str, there: str, packet: object, other: object
) -> None:
    async def story(site: Gateway) -> None:
        policy = tunnel.out(here, there)
        await site.have(policy)
        await looked_at(site)
        assert await site.fates(other) == [CLEAR]
        await looked_at(site)
        assert site.kernel.acquired == []
        assert await site.fates(packet) == [DROP]
        await asked(site, 1)
        assert await site.fates(packet, packet) == [DROP, DROP]
        await asked(site, 1)
        assert site.kernel.acquired == [policy]
        await site.open(tunnel)
        assert await site.fates(packet) == [tunnel.name]
        await looked_at(site)
        await site.lose(*tunnel.pair())
        await looked_at(site)
        assert len(site.kernel.acquired) == 1
        assert await site.fates(packet) == [DROP]
        await asked(site, 2)

    tell(story)


def test_policies_that_saw_no_packet_are_not_asked_for() -> None:
    async def story(site: Gateway) -> None:
        await site.open(THREE)
        blocked, carried = block(HERE, "10.4.0.0/24"), THREE.out(HERE, "10.5.0.0/24")
        nested = TWO.out(HERE, "10.2.0.0/16", priority=2000)
        await site.have(ONE.out(HERE, THERE), nested, blocked, carried)
        await looked_at(site)
        packets = udp("10.4.0.9"), udp("10.5.0.9"), udp("10.6.0.9"), udp("10.2.7.9")
        assert await site.fates(*packets) == [DROP, THREE.name, CLEAR, DROP]
        await asked(site, 1)
        assert site.kernel.acquired == [nested]

    tell(story)


def test_restarted_service_counts_drops_of_adopted_routes() -> None:
    async def story(site: Gateway) -> None:
        policy = ONE.out(HERE, THERE)
        await site.have(policy)
        assert await site.fates(udp("10.2.0.9")) == [DROP]
        await site.kill()
        site.kernel.acquired.clear()
        site.start()
        await site.settle()
        await looked_at(site)
        assert site.kernel.acquired == []
        assert await site.fates(udp("10.2.0.9")) == [DROP]
        await asked(site, 1)
        assert site.kernel.acquired == [policy]

    tell(story)
