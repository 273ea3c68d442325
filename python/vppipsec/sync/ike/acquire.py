"""Has an ACQUIRE raised where VPP drops packets for want of an SA, so that the IKE daemon brings their tunnel up.

The kernel raises one by itself when a packet meets a policy without an SA, but of what VPP drops it sees nothing. VPP counts what
meets a route: those of such a policy drop, and while there are any their counters are looked at. When one has risen the kernel
is told (XFRM_MSG_ACQUIRE), and hands on to the IKE daemon what it would have said itself.
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
"""How often VPP's counters are looked at, while there are groups that wait."""
ACQUIRE_REPEAT_S = 10.0
"""After so long packets that are still dropped raise another ACQUIRE of their group. The kernel, too, asks once for all policies
that want the same SAs, but again only when its larval SA has expired (net.core.xfrm_acq_expires): after 30 s, or 165 s where
strongSwan has made it as long as it tries. What an IKE daemon is at already it ignores, as strongSwan 5.9.8 does; where it has
given up, a peer that came back is tried sooner."""
MAX_ACQUIRES_PER_POLL = 10
"""ACQUIREs in `COUNTER_POLL_S`, so 40 a second: who sends to whatever destination there is shall not bury the IKE daemon.
Others wait.
"""
COUNTER_RETRY_S = 5.0
"""After so long counters that could not be read are tried again."""


def awaits_sa(tunnel: Tunnel, env: EnvironmentSnapshot) -> bool:
    """Tell whether VPP would carry what a group's policies are for, but the kernel has no SA to send it with."""
    local, remote = endpoints_of(tunnel.key, tunnel, env.addresses)
    if local is None or remote in env.unreachable or any(sa.saddr == local for sa in tunnel.sas.values()):
        return False
    return any(map(_is_outbound_allow, tunnel.policies.values()))


def policy_for(tunnel: Tunnel, prefix: Prefix) -> Policy | None:
    """Return the outbound policy of a group that a route of its is there for: of several the first; None where it has none."""
    found = list(filter(_is_outbound_allow, tunnel.policies.values()))
    fitting = [it for it in found if Prefix(it.selector.daddr, it.selector.prefixlen_d).covers(prefix)]
    return min(fitting or found, key=lambda policy: policy.priority, default=None)


def _is_outbound_allow(policy: Policy) -> bool:
    return policy.direction == PolicyDir.OUT and policy.action == PolicyAction.ALLOW


class Acquires:
    """Knows which groups wait for an SA, and asks for it when VPP drops packets of theirs."""

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
        """Take what is asked and told here.

        `acquire` raises an ACQUIRE (OSError, TimeoutError), `read_packets` reads counters by stats_index (VppError); `discarding`
        returns those of our routes that drop in VPP, each with its stats_index, `target_of` where a route is to lead.
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
        """Note what a group, perhaps an empty one, is now, and tell whether it waits for an SA."""
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
        """Note that VPP has the routes of all groups noted so far: counters of new ones are looked at now, not in a while."""
        if self._has_new:
            self._has_new = False
            self._poll_now.set()

    def clear(self) -> None:
        """Know of no group, as at first: all are noted anew."""
        self._waiting.clear()
        self._any_waiting.clear()
        self._journaled.clear()
        self._packets, self._due, self._acquired_at = {}, {}, {}

    async def run(self) -> None:
        """Look again and again while groups wait."""
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
        """Find out which groups VPP has dropped packets of since the last look. Raises VppError.

        At the first look at a route it is not known when its packets came: they raise nothing, the next ones do.
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
            if key not in self._journaled:  # once while it waits: else the journal would be full of a peer that is down
                self._journaled.add(key)
                self._journal.note_acquire(policy)

    def _note_problem(self, problem: str) -> None:
        if problem != self._problem:
            log.error("%s", problem)
            self._journal.note(JournalSource.VPP, problem)
        self._problem = problem
