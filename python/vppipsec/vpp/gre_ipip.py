"""VPP's gre and ipip interfaces. VPP builds their packets itself, so only a tunnel protection can encrypt them.

Other programs create these interfaces. The service adds and removes their protection, and changes nothing else.

The service *blocks* an interface while an outbound policy covers its packets and there are no SAs for it. The block is a
protection by an SA without any algorithm. VPP 26.06 then drops all packets that the interface would send (`drop_no_crypto`,
src/vnet/ipsec/esp_encrypt.c).

After a protection is removed, VPP 26.06 lets the interface send nothing until the interface is created again:
ipsec_tun_protect_tx_db_remove leaves `ip4-drop` at the end of its output (src/vnet/ipsec/ipsec_tun.c).
"""

from __future__ import annotations

from typing import NamedTuple

from vppipsec.vpp.algorithms import CryptoAlg, IntegAlg
from vppipsec.vpp.ownership import BLOCK_SAD_ID
from vppipsec.vpp.types import Protection, SaSpec

BLOCK_PROTECTION = Protection(BLOCK_SAD_ID, ())
BLOCK_SA = SaSpec(1, bytes(4), bytes(4), CryptoAlg.NONE, b"", IntegAlg.NONE, b"", 0, 0, 0)
"""The SA of blocked interfaces: VPP sends nothing with it. No IKE daemon negotiates its SPI (RFC 4303 section 2.1)."""


class GreIpipInterface(NamedTuple):
    """A gre or ipip interface: its two endpoints, and the IP protocols of its packets.

    `remote` is all zeroes if there are several remotes. `unsupported_reason` says why the service's SAs cannot encrypt its
    packets; it is empty if they can.
    """

    sw_if_index: int
    name: str
    local: bytes
    remote: bytes
    protos: tuple[int, ...]
    unsupported_reason: str = ""

    @property
    def is_multipoint(self) -> bool:
        """True if VPP protects next hops of this interface, not the interface itself."""
        return not any(self.remote)
