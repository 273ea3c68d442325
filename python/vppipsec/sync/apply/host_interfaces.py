"""Sees to it that VPP encrypts what the router itself sends: says which tunnels have host interfaces, and tells the kernel."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

from vppipsec.kernel.hostpath.apply import HostError, HostWays
from vppipsec.kernel.xfrm.sad_spd import Group, GroupKey
from vppipsec.kernel.xfrm.values import PolicyDir
from vppipsec.sync.actual.environment import Surroundings
from vppipsec.sync.actual.vpp_state import GroupState, VppSide
from vppipsec.sync.actual.vtis import Vtis
from vppipsec.sync.desired.host_interfaces import (
    MOST,
    choose,
    host_ways,
    local_addresses,
    multicast_tables,
    senders,
    why_kernel_sends,
)
from vppipsec.sync.desired.outbound_policy import Outbound
from vppipsec.sync.desired.vti_routes import Table
from vppipsec.sync.journal import Journal, Source, count
from vppipsec.sync.work_queue import Todo
from vppipsec.vpp.api.linux_cp import PairItf
from vppipsec.vpp.types import HostItf, Route

log = logging.getLogger(__name__)

RETRY_S = 5.0
"""How long the kernel is left alone after it did not do as told, s."""


class HostKeeper:
    """What is wanted of host interfaces, and what the kernel was told of them.

    `local` are addresses that VPP is to take for the router's own, each in a table; `multicast` are tables in which it is to
    receive that of a link. `problem` says why the kernel does not send as it should, as a sentence; nothing where it does.
    """

    def __init__(
        self,
        vtis: Vtis,
        todo: Todo,
        journal: Journal,
        tell: Callable[[HostWays], None] | None,
        obeyed: Callable[[Collection[GroupKey]], Awaitable[None]],
    ) -> None:
        """`tell` brings the kernel to what is wanted, or raises HostError; it may block for a while. None: it is not told.

        `obeyed` is told of the groups for whose tunnels the kernel no longer sends itself.
        """
        self.local: frozenset[Route] = frozenset()
        self.multicast: frozenset[Table] = frozenset()
        self.problem = ""
        self._vtis = vtis
        self._todo = todo
        self._journal = journal
        self._tell = tell
        self._obeyed = obeyed
        self._policies: Sequence[Outbound] = ()
        self._paired: frozenset[GroupKey] = frozenset()
        self._is_connected = False
        self._of_others = ""  # what of `problem` does not concern policies without if_id alone
        self._found_by: object = None
        self._told_by: object = None
        self._told: Mapping[GroupKey, str] = {}
        self._heard: Mapping[GroupKey, HostItf] = {}  # as of when the kernel was last told, whatever it said to that
        self._hosts: Mapping[GroupKey, HostItf] = {}
        self._wake = asyncio.Event()

    def forget(self) -> None:
        """Tell the kernel all again at the next opportunity: its interfaces may be others, or somebody may have changed it."""
        self._told_by = None

    def begin_anew(self) -> None:
        """Take it that nothing is known of what is wanted in a VPP: until that is found, what there is stays."""
        self._found_by = None
        self._heard = {}
        self.forget()

    def is_paired(self, key: GroupKey, host: HostItf | None) -> bool:
        """Tell whether the tunnel of a group, which has `host`, is to have a host interface."""
        return host is not None if self._found_by is None else key in self._paired

    def may_begin(self, state: GroupState) -> bool:
        """Tell whether VPP may begin to send into a tunnel: where it has to be told, not before the kernel was told not to."""
        key, host = state.desired.key, state.held.host
        is_told = self._tell is not None and self._found_by is not None and key in self._paired
        if not is_told or state.held.protection is not None:
            return True
        has_none = host is None and any(isinstance(refused, PairItf) for refused in state.refusals.every)
        return has_none or (host is not None and self._heard.get(key) == host)

    def find(self, policies: Sequence[Outbound], changes: int, vpp: VppSide, surroundings: Surroundings) -> None:
        """Find which tunnels are to have one. `policies` are the outbound ones in the kernel's order, new where `changes` is.

        Without a linux-cp pair the kernel has no part in what VPP forwards, and none of them is of use.
        """
        self._is_connected = bool(surroundings.interfaces.taps)
        by = (changes, self._vtis.changes, surroundings.known, surroundings.tables, self._is_connected, vpp)
        if by == self._found_by:
            return
        self._found_by, self._policies = by, policies
        paired, local, multicast = frozenset[GroupKey](), frozenset[Route](), frozenset[Table]()
        if self._is_connected:
            held = {key for key, state in vpp.groups.items() if state.held.host is not None}
            paired = choose(senders(policies, self._vtis.own(), self._vtis.link, held), held)
            local = local_addresses(policies, paired, surroundings.unknown(self._vtis.own_hosts()), self._vtis.link)
            multicast = multicast_tables(policies, paired, self._vtis.link) & surroundings.tables
        self._todo.soil(paired ^ self._paired)
        self._paired, self.local, self.multicast = paired, local, multicast

    def look(self, groups: Mapping[GroupKey, GroupState]) -> None:
        """See which host interfaces there are by now; the kernel is told soon where that is news."""
        if self._found_by is None:
            return
        states = {key: groups[key] for key in self._paired if key in groups}
        self._hosts = {key: host for key, state in states.items() if (host := state.held.host) is not None}
        if not self.settled:
            self._wake.set()

    @property
    def settled(self) -> bool:
        """Whether the kernel was told what is wanted now, whatever it said to that."""
        return self._tell is None or self._found_by is None or self._told_by == (self._found_by, self._hosts)

    async def follow(self) -> None:
        """Have the kernel send what it has for these tunnels to their host interfaces, again and again until cancelled.

        It may be slow, so nobody waits for it.
        """
        while self._tell is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_S if self.problem else None):
                    await self._wake.wait()
            self._wake.clear()
            if not self.settled or self.problem:
                await self._tell_kernel(self._tell)
                self._todo.wake.set()  # whoever waits for all to be settled is told

    async def _tell_kernel(self, tell: Callable[[HostWays], None]) -> None:
        hosts, by = self._hosts, (self._found_by, self._hosts)
        names = {key: host.name for key, host in hosts.items()}
        problem = of_others = ""
        try:
            wanted = host_ways(self._policies, names, self._vtis.own(), self._vtis.link)
            if hosts or self._told or self._is_connected:  # else no earlier run can have told it anything
                await asyncio.to_thread(tell, wanted)
        except HostError as error:
            problem, of_others = str(error), error.of_others
        except Exception as error:  # whatever it is: the tunnels go on
            problem = of_others = f"a mistake in vpp-ipsecd: {type(error).__name__}"
        if problem and problem != self.problem and hosts:
            log.error("the router's own packets: %s", problem)
            self._journal.note(Source.KERNEL, f"does not send its own packets as it should: {problem}")
        if not problem and names != self._told:
            told = f"sends its own packets for {count(len(names), 'tunnel')} to host interfaces"
            self._journal.note(Source.KERNEL, told)
        self._told = self._told if problem else names
        self.problem, self._of_others = (problem, of_others) if hosts else ("", "")
        new = {key for key, host in hosts.items() if self._heard.get(key) != host}
        await self._obeyed({key for key in new if not self._why_not(key)})
        self._heard = hosts
        self._todo.soil(new)
        self._told_by = by

    def say(self, group: Group, state: GroupState | None) -> str:
        """Say who encrypts what the router itself sends into a tunnel; nothing where it can send nothing there."""
        policies = [it for it in group.policies.values() if it.direction == PolicyDir.OUT and it.templates]
        if not policies:
            return ""
        own = self._vtis.own()
        reasons = [why_kernel_sends(policy, own, self._vtis.link) for policy in policies]
        if all(reasons):
            return f"the kernel: {reasons[0]}"
        if not self._is_connected:
            return "the kernel: no linux-cp pair connects it with VPP"
        if group.key not in self._paired:
            return f"the kernel: {MOST} other tunnels have host interfaces"
        if state is not None and state.desired.tunnel is None:
            return "the kernel: VPP does not carry the tunnel"
        if state is None or state.held.host is None:
            return "VPP, once it has a host interface"
        why = next(filter(None, reasons), "")
        rest = f"; some of it the kernel: {why}" if why else ""
        problem = self._why_not(group.key)
        return f"the kernel: {problem}" if problem else f"VPP, over {state.held.host.name}{rest}"

    def _why_not(self, key: GroupKey) -> str:
        """Return why the kernel does not send a group's packets as it was told, as far as that is known."""
        return self._of_others if key.if_id else self.problem
