"""Whose each of our routes is: several policies can name one destination, and VPP has one route for it in each table. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vppipsec.kernel.xfrm.sad_spd import TunnelKey
from vppipsec.sync.desired.policy_layers import LinkNextHop, Target, VtiClassifier
from vppipsec.vpp.types import Prefix, Route

_NONE: frozenset[Route] = frozenset()


@dataclass(frozen=True, slots=True)
class WeightedTargets:
    """A target that is several ones: each gets the share of a route's packets that its weight says. Weights are relative."""

    shares: tuple[tuple[Target | VtiClassifier | LinkNextHop, int], ...]

    @property
    def targets(self) -> Sequence[Target | VtiClassifier | LinkNextHop]:
        """The targets, each once."""
        return [target for target, _ in self.shares]


RouteTarget = Target | VtiClassifier | WeightedTargets
"""Where a route of ours is to lead."""


class RouteTargets:
    """Where each route of ours is to lead: into the tunnel of a group, into several, to the kernel, or nowhere.

    An *exposed* route has to be there even while it leads nowhere. In a layer's table a destination without a route is dropped,
    so there a route is exposed only below a wider one, which would take its packets. In all other tables each route is.
    (Routes of groups that wait for an SA are there as well, to be counted: `vppipsec.sync.ike.acquire`.)
    """

    def __init__(
        self, tables: Iterable[tuple[int, Mapping[Prefix, RouteTarget]]] = (), layers: frozenset[int] = frozenset()
    ) -> None:
        """Take what tables shall have, by number; of two that name a destination in one table the later counts.

        `layers` are the tables that are a layer's, and of no other use.
        """
        self._targets: dict[Route, RouteTarget] = {}
        self._implicit_drops: set[Route] = set()
        for table, routes in tables:
            lengths = {prefix.length for prefix in routes}
            for prefix, target in routes.items():
                self._targets[Route(prefix, table)] = target
                if table in layers and not any(
                    length < prefix.length and prefix.shortened(length) in routes for length in lengths
                ):
                    self._implicit_drops.add(Route(prefix, table))
        exclusive: dict[TunnelKey, set[Route]] = {}
        shared: dict[TunnelKey, set[Route]] = {}
        for route, target in self._targets.items():
            if isinstance(target, WeightedTargets):
                for share, _ in target.shares:
                    if isinstance(share, TunnelKey):
                        shared.setdefault(share, set()).add(route)
            elif isinstance(target, TunnelKey):
                exclusive.setdefault(target, set()).add(route)
        self._exclusive = {key: frozenset(routes) for key, routes in exclusive.items()}
        self._shared = {key: frozenset(routes) for key, routes in shared.items()}

    @property
    def targets(self) -> Mapping[Route, RouteTarget]:
        """Where each route is to lead."""
        return self._targets

    def target(self, route: Route) -> RouteTarget | None:
        """Return where a route is to lead, None where there is to be none."""
        return self._targets.get(route)

    def exclusive_routes(self, key: TunnelKey) -> frozenset[Route]:
        """Return the routes into the tunnel of a group alone."""
        return self._exclusive.get(key, _NONE)

    def shared_routes(self, key: TunnelKey) -> frozenset[Route]:
        """Return the routes of which the tunnel of a group has a share."""
        return self._shared.get(key, _NONE)

    def routes_of(self, key: TunnelKey) -> frozenset[Route]:
        """Return the routes into the tunnel of a group, those included of which it has a share only."""
        return self.exclusive_routes(key) | self.shared_routes(key)

    def needs_explicit_drop(self, route: Route) -> bool:
        """Tell whether a route has to be there even while it leads nowhere."""
        return route not in self._implicit_drops

    def changed_tunnels(self, before: RouteTargets) -> set[TunnelKey]:
        """Return the groups that have other routes, or shares of routes, than before."""
        keys = self._exclusive.keys() | before._exclusive.keys()
        shared = self._shared.keys() | before._shared.keys()
        return {key for key in keys if self.exclusive_routes(key) != before.exclusive_routes(key)} | {
            key for key in shared if self.shared_routes(key) != before.shared_routes(key)
        }
