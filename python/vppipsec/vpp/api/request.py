"""Requests to VPP as frozen values: what each of them offers, and fields that several have.

Each class knows its message, the arguments as vpp_papi takes them (`arguments`), and a packed form made with `struct` (`pack`),
many times faster. `vppipsec.vpp.api.codec` compares the two at connect, against VPP's own definitions, and uses the packed form
only where they agree. All numbers go out in network byte order. The requests are in modules by VPP's own .api files.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, ClassVar

Arguments = Mapping[str, Any]  # what vpp_papi's serializer takes; nested dictionaries of plain values

API_HEADER = ">HII"  # _vl_msg_id, client_index, context

_NET_U32 = struct.Struct(">I")
_I32 = struct.Struct(">i")
REPLY_SIZE = 10  # _vl_msg_id, context, retval


def family_of(address: bytes) -> int:
    """Return VPP's number of an address's family: ADDRESS_IP4 or ADDRESS_IP6."""
    return 0 if len(address) == 4 else 1


def address_fields(address: bytes) -> dict[str, Any]:
    """Return vl_api_address_t as vpp_papi takes it."""
    return {"af": family_of(address), "un": {"ip4" if len(address) == 4 else "ip6": address}}


class Request:
    """What every request offers to the client."""

    __slots__ = ()

    message: ClassVar[str]
    """Name of VPP's message."""
    reply_field: ClassVar[str | None] = None
    """Name of what the reply carries behind `retval`, if anything."""
    reply_field_first: ClassVar[bool] = False
    """True where the reply carries `reply_field` before `retval`, not behind it."""
    already_done_retval: ClassVar[int] = 0
    """The error number by which VPP says that it was so before; 0 where it has none."""

    def arguments(self) -> Arguments:
        """Return the message's fields as vpp_papi's serializer takes them, without the header."""
        raise TypeError(f"{type(self).__name__} says no arguments")

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        """Return the message's bytes."""
        raise TypeError(f"{type(self).__name__} has no packed form")

    @classmethod
    def read(cls, reply: bytes | bytearray) -> int:
        """Return the one number that we use of what the reply carries behind `retval`, 0 where it carries nothing."""
        return 0 if cls.reply_field is None else int(_NET_U32.unpack_from(reply, REPLY_SIZE)[0])

    @classmethod
    def read_reply(cls, reply: bytes | bytearray, retval: int) -> tuple[int, int]:
        """Return `retval` and what `read` says of a reply that has something behind, or before, the field called `retval`.

        `retval` is what stands at that field's usual place.
        """
        if cls.reply_field_first:
            return int(_I32.unpack_from(reply, REPLY_SIZE)[0]), retval & 0xFFFFFFFF
        return retval, 0 if retval else cls.read(reply)
