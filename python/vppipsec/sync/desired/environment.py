"""What the desired state of tunnels depends on that is VPP's or the kernel's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vppipsec.kernel.xfrm.sad_spd import TunnelKey
from vppipsec.vpp.algorithms import CryptoAlg
from vppipsec.vpp.gre_ipip import GreIpipInterface


@dataclass(frozen=True, slots=True)
class EnvironmentSnapshot:
    """What translate knows of VPP.

    `addresses`: address of a VPP interface -> its sw_if_index. `unreachable`: remote addresses to which VPP has no usable
    route. `ciphers`: the ciphers that this VPP has. `enforce_selectors`: whether decrypted packets are held against the
    selectors. `gre_ipip`: the interface of others that the SAs of a group in transport mode are for, where there is one.
    `link_mtus`: how long a packet to a remote address may be that leaves VPP, bytes, where that is known. It counts for
    VTIs alone: what VPP says of a packet that rules led somewhere is looked up in the rules' table, and lost there.
    `classified_vtis`: VTIs, by if_id, whose packets are led by rules, too. `vtis` are those that the kernel has, by if_id,
    each with the table by which it forwards what comes out of it, 0 for the main one; None where nobody looked. `tables`
    are VPP's but for ours, by number and family (True for IPv6).
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
