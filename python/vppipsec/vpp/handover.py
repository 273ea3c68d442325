"""How packets are handed to the kernel's stack: over a linux-cp tap of VPP's, to a next hop that stands for the kernel.

The tap's other end is an interface of the kernel's, which takes what is addressed to its MAC, whatever the next hop was. So that
can be an address that nobody has: it tells our neighbors from others, and is the same on each tap. Should another interface get
the tap's number nobody there answers for it, and what would be handed over is dropped.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

from vppipsec.vpp.requests import HEADER, Arguments, Request, address_fields, family_of

KERNEL = {False: bytes((169, 254, 73, 80)), True: bytes.fromhex("fe800000000000000000000000004950")}
"""The next hop that stands for the kernel, by `ip6`: link-local (RFC 3927, RFC 4291)."""
_STATIC = 3  # IP_API_NEIGHBOR_FLAG_STATIC, and _NO_FIB_ENTRY: it shall be in no table


@dataclass(frozen=True, slots=True)
class SetNeighbor(Request):
    """ip_neighbor_add_del: say which MAC the next hop has that stands for the kernel on a tap, or take that back."""

    message: ClassVar[str] = "ip_neighbor_add_del"
    extra: ClassVar[str | None] = "stats_index"
    _layout: ClassVar[struct.Struct] = struct.Struct(HEADER + "?IB6sB16s")

    sw_if_index: int
    ip6: bool
    mac: bytes
    is_add: bool = True

    def arguments(self) -> Arguments:
        neighbor = {
            "sw_if_index": self.sw_if_index,
            "flags": _STATIC,
            "mac_address": self.mac,
            "ip_address": address_fields(KERNEL[self.ip6]),
        }
        return {"is_add": self.is_add, "neighbor": neighbor}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        address = KERNEL[self.ip6]
        return self._layout.pack(
            msg_id,
            client,
            context,
            self.is_add,
            self.sw_if_index,
            _STATIC,
            self.mac,
            family_of(address),
            address,
        )


SAMPLES: tuple[Request, ...] = (SetNeighbor(0x01020304, True, bytes(range(1, 7))),)
"""One request, with every field distinct where it can be, for comparing the two wire forms."""
