"""Status on a terminal: a table for many, a paragraph for one, an answer in one screen."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from vppipsec.status.text import (
    EVENTS_SHOWN,
    TEXTS,
    columns,
    counters_text,
    events_text,
    policy_text,
    sa_detail_text,
    sa_text,
    sync_text,
    tunnel_text,
)

NOW = 1_700_000_000.0

SYNC: dict[str, Any] = {
    "version": "1",
    "state": "in-sync",
    "problem": "",
    "own_packets": "",
    "kernel": {"sas": 2, "policies": 3},
    "vpp": {"version": "26.06", "pid": 77, "sas": 2, "tunnels": 1, "routes": 1, "leftovers": 0},
    "counts": {"synced": 2, "pending": 0, "unsupported": 0, "refused": 0},
    "last_event": {"time": NOW - 3, "name": "SaAdded"},
    "last_resync": NOW - 60,
    "queue": 0,
    "events": 12345,
    "overflows": 1,
    "resyncs": 2,
    "refusals": 0,
    "withheld": 0,
    "reconnects": 1,
    "rekeys": 0,
    "acquires": 3,
    "requests": 99,
}

SA: dict[str, Any] = {
    "spi": "0x000000c1",
    "src": "192.0.2.2",
    "dst": "192.0.2.1",
    "direction": "in",
    "reqid": 1,
    "if_id": 0,
    "mode": "tunnel",
    "algorithm": "cbc(aes) 128 + hmac(sha256) 128",
    "esn": False,
    "encap": "",
    "state": "synced",
    "reason": "",
    "tunnel": "ipsec0",
    "sad_id": 0x49500000,
}

DETAIL: dict[str, Any] = SA | {
    "proto": 50,
    "replay_window": 32,
    "flags": ["af_unspec"],
    "mark": "",
    "set_mark": "",
    "selector": "0.0.0.0/0 > 0.0.0.0/0",
    "limits": {"soft_bytes": 1000, "hard_packets": 5000, "soft_add_s": 3300, "hard_add_s": 3600},
    "added": int(NOW),
    "stat_index": 4,
    "replay_window_in_vpp": 64,
    "packets": 1234567,
    "bytes": 99,
    "errors": {"lost": 4, "replay": 3000},
}

POLICY: dict[str, Any] = {
    "selector": "10.1.0.0/24 > 10.2.0.0/24",
    "direction": "out",
    "action": "allow",
    "priority": 1000,
    "type": "main",
    "reqid": 1,
    "if_id": 0,
    "mark": "",
    "peers": ["192.0.2.1 > 192.0.2.2"],
    "steering": "routed",
    "by": "rules",
    "route": "10.2.0.0/24",
    "tunnel": "ipsec0",
    "reason": "",
}

TUNNEL: dict[str, Any] = {
    "local": "192.0.2.1",
    "remote": "192.0.2.2",
    "mode": "tunnel",
    "reqid": 1,
    "if_id": 0,
    "tunnel": "ipsec0",
    "inbound": 2,
    "outbound": 1,
    "policies": 3,
    "routes": ["10.2.0.0/24", "10.3.0.0/24"],
    "state": "synced",
    "reason": "",
    "denied": 12345,
    "own_packets": "VPP, over ipsec0",
}


@pytest.fixture(autouse=True)
def in_utc_at_a_known_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    monkeypatch.setattr(time, "time", lambda: NOW)
    yield
    monkeypatch.undo()
    time.tzset()


def test_sync_is_one_screen() -> None:
    assert sync_text(SYNC).splitlines() == [
        "State      in-sync",
        "Kernel     2 SAs, 3 policies",
        "VPP        2 SAs, 1 tunnel, 1 route  (VPP 26.06, process 77)",
        "SAs        2 synced, 0 pending, 0 unsupported, 0 refused",
        "Last event 3.0 s ago (SaAdded)",
        "Queue      0 tunnels to look at",
        "Netlink    12,345 events, 1 overflow, 2 resyncs (last 60.0 s ago)",
        "VPP API    99 requests, 0 refusals, 0 withheld, 1 reconnect, 0 rekeys and 3 tunnels asked for",
    ]


def test_sync_says_what_is_wrong() -> None:
    vpp = {"version": "", "pid": 0, "sas": 0, "tunnels": 0, "routes": 0, "leftovers": 1}
    nothing = {"time": 0.0, "name": ""}
    text = sync_text(
        SYNC | {"state": "disconnected", "problem": "no answer", "vpp": vpp, "last_event": nothing, "last_resync": 0.0}
    )
    assert "State      disconnected: no answer" in text
    assert "0 routes, 1 leftover of an earlier run  (VPP not connected)" in text
    assert "Last event never" in text
    assert "(last never)" in text
    alone = sync_text(SYNC | {"own_packets": "there is no interface ipsec256"}).splitlines()[1]
    assert alone == "Router     its own packets are the kernel's: there is no interface ipsec256"


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        (SA, ["0x000000c1", "192.0.2.2 > 192.0.2.1", "in", "1", SA["algorithm"], "ipsec0", "synced"]),
        (
            SA | {"state": "unsupported", "reason": "VPP has no hmac(sha256)", "tunnel": ""},
            [
                "0x000000c1",
                "192.0.2.2 > 192.0.2.1",
                "in",
                "1",
                SA["algorithm"],
                "-",
                "unsupported: VPP has no hmac(sha256)",
            ],
        ),
        *(
            (
                SA | {"state": "unsupported", "reason": "no cipher", "fallback": what, "fallback_reason": why},
                [
                    "0x000000c1",
                    "192.0.2.2 > 192.0.2.1",
                    "in",
                    "1",
                    SA["algorithm"],
                    "ipsec0",
                    f"unsupported: no cipher; {said}",
                ],
            )
            for what, why, said in (
                ("kernel", "", "the kernel has its packets"),
                ("drop", "", "its packets are dropped"),
                ("drop", "there is no tap", "dropped: there is no tap"),
            )
        ),
        (
            SA | {"esn": True, "encap": "4500>4501"},
            [
                "0x000000c1",
                "192.0.2.2 > 192.0.2.1",
                "in",
                "1",
                f"{SA['algorithm']} esn udp 4500>4501",
                "ipsec0",
                "synced",
            ],
        ),
    ],
)
def test_an_sa_is_a_line(row: dict[str, Any], cells: list[str]) -> None:
    line = sa_text([row]).splitlines()[2]
    assert re.split(" {2,}", line) == cells


def test_an_sa_in_detail_is_a_paragraph() -> None:
    assert sa_detail_text({"problem": "", "rows": [DETAIL]}).splitlines() == [
        "src 192.0.2.2 dst 192.0.2.1",
        "    spi 0x000000c1 reqid 1 mode tunnel direction in",
        "    state       synced",
        "    algorithms  cbc(aes) 128 + hmac(sha256) 128",
        "    replay      32 packets, 64 in VPP",
        "    flags       af_unspec",
        "    selector    0.0.0.0/0 > 0.0.0.0/0",
        "    limits      bytes 1,000/-, packets -/5,000, add 3,300/3,600 s (soft/hard)",
        "    added       2023-11-14 22:13:20",
        "    VPP         sad_id 0x49500000, stat_index 4, ipsec0",
        "    passed      1,234,567 packets, 99 bytes",
        "    errors      lost 4, replay 3,000",
    ]


def test_an_sa_in_detail_that_vpp_does_not_hold() -> None:
    changes: dict[str, Any] = {
        "sad_id": None,
        "stat_index": None,
        "replay_window_in_vpp": None,
        "packets": None,
        "bytes": None,
        "errors": {},
        "limits": {},
        "flags": [],
        "added": 0,
        "state": "unsupported",
        "reason": "AH: only ESP is carried",
        "if_id": 5,
        "mark": "0x10/0xff",
        "set_mark": "0x1/0xff",
        "encap": "4500>4500",
    }
    text = sa_detail_text({"problem": "VPP is not connected", "rows": [DETAIL | changes, DETAIL]})
    assert text.startswith("VPP is not connected\n\nsrc 192.0.2.2")
    first = text.split("\n\n")[1]
    for line in (
        "direction in if_id 5 mark 0x10/0xff set_mark 0x1/0xff",
        "state       unsupported: AH: only ESP is carried",
        "replay      32 packets\n",
        "flags       udp-encap 4500>4500",
        "limits      none",
        "added       -",
        "VPP         not in VPP",
        "passed      - packets, - bytes",
        "errors      -",
    ):
        assert line in first


def test_a_window_that_vpp_does_not_keep_is_said() -> None:
    assert "0 packets, none in VPP" in sa_detail_text(
        {"problem": "", "rows": [DETAIL | {"replay_window": 0, "replay_window_in_vpp": 0}]}
    )


def test_counters_are_a_line_each_and_what_is_not_known_is_a_dash() -> None:
    unknown = DETAIL | {"spi": "0x000000c2", "packets": None, "bytes": None, "errors": {}, "tunnel": ""}
    assert counters_text({"problem": "VPP's stats socket is shut", "rows": [DETAIL, unknown]}).splitlines() == [
        "VPP's stats socket is shut",
        "",
        "SPI         Endpoints              Dir  Reqid  Tunnel  Packets    Bytes  Errors",
        "----------  ---------------------  ---  -----  ------  ---------  -----  ------",
        "0x000000c1  192.0.2.2 > 192.0.2.1  in   1      ipsec0  1,234,567  99     lost 4, replay 3,000",
        "0x000000c2  192.0.2.2 > 192.0.2.1  in   1      -       -          -      -",
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "10.2.0.0/24 into ipsec0 by rules"),
        ({"steering": "dropped", "reason": "there is no SA"}, "10.2.0.0/24 dropped: there is no SA"),
        ({"steering": "not carried", "route": "", "reason": "it blocks"}, "not carried: it blocks"),
        ({"steering": "refused", "reason": "BUSY (-167)"}, "refused 10.2.0.0/24: BUSY (-167)"),
        ({"steering": "pending", "route": "", "reason": ""}, "pending"),
        ({"steering": "", "direction": "in", "route": ""}, "-"),
    ],
)
def test_of_a_policy_is_said_where_its_packets_go(changes: dict[str, Any], said: str) -> None:
    head, _, line = policy_text([POLICY | changes]).splitlines()
    assert line[head.index("In VPP") :] == said


def test_a_policy_is_a_line() -> None:
    bare = POLICY | {"reqid": 0, "peers": [], "if_id": 5, "mark": "0x10/0xff", "steering": ""}
    line = policy_text([bare]).splitlines()[2]
    assert line.split("  ")[0] == "10.1.0.0/24 > 10.2.0.0/24 mark 0x10/0xff"
    assert line.split() == [
        "10.1.0.0/24",
        ">",
        "10.2.0.0/24",
        "mark",
        "0x10/0xff",
        "out",
        "allow",
        "1000",
        "-",
        "5",
        "-",
        "-",
    ]


def test_a_tunnel_is_a_line() -> None:
    bare = TUNNEL | {
        "tunnel": "",
        "routes": [],
        "if_id": 9,
        "denied": None,
        "own_packets": "the kernel: its VTI is in a VRF",
    }
    bare |= {"state": "pending", "reason": "there is no SA"}
    assert tunnel_text([TUNNEL, bare]).splitlines()[2:] == [
        "192.0.2.1  192.0.2.2  1      -      ipsec0  2/1         12,345  VPP          10.2.0.0/24 +1  synced",
        "192.0.2.1  192.0.2.2  1      9      -       2/1         -       kernel       -               pending: there is no SA",
    ]


def test_events_are_the_last_screen_with_the_newest_at_the_end() -> None:
    rows = [{"time": NOW + n, "until": NOW + n, "source": "kernel", "text": f"line {n}"} for n in range(30)]
    lines = events_text(rows).splitlines()
    assert lines[0] == "(10 earlier)"
    assert lines[1:] == [f"2023-11-14 22:13:{20 + n}  kernel    line {n}" for n in range(10, 30)]
    assert len(lines) == EVENTS_SHOWN + 1
    assert len(events_text(rows, 100).splitlines()) == 30
    assert events_text(rows, 1).splitlines() == ["(29 earlier)", "2023-11-14 22:13:49  kernel    line 29"]


def test_a_flood_says_how_long_it_took() -> None:
    row = {"time": NOW, "until": NOW + 3.21, "source": "vpp", "text": "4,000 SAs deleted"}
    assert events_text([row]) == "2023-11-14 22:13:20  vpp       4,000 SAs deleted within 3.2 s"


@pytest.mark.parametrize(
    ("what", "empty", "said"),
    [
        ("sa", [], "There are no such SAs in the kernel."),
        ("policy", [], "There are no such policies in the kernel."),
        ("tunnel", [], "The kernel has no tunnels."),
        ("events", [], "Nothing has happened yet."),
        ("counters", {"problem": "", "rows": []}, "There are no such SAs in the kernel."),
    ],
)
def test_nothing_is_said_in_a_sentence(what: str, empty: Any, said: str) -> None:
    assert TEXTS[what](empty) == said


def test_no_details_are_said_in_a_sentence() -> None:
    assert sa_detail_text({"problem": "", "rows": []}) == "There are no such SAs in the kernel."


def test_columns_are_as_wide_as_their_widest_cell_and_end_without_blanks() -> None:
    assert columns(("A", "Long", "Z"), [("xxx", "y", "z z z"), ("x", "y", "")]).splitlines() == [
        "A    Long  Z",
        "---  ----  -",
        "xxx  y     z z z",
        "x    y",
    ]
