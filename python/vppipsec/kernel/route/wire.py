"""Decodes messages of NETLINK_ROUTE: links, addresses, next hops and routes.

Sources: include/uapi/linux/rtnetlink.h, if_link.h, if_addr.h, nexthop.h; net/ipv4/fib_semantics.c (fib_dump_info) and
net/ipv6/route.c (rt6_fill_node) for the messages that the kernel sends. Numbers are in host byte order, addresses in network byte
order. Few routes of a router concern an xfrm interface. `RouteFilter` finds them without decoding the others.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import NamedTuple

from vppipsec.kernel.netlink.wire import AF_INET, AF_INET6, HEADER, Attributes, WireError, attributes, message_type


class RtMsg(IntEnum):
    """Types of messages (RTM_*)."""

    NEWLINK = 16
    DELLINK = 17
    GETLINK = 18
    NEWADDR = 20
    DELADDR = 21
    GETADDR = 22
    NEWROUTE = 24
    DELROUTE = 25
    GETROUTE = 26
    NEWNEXTHOP = 104
    DELNEXTHOP = 105


class LinkAttr(IntEnum):
    """IFLA_* that are read."""

    IFNAME = 3
    LINKINFO = 18


class LinkInfo(IntEnum):
    """IFLA_INFO_*."""

    KIND = 1
    DATA = 2
    XSTATS = 3
    SLAVE_KIND = 4
    SLAVE_DATA = 5


class KindAttr(IntEnum):
    """Attributes of a kind of link, and of its ports."""

    XFRM_IF_ID = 2
    VRF_TABLE = 1  # and IFLA_VRF_PORT_TABLE


class AddressAttr(IntEnum):
    """IFA_* that are read. ADDRESS is the peer's address if the link has a peer. IPv6 sends LOCAL only with a peer."""

    ADDRESS = 1
    LOCAL = 2


class RouteAttr(IntEnum):
    """RTA_* that are read."""

    DST = 1
    OIF = 4
    GATEWAY = 5
    PRIORITY = 6
    MULTIPATH = 9
    TABLE = 15
    VIA = 18
    NH_ID = 30


class NextHopAttr(IntEnum):
    """NHA_* that are read."""

    ID = 1


class RouteKind(IntEnum):
    """RTN_* that the model distinguishes. Only UNICAST routes have paths."""

    UNICAST = 1
    LOCAL = 2
    BLACKHOLE = 6


NLM_F_REPLACE = 0x100
NLM_F_APPEND = 0x800
_IFF_UP = 0x1
_IFF_LOWER_UP = 0x10000
_LINK_LOCAL_BITS = 10  # fe80::/10
_RTM_F_CLONED = 0x200
_RTNH_F_DEAD = 0x1
_RTNH_F_PERVASIVE = 0x2

_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, ifindex, flags, change
_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix length, flags, scope, ifindex
_ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
_NEXT_HOP = struct.Struct("=HBBi")  # struct rtnexthop: length, flags, hops, ifindex
_NHMSG_SIZE = 8  # struct nhmsg
_ATTR = struct.Struct("=HH")
_U32 = struct.Struct("=I")
_FIXED = HEADER.size + _ROUTE.size
_ADDRESS_SIZE = {AF_INET: 4, AF_INET6: 16}


class Link(NamedTuple):
    """A link. `if_id` is 0 unless it is an xfrm interface with one. `table` is its VRF's, its own if it is a VRF, or 0.

    `up` is the administrative state, `carrier` the operational one. Routes over the link may be dead if one of them is False.
    """

    ifindex: int
    name: str
    up: bool
    if_id: int = 0
    table: int = 0
    carrier: bool = True


class LinkGone(NamedTuple):
    """A link is deleted, with its addresses and routes. The kernel sends no event for its IPv4 routes."""

    ifindex: int


class Address(NamedTuple):
    """An address of a link. `length` is its prefix length."""

    ifindex: int
    address: bytes
    length: int


class AddressGone(NamedTuple):
    """A link has lost an address."""

    address: Address


class NextHopChanged(NamedTuple):
    """A next hop object (`ip nexthop`) is new, changed or deleted. The kernel sends no event for its routes (Linux 6.1)."""

    id: int


class Destination(NamedTuple):
    """The destination of a route: an IP prefix in a table of the kernel (254: main). Its host bits are zero."""

    table: int
    address: bytes
    length: int


class KernelPath(NamedTuple):
    """A path of a route. `gateway` is None for a neighbour. `dead` is True if the kernel skips it since the link is down."""

    ifindex: int
    gateway: bytes | None = None
    weight: int = 1
    dead: bool = False


class KernelRoute(NamedTuple):
    """A route. `kind` is its type (RTN_*). Only unicast routes have paths, so not a blackhole or an address of the router.

    `next_hop` is the id of its next hop object, 0 for none.
    """

    destination: Destination
    metric: int
    kind: int
    paths: tuple[KernelPath, ...]
    next_hop: int = 0


class RouteAdded(NamedTuple):
    """A route is new. `flags` are those of the request that added it: NLM_F_REPLACE, NLM_F_APPEND."""

    route: KernelRoute
    flags: int


class RouteGone(NamedTuple):
    """A route is deleted. For an IPv6 multipath route it may be one path only."""

    route: KernelRoute


LinkEvent = Link | LinkGone | Address | AddressGone | NextHopChanged | RouteAdded | RouteGone


class RouteFilter:
    """Finds the routes that matter among many: those over some links, and all others with the same destinations."""

    def __init__(self, links: Iterable[int] = (), destinations: Iterable[Destination] = ()) -> None:
        """Watch links, by ifindex, and destinations over any link. `destinations` stay watched after `set`."""
        self.destinations = frozenset(destinations)
        self.set(links, ())

    def set(self, links: Iterable[int], destinations: Iterable[Destination]) -> None:
        """Watch these links, by ifindex, these destinations and those of the attribute `destinations`, and no others."""
        self._keys = {_destination_key(destination) for destination in (*destinations, *self.destinations)}
        by_rest: dict[bytes, bytes] = {}  # grouped, so that many links make a short pattern
        for index in map(_U32.pack, links):
            by_rest[index[1:]] = by_rest.get(index[1:], b"") + re.escape(index[:1])
        indices = b"|".join(b"[%b]%b" % (first, re.escape(rest)) for rest, first in by_rest.items())
        # Before an ifindex come length and type of RTA_OIF, or length, flags and hops of a struct rtnexthop. So the pattern
        # expects a length of at least 8, then type 4, or flags without one bit that the kernel never sets. Other attributes
        # with the same number have other types (6, 15, 30), or less before it. The index comes first in the pattern, since a
        # search for fixed bytes is fast.
        length = rb"(?:[^\x00-\x07].|.[^\x00])"
        flags = b"".join(re.escape(bytes([n])) for n in range(256) if not n & _RTNH_F_PERVASIVE)
        self._over: re.Pattern[bytes] | None = None
        if indices:
            self._over = re.compile(b"(?:%b)(?<=%b[%b].{5})" % (indices, length, flags), re.DOTALL)

    def add(self, destination: Destination) -> None:
        """Watch one more destination."""
        self._keys.add(_destination_key(destination))

    def matches(self, message: bytes) -> bool:
        """Return whether a message may describe a route that matters. False is certain, True is not."""
        over = self._over
        return over is not None and (over.search(message, _FIXED) is not None or route_key(message) in self._keys)


def route_key(message: bytes) -> bytes:
    """Return bytes that identify the destination of a route message: family, length, table, prefix.

    The kernel puts RTA_TABLE first, and RTA_DST second. It omits RTA_DST if the prefix length is 0.
    """
    end = 36 + (4 + _ADDRESS_SIZE.get(message[16], 0) if message[17] else 0)
    return message[16:18] + message[28:end]


def _destination_key(destination: Destination) -> bytes:
    family = AF_INET if len(destination.address) == 4 else AF_INET6
    key = bytes([family, destination.length]) + _ATTR.pack(8, RouteAttr.TABLE) + _U32.pack(destination.table)
    if not destination.length:
        return key
    return key + _ATTR.pack(4 + len(destination.address), RouteAttr.DST) + destination.address


def decode_route(message: bytes | memoryview, watch: RouteFilter | None = None) -> LinkEvent | None:
    """Decode one message with its header. Return None for one without interest, such as a route that `watch` does not match.

    Raises WireError, and no other exception, for any malformed message.
    """
    kind = message_type(message)
    decoder = _ROUTE_DECODERS.get(kind)
    if decoder is None:
        raise WireError(f"netlink message of unknown type {kind:#x}, {len(message)} bytes")
    try:
        if HEADER.unpack_from(message)[0] != len(message):
            raise WireError(f"it claims {HEADER.unpack_from(message)[0]} bytes")
        if watch is not None and decoder is _on_route and not watch.matches(bytes(message)):
            return None
        return decoder(memoryview(message), kind)
    except WireError as error:
        raise WireError(f"{RtMsg(kind).name} of {len(message)} bytes: {error}") from None
    except (struct.error, IndexError):
        raise WireError(f"{RtMsg(kind).name} of {len(message)} bytes is cut short") from None


def _on_link(message: memoryview, kind: int) -> Link | LinkGone | None:
    family, _, ifindex, flags, _ = _LINK.unpack_from(message, HEADER.size)
    if family:  # AF_BRIDGE: the event is about a bridge port, not the link
        return None
    if kind == RtMsg.DELLINK:
        return LinkGone(ifindex)
    attrs = attributes(message, HEADER.size + _LINK.size, LinkAttr)
    name = bytes(attrs.get(LinkAttr.IFNAME, b"")).rstrip(b"\0").decode("ascii", "backslashreplace")
    info = _nested(attrs, LinkAttr.LINKINFO, LinkInfo)
    if_id = table = 0
    if _word(info.get(LinkInfo.KIND)) == b"xfrm":
        if_id = _u32(_nested(info, LinkInfo.DATA, KindAttr), KindAttr.XFRM_IF_ID)
    elif _word(info.get(LinkInfo.KIND)) == b"vrf":
        table = _u32(_nested(info, LinkInfo.DATA, KindAttr), KindAttr.VRF_TABLE)
    if _word(info.get(LinkInfo.SLAVE_KIND)) == b"vrf":
        table = _u32(_nested(info, LinkInfo.SLAVE_DATA, KindAttr), KindAttr.VRF_TABLE)
    return Link(ifindex, name, bool(flags & _IFF_UP), if_id, table, bool(flags & _IFF_LOWER_UP))


def _on_address(message: memoryview, kind: int) -> Address | AddressGone | None:
    family, length, _, _, ifindex = _ADDRESS.unpack_from(message, HEADER.size)
    size = _ADDRESS_SIZE.get(family)
    if size is None:
        return None
    attrs = attributes(message, HEADER.size + _ADDRESS.size, AddressAttr)
    raw = attrs.get(AddressAttr.LOCAL, attrs.get(AddressAttr.ADDRESS, memoryview(b"")))
    address = Address(ifindex, _sized(raw, size, "an address"), _length(length, size))
    return AddressGone(address) if kind == RtMsg.DELADDR else address


def _on_next_hop(message: memoryview, kind: int) -> NextHopChanged:
    return NextHopChanged(_u32(attributes(message, HEADER.size + _NHMSG_SIZE, NextHopAttr), NextHopAttr.ID))


def _on_route(message: memoryview, kind: int) -> RouteAdded | RouteGone | None:
    route = _route(message[HEADER.size :])
    if route is None:
        return None
    flags = HEADER.unpack_from(message)[2]
    return RouteGone(route) if kind == RtMsg.DELROUTE else RouteAdded(route, flags & (NLM_F_REPLACE | NLM_F_APPEND))


def _route(body: memoryview) -> KernelRoute | None:
    """Decode a route. Return None for one with a TOS or a source, a cached one, and one for link-local addresses."""
    family, bits, src_bits, tos, _, _, _, kind, flags = _ROUTE.unpack_from(body)
    size = _ADDRESS_SIZE.get(family)
    if size is None or src_bits or tos or flags & _RTM_F_CLONED:
        return None
    attrs = attributes(body, _ROUTE.size, RouteAttr)
    address = _sized(attrs[RouteAttr.DST], size, "a destination") if RouteAttr.DST in attrs else bytes(size)
    if address[:1] == b"\xfe" and size == 16 and bits >= _LINK_LOCAL_BITS and address[1] & 0xC0 == 0x80:
        return None
    destination = Destination(_u32(attrs, RouteAttr.TABLE), address, _length(bits, size))
    paths: tuple[KernelPath, ...] = ()
    if kind == RouteKind.UNICAST:
        if RouteAttr.MULTIPATH in attrs:
            paths = _paths(attrs[RouteAttr.MULTIPATH])
        elif RouteAttr.OIF in attrs:
            paths = (KernelPath(_u32(attrs, RouteAttr.OIF), _gateway(attrs), 1, bool(flags & _RTNH_F_DEAD)),)
    return KernelRoute(destination, _u32(attrs, RouteAttr.PRIORITY), kind, paths, _u32(attrs, RouteAttr.NH_ID))


def _paths(data: memoryview) -> tuple[KernelPath, ...]:
    found = []
    while len(data) >= _NEXT_HOP.size:
        length, flags, hops, ifindex = _NEXT_HOP.unpack_from(data)
        if length < _NEXT_HOP.size or length > len(data):
            raise WireError(f"a next hop claims {length} bytes, {len(data)} are there")
        attrs = attributes(data[:length], _NEXT_HOP.size, RouteAttr)
        found.append(KernelPath(ifindex, _gateway(attrs), hops + 1, bool(flags & _RTNH_F_DEAD)))
        data = data[(length + 3) & ~3 :]
    return tuple(found)


def _gateway(attrs: Attributes) -> bytes | None:
    if RouteAttr.VIA in attrs:  # struct rtvia: next hop and destination have different families
        return bytes(attrs[RouteAttr.VIA][2:])
    return bytes(attrs[RouteAttr.GATEWAY]) if RouteAttr.GATEWAY in attrs else None


def _nested(attrs: Attributes, kind: int, names: type[IntEnum]) -> Attributes:
    return attributes(attrs[kind], 0, names) if kind in attrs else {}


def _word(data: memoryview | None) -> bytes:
    return b"" if data is None else bytes(data).rstrip(b"\0")


def _u32(attrs: Attributes, kind: int) -> int:
    """Return a number, 0 if the attribute is absent: the kernel omits some that are 0."""
    return int(_U32.unpack_from(attrs[kind])[0]) if kind in attrs else 0


def _sized(data: memoryview, size: int, what: str) -> bytes:
    if len(data) != size:
        raise WireError(f"{what} has {len(data)} bytes, not {size}")
    return bytes(data)


def _length(bits: int, size: int) -> int:
    if bits > 8 * size:
        raise WireError(f"a prefix length of {bits}")
    return bits


_ROUTE_DECODERS: dict[int, Callable[[memoryview, int], LinkEvent | None]] = {
    RtMsg.NEWLINK: _on_link,
    RtMsg.DELLINK: _on_link,
    RtMsg.NEWADDR: _on_address,
    RtMsg.DELADDR: _on_address,
    RtMsg.NEWROUTE: _on_route,
    RtMsg.DELROUTE: _on_route,
    RtMsg.NEWNEXTHOP: _on_next_hop,
    RtMsg.DELNEXTHOP: _on_next_hop,
}
