"""Packets routed over VTIs against a small model of both: the kernel's routes and policies, and what VPP is made to hold."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.build import make_policy
from support.packet_path import decide
from support.policy_sets import HOSTS, address, packets, selectors
from support.spd import Packet, in_prefix, lookup, target_of
from vppipsec.kernel.route.model import NextHop
from vppipsec.kernel.route.wire import Destination
from vppipsec.kernel.xfrm.values import Mark, Policy, PolicyType
from vppipsec.sync.desired.classifiers import VtiClassifierConfig
from vppipsec.sync.desired.outbound_policy import outbound_policies, vti_outbound_policy
from vppipsec.sync.desired.policy_layers import Action, LinkNextHop, PlacementKind, VtiClassifier, compute_vti_steering
from vppipsec.sync.desired.routes import WeightedTargets
from vppipsec.sync.desired.vti_routes import RT_TABLE_MAIN, VtiRouteTargets, selectors_of, vti_route_targets
from vppipsec.vpp.types import Prefix

LINK, LINK6 = NextHop(0, 1, 3, bytes((192, 0, 2, 9))), NextHop(0, 1, 3, bytes((0xFE, 0x80, *bytes(13), 9)))
IF_IDS = (7, 8)
NextHopDraws = Mapping[Destination, tuple[NextHop, ...]]


@st.composite
def children(draw: st.DrawFn, ip6: bool) -> Policy:
    """Return an outbound policy of a VTI; some block, some have no template, and so let nothing pass."""
    kind, priority, if_id = draw(st.integers(0, 6)), draw(st.integers(1, 3)), draw(st.sampled_from(IF_IDS))
    selector = draw(selectors(ip6))
    if kind > 4:
        return make_policy(action=kind - 5, templates=(), selector=selector, priority=priority, if_id=if_id)
    return make_policy(reqid=kind % 4 + 1, selector=selector, priority=priority, if_id=if_id)


@st.composite
def routes(draw: st.DrawFn, ip6: bool) -> NextHopDraws:
    """Return the kernel's routes to the small universe, over VTIs and beside them; the default one is over a VTI.

    IPv4 has next hops of IPv6 beside them, too (RTA_VIA).
    """
    links = (LINK6,) if ip6 else (LINK, LINK6)
    more = draw(st.sampled_from(((), (NextHop(8, 2),), *((link,) for link in links))))
    found = {Destination(RT_TABLE_MAIN, bytes(16 if ip6 else 4), 0): (NextHop(7, 1), *more)}
    for length in draw(st.lists(st.sampled_from((28, 29, 30, 32)), max_size=3)):
        number = draw(st.sampled_from(HOSTS)) >> (32 - length) << (32 - length)
        place = Prefix(address(number, ip6), length + 96 * ip6)
        next_hops = draw(
            st.lists(st.sampled_from((NextHop(7, 1), NextHop(8, 1), *links)), min_size=1, max_size=3, unique=True)
        )
        found[Destination(RT_TABLE_MAIN, *place)] = tuple(next_hops)
    return found


@st.composite
def stories(draw: st.DrawFn) -> tuple[NextHopDraws, list[Policy], list[Packet]]:
    ip6 = draw(st.booleans())
    actual = draw(st.lists(children(ip6), min_size=1, max_size=6, unique_by=lambda it: (it.selector, it.if_id)))
    return draw(routes(ip6)), actual, draw(st.lists(packets(ip6, actual), min_size=8, max_size=8))


def in_kernel(next_hops: NextHopDraws, actual: Sequence[Policy], packet: Packet) -> set[object]:
    """Return where the ways of a packet's route take it: by the best policy of each VTI; nowhere without one.

    A next hop of the other family is not among those that a route of VPP's can have: it is some link that is not there.
    """
    place = max((it for it in next_hops if in_prefix(packet.dst, it.address, it.length)), key=lambda it: it.length)
    found: set[object] = set()
    for way in next_hops[place]:
        policy = lookup([it for it in actual if it.if_id == way.if_id], packet)
        passes = policy is not None and bool(policy.templates)
        other_links = (
            LinkNextHop(way.ifindex, way.gateway)
            if len(way.gateway or b"") == len(packet.dst)
            else LinkNextHop(0, None)
        )
        found.add((target_of(policy) if passes else Action.DISCARD) if way.if_id else other_links)
    return found


def in_vpp(targets: VtiRouteTargets, classified: Mapping[int, VtiClassifierConfig], packet: Packet) -> set[object]:
    """Return where the longest of our routes takes it, and what is at a junction decided there."""
    table = targets.routes[0]
    target = table[max((it for it in table if in_prefix(packet.dst, *it)), key=lambda it: it.length)]
    found: set[object] = set()
    for share in target.targets if isinstance(target, WeightedTargets) else (target,):
        if isinstance(share, VtiClassifier):
            layers = classified[share.if_id].steering.family(len(packet.dst) == 16).layers
            decided = decide([(layer.rules, layer.routes) for layer in layers], {}, packet)
            found.add(Action.DISCARD if decided is Action.BYPASS else decided)  # nothing is in the junctions' table
        else:
            found.add(share)
    return found


def at_classifiers(targets: VtiRouteTargets, actual: Sequence[Policy]) -> dict[int, VtiClassifierConfig]:
    """Return what tells packets apart behind each VTI."""
    found = {}
    for if_id in targets.classifiers:
        of_its = [vti_outbound_policy(each.policy) for each in outbound_policies(actual) if each.policy.if_id == if_id]
        wanted = tuple(each.policy_rules for each in of_its if each.policy_rules is not None)
        found[if_id] = VtiClassifierConfig(of_its, wanted, compute_vti_steering(wanted))
    return found


@pytest.mark.slow
@settings(max_examples=800, deadline=None)
@given(stories())
def test_every_packet_goes_where_the_kernel_lets_its_ways_go(
    story: tuple[NextHopDraws, list[Policy], list[Packet]],
) -> None:
    next_hops, actual, sent = story
    targets = vti_route_targets(
        next_hops, selectors_of([each.policy for each in outbound_policies(actual)]), {(0, False), (0, True)}
    )
    classified = at_classifiers(targets, actual)
    for packet in sent:
        found = in_kernel(next_hops, actual, packet)
        if not all(isinstance(way, LinkNextHop) for way in found):  # else no route of ours is for it
            assert in_vpp(targets, classified, packet) == found, packet


def test_children_for_one_destination_are_in_layers_in_the_kernels_order() -> None:
    actual = [
        make_policy(src=src, dst="10.2.0.0/16", reqid=reqid, if_id=7, priority=priority)
        for reqid, (src, priority) in enumerate([("0.0.0.0/0", 3), ("10.1.0.0/16", 1), ("10.1.1.0/24", 2)], 1)
    ]
    targets = vti_route_targets(
        {Destination(RT_TABLE_MAIN, bytes(4), 0): (NextHop(7, 1),)}, selectors_of(actual), {(0, False)}
    )
    assert targets.routes == {0: {Prefix(bytes(4), 0): VtiClassifier(7)}}
    (classified,) = at_classifiers(targets, actual).values()
    sources = [[rule.src.length for rule in layer.rules] for layer in classified.steering.ip4.layers]
    assert sources == [[16], [0]], "the third is never the first to match"
    assert [place.kind if place else None for _, place in classified.placements()] == [
        PlacementKind.LAYER,
        PlacementKind.SHADOWED,
        PlacementKind.LAYER,
    ]


def test_policy_vpp_cannot_match_discards_and_one_with_a_mark_is_omitted() -> None:
    sub = replace(make_policy(if_id=7, priority=1, dst="10.2.0.0/16"), type=PolicyType.SUB)
    sctp = make_policy(if_id=7, priority=2, dst="10.3.0.0/16")
    sctp = replace(sctp, selector=replace(sctp.selector, proto=132, dport=80, dport_mask=0xFFFF))
    marked = replace(make_policy(if_id=7, priority=3, dst="10.4.0.0/16"), mark=Mark(1, 1))
    found = [vti_outbound_policy(policy) for policy in (sub, sctp, marked)]
    assert [each.policy_rules.target if each.policy_rules else None for each in found] == [
        Action.DISCARD,
        Action.DISCARD,
        None,
    ]
    assert all(each.reason for each in found)
    steering = compute_vti_steering([each.policy_rules for each in found if each.policy_rules is not None])
    assert [*itertools.chain(*(layer.routes.values() for layer in steering.ip4.layers))] == [Action.DISCARD] * 2
