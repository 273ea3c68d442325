"""What vanishes or moves without a word is found by the next periodic dump, which costs next to nothing when nothing changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from support.netlink_kernel import WireKernel
from support.netlink_rig import WireRig, pair, play, wire_kernel
from support.netns import ip
from support.rig import KINDS
from vppipsec.conf.settings import RESYNC_INTERVAL_S, NetlinkSettings
from vppipsec.kernel.text import parse_addr
from vppipsec.kernel.xfrm.socket import XfrmSocket
from vppipsec.kernel.xfrm.values import Policy
from vppipsec.status.summary import sync_view

OFTEN = NetlinkSettings(batch_delay_ms=0, resync_interval_s=RESYNC_INTERVAL_S.low)
TUNNELS = 20
SAS = [sa for number in range(TUNNELS) for sa in pair(number)[0]]
POLICIES = [policy for number in range(TUNNELS) for policy in pair(number)[1]]
MOVED = parse_addr("192.0.2.250")


def vanish(kernel: WireKernel) -> None:
    """As SAs do when the device goes that they were offloaded to, or when an expiry or a flush was lost."""
    kernel.forget(*pair(3)[0])


def vanish_all(kernel: WireKernel) -> None:
    kernel.forget(*SAS, *POLICIES)


def be_replaced(kernel: WireKernel) -> None:
    kernel.forget(*pair(3)[0])
    kernel.add(*(sa._replace(spi=sa.spi + 0x100000) for sa in pair(3)[0]))


def come(kernel: WireKernel) -> None:
    kernel.add(*pair(77)[0], *pair(77)[1])


def migrate(kernel: WireKernel) -> None:
    """The peer's address changes, in SAs and policies, where they are (xfrm_migrate, net/xfrm/xfrm_policy.c)."""
    sas, policies = pair(3)
    peer = sas[0].saddr
    for sa in sas:
        here = sa._replace(**{end: MOVED for end in ("saddr", "daddr") if getattr(sa, end) == peer})
        kernel.forget(sa)
        kernel.add(here)
    for policy in policies:
        kernel.add(_moved(policy, peer))


def _moved(policy: Policy, peer: bytes) -> Policy:
    templates = [
        replace(t, **{end: MOVED for end in ("saddr", "daddr") if getattr(t, end) == peer}) for t in policy.templates
    ]
    return replace(policy, templates=tuple(templates))


@pytest.mark.parametrize("change", [vanish, vanish_all, be_replaced, come, migrate], ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_silent_change_is_found_by_the_next_periodic_dump(change: Callable[[WireKernel], None], kind: str) -> None:
    async def story(rig: WireRig) -> None:
        kernel = wire_kernel(rig)
        kernel.add(*SAS, *POLICIES)
        rig.start()
        await rig.until(lambda: rig.engine.in_sync and rig.engine.counters.events >= kernel.said)
        kernel.silent = True
        change(kernel)
        before, events = rig.engine.counters.resyncs, rig.engine.counters.events
        await rig.resynced(before + 1)  # one may have been under way
        assert rig.engine.counters.events == events  # it was not told
        assert sync_view(rig.engine)["kernel"]["sas"] == len(kernel.sas)
        assert await rig.differences() == []

    play(story, OFTEN, kind)


def test_interval_of_periodic_dumps_is_the_operators() -> None:
    async def story(rig: WireRig) -> None:
        rig.start()
        await rig.resynced(before=3)  # nobody asks for them
        assert wire_kernel(rig).dumps >= 8

    play(story, OFTEN)


def _periodic(rig: WireRig) -> Counter[str]:
    """Return what VPP was asked, dumps counted by their message alone: the ping that ends each is left out."""
    asked = rig.asked()
    del asked["control_ping"]
    return asked


def test_unchanged_periodic_dump_decodes_and_sends_nothing() -> None:
    async def story(rig: WireRig) -> None:
        kernel = wire_kernel(rig)
        kernel.add(*SAS, *POLICIES)
        rig.start()
        await rig.until(lambda: rig.engine.in_sync and rig.engine.counters.events >= kernel.said)
        await rig.resynced(before=rig.engine.counters.resyncs)
        decoded, asked = len(rig.decoded), _periodic(rig)
        translated = {key: state.desired for key, state in rig.engine.tunnels.items()}
        before = rig.engine.counters.resyncs
        await rig.resynced(before + 1)
        dumps = rig.engine.counters.resyncs - before
        assert len(rig.decoded) == decoded
        assert all(state.desired is translated[key] for key, state in rig.engine.tunnels.items())
        more = _periodic(rig) - asked
        assert more.keys() == {"ip_address_dump", "ip_route_lookup_v2"}
        asked_for = more[
            "ip_route_lookup_v2"
        ]  # each remote address once a dump; the first or the last may not count yet
        assert abs(asked_for - dumps * TUNNELS) <= TUNNELS

    play(story, OFTEN)


def test_periodic_dump_decodes_only_what_changed() -> None:
    async def story(rig: WireRig) -> None:
        kernel = wire_kernel(rig)
        kernel.add(*SAS, *POLICIES)
        rig.start()
        await rig.until(lambda: rig.engine.in_sync and rig.engine.counters.events >= kernel.said)
        await rig.resynced(before=rig.engine.counters.resyncs)
        decoded = len(rig.decoded)
        kernel.silent = True
        be_replaced(kernel)
        before = rig.engine.counters.resyncs
        await rig.resynced(before + 1)
        assert len(rig.decoded) - decoded == 2
        assert await rig.differences() == []

    play(story, OFTEN)


def test_policies_that_vanish_from_the_kernels_own_xfrm_unheard_are_found() -> None:
    async def story(rig: WireRig) -> None:
        rig.start()
        template = "tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid {} mode tunnel"
        ip(*(f"xfrm policy add dst 10.2.{n}.0/24 dir out {template.format(n + 1)}" for n in range(20)))
        await rig.until(lambda: sync_view(rig.engine)["vpp"]["rules"] == 20)
        deaf = rig.kernel._events
        deaf.setsockopt(270, 2, 4)  # SOL_NETLINK, NETLINK_DROP_MEMBERSHIP, XFRMNLGRP_POLICY
        ip("xfrm policy flush")
        await rig.until(lambda: sync_view(rig.engine)["vpp"]["rules"] == 0)
        assert await rig.differences() == []

    play(story, OFTEN, make_kernel=XfrmSocket)
