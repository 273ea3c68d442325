"""Which SAs VPP's gre and ipip interfaces send with: their packets are the router's own, and no rule on an interface sees them.

They are VPP's own, so the outbound policies hold for them as for the kernel's own packets. The first that matches decides: SAs in
transport mode protect the interface; where VPP cannot do what it says, or there are no SAs yet, the interface is muted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from vppipsec.kernel.xfrm.sad_spd import GroupKey
from vppipsec.kernel.xfrm.values import Mode, Policy, PolicyAction, PolicyDir
from vppipsec.sync.desired.outbound_policy import Outbound
from vppipsec.sync.desired.policy_layers import Fixed
from vppipsec.sync.desired.selectors import widest_rule
from vppipsec.vpp.gre_ipip import Overlay
from vppipsec.vpp.types import Prefix, Rule


class Claims(NamedTuple):
    """What outbound policies say of overlays.

    `guarded` are those that must not send in clear, each with the group whose SAs are to protect it, None where none can.
    `of_groups` are the overlays that groups in transport mode are for, those that cannot be protected included.
    """

    guarded: Mapping[Overlay, GroupKey | None]
    of_groups: Mapping[GroupKey, Overlay]


def claims_on(overlays: Collection[Overlay], policies: Sequence[Outbound]) -> Claims:
    """Return what outbound policies, in the kernel's order, say of overlays. Of two that one group is for, one has its SAs."""
    guarded: dict[Overlay, GroupKey | None] = {}
    of_groups: dict[GroupKey, Overlay] = {}
    for overlay in sorted(overlays, key=lambda it: (bool(it.unfit), it.sw_if_index)):
        if overlay.has_several_remotes:
            continue
        targets = {wanted.target for _, wanted, _ in deciding(overlay, policies) if wanted is not None} - {Fixed.CLEAR}
        if not targets:
            continue
        target = targets.pop() if len(targets) == 1 else None
        group = target if isinstance(target, GroupKey) and target.mode == Mode.TRANSPORT else None
        if group in of_groups:
            group = None
        guarded[overlay] = None if overlay.unfit else group
        if group is not None:
            of_groups[group] = overlay
    for overlay in [it for it in overlays if it.has_several_remotes]:
        for group in _groups_from(overlay, policies):
            of_groups.setdefault(group, overlay)
    return Claims(guarded, of_groups)


def _groups_from(overlay: Overlay, policies: Iterable[Outbound]) -> Iterator[GroupKey]:
    """Yield the groups in transport mode that are for packets from an overlay's local end to some host."""
    local = Prefix(overlay.local, 8 * len(overlay.local))
    for _, wanted, _ in policies:
        if wanted is None or not isinstance(wanted.target, GroupKey) or wanted.target.mode != Mode.TRANSPORT:
            continue
        if any(rule.proto in (0, *overlay.protos) and rule.src == local for rule in wanted.rules):
            yield wanted.target


def _rules_of(overlay: Overlay) -> Iterator[Rule]:
    """Yield rules that match an overlay's packets, one for each of its protocols."""
    local, remote = (Prefix(address, 8 * len(address)) for address in (overlay.local, overlay.remote))
    for proto in overlay.protos:
        yield Rule(True, local, remote, proto)


def deciding(overlay: Overlay, policies: Sequence[Outbound]) -> Iterator[Outbound]:
    """Yield for each protocol of an overlay's packets the policy that decides: the first that matches them all."""
    for packets in _rules_of(overlay):
        for policy in policies:
            if policy.wanted is not None and any(_covers(rule, packets) for rule in policy.wanted.rules):
                yield policy
                break


def _covers(rule: Rule, packets: Rule) -> bool:
    return rule.proto in (0, packets.proto) and rule.src.covers(packets.src) and rule.dst.covers(packets.dst)


def not_in_clear(guarded: Iterable[Overlay], policies: Iterable[Policy]) -> list[Rule]:
    """Return rules for what remotes of guarded overlays must not send in clear: what an `in` policy wants encrypted.

    VPP takes it, whatever protects the overlay (gre4-input, ipip4-input); the kernel drops it (XfrmInTmplMismatch).
    """
    asking = [
        widest_rule(policy.selector)
        for policy in policies
        if policy.direction == PolicyDir.IN and policy.action == PolicyAction.ALLOW and not policy.if_id
        if any(not template.optional for template in policy.templates)
    ]
    rules = [rule._replace(src=rule.dst, dst=rule.src) for overlay in guarded for rule in _rules_of(overlay)]
    return [rule for rule in rules if any(_covers(asked, rule) for asked in asking)]
