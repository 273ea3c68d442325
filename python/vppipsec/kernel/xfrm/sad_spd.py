"""A model of the kernel's SAD and SPD, fed by events and dumps. Each update returns the tunnels that may have changed.

A *tunnel* is the SAs that replace each other, in both directions, and the policies that ask for them. They have the same two
endpoints, mode, reqid and if_id. The SAs of a tunnel are in the order of their addition to the kernel, oldest first. The kernel
prefers the newest (xfrm_state_look_at, net/xfrm/xfrm_state.c).

The model omits the service's own policies.
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
    """Identifies a tunnel. The two endpoints are in ascending order, since the key has no direction."""

    low: bytes
    high: bytes
    mode: int
    reqid: int
    if_id: int


@dataclass(slots=True)
class Tunnel:
    """SAs in the kernel's order, oldest first, and policies in the order in which the model got them."""

    key: TunnelKey
    sas: dict[SaId, Sa] = field(default_factory=dict)
    policies: dict[PolicyId, Policy] = field(default_factory=dict)


# Each message makes new keys. `_tunnel` returns the tunnel with the first key, so that thousands of equal keys are not kept.


def tunnel_key_of_sa(sa: Sa) -> TunnelKey:
    """Return the key of the tunnel of an SA."""
    low, high = (sa.saddr, sa.daddr) if sa.saddr <= sa.daddr else (sa.daddr, sa.saddr)
    return TunnelKey(low, high, sa.mode, sa.reqid, sa.if_id)


def tunnel_keys_of_policy(policy: Policy) -> tuple[TunnelKey, ...]:
    """Return the keys of the tunnels that a policy's templates ask for. A policy without templates has none.

    In transport mode the kernel uses the addresses of the packet, not of the template (xfrm_tmpl_resolve_one,
    net/xfrm/xfrm_policy.c). The selector has these addresses if it is for two hosts.
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
    """SAs and policies by tunnel. It omits larval SAs: they carry no traffic and have no keys."""

    def __init__(self) -> None:
        self.tunnels: dict[TunnelKey, Tunnel] = {}
        self.policy_changes = 0
        """Increases with each dump, and whenever a policy is added, deleted or changed. Policies without templates count too.

        A dump counts because an equal policy, deleted and added again, may have another place among policies of its priority."""
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
        """Return the last known state of an SA, or None."""
        key = self._key_of_sa.get(sa_id)
        return None if key is None else self.tunnels[key].sas[sa_id]

    def sas(self) -> list[Sa]:
        """Return all SAs, by tunnel, oldest first within a tunnel."""
        return [sa for tunnel in self.tunnels.values() for sa in tunnel.sas.values()]

    def policies(self) -> list[Policy]:
        """Return all policies, those without templates included."""
        return [policy for policy, _ in self._keys_of_policy.values()]

    def apply(self, event: Event) -> set[TunnelKey]:
        """Apply one event and return the keys of the tunnels that it may have changed.

        Events may come twice, or name unknown objects. The result is the same as if they had come once, in order.
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
        """Replace the state by a dump. The kernel dumps both newest first. Return the keys of the tunnels that differ."""
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
        """Add an SA as the newest, also if it is known: then it was deleted in between. An updated SA keeps its place."""
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
    """Return an SA after an UPDSA.

    The message repeats the whole request, but the kernel changes only these fields (xfrm_state_update, net/xfrm/xfrm_state.c;
    tested with Linux 6.1).
    """
    return known._replace(
        limits=asked.limits,
        encap=asked.encap if known.encap is not None and asked.encap is not None else known.encap,
        if_id=asked.if_id or known.if_id,
        set_mark=asked.set_mark or known.set_mark,
    )


def _union(sets: Iterable[set[TunnelKey]]) -> set[TunnelKey]:
    return set().union(*sets)


def _same_sas(before: Tunnel | None, after: Tunnel | None) -> bool:
    """Return whether two states of a tunnel are equal except for counters and times of use."""
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
