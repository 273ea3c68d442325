"""Decodes the framing of netlink messages of any family: header, attributes, errors (include/uapi/linux/netlink.h)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum

AF_INET = 2
AF_INET6 = 10

NLMSG_ERROR = 2
NLMSG_DONE = 3

HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence number, port id."""
_ATTR = struct.Struct("=HH")

_U32 = struct.Struct("=I")


class WireError(ValueError):
    """A netlink message is malformed, cut short or unknown; the text says which and where."""


Attributes = dict[int, memoryview]


def messages_in(data: bytes | memoryview) -> Iterator[memoryview]:
    """Yield the messages of one read of a netlink socket, each with its header.

    Raises WireError at an impossible length, after it has yielded the messages before.
    """
    view = memoryview(data)
    offset = 0
    while offset < len(view):
        if offset + HEADER.size > len(view):
            raise WireError(f"{len(view) - offset} bytes are left over, too few for a netlink header")
        length = _U32.unpack_from(view, offset)[0]
        if length < HEADER.size or offset + length > len(view):
            raise WireError(f"a netlink message claims {length} bytes; {len(view) - offset} are there")
        yield view[offset : offset + length]
        offset += (length + 3) & ~3


def message_type(message: bytes | memoryview) -> int:
    """Return the type of a message. Raises WireError if the header is incomplete."""
    if len(message) < HEADER.size:
        raise WireError(f"a netlink message of {len(message)} bytes has no header")
    return int(HEADER.unpack_from(message)[1])


def attributes(body: memoryview, offset: int, names: type[IntEnum]) -> Attributes:
    """Return the attributes from `offset` on, by type. The last of two of a type counts, as in the kernel's nla_parse.

    `names` provides their names for errors. Raises WireError if an attribute does not fit.
    """
    found: Attributes = {}
    size = len(body)
    if offset > size:
        raise WireError(f"its fixed part has {offset} bytes, {size} are there")
    while offset + 4 <= size:
        length, kind = _ATTR.unpack_from(body, offset)
        if length < 4 or offset + length > size:
            raise WireError(f"attribute {_attr_name(kind, names)} claims {length} bytes, {size - offset} are there")
        found[kind & 0x3FFF] = body[offset + 4 : offset + length]  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
        offset += (length + 3) & ~3
    return found


def _attr_name(kind: int, names: type[IntEnum]) -> str:
    try:
        return names(kind & 0x3FFF).name
    except ValueError:
        return str(kind & 0x3FFF)
