"""Hostile SAs and policies, reproducible by a seed: anything that a broken or malicious IKE daemon, or kernel, could
send.

Each starts valid, and is then changed in some places: in its values, in its bytes, or in both. Some stay valid, so that
the changed ones meet tunnels that VPP carries.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from support import netlink_encode
from support.build import CBC, GCM, LOCAL, LOCAL6, SHA256, make_policy, make_sa
from vppipsec.kernel.text import parse_addr
from vppipsec.kernel.xfrm.values import Algorithm, Attr, Encap, Limits, Mark, MsgType, Policy, Sa, Template, Usage

PEERS = [parse_addr(f"192.0.2.{n}") for n in range(2, 12)]
PEERS6 = [parse_addr(f"2001:db8::{n:x}") for n in range(2, 8)]
ODD = [
    parse_addr(text) for text in ("0.0.0.0", "255.255.255.255", "224.0.0.1", "127.0.0.1", "203.0.113.9", "192.0.2.1")
]
ODD6 = [parse_addr(text) for text in ("::", "::1", "ff02::1", "fe80::1", "::ffff:192.0.2.1", "3fff::9", "2001:db8::1")]
U8, U16, U32, U64 = ((1 << bits) - 1 for bits in (8, 16, 32, 64))

_NAMES = [
    *("rfc4106(gcm(aes))", "rfc7539esp(chacha20,poly1305)", "rfc4543(gcm(aes))", "rfc4309(ccm(aes))", "cbc(aes)"),
    *("cbc(des3_ede)", "cbc(des)", "ecb(cipher_null)", "rfc3686(ctr(aes))", "hmac(md5)", "hmac(sha1)", "hmac(sha256)"),
    *(
        "hmac(sha384)",
        "hmac(sha512)",
        "xcbc(aes)",
        "cmac(aes)",
        "digest_null",
        "cbc(serpent)",
        "deflate",
        "",
        "%s%n",
        "(" * 63,
    ),
]
_NO_FLUSHES = [kind for kind in MsgType if kind not in (MsgType.FLUSHSA, MsgType.FLUSHPOLICY)]
_MOST_SAS, _MOST_POLICIES = 1500, 600


class Flooded(NamedTuple):
    """A message, and whether it adds or updates an SA or a policy."""

    message: bytes
    is_item: bool


class Flood:
    """The messages of a hostile kernel, and its tables: `sas` and `policies` are messages, oldest first."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._number = 0
        self.sas: dict[int, bytes] = {}
        self.policies: dict[int, bytes] = {}
        self._deletions: dict[int, bytes] = {}

    def told(self) -> Iterator[Flooded]:
        """Yield messages for ever."""
        rng = self._rng
        while True:
            chance = rng.random()
            if chance < 0.55:
                yield from self._add(self.sas, *self._sa(), most=_MOST_SAS)
            elif chance < 0.85:
                yield from self._add(self.policies, *self._policy(), most=_MOST_POLICIES)
            elif chance < 0.95:
                yield from self._delete(rng.choice((self.sas, self.policies)))
            else:
                yield Flooded(self._other(), False)

    def _add(self, table: dict[int, bytes], message: bytes, deletion: bytes, most: int) -> Iterator[Flooded]:
        self._number += 1
        table[self._number], self._deletions[self._number] = message, deletion
        yield Flooded(message, True)
        if len(table) > most:
            yield from self._delete(table, oldest=True)

    def _delete(self, table: dict[int, bytes], oldest: bool = False) -> Iterator[Flooded]:
        if table:
            number = next(iter(table)) if oldest else self._rng.choice(list(table))
            del table[number]
            yield Flooded(self._deletions.pop(number), False)

    def _sa(self) -> tuple[bytes, bytes]:
        """Return NEWSA or UPDSA, and the DELSA for it."""
        rng = self._rng
        sa = plausible_sa(rng)
        for bend in rng.sample(SA_BENDS, rng.choice((0, 0, 1, 1, 2, 3))):
            sa = sa._replace(**bend(rng, sa))
        message, deletion = netlink_encode.new_sa(sa, rng.random() < 0.5), netlink_encode.del_sa(sa)
        return (spoilt(rng, message) if rng.random() < 0.25 else message), deletion

    def _policy(self) -> tuple[bytes, bytes]:
        """Return NEWPOLICY or UPDPOLICY, and the DELPOLICY for it."""
        rng = self._rng
        policy = plausible_policy(rng)
        for bend in rng.sample(POLICY_BENDS, rng.choice((0, 0, 1, 1, 2, 3))):
            policy = replace(policy, **bend(rng, policy))
        message, deletion = netlink_encode.new_policy(policy, rng.random() < 0.5), netlink_encode.del_policy(policy)
        return (spoilt(rng, message) if rng.random() < 0.25 else message), deletion

    def _other(self) -> bytes:
        """Return another message: an expiry, a flush of an unused kind, a migration, or arbitrary bytes."""
        rng = self._rng
        sa = plausible_sa(rng)
        policy = plausible_policy(rng)
        return rng.choice(
            (
                netlink_encode.expire_sa(sa, hard=rng.random() < 0.5),
                netlink_encode.expire_policy(policy, hard=rng.random() < 0.5),
                netlink_encode.flush_sas(rng.choice((51, 108, 99))),
                netlink_encode.flush_policies(rng.choice((1, 2, 255))),
                netlink_encode.message(rng.choice(_NO_FLUSHES), rng.randbytes(rng.randrange(400))),
                netlink_encode.message(rng.randrange(0x29, U16), rng.randbytes(rng.randrange(64))),
                rng.randbytes(rng.randrange(1, 64)),
                spoilt(rng, netlink_encode.del_sa(sa)),
                spoilt(rng, netlink_encode.del_policy(policy)),
            )
        )


def plausible_sa(rng: random.Random) -> Sa:
    """Return a valid SA of a tunnel that may have others; one tunnel has hundreds."""
    peers, local = rng.choice(((PEERS, LOCAL), (PEERS, LOCAL), (PEERS6, LOCAL6)))
    crowd = rng.random() < 0.15
    peer, reqid = (peers[0], 7) if crowd else (rng.choice(peers), rng.randrange(1, 8))
    ends = rng.choice(((local, peer), (peer, local)))
    aead = GCM._replace(key=rng.randbytes(rng.choice((20, 36))))
    algorithms: dict[str, Any] = rng.choice(({"aead": aead}, {"aead": None, "crypt": CBC, "auth": SHA256}))
    return make_sa(rng.randrange(0x1000, 0x1400), *ends, reqid, **algorithms)


def plausible_policy(rng: random.Random) -> Policy:
    """Return a valid policy."""
    inner6 = rng.random() < 0.3
    src, dst = (
        ("fd00::/64", f"fd01:{rng.randrange(60):x}::/64")
        if inner6
        else ("172.16.0.0/16", f"10.{rng.randrange(60)}.0.0/16")
    )
    peers, local = rng.choice(((PEERS, LOCAL), (PEERS, LOCAL), (PEERS6, LOCAL6)))
    return make_policy(
        rng.choice((1, 1, 1, 0, 2)),
        src,
        dst,
        rng.randrange(1, 8),
        (local, rng.choice(peers)),
        priority=rng.randrange(1, 2000),
    )


# Changes of values


def _some(rng: random.Random, most: int) -> int:
    """Return a limit value or any number."""
    return rng.choice((0, 1, 2, most, most - 1, most // 2 + 1, rng.randint(0, most)))


def algorithm(rng: random.Random) -> Algorithm:
    """Return an algorithm with independently chosen name, key and ICV."""
    size = rng.choice((0, 1, 3, 4, 8, 12, 15, 16, 17, 20, 24, 28, 32, 36, 48, 64, 68, 129, 2000, rng.randrange(80)))
    icv = rng.choice((0, 64, 96, 128, 128, 128, 160, 192, 256, 1, U32))
    return Algorithm(rng.choice(_NAMES), rng.randbytes(size), icv)


def with_other_key(rng: random.Random, *of: tuple[str, int]) -> Algorithm:
    """Return one of some algorithms, by name and ICV, with a key of any length."""
    name, icv = rng.choice(of)
    return Algorithm(
        name, rng.randbytes(rng.choice((0, 1, 4, 15, 16, 17, 20, 24, 28, 32, 36, 48, 64, rng.randrange(140)))), icv
    )


_AEADS = (("rfc4106(gcm(aes))", 128), ("rfc4543(gcm(aes))", 128), ("rfc7539esp(chacha20,poly1305)", 128))
_CIPHERS = (("cbc(aes)", 0), ("cbc(des3_ede)", 0), ("rfc3686(ctr(aes))", 0), ("ecb(cipher_null)", 0))
_HMACS = (
    *(("hmac(md5)", 96), ("hmac(sha1)", 96), ("hmac(sha256)", 96), ("hmac(sha256)", 128)),
    *(("hmac(sha384)", 192), ("hmac(sha512)", 256)),
)


def _family(rng: random.Random, item: Sa | Template) -> dict[str, Any]:
    return {"family": rng.choice((2, 10, 10, 0, 1, 99, U16))}


def _address(rng: random.Random, item: Sa | Template) -> dict[str, Any]:
    return {rng.choice(("saddr", "daddr")): rng.choice(ODD if len(item.saddr) == 4 else ODD6)}


def _sa_selector(rng: random.Random, sa: Sa) -> dict[str, Any]:
    return {"selector": selector(rng, plausible_policy(rng))}


def _mark(rng: random.Random, item: Sa | Policy) -> dict[str, Any]:
    return {"mark": Mark(_some(rng, U32), _some(rng, U32))}


def _limits(rng: random.Random, item: Sa | Policy) -> dict[str, Any]:
    return {
        "limits": Limits(*(_some(rng, U64) for _ in range(8))),
        "usage": Usage(*(_some(rng, U64) for _ in range(4))),
    }


SA_BENDS: list[Callable[[random.Random, Sa], dict[str, Any]]] = [
    lambda rng, sa: {"aead": algorithm(rng)},
    lambda rng, sa: {"aead": with_other_key(rng, *_AEADS)},
    lambda rng, sa: {"aead": None, "crypt": with_other_key(rng, *_CIPHERS), "auth": SHA256},
    lambda rng, sa: {"aead": None, "crypt": CBC, "auth": with_other_key(rng, *_HMACS)},
    lambda rng, sa: {"aead": None, "crypt": algorithm(rng), "auth": algorithm(rng)},
    lambda rng, sa: {"aead": None, "crypt": CBC, "auth": rng.choice((None, algorithm(rng)))},
    lambda rng, sa: {"aead": None, "crypt": algorithm(rng), "auth": SHA256},
    lambda rng, sa: {"crypt": algorithm(rng), "auth": algorithm(rng), "comp": algorithm(rng)},
    lambda rng, sa: {"aead": None, "crypt": None, "auth": rng.choice((None, SHA256)), "comp": None},
    lambda rng, sa: {"spi": rng.choice((0, 0, 1, 255, 256, U32))},
    lambda rng, sa: {"proto": rng.choice((0, 4, 50, 51, 108, 255))},
    lambda rng, sa: {"mode": _some(rng, U8)},
    lambda rng, sa: {"reqid": _some(rng, U32)},
    lambda rng, sa: {"replay_window": rng.choice((1, 33, 64, 65, 255, 256, 4095, 4096, 4097, 1 << 31, U32, rng.randint(0, U32)))},
    lambda rng, sa: {"flags": _some(rng, U8), "extra_flags": _some(rng, U32)},
    lambda rng, sa: {"encap": Encap(rng.choice((0, 1, 2, 2, 3, 7, U16)), _some(rng, U16), _some(rng, U16), bytes(16))},
    lambda rng, sa: {"direction": rng.choice((1, 2, 3, U8))},
    lambda rng, sa: {"if_id": _some(rng, U32), "set_mark": Mark(_some(rng, U32), _some(rng, U32))},
    lambda rng, sa: {"tfcpad": _some(rng, U32), "seq": _some(rng, U32)},
    *(_family, _address, _address, _sa_selector, _mark, _limits),
]  # fmt: skip


def selector(rng: random.Random, policy: Policy) -> Any:
    """Return a selector: too wide, with host bits, longer than an address, with ports, of another family."""
    plain = policy.selector
    most = 8 * len(plain.daddr)
    peers, odd = (PEERS, ODD) if most == 32 else (PEERS6, ODD6)
    changes: dict[str, Any] = rng.choice(
        (
            {"prefixlen_d": 0},
            {"prefixlen_d": rng.randrange(most + 1)},  # most likely with host bits
            {"prefixlen_d": rng.choice((most + 1, 129, U8)), "prefixlen_s": rng.choice((0, 33, U8))},
            {"daddr": rng.choice(peers), "prefixlen_d": rng.choice((0, 1, most // 2, most))},  # covers a peer
            {"daddr": rng.choice(odd), "prefixlen_d": rng.choice((0, 1, 8, most - 1, most))},
            {"daddr": plain.saddr, "saddr": plain.daddr},
            {"proto": _some(rng, U8), "dport": _some(rng, U16), "dport_mask": _some(rng, U16), "sport_mask": _some(rng, U16)},
            {"family": rng.choice((0, 2, 10, 99, U16))},
            {"ifindex": rng.randint(-1, 9), "user": _some(rng, U32)},
        )
    )  # fmt: skip
    return replace(plain, **changes)


def templates(rng: random.Random, policy: Policy) -> tuple[Template, ...]:
    """Return templates: none, many, optional ones, of other modes, tunnels and families, with wildcards."""
    count = rng.choice((0, 1, 1, 2, 2, 3, 6, 7, 64))
    made = []
    for _ in range(count):
        template = plausible_policy(rng).templates[0]
        kind = rng.randrange(8)
        if kind < 2:
            template = replace(template, **(_family if kind else _address)(rng, template))
        elif kind == 2:
            template = replace(template, optional=True, mode=_some(rng, U8))
        elif kind == 3:
            zero = bytes(len(template.saddr))
            template = replace(template, saddr=zero, daddr=rng.choice((zero, template.daddr)))
        elif kind == 4:
            template = replace(template, reqid=_some(rng, U32), spi=_some(rng, U32), proto=_some(rng, U8))
        made.append(template)
    return tuple(made)


POLICY_BENDS: list[Callable[[random.Random, Policy], dict[str, Any]]] = [
    lambda rng, policy: {"selector": selector(rng, policy)},
    lambda rng, policy: {"selector": selector(rng, replace(policy, selector=selector(rng, policy)))},
    lambda rng, policy: {"templates": templates(rng, policy)},
    lambda rng, policy: {"templates": templates(rng, policy)},
    lambda rng, policy: {"direction": _some(rng, U8)},
    lambda rng, policy: {"action": _some(rng, U8), "share": _some(rng, U8), "flags": _some(rng, U8)},
    lambda rng, policy: {"type": _some(rng, U8)},
    lambda rng, policy: {"priority": max(1, _some(rng, U32)), "index": _some(rng, U32)},
    lambda rng, policy: {"if_id": _some(rng, U32)},
    *(_mark, _limits),
]


# Changes of bytes


def spoilt(rng: random.Random, message: bytes) -> bytes:
    """Return a message that was damaged, or got attributes that it should not have."""
    kind = rng.randrange(7)
    if kind == 0:  # huge attributes, known and unknown
        return _with(
            message,
            netlink_encode.attribute(rng.choice((60, rng.randint(0, U16), *Attr)), bytes(rng.choice((4000, 30_000)))),
        )
    if kind == 1:  # one attribute twice, or a nonsensical one; the last counts
        return _with(message, netlink_encode.attribute(rng.choice(list(Attr)), rng.randbytes(rng.randrange(100))))
    if kind == 2:  # a key longer than the data, or of a number of bits that is no byte; a name that is no text
        name = rng.choice((b"\xff\xfe", b"a" * 64, b"cbc(aes)\0junk", b"cbc(aes)"))
        head = name.ljust(64, b"\0") + struct.pack("=I", rng.choice((127, 129, 1 << 20, U32, U32 - 6)))
        return _with(message, netlink_encode.attribute(Attr.ALG_CRYPT, head + rng.randbytes(16)))
    if kind == 3:  # a bitmap longer than the data
        words = rng.choice((0, 1, 128, 129, U32))
        numbers = struct.pack("=6I", words, *(_some(rng, U32) for _ in range(5)))
        return _with(
            message, netlink_encode.attribute(Attr.REPLAY_ESN_VAL, numbers + bytes(4 * rng.choice((0, 1, 128))))
        )
    if kind == 4:  # truncated, with and without a matching header
        cut = message[: rng.randrange(16, len(message))]
        return cut if rng.random() < 0.5 else _with(cut, b"")
    damaged = bytearray(message)
    for _ in range(rng.randint(1, 8)):
        damaged[rng.randrange(6, len(damaged))] = rng.choice((0, 1, 0x7F, 0x80, U8, rng.randrange(256)))
    if kind == 5:  # with a wrong header
        damaged[rng.randrange(4)] = rng.randrange(256)
    return bytes(damaged)


def _with(message: bytes, more: bytes) -> bytes:
    """Append to a message, and adjust its header."""
    body = message + bytes(-len(message) % 4) + more
    return struct.pack("=I", len(body)) + body[4:]
