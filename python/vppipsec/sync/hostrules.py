"""From policies that name a protocol to the routing rules for the router's own packets. Pure: no I/O, no state.

The kernel's rules are asked one after the other, as its policies are, and the first that matches decides. So each policy that
leads to a host interface becomes a rule, and one before it that may match the same packets becomes one that keeps them from it.
What the lookup of a socket's route does not say, such as ports for raw sockets, the kernel's policies do not see either.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from vppipsec.sync.algorithms import Unsupported
from vppipsec.sync.selectors import ICMP, UDP, rules_of, widest_rule
from vppipsec.vpp.objects import ANY_PORT, Prefix, Rule
from vppipsec.xfrm.hostways import Aside, HostRule
from vppipsec.xfrm.values import Selector

_LAST_PORT = 65535
_EVERYWHERE = Prefix(bytes(4), 0)


class Asked(NamedTuple):
    """An outbound policy of IPv4 without if_id. `host` is the host interface that it leads to by a rule, empty where it does not.

    `source` is an address of the router that it is for.
    """

    selector: Selector
    host: str = ""
    source: bytes = b""


def is_narrow(selector: Selector) -> bool:
    """Tell whether a selector names more than addresses."""
    return bool(selector.proto or selector.sport_mask or selector.dport_mask or selector.ifindex)


def why_no_rule(selector: Selector) -> str:
    """Say why a routing rule cannot match what a selector does; nothing where it can."""
    try:
        (rule,) = rules_of(selector)
    except Unsupported as why:
        return str(why)
    named = [ports for ports in (rule.sports, rule.dports) if ports != ANY_PORT]
    if named and rule.proto == ICMP:
        return "its policy names an ICMP type, which routing rules do not know"
    if any(
        first == 0 or last == _LAST_PORT for first, last in named
    ):  # fib_rule_port_range_valid, net/core/fib_rules.c
        return "its policy names port 0 or 65535, which routing rules do not know"
    return ""


def host_rules(policies: Sequence[Asked], peers: Collection[Prefix]) -> tuple[HostRule, ...]:
    """Return the rules for policies, which are in the order in which the kernel asks them.

    An IKE daemon may use whatever UDP port, so UDP for the peers' own addresses goes as without us.
    """
    leading = {at: _rule(asked.selector) for at, asked in enumerate(policies) if asked.host}
    if not leading:
        return ()
    own: dict[str, bytes] = {}
    found = [
        _host_rule(Rule(True, _EVERYWHERE, peer, UDP), Aside.KERNEL)
        for peer in sorted(peers)
        if any(rule.proto == UDP and rule.dst.covers(peer) for rule in leading.values())
    ]
    for at, asked in enumerate(policies[: max(leading) + 1]):
        if rule := leading.get(at):
            source = own.setdefault(asked.host, asked.source)
            is_for = rule.src.covers(Prefix(source, 8 * len(source)))
            found.append(_host_rule(rule, asked.host, source if is_for else b""))
            continue
        destination = Prefix(asked.selector.daddr, asked.selector.prefixlen_d)
        near = [other for later, other in leading.items() if later > at and other.dst.meets(destination)]
        if not near:
            continue
        rule = _rule(asked.selector)
        if any(_meet(rule, other) for other in near):
            found.append(_host_rule(rule, Aside.KERNEL if is_narrow(asked.selector) else Aside.ROUTES))
    return tuple(found)


def _rule(selector: Selector) -> Rule:
    """Return the narrowest rule that routing rules can express and that matches all that a selector does."""
    return widest_rule(selector) if why_no_rule(selector) else rules_of(selector)[0]


def _meet(one: Rule, other: Rule) -> bool:
    """Tell whether a packet may match both."""
    if one.proto and other.proto and one.proto != other.proto:
        return False
    pairs = (one.sports, other.sports), (one.dports, other.dports)
    if any(first > last for (_, last), (first, _) in (*pairs, *((b, a) for a, b in pairs))):
        return False
    return one.dst.meets(other.dst) and one.src.meets(other.src)


def _host_rule(rule: Rule, to: str | Aside, own: bytes = b"") -> HostRule:
    sports, dports = (None if ports == ANY_PORT else ports for ports in (rule.sports, rule.dports))
    return HostRule(rule.src, rule.dst, rule.proto, to, own, sports, dports)
