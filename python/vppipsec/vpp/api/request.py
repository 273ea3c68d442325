"""The base class of requests to VPP, and helpers for fields that several requests have.

Requests are frozen values, in one module for each of VPP's .api files. Each class knows its message and two forms of it:
`arguments` for vpp_papi's serializer, and `pack`, made with `struct` and many times faster. At connect `vppipsec.vpp.api.codec`
compares the two, against VPP's own definitions. It uses the packed form only if they agree. All numbers are in network byte
order.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, ClassVar

Arguments = Mapping[str, Any]  # input of vpp_papi's serializer: nested dictionaries of plain values

API_HEADER = ">HII"  # _vl_msg_id, client_index, context

_NET_U32 = struct.Struct(">I")
_I32 = struct.Struct(">i")
REPLY_SIZE = 10  # _vl_msg_id, context, retval


def family_of(address: bytes) -> int:
    """Return VPP's number of an address family: ADDRESS_IP4 or ADDRESS_IP6."""
    return 0 if len(address) == 4 else 1


def address_fields(address: bytes) -> dict[str, Any]:
    """Return vl_api_address_t in the form of vpp_papi's serializer."""
    return {"af": family_of(address), "un": {"ip4" if len(address) == 4 else "ip6": address}}


class Request:
    """Base class of requests: the interface that the client uses."""

    __slots__ = ()

    message: ClassVar[str]
    """Name of VPP's message."""
    reply_field: ClassVar[str | None] = None
    """Name of the field behind `retval` in the reply, None if there is none."""
    reply_field_first: ClassVar[bool] = False
    """True if the reply carries `reply_field` before `retval`, not behind it."""
    already_done_retval: ClassVar[int] = 0
    """VPP's error number that means "already done"; 0 if there is none."""

    def arguments(self) -> Arguments:
        """Return the message's fields for vpp_papi's serializer, without the header."""
        raise TypeError(f"{type(self).__name__} says no arguments")

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        """Return the message's bytes."""
        raise TypeError(f"{type(self).__name__} has no packed form")

    @classmethod
    def read(cls, reply: bytes | bytearray) -> int:
        """Return the number that the service uses from behind `retval` in a reply, 0 if there is none."""
        return 0 if cls.reply_field is None else int(_NET_U32.unpack_from(reply, REPLY_SIZE)[0])

    @classmethod
    def read_reply(cls, reply: bytes | bytearray, retval: int) -> tuple[int, int]:
        """Return `retval` and the value of `read`, for a reply that has a field behind or before `retval`.

        The argument `retval` is the number at the usual place of that field. The returned value is 0 if VPP refused.
        """
        if cls.reply_field_first:
            return int(_I32.unpack_from(reply, REPLY_SIZE)[0]), retval & 0xFFFFFFFF
        return retval, 0 if retval else cls.read(reply)
