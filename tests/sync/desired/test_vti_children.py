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
from vppipsec.kernel.route.model import Way
from vppipsec.kernel.route.wire import Destination
from vppipsec.kernel.xfrm.values import Mark, Policy, PolicyType
from vppipsec.sync.desired.classifiers import Apart
from vppipsec.sync.desired.outbound_policy import of_vti, outbound
from vppipsec.sync.desired.policy_layers import Beside, Fixed, How, Junction, steer_routed
from vppipsec.sync.desired.routes import Split
from vppipsec.sync.desired.vti_routes import MAIN, VtiLeads, selectors_of, vti_leads
from vppipsec.vpp.types import Prefix

LINK, LINK6 = Way(0, 1, 3, bytes((192, 0, 2, 9))), Way(0, 1, 3, bytes((0xFE, 0x80, *bytes(13), 9)))
IF_IDS = (7, 8)
Ways = Mapping[Destination, tuple[Way, ...]]


@st.composite
def children(draw: st.DrawFn, ip6: bool) -> Policy:
    """Return an outbound policy of a VTI; some block, some have no template, and so let nothing pass."""
    kind, priority, if_id = draw(st.integers(0, 6)), draw(st.integers(1, 3)), draw(st.sampled_from(IF_IDS))
    selector = draw(selectors(ip6))
    if kind > 4:
        return make_policy(action=kind - 5, templates=(), selector=selector, priority=priority, if_id=if_id)
    return make_policy(reqid=kind % 4 + 1, selector=selector, priority=priority, if_id=if_id)


@st.composite
def routes(draw: st.DrawFn, ip6: bool) -> Ways:
    """Return the kernel's routes to the small universe, over VTIs and beside them; the default one is over a VTI.

    IPv4 has next hops of IPv6 beside them, too (RTA_VIA).
    """
    links = (LINK6,) if ip6 else (LINK, LINK6)
    more = draw(st.sampled_from(((), (Way(8, 2),), *((link,) for link in links))))
    found = {Destination(MAIN, bytes(16 if ip6 else 4), 0): (Way(7, 1), *more)}
    for length in draw(st.lists(st.sampled_from((28, 29, 30, 32)), max_size=3)):
        number = draw(st.sampled_from(HOSTS)) >> (32 - length) << (32 - length)
        place = Prefix(address(number, ip6), length + 96 * ip6)
        ways = draw(st.lists(st.sampled_from((Way(7, 1), Way(8, 1), *links)), min_size=1, max_size=3, unique=True))
        found[Destination(MAIN, *place)] = tuple(ways)
    return found


@st.composite
def stories(draw: st.DrawFn) -> tuple[Ways, list[Policy], list[Packet]]:
    ip6 = draw(st.booleans())
    held = draw(st.lists(children(ip6), min_size=1, max_size=6, unique_by=lambda it: (it.selector, it.if_id)))
    return draw(routes(ip6)), held, draw(st.lists(packets(ip6, held), min_size=8, max_size=8))


def in_kernel(ways: Ways, held: Sequence[Policy], packet: Packet) -> set[object]:
    """Return where the ways of a packet's route take it: by the best policy of each VTI; nowhere without one.

    A next hop of the other family is not among those that a route of VPP's can have: it is some link that is not there.
    """
    place = max((it for it in ways if in_prefix(packet.dst, it.address, it.length)), key=lambda it: it.length)
    found: set[object] = set()
    for way in ways[place]:
        policy = lookup([it for it in held if it.if_id == way.if_id], packet)
        passes = policy is not None and bool(policy.templates)
        beside = Beside(way.ifindex, way.gateway) if len(way.gateway or b"") == len(packet.dst) else Beside(0, None)
        found.add((target_of(policy) if passes else Fixed.DROP) if way.if_id else beside)
    return found


def in_vpp(leads: VtiLeads, apart: Mapping[int, Apart], packet: Packet) -> set[object]:
    """Return where the longest of our routes takes it, and what is at a junction decided there."""
    table = leads.routes[0]
    target = table[max((it for it in table if in_prefix(packet.dst, *it)), key=lambda it: it.length)]
    found: set[object] = set()
    for share in target.targets if isinstance(target, Split) else (target,):
        if isinstance(share, Junction):
            layers = apart[share.if_id].steering.of(len(packet.dst) == 16).layers
            decided = decide([(layer.rules, layer.routes) for layer in layers], {}, packet)
            found.add(Fixed.DROP if decided is Fixed.CLEAR else decided)  # nothing is in the junctions' table
        else:
            found.add(share)
    return found


def at_junctions(leads: VtiLeads, held: Sequence[Policy]) -> dict[int, Apart]:
    """Return what tells packets apart behind each VTI."""
    found = {}
    for if_id in leads.junctions:
        of_its = [of_vti(each.policy) for each in outbound(held) if each.policy.if_id == if_id]
        wanted = tuple(each.wanted for each in of_its if each.wanted is not None)
        found[if_id] = Apart(of_its, wanted, steer_routed(wanted))
    return found


@pytest.mark.slow
@settings(max_examples=800, deadline=None)
@given(stories())
def test_every_packet_goes_where_the_kernel_lets_its_ways_go(story: tuple[Ways, list[Policy], list[Packet]]) -> None:
    ways, held, sent = story
    leads = vti_leads(ways, selectors_of([each.policy for each in outbound(held)]), {(0, False), (0, True)})
    apart = at_junctions(leads, held)
    for packet in sent:
        found = in_kernel(ways, held, packet)
        if not all(isinstance(way, Beside) for way in found):  # else no route of ours is for it
            assert in_vpp(leads, apart, packet) == found, packet


def test_children_for_one_destination_are_in_layers_in_the_kernels_order() -> None:
    held = [
        make_policy(src=src, dst="10.2.0.0/16", reqid=reqid, if_id=7, priority=priority)
        for reqid, (src, priority) in enumerate([("0.0.0.0/0", 3), ("10.1.0.0/16", 1), ("10.1.1.0/24", 2)], 1)
    ]
    leads = vti_leads({Destination(MAIN, bytes(4), 0): (Way(7, 1),)}, selectors_of(held), {(0, False)})
    assert leads.routes == {0: {Prefix(bytes(4), 0): Junction(7)}}
    (apart,) = at_junctions(leads, held).values()
    sources = [[rule.src.length for rule in layer.rules] for layer in apart.steering.ip4.layers]
    assert sources == [[16], [0]], "the third is never the first to match"
    assert [place.how if place else None for _, place in apart.places()] == [How.LAYER, How.SHADOWED, How.LAYER]


def test_a_policy_that_vpp_cannot_tell_drops_and_one_for_a_mark_is_left_out() -> None:
    sub = replace(make_policy(if_id=7, priority=1, dst="10.2.0.0/16"), type=PolicyType.SUB)
    sctp = make_policy(if_id=7, priority=2, dst="10.3.0.0/16")
    sctp = replace(sctp, selector=replace(sctp.selector, proto=132, dport=80, dport_mask=0xFFFF))
    marked = replace(make_policy(if_id=7, priority=3, dst="10.4.0.0/16"), mark=Mark(1, 1))
    found = [of_vti(policy) for policy in (sub, sctp, marked)]
    assert [each.wanted.target if each.wanted else None for each in found] == [Fixed.DROP, Fixed.DROP, None]
    assert all(each.reason for each in found)
    steering = steer_routed([each.wanted for each in found if each.wanted is not None])
    assert [*itertools.chain(*(layer.routes.values() for layer in steering.ip4.layers))] == [Fixed.DROP] * 2
