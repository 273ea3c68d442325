"""Encodes values as netlink messages of the kernel: the inverse of `vppipsec.kernel.xfrm.wire`.

Fields are packed unchecked, so that a value that no kernel has makes a message that no kernel sends. Source:
include/uapi/linux/xfrm.h.
"""

from __future__ import annotations

import struct

from vppipsec.kernel.netlink.wire import HEADER
from vppipsec.kernel.xfrm.values import (
    Algorithm,
    Attr,
    Limits,
    Mark,
    MsgType,
    Policy,
    Sa,
    SaId,
    Selector,
    Template,
    Usage,
)


def message(kind: int, body: bytes) -> bytes:
    """Put a header before a body."""
    return HEADER.pack(HEADER.size + len(body), kind, 0, 0, 0) + body


def attribute(kind: int, data: bytes) -> bytes:
    """Return an attribute, padded."""
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def new_sa(sa: Sa, updated: bool = False) -> bytes:
    """Return NEWSA or UPDSA."""
    return message(MsgType.UPDSA if updated else MsgType.NEWSA, _sa_info(sa) + sa_attributes(sa))


def del_sa(sa: Sa) -> bytes:
    """Return DELSA with the SA as it was, keys included."""
    inner = attribute(Attr.SA, _sa_info(sa)) + sa_attributes(sa)
    return message(MsgType.DELSA, _sa_id(sa.id, sa.family) + inner)


def expire_sa(sa: Sa, hard: bool) -> bytes:
    """Return EXPIRE."""
    return message(MsgType.EXPIRE, _sa_info(sa) + struct.pack("=B7x", hard) + _mark(sa.mark))


def flush_sas(proto: int = 0) -> bytes:
    """Return FLUSHSA."""
    return message(MsgType.FLUSHSA, bytes([proto, 0, 0, 0]))


def new_policy(policy: Policy, updated: bool = False) -> bytes:
    """Return NEWPOLICY or UPDPOLICY."""
    return message(
        MsgType.UPDPOLICY if updated else MsgType.NEWPOLICY, _policy_info(policy) + policy_attributes(policy)
    )


def del_policy(policy: Policy) -> bytes:
    """Return DELPOLICY by selector."""
    identity = _selector(policy.selector) + struct.pack("=IB3x", 0, policy.direction)
    return message(MsgType.DELPOLICY, identity + policy_attributes(policy))


def expire_policy(policy: Policy, hard: bool) -> bytes:
    """Return POLEXPIRE."""
    body = _policy_info(policy) + struct.pack("=B7x", hard) + policy_attributes(policy)
    return message(MsgType.POLEXPIRE, body)


def flush_policies(kind: int = 0) -> bytes:
    """Return FLUSHPOLICY."""
    return message(MsgType.FLUSHPOLICY, attribute(Attr.POLICY_TYPE, bytes([kind, 0, 0, 0, 0, 0])))


def sa_attributes(sa: Sa) -> bytes:
    """Return the attributes of an SA."""
    out = b"" if sa.aead is None else attribute(Attr.ALG_AEAD, algorithm(sa.aead, with_icv=True))
    if sa.auth is not None:
        kind = Attr.ALG_AUTH_TRUNC if sa.auth.icv_bits else Attr.ALG_AUTH
        out += attribute(kind, algorithm(sa.auth, with_icv=bool(sa.auth.icv_bits)))
    for kind, plain in ((Attr.ALG_CRYPT, sa.crypt), (Attr.ALG_COMP, sa.comp)):
        if plain is not None:
            out += attribute(kind, algorithm(plain, with_icv=False))
    if sa.encap is not None:
        ports = struct.pack("=H", sa.encap.kind) + struct.pack(">HH2x", sa.encap.sport, sa.encap.dport)
        out += attribute(Attr.ENCAP, ports + _wide(sa.encap.oa))
    if sa.replay_window > 0xFF:
        out += attribute(Attr.REPLAY_ESN_VAL, struct.pack("=6I", 0, 0, 0, 0, 0, sa.replay_window))
    if sa.set_mark is not None:
        out += attribute(Attr.SET_MARK, struct.pack("=I", sa.set_mark.value))
        out += attribute(Attr.SET_MARK_MASK, struct.pack("=I", sa.set_mark.mask))
    for kind, number in ((Attr.IF_ID, sa.if_id), (Attr.SA_EXTRA_FLAGS, sa.extra_flags), (Attr.TFCPAD, sa.tfcpad)):
        if number:
            out += attribute(kind, struct.pack("=I", number))
    if sa.direction:
        out += attribute(Attr.SA_DIR, bytes([sa.direction]))
    return out + _mark(sa.mark)


def policy_attributes(policy: Policy) -> bytes:
    """Return the attributes of a policy."""
    out = b""
    if policy.templates:
        out += attribute(Attr.TMPL, b"".join(map(template, policy.templates)))
    if policy.type:
        out += attribute(Attr.POLICY_TYPE, bytes([policy.type, 0, 0, 0, 0, 0]))
    if policy.if_id:
        out += attribute(Attr.IF_ID, struct.pack("=I", policy.if_id))
    return out + _mark(policy.mark)


def algorithm(value: Algorithm, with_icv: bool) -> bytes:
    """Return struct xfrm_algo, or with an ICV length struct xfrm_algo_auth and xfrm_algo_aead."""
    head = value.name.encode().ljust(64, b"\0")[:64] + struct.pack("=I", 8 * len(value.key))
    return head + (struct.pack("=I", value.icv_bits) if with_icv else b"") + value.key


def template(value: Template) -> bytes:
    """Return struct xfrm_user_tmpl."""
    out = _wide(value.daddr) + struct.pack(">I", value.spi) + struct.pack("=B3xH2x", value.proto, value.family)
    out += _wide(value.saddr) + struct.pack("=IBBBx", value.reqid, value.mode, value.share, value.optional)
    return out + struct.pack("=III", value.aalgos, value.ealgos, value.calgos)


def _sa_info(sa: Sa) -> bytes:
    out = _selector(sa.selector) + _wide(sa.daddr) + struct.pack(">I", sa.spi) + struct.pack("=B3x", sa.proto)
    out += _wide(sa.saddr) + _limits(sa.limits) + _usage(sa.usage) + struct.pack("=III", *sa.stats)
    window = sa.replay_window if sa.replay_window <= 0xFF else 0
    return out + struct.pack("=IIHBBB7x", sa.seq, sa.reqid, sa.family, sa.mode, window, sa.flags)


def _sa_id(sa_id: SaId, family: int) -> bytes:
    return _wide(sa_id.daddr) + struct.pack(">I", sa_id.spi) + struct.pack("=HBx", family, sa_id.proto)


def _policy_info(policy: Policy) -> bytes:
    out = _selector(policy.selector) + _limits(policy.limits) + _usage(policy.usage)
    numbers = (policy.priority, policy.index, policy.direction, policy.action, policy.flags, policy.share)
    return out + struct.pack("=IIBBBB4x", *numbers)


def _selector(value: Selector) -> bytes:
    out = _wide(value.daddr) + _wide(value.saddr)
    out += struct.pack(">4H", value.dport, value.dport_mask, value.sport, value.sport_mask)
    lengths = (value.family, value.prefixlen_d, value.prefixlen_s, value.proto, value.ifindex, value.user)
    return out + struct.pack("=HBBB3xiI", *lengths)


def _limits(value: Limits) -> bytes:
    return struct.pack("=8Q", *value)


def _usage(value: Usage) -> bytes:
    return struct.pack("=4Q", *value)


def _mark(mark: Mark | None) -> bytes:
    return b"" if mark is None else attribute(Attr.MARK, struct.pack("=II", mark.value, mark.mask))


def _wide(address: bytes) -> bytes:
    return address.ljust(16, b"\0")
