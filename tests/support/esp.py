"""SAs of every algorithm that VPP has, for the kernel and for scapy, an independent ESP implementation."""

from __future__ import annotations

from dataclasses import dataclass

from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.ipsec import ESP, SecurityAssociation

from support.build import LOCAL, LOCAL6, REMOTE, REMOTE6, make_sa
from support.wire import PEER, PEER6
from vppipsec.kernel.xfrm.values import Algorithm, Encap, Sa, SaFlag

SPI_IN, SPI_OUT = 0xC1000001, 0xD1000001


@dataclass(frozen=True)
class Case:
    """One kind of tunnel: the kernel's algorithms, and scapy's names for them."""

    name: str
    aead: str = ""
    cipher: str = ""
    integrity: str = ""
    icv_bits: int = 0
    key_bytes: int = 16
    integrity_bytes: int = 0
    esn: bool = False
    nat: bool = False
    outer6: bool = False
    inner6: bool = False


GCM = "rfc4106(gcm(aes))"
CASES = (
    Case("gcm-128", aead=GCM, icv_bits=128),
    Case("gcm-256", aead=GCM, icv_bits=128, key_bytes=32),
    Case("cbc-sha1", cipher="cbc(aes)", integrity="hmac(sha1)", icv_bits=96, integrity_bytes=20),
    Case("cbc-sha256", cipher="cbc(aes)", integrity="hmac(sha256)", icv_bits=128, integrity_bytes=32),
    Case("cbc-256-sha512", cipher="cbc(aes)", integrity="hmac(sha512)", icv_bits=256, integrity_bytes=64, key_bytes=32),
    Case("ctr-sha256", cipher="rfc3686(ctr(aes))", integrity="hmac(sha256)", icv_bits=128, integrity_bytes=32),
    Case(
        "null-sha256",
        cipher="ecb(cipher_null)",
        integrity="hmac(sha256)",
        icv_bits=128,
        integrity_bytes=32,
        key_bytes=0,
    ),
    Case("gcm-esn", aead=GCM, icv_bits=128, esn=True),
    Case("cbc-sha256-esn", cipher="cbc(aes)", integrity="hmac(sha256)", icv_bits=128, integrity_bytes=32, esn=True),
    Case("gcm-nat-t", aead=GCM, icv_bits=128, nat=True),
    Case("cbc-sha256-nat-t", cipher="cbc(aes)", integrity="hmac(sha256)", icv_bits=128, integrity_bytes=32, nat=True),
    Case("gcm-ipv6", aead=GCM, icv_bits=128, outer6=True, inner6=True),
    Case(
        "cbc-sha256-ipv6",
        cipher="cbc(aes)",
        integrity="hmac(sha256)",
        icv_bits=128,
        integrity_bytes=32,
        outer6=True,
        inner6=True,
    ),
    Case("gcm-6in4", aead=GCM, icv_bits=128, inner6=True),
    Case("gcm-4in6", aead=GCM, icv_bits=128, outer6=True),
)
_SCAPY_CIPHERS = {GCM: "AES-GCM", "cbc(aes)": "AES-CBC", "rfc3686(ctr(aes))": "AES-CTR", "ecb(cipher_null)": "NULL"}
_SCAPY_INTEGRITY = {
    "": None,
    "hmac(sha1)": "HMAC-SHA1-96",
    "hmac(sha256)": "SHA2-256-128",
    "hmac(sha512)": "SHA2-512-256",
}


def kernel_sa(case: Case, inbound: bool) -> Sa:
    """Return one of the two SAs as the kernel has it, with keys of its own."""
    local, remote = (LOCAL6, REMOTE6) if case.outer6 else (LOCAL, REMOTE)
    first = 10 if inbound else 100
    salt = b"" if case.cipher in ("cbc(aes)", "ecb(cipher_null)") else bytes((0xDE, 0xAD, 0xBE, first))
    key = bytes(range(first, first + case.key_bytes)) + salt
    integrity = Algorithm(case.integrity, bytes(range(first, first + case.integrity_bytes)), case.icv_bits)
    return make_sa(
        SPI_IN if inbound else SPI_OUT,
        *((remote, local) if inbound else (local, remote)),
        flags=32 | (SaFlag.ESN if case.esn else 0),
        replay_window=64 if inbound else 0,
        aead=Algorithm(case.aead, key, case.icv_bits) if case.aead else None,
        crypt=Algorithm(case.cipher, key) if case.cipher else None,
        auth=integrity if case.integrity else None,
        encap=Encap(2, 4500, 4500, bytes(4)) if case.nat else None,
    )


def scapy_sa(case: Case, sa: Sa) -> SecurityAssociation:
    """Return the same SA for scapy."""
    header = (IPv6 if case.outer6 else IP)(
        **dict(zip(("src", "dst"), ends_of(case) if sa.spi == SPI_OUT else ends_of(case)[::-1], strict=True))
    )
    algorithm = sa.aead or sa.crypt
    assert algorithm is not None
    return SecurityAssociation(
        ESP,
        spi=sa.spi,
        crypt_algo=_SCAPY_CIPHERS[algorithm.name],
        crypt_key=algorithm.key,
        auth_algo=_SCAPY_INTEGRITY[sa.auth.name if sa.auth is not None else ""],
        auth_key=sa.auth.key if sa.auth is not None else None,
        tunnel_header=header,
        nat_t_header=UDP(sport=4500, dport=4500) if case.nat else None,
        esn_en=case.esn,
    )


def ends_of(case: Case) -> tuple[str, str]:
    return ("2001:db8::1", PEER6) if case.outer6 else ("192.0.2.1", PEER)
