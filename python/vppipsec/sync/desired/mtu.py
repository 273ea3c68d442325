"""Computes a tunnel's MTU: the longest packet that fits the outgoing link once it is in ESP. Pure.

The kernel reports its MTU to the sender of a longer packet that must not be fragmented. VPP does when the interface has
that MTU. Sources: xfrm_state_mtu in net/xfrm/xfrm_state.c, xfrm4_tunnel_check_size in net/xfrm/xfrm_output.c.
"""

from __future__ import annotations

from vppipsec.vpp.algorithms import AEAD_ALGS, CryptoAlg, IntegAlg
from vppipsec.vpp.types import MAX_MTU, MIN_MTU, SadFlag, SaSpec

_IP4_HEADER, _IP6_HEADER, _UDP_HEADER, _ESP_HEADER, _ESP_TRAILER = 20, 40, 8, 8, 2
_AES_CBC = (CryptoAlg.AES_CBC_128, CryptoAlg.AES_CBC_192, CryptoAlg.AES_CBC_256)
_AEAD_ICV = 16
_ICV = {
    IntegAlg.NONE: 0,
    IntegAlg.MD5_96: 12,
    IntegAlg.SHA1_96: 12,
    IntegAlg.SHA_256_96: 12,
    IntegAlg.SHA_256_128: 16,
    IntegAlg.SHA_384_192: 24,
    IntegAlg.SHA_512_256: 32,
}


def max_inner_packet(link_mtu: int, sa: SaSpec) -> int:
    """Return the longest packet, in bytes, that an SA in tunnel mode makes fit a link; at least IP's minimum MTU."""
    iv, block = _iv_block_bytes(sa.crypto)
    head = (
        (_IP6_HEADER if len(sa.dst) == 16 else _IP4_HEADER)
        + (_UDP_HEADER if sa.flags & SadFlag.UDP_ENCAP else 0)
        + _ESP_HEADER
        + iv
    )
    icv = _AEAD_ICV if sa.crypto in AEAD_ALGS else _ICV[sa.integ]
    return min(max((link_mtu - head - icv) // block * block - _ESP_TRAILER, MIN_MTU), MAX_MTU)


def _iv_block_bytes(crypto: CryptoAlg) -> tuple[int, int]:
    """Return a cipher's IV length and ESP's padding unit, both in bytes.

    Source: ipsec_sa_crypto_integ_map in src/vnet/ipsec/ipsec_sa.c.
    """
    if crypto in _AES_CBC:
        return 16, 16
    if crypto == CryptoAlg.TDES_CBC:
        return 8, 8
    return 0 if crypto == CryptoAlg.NONE else 8, 4
