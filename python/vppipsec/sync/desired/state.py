"""Frozen values of the desired state: what VPP should hold for one tunnel, and the decision on each of its SAs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from vppipsec.kernel.xfrm.sad_spd import TunnelKey
from vppipsec.kernel.xfrm.values import Sa, SaId
from vppipsec.vpp.gre_ipip import GreIpipInterface
from vppipsec.vpp.types import Rule, SaSpec


class OffloadStatus(StrEnum):
    """What VPP does with a kernel SA."""

    OFFLOADED = "carried"
    """VPP should hold it."""
    PENDING = "pending"
    """Something expected is missing, such as its counterpart or its policy."""
    AWAITING_REKEY = "rekeying"
    """VPP cannot continue its sequence numbers, so the service asks the IKE daemon to replace it."""
    UNSUPPORTED = "unsupported"
    """VPP cannot carry it, or it does not concern VPP."""


@dataclass(frozen=True, slots=True)
class OffloadDecision:
    """The decision on one kernel SA. `spec` is the SA that VPP should hold if it is offloaded; `reason` says why it is
    not.

    `sa` is the SA if it was judged on its own, None where the decision comes from the whole tunnel.
    """

    status: OffloadStatus
    reason: str = ""
    spec: SaSpec | None = None
    direction: str = "?"
    sa: Sa | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class DesiredTunnel:
    """An `ipsec` interface with its SAs, oldest first. VPP sends with the newest outbound SA and receives with all
    inbound ones.

    `tag` is written on the interface, so that a restarted service recognises it. `unnumbered_from` is the sw_if_index
    of the interface that holds the local address. `ip6` says whether IPv6 packets pass inside.

    `inbound_rules` filter decrypted packets; the first that matches decides. None filters nothing.

    `gre_ipip` is the gre or ipip interface that the SAs protect; the service then creates no `ipsec` interface.

    `mtu` is the longest packet that the interface accepts, in bytes; 0 leaves the MTU to VPP. `table` is the FIB table
    that forwards decrypted packets.

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
    """What VPP should hold for one tunnel, without its routes: other tunnels' policies can precede it there."""

    key: TunnelKey
    tunnel: DesiredTunnel | None = None
    decisions: Mapping[SaId, OffloadDecision] = field(default_factory=dict)
