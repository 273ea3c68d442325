"""Turns the ordered outbound policies into VPP's policy layers, so that each packet meets the same policy. Pure: no
state.

VPP has routes, which match destinations only, and ABF. On an interface, the ACLs of all ABF policies form one list. The
first rule that matches selects the table in which VPP looks up the packet's destination. So policies become *layers*,
each an ACL and a table:

1. Rules keep the kernel's order. A rule is never in an earlier layer than a preceding rule that matches some of the
   same packets.
2. Two rules with different targets share a layer if no destination is in both. They also do if the earlier rule has the
   narrower (or the same) destination, and matches all packets to it that the later rule would match. Otherwise the
   longer prefix would catch packets of the wider rule, so the later rule goes into another layer.
3. A BYPASS policy is a deny rule: its packets are forwarded normally. So are packets to the router itself, before all
   rules.
4. A rule that can never be the first to match is omitted. So is a BYPASS policy that no later rule overlaps.
5. VPP lets a fragment without ports match any port that a rule names; the kernel lets it match port 0. So special rules
   precede a BYPASS policy for other ports. They match such fragments only, and do what later policies say about them.

A policy for one host, with any source and protocol, needs no rule: it is a route in table 0, which follows all layers.
Only hosts qualify. For a wider prefix, another owner's longer route, such as the kernel's, would send packets out
unencrypted.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from vppipsec.kernel.xfrm.sad_spd import TunnelKey
from vppipsec.sync.desired.selectors import ICMP, ICMP6
from vppipsec.vpp.types import ANY_PORT, Prefix, Rule, everything

MAX_LAYERS = 64
"""Layers of a family. The last one only drops; it holds every rule that fits into no other layer.

Policies for one destination and different sources need one layer each: a site with many local networks has them. A
layer costs a table and an attachment to each interface. It costs a packet nothing: one lookup covers all rules.
"""

NEVER_FORWARDED = (Prefix(b"\xff\xff\xff\xff", 32), Prefix(b"\xfe\x80" + bytes(14), 10))
"""Destinations that no router forwards (RFC 919, RFC 4291). Multicast is not listed: ABF sees unicast only."""


class Action(Enum):
    """Targets other than tunnels."""

    DISCARD = "drop"
    BYPASS = "clear"
    LOCAL = "router"
    """The router itself. No policy has this target."""


class KernelTap(NamedTuple):
    """A target other than a tunnel: the kernel's stack, over a linux-cp tap."""

    sw_if_index: int


class VtiClassifier(NamedTuple):
    """The target of a route over a VTI whose children need more than the destination to select one. No policy has it."""

    if_id: int


class LinkNextHop(NamedTuple):
    """A kernel link that has a share of a route over a VTI, and the next hop there, if any. No policy has this target."""

    ifindex: int
    gateway: bytes | None


Target = TunnelKey | Action | KernelTap
"""Where packets go: into a tunnel, nowhere, their normal path, or to the kernel."""


class PlacementKind(Enum):
    """How VPP implements a policy."""

    ROUTE = "route"
    """A route in table 0."""
    LAYER = "layer"
    """Rules of ACLs."""
    SHADOWED = "shadowed"
    """Not at all: earlier policies match all its packets, or its packets are for the router itself."""
    UNNEEDED = "needless"
    """Not at all: VPP forwards the packets that it bypasses normally anyhow."""


class PolicyRules(NamedTuple):
    """An outbound policy as VPP has it: permit rules of one family that match its packets, and their target."""

    rules: tuple[Rule, ...]
    target: Target


@dataclass(frozen=True, slots=True)
class Placement:
    """How and where a policy is implemented. `layers` count from 0.

    `discarded`: no layer was left that could hold the policy, so its packets are dropped.
    """

    kind: PlacementKind
    layers: tuple[int, ...] = ()
    discarded: bool = False


@dataclass(frozen=True, slots=True)
class PolicyLayer:
    """An ACL, and the routes of the table that looks up the destinations of permitted packets."""

    rules: tuple[Rule, ...]
    routes: Mapping[Prefix, Target]


@dataclass(frozen=True, slots=True)
class FamilySteering:
    """What one family needs: routes in table 0, and layers in the order in which VPP asks them."""

    routes: Mapping[Prefix, Target] = field(default_factory=dict)
    layers: tuple[PolicyLayer, ...] = ()


@dataclass(frozen=True, slots=True)
class Steering:
    """What both families need, and the placement of each policy, in the order of the policies."""

    ip4: FamilySteering
    ip6: FamilySteering
    placements: tuple[Placement, ...]

    def family(self, ip6: bool) -> FamilySteering:
        """Return the steering of one family."""
        return self.ip6 if ip6 else self.ip4


NO_STEERING = Steering(FamilySteering(), FamilySteering(), ())
"""The steering where there is no policy."""


def compute_steering(
    wanted: Sequence[PolicyRules],
    local: Iterable[bytes],
    peers: Iterable[bytes],
    first: Iterable[tuple[Rule, Target]] = (),
) -> Steering:
    """Return routes and layers that make VPP follow the outbound policies. The first policy that matches a packet
    decides.

    `local` are the addresses of VPP's own interfaces; packets to them are not forwarded. `peers` are remote tunnel
    ends. They get no route into a tunnel, as it would send a tunnel's own packets into a tunnel.

    `first` are rules, with targets, for packets to the router itself, each for one of its addresses. They precede all
    other rules. Those that drop have a layer of their own before the others.
    """
    local, peers = frozenset(local), frozenset(peers)
    entries: dict[bool, list[_RuleEntry]] = {False: [], True: []}
    for number, (rules, target) in enumerate(wanted):
        for rule in rules:
            of_family = entries[_is_ip6(rule)]
            if target is Action.BYPASS and not _matches_fragments(rule):
                of_family += _fragment_entries(rule, number, wanted)
            of_family.append(_RuleEntry(number, rule, target, len(rules) == 1))
    placements: list[Placement | None] = [None] * len(wanted)
    firsts: dict[bool, dict[Rule, Target]] = {False: {}, True: {}}
    for rule, target in first:
        firsts[_is_ip6(rule)][rule] = target
    ip4, ip6 = (_compute_family(entries[ip6], ip6, local, peers, placements, firsts[ip6]) for ip6 in (False, True))
    return Steering(ip4, ip6, tuple(place or Placement(PlacementKind.SHADOWED) for place in placements))


def compute_vti_steering(wanted: Sequence[PolicyRules]) -> Steering:
    """Return layers for packets that a route has already sent over a VTI. Packets that no policy matches need no rule.

    It uses layers only, no routes in table 0.
    """
    placements: list[Placement | None] = [None] * len(wanted)
    stacks = []
    for ip6 in (False, True):
        rules = [(number, it, rule) for number, it in enumerate(wanted) for rule in it.rules if _is_ip6(rule) == ip6]
        entries = [_RuleEntry(number, rule, it.target, False) for number, it, rule in rules]
        stack = _StackBuilder(128 if ip6 else 32)
        for entry in _without_shadowed(entries, ()) if entries else ():
            stack.add_rule(entry)
        stack.note_placements(placements, 0)
        stacks.append(FamilySteering(layers=stack.layers({}, ())))
    ip4, ip6_too = stacks
    return Steering(ip4, ip6_too, tuple(place or Placement(PlacementKind.SHADOWED) for place in placements))


def _is_ip6(rule: Rule) -> bool:
    return len(rule.dst.address) == 16


class _RuleEntry:
    """A rule of a policy, with addresses as numbers. `order` is its position among all rules of its family.

    `is_for_fragments`: the rule matches fragments without ports, which also match any port that another rule names.
    """

    __slots__ = (
        "bits",
        "is_for_fragments",
        "is_only_rule",
        "length",
        "net",
        "number",
        "order",
        "rule",
        "src",
        "src_length",
        "target",
    )

    def __init__(
        self, number: int, rule: Rule, target: Target, is_only_rule: bool, is_for_fragments: bool = False
    ) -> None:
        self.is_for_fragments = is_for_fragments
        self.number = number
        self.order = -1
        self.rule = rule
        self.target = target
        self.is_only_rule = is_only_rule
        self.bits = 8 * len(rule.dst.address)
        self.net, self.length = int.from_bytes(rule.dst.address, "big"), rule.dst.length
        self.src, self.src_length = int.from_bytes(rule.src.address, "big"), rule.src.length

    @property
    def destination_only(self) -> bool:
        """True when the destination alone decides."""
        rule = self.rule
        return not self.src_length and not rule.proto

    def overlaps(self, other: _RuleEntry) -> bool:
        """Return whether some source, protocol and ports match both rules."""
        shift = self.bits - min(self.src_length, other.src_length)
        if self.src >> shift != other.src >> shift:
            return False
        mine, other_rule = self.rule, other.rule
        if not mine.proto or not other_rule.proto:
            return True
        if self.is_for_fragments or other.is_for_fragments:
            return mine.proto == other_rule.proto
        return (
            mine.proto == other_rule.proto
            and mine.sports[0] <= other_rule.sports[1]
            and other_rule.sports[0] <= mine.sports[1]
            and mine.dports[0] <= other_rule.dports[1]
            and other_rule.dports[0] <= mine.dports[1]
        )

    def covers(self, other: _RuleEntry) -> bool:
        """Return whether every source, protocol and ports that match the other rule match this one."""
        shift = self.bits - self.src_length
        if self.src_length > other.src_length or self.src >> shift != other.src >> shift:
            return False
        mine, other_rule = self.rule, other.rule
        if not mine.proto:
            return True
        if other.is_for_fragments:
            return mine.proto == other_rule.proto
        return (
            mine.proto == other_rule.proto
            and mine.sports[0] <= other_rule.sports[0]
            and other_rule.sports[1] <= mine.sports[1]
            and mine.dports[0] <= other_rule.dports[0]
            and other_rule.dports[1] <= mine.dports[1]
        )


def _matches_fragments(rule: Rule) -> bool:
    """Return whether fragments without ports match a rule in the kernel.

    The kernel takes their ports as 0 (xfrm_decode_session).
    """
    return not rule.sports[0] and not rule.dports[0]


def _fragment_entries(bypass: Rule, number: int, wanted: Sequence[PolicyRules]) -> list[_RuleEntry]:
    """Return rules for fragments that a BYPASS policy's rule would catch but later policies match.

    The rules name ports that no policy names. Whole packets with those ports still follow the order of policies.
    """
    ports = _unnamed_ports(bypass.proto, wanted)
    found: dict[Rule, _RuleEntry] = {}
    for later, (rules, target) in enumerate(wanted[number + 1 :], number + 1):
        for rule in rules:
            if _matches_fragments(rule) and rule.proto in (0, bypass.proto) and _is_ip6(rule) == _is_ip6(bypass):
                src, dst = _intersection(rule.src, bypass.src), _intersection(rule.dst, bypass.dst)
                if src is not None and dst is not None:
                    common = Rule(True, src, dst, bypass.proto, *ports)
                    found.setdefault(common, _RuleEntry(later, common, target, False, True))
    return list(found.values())


def _intersection(one: Prefix, other: Prefix) -> Prefix | None:
    """Return the addresses that are in both prefixes, None where there are none."""
    return max(one, other, key=lambda it: it.length) if one.overlaps(other) else None


def _unnamed_ports(proto: int, wanted: Iterable[PolicyRules]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the highest source and destination ports that no rule for a protocol names, each as a range.

    For ICMP they are type and code. Where rules name all of them, the result is the highest possible value.
    """
    highest = 0xFF if proto in (ICMP, ICMP6) else 0xFFFF
    rules = [rule for each in wanted for rule in each.rules if rule.proto == proto]
    source = _highest_unnamed((rule.sports for rule in rules), highest)
    destination = _highest_unnamed((rule.dports for rule in rules), highest)
    return (source, source), (destination, destination)


def _highest_unnamed(ranges: Iterable[tuple[int, int]], highest: int) -> int:
    named = [each for each in ranges if each != ANY_PORT]
    candidates = sorted({highest, *(first - 1 for first, _ in named if first)}, reverse=True)
    return next((it for it in candidates if not any(first <= it <= last for first, last in named)), highest)


class _ByDestination:
    """Rule entries, indexed to find overlapping destinations."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._by_length: dict[int, dict[int, list[_RuleEntry]]] = {}
        self._nets: list[tuple[int, int]] = []

    def add(self, entry: _RuleEntry) -> None:
        nets = self._by_length.setdefault(entry.length, {})
        here = nets.get(entry.net)
        if here is None:
            nets[entry.net] = [entry]
            insort(self._nets, (entry.net, entry.length))
        else:
            here.append(entry)

    def covering(self, net: int, length: int) -> Iterator[list[_RuleEntry]]:
        """Yield the entries of each destination that contains this one or is the same."""
        for other, nets in self._by_length.items():
            if other <= length:
                shift = self._bits - other
                here = nets.get(net >> shift << shift)
                if here is not None:
                    yield here

    def within(self, net: int, length: int) -> Iterator[list[_RuleEntry]]:
        """Yield the entries of each destination strictly within this one."""
        first = bisect_left(self._nets, (net, length + 1))
        end = net + (1 << (self._bits - length))
        for position in range(first, len(self._nets)):
            other, other_length = self._nets[position]
            if other >= end:
                return
            yield self._by_length[other_length][other]

    def overlapping(self, entry: _RuleEntry) -> Iterator[_RuleEntry]:
        """Yield the entries that share some packet with this one."""
        for found in (self.covering, self.within):
            for here in found(entry.net, entry.length):
                yield from (other for other in here if other.overlaps(entry))


class _Shadows:
    """Earlier rules, indexed by destination and source, so that a rule is compared with few others."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._lengths: set[tuple[int, int]] = set()
        self._entries: dict[tuple[int, int, int, int], list[_RuleEntry]] = {}

    def add(self, entry: _RuleEntry) -> None:
        self._lengths.add((entry.length, entry.src_length))
        key = (entry.net, entry.length, entry.src, entry.src_length)
        self._entries.setdefault(key, []).append(entry)

    def shadow(self, entry: _RuleEntry) -> bool:
        """Return whether one earlier rule matches all packets that this one would."""
        for length, src_length in self._lengths:
            if length <= entry.length and src_length <= entry.src_length:
                shift, src_shift = self._bits - length, self._bits - src_length
                key = (entry.net >> shift << shift, length, entry.src >> src_shift << src_shift, src_length)
                if any(other.covers(entry) for other in self._entries.get(key, ())):
                    return True
        return False


def _compute_family(
    entries: list[_RuleEntry],
    ip6: bool,
    local: frozenset[bytes],
    peers: frozenset[bytes],
    placements: list[Placement | None],
    first: Mapping[Rule, Target],
) -> FamilySteering:
    """Return the steering of one family, and write its policies' placements into `placements`."""
    drops = tuple(rule for rule, target in first.items() if target is Action.DISCARD)
    before = (PolicyLayer(drops, {rule.dst: Action.DISCARD for rule in drops}),) if drops else ()
    first = {rule: target for rule, target in first.items() if target is not Action.DISCARD}
    if not entries:
        return FamilySteering(layers=(*before, *_StackBuilder(0).layers(first, ())))
    local_rules = _local_rules(ip6, local)
    left = _without_shadowed(entries, local_rules)
    routes = _host_routes(left, peers)
    for entry in routes:
        placements[entry.number] = Placement(PlacementKind.ROUTE)
    routed = {entry.order for entry in routes}
    left = [entry for entry in left if entry.order not in routed]
    permits = _ByDestination(entries[0].bits)
    for entry in left:
        if entry.target is not Action.BYPASS:
            permits.add(entry)
    stack = _StackBuilder(entries[0].bits)
    for entry in left:
        if entry.target is not Action.BYPASS:
            stack.add_rule(entry)
        elif any(other.order > entry.order for other in permits.overlapping(entry)):
            stack.add_bypass(entry)
        elif placements[entry.number] is None:
            placements[entry.number] = Placement(PlacementKind.UNNEEDED)
    stack.note_placements(placements, len(before))
    denied = [rule for rule, net in local_rules if any(permits.covering(net, rule.dst.length))]
    layers = (*before, *stack.layers(first, denied))
    return FamilySteering({entry.rule.dst: entry.target for entry in routes}, layers)


def _local_rules(ip6: bool, local: frozenset[bytes]) -> list[tuple[Rule, int]]:
    """Return rules that deny destinations that VPP does not forward, each with its destination as a number."""
    size = 16 if ip6 else 4
    prefixes = [prefix for prefix in NEVER_FORWARDED if len(prefix.address) == size]
    hosts = sorted(address for address in local if len(address) == size)
    prefixes += (
        Prefix(address, 8 * size) for address in hosts if not (ip6 and address[0] == 0xFE and address[1] & 0xC0 == 0x80)
    )
    return [
        (Rule(False, everything(ip6), prefix, 0, ANY_PORT, ANY_PORT), int.from_bytes(prefix.address, "big"))
        for prefix in prefixes
    ]


def _without_shadowed(entries: list[_RuleEntry], local_rules: Iterable[tuple[Rule, int]]) -> list[_RuleEntry]:
    """Number the entries in order, and return those that can be the first to match a packet."""
    shadows = _Shadows(entries[0].bits)
    for rule, _ in local_rules:
        shadows.add(_RuleEntry(-1, rule, Action.BYPASS, True))
    left = []
    for order, entry in enumerate(entries):
        entry.order = order
        if not shadows.shadow(entry):
            shadows.add(entry)
            left.append(entry)
    return left


def _host_routes(entries: Sequence[_RuleEntry], peers: frozenset[bytes]) -> list[_RuleEntry]:
    """Return the entries that a route in table 0 can implement. The layers precede table 0 and must let their packets
    through.

    So no later rule of a layer may match the packets first, and no earlier BYPASS policy may have let them through.
    """
    bits = entries[0].bits if entries else 0
    bypasses, layered = _ByDestination(bits), _ByDestination(bits)
    for entry in entries:
        if entry.target is Action.BYPASS:
            bypasses.add(entry)
    routes = []
    for entry in reversed(entries):
        if entry.target is Action.BYPASS:
            continue
        host = (
            entry.is_only_rule
            and entry.length == bits
            and entry.destination_only
            and entry.rule.dst.address not in peers
        )
        if (
            host
            and not any(True for _ in layered.covering(entry.net, bits))
            and not any(other.order < entry.order for here in bypasses.covering(entry.net, bits) for other in here)
        ):
            routes.append(entry)
        else:
            layered.add(entry)
    routes.reverse()
    return routes


class _StackBuilder:
    """Builds the layers of one family."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._entries: list[list[_RuleEntry]] = []
        self._nets: list[_ByDestination] = []
        self._routes: list[dict[tuple[int, int], Target]] = []
        self._lengths: set[int] = set()
        self._discarded: set[int] = set()

    def add_rule(self, entry: _RuleEntry) -> None:
        """Add a rule to the first layer that can hold it. The last layer, which drops, holds any rule."""
        last = MAX_LAYERS - 1
        number = self._first_allowed_layer(entry)
        while number < min(last, len(self._entries)) and not self._fits(entry, number):
            number += 1
        if number == last and entry.target is not Action.DISCARD:
            entry.target = Action.DISCARD
            self._discarded.add(entry.number)
        self._add(entry, number)
        self._routes[number][entry.net, entry.length] = entry.target
        self._lengths.add(entry.length)

    def add_bypass(self, entry: _RuleEntry) -> None:
        """Add a deny rule to the first layer that puts it after the earlier rules."""
        self._add(entry, self._first_allowed_layer(entry))

    def note_placements(self, placements: list[Placement | None], before: int) -> None:
        """Write the policies' layers into `placements`. `before` is the number of layers that precede these."""
        layers: dict[int, set[int]] = {}
        for number, entries in enumerate(self._entries):
            for entry in entries:
                layers.setdefault(entry.number, set()).add(before + number)
        for number, found in layers.items():
            placements[number] = Placement(PlacementKind.LAYER, tuple(sorted(found)), number in self._discarded)

    def layers(self, first: Mapping[Rule, Target], denied: Sequence[Rule]) -> tuple[PolicyLayer, ...]:
        """Return the layers. In the first layer the rules of `first`, then of `denied`, precede all others.

        The routes of `first` conflict with no other: `denied` has a rule for the same destinations, which precedes all
        others.
        """
        made = []
        for number, entries in enumerate(self._entries or ([[]] if first else [])):
            rules = [*first, *denied] if not number else []
            routes = {rule.dst: target for rule, target in first.items()} if not number else {}
            for entry in entries:
                if entry.target is Action.BYPASS:
                    rules.append(entry.rule._replace(permit=False))
                else:
                    rules.append(entry.rule)
                    routes[entry.rule.dst] = entry.target
            made.append(PolicyLayer(tuple(rules), routes))
        return tuple(made)

    def _add(self, entry: _RuleEntry, number: int) -> None:
        if number == len(self._entries):
            self._entries.append([])
            self._nets.append(_ByDestination(self._bits))
            self._routes.append({})
        self._entries[number].append(entry)
        self._nets[number].add(entry)

    def _first_allowed_layer(self, entry: _RuleEntry) -> int:
        """Return the last layer that has a rule overlapping this one, else the first layer."""
        for number in range(len(self._nets) - 1, 0, -1):
            if any(True for _ in self._nets[number].overlapping(entry)):
                return number
        return 0

    def _fits(self, entry: _RuleEntry, number: int) -> bool:
        """Return whether an entry can share a layer with the entries in it, all of which precede it."""
        routes = self._routes[number]
        for length in self._lengths:
            if length <= entry.length:
                shift = self._bits - length
                target = routes.get((entry.net >> shift << shift, length))
                if target is not None and target is not entry.target and target != entry.target:
                    return False
        for here in self._nets[number].within(entry.net, entry.length):
            for other in here:
                if other.target is not Action.BYPASS and other.target != entry.target and not other.covers(entry):
                    return False
        return True
