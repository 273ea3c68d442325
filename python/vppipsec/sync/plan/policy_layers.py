"""From held to wanted steering, as requests: each packet is decided by the old policies or by the new ones, at any time. Pure.

`layer_requests` says what can be sent *now*; after the answers it is asked again, as in `vppipsec.sync.plan.tunnel`. It remembers
nothing: what VPP holds tells how far things are. Why this order:

1. What an interface asks is one list of rules, and the first match decides. While the list has all old rules in their order and
   the first of the new ones in theirs, each packet meets the first old rule that matches it or the first new one. So rules come
   in from the first layer to the last, until all are there; the old ones go from the last to the first.
2. A layer's table serves both meanwhile. A route that changes, and that another one of the table with another target overlaps,
   drops before the first rule changes, until the last one has: so no longer prefix catches what it shall not.
3. Where a rule would go from one layer to another one this would drop what does not change. Then new layers are made, filled, and
   attached before the old ones, which go afterwards.
4. Routes in table 0 come before the rules that they relieve, and go after those that relieve them.
5. A policy is attached when VPP has accepted it, and goes when it is attached nowhere; an ACL goes after its policy, a table
   after its routes. VPP dies, refuses, or keeps them otherwise.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from vppipsec.sync.desired.policy_layers import Action, FamilySteering, PolicyLayer, Target
from vppipsec.vpp.api.abf import AbfAttach, AbfPolicyAddDel
from vppipsec.vpp.api.acl import AclAddReplace, AclDel
from vppipsec.vpp.api.ip import TableAddDel
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.state.policy_layers import ActualLayer, ActualLayers, StackKey
from vppipsec.vpp.types import NO_INDEX, Prefix, Rule

FIRST_ATTACHMENT_PRIORITY = 1 << 30
"""Of attachments. It leaves room on both sides: VPP subtracts them from each other as if they had a sign."""

TableRoutes = Mapping[Prefix, Target]


@dataclass(frozen=True, slots=True)
class SteeringPlan:
    """What to send now, and which routes each table shall have now, by number.

    The routes come first; where a target is a tunnel that is not there, its route drops. `complete` tells that VPP holds what is
    wanted, but for routes that it has not been given yet.
    """

    requests: Sequence[Request]
    routes: Mapping[int, TableRoutes]
    complete: bool


def layer_requests(
    stack: StackKey,
    desired: FamilySteering,
    interfaces: Set[int],
    actual: ActualLayers,
    routes: Mapping[int, TableRoutes],
    refused: Set[tuple[int, Prefix]] = frozenset(),
    numbers: Iterator[int] | None = None,
) -> SteeringPlan:
    """Return what to send now so that a stack's packets are steered as wanted on all of `interfaces`.

    `routes` are ours that VPP holds, by the number of their table; in table 0 those that policies for hosts make, of the stack's
    family, where it is not a junction's. `refused` are routes, by table, that VPP does not take: layers are not kept waiting by
    them. `numbers` are free ones for what is made, shared by the stacks whose requests are sent together.
    """
    change = _StackChange(stack, desired, interfaces, actual, routes, refused, numbers or actual.free_numbers())
    now = change.routes_now()
    requests = [*change.detach_dangling(), *change.detach_unwanted(), *change.build(), *change.remove_surplus()]
    if change.is_built and change.routes_are_safe(now):
        requests += change.add_new_rules() or change.remove_old_rules()
    done = change.is_final and change.is_attached_everywhere and not change.surplus and not requests
    return SteeringPlan(
        requests, now, done and all(now.get(number) == table for number, table in change.wanted_tables())
    )


class _StackChange:
    """What is wanted of one family beside what is held. `pairs` are layers that shall be, `surplus` those that shall go."""

    def __init__(
        self,
        stack: StackKey,
        desired: FamilySteering,
        interfaces: Set[int],
        actual: ActualLayers,
        routes: Mapping[int, TableRoutes],
        refused: Set[tuple[int, Prefix]],
        numbers: Iterator[int],
    ) -> None:
        self.stack = stack
        self.ip6 = stack.ip6
        self.desired = desired
        self.routes = routes
        self.refused = refused
        self.numbers = numbers
        layers = self.layers = actual.stack(stack)
        self.interfaces = interfaces
        self.attachable = interfaces - {index for layer in layers for index in layer.dangling}
        """Interfaces to which a policy may be attached now."""
        fresh = _rules_change_layer(layers, desired.layers)
        self.pairs = [] if fresh else list(zip(layers, desired.layers, strict=False))
        self.surplus = layers[len(self.pairs) :]
        self.missing = len(desired.layers) - len(self.pairs)
        self.first_missing = FIRST_ATTACHMENT_PRIORITY
        if layers:
            self.first_missing = layers[0].priority - self.missing if fresh else layers[-1].priority + 1

    @property
    def is_built(self) -> bool:
        """True when there is all that is to be attached."""
        return not self.missing and all(
            layer.has_policy and (layer.attached or layer.rules == wanted.rules) for layer, wanted in self.pairs
        )

    @property
    def is_replacing(self) -> bool:
        """True while there are layers to be relieved."""
        return any(layer.attached for layer in self.surplus)

    @property
    def is_final(self) -> bool:
        """True when no rule decides that is not wanted, and none is missing."""
        return (
            self.is_built and not self.is_replacing and all(layer.rules == wanted.rules for layer, wanted in self.pairs)
        )

    @property
    def is_attached_everywhere(self) -> bool:
        """True when all interfaces ask all layers that are wanted."""
        return not self.missing and all(layer.attached >= self.interfaces for layer, _ in self.pairs)

    def wanted_tables(self) -> Iterator[tuple[int, TableRoutes]]:
        """Yield the tables that shall be, with what they shall have."""
        if not self.stack.if_id:
            yield 0, self.desired.routes
        for layer, wanted in self.pairs:
            yield layer.number, wanted.routes

    # What can be done at any time

    def detach_dangling(self) -> Iterator[Request]:
        """Take away what is attached to interfaces that are gone."""
        for layer in self.layers:
            for index in sorted(layer.dangling):
                yield self._attach(layer, index, False)

    def detach_unwanted(self) -> Iterator[Request]:
        """Detach from interfaces that are not to be steered any more, the last layer first."""
        left: set[int] = set()
        for layer in reversed(self.layers):
            for index in sorted(layer.attached - self.interfaces - left):
                left.add(index)
                yield self._attach(layer, index, False)

    def build(self) -> Iterator[Request]:
        """Make what is missing; nothing asks it yet."""
        for priority, number in zip(range(self.missing), self.numbers, strict=False):
            yield TableAddDel(
                number, self.ip6, ActualLayer(number, self.stack, self.first_missing + priority).table_name
            )
        for layer, wanted in self.pairs:
            if layer.acl_index is None:
                yield AclAddReplace(NO_INDEX, layer.acl_tag, wanted.rules)
            elif not layer.attached and layer.rules != wanted.rules:
                yield AclAddReplace(layer.acl_index, layer.acl_tag, wanted.rules)
            elif not layer.has_policy:
                yield AbfPolicyAddDel(layer.number, layer.acl_index, layer.number, self.ip6)

    def remove_surplus(self) -> Iterator[Request]:
        """Remove what nothing asks any more."""
        for layer in self.surplus:
            if layer.attached or layer.dangling:
                continue
            if layer.acl_index is not None:
                if layer.has_policy:
                    yield AbfPolicyAddDel(layer.number, layer.acl_index, layer.number, self.ip6, False)
                else:
                    yield AclDel(layer.acl_index)
            elif not self.routes.get(layer.number):
                yield TableAddDel(layer.number, self.ip6, layer.table_name, False)

    # What has its order

    def add_new_rules(self) -> list[Request]:
        """Bring new rules in: in the first layer that lacks some."""
        differing = sum(layer.rules != wanted.rules for layer, wanted in self.pairs)
        at_once = differing == 1 and self.is_attached_everywhere and not self.is_replacing
        for layer, wanted in self.pairs:
            if layer.acl_index is not None and not _is_subsequence(wanted.rules, layer.rules):
                rules = wanted.rules if at_once else _merged(layer.rules, wanted.rules)
                return [AclAddReplace(layer.acl_index, layer.acl_tag, rules)]
            missing = self.attachable - layer.attached
            if missing:
                return [self._attach(layer, index) for index in sorted(missing)]
        return []

    def remove_old_rules(self) -> list[Request]:
        """Take old rules out: in the last layer that has some."""
        for layer in reversed(self.surplus):
            if layer.attached:
                return [self._attach(layer, index, False) for index in sorted(layer.attached & self.interfaces)]
        for layer, wanted in reversed(self.pairs):
            if layer.acl_index is not None and layer.rules != wanted.rules:
                return [AclAddReplace(layer.acl_index, layer.acl_tag, wanted.rules)]
        return []

    def _attach(self, layer: ActualLayer, sw_if_index: int, is_add: bool = True) -> Request:
        return AbfAttach(layer.number, sw_if_index, layer.priority, self.ip6, is_add)

    # Routes

    def routes_now(self) -> dict[int, TableRoutes]:
        """Return what each table shall have now."""
        now: dict[int, TableRoutes] = {} if self.stack.if_id else {0: self._main_routes()}
        for layer, wanted in self.pairs:
            settled = self.is_final or not layer.attached
            now[layer.number] = _transitional_routes(self.routes.get(layer.number, {}), wanted.routes, settled)
        for layer in self.surplus:
            now[layer.number] = self.routes.get(layer.number, {}) if layer.has_policy else {}
        return now

    def _main_routes(self) -> TableRoutes:
        """Return table 0's: those that go stay until the rules that relieve them are in all places."""
        actual, desired = self.routes.get(0, {}), self.desired.routes
        if self.is_final and self.is_attached_everywhere:
            return desired
        now = {**actual, **desired}
        for prefix in now:
            if prefix in desired:
                drops = actual.get(prefix) != desired[prefix] and any(
                    _has_route(it.routes, prefix) for it in self.desired.layers
                )
            else:
                drops = self._is_steered(prefix)
            if drops:
                now[prefix] = (
                    Action.DISCARD
                )  # a packet that a layer takes, or took, would go along it while that is not there
        return now

    def routes_are_safe(self, now: Mapping[int, TableRoutes]) -> bool:
        """Tell whether the routes are there that must be before rules change."""
        actual = self.routes.get(0, {})
        for prefix, target in now.get(0, {}).items():
            if self._is_steered(prefix) if prefix not in actual else target is Action.DISCARD is not actual[prefix]:
                return False
        for layer, wanted in self.pairs:
            table = self.routes.get(layer.number, {})
            for prefix, target in now[layer.number].items():
                there = table.get(prefix)
                if (
                    target is Action.DISCARD
                    and there is not Action.DISCARD
                    and (there is not None or _leads_to_tunnel(table, prefix))
                ):
                    return False
            if self.is_replacing and any(
                prefix not in table and (layer.number, prefix) not in self.refused for prefix in wanted.routes
            ):
                return False  # what goes into a tunnel now would be dropped for a while
        return True

    def _is_steered(self, prefix: Prefix) -> bool:
        """Tell whether rules in VPP may take packets to a destination."""
        layers = [layer for layer in self.layers if layer.attached]
        return any(_has_route(self.routes.get(layer.number, {}), prefix) for layer in layers)


def _rules_change_layer(layers: Sequence[ActualLayer], wanted: Sequence[PolicyLayer]) -> bool:
    """Tell whether a rule that an interface asks is wanted in another layer than the one that stands in its place.

    Layers that nothing asks yet are no hindrance, where they come first: they were made for this.
    """
    if [layer.rules for layer in layers] == [layer.rules for layer in wanted]:
        return False
    placements: dict[Rule, list[int]] = {}
    for number, layer in enumerate(layers):
        if layer.attached:
            for rule in layer.rules:
                if rule.permit:
                    placements.setdefault(rule, []).append(number)
    for number, wanted_layer in enumerate(wanted):
        made = number < len(layers) and not layers[number].attached
        for rule in wanted_layer.rules:
            found = placements.get(rule)
            if found is not None and number not in found and not (made and found[0] > number):
                return True
    return False


def _is_subsequence(rules: Sequence[Rule], whole: Sequence[Rule]) -> bool:
    """Tell whether all rules are in the whole, in their order."""
    if rules == whole:
        return True
    rest = iter(whole)
    return all(rule in rest for rule in rules)


def _merged(old: Sequence[Rule], new: Sequence[Rule]) -> tuple[Rule, ...]:
    """Return rules that have both the old and the new ones in their order, few of them twice."""
    placements = {rule: number for number, rule in enumerate(old)}
    common = _longest_rising([(placements[rule], number) for number, rule in enumerate(new) if rule in placements])
    merged: list[Rule] = []
    old_next = new_next = 0
    for old_place, new_place in [*common, (len(old), len(new))]:
        merged += new[new_next:new_place]
        merged += old[old_next : old_place + 1]
        old_next, new_next = old_place + 1, new_place + 1
    return tuple(merged)


def _longest_rising(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the longest choice of pairs whose first numbers rise; the second ones do already."""
    ends: list[int] = []
    chains: list[int] = []
    before: list[int] = []
    for number, (first, _) in enumerate(pairs):
        length = bisect_left(ends, first)
        before.append(chains[length - 1] if length else -1)
        ends[length : length + 1] = [first]
        chains[length : length + 1] = [number]
    chosen = []
    number = chains[-1] if chains else -1
    while number >= 0:
        chosen.append(pairs[number])
        number = before[number]
    return chosen[::-1]


def _transitional_routes(actual: TableRoutes, desired: TableRoutes, settled: bool) -> TableRoutes:
    """Return what a table shall have now. `settled` tells that the rules which lead there are those that are wanted.

    Before that, and while one is missing, a route drops that is another one than it shall be and that could catch, or let go to
    another one, what is not its own.
    """
    if actual == desired:
        return desired
    overlaps = _Overlaps(actual, desired)
    if settled and not any(
        prefix not in actual and overlaps.is_caught(prefix, target) for prefix, target in desired.items()
    ):
        return desired
    now: dict[Prefix, Target] = {}
    for prefix, target in desired.items():
        there = actual.get(prefix)
        as_wanted = there == target or ((there is None or settled) and not overlaps.has_other_target(prefix, target))
        now[prefix] = target if as_wanted else Action.DISCARD
    if not settled:
        for prefix, target in actual.items():
            if prefix not in desired:
                now[prefix] = Action.DISCARD if overlaps.has_other_target(prefix, target) else target
    return now


class _Overlaps:
    """Finds routes of the same table that share destinations with one of them and lead elsewhere, before or after a change."""

    def __init__(self, actual: TableRoutes, desired: TableRoutes) -> None:
        self._tables = (actual, desired)
        self._prefixes = sorted(actual.keys() | desired.keys())
        self._lengths = {prefix.length for prefix in self._prefixes}

    def has_other_target(self, prefix: Prefix, target: Target) -> bool:
        """Tell whether there is another prefix above or below this one whose target is another one."""
        if len(self._lengths) == 1:
            return False
        return any(
            table[other] != target
            for other in (*_covering(prefix, self._lengths), *self._within(prefix))
            for table in self._tables
            if other != prefix and other in table
        )

    def is_caught(self, prefix: Prefix, target: Target) -> bool:
        """Tell whether a wider route with another target takes what is this one's while it is missing."""
        return any(
            table[other] != target
            for other in _covering(prefix, self._lengths)
            for table in self._tables
            if other != prefix and other in table
        )

    def _within(self, prefix: Prefix) -> Sequence[Prefix]:
        bits = 8 * len(prefix.address)
        last = int.from_bytes(prefix.address, "big") | (1 << (bits - prefix.length)) - 1
        first = bisect_right(self._prefixes, prefix)
        end = bisect_right(self._prefixes, Prefix(last.to_bytes(bits // 8, "big"), bits))
        return [other for other in self._prefixes[first:end] if other.length > prefix.length]


def _covering(prefix: Prefix, lengths: Iterable[int]) -> Iterator[Prefix]:
    """Yield the prefixes of some lengths that contain this one or are the same."""
    return (prefix.shortened(length) for length in lengths if length <= prefix.length)


def _has_route(routes: TableRoutes, prefix: Prefix) -> bool:
    """Tell whether a table has a route for a destination."""
    return any(other in routes for other in _covering(prefix, range(prefix.length + 1)))


def _leads_to_tunnel(routes: TableRoutes, prefix: Prefix) -> bool:
    """Tell whether a table leads a destination into a tunnel."""
    for other in _covering(prefix, range(prefix.length, -1, -1)):
        if other in routes:
            return routes[other] is not Action.DISCARD
    return False
