"""The state of an SA or a tunnel in VPP: synced, pending, rekeying, unsupported or refused, and why. Only reads the engine."""

from __future__ import annotations

from typing import NamedTuple

from vppipsec.kernel.text import format_prefix
from vppipsec.kernel.xfrm.values import SaId
from vppipsec.sync.actual.backoff import Refusals, RefusedRequest
from vppipsec.sync.actual.vpp_state import TunnelState
from vppipsec.sync.desired.state import DesiredTunnel, OffloadDecision, OffloadStatus
from vppipsec.sync.engine import Engine
from vppipsec.vpp.api.ip import RouteAddDel
from vppipsec.vpp.api.ipsec import IpsecItfDelete, SadEntryDel, SadEntryUpdate, TunnelUnprotect
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.state.tunnels import ActualTunnel
from vppipsec.vpp.types import NO_INDEX, Route, SaSpec

SYNCED, PENDING, REKEYING, UNSUPPORTED, REFUSED = "synced", "pending", "rekeying", "unsupported", "refused"
STATES = (SYNCED, PENDING, REKEYING, UNSUPPORTED, REFUSED)

_NOT_CONNECTED = OffloadDecision(OffloadStatus.PENDING, "VPP is not connected")
_NOT_LOOKED_AT = OffloadDecision(OffloadStatus.PENDING, "not looked at yet")
_OF_ONE_SA = (SadEntryDel, SadEntryUpdate)
_NOT_OF_SAS = (RouteAddDel, TunnelUnprotect, IpsecItfDelete)


class SaState(NamedTuple):
    """One of STATES, its reason, and the SA's `sad_id` in VPP, None if VPP does not hold the SA."""

    state: str
    reason: str = ""
    sad_id: int | None = None


def is_connected(engine: Engine) -> bool:
    """Return whether VPP is connected and its dumps have been read. Otherwise its state is unknown."""
    return engine.client is not None and not engine.vpp_problem


def current_decision(sa_id: SaId, state: TunnelState | None, has_vpp: bool) -> OffloadDecision:
    """Return the offload decision of an SA. Without VPP (`has_vpp`, see `is_connected`) it is pending, unless unsupported."""
    known = state.desired.decisions.get(sa_id, _NOT_LOOKED_AT) if state is not None else _NOT_LOOKED_AT
    if has_vpp or known.status is OffloadStatus.UNSUPPORTED:
        return known
    return OffloadDecision(_NOT_CONNECTED.status, _NOT_CONNECTED.reason, None, known.direction)


def sa_state_of(decision: OffloadDecision, state: TunnelState | None) -> SaState:
    """Return the state of an SA in VPP."""
    if (
        decision.status is not OffloadStatus.OFFLOADED
        or decision.spec is None
        or state is None
        or state.desired.tunnel is None
    ):
        return SaState(str(decision.status), decision.reason)
    spec, actual, want = decision.spec, state.actual, state.desired.tunnel
    sad_id = _sad_id_of(spec, actual)
    if sad_id is None:
        refusal = _refusal_of_sa(spec, state) or _refusal_of_tunnel(state)
        return SaState(REFUSED, refusal) if refusal else SaState(PENDING, "being programmed")
    protection = actual.protection
    if protection is not None and _passes_packets(actual, want):
        if sad_id in (protection.outbound, *protection.inbound):
            return SaState(SYNCED, "", sad_id)
        if not spec.inbound and spec is not want.outbound[-1]:
            return SaState(SYNCED, "a newer one is used", sad_id)
    if refusal := _refusal_of_tunnel(state):
        return SaState(REFUSED, refusal, sad_id)
    for other, other_refusal in state.refusals.all.items():
        if isinstance(other, SaSpec) and other.inbound != spec.inbound:
            return SaState(PENDING, f"its counterpart {other.spi:#010x} was refused: {other_refusal.reason}", sad_id)
    return SaState(PENDING, "being programmed", sad_id)


class FallbackState(NamedTuple):
    """Kernel fallback of a tunnel that VPP cannot carry: `kernel`, or `drop` and why there is no fallback. Else empty."""

    action: str = ""
    reason: str = ""


def fallback_state(sa_state: SaState, state: TunnelState | None, engine: Engine) -> FallbackState:
    """Return where the packets of an SA's tunnel go if VPP cannot carry it."""
    if sa_state.state != UNSUPPORTED or state is None or state.desired.tunnel is not None or not is_connected(engine):
        return FallbackState()
    found = engine.steering.fallbacks.get(state.desired.key)
    if found is None:
        return FallbackState("drop")
    return FallbackState("drop", found.reason) if found.target is None else FallbackState("kernel")


def refusal_texts(refusals: Refusals) -> list[str]:
    """Return a text for each refusal, without duplicates."""
    return list(dict.fromkeys(_refusal_text(key, refusal) for key, refusal in refusals.all.items()))


def refusal_of_route(route: Route, state: TunnelState) -> str:
    """Return why VPP refused a route, empty if it did not."""
    found = [
        refusal for key, refusal in state.refusals.all.items() if isinstance(key, RouteAddDel) and key.route == route
    ]
    return found[-1].reason if found else ""


def _refusal_of_sa(spec: SaSpec, state: TunnelState) -> str:
    """Return why VPP refused an SA or a change of its ports, empty if it did not."""
    for key, refusal in state.refusals.all.items():
        if key == spec:
            return refusal.reason
        if isinstance(key, SadEntryUpdate):
            actual = state.actual.sas.get(key.sad_id)
            if actual is not None and actual.spec.spi == spec.spi:
                return _refusal_text(key, refusal)
    return ""


def _refusal_of_tunnel(state: TunnelState) -> str:
    """Return the refusal of a request that all SAs of a tunnel depend on, empty if there is none."""
    for key, refusal in state.refusals.all.items():
        if not isinstance(key, (SaSpec, *_OF_ONE_SA, *_NOT_OF_SAS)):
            return _refusal_text(key, refusal)
    return ""


def _refusal_text(key: SaSpec | Request, refusal: RefusedRequest) -> str:
    if isinstance(key, SaSpec):
        return f"SA {key.spi:#010x}: {refusal.reason}"
    if isinstance(key, RouteAddDel):
        return f"route {format_prefix(*key.prefix)}: {refusal.reason}"
    return f"{key.message}: {refusal.reason}"


def _sad_id_of(spec: SaSpec, actual: ActualTunnel) -> int | None:
    """Return the `sad_id` of an SA in VPP, None if VPP does not hold it. Of two equal SAs the one that protects counts."""
    found = [sad_id for sad_id, sa in actual.sas.items() if sa.spec == spec]
    if len(found) > 1 and actual.protection is not None:
        named = (actual.protection.outbound, *actual.protection.inbound)
        found.sort(key=lambda sad_id: sad_id not in named)
    return found[0] if found else None


def _passes_packets(actual: ActualTunnel, want: DesiredTunnel) -> bool:
    """Return whether a tunnel's interface is ready for packets, without regard to its protection."""
    if want.gre_ipip is not None:
        return actual.gre_ipip == want.gre_ipip
    passes4 = actual.has_address if want.table else actual.unnumbered_from == want.unnumbered_from
    return actual.up and actual.tables[0] == want.table and passes4 and (actual.ip6 or not want.ip6)


def interface_name(actual: ActualTunnel) -> str:
    """Return the name of a tunnel's `ipsec`, gre or ipip interface, empty if it has none."""
    if actual.gre_ipip is not None:
        return actual.gre_ipip.name
    return f"ipsec{actual.instance}" if actual.sw_if_index is not None and actual.instance != NO_INDEX else ""
