"""The journal tells of single things by name and of floods by number, stays bounded, and holds no key."""

from __future__ import annotations

from dataclasses import replace

import pytest

from support.build import GCM, LOCAL, REMOTE, any_selector, make_policy, make_sa, sa_in, sa_out
from vppipsec.kernel.xfrm.events import (
    Event,
    Irrelevant,
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
from vppipsec.kernel.xfrm.sad_spd import KernelModel, TunnelKey
from vppipsec.kernel.xfrm.socket import Overflow
from vppipsec.kernel.xfrm.values import PolicyDir, SaId
from vppipsec.sync.journal import (
    FLOOD_WINDOW_S,
    MAX_FLOOD_S,
    MAX_LINES,
    MAX_LINES_PER_WINDOW,
    EventKind,
    Journal,
    JournalSource,
    count_text,
)
from vppipsec.vpp.algorithms import CryptoAlg, IntegAlg
from vppipsec.vpp.api.ipsec import IpsecItfCreate, SadEntryAdd
from vppipsec.vpp.types import NO_INDEX, SaSpec

KEY = TunnelKey(LOCAL, REMOTE, 1, 7, 0)
SA = "SA 0x00000001 192.0.2.2 > 192.0.2.1 reqid 1"
OUT = "policy out 10.1.0.0/24 > 10.2.0.0/24"


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def journal() -> tuple[Journal, Clock]:
    clock = Clock()
    return Journal(clock), clock


def texts(made: Journal) -> list[str]:
    return [entry.text for entry in made]


@pytest.mark.parametrize(
    ("event", "says"),
    [
        (SaAdded(sa_in(1)), f"{SA} added"),
        (SaDeleted(sa_in(1).id, sa_in(1)), f"{SA} deleted"),
        (SaDeleted(SaId(LOCAL, 1, 50)), "SA 0x00000001 to 192.0.2.1 deleted"),
        (SaExpired(sa_in(1), False), f"{SA} reached a soft limit: to be rekeyed"),
        (SaExpired(sa_in(1), True), f"{SA} expired: the kernel has removed it"),
        (SasFlushed(0), "all SAs flushed"),
        (SasFlushed(50), "all SAs of esp flushed"),
        (PolicyAdded(make_policy()), f"{OUT} added"),
        (PolicyAdded(make_policy(), True), f"{OUT} updated"),
        (PolicyAdded(make_policy(PolicyDir.FWD)), "policy fwd 10.1.0.0/24 > 10.2.0.0/24 added"),
        (PolicyDeleted(make_policy().id), f"{OUT} deleted"),
        (PolicyExpired(make_policy(), True), f"{OUT} expired: the kernel has removed it"),
        (PolicyExpired(make_policy(), False), f"{OUT} reached a soft limit"),
        (PoliciesFlushed(0), "all policies flushed"),
        (Migrated(make_policy().id, ()), f"the peers of {OUT} moved"),
        (
            Mapped(SaId(LOCAL, 1, 50), 1, REMOTE, LOCAL, 4500, 40123),
            "the peer of SA 0x00000001 moved from 192.0.2.2 port 4500 to 192.0.2.1 port 40123",
        ),
        (Overflow(), "the kernel dropped netlink messages that were not read in time; its tables are read anew"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_a_single_event_is_told_by_name(event: Event | Overflow, says: str) -> None:
    made, clock = journal()
    made.note_events([event], KernelModel())
    assert [(e.time, e.until, e.source, e.text) for e in made] == [(clock.now, clock.now, JournalSource.KERNEL, says)]


@pytest.mark.parametrize("event", [Irrelevant(0x24), SaAdded(make_sa(9, aead=None))], ids=["irrelevant", "larval"])
def test_what_changes_nothing_is_not_told(event: Event) -> None:
    made, _ = journal()
    made.note_events([event], KernelModel())
    assert texts(made) == []


def test_what_changes_nothing_makes_no_line_in_a_flood_either() -> None:
    made, _ = journal()
    made.note_events([Irrelevant(0x24)] * 100, KernelModel())
    assert texts(made) == []


def test_rekey_line_names_the_replaced_sa_and_an_update_says_so() -> None:
    model = KernelModel()
    model.replace([sa_out(2), sa_in(1)], [make_policy()])
    made, _ = journal()
    made.note_events([SaAdded(sa_in(3), True), SaAdded(sa_out(2), True)], model)
    assert texts(made) == [
        "SA 0x00000003 192.0.2.2 > 192.0.2.1 reqid 1 added, to replace 0x00000001",
        "SA 0x00000002 192.0.2.1 > 192.0.2.2 reqid 1 updated",
    ]


def test_a_flood_is_one_line_with_numbers() -> None:
    made, clock = journal()
    model = KernelModel()
    added: list[Event] = [SaAdded(sa_in(spi)) for spi in range(4000)]
    made.note_events([*added, PolicyAdded(make_policy()), Irrelevant(1)], model)
    clock.now += 0.5
    made.note_events([SaDeleted(sa_in(1).id)], model)
    (entry,) = made
    assert entry.text == "4,000 SAs added or updated, 1 policy added or updated, 1 SA deleted"
    assert entry.until - entry.time == 0.5


def test_many_single_events_turn_into_a_flood_and_back() -> None:
    made, clock = journal()
    for spi in range(MAX_LINES_PER_WINDOW + 30):
        made.note_events([SaDeleted(SaId(LOCAL, spi, 50))], KernelModel())
    assert texts(made)[MAX_LINES_PER_WINDOW:] == ["30 SAs deleted"]
    clock.now += FLOOD_WINDOW_S
    made.note_events([SasFlushed(0)], KernelModel())
    assert texts(made)[MAX_LINES_PER_WINDOW:] == ["30 SAs deleted", "all SAs flushed"]


def test_a_flood_that_does_not_end_gets_a_line_now_and_then() -> None:
    made, clock = journal()
    for _ in range(int(2.5 * MAX_FLOOD_S / 0.5)):
        made.note_events([SaDeleted(SaId(LOCAL, 1, 50))] * 20, KernelModel())
        clock.now += 0.5
    assert texts(made) == ["400 SAs deleted", "400 SAs deleted", "200 SAs deleted"]


def test_a_flood_of_the_kernel_leaves_vpps_lines_alone() -> None:
    made, _ = journal()
    made.note_events([SasFlushed(0)] * 100, KernelModel())
    made.note_limited(JournalSource.VPP, EventKind.REACHED, "has no route to 192.0.2.2")
    made.note(JournalSource.VPP, "VPP closed the connection")
    assert texts(made) == ["100 flushes of SAs", "has no route to 192.0.2.2", "VPP closed the connection"]


def test_refusals_by_the_thousand_are_counted() -> None:
    made, _ = journal()
    for _ in range(1000):
        made.note_refused(KEY, IpsecItfCreate(NO_INDEX), "INVALID_REGISTRATION (-31)")
    said = "ipsec_itf_create of 192.0.2.1 - 192.0.2.2 reqid 7: INVALID_REGISTRATION (-31)"
    assert texts(made) == [said] * MAX_LINES_PER_WINDOW + ["990 requests refused or not sent"]


def test_refusal_of_an_sa_names_its_spi_and_not_its_key() -> None:
    key = b"\xa5" * 32
    made, _ = journal()
    spec = SaSpec(0x77, LOCAL, REMOTE, CryptoAlg.AES_GCM_256, key, IntegAlg.NONE, b"", 4, 0, 0)
    made.note_refused(KEY, SadEntryAdd(1, spec), "KEY_LENGTH (-156)")
    assert texts(made) == ["SA 0x00000077 of 192.0.2.1 - 192.0.2.2 reqid 7: KEY_LENGTH (-156)"]
    nobody = TunnelKey(b"", b"", 0, 0, 0)
    made.note_refused(nobody, IpsecItfCreate(1), "BUSY (-167)")
    assert texts(made)[1] == "ipsec_itf_create of an earlier run: BUSY (-167)"


def test_a_rekey_that_we_ask_for_is_told_and_counted_where_there_are_many() -> None:
    made, _ = journal()
    for _ in range(MAX_LINES_PER_WINDOW + 2):
        made.note_rekey(sa_out(2))
    said = "cannot go on with SA 0x00000002 192.0.2.1 > 192.0.2.2 reqid 1: a rekey is asked for"
    assert texts(made) == [said] * MAX_LINES_PER_WINDOW + ["2 rekeys asked for"]


def test_the_ring_keeps_the_newest() -> None:
    made, _ = journal()
    for number in range(MAX_LINES + 5):
        made.note(JournalSource.OPERATOR, str(number))
    assert texts(made) == [str(number) for number in range(5, MAX_LINES + 5)]


def test_nothing_that_is_kept_refers_to_an_sa() -> None:
    """Entries are text and numbers: an SA that is gone is not kept alive, with its key, by the journal."""
    made, _ = journal()
    secret = sa_in(1, aead=GCM._replace(key=b"distinctive-key-of-thirty-six-bytes!"))
    made.note_events([SaAdded(secret)], KernelModel())
    made.note_events([SaAdded(secret), SaDeleted(secret.id, secret)] * 50, KernelModel())
    kept = [repr((e.time, e.until, e.source, e.line, e.counts)) for e in made]
    assert len(kept) == 2
    assert "distinctive" not in "".join(kept)
    assert {type(what) for e in made for what in e.counts} <= {type, EventKind}


def test_a_selector_with_ports_is_told_in_full() -> None:
    selector = replace(any_selector(), proto=17, dport=53, dport_mask=0xFFFF)
    made, _ = journal()
    made.note_events([PolicyAdded(make_policy(selector=selector))], KernelModel())
    assert texts(made) == ["policy out 0.0.0.0/0 > 0.0.0.0/0 udp dport 53 added"]


@pytest.mark.parametrize(("number", "said"), [(0, "0 tunnels"), (1, "1 tunnel"), (4000, "4,000 tunnels")])
def test_numbers_are_said_in_singular_and_plural(number: int, said: str) -> None:
    assert count_text(number, "tunnel") == said
