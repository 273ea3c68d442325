"""The plan of steering against a small VPP that breaks where VPP would: the order, and no packet astray at any moment."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings

from support.layers_vpp import DMZ, LAN, Bench, kinds, stories
from support.policy_sets import DROP, A, B, C, one, prefix, rule
from support.spd import Packet
from vppipsec.kernel.text import parse_addr
from vppipsec.sync.desired.policy_layers import FamilySteering, Wanted
from vppipsec.sync.plan.policy_layers import FIRST_PRIORITY, next_requests
from vppipsec.vpp.api.abf import AttachAbf, SetAbfPolicy
from vppipsec.vpp.api.acl import PutAcl
from vppipsec.vpp.api.ip import SetTable
from vppipsec.vpp.inventory import FoundAcl, FoundTable
from vppipsec.vpp.ownership import NUMBERS
from vppipsec.vpp.state.policy_layers import HeldLayer, Stack, adopt
from vppipsec.vpp.types import NO_INDEX, Prefix, Rule

# The order, claim by claim


def test_layer_is_made_from_the_table_to_the_attachment_each_accepted_before_the_next() -> None:
    bench = Bench(interfaces=(LAN, DMZ))
    bench.wish(one(A, "10.1.0.0/16"), one(B, "10.2.0.0/16"))
    assert bench.converge() == 4
    assert kinds(bench.sent) == ["SetTable", "PutAcl", "SetAbfPolicy", "AttachAbf", "AttachAbf"]
    table, acl, policy, *attach = bench.sent
    assert table == SetTable(NUMBERS[0], False, f"vpp-ipsecd {FIRST_PRIORITY}")
    assert acl == PutAcl(NO_INDEX, f"vpp-ipsecd out {NUMBERS[0]}", bench.want.layers[0].rules)
    assert policy == SetAbfPolicy(NUMBERS[0], 1, NUMBERS[0], False)
    assert attach == [AttachAbf(NUMBERS[0], index, FIRST_PRIORITY, False) for index in (LAN, DMZ)]


def test_nothing_wanted_any_more_goes_from_the_attachment_to_the_table() -> None:
    bench = Bench()
    bench.wish(one(A, "10.1.0.0/16", "10.9.0.0/16"), one(B, "10.0.0.0/8"), one(C, "172.16.0.1/32"))
    bench.converge()
    bench.wish()
    bench.converge()
    assert kinds(bench.sent) == [
        "-AttachAbf",
        *("-SetAbfPolicy", "-AttachAbf"),  # the second layer is removed while the first is detached
        *("-SetAbfPolicy", "DelAcl"),
        *("DelAcl", "-SetTable"),
        "-SetTable",
    ]
    detached = [request.priority for request in bench.sent if isinstance(request, AttachAbf)]
    assert detached == [FIRST_PRIORITY + 1, FIRST_PRIORITY]
    assert bench.vpp.empty


def test_what_needs_no_other_layer_changes_in_place_by_one_request() -> None:
    bench = Bench()
    bench.wish(one(A, "10.1.0.0/16"))
    bench.converge()
    bench.wish(one(A, "10.1.0.0/16"), one(B, "10.2.0.0/16"))
    bench.converge()
    bench.wish(one(B, "10.2.0.0/16"))
    assert kinds(bench.sent) == ["PutAcl"]
    bench.converge()
    assert bench.sent == [PutAcl(1, f"vpp-ipsecd out {NUMBERS[0]}", (rule("10.2.0.0/16"),))]


def test_policy_that_only_gets_another_tunnel_costs_no_request_here() -> None:
    bench = Bench()
    bench.wish(one(A, "10.1.0.0/16"))
    bench.converge()
    bench.wish(one(B, "10.1.0.0/16"))
    assert bench.plan().requests == []
    assert bench.plan().routes[NUMBERS[0]] == {prefix("10.1.0.0/16"): B}
    bench.converge()


def test_route_that_another_one_overlaps_drops_until_the_rules_have_changed() -> None:
    bench = Bench()
    bench.wish(one(A, "10.0.0.0/8"))
    bench.converge()
    bench.wish(one(B, "10.1.0.0/16"), one(A, "10.0.0.0/8"), one(C, "172.16.0.0/16"))
    plan = bench.plan()
    (number,) = plan.routes.keys() - {0}
    narrow, wide, other = (prefix(text) for text in ("10.1.0.0/16", "10.0.0.0/8", "172.16.0.0/16"))
    assert plan.routes[number] == {narrow: DROP, wide: A, other: C}
    assert plan.requests == []  # not before it drops
    bench.vpp.tables[number, False] |= {narrow: DROP}
    assert kinds(bench.plan().requests) == ["PutAcl"]
    bench.converge()
    assert bench.vpp.tables[number, False] == {narrow: B, wide: A, other: C}


def test_rule_that_goes_to_another_layer_has_new_ones_before_the_old_ones_go_and_loses_nothing() -> None:
    bench = Bench()
    bench.wish(one(A, "10.1.0.0/16"))
    bench.converge()
    packet = Packet(parse_addr("10.8.0.1"), parse_addr("10.1.0.1"), 17)
    bench.watch([packet])
    bench.may = [{A}]
    bench.wish(one(B, "10.1.0.0/16", "10.9.0.0/16"), one(A, "10.1.0.0/16"))
    while not bench.round():
        assert bench.vpp.decide(LAN, False, packet) == A
    asked = [it for it in kinds(bench.sent) if it.endswith("AttachAbf")]
    assert asked[-3:] == ["AttachAbf", "AttachAbf", "-AttachAbf"]
    first, second = bench.held.of(Stack(False))
    assert (first.priority, second.priority) == (FIRST_PRIORITY - 2, FIRST_PRIORITY - 1)
    assert NUMBERS[0] not in (first.number, second.number)
    bench.assert_as_wanted()


def test_new_layers_are_not_attached_before_their_routes_are_there_where_they_relieve_others() -> None:
    bench = Bench()
    bench.wish(one(A, "10.1.0.0/16"))
    bench.converge()
    bench.wish(one(B, "10.1.0.0/16", "10.9.0.0/16"), one(A, "10.1.0.0/16"))
    bench.haste = 0
    while len(bench.vpp.policies) < 3:
        bench.round()
    for number in bench.tables - {0, NUMBERS[0]}:
        bench.vpp.tables[number, False].clear()
    assert bench.plan().requests == []
    routes = {number: dict(table) for (number, ip6), table in bench.vpp.tables.items() if not ip6}
    refused = {(number, prefix("10.1.0.0/16")) for number in routes}
    plan = next_requests(Stack(False), bench.want, {LAN}, bench.held, routes, refused)
    assert kinds(plan.requests) == ["AttachAbf"]  # what VPP refuses is not waited for


def test_host_that_a_route_takes_over_from_a_layer_has_it_before_the_rule_goes() -> None:
    bench = Bench()
    bench.wish(one(A, "10.1.1.1/32"), one(B, "10.0.0.0/8"))
    bench.converge()
    bench.wish(one(A, "10.1.1.1/32"), one(B, "172.16.0.0/16"))
    assert bench.plan().requests == []
    assert bench.plan().routes[0] == {prefix("10.1.1.1/32"): A}
    bench.converge()
    bench.wish(one(A, "10.1.1.1/32"), one(B, "10.0.0.0/8"))
    assert kinds(bench.plan().requests) == ["PutAcl"]
    assert bench.plan().routes[0] == {prefix("10.1.1.1/32"): A}  # until the rule is there
    bench.converge()
    assert bench.vpp.tables[0, False] == {}


def test_new_interface_is_steered_and_one_that_is_left_is_not() -> None:
    bench = Bench()
    bench.wish(one(A, "10.1.0.0/16", "10.9.0.0/16"), one(B, "10.0.0.0/8"))
    bench.converge()
    bench.interfaces = {DMZ}
    bench.converge()
    attached = [
        (it.sw_if_index, it.is_add, it.priority - FIRST_PRIORITY) for it in bench.sent if isinstance(it, AttachAbf)
    ]
    assert attached == [(LAN, False, 1), (DMZ, True, 0), (LAN, False, 0), (DMZ, True, 1)]


def test_attachments_of_an_interface_that_was_deleted_go_before_its_number_serves_another() -> None:
    bench = Bench(interfaces=(LAN, DMZ))
    bench.wish(one(A, "10.1.0.0/16"))
    bench.converge()
    bench.held.interface_deleted(LAN)
    plan = bench.plan()
    assert plan.requests == [AttachAbf(NUMBERS[0], LAN, FIRST_PRIORITY, False, False)]
    assert not plan.complete
    bench.converge()
    assert kinds(bench.sent) == ["-AttachAbf", "AttachAbf"]
    bench.held.interface_deleted(LAN)
    bench.interfaces = {DMZ}
    bench.wish()
    bench.converge()
    assert bench.vpp.empty


def test_what_an_earlier_run_left_is_adopted_and_what_others_made_is_not() -> None:
    bench = Bench(interfaces=(LAN, DMZ))
    bench.wish(one(A, "10.1.0.0/16", "10.9.0.0/16"), one(B, "10.0.0.0/8"))
    bench.converge()
    found = bench.inventory()
    found = replace(
        found,
        tables=(FoundTable(NUMBERS[9], False, "red"), FoundTable(NUMBERS[8], True, "vpp-ipsecd x"), *found.tables),
        acls=(FoundAcl(99, "vpp-ipsecd filter", ()), FoundAcl(98, "vpp-ipsecd out 7", ()), *found.acls),
    )
    held = adopt(found, {LAN})
    for layer in bench.held.of(Stack(False)):
        layer.attached.remove(DMZ)
        layer.dangling.add(DMZ)
    assert held.layers == bench.held.layers


def test_families_share_no_number() -> None:
    bench = Bench()
    bench.held.add(HeldLayer(NUMBERS[0], Stack(True), FIRST_PRIORITY))
    bench.wish(one(A, "10.1.0.0/16"))
    assert bench.plan().requests == [SetTable(NUMBERS[1], False, f"vpp-ipsecd {FIRST_PRIORITY}")]


@pytest.mark.slow
def test_ten_thousand_policies_change_in_place_by_as_many_requests_as_one() -> None:
    bench = Bench()
    nets = [Prefix((10 << 24 | 4 * number).to_bytes(4, "big"), 30) for number in range(10_000)]
    every = [Wanted((Rule(True, net, net),), A._replace(reqid=number)) for number, net in enumerate(nets)]
    bench.wish(*every)
    bench.converge()
    bench.wish(*every[:5_000], *every[5_001:], one(B, "172.16.0.0/16"))
    bench.converge()
    assert kinds(bench.sent) == ["PutAcl"]


# No packet astray


@pytest.mark.parametrize(("haste", "refusals"), [(1.0, 0.0), (0.5, 0.0), (0.4, 0.2)])
@settings(max_examples=200, deadline=None, derandomize=True)
@given(story=stories())
def test_no_packet_leaves_in_clear_or_by_a_strangers_tunnel_while_policies_change(
    haste: float, refusals: float, story: tuple[bool, list[FamilySteering], list[Packet], int]
) -> None:
    ip6, states, sent, seed = story
    bench = Bench(ip6, (LAN, DMZ))
    bench.chance, bench.haste = random.Random(seed), haste
    bench.watch(sent)
    for state in [*states, FamilySteering()]:
        bench.steer(state)
        bench.refusals = refusals
        for _ in range(bench.chance.randrange(12)):  # not always to the end
            bench.down = set(bench.chance.sample([A, B, C], bench.chance.randrange(2)))
            bench.round()
            if bench.chance.random() < 0.1:
                bench.restart()
        if bench.chance.random() < 0.5:
            bench.refusals = 0
            bench.converge()
    bench.refusals = 0
    bench.converge()
    assert bench.vpp.empty


def test_old_rules_go_from_the_last_layer_to_the_first() -> None:
    bench = Bench()
    stays = one(A, "172.16.0.0/16", "10.9.0.0/16"), one(B, "172.16.0.0/12")
    bench.wish(one(A, "10.1.0.0/16", "10.9.0.0/16"), stays[0], one(B, "10.0.0.0/8"), stays[1])
    bench.converge()
    bench.watch([Packet(parse_addr("10.9.0.1"), parse_addr("10.1.0.1"), 17)])
    bench.wish(*stays)  # what went into A is in clear now, and goes into B never
    bench.converge()
    assert kinds(bench.sent) == ["PutAcl", "PutAcl"]


def test_what_the_model_finds_astray_is_found() -> None:
    bench = Bench()
    bench.wish(one(A, "10.0.0.0/8"))
    bench.converge()
    bench.watch([Packet(parse_addr("10.9.0.1"), parse_addr("10.1.0.1"), 17)])
    (number,) = bench.tables - {0}
    with pytest.raises(AssertionError):
        bench.route(number, prefix("10.1.0.0/16"), B)
    bench.route(number, prefix("10.1.0.0/16"), DROP)
    bench.vpp.attached.clear()
    with pytest.raises(AssertionError):
        bench.look("detached")
