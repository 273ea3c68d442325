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

from vppipsec.vpp.api.request import API_HEADER, Arguments, Request

HOST_TUN = 1  # LCP_API_ITF_HOST_TUN


@dataclass(frozen=True, slots=True)
class LcpPairAddDel(Request):
    """lcp_itf_pair_add_del_v3: give an `ipsec` interface a host interface, a tun of the kernel's, or take it away again.

    The name has 1 to 15 bytes of those that linux-cp allows. The host interface is up if the other one is. It goes with the
    other one, and with VPP. The answer carries its index in the kernel. VPP needs the kernel's vhost-net for it.
    """

    message: ClassVar[str] = "lcp_itf_pair_add_del_v3"
    reply_field: ClassVar[str | None] = "vif_index"
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "?I16sB32s")

    sw_if_index: int
    name: str
    is_add: bool = True

    def arguments(self) -> Arguments:
        return {
            "is_add": self.is_add,
            "sw_if_index": self.sw_if_index,
            "host_if_name": self.name,
            "host_if_type": HOST_TUN,
            "netns": "",
        }

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        name = self.name.encode("ascii")
        return self._layout.pack(msg_id, client, context, self.is_add, self.sw_if_index, name, HOST_TUN, b"")


LINUX_CP_SAMPLES: tuple[Request, ...] = (LcpPairAddDel(0x01020305, "a name"),)
"""At least one request of each kind, with every field distinct where it can be, for comparing the two wire forms."""
