"""VTIs: the kernel's routes over them, which a follower keeps up to date, and the routes that VPP should have for them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Set
from typing import Protocol

from vppipsec.kernel.route.model import KernelRoutes, Vti
from vppipsec.kernel.route.wire import Destination
from vppipsec.kernel.xfrm.values import Policy
from vppipsec.sync.desired.vti_routes import (
    RT_TABLE_MAIN,
    NextHops,
    Selectors,
    TableId,
    VtiRouteTargets,
    conflicting_destinations,
    selectors_of,
    vti_route_targets,
)
from vppipsec.vpp.types import Prefix, Route


class RouteSource(Protocol):
    """The source of the kernel's routes: `vppipsec.kernel.route.follower.RouteFollower`, or a substitute in tests."""

    @property
    def routes(self) -> KernelRoutes:
        """The model that is kept equal to the kernel."""

    async def changed(self, limit: int) -> set[int]:
        """Wait for a change; the first time, for the model.

        Return the if_ids concerned. Raises OSError, TimeoutError.
        """

    async def read(self) -> set[int]:
        """Read everything now."""

    def keep_destinations(self, destinations: Iterable[Destination]) -> None:
        """Keep the routes to these destinations in the model, whatever their links."""

    def resync(self) -> None:
        """Read everything again as soon as possible."""


class Vtis:
    """The kernel's routes over VTIs. Without a source there are none, and `known` is set at once."""

    def __init__(self, source: RouteSource | None) -> None:
        self.source = source
        self.known = asyncio.Event()
        """Set once the kernel's routes have been read."""
        self.changes = 0
        """Rises whenever the kernel's routes may have changed."""
        self.problem = ""
        """Why they cannot be read, as a sentence."""
        self.route_targets = VtiRouteTargets()
        """The routes that VPP should have."""
        if source is None:
            self.known.set()

    @property
    def followed(self) -> bool:
        """Whether the service follows the kernel's routes over VTIs."""
        return self.source is not None

    async def next_change(self, limit: int) -> None:
        """Wait until the kernel's routes may have changed; handle at most `limit` events at a time.

        Raises OSError and TimeoutError.
        """
        assert self.source is not None
        await self.source.changed(limit)
        self.changed()

    async def read(self, policies: Iterable[Policy]) -> None:
        """Read the kernel's routes in full, once, including those to destinations that the policies make relevant."""
        if self.source is not None:
            await self.source.read()
            self._keep(policies, self.source.routes.next_hops())
            if self.source.routes.stale:
                await self.source.read()
            self.changed()

    def changed(self) -> None:
        """Record that the kernel's routes may have changed."""
        self.changes += 1
        self.problem = ""
        self.known.set()

    def resync(self) -> None:
        """Read everything again as soon as possible."""
        if self.source is not None:
            self.source.resync()

    def own_addresses(self) -> frozenset[bytes]:
        """Return the router's own addresses outside VRFs, as far as they are known."""
        by_table = self._own_by_table()
        return by_table.get(0, frozenset()) | by_table.get(RT_TABLE_MAIN, frozenset())

    def own_host_routes(self) -> frozenset[Route]:
        """Return all of the router's own addresses, each in VPP's table of its VRF."""
        found = ((_vpp_table(table), each) for table, addresses in self._own_by_table().items() for each in addresses)
        return frozenset(Route(Prefix(address, 8 * len(address)), table) for table, address in found)

    def _own_by_table(self) -> dict[int, frozenset[bytes]]:
        return {} if self.source is None else self.source.routes.addresses_by_table()

    def link(self, if_id: int) -> Vti | None:
        """Return the kernel's interface of an if_id, None where there is none.

        Its table is VPP's: 0 for the main one.
        """
        found = None if self.source is None else self.source.routes.link(if_id)
        return None if found is None else found._replace(table=_vpp_table(found.table))

    def tables(self) -> dict[int, int] | None:
        """Return VPP's table that forwards each VTI's decrypted packets, by if_id; None without a source of routes."""
        if self.source is None:
            return None
        return {vti.if_id: vti.table for vti in self._links()}

    def _links(self) -> list[Vti]:
        assert self.source is not None
        return [vti for if_id in sorted(self.source.routes.if_ids()) if (vti := self.link(if_id)) is not None]

    def compute(self, policies: Iterable[Policy], tables: Set[TableId]) -> bool:
        """Compute the routes that VPP should have, and return whether they changed.

        `policies` are in the order in which the kernel asks them. `tables` are VPP's tables that the service did not
        create.
        """
        if self.source is None:
            return False
        before = self.route_targets
        next_hops = self.source.routes.next_hops()
        self.route_targets = vti_route_targets(next_hops, self._keep(policies, next_hops), tables, self._links())
        return self.route_targets != before

    def _keep(self, policies: Iterable[Policy], next_hops: NextHops) -> Selectors:
        """Keep the routes that could conflict with the service's routes, and return the selectors of the policies."""
        assert self.source is not None
        selectors = selectors_of(policies)
        self.source.keep_destinations(conflicting_destinations(next_hops, selectors))
        return selectors


def _vpp_table(table: int) -> int:
    """Return VPP's number of a kernel table."""
    return 0 if table == RT_TABLE_MAIN else table
