"""Whatever the order of SA and policy events, the desired state is that of a dump at the end.

The kernel here behaves as net/xfrm does where it matters: dumps run newest first, an update of an SA keeps its place and changes
little, though its message repeats all that was asked for; an updated policy counts as new; a hard expiry, a flush, a reservation
by ALLOCSPI are not told as a deletion or an addition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.build import CBC, ENV, GCM, GCM128, LOCAL, LOCAL6, REMOTE, REMOTE6, make_policy, make_sa, sa_in, sa_out
from vppipsec.kernel.xfrm.events import (
    Event,
    PoliciesFlushed,
    PolicyAdded,
    PolicyDeleted,
    PolicyExpired,
    SaAdded,
    SaDeleted,
    SaExpired,
    SasFlushed,
)
from vppipsec.kernel.xfrm.sad_spd import KernelModel, TunnelKey
from vppipsec.kernel.xfrm.values import NO_LIMITS, Encap, Mark, Policy, PolicyDir, PolicyId, Sa, SaFlag, SaId
from vppipsec.sync.desired.state import Translation
from vppipsec.sync.desired.tunnel import translate


class Kernel:
    """SAD and SPD, each newest first. Every change returns what is announced of it."""

    def __init__(self) -> None:
        self.sas: list[Sa] = []
        self.policies: list[Policy] = []

    def find(self, sa_id: SaId) -> Sa | None:
        return next((sa for sa in self.sas if sa.id == sa_id), None)

    def new_sa(self, sa: Sa) -> list[Event]:
        """NEWSA (xfrm_state_add): refused where it is known."""
        if self.find(sa.id) is not None:
            return []
        self.sas.insert(0, sa)
        return [SaAdded(sa)]

    def reserve(self, sa: Sa) -> list[Event]:
        """ALLOCSPI: a larval SA of which nobody is told."""
        if self.find(sa.id) is None:
            self.sas.insert(0, sa._replace(aead=None, crypt=None, auth=None))
        return []

    def update_sa(self, asked: Sa) -> list[Event]:
        """UPDSA (xfrm_state_update): a larval SA is replaced, another one is changed where it stands, and only in part."""
        known = self.find(asked.id)
        if known is None or (not known.larval and (known.encap is None) != (asked.encap is None)):
            return []
        if known.larval:
            self.sas.remove(known)
            self.sas.insert(0, asked)
        else:
            if_id, set_mark = asked.if_id or known.if_id, asked.set_mark or known.set_mark
            changed = known._replace(limits=asked.limits, encap=asked.encap, if_id=if_id, set_mark=set_mark)
            self.sas[self.sas.index(known)] = changed
        return [SaAdded(asked, updated=True)]

    def delete_sa(self, sa_id: SaId) -> list[Event]:
        known = self.find(sa_id)
        if known is None:
            return []
        self.sas.remove(known)
        return [SaDeleted(sa_id, known)]

    def expire_sa(self, sa_id: SaId, hard: bool) -> list[Event]:
        known = self.find(sa_id)
        if known is None:
            return []
        if hard:
            self.sas.remove(known)
        return [SaExpired(known, hard)]

    def flush_sas(self, proto: int) -> list[Event]:
        left = [sa for sa in self.sas if proto not in (0, 255, sa.proto)]
        told = len(left) != len(self.sas)
        self.sas = left
        return [SasFlushed(proto)] if told else []

    def put_policy(self, policy: Policy) -> list[Event]:
        """NEWPOLICY or UPDPOLICY (xfrm_policy_insert): what is updated is taken out and put in anew."""
        left = [known for known in self.policies if known.id != policy.id]
        updated = len(left) != len(self.policies)
        self.policies = [policy, *left]
        return [PolicyAdded(policy, updated)]

    def delete_policy(self, policy_id: PolicyId, expires: bool) -> list[Event]:
        found = [policy for policy in self.policies if policy.id == policy_id]
        self.policies = [policy for policy in self.policies if policy.id != policy_id]
        return [PolicyExpired(policy, True) if expires else PolicyDeleted(policy.id, policy=policy) for policy in found]

    def flush_policies(self, kind: int) -> list[Event]:
        self.policies = [policy for policy in self.policies if policy.type != kind]
        return [PoliciesFlushed(kind)]


Change = Callable[[Kernel], list[Event]]


def desired_of(model: KernelModel) -> dict[TunnelKey, Translation]:
    return {key: translate(key, tunnel, ENV) for key, tunnel in model.tunnels.items()}


def dumped(kernel: Kernel) -> KernelModel:
    model = KernelModel()
    model.replace(kernel.sas, kernel.policies)
    return model


class Follower:
    """Follows as the service does: translates again only what is said to have changed, and uses old verdicts again."""

    def __init__(self) -> None:
        self.model = KernelModel()
        self.desired: dict[TunnelKey, Translation] = {}

    def take(self, *events: Event) -> None:
        for event in events:
            self.look_at(self.model.apply(event))

    def dump(self, kernel: Kernel) -> None:
        self.look_at(self.model.replace(kernel.sas, kernel.policies))

    def look_at(self, keys: set[TunnelKey]) -> None:
        for key in keys:
            before = self.desired.pop(key, None)
            if key in self.model.tunnels:
                known = before.decisions if before is not None else {}
                self.desired[key] = translate(key, self.model.tunnels[key], ENV, known)

    def assert_equal_to(self, kernel: Kernel) -> None:
        """Check that a dump of the kernel means what was gathered from events."""
        assert self.desired == desired_of(dumped(kernel))
        assert self.model.replace(kernel.sas, kernel.policies) == set()


# Claims about single cases


def test_message_of_an_update_tells_more_than_the_kernel_changes() -> None:
    kernel, follower = Kernel(), Follower()
    encap = Encap(2, 4500, 4500, bytes(4))
    follower.take(*kernel.new_sa(sa_out(1, encap=encap)), *kernel.new_sa(sa_in(2)), *kernel.put_policy(make_policy()))
    asked = sa_out(1, reqid=7, aead=GCM128, mode=0, saddr=REMOTE, flags=SaFlag.ESN, replay_window=64)
    asked = asked._replace(encap=Encap(2, 4500, 40123, bytes(4)), limits=NO_LIMITS._replace(hard_bytes=99))
    follower.take(*kernel.update_sa(asked))
    follower.assert_equal_to(kernel)
    ((_, tunnel),) = follower.model.tunnels.items()
    sa = tunnel.sas[asked.id]
    assert (sa.aead, sa.reqid, sa.mode, sa.replay_window) == (GCM, 1, 1, 0)
    assert (sa.encap, sa.limits.hard_bytes) == (asked.encap, 99)


@pytest.mark.parametrize("asked", [{"if_id": 9}, {"if_id": 0}, {"set_mark": Mark(3, 3)}])
def test_update_without_if_id_or_mark_keeps_those_that_were(asked: dict[str, object]) -> None:
    kernel, follower = Kernel(), Follower()
    follower.take(*kernel.new_sa(sa_out(1, if_id=5, set_mark=Mark(1, 1))))
    follower.take(*kernel.update_sa(sa_out(1)._replace(**asked)))
    follower.assert_equal_to(kernel)


def test_sa_that_comes_again_with_the_same_spi_is_the_newest() -> None:
    kernel, follower = Kernel(), Follower()
    for spi in (1, 2):
        follower.take(*kernel.new_sa(sa_out(spi)))
    follower.take(*kernel.new_sa(sa_in(3)), *kernel.put_policy(make_policy()))
    follower.take(*kernel.delete_sa(sa_out(1).id), *kernel.new_sa(sa_out(1)))  # as after MOBIKE
    follower.assert_equal_to(kernel)
    ((_, desired),) = follower.desired.items()
    assert desired.tunnel is not None
    assert [spec.spi for spec in desired.tunnel.outbound] == [2, 1]


def test_sa_whose_deletion_was_missed_is_the_newest_when_it_comes_again() -> None:
    kernel, follower = Kernel(), Follower()
    for spi in (1, 2):
        follower.take(*kernel.new_sa(sa_out(spi)))
    kernel.delete_sa(sa_out(1).id)
    follower.take(*kernel.new_sa(sa_out(1)))
    follower.assert_equal_to(kernel)


def test_what_was_told_before_a_dump_and_comes_after_it_keeps_the_order() -> None:
    kernel, follower = Kernel(), Follower()
    follower.take(*kernel.new_sa(sa_out(1)), *kernel.new_sa(sa_in(3)), *kernel.put_policy(make_policy()))
    late = [*kernel.delete_sa(sa_out(1).id), *kernel.new_sa(sa_out(1)), *kernel.new_sa(sa_out(2))]
    follower.dump(kernel)
    follower.take(*late)
    follower.assert_equal_to(kernel)


def test_policies_of_a_dump_are_newest_first_too() -> None:
    kernel, follower = Kernel(), Follower()
    follower.take(*kernel.new_sa(sa_out(1)), *kernel.new_sa(sa_in(2)))
    for policy in (make_policy(type=1), make_policy(mark=Mark(1, 1))):
        follower.take(*kernel.put_policy(policy))
    follower.assert_equal_to(kernel)
    reasons = {decision.reason for desired in follower.desired.values() for decision in desired.decisions.values()}
    assert reasons == {"its policy matches a firewall mark: packets in VPP carry none"}


# Random sequences

ENDS = ((LOCAL, REMOTE), (REMOTE, LOCAL), (LOCAL6, REMOTE6))
SUITES: tuple[dict[str, object], ...] = (
    {},
    {},
    {},
    {"aead": GCM128},
    {"aead": None, "crypt": CBC},
    {"flags": SaFlag.ESN},
)
ENCAPS = (None, Encap(2, 4500, 4500, bytes(4)), Encap(2, 4500, 40123, bytes(4)))


@st.composite
def any_sa(draw: st.DrawFn) -> Sa:
    """Return one of few SAs, so that most changes meet one that is there."""
    src, dst = draw(st.sampled_from((ENDS[0], ENDS[0], ENDS[1], ENDS[1], ENDS[2])))
    sa = make_sa(draw(st.integers(1, 3)), src, dst, draw(st.sampled_from((1, 1, 1, 2))))
    limits = NO_LIMITS._replace(soft_bytes=draw(st.integers(1, 3)))
    proto = draw(st.sampled_from((50, 50, 50, 50, 50, 51)))
    if_id, encap = draw(st.sampled_from((0, 0, 0, 0, 0, 7))), draw(st.sampled_from(ENCAPS))
    changed: Sa = sa._replace(**draw(st.sampled_from(SUITES)), encap=encap, limits=limits, if_id=if_id, proto=proto)
    return changed


@st.composite
def any_policy(draw: st.DrawFn) -> Policy:
    """Return one of few policies; some cannot be carried, for one reason or another."""
    reqid, if_id = draw(st.sampled_from((1, 1, 2))), draw(st.sampled_from((0, 0, 0, 7)))
    src, dst, ends = draw(
        st.sampled_from(
            (
                ("10.1.0.0/16", "10.2.0.0/16", ENDS[0]),
                ("10.1.0.0/16", "192.0.2.0/24", ENDS[0]),
                ("fd01::/64", "fd02::/64", ENDS[0]),
                ("fd01::/64", "fd02::/64", ENDS[2]),
            )
        )
    )
    policy = make_policy(
        draw(st.sampled_from((PolicyDir.OUT, PolicyDir.OUT, PolicyDir.IN, PolicyDir.FWD))),
        src,
        dst,
        reqid,
        ends,
        priority=draw(st.integers(1, 3)),
        if_id=if_id,
        type=draw(st.sampled_from((0, 0, 0, 1))),
        mark=draw(st.sampled_from((None, None, Mark(1, 1)))),
    )
    blocking: Policy = replace(policy, action=1, templates=())
    return blocking if draw(st.integers(0, 7)) == 0 else policy


def again(sa: Sa) -> Change:
    return lambda kernel: [*kernel.delete_sa(sa.id), *kernel.new_sa(sa)]


SA_CHANGES = st.one_of(
    any_sa().map(lambda sa: lambda kernel: kernel.new_sa(sa)),
    any_sa().map(lambda sa: lambda kernel: kernel.new_sa(sa)),
    any_sa().map(lambda sa: lambda kernel: kernel.delete_sa(sa.id)),
    any_sa().map(again),
    st.tuples(any_sa(), st.booleans()).map(lambda of: lambda kernel: kernel.expire_sa(of[0].id, of[1])),
)
UPDATES = st.one_of(
    # an update that gives another if_id moves an SA among others, whose age relative to it only a dump tells
    any_sa().map(lambda sa: lambda kernel: kernel.update_sa(sa._replace(if_id=0))),
    any_sa().map(lambda sa: lambda kernel: [*kernel.reserve(sa), *kernel.update_sa(sa._replace(if_id=0))]),
    any_sa().map(lambda sa: lambda kernel: kernel.reserve(sa)),
)
POLICY_CHANGES = st.one_of(
    any_policy().map(lambda policy: lambda kernel: kernel.put_policy(policy)),
    any_policy().map(lambda policy: lambda kernel: kernel.put_policy(policy)),
    st.tuples(any_policy(), st.booleans()).map(lambda of: lambda kernel: kernel.delete_policy(of[0].id, of[1])),
)
FLUSHES = st.one_of(
    st.sampled_from((0, 255, 50, 51)).map(lambda proto: lambda kernel: kernel.flush_sas(proto)),
    st.sampled_from((0, 1)).map(lambda kind: lambda kernel: kernel.flush_policies(kind)),
)
CHANGES = st.one_of(SA_CHANGES, SA_CHANGES, UPDATES, POLICY_CHANGES, POLICY_CHANGES, FLUSHES)


def with_a_tunnel_up() -> tuple[Kernel, Follower]:
    """Return a kernel in which a tunnel is amid a rekey, and who followed it so far."""
    kernel, follower = Kernel(), Follower()
    for sa in (sa_in(1), sa_out(1), sa_in(2), sa_out(2)):
        follower.take(*kernel.new_sa(sa))
    follower.take(*kernel.put_policy(make_policy()))
    return kernel, follower


def noise(kernel: Kernel, sa: Sa, policy: Policy) -> Iterator[Event]:
    """Yield events about what the kernel does not have."""
    if kernel.find(sa.id) is None:
        yield SaDeleted(sa.id)
        yield SaExpired(sa, hard=True)
    if all(known.id != policy.id for known in kernel.policies):
        yield PolicyDeleted(policy.id)
        yield PolicyExpired(policy, hard=True)


STEPS = st.tuples(CHANGES, st.integers(1, 3), any_sa(), any_policy())


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=50))
def test_events_in_any_order_with_repeats_and_strangers_end_as_a_dump_does(
    steps: list[tuple[Change, int, Sa, Policy]],
) -> None:
    kernel, follower = with_a_tunnel_up()
    for change, repeats, sa, policy in steps:
        for event in change(kernel):
            follower.take(*[event] * repeats)
        follower.take(*noise(kernel, sa, policy))
    follower.assert_equal_to(kernel)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(SA_CHANGES, SA_CHANGES, SA_CHANGES, POLICY_CHANGES, FLUSHES), min_size=8, max_size=40),
    st.integers(0, 20),
    st.integers(0, 20),
)
def test_events_that_a_dump_knew_already_end_as_a_dump_does(changes: list[Change], begun: int, length: int) -> None:
    kernel, follower = with_a_tunnel_up()
    for change in changes[:begun]:
        follower.take(*change(kernel))
    deferred = [event for change in changes[begun : begun + length] for event in change(kernel)]
    follower.dump(kernel)
    follower.take(*deferred)
    for change in changes[begun + length :]:
        follower.take(*change(kernel))
    follower.assert_equal_to(kernel)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_sas_and_policies_of_a_start_may_come_in_any_order(data: st.DataObject) -> None:
    sas = data.draw(st.lists(any_sa(), max_size=8, unique_by=lambda sa: sa.id))
    policies = data.draw(st.lists(any_policy(), max_size=8, unique_by=lambda policy: policy.id))
    kernel = Kernel()
    events = [event for sa in sas for event in kernel.new_sa(sa)]
    others = [event for policy in policies for event in kernel.put_policy(policy)]
    follower = Follower()
    while events or others:
        source = events if not others or (events and data.draw(st.booleans())) else others
        follower.take(source.pop(0))
    follower.assert_equal_to(kernel)
