"""Packets that VPP drops for want of an SA make the IKE daemon bring it up, once for each group and not too often."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest

from support.build import ENV, LOCAL, REMOTE, make_policy, make_sa, sa_in, sa_out
from support.clock import run_jumping
from vppipsec.kernel.netlink.messages import NetlinkError
from vppipsec.kernel.text import parse_addr
from vppipsec.kernel.xfrm.events import PolicyAdded, SaAdded
from vppipsec.kernel.xfrm.sad_spd import KernelModel, Tunnel, tunnel_keys_of_policy
from vppipsec.kernel.xfrm.values import Policy, PolicyDir, Sa
from vppipsec.sync.desired.policy_layers import Action, Target
from vppipsec.sync.desired.routes import WeightedTargets
from vppipsec.sync.ike.acquire import (
    ACQUIRE_REPEAT_S,
    COUNTER_POLL_S,
    COUNTER_RETRY_S,
    MAX_ACQUIRES_PER_POLL,
    Acquires,
    awaits_sa,
    policy_for,
)
from vppipsec.sync.journal import Counters, Journal
from vppipsec.vpp.api.errors import VppUnavailable
from vppipsec.vpp.types import Prefix, Route

BOTH_LOCAL = replace(ENV, addresses={LOCAL: 1, REMOTE: 1})
UNREACHABLE = replace(ENV, unreachable=frozenset({REMOTE}))
TABLE = 0x49500000


def prefix(text: str) -> Prefix:
    address, length = text.split("/")
    return Prefix(parse_addr(address), int(length))


def group_with(*items: Sa | Policy) -> Tunnel:
    model = KernelModel()
    for item in items:
        model.apply(SaAdded(item) if isinstance(item, Sa) else PolicyAdded(item))
    (tunnel,) = model.tunnels.values()
    return tunnel


@pytest.mark.parametrize(
    ("items", "env", "waits"),
    [
        ([make_policy()], ENV, True),
        ([make_policy(), sa_in(1)], ENV, True),
        ([make_policy(), sa_in(1), sa_out(2)], ENV, False),
        ([make_policy(), sa_out(2)], ENV, False),
        ([make_policy()], BOTH_LOCAL, True),
        ([make_policy(), sa_in(1)], BOTH_LOCAL, True),
        ([make_policy(), sa_out(1)], BOTH_LOCAL, False),
        ([make_policy()], UNREACHABLE, False),
        ([make_policy()], replace(ENV, addresses={}), False),
        ([make_policy(PolicyDir.IN), make_policy(PolicyDir.FWD)], ENV, False),
        ([make_policy(), make_policy(PolicyDir.IN)], ENV, True),
        ([make_policy(if_id=7)], ENV, True),
        ([make_policy(action=1)], ENV, False),
        ([sa_in(1)], ENV, False),
        ([make_policy(), sa_out(2, aead=None)], ENV, True),
    ],
)
def test_group_waits_that_vpp_would_carry_and_that_has_no_sa_to_send_with(
    items: list[Sa | Policy], env: object, waits: bool
) -> None:
    assert awaits_sa(group_with(*items), env) is waits  # type: ignore[arg-type]  # of either kind


def test_policy_is_the_first_that_leads_to_the_destination() -> None:
    near, far, wide = (
        make_policy(dst=dst, priority=priority)
        for dst, priority in (("10.2.0.0/24", 5), ("10.3.0.0/24", 4), ("0.0.0.0/0", 6))
    )
    inbound = make_policy(PolicyDir.IN, dst="10.2.0.0/24", priority=1)
    tunnel = group_with(wide, near, far, inbound)
    assert policy_for(tunnel, prefix("10.2.0.0/24")) == near
    assert policy_for(tunnel, prefix("10.2.0.128/25")) == near
    assert policy_for(tunnel, prefix("10.3.0.0/24")) == far
    assert policy_for(tunnel, prefix("10.2.0.0/16")) == wide
    assert policy_for(tunnel, prefix("fd02::/64")) == far
    assert policy_for(group_with(inbound), prefix("10.2.0.0/24")) is None


@dataclass
class Story:
    """A kernel that takes ACQUIREs, and a VPP whose routes count; time is that of the loop."""

    model: KernelModel = field(default_factory=KernelModel)
    journal: Journal = field(default_factory=Journal)
    counters: Counters = field(default_factory=Counters)
    raised: list[Policy] = field(default_factory=list)
    packets: dict[int, int] = field(default_factory=dict)
    routes: dict[Route, int] = field(default_factory=dict)
    owners: dict[Route, Target | WeightedTargets] = field(default_factory=dict)
    trouble: Exception | None = None
    reads: int = 0

    def __post_init__(self) -> None:
        self.acquires = Acquires(
            self.model,
            self.journal,
            self.counters,
            self.acquire,
            self.read,
            lambda: list(self.routes.items()),
            self.owners.get,
        )

    async def acquire(self, policy: Policy) -> None:
        if isinstance(self.trouble, OSError | TimeoutError):
            raise self.trouble
        self.raised.append(policy)

    async def read(self, indices: Sequence[int]) -> list[int]:
        self.reads += 1
        if isinstance(self.trouble, VppUnavailable):
            raise self.trouble
        return [self.packets.get(index, 0) for index in indices]

    def drop(self, policy: Policy, stats_index: int, owner: Target | WeightedTargets | None = None) -> Route:
        """Have a policy whose packets VPP drops by a route of its own."""
        self.model.apply(PolicyAdded(policy))
        route = Route(Prefix(policy.selector.daddr, policy.selector.prefixlen_d), TABLE)
        self.routes[route] = stats_index
        self.owners[route] = tunnel_keys_of_policy(policy)[0] if owner is None else owner
        self.note(policy)
        return route

    def note(self, policy: Policy) -> bool:
        """Let a policy's group be noted as it is now; tell whether it waits."""
        (key,) = tunnel_keys_of_policy(policy)
        return self.acquires.update(self.model.tunnels.get(key) or Tunnel(key), ENV)

    def send(self, stats_index: int, packets: int = 1) -> None:
        """Let VPP count packets."""
        self.packets[stats_index] = self.packets.get(stats_index, 0) + packets


def tell(story: Callable[[Story], Awaitable[None]]) -> Story:
    made = Story()

    async def run() -> None:
        work = asyncio.create_task(made.acquires.run())
        await story(made)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)

    run_jumping(run())
    return made


async def look(times: float = 1) -> None:
    await asyncio.sleep(times * COUNTER_POLL_S)


ONE = make_policy()
TWO = make_policy(dst="10.3.0.0/24", reqid=2)


def test_nothing_is_read_while_no_group_waits() -> None:
    async def story(made: Story) -> None:
        await look(1000)
        made.drop(ONE, 40)
        await look(10)
        assert 9 <= made.reads <= 12
        made.model.apply(SaAdded(sa_out(1)))
        made.note(ONE)
        before = made.reads
        await look(1000)
        assert made.reads <= before + 1

    tell(story)


def test_packets_raise_one_acquire_for_their_policy_and_none_for_others() -> None:
    async def story(made: Story) -> None:
        made.drop(ONE, 40)
        made.drop(TWO, 41)
        await look(2)
        made.send(41, 3)
        await look(3)
        made.send(41, 3)
        await look(3)

    made = tell(story)
    assert made.raised == [TWO]
    assert made.counters.acquires == 1
    (entry,) = made.journal
    expected = (
        "dropped packets of policy out 10.1.0.0/24 > 10.3.0.0/24, which has no SA: the IKE daemon is asked for one"
    )
    assert (entry.source, entry.text) == ("vpp", expected)


def test_what_was_counted_before_the_group_waited_raises_nothing() -> None:
    async def story(made: Story) -> None:
        made.send(40, 1_000_000)
        route = made.drop(ONE, 40)
        await look(3)
        made.model.apply(SaAdded(sa_out(1)))
        made.note(ONE)
        del made.routes[route]  # it leads into the tunnel now, and counts on
        made.send(40, 1_000_000)
        await look(3)
        made.model.replace([], [ONE])
        made.routes[route] = 40
        made.note(ONE)
        await look(3)
        assert made.raised == []
        made.send(40)
        await look(3)
        assert made.raised == [ONE]

    tell(story)


def test_counters_of_a_new_tunnel_are_read_once_vpp_has_its_routes() -> None:
    async def story(made: Story) -> None:
        made.drop(ONE, 40)
        await look(2)
        made.send(41, 1000)
        made.drop(TWO, 41)
        before = made.reads
        made.acquires.note_routes_applied()
        await look(0.1)
        assert made.reads == before + 1
        made.send(41)
        await look(1.1)
        assert made.raised == [TWO]

    tell(story)


def test_packets_that_go_on_raise_another_acquire_after_a_while() -> None:
    async def story(made: Story) -> None:
        made.drop(ONE, 40)
        await look(2)
        for _ in range(int(2.5 * ACQUIRE_REPEAT_S / COUNTER_POLL_S)):
            made.send(40)
            await look()

    made = tell(story)
    assert made.raised == [ONE] * 3
    assert made.counters.acquires == 3
    assert len(list(made.journal)) == 1


def test_tunnel_that_was_up_meanwhile_is_asked_for_at_once() -> None:
    async def story(made: Story) -> None:
        made.drop(ONE, 40)
        await look(2)
        made.send(40)
        await look(2)
        for sas in ([sa_out(1)], []):
            made.model.replace(sas, [ONE])
            made.note(ONE)
        await look(2)
        made.send(40)
        await look(2)

    made = tell(story)
    assert made.raised == [ONE, ONE]
    assert len(list(made.journal)) == 2


def test_many_that_are_asked_for_at_once_take_their_turns() -> None:
    policies = [make_policy(dst=f"10.2.{number}.0/24", reqid=number) for number in range(1, 3 * MAX_ACQUIRES_PER_POLL)]

    async def story(made: Story) -> None:
        for number, policy in enumerate(policies):
            made.drop(policy, number)
        await look(2)
        for number in range(len(policies)):
            made.send(number)
        counts = []
        for _ in range(6):
            made.acquires._has_new = True  # others come, too, so that there are more looks
            made.acquires.note_routes_applied()
            await look()
            counts.append(len(made.raised))
        assert max(now - before for before, now in zip([0, *counts], counts, strict=False)) <= MAX_ACQUIRES_PER_POLL
        assert made.raised == policies

    tell(story)


def test_one_whose_sas_came_while_it_waited_its_turn_is_not_asked_for() -> None:
    policies = [make_policy(dst=f"10.2.{number}.0/24", reqid=number) for number in range(1, 2 * MAX_ACQUIRES_PER_POLL)]

    async def story(made: Story) -> None:
        for number, policy in enumerate(policies):
            made.drop(policy, number)
        await look(2)
        for number in range(len(policies)):
            made.send(number)
        while not made.raised:
            await look(0.5)
        made.model.apply(SaAdded(make_sa(1, reqid=len(policies))))
        made.note(policies[-1])
        made.model.apply(SaAdded(make_sa(1, reqid=len(policies) - 1)))  # and has not been noted yet
        await look(6)
        assert made.raised == policies[:-2]

    tell(story)


@pytest.mark.parametrize("owner", [Action.DISCARD, None])
def test_route_that_drops_for_another_reason_raises_nothing(owner: Target | None) -> None:
    async def story(made: Story) -> None:
        route = made.drop(ONE, 40)
        made.owners[route] = Action.DISCARD
        if owner is None:
            del made.owners[route]
        await look(2)
        made.send(40)
        await look(2)

    assert tell(story).raised == []


def test_route_that_several_tunnels_share_raises_one_for_each_that_waits() -> None:
    async def story(made: Story) -> None:
        up = make_policy(dst="10.4.0.0/24", reqid=3)
        made.model.apply(SaAdded(make_sa(1, reqid=3)))
        keys = [tunnel_keys_of_policy(policy)[0] for policy in (ONE, TWO, up)]
        for policy in (ONE, TWO, up):
            made.model.apply(PolicyAdded(policy))
            made.note(policy)
        shared = Route(prefix("10.7.0.0/16"))
        made.routes[shared], made.owners[shared] = 40, WeightedTargets(tuple((key, 1) for key in keys))
        await look(2)
        made.send(40)
        await look(2)

    assert tell(story).raised == [ONE, TWO]


def test_counters_that_cannot_be_read_are_told_of_once_and_tried_again() -> None:
    async def story(made: Story) -> None:
        made.trouble = VppUnavailable("its stats socket is gone")
        made.drop(ONE, 40)
        await asyncio.sleep(10.5 * COUNTER_RETRY_S)
        assert made.reads == 11
        made.trouble = None
        await asyncio.sleep(COUNTER_RETRY_S)
        made.send(40)
        await look(2)
        assert made.raised == [ONE]

    made = tell(story)
    assert [entry.text for entry in made.journal][:-1] == [
        "packets that wait for a tunnel cannot be noticed: its stats socket is gone"
    ]


@pytest.mark.parametrize("trouble", [NetlinkError("an ACQUIRE", errno.EPERM), TimeoutError("no answer")])
def test_kernel_that_refuses_is_asked_again_later(trouble: Exception, caplog: pytest.LogCaptureFixture) -> None:
    async def story(made: Story) -> None:
        made.drop(ONE, 40)
        await look(2)
        made.trouble = trouble
        made.send(40)
        await look(2)
        made.trouble = None
        made.send(40)
        await look(2)
        assert made.raised == []
        assert made.counters.acquires == 0
        await asyncio.sleep(ACQUIRE_REPEAT_S)
        made.send(40)
        await look(2)
        assert made.raised == [ONE]

    tell(story)
    assert "the IKE daemon cannot be asked for an SA" in caplog.text


def test_after_vpp_went_all_groups_are_noted_anew() -> None:
    async def story(made: Story) -> None:
        assert not made.note(ONE)
        route = made.drop(ONE, 40)
        made.send(40, 7)
        await look(2)
        made.acquires.clear()
        await look(2)
        before = made.reads
        await look(100)
        assert made.reads == before
        made.packets.clear()
        made.routes[route] = 3
        assert made.note(ONE)
        await look(2)
        assert made.raised == []
        made.send(3)
        await look(2)
        assert made.raised == [ONE]

    tell(story)
