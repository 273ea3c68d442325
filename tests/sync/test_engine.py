"""The engine between a kernel and VPP, stand-in and real: whatever happens, VPP ends equal."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator

import pytest

from support.build import ENV, GCM128, LOCAL, LOCAL6, REMOTE6, make_policy, make_sa, sa_in, sa_out
from support.recorded import PATIENCE_S
from support.rig import KINDS, Rig, play
from vppipsec.kernel.text import parse_addr
from vppipsec.kernel.xfrm.events import Migrated, PoliciesFlushed, SasFlushed
from vppipsec.kernel.xfrm.sad_spd import KernelModel
from vppipsec.kernel.xfrm.socket import Overflow
from vppipsec.kernel.xfrm.values import Encap, Policy, PolicyDir, Sa, SaFlag
from vppipsec.status.summary import sa_view, sync_view
from vppipsec.status.tunnels import policy_rows
from vppipsec.sync.desired.tunnel import translate
from vppipsec.sync.ike.rekey_queue import REKEY_REPEAT_FIRST_S
from vppipsec.vpp.api.ipsec import IpsecItfCreate, SadEntryAdd
from vppipsec.vpp.ownership import SAD_ID_FIRST
from vppipsec.vpp.types import SaSpec

pytestmark = [pytest.mark.versions, pytest.mark.parametrize("kind", KINDS)]


def tunnel(number: int) -> tuple[list[Sa], list[Policy]]:
    """Return one of many tunnels, each to a peer of its own behind the same WAN."""
    remote = bytes((192, 0, 2, 2 + number % 200))
    reqid = number + 1
    sas = [
        make_sa(0xC0000000 + number, remote, LOCAL, reqid),
        make_sa(0xD0000000 + number, LOCAL, remote, reqid),
    ]
    inner = f"10.{number >> 8}.{number & 255}.0/24"
    policies = [
        make_policy(direction, "172.16.0.0/16", inner, reqid, (LOCAL, remote)) for direction in (PolicyDir.OUT,)
    ]
    return sas, policies


def rekeyed(sas: list[Sa], by: int = 0x100000) -> list[Sa]:
    return [sa._replace(spi=sa.spi + by) for sa in sas]


def outbound_spec(spi: int) -> SaSpec:
    """Return what VPP is to hold of an outbound SA of the default tunnel."""
    model = KernelModel()
    model.replace([sa_out(spi), sa_in(spi + 1)], [make_policy()])
    ((key, tunnel),) = model.tunnels.items()
    made = translate(key, tunnel, ENV).tunnel
    assert made is not None
    return made.outbound[0]


def states(rig: Rig) -> dict[str, int]:
    return {name: count for name, count in sync_view(rig.engine)["counts"].items() if count}


def test_what_was_there_before_the_start_is_programmed(kind: str) -> None:
    async def story(rig: Rig) -> None:
        rig.kernel.silent = True
        rig.kernel.add(sa_in(1), sa_out(2), make_policy(), make_policy(PolicyDir.IN))
        rig.start()
        await rig.settle()
        assert states(rig) == {"synced": 2}
        view = sync_view(rig.engine)
        assert (view["state"], view["vpp"]["sas"], view["vpp"]["tunnels"], view["vpp"]["routes"]) == (
            "in-sync",
            2,
            1,
            1,
        )

    play(kind, story)


def test_set_up_rekey_and_delete_leave_vpp_equal_each_time(kind: str) -> None:
    async def story(rig: Rig) -> None:
        rig.start()
        kernel = rig.kernel
        old = [sa_in(1), sa_out(2)]
        kernel.add(*old, make_policy())
        await rig.settle()
        new = rekeyed(old)
        kernel.add(*new)
        await rig.settle()
        assert states(rig) == {"synced": 4}
        kernel.delete(old[1])
        await rig.settle()
        kernel.delete(old[0])
        await rig.settle()
        assert states(rig) == {"synced": 2}
        kernel.delete(*new, make_policy())
        await rig.settle()
        view = sync_view(rig.engine)
        assert (view["vpp"]["sas"], view["vpp"]["tunnels"], view["vpp"]["routes"]) == (0, 0, 0)

    play(kind, story)


def test_all_kinds_of_tunnels_side_by_side(kind: str) -> None:
    async def story(rig: Rig) -> None:
        rig.start()
        esn = {"flags": SaFlag.ESN | 32, "replay_window": 1024}
        nat = {"encap": Encap(2, 4500, 4500, bytes(4))}
        rig.kernel.add(sa_in(1), sa_out(2), make_policy())
        rig.kernel.add(sa_in(3, 2, **esn), sa_out(4, 2, **esn), make_policy(reqid=2, dst="10.3.0.0/24"))
        rig.kernel.add(sa_in(5, 3, **nat), sa_out(6, 3, **nat), make_policy(reqid=3, dst="10.4.0.0/24"))
        rig.kernel.add(make_sa(7, REMOTE6, LOCAL6, 4), make_sa(8, LOCAL6, REMOTE6, 4))
        rig.kernel.add(make_policy(src="fd01::/64", dst="fd02::/64", reqid=4, ends=(LOCAL6, REMOTE6)))
        rig.kernel.add(sa_in(9, 5, aead=GCM128), sa_out(10, 5, aead=GCM128))
        rig.kernel.add(make_policy(src="fd03::/64", dst="fd04::/64", reqid=5))  # IPv6 within IPv4
        await rig.settle()
        assert states(rig) == {"synced": 10}

    play(kind, story)


@pytest.mark.slow
def test_a_thousand_tunnels_in_one_burst_and_none_is_lost(kind: str) -> None:
    async def story(rig: Rig) -> None:
        rig.start()
        items: list[Sa | Policy] = []
        for number in range(1000):
            sas, policies = tunnel(number)
            items += [*sas, *policies]
        rig.kernel.add(*items)
        await rig.settle()
        assert states(rig) == {"synced": 2000}
        for number in range(1000):
            old = tunnel(number)[0]
            rig.kernel.add(*rekeyed(old))
            rig.kernel.delete(*old)
        await rig.settle()
        assert states(rig) == {"synced": 2000}

    play(kind, story, batch_delay_ms=20)


def test_an_sa_in_one_direction_waits_and_its_traffic_is_dropped(kind: str) -> None:
    async def story(rig: Rig) -> None:
        rig.start()
        rig.kernel.add(make_policy())
        await rig.settle()
        assert [row["steering"] for row in policy_rows(rig.engine)] == ["dropped"]
        rig.kernel.add(sa_in(1))
        await rig.settle()
        assert [(row["state"], row["reason"]) for row in sa_view(rig.engine)] == [
            ("pending", "there is no outbound SA yet")
        ]
        rig.kernel.add(sa_out(2))
        await rig.settle()
        assert states(rig) == {"synced": 2}

    play(kind, story)


def test_flush_is_followed(kind: str) -> None:
    async def story(rig: Rig) -> None:
        rig.start()
        rig.kernel.add(*(item for n in range(5) for part in tunnel(n) for item in part))
        await rig.settle()
        rig.kernel.sas.clear()
        rig.kernel.tell(SasFlushed(0))
        await rig.settle()
        view = sync_view(rig.engine)["vpp"]
        assert (view["sas"], view["tunnels"]) == (0, 0)
        assert [row["steering"] for row in policy_rows(rig.engine)] == ["dropped"] * 5  # nothing in clear

    play(kind, story)


def test_policies_removed_together_with_their_sas_leave_no_route(kind: str) -> None:
    async def story(rig: Rig) -> None:
        rig.start()
        rig.kernel.add(*(item for n in range(100) for part in tunnel(n) for item in part))
        await rig.settle()
        rig.kernel.sas.clear()
        rig.kernel.tell(SasFlushed(0))
        while sync_view(rig.engine)["vpp"]["sas"] == 200:  # noqa: ASYNC110  # VPP's next answer, no later
            await asyncio.sleep(0)
        rig.kernel.policies.clear()
        rig.kernel.tell(PoliciesFlushed(0))
        await rig.settle()
        assert sync_view(rig.engine)["vpp"]["routes"] == 0

    play(kind, story)


def test_what_overflow_or_silence_hid_is_found_by_a_dump(kind: str) -> None:
    async def story(rig: Rig) -> None:
        rig.start()
        rig.kernel.add(*tunnel(0)[0], *tunnel(0)[1])
        await rig.settle()
        rig.kernel.silent = True
        rig.kernel.delete(*tunnel(0)[0])
        rig.kernel.add(*tunnel(1)[0], *tunnel(1)[1])
        rig.kernel.silent = False
        rig.kernel.tell(Overflow())
        await rig.settle()
        assert states(rig) == {"synced": 2}
        assert sync_view(rig.engine)["overflows"] == 1
        rig.kernel.silent = True
        rig.kernel.delete(*tunnel(1)[0])
        rig.kernel.silent = False
        rig.kernel.tell(Migrated(make_policy().id, ()))
        await rig.settle()
        assert states(rig) == {}
        rig.kernel.silent = True
        rig.kernel.add(*tunnel(2)[0], *tunnel(2)[1])
        rig.engine.request_resync()
        await rig.settle()
        assert states(rig) == {"synced": 2}

    play(kind, story)


def test_new_engine_adopts_what_vpp_holds_and_touches_nothing_of_it(kind: str) -> None:
    async def story(rig: Rig) -> None:
        rig.start()
        six = [make_sa(7, REMOTE6, LOCAL6, 90), make_sa(8, LOCAL6, REMOTE6, 90)]
        rig.kernel.add(*six, make_policy(src="fd01::/64", dst="fd02::/64", reqid=90, ends=(LOCAL6, REMOTE6)))
        rig.kernel.add(*(item for n in range(5) for part in tunnel(n) for item in part))
        await rig.settle()
        before = {row["spi"]: row["sad_id"] for row in sa_view(rig.engine)}
        await rig.stop()
        gone, new = tunnel(0), tunnel(7)
        rig.kernel.delete(*gone[0], *gone[1])
        rig.kernel.add(*new[0], *new[1])
        if rig.standin is not None:
            rig.standin.requests.clear()
        await rig.restart_engine()
        await rig.settle()
        after = {row["spi"]: row["sad_id"] for row in sa_view(rig.engine)}
        kept = before.keys() & after.keys()
        assert len(kept) == 10
        assert {spi: after[spi] for spi in kept} == {spi: before[spi] for spi in kept}
        if rig.standin is not None:
            sent = rig.standin.requests
            assert sent.count("ipsec_sad_entry_add_v2") == sent.count("ipsec_sad_entry_del") == 2
            assert sent.count("ipsec_itf_create") == sent.count("ipsec_itf_delete") == 1
            assert sent.count("ipsec_tunnel_protect_update") == 1

    play(kind, story)


def test_what_others_made_in_vpp_stays(kind: str) -> None:
    async def story(rig: Rig) -> None:
        admin = await rig.admin()
        made = await admin.run([IpsecItfCreate(77)])
        await admin.run([SadEntryAdd(5, outbound_spec(0x77))])
        rig.start()
        rig.kernel.add(*tunnel(0)[0], *tunnel(0)[1])
        await rig.settle()
        rig.kernel.delete(*tunnel(0)[0], *tunnel(0)[1])
        await rig.settle()
        sas = await admin.dump("ipsec_sa_v5_dump")
        itfs = await admin.dump("ipsec_itf_dump", {"sw_if_index": 0xFFFFFFFF})
        assert [sa.entry.sad_id for sa in sas] == [5]
        assert [itf.itf.sw_if_index for itf in itfs] == [made[0].value]

    play(kind, story)


def test_two_tunnels_between_the_same_addresses_and_more_than_255_reqids(kind: str) -> None:
    async def story(rig: Rig) -> None:
        rig.start()
        for reqid in range(1, 301):
            dst = f"10.{reqid >> 8}.{reqid & 255}.0/24"
            rig.kernel.add(sa_in(reqid, reqid), sa_out(0x1000 + reqid, reqid), make_policy(dst=dst, reqid=reqid))
        await rig.settle()
        assert states(rig) == {"synced": 600}
        assert len({row["tunnel"] for row in sa_view(rig.engine)}) == 300

    play(kind, story)


def test_six_inbound_sas_use_the_newest_and_report_the_rest(kind: str) -> None:
    async def story(rig: Rig) -> None:
        rig.start()
        rig.kernel.add(*(sa_in(spi) for spi in range(1, 7)), sa_out(9), make_policy())
        await rig.settle()
        rows = {row["spi"]: row for row in sa_view(rig.engine)}
        assert [rows[f"{spi:#010x}"]["state"] for spi in range(1, 7)] == ["unsupported"] * 2 + ["synced"] * 4
        assert rows["0x00000001"]["reason"] == "VPP takes 4 inbound SAs per tunnel; the newest are used"

    play(kind, story)


def test_newest_outbound_sa_protects_and_the_old_one_is_fallback(kind: str) -> None:
    async def story(rig: Rig) -> None:
        rig.start()
        rig.kernel.add(sa_in(1), sa_out(2), make_policy())
        rig.kernel.add(sa_out(3))
        await rig.settle()
        rig.kernel.delete(sa_out(3))
        await rig.settle()
        assert states(rig) == {"synced": 2}

    play(kind, story)


def test_port_change_keeps_the_sa(kind: str) -> None:
    async def story(rig: Rig) -> None:
        rig.start()
        before, after = Encap(2, 4500, 4500, bytes(4)), Encap(2, 4500, 40123, bytes(4))
        rig.kernel.add(sa_in(1, encap=before), sa_out(2, encap=before), make_policy())
        await rig.settle()
        ids = {row["spi"]: row["sad_id"] for row in sa_view(rig.engine)}
        rig.kernel.add(sa_out(2, encap=after))
        await rig.settle()
        assert {row["spi"]: row["sad_id"] for row in sa_view(rig.engine)} == ids

    play(kind, story)


def test_local_address_that_leaves_vpp_takes_the_tunnel_with_it_and_back(kind: str) -> None:
    async def story(rig: Rig) -> None:
        rig.start()
        rig.kernel.add(make_sa(7, REMOTE6, LOCAL6, 90), make_sa(8, LOCAL6, REMOTE6, 90))
        rig.kernel.add(make_policy(src="fd01::/64", dst="fd02::/64", reqid=90, ends=(LOCAL6, REMOTE6)))
        rig.kernel.add(sa_in(1), sa_out(2), make_policy())
        await rig.settle()
        admin = await rig.admin()
        address = {"sw_if_index": rig.wan, "prefix": "2001:db8::1/64"}
        await admin.call("sw_interface_add_del_address", {**address, "is_add": False})
        rig.engine.request_resync()
        await until(lambda: states(rig) == {"synced": 2, "unsupported": 2})
        await rig.settle()
        reasons = {row["reason"] for row in sa_view(rig.engine)} - {""}
        assert reasons == {"neither 2001:db8::1 nor 2001:db8::2 is on a VPP interface"}
        await admin.call("sw_interface_add_del_address", {**address, "is_add": True})
        rig.engine.request_resync()
        await until(lambda: states(rig) == {"synced": 4})
        await rig.settle()

    play(kind, story)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110  # any condition
            await asyncio.sleep(0.02)


def test_peer_that_vpp_cannot_reach_is_unsupported_until_it_can(kind: str) -> None:
    async def story(rig: Rig) -> None:
        rig.start()
        far = parse_addr("203.0.113.9")
        rig.kernel.add(make_sa(1, far, LOCAL), make_sa(2, LOCAL, far), make_policy(ends=(LOCAL, far)))
        await rig.settle()
        assert {row["reason"] for row in sa_view(rig.engine)} == {"VPP has no route to 203.0.113.9"}
        await (await rig.admin()).call(
            "sw_interface_add_del_address", {"sw_if_index": rig.wan, "is_add": True, "prefix": "203.0.113.1/24"}
        )
        await until(lambda: states(rig) == {"synced": 2})  # without being told
        await rig.settle()

    play(kind, story)


def test_vpp_that_comes_back_is_programmed_again(kind: str) -> None:
    async def story(rig: Rig) -> None:
        rig.start()
        rig.kernel.add(*(item for n in range(20) for part in tunnel(n) for item in part))
        await rig.settle()
        await rig.kill_vpp()
        await until(lambda: not rig.engine.in_sync)
        rig.kernel.add(*tunnel(30)[0], *tunnel(30)[1])
        assert sync_view(rig.engine)["state"] == "disconnected"
        await rig.bring_vpp_back()
        await rig.settle()
        assert states(rig) == {"synced": 42}
        assert sync_view(rig.engine)["reconnects"] >= 1

    play(kind, story)


def test_random_changes_end_equal(kind: str) -> None:
    async def story(rig: Rig) -> None:
        rng = random.Random(7)
        rig.start()
        for step in chances(rng, rig):
            step()
            if rng.random() < 0.3:
                await asyncio.sleep(0.003 * rng.random())
            if rng.random() < 0.02:
                await rig.restart_engine()
        await rig.settle(REKEY_REPEAT_FIRST_S + 15)  # an SA may have come again just as it was being rekeyed

    play(kind, story)


def chances(rng: random.Random, rig: Rig) -> Iterator[Callable[[], None]]:
    kernel = rig.kernel
    for _ in range(400):
        number, spi = rng.randrange(6), rng.randrange(1, 9)
        inbound, outbound = tunnel(number)[0]
        sa = rng.choice((inbound, outbound))
        sa = sa._replace(spi=sa.spi + spi * 0x10000, reqid=1 + number)
        policy = tunnel(number)[1][0]
        if rng.random() < 0.1:
            policy = make_policy(
                PolicyDir.OUT, "172.16.0.0/16", "10.99.0.0/24", number + 1, (LOCAL, inbound.saddr), priority=number
            )
        item: Sa | Policy = sa if rng.random() < 0.7 else policy
        actual = kernel.sas if isinstance(item, Sa) else kernel.policies
        if item.id in actual and rng.random() < 0.6:
            yield lambda item=item: kernel.delete(item)
        else:
            yield lambda item=item: kernel.add(item)


def test_sad_ids_are_of_our_range(kind: str) -> None:
    async def story(rig: Rig) -> None:
        rig.start()
        rig.kernel.add(sa_in(1), sa_out(2), make_policy())
        await rig.settle()
        assert {row["sad_id"] for row in sa_view(rig.engine)} == {SAD_ID_FIRST, SAD_ID_FIRST + 1}

    play(kind, story)
