"""Requests about interfaces in other FIB tables than the main one, in the same form as those of `vppipsec.vpp.api.ipsec`.

There it cannot borrow the addresses of an interface in the main table (-74). Without any it passes no IPv4, so it gets its own.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

from vppipsec.vpp.api.ipsec import HEADER, Arguments, Request, address_fields
from vppipsec.vpp.types import MAX_ITF_INSTANCE


def own_address(instance: int) -> bytes:
    """Return the IPv4 address that `ipsec<instance>` has in another table than the main one: no other interface of ours has it.

    It is link-local (RFC 3927), and the lowest of four: where two routers share a /30 of that range, none of them has it.
    """
    assert instance < MAX_ITF_INSTANCE
    return bytes((169, 254, instance >> 6, instance << 2 & 0xFF))


@dataclass(frozen=True, slots=True)
class SetItfTable(Request):
    """sw_interface_set_table: have what an interface receives looked up in a FIB table.

    VPP refuses where the table does not exist, and while the interface has an address, or borrows one, of that family.
    """

    message: ClassVar[str] = "sw_interface_set_table"
    _layout: ClassVar[struct.Struct] = struct.Struct(HEADER + "I?I")

    sw_if_index: int
    ip6: bool
    table: int

    def arguments(self) -> Arguments:
        return {"sw_if_index": self.sw_if_index, "is_ipv6": self.ip6, "vrf_id": self.table}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.sw_if_index, self.ip6, self.table)


@dataclass(frozen=True, slots=True)
class GetItfTable(Request):
    """sw_interface_get_table: by which table is forwarded what an interface receives."""

    message: ClassVar[str] = "sw_interface_get_table"
    extra: ClassVar[str | None] = "vrf_id"
    _layout: ClassVar[struct.Struct] = struct.Struct(HEADER + "I?")

    sw_if_index: int
    ip6: bool

    def arguments(self) -> Arguments:
        return {"sw_if_index": self.sw_if_index, "is_ipv6": self.ip6}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.sw_if_index, self.ip6)


@dataclass(frozen=True, slots=True)
class SetItfAddress(Request):
    """sw_interface_add_del_address: give an interface an IPv4 address of its own, whose network is that host, or take it away."""

    message: ClassVar[str] = "sw_interface_add_del_address"
    _layout: ClassVar[struct.Struct] = struct.Struct(HEADER + "I??B16sB")

    sw_if_index: int
    address: bytes
    is_add: bool = True

    def arguments(self) -> Arguments:
        prefix = {"address": address_fields(self.address), "len": 32}
        return {"sw_if_index": self.sw_if_index, "is_add": self.is_add, "del_all": False, "prefix": prefix}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.sw_if_index, self.is_add, False, 0, self.address, 32)


SAMPLES: tuple[Request, ...] = (
    SetItfTable(0x01020304, True, 0x01020305),
    GetItfTable(0x01020306, True),
    SetItfAddress(0x01020307, bytes(range(33, 37))),
    SetItfAddress(0x01020308, bytes(range(37, 41)), False),
)
"""As `vppipsec.vpp.api.ipsec.SAMPLES`."""
