"""A security gateway made of VPP and the service. The test captures both wires, and finds the fate of each packet."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import select
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, IPv6
from scapy.layers.ipsec import ESP, SecurityAssociation
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

from support.build import LOCAL, REMOTE, make_policy, make_sa
from support.fake_kernel import FakeKernel
from support.fake_routes import FakeRoutes
from support.netns import in_new_netns
from support.recorded import PATIENCE_S
from support.wire import HOST, HOST6, LAN_MAC, PEER, PEER6, WAN_MAC, Router, Wire, router
from vppipsec.conf.settings import NetlinkSettings, OffloadSettings, Settings, VppSettings
from vppipsec.kernel.text import format_addr
from vppipsec.kernel.xfrm.events import Event, SaAdded
from vppipsec.kernel.xfrm.values import Algorithm, Mode, Policy, PolicyDir, Sa
from vppipsec.sync.engine import Engine

CLEAR, DROP, LAN = "in clear", "dropped", "to the LAN"
"""What becomes of a packet, besides the name of the tunnel that it left by."""
COPIES = 3
"""How often each packet is sent, so that its fate is no accident."""
MARK = b"\xa5numbered"
"""Precedes the number of each packet, so that unencrypted packets are found anywhere."""
LAN_ADDRESS, WAN_ADDRESS = "10.1.0.1", "192.0.2.1"
LAN_ADDRESS6 = "fd01::1"
PEER_B, PEER_B6 = "192.0.2.3", "2001:db8::3"
IP_TYPES = (b"\x08\x00", b"\x86\xdd")
_ROUTES = f"""
ip route add 0.0.0.0/0 via {PEER} host-wan0
ip route add ::/0 via {PEER6} host-wan0
set ip neighbor host-wan0 {PEER_B} {WAN_MAC}
set ip neighbor host-wan0 {PEER_B6} {WAN_MAC}
"""


@dataclass(frozen=True)
class Tunnel:
    """One tunnel of the gateway; `ends` are the local and the remote one."""

    reqid: int = 1
    ends: tuple[bytes, bytes] = (LOCAL, REMOTE)

    @property
    def name(self) -> str:
        """The name of a packet's fate that left by this tunnel."""
        return f"tunnel {self.reqid}"

    def pair(self, generation: int = 0) -> tuple[Sa, Sa]:
        """Return the inbound and the outbound SA after some number of rekeys."""
        low = 0x100 * self.reqid + generation
        return self._sa(0xC0000000 + low, *self.ends[::-1]), self._sa(0xD0000000 + low, *self.ends)

    def _sa(self, spi: int, src: bytes, dst: bytes) -> Sa:
        key = Algorithm("rfc4106(gcm(aes))", spi.to_bytes(4, "big") * 4 + b"salt", 128)
        return make_sa(spi, src, dst, self.reqid, aead=key, replay_window=64 if dst == self.ends[0] else 0)

    def out(self, src: str, dst: str, **selected: int) -> Policy:
        """Return an outbound policy into the tunnel; its further selectors and priority as for `select_by`."""
        return select_by(make_policy(PolicyDir.OUT, src, dst, self.reqid, self.ends), **selected)

    def both(
        self, src: str, dst: str, proto: int = 0, sport: int = 0, dport: int = 0, priority: int = 1000
    ) -> list[Policy]:
        """Return the policies of both directions; `src` and ports are those of the outbound one."""
        back = {"proto": proto, "sport": dport, "dport": sport, "priority": priority}
        return [
            self.out(src, dst, proto=proto, sport=sport, dport=dport, priority=priority),
            select_by(make_policy(PolicyDir.IN, dst, src, self.reqid, self.ends), **back),
            select_by(make_policy(PolicyDir.FWD, dst, src, self.reqid, self.ends), **back),
        ]


def select_by(policy: Policy, proto: int = 0, sport: int = 0, dport: int = 0, priority: int = 1000) -> Policy:
    """Return a policy that also selects a protocol and single ports; 0 is any. For ICMP `sport` is the type."""
    masks = {"sport_mask": 0xFFFF if sport else 0, "dport_mask": 0xFFFF if dport else 0}
    selector = replace(policy.selector, proto=proto, sport=sport, dport=dport, **masks)
    return replace(policy, selector=selector, priority=priority)


def bypass(src: str, dst: str, **selected: int) -> Policy:
    """Return a BYPASS policy."""
    return replace(Tunnel().out(src, dst, **selected), templates=())


def block(src: str, dst: str, **selected: int) -> Policy:
    """Return a DISCARD policy."""
    return replace(bypass(src, dst, **selected), action=1)


def _ip(src: str, dst: str) -> Packet:
    return IPv6(src=src, dst=dst) if ":" in dst else IP(src=src, dst=dst)


def _host(dst: str, src: str) -> str:
    return src or (HOST6 if ":" in dst else HOST)


def udp(dst: str, dport: int = 2000, src: str = "", sport: int = 1000) -> Packet:
    """Return a packet from the LAN host, or from another source."""
    return _ip(_host(dst, src), dst) / UDP(sport=sport, dport=dport)


def tcp(dst: str, dport: int = 2000, src: str = "") -> Packet:
    """Return a segment from the LAN host, or from another source."""
    return _ip(_host(dst, src), dst) / TCP(sport=1000, dport=dport, flags="S")


def ping(dst: str, src: str = "", is_reply: bool = False) -> Packet:
    """Return an echo request or reply from the LAN host, or from another source."""
    if ":" in dst:
        return _ip(_host(dst, src), dst) / (ICMPv6EchoReply() if is_reply else ICMPv6EchoRequest())
    return _ip(_host(dst, src), dst) / ICMP(type="echo-reply" if is_reply else "echo-request")


def parse(data: bytes) -> Packet:
    """Return an IP packet of either family."""
    return IPv6(data) if data[0] >> 4 == 6 else IP(data)


def innermost(packet: Packet) -> Packet:
    """Return the innermost IP header of a packet with its payload."""
    layers = [packet.getlayer(number) for number in range(len(packet.layers()))]
    return [layer for layer in layers if isinstance(layer, IP | IPv6)][-1]


class Frame(NamedTuple):
    """A frame that VPP sent, and its wire."""

    wire: Wire
    data: bytes

    @property
    def packet(self) -> Packet:
        """The IP packet in it."""
        return parse(self.data[14:])


class Ear(threading.Thread):
    """Captures all frames that VPP sends on both wires, in order."""

    def __init__(self, wires: Router) -> None:
        super().__init__(daemon=True)
        self.frames: list[Frame] = []
        self._wires = {wires.lan.fileno(): (wires.lan, LAN_MAC), wires.wan.fileno(): (wires.wan, WAN_MAC)}
        self._ended = threading.Event()

    def run(self) -> None:
        """Capture until stopped."""
        while not self._ended.is_set():
            for descriptor in select.select(list(self._wires), [], [], 0.1)[0]:
                wire, own = self._wires[descriptor]
                data = os.read(descriptor, 65536)
                if data[6:12] != bytes.fromhex(own.replace(":", "")):  # a packet socket also receives what it sends
                    self.frames.append(Frame(wire, data))

    def stop(self) -> None:
        """Stop capturing."""
        self._ended.set()
        self.join()


class Passed(NamedTuple):
    """An IP packet that left VPP: by which path, and its SPI and sequence number if it was in ESP."""

    outcome: str
    inner: Packet
    spi: int = 0
    seq: int = 0


class Seen(NamedTuple):
    """A numbered packet on a wire: its fate, and its SPI and sequence number if it was in ESP."""

    number: int
    outcome: str
    spi: int = 0
    seq: int = 0


def peers_sa(sa: Sa) -> SecurityAssociation:
    """Return one of the kernel's SAs in the peer's form."""
    assert sa.aead is not None
    header = _ip(format_addr(sa.saddr), format_addr(sa.daddr)) if sa.mode == Mode.TUNNEL else None
    return SecurityAssociation(ESP, spi=sa.spi, crypt_algo="AES-GCM", crypt_key=sa.aead.key, tunnel_header=header)


class Kernel(FakeKernel):
    """A kernel that shares every SA with the peer: `reads` has them by SPI, with the name of the tunnel."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: dict[int, tuple[str, SecurityAssociation]] = {}

    def changed(self, event: Event) -> None:
        if isinstance(event, SaAdded) and event.sa.aead is not None:
            self.reads[event.sa.spi] = (f"tunnel {event.sa.reqid}", peers_sa(event.sa))
        super().changed(event)


@dataclass
class Gateway:
    """VPP, the service, a kernel that the test sets, and both wires."""

    wires: Router
    kernel: Kernel
    settings: Settings
    ear: Ear
    routes: FakeRoutes | None = None
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    # The service

    def start(self) -> None:
        """Start a service without knowledge."""
        self.kernel.forget_listener()
        self.engine = Engine(self.settings, self.kernel, routes=self.routes)
        self._work = asyncio.create_task(self.engine.run())

    async def kill(self) -> None:
        """End the service without a shutdown."""
        if self.engine.client is not None and self.engine.client._transport is not None:
            self.engine.client._transport.abort()
        self._work.cancel()
        await asyncio.gather(self._work, return_exceptions=True)

    async def settle(self) -> None:
        """Wait until VPP holds the desired state."""
        deadline = time.monotonic() + PATIENCE_S
        while self.kernel.pending or (self.routes and self.routes.pending) or not self.engine.in_sync:
            assert time.monotonic() < deadline, await self.steering()
            await asyncio.sleep(0.001)

    async def settle_for(self, told: Callable[[], bool]) -> None:
        """Wait until VPP has reported a change and holds the desired state after it."""
        deadline = time.monotonic() + PATIENCE_S
        while not told():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.001)
        await self.settle()

    async def steering(self) -> str:
        """Return VPP's steering for outbound policies, as VPP prints it."""
        tables = sorted(self.engine.vpp.layers.layers)
        asked = ["show abf policy", "show abf attach", "show acl-plugin acl"]
        asked += [f"show {family} fib table {number}" for family in ("ip", "ip6") for number in tables]
        return "\n".join([f"{command}:\n{await self.wires.cli(command)}" for command in asked])

    async def have(self, *items: Sa | Policy) -> None:
        """Add SAs and policies to the kernel, and wait until VPP follows."""
        self.kernel.add(*items)
        await self.settle()

    async def open(self, *tunnels: Tunnel) -> None:
        """Give tunnels their SAs."""
        for tunnel in tunnels:
            await self.have(*tunnel.pair())

    async def lose(self, *items: Sa | Policy) -> None:
        """Delete SAs and policies from the kernel, and wait until VPP follows."""
        self.kernel.delete(*items)
        await self.settle()

    # Packets

    async def fates(self, *packets: Packet) -> list[str]:
        """Send packets to VPP from the LAN, and return the fate of each. A packet that is seen twice has two fates."""
        return await self._fates(self.wires.lan, packets, lambda packet: packet)

    async def brought(self, tunnel: Tunnel, *packets: Packet) -> list[str]:
        """Send packets through a tunnel to VPP, and return the fate of each."""
        return await self._fates(self.wires.wan, packets, self.kernel.reads[tunnel.pair()[0].spi][1].encrypt)

    async def _fates(self, wire: Wire, packets: Iterable[Packet], wrap: Callable[[Packet], Packet]) -> list[str]:
        first = len(self.ear.frames)
        sent: list[dict[int, Packet]] = []
        for packet in packets:
            copies = {}
            for number in itertools.islice(self._numbers, COPIES):
                copies[number] = parse(bytes(packet / Raw(MARK + number.to_bytes(8, "big"))))
                wire.send(wrap(copies[number]))
            sent.append(copies)
        await self.quiet()
        found: dict[int, list[str]] = {}
        every = {number: packet for copies in sent for number, packet in copies.items()}
        for seen, inner in self.read(first):
            found.setdefault(seen.number, []).append(seen.outcome)
            if seen.spi:
                assert bytes(inner.payload) == bytes(every[seen.number].payload)
                assert (inner.src, inner.dst) == (every[seen.number].src, every[seen.number].dst)
        return [" and ".join(sorted({"+".join(found.get(number, (DROP,))) for number in copies})) for copies in sent]

    def read(self, first: int) -> Iterator[tuple[Seen, Packet]]:
        """Yield the numbered packets that left VPP, from frame `first` on."""
        for passed in self.passed(first):
            number = number_in(bytes(passed.inner))
            if number is not None:
                yield Seen(number, passed.outcome, passed.spi, passed.seq), passed.inner

    def passed(self, first: int) -> Iterator[Passed]:
        """Yield the IP packets that left VPP, from frame `first` on; those in ESP are decrypted."""
        for frame in self.ear.frames[first:]:
            if frame.data[12:14] not in IP_TYPES:
                continue
            outer = frame.packet
            if frame.wire is self.wires.wan and ESP in outer:
                spi, seq = outer[ESP].spi, outer[ESP].seq
                outcome, reader = self.kernel.reads[spi]
                yield Passed(outcome, innermost(reader.decrypt(outer)), spi, seq)
            else:
                yield Passed(LAN if frame.wire is self.wires.lan else CLEAR, outer)

    async def quiet(self) -> None:
        """Wait until every packet that was sent to VPP has left it or never will: VPP has answered a later request."""
        for wire in (self.wires.lan, self.wires.wan, self.wires.lan, self.wires.wan):
            first = len(self.ear.frames)
            own, host, asked = (LAN_MAC, HOST, LAN_ADDRESS) if wire is self.wires.lan else (WAN_MAC, PEER, WAN_ADDRESS)
            wire.send(ARP(hwsrc=own, psrc=host, pdst=asked))
            await self.hears(lambda frame, wire=wire: frame.wire is wire and frame.data[12:14] == b"\x08\x06", first)

    async def hears(self, wanted: Callable[[Frame], bool], first: int = 0) -> Frame:
        """Wait for a frame from VPP, from frame `first` on."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            for frame in self.ear.frames[first:]:
                if wanted(frame):
                    return frame
            await asyncio.sleep(0.001)
        raise AssertionError("VPP did not send what was waited for")


def number_in(data: bytes) -> int | None:
    """Return the number of a packet, None where it has none."""
    start = data.find(MARK)
    return None if start < 0 else int.from_bytes(data[start + len(MARK) : start + len(MARK) + 8], "big")


class Stream(threading.Thread):
    """Sends a packet from the LAN again and again, in a thread. `sent` is the number of the next one."""

    def __init__(self, gateway: Gateway, packet: Packet, pause_s: float = 0.004) -> None:
        super().__init__(daemon=True)
        self.sent = 0
        self._gateway = gateway
        self._pause_s = pause_s
        self._first = len(gateway.ear.frames)
        whole = parse(bytes(packet / Raw(MARK + bytes(8))))
        if isinstance(whole, IP):
            whole[UDP].chksum = 0
        head = bytes(Ether(src=LAN_MAC, dst=gateway.wires.lan.vpp_mac) / whole)
        self._head = head[: head.index(MARK) + len(MARK)]
        self._ended = threading.Event()

    def run(self) -> None:
        """Send until stopped."""
        descriptor = self._gateway.wires.lan.fileno()
        while not self._ended.wait(self._pause_s):
            number = self.sent
            self.sent += 1
            os.write(descriptor, self._head + number.to_bytes(8, "big"))

    async def go_on(self, packets: int = 50) -> None:
        """Wait until this many more are sent."""
        until = self.sent + packets
        while self.sent < until:  # noqa: ASYNC110  # the other thread is no task
            await asyncio.sleep(0.002)

    async def end(self) -> list[Seen]:
        """Stop, and return the fates of the packets that left VPP, in order."""
        self._ended.set()
        self.join()
        await self._gateway.quiet()
        return [seen for seen, _ in self._gateway.read(self._first)]


@contextlib.asynccontextmanager
async def gateway(offload: OffloadSettings | None = None, routes: FakeRoutes | None = None) -> AsyncIterator[Gateway]:
    """Start VPP with default routes to the peer, and the service."""
    async with router() as wires:
        for line in _ROUTES.strip().split("\n"):
            assert not await wires.cli(line)
        vpp = VppSettings(api_socket=wires.box.api_socket, stats_socket=str(wires.box.dir / "stats.sock"))
        settings = Settings(vpp=vpp, netlink=NetlinkSettings(batch_delay_ms=0), offload=offload or OffloadSettings())
        made = Gateway(wires, Kernel(), settings, Ear(wires), routes)
        made.ear.start()
        made.start()
        try:
            yield made
        finally:
            await made.kill()
            made.ear.stop()


def tell(
    story: Callable[[Gateway], Awaitable[None]],
    offload: OffloadSettings | None = None,
    limit_s: float = PATIENCE_S,
    routes: FakeRoutes | None = None,
) -> None:
    """Run a test in a network namespace of its own."""

    async def run() -> None:
        async with asyncio.timeout(limit_s), gateway(offload, routes) as made:
            await story(made)

    in_new_netns(lambda: asyncio.run(run()), limit_s + 30)
