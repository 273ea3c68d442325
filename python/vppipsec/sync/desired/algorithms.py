"""Maps the kernel's algorithm names to VPP's, and divides the kernel's key blobs into key and salt.

Kernel names: net/xfrm/xfrm_algo.c. Key layouts:

- GCM: key, then 4 bytes of salt (RFC 4106 section 8.1); GMAC as GCM (RFC 4543 section 5);
- CTR: key, then 4 bytes of nonce (RFC 3686 section 5.1);
- ChaCha20-Poly1305: key, then 4 bytes of salt (RFC 7634 section 2).

VPP: ipsec_sa_crypto_integ_map in src/vnet/ipsec/ipsec_sa.c.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vppipsec.kernel.xfrm.values import Algorithm, Sa
from vppipsec.vpp.algorithms import CTR_ALGS, INTEG_KEY_BYTES, CryptoAlg, IntegAlg

_SALT_BYTES = 4

_AEAD_CIPHERS: dict[str, dict[int, CryptoAlg]] = {
    "rfc4106(gcm(aes))": {16: CryptoAlg.AES_GCM_128, 24: CryptoAlg.AES_GCM_192, 32: CryptoAlg.AES_GCM_256},
    "rfc7539esp(chacha20,poly1305)": {32: CryptoAlg.CHACHA20_POLY1305},
    "rfc4543(gcm(aes))": {
        16: CryptoAlg.AES_NULL_GMAC_128,
        24: CryptoAlg.AES_NULL_GMAC_192,
        32: CryptoAlg.AES_NULL_GMAC_256,
    },
}
_AEAD_ICV_BITS = 128

_CIPHERS: dict[str, dict[int, CryptoAlg]] = {
    "cbc(aes)": {16: CryptoAlg.AES_CBC_128, 24: CryptoAlg.AES_CBC_192, 32: CryptoAlg.AES_CBC_256},
    "cbc(des3_ede)": {24: CryptoAlg.TDES_CBC},
    "ecb(cipher_null)": {0: CryptoAlg.NONE},
}
_CTR = "rfc3686(ctr(aes))"
_CTR_CIPHERS = {16: CryptoAlg.AES_CTR_128, 24: CryptoAlg.AES_CTR_192, 32: CryptoAlg.AES_CTR_256}

_INTEGRITY: dict[tuple[str, int], IntegAlg] = {
    ("hmac(md5)", 96): IntegAlg.MD5_96,
    ("hmac(sha1)", 96): IntegAlg.SHA1_96,
    ("hmac(sha256)", 96): IntegAlg.SHA_256_96,
    ("hmac(sha256)", 128): IntegAlg.SHA_256_128,
    ("hmac(sha384)", 192): IntegAlg.SHA_384_192,
    ("hmac(sha512)", 256): IntegAlg.SHA_512_256,
}
_DEFAULT_ICV_BITS = {"hmac(md5)": 96, "hmac(sha1)": 96, "hmac(sha256)": 96}
"""The ICV length that the kernel uses where XFRMA_ALG_AUTH names none (aalg_list in net/xfrm/xfrm_algo.c)."""


class Unsupported(Exception):
    """VPP cannot carry an SA. The text gives the operator the reason; it contains no key."""


@dataclass(frozen=True, slots=True)
class Suite:
    """Cipher and integrity algorithm of an SA as VPP names them, with their keys."""

    crypto: CryptoAlg
    crypto_key: bytes = field(repr=False)
    salt: int = field(repr=False)
    integ: IntegAlg = IntegAlg.NONE
    integ_key: bytes = field(default=b"", repr=False)


def suite_of(sa: Sa, ciphers: frozenset[CryptoAlg]) -> Suite:
    """Return an SA's algorithms as VPP names them. `ciphers` are those that this VPP has.

    Raises Unsupported where VPP lacks an algorithm, and where a key's length does not fit its algorithm.
    """
    suite = _aead_suite(sa.aead) if sa.aead is not None else _cipher_suite(sa)
    if suite.crypto not in ciphers:
        raise Unsupported(f"this VPP has no {suite.crypto.name.replace('_', '-')}")
    return suite


def describe_algorithms(sa: Sa) -> str:
    """Return an SA's algorithms by their kernel names, with key and ICV lengths in bits: `rfc4106(gcm(aes)) 256/128`."""
    if sa.aead is not None:
        return f"{sa.aead.name} {8 * max(len(sa.aead.key) - _SALT_BYTES, 0)}/{sa.aead.icv_bits}"
    parts = []
    if sa.crypt is not None:
        key_bits = 8 * len(sa.crypt.key) - (8 * _SALT_BYTES if sa.crypt.name == _CTR else 0)
        parts.append(f"{sa.crypt.name} {key_bits}" if key_bits > 0 else sa.crypt.name)
    if sa.auth is not None:
        parts.append(f"{sa.auth.name} {_icv_bits(sa.auth)}")
    return " + ".join(parts) or "none"


def _aead_suite(algorithm: Algorithm) -> Suite:
    ciphers = _AEAD_CIPHERS.get(algorithm.name)
    if ciphers is None:
        raise Unsupported(f"VPP has no {algorithm.name}")
    if algorithm.icv_bits != _AEAD_ICV_BITS:
        raise Unsupported(f"{algorithm.name} with an ICV of {algorithm.icv_bits} bits: VPP has 128 only")
    key, salt = algorithm.key[:-_SALT_BYTES], algorithm.key[-_SALT_BYTES:]
    crypto = ciphers.get(len(key))
    if crypto is None:
        raise Unsupported(f"{algorithm.name} with a key of {8 * len(algorithm.key)} bits")
    return Suite(crypto, key, int.from_bytes(salt, "big"))


def _cipher_suite(sa: Sa) -> Suite:
    if sa.crypt is None:
        raise Unsupported("an ESP SA without a cipher")
    key, salt = sa.crypt.key, b""
    ciphers = _CIPHERS.get(sa.crypt.name)
    if sa.crypt.name == _CTR:
        ciphers = _CTR_CIPHERS
        key, salt = key[:-_SALT_BYTES], key[-_SALT_BYTES:]
    if ciphers is None:
        raise Unsupported(f"VPP has no {sa.crypt.name}")
    crypto = ciphers.get(len(key))
    if crypto is None:
        raise Unsupported(f"{sa.crypt.name} with a key of {8 * len(sa.crypt.key)} bits")
    if sa.auth is None or sa.auth.name == "digest_null":
        raise Unsupported(f"{sa.crypt.name} without integrity")
    integ = _INTEGRITY.get((sa.auth.name, _icv_bits(sa.auth)))
    if integ is None:
        raise Unsupported(f"VPP has no {sa.auth.name} with an ICV of {_icv_bits(sa.auth)} bits")
    if crypto in CTR_ALGS and integ == IntegAlg.MD5_96:
        raise Unsupported(f"VPP has no {sa.crypt.name} with {sa.auth.name}")
    if len(sa.auth.key) != INTEG_KEY_BYTES[integ]:
        raise Unsupported(f"{sa.auth.name} with a key of {8 * len(sa.auth.key)} bits")
    return Suite(crypto, key, int.from_bytes(salt, "big"), integ, sa.auth.key)


def _icv_bits(algorithm: Algorithm) -> int:
    return algorithm.icv_bits or _DEFAULT_ICV_BITS.get(algorithm.name, 0)
