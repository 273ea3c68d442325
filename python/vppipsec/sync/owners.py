"""Whose each of our routes is: several policies can name one destination, and VPP has one route for it in each table. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vppipsec.sync.steering import Target
from vppipsec.vpp.objects import Prefix, Route
from vppipsec.xfrm.model import GroupKey

_NONE: frozenset[Route] = frozenset()


class Owners:
    """Where each route of ours is to lead: into the tunnel of a group, to the kernel, or nowhere.

    An *exposed* route has to be there even while it leads nowhere. In a layer's table a destination without a route is dropped,
    so there a route is exposed only below a wider one, which would take its packets. In all other tables each route is.
    """

    def __init__(
        self, tables: Iterable[tuple[int, Mapping[Prefix, Target]]] = (), layers: frozenset[int] = frozenset()
    ) -> None:
        """Take what tables shall have, by number. `layers` are those that are a layer's, and of no other use."""
        self._targets: dict[Route, Target] = {}
        self._sheltered: set[Route] = set()
        for table, routes in tables:
            lengths = {prefix.length for prefix in routes}
            for prefix, target in routes.items():
                self._targets[Route(prefix, table)] = target
                if table in layers and not any(
                    length < prefix.length and prefix.cut(length) in routes for length in lengths
                ):
                    self._sheltered.add(Route(prefix, table))
        owned: dict[GroupKey, set[Route]] = {}
        for route, target in self._targets.items():
            if isinstance(target, GroupKey):
                owned.setdefault(target, set()).add(route)
        self._owned = {key: frozenset(routes) for key, routes in owned.items()}

    @property
    def targets(self) -> Mapping[Route, Target]:
        """Where each route is to lead."""
        return self._targets

    def owner(self, route: Route) -> Target | None:
        """Return where a route is to lead, None where there is to be none."""
        return self._targets.get(route)

    def owned(self, key: GroupKey) -> frozenset[Route]:
        """Return the routes into the tunnel of a group."""
        return self._owned.get(key, _NONE)

    def exposed(self, route: Route) -> bool:
        """Tell whether a route has to be there even while it leads nowhere."""
        return route not in self._sheltered

    def differ_from(self, before: Owners) -> set[GroupKey]:
        """Return the groups that have other routes than before."""
        keys = self._owned.keys() | before._owned.keys()
        return {key for key in keys if self.owned(key) != before.owned(key)}
