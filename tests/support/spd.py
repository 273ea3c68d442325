"""A small model of the kernel's outbound policy lookup; `kernel/xfrm/test_policy_lookup.py` compares it with the
kernel.

Sources: xfrm_policy_lookup_bytype, __xfrm4_selector_match and __xfrm6_selector_match in net/xfrm/xfrm_policy.c. For the
values in place of ports: xfrm_flowi_sport in include/net/xfrm.h.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from vppipsec.kernel.xfrm.sad_spd import TunnelKey
from vppipsec.kernel.xfrm.values import Policy, PolicyAction, PolicyDir, Selector
from vppipsec.sync.desired.policy_layers import Action, Target

ICMP, TCP, UDP, GRE, ICMP6 = 1, 6, 17, 47, 58


class Packet(NamedTuple):
    """The fields of a packet that the lookup reads. For ICMP and ICMPv6 `sport` is the type and `dport` is the code."""

    src: bytes
    dst: bytes
    proto: int
    sport: int = 0
    dport: int = 0


class Fragment(Packet):
    """A fragment that is not the first of its packet. The kernel reads no ports from it."""


def matches(selector: Selector, packet: Packet) -> bool:
    """Return whether a selector is of a packet's family and matches it."""
    sport, dport = (0, 0) if isinstance(packet, Fragment) else (packet.sport, packet.dport)
    return (
        len(selector.daddr) == len(packet.dst)
        and in_prefix(packet.dst, selector.daddr, selector.prefixlen_d)
        and in_prefix(packet.src, selector.saddr, selector.prefixlen_s)
        and not (dport ^ selector.dport) & selector.dport_mask
        and not (sport ^ selector.sport) & selector.sport_mask
        and selector.proto in (0, packet.proto)
    )


def in_prefix(address: bytes, network: bytes, length: int) -> bool:
    """Return whether an address is in a prefix of its family."""
    bits = 8 * len(address)
    return (int.from_bytes(address, "big") ^ int.from_bytes(network, "big")) >> (bits - length) == 0


def lookup(policies: Iterable[Policy], packet: Packet) -> Policy | None:
    """Return the policy that decides: of those that match, the lowest priority number, then the oldest."""
    matching = [it for it in policies if it.direction == PolicyDir.OUT and matches(it.selector, packet)]
    return min(matching, key=lambda policy: policy.priority, default=None)


def target_of(policy: Policy | None) -> Target:
    """Return the target of a policy's packets."""
    if policy is None:
        return Action.BYPASS
    if policy.action == PolicyAction.BLOCK:
        return Action.DISCARD
    if not policy.templates:
        return Action.BYPASS
    (template,) = policy.templates
    low, high = sorted((template.saddr, template.daddr))
    return TunnelKey(low, high, template.mode, template.reqid, policy.if_id)
