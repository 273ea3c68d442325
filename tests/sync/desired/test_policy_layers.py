"""What becomes of outbound policies in VPP: claim by claim, and packet by packet against a model of the kernel's lookup."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.build import LOCAL, REMOTE
from support.packet_path import decide_by
from support.policy_sets import (
    CLEAR,
    DROP,
    HOSTS,
    A,
    B,
    C,
    address,
    deny,
    one,
    packets,
    policies,
    prefix,
    rule,
    wanted_of,
)
from support.spd import TCP, UDP, Fragment, Packet, lookup, target_of
from vppipsec.kernel.text import parse_addr
from vppipsec.kernel.xfrm.sad_spd import TunnelKey
from vppipsec.kernel.xfrm.values import Policy
from vppipsec.sync.desired import policy_layers
from vppipsec.sync.desired.policy_layers import Placement, PlacementKind, PolicyRules, Steering, compute_steering
from vppipsec.vpp.types import ANY_PORT, Prefix, Rule


def layers_of(*wanted: PolicyRules, local: Sequence[str] = (), peers: Sequence[str] = ()) -> list[list[Rule]]:
    made = compute_steering(wanted, map(parse_addr, local), map(parse_addr, peers))
    return [list(layer.rules) for layer in made.ip4.layers]


def test_policies_of_different_destinations_share_a_layer() -> None:
    made = compute_steering([one(A, "10.1.0.0/16"), one(B, "10.2.0.0/16", "10.9.0.0/16")], (), ())
    (layer,) = made.ip4.layers
    assert layer.rules == (rule("10.1.0.0/16"), rule("10.2.0.0/16", "10.9.0.0/16"))
    assert layer.routes == {prefix("10.1.0.0/16"): A, prefix("10.2.0.0/16"): B}
    assert made.placements == (Placement(PlacementKind.LAYER, (0,)), Placement(PlacementKind.LAYER, (0,)))
    assert (made.ip4.routes, made.ip6.routes, made.ip6.layers) == ({}, {}, ())


@pytest.mark.parametrize(
    ("earlier", "later", "layers"),
    [
        (one(A, "10.1.0.0/16"), one(B, "10.0.0.0/8"), 1),  # the narrower one takes all that is there
        (one(A, "10.1.0.0/16", "10.9.0.0/16"), one(B, "10.0.0.0/8", "10.9.9.0/24"), 1),
        (one(A, "10.1.0.0/16", "10.9.0.0/16"), one(B, "10.0.0.0/8"), 2),  # other sources would go into A
        (one(A, "10.1.0.0/16", "0.0.0.0/0", TCP), one(B, "10.0.0.0/8"), 2),
        (one(A, "10.1.0.0/16", "0.0.0.0/0", TCP, (0, 9)), one(B, "10.0.0.0/8", "0.0.0.0/0", TCP, (5, 9)), 1),
        (one(A, "10.1.0.0/16", "0.0.0.0/0", TCP, (5, 9)), one(B, "10.0.0.0/8", "0.0.0.0/0", TCP, (0, 9)), 2),
        (one(A, "10.1.0.0/16", "0.0.0.0/0", TCP), one(A, "10.0.0.0/8"), 1),  # the same target
        (one(A, "10.1.0.0/16", "10.8.0.0/16"), one(B, "10.1.0.0/16", "10.9.0.0/16"), 2),  # one route for both
        (one(A, "10.0.0.0/8", "10.8.0.0/16"), one(B, "10.1.0.0/16", "10.9.0.0/16"), 2),  # the longer one catches A's
        (one(CLEAR, "10.1.0.0/16"), one(B, "10.0.0.0/8"), 1),
        (one(DROP, "10.1.0.0/16", "10.8.0.0/16"), one(B, "10.0.0.0/8"), 2),
    ],
)
def test_two_policies_share_a_layer_where_no_packet_can_go_astray(
    earlier: PolicyRules, later: PolicyRules, layers: int
) -> None:
    assert len(layers_of(earlier, later)) == layers


def test_rule_never_stands_before_an_earlier_one_that_it_meets() -> None:
    first, second = one(A, "10.0.0.0/8", "10.8.0.0/16"), one(B, "10.1.0.0/16", "10.8.0.0/15")
    third = one(A, "10.1.0.0/24", "10.9.0.0/16")  # would fit into the first layer, but meets the second policy
    assert layers_of(first, second, third) == [
        [rule("10.0.0.0/8", "10.8.0.0/16")],
        [rule("10.1.0.0/16", "10.8.0.0/15")],
    ]  # it is shadowed, even
    wider = one(A, "10.1.0.0/24", "0.0.0.0/0")
    assert [len(rules) for rules in layers_of(first, second, wider)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("wanted", "local", "peers", "hows"),
    [
        ([one(A, "10.1.1.1/32"), one(DROP, "10.1.1.2/32")], [], [], "rr"),
        ([one(A, "10.1.1.0/31")], [], [], "l"),  # a longer route of others would take its packets
        ([one(A, "10.1.1.1/32", "10.9.0.0/16")], [], [], "l"),
        ([one(A, "10.1.1.1/32", "0.0.0.0/0", TCP)], [], [], "l"),
        ([one(A, "10.1.1.1/32")], [], ["10.1.1.1"], "l"),
        ([one(A, "10.1.1.1/32")], ["10.1.1.1"], [], "s"),
        ([one(A, "10.1.1.1/32"), one(B, "10.1.1.1/32")], [], [], "rs"),
        ([one(A, "10.1.1.1/32"), one(B, "10.0.0.0/8")], [], [], "ll"),  # the later one's layer would come first
        ([one(A, "10.0.0.0/8", "10.9.0.0/16"), one(B, "10.1.1.1/32")], [], [], "lr"),
        ([one(CLEAR, "10.0.0.0/8", "10.9.0.0/16"), one(B, "10.1.1.1/32")], [], [], "ll"),
        ([one(A, "10.1.1.1/32"), one(CLEAR, "10.0.0.0/8")], [], [], "rn"),
        ([PolicyRules((rule("10.1.1.1/32"), rule("10.1.1.2/32")), A)], [], [], "l"),
        ([one(CLEAR, "10.1.0.0/16"), one(A, "10.2.0.0/16")], [], [], "nl"),
        ([one(A, "10.0.0.0/8"), one(B, "10.1.0.0/16", "10.9.0.0/16")], [], [], "ls"),
    ],
)
def test_host_policies_become_routes_and_the_others_rules(
    wanted: list[PolicyRules], local: list[str], peers: list[str], hows: str
) -> None:
    made = compute_steering(wanted, map(parse_addr, local), map(parse_addr, peers))
    assert "".join(place.kind.value[0] for place in made.placements) == hows
    hosts = {it.rules[0].dst: it.target for it, how in zip(wanted, hosts_of(hows), strict=True) if how}
    assert made.ip4.routes == hosts


def hosts_of(hows: str) -> list[bool]:
    return [how == "r" for how in hows]


def test_bypass_is_a_deny_rule_in_its_place() -> None:
    wanted = [one(CLEAR, "10.1.0.0/16", "10.9.0.0/16"), one(A, "10.0.0.0/8")]
    assert layers_of(*wanted) == [[deny("10.1.0.0/16", "10.9.0.0/16"), rule("10.0.0.0/8")]]


def test_packets_to_the_router_need_a_rule_only_where_policies_match() -> None:
    local = ["192.0.2.1", "10.1.0.1", "fe80::1", "2001:db8::1"]
    rules = layers_of(one(A, "10.1.0.0/16"), one(B, "10.2.0.0/16"), local=local)
    assert rules == [[deny("10.1.0.1/32"), rule("10.1.0.0/16"), rule("10.2.0.0/16")]]
    (layer,) = layers_of(one(A, "0.0.0.0/0", "10.1.0.0/16"), local=local)
    assert layer[:-1] == [deny("255.255.255.255/32"), deny("10.1.0.1/32"), deny("192.0.2.1/32")]
    made = compute_steering([one(A, "::/0", "fd00::/8")], map(parse_addr, local), ())
    assert [it.dst for it in made.ip6.layers[0].rules] == [*map(prefix, ("fe80::/10", "2001:db8::1/128", "::/0"))]


def test_one_policy_may_end_in_several_layers() -> None:
    both = PolicyRules((rule("10.1.0.0/16", "0.0.0.0/0", TCP), rule("10.1.0.0/16", "0.0.0.0/0", UDP)), A)
    made = compute_steering([one(B, "10.1.0.0/16", "10.9.0.0/16", TCP), both], (), ())
    assert made.placements == (Placement(PlacementKind.LAYER, (0,)), Placement(PlacementKind.LAYER, (1,)))
    made = compute_steering(
        [one(B, "10.1.5.0/24", "10.9.0.0/16"), PolicyRules((rule("10.2.0.0/16"), rule("10.1.0.0/16")), A)], (), ()
    )
    assert made.placements == (Placement(PlacementKind.LAYER, (0,)), Placement(PlacementKind.LAYER, (0, 1)))


def test_policy_without_a_fitting_layer_discards_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_layers, "MAX_LAYERS", 3)
    sources = [f"10.9.{number}.0/24" for number in range(5)]
    targets = [A, B, C, DROP, CLEAR]
    wanted = [one(target, "10.1.0.0/16", source) for target, source in zip(targets, sources, strict=True)]
    made = compute_steering([*wanted, one(A, "10.0.0.0/8")], (), ())
    assert len(made.ip4.layers) == 3
    assert set(made.ip4.layers[-1].routes.values()) == {DROP}
    assert [place.discarded for place in made.placements] == [False, False, True, False, False, True]
    for source, target in zip(sources, (A, B, DROP, DROP, CLEAR), strict=True):
        packet = Packet(parse_addr(source.split("/")[0]), parse_addr("10.1.2.3"), UDP)
        assert decide_by(made.ip4, packet) == target


def test_ten_thousand_policies_are_one_layer_and_each_finds_its_own_tunnel() -> None:
    keys = [TunnelKey(LOCAL, REMOTE, 1, reqid, 0) for reqid in range(10_000)]
    prefixes = [Prefix((10 << 24 | 4 * number).to_bytes(4, "big"), 30) for number in range(20_000)]
    wanted = [
        PolicyRules((Rule(True, prefixes[number], prefixes[10_000 + number]),), key) for number, key in enumerate(keys)
    ]
    made = compute_steering(wanted, (), ())
    (layer,) = made.ip4.layers
    assert layer.rules == tuple(it.rules[0] for it in wanted)
    assert layer.routes == {it.rules[0].dst: it.target for it in wanted}
    assert set(made.placements) == {Placement(PlacementKind.LAYER, (0,))}


def test_thousand_policies_for_one_destination_keep_the_layer_limit() -> None:
    wanted = [
        one(A._replace(reqid=number), "10.0.0.0/8", f"192.168.{number >> 8}.{number & 255}/32")
        for number in range(1000)
    ]
    made = compute_steering(wanted, (), ())
    assert len(made.ip4.layers) == policy_layers.MAX_LAYERS
    assert sum(place.discarded for place in made.placements) == 1000 - (policy_layers.MAX_LAYERS - 1)


def test_port_bypass_is_preceded_by_fragment_rules_with_unnamed_ports() -> None:
    sctp, port = one(C, "10.1.0.0/16", "0.0.0.0/0", 132), (0xFFFF, 0xFFFF)
    bypassed = one(CLEAR, "10.1.2.0/24", "10.0.0.0/8", UDP, ANY_PORT, port)
    of_port = one(A, "10.1.2.0/24", "10.0.0.0/8", UDP, (7, 7))
    made = compute_steering([bypassed, sctp, of_port, one(B, "10.1.0.0/16", "10.9.0.0/16")], (), ())
    layer = made.ip4.layers[0]
    of_fragments = rule("10.1.2.0/24", "10.9.0.0/16", UDP, port, (0xFFFE, 0xFFFE))
    assert layer.rules[:2] == (of_fragments, *(it._replace(permit=False) for it in bypassed.rules))
    assert layer.routes[of_fragments.dst] == B
    assert all(layer.rules.count(it) == 1 for it in layer.rules)
    assert compute_steering([bypassed, of_port], (), ()).ip4.layers[0].rules == (layer.rules[1], *of_port.rules)


# Against the kernel's lookup


@st.composite
def cases(draw: st.DrawFn) -> tuple[bool, list[Policy], list[Packet], list[bytes], list[bytes]]:
    ip6 = draw(st.booleans())
    actual = draw(st.lists(policies(ip6), min_size=1, max_size=9, unique_by=lambda it: it.selector))
    hosts = st.lists(st.sampled_from(HOSTS).map(lambda number: address(number, ip6)), max_size=2)
    return ip6, actual, draw(st.lists(packets(ip6, actual), min_size=4, max_size=10)), draw(hosts), draw(hosts)


@pytest.mark.slow
@settings(max_examples=1250, deadline=None, derandomize=True)  # each with four packets or more
@given(cases())
def test_steering_agrees_with_the_kernels_lookup(
    case: tuple[bool, list[Policy], list[Packet], list[bytes], list[bytes]],
) -> None:
    ip6, actual, sent, local, peers = case
    made: Steering = compute_steering(wanted_of(actual), local, peers)
    for packet in sent:
        expected = CLEAR if packet.dst in local else target_of(lookup(actual, packet))
        assert decide_by(made.family(ip6), packet) == expected, packet
        fragment = Fragment(*packet)
        if packet.dst not in local and decide_by(made.family(ip6), fragment) is CLEAR:
            assert lookup(actual, fragment) is None or target_of(lookup(actual, fragment)) is CLEAR, fragment
    assert not any(place.discarded for place in made.placements)
    assert compute_steering(wanted_of(actual), reversed(local), reversed(peers)) == made
    assert made.family(not ip6).layers == ()
    hosts = {it.address for it in made.family(ip6).routes}
    assert not hosts & {*local, *peers}
