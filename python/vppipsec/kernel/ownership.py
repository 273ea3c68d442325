"""How the service recognises its objects in the kernel: nftables table, routing protocol, metric and marks."""

from __future__ import annotations

from vppipsec.kernel.xfrm.values import Mark, PolicyId

NFT_TABLE = "vpp-ipsecd"
FULL_MASK = 0xFFFFFFFF
MARK_OUT = Mark(0xC0000000, 0xF0000000)
"""Mark of packets for a host interface; the bits outside the mask are its ifindex. VyOS's CLI gives marks up to 0x7fffffff."""
MARK_IN = Mark(0xD0004950, FULL_MASK)
"""Mark of packets that a host interface received."""

ROUTE_METRIC = 0x4950
"""Preference of the service's tc filters, and metric of its routes."""
ROUTE_PROTOCOL = 73
"""Protocol number of the service's rules and routes (FRA_PROTOCOL, rtm_protocol)."""


def is_pass_policy(policy: PolicyId) -> bool:
    """Return whether a policy belongs to the service. Such a policy asks for no tunnel."""
    mark = policy.mark
    if mark is None or mark.mask != FULL_MASK or policy.selector.prefixlen_d or policy.selector.prefixlen_s:
        return False
    return mark == MARK_IN or (
        mark.value & MARK_OUT.mask == MARK_OUT.value and mark.value - MARK_OUT.value == policy.selector.ifindex
    )
