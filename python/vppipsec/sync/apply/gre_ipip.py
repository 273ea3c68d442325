"""Keeps VPP's gre and ipip interfaces from sending in clear what outbound policies cover, and hands them to the groups whose SAs
are to protect them."""

from __future__ import annotations

from collections.abc import Sequence

from vppipsec.kernel.xfrm.sad_spd import GroupKey
from vppipsec.sync.actual.backoff import OUTBOUND, Refusals, refusal_key
from vppipsec.sync.actual.environment import Surroundings
from vppipsec.sync.actual.vpp_state import VppSide
from vppipsec.sync.desired.gre_ipip import Claims, claims_on
from vppipsec.sync.desired.outbound_policy import Outbound
from vppipsec.sync.journal import Journal, Source
from vppipsec.sync.plan import gre_ipip
from vppipsec.sync.work_queue import Todo
from vppipsec.vpp.api.client import VppClient
from vppipsec.vpp.api.ipsec import AddSa, DelSa, Protect, Unprotect
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.gre_ipip import MUTED, Overlay
from vppipsec.vpp.guard import GuardError, check_overlay
from vppipsec.vpp.state.tunnels import HeldTunnel


class Overlayer:
    """The overlays of one VPP: which of them are guarded, and by whose SAs. `refusals` are of what mutes them or lets them go."""

    def __init__(self, vpp: VppSide, surroundings: Surroundings, todo: Todo, journal: Journal) -> None:
        self.refusals = Refusals(OUTBOUND)
        self.claims = Claims({}, {})
        self._vpp = vpp
        self._surroundings = surroundings
        self._todo = todo
        self._journal = journal

    @property
    def settled(self) -> bool:
        """True when each guarded overlay is muted or protected by its group's SAs, and no other by ours."""
        return not self.refusals and not self._next() and not self._to_hand_over()

    def claim(self, policies: Sequence[Outbound]) -> None:
        """Find which overlays are guarded by outbound policies, which are in the kernel's order."""
        before, self.claims = self.claims, claims_on(self._surroundings.overlays, policies)
        for overlay in self.claims.guarded.keys() - before.guarded.keys():
            self._tell(overlay, "an outbound policy covers its packets: none leaves in clear")
        for overlay in before.guarded.keys() - self.claims.guarded.keys():
            self._tell(
                overlay, "no outbound policy covers its packets any more; VPP 26.06 sends none until it is made anew"
            )
        for key in self.claims.of_groups:
            self._vpp.state_of(key)  # it may protect one already
        self._todo.soil(self._surroundings.guard(self.claims.of_groups))

    async def hold(self, client: VppClient) -> None:
        """Mute what would send in clear, let go of what nobody guards, and hand the others over. Raises VppUnavailable."""
        self.refusals.let_due_be_tried()
        while True:
            for overlay, heir in self._to_hand_over():
                self._hand_over(overlay, heir)
            wanted = self._next()
            requests = [request for request in wanted if self._is_safe(request)]
            if not requests:
                break
            for request, reply in zip(requests, await client.run(requests), strict=True):
                if self._vpp.accepts(self.refusals, request, reply):
                    self._took(request)
        self.refusals.forget_all_but({refusal_key(request) for request in wanted}.__contains__)

    def _next(self) -> list[Request]:
        """Return what to send now, what was refused lately included."""
        held, guarded = self._vpp.overlays, self.claims.guarded
        unmuted = [overlay for overlay, key in guarded.items() if not self._is_held(held.get(overlay.sw_if_index), key)]
        surplus = [it.overlay for it in held.values() if it.overlay is not None and it.overlay not in guarded]
        return gre_ipip.next_requests(guarded, unmuted, surplus, self._vpp.mute)

    def _is_held(self, holder: HeldTunnel | None, key: GroupKey | None) -> bool:
        """Tell whether what protects an overlay is right: nobody's SA, or those of its group."""
        return holder is not None and (holder.protection == MUTED or holder is self._held_by(key))

    def _held_by(self, key: GroupKey | None) -> HeldTunnel | None:
        state = None if key is None else self._vpp.groups.get(key)
        return None if state is None else state.held

    def _to_hand_over(self) -> list[tuple[Overlay, HeldTunnel]]:
        """Return muted overlays that their group does not have yet, each with what the group holds."""
        found = []
        for overlay, key in self.claims.guarded.items():
            holder, heir = self._vpp.overlays.get(overlay.sw_if_index), self._held_by(key)
            muted = holder is not None and holder.protection == MUTED
            if muted and heir is not None and holder is not heir and heir.protection in (None, MUTED):
                found.append((overlay, heir))
        return found

    def _hand_over(self, overlay: Overlay, heir: HeldTunnel) -> None:
        if heir.overlay is not None:
            self._mute(heir.overlay)  # which is no longer its group's
        self._mute(overlay, heir)
        self._vpp.soil(heir)

    def _mute(self, overlay: Overlay, holder: HeldTunnel | None = None) -> None:
        """Note that an overlay is muted, and who may protect it."""
        holder = holder or HeldTunnel()
        self._vpp.let_go(overlay.sw_if_index)
        holder.overlay, holder.protection = overlay, MUTED
        self._vpp.overlays[overlay.sw_if_index] = holder

    def _took(self, request: Request) -> None:
        match request:
            case AddSa():
                self._vpp.mute = True
            case DelSa():
                self._vpp.mute = False
            case Unprotect(index):
                self._vpp.let_go(index)
            case Protect(index):
                self._mute(next(it for it in self.claims.guarded if it.sw_if_index == index))

    def _is_safe(self, request: Request) -> bool:
        if refusal_key(request) in self.refusals:
            return False
        try:
            there = {overlay.sw_if_index for overlay in self._surroundings.overlays}
            check_overlay(request, there, self._vpp.overlays.keys(), self._vpp.mute)
        except GuardError as error:
            self._vpp.withhold(self.refusals, request, error)
            return False
        return True

    def _tell(self, overlay: Overlay, what: str) -> None:
        self._journal.note(Source.VPP, f"{overlay.name}: {what}")
