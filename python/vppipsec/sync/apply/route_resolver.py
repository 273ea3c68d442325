"""Where in VPP a route of ours leads: from what it is for to interfaces, as they are now, and back."""

from __future__ import annotations

from collections.abc import Iterable

from vppipsec.sync.actual.environment import Surroundings
from vppipsec.sync.actual.vpp_state import NOBODY, VppSide
from vppipsec.sync.desired.policy_layers import Beside, Fixed, Handover, Junction, Target
from vppipsec.sync.desired.routes import Aim, Split
from vppipsec.vpp.types import FOR_US, NO_INDEX, RECEIVED, Hop, Lead, interfaces_of, shared


class Leading:
    """Tells where routes are to lead in one VPP. `ready` are the VTIs, by if_id, whose junctions may be led to."""

    def __init__(self, vpp: VppSide, surroundings: Surroundings) -> None:
        self.ready: frozenset[int] = frozenset()
        self._vpp = vpp
        self._surroundings = surroundings

    def lead_of(self, target: Aim) -> Lead:
        """Return where a route to a target is to lead now."""
        if not isinstance(target, Split):
            return self._index_of(target)
        if not self.may_lead(target):
            return NO_INDEX
        return shared(self._hop_of(share, weight) for share, weight in target.shares)

    def may_lead(self, target: Aim) -> bool:
        """Tell whether the junctions that a route is to lead to are ready for it."""
        shares = target.targets if isinstance(target, Split) else (target,)
        return all(share.if_id in self.ready for share in shares if isinstance(share, Junction))

    def ways(self, leads: Iterable[Lead]) -> set[int]:
        """Return those of the ways of routes that a share may go."""
        vpp, links = self._vpp, {*self._surroundings.interfaces.links.values()}
        received = {RECEIVED + index for index in vpp.junctions.indexes}
        found = {way for lead in leads for way in interfaces_of(lead)}
        return {way for way in found if way in vpp.owner_of or way in received or way in links}

    def target_into(self, sw_if_index: int) -> Target | Junction:
        """Return what a route is for that VPP has, by where it leads."""
        if sw_if_index >= RECEIVED:
            return Junction(self._vpp.junctions.indexes.get(sw_if_index - RECEIVED, 0))
        if sw_if_index in (NO_INDEX, FOR_US):
            return Fixed.DROP if sw_if_index == NO_INDEX else Fixed.ROUTER
        if sw_if_index in self._surroundings.interfaces.macs:
            return Handover(sw_if_index)
        return self._vpp.owner_of.get(sw_if_index, NOBODY)

    def aim_of(self, lead: Lead) -> Aim:
        """Return likewise what a route is for that may have several shares."""
        if isinstance(lead, int):
            return self.target_into(lead)
        return Split(tuple((self._share_of(hop), hop.weight) for hop in lead))

    def _share_of(self, hop: Hop) -> Target | Junction | Beside:
        links = self._surroundings.interfaces.links
        beside = (Beside(link, hop.next_hop or None) for link, index in links.items() if index == hop.sw_if_index)
        return next(beside, None) or self.target_into(hop.sw_if_index)

    def _hop_of(self, share: Target | Junction | Beside, weight: int) -> Hop:
        if isinstance(share, Beside):
            link = self._surroundings.interfaces.links.get(share.ifindex, NO_INDEX)
            return Hop(link, weight, share.gateway or b"")
        return Hop(self._index_of(share), weight)

    def _index_of(self, target: Target | Junction) -> int:
        """Return the interface of a target's tunnel, or the kernel's tap, NO_INDEX where packets for it are dropped.

        FOR_US stands for the router itself; RECEIVED is added to a junction's.
        """
        if isinstance(target, Junction):
            junction = self._vpp.junctions.index(target.if_id) if target.if_id in self.ready else None
            return NO_INDEX if junction is None else RECEIVED + junction
        if target is Fixed.ROUTER:
            return FOR_US
        if isinstance(target, Handover):
            return target.sw_if_index if target.sw_if_index in self._surroundings.interfaces.macs else NO_INDEX
        state = None if isinstance(target, Fixed) else self._vpp.groups.get(target)
        if state is None or state.held.sw_if_index is None or (state.env is not None and state.desired.tunnel is None):
            return NO_INDEX
        return state.held.sw_if_index
