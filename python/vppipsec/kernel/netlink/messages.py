"""Netlink requests and answers of any family: flags, attributes, dump requests and errors."""

from __future__ import annotations

import os
import struct

from vppipsec.kernel.netlink.wire import HEADER, WireError

NLM_F_REQUEST = 0x01
NLM_F_ACK = 0x04
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300

_ERROR = struct.Struct("=i")


class NetlinkError(OSError):
    """The kernel refused a request; `errno` and its text are the kernel's."""

    def __init__(self, what: str, errno: int) -> None:
        super().__init__(errno, f"the kernel refused {what}: {os.strerror(errno)}")

    def __str__(self) -> str:
        return str(self.strerror)


def dump_request(kind: int, seq: int, body: bytes = b"") -> bytes:
    """Return a dump request of message type `kind`, such as GETSA for all SAs."""
    return HEADER.pack(HEADER.size + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP, seq, 0) + body


def error_of(message: bytes | memoryview) -> int:
    """Return the errno of an NLMSG_ERROR or NLMSG_DONE, 0 for an acknowledgement. Raises WireError if it is cut short."""
    if len(message) < HEADER.size + _ERROR.size:
        raise WireError("a netlink error message that is cut short")
    return -int(_ERROR.unpack_from(message, HEADER.size)[0])


def attribute(kind: int, value: bytes) -> bytes:
    """Return a netlink attribute with its padding (struct nlattr)."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)
