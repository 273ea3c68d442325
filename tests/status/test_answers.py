"""What an operator is told, of a service between a kernel and a VPP, which is the stand-in or a real one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from support.build import GCM, LOCAL, LOCAL6, REMOTE, REMOTE6, make_policy, make_sa, sa_in, sa_out
from support.rig import KINDS, Rig, play
from support.status_rig import Asker, play_asking, until
from vppipsec.kernel.text import parse_addr
from vppipsec.kernel.xfrm.events import SasFlushed
from vppipsec.kernel.xfrm.values import XFRM_INF, Encap, Limits, Mark, Policy, PolicyDir, SaFlag
from vppipsec.status import server as status_socket
from vppipsec.status.tunnels import acls_of, tunnel_rows
from vppipsec.vpp.api.client import connect
from vppipsec.vpp.ownership import SAD_ID_FIRST

pytestmark = pytest.mark.parametrize("kind", KINDS)

IN, OUT = sa_in(0xC1), sa_out(0xD1)
POLICIES = (make_policy(), make_policy(PolicyDir.IN), make_policy(PolicyDir.FWD))
THIRD = parse_addr("192.0.2.3")


def of(rows: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in rows]


def test_sync_tells_totals_of_both_sides(kind: str) -> None:
    async def story(rig: Rig, asking: Asker) -> None:
        rig.kernel.add(IN, OUT, *POLICIES)
        rig.kernel.add(make_sa(0xE1, REMOTE, LOCAL, 9))  # a tunnel that lacks its outbound SA
        await rig.settle()
        view = await asking.ask("show sync")
        assert (view["state"], view["problem"], view["kernel"]) == ("in-sync", "", {"sas": 3, "policies": 3})
        assert (view["vpp"]["sas"], view["vpp"]["tunnels"], view["vpp"]["routes"]) == (2, 1, 1)
        assert view["vpp"]["leftovers"] == 0
        assert view["vpp"]["pid"] > 0
        assert {state: number for state, number in view["counts"].items() if number} == {"synced": 2, "pending": 1}
        assert (view["queue"], view["overflows"], view["refusals"], view["withheld"]) == (0, 0, 0, 0)
        assert view["last_event"]["name"] == "SaAdded"
        assert view["events"] == 6
        assert view["requests"] > 8

    play_asking(kind, story)


def test_while_vpp_is_away_nothing_counts_as_synced(kind: str) -> None:
    async def story(rig: Rig, asking: Asker) -> None:
        rig.kernel.add(IN, OUT, *POLICIES)
        await rig.settle()
        await rig.kill_vpp()
        await until(lambda: not rig.engine.in_sync)
        view = await asking.ask("show sync")
        assert view["state"] == "disconnected"
        assert "VPP" in view["problem"]
        assert {state: number for state, number in view["counts"].items() if number} == {"pending": 2}
        assert (view["vpp"]["sas"], view["vpp"]["tunnels"], view["vpp"]["routes"]) == (0, 0, 0)
        rows = await asking.rows("show sa")
        assert {(row["state"], row["reason"], row["sad_id"]) for row in rows.values()} == {
            ("pending", "VPP is not connected", None)
        }
        assert of(await asking.ask("show tunnel"), "tunnel", "routes", "denied", "state", "reason") == [
            ("", [], None, "pending", "VPP is not connected")
        ]
        assert ("pending", "VPP is not connected") in of(await asking.ask("show policy"), "steering", "reason")
        counters = await asking.ask("show counters")
        assert counters["problem"]
        assert {row["packets"] for row in counters["rows"]} == {None}
        await rig.bring_vpp_back()
        await rig.settle()

    play_asking(kind, story)


def test_sas_are_told_with_what_they_are_and_how_vpp_holds_them(kind: str) -> None:
    async def story(rig: Rig, asking: Asker) -> None:
        nat = Encap(2, 4500, 40123, bytes(4))
        esn = sa_out(0xD1, flags=SaFlag.ESN | SaFlag.AF_UNSPEC, encap=nat)
        rig.kernel.add(sa_in(0xC1, encap=nat), esn, make_policy())
        await rig.settle()
        rows = await asking.rows("show sa")
        assert rows["0x000000d1"] == {
            "spi": "0x000000d1",
            "src": "192.0.2.1",
            "dst": "192.0.2.2",
            "direction": "out",
            "reqid": 1,
            "if_id": 0,
            "mode": "tunnel",
            "algorithm": "rfc4106(gcm(aes)) 256/128",
            "esn": True,
            "encap": "4500>40123",
            "state": "synced",
            "reason": "",
            "fallback": "",
            "fallback_reason": "",
            "tunnel": "ipsec256",
            "sad_id": rows["0x000000d1"]["sad_id"],
        }
        assert {row["sad_id"] for row in rows.values()} == {SAD_ID_FIRST, SAD_ID_FIRST + 1}

    play_asking(kind, story)


def test_rekey_before_deletion_shows_the_old_outbound_sa_superseded(kind: str) -> None:
    async def story(rig: Rig, asking: Asker) -> None:
        rig.kernel.add(IN, OUT, make_policy(), sa_in(0xC2), sa_out(0xD2))
        await rig.settle()
        rows = await asking.rows("show sa")
        assert {spi: (row["state"], row["reason"]) for spi, row in rows.items()} == {
            "0x000000c1": ("synced", ""),
            "0x000000d1": ("synced", "a newer one is used"),
            "0x000000c2": ("synced", ""),
            "0x000000d2": ("synced", ""),
        }

    play_asking(kind, story)


def test_sas_are_found_by_peer_and_by_spi(kind: str) -> None:
    async def story(rig: Rig, asking: Asker) -> None:
        rig.kernel.add(IN, OUT, make_policy())
        rig.kernel.add(make_sa(7, REMOTE6, LOCAL6, 4), make_sa(8, LOCAL6, REMOTE6, 4))
        rig.kernel.add(make_policy(src="fd01::/64", dst="fd02::/64", reqid=4, ends=(LOCAL6, REMOTE6)))
        await rig.settle()
        assert set(await asking.rows("show sa", peer="2001:db8:0::2")) == {"0x00000007", "0x00000008"}
        assert set(await asking.rows("show sa", spi=0xD1)) == {"0x000000d1"}
        assert await asking.ask("show sa", peer="192.0.2.2", spi=8) == []
        assert set(await asking.rows("show counters", peer="192.0.2.2")) == {"0x000000c1", "0x000000d1"}
        assert of(await asking.ask("show tunnel", peer="2001:db8::2"), "remote") == [("2001:db8::2",)]
        assert of(await asking.ask("show policy", peer="2001:db8::2"), "route") == [("fd02::/64",)]

    play_asking(kind, story)


def test_details_tell_windows_flags_limits_and_numbers(kind: str) -> None:
    async def story(rig: Rig, asking: Asker) -> None:
        limits = Limits(1000, 2000, XFRM_INF, 5000, 3300, 3600, 0, 0)
        rig.kernel.add(sa_in(0xC1, limits=limits, replay_window=32, flags=SaFlag.AF_UNSPEC | SaFlag.NOECN), OUT)
        rig.kernel.add(make_policy(), make_sa(0xE1, LOCAL, REMOTE, 5, mark=Mark(0x10, 0xFF)))
        await rig.settle()
        (row,) = (await asking.ask("show sa", spi=0xC1, detail=True))["rows"]
        assert (row["replay_window"], row["replay_window_in_vpp"]) == (32, 64)
        assert row["flags"] == ["noecn", "af_unspec"]
        assert row["limits"] == {
            "soft_bytes": 1000,
            "hard_bytes": 2000,
            "hard_packets": 5000,
            "soft_add_s": 3300,
            "hard_add_s": 3600,
        }
        assert (row["selector"], row["mark"], row["added"]) == ("0.0.0.0/0 > 0.0.0.0/0", "", IN.usage.add_time)
        assert row["stat_index"] in (0, 1)
        assert (row["packets"], row["bytes"], row["errors"]) == (0, 0, {})
        (marked,) = (await asking.ask("show sa", spi=0xE1, detail=True))["rows"]
        assert (marked["mark"], marked["stat_index"], marked["replay_window_in_vpp"]) == ("0x10/0xff", None, None)

    play_asking(kind, story)


def test_tunnels_are_told_with_their_interface_sas_and_routes(kind: str) -> None:
    async def story(rig: Rig, asking: Asker) -> None:
        rig.kernel.add(IN, OUT, *POLICIES, make_policy(dst="10.9.0.0/16"))
        rig.kernel.add(make_policy(reqid=2, dst="10.3.0.0/24", ends=(LOCAL, THIRD)))  # a trap: no SA yet
        rig.kernel.add(make_sa(5, parse_addr("198.51.100.1"), parse_addr("198.51.100.2"), 6))
        await rig.settle()
        rows = sorted(await asking.ask("show tunnel"), key=lambda row: int(row["reqid"]))
        assert of(rows, "local", "remote", "reqid", "tunnel", "inbound", "outbound", "routes", "state", "reason") == [
            ("192.0.2.1", "192.0.2.2", 1, "ipsec256", 1, 1, ["10.2.0.0/24", "10.9.0.0/16"], "synced", ""),
            ("192.0.2.1", "192.0.2.3", 2, "", 0, 0, [], "pending", "there is no SA"),
            (
                "198.51.100.1",
                "198.51.100.2",
                6,
                "",
                0,
                0,
                [],
                "unsupported",
                "neither 198.51.100.1 nor 198.51.100.2 is on a VPP interface",
            ),
        ]

    play_asking(kind, story)


def test_a_tunnel_whose_surplus_sas_are_left_out_is_synced_and_says_so(kind: str) -> None:
    async def story(rig: Rig, asking: Asker) -> None:
        rig.kernel.add(*(sa_in(spi) for spi in range(1, 7)), OUT, make_policy())
        await rig.settle()
        rows = await asking.ask("show tunnel")
        assert of(rows, "inbound", "outbound", "state", "reason") == [
            (6, 1, "synced", "without 2 of its SAs: see `show sa`")
        ]

    play_asking(kind, story)


NARROWER = replace(make_policy().selector, prefixlen_d=25)

STEERED: list[tuple[str, Policy, tuple[str, str, str, str]]] = [
    ("routed", make_policy(), ("routed", "10.2.0.0/24", "ipsec256", "")),
    ("inbound", make_policy(PolicyDir.IN), ("", "", "", "")),
    (
        "several tunnels, one prefix",
        make_policy(src="10.7.0.0/24", reqid=2, ends=(LOCAL, THIRD), priority=2000),
        ("dropped", "10.2.0.0/24", "", "there is no SA"),
    ),
    (
        "no SA",
        make_policy(reqid=2, dst="10.3.0.0/24", ends=(LOCAL, THIRD)),
        ("dropped", "10.3.0.0/24", "", "there is no SA"),
    ),
    (
        "vti",
        make_policy(dst="0.0.0.0/0", if_id=5),
        ("not carried", "", "", "it is of a VTI (if_id 5): routes over that interface decide"),
    ),
    (
        "several tunnels, one selector",
        make_policy(reqid=2, ends=(LOCAL, THIRD), priority=2000, if_id=0, selector=NARROWER),
        ("not carried", "", "", "others before it take all its packets, or they are for the router itself"),
    ),
    ("default route", make_policy(dst="0.0.0.0/0"), ("routed", "0.0.0.0/0", "ipsec256", "")),
    ("one host", make_policy(src="0.0.0.0/0", dst="10.2.7.9/32"), ("routed", "10.2.7.9/32", "ipsec256", "")),
    (
        "not on VPP",
        make_policy(reqid=3, dst="10.4.0.0/24", ends=(parse_addr("198.51.100.1"), parse_addr("198.51.100.2"))),
        ("dropped", "10.4.0.0/24", "", "neither 198.51.100.1 nor 198.51.100.2 is on a VPP interface"),
    ),
    (
        "not reached",
        make_policy(reqid=3, dst="10.4.0.0/24", ends=(LOCAL, parse_addr("198.51.100.2"))),
        ("dropped", "10.4.0.0/24", "", "VPP has no route to 198.51.100.2"),
    ),
    (
        "bypass",
        make_policy(templates=(), dst="10.5.0.0/24"),
        ("in clear", "", "", "it needs nothing in VPP: no policy after it would take its packets"),
    ),
    ("bypass first", make_policy(templates=(), selector=NARROWER, priority=500), ("in clear", "", "", "")),
    (
        "block",
        make_policy(templates=(), action=1, dst="10.5.0.0/24"),
        ("dropped", "10.5.0.0/24", "", "it blocks"),
    ),
    (
        "mark",
        make_policy(dst="10.6.0.0/24", mark=Mark(1, 0xFF)),
        ("not carried", "", "", "its policy matches a firewall mark: packets in VPP carry none"),
    ),
]


@pytest.mark.parametrize(("policy", "told"), [case[1:] for case in STEERED], ids=[case[0] for case in STEERED])
def test_of_every_policy_is_told_where_its_packets_go(
    kind: str, policy: Policy, told: tuple[str, str, str, str]
) -> None:
    async def story(rig: Rig, asking: Asker) -> None:
        rig.kernel.add(IN, OUT, make_policy(), policy)
        await rig.settle()
        rows = await asking.ask("show policy")
        assert len(rows) == len({make_policy().id, policy.id})
        assert rows == sorted(rows, key=lambda row: row["priority"])
        ours = rows[-1] if policy.priority == 1000 else next(r for r in rows if r["priority"] == policy.priority)
        assert of([ours], "steering", "route", "tunnel", "reason") == [told]

    play_asking(kind, story)


def test_policies_are_told_in_full(kind: str) -> None:
    async def story(rig: Rig, asking: Asker) -> None:
        selector = replace(make_policy().selector, proto=17, dport=53, dport_mask=0xFFFF)
        rig.kernel.add(make_policy(selector=selector, priority=77, if_id=5, mark=Mark(0x10, 0xFF)))
        await rig.settle()
        (row,) = await asking.ask("show policy")
        assert {name: row[name] for name in ("selector", "direction", "action", "priority", "type")} == {
            "selector": "10.1.0.0/24 > 10.2.0.0/24 udp dport 53",
            "direction": "out",
            "action": "allow",
            "priority": 77,
            "type": "main",
        }
        assert (row["reqid"], row["if_id"], row["mark"]) == (1, 5, "0x10/0xff")
        assert row["peers"] == ["192.0.2.1 > 192.0.2.2"]

    play_asking(kind, story)


def test_counters_come_from_vpps_stats_segment(kind: str) -> None:
    async def story(rig: Rig, asking: Asker) -> None:
        by_route = make_policy(src="0.0.0.0/0", dst="10.2.0.5/32")  # which VPP's own packets take as well
        rig.kernel.add(IN, OUT, by_route, make_sa(0xE1, REMOTE, LOCAL, 9))
        await rig.settle()
        actual = next(iter(rig.engine.tunnels.values())).actual
        outbound = next(sa for sa in actual.sas.values() if not sa.spec.inbound)
        if asking.segment is not None:
            asking.segment.count(outbound.stat_index, 3, 348)
        else:
            client = await connect(rig.api_socket, also=("cli_inband",))
            await client.call("cli_inband", {"cmd": "ping 10.2.0.5 source loop0 repeat 3 interval 0.02"})
            await client.close()
        answer = await asking.ask("show counters")
        rows = {row["spi"]: (row["packets"], row["bytes"], row["errors"]) for row in answer["rows"]}
        assert answer["problem"] == ""
        assert rows == {"0x000000d1": (3, 348, {}), "0x000000c1": (0, 0, {}), "0x000000e1": (None, None, {})}

    play_asking(kind, story)


def test_packets_outside_of_the_selectors_are_told_by_tunnel(kind: str) -> None:
    async def story(rig: Rig, asking: Asker) -> None:
        async def told() -> list[tuple[Any, ...]]:
            return sorted(of(await asking.ask("show tunnel"), "reqid", "denied"))

        rig.kernel.add(IN, OUT, *POLICIES)
        rig.kernel.add(sa_in(0xC2, 2), sa_out(0xD2, 2), make_policy(reqid=2, dst="10.3.0.0/24"))
        rig.kernel.add(make_sa(0xE1, REMOTE, LOCAL, 9))
        await rig.settle()
        assert await told() == [(1, 0), (2, 0), (9, None)]
        if asking.segment is None:
            return  # what a real VPP counts, packets on a wire show
        for key, state in rig.engine.tunnels.items():
            if state.actual.acl is not None:
                for number, rule in enumerate(state.actual.rules):
                    asking.segment.count_matches(state.actual.acl, number, 1000 if rule.permit else key.reqid)
        assert await told() == [(1, 2), (2, 4), (9, None)]
        assert of(await asking.ask("show tunnel", peer="192.0.2.9"), "denied") == []
        rig.kernel.add(make_policy(PolicyDir.IN, "10.9.0.0/24", "10.1.0.0/24"))
        await rig.settle()
        assert await told() == [(1, 0), (2, 4), (9, None)]

    play_asking(kind, story)


def test_packets_outside_the_selectors_are_counted_when_enforced(kind: str) -> None:
    async def story(rig: Rig) -> None:
        def counts() -> bool:
            if rig.box is not None:
                return "Stats counters enabled for interface ACLs: 1" in rig.box.cli("show acl-plugin tables mask")
            assert rig.standin is not None
            return rig.standin.world.counts_acl_matches

        enforced = rig.settings
        rig.settings = replace(rig.settings, offload=replace(rig.settings.offload, selector_enforcement=False))
        rig.kernel.add(IN, OUT, *POLICIES)
        await rig.restart_engine()
        await rig.engine.wait_in_sync()
        assert not counts()
        assert of(list(tunnel_rows(rig.engine)), "state") == [("synced",)]
        assert acls_of(rig.engine) == {}
        rig.engine.reload(enforced)
        await rig.settle()
        assert counts()
        assert len(acls_of(rig.engine)) == 1

    play(kind, story)


def test_what_vpp_may_count_for_other_rules_by_now_is_not_told(kind: str) -> None:
    async def story(rig: Rig, asking: Asker) -> None:
        rig.kernel.add(IN, OUT, *POLICIES)
        await rig.settle()
        (state,) = rig.engine.tunnels.values()
        reading = status_socket.read_acl_matches

        async def overtaken(path: str, rules: Any) -> dict[int, int]:
            found = await reading(path, rules)
            assert state.desired.tunnel is not None
            wider = state.desired.tunnel.inbound_rules[1:]  # type: ignore[index]  # it is enforced
            state.desired = replace(state.desired, tunnel=replace(state.desired.tunnel, inbound_rules=wider))
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(status_socket, "read_acl_matches", overtaken)
            assert of(await asking.ask("show tunnel"), "denied") == [(None,)]

    play_asking(kind, story)


def test_without_a_stats_socket_counters_say_why_they_are_missing(kind: str) -> None:
    async def story(rig: Rig, asking: Asker) -> None:
        rig.kernel.add(IN, OUT, make_policy())
        await rig.settle()
        nowhere = replace(rig.settings.vpp, stats_socket="/nonexistent/stats.sock")
        rig.engine.reload(replace(rig.settings, vpp=nowhere))
        for answer in (await asking.ask("show counters"), await asking.ask("show sa", detail=True)):
            assert answer["problem"].startswith(
                "VPP's stats socket /nonexistent/stats.sock cannot be read: No such file"
            )
            assert {(row["state"], row["packets"]) for row in answer["rows"]} == {("synced", None)}
        assert of(await asking.ask("show tunnel"), "state", "denied") == [("synced", None)]

    play_asking(kind, story)


def test_events_tell_the_story_of_a_tunnel(kind: str) -> None:
    async def story(rig: Rig, asking: Asker) -> None:
        await until(lambda: rig.engine.client is not None and rig.engine.in_sync)
        steps: list[Callable[[], None]] = [
            lambda: rig.kernel.add(IN, OUT, make_policy()),
            lambda: rig.kernel.add(sa_in(0xC2), sa_out(0xD2)),
            lambda: rig.kernel.delete(OUT),
            lambda: (rig.kernel.sas.clear(), rig.kernel.tell(SasFlushed(0))),  # type: ignore[arg-type, return-value]  # done for its effects
        ]
        for step in steps:
            step()
            await rig.settle()
        await asking.ask("reset sync")
        rows = await asking.ask("show events")
        assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
        told = [(row["source"], row["text"]) for row in rows]
        assert told[0][0] == "vpp"
        assert told[0][1].startswith("connected to VPP ")
        assert told[1:] == [
            ("kernel", "SA 0x000000c1 192.0.2.2 > 192.0.2.1 reqid 1 added"),
            ("kernel", "SA 0x000000d1 192.0.2.1 > 192.0.2.2 reqid 1 added"),
            ("kernel", "policy out 10.1.0.0/24 > 10.2.0.0/24 added"),
            ("kernel", "SA 0x000000c2 192.0.2.2 > 192.0.2.1 reqid 1 added, to replace 0x000000c1"),
            ("kernel", "SA 0x000000d2 192.0.2.1 > 192.0.2.2 reqid 1 added, to replace 0x000000d1"),
            ("kernel", "SA 0x000000d1 192.0.2.1 > 192.0.2.2 reqid 1 deleted"),
            ("kernel", "all SAs flushed"),
            ("operator", "asked for everything to be read anew"),
        ]

    play_asking(kind, story)


def test_events_tell_of_vpps_end_and_return_and_of_what_a_dump_found(kind: str) -> None:
    async def story(rig: Rig, asking: Asker) -> None:
        rig.kernel.add(IN, OUT, make_policy())
        await rig.settle()
        await rig.kill_vpp()
        await until(lambda: not rig.engine.in_sync)
        await rig.bring_vpp_back()
        await rig.settle()
        rig.kernel.silent = True
        rig.kernel.delete(*rig.kernel.sas.values())
        rig.kernel.silent = False
        await asking.ask("reset sync")
        await until(lambda: rig.engine.in_sync and rig.engine.model.sa_count == 0)
        texts = [row["text"] for row in await asking.ask("show events")]
        assert "VPP closed the connection" in texts
        assert sum(text.startswith("connected to VPP") for text in texts) == 2
        asked = "cannot go on with SA 0x000000d1 192.0.2.1 > 192.0.2.2 reqid 1: a rekey is asked for"
        assert asked in texts
        assert (await asking.ask("show sync"))["rekeys"] >= 1
        assert "its tables, read in full, told of changes in 1 tunnel" in texts

    play_asking(kind, story)


def test_events_tell_of_what_an_earlier_run_left(kind: str) -> None:
    async def story(rig: Rig, asking: Asker) -> None:
        rig.kernel.add(IN, OUT, make_policy())
        rig.kernel.add(sa_in(0xC5, 5), sa_out(0xD5, 5), make_policy(reqid=5, dst="10.5.0.0/24"))
        await rig.settle()
        await rig.stop()
        rig.kernel.delete(sa_in(0xC5, 5), sa_out(0xD5, 5), make_policy(reqid=5, dst="10.5.0.0/24"))
        await rig.restart_engine()
        await rig.settle()
        texts = [entry.text for entry in rig.engine.journal]
        assert "has 2 tunnels and 4 SAs of an earlier run; those that are still right stay" in texts
        assert "removing 1 tunnel of an earlier run" in texts

    play_asking(kind, story)


def test_keys_are_in_no_answer(kind: str) -> None:
    async def story(rig: Rig, asking: Asker) -> None:
        key = bytes(range(0xA0, 0xC4))
        secret = GCM._replace(key=key)
        rig.kernel.add(sa_in(0xC1, aead=secret), sa_out(0xD1, aead=secret), make_policy())
        await rig.settle()
        told = ""
        for what in ("sync", "sa", "policy", "tunnel", "events", "counters"):
            told += repr(await asking.ask(f"show {what}"))
        told += repr(await asking.ask("show sa", detail=True))
        assert "0x000000c1" in told
        for piece in (key.hex(), key[:8].hex(), repr(key[:8])[2:-1], str(list(key[:4]))[1:-1]):
            assert piece not in told.lower()

    play_asking(kind, story)
