"""Outbound policies through the engine, on a stand-in: which way a packet goes, and in which order VPP is told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from support.build import LOCAL, LOCAL6, REMOTE, REMOTE6, make_policy, make_sa, sa_in, sa_out
from support.faults import Trouble, of_kind
from support.invariants import lan_of, targets
from support.rig import Rig, play_jumping
from support.spd import TCP, UDP, Packet
from vppipsec.conf.settings import OffloadSettings
from vppipsec.kernel.text import parse_addr
from vppipsec.kernel.xfrm.values import Policy, PolicyDir, Sa
from vppipsec.status.summary import sync_view
from vppipsec.status.tunnels import policy_rows
from vppipsec.sync.desired.policy_layers import Action
from vppipsec.sync.engine import ENVIRONMENT_INTERVAL_S
from vppipsec.vpp.api.abf import AbfAttach, AbfPolicyAddDel
from vppipsec.vpp.api.acl import AclAddReplace
from vppipsec.vpp.api.ip import TableAddDel
from vppipsec.vpp.api.ipsec import IpsecItfCreate, SadEntryAdd, TunnelProtect
from vppipsec.vpp.types import NO_INDEX

Story = Callable[[Rig], Awaitable[None]]
THIRD = bytes((192, 0, 2, 3))


def packet(src: str, dst: str, proto: int = UDP, dport: int = 2000) -> Packet:
    return Packet(parse_addr(src), parse_addr(dst), proto, 1000, dport)


PLAIN = packet("10.1.0.9", "10.2.0.9")


def way(rig: Rig, sent: Packet) -> object:
    """Return where a packet goes that comes on any interface of the LAN's side, as the index of its tunnel."""
    assert rig.standin is not None
    world = rig.standin.world
    next_hops = {targets(world, index, sent) for index in lan_of(world)}
    assert len(next_hops) == 1
    (found,) = next_hops
    return Action.DISCARD if found == NO_INDEX else found


def tunnel_of(rig: Rig, reqid: int) -> int:
    (found,) = [state.actual.sw_if_index for key, state in rig.engine.tunnels.items() if key.reqid == reqid]
    assert found is not None
    return found


def both_directions(reqid: int, near: str, far: str, ends: tuple[bytes, bytes], **changes: Any) -> list[Policy]:
    out = make_policy(PolicyDir.OUT, near, far, reqid, ends, **changes)
    return [out, *(make_policy(d, far, near, reqid, ends, **changes) for d in (PolicyDir.IN, PolicyDir.FWD))]


def pair(spi: int, reqid: int, ends: tuple[bytes, bytes]) -> list[Sa]:
    return [make_sa(spi, *ends, reqid), make_sa(spi + 1, *ends[::-1], reqid)]


def test_source_protocol_and_ports_count() -> None:
    async def story(rig: Rig) -> None:
        dns = replace(make_policy().selector, proto=UDP, dport=53, dport_mask=0xFFFF)
        rig.kernel.add(sa_in(1), sa_out(2), make_policy(selector=dns))
        rig.start()
        await rig.settle()
        assert way(rig, packet("10.1.0.9", "10.2.0.9", UDP, 53)) == tunnel_of(rig, 1)
        for other in (
            packet("10.1.0.9", "10.2.0.9", UDP, 54),
            packet("10.1.0.9", "10.2.0.9", TCP, 53),
            packet("10.3.0.9", "10.2.0.9", UDP, 53),
            packet("10.1.0.9", "10.3.0.9", UDP, 53),
        ):
            assert way(rig, other) is Action.BYPASS

    play_jumping(story)


def test_block_and_bypass_count_in_the_order_of_their_priority() -> None:
    async def story(rig: Rig) -> None:
        web = replace(make_policy().selector, proto=TCP, dport=80, dport_mask=0xFFFF)
        ssh = replace(web, dport=22)
        rig.kernel.add(sa_in(1), sa_out(2), make_policy())
        rig.kernel.add(make_policy(selector=web, templates=(), priority=500))
        rig.kernel.add(make_policy(selector=ssh, templates=(), action=1, priority=500))
        rig.kernel.add(make_policy(src="10.1.0.0/16", templates=(), priority=2000))
        rig.start()
        await rig.settle()
        assert way(rig, packet("10.1.0.9", "10.2.0.9", TCP, 80)) is Action.BYPASS
        assert way(rig, packet("10.1.0.9", "10.2.0.9", TCP, 22)) is Action.DISCARD
        assert way(rig, packet("10.1.0.9", "10.2.0.9", TCP, 25)) == tunnel_of(rig, 1)
        assert {row["steering"] for row in policy_rows(rig.engine)} == {"routed", "in clear", "dropped"}

    play_jumping(story)


def test_change_of_a_policy_without_template_is_followed() -> None:
    async def story(rig: Rig) -> None:
        rig.kernel.add(sa_in(1), sa_out(2), make_policy())
        rig.start()
        await rig.settle()
        bypass = make_policy(src="10.1.0.9/32", templates=(), priority=1)
        now = asyncio.get_running_loop().time
        for act, expected in ((rig.kernel.add, Action.BYPASS), (rig.kernel.delete, tunnel_of(rig, 1))):
            began = now()
            act(bypass)
            await rig.settle()
            assert way(rig, PLAIN) == expected
            assert now() - began < ENVIRONMENT_INTERVAL_S / 2  # of the loop, where time jumps: nothing was waited for

    play_jumping(story)


def test_it_is_not_in_sync_between_new_settings_and_what_they_change() -> None:
    async def story(rig: Rig) -> None:
        rig.kernel.add(sa_in(1), sa_out(2), make_policy())
        rig.start()
        await rig.settle()
        engine = rig.engine
        for enforces in (False, True):
            engine.reload(replace(rig.settings, offload=OffloadSettings(selector_enforcement=enforces)))
            while not engine.in_sync:  # noqa: ASYNC110  # each turn of the loop is looked at
                await asyncio.sleep(0)
            assert engine.environment.snapshot.enforce_selectors is enforces
            (state,) = engine.tunnels.values()
            assert state.actual.acl_applied is enforces

    play_jumping(story)


def test_all_policies_are_in_vpp_before_the_first_tunnel() -> None:
    async def story(rig: Rig) -> None:
        for number in range(3, 8):
            ends = (LOCAL, bytes((192, 0, 2, number)))
            rig.kernel.add(
                *pair(16 * number, number, ends), *both_directions(number, "10.1.0.0/24", f"10.{number}.0.0/24", ends)
            )
        seen: list[str] = []
        assert rig.standin is not None
        rig.standin.watch = lambda name, request, retval: seen.append(name)
        rig.start()
        await rig.settle()
        assert max(i for i, name in enumerate(seen) if name == AbfAttach.message) < seen.index(IpsecItfCreate.message)

    play_jumping(story)


def test_policies_can_be_asked_about_at_any_moment() -> None:
    async def story(rig: Rig) -> None:
        seen: set[tuple[str, str]] = set()
        assert rig.standin is not None
        rig.standin.watch = lambda *_: seen.update((r["steering"], r["reason"]) for r in policy_rows(rig.engine))
        rig.kernel.add(sa_in(1), sa_out(2), make_policy(), make_policy(dst="10.2.0.0/16", reqid=2, priority=5000))
        rig.start()
        await rig.settle()
        assert ("pending", "being programmed") in seen
        assert [row["steering"] for row in policy_rows(rig.engine)] == ["routed", "dropped"]

    play_jumping(story)


def test_what_has_no_tunnel_is_dropped_whatever_the_reason() -> None:
    unreachable = (LOCAL, parse_addr("198.51.100.2"))
    elsewhere = (parse_addr("198.51.100.1"), parse_addr("198.51.100.2"))

    async def story(rig: Rig) -> None:
        rig.kernel.add(*pair(16, 2, unreachable), make_policy(dst="10.2.0.0/24", reqid=2, ends=unreachable))
        rig.kernel.add(*pair(32, 3, elsewhere), make_policy(dst="10.3.0.0/24", reqid=3, ends=elsewhere))
        rig.kernel.add(sa_in(1, 4), sa_out(2, 4, tfcpad=8), make_policy(dst="10.4.0.0/24", reqid=4))
        sctp = replace(make_policy(dst="10.5.0.0/24").selector, proto=132, dport=9, dport_mask=0xFFFF)
        rig.kernel.add(make_policy(selector=sctp, reqid=5))
        rig.start()
        await rig.settle()
        for number in (2, 3, 4):
            assert way(rig, packet("10.1.0.9", f"10.{number}.0.9")) is Action.DISCARD
        assert way(rig, packet("10.1.0.9", "10.5.0.9", 132)) is Action.DISCARD
        assert way(rig, packet("10.1.0.9", "10.5.0.9")) is Action.BYPASS

    play_jumping(story)


@pytest.mark.parametrize("wide_first", [False, True])
def test_of_nested_destinations_the_first_by_priority_counts(wide_first: bool) -> None:
    async def story(rig: Rig) -> None:
        second = (LOCAL, THIRD)
        rig.kernel.add(sa_in(1), sa_out(2), *pair(16, 2, second))
        rig.kernel.add(
            make_policy(dst="10.2.0.0/16", priority=100 if wide_first else 200),
            make_policy(dst="10.2.1.0/24", priority=200 if wide_first else 100, reqid=2, ends=second),
        )
        rig.start()
        await rig.settle()
        assert way(rig, packet("10.1.0.9", "10.2.0.9")) == tunnel_of(rig, 1)
        assert way(rig, packet("10.1.0.9", "10.2.1.9")) == tunnel_of(rig, 1 if wide_first else 2)

    play_jumping(story)


def test_packets_to_the_router_and_ipv6_neighbours_are_bypassed() -> None:
    async def story(rig: Rig) -> None:
        six = (LOCAL6, REMOTE6)
        rig.kernel.add(sa_in(1), sa_out(2), make_policy(src="0.0.0.0/0", dst="0.0.0.0/0"))
        rig.kernel.add(*pair(16, 2, six), make_policy(PolicyDir.OUT, "::/0", "::/0", 2, six))
        rig.start()
        await rig.settle()
        assert way(rig, packet("10.1.0.9", "10.2.0.9")) == tunnel_of(rig, 1)
        assert way(rig, packet("10.1.0.9", "192.0.2.1")) is Action.BYPASS
        assert way(rig, packet("fd01::9", "fd02::9")) == tunnel_of(rig, 2)
        assert way(rig, packet("fe80::9", "fe80::1")) is Action.BYPASS
        assert way(rig, packet("2001:db8::9", "2001:db8::1")) is Action.BYPASS

    play_jumping(story)


def test_tunnel_with_transit_packets_is_attached_before_protection() -> None:
    async def story(rig: Rig) -> None:
        hub = [((LOCAL, bytes((192, 0, 2, number))), number, f"10.{number}.0.0/24") for number in (3, 4)]
        seen: list[tuple[str, int]] = []
        assert rig.standin is not None
        world = rig.standin.world

        def saw(name: str, request: Any, retval: int) -> None:
            if name == AbfAttach.message:
                seen.append((name, request.attach.sw_if_index))
            elif name == TunnelProtect.message:
                seen.append((name, request.tunnel.sw_if_index))

        rig.standin.watch = saw
        for ends, number, far in hub:
            rig.kernel.add(*pair(16 * number, number, ends), *both_directions(number, "10.0.0.0/8", far, ends))
        rig.start()
        await rig.settle()
        for _, number, _ in hub:
            index = tunnel_of(rig, number)
            assert seen.index((AbfAttach.message, index)) < seen.index((TunnelProtect.message, index))
        assert targets(world, tunnel_of(rig, 3), packet("10.3.0.9", "10.4.0.9")) == tunnel_of(rig, 4)
        for ends, number, far in hub[:1]:
            rig.kernel.delete(*pair(16 * number, number, ends), *both_directions(number, "10.0.0.0/8", far, ends))
        await rig.settle()
        assert world.leaks == []

    play_jumping(story)


@pytest.mark.parametrize("message", [AbfAttach.message, TunnelProtect.message])
def test_refusal_of_either_keeps_a_tunnel_closed_and_is_tried_again(message: str) -> None:
    trouble = Trouble()

    async def story(rig: Rig) -> None:
        rig.kernel.add(
            sa_in(1), sa_out(2), *both_directions(1, "10.0.0.0/8", "10.2.0.0/24", (LOCAL, bytes((192, 0, 2, 2))))
        )
        rig.start()
        trouble.refuse(of_kind(message), -1)
        await asyncio.sleep(5)
        assert rig.standin is not None
        assert not rig.engine.in_sync
        assert rig.standin.world.protections == {}
        trouble.heal()
        await asyncio.sleep(130)
        await rig.settle()
        assert rig.standin.world.protections.keys() == {tunnel_of(rig, 1)}
        assert SadEntryAdd.message in rig.standin.requests

    play_jumping(story, trouble)


@pytest.mark.parametrize(
    "message", [TableAddDel.message, AclAddReplace.message, AbfPolicyAddDel.message, AbfAttach.message]
)
def test_refusal_of_what_all_policies_need_is_told_as_theirs(message: str) -> None:
    trouble = Trouble()

    async def story(rig: Rig) -> None:
        trouble.refuse(of_kind(message), -7)
        rig.kernel.add(make_policy())
        rig.start()
        await asyncio.sleep(3)
        assert not rig.engine.in_sync
        told = f"VPP refuses {message}: INVALID_VALUE (-7) (the outbound policies: some of their packets may leave in clear)"
        assert sync_view(rig.engine)["problem"] == told
        assert f"{message} of the outbound policies: INVALID_VALUE (-7)" in [entry.text for entry in rig.engine.journal]
        trouble.heal()
        await asyncio.sleep(10)
        await rig.settle()
        assert sync_view(rig.engine)["problem"] == ""

    play_jumping(story, trouble)


def test_refused_rules_do_not_make_an_unprotected_tunnel_spin() -> None:
    tried: list[str] = []

    def refuse(name: str, request: Any) -> int | None:
        is_table = name == "ip_table_add_del_v2" and bool(request.table.is_ip6)
        if name != "ipsec_tunnel_protect_update" and not is_table:
            return None
        tried.append(name)
        return -1

    async def story(rig: Rig) -> None:
        onward = make_policy(src="10.2.0.0/16", dst="10.3.0.0/16", action=1, templates=())
        six = make_policy(src="fd01::/64", dst="fd02::/64", reqid=2, ends=(LOCAL6, REMOTE6))
        rig.kernel.add(
            sa_in(1), sa_out(2), *both_directions(1, "10.0.0.0/8", "10.2.0.0/24", (LOCAL, REMOTE)), onward, six
        )
        rig.start()
        await asyncio.sleep(20)
        assert 2 <= tried.count("ipsec_tunnel_protect_update") < 10
        assert 2 <= tried.count("ip_table_add_del_v2") < 10
        assert rig.engine.vpp_problem == ""

    play_jumping(story, refuse)
