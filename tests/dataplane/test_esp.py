"""What VPP puts on the wire, an independent ESP implementation reads, and the other way round."""

from __future__ import annotations

import asyncio
import functools

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.ipsec import ESP
from scapy.packet import Packet, Raw
from scapy.utils import checksum

from support.build import LOCAL, LOCAL6, REMOTE, REMOTE6, make_policy
from support.esp import CASES, SPI_OUT, Case, ends_of, kernel_sa, scapy_sa
from support.fake_kernel import FakeKernel
from support.netns import in_new_netns
from support.recorded import PATIENCE_S
from support.vpp_box import vpp_binary
from support.wire import HOST, HOST6, Router, router
from vppipsec.conf.settings import NetlinkSettings, Settings, VppSettings
from vppipsec.kernel.xfrm.values import PolicyDir
from vppipsec.status.server import StatusServer, ask
from vppipsec.sync.engine import Engine

pytestmark = [pytest.mark.vpp, pytest.mark.skipif(vpp_binary() is None, reason="VPP_BIN does not name a VPP")]


def plain(case: Case, outbound: bool) -> Packet:
    """Return a packet of the LAN host to the other side, or back."""
    near, far = (HOST6, "fd02::9") if case.inner6 else (HOST, "10.2.0.9")
    src, dst = (near, far) if outbound else (far, near)
    packet = (
        (IPv6(src=src, dst=dst) if case.inner6 else IP(src=src, dst=dst, flags="DF"))
        / UDP(sport=1000, dport=2000)
        / Raw(b"a secret")
    )
    return packet.__class__(bytes(packet))


def has_right_checksum(packet: Packet) -> bool:
    """Tell whether an IPv4 header's checksum is right; IPv6 has none."""
    return not isinstance(packet, IP) or checksum(bytes(packet)[: 4 * packet.ihl]) == 0


def is_esp(case: Case, packet: Packet) -> bool:
    outer = IPv6 if case.outer6 else IP
    return (
        isinstance(packet, outer)
        and (packet.dst == ends_of(case)[1])
        and (ESP in packet or (case.nat and UDP in packet))
    )


def _with_fresh_checksums(packet: Packet) -> Packet:
    for layer in (packet, packet[UDP]):
        if "chksum" in layer.fields:
            del layer.chksum
    return packet


def is_inner(packet: Packet, expected: Packet) -> bool:
    return isinstance(packet, type(expected)) and packet.dst == expected.dst


async def denied(engine: Engine, wires: Router) -> list[int | None]:
    """Ask how many packets each tunnel decrypted that its selectors do not let in."""
    server = StatusServer(engine, str(wires.box.dir / "status.sock"))
    await server.start()
    try:
        return [row["denied"] for row in await asyncio.to_thread(ask, server.path, "show tunnel")]
    finally:
        await server.stop()


async def exchange(case: Case, wires: Router) -> None:
    kernel = FakeKernel()
    inner = ("fd01::/64", "fd02::/64") if case.inner6 else ("10.1.0.0/24", "10.2.0.0/24")
    ends = (LOCAL6, REMOTE6) if case.outer6 else (LOCAL, REMOTE)
    inbound, outbound = kernel_sa(case, inbound=True), kernel_sa(case, inbound=False)
    kernel.add(inbound, outbound, make_policy(PolicyDir.OUT, *inner, ends=ends))
    kernel.add(*(make_policy(direction, *inner[::-1], ends=ends) for direction in (PolicyDir.IN, PolicyDir.FWD)))
    vpp = VppSettings(api_socket=wires.box.api_socket, stats_socket=str(wires.box.dir / "stats.sock"))
    settings = Settings(vpp=vpp, netlink=NetlinkSettings(batch_delay_ms=0))
    engine = Engine(settings, kernel)
    work = asyncio.create_task(engine.run())
    try:
        async with asyncio.timeout(PATIENCE_S):
            await engine.wait_in_sync()
        sender, reader = scapy_sa(case, inbound), scapy_sa(case, outbound)
        for number in range(1, 4):
            sent = plain(case, outbound=True)
            wires.lan.send(sent)
            seen = wires.wan.receive(lambda packet: is_esp(case, packet))
            assert seen is not None, await wires.cli("show error")
            assert (b"a secret" in bytes(seen)) == (case.key_bytes == 0)
            assert has_right_checksum(seen)
            esp = ESP(bytes(seen[UDP].payload)) if case.nat else seen[ESP]
            assert (esp.spi, esp.seq) == (SPI_OUT, number)
            decrypted = reader.decrypt(seen, verify=True, esn=0) if case.esn else reader.decrypt(seen)
            assert decrypted[UDP].payload.load == b"a secret"
            assert (decrypted.src, decrypted.dst) == (sent.src, sent.dst)

            back = plain(case, outbound=False)
            encrypted = sender.encrypt(back, esn=0) if case.esn else sender.encrypt(back)
            wires.wan.send(encrypted)
            arrived = wires.lan.receive(functools.partial(is_inner, expected=back))
            assert arrived is not None, await wires.cli("show error")
            assert arrived[UDP].payload.load == b"a secret"
            assert (arrived.src, arrived.dst) == (back.src, back.dst)
        assert await denied(engine, wires) == [0]
        for forged in (back.copy(), back.copy()):
            forged.src = "fd03::9" if case.inner6 else "10.3.0.9"  # nothing that the tunnel's selectors let in
            forged = type(back)(bytes(_with_fresh_checksums(forged)))
            wires.wan.send(sender.encrypt(forged, esn=0) if case.esn else sender.encrypt(forged))
        assert wires.lan.receive(functools.partial(is_inner, expected=back), patience_s=0.3) is None
        assert await denied(engine, wires) == [2]
        wires.wan.send(encrypted)  # a replay
        assert wires.lan.receive(functools.partial(is_inner, expected=back), patience_s=0.3) is None
        assert await denied(engine, wires) == [2]
        kernel.delete(inbound, outbound)
        async with asyncio.timeout(PATIENCE_S):
            while kernel.pending:  # noqa: ASYNC110  # a queue has no event for being empty
                await asyncio.sleep(0.001)
            await engine.wait_in_sync()
        wires.lan.send(plain(case, outbound=True))  # the policy is still there
        assert wires.wan.receive(lambda packet: b"a secret" in bytes(packet), patience_s=0.3) is None
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_esp_of_vpp_and_of_scapy_understand_each_other(case: Case) -> None:
    async def story() -> None:
        async with asyncio.timeout(PATIENCE_S), router() as wires:
            await exchange(case, wires)

    in_new_netns(lambda: asyncio.run(story()))
