"""Answers about the whole service and about SAs, as values for JSON. Read from the engine; they never contain a key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from vppipsec import __version__
from vppipsec.kernel.text import format_addr, format_mark, format_selector
from vppipsec.kernel.xfrm.values import XFRM_INF, Limits, Mode, Sa, SaExtraFlag, SaFlag
from vppipsec.status.state import (
    STATES,
    current_decision,
    fallback_state,
    interface_name,
    is_connected,
    refusal_texts,
    sa_state_of,
)
from vppipsec.sync.actual.backoff import OUTBOUND_POLICIES
from vppipsec.sync.actual.vpp_state import TunnelState
from vppipsec.sync.desired.algorithms import describe_algorithms
from vppipsec.sync.engine import Engine
from vppipsec.sync.journal import count_text
from vppipsec.vpp.state.tunnels import ActualSa
from vppipsec.vpp.stats import SaCounters

Row = dict[str, Any]

MODES: dict[int, str] = {Mode.TRANSPORT: "transport", Mode.TUNNEL: "tunnel", Mode.BEET: "beet"}


class SaFilter(NamedTuple):
    """Selects SAs. `peer` is the address of either endpoint. None selects all."""

    peer: bytes | None = None
    spi: int | None = None

    def matches(self, sa: Sa) -> bool:
        """Return whether the filter selects an SA."""
        return (self.peer is None or self.peer in (sa.saddr, sa.daddr)) and (self.spi is None or self.spi == sa.spi)


NO_FILTER = SaFilter()


def sync_view(engine: Engine) -> Row:
    """Return the answer to `show sync`: totals of kernel and VPP, the sync state, and the last event."""
    counts = dict.fromkeys(STATES, 0)
    has_vpp = is_connected(engine)
    for key, tunnel in engine.model.tunnels.items():
        state = engine.tunnels.get(key)
        for sa_id in tunnel.sas:
            counts[sa_state_of(current_decision(sa_id, state, has_vpp), state).state] += 1
    actual = [state.actual for state in engine.tunnels.values()] if has_vpp else []
    counters = engine.counters
    client = engine.client
    return {
        "version": __version__,
        "state": "in-sync" if engine.in_sync else "disconnected" if client is None else "converging",
        "problem": engine.kernel_problem or engine.vpp_problem or _first_problem(engine),
        "own_packets": engine.host_interfaces.problem,
        "kernel": {"sas": engine.model.sa_count, "policies": engine.model.policy_count},
        "vpp": {
            "version": client.version if client is not None else "",
            "pid": client.pid if client is not None else 0,
            "sas": sum(len(tunnel.sas) for tunnel in actual),
            "tunnels": sum(tunnel.sw_if_index is not None or tunnel.gre_ipip is not None for tunnel in actual),
            "routes": len(engine.vpp.routes) if has_vpp else 0,
            "rules": engine.vpp.layers.rule_count if has_vpp else 0,
            "leftovers": engine.vpp.unclaimed_count if has_vpp else 0,
        },
        "counts": counts,
        "last_event": {"time": counters.last_event, "name": counters.last_event_name},
        "last_resync": counters.last_resync,
        "queue": engine.queue_length,
        "events": counters.events,
        "overflows": counters.overflows,
        "resyncs": counters.resyncs,
        "refusals": counters.refusals,
        "withheld": counters.withheld,
        "reconnects": counters.reconnects,
        "rekeys": counters.rekeys,
        "acquires": counters.acquires,
        "requests": counters.requests + (client.sent if client is not None else 0),
    }


def _first_problem(engine: Engine) -> str:
    """Return the most important problem, empty if there is none.

    An internal error of steering comes first, then a refusal for steering, then a refusal for a tunnel. The last one also has the
    number of further tunnels.
    """
    for what, error in engine.steering.internal_errors.items():
        return f"{error}: VPP keeps what it has of {what} (some of their packets may leave in clear)"
    if steering := refusal_texts(engine.steering.refusals):
        return f"VPP refuses {steering[0]} ({OUTBOUND_POLICIES}: some of their packets may leave in clear)"
    refused = [state for state in engine.tunnels.values() if state.refusals]
    if not refused:
        return ""
    key, (first, *_) = refused[0].desired.key, refusal_texts(refused[0].refusals)
    more = f", and {count_text(len(refused) - 1, 'tunnel')} more" if len(refused) > 1 else ""
    return f"VPP refuses {first} ({format_addr(key.low)} - {format_addr(key.high)} reqid {key.reqid}{more})"


def sa_view(engine: Engine, wanted: SaFilter = NO_FILTER) -> list[Row]:
    """Return a row for each selected kernel SA: its parameters, its state in VPP and the reason."""
    return list(sa_rows(engine, wanted))


def sa_rows(engine: Engine, wanted: SaFilter = NO_FILTER) -> Iterator[Row]:
    """Yield the rows of `sa_view`. The engine may run between two rows."""
    for sa, state in _selected_sas(engine, wanted):
        yield _sa_row(sa, state, engine)


def counter_rows(engine: Engine, counters: SaCounters | None, known: frozenset[int], wanted: SaFilter) -> Iterator[Row]:
    """Yield a row for each selected kernel SA with VPP's counters, None if they are unknown.

    `known` are the `sad_id`s that VPP held when the counters were read. A newer SA may use the counter of a deleted one.
    """
    for sa, state in _selected_sas(engine, wanted):
        row = _sa_row(sa, state, engine)
        shown = {name: row[name] for name in ("spi", "src", "dst", "direction", "reqid", "tunnel", "state")}
        yield shown | _traffic(_actual_sa(row, state), counters if row["sad_id"] in known else None)


def detail_rows(engine: Engine, counters: SaCounters | None, known: frozenset[int], wanted: SaFilter) -> Iterator[Row]:
    """Yield a row for each selected kernel SA with all details except keys. `known` is as for `counter_rows`."""
    for sa, state in _selected_sas(engine, wanted):
        row = _sa_row(sa, state, engine)
        actual = _actual_sa(row, state)
        in_vpp = {
            "stat_index": actual.stat_index if actual is not None else None,
            "replay_window_in_vpp": actual.spec.replay_window if actual is not None else None,
        }
        yield row | _kernel_details(sa) | in_vpp | _traffic(actual, counters if row["sad_id"] in known else None)


def actual_sad_ids(engine: Engine) -> frozenset[int]:
    """Return the `sad_id`s of the SAs that VPP holds."""
    return frozenset(sad_id for state in engine.tunnels.values() for sad_id in state.actual.sas)


def event_rows(engine: Engine) -> list[Row]:
    """Return the journal's entries, oldest first."""
    return [
        {"time": entry.time, "until": entry.until, "source": str(entry.source), "text": entry.text}
        for entry in engine.journal
    ]


def _selected_sas(engine: Engine, wanted: SaFilter) -> Iterator[tuple[Sa, TunnelState | None]]:
    for key, tunnel in list(engine.model.tunnels.items()):
        if wanted.peer is not None and wanted.peer not in (key.low, key.high):
            continue
        for sa in list(tunnel.sas.values()):
            if wanted.matches(sa):
                yield sa, engine.tunnels.get(key)


def _sa_row(sa: Sa, state: TunnelState | None, engine: Engine) -> Row:
    decision = current_decision(sa.id, state, is_connected(engine))
    sa_state = sa_state_of(decision, state)
    fallback = fallback_state(sa_state, state, engine)
    return {
        "spi": f"{sa.spi:#010x}",
        "src": format_addr(sa.saddr),
        "dst": format_addr(sa.daddr),
        "direction": decision.direction,
        "reqid": sa.reqid,
        "if_id": sa.if_id,
        "mode": MODES.get(sa.mode, str(sa.mode)),
        "algorithm": describe_algorithms(sa),
        "esn": bool(sa.flags & SaFlag.ESN),
        "encap": f"{sa.encap.sport}>{sa.encap.dport}" if sa.encap is not None else "",
        "state": sa_state.state,
        "reason": sa_state.reason,
        "fallback": fallback.action,
        "fallback_reason": fallback.reason,
        "tunnel": interface_name(state.actual) if state is not None and sa_state.sad_id is not None else "",
        "sad_id": sa_state.sad_id,
    }


def _actual_sa(row: Row, state: TunnelState | None) -> ActualSa | None:
    return None if state is None or row["sad_id"] is None else state.actual.sas[row["sad_id"]]


def _traffic(actual: ActualSa | None, counters: SaCounters | None) -> Row:
    traffic = counters.of_sa(actual.stat_index) if actual is not None and counters is not None else None
    if traffic is None:
        return {"packets": None, "bytes": None, "errors": {}}
    return {"packets": traffic.packets, "bytes": traffic.bytes, "errors": dict(traffic.errors)}


def _kernel_details(sa: Sa) -> Row:
    """Return the kernel's details of an SA that `show sa` leaves out."""
    flags = [flag.name.lower() for flag in SaFlag if sa.flags & flag]
    flags += [flag.name.lower() for flag in SaExtraFlag if sa.extra_flags & flag]
    return {
        "proto": sa.proto,
        "replay_window": sa.replay_window,
        "flags": flags,
        "mark": format_mark(sa.mark),
        "set_mark": format_mark(sa.set_mark),
        "selector": format_selector(sa.selector),
        "limits": _limits_row(sa.limits),
        "added": sa.usage.add_time,
    }


def _limits_row(limits: Limits) -> dict[str, int]:
    """Return the limits that are set: bytes, packets, seconds since addition, and seconds since first use."""
    return {name: limit for name, limit in limits._asdict().items() if limit not in (0, XFRM_INF)}
