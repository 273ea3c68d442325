"""An asyncio socket of NETLINK_ROUTE, and a follower that keeps a `KernelRoutes` model equal to the kernel."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from time import monotonic

from vppipsec.kernel.netlink.messages import dump_request
from vppipsec.kernel.netlink.socket import (
    DumpInterrupted,
    NetlinkSocket,
    Overflow,
    dump,
    open_netlink,
    subscribe,
    whole_dump,
)
from vppipsec.kernel.netlink.wire import AF_INET, AF_INET6, WireError
from vppipsec.kernel.route.model import KernelRoutes, RouteDump
from vppipsec.kernel.route.wire import (
    Address,
    Destination,
    KernelRoute,
    Link,
    LinkEvent,
    RouteAdded,
    RouteFilter,
    RtMsg,
    decode_route,
    route_key,
)

log = logging.getLogger(__name__)

NETLINK_ROUTE = 0
_LINK_GROUPS = (1, 5, 9)  # RTNLGRP_LINK, IPV4_IFADDR, IPV6_IFADDR
_ROUTE_GROUPS = (7, 11, 32)  # RTNLGRP_IPV4_ROUTE, IPV6_ROUTE, NEXTHOP

_IFINFOMSG = bytes(16)
_IFADDRMSG = bytes(8)
_COMPAT_MODE = Path("/proc/sys/net/ipv4/nexthop_compat_mode")
_HIDDEN_NEXT_HOPS = (
    "routes that use next hop objects do not say where they lead, so those over a VTI are not seen: "
    "set net.ipv4.nexthop_compat_mode to 1"
)

_DECODE_AT_ONCE = 500
"""Number of routes that are decoded before other tasks get their turn: about 5 ms of work."""
_EVERYTHING = 1_000_000  # datagrams: more than any receive buffer holds
SETTLE_S = 0.05
"""Delay between an event that requires a dump and the dump, s.

The kernel reports a link that comes up before it changes the routes over it (dev_open, net/core/dev.c). It also reports
many routes one after another."""
REST_FACTOR = 9
"""Minimum pause between two dumps, in durations of the first: full tables must not keep the follower busy."""


class RouteSocket(NetlinkSocket[LinkEvent]):
    """Events and dumps of one network namespace. It subscribes to routes only if the last dump had xfrm interfaces."""

    def __init__(self, watch: RouteFilter, rx_buffer_size: int = 0, events: socket.socket | None = None) -> None:
        """Open and subscribe. `watch` selects the routes that matter. `rx_buffer_size` is in bytes; 0 keeps the system's default.

        `events` replaces the kernel's socket by any socket that delivers datagrams of netlink messages. Raises OSError.
        """
        self._kernel = events is None
        self._watch = watch
        self._follows_routes = False
        self._has_warned = False
        super().__init__(open_netlink(NETLINK_ROUTE, _LINK_GROUPS) if events is None else events, rx_buffer_size)

    def _decode_event(self, message: memoryview) -> LinkEvent | None:
        return decode_route(message, self._watch)

    async def dump(self) -> RouteDump:
        """Return the kernel's links and addresses, and all routes of each destination that a VTI has a route for.

        Without a VTI it requests no routes. Raises OSError and TimeoutError with a sentence.
        """
        links = [link for link in await self._all(RtMsg.GETLINK, _IFINFOMSG, "links") if isinstance(link, Link)]
        vtis = [link.ifindex for link in links if link.if_id]
        self._subscribe_routes(bool(vtis))
        found = await self._all(RtMsg.GETADDR, _IFADDRMSG, "addresses")
        addresses = tuple(address for address in found if isinstance(address, Address))
        if not vtis:
            return RouteDump(tuple(links), addresses, ())
        routes = [*await self._routes(AF_INET, vtis), *await self._routes(AF_INET6, vtis)]
        return RouteDump(tuple(links), addresses, tuple(routes))

    def _subscribe_routes(self, wanted: bool) -> None:
        if self._kernel and wanted != self._follows_routes:
            for group in _ROUTE_GROUPS:
                subscribe(self._events, group, wanted)
            self._follows_routes = wanted
        if wanted and not self._has_warned and _next_hops_hidden():
            self._has_warned = True
            log.warning(_HIDDEN_NEXT_HOPS)

    async def _all(self, kind: RtMsg, body: bytes, what: str) -> list[LinkEvent]:
        request = dump_request(kind, next(self._seq), body)
        messages = await whole_dump(_open_route_socket, request, f"the dump of {what}")
        return [event for message in messages for event in self._decode_all(message)]

    async def _routes(self, family: int, links: list[int]) -> list[KernelRoute]:
        """Return all routes of each destination that is watched or has a route over these links, in the kernel's order.

        Events report the changes during the dump, so an interrupted dump is good enough.
        """
        sieve = _RouteSieve(RouteFilter(links, self._watch.destinations))
        request = dump_request(RtMsg.GETROUTE, next(self._seq), struct.pack("=B11x", family))
        with contextlib.suppress(DumpInterrupted), _open_route_socket() as asking:
            async for part in dump(asking, request, "the dump of routes"):
                sieve.take(part)
                await asyncio.sleep(0)  # a full table takes a second
        found = []
        for number, message in enumerate(sieve.kept(), 1):
            if number % _DECODE_AT_ONCE == 0:
                await asyncio.sleep(0)
            try:
                event = decode_route(message)
                if isinstance(event, RouteAdded):
                    found.append(event.route)
            except WireError as error:
                self._log_malformed(error)
        wanted = {route.destination for route in found if any(path.ifindex in links for path in route.paths)}
        wanted |= self._watch.destinations
        return [route for route in found if route.destination in wanted]


class _RouteSieve:
    """Keeps all routes of a destination if one of them may matter. A dump has the routes of a destination together."""

    def __init__(self, watch: RouteFilter) -> None:
        self._watch = watch
        self._kept: list[bytes] = []
        self._same_destination: list[bytes] = []
        self._key = b""
        self._matters = False

    def take(self, messages: list[bytes]) -> None:
        """Add messages of a dump, in order."""
        wants = self._watch.matches
        for message in messages:
            key = route_key(message)
            if key != self._key:
                self._finish()
                self._key = key
            self._same_destination.append(message)
            if not self._matters:
                self._matters = wants(message)

    def kept(self) -> list[bytes]:
        """Return the kept messages. Call it after the last `take`."""
        self._finish()
        return self._kept

    def _finish(self) -> None:
        if self._matters:
            self._kept += self._same_destination
        self._same_destination = []
        self._matters = False


class RouteFollower:
    """Keeps a model of routes equal to the kernel. It applies events, and dumps if events are not enough."""

    def __init__(self, source: RouteSocket, routes: KernelRoutes, clock: Callable[[], float] = monotonic) -> None:
        """`clock` returns seconds."""
        self._source = source
        self.routes = routes
        self._has_looked = False
        self._clock = clock
        self._due = clock()
        self._read_timeout: asyncio.Timeout | None = None

    def set_receive_buffer(self, size: int) -> None:
        """Request a receive buffer of `size` bytes for the socket, see `NetlinkSocket.set_receive_buffer`."""
        self._source.set_receive_buffer(size)

    def close(self) -> None:
        """Close the socket."""
        self._source.close()

    def keep_destinations(self, destinations: Iterable[Destination]) -> None:
        """Keep the routes of these destinations too, over any link. See `KernelRoutes.keep_destinations`."""
        self.routes.keep_destinations(destinations)
        if self.routes.stale:
            self._end_read()

    def resync(self) -> None:
        """Request a dump as soon as possible, without an event that requires it."""
        self.routes.stale = True
        self._end_read()

    def _end_read(self) -> None:
        if self._read_timeout is not None:
            self._read_timeout.reschedule(asyncio.get_running_loop().time())

    async def changed(self, limit: int) -> set[int]:
        """Wait until links, addresses or routes of VTIs may have changed, and return the if_ids of those VTIs.

        The first call returns after the first dump, even if the dump has no VTI. It handles at most `limit` events at a time.
        Raises OSError, and TimeoutError if the kernel does not answer. The model then stays as it was, and the next call retries.
        """
        while True:
            first = not self._has_looked
            if self.routes.stale and self._clock() >= self._due:
                dirty = await self.read()
            else:
                dirty = self._apply(await self._read(limit))
            if dirty or (first and self._has_looked):
                return dirty

    async def _read(self, limit: int) -> list[LinkEvent | Overflow]:
        """Wait for events and return them. Return an empty list when a dump is due."""
        wait_s = max(0.0, self._due - self._clock()) if self.routes.stale else None
        try:
            async with asyncio.timeout(wait_s) as self._read_timeout:
                return await self._source.read(limit)
        except TimeoutError:
            return []
        finally:
            self._read_timeout = None

    async def read(self) -> set[int]:
        """Take a dump now. Returns if_ids and raises exceptions as `changed` does."""
        began = self._clock()
        try:
            dump = await self._source.dump()
        finally:
            ended = self._clock()
            self._due = ended + REST_FACTOR * (ended - began)
        dirty = self.routes.replace(dump)
        self._has_looked = True
        late = self._apply(self._source.queued(_EVERYTHING))
        # an event during the dump may be older than its answer, and applying some events twice does harm
        self.routes.stale |= bool(late)
        return dirty | late

    def _apply(self, events: list[LinkEvent | Overflow]) -> set[int]:
        was_stale = self.routes.stale
        dirty: set[int] = set()
        for event in events:
            dirty |= self.routes.apply(event)
        if self.routes.stale and not was_stale:
            self._due = max(self._due, self._clock() + SETTLE_S)
        return dirty


def open_follower(rx_buffer_size: int = 0) -> RouteFollower:
    """Return a subscribed follower of this network namespace's routes. It has read nothing yet. Raises OSError."""
    routes = KernelRoutes()
    return RouteFollower(RouteSocket(routes.watch, rx_buffer_size), routes)


def _next_hops_hidden() -> bool:
    try:
        return _COMPAT_MODE.read_text().strip() == "0"
    except OSError:  # before Linux 5.8, which always shows them
        return False


def _open_route_socket() -> socket.socket:
    return open_netlink(NETLINK_ROUTE, ())
