"""Frozen values of the desired state: what VPP should hold for one group of kernel SAs, and what becomes of each SA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from vppipsec.kernel.xfrm.sad_spd import GroupKey
from vppipsec.kernel.xfrm.values import Sa, SaId
from vppipsec.vpp.gre_ipip import Overlay
from vppipsec.vpp.types import Rule, SaSpec


class Fate(StrEnum):
    """What becomes of a kernel SA."""

    CARRIED = "carried"
    """VPP shall hold it."""
    PENDING = "pending"
    """Something is missing that is expected to come, such as its counterpart or its policy."""
    REKEYING = "rekeying"
    """Its sequence numbers are not VPP's to go on with, so the IKE daemon is asked to replace it."""
    UNSUPPORTED = "unsupported"
    """VPP cannot carry it, or it is not VPP's business."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of one kernel SA. `spec` is what VPP shall hold where it is carried; `reason` says why it is not.

    `sa` is the SA that was judged on its own, None where the verdict came from elsewhere.
    """

    fate: Fate
    reason: str = ""
    spec: SaSpec | None = None
    direction: str = "?"
    sa: Sa | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Tunnel:
    """An `ipsec` interface with its SAs. SAs are oldest first; the newest outbound one is used, all inbound ones are.

    `tag` is put on the interface, so that it can be told after a restart whose it is; `lender` is the sw_if_index of the
    interface that holds the local address; `ip6` says whether IPv6 packets pass inside. `admitted` are the rules that decrypted
    packets are held against, the first that matches decides; None where they are not. Where there is an `overlay`, the SAs are to
    protect that interface of others, and there is to be none of ours. `mtu` is the length of the longest packet that the
    interface takes, bytes; 0 where it is VPP's to say. `table` is the FIB table by which is forwarded what comes out of it.

    Without SAs nothing passes.
    """

    tag: str
    lender: int
    ip6: bool
    outbound: tuple[SaSpec, ...]
    inbound: tuple[SaSpec, ...]
    admitted: tuple[Rule, ...] | None = None
    overlay: Overlay | None = None
    mtu: int = 0
    table: int = 0


@dataclass(frozen=True, slots=True)
class Desired:
    """What VPP shall hold for one group, apart from the routes into its tunnel: policies of other groups can go first there."""

    key: GroupKey
    tunnel: Tunnel | None = None
    verdicts: Mapping[SaId, Verdict] = field(default_factory=dict)
