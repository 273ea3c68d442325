"""VTIs from the kernel's routes to VPP's: the engine between a kernel of the test's, with its links and routes, and a VPP."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import pytest

from build import NOT_USED, make_policy, sa_in, sa_out
from clock import run_jumping
from fakeroutes import FakeRoutes
from kernel import FakeKernel
from lanwan import set_pair
from netns import in_new_netns, ip
from rig import KINDS, SETTLE_S, Rig, rig
from vethvti import VethsAsVtis, links
from vppipsec.standin.server import End, Fault
from vppipsec.status.tunnels import policy_rows
from vppipsec.sync.dryrun import dry_run
from vppipsec.sync.engine import Engine
from vppipsec.vpp.inventory import FIB_SOURCE
from vppipsec.xfrm.links import Path
from vppipsec.xfrm.model import group_of_sa
from vppipsec.xfrm.routes import KernelRoutes
from vppipsec.xfrm.routesocket import RouteFollower
from vppipsec.xfrm.values import Policy, PolicyDir, Sa

EVERYTHING, EVERYTHING6 = "0.0.0.0/0", "::/0"
VRF = 100
SEEDS = 40 if os.environ.get("VPPIPSEC_LONG") else 6


def tunnel(number: int, if_id: int, *remotes: str, src: str = EVERYTHING, **changes: Any) -> list[Sa | Policy]:
    """Return the SAs and policies of a child of a VTI; `number` is its reqid."""
    policies: list[Sa | Policy] = []
    for remote in remotes:
        near = EVERYTHING6 if ":" in remote and src == EVERYTHING else src
        selectors = {PolicyDir.OUT: (near, remote), PolicyDir.IN: (remote, near), PolicyDir.FWD: (remote, near)}
        policies += [make_policy(way, *ends, number, if_id=if_id, **changes) for way, ends in selectors.items()]
    return [sa_in(0xC0 + number, number, if_id=if_id), sa_out(0xD0 + number, number, if_id=if_id), *policies]


async def lead(made: Rig) -> dict[str, str]:
    """Return our routes as VPP tells them: `prefix` or `prefix table N` -> reqids of the tunnels, with weights, or `drop`."""
    names = {
        state.held.sw_if_index: str(key.reqid)
        for key, state in made.engine.groups.items()
        if state.held.sw_if_index is not None
    }
    admin = await made.admin()
    (source,) = [it.src.id for it in await admin.dump("fib_source_dump") if it.src.name == FIB_SOURCE]
    found = {}
    for table in [it.table for it in await admin.dump("ip_table_dump")]:
        if table.table_id >= 0x49500000:
            continue
        which = {"table_id": table.table_id, "is_ip6": table.is_ip6, "name": ""}
        for route in [it.route for it in await admin.dump("ip_route_v2_dump", {"src": source, "table": which})]:
            where = str(route.prefix) if isinstance(route.prefix, str) else shown(route.prefix)
            ways = [way_of(made, path, names) + f"*{path.weight}" * (route.n_paths > 1) for path in route.paths]
            found[where + (f" table {table.table_id}" if table.table_id else "")] = " ".join(ways)
    return found


def way_of(made: Rig, path: Any, names: Mapping[int, str]) -> str:
    """Return where a path leads, a VTI's junction by the VTI's if_id."""
    if int(path.type) == 9:
        return f"vti {made.engine.vpp.junctions.indexes[path.sw_if_index]}"
    return "drop" if int(path.type) == 2 else names[path.sw_if_index]


async def told_apart(made: Rig) -> dict[str, list[str]]:
    """Return what rules lead to behind the junctions, as VPP tells it: `prefix behind vti N` -> reqids, layer by layer."""
    names = {
        state.held.sw_if_index: str(key.reqid)
        for key, state in made.engine.groups.items()
        if state.held.sw_if_index is not None
    }
    admin = await made.admin()
    found: dict[str, list[str]] = {}
    policies = {it.policy.policy_id: it.policy for it in await admin.dump("abf_policy_dump")}
    attached = sorted((it.attach.priority, it.attach) for it in await admin.dump("abf_itf_attach_dump"))
    for _, attach in attached:
        if_id = made.engine.vpp.junctions.indexes.get(attach.sw_if_index)
        table = policies[attach.policy_id].paths[0].table_id
        (rules,) = [it.r for it in await admin.dump("acl_dump", {"acl_index": policies[attach.policy_id].acl_index})]
        which = {"table_id": table, "is_ip6": attach.is_ipv6, "name": ""}
        routes = [it.route for it in await admin.dump("ip_route_v2_dump", {"src": 0, "table": which})]
        leads = {shown(route.prefix): way_of(made, route.paths[0], names) for route in routes if route.src >= 23}
        for rule in rules if if_id is not None else ():
            where = shown(rule.dst_prefix)
            found.setdefault(f"{where} behind vti {if_id}", []).append(leads.get(where, "drop"))
    return found


async def until_lead(made: Rig, expected: dict[str, str]) -> None:
    """Wait until our routes are as expected."""
    async with asyncio.timeout(SETTLE_S):
        while await lead(made) != expected:  # noqa: ASYNC110  # VPP has no event for it
            await asyncio.sleep(0.02)


def shown(prefix: Any) -> str:
    address = bytes(prefix.address.un.ip4 if int(prefix.address.af) == 0 else prefix.address.un.ip6)
    return f"{ipaddress.ip_address(address)}/{prefix.len}"


def said(made: Rig) -> dict[str, tuple[str, str, str]]:
    """Return of each outbound policy what status says: steering, route and reason, by selector."""
    return {
        row["selector"]: (row["steering"], row["route"], row["reason"])
        for row in policy_rows(made.engine)
        if row["direction"] == "out"
    }


def play_with_routes(
    kind: str, story: Callable[[Rig, FakeRoutes], Awaitable[None]], fault: Fault | None = None
) -> None:
    """Run a story in a rig whose kernel has routes."""

    async def run() -> None:
        routes = FakeRoutes()
        async with asyncio.timeout(60), rig(kind, fault, routes=routes) as made:
            await story(made, routes)

    asyncio.run(run())


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def begun(made: Rig, *items: Sequence[Sa | Policy]) -> None:
    for each in items:
        made.kernel.add(*each)
    made.start()
    await made.settle()


def test_default_route_goes_into_a_tunnel_only_while_the_kernels_does(kind: str) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7)
        await begun(made, tunnel(1, 7, EVERYTHING, EVERYTHING6))
        assert await lead(made) == {}
        routes.add(EVERYTHING, "vti7")
        await made.settle()
        assert await lead(made) == {"0.0.0.0/0": "1"}
        routes.add(EVERYTHING6, "vti7")
        routes.delete(EVERYTHING)
        await made.settle()
        assert await lead(made) == {"::/0": "1"}
        routes.delete(EVERYTHING6)
        await made.settle()
        assert await lead(made) == {}

    play_with_routes(kind, story)


def test_the_route_of_the_best_metric_decides() -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("eth0")
        routes.link("vti7", 7)
        routes.add("10.9.0.0/16", "vti7", metric=20)
        routes.add("10.9.0.0/16", "eth0", metric=10)
        await begun(made, tunnel(1, 7, EVERYTHING))
        assert await lead(made) == {}
        routes.delete("10.9.0.0/16", metric=10)
        await made.settle()
        assert await lead(made) == {"10.9.0.0/16": "1"}
        routes.add("10.9.0.0/16", "eth0", metric=5)
        await made.settle()
        assert await lead(made) == {}

    play_with_routes("standin", story)


def test_link_that_goes_down_takes_its_routes_along() -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7)
        routes.link("vti8", 8)
        routes.add("10.9.0.0/16", "vti7", metric=1)
        routes.add("10.9.0.0/16", "vti8", metric=2)
        await begun(made, tunnel(1, 7, EVERYTHING), tunnel(2, 8, EVERYTHING))
        assert await lead(made) == {"10.9.0.0/16": "1"}
        routes.link("vti7", 7, up=False)
        await made.settle()
        assert await lead(made) == {"10.9.0.0/16": "2"}
        routes.unlink("vti8")
        await made.settle()
        assert await lead(made) == {}

    play_with_routes("standin", story)


def test_a_route_drops_while_its_tunnel_is_not_there(kind: str) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7)
        routes.add("10.9.0.0/16", "vti7")
        await begun(made)
        assert await lead(made) == {"10.9.0.0/16": "drop"}, "the kernel has no policy for what goes into the VTI"
        child = tunnel(1, 7, EVERYTHING)
        made.kernel.add(*child)
        await made.settle()
        assert await lead(made) == {"10.9.0.0/16": "1"}
        made.kernel.delete(*child[:2])
        await made.settle()
        assert await lead(made) == {"10.9.0.0/16": "drop"}
        made.kernel.delete(*child[2:])
        routes.delete("10.9.0.0/16")
        await made.settle()
        assert await lead(made) == {}

    play_with_routes(kind, story)


def test_children_of_one_vti_share_its_routes_by_their_selectors(kind: str) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("eth0")
        routes.link("vti7", 7)
        routes.add("10.0.0.0/8", "vti7")
        routes.add("10.2.0.0/15", "eth0")
        children = [tunnel(1, 7, "10.1.0.0/16"), tunnel(2, 7, "10.2.0.0/16", "10.4.0.0/16")]
        await begun(made, *children)
        assert await lead(made) == {"10.0.0.0/8": "drop", "10.1.0.0/16": "1", "10.4.0.0/16": "2"}
        blocked = make_policy(dst="10.4.4.0/24", src=EVERYTHING, priority=1, if_id=7, action=1, templates=())
        made.kernel.add(blocked)
        await made.settle()
        assert (await lead(made))["10.4.4.0/24"] == "drop"
        routes.delete("10.2.0.0/15")
        made.kernel.delete(blocked)
        await made.settle()
        assert await lead(made) == {"10.0.0.0/8": "drop", "10.1.0.0/16": "1", "10.2.0.0/16": "2", "10.4.0.0/16": "2"}

    play_with_routes(kind, story)


def test_tunnels_share_a_route_by_weight(kind: str) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7)
        routes.link("vti8", 8)
        routes.add("10.9.0.0/16", ("vti7", 3), "vti8")
        routes.add("fd09::/48", "vti7", "vti8")
        one, two = tunnel(1, 7, EVERYTHING, EVERYTHING6), tunnel(2, 8, EVERYTHING, EVERYTHING6)
        await begun(made, one)
        assert await lead(made) == {"10.9.0.0/16": "1", "fd09::/48": "1"}, "what has no tunnel has no share"
        made.kernel.add(*two)
        await made.settle()
        assert await lead(made) == {"10.9.0.0/16": "1*3 2*1", "fd09::/48": "1*1 2*1"}
        routes.replace("10.9.0.0/16", "vti7", ("vti8", 2))
        await made.settle()
        assert (await lead(made))["10.9.0.0/16"] == "1*1 2*2"
        made.kernel.delete(*one)
        await made.settle()
        assert await lead(made) == {"10.9.0.0/16": "2", "fd09::/48": "2"}
        made.kernel.delete(*two[:2])
        await made.settle()
        assert await lead(made) == {"10.9.0.0/16": "drop", "fd09::/48": "drop"}

    play_with_routes(kind, story)


def test_a_shared_route_is_never_missing_while_tunnels_come_and_go() -> None:
    asked: list[tuple[bool, int]] = []

    def note(name: str, request: Any) -> End | int | None:
        if name == "ip_route_add_del_v2":
            asked.append((request.is_add, request.route.n_paths))
        return None

    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7)
        routes.link("vti8", 8)
        routes.add("10.9.0.0/16", "vti7", "vti8")
        one, two = tunnel(1, 7, EVERYTHING), tunnel(2, 8, EVERYTHING)
        await begun(made, one, two)
        made.kernel.delete(*one[:2])
        await made.settle()
        made.kernel.add(*(sa._replace(spi=sa.spi + 0x100) for sa in one[:2] if isinstance(sa, Sa)))
        await made.settle()
        assert await lead(made) == {"10.9.0.0/16": "1*1 2*1"}
        assert (True, 2) in asked
        assert all(is_add for is_add, _ in asked)

    play_with_routes("standin", story, note)


def test_children_are_told_apart_by_all_of_their_selectors_at_a_junction(kind: str) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7)
        routes.add("10.0.0.0/8", "vti7")
        routes.add("fd00::/16", "vti7")
        one, two = tunnel(1, 7, "10.1.0.0/16"), tunnel(2, 7, "10.1.0.0/16", src="10.8.0.0/16", priority=900)
        await begun(made, one)
        assert await lead(made) == {"10.0.0.0/8": "drop", "10.1.0.0/16": "1", "fd00::/16": "drop"}

        made.kernel.add(*two)
        await made.settle()
        assert await lead(made) == {"10.0.0.0/8": "vti 7", "fd00::/16": "vti 7"}
        told = {"10.1.0.0/16 behind vti 7": ["2", "1"]}
        assert await told_apart(made) == told
        where = "routes over vti7: 10.0.0.0/8"
        assert said(made) == {
            "10.8.0.0/16 > 10.1.0.0/16": ("routed", "10.1.0.0/16", where),
            "0.0.0.0/0 > 10.1.0.0/16": ("routed", "10.1.0.0/16", where),
        }
        routes.replace("10.0.0.0/8", "vti7", metric=0)
        made.kernel.delete(*two[:2])
        await made.settle()
        assert await told_apart(made) == {"10.1.0.0/16 behind vti 7": ["drop", "1"]}, (
            "it does not go into the other one"
        )

        made.kernel.delete(*two[2:])
        await made.settle()
        assert await lead(made) == {"10.0.0.0/8": "drop", "10.1.0.0/16": "1", "fd00::/16": "drop"}
        assert await told_apart(made) == {}

    play_with_routes(kind, story)


def test_while_a_vti_gets_its_junction_no_route_over_it_drops_what_it_did_not_drop_before() -> None:
    led: list[tuple[str, int]] = []

    def note(name: str, request: Any) -> End | int | None:
        if name == "ip_route_add_del_v2" and not request.route.table_id:
            led.append((shown(request.route.prefix), int(request.route.paths[0].type)))
        return None

    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7)
        routes.add("10.0.0.0/8", "vti7")
        await begun(made, tunnel(1, 7, EVERYTHING))
        led.clear()
        two = tunnel(2, 7, EVERYTHING, src="10.8.0.0/16", priority=900)
        made.kernel.add(*two)
        await made.settle()
        assert led == [("10.0.0.0/8", 9)]
        made.kernel.delete(*two)
        await made.settle()
        assert led == [("10.0.0.0/8", 9), ("10.0.0.0/8", 0)]

    play_with_routes("standin", story, note)


@pytest.mark.parametrize("message", ["ipsec_itf_create", "sw_interface_set_table", "abf_itf_attach_add_del"])
def test_a_vti_whose_junction_vpp_refuses_drops_until_it_is_accepted(message: str) -> None:
    refused = {"": 0}

    def refuse(name: str, request: Any) -> End | int | None:
        return -1 if refused[""] and name == message else None

    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7)
        routes.add("10.0.0.0/8", "vti7")
        await begun(made, tunnel(1, 7, EVERYTHING))
        assert await lead(made) == {"10.0.0.0/8": "1"}
        refused[""] = 1
        policy = make_policy(dst=EVERYTHING, src="10.8.0.0/16", priority=900, if_id=7, action=1, templates=())
        made.kernel.add(policy)
        await until_lead(made, {"10.0.0.0/8": "drop"})
        refused[""] = 0
        await made.settle()
        assert await lead(made) == {"10.0.0.0/8": "vti 7"}

    play_with_routes("standin", story, refuse)


def test_a_junction_is_adopted_whole_and_removed_half_made() -> None:
    asked: list[str] = []
    ends = {"": 0}

    def note(name: str, request: Any) -> End | int | None:
        asked.append(name)
        return End.CONNECTION if name == "sw_interface_add_del_address" and ends.pop("", None) else None

    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7)
        routes.add("10.0.0.0/8", "vti7")
        ends[""] = 1
        await begun(made, tunnel(1, 7, EVERYTHING, src="10.8.0.0/16"))
        assert asked.count("ipsec_itf_delete") == 1, "it may be in the main table"
        assert await lead(made) == {"10.0.0.0/8": "vti 7"}
        asked.clear()
        await made.restart_engine()
        await made.settle()
        assert await lead(made) == {"10.0.0.0/8": "vti 7"}
        assert await told_apart(made) == {"0.0.0.0/0 behind vti 7": ["1"]}
        assert not {"ipsec_itf_create", "ipsec_itf_delete", "ip_route_add_del_v2", "abf_itf_attach_add_del"} & {*asked}

    ends.clear()
    play_with_routes("standin", story, note)


def test_a_route_shared_with_another_link_has_its_share_there() -> None:
    asked: list[str] = []

    def note(name: str, request: Any) -> End | int | None:
        asked.append(name)
        return None

    async def story(made: Rig, routes: FakeRoutes) -> None:
        made.start()
        await made.settle()
        tap = await set_pair(await made.admin(), made.wan, "wan")
        (pair,) = await (await made.admin()).stream("lcp_itf_pair_get")
        assert pair.host_sw_if_index == tap
        routes.link("wan", ifindex=pair.vif_index)
        routes.link("vti7", 7)
        gateway = bytes((192, 0, 2, 254))
        routes.add("10.9.0.0/16", ("vti7", 3), Path(pair.vif_index, gateway))
        routes.add("10.10.0.0/16", Path(pair.vif_index, None, 2), "vti7")
        made.kernel.add(*tunnel(1, 7, EVERYTHING))
        expected = {
            "10.9.0.0/16": [("vti 7", 3, ""), ("wan", 1, "192.0.2.254")],
            "10.10.0.0/16": [("vti 7", 1, ""), ("wan", 2, "")],
        }
        await until_shared(made, expected)
        await made.settle()
        asked.clear()
        await made.restart_engine()
        await made.settle()
        assert "ip_route_add_del_v2" not in asked
        made.kernel.delete(*tunnel(1, 7, EVERYTHING)[:2])
        await made.settle()
        await until_shared(made, expected)  # its share drops at the junction, and nobody else gets it
        await set_pair(await made.admin(), made.wan, "wan", False)
        await until_shared(made, {"10.9.0.0/16": [("vti 7", 1, "")], "10.10.0.0/16": [("vti 7", 1, "")]})

    async def until_shared(made: Rig, expected: dict[str, list[tuple[str, int, str]]]) -> None:
        async with asyncio.timeout(SETTLE_S):
            while await shares(made) != expected:  # noqa: ASYNC110  # VPP has no event for it
                await asyncio.sleep(0.02)

    async def shares(made: Rig) -> dict[str, list[tuple[str, int, str]]]:
        admin = await made.admin()
        which = {"table_id": 0, "is_ip6": False, "name": ""}
        found = [
            it.route for it in await admin.dump("ip_route_v2_dump", {"src": 0, "table": which}) if it.route.src >= 23
        ]
        names = {made.wan: "wan"}
        return {
            shown(route.prefix): sorted(
                (
                    way_of(made, path, names),
                    path.weight,
                    ".".join(map(str, path.nh.address.ip4)) if any(path.nh.address.ip4) else "",
                )
                for path in route.paths
            )
            for route in found
        }

    play_with_routes("standin", story, note)


def test_a_link_that_vpp_does_not_have_gets_no_share(kind: str) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("eth0")
        routes.link("vti7", 7)
        routes.add("10.9.0.0/16", "vti7", "eth0")
        routes.add("10.10.0.0/16", "vti7")
        await begun(made, tunnel(1, 7, EVERYTHING))
        assert await lead(made) == {"10.9.0.0/16": "vti 7", "10.10.0.0/16": "vti 7"}, "VPP does not have the other link"
        assert said(made) == {
            "0.0.0.0/0 > 0.0.0.0/0": ("routed", "0.0.0.0/0", "routes over vti7: 10.9.0.0/16, 10.10.0.0/16")
        }

    play_with_routes(kind, story)


def test_routes_of_a_vrf_go_into_its_table_where_vpp_has_one(kind: str) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7, table=VRF)
        routes.add("10.9.0.0/16", "vti7", table=VRF)
        await begun(made, tunnel(1, 7, EVERYTHING))
        assert await lead(made) == {}
        (answer,) = said(made).values()
        assert answer[2].endswith(f"10.9.0.0/16 is left out: VPP has no table {VRF}")
        assert f"has no IPv4 table {VRF}: the routes over VTIs in it are left out" in {
            e.text for e in made.engine.journal
        }
        admin = await made.admin()
        table = {"table_id": VRF, "is_ip6": False, "name": "red"}
        await admin.call("ip_table_add_del_v2", {"table": table, "create_mfib": False, "is_add": True})
        await until_lead(made, {f"10.9.0.0/16 table {VRF}": "1"})
        await made.settle()
        assert next(iter(said(made).values()))[2] == f"routes over vti7: 10.9.0.0/16 table {VRF}"
        routes.delete("10.9.0.0/16", table=VRF)
        await made.settle()
        assert await lead(made) == {}

    play_with_routes(kind, story)


def test_a_policy_without_if_id_goes_before_a_vti() -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7)
        routes.add("10.9.0.9/32", "vti7")
        routes.add("10.9.0.0/16", "vti7")
        host = tunnel(2, 0, "10.9.0.9/32")
        await begun(made, tunnel(1, 7, EVERYTHING), host)
        assert await lead(made) == {"10.9.0.9/32": "2", "10.9.0.0/16": "1"}
        made.kernel.delete(*host)
        await made.settle()
        assert await lead(made) == {"10.9.0.9/32": "1", "10.9.0.0/16": "1"}

    play_with_routes("standin", story)


def test_own_address_of_a_vti_does_not_go_into_its_tunnel() -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7)
        routes.address("vti7", "10.99.0.1/30")
        routes.add("10.99.0.0/30", "vti7")
        await begun(made, tunnel(1, 7, EVERYTHING))
        assert await lead(made) == {"10.99.0.0/30": "1", "10.99.0.1/32": "drop"}
        routes.delete("10.99.0.0/30")
        await made.settle()
        assert await lead(made) == {}

    play_with_routes("standin", story)


def test_what_is_there_after_a_restart_is_not_touched() -> None:
    changes: list[str] = []

    def note(name: str, request: Any) -> End | int | None:
        if "dump" not in name and name not in READING:
            changes.append(name)
        return None

    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7)
        routes.link("vti8", 8)
        routes.add(EVERYTHING, "vti7")
        routes.add("10.9.0.0/16", "vti7", ("vti8", 2))
        routes.add("10.9.0.9/32", "vti8")
        await begun(made, tunnel(1, 7, EVERYTHING), tunnel(2, 8, EVERYTHING))
        expected = {"0.0.0.0/0": "1", "10.9.0.0/16": "1*1 2*2", "10.9.0.9/32": "2"}
        assert await lead(made) == expected
        changes.clear()
        await made.restart_engine()
        await made.settle()
        assert await lead(made) == expected
        assert changes == []
        await made.stop()
        routes.delete("10.9.0.9/32")
        await made.restart_engine()
        await made.settle()
        del expected["10.9.0.9/32"]
        assert await lead(made) == expected

    play_with_routes("standin", story, note)


READING = {
    "lcp_itf_pair_get",
    "sockclnt_create",
    "sockclnt_delete",
    "control_ping",
    "show_version",
    "get_api_json",
    "api_versions",
    "want_interface_events",
    "acl_stats_intf_counters_enable",
    "ip_route_lookup_v2",
}


def test_nothing_is_taken_for_in_sync_before_the_routes_are_known() -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.refuses = "no answer"
        made.kernel.add(*tunnel(1, 7, EVERYTHING))
        made.start()
        async with asyncio.timeout(SETTLE_S):
            while not made.engine.kernel_problem:  # noqa: ASYNC110  # the engine has no event for it
                await asyncio.sleep(0.01)
        assert made.engine.kernel_problem == "the kernel's routes over VTIs cannot be read: no answer"
        assert not made.engine.in_sync
        routes.refuses = ""
        await made.settle()
        assert made.engine.kernel_problem == ""

    play_with_routes("standin", story)


def test_a_peer_behind_its_own_tunnel_is_not_reached() -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7)
        await begun(made, tunnel(1, 7, EVERYTHING))
        routes.add("192.0.2.2/32", "vti7")
        await made.settle()
        (state,) = made.engine.groups.values()
        assert state.desired.tunnel is None
        assert await lead(made) == {"192.0.2.2/32": "drop"}
        routes.delete("192.0.2.2/32")
        await made.settle()
        assert await lead(made) == {}
        assert state.desired.tunnel is not None

    play_with_routes("standin", story)


def test_status_tells_which_routes_lead_into_a_policys_tunnel() -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        await begun(made, tunnel(1, 7, "10.0.0.0/8", src="10.1.0.0/24"))
        selector = "10.1.0.0/24 > 10.0.0.0/8"
        assert said(made) == {selector: ("not carried", "", "there is no interface with if_id 7")}
        routes.link("vti7", 7)
        await made.settle()
        assert said(made) == {selector: ("not carried", "", "no route over vti7 leads to it")}
        routes.add("10.9.0.0/16", "vti7")
        await made.settle()
        assert said(made) == {selector: ("routed", "10.0.0.0/8", "routes over vti7: 10.9.0.0/16")}
        routes.add("10.8.0.0/16", "vti7")
        await made.settle()
        both = "routes over vti7: 10.8.0.0/16, 10.9.0.0/16"
        assert said(made) == {selector: ("routed", "10.0.0.0/8", both)}
        routes.link("vti7", 7, up=False)
        await made.settle()
        assert said(made) == {selector: ("not carried", "", "no route over vti7, which is down, leads to it")}

    play_with_routes("standin", story)


def test_a_dry_run_tells_of_routes_over_vtis() -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("eth0")
        routes.link("vti7", 7)
        routes.add("10.0.0.0/8", "vti7")
        routes.add("10.1.0.0/16", "eth0")
        made.kernel.add(*tunnel(1, 7, "10.1.0.0/16", "10.2.0.0/16"))
        lines = await dry_run(made.settings, made.kernel, routes)
        assert [line for line in lines if line.startswith("route ")] == [
            "route 10.2.0.0/16 to drop",
            "route 10.0.0.0/8 to drop",
            "route 10.2.0.0/16 into ipsec256",
        ]

    play_with_routes("standin", story)


class Renewing(FakeKernel):
    """A kernel whose IKE daemon never runs out of SPIs, however often it is asked to rekey."""

    def __init__(self) -> None:
        super().__init__()
        self._spi = 0x1000

    def rekey(self, sa: Sa) -> None:
        old = [other for other in self.sas.values() if group_of_sa(other) == group_of_sa(sa)]
        for other in old:
            self._spi += 1
            self.add(other._replace(spi=self._spi, usage=NOT_USED, replay=None))
        self.delete(*old)


class Anything:
    """Lets things happen to the kernel's VTIs, chosen by a seed, and VPP refuse now and then until it is healed."""

    NETS = ("0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.1.0/24", "10.1.1.1/32", "fd01::/48", "fd01::1/128")

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.sick = True
        self._children = [
            tunnel(1, 7, EVERYTHING, EVERYTHING6),
            tunnel(2, 8, "10.1.0.0/16", "fd01::/48"),
            tunnel(3, 8, "10.1.1.0/24", src="10.5.0.0/16"),
            tunnel(4, 0, "10.1.1.1/32"),
        ]
        self._there: set[tuple[str, int]] = set()
        self._up = {"vti7": True, "vti8": True}

    def refuses(self, name: str, request: Any) -> int | None:
        change = name in ("ip_route_add_del_v2", "ipsec_itf_create", "ipsec_sad_entry_add_v2", "sw_interface_set_flags")
        return -1 if self.sick and change and self._random.random() < 0.1 else None

    def step(self, made: Rig, routes: FakeRoutes) -> None:
        """Change something."""
        pick = self._random
        match pick.choice(("child", "child", "route", "route", "route", "link")):
            case "child":
                child = pick.choice(self._children)
                some = [item for item in child if pick.random() < 0.7]
                there = {*made.kernel.sas, *made.kernel.policies}
                if pick.random() < 0.4:
                    made.kernel.delete(*(item for item in some if item.id in there))
                else:
                    made.kernel.add(*(item for item in some if item.id not in there))
            case "route":
                where = pick.choice(self.NETS), pick.choice((1, 2))
                if where in self._there and pick.random() < 0.5:
                    routes.delete(where[0], metric=where[1])
                    self._there.remove(where)
                    return
                ways = pick.sample([("vti7", 1), ("vti8", pick.choice((1, 3))), ("eth0", 1)], pick.choice((1, 1, 2)))
                (routes.replace if where in self._there else routes.add)(where[0], *ways, metric=where[1])
                self._there.add(where)
            case "link":
                name = pick.choice(tuple(self._up))
                self._up[name] = not self._up[name]
                routes.link(name, int(name[3:]), up=self._up[name])

    async def pause(self) -> None:
        """Wait for as long as it may be between two changes."""
        await asyncio.sleep(self._random.choice((0, 0.001, 0.01, 3)))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_happens_vpp_ends_equal(seed: int) -> None:
    anything = Anything(seed)
    anything_routes = FakeRoutes()

    async def run() -> None:
        async with rig("standin", anything.refuses, kernel=Renewing(), routes=anything_routes) as made:
            for name, if_id in (("eth0", 0), ("vti7", 7), ("vti8", 8)):
                anything_routes.link(name, if_id)
            made.start()
            for round_number in range(4):
                anything.sick = True
                for _ in range(25):
                    anything.step(made, anything_routes)
                    await anything.pause()
                if round_number == 2:
                    await made.restart_engine()
                anything.sick = False
                await made.settle(within_s=900)

    run_jumping(run())


def test_the_kernels_own_routes_over_a_vti_are_followed() -> None:
    async def run() -> None:
        routes = KernelRoutes()
        source = VethsAsVtis(routes.watch)
        try:
            async with asyncio.timeout(60), rig("standin") as made:
                made.engine = Engine(made.settings, made.kernel, routes=RouteFollower(source, routes))
                made.kernel.add(*tunnel(1, 7, EVERYTHING))
                made.start()
                await made.engine.wait_in_sync()
                assert await lead(made) == {}
                for commands, expected in (
                    (("route add 10.9.0.0/16 dev vti7", "route add default dev vti7"), ("10.9.0.0/16", "0.0.0.0/0")),
                    (("route del default",), ("10.9.0.0/16",)),
                    (("link set vti7 down",), ()),
                ):
                    ip(*commands)
                    await until_lead(made, dict.fromkeys(expected, "1"))
        finally:
            source.close()

    def work() -> None:
        ip("link set lo up")
        ip(*links("vti7"))
        asyncio.run(run())

    in_new_netns(work)
