"""What is wanted of VPP for each outbound policy, and why it is not what the policy says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from support.build import make_policy
from vppipsec.kernel.xfrm.sad_spd import tunnel_keys_of_policy
from vppipsec.kernel.xfrm.values import Mark, Policy, PolicyDir
from vppipsec.sync.desired.outbound_policy import outbound_policies, why_not_protected
from vppipsec.sync.desired.policy_layers import Action, PolicyRules
from vppipsec.vpp.types import Prefix, Rule

LOCAL_POLICY = make_policy()
RULE = Rule(True, Prefix(bytes((10, 1, 0, 0)), 24), Prefix(bytes((10, 2, 0, 0)), 24))
SCTP = replace(LOCAL_POLICY.selector, proto=132, dport=9, dport_mask=0xFFFF)


@pytest.mark.parametrize(
    ("policy", "wanted", "reason"),
    [
        (LOCAL_POLICY, PolicyRules((RULE,), tunnel_keys_of_policy(LOCAL_POLICY)[0]), ""),
        (make_policy(mark=Mark(0, 0xFF)), PolicyRules((RULE,), tunnel_keys_of_policy(LOCAL_POLICY)[0]), ""),
        (make_policy(action=1), PolicyRules((RULE,), Action.DISCARD), ""),
        (make_policy(templates=()), PolicyRules((RULE,), Action.BYPASS), ""),
        (make_policy(if_id=5), None, "it is of a VTI (if_id 5): routes over that interface decide"),
        (make_policy(mark=Mark(1, 0xFF)), None, "its policy matches a firewall mark: packets in VPP carry none"),
        (
            make_policy(templates=2 * LOCAL_POLICY.templates),
            PolicyRules((RULE,), Action.DISCARD),
            "its policy asks for more than one transformation",
        ),
        (make_policy(type=1), PolicyRules((RULE,), Action.DISCARD), "its policy asks for more than one transformation"),
        (
            make_policy(selector=SCTP),
            PolicyRules((RULE._replace(proto=132),), Action.DISCARD),
            "its policy names ports of SCTP: VPP knows those of TCP and UDP",
        ),
        (
            make_policy(selector=SCTP, templates=()),
            None,
            "its policy names ports of SCTP: VPP knows those of TCP and UDP",
        ),
    ],
)
def test_of_each_policy_is_said_what_is_wanted(policy: Policy, wanted: PolicyRules | None, reason: str) -> None:
    assert outbound_policies([policy]) == [(policy, wanted, reason)]
    assert why_not_protected(policy) == reason


def test_outbound_policies_sort_by_priority_then_age() -> None:
    policies = [make_policy(dst=f"10.{n}.0.0/24", priority=p) for n, p in enumerate((7, 5, 7, 5))]
    found = outbound_policies([make_policy(PolicyDir.IN), *policies, make_policy(PolicyDir.FWD)])
    assert [each.policy for each in found] == [policies[i] for i in (1, 3, 0, 2)]
