"""Shared parts of the stand-in: refusals with VPP's numbers (src/vnet/error.h), death, pools, addresses in messages."""

from __future__ import annotations

from typing import Any, NamedTuple

ReplyFields = dict[str, Any]

INVALID_SW_IF_INDEX, NO_SUCH_FIB, NO_SUCH_ENTRY, INVALID_VALUE, INVALID_VALUE_2 = -2, -3, -6, -7, -8
UNIMPLEMENTED, INVALID_SW_IF_INDEX_2, INVALID_REGISTRATION = -9, -10, -31
NO_PATHS_IN_ROUTE, NO_MATCHING_INTERFACE, INVALID_SRC_ADDRESS, INVALID_DST_ADDRESS = -52, -54, -57, -58
ADDRESS_NOT_FOUND_FOR_INTERFACE, VALUE_EXIST, SAME_SRC_DST = -60, -81, -82
IP6_NOT_ENABLED, UNEXPECTED_INTF_STATE, ADDRESS_FOUND_FOR_INTERFACE = -62, -74, -114
INVALID_ARGUMENT, IF_ALREADY_EXISTS, ADDRESS_IN_USE, ENTRY_ALREADY_EXISTS = -73, -79, -105, -116
ACL_IN_USE_INBOUND, ACL_IN_USE_OUTBOUND, ACL_IN_USE_BY_LOOKUP_CONTEXT = -142, -143, -149
INVALID_PROTOCOL, KEY_LENGTH, LIMIT_EXCEEDED, EAGAIN, INVALID_PREFIX_LENGTH = -153, -156, -162, -165, -171
INSTANCE_IN_USE = -147

NO_INDEX = 0xFFFFFFFF


class Portion(NamedTuple):
    """The details of one answer and its end. If `retval` is EAGAIN, there are more from `cursor` on."""

    details: list[ReplyFields]
    retval: int
    cursor: int


class Death(Exception):
    """VPP would have crashed here; the text says why."""


class Refusal(Exception):
    """VPP answers with an error number, and with `fields` if the answer has others."""

    def __init__(self, retval: int, **fields: int) -> None:
        super().__init__(retval)
        self.retval = retval
        self.fields = fields


class Pool:
    """Hands out numbers as VPP's pools do: the number that was freed last comes first."""

    def __init__(self, first: int = 0) -> None:
        self._next = first
        self._free: list[int] = []

    def take(self) -> int:
        if self._free:
            return self._free.pop()
        self._next += 1
        return self._next - 1

    def give(self, number: int) -> None:
        self._free.append(number)


def address_of(value: Any) -> bytes:
    """Return the bytes of vl_api_address_t."""
    return bytes(value.un.ip4 if int(value.af) == 0 else value.un.ip6)


def address_reply(address: bytes) -> ReplyFields:
    """Return vl_api_address_t for the serializer. For IPv4 the rest of the union is zero, as in VPP."""
    return {"af": 0 if len(address) == 4 else 1, "un": {"ip6": address.ljust(16, b"\0")}}
