"""What status says of tunnels and policies, as plain JSON-able values: which exist, and where VPP leads their packets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from vppipsec.kernel.text import format_addr, format_mark, format_prefix, format_selector
from vppipsec.kernel.xfrm.sad_spd import Group, GroupKey, groups_of_policy
from vppipsec.kernel.xfrm.values import Policy, PolicyAction, PolicyDir, PolicyId, PolicyType
from vppipsec.status.state import (
    PENDING,
    REFUSED,
    REKEYING,
    SYNCED,
    UNSUPPORTED,
    connected,
    name_of,
    refusal_of_route,
    say_refusals,
    standing_of,
    verdict_on,
)
from vppipsec.status.summary import MODES
from vppipsec.sync.actual.backoff import OUTBOUND
from vppipsec.sync.actual.vpp_state import GroupState
from vppipsec.sync.desired.gre_ipip import deciding
from vppipsec.sync.desired.outbound_policy import Outbound, is_marked
from vppipsec.sync.desired.policy_layers import Fixed, How, Junction, Place, Target, Wanted
from vppipsec.sync.desired.routes import Split
from vppipsec.sync.desired.selectors import widest_rule
from vppipsec.sync.desired.tunnel import remote_of, why_not_vpps
from vppipsec.sync.engine import Engine
from vppipsec.vpp.gre_ipip import Overlay
from vppipsec.vpp.state.policy_layers import Stack
from vppipsec.vpp.types import NO_INDEX, Prefix, Route, Rule, interfaces_of

Row = dict[str, Any]

ROUTED, DROPPED, IN_CLEAR, NOT_CARRIED = "routed", "dropped", "in clear", "not carried"
TO_KERNEL = "to the kernel"
BY_ROUTE, BY_RULES, BY_PROTECTION = "route", "rules", "protection"
"""By what VPP tells a policy's packets: their destination alone, or an ACL's rules before their destination, or that they are the
packets of an interface of others."""
_DIRECTIONS: dict[int, str] = {PolicyDir.IN: "in", PolicyDir.OUT: "out", PolicyDir.FWD: "fwd"}
_GRAVITY = (REFUSED, REKEYING, PENDING, UNSUPPORTED)
"""Which state of an SA tells most of its tunnel."""
_NOT_KNOWN: Mapping[GroupKey, int] = MappingProxyType({})


class Acl(NamedTuple):
    """The ACL that the packets which a tunnel decrypts are held against."""

    acl_index: int
    rules: tuple[Rule, ...]

    @property
    def denials(self) -> tuple[int, ...]:
        """Numbers of the rules by which packets are dropped."""
        return tuple(number for number, rule in enumerate(self.rules) if not rule.permit)


def acls_of(engine: Engine, peer: bytes | None = None) -> dict[GroupKey, Acl]:
    """Return the ACL of each tunnel, or of each of a peer, that VPP uses with the rules that it shall have."""
    return {
        key: Acl(held.acl, held.rules)
        for key, state in engine.groups.items()
        if (peer is None or peer in (key.low, key.high))
        and (held := state.held).acl is not None
        and held.filtered
        and (want := state.desired.tunnel) is not None
        and want.admitted == held.rules  # else VPP may be about to replace them, and to count by their numbers
    }


def tunnel_rows(
    engine: Engine, peer: bytes | None = None, denied: Mapping[GroupKey, int] = _NOT_KNOWN
) -> Iterator[Row]:
    """Return a row for each group of SAs and policies; in between the engine may go on.

    `denied` is how many packets VPP decrypted and then dropped, since they are outside of the selectors, where that is known.
    """
    for key in dict.fromkeys((*engine.model.groups, *engine.groups)):
        if peer is not None and peer not in (key.low, key.high):
            continue
        group, state = engine.model.groups.get(key), engine.groups.get(key)
        if group is not None or state is not None:
            yield _tunnel(key, group or Group(key), state, engine) | {"denied": denied.get(key)}


def policy_rows(engine: Engine, peer: bytes | None = None) -> Iterator[Row]:
    """Return a row for each kernel policy, those that go first at the top; in between the engine may go on."""
    steered = {each.policy.id: (each, place) for each, place in engine.steerer.outbound_policies()}
    muted = _muted(engine, [each for each, _ in steered.values()])
    for policy in sorted(engine.model.policies(), key=lambda policy: policy.priority):
        ends = [end for key in groups_of_policy(policy) for end in (key.low, key.high)]
        if peer is None or peer in ends:
            yield _policy(policy, steered.get(policy.id), engine, muted.get(policy.id, ()))


def _muted(engine: Engine, policies: Sequence[Outbound]) -> Mapping[PolicyId, Sequence[str]]:
    """Return the interfaces of others that send nothing since nobody's SAs can protect them, by the policies that want it."""
    names: dict[PolicyId, list[str]] = {}
    for overlay, key in engine.steerer.overlayer.claims.guarded.items():
        if key is None:
            for policy_id in {each.policy.id for each in deciding(overlay, policies)}:
                names.setdefault(policy_id, []).append(overlay.name)
    return names


def _tunnel(key: GroupKey, group: Group, state: GroupState | None, engine: Engine) -> Row:
    there = connected(engine)
    verdicts = [verdict_on(sa_id, state, there) for sa_id in group.sas]
    index = state.held.sw_if_index if state is not None and there else None
    local, remote = _ends(key, group, engine)
    standing, reason = _state_of_tunnel(group, state, engine)
    return {
        "local": format_addr(local),
        "remote": format_addr(remote),
        "mode": MODES.get(key.mode, str(key.mode)),
        "reqid": key.reqid,
        "if_id": key.if_id,
        "tunnel": name_of(state.held) if state is not None and there else "",
        "inbound": sum(verdict.direction == "in" for verdict in verdicts),
        "outbound": sum(verdict.direction == "out" for verdict in verdicts),
        "policies": len(group.policies),
        "routes": sorted({_shown(route.prefix) for route in engine.vpp.routes.into(index)})
        if index is not None
        else [],
        "own_packets": engine.hosts.say(group, state) if there else "",
        "state": standing,
        "reason": reason,
    }


def _ends(key: GroupKey, group: Group, engine: Engine) -> tuple[bytes, bytes]:
    """Return the local and the remote end, in any order where neither is ours."""
    remote = remote_of(key, group, engine.surroundings.env.addresses)
    return (key.high, key.low) if remote == key.low else (key.low, key.high)


def _state_of_tunnel(group: Group, state: GroupState | None, engine: Engine) -> tuple[str, str]:
    """Return state and reason of a group: those of the SA that is worst off, or of what else is wrong."""
    there = connected(engine)
    if state is not None and there and (refusals := say_refusals(state.refusals)):
        return REFUSED, "; ".join(refusals)
    standings = [standing_of(verdict_on(sa_id, state, there), state) for sa_id in group.sas]
    carried = state is not None and there and state.desired.tunnel is not None
    worst = _GRAVITY if not carried else (REFUSED, REKEYING, PENDING)
    for name in worst:
        for standing in standings:
            if standing.state == name:
                return standing.state, standing.reason
    if not standings:
        return PENDING, "there is no SA" if group.policies else "being removed from VPP"
    left_out = sum(standing.state == UNSUPPORTED for standing in standings)
    return SYNCED, f"without {left_out} of its SAs: see `show sa`" if left_out else ""


def _policy(policy: Policy, found: tuple[Outbound, Place | None] | None, engine: Engine, muted: Sequence[str]) -> Row:
    action = {PolicyAction.ALLOW.value: "allow", PolicyAction.BLOCK.value: "block"}.get(policy.action, "?")
    steered = _steered(policy, found, engine)
    return {
        "selector": format_selector(policy.selector),
        "direction": _DIRECTIONS.get(policy.direction, str(policy.direction)),
        "action": action,
        "priority": policy.priority,
        "type": "sub" if policy.type == PolicyType.SUB else "main",
        "reqid": policy.templates[0].reqid if policy.templates else 0,
        "if_id": policy.if_id,
        "mark": format_mark(policy.mark),
        "peers": [f"{format_addr(t.saddr)} > {format_addr(t.daddr)}" for t in policy.templates],
        "steering": steered.what,
        "by": steered.by,
        "route": _shown(steered.prefix) if steered.prefix is not None else "",
        "tunnel": steered.tunnel,
        "reason": "; ".join(filter(None, [steered.reason, *(f"{name} sends nothing" for name in muted)])),
    }


_SHADOWED = "others before it take all its packets"
_FRAGMENTS = "so do fragments of its protocol, but the first, that no policy without ports takes"


def _has_ports(policy: Policy) -> bool:
    return bool(policy.selector.sport_mask or policy.selector.dport_mask)


class _Steered(NamedTuple):
    """What VPP does with the packets of a policy: by what means, along which route, into which tunnel, and why not."""

    what: str
    by: str = ""
    prefix: Prefix | None = None
    tunnel: str = ""
    reason: str = ""


def _steered(policy: Policy, found: tuple[Outbound, Place | None] | None, engine: Engine) -> _Steered:
    if policy.direction != PolicyDir.OUT:
        return _Steered("")
    if not connected(engine):
        return _Steered(PENDING, reason="VPP is not connected")
    if found is None or found[0].policy != policy:
        return _Steered(PENDING, reason=engine.steerer.mistakes.get(OUTBOUND, "not looked at yet"))
    wanted, place, why = found[0].wanted, found[1], found[0].reason
    if wanted is not None and isinstance(wanted.target, GroupKey):
        overlay = engine.surroundings.env.overlays.get(wanted.target)
        if overlay is not None:
            return _for_overlay(overlay, wanted.target, engine)
    if policy.if_id and engine.vtis.followed:
        return _of_vti(policy, wanted, place, why, engine)
    if wanted is None or place is None:
        return _Steered(NOT_CARRIED, reason=why)
    if place.how is How.NEEDLESS:
        return _Steered(IN_CLEAR, reason="it needs nothing in VPP: no policy after it would take its packets")
    if place.how is How.ROUTE:
        return _led(Route(wanted.rules[0].dst), BY_ROUTE, wanted.target, why, engine)
    if place.how is How.LAYER and wanted.target is Fixed.CLEAR:
        return _Steered(IN_CLEAR, BY_RULES, reason=_FRAGMENTS if _has_ports(policy) else "")
    return _by_rules(wanted, place, why, engine)


def _by_rules(wanted: Wanted, place: Place, why: str, engine: Engine, if_id: int = 0) -> _Steered:
    """Tell where rules lead, those that interfaces ask or those of the junction of a VTI."""
    if place.how is How.SHADOWED:
        return _Steered(NOT_CARRIED, reason=_SHADOWED if if_id else f"{_SHADOWED}, or they are for the router itself")
    prefix = wanted.rules[0].dst
    if place.dropped:
        return _Steered(DROPPED, BY_RULES, prefix, reason="more policies overlap here than VPP is given rules for")
    layers = engine.vpp.layers.of(Stack(len(prefix.address) == 16, if_id))
    if place.layers[0] >= len(layers):
        return _Steered(PENDING, BY_RULES, prefix, reason="being programmed")
    return _led(Route(prefix, layers[place.layers[0]].number), BY_RULES, wanted.target, why, engine)


def _for_overlay(overlay: Overlay, target: GroupKey, engine: Engine) -> _Steered:
    """Tell whether an interface of others sends with the SAs of a group."""
    state, group = engine.groups.get(target), engine.model.groups.get(target)
    if state is None or group is None:
        return _Steered(PENDING, BY_PROTECTION, None, overlay.name, "not looked at yet")
    standing, reason = _state_of_tunnel(group, state, engine)
    what = ROUTED if standing == SYNCED else IN_CLEAR if overlay.has_several_remotes else DROPPED
    return _Steered(what, BY_PROTECTION, None, overlay.name, reason)


def _of_vti(policy: Policy, wanted: Wanted | None, place: Place | None, why: str, engine: Engine) -> _Steered:
    """Tell which of the kernel's routes over a policy's VTI lead into its tunnel, or to where rules do.

    `wanted` and `place` are what those rules are made of, None where there are none.
    """
    vti, leads = engine.vtis.link(policy.if_id), engine.vtis.leads
    if vti is None:
        return _Steered(NOT_CARRIED, reason=f"there is no interface with if_id {policy.if_id}")
    if is_marked(policy):
        return _Steered(NOT_CARRIED, reason="its policy matches a firewall mark: packets in VPP carry none")
    keys = groups_of_policy(policy)
    if policy.action == PolicyAction.BLOCK or len(keys) != 1:
        by = BY_ROUTE if place is None else BY_RULES
        return _Steered(DROPPED, by, reason=f"it lets nothing that is routed over {vti.name} pass")
    destination = widest_rule(policy.selector).dst
    aim = keys[0] if place is None else Junction(policy.if_id)
    routes = sorted(
        Route(prefix, number)
        for number, table in leads.routes.items()
        for prefix, target in table.items()
        if prefix.meets(destination) and aim in (target.targets if isinstance(target, Split) else (target,))
    )
    left_out = [
        f"{_shown(left.prefix)} is left out: {reason}"
        for left, reason in leads.left_out.items()
        if left.prefix.meets(destination)
    ]
    if not routes:
        state = "" if vti.up else ", which is down,"
        return _Steered(NOT_CARRIED, reason="; ".join([f"no route over {vti.name}{state} leads to it", *left_out]))
    if wanted is None or place is None:
        first, are_told = _led(routes[0], BY_ROUTE, keys[0], "", engine), len(routes) > 1 or bool(routes[0].table)
    else:
        first, are_told = _by_rules(wanted, place, why, engine, policy.if_id), True
    notes = [f"routes over {vti.name}: {', '.join(map(_where, routes))}"] if are_told else []
    return first._replace(reason="; ".join(filter(None, [first.reason, *notes, *left_out])))


def _where(route: Route) -> str:
    return _shown(route.prefix) + (f" table {route.table}" if route.table else "")


def _led(route: Route, by: str, target: Target, why: str, engine: Engine) -> _Steered:
    """Tell where a route leads that is to lead to a target."""
    if not isinstance(target, GroupKey):
        return _Steered(DROPPED, by, route.prefix, reason=why or "it blocks")
    state, group = engine.groups.get(target), engine.model.groups.get(target)
    if state is None or group is None:
        return _Steered(PENDING, by, route.prefix, reason="not looked at yet")
    if refusal := refusal_of_route(route, state):
        return _Steered(REFUSED, by, route.prefix, reason=refusal)
    index, fallback = engine.vpp.routes.get(route, NO_INDEX), engine.steerer.fallbacks.get(target)
    if fallback is not None and fallback.target is not None and index == fallback.target.sw_if_index:
        return _Steered(TO_KERNEL, by, route.prefix, reason=_state_of_tunnel(group, state, engine)[1])
    want = state.desired.tunnel
    lacks_sas = want is not None and not want.outbound
    if index != NO_INDEX and state.held.sw_if_index in interfaces_of(index) and not lacks_sas:
        return _Steered(ROUTED, by, route.prefix, name_of(state.held))
    if lacks_sas or (index == NO_INDEX and want is None):
        reason = why_not_vpps(target, group, engine.surroundings.env) or _state_of_tunnel(group, state, engine)[1]
        if fallback is not None and fallback.reason:
            reason += f"; {fallback.reason}"
        return _Steered(DROPPED, by, route.prefix, reason=reason)
    return _Steered(PENDING, by, route.prefix, reason="being programmed")


def _shown(prefix: Prefix) -> str:
    return format_prefix(*prefix)
