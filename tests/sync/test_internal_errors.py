"""A mistake of ours in what finds the rules for outbound policies: VPP keeps what it has of them, and the service goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from support.build import GCM, LOCAL6, REMOTE6, SHA256, make_policy, sa_in, sa_out
from support.clock import run_jumping
from support.fake_routes import FakeRoutes
from support.invariants import inventory_of, targets
from support.lanwan import make_loopback, set_pair
from support.rig import Rig, play_jumping, rig
from support.spd import UDP, Packet
from vppipsec.kernel.text import parse_addr
from vppipsec.kernel.xfrm.values import Algorithm
from vppipsec.status.summary import sync_view
from vppipsec.status.tunnels import policy_rows
from vppipsec.sync.actual import vtis
from vppipsec.sync.apply import steering as apply_steering
from vppipsec.sync.desired.policy_layers import Action
from vppipsec.vpp.inventory import Inventory
from vppipsec.vpp.types import NO_INDEX, Prefix, Route

STUMBLED = "a mistake in vpp-ipsecd: ValueError"
PLAIN = Packet(parse_addr("10.1.0.9"), parse_addr("10.2.0.9"), UDP, 1000, 2000)
HOST = PLAIN._replace(dst=parse_addr("10.5.0.1"))
PURE = {
    "outbound": (apply_steering, "outbound_policies", "the outbound policies"),
    "steer": (apply_steering, "compute_steering", "the outbound policies"),
    "Meetings": (apply_steering, "RuleIndex", "the outbound policies"),
    "next_requests": (apply_steering.plan_policy_layers, "layer_requests", "the rules for outbound policies"),
    "Owners": (apply_steering, "RouteTargets", "the rules for outbound policies"),
}


def stumble(*_: Any) -> Any:
    raise ValueError(f"with {GCM.key.hex()}")


def actual(made: Rig) -> Inventory:
    assert made.standin is not None
    return inventory_of(made.standin.world)


def way(made: Rig, packet: Packet) -> object:
    assert made.standin is not None
    found = targets(made.standin.world, made.wan, packet)
    return Action.DISCARD if found == NO_INDEX else found


def tunnel_of(made: Rig, reqid: int) -> int | None:
    (found,) = [state.actual.sw_if_index for key, state in made.engine.tunnels.items() if key.reqid == reqid]
    return found


def told(made: Rig) -> dict[str, tuple[str, str]]:
    return {row["selector"]: (row["steering"], row["reason"]) for row in policy_rows(made.engine)}


@pytest.mark.parametrize("name", PURE)
def test_a_mistake_costs_neither_the_service_nor_the_rules_that_vpp_has(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    where, attribute, what = PURE[name]

    async def story(made: Rig) -> None:
        made.kernel.add(sa_in(1), sa_out(2), make_policy())
        made.start()
        await made.settle()
        before, tunnel = actual(made), tunnel_of(made, 1)
        assert way(made, PLAIN) == tunnel
        with monkeypatch.context() as patch:
            patch.setattr(where, attribute, stumble)
            made.kernel.add(make_policy(dst="10.3.0.0/24", reqid=2), make_policy(dst="10.4.0.0/24", reqid=2))
            made.kernel.add(sa_in(11), sa_out(12))  # a rekey
            await asyncio.sleep(60)
            assert made.work is not None
            assert not made.work.done()
            assert not made.engine.in_sync
            now = actual(made)
            assert (now.acls, now.tables, now.policies, now.routes) == (
                before.acls,
                before.tables,
                before.policies,
                before.routes,
            )
            assert way(made, PLAIN) == tunnel
            assert {sa.spec.spi for sa in now.sas} >= {11, 12}
            problem = f"{STUMBLED}: VPP keeps what it has of {what} (some of their packets may leave in clear)"
            assert sync_view(made.engine)["problem"] == problem
            if what == "the outbound policies":
                assert told(made)["10.1.0.0/24 > 10.3.0.0/24"] == ("pending", STUMBLED)
            made.kernel.delete(*made.kernel.sas.values())
            await asyncio.sleep(5)
            assert way(made, PLAIN) is Action.DISCARD
        made.kernel.add(sa_in(21), sa_out(22), make_policy(dst="10.6.0.0/24"))
        await made.settle()
        assert sync_view(made.engine)["problem"] == ""
        assert way(made, PLAIN) == tunnel_of(made, 1)
        assert way(made, PLAIN._replace(dst=parse_addr("10.3.0.9"))) is Action.DISCARD

    play_jumping(story)
    lines = [record.getMessage() for record in caplog.records if STUMBLED in record.getMessage()]
    assert lines == [f"VPP keeps what it has of {what}: {STUMBLED}"]
    assert GCM.key.hex() not in caplog.text


async def furnished(made: Rig, routes: FakeRoutes) -> int:
    """Let VPP have everything that steering knows: rules, a route of a host, one over a VTI, and packets for the kernel's tap."""
    admin = await made.admin()
    tap = await set_pair(admin, made.wan, "tap0")
    routes.link("vti7", 7)
    routes.add("10.7.0.0/16", "vti7")
    camellia: dict[str, Any] = {"aead": None, "crypt": Algorithm("cbc(camellia)", bytes(16)), "auth": SHA256}
    made.kernel.add(sa_in(1), sa_out(2), make_policy(), make_policy(src="0.0.0.0/0", dst="10.5.0.1/32"))
    made.kernel.add(sa_in(3, 2, if_id=7), sa_out(4, 2, if_id=7))
    made.kernel.add(make_policy(src="0.0.0.0/0", dst="0.0.0.0/0", reqid=2, if_id=7))
    six = {"saddr": LOCAL6, "daddr": REMOTE6}
    made.kernel.add(sa_in(5, 3, saddr=REMOTE6, daddr=LOCAL6, **camellia), sa_out(6, 3, **six, **camellia))
    made.kernel.add(make_policy(dst="10.8.0.0/24", reqid=3, ends=(LOCAL6, REMOTE6)))
    made.start()
    await made.settle()
    return tap


@pytest.mark.parametrize(
    ("where", "attribute"),
    [
        (apply_steering, "outbound_policies"),
        (apply_steering, "compute_steering"),
        (apply_steering, "kernel_fallbacks"),
        (vtis, "vti_route_targets"),
        (apply_steering.plan_policy_layers, "layer_requests"),
    ],
)
def test_a_service_that_starts_with_a_mistake_leaves_what_it_finds(
    where: Any, attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        tap = await furnished(made, routes)
        before = actual(made)
        packets = [PLAIN, HOST, PLAIN._replace(dst=parse_addr("10.8.0.9"))]
        next_hops = [way(made, packet) for packet in packets]
        assert next_hops == [tunnel_of(made, 1), tunnel_of(made, 1), tap]
        await made.stop()
        with monkeypatch.context() as patch:
            patch.setattr(where, attribute, stumble)
            await made.restart_engine()
            await asyncio.sleep(60)
            assert made.work is not None
            assert not made.work.done()
            assert not made.engine.in_sync
            assert actual(made) == before
            assert STUMBLED in sync_view(made.engine)["problem"]
            made.kernel.add(sa_in(11, 4), sa_out(12, 4), make_policy(dst="10.4.0.0/24", reqid=4))
            made.kernel.add(sa_in(21), sa_out(22))  # a rekey
            await asyncio.sleep(60)
            assert [way(made, packet) for packet in packets] == next_hops
            assert {sa.spec.spi for sa in actual(made).sas} >= {21, 22}
            index = tunnel_of(made, 4)
            assert index is not None
            assert index not in made.standin.world.protections  # its packets would be told from no others
            made.kernel.delete(*[sa for sa in made.kernel.sas.values() if sa.reqid in (1, 2)])
            await asyncio.sleep(5)
            assert [way(made, packet) for packet in packets] == [Action.DISCARD, Action.DISCARD, tap]
            assert NO_INDEX in actual(made).routes.values()
        routes.add("10.9.0.0/16", "vti7")
        made.kernel.add(make_policy(dst="10.6.0.0/24", reqid=4))
        await made.settle()
        assert sync_view(made.engine)["problem"] == ""
        assert tunnel_of(made, 4) in made.standin.world.protections

    play_with_routes(story)


def test_without_route_targets_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    right = apply_steering.RouteTargets

    async def story(made: Rig, routes: FakeRoutes) -> None:
        await furnished(made, routes)
        await made.stop()
        before = actual(made)
        with monkeypatch.context() as patch:
            patch.setattr(apply_steering, "RouteTargets", lambda *tables: stumble() if tables else right())
            made.kernel.add(sa_in(21), sa_out(22))
            await made.restart_engine()
            await asyncio.sleep(60)
            assert actual(made) == before
            assert STUMBLED in sync_view(made.engine)["problem"]
        await asyncio.sleep(5)
        await made.settle()
        assert {sa.spec.spi for sa in actual(made).sas} >= {21, 22}

    play_with_routes(story)


def test_a_mistake_at_the_very_first_start_opens_no_tunnel(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(made: Rig) -> None:
        made.kernel.add(sa_in(1), sa_out(2), make_policy())
        made.kernel.add(
            sa_in(3, 2, if_id=7), sa_out(4, 2, if_id=7), make_policy(reqid=2, if_id=7)
        )  # no route leads there
        with monkeypatch.context() as patch:
            patch.setattr(apply_steering, "compute_steering", stumble)
            made.start()
            await asyncio.sleep(60)
            assert [itf.protection for itf in actual(made).interfaces] == [None, None]
        made.kernel.add(make_policy(dst="10.6.0.0/24", templates=()))  # of no tunnel
        await made.settle()
        assert way(made, PLAIN) == tunnel_of(made, 1)

    play_jumping(story)


def test_routes_over_vtis_follow_once_the_policies_are_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(made: Rig, routes: FakeRoutes) -> None:
        await furnished(made, routes)
        with monkeypatch.context() as patch:
            patch.setattr(apply_steering, "outbound_policies", stumble)
            routes.link("vti9", 9)
            routes.add("10.9.0.0/16", "vti9")
            made.kernel.add(sa_in(7, 4, if_id=9), sa_out(8, 4, if_id=9))
            made.kernel.add(make_policy(src="0.0.0.0/0", dst="0.0.0.0/0", reqid=4, if_id=9))
            await asyncio.sleep(60)
            assert actual(made).routes[Route(Prefix(parse_addr("10.9.0.0"), 16))] == NO_INDEX
        await make_loopback(await made.admin(), "198.51.100.1/32")
        await made.settle()
        assert actual(made).routes[Route(Prefix(parse_addr("10.9.0.0"), 16))] == tunnel_of(made, 4)

    play_with_routes(story)


def play_with_routes(story: Callable[[Rig, FakeRoutes], Awaitable[None]]) -> None:
    """Run a story in a rig whose kernel has routes."""

    async def run() -> None:
        routes = FakeRoutes()
        async with rig("standin", routes=routes) as made:
            await story(made, routes)

    run_jumping(run())
