"""A real VPP under traffic in both directions: no packet is lost when the service is killed, and none at a rekey."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.ipsec import ESP, SecurityAssociation
from scapy.packet import Packet, Raw

from support.charon import Charon, Child
from support.netns import in_new_netns
from support.recorded import PATIENCE_S
from support.vpp_box import vpp_binary
from support.wire import HOST, PEER, Router, router
from vppipsec.conf.settings import NetlinkSettings, Settings, VppSettings
from vppipsec.kernel.xfrm.values import Sa
from vppipsec.status.summary import sa_view
from vppipsec.sync.engine import Engine

pytestmark = [pytest.mark.vpp, pytest.mark.skipif(vpp_binary() is None, reason="VPP_BIN does not name a VPP")]

LOCAL = "192.0.2.1"
FAR_HOST = "10.2.0.9"
PAUSE_S = 0.01
"""Between two packets of each direction."""
NEGOTIATION_S = 0.1
"""From when the router has the SAs of a rekey until the peer sends on them."""


def scapy_sa(sa: Sa, src: str, dst: str) -> SecurityAssociation:
    """Return an SA of the kernel as the peer has it."""
    assert sa.aead is not None
    header = IP(src=src, dst=dst)
    return SecurityAssociation(ESP, spi=sa.spi, crypt_algo="AES-GCM", crypt_key=sa.aead.key, tunnel_header=header)


@dataclass
class Seen:
    """What arrived on the peer's wire: of which SA, with which sequence number, and which packet was in it."""

    spi: int
    seq: int
    number: int


@dataclass
class Peer:
    """The other end of the tunnel, and of both wires: it sends numbered packets both ways and reads what arrives."""

    wires: Router
    reads: dict[int, SecurityAssociation] = field(default_factory=dict)
    sends: SecurityAssociation | None = None
    out: list[Seen] = field(default_factory=list)
    back: list[int] = field(default_factory=list)
    clear: int = 0
    sent: int = 0

    def learns(self, pair: tuple[Sa, Sa]) -> None:
        """Take the pair of a rekey: what arrives on it can be read from now on."""
        self.reads[pair[1].spi] = scapy_sa(pair[1], LOCAL, PEER)

    def uses(self, pair: tuple[Sa, Sa]) -> None:
        """Send on a pair from now on."""
        self.sends = scapy_sa(pair[0], PEER, LOCAL)

    async def talk(self) -> None:
        """Send a packet each way, again and again."""
        assert self.sends is not None
        for number in itertools.count():
            self.wires.lan.send(_packet(HOST, FAR_HOST, number))
            self.wires.wan.send(self.sends.encrypt(_packet(FAR_HOST, HOST, number)))
            self.sent = number + 1
            await asyncio.sleep(PAUSE_S)

    def on_wan(self, packet: Packet) -> None:
        """Take a packet that VPP sent to the peer."""
        if isinstance(packet, IP) and ESP in packet:
            spi, seq = packet[ESP].spi, packet[ESP].seq
            self.out.append(Seen(spi, seq, _number(self.reads[spi].decrypt(packet))))
        elif isinstance(packet, IP) and packet.dst == FAR_HOST:
            self.clear += 1

    def on_lan(self, packet: Packet) -> None:
        """Take a packet that VPP sent to the LAN host."""
        if isinstance(packet, IP) and packet.dst == HOST and UDP in packet:
            self.back.append(_number(packet))

    def assert_nothing_was_lost(self) -> None:
        """Check that every packet arrived once, encrypted, and that no SA began anew."""
        assert self.sent > 100
        assert (self.clear, sorted(seen.number for seen in self.out)) == (0, list(range(self.sent)))
        assert sorted(self.back) == list(range(self.sent))
        for spi in {seen.spi for seen in self.out}:
            seqs = [seen.seq for seen in self.out if seen.spi == spi]
            assert seqs == list(range(1, len(seqs) + 1))


def _packet(src: str, dst: str, number: int) -> Packet:
    packet = IP(src=src, dst=dst) / UDP(sport=1000, dport=2000) / Raw(number.to_bytes(8, "big"))
    return IP(bytes(packet))


def _number(packet: Packet) -> int:
    return int.from_bytes(packet[UDP].payload.load[:8], "big")


@contextlib.contextmanager
def listening(peer: Peer) -> Iterator[None]:
    """Let a peer read both wires as soon as something is there."""
    loop = asyncio.get_running_loop()
    ends = ((peer.wires.wan, peer.on_wan), (peer.wires.lan, peer.on_lan))
    for wire, take in ends:
        loop.add_reader(wire.fileno(), lambda wire=wire, take=take: [take(packet) for packet in wire.waiting()])
    try:
        yield
    finally:
        for wire, _ in ends:
            loop.remove_reader(wire.fileno())


class Service:
    """The service beside one VPP, which can be killed."""

    def __init__(self, api_socket: str, kernel: Charon) -> None:
        netlink = NetlinkSettings(batch_delay_ms=0)
        self._settings = Settings(vpp=VppSettings(api_socket=api_socket), netlink=netlink)
        self._kernel = kernel
        self.start()

    def start(self) -> None:
        """Start one that knows nothing."""
        self._kernel.forget_listener()
        self.engine = Engine(self._settings, self._kernel)
        self._work = asyncio.create_task(self.engine.run())

    async def kill(self) -> None:
        """End it without a word to VPP."""
        assert self.engine.client is not None
        assert self.engine.client._transport is not None
        self.engine.client._transport.abort()
        self._work.cancel()
        await asyncio.gather(self._work, return_exceptions=True)

    async def settle(self) -> None:
        """Wait until it is in sync."""
        async with asyncio.timeout(PATIENCE_S):
            while self._kernel.pending or not self.engine.in_sync:  # noqa: ASYNC110  # a queue has no event for being empty
                await asyncio.sleep(0.005)

    def sad_ids(self) -> dict[str, int]:
        """Return the numbers of the SAs in VPP by SPI."""
        return {row["spi"]: row["sad_id"] for row in sa_view(self.engine)}


@contextlib.asynccontextmanager
async def conversation(wires: Router) -> AsyncIterator[tuple[Peer, Charon, Child, Service]]:
    """Let a peer talk through a tunnel that is up. At the end nothing has been lost."""
    kernel = Charon()
    child, peer = kernel.children[0], Peer(wires)
    service = Service(wires.box.api_socket, kernel)
    await service.settle()
    kernel.establish(child)
    peer.learns(child.pairs[0])
    peer.uses(child.pairs[0])
    await service.settle()
    with listening(peer):
        talk = asyncio.create_task(peer.talk())
        try:
            await asyncio.sleep(0.5)
            yield peer, kernel, child, service
            await asyncio.sleep(0.5)
        finally:
            talk.cancel()
            await asyncio.sleep(0.5)  # what is under way arrives
            await service.kill()
    peer.assert_nothing_was_lost()


def converse(story: Callable[[Peer, Charon, Child, Service], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(PATIENCE_S), router() as wires, conversation(wires) as parts:
            await story(*parts)

    in_new_netns(lambda: asyncio.run(run()))


def test_restart_of_the_service_loses_no_packet() -> None:
    async def story(peer: Peer, kernel: Charon, child: Child, service: Service) -> None:
        before = service.sad_ids()
        for _ in range(3):
            await service.kill()
            await asyncio.sleep(0.3)
            service.start()
            await service.settle()
            assert service.sad_ids() == before
        assert {seen.spi for seen in peer.out} == {child.pairs[0][1].spi}
        assert kernel.asked == []

    converse(story)


def test_no_packet_is_lost_by_rekeys() -> None:
    async def story(peer: Peer, kernel: Charon, child: Child, service: Service) -> None:
        for _ in range(10):
            kernel.establish(child)
            new = child.pairs[-1]
            peer.learns(new)
            await asyncio.sleep(NEGOTIATION_S)
            peer.uses(new)
            old = child.pairs.pop(0)
            kernel.delete(old[1])
            await asyncio.sleep(0.5)
            kernel.delete(old[0])
            await asyncio.sleep(0.4)
        assert len({seen.spi for seen in peer.out}) == 11
        assert kernel.asked == []

    converse(story)


def test_no_packet_is_lost_by_a_rekey_while_there_is_no_service() -> None:
    async def story(peer: Peer, kernel: Charon, child: Child, service: Service) -> None:
        await asyncio.sleep(1.0)  # the new SA must be younger than VPP by the kernel's clock, which tells seconds
        await service.kill()
        kernel.establish(child)  # the peer goes on with the old one, which is deleted after the new one is in VPP
        peer.learns(child.pairs[-1])
        await asyncio.sleep(0.3)
        service.start()
        await service.settle()
        peer.uses(child.pairs[-1])
        old = child.pairs.pop(0)
        await asyncio.sleep(0.3)  # what the peer sent on the old one arrives
        kernel.delete(old[1], old[0])
        await service.settle()
        assert len({seen.spi for seen in peer.out}) == 2
        assert kernel.asked == []

    converse(story)
