"""The requests for interfaces (src/vnet/interface.api).

An interface outside of the main FIB table cannot borrow addresses from one in the main table (VPP answers -74). Without an
address it passes no IPv4, so it gets its own.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

from vppipsec.vpp.api.request import API_HEADER, Arguments, Request, address_fields
from vppipsec.vpp.types import MIN_MTU6


@dataclass(frozen=True, slots=True)
class SetInterfaceTable(Request):
    """sw_interface_set_table: VPP looks up the packets that an interface receives in this FIB table.

    VPP refuses if the table does not exist. It also refuses while the interface has or borrows an address of that family.
    """

    message: ClassVar[str] = "sw_interface_set_table"
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "I?I")

    sw_if_index: int
    ip6: bool
    table: int

    def arguments(self) -> Arguments:
        return {"sw_if_index": self.sw_if_index, "is_ipv6": self.ip6, "vrf_id": self.table}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.sw_if_index, self.ip6, self.table)


@dataclass(frozen=True, slots=True)
class GetInterfaceTable(Request):
    """sw_interface_get_table: return the FIB table in which VPP looks up the packets that an interface receives."""

    message: ClassVar[str] = "sw_interface_get_table"
    reply_field: ClassVar[str | None] = "vrf_id"
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "I?")

    sw_if_index: int
    ip6: bool

    def arguments(self) -> Arguments:
        return {"sw_if_index": self.sw_if_index, "is_ipv6": self.ip6}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.sw_if_index, self.ip6)


@dataclass(frozen=True, slots=True)
class InterfaceAddressAddDel(Request):
    """sw_interface_add_del_address: add an IPv4 address with prefix length 32 to an interface, or remove it."""

    message: ClassVar[str] = "sw_interface_add_del_address"
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "I??B16sB")

    sw_if_index: int
    address: bytes
    is_add: bool = True

    def arguments(self) -> Arguments:
        prefix = {"address": address_fields(self.address), "len": 32}
        return {"sw_if_index": self.sw_if_index, "is_add": self.is_add, "del_all": False, "prefix": prefix}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.sw_if_index, self.is_add, False, 0, self.address, 32)


@dataclass(frozen=True, slots=True)
class SetInterfaceTag(Request):
    """sw_interface_tag_add_del: set the tag by which the service recognises its interface. At most 63 bytes of ASCII."""

    message: ClassVar[str] = "sw_interface_tag_add_del"
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "?I64s")

    sw_if_index: int
    tag: str

    def arguments(self) -> Arguments:
        return {"is_add": True, "sw_if_index": self.sw_if_index, "tag": self.tag}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, True, self.sw_if_index, self.tag.encode("ascii"))


@dataclass(frozen=True, slots=True)
class SetUnnumbered(Request):
    """sw_interface_set_unnumbered: an `ipsec` interface borrows the addresses of `unnumbered_from`, so that it passes IP."""

    message: ClassVar[str] = "sw_interface_set_unnumbered"
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "II?")

    sw_if_index: int
    unnumbered_from: int
    is_add: bool = True

    def arguments(self) -> Arguments:
        # in VPP's message `sw_if_index` has the addresses, and `unnumbered_sw_if_index` borrows them
        return {
            "sw_if_index": self.unnumbered_from,
            "unnumbered_sw_if_index": self.sw_if_index,
            "is_add": self.is_add,
        }

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.unnumbered_from, self.sw_if_index, self.is_add)


@dataclass(frozen=True, slots=True)
class SetInterfaceUp(Request):
    """sw_interface_set_flags: bring an interface up."""

    message: ClassVar[str] = "sw_interface_set_flags"
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "II")

    sw_if_index: int

    def arguments(self) -> Arguments:
        return {"sw_if_index": self.sw_if_index, "flags": 1}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.sw_if_index, 1)


@dataclass(frozen=True, slots=True)
class SetInterfaceMtu(Request):
    """sw_interface_set_mtu: set the longest packet that an interface accepts, bytes.

    For IPv6 it stays at 1280 at least, since every IPv6 link accepts such packets (RFC 8200).
    """

    message: ClassVar[str] = "sw_interface_set_mtu"
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "IIIII")

    sw_if_index: int
    mtu: int

    def _mtus(self) -> tuple[int, int, int, int]:
        """Return the MTUs of layer 3, IPv4, IPv6 and MPLS; 0 means the one of layer 3."""
        return self.mtu, 0, MIN_MTU6 if self.mtu < MIN_MTU6 else 0, 0

    def arguments(self) -> Arguments:
        return {"sw_if_index": self.sw_if_index, "mtu": list(self._mtus())}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.sw_if_index, *self._mtus())


VRF_SAMPLES: tuple[Request, ...] = (
    SetInterfaceTag(0x01020306, "a tag"),
    SetUnnumbered(0x01020307, 0x01020308),
    SetInterfaceUp(0x0102030A),
    SetInterfaceMtu(0x01020315, 0x0102),
    SetInterfaceTable(0x01020304, True, 0x01020305),
    GetInterfaceTable(0x01020306, True),
    InterfaceAddressAddDel(0x01020307, bytes(range(33, 37))),
    InterfaceAddressAddDel(0x01020308, bytes(range(37, 41)), False),
)
"""At least one request of each kind, for comparing the two wire forms. Fields have distinct values where possible."""
