"""What VPP shall hold for the kernel's routes over VTIs: by tables, and against a small model of both lookups."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vppipsec.kernel.route.model import NextHop
from vppipsec.kernel.route.wire import Destination
from vppipsec.kernel.xfrm.sad_spd import TunnelKey
from vppipsec.sync.desired.policy_layers import LinkNextHop, VtiClassifier
from vppipsec.sync.desired.vti_routes import (
    ChildSelector,
    TargetShare,
    VtiRoute,
    conflicting_destinations,
    vti_routes,
    vtis_needing_classifier,
)
from vppipsec.vpp.types import Prefix, Route

ONE, TWO, THREE = (TunnelKey(bytes([192, 0, 2, 1]), bytes([192, 0, 2, n]), 1, n, 7) for n in (2, 3, 4))
NAMES = {ONE: "one", TWO: "two", THREE: "three", None: "drop", VtiClassifier(7): "apart7", VtiClassifier(8): "apart8"}
VTI7, VTI8, LINK = NextHop(7, 1), NextHop(8, 1), NextHop(0, 1, 3, bytes([10, 0, 0, 9]))
EVERYTHING = "0.0.0.0/0"


def prefix(text: str) -> Prefix:
    net = ipaddress.ip_network(text)
    return Prefix(net.network_address.packed, net.prefixlen)


def to(text: str, table: int = 254) -> Destination:
    return Destination(table, *prefix(text))


def child(remote: str, target: TunnelKey | None, priority: int = 1000, narrow: bool = False) -> ChildSelector:
    return ChildSelector(prefix(remote), priority, target, narrow)


def told(routes: Mapping[Route, VtiRoute]) -> dict[str, str]:
    """Return routes as text: `table prefix` -> `target*weight ...`."""
    text = {}
    for ((address, length), table), route in routes.items():
        shares = [
            f"{'beside' if isinstance(share.target, LinkNextHop) else NAMES[share.target]}*{share.weight}"
            for share in route
        ]
        place = f"{table} {ipaddress.ip_address(address)}/{length}"
        text[place] = " ".join(shares)
    return text


TUNNEL = {7: [child(EVERYTHING, ONE), child("::/0", ONE)]}
WEIGHTED = {7: [child("10.1.0.0/16", ONE), child("10.2.0.0/16", TWO)]}
CASES = {
    "a child for everything takes the whole route": (
        {to("10.0.0.0/8"): (VTI7,)},
        TUNNEL,
        {"0 10.0.0.0/8": "one*1"},
    ),
    "a default route is taken only where the kernel has it over the VTI": (
        {to(EVERYTHING): (LINK,), to("10.0.0.0/8"): (VTI7,)},
        TUNNEL,
        {"0 10.0.0.0/8": "one*1"},
    ),
    "the kernel's default route over the VTI is one": (
        {to(EVERYTHING): (VTI7,), to("::/0"): (VTI7,)},
        TUNNEL,
        {"0 0.0.0.0/0": "one*1", "0 ::/0": "one*1"},
    ),
    "children without a route make none": ({}, TUNNEL, {}),
    "a route without children drops": ({to("10.0.0.0/8"): (VTI7,)}, {}, {"0 10.0.0.0/8": "drop*1"}),
    "a route is cut up by its children, and the rest drops": (
        {to("10.0.0.0/8"): (VTI7,)},
        WEIGHTED,
        {"0 10.0.0.0/8": "drop*1", "0 10.1.0.0/16": "one*1", "0 10.2.0.0/16": "two*1"},
    ),
    "a route within one child is whole": ({to("10.2.3.0/24"): (VTI7,)}, WEIGHTED, {"0 10.2.3.0/24": "two*1"}),
    "a route outside of all children drops": ({to("10.3.0.0/16"): (VTI7,)}, WEIGHTED, {"0 10.3.0.0/16": "drop*1"}),
    "the lower priority number wins, though its selector is wider": (
        {to("10.0.0.0/8"): (VTI7,)},
        {7: [child("10.1.0.0/16", ONE, 2000), child("10.0.0.0/8", TWO, 1000)]},
        {"0 10.0.0.0/8": "two*1"},
    ),
    "the longer selector has a piece where its number is lower": (
        {to("10.0.0.0/8"): (VTI7,)},
        {7: [child("10.1.0.0/16", ONE, 1000), child("10.0.0.0/8", TWO, 2000)]},
        {"0 10.0.0.0/8": "two*1", "0 10.1.0.0/16": "one*1"},
    ),
    "of two with one number the older wins": (
        {to("10.1.0.0/16"): (VTI7,)},
        {7: [child("10.1.0.0/16", TWO), child("10.0.0.0/8", ONE)]},
        {"0 10.1.0.0/16": "two*1"},
    ),
    "a policy that blocks drops its piece": (
        {to("10.0.0.0/8"): (VTI7,)},
        {7: [child(EVERYTHING, ONE, 2000), child("10.66.0.0/16", None, 1000)]},
        {"0 10.0.0.0/8": "one*1", "0 10.66.0.0/16": "drop*1"},
    ),
    "tables keep their numbers but for the main one": (
        {to("10.0.0.0/8", 10): (VTI7,), to("10.0.0.0/8", 254): (VTI8,)},
        {7: [child(EVERYTHING, ONE)], 8: [child(EVERYTHING, TWO)]},
        {"10 10.0.0.0/8": "one*1", "0 10.0.0.0/8": "two*1"},
    ),
    "the table of local addresses is left out": ({to("10.0.0.1/32", 255): (VTI7,)}, TUNNEL, {}),
    "two VTIs share by weight": (
        {to("10.0.0.0/8"): (NextHop(7, 2), NextHop(8, 1))},
        {7: [child(EVERYTHING, ONE)], 8: [child(EVERYTHING, TWO)]},
        {"0 10.0.0.0/8": "one*2 two*1"},
    ),
    "two VTIs with different children share piece by piece": (
        {to("10.0.0.0/8"): (VTI7, VTI8)},
        {7: [child("10.1.0.0/16", ONE)], 8: [child(EVERYTHING, TWO)]},
        {"0 10.0.0.0/8": "drop*1 two*1", "0 10.1.0.0/16": "one*1 two*1"},
    ),
    "two ways into one child are one": (
        {to("10.0.0.0/8"): (VTI7, NextHop(7, 2))},
        TUNNEL,
        {"0 10.0.0.0/8": "one*3"},
    ),
    "a way beside the VTI keeps its share": (
        {to("10.0.0.0/8"): (NextHop(7, 2), LINK)},
        TUNNEL,
        {"0 10.0.0.0/8": "apart7*2 beside*1"},
    ),
    "and then all routes over that VTI lead to its junction": (
        {to("10.0.0.0/8"): (VTI7, LINK), to("172.16.0.0/12"): (VTI7, VTI8), to("10.5.0.0/16", 10): (VTI7,)},
        {7: [child("10.1.0.0/16", ONE)], 8: [child(EVERYTHING, TWO)]},
        {"0 10.0.0.0/8": "apart7*1 beside*1", "0 172.16.0.0/12": "apart7*1 two*1", "10 10.5.0.0/16": "apart7*1"},
    ),
    "a longer route keeps what it has of a child's piece": (
        {to("10.0.0.0/8"): (VTI7,), to("10.1.0.0/24"): (VTI8,)},
        {7: [child("10.1.0.0/16", ONE)], 8: [child(EVERYTHING, TWO)]},
        {"0 10.0.0.0/8": "drop*1", "0 10.1.0.0/16": "one*1", "0 10.1.0.0/24": "two*1"},
    ),
    "no piece comes out within a longer route, whatever link that is over": (
        {to("10.0.0.0/8"): (VTI7,), to("10.1.0.0/16"): (LINK,), to("10.2.0.0/15"): ()},
        {7: [child("10.1.1.0/24", ONE), child("10.2.0.0/16", TWO), child("10.9.0.0/16", THREE)]},
        {"0 10.0.0.0/8": "drop*1", "0 10.9.0.0/16": "three*1"},
    ),
    "a child that more than its destination tells apart makes a junction of its VTI's": (
        {to("10.0.0.0/8"): (VTI7,), to("fd00::/16"): (VTI7,), to("10.8.0.0/16"): (VTI8,)},
        {
            7: [child("10.1.0.0/16", ONE, 1000, narrow=True), child("10.0.0.0/8", TWO, 2000)],
            8: [child(EVERYTHING, TWO)],
        },
        {"0 10.0.0.0/8": "apart7*1", "0 fd00::/16": "apart7*1", "0 10.8.0.0/16": "two*1"},
    ),
    "families do not mix": ({to("fd00::/16"): (VTI7,)}, WEIGHTED, {"0 fd00::/16": "drop*1"}),
}


@pytest.mark.parametrize("name", CASES)
def test_routes_over_vtis(name: str) -> None:
    next_hops, selectors, expected = CASES[name]
    assert told(vti_routes(next_hops, selectors)) == expected


def test_link_next_hop_has_link_and_gateway() -> None:
    route = vti_routes({to("10.0.0.0/8"): (VTI7, LINK)}, TUNNEL)[Route(prefix("10.0.0.0/8"))]
    assert route == (TargetShare(VtiClassifier(7), 1), TargetShare(LinkNextHop(3, bytes([10, 0, 0, 9])), 1))


def test_next_hop_of_the_other_family_is_over_no_link_of_vpp() -> None:
    routes = vti_routes({to("10.0.0.0/8"): (VTI7, NextHop(0, 1, 3, bytes(16)))}, TUNNEL)
    assert routes == {
        Route(prefix("10.0.0.0/8")): (TargetShare(VtiClassifier(7), 1), TargetShare(LinkNextHop(0, None), 1))
    }


def test_in_the_way_is_what_could_lie_between_a_route_and_its_pieces() -> None:
    next_hops = {to("10.0.0.0/8", 10): (VTI7,), to("172.16.0.0/12"): (VTI7,), to("192.168.0.0/16"): (LINK,)}
    selectors = {7: [child(EVERYTHING, ONE), child("10.192.0.0/11", TWO), child("192.168.1.0/24", TWO)]}
    assert conflicting_destinations(next_hops, selectors) == {
        to("10.128.0.0/9", 10),
        to("10.192.0.0/10", 10),
        to("10.192.0.0/11", 10),
    }


def test_classifier_is_for_vtis_with_narrow_children_or_other_links() -> None:
    selectors = {7: [child(EVERYTHING, ONE, narrow=True)], 8: [child(EVERYTHING, TWO)]}
    assert vtis_needing_classifier({}, selectors) == set()
    assert vtis_needing_classifier({to("10.0.0.1/32", 255): (VTI7,)}, selectors) == set()
    assert vtis_needing_classifier({to("10.0.0.0/8"): (VTI7, VTI8)}, selectors) == {7}
    assert vtis_needing_classifier({to("10.0.0.0/8"): (VTI8,), to("10.1.0.0/16"): (VTI8, LINK)}, selectors) == {8}
    assert vtis_needing_classifier({to("10.0.0.0/8"): (LINK,)}, selectors) == set()


# Small addresses, so that prefixes lie within each other often: 10.0.0.0/24 and what is in it.
_LENGTHS = st.integers(24, 32)


@st.composite
def prefixes(draw: st.DrawFn) -> Prefix:
    length = draw(_LENGTHS)
    last = draw(st.integers(0, 255)) & (0xFF << (32 - length)) & 0xFF
    return Prefix(bytes([10, 0, 0, last]), length)


_NEXT_HOPS = st.lists(
    st.one_of(st.builds(NextHop, st.sampled_from([7, 8]), st.integers(1, 3)), st.just(LINK)), max_size=3
).map(tuple)
_KERNEL = st.dictionaries(
    st.builds(lambda table, p: Destination(table, *p), st.sampled_from([254, 10]), prefixes()), _NEXT_HOPS
)
_SELECTORS = st.dictionaries(
    st.sampled_from([7, 8]),
    st.lists(
        st.builds(ChildSelector, prefixes(), st.integers(1, 3), st.sampled_from([ONE, TWO, THREE, None])), max_size=5
    ),
)


def holds(address: bytes, within: Prefix) -> bool:
    net = ipaddress.ip_network((within.address, within.length))
    return ipaddress.ip_address(address) in net


def weights(shares: Sequence[tuple[object, int]]) -> dict[object, int]:
    total: dict[object, int] = {}
    for target, weight in shares:
        total[target] = total.get(target, 0) + weight
    return total


def in_kernel(
    table: int,
    address: bytes,
    next_hops: Mapping[Destination, tuple[NextHop, ...]],
    selectors: Mapping[int, list[ChildSelector]],
) -> dict[object, int] | str:
    """What the kernel does: its longest route, then in each VTI the best policy. `not ours` where that is over no VTI."""
    classified = vtis_needing_classifier(next_hops, selectors)
    found = [d for d in next_hops if d.table == table and holds(address, Prefix(d.address, d.length))]
    if not found:
        return "not ours"
    chosen = next_hops[max(found, key=lambda d: d.length)]
    if not any(way.if_id for way in chosen):
        return "not ours"
    shares: list[tuple[object, int]] = []
    for way in chosen:
        if not way.if_id:
            shares.append((LinkNextHop(way.ifindex, way.gateway), way.weight))
            continue
        if way.if_id in classified:
            shares.append((VtiClassifier(way.if_id), way.weight))
            continue
        fitting = [s for s in selectors.get(way.if_id, []) if holds(address, s.remote)]
        shares.append((min(fitting, key=lambda s: s.priority).target if fitting else None, way.weight))
    return weights(shares)


def in_vpp(
    table: int, address: bytes, next_hops: Mapping[Destination, tuple[NextHop, ...]], routes: Mapping[Route, VtiRoute]
) -> dict[object, int] | str:
    """What VPP does: the longest of our routes and of those that it mirrors from the kernel for other links; ours go first."""
    ours = [place.prefix for place in routes if place.table == table and holds(address, place.prefix)]
    mirrored = [
        Prefix(d.address, d.length)
        for d, shared in next_hops.items()
        if (0 if d.table == 254 else d.table) == table
        and not any(way.if_id for way in shared)
        and holds(address, Prefix(d.address, d.length))
    ]
    if not ours + mirrored:
        return "not ours"
    best = max(ours + mirrored, key=lambda p: p.length)
    route = routes.get(Route(best, table))
    return "not ours" if route is None else weights(route)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(_KERNEL, _SELECTORS)
def test_vpp_takes_every_address_where_the_kernel_does(
    next_hops: dict[Destination, tuple[NextHop, ...]], selectors: dict[int, list[ChildSelector]]
) -> None:
    routes = vti_routes(next_hops, selectors)
    for table in (254, 10):
        for last in range(256):
            address = bytes([10, 0, 0, last])
            assert in_vpp(0 if table == 254 else table, address, next_hops, routes) == in_kernel(
                table, address, next_hops, selectors
            ), ipaddress.ip_address(address)


@settings(max_examples=200, deadline=None)
@given(_KERNEL, _SELECTORS)
def test_only_what_is_in_the_way_matters_besides_the_routes_over_vtis(
    next_hops: dict[Destination, tuple[NextHop, ...]], selectors: dict[int, list[ChildSelector]]
) -> None:
    known = conflicting_destinations(next_hops, selectors)
    seen = {d: shared for d, shared in next_hops.items() if d in known or any(way.if_id for way in shared)}
    assert vti_routes(seen, selectors) == vti_routes(next_hops, selectors)
