"""VPP's algorithms and their key lengths (src/vnet/ipsec/ipsec_types.api)."""

from __future__ import annotations

from enum import IntEnum


class CryptoAlg(IntEnum):
    """enum ipsec_crypto_alg."""

    NONE = 0
    AES_CBC_128 = 1
    AES_CBC_192 = 2
    AES_CBC_256 = 3
    AES_CTR_128 = 4
    AES_CTR_192 = 5
    AES_CTR_256 = 6
    AES_GCM_128 = 7
    AES_GCM_192 = 8
    AES_GCM_256 = 9
    DES_CBC = 10
    TDES_CBC = 11
    CHACHA20_POLY1305 = 12
    AES_NULL_GMAC_128 = 13
    AES_NULL_GMAC_192 = 14
    AES_NULL_GMAC_256 = 15


class IntegAlg(IntEnum):
    """enum ipsec_integ_alg."""

    NONE = 0
    MD5_96 = 1
    SHA1_96 = 2
    SHA_256_96 = 3
    SHA_256_128 = 4
    SHA_384_192 = 5
    SHA_512_256 = 6


CRYPTO_KEY_BYTES: dict[CryptoAlg, int] = {
    CryptoAlg.NONE: 0,
    CryptoAlg.AES_CBC_128: 16,
    CryptoAlg.AES_CBC_192: 24,
    CryptoAlg.AES_CBC_256: 32,
    CryptoAlg.AES_CTR_128: 16,
    CryptoAlg.AES_CTR_192: 24,
    CryptoAlg.AES_CTR_256: 32,
    CryptoAlg.AES_GCM_128: 16,
    CryptoAlg.AES_GCM_192: 24,
    CryptoAlg.AES_GCM_256: 32,
    CryptoAlg.DES_CBC: 8,
    CryptoAlg.TDES_CBC: 24,
    CryptoAlg.CHACHA20_POLY1305: 32,
    CryptoAlg.AES_NULL_GMAC_128: 16,
    CryptoAlg.AES_NULL_GMAC_192: 24,
    CryptoAlg.AES_NULL_GMAC_256: 32,
}
"""Cipher key lengths that VPP expects, bytes, without the salt. VPP 26.06 crashes on any other length."""

AEAD_ALGS = frozenset(
    {
        CryptoAlg.AES_GCM_128,
        CryptoAlg.AES_GCM_192,
        CryptoAlg.AES_GCM_256,
        CryptoAlg.CHACHA20_POLY1305,
        CryptoAlg.AES_NULL_GMAC_128,
        CryptoAlg.AES_NULL_GMAC_192,
        CryptoAlg.AES_NULL_GMAC_256,
    }
)
"""Ciphers that authenticate packets themselves and allow no integrity algorithm."""

CTR_ALGS = frozenset({CryptoAlg.AES_CTR_128, CryptoAlg.AES_CTR_192, CryptoAlg.AES_CTR_256})
"""Counter mode ciphers. VPP supports them with every integrity algorithm except MD5."""

INTEG_KEY_BYTES: dict[IntegAlg, int] = {
    IntegAlg.NONE: 0,
    IntegAlg.MD5_96: 16,
    IntegAlg.SHA1_96: 20,
    IntegAlg.SHA_256_96: 32,
    IntegAlg.SHA_256_128: 32,
    IntegAlg.SHA_384_192: 48,
    IntegAlg.SHA_512_256: 64,
}
"""Integrity key lengths in ESP, bytes (RFC 2403, RFC 2404, RFC 4868)."""
