"""The loop that owns both sides: kernel events make groups dirty; dirty groups are translated, planned and programmed.

There is one way for start-up, events, recovery and reset: they all only make groups dirty. Tasks share the state within one event
loop: `_follow_kernel` and `_follow_routes` keep the models equal to the kernel, `_follow_vpp` keeps VPP equal to what they mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from vppipsec.conf.settings import Settings
from vppipsec.sync import steerplan
from vppipsec.sync.desired import Desired, Fate, Verdict
from vppipsec.sync.fallback import Fallback, fallbacks, inbound_of, is_beyond_vpp
from vppipsec.sync.held import (
    INSTANCES,
    SAD_ID_FIRST,
    SAD_ID_LAST,
    HeldRoutes,
    HeldTunnel,
    Numbers,
    NumbersExhausted,
)
from vppipsec.sync.journal import Journal, Kind, Source, count
from vppipsec.sync.leftovers import Leftovers
from vppipsec.sync.meetings import Meetings
from vppipsec.sync.outbound import Outbound, outbound
from vppipsec.sync.owners import Owners, Split
from vppipsec.sync.plan import Plan, next_requests
from vppipsec.sync.rekeys import Wear, Wishes
from vppipsec.sync.steerheld import NUMBERS, HeldSteering, adopt
from vppipsec.sync.steering import Fixed, Handover, Place, Target, steer
from vppipsec.sync.translate import TAG_PREFIX, Environment, remote_of, tag_of, translate
from vppipsec.sync.vtileads import Table, VtiLeads
from vppipsec.sync.vtis import RouteSource, Vtis
from vppipsec.vpp import inventory
from vppipsec.vpp.client import Reply, VppClient, connect
from vppipsec.vpp.errors import VppError, VppUnavailable, describe_error
from vppipsec.vpp.guard import GuardError, check, check_handover, check_layer
from vppipsec.vpp.handover import KERNEL, SetNeighbor
from vppipsec.vpp.objects import NO_INDEX, Hop, Lead, Prefix, Route, SaSpec, interfaces_of, shared
from vppipsec.vpp.requests import (
    NOT_REACHED,
    AddSa,
    ChangeRoute,
    CreateItf,
    DeleteItf,
    DelSa,
    LookupRoute,
    Request,
)
from vppipsec.xfrm.events import Event, Migrated, SaAdded
from vppipsec.xfrm.model import Group, GroupKey, KernelModel
from vppipsec.xfrm.routes import Vti
from vppipsec.xfrm.socket import Overflow
from vppipsec.xfrm.text import format_addr
from vppipsec.xfrm.values import Policy, Sa, SaId

log = logging.getLogger(__name__)

CHUNK = 500
"""Groups that are translated and programmed together; the first are ready before the last are begun."""
RETRY_FIRST_S = 1.0
RETRY_LONGEST_S = 60.0
RECONNECT_FIRST_S = 0.1
RECONNECT_LONGEST_S = 5.0
LOOK_AGAIN_S = 2.0
"""How often VPP is asked again about remote addresses that it could not reach, and about its own addresses."""
DUMP_RETRY_S = 1.0
MOST_ROUNDS = 100
"""Rounds of requests after which a change of the rules for outbound policies is taken to be a mistake of ours."""
OUTBOUND = "the outbound policies"
"""Whose a request is that is no single group's."""
_GONE = NO_INDEX - 1
"""Stands for the interface of a route whose interface is gone; no interface of VPP's has it."""
_NONE: frozenset[Any] = frozenset()
_NOBODY = GroupKey(b"", b"", 0, 0, 0)
"""Group of what was left in VPP by an earlier run and belongs to no group of the kernel."""


class KernelSource(Protocol):
    """Where the kernel's messages come from: `vppipsec.xfrm.socket.XfrmSocket`, or something that behaves as it."""

    async def read(self, limit: int) -> list[Event | Overflow]:
        """Wait for at least one event and return at most `limit`."""

    async def dump_sas(self) -> list[Sa]:
        """Return all SAs, newest first."""

    async def dump_policies(self) -> list[Policy]:
        """Return all policies."""

    async def expire(self, sa: Sa, hard: bool = False) -> None:
        """Tell the kernel that an SA has expired, softly so that the IKE daemon rekeys it. Raises OSError."""


@dataclass(slots=True)
class Refusal:
    """A request that VPP refused, and when it is tried again (time of the event loop, s)."""

    reason: str
    delay_s: float
    retry_at: float


@dataclass(slots=True)
class GroupState:
    """What is known of one group on VPP's side."""

    desired: Desired
    held: HeldTunnel = field(default_factory=HeldTunnel)
    env: Environment | None = None
    refusals: dict[SaSpec | Request, Refusal] = field(default_factory=dict)
    past: dict[SaSpec | Request, Refusal] = field(default_factory=dict)
    """Refusals whose time has come: kept for their delay, in case VPP refuses again."""
    worn: frozenset[SaId] = _NONE
    """SAs of the group that are to be rekeyed before VPP carries the tunnel on."""


def refusal_key(request: Request) -> SaSpec | Request:
    """Return what a refusal is remembered by: an SA by what it is, not by the number that it would have had."""
    if isinstance(request, AddSa):
        return request.sa
    return CreateItf(NO_INDEX) if isinstance(request, CreateItf) else request


@dataclass(slots=True)
class Counters:
    """What happened so far, for status."""

    events: int = 0
    overflows: int = 0
    resyncs: int = 0
    refusals: int = 0
    withheld: int = 0
    reconnects: int = 0
    requests: int = 0
    rekeys: int = 0
    last_event: float = 0.0
    last_event_name: str = ""
    last_resync: float = 0.0


class Engine:
    """Keeps one VPP equal to one kernel. `run` does it until it is cancelled; VPP's state then stays as it is."""

    def __init__(
        self,
        settings: Settings,
        source: KernelSource,
        connector: Callable[..., Awaitable[VppClient]] = connect,
        routes: RouteSource | None = None,
    ) -> None:
        """Take where the kernel's SAs and policies come from, and its routes over VTIs, which are not followed without."""
        self.settings = settings
        self.model = KernelModel()
        self.groups: dict[GroupKey, GroupState] = {}
        self.counters = Counters()
        self.journal = Journal()
        self.client: VppClient | None = None
        self.vpp_problem = "not connected yet"
        self._sa_problem = ""
        self._source = source
        self._vtis = Vtis(routes)
        self._led_by: object = None
        self._tables: frozenset[Table] = frozenset()
        """VPP's FIB tables but for ours."""
        self._owned_by: object = None
        self._connect = connector
        self._dirty: dict[GroupKey, None] = {}  # a set that keeps order
        self._wake = asyncio.Event()
        self._resync_wanted = asyncio.Event()
        self._synced = asyncio.Event()
        self._held_back: list[Event | Overflow] | None = None
        self._working = False
        self._reconnect_s = RECONNECT_FIRST_S
        self._model_ready = asyncio.Event()
        self._wear = Wear()
        self._wishes = Wishes()
        self._outbound: list[Outbound] = []
        self._steering = steer((), (), ())
        self._owners = Owners()
        self._beyond_vpp: set[GroupKey] = set()
        """Groups that the kernel may have to carry; mostly there are none, and then nobody looks at all of them."""
        self._fallbacks: dict[GroupKey, Fallback] = {}
        self._neighbors: dict[inventory.Neighbor, bytes] = {}
        self._steered_by: object = None
        self._is_steered = False
        self._tables_of: dict[bool, Mapping[int, Mapping[Prefix, Target]]] = {}
        """What our tables are to have now, by family."""
        self._layers = HeldSteering()
        self._layers_state = GroupState(Desired(_NOBODY))
        self._meetings = Meetings(())
        self._meeting: set[GroupKey] = set()
        self._asked_before: set[int] = set()
        self._env = Environment({})
        self._reached: dict[bytes, bool] = {}
        self._interfaces = inventory.Interfaces()
        self._changed_interfaces: set[int] = set()
        self._refresh_wanted = False
        self._routes = HeldRoutes()
        self._route_source = 0
        self._numbers = Numbers()
        self._left = Leftovers()
        self._orphans: list[GroupState] = []
        self._nobodys = GroupState(Desired(_NOBODY))  # routes that nobody claims
        self._owner_of: dict[int, GroupKey] = {}
        self._routes_suspect = False

    # What status reads

    @property
    def in_sync(self) -> bool:
        """True when VPP holds exactly what the kernel's state, as far as we have read it, means."""
        return (
            self.client is not None
            and not self.vpp_problem  # it has told what it holds
            and self._model_ready.is_set()
            and self._vtis.known.is_set()
            and not self._resync_wanted.is_set()
            and not self._dirty
            and not self._refresh_wanted
            and not self._changed_interfaces
            and not self._working
            and not self._left
            and not self._orphans
            and not self._nobodys.refusals
            and self._steered_by == self._steer_by()
            and self._led_by == self._lead_by()
            and self._is_steered
            and not self._layers_state.refusals
            and not self._wishes
            and not any(state.refusals for state in self.groups.values())
        )

    @property
    def queue(self) -> int:
        """Number of groups that wait for their turn."""
        return len(self._dirty)

    @property
    def leftovers(self) -> int:
        """Number of tunnels and SAs of an earlier run that nobody claimed so far and that are still in VPP."""
        return len(self._left) + len(self._orphans)

    @property
    def env(self) -> Environment:
        """What was translated by last."""
        return self._env

    @property
    def kernel_problem(self) -> str:
        """Why the kernel cannot be followed, as a sentence; nothing where it can."""
        return self._sa_problem or self._vtis.problem

    @property
    def routes(self) -> Mapping[Route, Lead]:
        """Routes of ours in VPP, each with where it leads."""
        return self._routes

    def routes_into(self, sw_if_index: int) -> Set[Route]:
        """Return the routes that lead into an interface of ours."""
        return self._routes.into(sw_if_index)

    def routes_of(self, key: GroupKey) -> Set[Route]:
        """Return the routes that are to lead into the tunnel of a group, those included of which it has a share only."""
        return self._owners.owned(key) | self._owners.shared(key)

    @property
    def follows_routes(self) -> bool:
        """Whether the kernel's routes over VTIs are followed."""
        return self._vtis.source is not None

    @property
    def vti_leads(self) -> VtiLeads:
        """What VPP shall have for the kernel's routes over VTIs."""
        return self._vtis.leads

    def vti(self, if_id: int) -> Vti | None:
        """Return the kernel's xfrm interface that has an if_id, None where none has."""
        return self._vtis.link(if_id)

    @property
    def tables(self) -> Mapping[bool, Sequence[int]]:
        """The FIB table of each layer, by family (True for IPv6)."""
        return self._layers.tables

    @property
    def steering_state(self) -> GroupState:
        """What VPP refuses of the rules for outbound policies."""
        return self._layers_state

    @property
    def rules(self) -> int:
        """Number of ACL rules in VPP that tell the packets of outbound policies."""
        return sum(len(layer.rules) for layers in self._layers.layers.values() for layer in layers)

    def outbound_policies(self) -> Iterator[tuple[Outbound, Place | None]]:
        """Yield the outbound policies as the kernel asks them, each with its place in VPP; None where VPP has no part in it."""
        places = iter(self._steering.places)
        for policy in self._outbound:
            yield policy, None if policy.wanted is None else next(places)

    def fallback_of(self, key: GroupKey) -> Fallback | None:
        """Return what becomes of the packets of a group that VPP cannot carry; None where the kernel is not to have them."""
        return self._fallbacks.get(key)

    @property
    def _enforces(self) -> bool:
        return self.settings.offload.selector_enforcement

    def reload(self, settings: Settings) -> None:
        """Take new settings; they hold from now on."""
        if settings.offload.unsupported != self.settings.offload.unsupported:
            self._is_steered = False
        self.settings = settings
        self._refresh_wanted = True
        self._wake.set()

    def request_resync(self) -> None:
        """Dump the kernel's tables anew, and look at everything again."""
        self._resync_wanted.set()

    async def read_routes(self) -> None:
        """Read the kernel's routes over VTIs once, for an engine that does not run. Raises OSError and TimeoutError."""
        await self._vtis.look([each.policy for each in outbound(self.model.policies())])

    async def wait_in_sync(self) -> None:
        """Return once `in_sync` holds."""
        while not self.in_sync:
            self._synced.clear()
            await self._synced.wait()

    # The tasks

    async def run(self) -> None:
        """Work until cancelled. Never returns by itself, and raises only what is a mistake in the program."""
        self.request_resync()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_kernel())
            tasks.create_task(self._resync_loop())
            if self.follows_routes:
                tasks.create_task(self._follow_routes())
            tasks.create_task(self._follow_vpp())
            tasks.create_task(self._ask_for_rekeys())

    async def _follow_kernel(self) -> None:
        while True:
            try:
                events = await self._source.read(self.settings.netlink.batch_size)
            except OSError as error:
                self._kernel_trouble(f"the netlink socket cannot be read: {error.strerror or error}")
                await asyncio.sleep(DUMP_RETRY_S)
                self.request_resync()
                continue
            if self._held_back is not None:
                self._held_back += events
            else:
                self._apply(events)

    async def _follow_routes(self) -> None:
        vtis = self._vtis
        while True:
            try:
                await vtis.next_change(self.settings.netlink.batch_size)
            except (OSError, ValueError, TimeoutError) as error:
                problem = f"the kernel's routes over VTIs cannot be read: {error}"
                self._say_trouble(problem, vtis.problem)
                vtis.problem = problem
                await asyncio.sleep(DUMP_RETRY_S)
            self._wake.set()

    def _apply(self, events: Sequence[Event | Overflow]) -> None:
        """Feed events to the model."""
        counters = self.counters
        changes = self.model.policy_changes
        self.journal.saw(events, self.model)
        for event in events:
            if isinstance(event, Overflow):
                counters.overflows += 1
                log.warning(
                    "the kernel dropped netlink messages because they were not read in time; reading everything anew"
                )
                self.request_resync()
                continue
            if isinstance(event, Migrated):
                self.request_resync()
            elif isinstance(event, SaAdded):
                self._wear.saw_added(event.sa)
            counters.events += 1
            self._soil(self.model.apply(event))
        if self.model.policy_changes != changes:
            self._wake.set()  # a policy without a template is in no group
        if events:
            counters.last_event = time.time()
            counters.last_event_name = type(events[-1]).__name__

    async def _resync_loop(self) -> None:
        """Dump the kernel's tables when asked to, and every `resync_interval_s`."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.settings.netlink.resync_interval_s):
                    await self._resync_wanted.wait()
            try:
                await self._resync()
            except (OSError, ValueError, TimeoutError) as error:
                self._kernel_trouble(f"the kernel's SAs cannot be read: {error}")
                self._resync_wanted.set()
                await asyncio.sleep(DUMP_RETRY_S)

    async def _resync(self) -> None:
        """Dump; meanwhile events are kept and applied after, since a dump may miss what comes while it runs."""
        self._resync_wanted.clear()
        self._held_back = []
        try:
            sas = await self._source.dump_sas()
            policies = await self._source.dump_policies()
            changed = self.model.replace(sas, policies)
            self._soil(changed)
            self._wear.forget_all_but(sas)
            if changed:
                told = f"its tables, read in full, told of changes in {count(len(changed), 'tunnel')}"
                self.journal.note(Source.KERNEL, told)
        finally:
            held_back, self._held_back = self._held_back, None
            self._apply(held_back)
        self._sa_problem = ""
        self._vtis.resync()
        self.counters.resyncs += 1
        self.counters.last_resync = time.time()
        self._refresh_wanted = True
        self._model_ready.set()
        self._wake.set()

    def _kernel_trouble(self, problem: str) -> None:
        self._say_trouble(problem, self._sa_problem)
        self._sa_problem = problem

    def _say_trouble(self, problem: str, before: str) -> None:
        if problem != before:
            log.error("%s", problem)
            self.journal.note(Source.KERNEL, problem)

    def _soil(self, keys: Iterable[GroupKey]) -> None:
        """Mark groups as perhaps changed."""
        for key in keys:
            self._dirty[key] = None
        if self._dirty:
            self._wake.set()

    async def _follow_vpp(self) -> None:
        """Connect, keep VPP equal while it lives, and begin anew when it goes."""
        await self._model_ready.wait()
        await self._vtis.known.wait()  # else what an earlier run made of them would be taken away
        while True:
            try:
                self.client = await self._connect(self.settings.vpp.api_socket, on_event=self._on_interface_event)
                log.info("connected to VPP %s, process %d", self.client.version, self.client.pid)
                self.journal.note(Source.VPP, f"connected to VPP {self.client.version}, process {self.client.pid}")
                await self.take_stock(self.client)
                self.vpp_problem = ""
                await self._keep_equal(self.client)
            except VppError as error:
                if str(error) != self.vpp_problem:
                    log.error("%s", error)
                    self.journal.note(Source.VPP, str(error))
                self.vpp_problem = str(error)
            finally:
                self._working = False
                if self.client is not None:
                    self.counters.requests += self.client.sent
                    client, self.client = self.client, None
                    await client.close()
            await asyncio.sleep(self._reconnect_s)
            self._reconnect_s = min(2 * self._reconnect_s, RECONNECT_LONGEST_S)
            self.counters.reconnects += 1

    def _on_interface_event(self, sw_if_index: int) -> None:
        """An interface of VPP changed. Whether it is one of ours is known once the answers that are under way are in."""
        self._changed_interfaces.add(sw_if_index)
        self._wake.set()

    async def take_stock(self, client: VppClient) -> None:
        """Learn what VPP holds of ours, and mark everything dirty. Raises VppError."""
        found = await inventory.read_inventory(
            client, lambda tag: tag.startswith(TAG_PREFIX), SAD_ID_FIRST, SAD_ID_LAST, INSTANCES, NUMBERS
        )
        self._wear.met_vpp(client.pid)
        self._wishes.clear()
        self._route_source = found.route_source
        self._numbers = Numbers(found.sad_ids, found.instances)
        self._routes = HeldRoutes()
        self._tables = found.other_tables
        for route, lead in found.routes.items():
            self._routes.took(ChangeRoute(lead, route.prefix, found.route_source, True, route.table))
        for found_sa in found.sas:
            self._wear.took(found_sa.spec)
        self._interfaces = await inventory.read_interfaces(client)
        self._layers = adopt(found, self._interfaces.every)
        self._left = Leftovers(found, self._layers.acls)
        self._orphans = []
        self._nobodys = GroupState(Desired(_NOBODY))
        if found.interfaces or found.sas:
            has = f"{count(len(found.interfaces), 'tunnel')} and {count(len(found.sas), 'SA')}"
            self.journal.note(Source.VPP, f"has {has} of an earlier run; those that are still right stay")
        self._owner_of = {itf.sw_if_index: _NOBODY for itf in found.interfaces}
        self._routes_suspect = True
        self._changed_interfaces = set()
        await client.call("want_interface_events", {"enable_disable": 1, "pid": 0})
        if self._enforces:
            await self._count_denied(client)
        addresses = await inventory.read_addresses(client, self._interfaces.up)
        self._env = Environment(addresses, frozenset(), inventory.offered_ciphers(client), self._enforces)
        self._reached = {}
        self._refresh_wanted = False
        self.groups = {}
        self._meeting = set()
        self._beyond_vpp = set()
        self._layers_state = GroupState(Desired(_NOBODY))
        self._owners = Owners()
        self._fallbacks = {}
        self._neighbors = dict(found.neighbors)
        self._steered_by = None
        self._led_by = None
        self._is_steered = False
        self._tables_of = {}
        self._soil(self.model.groups)
        if found.neighbors:  # what goes to the kernel shall go on while all groups are looked at again
            for key in self.model.groups:
                self._translate(key)

    async def _count_denied(self, client: VppClient) -> None:
        """Let VPP count what ACLs match; it counts for others' ACLs too then, so it is left alone where nothing needs it."""
        await client.call("acl_stats_intf_counters_enable", {"enable": True})

    async def _keep_equal(self, client: VppClient) -> None:
        """Program what is dirty, again and again. Ends with VppError when VPP goes."""
        loop = asyncio.get_running_loop()
        quiet_until = 0.0
        look_again_at = loop.time() + LOOK_AGAIN_S
        while True:
            await self._wait_for_work(client, min(look_again_at, self._next_retry()))
            if (pause := quiet_until - loop.time()) > 0 and len(self._dirty) < self.settings.netlink.batch_size:
                await asyncio.sleep(
                    pause
                )  # the first change after a quiet time is handled at once, those after it are gathered
            if self._refresh_wanted or self._changed_interfaces or loop.time() >= look_again_at:
                self._working = True  # not in sync before it is known what changed
                await self._refresh_environment(client)
                look_again_at = loop.time() + LOOK_AGAIN_S
            self._soil_retries()
            await self.converge(client)
            self._reconnect_s = RECONNECT_FIRST_S  # only now: a VPP that dies of what it is asked must not be hurried
            quiet_until = loop.time() + self.settings.netlink.batch_delay_ms / 1000
            if self.in_sync:
                self._synced.set()

    async def _wait_for_work(self, client: VppClient, until: float) -> None:
        """Wait until something is dirty, a retry is due, or VPP is gone (VppUnavailable)."""
        loop = asyncio.get_running_loop()
        wake = loop.create_task(self._wake.wait())
        try:
            if not self._dirty:
                timeout = max(0.0, until - loop.time())
                await asyncio.wait((wake, client.closed), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            wake.cancel()
        self._wake.clear()
        if client.closed.done():
            raise VppUnavailable("VPP closed the connection")

    async def _refresh_environment(self, client: VppClient) -> None:
        """Read VPP's addresses again, and ask again about remotes; what depends on what changed gets dirty."""
        changed, self._changed_interfaces = self._changed_interfaces, set()
        others_changed = any(index not in self._owner_of for index in changed)
        everything = self._refresh_wanted or others_changed
        self._refresh_wanted = False
        if others_changed:
            before, self._interfaces = self._interfaces, await inventory.read_interfaces(client)
            for gone in before.every - self._interfaces.every:
                self._layers.interface_deleted(gone)
            await self._look_for_neighbors(client)
        addresses = await inventory.read_addresses(client, self._interfaces.up)
        if addresses != self._env.addresses:
            self.journal.note(Source.VPP, "the addresses of its interfaces changed: every tunnel is looked at again")
            self._env = replace(self._env, addresses=addresses)
            self._soil(self.model.groups)
        if self._enforces != self._env.enforces:
            if self._enforces:
                await self._count_denied(client)
            self._env = replace(self._env, enforces=self._enforces)
            self._soil(self.model.groups)
        await self._look_at_tables(client)
        again = [remote for remote, reached in self._reached.items() if everything or not reached]
        moved = await self._look_up(client, again)
        if moved:
            self._soil(key for key in self.model.groups if key.low in moved or key.high in moved)

    async def _look_at_tables(self, client: VppClient) -> None:
        """See whether VPP has other tables than it had, where a VTI needs one besides the main one."""
        if self._vtis.leads.lacking or self._vtis.leads.routes.keys() - {0}:
            self._tables = await inventory.read_other_tables(client, NUMBERS)
            for route in [route for route in self._routes if self._is_in_lost_table(route)]:
                self._routes.took(ChangeRoute(NO_INDEX, route.prefix, self._route_source, False, route.table))

    def _is_in_lost_table(self, route: Route) -> bool:
        table = route.table, len(route.prefix.address) == 16
        return route.table not in NUMBERS and table not in self._tables

    async def _look_for_neighbors(self, client: VppClient) -> None:
        """Find out which taps went, if only to come again at once: what led there drops for good, whatever now has its number."""
        if self._neighbors:
            before, self._neighbors = self._neighbors, await inventory.read_neighbors(client)
            for index in {neighbor.sw_if_index for neighbor in before.keys() - self._neighbors.keys()}:
                for route in list(self._routes.into(index)):
                    self._routes.took(ChangeRoute(_GONE, route.prefix, self._route_source, True, route.table))
                self._is_steered = False

    async def _look_up(self, client: VppClient, remotes: Sequence[bytes]) -> set[bytes]:
        """Ask VPP whether it reaches addresses. Return those whose answer is new or has changed."""
        replies = await client.run([LookupRoute(remote) for remote in remotes])
        ours = {state.held.sw_if_index for state in self.groups.values()} - {None}
        changed = set()
        for remote, reply in zip(remotes, replies, strict=True):
            if reply.retval and remote in self._reached:
                continue  # VPP does not say: no reason to take a tunnel down
            # through a tunnel of ours it would be encrypted again, and again
            reached = not reply.retval and reply.extra != NOT_REACHED and reply.extra not in ours
            if self._reached.get(remote) != reached:
                if not reached or remote in self._reached:
                    route = "a route" if reached else "no route"
                    self.journal.tell(Source.VPP, Kind.REACHED, f"has {route} to {format_addr(remote)}")
                self._reached[remote] = reached
                changed.add(remote)
        if changed:
            unreachable = frozenset(remote for remote, reached in self._reached.items() if not reached)
            self._env = replace(self._env, unreachable=unreachable)
        return changed

    async def converge(self, client: VppClient) -> None:
        """Program all that is dirty, then take away what nobody wants any more. Raises VppUnavailable.

        Policies go first, all of them: what they match is dropped from then on until its tunnel is there.
        """
        self._working = True
        await self._steer(client)
        while self._dirty:
            keys = list(self._dirty)[:CHUNK]
            for key in keys:
                del self._dirty[key]
            await self._look_up_new(client, keys)
            await self._steer(client)  # there may be new policies by now
            states = [state for key in keys if (state := self._translate(key)) is not None]
            if self._find_fallbacks() != self._fallbacks:
                await self._steer(client)  # the kernel is to have no more of what VPP takes over now
            await self._program(client, states)
            if not all(map(self._may_receive, states)):
                await self._steer(client)  # their interfaces are there by now
            for state in states:
                key = state.desired.key
                gone = key not in self.model.groups and key not in self._dirty  # else it went just now
                if gone and state.held.empty and not state.refusals:
                    self.groups.pop(key, None)
                    self._meeting.discard(key)
                    self._beyond_vpp.discard(key)
        await self._remove_leftovers(client)
        self._working = False

    async def _remove_leftovers(self, client: VppClient) -> None:
        """Take away what an earlier run left and nobody claims, and routes that nobody claims any more."""
        if self._left:
            log.info("removing %s of an earlier run from VPP", self._left)
            self.journal.note(Source.VPP, f"removing {self._left} of an earlier run")
            self._orphans += [GroupState(Desired(_NOBODY), held) for held in self._left.rest()]
        if self._routes_suspect or self._nobodys.refusals:
            self._routes_suspect = False
            await self._remove_stale_routes(client)
        await self._steer(client)  # there may be new tunnels to be asked, and tables that are empty now
        for state in self._orphans:
            self._let_due_be_tried(state)
        await self._program(client, self._orphans)
        self._orphans = [state for state in self._orphans if not state.held.empty]

    async def _remove_stale_routes(self, client: VppClient) -> None:
        """Take away the routes that nobody claims."""
        nobodys = self._nobodys
        stale = [route for route in self._routes if self._owners.owner(route) is None]
        requests = [ChangeRoute(NO_INDEX, route.prefix, self._route_source, False, route.table) for route in stale]
        nobodys.refusals = {key: nobodys.refusals[key] for key in requests if key in nobodys.refusals}
        self._let_due_be_tried(nobodys)
        requests = [request for request in requests if request not in nobodys.refusals]
        for request, reply in zip(requests, await client.run(requests), strict=True):
            self._took(nobodys, request, reply)

    # Outbound policies

    def _steer_by(self) -> object:
        """Return what the steering is made of: while that stays, it does."""
        return self.model.policy_changes, self._env.addresses, self._fallbacks

    def _lead_by(self) -> tuple[int, int, frozenset[Table]]:
        """Return what the routes over VTIs are made of: while that stays, they do."""
        return self.model.policy_changes, self._vtis.changes, self._tables

    def _find_vti_routes(self) -> None:
        """Find which routes VPP shall have for the kernel's over VTIs."""
        lacked = self._vtis.leads.lacking
        if not self._vtis.find([each.policy for each in self._outbound], self._tables):
            return
        leads = self._vtis.leads
        for number, ip6 in sorted(leads.lacking - lacked):
            family = "IPv6" if ip6 else "IPv4"
            self.journal.note(Source.VPP, f"has no {family} table {number}: the routes over VTIs in it are left out")
        self._refresh_wanted = True  # peers may be reached another way from now on
        self._wake.set()

    async def _steer(self, client: VppClient) -> None:
        """Let VPP tell the packets of outbound policies from others; those for which there is no tunnel yet are dropped."""
        self._fallbacks = self._find_fallbacks()
        by, led_by = self._steer_by(), self._lead_by()
        if by != self._steered_by:
            self._outbound = outbound(self.model.policies())
            peers = {template.daddr for each in self._outbound for template in each.policy.templates}
            wanted = [each.wanted for each in self._outbound if each.wanted is not None]
            handed = [each._replace(target=self._handed(each.target)) for each in wanted]
            self._steering = steer(handed, self._env.addresses, peers, inbound_of(self._fallbacks))
            layers = (*self._steering.ip4.layers, *self._steering.ip6.layers)
            self._meetings = Meetings(rule for layer in layers for rule in layer.rules)
            for state in self.groups.values():
                self._note_meeting(state)
            self._steered_by = by
            for each in wanted:
                if isinstance(each.target, GroupKey) and each.target in self.model.groups:
                    self._state_of(each.target)  # its tunnel may be there already
        elif (
            led_by == self._led_by
            and self._is_steered
            and not self._layers_state.refusals
            and self._asked() == self._asked_before
        ):
            return
        if led_by != self._led_by:
            self._find_vti_routes()
            self._led_by = led_by
            for target in self._vti_targets():
                if target in self.model.groups:
                    self._state_of(target)  # likewise
        await self._bring_layers(client)

    def _find_fallbacks(self) -> dict[GroupKey, Fallback]:
        """Return what becomes of the groups that VPP cannot carry, where the kernel may get their packets."""
        if self.settings.offload.unsupported != "kernel" or not self._beyond_vpp:
            return {}
        desired = [state.desired for state in self.groups.values()]
        found = fallbacks(desired, self.model.groups, self._env, self._interfaces.taps, self._wear.has_sent)
        for key, fallback in found.items():
            if fallback.target is not None:
                for sa in self.model.groups[key].sas.values():
                    self._wear.kernel_sends(sa)
        return found

    def _handed(self, target: Target) -> Target:
        """Return the kernel in place of a group that VPP cannot carry, where the kernel gets its packets."""
        fallback = self._fallbacks.get(target) if isinstance(target, GroupKey) else None
        return target if fallback is None or fallback.target is None else fallback.target

    def _wanted_neighbors(self) -> dict[inventory.Neighbor, bytes]:
        """Return the next hops on taps by which the kernel gets packets."""
        taps = {each.target.sw_if_index for each in self._fallbacks.values() if each.target is not None}
        return {inventory.Neighbor(tap, ip6): self._interfaces.macs[tap] for tap in taps for ip6 in (False, True)}

    def _asked(self) -> set[int]:
        """Return the interfaces on which packets come that outbound policies may be for."""
        states = (self.groups[key] for key in self._meeting)
        return {
            *self._interfaces.up,
            *(state.held.sw_if_index for state in states if state.held.sw_if_index is not None),
        }

    def _note_meeting(self, state: GroupState) -> None:
        """Note whether what a tunnel brings may be for another one."""
        tunnel = state.desired.tunnel
        if tunnel is not None and self._meetings.may_meet(tunnel.admitted):
            self._meeting.add(state.desired.key)
        else:
            self._meeting.discard(state.desired.key)

    def _may_receive(self, state: GroupState) -> bool:
        """Tell whether what comes out of a tunnel would be held against the outbound policies, where it has to be."""
        if state.desired.key not in self._meeting:
            return True
        index = state.held.sw_if_index
        return all(index in layer.attached for layers in self._layers.layers.values() for layer in layers)

    async def _bring_layers(self, client: VppClient) -> None:
        """Bring the layers of rules, and the routes behind them, towards what is wanted, as far as that can be now."""
        state = self._layers_state
        self._let_due_be_tried(state)
        self._asked_before = self._asked()
        barred: set[Request] = set()
        wanted = self._wanted_neighbors()
        lacking = [SetNeighbor(*it, mac) for it, mac in wanted.items() if self._neighbors.get(it) != mac]
        await self._send(client, lacking, barred)
        complete = [await self._bring_family(client, ip6, barred) for ip6 in (False, True)]
        if all(complete):
            surplus = [SetNeighbor(*it, mac, False) for it, mac in self._neighbors.items() if it not in wanted]
            await self._send(client, surplus, barred)
        state.refusals = {key: kept for key, kept in state.refusals.items() if key in barred}
        state.past = {}
        self._is_steered = all(complete) and self._neighbors == wanted
        waiting = [self.groups[key] for key in self._meeting if self.groups[key].held.protection is None]
        self._soil(
            state.desired.key
            for state in waiting
            if state.desired.tunnel is not None and state.held.sw_if_index is not None and self._may_receive(state)
        )

    async def _send(self, client: VppClient, requests: Iterable[Request], barred: set[Request]) -> bool:
        """Send requests for steering, and tell whether any was sent. Those refused, now or before, are added to `barred`."""
        state = self._layers_state
        allowed = []
        for request in requests:
            if request in state.refusals or not self._is_safe(state, request):
                barred.add(request)
            else:
                allowed.append(request)
        for request, reply in zip(allowed, await client.run(allowed), strict=True):
            if not self._took(state, request, reply):
                barred.add(request)
        return bool(allowed)

    async def _bring_family(self, client: VppClient, ip6: bool, barred: set[Request]) -> bool:
        """Do so for one family, and tell whether all is done. Requests that were refused lately are added to `barred`."""
        state = self._layers_state
        for _ in range(MOST_ROUNDS):
            refused = {(key.table, key.prefix) for key in state.refusals if isinstance(key, ChangeRoute)}
            want, held = self._steering.of(ip6), self._held_targets(ip6)
            plan = steerplan.next_requests(ip6, want, self._asked_before, self._layers, held, refused)
            self._own(ip6, plan.routes)
            if not await self._send(client, (*self._route_changes(), *plan.requests), barred):
                return plan.complete
        log.error("the rules for outbound policies do not come to an end; they are tried again")
        return False

    def _held_targets(self, ip6: bool) -> dict[int, dict[Prefix, Target]]:
        """Return where our routes lead, by table, without those over VTIs."""
        targets: dict[int, dict[Prefix, Target]] = {}
        fixed: dict[int, Target] = {NO_INDEX: Fixed.DROP}
        fixed.update((tap, Handover(tap)) for tap in self._interfaces.macs)
        for route, lead in self._routes.items():
            if (len(route.prefix.address) == 16) == ip6 and isinstance(lead, int) and not self._is_vtis(route, ip6):
                target = fixed.get(lead) or self._owner_of.get(lead, _NOBODY)
                targets.setdefault(route.table, {})[route.prefix] = target
        return targets

    def _is_vtis(self, route: Route, ip6: bool) -> bool:
        """Tell whether a route is one over a VTI: of the tables that layers don't have, policies claim hosts in the main one."""
        if route.table in NUMBERS:
            return False
        if route.table or route.prefix.length < 8 * len(route.prefix.address):
            return True
        claimed = (self._steering.of(ip6).routes, self._tables_of.get(ip6, {}).get(0, {}))
        return route.prefix in self._vtis.leads.routes.get(0, {}) and not any(route.prefix in it for it in claimed)

    def _vti_targets(self) -> Set[GroupKey]:
        """Return the groups into whose tunnels routes over VTIs lead."""
        found: set[GroupKey] = set()
        for table in self._vtis.leads.routes.values():
            for target in table.values():
                shares = [share for share, _ in target.shares] if isinstance(target, Split) else [target]
                found.update(share for share in shares if isinstance(share, GroupKey))
        return found

    def _own(self, ip6: bool, tables: Mapping[int, Mapping[Prefix, Target]]) -> None:
        """Take note of whose each route of a family is from now on."""
        leads = self._vtis.leads.routes
        if self._tables_of.get(ip6) == tables and self._owned_by is leads:
            return
        self._tables_of[ip6] = tables
        self._owned_by = leads
        layers = frozenset(number for numbers in self._layers.tables.values() for number in numbers)
        steered = [item for family in self._tables_of.values() for item in family.items()]
        owners = Owners([*leads.items(), *steered], layers)
        self._soil(owners.differ_from(self._owners))
        self._routes_suspect |= not self._owners.targets.keys() <= owners.targets.keys()
        self._owners = owners

    def _route_changes(self) -> Iterator[ChangeRoute]:
        """Yield what makes our routes lead where they are to lead, as far as there is a tunnel for them."""
        replaced = any(len(self._layers.layers[ip6]) > len(self._steering.of(ip6).layers) for ip6 in (False, True))
        for route, target in self._owners.targets.items():
            lead = self._lead_of(target)
            held = self._routes.get(route)
            if held != lead and (held is not None or lead != NO_INDEX or replaced or self._owners.exposed(route)):
                is_tap = isinstance(lead, int) and lead in self._interfaces.macs
                next_hop = KERNEL[len(route.prefix.address) == 16] if is_tap else b""
                yield ChangeRoute(lead, route.prefix, self._route_source, True, route.table, next_hop)

    def _lead_of(self, target: Target | Split) -> Lead:
        """Return where a route to a target is to lead now."""
        if isinstance(target, Split):
            return shared(Hop(self._index_of(share), weight) for share, weight in target.shares)
        return self._index_of(target)

    def _index_of(self, target: Target) -> int:
        """Return the interface of a target's tunnel, or the kernel's tap, NO_INDEX where packets for it are dropped."""
        if isinstance(target, Handover):
            return target.sw_if_index if target.sw_if_index in self._interfaces.macs else NO_INDEX
        state = None if isinstance(target, Fixed) else self.groups.get(target)
        if state is None or state.held.sw_if_index is None or (state.env is not None and state.desired.tunnel is None):
            return NO_INDEX
        return state.held.sw_if_index

    def _is_safe(self, state: GroupState, request: Request) -> bool:
        try:
            check_layer(request, self._layers.layers, self._interfaces.every | self._owner_of.keys())
            check_handover(request, self._interfaces.macs)
        except GuardError as error:
            self.counters.withheld += 1
            self._refuse(state, request, f"not sent to VPP: {error}")
            return False
        return True

    async def _look_up_new(self, client: VppClient, keys: Iterable[GroupKey]) -> None:
        """Ask VPP about the remote ends that it was not asked about yet."""
        new: dict[bytes, None] = {}
        for key in keys:
            group = self.model.groups.get(key)
            if group is not None:
                remote = remote_of(key, group, self._env.addresses)
                if remote is not None and remote not in self._reached:
                    new[remote] = None
        if new:
            await self._look_up(client, list(new))

    def _translate(self, key: GroupKey) -> GroupState | None:
        """Bring the desired state of a group up to date."""
        group = self.model.groups.get(key)
        state = self.groups.get(key)
        if group is None and state is None:
            return None
        known = state.desired.verdicts if state is not None and state.env is self._env else {}
        group = group or Group(key)
        if state is None:
            state = self._state_of(key)
        before = state.desired.tunnel
        state.desired = self._translated(group, known, state.held)
        now = state.desired.tunnel
        if now is None or before is None or now.admitted != before.admitted:
            self._note_meeting(state)
        state.env = self._env
        (self._beyond_vpp.add if is_beyond_vpp(state.desired) else self._beyond_vpp.discard)(key)
        self._wish_for_rekeys(state)
        self._let_due_be_tried(state)
        return state

    def _state_of(self, key: GroupKey) -> GroupState:
        """Return what is known of a group on VPP's side; at first that is what an earlier run left."""
        state = self.groups.get(key)
        if state is None:
            group = self.model.groups.get(key) or Group(key)
            held = self._left.claim(tag_of(key), group.sas)
            state = self.groups[key] = GroupState(Desired(key), held)
            if held.sw_if_index is not None:
                self._owner_of[held.sw_if_index] = key
        return state

    def _wish_for_rekeys(self, state: GroupState) -> None:
        """Let those SAs of a group be rekeyed, and no others, that have to be."""
        verdicts = state.desired.verdicts
        worn = frozenset(sa_id for sa_id, verdict in verdicts.items() if verdict.fate is Fate.REKEYING)
        for sa_id in state.worn - worn:
            self._wishes.drop(sa_id)
        for sa_id in worn:
            self._wishes.add(sa_id)
        state.worn = worn

    async def _ask_for_rekeys(self) -> None:
        """Ask the IKE daemon, through the kernel, to rekey what has to be; at most `restart_rekey_rate` SAs a second."""
        while True:
            sa_id = await self._wishes.next()
            sa = self.model.find(sa_id)
            if sa is None or self.client is None:
                continue
            try:
                await self._source.expire(sa)
                self.counters.rekeys += 1
                self.journal.asked_for_rekey(sa)
            except (OSError, TimeoutError) as error:
                log.warning("an SA cannot be rekeyed: %s", error)
                self.request_resync()
            await asyncio.sleep(1 / self.settings.offload.restart_rekey_rate)

    def _translated(self, group: Group, known: Mapping[SaId, Verdict], held: HeldTunnel) -> Desired:
        """Translate; an SA that our own code stumbles over costs its own group, not the service."""
        worn = {sa_id for sa_id, sa in group.sas.items() if self._wear.worn(sa)}
        try:
            return translate(group.key, group, self._env, known, worn, [sa.spec for sa in held.sas.values()])
        except Exception as error:  # whatever it is: the other tunnels go on
            log.error("a tunnel cannot be translated: %s at %s", type(error).__name__, tag_of(group.key))
            verdict = Verdict(Fate.UNSUPPORTED, f"a mistake in vpp-ipsecd: {type(error).__name__}")
            return Desired(group.key, verdicts=dict.fromkeys(group.sas, verdict))

    async def _program(self, client: VppClient, states: Sequence[GroupState]) -> None:
        """Bring VPP to what is desired of groups, in two lanes: while VPP works for the one, the other is planned.

        Tunnels that share routes are in one lane: so it is always the latest request for a route that VPP gets last.
        """
        sharing = [state for state in states if self._owners.shared(state.desired.key)]
        alone = [state for state in states if not self._owners.shared(state.desired.key)] if sharing else states
        lanes = [self._program_lane(client, lane) for lane in ([*sharing, *alone[::2]], alone[1::2]) if lane]
        for outcome in await asyncio.gather(*lanes, return_exceptions=True):
            if outcome is not None:
                raise outcome

    async def _program_lane(self, client: VppClient, states: Sequence[GroupState]) -> None:
        """Send what the plan says, round by round, until nothing is left or what is left was refused."""
        todo = list(states)
        while todo:
            planned = []
            batch: list[Request] = []
            for state in todo:
                plan = self._plan(state)
                if plan.requests:
                    planned.append((state, plan))
                    batch += plan.requests
            replies = iter(await client.run(batch))
            todo = []
            for state, plan in planned:
                accepted = [self._took(state, request, next(replies)) for request in plan.requests]
                if not plan.complete or not all(accepted) or state.refusals:
                    todo.append(state)

    def _plan(self, state: GroupState) -> Plan:
        """Ask the plan for the next requests of a group, without those that were refused lately or that break a rule."""
        refused = frozenset(key for key in state.refusals if isinstance(key, SaSpec)) if state.refusals else _NONE
        owned = self._owners.owned(state.desired.key)
        targets = self._owners.targets
        shares = {route: self._lead_of(targets[route]) for route in self._owners.shared(state.desired.key)}
        held = state.held
        try:
            plan = next_requests(
                state.desired.tunnel,
                owned,
                held,
                self._routes,
                self._route_source,
                self._numbers,
                refused,
                self._owners.exposed,
                self._may_receive(state),
                shares,
            )
        except NumbersExhausted as error:
            self._refuse(state, CreateItf(NO_INDEX), str(error))
            return Plan((), True)
        leading = self._routes.into(held.sw_if_index) if held.sw_if_index is not None else _NONE
        allowed, barred = [], set()
        for request in plan.requests:
            if state.refusals and (key := refusal_key(request)) in state.refusals:
                barred.add(key)
                self._give_back(request)
                continue
            if isinstance(request, ChangeRoute) and not request.is_add and self._will_be_replaced(request.route):
                continue
            try:
                is_shared = isinstance(request, ChangeRoute) and request.route in shares
                check(request, held, leading, self._owner_of.keys() if is_shared else _NONE)
            except GuardError as error:
                self.counters.withheld += 1
                self._give_back(request)
                barred.add(self._refuse(state, request, f"not sent to VPP: {error}"))
                continue
            allowed.append(request)
        if not allowed and (state.refusals or state.past):
            self._forget_moot_refusals(state, barred)
        return Plan(allowed, plan.complete)

    def _will_be_replaced(self, route: Route) -> bool:
        """Tell whether the new owner of a route leads it elsewhere, so that there is no moment without."""
        owner = self._owners.owner(route)
        if owner is None or self._owners.exposed(route) or isinstance(owner, Handover):
            return owner is not None
        state = None if isinstance(owner, Fixed | Split) else self.groups.get(owner)
        return state is not None and state.desired.tunnel is not None

    def _forget_moot_refusals(self, state: GroupState, barred: Set[SaSpec | Request]) -> None:
        """Nothing is left to send of a group: forget the refusals of what is not wanted any more."""
        want = state.desired.tunnel
        wanted = () if want is None else (*want.inbound, *want.outbound)
        state.refusals = {key: kept for key, kept in state.refusals.items() if key in barred or key in wanted}
        state.past = {}

    def _took(self, state: GroupState, request: Request, reply: Reply) -> bool:
        """Note VPP's answer; tell whether VPP accepted."""
        if reply.retval and reply.retval != request.done_before:
            self._refuse(state, request, describe_error(reply.retval))
            self._give_back(request)
            return False
        if state.past:
            state.past.pop(refusal_key(request), None)
        if isinstance(request, ChangeRoute):
            before = self._routes.get(request.route, NO_INDEX)
            self._routes.took(request)
            left = {*interfaces_of(before)} - {NO_INDEX, state.held.sw_if_index}
            self._soil({self._owner_of.get(index, _NOBODY) for index in left})  # they may have waited for it to leave
            return True
        if isinstance(request, SetNeighbor):
            neighbor = inventory.Neighbor(request.sw_if_index, request.ip6)
            self._neighbors.pop(neighbor, None)
            if request.is_add:
                self._neighbors[neighbor] = request.mac
            return True
        if state is self._layers_state:
            self._layers.took(request, reply.extra)
            return True
        if isinstance(request, CreateItf):
            self._owner_of[reply.extra] = state.desired.key
        elif isinstance(request, DeleteItf):
            self._owner_of.pop(request.sw_if_index, None)
            self._layers.interface_deleted(request.sw_if_index)
            self._numbers.free_instance(state.held.instance)
        elif isinstance(request, DelSa):
            self._numbers.free_sad_id(request.sad_id)
        elif isinstance(request, AddSa):
            self._wear.took(request.sa)
        state.held.took(request, reply.extra)
        return True

    def _give_back(self, request: Request) -> None:
        """Free the number of a request that came to nothing."""
        if isinstance(request, AddSa):
            self._numbers.free_sad_id(request.sad_id)
        elif isinstance(request, CreateItf):
            self._numbers.free_instance(request.instance)

    def _refuse(self, state: GroupState, request: Request, reason: str) -> SaSpec | Request:
        """Remember a refusal, log it once, and set the time of the next try. Return what it is remembered by."""
        key = refusal_key(request)
        before = state.refusals.get(key) or state.past.get(key)
        delay_s = RETRY_FIRST_S if before is None else min(2 * before.delay_s, RETRY_LONGEST_S)
        retry_at = asyncio.get_running_loop().time() + delay_s
        state.refusals[key] = Refusal(reason, delay_s, retry_at)
        self.counters.refusals += 1
        if before is None or before.reason != reason:
            steers = state is self._layers_state
            whose = OUTBOUND if steers else tag_of(state.desired.key)
            log.warning("%s of %s: %s", type(request).__name__, whose, reason)
            self.journal.refused(OUTBOUND if steers else state.desired.key, request, reason)
        return key

    def _next_retry(self) -> float:
        states = (*self.groups.values(), *self._orphans, self._nobodys, self._layers_state)
        return min((r.retry_at for state in states for r in state.refusals.values()), default=float("inf"))

    def _soil_retries(self) -> None:
        """Let groups be looked at again of which VPP refused something that is now due again."""
        now = asyncio.get_running_loop().time()
        self._soil(key for key, state in self.groups.items() if any(r.retry_at <= now for r in state.refusals.values()))

    def _let_due_be_tried(self, state: GroupState) -> None:
        """Take the bar off requests whose time has come."""
        if not state.refusals:
            return
        now = asyncio.get_running_loop().time()
        state.past = {key: refusal for key, refusal in state.refusals.items() if refusal.retry_at <= now}
        for key in state.past:
            del state.refusals[key]
