"""The routes of our FIB source in VPP, each with where it leads."""

from __future__ import annotations

from vppipsec.vpp.api.ip import ChangeRoute
from vppipsec.vpp.types import NO_INDEX, Lead, Route, interfaces_of


class HeldRoutes(dict[Route, Lead]):
    """Routes of our FIB source, each with where it leads; of those that drop also by which stats_index VPP counts."""

    def __init__(self) -> None:
        super().__init__()
        self._dropping: dict[Route, int] = {}
        self._by_interface: dict[int, set[Route]] = {}

    def into(self, sw_if_index: int) -> frozenset[Route] | set[Route]:
        """Return the routes that lead into an interface, those included of which it has a share only."""
        return self._by_interface.get(sw_if_index, frozenset())

    def dropping(self) -> list[tuple[Route, int]]:
        """Return the routes that drop, each with its stats_index."""
        return list(self._dropping.items())

    def took(self, request: ChangeRoute, stats_index: int = NO_INDEX) -> None:
        """Note that VPP accepted a change of route; `stats_index` is what its answer carried."""
        route = request.route
        before = self.pop(route, None)
        self._dropping.pop(route, None)
        for index in () if before is None else interfaces_of(before):
            routes = self._by_interface[index]
            routes.discard(route)
            if not routes:
                del self._by_interface[index]
        if request.is_add:
            self[route] = request.lead
            if request.lead == NO_INDEX:
                self._dropping[route] = stats_index
            for index in interfaces_of(request.lead):
                self._by_interface.setdefault(index, set()).add(route)
