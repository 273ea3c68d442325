"""Faults of VPP and of the service, each at every moment: all ends equal, nothing is lost, and nothing happens twice."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from support.build import make_policy
from support.charon import Child
from support.faults import OWN_CHANGES, Chosen, of_kind
from support.invariants import our_sas
from support.story import Story, play_story
from vppipsec.conf.settings import OffloadSettings
from vppipsec.kernel.text import format_addr
from vppipsec.status.summary import sa_view
from vppipsec.vpp.api.abf import AbfAttach, AbfPolicyAddDel
from vppipsec.vpp.api.acl import AclAddReplace, AclDel
from vppipsec.vpp.api.client import connect
from vppipsec.vpp.api.errors import VppUnavailable
from vppipsec.vpp.api.interface import (
    InterfaceAddressAddDel,
    SetInterfaceMtu,
    SetInterfaceTable,
    SetInterfaceUp,
    SetUnnumbered,
)
from vppipsec.vpp.api.ip import NeighborAddDel, RouteAddDel, RouteLookup, TableAddDel
from vppipsec.vpp.api.ipsec import IpsecItfCreate, SadEntryAdd, SadEntryDel, SadEntryUpdate, TunnelProtect
from vppipsec.vpp.types import SaSpec
from vppstandin.server import Busy, End
from vppstandin.world import address_of

Scene = Callable[[Story], None]
"""What the IKE daemon does while something goes wrong."""


def set_up(story: Story) -> None:
    for child in story.kernel.children:
        story.kernel.establish(child)


def rekey(story: Story) -> None:
    for child in story.kernel.children:
        _rekey_child(story, child)


def _rekey_child(story: Story, child: Child) -> None:
    story.kernel.rekey_child(child, child.pairs[-1])


def tear_down(story: Story) -> None:
    for child in story.kernel.children:
        story.kernel.terminate(child)


SCENES: dict[str, Scene] = {"set-up": set_up, "rekey": rekey, "teardown": tear_down}
with_scenes = pytest.mark.parametrize(
    "scene",
    [pytest.param(scene, marks=[pytest.mark.slow] * (scene is not rekey)) for scene in SCENES.values()],
    ids=SCENES,
)


async def open_scene(story: Story, scene: Scene) -> None:
    """Bring a story to where a scene begins, with the service running."""
    if scene is not set_up:
        set_up(story)
    await story.begin()


def at_every_change(fault: Callable[[Story, int], object], scene: Scene, after: Callable[[Story, bool], None]) -> None:
    """Tell a scene with a fault at its first change of VPP, at its second, and so on, as far as there are any.

    `after` is told whether the fault happened, at the end.
    """
    happened = True
    for number in itertools.count(1):
        if not happened:
            assert number > 15  # there were many moments
            return

        async def tell(story: Story, number: int = number) -> None:
            nonlocal happened
            await open_scene(story, scene)
            last = story.trouble.changes + number
            fault(story, number)
            scene(story)
            await asyncio.sleep(0.5)
            happened = story.trouble.changes >= last
            await story.settle()
            after(story, happened)

        try:
            play_story(tell)
        except BaseException as error:
            error.add_note(f"with the fault at change {number}")
            raise


def outbound(story: Story) -> set[int]:
    """Return the SPIs of the outbound SAs that VPP holds of ours."""
    return {spec.spi for spec in our_sas(story.world).values() if not spec.inbound}


def rows(story: Story, reqid: int) -> list[dict[str, Any]]:
    """Return what status says of the SAs of one child."""
    return [row for row in sa_view(story.rig.engine) if row["reqid"] == reqid]


def event_times(times: list[float]) -> Callable[[], None]:
    """Return what writes down the time of the loop."""
    return lambda: times.append(asyncio.get_running_loop().time())


def gaps(times: list[float]) -> list[float]:
    return [later - time for time, later in itertools.pairwise(times)]


# VPP dies


@with_scenes
def test_vpp_that_dies_at_any_change_and_comes_back_empty_is_equal_again(scene: Scene) -> None:
    """That what had been sent with is rekeyed, not begun anew, and nothing else is rekeyed, the watch sees."""

    def after(story: Story, happened: bool) -> None:
        asked = [sa_id.spi for _, sa_id in story.kernel.asked]
        assert len(asked) == len(set(asked))
        assert not set(asked) & outbound(story)
        assert bool(story.rig.engine.counters.reconnects) is happened

    at_every_change(lambda story, number: story.vpp_dies_at(number, 0.3), scene, after)


def test_rekeys_after_vpp_came_back_keep_to_their_rate() -> None:
    async def tell(story: Story) -> None:
        story.rig.engine.settings = replace(story.rig.settings, offload=OffloadSettings(restart_rekey_rate=4))
        for child in story.kernel.children[:4]:
            for _ in range(3):
                story.kernel.establish(child)
        await story.begin()
        story.vpp_dies(1.0)
        await story.settle()
        times = [time for time, _ in story.kernel.asked]
        assert len(times) == 12
        assert all(0.25 <= gap < 0.3 for gap in gaps(times))

    play_story(tell)


def test_vpp_that_dies_of_what_it_is_asked_is_asked_ever_more_seldom() -> None:
    async def tell(story: Story) -> None:
        deaths: list[float] = []
        note = event_times(deaths)

        def dies_again() -> None:
            note()
            story.vpp_dies_at(1, 0.01, dies_again)

        dies_again()
        set_up(story)
        story.rig.start()
        await asyncio.sleep(100)
        assert gaps(deaths)[-1] >= 5
        assert len(deaths) < 30
        await story.settle()

    play_story(tell)


def test_vpp_that_refuses_to_be_followed_is_asked_ever_more_seldom() -> None:
    async def tell(story: Story) -> None:
        asked: list[float] = []
        note = event_times(asked)

        def chosen(name: str, request: Any) -> bool:
            if name == "want_interface_events":
                note()
            return name == "want_interface_events"

        story.trouble.refuse(chosen)
        set_up(story)
        story.rig.start()
        await asyncio.sleep(100)
        assert gaps(asked)[-1] >= 5
        assert len(asked) < 30
        assert "want_interface_events: UNSPECIFIED (-1)" in story.rig.engine.vpp_problem
        await story.settle()

    play_story(tell)


# The service dies


@with_scenes
def test_service_killed_at_any_change_is_followed_by_adoption(scene: Scene) -> None:
    """That nothing right is deleted or added anew, and nothing of others touched, the watch sees."""
    found: dict[int, SaSpec] = {}

    def fault(story: Story, number: int) -> None:
        found.clear()
        story.service_dies_at(number, 0.1, lambda: found.update(our_sas(story.world)))

    def after(story: Story, happened: bool) -> None:
        now = our_sas(story.world)
        kept = {sad_id: spec for sad_id, spec in found.items() if spec in now.values()}
        assert kept.items() <= now.items()
        assert story.kernel.asked == []

    at_every_change(fault, scene, after)


@with_scenes
def test_connection_that_ends_at_any_change_costs_nothing(scene: Scene) -> None:
    def after(story: Story, happened: bool) -> None:
        assert story.kernel.asked == []
        assert bool(story.rig.engine.counters.reconnects) is happened

    at_every_change(lambda story, number: story.trouble.at(number, End.CONNECTION), scene, after)


def test_what_changed_while_there_was_no_service_is_made_good_by_the_next() -> None:
    async def tell(story: Story) -> None:
        set_up(story)
        await story.begin()
        before = our_sas(story.world)
        story.service_dies(5.0)
        await asyncio.sleep(1.0)
        _rekey_child(story, story.kernel.children[0])
        story.kernel.terminate(story.kernel.children[1])
        await story.settle()
        kept = {sad_id: spec for sad_id, spec in our_sas(story.world).items() if sad_id in before}
        assert len(kept) == 4  # of the two children to which nothing happened
        assert kept.items() <= before.items()

    play_story(tell)


# VPP is slow


@with_scenes
@pytest.mark.parametrize(("busy_s", "given_up"), [(30.0, False), (90.0, True)])
def test_busy_vpp_is_waited_for_and_after_a_minute_given_up(scene: Scene, busy_s: float, given_up: bool) -> None:
    def after(story: Story, happened: bool) -> None:
        assert bool(story.rig.engine.counters.reconnects) is (given_up and happened)
        assert story.kernel.asked == []

    at_every_change(lambda story, number: story.trouble.at(number, Busy(busy_s)), scene, after)


def test_silence_counts_from_when_something_was_asked() -> None:
    async def tell(story: Story) -> None:
        client = await connect(story.rig.api_socket)
        await asyncio.sleep(50)
        for busy_s in (59.0, 59.0):
            story.trouble.at(1, Busy(busy_s))
            assert len(await client.run([SetInterfaceUp(1)])) == 1
        story.trouble.at(1, Busy(61.0))
        with pytest.raises(VppUnavailable, match="VPP has not answered for 60 s"):
            await client.run([SetInterfaceUp(1)])
        await story.begin()

    play_story(tell)


# VPP refuses


class Spared:
    """Chooses requests of one kind that are not about one child."""

    def __init__(self, story: Story, reqid: int) -> None:
        self._world = story.world
        self._reqid_of = story.kernel.reqid_of
        self._reqid = reqid
        self._interfaces = set(story.world.interfaces)
        self._acls = set(story.world.acls)
        self._prefixes = {child.dst.split("/")[0] for child in story.kernel.children if child.reqid == reqid}

    def is_about(self, name: str, request: Any) -> bool:
        """Tell whether a request is about the child that is spared."""
        match name:
            case SadEntryAdd.message:
                return self._reqid_of[request.entry.spi] == self._reqid
            case SadEntryUpdate.message | SadEntryDel.message:
                sad_id = request.sad_id if name == SadEntryUpdate.message else request.id
                return self._reqid_of[self._world.sas[sad_id].entry.spi] == self._reqid
            case TunnelProtect.message:
                return request.tunnel.sw_if_index in self._interfaces
            case SetUnnumbered.message:
                return request.unnumbered_sw_if_index in self._interfaces
            case RouteAddDel.message:
                return format_addr(address_of(request.route.prefix.address)) in self._prefixes
            case IpsecItfCreate.message | NeighborAddDel.message:
                return False  # it has one, and the kernel has no part in it
            case TableAddDel.message:
                return not request.table.is_ip6  # what is spared is of IPv4
            case AbfPolicyAddDel.message:
                return not request.policy.paths[0].proto
            case AbfAttach.message:
                return not request.attach.is_ipv6
            case AclAddReplace.message | AclDel.message:
                return request.acl_index in self._acls
        return request.sw_if_index in self._interfaces

    def of_kind(self, kind: str) -> Chosen:
        """Choose the requests of a kind that are not about it."""
        return lambda name, request: name == kind and not self.is_about(name, request)


OF_VTIS = (SetInterfaceMtu, SetInterfaceTable, InterfaceAddressAddDel)
"""What is only asked for tunnels that the children here are none of."""


@pytest.mark.parametrize("times", [1, 4, None], ids=["once", "four-times", "for-ever"])
@pytest.mark.parametrize("kind", [request.message for request in OWN_CHANGES if request not in OF_VTIS])
def test_refused_request_affects_only_its_tunnel_until_accepted(kind: str, times: int | None) -> None:
    async def tell(story: Story) -> None:
        spared, nat, six, *_ = children = story.kernel.children
        story.kernel.establish(spared)
        await story.begin()
        story.trouble.refuse(Spared(story, spared.reqid).of_kind(kind), -1, times)
        acts: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
            *((story.kernel.establish, (child,)) for child in children[1:]),
            (story.kernel.change_port, (nat, 40001)),
            (_rekey_child, (story, nat)),
            (_rekey_child, (story, six)),
            (story.kernel.toggle_nat, (six,)),
            (story.kernel.terminate, (nat,)),
            (story.kernel.uninstall_policies, (six,)),
            (story.kernel.establish, (nat,)),
        ]
        for act, arguments in acts:
            act(*arguments)
            _rekey_child(story, spared)
            await asyncio.sleep(0.1)
            assert {row["state"] for row in rows(story, spared.reqid)} == {"synced"}
            await asyncio.sleep(3)
            story.look()
        assert story.trouble.refused >= (times or 1)
        assert story.rig.engine.counters.reconnects == 0
        await story.settle()

    play_story(tell)


def test_route_that_vpp_does_not_let_go_of_is_asked_for_again() -> None:
    async def tell(story: Story) -> None:
        policy = make_policy(src="0.0.0.0/0", dst="10.8.0.9/32")  # there is no SA: its route drops
        story.kernel.add(policy)
        await story.begin()
        story.kernel.remove(policy)
        story.trouble.refuse(
            lambda name, request: name == RouteAddDel.message and not request.is_add and is_it(request), -1, 2
        )
        await asyncio.sleep(2.9)
        assert not story.rig.engine.in_sync
        await story.wait_in_sync(0.2)

    def is_it(request: Any) -> bool:
        return bytes(request.route.prefix.address.un.ip4) == bytes((10, 8, 0, 9))

    play_story(tell)


def test_refused_sa_is_retried_with_back_off_and_shows_the_reason() -> None:
    async def tell(story: Story) -> None:
        child = story.kernel.children[0]
        tries: list[float] = []
        note = event_times(tries)
        await story.begin()
        story.kernel.establish(child)
        refused_spi = child.pairs[0][1].spi

        def chosen(name: str, request: Any) -> bool:
            if name != SadEntryAdd.message or request.entry.spi != refused_spi:
                return False
            note()
            return True

        story.trouble.refuse(chosen, -167)
        await asyncio.sleep(200)
        assert [round(gap) for gap in gaps(tries)] == [1, 2, 4, 8, 16, 32, 60, 60]
        inbound, refused = rows(story, child.reqid)
        assert (refused["state"], refused["reason"]) == ("refused", "BUSY (-167)")
        assert (inbound["state"], "BUSY" in inbound["reason"]) == ("pending", True)
        story.kernel.rekey_child(child, child.pairs[0])  # nobody wants it any more, so nothing is refused any more
        await story.wait_in_sync(0.5)

    play_story(tell)


def test_vpp_that_does_not_say_what_it_reaches_keeps_its_tunnels() -> None:
    async def tell(story: Story) -> None:
        set_up(story)
        await story.begin()
        before = our_sas(story.world)
        story.trouble.refuse(of_kind(RouteLookup.message))
        story.rig.engine.request_resync()
        await asyncio.sleep(100)
        assert our_sas(story.world) == before
        assert story.trouble.refused

    play_story(tell)


def test_service_is_not_in_sync_while_it_has_to_look_at_vpp_again() -> None:
    async def tell(story: Story) -> None:
        await story.begin()
        assert story.rig.engine.in_sync
        story.rig.engine._on_interface_event(story.rig.wan)
        assert not story.rig.engine.in_sync
        await story.wait_in_sync(0.1)

    play_story(tell)


# Duplicates


def test_rekey_from_both_sides_and_duplicates_use_the_newest() -> None:
    async def tell(story: Story) -> None:
        child = story.kernel.children[0]
        story.kernel.establish(child)
        await story.begin()
        story.kernel.rekey_from_both_sides(child)
        await story.settle()
        assert used(story) == (child.pairs[-1][1].spi, [child.pairs[-1][0].spi])
        for _ in range(5):
            story.kernel.establish(child)
            await story.settle()
            assert used(story) == (child.pairs[-1][1].spi, [inbound.spi for inbound, _ in child.pairs[-4:]])
        states = [row["state"] for row in rows(story, child.reqid) if row["direction"] == "in"]
        assert states == ["unsupported"] * 2 + ["synced"] * 4
        while len(child.pairs) > 1:
            story.kernel.remove(*child.pairs.pop())  # the newest goes, and one that was in use before takes over
            await story.settle()
            assert used(story) == (child.pairs[-1][1].spi, [inbound.spi for inbound, _ in child.pairs[-4:]])
        assert story.kernel.asked == []

    play_story(tell)


def used(story: Story) -> tuple[int, list[int]]:
    """Return the SPIs of the SAs that the one tunnel uses: outbound, and inbound ones in order."""
    (protection,) = story.world.protections.values()
    return story.world.sas[protection.out].entry.spi, [story.world.sas[sad_id].entry.spi for sad_id in protection.ins]
