"""From the kernel's SAs and policies of one group to what VPP shall hold. Pure: no I/O, no state.

This is where it is decided what VPP carries. Whoever asks why a tunnel is not offloaded finds the answer, and its wording, here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Set
from types import MappingProxyType

from vppipsec.kernel.text import format_addr
from vppipsec.kernel.xfrm.sad_spd import Group, GroupKey
from vppipsec.kernel.xfrm.values import (
    PolicyAction,
    PolicyDir,
    PolicyType,
    Sa,
    SaDir,
    SaId,
)
from vppipsec.sync.desired.algorithms import Unsupported
from vppipsec.sync.desired.environment import Environment
from vppipsec.sync.desired.mtu import longest_inner
from vppipsec.sync.desired.outbound_policy import is_marked, why_not_led
from vppipsec.sync.desired.sa import direction_of, verdict_on
from vppipsec.sync.desired.selectors import rules_of
from vppipsec.sync.desired.state import Desired, Fate, Tunnel, Verdict
from vppipsec.vpp.ownership import TAG_PREFIX
from vppipsec.vpp.types import DEFAULT_MTU, MAX_INBOUND_SAS, Prefix, Rule, SaSpec, everything

_WORN = "its sequence numbers were used before this VPP could go on with them; the IKE daemon is asked to rekey"
_NOTHING: Mapping[SaId, Verdict] = MappingProxyType({})
_NO_ROUTES: Mapping[Prefix, int] = MappingProxyType({})


def tag_of(key: GroupKey) -> str:
    """Return the interface tag of a group: short, the same in every run, different for every group."""
    text = f"{key.low.hex()} {key.high.hex()} {key.mode} {key.reqid} {key.if_id}"
    return TAG_PREFIX + hashlib.sha256(text.encode()).hexdigest()[:20]


def translate(
    key: GroupKey,
    group: Group,
    env: Environment,
    before: Mapping[SaId, Verdict] = _NOTHING,
    worn: Set[SaId] = frozenset(),
    held: Collection[SaSpec] = (),
) -> Desired:
    """Return what VPP shall hold for a group, and what becomes of each of its SAs.

    `before` may hold verdicts of an earlier translation in the same environment: those on the same SAs are used again.
    `worn` are SAs whose sequence numbers were used: where VPP would carry an outbound one of them it must not start at 1 again,
    unless it is one of those that VPP has, `held`, and goes on. While all of them are to be rekeyed the tunnel is there without
    SAs: nothing passes, and what leads there, the kernel's ways to its host interface included, is in place when others come.
    """
    local, remote = ends_of(key, group, env.addresses)
    if local is None or remote is None:
        return Desired(key, verdicts=_all(group, Fate.UNSUPPORTED, _not_ours(key)))
    if remote in env.unreachable:
        return Desired(key, verdicts=_all(group, Fate.UNSUPPORTED, _not_reached(remote), local))
    overlay = env.overlays.get(key)
    ip6 = any(len(policy.selector.daddr) == 16 for policy in group.policies.values())
    table = 0 if overlay is not None or env.vtis is None or not key.if_id else env.vtis.get(key.if_id)
    if table is None:  # it may be in a VRF when it comes; until then the kernel drops, too
        reason = f"there is no interface with if_id {key.if_id}"
        return Desired(key, verdicts=_all(group, Fate.PENDING, reason, local))
    if table and (lacking := {(table, False), (table, ip6)} - env.tables):
        family = "IPv4" if (table, False) in lacking else "IPv6"
        reason = f"VPP has no {family} table {table}, the one of its VTI's VRF"
        return Desired(key, verdicts=_all(group, Fate.UNSUPPORTED, reason, local))
    verdicts = {}
    for sa_id, sa in group.sas.items():
        known = before.get(sa_id)
        fresh = known is None or known.sa is not sa or known.fate is Fate.REKEYING
        verdicts[sa_id] = verdict_on(sa, local, env, overlay) if fresh or known is None else known
    outbound = {sa_id: v.spec for sa_id, v in verdicts.items() if v.spec is not None and not v.spec.inbound}
    inbound = [(sa_id, v.spec) for sa_id, v in verdicts.items() if v.spec is not None and v.spec.inbound]
    unfilterable = ""
    try:
        admitted = admitted_by(group) if env.enforces and overlay is None else None
    except Unsupported as why:
        admitted, unfilterable = None, str(why)
    if table and not ip6 and not env.enforces:  # linux-nl lets IPv6 out of each interface with a host interface
        admitted = _IP4_ALONE
    refused = unfilterable or _why_nothing_is_led(group)
    missing = _what_is_missing(group, verdicts, bool(outbound), bool(inbound), refused)
    if missing is not None:
        return Desired(key, None, _held_up(verdicts, missing))
    newest = list(outbound.values())[-1]
    for sa_id in [sa_id for sa_id in outbound if sa_id in worn and _begins_anew(outbound[sa_id], held)]:
        del outbound[sa_id]
        verdicts[sa_id] = Verdict(Fate.REKEYING, _WORN, None, "out", group.sas[sa_id])
    if not outbound:
        verdicts, inbound = _held_up(verdicts, Verdict(Fate.PENDING, "its outbound counterpart is being rekeyed")), []
    for sa_id, spec in inbound[:-MAX_INBOUND_SAS]:
        reason = f"VPP takes {MAX_INBOUND_SAS} inbound SAs per tunnel; the newest are used"
        verdicts[sa_id] = Verdict(Fate.UNSUPPORTED, reason, None, direction_of(spec))
    tunnel = Tunnel(
        tag=tag_of(key),
        lender=env.addresses[local],
        ip6=ip6,
        outbound=tuple(outbound.values()),
        inbound=tuple(spec for _, spec in inbound[-MAX_INBOUND_SAS:]),
        admitted=admitted,
        overlay=overlay,
        mtu=_mtu(key, remote, newest, env),
        table=table,
    )
    return Desired(key, tunnel, verdicts)


def _held_up(verdicts: Mapping[SaId, Verdict], by: Verdict) -> dict[SaId, Verdict]:
    """Return verdicts on SAs that could be carried, but for what holds up their tunnel, and on those that could not."""
    held_up = {i: by if v.spec is not None else v for i, v in verdicts.items()}
    return {i: Verdict(v.fate, v.reason, None, verdicts[i].direction) for i, v in held_up.items()}


def _mtu(key: GroupKey, remote: bytes, sa: SaSpec, env: Environment) -> int:
    """Return how long packets into a tunnel may be, bytes, 0 where that does not matter."""
    if key.if_id in env.told_apart:
        return DEFAULT_MTU
    link_mtu = env.link_mtus.get(remote, 0) if key.if_id else 0
    return longest_inner(link_mtu, sa) if link_mtu else 0


_DENIALS = tuple(Rule(False, everything(ip6), everything(ip6)) for ip6 in (False, True))
_IP4_ALONE = (Rule(True, everything(False), everything(False)), *_DENIALS)


def admitted_by(group: Group) -> tuple[Rule, ...]:
    """Return the rules that decrypted packets of a group are held against: those that a policy of it lets in, and no others.

    The kernel asks the `in` policies about packets to itself and the `fwd` ones about those that it hands on
    (__xfrm_policy_check, net/xfrm/xfrm_policy.c); IKE daemons install both alike. The last two rules are there to count what is
    denied. Raises Unsupported where VPP cannot tell what a policy lets in.
    """
    rules = {
        rule
        for policy in group.policies.values()
        if policy.direction in (PolicyDir.IN, PolicyDir.FWD)
        and policy.action == PolicyAction.ALLOW
        and policy.type == PolicyType.MAIN
        and not is_marked(policy)
        for rule in rules_of(policy.selector)
    }
    return (*sorted(rules), *_DENIALS)


def remote_of(key: GroupKey, group: Group, addresses: Mapping[bytes, int]) -> bytes | None:
    """Return the end of a group that is not ours, for asking VPP whether it reaches it; None where no end is ours."""
    return ends_of(key, group, addresses)[1]


def why_not_vpps(key: GroupKey, group: Group, env: Environment) -> str:
    """Say why a group is none of VPP's business; nothing where it is."""
    local, remote = ends_of(key, group, env.addresses)
    if local is None or remote is None:
        return _not_ours(key)
    return _not_reached(remote) if remote in env.unreachable else ""


def _not_ours(key: GroupKey) -> str:
    return f"neither {format_addr(key.low)} nor {format_addr(key.high)} is on a VPP interface"


def _not_reached(remote: bytes) -> str:
    return f"VPP has no route to {format_addr(remote)}"


def ends_of(key: GroupKey, group: Group, addresses: Mapping[bytes, int]) -> tuple[bytes | None, bytes | None]:
    """Tell local end from remote end. Where both are on VPP interfaces, direction flags and outbound policies decide."""
    low, high = key.low in addresses, key.high in addresses
    if low and not high:
        return key.low, key.high
    if high and not low:
        return key.high, key.low
    if not low:
        return None, None
    for sa in group.sas.values():
        if sa.direction == SaDir.OUT:
            return sa.saddr, sa.daddr
        if sa.direction == SaDir.IN:
            return sa.daddr, sa.saddr
    for policy in group.policies.values():
        if policy.direction == PolicyDir.OUT:
            for template in policy.templates:
                if {template.saddr, template.daddr} == {key.low, key.high}:
                    return template.saddr, template.daddr
    return key.low, key.high


def _all(group: Group, fate: Fate, reason: str, local: bytes | None = None) -> dict[SaId, Verdict]:
    def direction(sa: Sa) -> str:
        return "?" if local is None else ("in" if sa.daddr == local else "out")

    return {sa_id: Verdict(fate, reason, None, direction(sa)) for sa_id, sa in group.sas.items()}


def _begins_anew(spec: SaSpec, held: Collection[SaSpec]) -> bool:
    """Tell whether VPP would send with an SA that it does not have, not even with other ports."""
    return not any(sa.spi == spec.spi and sa.moved() == spec.moved() for sa in held)


def _what_is_missing(
    group: Group, verdicts: Mapping[SaId, Verdict], has_outbound: bool, has_inbound: bool, refused: str
) -> Verdict | None:
    """Return why the group makes no tunnel in VPP although some of its SAs could be carried, or None where it does."""
    if refused:
        return Verdict(Fate.UNSUPPORTED, refused)
    if not group.policies:
        return Verdict(Fate.PENDING, "no policy uses it")
    for present, name in ((has_outbound, "out"), (has_inbound, "in")):
        if present:
            continue
        for verdict in verdicts.values():
            if verdict.direction == name:
                return Verdict(Fate.UNSUPPORTED, f"its {name}bound counterpart: {verdict.reason}")
        return Verdict(Fate.PENDING, f"there is no {name}bound SA yet")
    return None


def _why_nothing_is_led(group: Group) -> str:
    """Return why none of a group's outbound policies leads anything into its tunnel; nothing where one does or none is there.

    Policies with an if_id (VTI) lead nothing themselves: the kernel's routes over that interface decide there.
    """
    reasons = [
        why_not_led(policy)
        for policy in group.policies.values()
        if policy.direction == PolicyDir.OUT and policy.action == PolicyAction.ALLOW and not policy.if_id
    ]
    return reasons[-1] if reasons and all(reasons) else ""
