"""From the kernel's outbound policies to what is to become of the packets that they match. Pure: no I/O, no state.

The kernel asks the policies in order of priority, and those of one priority in the order of their insertion, and the first that
matches decides (xfrm_policy_lookup_bytype, net/xfrm/xfrm_policy.c). Where VPP cannot do what a policy says, it drops: what the
kernel would have encrypted never leaves in clear.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from vppipsec.kernel.xfrm.sad_spd import tunnel_keys_of_policy
from vppipsec.kernel.xfrm.values import Policy, PolicyAction, PolicyDir, PolicyType
from vppipsec.sync.desired.algorithms import Unsupported
from vppipsec.sync.desired.policy_layers import Action, PolicyRules, Target
from vppipsec.sync.desired.selectors import rules_of, widest_rule


class OutboundPolicy(NamedTuple):
    """An outbound policy and what is wanted of VPP for it, None where nothing is. `reason`: why that is not what it says."""

    policy: Policy
    policy_rules: PolicyRules | None
    reason: str = ""


def outbound_policies(policies: Iterable[Policy]) -> list[OutboundPolicy]:
    """Return the outbound policies in the order in which the kernel asks them. `policies` are in that of their insertion."""
    found = [policy for policy in policies if policy.direction == PolicyDir.OUT]
    return [_from_policy(policy) for policy in sorted(found, key=_priority)]


def why_not_protected(policy: Policy) -> str:
    """Say why an outbound policy that encrypts leads nothing into a tunnel of VPP's; nothing where it does."""
    return _from_policy(policy).reason


def matches_mark(policy: Policy) -> bool:
    """Tell whether a policy matches a firewall mark only."""
    return policy.mark is not None and bool(policy.mark.value & policy.mark.mask)


def _priority(policy: Policy) -> int:
    return policy.priority


def vti_outbound_policy(policy: Policy) -> OutboundPolicy:
    """Say what is wanted for an outbound policy of a VTI, once packets are routed over that."""
    return _with_rules(policy, Action.DISCARD)


def _from_policy(policy: Policy) -> OutboundPolicy:
    if policy.if_id:
        return OutboundPolicy(policy, None, f"it is of a VTI (if_id {policy.if_id}): routes over that interface decide")
    return _with_rules(policy, Action.BYPASS)


def _with_rules(policy: Policy, without_template: Action) -> OutboundPolicy:
    if matches_mark(policy):
        return OutboundPolicy(policy, None, "its policy matches a firewall mark: packets in VPP carry none")
    target: Target
    reason = ""
    if policy.action == PolicyAction.BLOCK:
        target = Action.DISCARD
    elif not policy.templates:
        target = without_template
    elif len(policy.templates) > 1 or policy.type != PolicyType.MAIN:
        target, reason = Action.DISCARD, "its policy asks for more than one transformation"
    else:
        (target,) = tunnel_keys_of_policy(policy)
    try:
        return OutboundPolicy(policy, PolicyRules(rules_of(policy.selector), target), reason)
    except Unsupported as why:
        if target is Action.BYPASS:
            return OutboundPolicy(policy, None, str(why))
        return OutboundPolicy(policy, PolicyRules((widest_rule(policy.selector),), Action.DISCARD), str(why))
