"""Makes VPP encrypt the router's own packets: selects tunnels for host interfaces, and redirects packets in the kernel."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

from vppipsec.kernel.hostpath.apply import HostError, HostRedirects
from vppipsec.kernel.xfrm.sad_spd import Tunnel, TunnelKey
from vppipsec.kernel.xfrm.values import PolicyDir
from vppipsec.sync.actual.environment import Environment
from vppipsec.sync.actual.vpp_state import TunnelState, VppState
from vppipsec.sync.actual.vtis import Vtis
from vppipsec.sync.desired.host_interfaces import (
    MAX_HOST_INTERFACES,
    choose_host_interfaces,
    host_interface_candidates,
    host_redirects,
    local_addresses,
    multicast_tables,
    why_kernel_sends,
)
from vppipsec.sync.desired.outbound_policy import OutboundPolicy
from vppipsec.sync.desired.vti_routes import TableId
from vppipsec.sync.journal import Journal, JournalSource, count_text
from vppipsec.sync.work_queue import WorkQueue
from vppipsec.vpp.api.linux_cp import LcpPairAddDel
from vppipsec.vpp.types import HostInterface, Route

log = logging.getLogger(__name__)

HOST_RETRY_S = 5.0
"""Delay before the kernel is configured again after a failure, s."""


class HostInterfaceReconciler:
    """The desired host interfaces, and the redirects that the kernel has for them.

    `local_addresses` are addresses that VPP should treat as the router's own, each in a table. `multicast_tables` are
    tables in which VPP should receive link multicast. `problem` says why the kernel does not send as it should, as a
    sentence; empty where it does.
    """

    def __init__(
        self,
        vtis: Vtis,
        work_queue: WorkQueue,
        journal: Journal,
        apply: Callable[[HostRedirects], None] | None,
        on_applied: Callable[[Collection[TunnelKey]], Awaitable[None]],
    ) -> None:
        """`apply` configures the kernel, or raises HostError; it may block for a while. With None the kernel is not
        configured.

        `on_applied` gets the tunnels for which the kernel no longer sends itself.
        """
        self.local_addresses: frozenset[Route] = frozenset()
        self.multicast_tables: frozenset[TableId] = frozenset()
        self.problem = ""
        self._vtis = vtis
        self._work_queue = work_queue
        self._journal = journal
        self._apply = apply
        self._on_applied = on_applied
        self._policies: Sequence[OutboundPolicy] = ()
        self._chosen: frozenset[TunnelKey] = frozenset()
        self._is_connected = False
        self._other_problem = ""  # the part of `problem` that does not concern only policies without if_id
        self._computed_from: object = None
        self._applied_inputs: object = None
        self._applied: Mapping[TunnelKey, str] = {}
        # as of the last attempt to configure the kernel, successful or not
        self._confirmed: Mapping[TunnelKey, HostInterface] = {}
        self._hosts: Mapping[TunnelKey, HostInterface] = {}
        self._wake = asyncio.Event()

    def invalidate(self) -> None:
        """Configure the kernel again at the next opportunity: its interfaces or its redirects may have changed."""
        self._applied_inputs = None

    def reset(self) -> None:
        """Forget the desired state for a VPP. Until it is computed again, existing host interfaces stay."""
        self._computed_from = None
        self._confirmed = {}
        self.invalidate()

    def wants_host_interface(self, key: TunnelKey, host: HostInterface | None) -> bool:
        """Return whether a tunnel, which now has `host`, should have a host interface."""
        return host is not None if self._computed_from is None else key in self._chosen

    def may_protect(self, state: TunnelState) -> bool:
        """Return whether VPP may start to send into a tunnel: not before the kernel has stopped to send for it."""
        key, host = state.desired.key, state.actual.host
        needs_kernel = self._apply is not None and self._computed_from is not None and key in self._chosen
        if not needs_kernel or state.actual.protection is not None:
            return True
        has_none = host is None and any(isinstance(refused, LcpPairAddDel) for refused in state.refusals.all)
        return has_none or (host is not None and self._confirmed.get(key) == host)

    def compute(
        self, policies: Sequence[OutboundPolicy], changes: int, vpp: VppState, environment: Environment
    ) -> None:
        """Compute which tunnels should have a host interface.

        `policies` are the outbound ones in the kernel's order; a new value of `changes` means that they changed.
        Without a linux-cp pair the kernel exchanges no packets with VPP, and no tunnel gets a host interface.
        """
        self._is_connected = bool(environment.interfaces.taps)
        inputs = (
            changes,
            self._vtis.changes,
            environment.interface_addresses,
            environment.tables,
            self._is_connected,
            vpp,
        )
        if inputs == self._computed_from:
            return
        self._computed_from, self._policies = inputs, policies
        chosen, addresses, tables = frozenset[TunnelKey](), frozenset[Route](), frozenset[TableId]()
        if self._is_connected:
            actual = {key for key, state in vpp.tunnels.items() if state.actual.host is not None}
            chosen = choose_host_interfaces(
                host_interface_candidates(policies, self._vtis.own_addresses(), self._vtis.link, actual), actual
            )
            addresses = local_addresses(
                policies, chosen, environment.unknown_addresses(self._vtis.own_host_routes()), self._vtis.link
            )
            tables = multicast_tables(policies, chosen, self._vtis.link) & environment.tables
        self._work_queue.mark_dirty(chosen ^ self._chosen)
        self._chosen, self.local_addresses, self.multicast_tables = chosen, addresses, tables

    def update(self, tunnels: Mapping[TunnelKey, TunnelState]) -> None:
        """Update which host interfaces exist. Where that changes, the kernel is configured soon."""
        if self._computed_from is None:
            return
        states = {key: tunnels[key] for key in self._chosen if key in tunnels}
        self._hosts = {key: host for key, state in states.items() if (host := state.actual.host) is not None}
        if not self.settled:
            self._wake.set()

    @property
    def settled(self) -> bool:
        """Whether the kernel was last configured for the present state, successfully or not."""
        return (
            self._apply is None
            or self._computed_from is None
            or self._applied_inputs == (self._computed_from, self._hosts)
        )

    async def run(self) -> None:
        """Make the kernel send its packets for these tunnels to their host interfaces, again and again until cancelled.

        That may be slow, so nothing waits for it.
        """
        while self._apply is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HOST_RETRY_S if self.problem else None):
                    await self._wake.wait()
            self._wake.clear()
            if not self.settled or self.problem:
                await self._apply_to_kernel(self._apply)
                self._work_queue.wake.set()  # wake those who wait for everything to be settled

    async def _apply_to_kernel(self, apply: Callable[[HostRedirects], None]) -> None:
        hosts, inputs = self._hosts, (self._computed_from, self._hosts)
        names = {key: host.name for key, host in hosts.items()}
        problem = other_problem = ""
        try:
            wanted = host_redirects(self._policies, names, self._vtis.own_addresses(), self._vtis.link)
            if hosts or self._applied or self._is_connected:  # else no earlier run can have configured it
                await asyncio.to_thread(apply, wanted)
        except HostError as error:
            problem, other_problem = str(error), error.other_problem
        except Exception as error:  # whatever it is: the tunnels go on
            problem = other_problem = f"a mistake in vpp-ipsecd: {type(error).__name__}"
        if problem and problem != self.problem and hosts:
            log.error("the router's own packets: %s", problem)
            self._journal.note(JournalSource.KERNEL, f"does not send its own packets as it should: {problem}")
        if not problem and names != self._applied:
            line = f"sends its own packets for {count_text(len(names), 'tunnel')} to host interfaces"
            self._journal.note(JournalSource.KERNEL, line)
        self._applied = self._applied if problem else names
        self.problem, self._other_problem = (problem, other_problem) if hosts else ("", "")
        new = {key for key, host in hosts.items() if self._confirmed.get(key) != host}
        await self._on_applied({key for key in new if not self._problem_of(key)})
        self._confirmed = hosts
        self._work_queue.mark_dirty(new)
        self._applied_inputs = inputs

    def own_packets_text(self, tunnel: Tunnel, state: TunnelState | None) -> str:
        """Return who encrypts the router's own packets into a tunnel; empty where there can be none."""
        policies = [it for it in tunnel.policies.values() if it.direction == PolicyDir.OUT and it.templates]
        if not policies:
            return ""
        own = self._vtis.own_addresses()
        reasons = [why_kernel_sends(policy, own, self._vtis.link) for policy in policies]
        if all(reasons):
            return f"the kernel: {reasons[0]}"
        if not self._is_connected:
            return "the kernel: no linux-cp pair connects it with VPP"
        if tunnel.key not in self._chosen:
            return f"the kernel: {MAX_HOST_INTERFACES} other tunnels have host interfaces"
        if state is not None and state.desired.tunnel is None:
            return "the kernel: VPP does not carry the tunnel"
        if state is None or state.actual.host is None:
            return "VPP, once it has a host interface"
        why = next(filter(None, reasons), "")
        rest = f"; some of it the kernel: {why}" if why else ""
        problem = self._problem_of(tunnel.key)
        return f"the kernel: {problem}" if problem else f"VPP, over {state.actual.host.name}{rest}"

    def _problem_of(self, key: TunnelKey) -> str:
        """Return why the kernel does not send a tunnel's packets as configured, as far as that is known."""
        return self._other_problem if key.if_id else self.problem
