"""Frozen values of the desired state: what VPP should hold for one group of kernel SAs, and what becomes of each SA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from vppipsec.kernel.xfrm.sad_spd import TunnelKey
from vppipsec.kernel.xfrm.values import Sa, SaId
from vppipsec.vpp.gre_ipip import GreIpipInterface
from vppipsec.vpp.types import Rule, SaSpec


class OffloadStatus(StrEnum):
    """What becomes of a kernel SA."""

    OFFLOADED = "carried"
    """VPP shall hold it."""
    PENDING = "pending"
    """Something is missing that is expected to come, such as its counterpart or its policy."""
    AWAITING_REKEY = "rekeying"
    """Its sequence numbers are not VPP's to go on with, so the IKE daemon is asked to replace it."""
    UNSUPPORTED = "unsupported"
    """VPP cannot carry it, or it is not VPP's business."""


@dataclass(frozen=True, slots=True)
class OffloadDecision:
    """What becomes of one kernel SA. `spec` is what VPP shall hold where it is carried; `reason` says why it is not.

    `sa` is the SA that was judged on its own, None where the verdict came from elsewhere.
    """

    status: OffloadStatus
    reason: str = ""
    spec: SaSpec | None = None
    direction: str = "?"
    sa: Sa | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class DesiredTunnel:
    """An `ipsec` interface with its SAs. SAs are oldest first; the newest outbound one is used, all inbound ones are.

    `tag` is put on the interface, so that it can be told after a restart whose it is; `unnumbered_from` is the sw_if_index
    of the interface that holds the local address; `ip6` says whether IPv6 packets pass inside. `inbound_rules` are the
    rules that decrypted packets are held against, the first that matches decides; None where they are not. Where there is
    an `gre_ipip`, the SAs are to protect that interface of others, and there is to be none of ours. `mtu` is the length of
    the longest packet that the interface takes, bytes; 0 where it is VPP's to say. `table` is the FIB table by which is
    forwarded what comes out of it.

    Without SAs nothing passes.
    """

    tag: str
    unnumbered_from: int
    ip6: bool
    outbound: tuple[SaSpec, ...]
    inbound: tuple[SaSpec, ...]
    inbound_rules: tuple[Rule, ...] | None = None
    gre_ipip: GreIpipInterface | None = None
    mtu: int = 0
    table: int = 0


@dataclass(frozen=True, slots=True)
class Translation:
    """What VPP shall hold for one group, apart from the routes into its tunnel: policies of other groups can go first there."""

    key: TunnelKey
    tunnel: DesiredTunnel | None = None
    decisions: Mapping[SaId, OffloadDecision] = field(default_factory=dict)
