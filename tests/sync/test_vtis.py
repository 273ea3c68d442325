"""VTIs from the kernel's routes to VPP's: the engine between a kernel of the test's, with its links and routes, and a VPP."""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any

import pytest

from support.build import NOT_USED, make_policy
from support.clock import run_jumping
from support.fake_kernel import FakeKernel
from support.fake_routes import FakeRoutes
from support.lanwan import set_table
from support.recorded import PATIENCE_S
from support.rig import KINDS, Rig, rig
from support.vti_rig import (
    EVERYTHING,
    EVERYTHING6,
    READING,
    begun,
    paths_of_route,
    play_with_routes,
    said,
    tunnel,
    until_paths,
)
from vppipsec.kernel.xfrm.sad_spd import tunnel_key_of_sa
from vppipsec.kernel.xfrm.values import Sa
from vppipsec.sync.preview import dry_run
from vppstandin.server import End

VRF = 100
SEEDS = 40 if os.environ.get("VPPIPSEC_LONG") else 6


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_default_route_goes_into_a_tunnel_only_while_the_kernels_does(kind: str) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7)
        await begun(made, tunnel(1, 7, EVERYTHING, EVERYTHING6))
        assert await paths_of_route(made) == {}
        routes.add(EVERYTHING, "vti7")
        await made.settle()
        assert await paths_of_route(made) == {"0.0.0.0/0": "1"}
        routes.add(EVERYTHING6, "vti7")
        routes.delete(EVERYTHING)
        await made.settle()
        assert await paths_of_route(made) == {"::/0": "1"}
        routes.delete(EVERYTHING6)
        await made.settle()
        assert await paths_of_route(made) == {}

    play_with_routes(kind, story)


def test_the_route_of_the_best_metric_decides() -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("eth0")
        routes.link("vti7", 7)
        routes.add("10.9.0.0/16", "vti7", metric=20)
        routes.add("10.9.0.0/16", "eth0", metric=10)
        await begun(made, tunnel(1, 7, EVERYTHING))
        assert await paths_of_route(made) == {}
        routes.delete("10.9.0.0/16", metric=10)
        await made.settle()
        assert await paths_of_route(made) == {"10.9.0.0/16": "1"}
        routes.add("10.9.0.0/16", "eth0", metric=5)
        await made.settle()
        assert await paths_of_route(made) == {}

    play_with_routes("standin", story)


def test_link_that_goes_down_takes_its_routes_along() -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7)
        routes.link("vti8", 8)
        routes.add("10.9.0.0/16", "vti7", metric=1)
        routes.add("10.9.0.0/16", "vti8", metric=2)
        await begun(made, tunnel(1, 7, EVERYTHING), tunnel(2, 8, EVERYTHING))
        assert await paths_of_route(made) == {"10.9.0.0/16": "1"}
        routes.link("vti7", 7, up=False)
        await made.settle()
        assert await paths_of_route(made) == {"10.9.0.0/16": "2"}
        routes.unlink("vti8")
        await made.settle()
        assert await paths_of_route(made) == {}

    play_with_routes("standin", story)


def test_a_route_drops_while_its_tunnel_is_not_there(kind: str) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7)
        routes.add("10.9.0.0/16", "vti7")
        await begun(made)
        assert await paths_of_route(made) == {"10.9.0.0/16": "drop"}, (
            "the kernel has no policy for what goes into the VTI"
        )
        child = tunnel(1, 7, EVERYTHING)
        made.kernel.add(*child)
        await made.settle()
        assert await paths_of_route(made) == {"10.9.0.0/16": "1"}
        made.kernel.delete(*child[:2])
        await made.settle()
        assert await paths_of_route(made) == {"10.9.0.0/16": "drop"}
        made.kernel.delete(*child[2:])
        routes.delete("10.9.0.0/16")
        await made.settle()
        assert await paths_of_route(made) == {}

    play_with_routes(kind, story)


def test_children_of_one_vti_share_its_routes_by_their_selectors(kind: str) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("eth0")
        routes.link("vti7", 7)
        routes.add("10.0.0.0/8", "vti7")
        routes.add("10.2.0.0/15", "eth0")
        children = [tunnel(1, 7, "10.1.0.0/16"), tunnel(2, 7, "10.2.0.0/16", "10.4.0.0/16")]
        await begun(made, *children)
        assert await paths_of_route(made) == {"10.0.0.0/8": "drop", "10.1.0.0/16": "1", "10.4.0.0/16": "2"}
        blocked = make_policy(dst="10.4.4.0/24", src=EVERYTHING, priority=1, if_id=7, action=1, templates=())
        made.kernel.add(blocked)
        await made.settle()
        assert (await paths_of_route(made))["10.4.4.0/24"] == "drop"
        routes.delete("10.2.0.0/15")
        made.kernel.delete(blocked)
        await made.settle()
        assert await paths_of_route(made) == {
            "10.0.0.0/8": "drop",
            "10.1.0.0/16": "1",
            "10.2.0.0/16": "2",
            "10.4.0.0/16": "2",
        }

    play_with_routes(kind, story)


def test_tunnels_share_a_route_by_weight(kind: str) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7)
        routes.link("vti8", 8)
        routes.add("10.9.0.0/16", ("vti7", 3), "vti8")
        routes.add("fd09::/48", "vti7", "vti8")
        one, two = tunnel(1, 7, EVERYTHING, EVERYTHING6), tunnel(2, 8, EVERYTHING, EVERYTHING6)
        await begun(made, one)
        assert await paths_of_route(made) == {"10.9.0.0/16": "1", "fd09::/48": "1"}, "what has no tunnel has no share"
        made.kernel.add(*two)
        await made.settle()
        assert await paths_of_route(made) == {"10.9.0.0/16": "1*3 2*1", "fd09::/48": "1*1 2*1"}
        routes.replace("10.9.0.0/16", "vti7", ("vti8", 2))
        await made.settle()
        assert (await paths_of_route(made))["10.9.0.0/16"] == "1*1 2*2"
        made.kernel.delete(*one)
        await made.settle()
        assert await paths_of_route(made) == {"10.9.0.0/16": "2", "fd09::/48": "2"}
        made.kernel.delete(*two[:2])
        await made.settle()
        assert await paths_of_route(made) == {"10.9.0.0/16": "drop", "fd09::/48": "drop"}

    play_with_routes(kind, story)


def test_a_link_that_vpp_does_not_have_gets_no_share(kind: str) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("eth0")
        routes.link("vti7", 7)
        routes.add("10.9.0.0/16", "vti7", "eth0")
        routes.add("10.10.0.0/16", "vti7")
        await begun(made, tunnel(1, 7, EVERYTHING))
        assert await paths_of_route(made) == {"10.9.0.0/16": "vti 7", "10.10.0.0/16": "vti 7"}, (
            "VPP does not have the other link"
        )
        assert said(made) == {
            "0.0.0.0/0 > 0.0.0.0/0": ("routed", "0.0.0.0/0", "routes over vti7: 10.9.0.0/16, 10.10.0.0/16")
        }

    play_with_routes(kind, story)


def test_routes_of_a_vrf_go_into_its_table_where_vpp_has_one(kind: str) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7, table=VRF)
        routes.add("10.9.0.0/16", "vti7", table=VRF)
        await begun(made, tunnel(1, 7, EVERYTHING))
        assert await paths_of_route(made) == {}
        (answer,) = said(made).values()
        assert answer[2].endswith(f"10.9.0.0/16 is left out: VPP has no table {VRF}")
        assert f"has no IPv4 table {VRF}: the routes over VTIs in it are left out" in {
            e.text for e in made.engine.journal
        }
        await set_table(await made.admin(), VRF, ip6=False)
        await until_paths(made, {f"10.9.0.0/16 table {VRF}": "1"})
        await made.settle()
        assert next(iter(said(made).values()))[2] == f"routes over vti7: 10.9.0.0/16 table {VRF}"
        routes.delete("10.9.0.0/16", table=VRF)
        await made.settle()
        assert await paths_of_route(made) == {}

    play_with_routes(kind, story)


def test_a_policy_without_if_id_goes_before_a_vti() -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7)
        routes.add("10.9.0.9/32", "vti7")
        routes.add("10.9.0.0/16", "vti7")
        host = tunnel(2, 0, "10.9.0.9/32")
        await begun(made, tunnel(1, 7, EVERYTHING), host)
        assert await paths_of_route(made) == {"10.9.0.9/32": "2", "10.9.0.0/16": "1"}
        made.kernel.delete(*host)
        await made.settle()
        assert await paths_of_route(made) == {"10.9.0.9/32": "1", "10.9.0.0/16": "1"}

    play_with_routes("standin", story)


def test_own_address_of_a_vti_does_not_go_into_its_tunnel() -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7)
        routes.address("vti7", "10.99.0.1/30")
        routes.add("10.99.0.0/30", "vti7")
        await begun(made, tunnel(1, 7, EVERYTHING))
        assert await paths_of_route(made) == {"10.99.0.0/30": "1", "10.99.0.1/32": "drop"}
        routes.delete("10.99.0.0/30")
        await made.settle()
        assert await paths_of_route(made) == {}

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
        assert await paths_of_route(made) == expected
        changes.clear()
        await made.restart_engine()
        await made.settle()
        assert await paths_of_route(made) == expected
        assert changes == []
        await made.stop()
        routes.delete("10.9.0.9/32")
        await made.restart_engine()
        await made.settle()
        del expected["10.9.0.9/32"]
        assert await paths_of_route(made) == expected

    play_with_routes("standin", story, note)


def test_nothing_is_taken_for_in_sync_before_the_routes_are_known() -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.refuses = "no answer"
        made.kernel.add(*tunnel(1, 7, EVERYTHING))
        made.start()
        async with asyncio.timeout(PATIENCE_S):
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
        (state,) = made.engine.tunnels.values()
        assert state.desired.tunnel is None
        assert await paths_of_route(made) == {"192.0.2.2/32": "drop"}
        routes.delete("192.0.2.2/32")
        await made.settle()
        assert await paths_of_route(made) == {}
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
        old = [other for other in self.sas.values() if tunnel_key_of_sa(other) == tunnel_key_of_sa(sa)]
        for other in old:
            self._spi += 1
            self.add(other._replace(spi=self._spi, usage=NOT_USED, replay=None))
        self.delete(*old)


REFUSED = {
    "ip_route_add_del_v2",
    "ipsec_itf_create",
    "ipsec_sad_entry_add_v2",
    "sw_interface_set_flags",
    "sw_interface_set_table",
    "sw_interface_add_del_address",
    "ip_table_add_del_v2",
    "acl_add_replace",
    "abf_policy_add_del",
    "abf_itf_attach_add_del",
}


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
        return -1 if self.sick and name in REFUSED and self._random.random() < 0.1 else None

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
                next_hops = pick.sample(
                    [("vti7", 1), ("vti8", pick.choice((1, 3))), ("eth0", 1)], pick.choice((1, 1, 2))
                )
                (routes.replace if where in self._there else routes.add)(where[0], *next_hops, metric=where[1])
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
