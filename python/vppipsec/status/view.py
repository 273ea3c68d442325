"""What status says, as plain JSON-able values: read from the engine, never with a key in it."""

from __future__ import annotations

from typing import Any

from vppipsec import __version__
from vppipsec.sync.algorithms import describe
from vppipsec.sync.desired import Fate, Verdict
from vppipsec.sync.engine import Engine, GroupState
from vppipsec.xfrm.text import format_addr
from vppipsec.xfrm.values import Mode, Sa, SaFlag, SaId

Row = dict[str, Any]

_MODES: dict[int, str] = {Mode.TRANSPORT: "transport", Mode.TUNNEL: "tunnel", Mode.BEET: "beet"}
_NOT_LOOKED_AT = Verdict(Fate.PENDING, "not looked at yet")
_NOT_CONNECTED = Verdict(Fate.PENDING, "VPP is not connected")


def sync_view(engine: Engine) -> Row:
    """Return totals of kernel and VPP, how far they are apart, and what happened last."""
    counts = dict.fromkeys(("synced", "pending", "unsupported", "refused"), 0)
    for key, group in engine.model.groups.items():
        state = engine.groups.get(key)
        for sa_id in group.sas:
            counts[_standing(_verdict(sa_id, state), state)[0]] += 1
    held = [state.held for state in engine.groups.values()]
    counters = engine.counters
    client = engine.client
    return {
        "version": __version__,
        "state": "in-sync" if engine.in_sync else "disconnected" if client is None else "converging",
        "problem": engine.kernel_problem or (engine.vpp_problem if client is None else ""),
        "kernel": {"sas": engine.model.sa_count, "policies": engine.model.policy_count},
        "vpp": {
            "version": client.version if client is not None else "",
            "pid": client.pid if client is not None else 0,
            "sas": sum(len(tunnel.sas) for tunnel in held),
            "tunnels": sum(tunnel.sw_if_index is not None for tunnel in held),
            "routes": len(engine.routes),
        },
        "counts": counts,
        "last_event": {"time": counters.last_event, "name": counters.last_event_name},
        "last_resync": counters.last_resync,
        "queue": engine.queue,
        "events": counters.events,
        "overflows": counters.overflows,
        "resyncs": counters.resyncs,
        "refusals": counters.refusals,
        "withheld": counters.withheld,
        "reconnects": counters.reconnects,
        "requests": counters.requests + (client.sent if client is not None else 0),
    }


def sa_view(engine: Engine) -> list[Row]:
    """Return a row for each kernel SA: what it is, and whether VPP carries it or why not."""
    rows = []
    for key, group in engine.model.groups.items():
        state = engine.groups.get(key)
        for sa_id, sa in group.sas.items():
            rows.append(_row(sa, _verdict(sa_id, state), state))
    return rows


def _verdict(sa_id: SaId, state: GroupState | None) -> Verdict:
    return _NOT_CONNECTED if state is None else state.desired.verdicts.get(sa_id, _NOT_LOOKED_AT)


def _row(sa: Sa, verdict: Verdict, state: GroupState | None) -> Row:
    name, reason, sad_id = _standing(verdict, state)
    connected = state is not None and state.held.sw_if_index is not None
    return {
        "spi": f"{sa.spi:#010x}",
        "src": format_addr(sa.saddr),
        "dst": format_addr(sa.daddr),
        "direction": verdict.direction,
        "reqid": sa.reqid,
        "if_id": sa.if_id,
        "mode": _MODES.get(sa.mode, str(sa.mode)),
        "algorithm": describe(sa),
        "esn": bool(sa.flags & SaFlag.ESN),
        "encap": f"{sa.encap.sport}>{sa.encap.dport}" if sa.encap is not None else "",
        "state": name,
        "reason": reason,
        "tunnel": f"ipsec{state.held.instance}" if connected and state is not None else "",
        "sad_id": sad_id,
    }


def _standing(verdict: Verdict, state: GroupState | None) -> tuple[str, str, int | None]:
    """Return state, reason and `sad_id` of an SA."""
    if verdict.fate is not Fate.CARRIED or state is None:
        return str(verdict.fate), verdict.reason, None
    held = state.held
    for sad_id, sa in held.sas.items():
        if sa.spec == verdict.spec:
            protection = held.protection
            if protection is not None and (sad_id in protection.inbound or not sa.spec.inbound):
                return "synced", "", sad_id
            break
    for refusal in state.refusals.values():
        return "refused", refusal.reason, None
    return "pending", "being programmed", None
