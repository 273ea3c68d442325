"""A small VPP with the rules of steering, and a bench that plans towards the desired state round by round.

The VPP fails the test that breaks its rules.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hypothesis import strategies as st

from support.packet_path import decide, decide_by
from support.policy_sets import CLEAR, DROP, packets, policies, wanted_of
from support.spd import Packet
from vppipsec.sync.desired.policy_layers import FamilySteering, PolicyRules, Target, compute_steering
from vppipsec.sync.plan.policy_layers import SteeringPlan, layer_requests
from vppipsec.vpp.api.abf import AbfAttach, AbfPolicyAddDel
from vppipsec.vpp.api.acl import AclAddReplace, AclDel
from vppipsec.vpp.api.ip import TableAddDel
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.inventory import FoundAbf, FoundAcl, FoundTable, Inventory
from vppipsec.vpp.ownership import TABLE_NUMBERS
from vppipsec.vpp.state.policy_layers import ActualLayers, StackKey, adopt_layers
from vppipsec.vpp.types import NO_INDEX, Prefix, Rule

LAN, DMZ = 11, 12
MOST_ROUNDS = 60
"""More than any change of up to eight layers needs: two for each, and some for creation and removal."""


@dataclass
class SmallVpp:
    """VPP's tables, ACLs, policies and attachments.

    It fails the test at a request that VPP would refuse or crash on.
    """

    tables: dict[tuple[int, bool], dict[Prefix, Target]] = field(
        default_factory=lambda: {(0, False): {}, (0, True): {}}
    )
    acls: dict[int, tuple[str, tuple[Rule, ...]]] = field(default_factory=dict)
    policies: dict[int, tuple[int, tuple[int, bool]]] = field(default_factory=dict)
    attached: dict[tuple[int, int], tuple[int, bool]] = field(default_factory=dict)
    names: dict[tuple[int, bool], str] = field(default_factory=dict)
    made: int = 0

    def apply(self, request: Request) -> int:
        """Apply a request, and return the value in its reply."""
        match request:
            case TableAddDel(number, ip6, name, is_add):
                table = (number, ip6)
                assert number in TABLE_NUMBERS
                if is_add:
                    assert table not in self.tables
                    assert name.startswith("vpp-ipsecd ")
                    self.tables[table] = {}
                    self.names[table] = name
                else:
                    assert not self.tables.pop(table), "its routes would be in the next table"
                    assert table not in [it[1] for it in self.policies.values()], "a path holds it"
            case AclAddReplace(index, tag, rules):
                assert rules
                if index == NO_INDEX:
                    self.made += 1
                    index = self.made
                else:
                    assert index in self.acls
                self.acls[index] = (tag, rules)
                return index
            case AclDel(index):
                assert index not in [acl for acl, _ in self.policies.values()], "-149"
                del self.acls[index]
            case AbfPolicyAddDel(number, acl, table, ip6, True):
                assert number not in self.policies, "a path that it has: SIGSEGV"
                assert acl in self.acls
                assert (table, ip6) in self.tables
                self.policies[number] = (acl, (table, ip6))
            case AbfPolicyAddDel(number, acl, table, ip6, False):
                assert number not in [policy for policy, _ in self.attached], "it is attached: SIGSEGV at the next dump"
                assert self.policies.pop(number) == (acl, (table, ip6))
            case AbfAttach(number, index, priority, ip6, True):
                assert number in self.policies, "SIGSEGV"
                assert (number, index) not in self.attached
                assert self.policies[number][1][1] == ip6
                self.attached[number, index] = (priority, ip6)
            case AbfAttach(number, index, _, ip6, False):
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
        """Return the target of a packet that an interface receives."""
        return decide(self.asked(sw_if_index, ip6), self.tables[0, ip6], packet)

    @property
    def empty(self) -> bool:
        """True when VPP holds nothing of the service."""
        return not (self.acls or self.policies or self.attached or len(self.tables) > 2 or any(self.tables.values()))


class Delta(NamedTuple):
    """A change of a route; None removes it."""

    table: int
    prefix: Prefix
    target: Target | None


class Bench:
    """The small VPP, the plan of one family, and a part of the engine that gives VPP the routes."""

    def __init__(self, ip6: bool = False, interfaces: Iterable[int] = (LAN,)) -> None:
        self.ip6 = ip6
        self.vpp = SmallVpp()
        self.actual = ActualLayers()
        self.want = FamilySteering()
        self.interfaces = set(interfaces)
        self.down: set[Target] = set()
        """Tunnels that do not exist; routes into them drop."""
        self.watched: Sequence[Packet] = ()
        self.may: list[set[Target]] = []
        """For each watched packet, the targets that it may have: those of all policies since VPP last was as desired.
        """
        self.chance = random.Random(1)
        self.haste = 1.0
        """Number of routes that are sent before the requests of a round."""
        self.refusals = 0.0
        self.sent: list[Request] = []
        self.log: list[tuple[Request, int] | Delta] = []
        """Everything sent to VPP, in order: requests with the values in their replies, and changes of routes."""

    def desire(self, *wanted: PolicyRules) -> None:
        """Change the desired state."""
        self.steer(compute_steering(wanted, (), ()).family(self.ip6))

    def steer(self, want: FamilySteering) -> None:
        """Change the desired state to that of a steering."""
        self.want = want
        for packet, targets in zip(self.watched, self.may, strict=True):
            targets.add(decide_by(want, packet))

    def watch(self, sent: Sequence[Packet]) -> None:
        """Check these packets after each request."""
        self.watched, self.may = sent, [{decide_by(self.want, packet)} for packet in sent]

    def restart(self) -> None:
        """Forget everything, and read VPP's state."""
        self.actual = adopt_layers(self.inventory(), self.interfaces)

    def inventory(self) -> Inventory:
        """Return VPP's state in the form of an inventory."""
        attached: dict[int, dict[int, int]] = {number: {} for number in self.vpp.policies}
        for (number, index), (priority, _) in self.vpp.attached.items():
            attached[number][index] = priority
        return Inventory(
            (),
            (),
            tuple(FoundAcl(number, tag, rules) for number, (tag, rules) in self.vpp.acls.items()),
            {},
            0,
            frozenset(),
            frozenset(),
            tuple(FoundTable(*table, name) for table, name in self.vpp.names.items() if table in self.vpp.tables),
            tuple(
                FoundAbf(number, acl, table[0], table[1], attached[number])
                for number, (acl, table) in self.vpp.policies.items()
            ),
        )

    def plan(self) -> SteeringPlan:
        """Return the present plan."""
        routes = {number: dict(table) for (number, ip6), table in self.vpp.tables.items() if ip6 == self.ip6}
        return layer_requests(StackKey(self.ip6), self.want, frozenset(self.interfaces), self.actual, routes)

    def round(self) -> bool:
        """Send the present plan, of which VPP may refuse a part, and return whether it was complete."""
        plan = self.plan()
        before = self.chance.sample(deltas := list(self.deltas(plan)), round(self.haste * len(deltas)))
        for delta in before:
            self.route(*delta)
        for request in plan.requests:
            if self.chance.random() >= self.refusals:
                extra = self.vpp.apply(request)
                self.sent.append(request)
                self.log.append((request, extra))
                self.actual.apply_accepted(request, extra)
                self.look(request)
        for delta in deltas:
            if delta not in before and delta[0] in self.tables:
                self.route(*delta)
        return plan.complete and not deltas

    @property
    def tables(self) -> set[int]:
        return {number for number, ip6 in self.vpp.tables if ip6 == self.ip6}

    def deltas(self, plan: SteeringPlan) -> Iterable[Delta]:
        """Yield the changes that make the routes equal to the plan's."""
        for number, table in plan.routes.items():
            actual = self.vpp.tables[number, self.ip6]
            real = {dst: DROP if target in self.down else target for dst, target in table.items()}
            yield from (Delta(number, dst, target) for dst, target in real.items() if actual.get(dst) != target)
            yield from (Delta(number, dst, None) for dst in actual if dst not in real)

    def route(self, number: int, dst: Prefix, target: Target | None) -> None:
        table = self.vpp.tables[number, self.ip6]
        if target is None:
            del table[dst]
        else:
            table[dst] = target
        self.log.append(Delta(number, dst, target))
        self.look(self.log[-1])

    def look(self, done: object) -> None:
        """Check that every watched packet has one of its permitted targets."""
        for packet, targets in zip(self.watched, self.may, strict=True):
            for index in self.interfaces:
                goes = self.vpp.decide(index, self.ip6, packet)
                assert goes in targets or (goes is DROP and targets != {CLEAR}), (packet, goes, targets, done)

    def converge(self) -> int:
        """Send plans until nothing is left, and return the number of rounds."""
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
    """Return the classes of requests; those that remove something have a minus."""
    return [f"{'' if getattr(it, 'is_add', True) else '-'}{type(it).__name__}" for it in requests]


@st.composite
def stories(draw: st.DrawFn) -> tuple[bool, list[FamilySteering], list[Packet], int]:
    """Return successive desired states: policies are added, removed and changed a few at a time."""
    ip6 = draw(st.booleans())
    known = draw(st.lists(policies(ip6), min_size=2, max_size=7, unique_by=lambda it: it.selector))
    states = []
    for _ in range(draw(st.integers(1, 4))):
        actual = draw(st.lists(st.sampled_from(known), max_size=6, unique_by=lambda it: it.selector))
        states.append(compute_steering(wanted_of(actual), (), ()).family(ip6))
        known = [*known, draw(policies(ip6))]
    return ip6, states, draw(st.lists(packets(ip6, known), min_size=4, max_size=10)), draw(st.integers(0, 1 << 16))
