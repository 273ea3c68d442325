"""Checks whether VPP can carry the SAs of an ESP proposal of `vpn ipsec`.

It builds SAs as strongSwan would install them, and asks `translate`. VyOS's names are those of the completion lists of `vpn ipsec
esp-group`. The kernel's names are those of strongSwan's kernel-netlink plugin.
"""

from __future__ import annotations

import re

from vppipsec.conf.cli import Proposal
from vppipsec.kernel.text import parse_addr
from vppipsec.kernel.xfrm.sad_spd import KernelModel
from vppipsec.kernel.xfrm.values import NO_LIMITS, Algorithm, Mode, Proto, Sa, SaStats, Selector, Usage
from vppipsec.sync.desired.environment import EnvironmentSnapshot
from vppipsec.sync.desired.state import OffloadStatus
from vppipsec.sync.desired.tunnel import translate
from vppipsec.vpp.algorithms import CryptoAlg

_LOCAL, _REMOTE = parse_addr("192.0.2.1"), parse_addr("192.0.2.2")
_ANY_SELECTOR = Selector(2, bytes(4), 0, bytes(4), 0)
_SALT_BYTES = 4

_BLOCK = {
    "aes": "cbc(aes)",
    "blowfish": "cbc(blowfish)",
    "camellia": "cbc(camellia)",
    "cast": "cbc(cast5)",
    "serpent": "cbc(serpent)",
    "twofish": "cbc(twofish)",
}
_AEAD = {"gcm": "rfc4106(gcm({}))", "ccm": "rfc4309(ccm({}))", "gmac": "rfc4543(gcm({}))"}
_CIPHER = re.compile(r"([a-z]+)(\d+)(?:(ctr|gmac)|(ccm|gcm)(\d+))?")
"""Cipher, key bits, mode, and ICV bits for CCM and GCM: `aes256`, `aes128ctr`, `aes256gcm128`, `aes128gmac`."""

_HASHES = {
    "md5": ("hmac(md5)", 96, 16),
    "md5_128": ("hmac(md5)", 128, 16),
    "sha1": ("hmac(sha1)", 96, 20),
    "sha1_160": ("hmac(sha1)", 160, 20),
    "sha256": ("hmac(sha256)", 128, 32),
    "sha256_96": ("hmac(sha256)", 96, 32),
    "sha384": ("hmac(sha384)", 192, 48),
    "sha512": ("hmac(sha512)", 256, 64),
    "aesxcbc": ("xcbc(aes)", 96, 16),
    "aescmac": ("cmac(aes)", 96, 16),
}
"""VyOS's name -> the kernel's name, truncation in bits, key length in bytes."""


def label_of(proposal: Proposal) -> str:
    """Return a proposal's name for the operator: its cipher, and its hash unless the cipher is an AEAD."""
    aead, _, _ = _algorithms(proposal.encryption, proposal.hash)
    return proposal.encryption if aead else f"{proposal.encryption}, {proposal.hash}"


def why_not_supported(proposal: Proposal) -> str | None:
    """Return why VPP cannot carry the SAs of a proposal, in the words of `show sa`. None: it can."""
    aead, crypt, auth = _algorithms(proposal.encryption, proposal.hash)
    mode = Mode.TRANSPORT if proposal.mode == "transport" else Mode.TUNNEL
    proto = Proto.COMP if proposal.compression else Proto.ESP
    out, back = (
        Sa(
            daddr=dst,
            saddr=src,
            spi=1,
            proto=proto,
            family=2,
            mode=mode,
            reqid=1,
            seq=0,
            replay_window=0,
            flags=0,
            extra_flags=0,
            selector=_ANY_SELECTOR,
            limits=NO_LIMITS,
            usage=Usage(0, 0, 0, 0),
            stats=SaStats(0, 0, 0),
            aead=aead,
            crypt=crypt,
            auth=auth,
        )
        for src, dst in ((_LOCAL, _REMOTE), (_REMOTE, _LOCAL))
    )
    model = KernelModel()
    model.replace([out, back], [])
    environment = EnvironmentSnapshot({_LOCAL: 1}, frozenset(), frozenset(CryptoAlg))
    for key, tunnel in model.tunnels.items():
        for decision in translate(key, tunnel, environment).decisions.values():
            if decision.status is OffloadStatus.UNSUPPORTED:
                return decision.reason
    return None


def _algorithms(encryption: str, integrity: str) -> tuple[Algorithm | None, Algorithm | None, Algorithm | None]:
    """Return AEAD, cipher and integrity algorithm with the kernel's names, and with keys of zeroes."""
    auth_name, icv_bits, key_bytes = _HASHES.get(integrity, (integrity, 128, 16))
    auth = Algorithm(auth_name, bytes(key_bytes), icv_bits)
    if encryption == "null":
        return None, Algorithm("ecb(cipher_null)", b""), auth
    if encryption == "3des":
        return None, Algorithm("cbc(des3_ede)", bytes(24)), auth
    if encryption == "chacha20poly1305":
        return Algorithm("rfc7539esp(chacha20,poly1305)", bytes(32 + _SALT_BYTES), 128), None, None
    match = _CIPHER.fullmatch(encryption)
    if match is None:
        return None, Algorithm(encryption, b""), auth
    cipher, bits, plain_mode, aead_mode, icv = match.groups()
    key = bytes(int(bits) // 8)
    mode = aead_mode or plain_mode
    if mode == "ctr":
        return None, Algorithm(f"rfc3686(ctr({cipher}))", key + bytes(_SALT_BYTES)), auth
    if mode is not None:
        return Algorithm(_AEAD[mode].format(cipher), key + bytes(_SALT_BYTES), int(icv or 128)), None, None
    return None, Algorithm(_BLOCK.get(cipher, cipher), key), auth
