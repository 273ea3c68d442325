"""Turns the kernel's SAs and policies of one tunnel into what VPP should hold. Pure: no I/O, no state.

This module decides what VPP carries. It also holds the wording of the reasons why a tunnel is not offloaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Set
from types import MappingProxyType

from vppipsec.kernel.text import format_addr
from vppipsec.kernel.xfrm.sad_spd import Tunnel, TunnelKey
from vppipsec.kernel.xfrm.values import (
    PolicyAction,
    PolicyDir,
    PolicyType,
    Sa,
    SaDir,
    SaId,
)
from vppipsec.sync.desired.algorithms import Unsupported
from vppipsec.sync.desired.environment import EnvironmentSnapshot
from vppipsec.sync.desired.mtu import max_inner_packet
from vppipsec.sync.desired.outbound_policy import matches_mark, why_not_protected
from vppipsec.sync.desired.sa import decision_on, direction_of
from vppipsec.sync.desired.selectors import rules_of
from vppipsec.sync.desired.state import DesiredTunnel, OffloadDecision, OffloadStatus, Translation
from vppipsec.vpp.ownership import TAG_PREFIX
from vppipsec.vpp.types import DEFAULT_MTU, MAX_INBOUND_SAS, Prefix, Rule, SaSpec, everything

_SEQUENCE_LOST = (
    "its sequence numbers were used before this VPP could go on with them; the IKE daemon is asked to rekey"
)
_NO_DECISIONS: Mapping[SaId, OffloadDecision] = MappingProxyType({})
_NO_ROUTES: Mapping[Prefix, int] = MappingProxyType({})


def tag_of(key: TunnelKey) -> str:
    """Return the interface tag of a tunnel: short, the same in every run, different for every tunnel."""
    text = f"{key.low.hex()} {key.high.hex()} {key.mode} {key.reqid} {key.if_id}"
    return TAG_PREFIX + hashlib.sha256(text.encode()).hexdigest()[:20]


def translate(
    key: TunnelKey,
    tunnel: Tunnel,
    env: EnvironmentSnapshot,
    before: Mapping[SaId, OffloadDecision] = _NO_DECISIONS,
    sequence_lost: Set[SaId] = frozenset(),
    actual_sas: Collection[SaSpec] = (),
) -> Translation:
    """Return what VPP should hold for a tunnel, and the decision on each of its SAs.

    `before` may hold decisions of an earlier translation in the same environment. Those on unchanged SAs are reused.

    `sequence_lost` are SAs whose sequence numbers were used. VPP must not start such an outbound SA at 1 again. An SA
    in `actual_sas`, which VPP already has, continues its numbers.

    While all outbound SAs wait for a rekey, the tunnel exists without SAs: nothing passes. The routes into it, and the
    kernel's redirects to its host interface, are then in place when new SAs come.
    """
    local, remote = endpoints_of(key, tunnel, env.addresses)
    if local is None or remote is None:
        return Translation(
            key, decisions=_same_decision(tunnel, OffloadStatus.UNSUPPORTED, _no_local_address_reason(key))
        )
    if remote in env.unreachable:
        return Translation(
            key, decisions=_same_decision(tunnel, OffloadStatus.UNSUPPORTED, _unreachable_reason(remote), local)
        )
    gre_ipip = env.gre_ipip.get(key)
    ip6 = any(len(policy.selector.daddr) == 16 for policy in tunnel.policies.values())
    table = 0 if gre_ipip is not None or env.vtis is None or not key.if_id else env.vtis.get(key.if_id)
    if table is None:  # the VTI may be in a VRF when it comes; until then the kernel drops, too
        reason = f"there is no interface with if_id {key.if_id}"
        return Translation(key, decisions=_same_decision(tunnel, OffloadStatus.PENDING, reason, local))
    if table and (missing := {(table, False), (table, ip6)} - env.tables):
        family = "IPv4" if (table, False) in missing else "IPv6"
        reason = f"VPP has no {family} table {table}, the one of its VTI's VRF"
        return Translation(key, decisions=_same_decision(tunnel, OffloadStatus.UNSUPPORTED, reason, local))
    decisions = {}
    for sa_id, sa in tunnel.sas.items():
        earlier = before.get(sa_id)
        is_new = earlier is None or earlier.sa is not sa or earlier.status is OffloadStatus.AWAITING_REKEY
        decisions[sa_id] = decision_on(sa, local, env, gre_ipip) if is_new or earlier is None else earlier
    outbound = {sa_id: v.spec for sa_id, v in decisions.items() if v.spec is not None and not v.spec.inbound}
    inbound = [(sa_id, v.spec) for sa_id, v in decisions.items() if v.spec is not None and v.spec.inbound]
    filter_problem = ""
    try:
        inbound_rules = inbound_rules_of(tunnel) if env.enforce_selectors and gre_ipip is None else None
    except Unsupported as why:
        inbound_rules, filter_problem = None, str(why)
    # linux-nl enables IPv6 on each interface with a host interface
    if table and not ip6 and not env.enforce_selectors:
        inbound_rules = _IP4_ALONE
    tunnel_problem = filter_problem or _why_no_policy_protects(tunnel)
    blocking = _blocking_decision(tunnel, decisions, bool(outbound), bool(inbound), tunnel_problem)
    if blocking is not None:
        return Translation(key, None, _with_tunnel_decision(decisions, blocking))
    newest = list(outbound.values())[-1]
    for sa_id in [
        sa_id for sa_id in outbound if sa_id in sequence_lost and _restarts_sequence(outbound[sa_id], actual_sas)
    ]:
        del outbound[sa_id]
        decisions[sa_id] = OffloadDecision(OffloadStatus.AWAITING_REKEY, _SEQUENCE_LOST, None, "out", tunnel.sas[sa_id])
    if not outbound:
        decisions, inbound = (
            _with_tunnel_decision(
                decisions, OffloadDecision(OffloadStatus.PENDING, "its outbound counterpart is being rekeyed")
            ),
            [],
        )
    for sa_id, spec in inbound[:-MAX_INBOUND_SAS]:
        reason = f"VPP takes {MAX_INBOUND_SAS} inbound SAs per tunnel; the newest are used"
        decisions[sa_id] = OffloadDecision(OffloadStatus.UNSUPPORTED, reason, None, direction_of(spec))
    desired_tunnel = DesiredTunnel(
        tag=tag_of(key),
        unnumbered_from=env.addresses[local],
        ip6=ip6,
        outbound=tuple(outbound.values()),
        inbound=tuple(spec for _, spec in inbound[-MAX_INBOUND_SAS:]),
        inbound_rules=inbound_rules,
        gre_ipip=gre_ipip,
        mtu=_mtu(key, remote, newest, env),
        table=table,
    )
    return Translation(key, desired_tunnel, decisions)


def _with_tunnel_decision(
    decisions: Mapping[SaId, OffloadDecision], reason: OffloadDecision
) -> dict[SaId, OffloadDecision]:
    """Return the decisions without specs. SAs that VPP could carry get the tunnel's decision, others keep their own."""
    replaced = {i: reason if v.spec is not None else v for i, v in decisions.items()}
    return {i: OffloadDecision(v.status, v.reason, None, decisions[i].direction) for i, v in replaced.items()}


def _mtu(key: TunnelKey, remote: bytes, sa: SaSpec, env: EnvironmentSnapshot) -> int:
    """Return the longest packet that a tunnel accepts, in bytes, 0 where that does not matter."""
    if key.if_id in env.classified_vtis:
        return DEFAULT_MTU
    link_mtu = env.link_mtus.get(remote, 0) if key.if_id else 0
    return max_inner_packet(link_mtu, sa) if link_mtu else 0


_DENIALS = tuple(Rule(False, everything(ip6), everything(ip6)) for ip6 in (False, True))
_IP4_ALONE = (Rule(True, everything(False), everything(False)), *_DENIALS)


def inbound_rules_of(tunnel: Tunnel) -> tuple[Rule, ...]:
    """Return the rules that filter a tunnel's decrypted packets: they permit what one of its policies permits, and no
    more.

    The kernel asks the `in` policies about packets to itself, and the `fwd` policies about packets that it forwards
    (__xfrm_policy_check, net/xfrm/xfrm_policy.c). IKE daemons install both alike. The last two rules count what is
    denied. Raises Unsupported where no rule of VPP's matches what a policy permits.
    """
    rules = {
        rule
        for policy in tunnel.policies.values()
        if policy.direction in (PolicyDir.IN, PolicyDir.FWD)
        and policy.action == PolicyAction.ALLOW
        and policy.type == PolicyType.MAIN
        and not matches_mark(policy)
        for rule in rules_of(policy.selector)
    }
    return (*sorted(rules), *_DENIALS)


def remote_endpoint(key: TunnelKey, tunnel: Tunnel, addresses: Mapping[bytes, int]) -> bytes | None:
    """Return the remote end of a tunnel, to ask VPP whether it reaches it; None where neither end is local."""
    return endpoints_of(key, tunnel, addresses)[1]


def why_not_offloadable(key: TunnelKey, tunnel: Tunnel, env: EnvironmentSnapshot) -> str:
    """Return why a tunnel's endpoints keep it out of VPP; empty where they do not."""
    local, remote = endpoints_of(key, tunnel, env.addresses)
    if local is None or remote is None:
        return _no_local_address_reason(key)
    return _unreachable_reason(remote) if remote in env.unreachable else ""


def _no_local_address_reason(key: TunnelKey) -> str:
    return f"neither {format_addr(key.low)} nor {format_addr(key.high)} is on a VPP interface"


def _unreachable_reason(remote: bytes) -> str:
    return f"VPP has no route to {format_addr(remote)}"


def endpoints_of(key: TunnelKey, tunnel: Tunnel, addresses: Mapping[bytes, int]) -> tuple[bytes | None, bytes | None]:
    """Return the local and the remote end, None and None where neither is on a VPP interface.

    Where both are on VPP interfaces, direction flags decide, else outbound policies.
    """
    low, high = key.low in addresses, key.high in addresses
    if low and not high:
        return key.low, key.high
    if high and not low:
        return key.high, key.low
    if not low:
        return None, None
    for sa in tunnel.sas.values():
        if sa.direction == SaDir.OUT:
            return sa.saddr, sa.daddr
        if sa.direction == SaDir.IN:
            return sa.daddr, sa.saddr
    for policy in tunnel.policies.values():
        if policy.direction == PolicyDir.OUT:
            for template in policy.templates:
                if {template.saddr, template.daddr} == {key.low, key.high}:
                    return template.saddr, template.daddr
    return key.low, key.high


def _same_decision(
    tunnel: Tunnel, status: OffloadStatus, reason: str, local: bytes | None = None
) -> dict[SaId, OffloadDecision]:
    def direction(sa: Sa) -> str:
        return "?" if local is None else ("in" if sa.daddr == local else "out")

    return {sa_id: OffloadDecision(status, reason, None, direction(sa)) for sa_id, sa in tunnel.sas.items()}


def _restarts_sequence(spec: SaSpec, actual_sas: Collection[SaSpec]) -> bool:
    """Return whether VPP would send with an SA that it does not have yet. Other UDP ports do not make another SA."""
    return not any(sa.spi == spec.spi and sa.with_ports() == spec.with_ports() for sa in actual_sas)


def _blocking_decision(
    tunnel: Tunnel, decisions: Mapping[SaId, OffloadDecision], has_outbound: bool, has_inbound: bool, refused: str
) -> OffloadDecision | None:
    """Return why VPP makes no tunnel although it could carry some of its SAs, None where it makes one."""
    if refused:
        return OffloadDecision(OffloadStatus.UNSUPPORTED, refused)
    if not tunnel.policies:
        return OffloadDecision(OffloadStatus.PENDING, "no policy uses it")
    for present, name in ((has_outbound, "out"), (has_inbound, "in")):
        if present:
            continue
        for decision in decisions.values():
            if decision.direction == name:
                return OffloadDecision(OffloadStatus.UNSUPPORTED, f"its {name}bound counterpart: {decision.reason}")
        return OffloadDecision(OffloadStatus.PENDING, f"there is no {name}bound SA yet")
    return None


def _why_no_policy_protects(tunnel: Tunnel) -> str:
    """Return why none of a tunnel's outbound policies protects packets in VPP; empty where one does or there is none.

    Policies with an if_id (VTI) select no packets themselves: there the kernel's routes over that interface decide.
    """
    reasons = [
        why_not_protected(policy)
        for policy in tunnel.policies.values()
        if policy.direction == PolicyDir.OUT and policy.action == PolicyAction.ALLOW and not policy.if_id
    ]
    return reasons[-1] if reasons and all(reasons) else ""
