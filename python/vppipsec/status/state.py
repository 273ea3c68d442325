"""How far VPP is with an SA or a tunnel: synced, pending, unsupported or refused, and why. Reads the engine, changes nothing."""

from __future__ import annotations

from typing import NamedTuple

from vppipsec.kernel.text import format_prefix
from vppipsec.kernel.xfrm.values import SaId
from vppipsec.sync.actual.backoff import Refusal, Refusals
from vppipsec.sync.actual.vpp_state import GroupState
from vppipsec.sync.desired.state import Fate, Tunnel, Verdict
from vppipsec.sync.engine import Engine
from vppipsec.vpp.api.ip import ChangeRoute
from vppipsec.vpp.api.ipsec import DeleteItf, DelSa, SetSaPorts, Unprotect
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.state.tunnels import HeldTunnel
from vppipsec.vpp.types import NO_INDEX, Route, SaSpec

SYNCED, PENDING, REKEYING, UNSUPPORTED, REFUSED = "synced", "pending", "rekeying", "unsupported", "refused"
STATES = (SYNCED, PENDING, REKEYING, UNSUPPORTED, REFUSED)

_NOT_CONNECTED = Verdict(Fate.PENDING, "VPP is not connected")
_NOT_LOOKED_AT = Verdict(Fate.PENDING, "not looked at yet")
_OF_ONE_SA = (DelSa, SetSaPorts)
_NO_SAS_BUSINESS = (ChangeRoute, Unprotect, DeleteItf)


class Standing(NamedTuple):
    """One of STATES, why, and the number by which VPP holds the SA, where it does."""

    state: str
    reason: str = ""
    sad_id: int | None = None


def connected(engine: Engine) -> bool:
    """Tell whether VPP is there and has told what it holds: only then is anything of it known."""
    return engine.client is not None and not engine.vpp_problem


def verdict_on(sa_id: SaId, state: GroupState | None, there: bool) -> Verdict:
    """Return what translate said of an SA, and while VPP is not `there` (see `connected`) what of that holds nevertheless."""
    known = state.desired.verdicts.get(sa_id, _NOT_LOOKED_AT) if state is not None else _NOT_LOOKED_AT
    if there or known.fate is Fate.UNSUPPORTED:
        return known
    return Verdict(_NOT_CONNECTED.fate, _NOT_CONNECTED.reason, None, known.direction)


def standing_of(verdict: Verdict, state: GroupState | None) -> Standing:
    """Return how far VPP is with an SA."""
    if verdict.fate is not Fate.CARRIED or verdict.spec is None or state is None or state.desired.tunnel is None:
        return Standing(str(verdict.fate), verdict.reason)
    spec, held, want = verdict.spec, state.held, state.desired.tunnel
    sad_id = _held_as(spec, held)
    if sad_id is None:
        refusal = _refusal_of_sa(spec, state) or _refusal_of_tunnel(state)
        return Standing(REFUSED, refusal) if refusal else Standing(PENDING, "being programmed")
    protection = held.protection
    if protection is not None and _works(held, want):
        if sad_id in (protection.outbound, *protection.inbound):
            return Standing(SYNCED, "", sad_id)
        if not spec.inbound and spec is not want.outbound[-1]:
            return Standing(SYNCED, "a newer one is used", sad_id)
    if refusal := _refusal_of_tunnel(state):
        return Standing(REFUSED, refusal, sad_id)
    for other, other_refusal in state.refusals.every.items():
        if isinstance(other, SaSpec) and other.inbound != spec.inbound:
            return Standing(PENDING, f"its counterpart {other.spi:#010x} was refused: {other_refusal.reason}", sad_id)
    return Standing(PENDING, "being programmed", sad_id)


class Fallback(NamedTuple):
    """What becomes of the packets of a tunnel that VPP cannot carry: `kernel`, or `drop` and why not the former; else nothing."""

    what: str = ""
    reason: str = ""


def fallback_of(standing: Standing, state: GroupState | None, engine: Engine) -> Fallback:
    """Return what becomes of the packets of an SA's tunnel, where VPP cannot carry it."""
    if standing.state != UNSUPPORTED or state is None or state.desired.tunnel is not None or not connected(engine):
        return Fallback()
    found = engine.steerer.fallbacks.get(state.desired.key)
    if found is None:
        return Fallback("drop")
    return Fallback("drop", found.reason) if found.target is None else Fallback("kernel")


def say_refusals(refusals: Refusals) -> list[str]:
    """Say what VPP refused."""
    return list(dict.fromkeys(_say(key, refusal) for key, refusal in refusals.every.items()))


def refusal_of_route(route: Route, state: GroupState) -> str:
    """Say why VPP refused a route; nothing where it did not."""
    found = [
        refusal for key, refusal in state.refusals.every.items() if isinstance(key, ChangeRoute) and key.route == route
    ]
    return found[-1].reason if found else ""


def _refusal_of_sa(spec: SaSpec, state: GroupState) -> str:
    """Say why VPP refused an SA, or the change of its ports; nothing where it did not."""
    for key, refusal in state.refusals.every.items():
        if key == spec:
            return refusal.reason
        if isinstance(key, SetSaPorts):
            held = state.held.sas.get(key.sad_id)
            if held is not None and held.spec.spi == spec.spi:
                return _say(key, refusal)
    return ""


def _refusal_of_tunnel(state: GroupState) -> str:
    """Say what VPP refused of a tunnel that none of its SAs works without; nothing where it refused no such thing."""
    for key, refusal in state.refusals.every.items():
        if not isinstance(key, (SaSpec, *_OF_ONE_SA, *_NO_SAS_BUSINESS)):
            return _say(key, refusal)
    return ""


def _say(key: SaSpec | Request, refusal: Refusal) -> str:
    if isinstance(key, SaSpec):
        return f"SA {key.spi:#010x}: {refusal.reason}"
    if isinstance(key, ChangeRoute):
        return f"route {format_prefix(*key.prefix)}: {refusal.reason}"
    return f"{key.message}: {refusal.reason}"


def _held_as(spec: SaSpec, held: HeldTunnel) -> int | None:
    """Find the number of an SA in VPP. Of two that are alike the one that protects counts."""
    found = [sad_id for sad_id, sa in held.sas.items() if sa.spec == spec]
    if len(found) > 1 and held.protection is not None:
        named = (held.protection.outbound, *held.protection.inbound)
        found.sort(key=lambda sad_id: sad_id not in named)
    return found[0] if found else None


def _works(held: HeldTunnel, want: Tunnel) -> bool:
    """Tell whether packets pass a tunnel's interface, apart from its protection."""
    if want.overlay is not None:
        return held.overlay == want.overlay
    passes4 = held.addressed if want.table else held.lender == want.lender
    return held.up and held.tables[0] == want.table and passes4 and (held.ip6 or not want.ip6)


def name_of(held: HeldTunnel) -> str:
    """Return the name of a tunnel's interface, one of others' included that its SAs are for; nothing where it has none."""
    if held.overlay is not None:
        return held.overlay.name
    return f"ipsec{held.instance}" if held.sw_if_index is not None and held.instance != NO_INDEX else ""
