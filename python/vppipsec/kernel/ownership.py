"""By what our objects in the kernel are recognised: table, routing protocol, metric and marks."""

from __future__ import annotations

from vppipsec.kernel.xfrm.values import Mark, PolicyId

NFT_TABLE = "vpp-ipsecd"
WHOLE = 0xFFFFFFFF
OUT = Mark(0xC0000000, 0xF0000000)
"""Of packets for a host interface: the rest is its ifindex. The marks of VyOS's command line end at 0x7fffffff."""
IN = Mark(0xD0004950, WHOLE)
"""Of packets that came in by a host interface."""

METRIC = 0x4950
"""The preference of our filters, and the metric of our routes."""
PROTOCOL = 73
"""What our rules and routes say made them (FRA_PROTOCOL, rtm_protocol)."""


def is_ours(policy: PolicyId) -> bool:
    """Tell whether a policy is one of ours, so nobody's wish for a tunnel."""
    mark = policy.mark
    if mark is None or mark.mask != WHOLE or policy.selector.prefixlen_d or policy.selector.prefixlen_s:
        return False
    return mark == IN or (mark.value & OUT.mask == OUT.value and mark.value - OUT.value == policy.selector.ifindex)
