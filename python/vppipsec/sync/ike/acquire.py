"""Raises an ACQUIRE where VPP drops packets because there is no SA, so that the IKE daemon sets up their tunnel.

The kernel raises one itself when a packet matches a policy without an SA, but it does not see packets that VPP drops.
VPP counts packets by route. The routes of such a policy drop, and their counters are polled while there are any. When
one has risen, the service sends XFRM_MSG_ACQUIRE to the kernel. The kernel passes it on to the IKE daemon like one of
its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence

from vppipsec.kernel.xfrm.sad_spd import KernelModel, Tunnel, TunnelKey
from vppipsec.kernel.xfrm.values import Policy, PolicyAction, PolicyDir
from vppipsec.sync.desired.environment import EnvironmentSnapshot
from vppipsec.sync.desired.routes import RouteTarget, WeightedTargets
from vppipsec.sync.desired.tunnel import endpoints_of
from vppipsec.sync.journal import Counters, Journal, JournalSource
from vppipsec.vpp.api.errors import VppError
from vppipsec.vpp.types import Prefix, Route

log = logging.getLogger(__name__)

COUNTER_POLL_S = 0.25
"""Interval at which VPP's counters are read, while tunnels wait."""
ACQUIRE_REPEAT_S = 10.0
"""Interval of ACQUIREs for one tunnel, while its packets are still dropped.

The kernel, too, asks once for all policies that need the same SAs. It asks again only when its larval SA has expired
(net.core.xfrm_acq_expires): after 30 s, or 165 s where strongSwan has set that to the duration of its tries. An IKE
daemon ignores an ACQUIRE for a negotiation in progress, as strongSwan 5.9.8 does. Where it has given up, it reaches a
peer that came back sooner.
"""
MAX_ACQUIRES_PER_POLL = 10
"""ACQUIREs within `COUNTER_POLL_S`, so 40 a second; others wait.

A sender to arbitrary destinations must not overload the IKE daemon.
"""
COUNTER_RETRY_S = 5.0
"""Delay before counters that could not be read are read again."""


def awaits_sa(tunnel: Tunnel, env: EnvironmentSnapshot) -> bool:
    """Return whether VPP would carry a tunnel's packets but the kernel has no outbound SA."""
    local, remote = endpoints_of(tunnel.key, tunnel, env.addresses)
    if local is None or remote in env.unreachable or any(sa.saddr == local for sa in tunnel.sas.values()):
        return False
    return any(map(_is_outbound_allow, tunnel.policies.values()))


def policy_for(tunnel: Tunnel, prefix: Prefix) -> Policy | None:
    """Return the outbound policy of a tunnel that explains its route; the first of several, None where there is none."""
    found = list(filter(_is_outbound_allow, tunnel.policies.values()))
    fitting = [it for it in found if Prefix(it.selector.daddr, it.selector.prefixlen_d).covers(prefix)]
    return min(fitting or found, key=lambda policy: policy.priority, default=None)


def _is_outbound_allow(policy: Policy) -> bool:
    return policy.direction == PolicyDir.OUT and policy.action == PolicyAction.ALLOW


class Acquires:
    """Knows which tunnels wait for an SA, and asks for it when VPP drops their packets."""

    def __init__(
        self,
        model: KernelModel,
        journal: Journal,
        counters: Counters,
        acquire: Callable[[Policy], Awaitable[None]],
        read_packets: Callable[[Sequence[int]], Awaitable[Sequence[int]]],
        discarding: Callable[[], Sequence[tuple[Route, int]]],
        target_of: Callable[[Route], RouteTarget | None],
    ) -> None:
        """`acquire` raises an ACQUIRE (OSError, TimeoutError); `read_packets` reads counters by stats_index (VppError).

        `discarding` returns the service's routes that drop in VPP, each with its stats_index. `target_of` returns a
        route's target.
        """
        self._model = model
        self._journal = journal
        self._counters = counters
        self._acquire = acquire
        self._read_packets = read_packets
        self._discarding = discarding
        self._target_of = target_of
        self._waiting: set[TunnelKey] = set()
        self._any_waiting = asyncio.Event()
        self._has_new = False
        self._poll_now = asyncio.Event()
        self._packets: dict[tuple[Route, int], int] = {}
        self._due: dict[TunnelKey, Route] = {}
        self._acquired_at: dict[TunnelKey, float] = {}
        self._next_at = 0.0
        self._journaled: set[TunnelKey] = set()
        self._problem = ""

    def update(self, tunnel: Tunnel, env: EnvironmentSnapshot) -> bool:
        """Record the present state of a tunnel, which may be empty. Return whether it waits for an SA."""
        key = tunnel.key
        if awaits_sa(tunnel, env):
            self._has_new |= key not in self._waiting
            self._waiting.add(key)
            self._any_waiting.set()
            return True
        if key in self._waiting:
            self._waiting.remove(key)
            self._due.pop(key, None)
            self._acquired_at.pop(key, None)
            self._journaled.discard(key)
            if not self._waiting:
                self.clear()
        return False

    def note_routes_applied(self) -> None:
        """Record that VPP has the routes of all recorded tunnels. Counters of new routes are then read at once."""
        if self._has_new:
            self._has_new = False
            self._poll_now.set()

    def clear(self) -> None:
        """Forget all tunnels; they are recorded again later."""
        self._waiting.clear()
        self._any_waiting.clear()
        self._journaled.clear()
        self._packets, self._due, self._acquired_at = {}, {}, {}

    async def run(self) -> None:
        """Poll while tunnels wait."""
        while True:
            await self._any_waiting.wait()
            pause_s = COUNTER_POLL_S
            try:
                await self._poll()
                self._problem = ""
            except VppError as error:
                pause_s = COUNTER_RETRY_S
                self._note_problem(f"packets that wait for a tunnel cannot be noticed: {error}")
            await self._send_acquires()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._poll_now.wait()
            self._poll_now.clear()

    async def _poll(self) -> None:
        """Find out for which tunnels VPP has dropped packets since the last poll. Raises VppError.

        The first poll of a route cannot show when its packets came. So only later packets raise an ACQUIRE.
        """
        routes = self._discarding()
        packets = await self._read_packets([stats_index for _, stats_index in routes])
        if not self._waiting:
            return
        before, self._packets = self._packets, dict(zip(routes, packets, strict=True))
        for route, number in self._packets.items():
            if number > before.get(route, number):
                self._note_discarded(route[0])

    def _note_discarded(self, route: Route) -> None:
        now, route_target = asyncio.get_running_loop().time(), self._target_of(route)
        for target in route_target.targets if isinstance(route_target, WeightedTargets) else [route_target]:
            if isinstance(target, TunnelKey) and target in self._waiting:
                acquired_at = self._acquired_at.get(target)
                if acquired_at is None or now - acquired_at >= ACQUIRE_REPEAT_S:
                    self._due.setdefault(target, route)

    async def _send_acquires(self) -> None:
        """Raise the ACQUIREs that are due, but not too many at once."""
        now = asyncio.get_running_loop().time()
        if now < self._next_at:
            return
        self._next_at = now + COUNTER_POLL_S
        for key in list(self._due)[:MAX_ACQUIRES_PER_POLL]:
            route, tunnel = self._due.pop(key, None), self._model.tunnels.get(key)
            policy = None if tunnel is None or route is None else policy_for(tunnel, route.prefix)
            if (
                tunnel is None
                or policy is None
                or any(sa.saddr == policy.templates[0].saddr for sa in tunnel.sas.values())
            ):
                continue  # its SAs came just now
            self._acquired_at[key] = now
            try:
                await self._acquire(policy)
            except (OSError, TimeoutError) as error:
                log.warning("the IKE daemon cannot be asked for an SA: %s", error)
                continue
            self._counters.acquires += 1
            if key not in self._journaled:  # once while it waits: a peer that is down would fill the journal
                self._journaled.add(key)
                self._journal.note_acquire(policy)

    def _note_problem(self, problem: str) -> None:
        if problem != self._problem:
            log.error("%s", problem)
            self._journal.note(JournalSource.VPP, problem)
        self._problem = problem
