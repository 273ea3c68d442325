"""Packets of VTIs that are in VRFs, on the wires of a real VPP: the VRF's table forwards them, and never another one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6PacketTooBig, IPv6
from scapy.packet import Packet, Raw

from support.fake_routes import FakeRoutes
from support.gateway import CLEAR, DROP, LAN, MARK, Gateway, Tunnel, parse, tcp, tell, udp
from support.vpp_box import vpp_binary
from support.wire import HOST, HOST6, LAN_MAC
from vppipsec.conf.settings import OffloadSettings
from vppipsec.kernel.xfrm.values import Policy, Sa
from vppipsec.status.tunnels import tunnel_rows

pytestmark = [pytest.mark.vpp, pytest.mark.skipif(vpp_binary() is None, reason="VPP_BIN does not name a VPP")]

VRF, OTHER_VRF = 10, 20
FAR, FAR6, STRANGER = "10.2.0.9", "fd02::9", "10.3.0.9"
_LAN_IN_VRF = f"""
ip table add {VRF}
ip6 table add {VRF}
set interface ip address del host-lan0 all
set interface ip table host-lan0 {VRF}
set interface ip6 table host-lan0 {VRF}
set interface ip address host-lan0 10.1.0.1/24
set interface ip address host-lan0 fd01::1/64
set ip neighbor host-lan0 {HOST} {LAN_MAC}
set ip neighbor host-lan0 {HOST6} {LAN_MAC}
"""
OUT, OUT6 = udp(FAR), udp(FAR6)
BACK, BACK6, SPOOFED = udp(HOST, src=FAR), udp(HOST6, src=FAR6), udp(HOST, src=STRANGER)


class Child(Tunnel):
    """A child of vti7, for 10.2.0.0/16 and fd02::/64 on the other side."""

    def pair(self, generation: int = 0) -> tuple[Sa, Sa]:
        inbound, outbound = super().pair(generation)
        return inbound._replace(if_id=7), outbound._replace(if_id=7)

    def both(self, src: str, dst: str, *selected: int, **more: int) -> list[Policy]:
        return [replace(policy, if_id=7) for policy in super().both(src, dst, *selected, **more)]

    def all(self, *remotes: str) -> list[Sa | Policy]:
        """Return its SAs and policies."""
        policies = [self.both("::/0" if ":" in it else "0.0.0.0/0", it) for it in remotes]
        return [*self.pair(), *(policy for of_one in policies for policy in of_one)]


ONE = Child()
WHOLE = ONE.all("10.2.0.0/16", "fd02::/64")


async def begun(site: Gateway, table: int = VRF, carried: Sequence[Sa | Policy] = WHOLE) -> FakeRoutes:
    """Put the LAN into a VRF, and have a tunnel of vti7, which is in the VRF of a table. Return the kernel's routes."""
    for line in _LAN_IN_VRF.strip().split("\n"):
        assert not await site.wires.cli(line)
    routes = site.routes
    assert routes is not None
    routes.link("vti7", 7, table=table)
    if table:
        routes.add("10.2.0.0/16", "vti7", table=table)
        routes.add("fd02::/64", "vti7", table=table)
    await site.have(*carried)
    return routes


def said(site: Gateway) -> set[tuple[str, str]]:
    """Return what status says of tunnels: state and reason."""
    return {(row["state"], row["reason"]) for row in tunnel_rows(site.engine)}


def test_what_comes_out_of_a_vti_is_forwarded_by_its_vrfs_table_alone() -> None:
    async def story(site: Gateway) -> None:
        await begun(site)
        assert await site.brought(ONE, BACK, BACK6) == [LAN, LAN]
        assert await site.brought(ONE, SPOOFED, udp("10.9.9.9", src=FAR)) == [DROP, DROP], (
            "the main table has a default route"
        )
        assert await site.fates(OUT, OUT6) == [ONE.name, ONE.name]

    tell(story, routes=FakeRoutes())


def test_ipv6_in_an_ipv4_tunnel_is_not_forwarded_by_the_main_table() -> None:
    async def story(site: Gateway) -> None:
        await begun(site, VRF, ONE.all("10.2.0.0/16"))
        (state,) = site.engine.tunnels.values()
        assert not await site.wires.cli(f"enable ip6 interface ipsec{state.actual.instance}")  # as linux-nl does
        assert await site.brought(ONE, BACK, SPOOFED, BACK6) == [LAN, LAN, DROP]

    tell(story, OffloadSettings(selector_enforcement=False), routes=FakeRoutes())


def test_a_vti_goes_into_a_vrf_and_out_of_it_while_its_tunnel_is_up() -> None:
    async def story(site: Gateway) -> None:
        routes = await begun(site, 0)
        assert await site.brought(ONE, BACK, BACK6) == [CLEAR, CLEAR], "the main table has default routes"
        for _ in range(3):
            routes.link("vti7", 7, table=VRF)
            routes.add("10.2.0.0/16", "vti7", table=VRF)
            await site.settle()
            assert await site.brought(ONE, BACK, BACK6) == [LAN, LAN]
            assert await site.fates(OUT) == [ONE.name]
            routes.link("vti7", 7)
            routes.delete("10.2.0.0/16", table=VRF)
            await site.settle()
            assert await site.brought(ONE, BACK, BACK6) == [CLEAR, CLEAR]

    tell(story, routes=FakeRoutes())


def test_in_the_moments_of_its_move_nothing_is_forwarded_by_another_table() -> None:
    async def story(site: Gateway) -> None:
        routes = await begun(site, 0)
        encrypt = site.kernel.reads[ONE.pair()[0].spi][1].encrypt
        for table, outcome in ((VRF, LAN), (0, CLEAR), (VRF, LAN)):
            first, number, numbers = len(site.ear.frames), 0, {False: 0, True: 0}
            routes.link("vti7", 7, table=table)
            moved = asyncio.create_task(site.settle())
            while number < 400 or not moved.done():
                number += 1
                for packet in (BACK, BACK6):
                    site.wires.wan.send(encrypt(parse(bytes(packet / Raw(MARK + number.to_bytes(8, "big"))))))
                await asyncio.sleep(0)
            await moved
            await site.quiet()
            for ip6 in (False, True):
                there = [
                    (seen.number, seen.outcome) for seen, inner in site.read(first) if isinstance(inner, IPv6) == ip6
                ]
                fates = [outcome for _, outcome in sorted(there)]  # two wires are heard in no order
                assert fates[-1] == outcome
                assert fates == sorted(fates, key=lambda seen: seen == outcome), "once it has moved, it has"
                numbers[ip6] = len(fates)
            assert 0 < numbers[False] <= number
            assert 0 < numbers[True] <= number

    tell(story, routes=FakeRoutes())


def test_tunnel_without_its_vrf_table_decrypts_nothing_until_it_exists() -> None:
    async def story(site: Gateway) -> None:
        routes = await begun(site, OTHER_VRF)
        assert await site.brought(ONE, BACK, BACK6) == [DROP, DROP]
        assert said(site) == {("unsupported", f"VPP has no IPv4 table {OTHER_VRF}, the one of its VTI's VRF")}
        assert not await site.wires.cli(f"ip table add {OTHER_VRF}")
        await site.settle_for(lambda: "IPv6" in str(said(site)))
        assert said(site) == {("unsupported", f"VPP has no IPv6 table {OTHER_VRF}, the one of its VTI's VRF")}
        assert not await site.wires.cli(f"ip6 table add {OTHER_VRF}")
        await site.settle_for(lambda: "unsupported" not in str(said(site)))
        assert await site.brought(ONE, BACK, BACK6) == [DROP, DROP], "nothing is in that VRF"
        routes.link("vti7", 7, table=VRF)
        await site.settle()
        assert await site.brought(ONE, BACK, BACK6) == [LAN, LAN]
        routes.unlink("vti7")
        await site.settle()
        assert await site.brought(ONE, BACK, BACK6) == [DROP, DROP]
        assert said(site) == {("pending", "there is no interface with if_id 7")}

    tell(story, routes=FakeRoutes())


def test_children_of_a_vti_are_in_its_vrf_each_with_its_selectors() -> None:
    async def story(site: Gateway) -> None:
        two = Child(2)
        routes = await begun(site)
        routes.add("10.3.0.0/16", "vti7", table=VRF)
        await site.have(*two.all("10.3.0.0/16"))
        theirs = udp(HOST, src=STRANGER)
        assert await site.brought(ONE, BACK, theirs) == [LAN, DROP]
        assert await site.brought(two, BACK, theirs) == [DROP, LAN]
        assert await site.fates(OUT, udp(STRANGER)) == [ONE.name, two.name]
        routes.link("vti7", 7)
        await site.settle()
        assert await site.brought(ONE, BACK, theirs) == [CLEAR, DROP]
        assert await site.brought(two, BACK, theirs) == [DROP, CLEAR]

    tell(story, routes=FakeRoutes())


def test_a_restarted_service_leaves_a_vti_in_its_vrf() -> None:
    async def story(site: Gateway) -> None:
        routes = await begun(site)
        await site.kill()
        assert await site.brought(ONE, BACK, BACK6) == [LAN, LAN]
        routes.forget_listener()
        site.start()
        await site.settle()
        assert site.engine.client is not None
        assert await site.brought(ONE, BACK, BACK6) == [LAN, LAN]
        await site.kill()
        routes.link("vti7", 7)
        routes.forget_listener()
        site.start()
        await site.settle()
        assert await site.brought(ONE, BACK, BACK6) == [CLEAR, CLEAR]

    tell(story, routes=FakeRoutes())


def test_a_vrf_that_vpp_is_told_to_delete_stays_while_a_vti_is_in_it() -> None:
    async def story(site: Gateway) -> None:
        routes = await begun(site, OTHER_VRF)
        for family in ("ip", "ip6"):
            assert not await site.wires.cli(f"{family} table add {OTHER_VRF}")
        await site.settle_for(lambda: "unsupported" not in str(said(site)))
        for family in ("ip", "ip6"):
            assert not await site.wires.cli(f"{family} table del {OTHER_VRF}")
        site.engine.reload(site.settings)
        await site.settle()
        assert await site.brought(ONE, BACK, BACK6) == [DROP, DROP]
        routes.link("vti7", 7)
        await site.settle()
        assert f"VRF:{OTHER_VRF}" not in await site.wires.cli("show ip fib summary")
        assert f"VRF:{OTHER_VRF}" not in await site.wires.cli("show ip6 fib summary")
        assert await site.brought(ONE, BACK, BACK6) == [CLEAR, CLEAR]

    tell(story, routes=FakeRoutes())


def _too_long(dst: str) -> Packet:
    head = IPv6(src=HOST6, dst=dst) if ":" in dst else IP(src=HOST, dst=dst, flags="DF")
    return parse(bytes(head / UDP(sport=1, dport=2) / Raw(bytes(1430))))


def test_who_is_in_the_vrf_is_told_there_what_is_too_long() -> None:
    async def story(site: Gateway) -> None:
        assert not await site.wires.cli("set interface mtu packet 1500 host-wan0")
        await begun(site)
        first = len(site.ear.frames)
        site.wires.lan.send(_too_long(FAR))
        site.wires.lan.send(_too_long(FAR6))
        await site.quiet()
        answers = [passed.inner for passed in site.passed(first)]
        assert len(answers) == 2
        assert [answer.dst for answer in answers] == [HOST, HOST6]
        assert (answers[0].src, answers[0][ICMP].nexthopmtu) == ("10.1.0.1", 1446)
        assert (answers[1].src, answers[1][ICMPv6PacketTooBig].mtu) == ("fd01::1", 1446)

    tell(story, routes=FakeRoutes())


def test_vti_classifier_selects_children_in_a_vrf() -> None:
    async def story(site: Gateway) -> None:
        two = Child(2)
        routes = await begun(site)
        await site.have(*two.pair(), *two.both("0.0.0.0/0", "10.2.0.0/16", 6, priority=1))
        assert await site.fates(OUT, tcp(FAR)) == [ONE.name, two.name]
        assert await site.brought(ONE, BACK) == [LAN]
        routes.link("vti7", 7)
        await site.settle()
        assert await site.fates(OUT, tcp(FAR)) == [ONE.name, two.name]
        assert await site.brought(ONE, BACK) == [CLEAR]

    tell(story, routes=FakeRoutes())
