"""Whose each route is, and which of them has to be there even while it leads nowhere."""

from __future__ import annotations

from support.small_vpp import HERE, PREFIXES, THERE
from vppipsec.kernel.xfrm.sad_spd import GroupKey
from vppipsec.sync.desired.policy_layers import Fixed
from vppipsec.sync.desired.routes import Owners
from vppipsec.vpp.types import Prefix, Route

FIRST, SECOND = (GroupKey(HERE, THERE, 1, reqid, 0) for reqid in (1, 2))
WIDE, NARROW = Prefix(bytes((10, 1, 0, 0)), 16), Prefix(bytes((10, 1, 2, 0)), 24)
TABLE = 7


def test_each_group_owns_what_leads_to_it_in_whatever_table() -> None:
    owners = Owners([(0, {WIDE: FIRST, PREFIXES[1]: Fixed.DROP}), (TABLE, {WIDE: SECOND, NARROW: FIRST})])
    assert owners.owned(FIRST) == {Route(WIDE), Route(NARROW, TABLE)}
    assert owners.owned(SECOND) == {Route(WIDE, TABLE)}
    assert owners.owner(Route(PREFIXES[1])) is Fixed.DROP
    assert owners.owner(Route(PREFIXES[1], TABLE)) is None


def test_route_of_a_layer_is_exposed_below_a_wider_one_alone() -> None:
    tables = [(0, {WIDE: FIRST}), (TABLE, {WIDE: SECOND, NARROW: FIRST}), (8, {NARROW: FIRST})]
    owners = Owners(tables, frozenset({TABLE, 8}))
    exposed = {route for route in owners.targets if owners.exposed(route)}
    assert exposed == {Route(WIDE), Route(NARROW, TABLE)}


def test_groups_that_win_or_lose_a_route_differ() -> None:
    before = Owners([(0, {WIDE: FIRST, NARROW: SECOND})])
    assert Owners([(0, {WIDE: FIRST, NARROW: SECOND})]).differ_from(before) == set()
    assert Owners([(0, {WIDE: SECOND, NARROW: SECOND})]).differ_from(before) == {FIRST, SECOND}
    assert Owners().differ_from(before) == {FIRST, SECOND}
