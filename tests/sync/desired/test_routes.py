"""Whose each route is, and which of them has to be there even while it leads nowhere."""

from __future__ import annotations

from support.small_vpp import HERE, PREFIXES, THERE
from vppipsec.kernel.xfrm.sad_spd import TunnelKey
from vppipsec.sync.desired.policy_layers import Action
from vppipsec.sync.desired.routes import RouteTargets
from vppipsec.vpp.types import Prefix, Route

FIRST, SECOND = (TunnelKey(HERE, THERE, 1, reqid, 0) for reqid in (1, 2))
WIDE, NARROW = Prefix(bytes((10, 1, 0, 0)), 16), Prefix(bytes((10, 1, 2, 0)), 24)
TABLE = 7


def test_each_tunnel_has_its_routes_in_every_table() -> None:
    route_targets = RouteTargets(
        [(0, {WIDE: FIRST, PREFIXES[1]: Action.DISCARD}), (TABLE, {WIDE: SECOND, NARROW: FIRST})]
    )
    assert route_targets.exclusive_routes(FIRST) == {Route(WIDE), Route(NARROW, TABLE)}
    assert route_targets.exclusive_routes(SECOND) == {Route(WIDE, TABLE)}
    assert route_targets.target(Route(PREFIXES[1])) is Action.DISCARD
    assert route_targets.target(Route(PREFIXES[1], TABLE)) is None


def test_layer_route_needs_explicit_drop_only_below_a_wider_one() -> None:
    tables = [(0, {WIDE: FIRST}), (TABLE, {WIDE: SECOND, NARROW: FIRST}), (8, {NARROW: FIRST})]
    route_targets = RouteTargets(tables, frozenset({TABLE, 8}))
    explicit = {route for route in route_targets.targets if route_targets.needs_explicit_drop(route)}
    assert explicit == {Route(WIDE), Route(NARROW, TABLE)}


def test_groups_that_win_or_lose_a_route_differ() -> None:
    before = RouteTargets([(0, {WIDE: FIRST, NARROW: SECOND})])
    assert RouteTargets([(0, {WIDE: FIRST, NARROW: SECOND})]).changed_tunnels(before) == set()
    assert RouteTargets([(0, {WIDE: SECOND, NARROW: SECOND})]).changed_tunnels(before) == {FIRST, SECOND}
    assert RouteTargets().changed_tunnels(before) == {FIRST, SECOND}
