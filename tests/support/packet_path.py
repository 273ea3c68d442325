"""VPP's treatment of a packet: an interface's ABF policies as one list of rules, their tables, then table 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from support.spd import Fragment, Packet, in_prefix
from vppipsec.sync.desired.policy_layers import Action, FamilySteering, Target
from vppipsec.vpp.types import Prefix, Rule


def rule_matches(rule: Rule, packet: Packet) -> bool:
    """Return whether a rule of an ACL matches a packet of its family."""
    if not in_prefix(packet.dst, *rule.dst) or not in_prefix(packet.src, *rule.src):
        return False
    if not rule.proto:
        return True
    if isinstance(packet, Fragment):
        return rule.proto == packet.proto
    first, last = rule.sports
    low, high = rule.dports
    return rule.proto == packet.proto and first <= packet.sport <= last and low <= packet.dport <= high


def longest(routes: Mapping[Prefix, Target], address: bytes) -> Target | None:
    """Return the target of the longest matching route, None where there is none."""
    found = [prefix for prefix in routes if in_prefix(address, *prefix)]
    return routes[max(found, key=lambda prefix: prefix.length)] if found else None


def decide(
    attached: Sequence[tuple[Sequence[Rule], Mapping[Prefix, Target]]], routes: Mapping[Prefix, Target], packet: Packet
) -> Target:
    """Return the target of a packet; `attached` are rules and routes of each ABF policy, in order of priority."""
    for rules, table in attached:
        for rule in rules:
            if rule_matches(rule, packet):
                if rule.permit:
                    return longest(table, packet.dst) or Action.DISCARD  # an empty table drops
                return longest(routes, packet.dst) or Action.BYPASS
    return longest(routes, packet.dst) or Action.BYPASS


def decide_by(steering: FamilySteering, packet: Packet) -> Target:
    """Return the target of a packet when VPP holds exactly the desired state."""
    return decide([(layer.rules, layer.routes) for layer in steering.layers], steering.routes, packet)
