"""The journal for the operator: a bounded ring of lines that stays cheap even under thousands of events.

Single events get a line each. Floods are counted, and get one line with the number of each kind of event. No line
contains a key, nor does anything else that is kept here.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum

from vppipsec.kernel.ownership import is_pass_policy
from vppipsec.kernel.text import format_addr, format_prefix, format_proto, format_selector
from vppipsec.kernel.xfrm.events import (
    Event,
    Mapped,
    Migrated,
    PoliciesFlushed,
    PolicyAdded,
    PolicyDeleted,
    PolicyExpired,
    SaAdded,
    SaDeleted,
    SaExpired,
    SasFlushed,
)
from vppipsec.kernel.xfrm.sad_spd import KernelModel, TunnelKey, tunnel_key_of_sa
from vppipsec.kernel.xfrm.socket import Overflow
from vppipsec.kernel.xfrm.values import Policy, PolicyDir, PolicyId, Sa, SaId
from vppipsec.vpp.api.ip import RouteAddDel
from vppipsec.vpp.api.ipsec import SadEntryAdd
from vppipsec.vpp.api.request import Request

MAX_LINES = 200
"""Lines that are kept."""
MAX_LINES_PER_WINDOW = 10
"""Lines that one source may write within `FLOOD_WINDOW_S`; further events are counted."""
FLOOD_WINDOW_S = 1.0
"""A flood ends after this time without an event."""
MAX_FLOOD_S = 10.0
"""A flood that lasts longer gets another line."""


class JournalSource(StrEnum):
    """Where something happened."""

    KERNEL = "kernel"
    VPP = "vpp"
    OPERATOR = "operator"


class EventKind(Enum):
    """Kinds of events that can come in floods, with their names in singular and plural."""

    SA_ADDED = ("SA added or updated", "SAs added or updated")
    SA_DELETED = ("SA deleted", "SAs deleted")
    SA_EXPIRED = ("SA at a lifetime limit", "SAs at a lifetime limit")
    SAS_FLUSHED = ("flush of SAs", "flushes of SAs")
    POLICY_ADDED = ("policy added or updated", "policies added or updated")
    POLICY_DELETED = ("policy deleted", "policies deleted")
    POLICY_EXPIRED = ("policy at a lifetime limit", "policies at a lifetime limit")
    POLICIES_FLUSHED = ("flush of policies", "flushes of policies")
    MIGRATED = ("migration", "migrations")
    MAPPED = ("change of a peer's UDP port", "changes of a peer's UDP port")
    OVERFLOW = ("overflow of the receive buffer", "overflows of the receive buffer")
    REFUSED = ("request refused or not sent", "requests refused or not sent")
    REKEY_ASKED = ("rekey asked for", "rekeys asked for")
    SA_ASKED = ("SA asked for", "SAs asked for")
    REACHED = ("change of what VPP reaches", "changes of what VPP reaches")


_EVENT_KINDS: dict[EventKind | type, EventKind] = {
    SaAdded: EventKind.SA_ADDED,
    SaDeleted: EventKind.SA_DELETED,
    SaExpired: EventKind.SA_EXPIRED,
    SasFlushed: EventKind.SAS_FLUSHED,
    PolicyAdded: EventKind.POLICY_ADDED,
    PolicyDeleted: EventKind.POLICY_DELETED,
    PolicyExpired: EventKind.POLICY_EXPIRED,
    PoliciesFlushed: EventKind.POLICIES_FLUSHED,
    Migrated: EventKind.MIGRATED,
    Mapped: EventKind.MAPPED,
    Overflow: EventKind.OVERFLOW,
}
"""Messages that report a change. Others (usage, counts and the like) are not journaled."""


@dataclass(slots=True)
class JournalEntry:
    """One line, or the counts of a flood: messages by type, other events by kind.

    `time` and `until` are the times of its first and last event, seconds since 1970.
    """

    time: float
    until: float
    source: JournalSource
    line: str = ""
    counts: Counter[EventKind | type] = field(default_factory=Counter)

    @property
    def text(self) -> str:
        """The entry as text."""
        counted = ((_EVENT_KINDS.get(what, what), number) for what, number in self.counts.items())
        return self.line or ", ".join(
            f"{n:,} {kind.value[n != 1]}" for kind, n in counted if isinstance(kind, EventKind)
        )


@dataclass(slots=True)
class _Pace:
    """How fast a source writes: lines since a time, and the current flood."""

    since: float = 0.0
    lines: int = 0
    flood: JournalEntry | None = None


@dataclass(slots=True)
class Counters:
    """Totals for status since the start."""

    events: int = 0
    overflows: int = 0
    resyncs: int = 0
    refusals: int = 0
    withheld: int = 0
    reconnects: int = 0
    requests: int = 0
    rekeys: int = 0
    acquires: int = 0
    last_event: float = 0.0
    last_event_name: str = ""
    last_resync: float = 0.0


class Journal:
    """The ring of entries. `clock` gives seconds since 1970."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._ring: deque[JournalEntry] = deque(maxlen=MAX_LINES)
        self._paces = {source: _Pace() for source in JournalSource}

    def __iter__(self) -> Iterator[JournalEntry]:
        """Iterate over the entries, oldest first."""
        return iter([entry for entry in self._ring if entry.text])

    def note(self, source: JournalSource, line: str) -> None:
        """Write a line about a rare event."""
        now = self._clock()
        self._ring.append(JournalEntry(now, now, source, line))

    def note_limited(self, source: JournalSource, kind: EventKind, line: str) -> None:
        """Write a line, or only count the event during a flood."""
        now = self._clock()
        pace = self._pace(source, now)
        if pace.flood is None and pace.lines < MAX_LINES_PER_WINDOW:
            pace.lines += 1
            self._ring.append(JournalEntry(now, now, source, line))
        else:
            self._flood(source, pace, now)[kind] += 1

    def note_events(self, events: Sequence[Event | Overflow], model: KernelModel) -> None:
        """Write kernel events. `model` is the model before them."""
        now = self._clock()
        pace = self._pace(JournalSource.KERNEL, now)
        if pace.flood is None and pace.lines + len(events) <= MAX_LINES_PER_WINDOW:
            for event in events:
                if (line := _event_line(event, model)) is not None:
                    pace.lines += 1
                    self._ring.append(JournalEntry(now, now, JournalSource.KERNEL, line))
            return
        counts = self._flood(JournalSource.KERNEL, pace, now)
        for event in events:
            counts[type(event)] += 1

    def note_refused(self, owner: TunnelKey | str, request: Request, reason: str) -> None:
        """Write that VPP refused a request of a tunnel or of a named owner, or that it was not sent."""
        match request:
            case SadEntryAdd(_, sa):
                what = f"SA {sa.spi:#010x}"
            case RouteAddDel(_, prefix):
                what = f"route {format_prefix(*prefix)}"
            case _:
                what = request.message
        if not isinstance(owner, str):
            named = f"{format_addr(owner.low)} - {format_addr(owner.high)} reqid {owner.reqid}" if owner.low else ""
            owner = named or "an earlier run"
        self.note_limited(JournalSource.VPP, EventKind.REFUSED, f"{what} of {owner}: {reason}")

    def note_rekey(self, sa: Sa) -> None:
        """Write that the IKE daemon was asked to replace an SA whose sequence numbers VPP cannot continue."""
        self.note_limited(
            JournalSource.VPP, EventKind.REKEY_ASKED, f"cannot go on with {_sa_text(sa)}: a rekey is asked for"
        )

    def note_acquire(self, policy: Policy) -> None:
        """Write that the IKE daemon was asked for the SAs of a policy whose packets VPP drops meanwhile."""
        line = f"dropped packets of {_policy_text(policy.id)}, which has no SA: the IKE daemon is asked for one"
        self.note_limited(JournalSource.VPP, EventKind.SA_ASKED, line)

    def _pace(self, source: JournalSource, now: float) -> _Pace:
        """Return how fast a source writes, reset if its flood is over."""
        pace = self._paces[source]
        flood = pace.flood
        if flood is None:
            if now - pace.since >= FLOOD_WINDOW_S:
                pace.since, pace.lines = now, 0
        elif now - flood.until >= FLOOD_WINDOW_S or now - flood.time >= MAX_FLOOD_S:
            pace.since, pace.lines, pace.flood = now, 0, None
        return pace

    def _flood(self, source: JournalSource, pace: _Pace, now: float) -> Counter[EventKind | type]:
        """Return the counts of the current flood; start one where there is none."""
        if pace.flood is None:
            pace.flood = JournalEntry(now, now, source)
            self._ring.append(pace.flood)
        pace.flood.until = now
        return pace.flood.counts


def count_text(number: int, name: str, names: str = "") -> str:
    """Return a number with its noun: `1 tunnel`, `4,000 tunnels`. `names` is an irregular plural."""
    return f"{number:,} {name}" if number == 1 else f"{number:,} {names or f'{name}s'}"


def _event_line(event: Event | Overflow, model: KernelModel) -> str | None:
    """Return the meaning of an event as text, None where it changes nothing."""
    match event:
        case SaAdded(sa):
            return None if sa.larval else f"{_sa_text(sa)} {_how_added(sa, model)}"
        case SaDeleted(sa_id, sa):
            return f"{_sa_text(sa) if sa is not None else _sa_id_text(sa_id)} deleted"
        case SaExpired(sa, hard):
            return f"{_sa_text(sa)} " + (
                "expired: the kernel has removed it" if hard else "reached a soft limit: to be rekeyed"
            )
        case SasFlushed(proto):
            return "all SAs flushed" if proto in (0, 255) else f"all SAs of {format_proto(proto)} flushed"
        case PolicyAdded(Policy(id=policy_id)) | PolicyDeleted(policy_id) if is_pass_policy(policy_id):
            return None  # another entry has reported it already
        case PolicyAdded(policy, updated):
            return f"{_policy_text(policy.id)} {'updated' if updated else 'added'}"
        case PolicyDeleted(policy_id):
            return f"{_policy_text(policy_id)} deleted"
        case PolicyExpired(policy, hard):
            return f"{_policy_text(policy.id)} " + (
                "expired: the kernel has removed it" if hard else "reached a soft limit"
            )
        case PoliciesFlushed():
            return "all policies flushed"
        case Migrated(policy_id):
            return f"the peers of {_policy_text(policy_id)} moved"
        case Mapped(sa_id, _, old, new, old_port, new_port):
            moved = f"{format_addr(old)} port {old_port} to {format_addr(new)} port {new_port}"
            return f"the peer of SA {sa_id.spi:#010x} moved from {moved}"
        case Overflow():
            return "the kernel dropped netlink messages that were not read in time; its tables are read anew"
    return None


def _how_added(sa: Sa, model: KernelModel) -> str:
    tunnel = model.tunnels.get(tunnel_key_of_sa(sa))
    if tunnel is None:
        return "added"
    if sa.id in tunnel.sas:
        return "updated"
    before = [other for other in tunnel.sas.values() if other.daddr == sa.daddr]
    return f"added, to replace {before[-1].spi:#010x}" if before else "added"


def _sa_text(sa: Sa) -> str:
    return f"SA {sa.spi:#010x} {format_addr(sa.saddr)} > {format_addr(sa.daddr)} reqid {sa.reqid}"


def _sa_id_text(sa_id: SaId) -> str:
    return f"SA {sa_id.spi:#010x} to {format_addr(sa_id.daddr)}"


def _policy_text(policy_id: PolicyId) -> str:
    names: dict[int, str] = {PolicyDir.IN: "in", PolicyDir.OUT: "out", PolicyDir.FWD: "fwd"}
    direction = names.get(policy_id.direction, str(policy_id.direction))
    return f"policy {direction} {format_selector(policy_id.selector)}"
