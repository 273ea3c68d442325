"""What classifies the packets that are routed over a VTI: its policies, and the layers that they become. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vppipsec.sync.desired.outbound_policy import OutboundPolicy
from vppipsec.sync.desired.policy_layers import Placement, PolicyRules, Steering


class VtiClassifierConfig(NamedTuple):
    """What tells the packets of a VTI apart: its policies, what is wanted for them now, and the layers that this makes."""

    policies: Sequence[OutboundPolicy]
    policy_rules: tuple[PolicyRules, ...]
    steering: Steering

    def placements(self) -> Iterator[tuple[OutboundPolicy, Placement | None]]:
        """Yield the policies, each with its place; None where VPP has no part in it."""
        places = iter(self.steering.placements)
        for each in self.policies:
            yield each, None if each.policy_rules is None else next(places)
