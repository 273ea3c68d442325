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

from vppipsec.kernel.ownership import is_pass_policy
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


class TunnelKey(NamedTuple):
    """What names a group. The two endpoints are in ascending order, since direction is not the model's business."""

    low: bytes
    high: bytes
    mode: int
    reqid: int
    if_id: int


@dataclass(slots=True)
class Tunnel:
    """SAs in the kernel's order, oldest first, and policies in the order in which we learned of them."""

    key: TunnelKey
    sas: dict[SaId, Sa] = field(default_factory=dict)
    policies: dict[PolicyId, Policy] = field(default_factory=dict)


# Keys are made anew for each message; `_tunnel` returns the one that is kept, so that thousands of alike ones are not.


def tunnel_key_of_sa(sa: Sa) -> TunnelKey:
    """Return the group that an SA belongs to."""
    low, high = (sa.saddr, sa.daddr) if sa.saddr <= sa.daddr else (sa.daddr, sa.saddr)
    return TunnelKey(low, high, sa.mode, sa.reqid, sa.if_id)


def tunnel_keys_of_policy(policy: Policy) -> tuple[TunnelKey, ...]:
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
        key = TunnelKey(low, high, template.mode, template.reqid, policy.if_id)
        if key not in keys:
            keys.append(key)
    return tuple(keys)


class KernelModel:
    """SAs and policies by group. Larval SAs are left out: they carry no traffic and have no keys."""

    def __init__(self) -> None:
        self.tunnels: dict[TunnelKey, Tunnel] = {}
        self.policy_changes = 0
        """Rises whenever a policy comes, goes or changes, one without templates, which is in no group, included, and with every
        dump: a policy that is installed anew as it was may have another place among those of its priority."""
        self._key_of_sa: dict[SaId, TunnelKey] = {}
        self._keys_of_policy: dict[PolicyId, tuple[Policy, tuple[TunnelKey, ...]]] = {}

    @property
    def sa_count(self) -> int:
        """Number of SAs, without larval ones."""
        return len(self._key_of_sa)

    @property
    def policy_count(self) -> int:
        """Number of policies of all directions and types."""
        return len(self._keys_of_policy)

    def find(self, sa_id: SaId) -> Sa | None:
        """Return an SA as it was told of last, None where the kernel has none of that name."""
        key = self._key_of_sa.get(sa_id)
        return None if key is None else self.tunnels[key].sas[sa_id]

    def sas(self) -> list[Sa]:
        """Return all SAs, by group and within a group oldest first."""
        return [sa for tunnel in self.tunnels.values() for sa in tunnel.sas.values()]

    def policies(self) -> list[Policy]:
        """Return all policies, those without templates included."""
        return [policy for policy, _ in self._keys_of_policy.values()]

    def apply(self, event: Event) -> set[TunnelKey]:
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
                gone = [known for known in self._key_of_sa if proto in _EVERY_PROTOCOL or known.proto == proto]
                return _union(self._drop_sa(known) for known in gone)
            case PolicyAdded(policy):
                return self._put_policy(policy)
            case PolicyDeleted(policy_id):
                return self._drop_policy(policy_id)
            case PolicyExpired(policy, hard=True):
                return self._drop_policy(policy.id)
            case PoliciesFlushed(kind):
                lost = [known for known in self._keys_of_policy if known.type == kind]
                return _union(self._drop_policy(known) for known in lost)
            case _:
                return set()

    def replace(self, sas: Sequence[Sa], policies: Reversible[Policy]) -> set[TunnelKey]:
        """Become what a dump says, newest first as the kernel dumps both; return the groups that differ from before."""
        before = self.tunnels
        self.tunnels, self._key_of_sa, self._keys_of_policy = {}, {}, {}
        for sa in reversed(sas):
            if not sa.larval:
                self._put_sa(sa)
        for policy in reversed(policies):
            self._put_policy(policy)
        self.policy_changes += 1
        keys = before.keys() | self.tunnels.keys()
        return {key for key in keys if not _same_sas(before.get(key), self.tunnels.get(key))}

    def _tunnel(self, key: TunnelKey) -> Tunnel:
        tunnel = self.tunnels.get(key)
        if tunnel is None:
            tunnel = self.tunnels[key] = Tunnel(key)
        return tunnel

    def _forget_if_empty(self, key: TunnelKey) -> None:
        tunnel = self.tunnels[key]
        if not tunnel.sas and not tunnel.policies:
            del self.tunnels[key]

    def _put_sa(self, sa: Sa, updated: bool = False) -> set[TunnelKey]:
        """Add an SA as the newest, also where it is known: then it had gone. One that is updated keeps its place."""
        sa_id = sa.id
        known = self._key_of_sa.get(sa_id)
        if known is not None and updated:
            sa = _as_updated(self.tunnels[known].sas[sa_id], sa)
        key = tunnel_key_of_sa(sa)
        dirty = {key}
        if known is not None and not (updated and known == key):
            dirty |= self._drop_sa(sa_id)
        tunnel = self._tunnel(key)
        tunnel.sas[sa_id] = sa
        self._key_of_sa[sa_id] = tunnel.key
        return dirty

    def _drop_sa(self, sa_id: SaId) -> set[TunnelKey]:
        key = self._key_of_sa.pop(sa_id, None)
        if key is None:
            return set()
        del self.tunnels[key].sas[sa_id]
        self._forget_if_empty(key)
        return {key}

    def _put_policy(self, policy: Policy) -> set[TunnelKey]:
        policy_id = policy.id
        if is_pass_policy(policy_id):
            return set()
        known, _ = self._keys_of_policy.get(policy_id, (None, ()))
        changes = self.policy_changes + (known is None or not _same_policy(known, policy))
        dirty = self._drop_policy(policy_id) if known is not None else set()
        self.policy_changes = changes
        tunnels = [self._tunnel(key) for key in tunnel_keys_of_policy(policy)]
        for tunnel in tunnels:
            tunnel.policies[policy_id] = policy
        keys = tuple(tunnel.key for tunnel in tunnels)
        self._keys_of_policy[policy_id] = (policy, keys)
        return dirty.union(keys)

    def _drop_policy(self, policy_id: PolicyId) -> set[TunnelKey]:
        _, keys = self._keys_of_policy.pop(policy_id, (None, ()))
        self.policy_changes += 1
        for key in keys:
            del self.tunnels[key].policies[policy_id]
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


def _union(sets: Iterable[set[TunnelKey]]) -> set[TunnelKey]:
    return set().union(*sets)


def _same_sas(before: Tunnel | None, after: Tunnel | None) -> bool:
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
