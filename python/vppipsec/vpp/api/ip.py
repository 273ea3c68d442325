"""Multicast that the router itself receives: the groups of a link, in which routing protocols such as OSPF talk.

What VPP decrypts for such a group it takes for the router's own where its multicast table says so, and gives it to the host
interface of the tunnel. linux-nl sees to that for interfaces with an address of their own, and ours borrow theirs. So there is
an entry of ours in each table: for prefixes that nobody else has, by whatever interface the packets come.

It is never taken back. VPP 26.06 keeps the entry without its path then, as its flags can be changed by a request without
paths alone, for which the API has no place (mroute_add_del_handler, src/vnet/ip/ip_api.c): it would drop what linux-nl's takes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

from vppipsec.vpp.api.ipsec import HEADER, PATH_LOCAL, Arguments, Request, pack_path, path_fields
from vppipsec.vpp.types import NO_INDEX, Prefix

GROUPS = {False: Prefix(bytes((224, 0, 0, 0)), 25), True: Prefix(bytes((0xFF, 0x02, *bytes(14))), 16)}
"""By `ip6`: of 224.0.0.0/24 (RFC 5771), which linux-nl has, the half that is in use; those of link-local scope (RFC 4291)."""
_ACCEPT_ALL, _FORWARD = 8, 4  # MFIB_API_ENTRY_FLAG_ACCEPT_ALL_ITF, MFIB_API_ITF_FLAG_FORWARD


@dataclass(frozen=True, slots=True)
class ReceiveGroups(Request):
    """ip_mroute_add_del: take the groups of a link, whatever link it is, for the router's own in a table of a family.

    VPP refuses where it has no such table for multicast.
    """

    message: ClassVar[str] = "ip_mroute_add_del"
    extra: ClassVar[str | None] = "stats_index"
    _layout: ClassVar[struct.Struct] = struct.Struct(HEADER + "??IIIBH16s16sBI")

    table: int
    ip6: bool

    def arguments(self) -> Arguments:
        address, length = GROUPS[self.ip6]
        prefix = {
            "af": int(self.ip6),
            "grp_address_length": length,
            "grp_address": {"ip6": address.ljust(16, b"\0")},
            "src_address": {"ip6": bytes(16)},
        }
        path = {"itf_flags": _FORWARD, "path": path_fields(NO_INDEX, 0, PATH_LOCAL, int(self.ip6))}
        entry = {"table_id": self.table, "entry_flags": _ACCEPT_ALL, "rpf_id": 0, "prefix": prefix}
        return {"is_add": True, "is_multipath": False, "route": entry | {"n_paths": 1, "paths": [path]}}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        address, length = GROUPS[self.ip6]
        head = self._layout.pack(
            msg_id,
            client,
            context,
            True,
            False,
            self.table,
            _ACCEPT_ALL,
            0,
            self.ip6,
            length,
            address,
            bytes(16),
            1,
            _FORWARD,
        )
        return head + pack_path(NO_INDEX, PATH_LOCAL, self.ip6)


SAMPLES: tuple[Request, ...] = (ReceiveGroups(0x01020304, True), ReceiveGroups(0x01020304, False))
"""As `vppipsec.vpp.api.ipsec.SAMPLES`."""
