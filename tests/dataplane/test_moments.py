"""On the wires of a real VPP, under traffic without a pause: from a policy on nothing leaves in clear, whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from support.build import LOCAL, LOCAL6, REMOTE6, SHA256
from support.gateway import CLEAR, DROP, PEER_B, Gateway, Seen, Stream, Tunnel, bypass, tell, udp
from support.recorded import PATIENCE_S
from support.vpp_box import vpp_binary
from vppipsec.kernel.text import parse_addr
from vppipsec.kernel.xfrm.values import Algorithm, Policy, Sa
from vppipsec.vpp.ownership import SAD_ID_FIRST

pytestmark = [pytest.mark.vpp, pytest.mark.skipif(vpp_binary() is None, reason="VPP_BIN does not name a VPP")]

ONE6 = Tunnel(1, (LOCAL6, REMOTE6))
ONE, TWO = Tunnel(1), Tunnel(2, (LOCAL, parse_addr(PEER_B)))
HERE, THERE = "10.1.0.0/24", "10.2.0.0/24"
FAR = "10.2.0.9"


@dataclass(frozen=True)
class Phase:
    """A time in which all packets are to have one fate: the first number, and the first one after it."""

    first: int
    end: int
    outcome: str


@dataclass
class Watch:
    """A stream, and what is to become of its packets."""

    site: Gateway
    stream: Stream
    phases: list[Phase] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)

    async def phase(self, outcome: str) -> None:
        """From now on, until this returns, all packets have this fate."""
        first = self.stream.sent
        await self.stream.go_on()
        end = self.stream.sent
        await self.stream.go_on(1)  # the last one is under way now
        await self.site.quiet()
        self.phases.append(Phase(first, end, outcome))

    def fates(self, first: int, end: int) -> dict[int, str]:
        """Return what became of packets by number."""
        found = dict.fromkeys(range(first, end), DROP)
        for seen in self.seen:
            if first <= seen.number < end:
                assert found[seen.number] == DROP, f"packet {seen.number} left twice"
                found[seen.number] = seen.outcome
        return found

    def lost(self) -> list[int]:
        """Return the packets from the first phase to the last that did not leave."""
        fates = self.fates(self.phases[0].first, self.phases[-1].end)
        return [number for number, outcome in fates.items() if outcome == DROP]

    def clear(self, first: int, end: int) -> list[int]:
        """Return the packets that left in clear, of those from the beginning of a phase to the end of another one."""
        fates = self.fates(self.phases[first].first, self.phases[end].end)
        return [number for number, outcome in fates.items() if outcome == CLEAR]

    def check(self) -> None:
        """Check that each phase was as it was to be, and each SA's sequence numbers went up by one."""
        for phase in self.phases:
            fates = self.fates(phase.first, phase.end)
            assert len(fates) > 1
            assert set(fates.values()) == {phase.outcome}, phase
        for spi in {seen.spi for seen in self.seen} - {0}:
            seqs = [seen.seq for seen in self.seen if seen.spi == spi]
            assert seqs == list(range(1, len(seqs) + 1))


@contextlib.asynccontextmanager
async def watched(site: Gateway, far: str = FAR) -> AsyncIterator[Watch]:
    """Let packets come from the LAN all the time; at the end each phase was as it was to be."""
    watch = Watch(site, Stream(site, udp(far)))
    watch.stream.start()
    try:
        yield watch
    finally:
        watch.seen = await watch.stream.end()
    watch.check()


def unknown(sa: Sa) -> Sa:
    """Return an SA with a cipher that VPP has not."""
    return sa._replace(aead=None, crypt=Algorithm("cbc(camellia)", bytes(16)), auth=SHA256)


@pytest.mark.parametrize(
    ("tunnel", "here", "there", "far"),
    [(ONE, HERE, THERE, FAR), (ONE6, "fd01::/64", "::/0", "fd02::9")],
    ids=("ip4", "all of ip6"),
)
def test_from_the_policy_on_nothing_leaves_unencrypted(tunnel: Tunnel, here: str, there: str, far: str) -> None:
    async def story(site: Gateway) -> None:
        policies = tunnel.both(here, there)
        await site.settle()
        async with watched(site, far) as watch:
            await watch.phase(CLEAR)
            await site.have(*policies)
            await watch.phase(DROP)
            await site.have(*tunnel.pair())
            await watch.phase(tunnel.name)
            await site.lose(*tunnel.pair()[::-1])
            await watch.phase(DROP)
            await site.have(*tunnel.pair(1))
            await watch.phase(tunnel.name)
            for sa in tunnel.pair(1)[::-1]:
                await site.kernel.expire(sa, hard=True)
            await site.settle()
            await watch.phase(DROP)
            await site.have(*tunnel.pair(2))
            await watch.phase(tunnel.name)
            site.kernel.delete(*tunnel.pair(2))  # at once with what comes
            site.kernel.add(*(unknown(sa) for sa in tunnel.pair(3)))
            await site.settle()
            await watch.phase(DROP)
            await site.lose(*tunnel.pair(3))
            await site.have(*tunnel.pair(4))
            await watch.phase(tunnel.name)
            await site.lose(*policies)
            await watch.phase(CLEAR)
        assert watch.clear(1, -2) == []

    tell(story)


def test_nothing_leaves_in_clear_while_vpp_refuses_an_sa() -> None:
    async def story(site: Gateway) -> None:
        await site.settle()
        taken = range(SAD_ID_FIRST, SAD_ID_FIRST + 4)
        for number in taken:
            await site.wires.cli(
                f"ipsec sa add {number} spi {number} esp crypto-alg aes-cbc-128 crypto-key {16 * '1f'}"
            )
        await site.have(*ONE.both(HERE, THERE))
        async with watched(site) as watch:
            await watch.phase(DROP)
            site.kernel.add(*ONE.pair())
            async with asyncio.timeout(PATIENCE_S):
                while not site.engine.counters.refusals:  # noqa: ASYNC110  # there is no event for it
                    await asyncio.sleep(0.001)
            await watch.phase(DROP)
            for number in taken:
                await site.wires.cli(f"ipsec sa del {number}")
            await site.settle()
            await watch.phase(ONE.name)
        assert watch.clear(0, -1) == []

    tell(story)


def test_service_restart_under_traffic_loses_and_leaks_nothing() -> None:
    async def story(site: Gateway) -> None:
        await site.have(*ONE.pair(), *ONE.both(HERE, THERE), *TWO.pair(), *TWO.both(HERE, "10.3.0.0/24", proto=6))
        async with watched(site) as watch:
            await watch.phase(ONE.name)
            for _ in range(3):
                await site.kill()
                await watch.phase(ONE.name)
                site.start()
                await site.settle()
                await watch.phase(ONE.name)
        assert watch.lost() == []
        assert watch.clear(0, -1) == []

    tell(story)


def test_policy_added_while_the_service_was_down_holds_once_in_sync() -> None:
    async def story(site: Gateway) -> None:
        await site.settle()
        async with watched(site) as watch:
            await watch.phase(CLEAR)
            await site.kill()
            site.kernel.add(*ONE.both(HERE, THERE), *ONE.pair())
            site.start()
            await site.settle()
            await watch.phase(ONE.name)
            await site.kill()
            site.kernel.delete(*ONE.pair())
            await watch.phase(ONE.name)
            site.start()
            await site.settle()
            await watch.phase(DROP)
        assert watch.clear(1, -1) == []

    tell(story)


@dataclass(frozen=True)
class Change:
    """A change of policies beside which the stream's packets stay where they are: what comes, then what goes."""

    name: str
    comes: list[Policy]
    goes: list[Policy] = field(default_factory=list)


WIDE, NARROW = ONE.out(HERE, THERE), ONE.out("10.1.0.2/32", "10.2.0.0/28", priority=990)
CHANGES = (
    Change("another priority", [ONE.out(HERE, THERE, priority=500)]),
    Change("installed anew", [WIDE]),
    Change("narrowed", [NARROW], [WIDE]),
    Change("widened", [WIDE], [NARROW]),
    Change("for one protocol", [ONE.out(HERE, THERE, proto=17)], [WIDE]),
    Change("for one port", [ONE.out(HERE, THERE, proto=17, dport=2000)], [WIDE]),
    Change("another tunnel's beside it", [TWO.out(HERE, "10.3.0.0/24", priority=100)]),
    Change("another tunnel's for TCP before it", [TWO.out(HERE, THERE, proto=6, priority=100)]),
    Change("another source's before it", [TWO.out("10.9.0.0/24", "10.0.0.0/8", priority=100)]),
    Change("everything into another tunnel after it", [TWO.out(HERE, "0.0.0.0/0", priority=2000)]),
    Change("a bypass for another port before it", [bypass(HERE, THERE, proto=17, dport=53, priority=1)]),
    Change("a bypass after it", [bypass(HERE, "0.0.0.0/0", priority=3000)]),
    Change("a host's route", [ONE.out("0.0.0.0/0", f"{FAR}/32", priority=1)], [WIDE]),
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_nothing_is_lost_or_in_clear_while_policies_change(change: Change) -> None:
    async def story(site: Gateway) -> None:
        kept = [*ONE.pair(), *TWO.pair()]
        await site.have(*kept, *(change.goes or [WIDE]))
        async with watched(site) as watch:
            await watch.phase(ONE.name)
            await site.have(*change.comes)
            await watch.phase(ONE.name)
            if change.goes:
                await site.lose(*change.goes)
                await watch.phase(ONE.name)
                await site.have(*change.goes)
                await watch.phase(ONE.name)
                await site.lose(*change.comes)
            elif WIDE.id not in {policy.id for policy in change.comes}:
                await site.lose(*change.comes)
            else:
                await site.have(WIDE)
            await watch.phase(ONE.name)
        assert watch.clear(0, -1) == []
        assert watch.lost() == []

    tell(story)


def test_earlier_policy_of_another_tunnel_takes_over_without_cleartext() -> None:
    async def story(site: Gateway) -> None:
        await site.have(*ONE.pair(), *TWO.pair(), WIDE)
        takes_over = TWO.out(HERE, THERE, priority=10, proto=17)
        async with watched(site) as watch:
            await watch.phase(ONE.name)
            await site.have(takes_over)
            await watch.phase(TWO.name)
            await site.lose(takes_over)
            await watch.phase(ONE.name)
        assert watch.clear(0, -1) == []

    tell(story)
