"""Children of a VTI that more than their destination tells apart, and links beside VTIs: junctions, and what leads there."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from support.build import make_policy
from support.fake_routes import FakeRoutes
from support.lanwan import set_pair
from support.recorded import PATIENCE_S
from support.rig import KINDS, Rig
from support.vti_rig import (
    EVERYTHING,
    begun,
    classified_vtis,
    paths_in_vpp,
    paths_of_route,
    play_with_routes,
    said,
    shown,
    tunnel,
    until_paths,
)
from vppipsec.kernel.route.wire import KernelPath
from vppipsec.kernel.xfrm.values import Sa
from vppstandin.server import End


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


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
        assert await paths_of_route(made) == {"10.9.0.0/16": "1*1 2*1"}
        assert (True, 2) in asked
        assert all(is_add for is_add, _ in asked)

    play_with_routes("standin", story, note)


def test_vti_classifier_selects_children_by_all_selectors(kind: str) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7)
        routes.add("10.0.0.0/8", "vti7")
        routes.add("fd00::/16", "vti7")
        one, two = tunnel(1, 7, "10.1.0.0/16"), tunnel(2, 7, "10.1.0.0/16", src="10.8.0.0/16", priority=900)
        await begun(made, one)
        assert await paths_of_route(made) == {"10.0.0.0/8": "drop", "10.1.0.0/16": "1", "fd00::/16": "drop"}

        made.kernel.add(*two)
        await made.settle()
        assert await paths_of_route(made) == {"10.0.0.0/8": "vti 7", "fd00::/16": "vti 7"}
        told = {"10.1.0.0/16 behind vti 7": ["2", "1"]}
        assert await classified_vtis(made) == told
        where = "routes over vti7: 10.0.0.0/8"
        assert said(made) == {
            "10.8.0.0/16 > 10.1.0.0/16": ("routed", "10.1.0.0/16", where),
            "0.0.0.0/0 > 10.1.0.0/16": ("routed", "10.1.0.0/16", where),
        }
        routes.replace("10.0.0.0/8", "vti7", metric=0)
        made.kernel.delete(*two[:2])
        await made.settle()
        assert await classified_vtis(made) == {"10.1.0.0/16 behind vti 7": ["drop", "1"]}, (
            "it does not go into the other one"
        )

        made.kernel.delete(*two[2:])
        await made.settle()
        assert await paths_of_route(made) == {"10.0.0.0/8": "drop", "10.1.0.0/16": "1", "fd00::/16": "drop"}
        assert await classified_vtis(made) == {}

    play_with_routes(kind, story)


def test_creating_a_vti_classifier_drops_nothing_new() -> None:
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
def test_vti_drops_while_vpp_refuses_its_classifier(message: str) -> None:
    refused = {"": 0}

    def refuse(name: str, request: Any) -> End | int | None:
        return -1 if refused[""] and name == message else None

    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7)
        routes.add("10.0.0.0/8", "vti7")
        await begun(made, tunnel(1, 7, EVERYTHING))
        assert await paths_of_route(made) == {"10.0.0.0/8": "1"}
        refused[""] = 1
        policy = make_policy(dst=EVERYTHING, src="10.8.0.0/16", priority=900, if_id=7, action=1, templates=())
        made.kernel.add(policy)
        await until_paths(made, {"10.0.0.0/8": "drop"})
        refused[""] = 0
        await made.settle()
        assert await paths_of_route(made) == {"10.0.0.0/8": "vti 7"}

    play_with_routes("standin", story, refuse)


def test_whole_classifier_is_adopted_and_a_half_made_one_removed() -> None:
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
        assert await paths_of_route(made) == {"10.0.0.0/8": "vti 7"}
        asked.clear()
        await made.restart_engine()
        await made.settle()
        assert await paths_of_route(made) == {"10.0.0.0/8": "vti 7"}
        assert await classified_vtis(made) == {"0.0.0.0/0 behind vti 7": ["1"]}
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
        routes.add("10.9.0.0/16", ("vti7", 3), KernelPath(pair.vif_index, gateway))
        routes.add("10.10.0.0/16", KernelPath(pair.vif_index, None, 2), "vti7")
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
        async with asyncio.timeout(PATIENCE_S):
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
                    paths_in_vpp(made, path, names),
                    path.weight,
                    ".".join(map(str, path.nh.address.ip4)) if any(path.nh.address.ip4) else "",
                )
                for path in route.paths
                if not path.preference
            )
            for route in found
        }

    play_with_routes("standin", story, note)
