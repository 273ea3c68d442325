"""Answers about tunnels and policies, as values for JSON: which exist, and where VPP sends their packets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from vppipsec.kernel.text import format_addr, format_mark, format_prefix, format_selector
from vppipsec.kernel.xfrm.sad_spd import Tunnel, TunnelKey, tunnel_keys_of_policy
from vppipsec.kernel.xfrm.values import Policy, PolicyAction, PolicyDir, PolicyId, PolicyType
from vppipsec.status.state import (
    PENDING,
    REFUSED,
    REKEYING,
    SYNCED,
    UNSUPPORTED,
    current_decision,
    interface_name,
    is_connected,
    refusal_of_route,
    refusal_texts,
    sa_state_of,
)
from vppipsec.status.summary import MODES
from vppipsec.sync.actual.backoff import OUTBOUND_POLICIES
from vppipsec.sync.actual.vpp_state import TunnelState
from vppipsec.sync.desired.gre_ipip import deciding_policies
from vppipsec.sync.desired.outbound_policy import OutboundPolicy, matches_mark
from vppipsec.sync.desired.policy_layers import Action, Placement, PlacementKind, PolicyRules, Target, VtiClassifier
from vppipsec.sync.desired.routes import WeightedTargets
from vppipsec.sync.desired.selectors import widest_rule
from vppipsec.sync.desired.tunnel import remote_endpoint, why_not_offloadable
from vppipsec.sync.engine import Engine
from vppipsec.vpp.gre_ipip import GreIpipInterface
from vppipsec.vpp.state.policy_layers import StackKey
from vppipsec.vpp.types import NO_INDEX, Prefix, Route, Rule, interfaces_of

Row = dict[str, Any]

ROUTED, DROPPED, BYPASSED, NOT_CARRIED = "routed", "dropped", "in clear", "not carried"
TO_KERNEL = "to the kernel"
BY_ROUTE, BY_RULES, BY_PROTECTION = "route", "rules", "protection"
"""How VPP matches a policy's packets: by destination alone (route), by ACL rules and then by destination (rules), or by the
protected gre or ipip interface that sends them (protection)."""
_DIRECTIONS: dict[int, str] = {PolicyDir.IN: "in", PolicyDir.OUT: "out", PolicyDir.FWD: "fwd"}
_WORST_FIRST = (REFUSED, REKEYING, PENDING, UNSUPPORTED)
"""States of SAs, the one that decides the state of its tunnel first."""
_NOT_KNOWN: Mapping[TunnelKey, int] = MappingProxyType({})


class Acl(NamedTuple):
    """The ACL that VPP applies to the packets that a tunnel decrypts."""

    acl_index: int
    rules: tuple[Rule, ...]

    @property
    def denials(self) -> tuple[int, ...]:
        """Numbers of the rules that deny packets."""
        return tuple(number for number, rule in enumerate(self.rules) if not rule.permit)


def acls_of(engine: Engine, peer: bytes | None = None) -> dict[TunnelKey, Acl]:
    """Return the applied ACL of each tunnel, or of each tunnel of a peer, if its rules are the desired ones."""
    return {
        key: Acl(actual.acl, actual.rules)
        for key, state in engine.tunnels.items()
        if (peer is None or peer in (key.low, key.high))
        and (actual := state.actual).acl is not None
        and actual.acl_applied
        and (want := state.desired.tunnel) is not None
        and want.inbound_rules == actual.rules  # else new rules may come, and counters are by number of rule
    }


def tunnel_rows(
    engine: Engine, peer: bytes | None = None, denied: Mapping[TunnelKey, int] = _NOT_KNOWN
) -> Iterator[Row]:
    """Yield a row for each tunnel, in the kernel or in VPP. The engine may run between two rows.

    `denied` has the number of packets that VPP decrypted and then dropped, because they are outside of the selectors, if known.
    """
    for key in dict.fromkeys((*engine.model.tunnels, *engine.tunnels)):
        if peer is not None and peer not in (key.low, key.high):
            continue
        tunnel, state = engine.model.tunnels.get(key), engine.tunnels.get(key)
        if tunnel is not None or state is not None:
            yield _tunnel_row(key, tunnel or Tunnel(key), state, engine) | {"denied": denied.get(key)}


def policy_rows(engine: Engine, peer: bytes | None = None) -> Iterator[Row]:
    """Yield a row for each kernel policy, by priority. The engine may run between two rows."""
    steered = {each.policy.id: (each, place) for each, place in engine.steering.outbound_policies()}
    blocked = _blocked_interfaces(engine, [each for each, _ in steered.values()])
    for policy in sorted(engine.model.policies(), key=lambda policy: policy.priority):
        ends = [end for key in tunnel_keys_of_policy(policy) for end in (key.low, key.high)]
        if peer is None or peer in ends:
            yield _policy_row(policy, steered.get(policy.id), engine, blocked.get(policy.id, ()))


def _blocked_interfaces(engine: Engine, policies: Sequence[OutboundPolicy]) -> Mapping[PolicyId, Sequence[str]]:
    """Return the blocked gre and ipip interfaces that no tunnel's SAs can protect, by the policies that require encryption."""
    names: dict[PolicyId, list[str]] = {}
    for gre_ipip, key in engine.steering.gre_ipip.claims.must_encrypt.items():
        if key is None:
            for policy_id in {each.policy.id for each in deciding_policies(gre_ipip, policies)}:
                names.setdefault(policy_id, []).append(gre_ipip.name)
    return names


def _tunnel_row(key: TunnelKey, tunnel: Tunnel, state: TunnelState | None, engine: Engine) -> Row:
    has_vpp = is_connected(engine)
    decisions = [current_decision(sa_id, state, has_vpp) for sa_id in tunnel.sas]
    index = state.actual.sw_if_index if state is not None and has_vpp else None
    local, remote = _tunnel_ends(key, tunnel, engine)
    state_name, reason = _state_of_tunnel(tunnel, state, engine)
    return {
        "local": format_addr(local),
        "remote": format_addr(remote),
        "mode": MODES.get(key.mode, str(key.mode)),
        "reqid": key.reqid,
        "if_id": key.if_id,
        "tunnel": interface_name(state.actual) if state is not None and has_vpp else "",
        "inbound": sum(decision.direction == "in" for decision in decisions),
        "outbound": sum(decision.direction == "out" for decision in decisions),
        "policies": len(tunnel.policies),
        "routes": sorted({_shown(route.prefix) for route in engine.vpp.routes.into(index)})
        if index is not None
        else [],
        "own_packets": engine.host_interfaces.own_packets_text(tunnel, state) if has_vpp else "",
        "state": state_name,
        "reason": reason,
    }


def _tunnel_ends(key: TunnelKey, tunnel: Tunnel, engine: Engine) -> tuple[bytes, bytes]:
    """Return the local and the remote endpoint, in either order if neither is an address of this router."""
    remote = remote_endpoint(key, tunnel, engine.environment.snapshot.addresses)
    return (key.high, key.low) if remote == key.low else (key.low, key.high)


def _state_of_tunnel(tunnel: Tunnel, state: TunnelState | None, engine: Engine) -> tuple[str, str]:
    """Return state and reason of a tunnel: VPP's refusals, else those of its SA in the worst state."""
    has_vpp = is_connected(engine)
    if state is not None and has_vpp and (refusals := refusal_texts(state.refusals)):
        return REFUSED, "; ".join(refusals)
    sa_states = [sa_state_of(current_decision(sa_id, state, has_vpp), state) for sa_id in tunnel.sas]
    carried = state is not None and has_vpp and state.desired.tunnel is not None
    worst = _WORST_FIRST if not carried else (REFUSED, REKEYING, PENDING)
    for name in worst:
        for sa_state in sa_states:
            if sa_state.state == name:
                return sa_state.state, sa_state.reason
    if not sa_states:
        return PENDING, "there is no SA" if tunnel.policies else "being removed from VPP"
    left_out = sum(sa_state.state == UNSUPPORTED for sa_state in sa_states)
    return SYNCED, f"without {left_out} of its SAs: see `show sa`" if left_out else ""


def _policy_row(
    policy: Policy, found: tuple[OutboundPolicy, Placement | None] | None, engine: Engine, blocked: Sequence[str]
) -> Row:
    action = {PolicyAction.ALLOW.value: "allow", PolicyAction.BLOCK.value: "block"}.get(policy.action, "?")
    steered = _policy_state(policy, found, engine)
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
        "steering": steered.action,
        "by": steered.by,
        "route": _shown(steered.prefix) if steered.prefix is not None else "",
        "tunnel": steered.tunnel,
        "reason": "; ".join(filter(None, [steered.reason, *(f"{name} sends nothing" for name in blocked)])),
    }


_SHADOWED = "others before it take all its packets"
_FRAGMENTS = "so do fragments of its protocol, but the first, that no policy without ports takes"


def _has_ports(policy: Policy) -> bool:
    return bool(policy.selector.sport_mask or policy.selector.dport_mask)


class _PolicyState(NamedTuple):
    """What VPP does with a policy's packets: the action, how VPP matches them, the route, the tunnel and the reason."""

    action: str
    by: str = ""
    prefix: Prefix | None = None
    tunnel: str = ""
    reason: str = ""


def _policy_state(
    policy: Policy, found: tuple[OutboundPolicy, Placement | None] | None, engine: Engine
) -> _PolicyState:
    if policy.direction != PolicyDir.OUT:
        return _PolicyState("")
    if not is_connected(engine):
        return _PolicyState(PENDING, reason="VPP is not connected")
    if found is None or found[0].policy != policy:
        return _PolicyState(PENDING, reason=engine.steering.internal_errors.get(OUTBOUND_POLICIES, "not looked at yet"))
    wanted, place, why = found[0].policy_rules, found[1], found[0].reason
    if wanted is not None and isinstance(wanted.target, TunnelKey):
        gre_ipip = engine.environment.snapshot.gre_ipip.get(wanted.target)
        if gre_ipip is not None:
            return _gre_ipip_state(gre_ipip, wanted.target, engine)
    if policy.if_id and engine.vtis.followed:
        return _vti_policy_state(policy, wanted, place, why, engine)
    if wanted is None or place is None:
        return _PolicyState(NOT_CARRIED, reason=why)
    if place.kind is PlacementKind.UNNEEDED:
        return _PolicyState(BYPASSED, reason="it needs nothing in VPP: no policy after it would take its packets")
    if place.kind is PlacementKind.ROUTE:
        return _route_state(Route(wanted.rules[0].dst), BY_ROUTE, wanted.target, why, engine)
    if place.kind is PlacementKind.LAYER and wanted.target is Action.BYPASS:
        return _PolicyState(BYPASSED, BY_RULES, reason=_FRAGMENTS if _has_ports(policy) else "")
    return _rules_state(wanted, place, why, engine)


def _rules_state(wanted: PolicyRules, place: Placement, why: str, engine: Engine, if_id: int = 0) -> _PolicyState:
    """Return where ACL rules send packets: those of all interfaces, or with `if_id` those of a VTI classifier."""
    if place.kind is PlacementKind.SHADOWED:
        return _PolicyState(
            NOT_CARRIED, reason=_SHADOWED if if_id else f"{_SHADOWED}, or they are for the router itself"
        )
    prefix = wanted.rules[0].dst
    if place.discarded:
        return _PolicyState(DROPPED, BY_RULES, prefix, reason="more policies overlap here than VPP is given rules for")
    layers = engine.vpp.layers.stack(StackKey(len(prefix.address) == 16, if_id))
    if place.layers[0] >= len(layers):
        return _PolicyState(PENDING, BY_RULES, prefix, reason="being programmed")
    return _route_state(Route(prefix, layers[place.layers[0]].number), BY_RULES, wanted.target, why, engine)


def _gre_ipip_state(gre_ipip: GreIpipInterface, target: TunnelKey, engine: Engine) -> _PolicyState:
    """Return whether a gre or ipip interface sends with the SAs of its tunnel."""
    state, tunnel = engine.tunnels.get(target), engine.model.tunnels.get(target)
    if state is None or tunnel is None:
        return _PolicyState(PENDING, BY_PROTECTION, None, gre_ipip.name, "not looked at yet")
    state_name, reason = _state_of_tunnel(tunnel, state, engine)
    what = ROUTED if state_name == SYNCED else BYPASSED if gre_ipip.is_multipoint else DROPPED
    return _PolicyState(what, BY_PROTECTION, None, gre_ipip.name, reason)


def _vti_policy_state(
    policy: Policy, wanted: PolicyRules | None, place: Placement | None, why: str, engine: Engine
) -> _PolicyState:
    """Return which kernel routes over a policy's VTI lead into its tunnel, or where the VTI classifier's rules send them.

    `wanted` and `place` describe those rules. They are None if there are none.
    """
    vti, targets = engine.vtis.link(policy.if_id), engine.vtis.route_targets
    if vti is None:
        return _PolicyState(NOT_CARRIED, reason=f"there is no interface with if_id {policy.if_id}")
    if matches_mark(policy):
        return _PolicyState(NOT_CARRIED, reason="its policy matches a firewall mark: packets in VPP carry none")
    keys = tunnel_keys_of_policy(policy)
    if policy.action == PolicyAction.BLOCK or len(keys) != 1:
        by = BY_ROUTE if place is None else BY_RULES
        return _PolicyState(DROPPED, by, reason=f"it lets nothing that is routed over {vti.name} pass")
    destination = widest_rule(policy.selector).dst
    vti_target = keys[0] if place is None else VtiClassifier(policy.if_id)
    routes = sorted(
        Route(prefix, number)
        for number, table in targets.routes.items()
        for prefix, target in table.items()
        if prefix.overlaps(destination)
        and vti_target in (target.targets if isinstance(target, WeightedTargets) else (target,))
    )
    omitted = [
        f"{_shown(left.prefix)} is left out: {reason}"
        for left, reason in targets.omitted.items()
        if left.prefix.overlaps(destination)
    ]
    if not routes:
        state = "" if vti.up else ", which is down,"
        return _PolicyState(NOT_CARRIED, reason="; ".join([f"no route over {vti.name}{state} leads to it", *omitted]))
    if wanted is None or place is None:
        first, has_notes = (
            _route_state(routes[0], BY_ROUTE, keys[0], "", engine),
            len(routes) > 1 or bool(routes[0].table),
        )
    else:
        first, has_notes = _rules_state(wanted, place, why, engine, policy.if_id), True
    notes = [f"routes over {vti.name}: {', '.join(map(_where, routes))}"] if has_notes else []
    return first._replace(reason="; ".join(filter(None, [first.reason, *notes, *omitted])))


def _where(route: Route) -> str:
    return _shown(route.prefix) + (f" table {route.table}" if route.table else "")


def _route_state(route: Route, by: str, target: Target, why: str, engine: Engine) -> _PolicyState:
    """Return where a route leads, compared with its desired target."""
    if not isinstance(target, TunnelKey):
        return _PolicyState(DROPPED, by, route.prefix, reason=why or "it blocks")
    state, tunnel = engine.tunnels.get(target), engine.model.tunnels.get(target)
    if state is None or tunnel is None:
        return _PolicyState(PENDING, by, route.prefix, reason="not looked at yet")
    if refusal := refusal_of_route(route, state):
        return _PolicyState(REFUSED, by, route.prefix, reason=refusal)
    index, fallback = engine.vpp.routes.get(route, NO_INDEX), engine.steering.fallbacks.get(target)
    if fallback is not None and fallback.target is not None and index == fallback.target.sw_if_index:
        return _PolicyState(TO_KERNEL, by, route.prefix, reason=_state_of_tunnel(tunnel, state, engine)[1])
    want = state.desired.tunnel
    lacks_sas = want is not None and not want.outbound
    if index != NO_INDEX and state.actual.sw_if_index in interfaces_of(index) and not lacks_sas:
        return _PolicyState(ROUTED, by, route.prefix, interface_name(state.actual))
    if lacks_sas or (index == NO_INDEX and want is None):
        reason = (
            why_not_offloadable(target, tunnel, engine.environment.snapshot)
            or _state_of_tunnel(tunnel, state, engine)[1]
        )
        if fallback is not None and fallback.reason:
            reason += f"; {fallback.reason}"
        return _PolicyState(DROPPED, by, route.prefix, reason=reason)
    return _PolicyState(PENDING, by, route.prefix, reason="being programmed")


def _shown(prefix: Prefix) -> str:
    return format_prefix(*prefix)
