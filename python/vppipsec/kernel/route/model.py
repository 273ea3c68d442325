"""A model of the kernel's routes over xfrm interfaces (VTIs), fed by events and dumps.

The model keeps all routes of a destination if a VTI has a route for it, routes over other links included. It keeps nothing about
other destinations. Routes are in the kernel's order: by metric, then as added. The first one that is not dead wins.

Some changes of the kernel have no event: IPv4 routes vanish with a link or a next hop object. A new destination may already have
had other routes. In such cases the model sets `stale`, and needs a dump.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from vppipsec.kernel.netlink.socket import Overflow
from vppipsec.kernel.route.wire import (
    NLM_F_APPEND,
    NLM_F_REPLACE,
    Address,
    AddressGone,
    Destination,
    KernelPath,
    KernelRoute,
    Link,
    LinkEvent,
    LinkGone,
    NextHopChanged,
    RouteAdded,
    RouteFilter,
    RouteGone,
    RouteKind,
)


class RouteDump(NamedTuple):
    """The answer of a dump: links, addresses, and all routes, in order, of each destination that a VTI has a route for."""

    links: tuple[Link, ...]
    addresses: tuple[Address, ...]
    routes: tuple[KernelRoute, ...]


class Vti(NamedTuple):
    """An xfrm interface. `table` is the table of its VRF, 0 without a VRF. `addresses` are its own, with prefix lengths."""

    if_id: int
    ifindex: int
    name: str
    up: bool
    table: int
    addresses: tuple[Address, ...]


class NextHop(NamedTuple):
    """A next hop with its share of the packets. `if_id` names a VTI. It is 0 for another link, named by `ifindex`."""

    if_id: int
    weight: int
    ifindex: int = 0
    gateway: bytes | None = None


@dataclass(slots=True)
class _State:
    """State after the last dump and the events since."""

    vtis: dict[int, Link] = field(default_factory=dict)  # by ifindex
    in_vrfs: dict[int, int] = field(default_factory=dict)  # VRF tables of other links, by ifindex
    addresses: dict[int, set[Address]] = field(default_factory=dict)  # of all links, by ifindex
    routes: dict[Destination, tuple[KernelRoute, ...]] = field(default_factory=dict)


class KernelRoutes:
    """VTIs by if_id, and the kernel's next hops for each destination that a VTI has a route for."""

    def __init__(self) -> None:
        self.stale = True
        """True if the events were not enough, so that the model needs a dump."""
        self.watch = RouteFilter()
        """Selects the routes that matter."""
        self._state = _State()
        self._by_if_id: dict[int, Link] | None = None  # None: not built yet
        self._links_used: set[int] = set()  # these two may hold more than the routes use
        self._objects_used: set[int] = set()

    def if_ids(self) -> set[int]:
        """Return the if_ids of all xfrm interfaces."""
        return {link.if_id for link in self._state.vtis.values()}

    def link(self, if_id: int) -> Vti | None:
        """Return the xfrm interface with an if_id, or None. (The kernel refuses a second one.)"""
        if self._by_if_id is None:
            self._by_if_id = {link.if_id: link for link in reversed(self._state.vtis.values())}
        link = self._by_if_id.get(if_id)
        if link is None:
            return None
        own = tuple(sorted(self._state.addresses.get(link.ifindex, ())))
        return Vti(if_id, link.ifindex, link.name, link.up, link.table, own)

    def addresses_by_table(self) -> dict[int, frozenset[bytes]]:
        """Return the router's own addresses by the table of their VRF, 0 for no VRF.

        It omits loopback and link-local addresses. IPv4 ones on VTIs are included, since peers use them for BGP.
        """
        found: dict[int, set[bytes]] = {}
        for index, addresses in self._state.addresses.items():
            vti = self._state.vtis.get(index)
            table = self._state.in_vrfs.get(index, 0) if vti is None else vti.table
            mean = (each for _, each, _ in addresses if not _is_of_link(each) or (vti is not None and len(each) == 4))
            found.setdefault(table, set()).update(mean)
        return {table: frozenset(addresses) for table, addresses in found.items() if addresses}

    def next_hops(self) -> dict[Destination, tuple[NextHop, ...]]:
        """Return the kernel's next hops for each kept destination that has a route.

        The tuple is empty if the kernel does not forward: it delivers the packets locally, or drops them. The model keeps a
        destination if a VTI has any route for it, not only the best one. It also keeps those of `keep_destinations`.
        """
        found = {destination: self._next_hops(routes) for destination, routes in self._state.routes.items()}
        return {destination: next_hops for destination, next_hops in found.items() if next_hops is not None}

    def keep_destinations(self, destinations: Iterable[Destination]) -> None:
        """Keep the routes of these destinations too, over any link. They replace those of an earlier call."""
        kept = frozenset(destinations)
        if kept != self.watch.destinations:
            self.stale |= not kept <= self.watch.destinations
            self.watch.destinations = kept
            self.watch.set(self._state.vtis, self._state.routes)

    def apply(self, event: LinkEvent | Overflow) -> set[int]:
        """Apply one event and return the if_ids whose link, addresses or routes it may have changed.

        The set contains 0 after a change outside VTIs: an address of another link, or a next hop that is no VTI for a kept
        destination.
        """
        match event:
            case Link(if_id=0):
                return self._on_other_link(event)
            case Link():
                return self._on_vti(event)
            case LinkGone(ifindex):
                return self._on_link_gone(ifindex)
            case Address(ifindex):
                return self._on_other(ifindex) | self._on_address(event, gone=False)
            case AddressGone(address):
                return self._on_other(address.ifindex) | self._on_address(address, gone=True)
            case NextHopChanged(number):
                self.stale |= number in self._objects_used
                return set()
            case RouteAdded(route, flags):
                return self._on_route(route, flags)
            case RouteGone(route):
                return self._on_route_gone(route)
            case Overflow():
                self.stale = True
                return set()

    def replace(self, dump: RouteDump) -> set[int]:
        """Replace the state by a dump. Return the if_ids whose link, addresses or routes differ, as `apply` does."""
        before = self._summary()
        self._by_if_id = None
        in_vrfs = {link.ifindex: link.table for link in dump.links if link.table and not link.if_id}
        state = self._state = _State({link.ifindex: link for link in dump.links if link.if_id}, in_vrfs)
        for address in dump.addresses:
            state.addresses.setdefault(address.ifindex, set()).add(address)
        self._links_used, self._objects_used = set(), set()
        for route in dump.routes:
            self._note_uses(route)
            state.routes[route.destination] = (*state.routes.get(route.destination, ()), route)
        for destination in self.watch.destinations:
            state.routes.setdefault(destination, ())
        self.watch.set(state.vtis, state.routes)
        self.stale = False
        after = self._summary()
        return {if_id for if_id in before.keys() | after.keys() if before.get(if_id) != after.get(if_id)}

    def _summary(self) -> dict[int, tuple[object, dict[Destination, tuple[NextHop, ...]]]]:
        """Return the public state of each if_id: link and destinations. Key 0: own addresses, and destinations outside VTIs."""
        summary: dict[int, tuple[object, dict[Destination, tuple[NextHop, ...]]]] = {0: (self.addresses_by_table(), {})}
        for if_id in self.if_ids():
            summary[if_id] = (self.link(if_id), {})
        for destination, next_hops in self.next_hops().items():
            for if_id in _if_ids(next_hops):
                summary[if_id][1][destination] = next_hops
        return summary

    def _on_vti(self, link: Link) -> set[int]:
        """Apply a new or changed xfrm interface. Its routes come and go with it, many of them without an event."""
        known = self._state.vtis.get(link.ifindex)
        if link == known:
            return set()
        over = [
            routes for routes in self._state.routes.values() if any(_is_over(route, link.ifindex) for route in routes)
        ]
        dirty = {link.if_id} if known is None else {link.if_id, known.if_id}
        dirty |= _if_ids(*map(self._next_hops, over))
        self._state.vtis[link.ifindex] = link
        self._by_if_id = None
        dirty |= _if_ids(*map(self._next_hops, over))
        if known is None:
            self.watch.set(self._state.vtis, self._state.routes)
        self.stale = True
        return dirty

    def _on_other_link(self, link: Link) -> set[int]:
        if link.ifindex in self._state.vtis:
            return self._on_link_gone(link.ifindex)
        before = self._state.in_vrfs.pop(link.ifindex, 0)
        if link.table:
            self._state.in_vrfs[link.ifindex] = link.table
        moved = before != link.table and link.ifindex in self._state.addresses
        return self._on_other(link.ifindex) | ({0} if moved else set())

    def _on_link_gone(self, ifindex: int) -> set[int]:
        dirty = self._on_other(ifindex)
        self._state.in_vrfs.pop(ifindex, None)
        if self._state.addresses.pop(ifindex, None):
            dirty.add(0)
        for destination, routes in list(self._state.routes.items()) if ifindex in self._links_used else ():
            if any(_is_over(route, ifindex) for route in routes):
                dirty |= self._set_routes(
                    destination, tuple(left for route in routes if (left := _without_link(route, ifindex)))
                )
        if ifindex in self._state.vtis:
            dirty.add(self._state.vtis.pop(ifindex).if_id)
            self._by_if_id = None
        return dirty

    def _on_other(self, ifindex: int) -> set[int]:
        """Handle a link whose state or addresses may have changed. IPv4 routes over it may die, vanish or revive."""
        self.stale |= ifindex in self._links_used
        return set()

    def _on_address(self, address: Address, gone: bool) -> set[int]:
        own = self._state.addresses.setdefault(address.ifindex, set())
        before = len(own)
        (own.discard if gone else own.add)(address)
        link = self._state.vtis.get(address.ifindex)
        if len(own) == before or (link is None and _is_of_link(address.address)):
            return set()
        return {0 if link is None else link.if_id}

    def _on_route(self, route: KernelRoute, flags: int) -> set[int]:
        routes = self._state.routes.get(route.destination)
        if routes is None:
            if not any(path.ifindex in self._state.vtis for path in route.paths):
                return set()
            self.stale = True  # there may be others
            self.watch.add(route.destination)
            routes = ()
        self.stale |= bool(flags & NLM_F_REPLACE) and sum(known.metric == route.metric for known in routes) > 1
        self._note_uses(route)
        return self._set_routes(route.destination, _with_route(routes, route, flags))

    def _on_route_gone(self, gone: KernelRoute) -> set[int]:
        routes = self._state.routes.get(gone.destination, ())
        alike = [route for route in routes if (route.metric, route.kind) == (gone.metric, gone.kind)]
        for same in (_weighted_path_ends, _path_ends):
            for route in alike:
                if same(route) == same(gone):
                    left = list(routes)
                    left.remove(route)
                    return self._set_routes(gone.destination, tuple(left))
        for route in alike:
            if _path_ends(route) > _path_ends(
                gone
            ):  # the kernel deletes the paths of an IPv6 multipath route one by one
                rest = route._replace(
                    paths=tuple(p for p in route.paths if (p.ifindex, p.gateway) not in _path_ends(gone))
                )
                return self._set_routes(gone.destination, tuple(rest if known is route else known for known in routes))
        self.stale |= bool(alike)
        return set()

    def _set_routes(self, destination: Destination, routes: tuple[KernelRoute, ...]) -> set[int]:
        """Set the routes of a destination. If its next hops change, return the if_ids of the old and the new ones."""
        before = self._next_hops(self._state.routes.get(destination, ()))
        self._state.routes[destination] = routes  # also an empty tuple: it says that the kernel has none
        after = self._next_hops(routes)
        return set() if before == after else _if_ids(before, after)

    def _note_uses(self, route: KernelRoute) -> None:
        self._links_used.update(path.ifindex for path in route.paths)
        self._objects_used.add(route.next_hop)

    def _next_hops(self, routes: Iterable[KernelRoute]) -> tuple[NextHop, ...] | None:
        """Return the next hops of a destination: empty if the kernel does not forward, None if it has no route."""
        for route in routes:
            if route.kind != RouteKind.UNICAST:
                return ()
            hops = [self._next_hop(path) for path in route.paths if self._is_alive(path)]
            if len(hops) == 1:  # the weight of a single next hop means nothing
                return (hops[0]._replace(weight=1),)
            if hops:  # sorted, since the kernel's order for IPv6 depends on the order of their addition
                return tuple(sorted(hops, key=lambda hop: (not hop.if_id, hop.if_id, hop.ifindex, hop.gateway or b"")))
        return None

    def _is_alive(self, path: KernelPath) -> bool:
        link = self._state.vtis.get(path.ifindex)
        return not path.dead and (link is None or link.up)

    def _next_hop(self, path: KernelPath) -> NextHop:
        link = self._state.vtis.get(path.ifindex)
        return NextHop(0, path.weight, path.ifindex, path.gateway) if link is None else NextHop(link.if_id, path.weight)


def _with_route(routes: tuple[KernelRoute, ...], route: KernelRoute, flags: int) -> tuple[KernelRoute, ...]:
    """Return the routes of a destination with a new one, at the place that the kernel gives it.

    IPv4 puts it before routes of the same metric, unless NLM_F_APPEND is set (fib_table_insert). IPv6 puts it after them. An IPv6
    message contains all paths, also known ones (fib6_add_rt2node). NLM_F_REPLACE replaces the first route of the metric.
    """
    ip4 = len(route.destination.address) == 4
    lower = [known for known in routes if known.metric < route.metric]
    same = [known for known in routes if known.metric == route.metric]
    higher = [known for known in routes if known.metric > route.metric]
    kept = [known for known in same if known.kind != route.kind or not _is_known(route, known, ip4)]
    if flags & NLM_F_REPLACE and len(kept) == len(same):
        del kept[:1]
    first = flags & NLM_F_REPLACE or (ip4 and not flags & NLM_F_APPEND)
    return (*lower, *([route, *kept] if first else [*kept, route]), *higher)


def _is_of_link(address: bytes) -> bool:
    """Return whether an address is a loopback (127.0.0.0/8, ::1) or link-local one (RFC 3927, RFC 4291)."""
    if len(address) == 4:
        return address[0] == 127 or address[:2] == b"\xa9\xfe"
    return address == bytes(15) + b"\x01" or (address[0] == 0xFE and address[1] & 0xC0 == 0x80)


def _path_ends(route: KernelRoute) -> set[tuple[int, bytes | None]]:
    return {(path.ifindex, path.gateway) for path in route.paths}


def _weighted_path_ends(route: KernelRoute) -> set[tuple[int, bytes | None, int]]:
    return {(path.ifindex, path.gateway, path.weight) for path in route.paths}


def _is_known(route: KernelRoute, known: KernelRoute, ip4: bool) -> bool:
    """Return whether `route` describes the route `known`. IPv4 routes with different weights are two routes."""
    return _weighted_path_ends(known) == _weighted_path_ends(route) if ip4 else _path_ends(known) <= _path_ends(route)


def _is_over(route: KernelRoute, ifindex: int) -> bool:
    return any(path.ifindex == ifindex for path in route.paths)


def _without_link(route: KernelRoute, ifindex: int) -> KernelRoute | None:
    """Return a route without its paths over a link, None if no path is left."""
    if not _is_over(route, ifindex):
        return route
    paths = tuple(path for path in route.paths if path.ifindex != ifindex)
    return route._replace(paths=paths) if paths else None


def _if_ids(*several: tuple[NextHop, ...] | None) -> set[int]:
    """Return the if_ids of several tuples of next hops. 0 stands for a next hop outside VTIs, and for an empty tuple."""
    return {
        if_id
        for next_hops in several
        if next_hops is not None
        for if_id in ([next_hop.if_id for next_hop in next_hops] or [0])
    }
