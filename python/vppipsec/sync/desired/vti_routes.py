"""Turns the kernel's routes over VTIs (xfrm interfaces) into the routes that VPP should have. Pure: no I/O, no state.

A VTI has no destinations of its own: the kernel's routes send packets to it. Its policies, those with its if_id, then
select the child SA: the one with the lowest priority number that matches. The kernel drops what none matches
(xfrmi_xmit2, net/xfrm/xfrm_interface_core.c).

VPP has one FIB for both steps. Where destinations alone select the child, the children's remote selectors divide a
route into pieces. Otherwise the route leads to the VTI classifier. A next hop's address on a VTI means nothing, since a
tunnel has only one path.

The result respects VPP's tables and other owners' routes. Policies that match a firewall mark are omitted, as packets
in VPP carry none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from vppipsec.kernel.route.model import NextHop, Vti
from vppipsec.kernel.route.wire import Destination
from vppipsec.kernel.xfrm.sad_spd import TunnelKey, tunnel_keys_of_policy
from vppipsec.kernel.xfrm.values import Policy, PolicyAction, PolicyDir, PolicyType
from vppipsec.sync.desired.outbound_policy import matches_mark
from vppipsec.sync.desired.policy_layers import Action, LinkNextHop, Target, VtiClassifier
from vppipsec.sync.desired.routes import RouteTarget, WeightedTargets
from vppipsec.sync.desired.selectors import widest_rule
from vppipsec.vpp.ownership import TABLE_NUMBERS
from vppipsec.vpp.types import Prefix, Route

RT_TABLE_MAIN = 254  # include/uapi/linux/rtnetlink.h
RT_TABLE_LOCAL = 255  # include/uapi/linux/rtnetlink.h

TableId = tuple[int, bool]
"""A FIB table's number and its family (True for IPv6)."""


class ChildSelector(NamedTuple):
    """An outbound policy of a VTI. `target` is None where it blocks. `narrow`: it matches more than the destination."""

    remote: Prefix
    priority: int
    target: TunnelKey | None
    narrow: bool = False


class TargetShare(NamedTuple):
    """A share of a route's packets. `target` is None where they are dropped. Weights are relative."""

    target: TunnelKey | VtiClassifier | LinkNextHop | None
    weight: int


VtiRoute = tuple[TargetShare, ...]
"""What VPP should do with packets to a prefix."""
NextHops = Mapping[Destination, tuple[NextHop, ...]]
"""The kernel's next hops by destination."""
Selectors = Mapping[int, Sequence[ChildSelector]]
"""Outbound policies by if_id, oldest first. Of two with one priority the older decides."""


def vti_routes(next_hops: NextHops, selectors: Selectors) -> dict[Route, VtiRoute]:
    """Return what VPP should hold for the kernel's routes over VTIs. The main table is VPP's table 0, as in linux-cp.

    `next_hops` are the kernel's routes. Those without a VTI matter only where `conflicting_destinations` names them.
    The table of local addresses is omitted.
    """
    classified = vtis_needing_classifier(next_hops, selectors)
    selectors = _without_classified(classified, selectors)
    routes: dict[Route, VtiRoute] = {}
    for destination, shared in next_hops.items():
        whole = Prefix(destination.address, destination.length)
        if not _is_forwarded(destination, shared):
            continue
        table = 0 if destination.table == RT_TABLE_MAIN else destination.table
        made = {whole: _vti_route(whole, shared, selectors, classified)}
        for piece in _pieces(whole, shared, selectors):
            if not any(between in next_hops for between in _between(destination, piece)):
                route = _vti_route(piece, shared, selectors, classified)
                if route != _longest_match(made, piece):
                    made[piece] = route
        routes.update((Route(piece, table), route) for piece, route in made.items())
    return routes


def vtis_needing_classifier(next_hops: NextHops, selectors: Selectors) -> frozenset[int]:
    """Return the VTIs, by if_id, that need a classifier.

    There are two reasons. Policies match more than the destination; or a route shares packets with another link, and
    VPP must find out whether any child matches. In VPP a share that drops gets no packets.
    """
    shares = [shared for destination, shared in next_hops.items() if _is_forwarded(destination, shared)]
    routed = {next_hop.if_id for shared in shares for next_hop in shared}
    with_other_links = {
        next_hop.if_id for shared in shares if not all(next_hop.if_id for next_hop in shared) for next_hop in shared
    }
    with_narrow_selectors = {if_id for if_id, of in selectors.items() if any(selector.narrow for selector in of)}
    return frozenset((routed & with_narrow_selectors | with_other_links) - {0})


def conflicting_destinations(next_hops: NextHops, selectors: Selectors) -> set[Destination]:
    """Return the destinations that lie between a route over a VTI and its pieces, where a kernel route would conflict.

    There VPP's piece, the longer prefix, would catch packets that are not for the VTI. Such routes must be known,
    whatever their link. Children whose remote selector matches everything cause none, nor do VTIs with a classifier.
    """
    selectors = _without_classified(vtis_needing_classifier(next_hops, selectors), selectors)
    return {
        between
        for destination, shared in next_hops.items()
        if _is_forwarded(destination, shared)
        for piece in _pieces(Prefix(destination.address, destination.length), shared, selectors)
        for between in _between(destination, piece)
    }


def _without_classified(classified: Set[int], selectors: Selectors) -> Selectors:
    """Return the selectors that divide routes into pieces: those of VTIs without a classifier."""
    return {if_id: of for if_id, of in selectors.items() if if_id not in classified}


def _best_target(prefix: Prefix, selectors: Iterable[ChildSelector]) -> TunnelKey | None:
    """Return the target of packets to a prefix that no selector is within: the best selector that covers it decides."""
    found = (selector for selector in selectors if selector.remote.covers(prefix))
    best = min(found, key=lambda selector: selector.priority, default=None)
    return None if best is None else best.target


def _is_forwarded(destination: Destination, next_hops: Iterable[NextHop]) -> bool:
    return destination.table != RT_TABLE_LOCAL and any(next_hop.if_id for next_hop in next_hops)


def _pieces(whole: Prefix, next_hops: Iterable[NextHop], selectors: Selectors) -> list[Prefix]:
    """Return the remote selectors strictly within a route's prefix, the shorter first."""
    remotes = {selector.remote for next_hop in next_hops for selector in selectors.get(next_hop.if_id, ())}
    within = [remote for remote in remotes if remote.length > whole.length and whole.covers(remote)]
    return sorted(within, key=lambda remote: (remote.length, remote.address))


def _between(destination: Destination, piece: Prefix) -> Iterator[Destination]:
    """Yield the destinations that contain a route's piece and are longer than the route itself. The piece is the last."""
    for length in range(destination.length + 1, piece.length + 1):
        yield Destination(destination.table, piece.shortened(length).address, length)


_NO_LINK = LinkNextHop(0, None)
"""Stands for a next hop of the other family, to which the service's routes have no path."""


def _vti_route(piece: Prefix, next_hops: Iterable[NextHop], selectors: Selectors, classified: Set[int]) -> VtiRoute:
    """Return what VPP should do with packets to a piece that no other piece is within."""
    weights: dict[TunnelKey | VtiClassifier | LinkNextHop | None, int] = {}
    for next_hop in next_hops:
        target: TunnelKey | VtiClassifier | LinkNextHop | None
        if not next_hop.if_id:
            fits = len(next_hop.gateway or piece.address) == len(piece.address)
            target = LinkNextHop(next_hop.ifindex, next_hop.gateway) if fits else _NO_LINK
        elif next_hop.if_id in classified:
            target = VtiClassifier(next_hop.if_id)
        else:
            target = _best_target(piece, selectors.get(next_hop.if_id, ()))
        weights[target] = weights.get(target, 0) + next_hop.weight
    return tuple(TargetShare(target, weight) for target, weight in weights.items())


def _longest_match(made: Mapping[Prefix, VtiRoute], piece: Prefix) -> VtiRoute | None:
    """Return the route that packets to a piece would follow so far."""
    for length in range(piece.length, -1, -1):
        route = made.get(piece.shortened(length))
        if route is not None:
            return route
    return None


@dataclass(frozen=True, slots=True)
class VtiRouteTargets:
    """`routes` are those that VPP should have, by table. `omitted` are those that it should not, with the reason.

    `missing_tables` are tables that VPP lacks for some routes.
    """

    routes: Mapping[int, Mapping[Prefix, RouteTarget]] = field(default_factory=dict)
    omitted: Mapping[Route, str] = field(default_factory=dict)
    missing_tables: frozenset[TableId] = frozenset()

    @property
    def targets(self) -> Set[TunnelKey]:
        """The tunnels that routes lead into."""
        return {target for target in self._all() if isinstance(target, TunnelKey)}

    @property
    def classifiers(self) -> Set[int]:
        """The VTIs, by if_id, whose classifiers routes lead to."""
        return {target.if_id for target in self._all() if isinstance(target, VtiClassifier)}

    def _all(self) -> Iterator[Target | VtiClassifier | LinkNextHop]:
        for table in self.routes.values():
            for target in table.values():
                if isinstance(target, WeightedTargets):
                    yield from target.targets
                else:
                    yield target


def selectors_of(policies: Iterable[Policy]) -> dict[int, list[ChildSelector]]:
    """Return the outbound policies of VTIs, by if_id, in the given order."""
    found: dict[int, list[ChildSelector]] = {}
    for policy in policies:
        if policy.direction == PolicyDir.OUT and policy.if_id and not matches_mark(policy):
            found.setdefault(policy.if_id, []).append(_child(policy))
    return found


def _child(policy: Policy) -> ChildSelector:
    """Return the destination, priority and target of a VTI's policy.

    Without a template it lets nothing pass: xfrmi_xmit2 finds no state and drops.
    """
    single = policy.action == PolicyAction.ALLOW and policy.type == PolicyType.MAIN and len(policy.templates) == 1
    widest, selector = widest_rule(policy.selector), policy.selector
    narrow = bool(
        selector.prefixlen_s or selector.proto or selector.sport_mask or selector.dport_mask or selector.ifindex
    )
    return ChildSelector(widest.dst, policy.priority, tunnel_keys_of_policy(policy)[0] if single else None, narrow)


def vti_route_targets(
    next_hops: NextHops, selectors: Selectors, tables: Set[TableId], vtis: Iterable[Vti] = ()
) -> VtiRouteTargets:
    """Return the routes that VPP should have, the longer prefixes first: they catch packets that must not follow the
    shorter.

    `tables` are VPP's tables that the service did not create. Others are not created for VTIs: only interfaces bring
    packets into a table. Packets to an address of `vtis` are dropped where they would follow one of these routes: the
    tunnel would bring them back.
    """
    routes: dict[int, dict[Prefix, RouteTarget]] = {}
    omitted: dict[Route, str] = {}
    missing_tables = set()
    found = vti_routes(next_hops, selectors)
    for place in sorted(found, key=lambda place: -place.prefix.length):
        route, table = found[place], (place.table, len(place.prefix.address) == 16)
        if place.table in TABLE_NUMBERS or table not in tables:
            missing_tables.add(table)
            omitted[place] = f"VPP has no table {place.table}"
        else:
            routes.setdefault(place.table, {})[place.prefix] = _route_target(route)
    lengths = {number: {prefix.length for prefix in table} for number, table in routes.items()}
    own: dict[int, dict[Prefix, RouteTarget]] = {}
    for vti in vtis:
        table_routes = routes.get(vti.table, {})
        for _, address, _ in vti.addresses:
            host = Prefix(address, 8 * len(address))
            wider = [length for length in lengths.get(vti.table, ()) if length < host.length]
            if host not in table_routes and any(host.shortened(length) in table_routes for length in wider):
                own.setdefault(vti.table, {})[host] = Action.DISCARD
    routes |= {number: hosts | routes[number] for number, hosts in own.items()}
    return VtiRouteTargets(routes, omitted, frozenset(missing_tables))


def _route_target(route: VtiRoute) -> RouteTarget:
    shares = tuple((Action.DISCARD if share.target is None else share.target, share.weight) for share in route)
    first = shares[0][0]
    return WeightedTargets(shares) if len(shares) > 1 or isinstance(first, LinkNextHop) else first
