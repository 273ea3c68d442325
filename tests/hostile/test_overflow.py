"""Messages that the kernel had to drop, or that come at the worst moment, cost a dump and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from support import netlink_encode
from support.netlink_kernel import WireKernel
from support.netlink_rig import WireRig, pair, play, wire_kernel
from support.netns import ip
from support.rig import KINDS
from vppipsec.conf.settings import RX_BUFFER_SIZE, NetlinkSettings
from vppipsec.kernel.xfrm.socket import XfrmSocket
from vppipsec.kernel.xfrm.values import MsgType
from vppipsec.status.summary import sa_view, sync_view
from vppipsec.status.text import sync_text

SMALLEST = NetlinkSettings(rx_buffer_size=RX_BUFFER_SIZE.low, batch_delay_ms=0)


def synced(rig: WireRig) -> int:
    return int(sync_view(rig.engine)["counts"]["synced"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_burst_of_5000_pairs_that_overflows_ends_equal_within_one_resync(kind: str) -> None:
    async def story(rig: WireRig) -> None:
        kernel = wire_kernel(rig)
        rig.start()
        await rig.until(lambda: rig.engine.in_sync)
        for number in range(5000):  # the loop does not turn meanwhile: the reader is held back
            sas, policies = pair(number)
            kernel.add(*sas, *policies)
        await rig.resynced(before=1)
        view = sync_view(rig.engine)
        assert kernel.said == 25_000
        assert view["events"] < 1000 < kernel.said
        assert (view["overflows"], kernel.overflows, view["resyncs"]) == (1, 1, 2)  # the first was at the start
        assert synced(rig) == view["vpp"]["sas"] == 10_000
        assert await rig.differences() == []
        assert "1 overflow, 2 resyncs" in sync_text(view)

    play(story, NetlinkSettings(rx_buffer_size=1, batch_delay_ms=0), kind)  # the kernel grants 1,152 bytes at least


@pytest.mark.slow
def test_overflow_of_the_kernels_own_xfrm_ends_equal_within_one_resync() -> None:
    async def story(rig: WireRig) -> None:
        rig.start()
        await rig.until(lambda: rig.engine.in_sync)
        template = "tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid {} mode tunnel"
        ip(*(f"xfrm policy add dst 10.{n >> 8}.{n & 255}.0/24 dir out {template.format(n + 1)}" for n in range(5000)))
        await rig.resynced(before=1)
        view = sync_view(rig.engine)
        assert view["overflows"] == 1
        assert view["events"] < 5000
        assert (view["resyncs"], view["kernel"]["policies"], view["vpp"]["rules"]) == (2, 5000, 5000)
        assert await rig.differences() == []

    play(story, SMALLEST, make_kernel=XfrmSocket)


def test_events_from_before_an_overflow_are_not_applied_after_the_dump() -> None:
    """The end of what is queued may be about SAs whose deletion is among what was lost."""

    async def story(rig: WireRig) -> None:
        kernel = wire_kernel(rig)
        rig.start()
        sas, policies = pair(0)
        kernel.add(*sas, *policies)
        await rig.until(lambda: synced(rig) == 2)
        newer = [sa._replace(spi=sa.spi + 0x100000) for sa in sas]
        kernel.add(*newer)
        while kernel.said < 1000:  # the end of this, and all that follows, is lost
            kernel.add(*(sa._replace(limits=sa.limits._replace(hard_add_s=kernel.said)) for sa in newer))
        kernel.delete(*newer)
        before = rig.engine.counters.resyncs
        await rig.resynced(before)
        assert rig.engine.counters.overflows == 1
        assert [row["spi"] for row in sa_view(rig.engine)] == [f"{sa.spi:#010x}" for sa in sas]
        assert await rig.differences() == []

    play(story, NetlinkSettings(rx_buffer_size=RX_BUFFER_SIZE.low, batch_delay_ms=0, batch_size=1))


# While a dump runs

OLD = [sa for number in range(3) for sa in pair(number)[0]]
OLD_POLICIES = [policy for number in range(3) for policy in pair(number)[1]]
NEW = [sa._replace(spi=sa.spi + 0x100000) for sa in OLD]


def rekey(kernel: WireKernel) -> None:
    kernel.add(*NEW)
    kernel.delete(*OLD)


def come_up(kernel: WireKernel) -> None:
    kernel.add(*pair(7)[0], *pair(7)[1])


def go_down(kernel: WireKernel) -> None:
    kernel.delete(*pair(0)[0], *pair(0)[1])


def flush(kernel: WireKernel) -> None:
    kernel.flush()


def expire(kernel: WireKernel) -> None:
    kernel.forget(OLD[0])
    kernel.say(netlink_encode.expire_sa(OLD[0], hard=True))


def flush_all_but_what_comes_after(kernel: WireKernel) -> None:
    kernel.flush()
    kernel.policies.clear()
    kernel.say(netlink_encode.flush_policies())
    come_up(kernel)


def come_and_go(kernel: WireKernel) -> None:
    come_up(kernel)
    kernel.delete(*pair(7)[0], *pair(7)[1])


def come_back(kernel: WireKernel) -> None:
    """An SA that goes and comes back is the newest, whatever the dump says."""
    kernel.add(*NEW)
    kernel.delete(*OLD)
    kernel.add(*OLD)


CHANGES = (rekey, come_up, go_down, flush, expire, flush_all_but_what_comes_after, come_and_go, come_back)


@pytest.mark.parametrize("during", [MsgType.GETSA, MsgType.GETPOLICY], ids=lambda kind: kind.name)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_during_a_dump_is_not_lost(change: Callable[[WireKernel], None], during: MsgType) -> None:
    async def story(rig: WireRig) -> None:
        kernel = wire_kernel(rig)
        kernel.add(*OLD, *OLD_POLICIES)

        async def slowly(kind: MsgType) -> None:
            kernel.before_dump_ends = None if kind == during else slowly
            if kind == during:
                change(kernel)
                read = rig.engine.counters.events
                await asyncio.sleep(0.05)  # the engine reads, and keeps it for later
                assert rig.engine.counters.events == read

        kernel.before_dump_ends = slowly
        rig.start()
        await rig.until(lambda: rig.engine.in_sync and rig.engine.counters.events >= kernel.said)
        await rig.until(lambda: rig.engine.in_sync)
        assert (rig.engine.counters.resyncs, rig.engine.counters.overflows) == (1, 0)
        assert await rig.differences() == []

    play(story, NetlinkSettings(batch_delay_ms=0))
