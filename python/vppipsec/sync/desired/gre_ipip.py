"""Decides which SAs protect VPP's gre and ipip interfaces.

VPP itself sends their packets, and no rule on an interface matches them. As for the kernel's own packets, the first
outbound policy that matches decides. SAs in transport mode protect the interface. Where VPP cannot do what the policy
says, or has no SA yet, the interface is blocked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from vppipsec.kernel.xfrm.sad_spd import TunnelKey
from vppipsec.kernel.xfrm.values import Mode, Policy, PolicyAction, PolicyDir
from vppipsec.sync.desired.outbound_policy import OutboundPolicy
from vppipsec.sync.desired.policy_layers import Action
from vppipsec.sync.desired.selectors import widest_rule
from vppipsec.vpp.gre_ipip import GreIpipInterface
from vppipsec.vpp.types import Prefix, Rule


class GreIpipClaims(NamedTuple):
    """What outbound policies require of gre and ipip interfaces.

    `must_encrypt`: interfaces that must not send unencrypted -> the tunnel whose SAs protect them, None where none can.
    `by_tunnel`: tunnels in transport mode -> their interface, including interfaces that cannot be protected.
    """

    must_encrypt: Mapping[GreIpipInterface, TunnelKey | None]
    by_tunnel: Mapping[TunnelKey, GreIpipInterface]


def gre_ipip_claims(
    gre_ipip_interfaces: Collection[GreIpipInterface], policies: Sequence[OutboundPolicy]
) -> GreIpipClaims:
    """Return what outbound policies, in the kernel's order, require of gre and ipip interfaces.

    Where one tunnel fits two interfaces, only one of them gets its SAs.
    """
    must_encrypt: dict[GreIpipInterface, TunnelKey | None] = {}
    by_tunnel: dict[TunnelKey, GreIpipInterface] = {}
    for gre_ipip in sorted(gre_ipip_interfaces, key=lambda it: (bool(it.unsupported_reason), it.sw_if_index)):
        if gre_ipip.is_multipoint:
            continue
        targets = {wanted.target for _, wanted, _ in deciding_policies(gre_ipip, policies) if wanted is not None} - {
            Action.BYPASS
        }
        if not targets:
            continue
        target = targets.pop() if len(targets) == 1 else None
        tunnel = target if isinstance(target, TunnelKey) and target.mode == Mode.TRANSPORT else None
        if tunnel in by_tunnel:
            tunnel = None
        must_encrypt[gre_ipip] = None if gre_ipip.unsupported_reason else tunnel
        if tunnel is not None:
            by_tunnel[tunnel] = gre_ipip
    for gre_ipip in [it for it in gre_ipip_interfaces if it.is_multipoint]:
        for tunnel in _tunnels_from(gre_ipip, policies):
            by_tunnel.setdefault(tunnel, gre_ipip)
    return GreIpipClaims(must_encrypt, by_tunnel)


def _tunnels_from(gre_ipip: GreIpipInterface, policies: Iterable[OutboundPolicy]) -> Iterator[TunnelKey]:
    """Yield the tunnels in transport mode whose policies match packets from the interface's local end to some host."""
    local = Prefix(gre_ipip.local, 8 * len(gre_ipip.local))
    for _, wanted, _ in policies:
        if wanted is None or not isinstance(wanted.target, TunnelKey) or wanted.target.mode != Mode.TRANSPORT:
            continue
        if any(rule.proto in (0, *gre_ipip.protos) and rule.src == local for rule in wanted.rules):
            yield wanted.target


def _rules_of(gre_ipip: GreIpipInterface) -> Iterator[Rule]:
    """Yield rules that match an interface's packets, one for each of its protocols."""
    local, remote = (Prefix(address, 8 * len(address)) for address in (gre_ipip.local, gre_ipip.remote))
    for proto in gre_ipip.protos:
        yield Rule(True, local, remote, proto)


def deciding_policies(gre_ipip: GreIpipInterface, policies: Sequence[OutboundPolicy]) -> Iterator[OutboundPolicy]:
    """Yield, for each protocol of an interface's packets, the policy that decides: the first that matches all of them."""
    for packets in _rules_of(gre_ipip):
        for policy in policies:
            if policy.policy_rules is not None and any(
                _covers_rule(rule, packets) for rule in policy.policy_rules.rules
            ):
                yield policy
                break


def _covers_rule(rule: Rule, packets: Rule) -> bool:
    return rule.proto in (0, packets.proto) and rule.src.covers(packets.src) and rule.dst.covers(packets.dst)


def cleartext_discard_rules(guarded: Iterable[GreIpipInterface], policies: Iterable[Policy]) -> list[Rule]:
    """Return rules that drop unencrypted packets from remotes of guarded interfaces where an `in` policy requires
    encryption.

    VPP would accept such packets even on a protected interface (gre4-input, ipip4-input). The kernel drops them
    (XfrmInTmplMismatch).
    """
    asking = [
        widest_rule(policy.selector)
        for policy in policies
        if policy.direction == PolicyDir.IN and policy.action == PolicyAction.ALLOW and not policy.if_id
        if any(not template.optional for template in policy.templates)
    ]
    rules = [rule._replace(src=rule.dst, dst=rule.src) for gre_ipip in guarded for rule in _rules_of(gre_ipip)]
    return [rule for rule in rules if any(_covers_rule(asked, rule) for asked in asking)]
