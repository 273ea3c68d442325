"""Actual state of the service's routes: the paths of each route of its FIB source."""

from __future__ import annotations

from vppipsec.vpp.api.ip import RouteAddDel
from vppipsec.vpp.types import NO_INDEX, Paths, Route, interfaces_of


class ActualRoutes(dict[Route, Paths]):
    """Paths by route, for the service's FIB source in VPP. Each route that drops also has the stats_index of its counter."""

    def __init__(self) -> None:
        super().__init__()
        self._discarding: dict[Route, int] = {}
        self._by_interface: dict[int, set[Route]] = {}

    def into(self, sw_if_index: int) -> frozenset[Route] | set[Route]:
        """Return the routes that have a path into an interface."""
        return self._by_interface.get(sw_if_index, frozenset())

    def discarding(self) -> list[tuple[Route, int]]:
        """Return the routes that drop, each with its stats_index."""
        return list(self._discarding.items())

    def apply_accepted(self, request: RouteAddDel, stats_index: int = NO_INDEX) -> None:
        """Record that VPP accepted a change of a route. `stats_index` comes from its answer."""
        route = request.route
        before = self.pop(route, None)
        self._discarding.pop(route, None)
        for index in () if before is None else interfaces_of(before):
            routes = self._by_interface[index]
            routes.discard(route)
            if not routes:
                del self._by_interface[index]
        if request.is_add:
            self[route] = request.paths
            if request.paths == NO_INDEX:
                self._discarding[route] = stats_index
            for index in interfaces_of(request.paths):
                self._by_interface.setdefault(index, set()).add(route)
