"""Encodes the requests that the service sends to NETLINK_XFRM: queries, its own policies, EXPIRE and ACQUIRE.

An EXPIRE makes the IKE daemon rekey. An ACQUIRE makes it set up SAs.

Layouts: include/uapi/linux/netlink.h and include/uapi/linux/xfrm.h.
"""

from __future__ import annotations

import struct

from vppipsec.kernel.netlink.messages import NLM_F_ACK, NLM_F_REQUEST, attribute
from vppipsec.kernel.netlink.wire import HEADER
from vppipsec.kernel.xfrm.values import Attr, MsgType, Policy, Sa, Selector, Template

_LIMITS_AND_USAGE = struct.Struct("=8Q4Q")


def expire_request(sa: Sa, hard: bool, seq: int) -> bytes:
    """Return an EXPIRE for an SA (struct xfrm_user_expire). Soft: the IKE daemon rekeys. Hard: the kernel deletes the SA."""
    selector = bytes(40) + struct.pack("=HBBB3xiI", sa.family, 0, 0, 0, 0, 0)
    identity = (
        _wide_address(sa.daddr) + struct.pack(">I", sa.spi) + struct.pack("=B3x", sa.proto) + _wide_address(sa.saddr)
    )
    rest = struct.pack("=IIIIIHBBB7x", 0, 0, 0, 0, sa.reqid, sa.family, sa.mode, 0, 0)
    body = selector + identity + _LIMITS_AND_USAGE.pack(*(0,) * 12) + rest + struct.pack("=B7x", hard)
    if sa.mark is not None:
        body += attribute(Attr.MARK, struct.pack("=II", sa.mark.value, sa.mark.mask))
    return _request_bytes(MsgType.EXPIRE, body, seq)


def acquire_request(policy: Policy, seq: int) -> bytes:
    """Return an ACQUIRE for a policy with a template (struct xfrm_user_acquire). It asks the IKE daemon to set up the SAs.

    The kernel forwards it to the multicast group, as if a packet had matched the policy. It makes no larval SA (xfrm_add_acquire,
    net/xfrm/xfrm_user.c). The selector is that of the policy, since there is no packet.
    """
    first = policy.templates[0]
    body = _id_bytes(first) + _wide_address(first.saddr) + _selector_bytes(policy.selector) + _policy_bytes(policy)
    body += struct.pack("=IIII", first.aalgos, first.ealgos, first.calgos, 0)
    body += attribute(Attr.TMPL, b"".join(map(_template_bytes, policy.templates)))
    return _request_bytes(MsgType.ACQUIRE, body + _name_of(policy), seq)


def sa_request(sa: Sa, seq: int) -> bytes:
    """Return a GETSA for one SA (struct xfrm_usersa_id)."""
    body = _wide_address(sa.daddr) + struct.pack(">I", sa.spi) + struct.pack("=HBx", sa.family, sa.proto)
    if sa.mark is not None:
        body += attribute(Attr.MARK, struct.pack("=II", sa.mark.value, sa.mark.mask))
    return _request_bytes(MsgType.GETSA, body, seq)


def policy_request(kind: MsgType, policy: Policy, seq: int) -> bytes:
    """Return an UPDPOLICY with a policy without templates, or a DELPOLICY or GETPOLICY that names it."""
    named = _selector_bytes(policy.selector) + struct.pack("=IB3x", policy.index, policy.direction)
    return _request_bytes(kind, (_policy_bytes(policy) if kind == MsgType.UPDPOLICY else named) + _name_of(policy), seq)


def _request_bytes(kind: MsgType, body: bytes, seq: int) -> bytes:
    """Return a request with its header. The kernel has to acknowledge it."""
    return HEADER.pack(HEADER.size + len(body), kind, NLM_F_REQUEST | NLM_F_ACK, seq, 0) + body


def _selector_bytes(it: Selector) -> bytes:
    """Return a struct xfrm_selector."""
    ports = struct.pack(">HHHH", it.dport, it.dport_mask, it.sport, it.sport_mask)
    rest = struct.pack("=HBBB3xiI", it.family, it.prefixlen_d, it.prefixlen_s, it.proto, it.ifindex, it.user)
    return _wide_address(it.daddr) + _wide_address(it.saddr) + ports + rest


def _policy_bytes(it: Policy) -> bytes:
    """Return a struct xfrm_userpolicy_info."""
    rest = struct.pack("=IIBBBB4x", it.priority, it.index, it.direction, it.action, it.flags, it.share)
    return _selector_bytes(it.selector) + _LIMITS_AND_USAGE.pack(*it.limits, 0, 0, 0, 0) + rest


def _name_of(policy: Policy) -> bytes:
    """Return the attributes that identify a policy, together with its selector and direction."""
    named = attribute(Attr.POLICY_TYPE, struct.pack("=B5x", policy.type))
    if policy.mark is not None:
        named += attribute(Attr.MARK, struct.pack("=II", policy.mark.value, policy.mark.mask))
    if policy.if_id:
        named += attribute(Attr.IF_ID, struct.pack("=I", policy.if_id))
    return named


def _id_bytes(template: Template) -> bytes:
    """Return a struct xfrm_id."""
    return _wide_address(template.daddr) + struct.pack(">IB3x", template.spi, template.proto)


def _template_bytes(it: Template) -> bytes:
    """Return a struct xfrm_user_tmpl."""
    rest = struct.pack("=IBBBxIII", it.reqid, it.mode, it.share, it.optional, it.aalgos, it.ealgos, it.calgos)
    return _id_bytes(it) + struct.pack("=H2x", it.family) + _wide_address(it.saddr) + rest


def _wide_address(address: bytes) -> bytes:
    return address.ljust(16, b"\0")
