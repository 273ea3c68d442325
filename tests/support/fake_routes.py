"""Fake links and routes of a kernel: the test sets them, and followers see the changes."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Iterable

from vppipsec.kernel.route.model import KernelRoutes, RouteDump
from vppipsec.kernel.route.wire import Address, Destination, KernelPath, KernelRoute, Link, RouteKind

MAIN = 254


def destination(text: str, table: int = MAIN) -> Destination:
    net = ipaddress.ip_network(text)
    return Destination(table, net.network_address.packed, net.prefixlen)


class FakeRoutes:
    """A substitute for `RouteFollower`: it reads everything after each change."""

    def __init__(self) -> None:
        self.routes = KernelRoutes()
        self.refuses = ""
        """The error that reading raises, if any."""
        self._links: dict[str, Link] = {}
        self._addresses: list[Address] = []
        self._routes: list[KernelRoute] = []
        self._told = asyncio.Event()
        self._told.set()

    # The test's part

    def link(self, name: str, if_id: int = 0, up: bool = True, table: int = 0, ifindex: int = 0) -> None:
        """Add or change a link.

        With an `if_id` it is a VTI; `table` is its VRF's. Without `ifindex` it gets a number.
        """
        known = self._links.get(name)
        index = ifindex or (known.ifindex if known is not None else 100 + len(self._links))
        self._links[name] = Link(index, name, up, if_id, table)
        self._told.set()

    def unlink(self, name: str) -> None:
        """Remove a link with its routes."""
        index = self._links.pop(name).ifindex
        self._routes = [route for route in self._routes if all(path.ifindex != index for path in route.paths)]
        self._told.set()

    def address(self, name: str, text: str) -> None:
        """Give a link an address."""
        interface = ipaddress.ip_interface(text)
        self._addresses.append(Address(self._links[name].ifindex, interface.ip.packed, interface.network.prefixlen))
        self._told.set()

    def add(
        self, text: str, *next_hops: str | tuple[str, int] | KernelPath, metric: int = 0, table: int = MAIN
    ) -> None:
        """Add a route over links, each with its weight unless that is 1."""
        paths = tuple(way if isinstance(way, KernelPath) else self._path(way) for way in next_hops)
        self._routes.append(KernelRoute(destination(text, table), metric, RouteKind.UNICAST, paths))
        self._routes.sort(key=lambda route: route.metric)
        self._told.set()

    def _path(self, way: str | tuple[str, int]) -> KernelPath:
        name, weight = (way, 1) if isinstance(way, str) else way
        return KernelPath(self._links[name].ifindex, None, weight)

    def delete(self, text: str, metric: int = 0, table: int = MAIN) -> None:
        """Remove a route."""
        gone = destination(text, table)
        (found,) = [route for route in self._routes if (route.destination, route.metric) == (gone, metric)]
        self._routes.remove(found)
        self._told.set()

    def replace(
        self, text: str, *next_hops: str | tuple[str, int] | KernelPath, metric: int = 0, table: int = MAIN
    ) -> None:
        """Replace a route in one step."""
        self.delete(text, metric, table)
        self.add(text, *next_hops, metric=metric, table=table)

    @property
    def pending(self) -> bool:
        """Whether a change has not been announced yet."""
        return self._told.is_set()

    def forget_listener(self) -> None:
        """Let a new follower start without knowledge."""
        self.routes = KernelRoutes()
        self._told.set()

    # The engine's part

    async def changed(self, limit: int) -> set[int]:
        await self._told.wait()
        return await self.read()

    async def read(self) -> set[int]:
        if self.refuses:
            raise OSError(self.refuses)
        self._told.clear()
        return self.routes.replace(self._dump())

    def keep_destinations(self, destinations: Iterable[Destination]) -> None:
        self.routes.keep_destinations(destinations)
        if self.routes.stale:
            self._told.set()

    def resync(self) -> None:
        self._told.set()

    def _dump(self) -> RouteDump:
        vtis = {link.ifindex for link in self._links.values() if link.if_id}
        wanted = {route.destination for route in self._routes if any(path.ifindex in vtis for path in route.paths)}
        wanted |= self.routes.watch.destinations
        found = tuple(route for route in self._routes if route.destination in wanted)
        return RouteDump(tuple(self._links.values()), tuple(self._addresses), found)
