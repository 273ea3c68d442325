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
from vppipsec.sync.desired.policy_layers import FamilySteering, PolicyRules
from vppipsec.sync.plan.policy_layers import FIRST_ATTACHMENT_PRIORITY, layer_requests
from vppipsec.vpp.api.abf import AbfAttach, AbfPolicyAddDel
from vppipsec.vpp.api.acl import AclAddReplace
from vppipsec.vpp.api.ip import TableAddDel
from vppipsec.vpp.inventory import FoundAcl, FoundTable
from vppipsec.vpp.ownership import TABLE_NUMBERS
from vppipsec.vpp.state.policy_layers import ActualLayer, StackKey, adopt_layers
from vppipsec.vpp.types import NO_INDEX, Prefix, Rule

# The order, claim by claim


def test_layer_is_built_from_table_to_attachment_step_by_step() -> None:
    bench = Bench(interfaces=(LAN, DMZ))
    bench.desire(one(A, "10.1.0.0/16"), one(B, "10.2.0.0/16"))
    assert bench.converge() == 4
    assert kinds(bench.sent) == ["TableAddDel", "AclAddReplace", "AbfPolicyAddDel", "AbfAttach", "AbfAttach"]
    table, acl, policy, *attach = bench.sent
    assert table == TableAddDel(TABLE_NUMBERS[0], False, f"vpp-ipsecd {FIRST_ATTACHMENT_PRIORITY}")
    assert acl == AclAddReplace(NO_INDEX, f"vpp-ipsecd out {TABLE_NUMBERS[0]}", bench.want.layers[0].rules)
    assert policy == AbfPolicyAddDel(TABLE_NUMBERS[0], 1, TABLE_NUMBERS[0], False)
    assert attach == [AbfAttach(TABLE_NUMBERS[0], index, FIRST_ATTACHMENT_PRIORITY, False) for index in (LAN, DMZ)]


def test_nothing_wanted_any_more_goes_from_the_attachment_to_the_table() -> None:
    bench = Bench()
    bench.desire(one(A, "10.1.0.0/16", "10.9.0.0/16"), one(B, "10.0.0.0/8"), one(C, "172.16.0.1/32"))
    bench.converge()
    bench.desire()
    bench.converge()
    assert kinds(bench.sent) == [
        "-AbfAttach",
        *("-AbfPolicyAddDel", "-AbfAttach"),  # the second layer is removed while the first is detached
        *("-AbfPolicyAddDel", "AclDel"),
        *("AclDel", "-TableAddDel"),
        "-TableAddDel",
    ]
    detached = [request.priority for request in bench.sent if isinstance(request, AbfAttach)]
    assert detached == [FIRST_ATTACHMENT_PRIORITY + 1, FIRST_ATTACHMENT_PRIORITY]
    assert bench.vpp.empty


def test_what_needs_no_other_layer_changes_in_place_by_one_request() -> None:
    bench = Bench()
    bench.desire(one(A, "10.1.0.0/16"))
    bench.converge()
    bench.desire(one(A, "10.1.0.0/16"), one(B, "10.2.0.0/16"))
    bench.converge()
    bench.desire(one(B, "10.2.0.0/16"))
    assert kinds(bench.sent) == ["AclAddReplace"]
    bench.converge()
    assert bench.sent == [AclAddReplace(1, f"vpp-ipsecd out {TABLE_NUMBERS[0]}", (rule("10.2.0.0/16"),))]


def test_policy_that_only_gets_another_tunnel_costs_no_request_here() -> None:
    bench = Bench()
    bench.desire(one(A, "10.1.0.0/16"))
    bench.converge()
    bench.desire(one(B, "10.1.0.0/16"))
    assert bench.plan().requests == []
    assert bench.plan().routes[TABLE_NUMBERS[0]] == {prefix("10.1.0.0/16"): B}
    bench.converge()


def test_overlapped_route_drops_until_the_rules_changed() -> None:
    bench = Bench()
    bench.desire(one(A, "10.0.0.0/8"))
    bench.converge()
    bench.desire(one(B, "10.1.0.0/16"), one(A, "10.0.0.0/8"), one(C, "172.16.0.0/16"))
    plan = bench.plan()
    (number,) = plan.routes.keys() - {0}
    narrow, wide, other = (prefix(text) for text in ("10.1.0.0/16", "10.0.0.0/8", "172.16.0.0/16"))
    assert plan.routes[number] == {narrow: DROP, wide: A, other: C}
    assert plan.requests == []  # not before it drops
    bench.vpp.tables[number, False] |= {narrow: DROP}
    assert kinds(bench.plan().requests) == ["AclAddReplace"]
    bench.converge()
    assert bench.vpp.tables[number, False] == {narrow: B, wide: A, other: C}


def test_rule_that_changes_layers_gets_new_layers_before_old_ones_go() -> None:
    bench = Bench()
    bench.desire(one(A, "10.1.0.0/16"))
    bench.converge()
    packet = Packet(parse_addr("10.8.0.1"), parse_addr("10.1.0.1"), 17)
    bench.watch([packet])
    bench.may = [{A}]
    bench.desire(one(B, "10.1.0.0/16", "10.9.0.0/16"), one(A, "10.1.0.0/16"))
    while not bench.round():
        assert bench.vpp.decide(LAN, False, packet) == A
    asked = [it for it in kinds(bench.sent) if it.endswith("AbfAttach")]
    assert asked[-3:] == ["AbfAttach", "AbfAttach", "-AbfAttach"]
    first, second = bench.actual.stack(StackKey(False))
    assert (first.priority, second.priority) == (FIRST_ATTACHMENT_PRIORITY - 2, FIRST_ATTACHMENT_PRIORITY - 1)
    assert TABLE_NUMBERS[0] not in (first.number, second.number)
    bench.assert_as_wanted()


def test_replacing_layers_wait_for_their_routes_before_attaching() -> None:
    bench = Bench()
    bench.desire(one(A, "10.1.0.0/16"))
    bench.converge()
    bench.desire(one(B, "10.1.0.0/16", "10.9.0.0/16"), one(A, "10.1.0.0/16"))
    bench.haste = 0
    while len(bench.vpp.policies) < 3:
        bench.round()
    for number in bench.tables - {0, TABLE_NUMBERS[0]}:
        bench.vpp.tables[number, False].clear()
    assert bench.plan().requests == []
    routes = {number: dict(table) for (number, ip6), table in bench.vpp.tables.items() if not ip6}
    refused = {(number, prefix("10.1.0.0/16")) for number in routes}
    plan = layer_requests(StackKey(False), bench.want, {LAN}, bench.actual, routes, refused)
    assert kinds(plan.requests) == ["AbfAttach"]  # what VPP refuses is not waited for


def test_host_route_comes_before_its_layer_rule_goes() -> None:
    bench = Bench()
    bench.desire(one(A, "10.1.1.1/32"), one(B, "10.0.0.0/8"))
    bench.converge()
    bench.desire(one(A, "10.1.1.1/32"), one(B, "172.16.0.0/16"))
    assert bench.plan().requests == []
    assert bench.plan().routes[0] == {prefix("10.1.1.1/32"): A}
    bench.converge()
    bench.desire(one(A, "10.1.1.1/32"), one(B, "10.0.0.0/8"))
    assert kinds(bench.plan().requests) == ["AclAddReplace"]
    assert bench.plan().routes[0] == {prefix("10.1.1.1/32"): A}  # until the rule is there
    bench.converge()
    assert bench.vpp.tables[0, False] == {}


def test_new_interface_is_steered_and_one_that_is_left_is_not() -> None:
    bench = Bench()
    bench.desire(one(A, "10.1.0.0/16", "10.9.0.0/16"), one(B, "10.0.0.0/8"))
    bench.converge()
    bench.interfaces = {DMZ}
    bench.converge()
    attached = [
        (it.sw_if_index, it.is_add, it.priority - FIRST_ATTACHMENT_PRIORITY)
        for it in bench.sent
        if isinstance(it, AbfAttach)
    ]
    assert attached == [(LAN, False, 1), (DMZ, True, 0), (LAN, False, 0), (DMZ, True, 1)]


def test_dangling_attachments_go_before_the_index_is_used_again() -> None:
    bench = Bench(interfaces=(LAN, DMZ))
    bench.desire(one(A, "10.1.0.0/16"))
    bench.converge()
    bench.actual.interface_deleted(LAN)
    plan = bench.plan()
    assert plan.requests == [AbfAttach(TABLE_NUMBERS[0], LAN, FIRST_ATTACHMENT_PRIORITY, False, False)]
    assert not plan.complete
    bench.converge()
    assert kinds(bench.sent) == ["-AbfAttach", "AbfAttach"]
    bench.actual.interface_deleted(LAN)
    bench.interfaces = {DMZ}
    bench.desire()
    bench.converge()
    assert bench.vpp.empty


def test_what_an_earlier_run_left_is_adopted_and_what_others_made_is_not() -> None:
    bench = Bench(interfaces=(LAN, DMZ))
    bench.desire(one(A, "10.1.0.0/16", "10.9.0.0/16"), one(B, "10.0.0.0/8"))
    bench.converge()
    found = bench.inventory()
    found = replace(
        found,
        tables=(
            FoundTable(TABLE_NUMBERS[9], False, "red"),
            FoundTable(TABLE_NUMBERS[8], True, "vpp-ipsecd x"),
            *found.tables,
        ),
        acls=(FoundAcl(99, "vpp-ipsecd filter", ()), FoundAcl(98, "vpp-ipsecd out 7", ()), *found.acls),
    )
    actual = adopt_layers(found, {LAN})
    for layer in bench.actual.stack(StackKey(False)):
        layer.attached.remove(DMZ)
        layer.dangling.add(DMZ)
    assert actual.layers == bench.actual.layers


def test_families_share_no_number() -> None:
    bench = Bench()
    bench.actual.add(ActualLayer(TABLE_NUMBERS[0], StackKey(True), FIRST_ATTACHMENT_PRIORITY))
    bench.desire(one(A, "10.1.0.0/16"))
    assert bench.plan().requests == [TableAddDel(TABLE_NUMBERS[1], False, f"vpp-ipsecd {FIRST_ATTACHMENT_PRIORITY}")]


@pytest.mark.slow
def test_ten_thousand_policies_change_in_place_by_as_many_requests_as_one() -> None:
    bench = Bench()
    nets = [Prefix((10 << 24 | 4 * number).to_bytes(4, "big"), 30) for number in range(10_000)]
    every = [PolicyRules((Rule(True, net, net),), A._replace(reqid=number)) for number, net in enumerate(nets)]
    bench.desire(*every)
    bench.converge()
    bench.desire(*every[:5_000], *every[5_001:], one(B, "172.16.0.0/16"))
    bench.converge()
    assert kinds(bench.sent) == ["AclAddReplace"]


# No packet astray


@pytest.mark.parametrize(("haste", "refusals"), [(1.0, 0.0), (0.5, 0.0), (0.4, 0.2)])
@settings(max_examples=200, deadline=None, derandomize=True)
@given(story=stories())
def test_policy_changes_leak_no_packet_to_cleartext_or_other_tunnels(
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
    bench.desire(one(A, "10.1.0.0/16", "10.9.0.0/16"), stays[0], one(B, "10.0.0.0/8"), stays[1])
    bench.converge()
    bench.watch([Packet(parse_addr("10.9.0.1"), parse_addr("10.1.0.1"), 17)])
    bench.desire(*stays)  # what went into A is in clear now, and goes into B never
    bench.converge()
    assert kinds(bench.sent) == ["AclAddReplace", "AclAddReplace"]


def test_what_the_model_finds_astray_is_found() -> None:
    bench = Bench()
    bench.desire(one(A, "10.0.0.0/8"))
    bench.converge()
    bench.watch([Packet(parse_addr("10.9.0.1"), parse_addr("10.1.0.1"), 17)])
    (number,) = bench.tables - {0}
    with pytest.raises(AssertionError):
        bench.route(number, prefix("10.1.0.0/16"), B)
    bench.route(number, prefix("10.1.0.0/16"), DROP)
    bench.vpp.attached.clear()
    with pytest.raises(AssertionError):
        bench.look("detached")
