"""How packets are handed to the kernel's stack, and come from there: over interfaces that linux-cp shares with the kernel.

What is no business of a tunnel of ours goes over the linux-cp tap of another interface, to a next hop that stands for the
kernel. The tap's other end is an interface of the kernel's, which takes what is addressed to its MAC, whatever the next hop was.
So that can be an address that nobody has: it tells our neighbors from others, and is the same on each tap. Should another
interface get the tap's number nobody there answers for it, and what would be handed over is dropped.

A tunnel's own *host interface* is a tun: what the kernel sends there leaves through the tunnel, whatever VPP's routes say, and
what comes out of the tunnel for the router itself arrives there (src/plugins/linux-cp/lcp_interface.c). Neither loses from its
TTL, on which BGP counts.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

from vppipsec.vpp.api.ipsec import HEADER, Arguments, Request, address_fields, family_of

KERNEL = {False: bytes((169, 254, 73, 80)), True: bytes.fromhex("fe800000000000000000000000004950")}
"""The next hop that stands for the kernel, by `ip6`: link-local (RFC 3927, RFC 4291)."""
TUN = 1  # LCP_API_ITF_HOST_TUN
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


@dataclass(frozen=True, slots=True)
class PairItf(Request):
    """lcp_itf_pair_add_del_v3: give an `ipsec` interface a host interface, a tun of the kernel's, or take it away again.

    The name has 1 to 15 bytes of those that linux-cp allows. The host interface is up if the other one is. It goes with the
    other one, and with VPP. The answer carries its index in the kernel. VPP needs the kernel's vhost-net for it.
    """

    message: ClassVar[str] = "lcp_itf_pair_add_del_v3"
    extra: ClassVar[str | None] = "vif_index"
    _layout: ClassVar[struct.Struct] = struct.Struct(HEADER + "?I16sB32s")

    sw_if_index: int
    name: str
    is_add: bool = True

    def arguments(self) -> Arguments:
        return {
            "is_add": self.is_add,
            "sw_if_index": self.sw_if_index,
            "host_if_name": self.name,
            "host_if_type": TUN,
            "netns": "",
        }

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        name = self.name.encode("ascii")
        return self._layout.pack(msg_id, client, context, self.is_add, self.sw_if_index, name, TUN, b"")


SAMPLES: tuple[Request, ...] = (
    SetNeighbor(0x01020304, True, bytes(range(1, 7))),
    PairItf(0x01020305, "a name"),
)
"""One request of each kind, with every field distinct where it can be, for comparing the two wire forms."""
