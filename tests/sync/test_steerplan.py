"""The plan of steering against a small VPP that breaks where VPP would: the order, and no packet astray at any moment."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policysets import CLEAR, DROP, A, B, C, one, packets, policies, prefix, rule, wanted_of
from spd import Packet
from steered import decide, decide_by
from vppipsec.sync.steering import FamilySteering, Target, Wanted, steer
from vppipsec.sync.steerplan import FIRST_PRIORITY, NUMBERS, HeldLayer, HeldSteering, SteerPlan, next_requests
from vppipsec.vpp.filters import DelAcl, PutAcl
from vppipsec.vpp.forwarding import AttachAbf, SetAbfPolicy, SetTable
from vppipsec.vpp.objects import NO_INDEX, Prefix, Rule
from vppipsec.vpp.requests import Request
from vppipsec.xfrm.text import parse_addr

LAN, DMZ = 11, 12
MOST_ROUNDS = 60
"""More than any change of up to eight layers needs: two for each, and some for what is made and removed."""


@dataclass
class SmallVpp:
    """What VPP holds of tables, ACLs, policies and attachments; it fails the test at what VPP would refuse or die of."""

    tables: dict[tuple[int, bool], dict[Prefix, Target]] = field(
        default_factory=lambda: {(0, False): {}, (0, True): {}}
    )
    acls: dict[int, tuple[str, tuple[Rule, ...]]] = field(default_factory=dict)
    policies: dict[int, tuple[int, tuple[int, bool]]] = field(default_factory=dict)
    attached: dict[tuple[int, int], tuple[int, bool]] = field(default_factory=dict)
    made: int = 0

    def apply(self, request: Request) -> int:
        """Do what a request says and return what its answer carries."""
        match request:
            case SetTable(number, ip6, name, is_add):
                table = (number, ip6)
                assert number in NUMBERS
                if is_add:
                    assert table not in self.tables
                    assert name.startswith("vpp-ipsecd ")
                    self.tables[table] = {}
                else:
                    assert not self.tables.pop(table), "its routes would be in the next table"
                    assert table not in [it[1] for it in self.policies.values()], "a path holds it"
            case PutAcl(index, tag, rules):
                assert rules
                if index == NO_INDEX:
                    self.made += 1
                    index = self.made
                else:
                    assert index in self.acls
                self.acls[index] = (tag, rules)
                return index
            case DelAcl(index):
                assert index not in [acl for acl, _ in self.policies.values()], "-149"
                del self.acls[index]
            case SetAbfPolicy(number, acl, table, ip6, True):
                assert number not in self.policies, "a path that it has: SIGSEGV"
                assert acl in self.acls
                assert (table, ip6) in self.tables
                self.policies[number] = (acl, (table, ip6))
            case SetAbfPolicy(number, acl, table, ip6, False):
                assert number not in [policy for policy, _ in self.attached], "it is attached: SIGSEGV at the next dump"
                assert self.policies.pop(number) == (acl, (table, ip6))
            case AttachAbf(number, index, priority, ip6, True):
                assert number in self.policies, "SIGSEGV"
                assert (number, index) not in self.attached
                assert self.policies[number][1][1] == ip6
                self.attached[number, index] = (priority, ip6)
            case AttachAbf(number, index, _, ip6, False):
                assert self.attached.pop((number, index))[1] == ip6, "SIGSEGV"
            case _:
                raise AssertionError(f"{request} was not expected")
        return 0

    def asked(self, sw_if_index: int, ip6: bool) -> list[tuple[tuple[Rule, ...], dict[Prefix, Target]]]:
        """Return rules and table of each policy that an interface asks, in order."""
        found = [
            (priority, number)
            for (number, index), (priority, family) in self.attached.items()
            if (index, family) == (sw_if_index, ip6)
        ]
        assert len({priority for priority, _ in found}) == len(found), "which of two is asked first is chance"
        return [(self.acls[self.policies[it][0]][1], self.tables[self.policies[it][1]]) for _, it in sorted(found)]

    def decide(self, sw_if_index: int, ip6: bool, packet: Packet) -> Target:
        """Return where a packet goes that an interface receives."""
        return decide(self.asked(sw_if_index, ip6), self.tables[0, ip6], packet)

    @property
    def empty(self) -> bool:
        """True when there is nothing of ours."""
        return not (self.acls or self.policies or self.attached or len(self.tables) > 2 or any(self.tables.values()))


class Bench:
    """The small VPP, the plan of one family, and an engine's part: the routes, which it gives VPP as it can."""

    def __init__(self, ip6: bool = False, interfaces: Iterable[int] = (LAN,)) -> None:
        self.ip6 = ip6
        self.vpp = SmallVpp()
        self.held = HeldSteering()
        self.want = FamilySteering()
        self.interfaces = set(interfaces)
        self.down: set[Target] = set()
        """Tunnels that are not there; what leads into them drops."""
        self.watched: Sequence[Packet] = ()
        self.may: list[set[Target]] = []
        """For each packet that is watched, where the policies send it that were in force since all was as wanted."""
        self.chance = random.Random(1)
        self.haste = 1.0
        """How many of the routes come before the requests of a round."""
        self.refusals = 0.0
        self.sent: list[Request] = []

    def wish(self, *wanted: Wanted) -> None:
        """Change what is wanted."""
        self.steer(steer(wanted, (), ()).of(self.ip6))

    def steer(self, want: FamilySteering) -> None:
        """Change what is wanted, as steering has it."""
        self.want = want
        for packet, targets in zip(self.watched, self.may, strict=True):
            targets.add(decide_by(want, packet))

    def watch(self, sent: Sequence[Packet]) -> None:
        """Look at these packets after each request."""
        self.watched, self.may = sent, [{decide_by(self.want, packet)} for packet in sent]

    def plan(self) -> SteerPlan:
        """Ask what to do now."""
        routes = {number: dict(table) for (number, ip6), table in self.vpp.tables.items() if ip6 == self.ip6}
        return next_requests(self.ip6, self.want, frozenset(self.interfaces), self.held, routes)

    def round(self) -> bool:
        """Do what the plan says now, not all of which VPP accepts, and tell whether it was complete."""
        plan = self.plan()
        before = self.chance.sample(deltas := list(self.deltas(plan)), round(self.haste * len(deltas)))
        for delta in before:
            self.route(*delta)
        for request in plan.requests:
            if self.chance.random() >= self.refusals:
                self.sent.append(request)
                self.held.took(request, self.vpp.apply(request))
                self.look(request)
        for delta in deltas:
            if delta not in before and delta[0] in self.tables:
                self.route(*delta)
        return plan.complete and not deltas

    @property
    def tables(self) -> set[int]:
        return {number for number, ip6 in self.vpp.tables if ip6 == self.ip6}

    def deltas(self, plan: SteerPlan) -> Iterable[tuple[int, Prefix, Target | None]]:
        """Yield what must change for the routes to be as the plan has them."""
        for number, table in plan.routes.items():
            held = self.vpp.tables[number, self.ip6]
            real = {dst: DROP if target in self.down else target for dst, target in table.items()}
            yield from ((number, dst, target) for dst, target in real.items() if held.get(dst) != target)
            yield from ((number, dst, None) for dst in held if dst not in real)

    def route(self, number: int, dst: Prefix, target: Target | None) -> None:
        table = self.vpp.tables[number, self.ip6]
        if target is None:
            del table[dst]
        else:
            table[dst] = target
        self.look((number, dst, target))

    def look(self, done: object) -> None:
        """Hold every watched packet against what was wanted since all was well."""
        for packet, targets in zip(self.watched, self.may, strict=True):
            for index in self.interfaces:
                goes = self.vpp.decide(index, self.ip6, packet)
                assert goes in targets or (goes is DROP and targets != {CLEAR}), (packet, goes, targets, done)

    def converge(self) -> int:
        """Go on until nothing is left to do, and return the number of rounds."""
        self.sent = []
        for rounds in range(MOST_ROUNDS):
            if self.round():
                self.assert_as_wanted()
                self.watch(self.watched)
                return rounds
        raise AssertionError("it does not end")

    def assert_as_wanted(self) -> None:
        layers = self.want.layers
        for index in self.interfaces:
            asked = self.vpp.asked(index, self.ip6)
            assert [rules for rules, _ in asked] == [layer.rules for layer in layers]
            for (_, table), layer in zip(asked, layers, strict=True):
                assert table == {dst: DROP if it in self.down else it for dst, it in layer.routes.items()}
        assert len(self.vpp.policies) == len(self.vpp.acls) == len(self.vpp.tables) - 2 == len(layers)
        assert len(self.vpp.attached) == len(layers) * len(self.interfaces)


def kinds(requests: Sequence[Request]) -> list[str]:
    """Return the classes of requests, those that take something away with a minus."""
    return [f"{'' if getattr(it, 'is_add', True) else '-'}{type(it).__name__}" for it in requests]


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
    first, second = bench.held.layers[False]
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
    plan = next_requests(False, bench.want, {LAN}, bench.held, routes, refused)
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


def test_families_share_no_number() -> None:
    bench = Bench()
    bench.held.add(True, HeldLayer(NUMBERS[0], FIRST_PRIORITY))
    bench.wish(one(A, "10.1.0.0/16"))
    assert bench.plan().requests == [SetTable(NUMBERS[1], False, f"vpp-ipsecd {FIRST_PRIORITY}")]


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


@st.composite
def stories(draw: st.DrawFn) -> tuple[bool, list[FamilySteering], list[Packet], int]:
    """Return what is wanted one after the other: policies come, go and change a few at a time."""
    ip6 = draw(st.booleans())
    known = draw(st.lists(policies(ip6), min_size=2, max_size=7, unique_by=lambda it: it.selector))
    states = []
    for _ in range(draw(st.integers(1, 4))):
        held = draw(st.lists(st.sampled_from(known), max_size=6, unique_by=lambda it: it.selector))
        states.append(steer(wanted_of(held), (), ()).of(ip6))
        known = [*known, draw(policies(ip6))]
    return ip6, states, draw(st.lists(packets(ip6, known), min_size=4, max_size=10)), draw(st.integers(0, 1 << 16))


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
        if bench.chance.random() < 0.5:
            bench.refusals = 0
            bench.converge()
    bench.refusals = 0
    bench.converge()
    assert bench.vpp.empty


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
