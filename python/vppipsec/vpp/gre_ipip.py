"""VPP's gre and ipip interfaces: others' tunnels whose packets VPP makes itself, so that only a protection encrypts them.

They are never ours: they are protected and let go of, and nothing else. One whose packets an outbound policy covers while it has
no SAs is *muted*: protected by an SA without any algorithm, for which VPP 26.06 drops what the interface would send
(`drop_no_crypto`, src/vnet/ipsec/esp_encrypt.c). Once one was protected, VPP 26.06 lets it send nothing more without,
until it is made anew: ipsec_tun_protect_tx_db_remove leaves `ip4-drop` at the end of its output (src/vnet/ipsec/ipsec_tun.c).
"""

from __future__ import annotations

from typing import NamedTuple

from vppipsec.vpp.algorithms import CryptoAlg, IntegAlg
from vppipsec.vpp.ownership import BLOCK_SAD_ID
from vppipsec.vpp.types import Protection, SaSpec

BLOCK_PROTECTION = Protection(BLOCK_SAD_ID, ())
BLOCK_SA = SaSpec(1, bytes(4), bytes(4), CryptoAlg.NONE, b"", IntegAlg.NONE, b"", 0, 0, 0)
"""That SA: nothing leaves by it. No IKE daemon negotiates its SPI (RFC 4303 section 2.1)."""


class GreIpipInterface(NamedTuple):
    """A gre or ipip interface: its two ends, and the IP protocols of its packets.

    `remote` is all zeroes where there are several. `unsupported_reason` says why its packets cannot be encrypted by SAs of
    ours; nothing where they can.
    """

    sw_if_index: int
    name: str
    local: bytes
    remote: bytes
    protos: tuple[int, ...]
    unsupported_reason: str = ""

    @property
    def is_multipoint(self) -> bool:
        """True where a protection would be for a next hop, not for the interface."""
        return not any(self.remote)
