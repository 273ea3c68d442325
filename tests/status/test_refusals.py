"""What VPP refuses is told of the SA, tunnel or policy that it belongs to, and of no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from support.build import LOCAL, make_policy, make_sa, sa_in, sa_out
from support.rig import Rig
from support.status_rig import Asker, play_asking, until
from vppipsec.kernel.text import parse_addr

THIRD = parse_addr("192.0.2.3")


def refusing(message: str, matches: Callable[[Any], bool] = lambda request: True) -> Callable[[str, Any], int | None]:
    """Return a fault that refuses some requests of one kind, for ever."""
    return lambda name, request: -7 if name == message and matches(request) else None


def has_tried(rig: Rig, refusals: int = 1) -> bool:
    """Tell whether VPP has been asked for all that is wanted, and has refused so much at least."""
    return rig.engine.counters.refusals >= refusals and not rig.engine.queue_length and not rig.engine._is_working


def add_two_tunnels(rig: Rig) -> None:
    rig.kernel.add(sa_in(1), sa_out(2), make_policy())
    rig.kernel.add(make_sa(3, THIRD, LOCAL, 9), make_sa(4, LOCAL, THIRD, 9))
    rig.kernel.add(make_policy(reqid=9, dst="10.9.0.0/24", ends=(LOCAL, THIRD)))


def test_a_refused_sa_is_named_and_the_rest_of_the_world_is_well() -> None:
    async def story(rig: Rig, asking: Asker) -> None:
        add_two_tunnels(rig)
        await until(lambda: has_tried(rig))
        rows = await asking.rows("show sa")
        assert {spi: (row["state"], row["reason"]) for spi, row in rows.items()} == {
            "0x00000001": ("pending", "its counterpart 0x00000002 was refused: INVALID_VALUE (-7)"),
            "0x00000002": ("refused", "INVALID_VALUE (-7)"),
            "0x00000003": ("synced", ""),
            "0x00000004": ("synced", ""),
        }
        tunnels = {row["reqid"]: (row["state"], row["reason"]) for row in await asking.ask("show tunnel")}
        assert tunnels == {1: ("refused", "SA 0x00000002: INVALID_VALUE (-7)"), 9: ("synced", "")}
        sync = await asking.ask("show sync")
        assert sync["state"] == "converging"
        assert sync["problem"] == ("VPP refuses SA 0x00000002: INVALID_VALUE (-7) (192.0.2.1 - 192.0.2.2 reqid 1)")
        assert sync["refusals"] >= 1
        texts = [row["text"] for row in await asking.ask("show events")]
        assert texts.count("SA 0x00000002 of 192.0.2.1 - 192.0.2.2 reqid 1: INVALID_VALUE (-7)") == 1

    play_asking("standin", story, refusing("ipsec_sad_entry_add_v2", lambda request: request.entry.spi == 2))


def test_a_refused_rekey_leaves_the_old_sas_synced() -> None:
    async def story(rig: Rig, asking: Asker) -> None:
        rig.kernel.add(sa_in(1), sa_out(2), make_policy())
        await rig.settle()
        rig.kernel.add(sa_in(0x11), sa_out(0x12))
        await until(lambda: has_tried(rig))
        rows = await asking.rows("show sa")
        assert {spi: row["state"] for spi, row in rows.items()} == {
            "0x00000001": "synced",
            "0x00000002": "synced",
            "0x00000011": "synced",
            "0x00000012": "refused",
        }

    play_asking("standin", story, refusing("ipsec_sad_entry_add_v2", lambda request: request.entry.spi == 0x12))


def test_refused_route_shows_at_its_policy_and_tunnel_not_at_sas() -> None:
    async def story(rig: Rig, asking: Asker) -> None:
        add_two_tunnels(rig)
        await until(lambda: has_tried(rig))
        assert {row["state"] for row in (await asking.rows("show sa")).values()} == {"synced"}
        policies = {
            row["reqid"]: (row["steering"], row["route"], row["reason"]) for row in await asking.ask("show policy")
        }
        assert policies[1] == ("routed", "10.2.0.0/24", "")
        assert policies[9] == ("refused", "10.9.0.0/24", "INVALID_VALUE (-7)")
        tunnels = {row["reqid"]: (row["state"], row["reason"]) for row in await asking.ask("show tunnel")}
        assert tunnels[9] == ("refused", "route 10.9.0.0/24: INVALID_VALUE (-7)")
        texts = [row["text"] for row in await asking.ask("show events")]
        assert "route 10.9.0.0/24 of 192.0.2.1 - 192.0.2.3 reqid 9: INVALID_VALUE (-7)" in texts

    def is_ninth(request: Any) -> bool:
        return bytes(request.route.prefix.address.un.ip4) == bytes((10, 9, 0, 0))

    play_asking("standin", story, refusing("ip_route_add_del_v2", is_ninth))


def test_many_refused_tunnels_are_one_line_and_a_number() -> None:
    async def story(rig: Rig, asking: Asker) -> None:
        for number in range(1, 31):
            dst = f"10.3.{number}.0/24"
            rig.kernel.add(sa_in(number, number), sa_out(100 + number, number), make_policy(reqid=number, dst=dst))
        await until(lambda: has_tried(rig, 30))
        sync = await asking.ask("show sync")
        assert "ipsec_itf_create: INVALID_VALUE (-7)" in sync["problem"]
        assert sync["problem"].endswith(", and 29 tunnels more)")
        assert sync["counts"]["refused"] == 60
        texts = [row["text"] for row in await asking.ask("show events") if row["source"] == "vpp"]
        assert texts[-1].endswith("requests refused or not sent")
        assert len(texts) <= 12

    play_asking("standin", story, refusing("ipsec_itf_create"))
