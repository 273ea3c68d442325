"""Indexes where VPP's routes lead: several policies can name one destination, for which a table has one route. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vppipsec.kernel.xfrm.sad_spd import TunnelKey
from vppipsec.sync.desired.policy_layers import LinkNextHop, Target, VtiClassifier
from vppipsec.vpp.types import Prefix, Route

_NONE: frozenset[Route] = frozenset()


@dataclass(frozen=True, slots=True)
class WeightedTargets:
    """A target made of several: each gets a share of a route's packets by its weight. Weights are relative."""

    shares: tuple[tuple[Target | VtiClassifier | LinkNextHop, int], ...]

    @property
    def targets(self) -> Sequence[Target | VtiClassifier | LinkNextHop]:
        """The target of each share, in order."""
        return [target for target, _ in self.shares]


RouteTarget = Target | VtiClassifier | WeightedTargets
"""The target of one of the service's routes."""


class RouteTargets:
    """The target of each route of the service: a tunnel, several targets by weight, the kernel, or none.

    Some routes need an explicit drop: they must exist even while they have no target. A layer's table drops a
    destination without a route. So there a route needs an explicit drop only below a wider route, which would catch its
    packets. In all other tables every route needs one. (Routes of tunnels that wait for an SA exist as well, for their
    counters: `vppipsec.sync.ike.acquire`.)
    """

    def __init__(
        self, tables: Iterable[tuple[int, Mapping[Prefix, RouteTarget]]] = (), layers: frozenset[int] = frozenset()
    ) -> None:
        """Index the routes of each table, given by number. Where two mappings name a destination in one table, the
        later wins.

        `layers` are the tables that serve a layer only.
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
        """The target of each route."""
        return self._targets

    def target(self, route: Route) -> RouteTarget | None:
        """Return the target of a route, None where there should be no route."""
        return self._targets.get(route)

    def exclusive_routes(self, key: TunnelKey) -> frozenset[Route]:
        """Return the routes that lead into this tunnel only."""
        return self._exclusive.get(key, _NONE)

    def shared_routes(self, key: TunnelKey) -> frozenset[Route]:
        """Return the routes that give this tunnel a share of their packets."""
        return self._shared.get(key, _NONE)

    def routes_of(self, key: TunnelKey) -> frozenset[Route]:
        """Return the routes that lead into a tunnel, including those that give it only a share."""
        return self.exclusive_routes(key) | self.shared_routes(key)

    def needs_explicit_drop(self, route: Route) -> bool:
        """Return whether a route must exist even while it has no target."""
        return route not in self._implicit_drops

    def changed_tunnels(self, before: RouteTargets) -> set[TunnelKey]:
        """Return the tunnels whose routes, or shares of routes, differ from before."""
        keys = self._exclusive.keys() | before._exclusive.keys()
        shared = self._shared.keys() | before._shared.keys()
        return {key for key in keys if self.exclusive_routes(key) != before.exclusive_routes(key)} | {
            key for key in shared if self.shared_routes(key) != before.shared_routes(key)
        }
