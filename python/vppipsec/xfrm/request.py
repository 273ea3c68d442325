"""What we send to the kernel over netlink: dumps, and an EXPIRE that makes the IKE daemon rekey.

Layouts: include/uapi/linux/netlink.h and include/uapi/linux/xfrm.h.
"""

from __future__ import annotations

import os
import struct

from vppipsec.xfrm.values import Attr, MsgType, Sa
from vppipsec.xfrm.wire import HEADER, WireError

NLM_F_REQUEST = 0x01
NLM_F_ACK = 0x04
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300

_LIMITS_AND_USAGE = struct.Struct("=8Q4Q")
_ERROR = struct.Struct("=i")


class NetlinkError(OSError):
    """The kernel refused a request; `errno` and text are its own."""

    def __init__(self, what: str, errno: int) -> None:
        super().__init__(errno, f"the kernel refused {what}: {os.strerror(errno)}")

    def __str__(self) -> str:
        return str(self.strerror)


def dump_request(kind: int, seq: int, body: bytes = b"") -> bytes:
    """Return a request for all there is of something, such as GETSA: all SAs."""
    return HEADER.pack(HEADER.size + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP, seq, 0) + body


def expire_request(sa: Sa, hard: bool, seq: int) -> bytes:
    """Return an EXPIRE for an SA (struct xfrm_user_expire). A soft one makes the IKE daemon rekey, a hard one deletes the SA."""
    selector = bytes(40) + struct.pack("=HBBB3xiI", sa.family, 0, 0, 0, 0, 0)
    identity = _wide(sa.daddr) + struct.pack(">I", sa.spi) + struct.pack("=B3x", sa.proto) + _wide(sa.saddr)
    rest = struct.pack("=IIIIIHBBB7x", 0, 0, 0, 0, sa.reqid, sa.family, sa.mode, 0, 0)
    body = selector + identity + _LIMITS_AND_USAGE.pack(*(0,) * 12) + rest + struct.pack("=B7x", hard)
    if sa.mark is not None:
        body += struct.pack("=HHII", 12, Attr.MARK, sa.mark.value, sa.mark.mask)
    length = HEADER.size + len(body)
    return HEADER.pack(length, MsgType.EXPIRE, NLM_F_REQUEST | NLM_F_ACK, seq, 0) + body


def error_of(message: bytes | memoryview) -> int:
    """Return the errno of an NLMSG_ERROR or NLMSG_DONE, 0 for an acknowledgement. Raises WireError where it is cut short."""
    if len(message) < HEADER.size + _ERROR.size:
        raise WireError("a netlink error message that is cut short")
    return -int(_ERROR.unpack_from(message, HEADER.size)[0])


def _wide(address: bytes) -> bytes:
    return address.ljust(16, b"\0")
