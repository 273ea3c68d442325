"""A small VPP that fails the test which breaks its rules of steering, and what is wanted of it, planned round by round."""

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
    names: dict[tuple[int, bool], str] = field(default_factory=dict)
    made: int = 0

    def apply(self, request: Request) -> int:
        """Do what a request says and return what its answer carries."""
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
        """Return where a packet goes that an interface receives."""
        return decide(self.asked(sw_if_index, ip6), self.tables[0, ip6], packet)

    @property
    def empty(self) -> bool:
        """True when there is nothing of ours."""
        return not (self.acls or self.policies or self.attached or len(self.tables) > 2 or any(self.tables.values()))


class Delta(NamedTuple):
    """A change of a route; None takes it away."""

    table: int
    prefix: Prefix
    target: Target | None


class Bench:
    """The small VPP, the plan of one family, and an engine's part: the routes, which it gives VPP as it can."""

    def __init__(self, ip6: bool = False, interfaces: Iterable[int] = (LAN,)) -> None:
        self.ip6 = ip6
        self.vpp = SmallVpp()
        self.actual = ActualLayers()
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
        self.log: list[tuple[Request, int] | Delta] = []
        """All that VPP was told, in order: requests with what their answers carried, and changes of routes."""

    def desire(self, *wanted: PolicyRules) -> None:
        """Change what is wanted."""
        self.steer(compute_steering(wanted, (), ()).family(self.ip6))

    def steer(self, want: FamilySteering) -> None:
        """Change what is wanted, as steering has it."""
        self.want = want
        for packet, targets in zip(self.watched, self.may, strict=True):
            targets.add(decide_by(want, packet))

    def watch(self, sent: Sequence[Packet]) -> None:
        """Look at these packets after each request."""
        self.watched, self.may = sent, [{decide_by(self.want, packet)} for packet in sent]

    def restart(self) -> None:
        """Forget all, and learn what there is from VPP."""
        self.actual = adopt_layers(self.inventory(), self.interfaces)

    def inventory(self) -> Inventory:
        """Return what VPP holds, as it is read."""
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
        """Ask what to do now."""
        routes = {number: dict(table) for (number, ip6), table in self.vpp.tables.items() if ip6 == self.ip6}
        return layer_requests(StackKey(self.ip6), self.want, frozenset(self.interfaces), self.actual, routes)

    def round(self) -> bool:
        """Do what the plan says now, not all of which VPP accepts, and tell whether it was complete."""
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
        """Yield what must change for the routes to be as the plan has them."""
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


@st.composite
def stories(draw: st.DrawFn) -> tuple[bool, list[FamilySteering], list[Packet], int]:
    """Return what is wanted one after the other: policies come, go and change a few at a time."""
    ip6 = draw(st.booleans())
    known = draw(st.lists(policies(ip6), min_size=2, max_size=7, unique_by=lambda it: it.selector))
    states = []
    for _ in range(draw(st.integers(1, 4))):
        actual = draw(st.lists(st.sampled_from(known), max_size=6, unique_by=lambda it: it.selector))
        states.append(compute_steering(wanted_of(actual), (), ()).family(ip6))
        known = [*known, draw(policies(ip6))]
    return ip6, states, draw(st.lists(packets(ip6, known), min_size=4, max_size=10)), draw(st.integers(0, 1 << 16))
