"""No outbound SA is begun anew with numbers that were used before: it is rekeyed instead."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from support.build import CBC, ENV, GCM, LOCAL, SHA256, make_policy, make_sa, sa_in, sa_out
from support.faults import Trouble
from support.recorded import PATIENCE_S
from support.rig import KINDS, Rig, play, play_jumping
from vppipsec.conf.settings import OffloadSettings
from vppipsec.kernel.text import parse_addr
from vppipsec.kernel.xfrm.sad_spd import KernelModel
from vppipsec.kernel.xfrm.values import Algorithm, Encap, Mark, Policy, PolicyDir, ReplayState, Sa, SaFlag, Usage
from vppipsec.status.summary import sa_view, sync_view
from vppipsec.sync.desired.tunnel import translate
from vppipsec.sync.ike import sa_usage
from vppipsec.sync.ike.rekey_queue import RekeyQueue
from vppipsec.sync.ike.sa_usage import SaUsage, process_started
from vppipsec.vpp.types import SaSpec
from vppstandin.server import Busy


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def spec_of(sa: Sa) -> SaSpec:
    """Return what translate makes of an SA of the default tunnel."""
    model = KernelModel()
    counterpart = sa_in(0x999) if sa.saddr == LOCAL else sa_out(0x999)
    model.replace([sa, counterpart], [make_policy()])
    ((key, tunnel),) = model.tunnels.items()
    spec = translate(key, tunnel, ENV).decisions[sa.id].spec
    assert spec is not None
    return spec


CIPHERS = {
    "gcm": {"aead": GCM},
    "cbc": {"aead": None, "crypt": CBC, "auth": SHA256},
    "ctr": {"aead": None, "crypt": Algorithm("rfc3686(ctr(aes))", bytes(range(20))), "auth": SHA256},
}


@pytest.mark.parametrize("cipher", CIPHERS.values(), ids=CIPHERS)
def test_sa_added_to_vpp_lost_its_sequence_wherever_it_moves(cipher: dict[str, Algorithm | None]) -> None:
    usage, sa = SaUsage(), sa_out(5, **cipher)
    assert not usage.sequence_lost(sa)
    usage.note_added_to_vpp(spec_of(sa))
    assert usage.sequence_lost(sa)
    assert usage.sequence_lost(sa._replace(saddr=parse_addr("198.51.100.1")))
    assert not usage.sequence_lost(sa._replace(spi=6))
    for others in ([sa_out(7)], [sa], [sa_out(7)]):
        usage.retain_only(others)
        assert usage.sequence_lost(sa)  # it may be on its way to another address
    usage.retain_only([sa_out(7)])
    assert not usage.sequence_lost(sa)


def test_inbound_sa_keeps_its_sequence() -> None:
    usage, sa = SaUsage(), sa_in(5)
    usage.note_added_to_vpp(spec_of(sa))
    assert not usage.sequence_lost(sa)


@pytest.mark.parametrize(("oseq", "sequence_lost"), [(0, False), (1, True), (1 << 33, True)])
def test_sa_the_kernel_sent_with_lost_its_sequence(oseq: int, sequence_lost: bool) -> None:
    assert SaUsage().sequence_lost(sa_out(5, replay=ReplayState(oseq, 0, 0, (), False))) is sequence_lost


def test_sa_older_than_vpp_lost_its_sequence_unless_seen_whole() -> None:
    usage = SaUsage()
    started = process_started(os.getpid())
    assert started is not None
    usage.set_vpp_start(os.getpid())
    assert usage.sequence_lost(sa_out(5, usage=Usage(0, 0, int(started) - 1, 0)))
    assert usage.sequence_lost(sa_out(5, usage=Usage(0, 0, int(started), 0)))  # in the same second: before, perhaps
    assert not usage.sequence_lost(sa_out(5, usage=Usage(0, 0, int(started) + 1, 0)))
    usage.set_vpp_start(1 << 30)  # no such process: as old as now
    assert usage.sequence_lost(sa_out(5, usage=Usage(0, 0, int(started) - 1, 0)))
    assert not usage.sequence_lost(sa_out(5, usage=Usage(0, 0, int(time.time()) + 2, 0)))


def test_sa_of_the_first_second_lost_its_sequence_unless_seen_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sa_usage, "time", SimpleNamespace(time=lambda: 1000.7))
    usage = SaUsage()
    usage.set_vpp_start(1 << 30)  # as old as now
    before, moving, after, long_before = (
        sa_out(spi, usage=Usage(0, 0, add, 0)) for spi, add in ((5, 1000), (8, 1000), (6, 1000), (7, 999))
    )
    usage.retain_only([before, moving, long_before])
    for sa in (after, long_before, moving):  # the latter two came again as they moved
        usage.note_added_by_kernel(sa)
    assert [usage.sequence_lost(sa) for sa in (before, moving, after, long_before)] == [True, True, False, True]


def test_start_of_a_process_is_told_and_of_none_is_not() -> None:
    started = process_started(os.getpid())
    assert started is not None
    assert started <= time.time()
    assert started > time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    assert process_started(1 << 30) is None


def test_rekey_queue_returns_each_sa_once_until_due_again() -> None:
    async def run() -> None:
        rekey_queue = RekeyQueue()
        waiting = asyncio.create_task(rekey_queue.next())
        await asyncio.sleep(0)
        for spi in (1, 2, 3, 1):
            rekey_queue.add(sa_out(spi).id)
        rekey_queue.discard(sa_out(2).id)
        assert [await waiting, await rekey_queue.next()] == [sa_out(1).id, sa_out(3).id]
        assert len(rekey_queue) == 2  # asked for, not fulfilled
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await rekey_queue.next()

    asyncio.run(run())


def spis(rig: Rig, state: str) -> set[str]:
    return {row["spi"] for row in sa_view(rig.engine) if row["state"] == state}


def test_restarted_vpp_gets_rekeyed_sas_never_the_old_outbound_one(kind: str) -> None:
    async def story(rig: Rig) -> None:
        rig.start()
        rig.kernel.add(sa_in(1), sa_out(2), make_policy())
        await rig.settle()
        await rig.kill_vpp()
        await rig.bring_vpp_back()
        await rig.settle()
        assert rig.kernel.expired == [sa_out(2).id]
        assert spis(rig, "synced") == {"0x40000001", "0x40000002"}
        assert sync_view(rig.engine)["counts"]["rekeying"] == 0
        actual = await (await rig.admin()).dump("ipsec_sa_v5_dump")
        assert {details.entry.spi for details in actual} == {0x40000001, 0x40000002}

    play(kind, story)


def test_status_says_rekeying_until_the_ike_daemon_has_done_it(kind: str) -> None:
    async def story(rig: Rig) -> None:
        rig.kernel.rekeys_when_asked = False
        rig.start()
        rig.kernel.add(sa_in(1), sa_out(2), make_policy())
        await rig.settle()
        await rig.kill_vpp()
        await rig.bring_vpp_back()
        async with asyncio.timeout(PATIENCE_S):
            while not rig.kernel.expired:  # noqa: ASYNC110  # the test's kernel has no event for it
                await asyncio.sleep(0.01)
        rows = {row["spi"]: row for row in sa_view(rig.engine)}
        assert rows["0x00000002"]["state"] == "rekeying"
        assert "sequence numbers" in rows["0x00000002"]["reason"]
        assert rows["0x00000001"]["reason"] == "its outbound counterpart is being rekeyed"
        assert not rig.engine.in_sync
        assert [details.entry.spi for details in await (await rig.admin()).dump("ipsec_sa_v5_dump")] == []
        rig.kernel.rekey(sa_out(2))
        await rig.settle()
        assert spis(rig, "synced") == {"0x40000001", "0x40000002"}

    play(kind, story)


def test_rekeys_are_requested_at_the_set_rate() -> None:
    async def story(rig: Rig) -> None:
        used = ReplayState(7, 0, 0, (), False)
        for number in range(1, 7):
            dst = f"10.9.{number}.0/24"
            rig.kernel.add(sa_in(number, number), make_policy(dst=dst, reqid=number))
            rig.kernel.add(sa_out(0x100 + number, number, replay=used if number < 6 else None))
        rig.kernel.rekeys_when_asked = False
        rig.engine.settings = replace(rig.settings, offload=OffloadSettings(restart_rekey_rate=20))
        rig.start()
        began = asyncio.get_running_loop().time()
        async with asyncio.timeout(PATIENCE_S):
            while len(rig.kernel.expired) < 5:  # noqa: ASYNC110  # the test's kernel has no event for it
                await asyncio.sleep(0.005)
        assert asyncio.get_running_loop().time() - began >= 4 / 20 - 0.01  # no machine is too fast for it
        assert spis(rig, "synced") == {"0x00000006", "0x00000106"}
        assert rig.kernel.expired == [sa_out(0x100 + number).id for number in range(1, 6)]

    play("standin", story)


def test_new_service_that_adopts_asks_for_no_rekey(kind: str) -> None:
    async def story(rig: Rig) -> None:
        old = Usage(0, 0, 1, 0)
        rig.start()
        rig.kernel.add(sa_in(1), sa_out(2), make_policy())
        await rig.settle()
        rig.kernel.sas = {sa_id: sa._replace(usage=old) for sa_id, sa in rig.kernel.sas.items()}
        await rig.restart_engine()
        await rig.settle()
        assert rig.kernel.expired == []
        assert spis(rig, "synced") == {"0x00000001", "0x00000002"}

    play(kind, story)


def test_sa_that_moves_with_its_numbers_is_rekeyed() -> None:
    """MOBIKE: the kernel gets the SA anew, with other addresses and the same SPI and keys."""

    async def story(rig: Rig) -> None:
        rig.start()
        rig.kernel.add(sa_in(1), sa_out(2), make_policy())
        await rig.settle()
        elsewhere = parse_addr("192.0.2.77")
        rig.kernel.delete(sa_in(1), sa_out(2), make_policy())
        rig.kernel.add(make_sa(1, elsewhere, LOCAL), make_sa(2, LOCAL, elsewhere))
        rig.kernel.add(make_policy(ends=(LOCAL, elsewhere)))
        await rig.settle()
        assert rig.kernel.expired == [make_sa(2, LOCAL, elsewhere).id]
        assert spis(rig, "synced") == {"0x40000001", "0x40000002"}

    play("standin", story)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"policy": make_policy(mark=Mark(1, 1))}, "its policy matches a firewall mark"),
        ({"policy": make_policy(reqid=2)}, "no policy"),
        ({"inbound": sa_in(1, flags=SaFlag.DECAP_DSCP)}, "its inbound counterpart: copying DSCP"),
    ],
)
def test_sa_that_vpp_does_not_carry_is_not_rekeyed(changes: dict[str, Sa | Policy], reason: str) -> None:
    """The kernel sends with it, and shall go on."""

    async def story(rig: Rig) -> None:
        used = ReplayState(7, 0, 0, (), False)
        items = {"inbound": sa_in(1), "outbound": sa_out(2, replay=used), "policy": make_policy()} | changes
        rig.kernel.add(*items.values())
        rig.start()
        await rig.settle()
        assert rig.kernel.expired == []
        (row,) = [row for row in sa_view(rig.engine) if row["spi"] == "0x00000002"]
        assert row["state"] in ("unsupported", "pending")
        assert reason in row["reason"]

    play("standin", story)


def test_sa_that_comes_again_behind_a_nat_is_rekeyed() -> None:
    """To VPP it is another SA, although its name, its key and the sequence numbers that the peer has seen are the same."""

    async def story(rig: Rig) -> None:
        rig.start()
        rig.kernel.add(sa_in(1), sa_out(2), make_policy())
        await rig.settle()
        nat = {"encap": Encap(2, 4500, 4500, bytes(4))}
        rig.kernel.delete(sa_in(1), sa_out(2))
        rig.kernel.add(sa_in(1, **nat), sa_out(2, **nat))
        await rig.settle()
        assert rig.kernel.expired == [sa_out(2).id]

    play("standin", story)


def test_sa_that_a_new_service_found_in_vpp_is_rekeyed_when_it_moves() -> None:
    async def story(rig: Rig) -> None:
        long_ago = {"usage": Usage(0, 0, int(time.time()) - 1, 0)}
        rig.start()
        rig.kernel.add(sa_in(1), sa_out(2), make_policy())
        await rig.settle()
        await rig.restart_engine()
        await rig.settle()
        elsewhere = parse_addr("192.0.2.77")
        rig.kernel.delete(sa_in(1), sa_out(2), make_policy())
        rig.kernel.add(make_sa(1, elsewhere, LOCAL, **long_ago), make_sa(2, LOCAL, elsewhere, **long_ago))
        rig.kernel.add(make_policy(ends=(LOCAL, elsewhere)))
        await rig.settle()
        assert rig.kernel.expired == [make_sa(2, LOCAL, elsewhere).id]

    play("standin", story)


def test_pending_rekey_ends_with_its_tunnel() -> None:
    """Also where the last SA of a tunnel goes while its tunnel is being looked at: the service must not wait for ever."""
    trouble = Trouble()

    async def story(rig: Rig) -> None:
        rekeyed = sa_in(1), sa_out(2, replay=ReplayState(7, 0, 0, (), False)), make_policy(PolicyDir.IN)
        rig.kernel.rekeys_when_asked = False
        rig.kernel.add(*rekeyed)
        rig.start()
        await asyncio.sleep(1)
        assert spis(rig, "rekeying") == {"0x00000002"}
        trouble.at(1, Busy(1.0), lambda: rig.kernel.delete(*rekeyed))  # while VPP is about the other tunnel
        rig.kernel.add(rekeyed[-1], sa_in(3, 2), sa_out(4, 2), make_policy(reqid=2))
        await rig.settle()
        assert spis(rig, "synced") == {"0x00000003", "0x00000004"}

    play_jumping(story, trouble)
