"""By what our objects in the kernel are recognised: table, routing protocol, metric and marks."""

from __future__ import annotations

from vppipsec.kernel.xfrm.values import Mark, PolicyId

NFT_TABLE = "vpp-ipsecd"
FULL_MASK = 0xFFFFFFFF
MARK_OUT = Mark(0xC0000000, 0xF0000000)
"""Of packets for a host interface: the rest is its ifindex. The marks of VyOS's command line end at 0x7fffffff."""
MARK_IN = Mark(0xD0004950, FULL_MASK)
"""Of packets that came in by a host interface."""

ROUTE_METRIC = 0x4950
"""The preference of our filters, and the metric of our routes."""
ROUTE_PROTOCOL = 73
"""What our rules and routes say made them (FRA_PROTOCOL, rtm_protocol)."""


def is_pass_policy(policy: PolicyId) -> bool:
    """Tell whether a policy is one of ours, so nobody's wish for a tunnel."""
    mark = policy.mark
    if mark is None or mark.mask != FULL_MASK or policy.selector.prefixlen_d or policy.selector.prefixlen_s:
        return False
    return mark == MARK_IN or (
        mark.value & MARK_OUT.mask == MARK_OUT.value and mark.value - MARK_OUT.value == policy.selector.ifindex
    )
