"""Turns actual and desired steering into requests. At any time, the old or the new policies decide on each packet.
Pure.

`layer_requests` returns what can be sent *now*. It is asked again after the replies, as in `vppipsec.sync.plan.tunnel`.
It keeps no state: the actual state shows the progress. The order, with reasons:

1. An interface asks one list of rules, and the first match decides. While rules change, the list has all old rules in
   their order and the first of the new rules in theirs. So each packet meets the first old or the first new rule that
   matches it. For this, rules are added from the first layer to the last. Then old rules are removed from the last
   layer to the first.
2. A layer's table serves both sets of rules meanwhile. A route that changes drops from before the first rule changes
   until the last one has, if a route with another target overlaps it. So no longer prefix catches the wrong packets.
3. If a rule would move to another layer, this would drop packets whose policy does not change. Then new layers are
   created, filled, and attached before the old ones, which are removed afterwards.
4. Routes in table 0 are added before the rules that they replace are removed, and removed after the rules that replace
   them are added.
5. An ABF policy is attached after VPP has accepted it, and deleted when no interface has it. An ACL is deleted after
   its ABF policy, a table after its routes. Otherwise VPP crashes, refuses, or keeps them.
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
"""Priority of the first attachment. It leaves room on both sides: VPP subtracts priorities as signed numbers."""

TableRoutes = Mapping[Prefix, Target]


@dataclass(frozen=True, slots=True)
class SteeringPlan:
    """The requests to send now, and the routes that each table should have now, by table number.

    The routes are sent first. A route drops while its target tunnel does not exist. `complete` means that VPP holds the
    desired steering, except for routes that it does not have yet.
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
    """Return what to send now so that all `interfaces` steer a stack's packets as desired.

    `routes` are the service's routes in VPP, by table number. For table 0 they are those of host policies, of the
    stack's family, unless the stack is a classifier's. `refused` are routes, by table, that VPP refuses: layers do not
    wait for them. `numbers` are free numbers for new objects; stacks whose requests are sent together share them.
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
    """The desired and actual layers of one stack, matched. `pairs` are layers that stay, `surplus` those to remove."""

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
        """True when everything that is to be attached exists."""
        return not self.missing and all(
            layer.has_policy and (layer.attached or layer.rules == wanted.rules) for layer, wanted in self.pairs
        )

    @property
    def is_replacing(self) -> bool:
        """True while some old layer still has to be detached."""
        return any(layer.attached for layer in self.surplus)

    @property
    def is_final(self) -> bool:
        """True when exactly the desired rules decide."""
        return (
            self.is_built and not self.is_replacing and all(layer.rules == wanted.rules for layer, wanted in self.pairs)
        )

    @property
    def is_attached_everywhere(self) -> bool:
        """True when all interfaces ask all desired layers."""
        return not self.missing and all(layer.attached >= self.interfaces for layer, _ in self.pairs)

    def wanted_tables(self) -> Iterator[tuple[int, TableRoutes]]:
        """Yield the desired tables with their routes."""
        if not self.stack.if_id:
            yield 0, self.desired.routes
        for layer, wanted in self.pairs:
            yield layer.number, wanted.routes

    # Requests that need no order

    def detach_dangling(self) -> Iterator[Request]:
        """Remove attachments to interfaces that are gone."""
        for layer in self.layers:
            for index in sorted(layer.dangling):
                yield self._attach(layer, index, False)

    def detach_unwanted(self) -> Iterator[Request]:
        """Detach from interfaces that need no steering any more, the last layer first."""
        left: set[int] = set()
        for layer in reversed(self.layers):
            for index in sorted(layer.attached - self.interfaces - left):
                left.add(index)
                yield self._attach(layer, index, False)

    def build(self) -> Iterator[Request]:
        """Create what is missing; no interface asks it yet."""
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
        """Remove what no interface asks any more."""
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

    # Requests that need an order

    def add_new_rules(self) -> list[Request]:
        """Return the requests that add new rules to the first layer that lacks some."""
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
        """Return the requests that remove old rules from the last layer that has some."""
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
        """Return the routes that each table should have now."""
        now: dict[int, TableRoutes] = {} if self.stack.if_id else {0: self._main_routes()}
        for layer, wanted in self.pairs:
            settled = self.is_final or not layer.attached
            now[layer.number] = _transitional_routes(self.routes.get(layer.number, {}), wanted.routes, settled)
        for layer in self.surplus:
            now[layer.number] = self.routes.get(layer.number, {}) if layer.has_policy else {}
        return now

    def _main_routes(self) -> TableRoutes:
        """Return the routes of table 0. Old routes stay until the rules that replace them are attached everywhere."""
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
                # a packet that a layer matches, or matched, would follow it while the layer's route is missing
                now[prefix] = Action.DISCARD
        return now

    def routes_are_safe(self, now: Mapping[int, TableRoutes]) -> bool:
        """Return whether VPP has the routes that must exist before rules change."""
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
                return False  # packets that a tunnel carries now would be dropped for a while
        return True

    def _is_steered(self, prefix: Prefix) -> bool:
        """Return whether rules in VPP may match packets to a destination."""
        layers = [layer for layer in self.layers if layer.attached]
        return any(_has_route(self.routes.get(layer.number, {}), prefix) for layer in layers)


def _rules_change_layer(layers: Sequence[ActualLayer], wanted: Sequence[PolicyLayer]) -> bool:
    """Return whether a rule that an interface asks is desired in another layer than the one at its position.

    Layers that no interface asks yet do not count if they come first: they were created for this change.
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
    """Return whether `whole` contains all rules in their order."""
    if rules == whole:
        return True
    rest = iter(whole)
    return all(rule in rest for rule in rules)


def _merged(old: Sequence[Rule], new: Sequence[Rule]) -> tuple[Rule, ...]:
    """Return rules that contain both the old and the new rules in their order, with few duplicates."""
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
    """Return the longest subsequence of pairs whose first numbers rise. Their second numbers rise already."""
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
    """Return the routes that a table should have now. `settled` means that only the desired rules refer to the table.

    Until then, and while a route is missing, a route that differs from the desired one drops in two cases: it could
    catch another route's packets, or another route could catch its packets.
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
    """Finds routes of one table that overlap a route and have another target, before or after a change."""

    def __init__(self, actual: TableRoutes, desired: TableRoutes) -> None:
        self._tables = (actual, desired)
        self._prefixes = sorted(actual.keys() | desired.keys())
        self._lengths = {prefix.length for prefix in self._prefixes}

    def has_other_target(self, prefix: Prefix, target: Target) -> bool:
        """Return whether another prefix above or below this one has another target."""
        if len(self._lengths) == 1:
            return False
        return any(
            table[other] != target
            for other in (*_covering(prefix, self._lengths), *self._within(prefix))
            for table in self._tables
            if other != prefix and other in table
        )

    def is_caught(self, prefix: Prefix, target: Target) -> bool:
        """Return whether a wider route with another target would catch this route's packets while it is missing."""
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
    """Yield the prefixes of these lengths that contain this one or are the same."""
    return (prefix.shortened(length) for length in lengths if length <= prefix.length)


def _has_route(routes: TableRoutes, prefix: Prefix) -> bool:
    """Return whether a table has a route for a destination."""
    return any(other in routes for other in _covering(prefix, range(prefix.length + 1)))


def _leads_to_tunnel(routes: TableRoutes, prefix: Prefix) -> bool:
    """Return whether a table sends a destination into a tunnel."""
    for other in _covering(prefix, range(prefix.length, -1, -1)):
        if other in routes:
            return routes[other] is not Action.DISCARD
    return False
