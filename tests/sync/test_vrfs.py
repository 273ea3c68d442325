"""VTIs that are in VRFs: in which table of VPP's their tunnels' interfaces are, between a kernel of the test's and a VPP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from support.fake_routes import MAIN, FakeRoutes
from support.faults import Trouble
from support.lanwan import set_table
from support.recorded import PATIENCE_S
from support.rig import KINDS, Rig
from support.vti_rig import EVERYTHING, EVERYTHING6, READING, begun, paths_of_route, play_with_routes, tunnel
from vppipsec.status.tunnels import tunnel_rows
from vppipsec.vpp.api.interface import GetInterfaceTable
from vppipsec.vpp.api.ip import DisableIp6, EnableIp6
from vppstandin.server import End

RED, BLUE = 10, 20
BOTH = (False, True)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def make_vrfs(made: Rig, *numbers: int) -> None:
    """Give VPP tables of both families."""
    for number in numbers:
        for ip6 in BOTH:
            await set_table(await made.admin(), number, ip6)


async def tables(made: Rig) -> dict[int, tuple[int, int]]:
    """Return the tables that VPP says an interface is in, of IPv4 and of IPv6, by reqid; of protected ones alone."""
    admin = await made.admin()
    protected = {
        it.tun.sw_if_index for it in await admin.dump("ipsec_tunnel_protect_dump", {"sw_if_index": 0xFFFFFFFF})
    }
    found = {}
    for key, state in made.engine.tunnels.items():
        if (index := state.actual.sw_if_index) in protected:
            of = [await admin.call("sw_interface_get_table", {"sw_if_index": index, "is_ipv6": ip6}) for ip6 in BOTH]
            found[key.reqid] = (of[0].vrf_id, of[1].vrf_id)
    return found


def said(made: Rig) -> dict[int, tuple[str, str]]:
    """Return state and reason of each tunnel, by reqid."""
    return {row["reqid"]: (row["state"], row["reason"]) for row in tunnel_rows(made.engine)}


async def until(made: Rig, holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110  # what VPP was given is no event
            await asyncio.sleep(0.02)
    await made.settle()


def test_a_tunnels_interface_follows_its_vti_from_vrf_to_vrf(kind: str) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        await make_vrfs(made, RED, BLUE)
        routes.link("vti7", 7)
        routes.link("vti8", 8, table=RED)
        children = (tunnel(1, 7, "10.1.0.0/16"), tunnel(2, 7, "10.2.0.0/16", "fd02::/64"), tunnel(3, 8, EVERYTHING))
        await begun(made, *children)
        assert await tables(made) == {1: (0, 0), 2: (0, 0), 3: (RED, 0)}
        before = {key: state.actual.sw_if_index for key, state in made.engine.tunnels.items()}
        for table in (RED, BLUE, 0, BLUE):
            routes.link("vti7", 7, table=table)
            routes.add("10.0.0.0/8", "vti7", table=table or MAIN)
            await made.settle()
            assert await tables(made) == {1: (table, 0), 2: (table, table), 3: (RED, 0)}
            where = f" table {table}" if table else ""
            assert await paths_of_route(made) == {
                f"10.0.0.0/8{where}": "drop",
                f"10.1.0.0/16{where}": "1",
                f"10.2.0.0/16{where}": "2",
            }
            routes.delete("10.0.0.0/8", table=table or MAIN)
        assert {key: state.actual.sw_if_index for key, state in made.engine.tunnels.items()} == before
        assert made.kernel.expired == [], "no SA had to be replaced"

    play_with_routes(kind, story)


def test_routes_of_another_table_into_a_vti_that_moves_stay(kind: str) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        await make_vrfs(made, RED, BLUE)
        routes.link("vti7", 7, table=RED)
        routes.add("10.9.0.0/16", "vti7")
        routes.add("10.9.0.0/16", "vti7", table=BLUE)
        await begun(made, tunnel(1, 7, EVERYTHING))
        for table in (RED, BLUE, 0):
            routes.link("vti7", 7, table=table)
            await made.settle()
            assert await paths_of_route(made) == {"10.9.0.0/16": "1", f"10.9.0.0/16 table {BLUE}": "1"}
            assert await tables(made) == {1: (table, 0)}

    play_with_routes(kind, story)


def test_a_tunnel_waits_until_vpp_has_the_tables_of_its_vrf(kind: str) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7, table=RED)
        await begun(made, tunnel(1, 7, EVERYTHING, EVERYTHING6), tunnel(2, 7, "10.2.0.0/16"))
        assert await tables(made) == {}
        reasons = [f"VPP has no {family} table {RED}, the one of its VTI's VRF" for family in ("IPv4", "IPv6")]
        assert said(made) == dict.fromkeys((1, 2), ("unsupported", reasons[0]))
        await set_table(await made.admin(), RED, ip6=False)
        await until(made, lambda: said(made)[2] == ("synced", ""))
        assert said(made)[1] == ("unsupported", reasons[1])
        await set_table(await made.admin(), RED, ip6=True)
        await until(made, lambda: said(made)[1] == ("synced", ""))
        assert await tables(made) == {1: (RED, RED), 2: (RED, 0)}
        routes.link("vti7", 7, table=BLUE)
        await made.settle()
        assert await tables(made) == {}, "better dropped than forwarded by another table"

    play_with_routes(kind, story)


def test_deleted_table_lives_until_the_last_tunnel_leaves_it(kind: str) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        await make_vrfs(made, RED)
        routes.link("vti7", 7, table=RED)
        await begun(made, tunnel(1, 7, EVERYTHING, EVERYTHING6))
        admin = await made.admin()
        for ip6 in BOTH:
            await set_table(admin, RED, ip6, is_add=False)
        made.engine.request_resync()
        await made.settle()
        assert await tables(made) == {1: (RED, RED)}
        routes.link("vti7", 7)
        await made.settle()
        assert await tables(made) == {1: (0, 0)}
        assert {details.table.table_id for details in await admin.dump("ip_table_dump")} == {0}
        routes.link("vti7", 7, table=RED)
        await until(made, lambda: said(made)[1][0] == "unsupported")
        assert await tables(made) == {}

    play_with_routes(kind, story)


def test_nothing_of_ours_is_left_in_a_table_that_goes_with_the_last_tunnel(kind: str) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        await make_vrfs(made, RED)
        routes.link("vti7", 7, table=RED)
        routes.address("vti7", "10.99.0.1/30")
        routes.add("10.99.0.0/30", "vti7", table=RED)
        routes.link("vti8", 8)
        routes.add("10.98.0.0/30", "vti8", table=RED)
        await begun(made, tunnel(1, 7, EVERYTHING))
        where = f" table {RED}"
        assert await paths_of_route(made) == {
            f"10.99.0.0/30{where}": "1",
            f"10.99.0.1/32{where}": "drop",
            f"10.98.0.0/30{where}": "drop",
        }
        await set_table(await made.admin(), RED, ip6=False, is_add=False)
        routes.delete("10.99.0.0/30", table=RED)
        routes.delete("10.98.0.0/30", table=RED)
        routes.link("vti7", 7)
        await made.settle()
        assert await tables(made) == {1: (0, 0)}
        await make_vrfs(made, BLUE)  # where RED was
        assert await paths_of_route(made) == {}

    play_with_routes(kind, story)


def test_routes_that_went_with_a_table_are_not_missed(kind: str) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        await make_vrfs(made, RED)
        routes.link("vti7", 7, table=RED)
        routes.add("10.98.0.0/16", "vti7", table=RED)
        routes.link("vti8", 8)
        routes.add("10.99.0.0/16", "vti8", table=RED)
        await begun(made, tunnel(1, 7, EVERYTHING))
        await set_table(await made.admin(), RED, ip6=False, is_add=False)
        routes.link("vti7", 7)  # as the kernel tells: of its routes later
        async with asyncio.timeout(PATIENCE_S):
            while await tables(made) != {1: (0, 0)}:  # noqa: ASYNC110  # VPP has no event for it
                await asyncio.sleep(0.01)
        for net in ("10.98.0.0/16", "10.99.0.0/16"):
            routes.delete(net, table=RED)
        await made.settle()
        assert await tables(made) == {1: (0, 0)}

    play_with_routes(kind, story, lambda name, request: None)  # VPP refuses to remove what is not there


def test_a_tunnel_whose_vti_is_gone_is_in_no_table(kind: str) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        await make_vrfs(made, RED)
        routes.link("vti7", 7, table=RED)
        await begun(made, tunnel(1, 7, EVERYTHING))
        assert await tables(made) == {1: (RED, 0)}
        routes.unlink("vti7")
        await made.settle()
        assert await tables(made) == {}
        assert said(made) == {1: ("pending", "there is no interface with if_id 7")}

    play_with_routes(kind, story)


def test_a_vti_in_the_vrf_of_the_kernels_main_table_is_in_vpps() -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        routes.link("vti7", 7, table=MAIN)
        await begun(made, tunnel(1, 7, EVERYTHING))
        assert await tables(made) == {1: (0, 0)}

    play_with_routes("standin", story)


def test_what_is_in_a_vrf_after_a_restart_is_not_touched() -> None:
    changes: list[str] = []

    def note(name: str, request: Any) -> None:
        if "dump" not in name and name not in READING and name != GetInterfaceTable.message:
            changes.append(name)

    async def story(made: Rig, routes: FakeRoutes) -> None:
        await make_vrfs(made, RED)
        routes.link("vti7", 7, table=RED)
        routes.link("vti8", 8)
        await begun(made, tunnel(1, 7, EVERYTHING, EVERYTHING6), tunnel(2, 8, EVERYTHING))
        before = await tables(made)
        assert before == {1: (RED, RED), 2: (0, 0)}
        changes.clear()
        await made.restart_engine()
        await made.settle()
        assert await tables(made) == before
        assert changes == []
        await made.stop()
        routes.link("vti7", 7)
        routes.link("vti8", 8, table=RED)
        await made.restart_engine()
        await made.settle()
        assert await tables(made) == {1: (0, 0), 2: (RED, 0)}

    play_with_routes("standin", story, note)


def test_a_vpp_that_comes_back_gets_the_tunnel_only_once_it_has_the_table(kind: str) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        await make_vrfs(made, RED)
        routes.link("vti7", 7, table=RED)
        await begun(made, tunnel(1, 7, EVERYTHING))
        await made.kill_vpp()
        await made.bring_vpp_back()
        await until(made, lambda: said(made).get(1, ("", ""))[0] == "unsupported")
        await make_vrfs(made, RED)
        await until(made, lambda: said(made)[1][0] != "unsupported")

    play_with_routes(kind, story)


@pytest.mark.parametrize(("before", "after"), [(0, RED), (RED, 0), (RED, BLUE)])
def test_a_connection_that_ends_at_any_change_of_a_move_costs_nothing(before: int, after: int) -> None:
    trouble = Trouble()

    async def story(made: Rig, routes: FakeRoutes) -> None:
        assert made.standin is not None
        await make_vrfs(made, RED, BLUE)
        routes.link("vti7", 7, table=before)
        await begun(made, tunnel(1, 7, EVERYTHING, EVERYTHING6))
        number, happens = 0, True
        while happens:
            number, ends = number + 1, made.engine.counters.reconnects
            trouble.at(number, End.CONNECTION)
            for table in (after, before):
                routes.link("vti7", 7, table=table)
                await made.settle()
                assert await tables(made) == {1: (table, table)}
                trouble.heal()
            happens = made.engine.counters.reconnects > ends
        assert number > 8
        assert set(made.standin.refused) <= DONE_BEFORE
        assert made.kernel.expired == []

    play_with_routes("standin", story, trouble)


DONE_BEFORE = {f"{it.message}: {it.already_done_retval}" for it in (EnableIp6, DisableIp6)}
