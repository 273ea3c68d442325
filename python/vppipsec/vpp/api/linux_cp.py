"""The requests for linux-cp, whose taps and tuns pass packets between VPP and the kernel's stack.

Kernel fallback: VPP sends packets over the linux-cp tap of an interface, to a next hop that stands for the kernel. The kernel's
end of the tap accepts every frame for its MAC, whatever the next hop was. So the next hop is an address that no host has. It is
the same on each tap, and the service recognises its neighbor entries by it. If another interface gets the tap's sw_if_index, no
neighbor answers there, and VPP drops the packets.

A tunnel's *host interface* is a tun (src/plugins/linux-cp/lcp_interface.c). Packets that the kernel sends there leave through
the tunnel, whatever VPP's routes say. Packets out of the tunnel for the router itself arrive there. Both keep their TTL, which
BGP relies on.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

from vppipsec.vpp.api.request import API_HEADER, Arguments, Request

HOST_TUN = 1  # LCP_API_ITF_HOST_TUN


@dataclass(frozen=True, slots=True)
class LcpPairAddDel(Request):
    """lcp_itf_pair_add_del_v3: add the host interface of an `ipsec` interface, a tun in the kernel, or delete it.

    The name has 1 to 15 bytes of the characters that linux-cp allows. The host interface is up while the `ipsec` interface is.
    It disappears with the `ipsec` interface, and with VPP. The answer carries its index in the kernel. VPP needs the kernel's
    vhost-net.
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
"""At least one request of each kind, for comparing the two wire forms. Fields have distinct values where possible."""
