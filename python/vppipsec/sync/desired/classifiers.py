"""The configuration of a VTI classifier: the VTI's policies, and the layers that select a child SA. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vppipsec.sync.desired.outbound_policy import OutboundPolicy
from vppipsec.sync.desired.policy_layers import Placement, PolicyRules, Steering


class VtiClassifierConfig(NamedTuple):
    """A VTI's outbound policies, the rules they become in VPP, and the layers made from those rules."""

    policies: Sequence[OutboundPolicy]
    policy_rules: tuple[PolicyRules, ...]
    steering: Steering

    def placements(self) -> Iterator[tuple[OutboundPolicy, Placement | None]]:
        """Yield each policy with its placement; None where VPP has no rule for the policy."""
        places = iter(self.steering.placements)
        for each in self.policies:
            yield each, None if each.policy_rules is None else next(places)
