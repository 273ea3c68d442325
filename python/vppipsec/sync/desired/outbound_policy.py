"""Turns the kernel's outbound policies into rules and targets for VPP. Pure: no I/O, no state.

The kernel asks policies by priority, and those of one priority in the order of insertion. The first that matches
decides (xfrm_policy_lookup_bytype, net/xfrm/xfrm_policy.c). Where VPP cannot do what a policy says, it drops. So
packets that the kernel would have encrypted never leave unencrypted.
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
    """An outbound policy, and its rules for VPP, None where VPP needs none.

    `reason` says why VPP does not do what the policy says.
    """

    policy: Policy
    policy_rules: PolicyRules | None
    reason: str = ""


def outbound_policies(policies: Iterable[Policy]) -> list[OutboundPolicy]:
    """Return the outbound policies in the order in which the kernel asks them.

    `policies` are in the order of insertion.
    """
    found = [policy for policy in policies if policy.direction == PolicyDir.OUT]
    return [_from_policy(policy) for policy in sorted(found, key=_priority)]


def why_not_protected(policy: Policy) -> str:
    """Return why VPP protects nothing by an outbound policy that encrypts; empty where it does."""
    return _from_policy(policy).reason


def matches_mark(policy: Policy) -> bool:
    """Return whether a policy matches a firewall mark only."""
    return policy.mark is not None and bool(policy.mark.value & policy.mark.mask)


def _priority(policy: Policy) -> int:
    return policy.priority


def vti_outbound_policy(policy: Policy) -> OutboundPolicy:
    """Return the rules and target of a VTI's outbound policy, for packets that a route has sent over the VTI."""
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
