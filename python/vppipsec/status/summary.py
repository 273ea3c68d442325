"""What status says of the whole and of SAs, as plain JSON-able values: read from the engine, never with a key in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from vppipsec import __version__
from vppipsec.kernel.text import format_addr, format_mark, format_selector
from vppipsec.kernel.xfrm.values import XFRM_INF, Limits, Mode, Sa, SaExtraFlag, SaFlag
from vppipsec.status.state import STATES, connected, fallback_of, name_of, say_refusals, standing_of, verdict_on
from vppipsec.sync.actual.backoff import OUTBOUND
from vppipsec.sync.actual.vpp_state import GroupState
from vppipsec.sync.desired.algorithms import describe
from vppipsec.sync.engine import Engine
from vppipsec.sync.journal import count
from vppipsec.vpp.state.tunnels import HeldSa
from vppipsec.vpp.stats import SaCounters

Row = dict[str, Any]

MODES: dict[int, str] = {Mode.TRANSPORT: "transport", Mode.TUNNEL: "tunnel", Mode.BEET: "beet"}


class Filter(NamedTuple):
    """Which rows are asked for. `peer`: an address that is one of the ends."""

    peer: bytes | None = None
    spi: int | None = None

    def takes(self, sa: Sa) -> bool:
        """Tell whether an SA is asked for."""
        return (self.peer is None or self.peer in (sa.saddr, sa.daddr)) and (self.spi is None or self.spi == sa.spi)


ALL = Filter()


def sync_view(engine: Engine) -> Row:
    """Return totals of kernel and VPP, how far they are apart, and what happened last."""
    counts = dict.fromkeys(STATES, 0)
    there = connected(engine)
    for key, group in engine.model.groups.items():
        state = engine.groups.get(key)
        for sa_id in group.sas:
            counts[standing_of(verdict_on(sa_id, state, there), state).state] += 1
    held = [state.held for state in engine.groups.values()] if there else []
    counters = engine.counters
    client = engine.client
    return {
        "version": __version__,
        "state": "in-sync" if engine.in_sync else "disconnected" if client is None else "converging",
        "problem": engine.kernel_problem or engine.vpp_problem or _first_trouble(engine),
        "own_packets": engine.hosts.problem,
        "kernel": {"sas": engine.model.sa_count, "policies": engine.model.policy_count},
        "vpp": {
            "version": client.version if client is not None else "",
            "pid": client.pid if client is not None else 0,
            "sas": sum(len(tunnel.sas) for tunnel in held),
            "tunnels": sum(tunnel.sw_if_index is not None or tunnel.overlay is not None for tunnel in held),
            "routes": len(engine.vpp.routes) if there else 0,
            "rules": engine.vpp.layers.rules if there else 0,
            "leftovers": engine.vpp.leftovers if there else 0,
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
        "rekeys": counters.rekeys,
        "acquires": counters.acquires,
        "requests": counters.requests + (client.sent if client is not None else 0),
    }


def _first_trouble(engine: Engine) -> str:
    """Say what our own code stumbles over now, or what VPP refuses: of the rules for all policies, else of one tunnel, and of
    how many more; else nothing.
    """
    for what, mistake in engine.steerer.mistakes.items():
        return f"{mistake}: VPP keeps what it has of {what} (some of their packets may leave in clear)"
    if steering := say_refusals(engine.steerer.refusals):
        return f"VPP refuses {steering[0]} ({OUTBOUND}: some of their packets may leave in clear)"
    refused = [state for state in engine.groups.values() if state.refusals]
    if not refused:
        return ""
    key, (first, *_) = refused[0].desired.key, say_refusals(refused[0].refusals)
    more = f", and {count(len(refused) - 1, 'tunnel')} more" if len(refused) > 1 else ""
    return f"VPP refuses {first} ({format_addr(key.low)} - {format_addr(key.high)} reqid {key.reqid}{more})"


def sa_view(engine: Engine, wanted: Filter = ALL) -> list[Row]:
    """Return a row for each kernel SA: what it is, and whether VPP carries it or why not."""
    return list(sa_rows(engine, wanted))


def sa_rows(engine: Engine, wanted: Filter = ALL) -> Iterator[Row]:
    """Return the rows of `sa_view` one by one; in between the engine may go on."""
    for sa, state in _sas(engine, wanted):
        yield _row(sa, state, engine)


def counter_rows(engine: Engine, counters: SaCounters | None, known: frozenset[int], wanted: Filter) -> Iterator[Row]:
    """Return a row for each kernel SA with what VPP counted; None where that is not known.

    `known` are the `sad_id`s that VPP held when the counters were read: others may have taken over a counter since.
    """
    for sa, state in _sas(engine, wanted):
        row = _row(sa, state, engine)
        shown = {name: row[name] for name in ("spi", "src", "dst", "direction", "reqid", "tunnel", "state")}
        yield shown | _usage(_held(row, state), counters if row["sad_id"] in known else None)


def detail_rows(engine: Engine, counters: SaCounters | None, known: frozenset[int], wanted: Filter) -> Iterator[Row]:
    """Return for each kernel SA all that there is to know, apart from its keys. `known` as with `counter_rows`."""
    for sa, state in _sas(engine, wanted):
        row = _row(sa, state, engine)
        held = _held(row, state)
        in_vpp = {
            "stat_index": held.stat_index if held is not None else None,
            "replay_window_in_vpp": held.spec.replay_window if held is not None else None,
        }
        yield row | _kernel_details(sa) | in_vpp | _usage(held, counters if row["sad_id"] in known else None)


def held_numbers(engine: Engine) -> frozenset[int]:
    """Return the `sad_id`s of the SAs that VPP holds."""
    return frozenset(sad_id for state in engine.groups.values() for sad_id in state.held.sas)


def event_rows(engine: Engine) -> list[Row]:
    """Return what happened lately, oldest first."""
    return [
        {"time": entry.time, "until": entry.until, "source": str(entry.source), "text": entry.text}
        for entry in engine.journal
    ]


def _sas(engine: Engine, wanted: Filter) -> Iterator[tuple[Sa, GroupState | None]]:
    for key, group in list(engine.model.groups.items()):
        if wanted.peer is not None and wanted.peer not in (key.low, key.high):
            continue
        for sa in list(group.sas.values()):
            if wanted.takes(sa):
                yield sa, engine.groups.get(key)


def _row(sa: Sa, state: GroupState | None, engine: Engine) -> Row:
    verdict = verdict_on(sa.id, state, connected(engine))
    standing = standing_of(verdict, state)
    fallback = fallback_of(standing, state, engine)
    return {
        "spi": f"{sa.spi:#010x}",
        "src": format_addr(sa.saddr),
        "dst": format_addr(sa.daddr),
        "direction": verdict.direction,
        "reqid": sa.reqid,
        "if_id": sa.if_id,
        "mode": MODES.get(sa.mode, str(sa.mode)),
        "algorithm": describe(sa),
        "esn": bool(sa.flags & SaFlag.ESN),
        "encap": f"{sa.encap.sport}>{sa.encap.dport}" if sa.encap is not None else "",
        "state": standing.state,
        "reason": standing.reason,
        "fallback": fallback.what,
        "fallback_reason": fallback.reason,
        "tunnel": name_of(state.held) if state is not None and standing.sad_id is not None else "",
        "sad_id": standing.sad_id,
    }


def _held(row: Row, state: GroupState | None) -> HeldSa | None:
    return None if state is None or row["sad_id"] is None else state.held.sas[row["sad_id"]]


def _usage(held: HeldSa | None, counters: SaCounters | None) -> Row:
    usage = counters.of(held.stat_index) if held is not None and counters is not None else None
    if usage is None:
        return {"packets": None, "bytes": None, "errors": {}}
    return {"packets": usage.packets, "bytes": usage.bytes, "errors": dict(usage.errors)}


def _kernel_details(sa: Sa) -> Row:
    """Return what the kernel says of an SA besides what the table shows."""
    flags = [flag.name.lower() for flag in SaFlag if sa.flags & flag]
    flags += [flag.name.lower() for flag in SaExtraFlag if sa.extra_flags & flag]
    return {
        "proto": sa.proto,
        "replay_window": sa.replay_window,
        "flags": flags,
        "mark": format_mark(sa.mark),
        "set_mark": format_mark(sa.set_mark),
        "selector": format_selector(sa.selector),
        "limits": _limits(sa.limits),
        "added": sa.usage.add_time,
    }


def _limits(limits: Limits) -> dict[str, int]:
    """Return the limits that are set: bytes, packets, and seconds since addition or first use."""
    return {name: limit for name, limit in limits._asdict().items() if limit not in (0, XFRM_INF)}
