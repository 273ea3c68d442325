"""The router's own packets: the engine between a kernel of the test's, which is told where to send them, and a stand-in."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from support.build import LOCAL, LOCAL6, REMOTE, REMOTE6, SHA256, make_policy, make_sa, sa_in, sa_out
from support.fake_routes import MAIN, FakeRoutes
from support.lanwan import make_loopback, set_pair, set_table
from support.recorded import PATIENCE_S
from support.rig import Rig, rig
from vppipsec.kernel.hostpath.apply import HostError, HostRedirects
from vppipsec.kernel.hostpath.nft_ruleset import PASS_IN_POLICY, TunnelSas, pass_out_policy
from vppipsec.kernel.netlink.wire import AF_INET, AF_INET6
from vppipsec.kernel.text import parse_addr
from vppipsec.kernel.xfrm.values import Algorithm, PolicyDir
from vppipsec.status.summary import sa_view, sync_view
from vppipsec.status.tunnels import policy_rows, tunnel_rows
from vppipsec.sync.apply import host_interfaces, steering
from vppipsec.sync.desired.host_interfaces import MAX_HOST_INTERFACES
from vppipsec.sync.preview import dry_run
from vppipsec.vpp.api.interface import InterfaceAddressAddDel, SetInterfaceTable
from vppipsec.vpp.api.ip import MrouteAdd
from vppipsec.vpp.inventory import read_multicast_entries
from vppipsec.vpp.types import LOCAL_INDEX, Prefix, Route
from vppstandin.linuxcp import TUN
from vppstandin.server import Fault

LAN, LOOPBACK, VTI, DUMMY = "10.1.0.1", "10.1.0.77", "10.99.0.1", "10.1.0.78"
RED, BLUE = 100, 200
POLICIES = tuple(make_policy(way) for way in (PolicyDir.OUT,)) + tuple(
    make_policy(way, "10.2.0.0/24", "10.1.0.0/24") for way in (PolicyDir.IN, PolicyDir.FWD)
)
SITE = (sa_in(1), sa_out(2), *POLICIES)
OF_SITE = TunnelSas(LOCAL, REMOTE, 1, AF_INET)


class Kernel:
    """Takes what it is told, or refuses with a sentence."""

    def __init__(self) -> None:
        self.told: list[HostRedirects] = []
        self.refuses = ""
        self.unmarked = ""
        self.breaks: Exception | None = None
        self.may_answer = threading.Event()
        self.may_answer.set()

    def send(self, wanted: HostRedirects) -> None:
        self.told.append(wanted)
        assert self.may_answer.wait(20)
        if self.breaks is not None:
            raise self.breaks
        if self.refuses:
            raise HostError(self.refuses, self.unmarked)
        if self.unmarked and wanted.marks:
            raise HostError("", self.unmarked)


def play(story: Callable[[Rig, FakeRoutes, Kernel], Awaitable[None]], fault: Fault | None = None) -> None:
    """Run a story with a router that has a LAN, a loopback address and linux-cp."""

    async def run() -> None:
        routes, kernel = FakeRoutes(), Kernel()
        routes.link("lan")
        routes.address("lan", f"{LAN}/24")
        routes.link("lo")
        routes.address("lo", f"{LOOPBACK}/32")
        async with asyncio.timeout(PATIENCE_S), rig("standin", fault, routes=routes, send=kernel.send) as made:
            await set_pair(await made.admin(), made.wan, "wan")
            made.start()
            await story(made, routes, kernel)

    asyncio.run(run())


def hosts(made: Rig) -> dict[int, str]:
    """Return the host interfaces that VPP has for tunnels: reqid -> name."""
    assert made.standin is not None
    names = {pair.phy: pair.name for pair in made.standin.world.linux_cp.pairs.values()}
    states = {key.reqid: state.actual.sw_if_index for key, state in made.engine.tunnels.items()}
    return {reqid: names[index] for reqid, index in states.items() if index in names}


def targets_of(made: Rig) -> dict[int, str]:
    """Return what status says of who encrypts the router's own packets: reqid -> sentence."""
    return {row["reqid"]: row["own_packets"] for row in tunnel_rows(made.engine)}


def routes_for_us(made: Rig) -> set[Route]:
    return {route for route, paths in made.engine.vpp.routes.items() if paths == LOCAL_INDEX}


def addresses_for_us(made: Rig) -> set[Prefix]:
    routes = routes_for_us(made)
    assert not any(route.table for route in routes)
    return {route.prefix for route in routes}


def host(text: str) -> Prefix:
    return Prefix(parse_addr(text), 8 * len(parse_addr(text)))


def test_tunnel_for_own_packets_gets_a_host_interface_the_kernel_uses() -> None:
    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        made.kernel.add(*SITE)
        await made.settle()
        (name,) = hosts(made).values()
        told = kernel.told[-1]
        assert told == HostRedirects(marks={OF_SITE: name})
        assert addresses_for_us(made) == {host(LAN), host(LOOPBACK)}
        assert targets_of(made) == {1: f"VPP, over {name}"}
        before = len(kernel.told)
        made.kernel.add(sa_in(3), sa_out(4))  # a rekey
        await made.settle()
        assert len(kernel.told) == before
        made.kernel.delete(*SITE, sa_in(3), sa_out(4))
        await made.settle()
        assert kernel.told[-1] == HostRedirects()
        assert hosts(made) == {}
        assert addresses_for_us(made) == set()

    play(story)


async def begin_vti(made: Rig, routes: FakeRoutes, table: int = 0) -> None:
    """Have a tunnel for all addresses of a VTI, which has one itself."""
    routes.link("vti7", if_id=7, table=table)
    routes.address("vti7", f"{VTI}/30")
    routes.add("10.99.0.0/30", "vti7", table=table or MAIN)
    everything = "0.0.0.0/0"
    policies = [make_policy(way, everything, everything, 7, if_id=7) for way in PolicyDir]
    made.kernel.add(sa_in(1, 7, if_id=7), sa_out(2, 7, if_id=7), *policies)
    await made.settle()


def test_vti_output_goes_to_the_host_interface_of_its_child() -> None:
    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        await begin_vti(made, routes)
        (name,) = hosts(made).values()
        told = kernel.told[-1]
        assert [[choice.host for choice in choices] for choices in told.to_host.values()] == [[name]]
        assert list(told.from_host) == [name]
        assert told.marks == {}
        assert addresses_for_us(made) == {host(LAN), host(LOOPBACK), host(VTI)}
        assert targets_of(made) == {7: f"VPP, over {name}"}

    play(story)


async def receiving(made: Rig) -> set[tuple[int, bool]]:
    """Return the tables in which VPP takes multicast of links for the router's own, by what it says."""
    found = await read_multicast_entries(
        made.admins[0], [(table, ip6) for table in (0, RED, BLUE) for ip6 in (False, True)]
    )
    return {table for table, has_ours in found.items() if has_ours}


def test_link_multicast_is_received_for_vtis_and_requested_once() -> None:
    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        made.kernel.add(*SITE)
        await made.settle()
        assert await receiving(made) == set(), "policies without if_id bring none"
        made.kernel.delete(*SITE)
        for ip6 in (False, True):
            await set_table(await made.admin(), RED, ip6, has_multicast=True)
            await set_table(await made.admin(), BLUE, ip6)
        await begin_vti(made, routes)
        assert await receiving(made) == {(0, False)}
        made.kernel.add(*(make_policy(way, "::/0", "::/0", 7, if_id=7) for way in PolicyDir))
        for table in (RED, BLUE, 0):
            routes.link("vti7", if_id=7, table=table)
            await made.settle()
        assert await receiving(made) == {(table, ip6) for table in (0, RED) for ip6 in (False, True)}
        assert sync_view(made.engine)["state"] == "in-sync", "BLUE has no multicast in VPP"
        assert made.standin is not None
        made.standin.requests.clear()
        await made.restart_engine()
        await made.settle()
        assert MrouteAdd.message not in made.standin.requests

    play(story)


def test_a_table_that_comes_again_receives_multicast_again() -> None:
    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        await set_table(await made.admin(), RED, ip6=False, has_multicast=True)
        await begin_vti(made, routes, RED)
        assert await receiving(made) == {(RED, False)}
        routes.link("vti7", if_id=7)
        await made.settle()
        for is_add in (False, True):
            await set_table(made.admins[0], RED, ip6=False, is_add=is_add, has_multicast=True)
        assert await receiving(made) == {(0, False)}
        routes.link("vti7", if_id=7, table=RED)
        await made.settle()
        assert await receiving(made) == {(0, False), (RED, False)}

    play(story)


def test_vti_keeps_its_host_interface_from_vrf_to_vrf() -> None:
    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        for table, ip6 in itertools.product((RED, BLUE), (False, True)):
            await set_table(await made.admin(), table, ip6)
        routes.link("dummy")
        routes.address("dummy", f"{DUMMY}/32")
        await begin_vti(made, routes)
        for table in (RED, BLUE, 0, RED):
            for name, if_id in (("vti7", 7), ("dummy", 0)):
                routes.link(name, if_id, table=table)
            await made.settle()
            (name,) = hosts(made).values()
            told = kernel.told[-1]
            assert [[choice.host for choice in choices] for choices in told.to_host.values()] == [[name]]
            assert list(told.from_host) == [name]
            assert targets_of(made) == {7: f"VPP, over {name}"}
            of_main = {Route(host(LAN)), Route(host(LOOPBACK))}
            there = {Route(host(VTI), table), Route(host(DUMMY), table)}
            assert routes_for_us(made) == (there if table else there | of_main)
        before, told = hosts(made), kernel.told[-1]
        await made.restart_engine()
        await made.settle()
        assert (hosts(made), kernel.told[-1], routes_for_us(made)) == (before, told, there)

    play(story)


def test_vrf_addresses_are_added_unless_vpp_has_them_on_interfaces() -> None:
    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        admin, there, elsewhere = await made.admin(), "10.9.0.1", "10.9.0.2"
        await set_table(admin, RED, ip6=False)
        await make_loopback(admin, f"{elsewhere}/32")
        index = await make_loopback(admin)
        await admin.run([SetInterfaceTable(index, False, RED), InterfaceAddressAddDel(index, parse_addr(there))])
        routes.link("red", table=RED)
        for address in (there, elsewhere, "fd09::1"):
            routes.address("red", f"{address}/{128 if ':' in address else 32}")
        await begin_vti(made, routes, RED)
        assert routes_for_us(made) == {Route(host(VTI), RED), Route(host(elsewhere), RED)}

    play(story)


def test_of_a_vtis_children_those_that_vpp_carries_get_what_is_for_them() -> None:
    def child(reqid: int, dst: str, **changes: Any) -> list[Any]:
        policies = [make_policy(PolicyDir.OUT, "10.1.0.0/24", dst, reqid, if_id=7)]
        policies += [make_policy(way, dst, "10.1.0.0/24", reqid, if_id=7) for way in (PolicyDir.IN, PolicyDir.FWD)]
        sas = [make(10 * reqid + at, reqid, if_id=7, **changes) for at, make in enumerate((sa_in, sa_out))]
        return [*sas, *policies]

    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        routes.link("vti7", if_id=7)
        routes.add("10.2.0.0/16", "vti7")
        camellia: dict[str, Any] = {"aead": None, "crypt": Algorithm("cbc(camellia)", bytes(16)), "auth": SHA256}
        made.kernel.add(*child(1, "10.2.1.0/24"), *child(2, "10.2.2.0/24", **camellia), *child(3, "10.2.0.0/16"))
        await made.settle()
        names = hosts(made)
        assert set(names) == {1, 3}
        (choices,) = kernel.told[-1].to_host.values()
        assert [each.host for each in choices] == [names[1], "", names[3]]
        assert set(kernel.told[-1].from_host) == {*names.values()}
        said = targets_of(made)
        assert (said[1], said[3]) == (f"VPP, over {names[1]}", f"VPP, over {names[3]}")
        assert said[2] == "the kernel: VPP does not carry the tunnel"

    play(story)


@pytest.mark.parametrize(
    "changes", [{"proto": 6, "dport": 80, "dport_mask": 0xFFFF}, {"proto": 1, "sport": 8, "sport_mask": 0xFFFF}]
)
def test_policy_with_ports_gets_a_host_interface_as_any_other(changes: dict[str, int]) -> None:
    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        narrow = replace(POLICIES[0], selector=replace(POLICIES[0].selector, **changes))
        made.kernel.add(sa_in(1), sa_out(2), narrow, *POLICIES[1:])
        await made.settle()
        (name,) = hosts(made).values()
        assert kernel.told[-1] == HostRedirects(marks={OF_SITE: name})
        assert targets_of(made) == {1: f"VPP, over {name}"}
        assert addresses_for_us(made) == {host(LAN), host(LOOPBACK)}

    play(story)


def test_what_vpp_lacks_of_a_vti_goes_to_the_kernel_until_vpp_carries_it() -> None:
    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        routes.link("vti7", if_id=7)
        routes.add("10.2.0.0/16", "vti7")
        everything = "0.0.0.0/0"
        camellia: dict[str, Any] = {"aead": None, "crypt": Algorithm("cbc(camellia)", bytes(16)), "auth": SHA256}
        old = sa_in(1, 7, if_id=7, **camellia), sa_out(2, 7, if_id=7, **camellia)
        made.kernel.add(*old, *[make_policy(way, everything, everything, 7, if_id=7) for way in PolicyDir])
        await made.settle()
        route = Route(Prefix(bytes((10, 2, 0, 0)), 16))
        tap = made.engine.environment.interfaces.taps[made.wan]
        assert made.engine.vpp.routes[route] == tap
        assert {(row["fallback"], row["fallback_reason"]) for row in sa_view(made.engine)} == {("kernel", "")}
        assert kernel.told[-1].to_host == {}
        made.kernel.add(sa_in(3, 7, if_id=7), sa_out(4, 7, if_id=7))
        made.kernel.delete(*old)
        await made.settle()
        (state,) = made.engine.tunnels.values()
        assert made.engine.vpp.routes[route] == state.actual.sw_if_index
        assert len(kernel.told[-1].to_host) == 1

    play(story)


def test_without_linux_cp_the_kernel_is_left_alone() -> None:
    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        await set_pair(await made.admin(), made.wan, "wan", is_add=False)
        made.engine.request_resync()
        made.kernel.add(*SITE)
        await made.settle()
        assert hosts(made) == {}
        assert not any(told.marks for told in kernel.told)
        assert targets_of(made) == {1: "the kernel: no linux-cp pair connects it with VPP"}
        assert addresses_for_us(made) == set()

    play(story)


def test_what_an_earlier_run_made_is_adopted_and_the_kernel_is_told_again() -> None:
    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        made.kernel.add(*SITE)
        await made.settle()
        before, told = hosts(made), kernel.told[-1]
        assert made.standin is not None
        asked = len(made.standin.world.linux_cp.pairs)
        kernel.told.clear()
        await made.restart_engine()
        await made.settle()
        assert hosts(made) == before
        assert len(made.standin.world.linux_cp.pairs) == asked
        assert kernel.told
        assert all(each == told for each in kernel.told), "there is no moment in which the kernel sends by itself"
        await made.stop()
        made.kernel.delete(*SITE)
        await made.restart_engine()
        await made.settle()
        assert hosts(made) == {}
        assert kernel.told[-1] == HostRedirects()

    play(story)


def test_restarted_vpp_gets_host_interfaces_and_the_kernel_its_filters() -> None:
    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        made.kernel.add(*SITE)
        await made.settle()
        kernel.told.clear()
        await made.kill_vpp()
        await made.bring_vpp_back()
        await set_pair(await made.admin(), made.wan, "wan")
        made.kernel.delete(sa_in(1), sa_out(2))
        made.kernel.add(sa_in(3), sa_out(4))
        await made.settle()
        assert set(hosts(made)) == {1}
        assert kernel.told[-1].marks

    play(story)


def test_a_kernel_that_refuses_is_told_again_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_interfaces, "HOST_RETRY_S", 0.05)

    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        kernel.refuses = "the kernel refused the settings of ipsec256: Operation not supported"
        made.kernel.add(*SITE)
        await made.settle()
        assert targets_of(made) == {1: f"the kernel: {kernel.refuses}"}
        assert kernel.refuses in sync_view(made.engine)["own_packets"]
        kernel.refuses = ""
        async with asyncio.timeout(PATIENCE_S):
            while made.engine.host_interfaces.problem:  # noqa: ASYNC110  # no event tells of it
                await asyncio.sleep(0.01)
        assert set(targets_of(made)[1].split(", ")) >= {"VPP"}
        assert sync_view(made.engine)["own_packets"] == ""

    play(story)


def test_marking_problems_show_at_policies_and_not_at_vtis(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_interfaces, "HOST_RETRY_S", 0.05)
    ends = LOCAL6, REMOTE6
    policies = [
        make_policy(way, *(("fd01::/64", "fd02::/64") if way is PolicyDir.OUT else ("fd02::/64", "fd01::/64")), 6, ends)
        for way in PolicyDir
    ]
    site6 = (make_sa(5, REMOTE6, LOCAL6, 6), make_sa(6, LOCAL6, REMOTE6, 6), *policies)

    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        routes.address("lan", "fd01::1/64")
        routes.link("vti7", if_id=7)
        routes.add("10.99.0.0/30", "vti7")
        everything = "0.0.0.0/0"
        over_vti = [make_policy(way, everything, everything, 7, if_id=7) for way in PolicyDir]
        kernel.unmarked = why = "there is no program nft"
        made.kernel.add(*SITE, *site6, sa_in(7, 7, if_id=7), sa_out(8, 7, if_id=7), *over_vti)
        await made.settle()
        name, name6, name7 = (hosts(made)[reqid] for reqid in (1, 6, 7))
        assert kernel.told[-1].marks == {OF_SITE: name, TunnelSas(LOCAL6, REMOTE6, 6, AF_INET6): name6}
        assert targets_of(made) == {1: f"the kernel: {why}", 6: f"the kernel: {why}", 7: f"VPP, over {name7}"}
        assert sync_view(made.engine)["own_packets"] == "there is no program nft"
        kernel.unmarked = ""
        async with asyncio.timeout(PATIENCE_S):
            while made.engine.host_interfaces.problem:  # noqa: ASYNC110  # no event tells of it
                await asyncio.sleep(0.01)
        assert targets_of(made) == {1: f"VPP, over {name}", 6: f"VPP, over {name6}", 7: f"VPP, over {name7}"}
        assert host("fd01::1") in addresses_for_us(made)

    play(story)


def test_pass_policies_are_no_tunnels_and_are_restored_when_removed() -> None:
    ours = (PASS_IN_POLICY, pass_out_policy(9))

    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        made.kernel.add(*SITE)
        await made.settle()
        before, rows = len(kernel.told), [*policy_rows(made.engine)]
        made.kernel.add(*ours)
        await made.settle()
        assert [*policy_rows(made.engine)] == rows
        assert made.engine.model.policy_count == len(POLICIES)
        assert len(kernel.told) == before
        made.kernel.delete(ours[0])
        await made.settle()
        assert len(kernel.told) > before
        assert not [entry for entry in made.engine.journal if "::/0" in entry.text]

    play(story)


def test_internal_error_costs_no_tunnel_and_is_reported() -> None:
    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        kernel.breaks = KeyError("attrs")
        made.kernel.add(*SITE)
        await made.settle()
        assert set(hosts(made)) == {1}
        assert targets_of(made) == {1: "the kernel: a mistake in vpp-ipsecd: KeyError"}
        made.kernel.add(sa_in(3), sa_out(4))
        await made.settle()

    play(story)


def test_while_it_is_not_known_what_is_wanted_what_there_is_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(_: object) -> None:
        raise KeyError("of ours")

    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        made.kernel.add(*SITE)
        await made.settle()
        before, told = hosts(made), kernel.told[-1]
        await made.stop()
        kernel.told.clear()
        with monkeypatch.context() as patch:
            patch.setattr(steering, "outbound_policies", stumble)
            await made.restart_engine()
            async with asyncio.timeout(PATIENCE_S):
                while not made.engine.steering.internal_errors:  # noqa: ASYNC110  # nothing tells of it
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert hosts(made) == before
            assert kernel.told == []
        made.engine.request_resync()
        made.kernel.add(make_policy(dst="10.6.0.0/24"))
        await made.settle()
        assert hosts(made) == before
        assert kernel.told[-1] == told

    play(story)


def protected(made: Rig) -> set[int]:
    """Return the tunnels that VPP sends and receives with, by reqid."""
    assert made.standin is not None
    indices = {key.reqid: state.actual.sw_if_index for key, state in made.engine.tunnels.items()}
    return {reqid for reqid, index in indices.items() if index in made.standin.world.protections}


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110  # any condition
            await asyncio.sleep(0.01)


def test_vpp_sends_with_no_sa_before_the_kernel_was_told_to_send_no_more() -> None:
    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        kernel.may_answer.clear()
        made.kernel.add(*SITE)
        await until(lambda: bool(kernel.told and kernel.told[-1].marks))
        await asyncio.sleep(0.2)
        assert set(hosts(made)) == {1}
        assert protected(made) == set()
        assert not made.engine.in_sync
        kernel.may_answer.set()
        await made.settle()
        assert protected(made) == {1}
        assert made.kernel.expired == []

    play(story)


def test_sa_the_kernel_sent_with_at_first_is_rekeyed_before_vpp_sends() -> None:
    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        made.kernel.rekeys_when_asked = False
        made.kernel.sent.add(sa_out(2).id)
        made.kernel.add(*SITE)
        await until(lambda: made.kernel.expired == [sa_out(2).id])
        (name,), before = hosts(made).values(), kernel.told[-1]
        assert protected(made) == set()
        assert {row["state"] for row in sa_view(made.engine)} == {"rekeying", "pending"}
        (policy,) = [row for row in policy_rows(made.engine) if row["direction"] == "out"]
        assert policy["steering"] == "dropped"
        assert policy["reason"].startswith("its sequence numbers were used before this VPP could go on with them")
        made.kernel.rekey(sa_out(2))
        await made.settle()
        assert protected(made) == {1}
        assert hosts(made) == {1: name}
        assert all(told == before for told in kernel.told[kernel.told.index(before) :])
        assert len(made.kernel.expired) == 1

    play(story)


def test_sa_the_kernel_sent_with_during_a_vrf_move_is_rekeyed() -> None:
    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        for ip6 in (False, True):
            await set_table(await made.admin(), RED, ip6)
        await begin_vti(made, routes)
        assert protected(made) == {7}
        made.kernel.sent.add(sa_out(2).id)
        kernel.may_answer.clear()
        routes.link("vti7", if_id=7, table=RED)
        await until(lambda: protected(made) == set())
        kernel.told.clear()
        kernel.may_answer.set()
        await made.settle()
        assert made.kernel.expired == [sa_out(2).id]
        assert protected(made) == {7}
        assert sa_out(2).id not in made.kernel.sas

    play(story)


def test_sa_the_kernel_does_not_report_counts_as_sent_with() -> None:
    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        made.kernel.says_nothing_of.add(sa_out(2).id)
        made.kernel.add(*SITE)
        await made.settle()
        assert made.kernel.expired == [sa_out(2).id]
        assert protected(made) == {1}

    play(story)


def test_a_kernel_that_goes_on_to_send_keeps_no_tunnel_from_being_carried() -> None:
    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        kernel.unmarked = "there is no program nft"
        made.kernel.sent.add(sa_out(2).id)
        made.kernel.add(*SITE)
        await made.settle()
        assert protected(made) == {1}
        assert made.kernel.expired == []

    play(story)


def test_refused_host_interface_does_not_stop_the_tunnel() -> None:
    def refuse(message: str, fields: Any) -> int | None:
        return -11 if message == "lcp_itf_pair_add_del_v3" and int(fields.host_if_type) == TUN else None

    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        made.kernel.add(*SITE)
        async with asyncio.timeout(PATIENCE_S):
            while not any(state.actual.protection for state in made.engine.tunnels.values()):  # noqa: ASYNC110  # nothing tells of it
                await asyncio.sleep(0.01)
        assert hosts(made) == {}
        assert targets_of(made) == {1: "VPP, once it has a host interface"}
        assert not any(told.marks for told in kernel.told)

    play(story, refuse)


def test_there_are_no_more_host_interfaces_than_vpps_buffers_bear() -> None:
    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        for number in range(1, MAX_HOST_INTERFACES + 3):
            dst = f"10.{number}.9.0/24"
            made.kernel.add(sa_in(number, number), sa_out(1000 + number, number), make_policy(dst=dst, reqid=number))
        await made.settle()
        assert len(hosts(made)) == MAX_HOST_INTERFACES
        said = targets_of(made)
        crowded = [reqid for reqid in said if reqid not in hosts(made)]
        assert {said[reqid] for reqid in crowded} == {
            f"the kernel: {MAX_HOST_INTERFACES} other tunnels have host interfaces"
        }
        assert len(crowded) == 2

    play(story)


def test_a_dry_run_tells_of_host_interfaces_and_does_nothing() -> None:
    async def story(made: Rig, routes: FakeRoutes, kernel: Kernel) -> None:
        await made.settle()
        await made.stop()
        kernel.told.clear()
        made.kernel.add(*SITE)
        lines = await dry_run(made.settings, made.kernel, routes)
        assert any(line.endswith("the host interface ipsec256") for line in lines)
        assert "route 10.1.0.77/32 to the router itself" in lines
        assert kernel.told == []
        assert hosts(made) == {}

    play(story)
