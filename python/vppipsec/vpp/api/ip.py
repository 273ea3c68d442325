"""The requests for FIB tables, routes, multicast and neighbors (src/vnet/ip/ip.api, src/vnet/ip-neighbor/ip_neighbor.api)."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from vppipsec.vpp.api.fib_types import PATH_LOCAL, PATH_NORMAL, pack_path, path_fields, path_type_of
from vppipsec.vpp.api.request import API_HEADER, REPLY_SIZE, Arguments, Request, address_fields, family_of
from vppipsec.vpp.ownership import KERNEL_NEXT_HOP, LINK_GROUPS
from vppipsec.vpp.types import INTERFACE_RX, NO_INDEX, Path, Paths, Prefix, Route

_ACCEPT_ALL, _FORWARD = 8, 4  # MFIB_API_ENTRY_FLAG_ACCEPT_ALL_ITF, MFIB_API_ITF_FLAG_FORWARD

VIA_RECURSION = NO_INDEX
"""Answer of RouteLookup: the route has a next hop without an interface."""
UNREACHABLE = 1 << 32
"""Answer of RouteLookup: there is no route, or it drops, or it ends in VPP itself."""

_STATIC = 3  # IP_API_NEIGHBOR_FLAG_STATIC, and _NO_FIB_ENTRY: the neighbor gets no route in a FIB table


@dataclass(frozen=True, slots=True)
class MrouteAdd(Request):
    """ip_mroute_add_del: in one table, deliver packets for link-local multicast groups to the router, from every interface.

    Routing protocols such as OSPF use these groups. VPP refuses if it has no such multicast table.

    VPP delivers decrypted packets for such a group to the tunnel's host interface only if its multicast table says so. linux-nl
    adds such entries for interfaces that have addresses, but `ipsec` interfaces borrow theirs. So the service adds one entry to
    each table. It is for prefixes that nothing else uses, and it accepts packets from every interface.

    The service never removes the entry. On removal VPP 26.06 would keep it without its path, and it would drop packets that
    linux-nl's entry accepts. Only a request without paths could change the entry's flags. The API cannot express one
    (mroute_add_del_handler, src/vnet/ip/ip_api.c).
    """

    message: ClassVar[str] = "ip_mroute_add_del"
    reply_field: ClassVar[str | None] = "stats_index"
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "??IIIBH16s16sBI")

    table: int
    ip6: bool

    def arguments(self) -> Arguments:
        address, length = LINK_GROUPS[self.ip6]
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
        address, length = LINK_GROUPS[self.ip6]
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


@dataclass(frozen=True, slots=True)
class EnableIp6(Request):
    """sw_interface_ip6_enable_disable: enable IPv6 on an interface. Borrowed addresses alone do not enable it.

    No dump of VPP shows the setting. So the service may send this a second time after it was killed in between.
    """

    message: ClassVar[str] = "sw_interface_ip6_enable_disable"
    already_done_retval: ClassVar[int] = -81  # VALUE_EXIST
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "I?")

    sw_if_index: int

    def arguments(self) -> Arguments:
        return {"sw_if_index": self.sw_if_index, "enable": True}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.sw_if_index, True)


@dataclass(frozen=True, slots=True)
class DisableIp6(Request):
    """sw_interface_ip6_enable_disable: disable IPv6 on an interface. May be sent a second time, as EnableIp6."""

    message: ClassVar[str] = "sw_interface_ip6_enable_disable"
    already_done_retval: ClassVar[int] = -62  # IP6_NOT_ENABLED
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "I?")

    sw_if_index: int

    def arguments(self) -> Arguments:
        return {"sw_if_index": self.sw_if_index, "enable": False}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.sw_if_index, False)


@dataclass(frozen=True, slots=True)
class RouteAddDel(Request):
    """ip_route_add_del_v2: add, replace or remove the service's route for `prefix` in the FIB table `table`.

    `paths` says where packets go, see `Paths`: into an interface, to `next_hop` there if given; into several interfaces; nowhere
    (NO_INDEX); to the router itself (LOCAL_INDEX). INTERFACE_RX is added to receive packets on an interface as if they came in
    there.

    Removing a route removes all its paths. Use NO_INDEX for that, since VPP refuses an interface that is gone.

    A path with INTERFACE_RX is an interface-rx path. VPP accepts one to an interface that does not exist. It also accepts to
    delete an interface that such a path uses. It crashes at the first packet on that path.

    An interface-rx path does not count as a route back to a source address. So VPP would drop packets from there to the router
    (ip4_local_check_src). A second path of lower preference leads into the same interface. VPP never uses it to forward, but
    counts it in that check (fib_path_contribute_urpf).
    """

    message: ClassVar[str] = "ip_route_add_del_v2"
    reply_field: ClassVar[str | None] = "stats_index"
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "??IIB16sBBB")

    paths: Paths
    prefix: Prefix
    source: int
    is_add: bool
    table: int = 0
    next_hop: bytes = b""

    @property
    def route(self) -> Route:
        """The route's prefix and table."""
        return Route(self.prefix, self.table)

    @property
    def _paths(self) -> tuple[Path, ...]:
        return (Path(self.paths, 1),) if isinstance(self.paths, int) else self.paths

    def _unused_paths(self) -> list[Path]:
        return [Path(hop.sw_if_index - INTERFACE_RX, 1) for hop in self._paths if hop.sw_if_index >= INTERFACE_RX]

    def arguments(self) -> Arguments:
        family = family_of(self.prefix.address)
        paths = [
            path_fields(index, 0, kind, family, hop.next_hop or self.next_hop)
            | {"weight": hop.weight, "preference": preference}
            for preference, hops in enumerate((self._paths, self._unused_paths()))
            for hop in hops
            for index, kind in (path_type_of(hop.sw_if_index),)
        ]
        return {
            "is_add": self.is_add,
            "is_multipath": False,
            "route": {
                "table_id": self.table,
                "stats_index": 0,
                "prefix": {"address": address_fields(self.prefix.address), "len": self.prefix.length},
                "n_paths": len(paths),
                "src": self.source,
                "paths": paths,
            },
        }

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        address, length = self.prefix
        family, hops, spare = family_of(address), self._paths, self._unused_paths()
        head = self._layout.pack(
            msg_id,
            client,
            context,
            self.is_add,
            False,
            self.table,
            0,
            family,
            address,
            length,
            len(hops) + len(spare),
            self.source,
        )
        if len(hops) == 1 and not spare:  # nearly all routes
            return head + self._pack_path(hops[0], family)
        paths = [self._pack_path(hop, family) for hop in hops]
        return head + b"".join(paths + [self._pack_path(hop, family, 1) for hop in spare])

    def _pack_path(self, path: Path, family: int, preference: int = 0) -> bytes:
        index, kind = path_type_of(path.sw_if_index)
        next_hop = path.next_hop or self.next_hop
        return pack_path(index, kind, family, next_hop, path.weight, preference)


@dataclass(frozen=True, slots=True)
class RouteLookup(Request):
    """ip_route_lookup_v2: find the interface towards an address, in table 0, by longest prefix match.

    The answer is a sw_if_index, VIA_RECURSION or UNREACHABLE.
    """

    message: ClassVar[str] = "ip_route_lookup_v2"
    reply_field: ClassVar[str | None] = "route"
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "IBB16sB")
    _answer: ClassVar[struct.Struct] = struct.Struct(">IIB16sBBBIIIBBI")  # ip_route_v2 up to the first path's type

    address: bytes

    def arguments(self) -> Arguments:
        prefix = {"address": address_fields(self.address), "len": 8 * len(self.address)}
        return {"table_id": 0, "exact": 0, "prefix": prefix}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        address = self.address
        return self._layout.pack(msg_id, client, context, 0, 0, family_of(address), address, 8 * len(address))

    @classmethod
    def read(cls, reply: bytes | bytearray) -> int:
        if len(reply) < REPLY_SIZE + cls._answer.size:
            return UNREACHABLE
        _, _, _, _, _, paths, _, sw_if_index, _, _, _, _, kind = cls._answer.unpack_from(reply, REPLY_SIZE)
        return int(sw_if_index) if paths and kind == PATH_NORMAL else UNREACHABLE


@dataclass(frozen=True, slots=True)
class TableAddDel(Request):
    """ip_table_add_del_v2: add a FIB table without a multicast table, or delete it. A table without routes drops.

    The same number names another table in the other family. The name has at most 63 bytes of ASCII. Routes must be removed
    before their table: VPP 26.06 leaves the routes of a deleted IPv4 table in the next new one.
    """

    message: ClassVar[str] = "ip_table_add_del_v2"
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "I?64s??")

    table: int
    ip6: bool
    name: str
    is_add: bool = True

    def arguments(self) -> Arguments:
        return {
            "table": {"table_id": self.table, "is_ip6": self.ip6, "name": self.name},
            "create_mfib": False,
            "is_add": self.is_add,
        }

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        name = self.name.encode("ascii")
        return self._layout.pack(msg_id, client, context, self.table, self.ip6, name, False, self.is_add)


@dataclass(frozen=True, slots=True)
class NeighborAddDel(Request):
    """ip_neighbor_add_del: set the MAC of the next hop that stands for the kernel on a tap, or remove it."""

    message: ClassVar[str] = "ip_neighbor_add_del"
    reply_field: ClassVar[str | None] = "stats_index"
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "?IB6sB16s")

    sw_if_index: int
    ip6: bool
    mac: bytes
    is_add: bool = True

    def arguments(self) -> Arguments:
        neighbor = {
            "sw_if_index": self.sw_if_index,
            "flags": _STATIC,
            "mac_address": self.mac,
            "ip_address": address_fields(KERNEL_NEXT_HOP[self.ip6]),
        }
        return {"is_add": self.is_add, "neighbor": neighbor}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        address = KERNEL_NEXT_HOP[self.ip6]
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


MULTICAST_SAMPLES: tuple[Request, ...] = (
    EnableIp6(0x01020309),
    DisableIp6(0x01020316),
    RouteAddDel(0x01020310, Prefix(bytes(range(33, 49)), 97), 23, True, 0x01020311, bytes(range(65, 81))),
    RouteAddDel(
        (Path(0x01020312, 7, bytes(range(81, 85))), Path(INTERFACE_RX + 0x01020313, 9)),
        Prefix(bytes(range(33, 37)), 25),
        23,
        False,
        0x01020314,
    ),
    RouteLookup(bytes(range(49, 65))),
    TableAddDel(0x01020304, True, "a name"),
    NeighborAddDel(0x01020304, True, bytes(range(1, 7))),
    MrouteAdd(0x01020304, True),
    MrouteAdd(0x01020304, False),
)
"""At least one request of each kind, for comparing the two wire forms. Fields have distinct values where possible."""


SAMPLE_ROUTE: Mapping[str, Any] = {
    **RouteAddDel(0x01020304, Prefix(bytes(range(33, 49)), 97), 23, True).arguments()["route"],
}
"""A route through interface 0x01020304, for vpp_papi's serializer, for checking how replies are read."""
