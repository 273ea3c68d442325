"""The model of SAD and SPD: what events and dumps make of it, and which groups they soil."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.build import ENV, GCM128, LOCAL, LOCAL6, REMOTE, REMOTE6, make_policy, make_sa, sa_in, sa_out
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
from vppipsec.kernel.xfrm.sad_spd import KernelModel, tunnel_key_of_sa
from vppipsec.kernel.xfrm.values import NO_LIMITS, Mark, Policy, PolicyDir, PolicyId, Sa, SaId, Usage
from vppipsec.sync.desired.tunnel import translate


def fed(*events: Event) -> KernelModel:
    model = KernelModel()
    for event in events:
        model.apply(event)
    return model


def test_both_directions_and_their_policies_are_one_group() -> None:
    model = fed(
        *(SaAdded(sa) for sa in (sa_in(1), sa_out(2))),
        *(PolicyAdded(make_policy(direction)) for direction in PolicyDir),
    )
    assert len(model.tunnels) == 1
    (tunnel,) = model.tunnels.values()
    assert [sa.spi for sa in tunnel.sas.values()] == [1, 2]
    assert len(tunnel.policies) == 3


@pytest.mark.parametrize("change", [{"reqid": 2}, {"if_id": 7}, {"mode": 0}, {"daddr": b"\x09\x09\x09\x09"}])
def test_what_differs_in_reqid_if_id_mode_or_endpoints_is_another_group(change: dict[str, object]) -> None:
    model = fed(SaAdded(sa_out(1)), SaAdded(sa_out(2)._replace(**change)))
    assert len(model.tunnels) == 2


def test_sas_keep_their_order_and_updates_their_place() -> None:
    limits = NO_LIMITS._replace(hard_bytes=9)
    model = fed(*(SaAdded(sa_in(spi)) for spi in (1, 2, 3)), SaAdded(sa_in(1, limits=limits), updated=True))
    (tunnel,) = model.tunnels.values()
    assert [(sa.spi, sa.limits) for sa in tunnel.sas.values()] == [(1, limits), (2, NO_LIMITS), (3, NO_LIMITS)]


def test_marks_tell_sas_of_the_same_spi_apart() -> None:
    model = fed(SaAdded(sa_out(1)), SaAdded(sa_out(1, mark=Mark(1, 1))))
    assert model.sa_count == 2
    model.apply(SaDeleted(sa_out(1, mark=Mark(1, 1)).id))
    assert [sa.mark for sa in model.sas()] == [None]


def test_larval_sas_are_left_out() -> None:
    larval = sa_in(1, aead=None)
    model = fed(SaAdded(larval))
    assert model.sa_count == 0
    model.apply(SaAdded(sa_in(1)))
    assert model.sa_count == 1
    assert KernelModel().replace([larval], []) == set()


def test_hard_expiry_removes_and_soft_does_not() -> None:
    model = fed(SaAdded(sa_out(1)), PolicyAdded(make_policy()))
    model.apply(SaExpired(sa_out(1), hard=False))
    model.apply(PolicyExpired(make_policy(), hard=False))
    assert (model.sa_count, model.policy_count) == (1, 1)
    assert model.apply(SaExpired(sa_out(1), hard=True)) == {tunnel_key_of_sa(sa_out(1))}
    model.apply(PolicyExpired(make_policy(), hard=True))
    assert (model.sa_count, model.policy_count, model.tunnels) == (0, 0, {})


@pytest.mark.parametrize(("proto", "left"), [(0, 0), (255, 0), (50, 1), (51, 2)])
def test_flush_removes_the_sas_of_its_protocol(proto: int, left: int) -> None:
    model = fed(SaAdded(sa_out(1)), SaAdded(sa_in(2)), SaAdded(sa_out(3, proto=51, reqid=9)))
    model.apply(SasFlushed(proto))
    assert model.sa_count == left


def test_flush_of_policies_removes_those_of_its_type() -> None:
    model = fed(PolicyAdded(make_policy()), PolicyAdded(make_policy(type=1)))
    assert len(model.apply(PoliciesFlushed(0))) == 1
    assert [policy.type for policy in model.policies()] == [1]


def test_policy_that_moves_to_another_reqid_leaves_its_old_group() -> None:
    model = fed(PolicyAdded(make_policy(reqid=1)))
    dirty = model.apply(PolicyAdded(make_policy(reqid=2), updated=True))
    assert {key.reqid for key in dirty} == {1, 2}
    assert [key.reqid for key in model.tunnels] == [2]


def test_sa_that_changes_its_group_leaves_the_old_one() -> None:
    model = fed(SaAdded(sa_out(1)))
    dirty = model.apply(SaAdded(sa_out(1, if_id=5), updated=True))
    assert {key.if_id for key in dirty} == {0, 5}
    assert [key.if_id for key in model.tunnels] == [5]


def test_unknown_deletions_mark_nothing_dirty() -> None:
    model = fed(SaAdded(sa_out(1)))
    assert model.apply(SaDeleted(sa_out(2).id)) == set()
    assert model.apply(PolicyDeleted(make_policy().id)) == set()
    assert model.sa_count == 1


def test_dump_that_says_the_same_soils_nothing() -> None:
    sas, policies = [sa_in(1), sa_out(2), sa_in(3)], [make_policy(), make_policy(PolicyDir.IN)]
    model = fed(*(SaAdded(sa) for sa in sas), *(PolicyAdded(policy) for policy in policies))
    used = [sa._replace(usage=Usage(99, 9, 1, 2)) for sa in sas]
    assert model.replace(used[::-1], policies[::-1]) == set()


def test_dump_soils_what_it_adds_removes_and_changes() -> None:
    model = fed(*(SaAdded(make_sa(reqid, LOCAL, REMOTE, reqid)) for reqid in (1, 2, 3)))
    dirty = model.replace(
        [make_sa(2, LOCAL, REMOTE, 2, aead=GCM128), make_sa(3, LOCAL, REMOTE, 3), sa_out(4, reqid=4)], []
    )
    assert {key.reqid for key in dirty} == {1, 2, 4}


# Random sequences end as a dump at the end does


class Kernel:
    """A small kernel: it does what it is told and says so, with repeats."""

    def __init__(self) -> None:
        self.sas: dict[SaId, Sa] = {}
        self.policies: dict[PolicyId, Policy] = {}

    def do(self, action: str, number: int) -> list[Event]:
        """Change something by chance; return what is announced, which is nothing where nothing changed."""
        local, remote = ((LOCAL, REMOTE), (LOCAL6, REMOTE6))[number % 2]
        reqid, spi = number // 2 % 2 + 1, number // 4 % 5 + 1
        ends = (local, remote) if number // 20 % 2 else (remote, local)
        sa = make_sa(
            spi, *ends, reqid=reqid, aead=None if action == "larval" else GCM128 if number % 3 else sa_out(1).aead
        )
        inner = ("10.1.0.0/24", f"10.2.{spi}.0/24") if number % 5 else ("fd01::/64", f"fd02:{spi}::/64")
        direction = (PolicyDir.OUT, PolicyDir.IN, PolicyDir.FWD)[number // 7 % 3]
        policy = make_policy(direction, *inner, reqid=reqid, ends=(local, remote), priority=1000 + number % 2)
        match action:
            case "add":
                if sa.id in self.sas and not self.sas[sa.id].larval:
                    return []  # EEXIST
                self.sas.pop(sa.id, None)  # a larval one is replaced
                self.sas[sa.id] = sa
                return [SaAdded(sa)]
            case "larval":
                if sa.id not in self.sas:
                    self.sas[sa.id] = sa  # ALLOCSPI says nothing
                return []
            case "update":
                if sa.id not in self.sas or self.sas[sa.id].larval:
                    return []
                self.sas[sa.id] = self.sas[sa.id]._replace(limits=sa.limits._replace(soft_bytes=number))
                return [SaAdded(self.sas[sa.id], updated=True)]
            case "delete":
                gone = self.sas.pop(sa.id, None)
                return [] if gone is None else [SaDeleted(sa.id, gone)]
            case "expire":
                gone = self.sas.pop(sa.id, None)
                return [] if gone is None else [SaExpired(gone, hard=True)]
            case "flush":
                found = bool(self.sas)
                self.sas = {}
                return [SasFlushed(0)] if found else []
            case "policy":
                known = policy.id in self.policies
                self.policies[policy.id] = policy
                return [PolicyAdded(policy, updated=known)]
            case "policy-gone":
                return [PolicyDeleted(policy.id)] if self.policies.pop(policy.id, None) is not None else []
            case "policy-expire":
                lost = self.policies.pop(policy.id, None)
                return [] if lost is None else [PolicyExpired(lost, hard=True)]
            case _:
                self.policies = {}
                return [PoliciesFlushed(0)]


ACTIONS = ("add",) * 6 + ("policy",) * 4 + ("delete", "update", "larval", "expire", "policy-gone", "policy-expire")
STEPS = st.tuples(
    st.sampled_from((*ACTIONS, "flush", "policy-flush")), st.integers(0, 4 * 5 * 2 * 3 * 7), st.integers(1, 3)
)


@given(st.lists(STEPS, max_size=60))
def test_random_sequences_end_in_the_state_of_a_dump_at_the_end(steps: list[tuple[str, int, int]]) -> None:
    kernel, followed = Kernel(), KernelModel()
    desired = {}
    for action, number, repeats in steps:
        for event in kernel.do(action, number) * repeats:
            for key in followed.apply(event):  # translate only what is said to have changed, as the engine does
                desired.pop(key, None)
                if key in followed.tunnels:
                    desired[key] = translate(key, followed.tunnels[key], ENV)
    dumped = KernelModel()
    dumped.replace(list(kernel.sas.values())[::-1], kernel.policies.values())
    assert desired == {key: translate(key, tunnel, ENV) for key, tunnel in dumped.tunnels.items()}
    assert followed.replace(list(kernel.sas.values())[::-1], kernel.policies.values()) == set()


def test_blocking_policy_belongs_to_no_group_and_is_known() -> None:
    model = fed(PolicyAdded(replace(make_policy(), templates=(), action=1)))
    assert model.tunnels == {}
    assert model.policy_count == 1
