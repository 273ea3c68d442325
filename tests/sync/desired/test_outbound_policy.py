"""What is wanted of VPP for each outbound policy, and why it is not what the policy says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from support.build import make_policy
from vppipsec.kernel.xfrm.sad_spd import groups_of_policy
from vppipsec.kernel.xfrm.values import Mark, Policy, PolicyDir
from vppipsec.sync.desired.outbound_policy import outbound, why_not_led
from vppipsec.sync.desired.policy_layers import Fixed, Wanted
from vppipsec.vpp.types import Prefix, Rule

OURS = make_policy()
RULE = Rule(True, Prefix(bytes((10, 1, 0, 0)), 24), Prefix(bytes((10, 2, 0, 0)), 24))
SCTP = replace(OURS.selector, proto=132, dport=9, dport_mask=0xFFFF)


@pytest.mark.parametrize(
    ("policy", "wanted", "reason"),
    [
        (OURS, Wanted((RULE,), groups_of_policy(OURS)[0]), ""),
        (make_policy(mark=Mark(0, 0xFF)), Wanted((RULE,), groups_of_policy(OURS)[0]), ""),
        (make_policy(action=1), Wanted((RULE,), Fixed.DROP), ""),
        (make_policy(templates=()), Wanted((RULE,), Fixed.CLEAR), ""),
        (make_policy(if_id=5), None, "it is of a VTI (if_id 5): routes over that interface decide"),
        (make_policy(mark=Mark(1, 0xFF)), None, "its policy matches a firewall mark: packets in VPP carry none"),
        (
            make_policy(templates=2 * OURS.templates),
            Wanted((RULE,), Fixed.DROP),
            "its policy asks for more than one transformation",
        ),
        (make_policy(type=1), Wanted((RULE,), Fixed.DROP), "its policy asks for more than one transformation"),
        (
            make_policy(selector=SCTP),
            Wanted((RULE._replace(proto=132),), Fixed.DROP),
            "its policy names ports of SCTP: VPP knows those of TCP and UDP",
        ),
        (
            make_policy(selector=SCTP, templates=()),
            None,
            "its policy names ports of SCTP: VPP knows those of TCP and UDP",
        ),
    ],
)
def test_of_each_policy_is_said_what_is_wanted(policy: Policy, wanted: Wanted | None, reason: str) -> None:
    assert outbound([policy]) == [(policy, wanted, reason)]
    assert why_not_led(policy) == reason


def test_lowest_priority_number_goes_first_then_the_oldest_and_other_directions_do_not_count() -> None:
    policies = [make_policy(dst=f"10.{n}.0.0/24", priority=p) for n, p in enumerate((7, 5, 7, 5))]
    found = outbound([make_policy(PolicyDir.IN), *policies, make_policy(PolicyDir.FWD)])
    assert [each.policy for each in found] == [policies[i] for i in (1, 3, 0, 2)]
