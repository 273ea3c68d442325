"""The messages of NETLINK_XFRM as typed events. `vppipsec.kernel.xfrm.wire.decode_xfrm` returns them."""

from __future__ import annotations

from dataclasses import dataclass

from vppipsec.kernel.xfrm.values import Mark, Policy, PolicyId, ReplayState, Sa, SaId, Selector, Usage


@dataclass(frozen=True, slots=True)
class SaAdded:
    """NEWSA or UPDSA, as a notification or in a dump. `updated` is True for UPDSA."""

    sa: Sa
    updated: bool = False


@dataclass(frozen=True, slots=True)
class SaDeleted:
    """DELSA. `sa` is the last state of the SA, if the kernel sent it."""

    id: SaId
    sa: Sa | None = None


@dataclass(frozen=True, slots=True)
class SaExpired:
    """EXPIRE. If `hard`, the kernel has deleted the SA, without a DELSA."""

    sa: Sa
    hard: bool


@dataclass(frozen=True, slots=True)
class SasFlushed:
    """FLUSHSA. `proto` 0 (IPPROTO_IP) and 255 (IPSEC_PROTO_ANY) mean every protocol."""

    proto: int


@dataclass(frozen=True, slots=True)
class PolicyAdded:
    """NEWPOLICY or UPDPOLICY, as a notification or in a dump. `updated` is True for UPDPOLICY."""

    policy: Policy
    updated: bool = False


@dataclass(frozen=True, slots=True)
class PolicyDeleted:
    """DELPOLICY of the policy `id`. `index` is set after a deletion by index, and `policy` if the kernel sent it."""

    id: PolicyId
    index: int = 0
    policy: Policy | None = None


@dataclass(frozen=True, slots=True)
class PolicyExpired:
    """POLEXPIRE. If `hard`, the kernel has deleted the policy, without a DELPOLICY."""

    policy: Policy
    hard: bool


@dataclass(frozen=True, slots=True)
class PoliciesFlushed:
    """FLUSHPOLICY, of one policy type (XFRM_POLICY_TYPE_*)."""

    type: int


@dataclass(frozen=True, slots=True)
class SaProgress:
    """NEWAE: usage or replay state of an SA changed (struct xfrm_aevent_id and its attributes)."""

    id: SaId
    saddr: bytes
    flags: int
    reqid: int
    usage: Usage | None = None
    replay: ReplayState | None = None


@dataclass(frozen=True, slots=True)
class Acquired:
    """ACQUIRE: a packet met a policy that has no SA (struct xfrm_user_acquire)."""

    id: SaId
    saddr: bytes
    selector: Selector
    policy: Policy
    seq: int
    aalgos: int
    ealgos: int
    calgos: int


@dataclass(frozen=True, slots=True)
class MigrateStep:
    """One pair of addresses that changed (struct xfrm_user_migrate)."""

    old_daddr: bytes
    old_saddr: bytes
    new_daddr: bytes
    new_saddr: bytes
    proto: int
    mode: int
    reqid: int
    old_family: int
    new_family: int


@dataclass(frozen=True, slots=True)
class Migrated:
    """MIGRATE: the addresses of SAs changed, without NEWSA or DELSA. Only a dump shows the result."""

    policy_id: PolicyId
    steps: tuple[MigrateStep, ...]


@dataclass(frozen=True, slots=True)
class Mapped:
    """MAPPING: ESP in UDP arrived from another address or port (struct xfrm_user_mapping); ports in host order."""

    id: SaId
    reqid: int
    old_saddr: bytes
    new_saddr: bytes
    old_sport: int
    new_sport: int


@dataclass(frozen=True, slots=True)
class Reported:
    """REPORT: the kernel dropped a packet because of its extension headers (struct xfrm_user_report)."""

    proto: int
    selector: Selector


@dataclass(frozen=True, slots=True)
class SadInfo:
    """NEWSADINFO: the number of SAs (XFRMA_SAD_CNT)."""

    count: int


@dataclass(frozen=True, slots=True)
class Irrelevant:
    """A known message that changes neither SAs nor policies (SPD info, default policy and the like)."""

    type: int


Event = (
    SaAdded
    | SaDeleted
    | SaExpired
    | SasFlushed
    | PolicyAdded
    | PolicyDeleted
    | PolicyExpired
    | PoliciesFlushed
    | SaProgress
    | Acquired
    | Migrated
    | Mapped
    | Reported
    | SadInfo
    | Irrelevant
)

__all__ = [
    "Acquired",
    "Event",
    "Irrelevant",
    "Mapped",
    "Mark",
    "MigrateStep",
    "Migrated",
    "PoliciesFlushed",
    "PolicyAdded",
    "PolicyDeleted",
    "PolicyExpired",
    "Reported",
    "SaAdded",
    "SaDeleted",
    "SaExpired",
    "SaProgress",
    "SadInfo",
    "SasFlushed",
]
