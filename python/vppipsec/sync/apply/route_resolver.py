"""Converts route targets into paths over VPP's present interfaces, and paths back into targets."""

from __future__ import annotations

from collections.abc import Iterable

from vppipsec.sync.actual.environment import Environment
from vppipsec.sync.actual.vpp_state import NO_TUNNEL, VppState
from vppipsec.sync.desired.policy_layers import Action, KernelTap, LinkNextHop, Target, VtiClassifier
from vppipsec.sync.desired.routes import RouteTarget, WeightedTargets
from vppipsec.vpp.types import INTERFACE_RX, LOCAL_INDEX, NO_INDEX, Path, Paths, interfaces_of, weighted_paths


class RouteResolver:
    """Converts targets and paths for one VPP. `ready_vtis` are the VTIs, by if_id, with a classifier ready for routes."""

    def __init__(self, vpp: VppState, environment: Environment) -> None:
        self.ready_vtis: frozenset[int] = frozenset()
        self._vpp = vpp
        self._environment = environment

    def paths_of(self, target: RouteTarget) -> Paths:
        """Return the paths that a route to a target should have now."""
        if not isinstance(target, WeightedTargets):
            return self._index_of(target)
        if not self.is_ready(target):
            return NO_INDEX
        return weighted_paths(self._path_to(share, weight) for share, weight in target.shares)

    def is_ready(self, target: RouteTarget) -> bool:
        """Return whether the classifiers that a route should lead to are ready."""
        shares = target.targets if isinstance(target, WeightedTargets) else (target,)
        return all(share.if_id in self.ready_vtis for share in shares if isinstance(share, VtiClassifier))

    def share_indexes(self, several: Iterable[Paths]) -> set[int]:
        """Return the interfaces of these paths that a share may use."""
        vpp, links = self._vpp, {*self._environment.interfaces.links.values()}
        received = {INTERFACE_RX + index for index in vpp.classifiers.if_ids}
        found = {index for paths in several for index in interfaces_of(paths)}
        return {index for index in found if index in vpp.tunnel_of_interface or index in received or index in links}

    def target_of_index(self, sw_if_index: int) -> Target | VtiClassifier:
        """Return the target of a route in VPP by its interface."""
        if sw_if_index >= INTERFACE_RX:
            return VtiClassifier(self._vpp.classifiers.if_ids.get(sw_if_index - INTERFACE_RX, 0))
        if sw_if_index in (NO_INDEX, LOCAL_INDEX):
            return Action.DISCARD if sw_if_index == NO_INDEX else Action.LOCAL
        if sw_if_index in self._environment.interfaces.macs:
            return KernelTap(sw_if_index)
        return self._vpp.tunnel_of_interface.get(sw_if_index, NO_TUNNEL)

    def target_of_paths(self, paths: Paths) -> RouteTarget:
        """Return the target of a route in VPP by its paths, of which there may be several."""
        if isinstance(paths, int):
            return self.target_of_index(paths)
        return WeightedTargets(tuple((self._target_of_path(path), path.weight) for path in paths))

    def _target_of_path(self, path: Path) -> Target | VtiClassifier | LinkNextHop:
        links = self._environment.interfaces.links
        next_hops = (
            LinkNextHop(link, path.next_hop or None) for link, index in links.items() if index == path.sw_if_index
        )
        return next(next_hops, None) or self.target_of_index(path.sw_if_index)

    def _path_to(self, share: Target | VtiClassifier | LinkNextHop, weight: int) -> Path:
        if isinstance(share, LinkNextHop):
            link = self._environment.interfaces.links.get(share.ifindex, NO_INDEX)
            return Path(link, weight, share.gateway or b"")
        return Path(self._index_of(share), weight)

    def _index_of(self, target: Target | VtiClassifier) -> int:
        """Return the interface of a target's tunnel, or the kernel's tap; NO_INDEX where the packets are dropped.

        LOCAL_INDEX stands for the router itself. INTERFACE_RX is added to the index of a classifier.
        """
        if isinstance(target, VtiClassifier):
            classifier = self._vpp.classifiers.index(target.if_id) if target.if_id in self.ready_vtis else None
            return NO_INDEX if classifier is None else INTERFACE_RX + classifier
        if target is Action.LOCAL:
            return LOCAL_INDEX
        if isinstance(target, KernelTap):
            return target.sw_if_index if target.sw_if_index in self._environment.interfaces.macs else NO_INDEX
        state = None if isinstance(target, Action) else self._vpp.tunnels.get(target)
        if (
            state is None
            or state.actual.sw_if_index is None
            or (state.env is not None and state.desired.tunnel is None)
        ):
            return NO_INDEX
        return state.actual.sw_if_index
