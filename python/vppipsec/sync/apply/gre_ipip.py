"""Blocks gre and ipip interfaces that outbound policies cover, and assigns them to the tunnels that protect them."""

from __future__ import annotations

from collections.abc import Sequence

from vppipsec.kernel.xfrm.sad_spd import TunnelKey
from vppipsec.sync.actual.backoff import OUTBOUND_POLICIES, Refusals, refusal_key
from vppipsec.sync.actual.environment import Environment
from vppipsec.sync.actual.vpp_state import VppState
from vppipsec.sync.desired.gre_ipip import GreIpipClaims, gre_ipip_claims
from vppipsec.sync.desired.outbound_policy import OutboundPolicy
from vppipsec.sync.journal import Journal, JournalSource
from vppipsec.sync.plan import gre_ipip
from vppipsec.sync.work_queue import WorkQueue
from vppipsec.vpp.api.client import VppClient
from vppipsec.vpp.api.ipsec import SadEntryAdd, SadEntryDel, TunnelProtect, TunnelUnprotect
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.gre_ipip import BLOCK_PROTECTION, GreIpipInterface
from vppipsec.vpp.guard import GuardError, check_gre_ipip_request
from vppipsec.vpp.state.tunnels import ActualTunnel


class GreIpipReconciler:
    """The gre and ipip interfaces of one VPP: which must be protected, and by which tunnel.

    `refusals` are of requests that block interfaces or end their protection.
    """

    def __init__(self, vpp: VppState, environment: Environment, work_queue: WorkQueue, journal: Journal) -> None:
        self.refusals = Refusals(OUTBOUND_POLICIES)
        self.claims = GreIpipClaims({}, {})
        self._vpp = vpp
        self._environment = environment
        self._work_queue = work_queue
        self._journal = journal

    @property
    def settled(self) -> bool:
        """True when each interface that must be protected is blocked or has its tunnel's SAs, and others are released."""
        return not self.refusals and not self._next_requests() and not self._assignable()

    def update_claims(self, policies: Sequence[OutboundPolicy]) -> None:
        """Compute which interfaces outbound policies cover. `policies` are in the kernel's order."""
        before, self.claims = self.claims, gre_ipip_claims(self._environment.gre_ipip, policies)
        for interface in self.claims.must_encrypt.keys() - before.must_encrypt.keys():
            self._note(interface, "an outbound policy covers its packets: none leaves in clear")
        for interface in before.must_encrypt.keys() - self.claims.must_encrypt.keys():
            self._note(
                interface, "no outbound policy covers its packets any more; VPP 26.06 sends none until it is made anew"
            )
        for key in self.claims.by_tunnel:
            self._vpp.tunnel_state(key)  # it may already protect one
        self._work_queue.mark_dirty(self._environment.set_gre_ipip_of(self.claims.by_tunnel))

    async def reconcile(self, client: VppClient) -> None:
        """Block interfaces that would send unencrypted, release those that need no protection, and assign the others to
        tunnels.

        Raises VppUnavailable.
        """
        self.refusals.release_due()
        while True:
            for interface, assignee in self._assignable():
                self._assign(interface, assignee)
            wanted = self._next_requests()
            requests = [request for request in wanted if self._is_safe(request)]
            if not requests:
                break
            for request, reply in zip(requests, await client.run(requests), strict=True):
                if self._vpp.is_accepted(self.refusals, request, reply):
                    self._apply_accepted(request)
        self.refusals.retain_only({refusal_key(request) for request in wanted}.__contains__)

    def _next_requests(self) -> list[Request]:
        """Return what to send now, including what VPP refused lately."""
        actual, must_encrypt = self._vpp.gre_ipip, self.claims.must_encrypt
        unblocked = [
            interface
            for interface, key in must_encrypt.items()
            if not self._is_as_desired(actual.get(interface.sw_if_index), key)
        ]
        surplus = [it.gre_ipip for it in actual.values() if it.gre_ipip is not None and it.gre_ipip not in must_encrypt]
        return gre_ipip.gre_ipip_requests(must_encrypt, unblocked, surplus, self._vpp.has_block_sa)

    def _is_as_desired(self, current: ActualTunnel | None, key: TunnelKey | None) -> bool:
        """Return whether an interface is blocked or protected by its tunnel's SAs."""
        return current is not None and (current.protection == BLOCK_PROTECTION or current is self._actual_of(key))

    def _actual_of(self, key: TunnelKey | None) -> ActualTunnel | None:
        state = None if key is None else self._vpp.tunnels.get(key)
        return None if state is None else state.actual

    def _assignable(self) -> list[tuple[GreIpipInterface, ActualTunnel]]:
        """Return blocked interfaces that their tunnel does not have yet, each with the tunnel's actual state."""
        found = []
        for interface, key in self.claims.must_encrypt.items():
            current, assignee = self._vpp.gre_ipip.get(interface.sw_if_index), self._actual_of(key)
            is_blocked = current is not None and current.protection == BLOCK_PROTECTION
            if (
                is_blocked
                and assignee is not None
                and current is not assignee
                and assignee.protection in (None, BLOCK_PROTECTION)
            ):
                found.append((interface, assignee))
        return found

    def _assign(self, interface: GreIpipInterface, assignee: ActualTunnel) -> None:
        if assignee.gre_ipip is not None:
            self._note_blocked(assignee.gre_ipip)  # that interface no longer belongs to the tunnel
        self._note_blocked(interface, assignee)
        self._vpp.mark_owner_dirty(assignee)

    def _note_blocked(self, interface: GreIpipInterface, current: ActualTunnel | None = None) -> None:
        """Record that an interface is blocked, and which tunnel may protect it."""
        current = current or ActualTunnel()
        self._vpp.note_unprotected(interface.sw_if_index)
        current.gre_ipip, current.protection = interface, BLOCK_PROTECTION
        self._vpp.gre_ipip[interface.sw_if_index] = current

    def _apply_accepted(self, request: Request) -> None:
        match request:
            case SadEntryAdd():
                self._vpp.has_block_sa = True
            case SadEntryDel():
                self._vpp.has_block_sa = False
            case TunnelUnprotect(index):
                self._vpp.note_unprotected(index)
            case TunnelProtect(index):
                self._note_blocked(next(it for it in self.claims.must_encrypt if it.sw_if_index == index))

    def _is_safe(self, request: Request) -> bool:
        if refusal_key(request) in self.refusals:
            return False
        try:
            there = {interface.sw_if_index for interface in self._environment.gre_ipip}
            check_gre_ipip_request(request, there, self._vpp.gre_ipip.keys(), self._vpp.has_block_sa)
        except GuardError as error:
            self._vpp.note_withheld(self.refusals, request, error)
            return False
        return True

    def _note(self, interface: GreIpipInterface, what: str) -> None:
        self._journal.note(JournalSource.VPP, f"{interface.name}: {what}")
