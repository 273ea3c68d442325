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

from vppipsec.kernel.xfrm.sad_spd import Group, GroupKey, KernelModel
from vppipsec.kernel.xfrm.values import Policy, PolicyAction, PolicyDir
from vppipsec.sync.desired.environment import Environment
from vppipsec.sync.desired.routes import Aim, Split
from vppipsec.sync.desired.tunnel import ends_of
from vppipsec.sync.journal import Counters, Journal, Source
from vppipsec.vpp.api.errors import VppError
from vppipsec.vpp.types import Prefix, Route

log = logging.getLogger(__name__)

LOOK_S = 0.25
"""How often VPP's counters are looked at, while there are groups that wait."""
AGAIN_S = 10.0
"""After so long packets that are still dropped raise another ACQUIRE of their group. The kernel, too, asks once for all policies
that want the same SAs, but again only when its larval SA has expired (net.core.xfrm_acq_expires): after 30 s, or 165 s where
strongSwan has made it as long as it tries. What an IKE daemon is at already it ignores, as strongSwan 5.9.8 does; where it has
given up, a peer that came back is tried sooner."""
MOST_AT_ONCE = 10
"""ACQUIREs in `LOOK_S`, so 40 a second: who sends to whatever destination there is shall not bury the IKE daemon. Others wait."""
RETRY_S = 5.0
"""After so long counters that could not be read are tried again."""


def awaits_sa(group: Group, env: Environment) -> bool:
    """Tell whether VPP would carry what a group's policies are for, but the kernel has no SA to send it with."""
    local, remote = ends_of(group.key, group, env.addresses)
    if local is None or remote in env.unreachable or any(sa.saddr == local for sa in group.sas.values()):
        return False
    return any(map(_encrypts, group.policies.values()))


def policy_for(group: Group, prefix: Prefix) -> Policy | None:
    """Return the outbound policy of a group that a route of its is there for: of several the first; None where it has none."""
    found = list(filter(_encrypts, group.policies.values()))
    fitting = [it for it in found if Prefix(it.selector.daddr, it.selector.prefixlen_d).covers(prefix)]
    return min(fitting or found, key=lambda policy: policy.priority, default=None)


def _encrypts(policy: Policy) -> bool:
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
        dropping: Callable[[], Sequence[tuple[Route, int]]],
        owner: Callable[[Route], Aim | None],
    ) -> None:
        """Take what is asked and told here.

        `acquire` raises an ACQUIRE (OSError, TimeoutError), `read_packets` reads counters by stats_index (VppError); `dropping`
        returns those of our routes that drop in VPP, each with its stats_index, `owner` where a route is to lead.
        """
        self._model = model
        self._journal = journal
        self._counters = counters
        self._acquire = acquire
        self._read_packets = read_packets
        self._dropping = dropping
        self._owner = owner
        self._waiting: set[GroupKey] = set()
        self._some_wait = asyncio.Event()
        self._is_new = False
        self._look_now = asyncio.Event()
        self._packets: dict[tuple[Route, int], int] = {}
        self._due: dict[GroupKey, Route] = {}
        self._asked_at: dict[GroupKey, float] = {}
        self._next_at = 0.0
        self._told: set[GroupKey] = set()
        self._problem = ""

    def note(self, group: Group, env: Environment) -> bool:
        """Note what a group, perhaps an empty one, is now, and tell whether it waits for an SA."""
        key = group.key
        if awaits_sa(group, env):
            self._is_new |= key not in self._waiting
            self._waiting.add(key)
            self._some_wait.set()
            return True
        if key in self._waiting:
            self._waiting.remove(key)
            self._due.pop(key, None)
            self._asked_at.pop(key, None)
            self._told.discard(key)
            if not self._waiting:
                self.forget()
        return False

    def programmed(self) -> None:
        """Note that VPP has the routes of all groups noted so far: counters of new ones are looked at now, not in a while."""
        if self._is_new:
            self._is_new = False
            self._look_now.set()

    def forget(self) -> None:
        """Know of no group, as at first: all are noted anew."""
        self._waiting.clear()
        self._some_wait.clear()
        self._told.clear()
        self._packets, self._due, self._asked_at = {}, {}, {}

    async def run(self) -> None:
        """Look again and again while groups wait."""
        while True:
            await self._some_wait.wait()
            pause_s = LOOK_S
            try:
                await self._look()
                self._problem = ""
            except VppError as error:
                pause_s = RETRY_S
                self._say(f"packets that wait for a tunnel cannot be noticed: {error}")
            await self._ask()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._look_now.wait()
            self._look_now.clear()

    async def _look(self) -> None:
        """Find out which groups VPP has dropped packets of since the last look. Raises VppError.

        At the first look at a route it is not known when its packets came: they raise nothing, the next ones do.
        """
        routes = self._dropping()
        packets = await self._read_packets([stats_index for _, stats_index in routes])
        if not self._waiting:
            return
        before, self._packets = self._packets, dict(zip(routes, packets, strict=True))
        for dropping, number in self._packets.items():
            if number > before.get(dropping, number):
                self._note_dropped(dropping[0])

    def _note_dropped(self, route: Route) -> None:
        now, owner = asyncio.get_running_loop().time(), self._owner(route)
        for target in owner.targets if isinstance(owner, Split) else [owner]:
            if isinstance(target, GroupKey) and target in self._waiting:
                asked_at = self._asked_at.get(target)
                if asked_at is None or now - asked_at >= AGAIN_S:
                    self._due.setdefault(target, route)

    async def _ask(self) -> None:
        """Raise the ACQUIREs that are due, but not too many at once."""
        now = asyncio.get_running_loop().time()
        if now < self._next_at:
            return
        self._next_at = now + LOOK_S
        for key in list(self._due)[:MOST_AT_ONCE]:
            route, group = self._due.pop(key, None), self._model.groups.get(key)
            policy = None if group is None or route is None else policy_for(group, route.prefix)
            if (
                group is None
                or policy is None
                or any(sa.saddr == policy.templates[0].saddr for sa in group.sas.values())
            ):
                continue  # its SAs came just now
            self._asked_at[key] = now
            try:
                await self._acquire(policy)
            except (OSError, TimeoutError) as error:
                log.warning("the IKE daemon cannot be asked for an SA: %s", error)
                continue
            self._counters.acquires += 1
            if key not in self._told:  # once while it waits: else the journal would be full of a peer that is down
                self._told.add(key)
                self._journal.asked_for_sa(policy)

    def _say(self, problem: str) -> None:
        if problem != self._problem:
            log.error("%s", problem)
            self._journal.note(Source.VPP, problem)
        self._problem = problem
