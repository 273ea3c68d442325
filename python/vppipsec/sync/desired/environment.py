"""The environment: the state of VPP and the kernel that tunnels depend on and the service does not manage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vppipsec.kernel.xfrm.sad_spd import TunnelKey
from vppipsec.vpp.algorithms import CryptoAlg
from vppipsec.vpp.gre_ipip import GreIpipInterface


@dataclass(frozen=True, slots=True)
class EnvironmentSnapshot:
    """The environment as `translate` sees it.

    `addresses`: address of a VPP interface -> its sw_if_index. `unreachable`: remote addresses to which VPP has no
    usable route. `ciphers`: the ciphers that this VPP has. `enforce_selectors`: whether VPP checks decrypted packets
    against the selectors.

    `gre_ipip`: the gre or ipip interface that a tunnel in transport mode protects.

    `link_mtus`: by remote address, the longest packet in bytes that the link to it carries, where that is known. Only
    VTIs use it: VPP looks up its "packet too big" reply in the table of the layer's rules, and drops it there.

    `classified_vtis`: VTIs, by if_id, that have a classifier. Layers forward their packets, too.

    `vtis`: the kernel's VTIs: if_id -> table that forwards their decrypted packets, 0 for the main table. None where
    the kernel has not been read.

    `tables`: VPP's FIB tables that the service did not create, by number and family (True for IPv6).
    """

    addresses: Mapping[bytes, int]
    unreachable: frozenset[bytes] = frozenset()
    ciphers: frozenset[CryptoAlg] = field(default=frozenset(CryptoAlg))
    enforce_selectors: bool = True
    gre_ipip: Mapping[TunnelKey, GreIpipInterface] = field(default_factory=dict)
    link_mtus: Mapping[bytes, int] = field(default_factory=dict)
    classified_vtis: frozenset[int] = frozenset()
    vtis: Mapping[int, int] | None = None
    tables: frozenset[tuple[int, bool]] = frozenset()
