"""Whose each of our routes is: several policies can name one destination, and VPP has one route for it in each table. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vppipsec.kernel.xfrm.sad_spd import GroupKey
from vppipsec.sync.desired.policy_layers import Beside, Junction, Target
from vppipsec.vpp.types import Prefix, Route

_NONE: frozenset[Route] = frozenset()


@dataclass(frozen=True, slots=True)
class Split:
    """A target that is several ones: each gets the share of a route's packets that its weight says. Weights are relative."""

    shares: tuple[tuple[Target | Junction | Beside, int], ...]

    @property
    def targets(self) -> Sequence[Target | Junction | Beside]:
        """The targets, each once."""
        return [target for target, _ in self.shares]


Aim = Target | Junction | Split
"""Where a route of ours is to lead."""


class Owners:
    """Where each route of ours is to lead: into the tunnel of a group, into several, to the kernel, or nowhere.

    An *exposed* route has to be there even while it leads nowhere. In a layer's table a destination without a route is dropped,
    so there a route is exposed only below a wider one, which would take its packets. In all other tables each route is.
    (Routes of groups that wait for an SA are there as well, to be counted: `vppipsec.sync.ike.acquire`.)
    """

    def __init__(
        self, tables: Iterable[tuple[int, Mapping[Prefix, Aim]]] = (), layers: frozenset[int] = frozenset()
    ) -> None:
        """Take what tables shall have, by number; of two that name a destination in one table the later counts.

        `layers` are the tables that are a layer's, and of no other use.
        """
        self._targets: dict[Route, Aim] = {}
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
        shared: dict[GroupKey, set[Route]] = {}
        for route, target in self._targets.items():
            if isinstance(target, Split):
                for share, _ in target.shares:
                    if isinstance(share, GroupKey):
                        shared.setdefault(share, set()).add(route)
            elif isinstance(target, GroupKey):
                owned.setdefault(target, set()).add(route)
        self._owned = {key: frozenset(routes) for key, routes in owned.items()}
        self._shared = {key: frozenset(routes) for key, routes in shared.items()}

    @property
    def targets(self) -> Mapping[Route, Aim]:
        """Where each route is to lead."""
        return self._targets

    def owner(self, route: Route) -> Aim | None:
        """Return where a route is to lead, None where there is to be none."""
        return self._targets.get(route)

    def owned(self, key: GroupKey) -> frozenset[Route]:
        """Return the routes into the tunnel of a group alone."""
        return self._owned.get(key, _NONE)

    def shared(self, key: GroupKey) -> frozenset[Route]:
        """Return the routes of which the tunnel of a group has a share."""
        return self._shared.get(key, _NONE)

    def of(self, key: GroupKey) -> frozenset[Route]:
        """Return the routes into the tunnel of a group, those included of which it has a share only."""
        return self.owned(key) | self.shared(key)

    def exposed(self, route: Route) -> bool:
        """Tell whether a route has to be there even while it leads nowhere."""
        return route not in self._sheltered

    def differ_from(self, before: Owners) -> set[GroupKey]:
        """Return the groups that have other routes, or shares of routes, than before."""
        keys = self._owned.keys() | before._owned.keys()
        shared = self._shared.keys() | before._shared.keys()
        return {key for key in keys if self.owned(key) != before.owned(key)} | {
            key for key in shared if self.shared(key) != before.shared(key)
        }
