"""The kernel's SAD and SPD as far as we know them: fed by events and by dumps, it says which groups may have changed. Policies of
our own are left out.

A *group* is the set of SAs that replace each other, with the policies that ask for them: same two endpoints, mode, reqid and
if_id, both directions. Within a group SAs are in the order in which the kernel got them, oldest first; the kernel prefers the
newest (xfrm_state_look_at, net/xfrm/xfrm_state.c).
"""

from __future__ import annotations

from collections.abc import Iterable, Reversible, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vppipsec.kernel.ownership import is_ours
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
from vppipsec.kernel.xfrm.values import Mode, Policy, PolicyId, Sa, SaId

_EVERY_PROTOCOL = (0, 255)  # IPPROTO_IP from iproute2, IPSEC_PROTO_ANY


class GroupKey(NamedTuple):
    """What names a group. The two endpoints are in ascending order, since direction is not the model's business."""

    low: bytes
    high: bytes
    mode: int
    reqid: int
    if_id: int


@dataclass(slots=True)
class Group:
    """SAs in the kernel's order, oldest first, and policies in the order in which we learned of them."""

    key: GroupKey
    sas: dict[SaId, Sa] = field(default_factory=dict)
    policies: dict[PolicyId, Policy] = field(default_factory=dict)


# Keys are made anew for each message; `_group` returns the one that is kept, so that thousands of alike ones are not.


def group_of_sa(sa: Sa) -> GroupKey:
    """Return the group that an SA belongs to."""
    low, high = (sa.saddr, sa.daddr) if sa.saddr <= sa.daddr else (sa.daddr, sa.saddr)
    return GroupKey(low, high, sa.mode, sa.reqid, sa.if_id)


def groups_of_policy(policy: Policy) -> tuple[GroupKey, ...]:
    """Return the groups that a policy's templates ask for; none for a policy that only blocks or lets pass.

    In transport mode the kernel takes the addresses of the packet, not the template's (xfrm_tmpl_resolve_one,
    net/xfrm/xfrm_policy.c): those of the selector where it is for two hosts.
    """
    keys = []
    for template in policy.templates:
        low, high = template.saddr, template.daddr
        if template.mode == Mode.TRANSPORT and policy.selector.is_for_two_hosts:
            low, high = policy.selector.saddr, policy.selector.daddr
        if low > high:
            low, high = high, low
        key = GroupKey(low, high, template.mode, template.reqid, policy.if_id)
        if key not in keys:
            keys.append(key)
    return tuple(keys)


class KernelModel:
    """SAs and policies by group. Larval SAs are left out: they carry no traffic and have no keys."""

    def __init__(self) -> None:
        self.groups: dict[GroupKey, Group] = {}
        self.policy_changes = 0
        """Rises whenever a policy comes, goes or changes, one without templates, which is in no group, included, and with every
        dump: a policy that is installed anew as it was may have another place among those of its priority."""
        self._group_of_sa: dict[SaId, GroupKey] = {}
        self._groups_of_policy: dict[PolicyId, tuple[Policy, tuple[GroupKey, ...]]] = {}

    @property
    def sa_count(self) -> int:
        """Number of SAs, without larval ones."""
        return len(self._group_of_sa)

    @property
    def policy_count(self) -> int:
        """Number of policies of all directions and types."""
        return len(self._groups_of_policy)

    def find(self, sa_id: SaId) -> Sa | None:
        """Return an SA as it was told of last, None where the kernel has none of that name."""
        key = self._group_of_sa.get(sa_id)
        return None if key is None else self.groups[key].sas[sa_id]

    def sas(self) -> list[Sa]:
        """Return all SAs, by group and within a group oldest first."""
        return [sa for group in self.groups.values() for sa in group.sas.values()]

    def policies(self) -> list[Policy]:
        """Return all policies, those without templates included."""
        return [policy for policy, _ in self._groups_of_policy.values()]

    def apply(self, event: Event) -> set[GroupKey]:
        """Take one event and return the groups that it may have changed.

        Events may come twice, or tell of what is not known: the model then ends as if they had come once, in order.
        """
        match event:
            case SaAdded(sa, updated):
                return self._drop_sa(sa.id) if sa.larval else self._put_sa(sa, updated)
            case SaDeleted(sa_id):
                return self._drop_sa(sa_id)
            case SaExpired(sa, hard=True):
                return self._drop_sa(sa.id)
            case SasFlushed(proto):
                gone = [known for known in self._group_of_sa if proto in _EVERY_PROTOCOL or known.proto == proto]
                return _union(self._drop_sa(known) for known in gone)
            case PolicyAdded(policy):
                return self._put_policy(policy)
            case PolicyDeleted(policy_id):
                return self._drop_policy(policy_id)
            case PolicyExpired(policy, hard=True):
                return self._drop_policy(policy.id)
            case PoliciesFlushed(kind):
                lost = [known for known in self._groups_of_policy if known.type == kind]
                return _union(self._drop_policy(known) for known in lost)
            case _:
                return set()

    def replace(self, sas: Sequence[Sa], policies: Reversible[Policy]) -> set[GroupKey]:
        """Become what a dump says, newest first as the kernel dumps both; return the groups that differ from before."""
        before = self.groups
        self.groups, self._group_of_sa, self._groups_of_policy = {}, {}, {}
        for sa in reversed(sas):
            if not sa.larval:
                self._put_sa(sa)
        for policy in reversed(policies):
            self._put_policy(policy)
        self.policy_changes += 1
        keys = before.keys() | self.groups.keys()
        return {key for key in keys if not _alike(before.get(key), self.groups.get(key))}

    def _group(self, key: GroupKey) -> Group:
        group = self.groups.get(key)
        if group is None:
            group = self.groups[key] = Group(key)
        return group

    def _forget_if_empty(self, key: GroupKey) -> None:
        group = self.groups[key]
        if not group.sas and not group.policies:
            del self.groups[key]

    def _put_sa(self, sa: Sa, updated: bool = False) -> set[GroupKey]:
        """Add an SA as the newest, also where it is known: then it had gone. One that is updated keeps its place."""
        sa_id = sa.id
        known = self._group_of_sa.get(sa_id)
        if known is not None and updated:
            sa = _as_updated(self.groups[known].sas[sa_id], sa)
        key = group_of_sa(sa)
        dirty = {key}
        if known is not None and not (updated and known == key):
            dirty |= self._drop_sa(sa_id)
        group = self._group(key)
        group.sas[sa_id] = sa
        self._group_of_sa[sa_id] = group.key
        return dirty

    def _drop_sa(self, sa_id: SaId) -> set[GroupKey]:
        key = self._group_of_sa.pop(sa_id, None)
        if key is None:
            return set()
        del self.groups[key].sas[sa_id]
        self._forget_if_empty(key)
        return {key}

    def _put_policy(self, policy: Policy) -> set[GroupKey]:
        policy_id = policy.id
        if is_ours(policy_id):
            return set()
        known, _ = self._groups_of_policy.get(policy_id, (None, ()))
        changes = self.policy_changes + (known is None or not _same_policy(known, policy))
        dirty = self._drop_policy(policy_id) if known is not None else set()
        self.policy_changes = changes
        groups = [self._group(key) for key in groups_of_policy(policy)]
        for group in groups:
            group.policies[policy_id] = policy
        keys = tuple(group.key for group in groups)
        self._groups_of_policy[policy_id] = (policy, keys)
        return dirty.union(keys)

    def _drop_policy(self, policy_id: PolicyId) -> set[GroupKey]:
        _, keys = self._groups_of_policy.pop(policy_id, (None, ()))
        self.policy_changes += 1
        for key in keys:
            del self.groups[key].policies[policy_id]
            self._forget_if_empty(key)
        return set(keys)


def _as_updated(known: Sa, asked: Sa) -> Sa:
    """Return what UPDSA makes of an SA. Its message repeats all that was asked for, but the kernel changes this alone
    (xfrm_state_update, net/xfrm/xfrm_state.c; tried with Linux 6.1)."""
    return known._replace(
        limits=asked.limits,
        encap=asked.encap if known.encap is not None and asked.encap is not None else known.encap,
        if_id=asked.if_id or known.if_id,
        set_mark=asked.set_mark or known.set_mark,
    )


def _union(sets: Iterable[set[GroupKey]]) -> set[GroupKey]:
    return set().union(*sets)


def _alike(before: Group | None, after: Group | None) -> bool:
    """Tell whether two states of a group mean the same: counters and use times aside."""
    if before is None or after is None:
        return before is after
    return (
        before.sas.keys() == after.sas.keys()
        and all(a == b for a, b in zip(before.sas, after.sas, strict=True))
        and all(_same_sa(sa, after.sas[sa_id]) for sa_id, sa in before.sas.items())
        and before.policies.keys() == after.policies.keys()
        and all(_same_policy(policy, after.policies[known]) for known, policy in before.policies.items())
    )


def _same_sa(a: Sa, b: Sa) -> bool:
    return a is b or _sa_meaning(a) == _sa_meaning(b)


def _sa_meaning(sa: Sa) -> tuple[object, ...]:
    return (
        (sa.saddr, sa.mode, sa.reqid, sa.if_id, sa.replay_window, sa.flags, sa.extra_flags, sa.direction),
        (sa.crypt, sa.auth, sa.aead, sa.comp, sa.encap, sa.set_mark, sa.selector, sa.tfcpad, sa.limits),
    )


def _same_policy(a: Policy, b: Policy) -> bool:
    return a is b or (a.action, a.priority, a.templates) == (b.action, b.priority, b.templates)
