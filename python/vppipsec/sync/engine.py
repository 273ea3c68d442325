"""The loop that owns both sides: kernel events make groups dirty; dirty groups are translated, planned and programmed.

There is one way for start-up, events, recovery and reset: they all only make groups dirty. Tasks share the state within one event
loop: those of `kernelside` keep the models equal to the kernel, `_follow_vpp` keeps VPP equal to what they mean.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from vppipsec.conf.settings import Settings
from vppipsec.kernel.hostpath.apply import HostWays
from vppipsec.kernel.xfrm.sad_spd import Group, GroupKey, KernelModel
from vppipsec.kernel.xfrm.values import SaId
from vppipsec.sync.actual.environment import Surroundings
from vppipsec.sync.actual.vpp_state import GroupState, VppSide
from vppipsec.sync.actual.vtis import RouteSource, Vtis
from vppipsec.sync.apply.host_interfaces import HostKeeper
from vppipsec.sync.apply.steering import Steerer
from vppipsec.sync.apply.tunnels import Programmer
from vppipsec.sync.desired.outbound_policy import outbound
from vppipsec.sync.desired.state import Desired, Fate, Verdict
from vppipsec.sync.desired.tunnel import remote_of, tag_of, translate
from vppipsec.sync.ike.acquire import Acquires
from vppipsec.sync.ike.rekey_queue import Wishes
from vppipsec.sync.ike.sa_usage import Wear
from vppipsec.sync.journal import Counters, Journal, Source, count
from vppipsec.sync.kernel_watcher import KernelSide, KernelSource
from vppipsec.sync.work_queue import Todo
from vppipsec.vpp import inventory
from vppipsec.vpp.api.client import VppClient, connect
from vppipsec.vpp.api.errors import VppError, VppUnavailable
from vppipsec.vpp.ownership import INSTANCES, NUMBERS, SAD_ID_FIRST, SAD_ID_LAST, TAG_PREFIX
from vppipsec.vpp.state.tunnels import HeldTunnel
from vppipsec.vpp.stats import read_route_packets

log = logging.getLogger(__name__)

CHUNK = 500
"""Groups that are translated and programmed together; the first are ready before the last are begun."""
RECONNECT_FIRST_S = 0.1
RECONNECT_LONGEST_S = 5.0
LOOK_AGAIN_S = 2.0
"""How often VPP is asked again about remote addresses that it could not reach, and about its own addresses."""


class Engine:
    """Keeps one VPP equal to one kernel. `run` does it until it is cancelled; VPP's state then stays as it is.

    What is known of a VPP (`vpp`, `surroundings`, `steerer`) begins anew with each connection.
    """

    def __init__(
        self,
        settings: Settings,
        source: KernelSource,
        connector: Callable[..., Awaitable[VppClient]] = connect,
        routes: RouteSource | None = None,
        send: Callable[[HostWays], None] | None = None,
        read_packets: Callable[[str, Sequence[int]], Awaitable[list[int]]] = read_route_packets,
    ) -> None:
        """Take where the kernel's SAs and policies come from, and its routes over VTIs, which are not followed without.

        `send` has the kernel send to host interfaces (`HostKeeper`); without, it goes on to encrypt what the router sends.
        `read_packets` reads VPP's counters of routes, whose stats socket is told.
        """
        self.settings = settings
        self.model = KernelModel()
        self.counters = Counters()
        self.journal = Journal()
        self.vtis = Vtis(routes)
        self._todo = Todo()
        self.hosts = HostKeeper(self.vtis, self._todo, self.journal, send, self._kernel_stopped)
        self.client: VppClient | None = None
        self.vpp_problem = "not connected yet"
        self._source = source
        self._connect = connector
        self._wear = Wear()
        self._wishes = Wishes()
        self._kernel = KernelSide(
            source, settings.netlink, self.model, self.vtis, self._wear, self._todo, self.journal, self.counters
        )
        self.acquires = Acquires(
            self.model,
            self.journal,
            self.counters,
            source.acquire,
            lambda indices: read_packets(self.settings.vpp.stats_socket, indices),
            lambda: self.vpp.routes.dropping(),
            lambda route: self.steerer.owners.owner(route),
        )
        self._synced = asyncio.Event()
        self._working = False
        self._reconnect_s = RECONNECT_FIRST_S
        self._know(VppSide(self.model, self._wear, self._todo, self.journal, self.counters), Surroundings(self.journal))

    def _know(self, vpp: VppSide, surroundings: Surroundings) -> None:
        """Begin anew with what is known of a VPP."""
        self.acquires.forget()
        self.vpp = vpp
        self.surroundings = surroundings
        self.steerer = Steerer(
            vpp,
            surroundings,
            self.model,
            self.vtis,
            self._wear,
            self._todo,
            self.journal,
            self.settings.offload,
            self.hosts,
        )
        self._programmer = Programmer(vpp, self.steerer, self.hosts)
        self.hosts.begin_anew()

    # What status reads

    @property
    def in_sync(self) -> bool:
        """True when VPP holds exactly what the kernel's state, as far as we have read it, means."""
        return (
            self.client is not None
            and not self.vpp_problem  # it has told what it holds
            and self._kernel.is_current
            and self._todo.done
            and not self._working
            and not self.vpp.leftovers
            and self.steerer.settled
            and self.hosts.settled
            and not self._wishes
            and not any(state.refusals for state in self.groups.values())
        )

    @property
    def queue(self) -> int:
        """Number of groups that wait for their turn."""
        return len(self._todo)

    @property
    def groups(self) -> dict[GroupKey, GroupState]:
        """What is known of each group on VPP's side."""
        return self.vpp.groups

    @property
    def kernel_problem(self) -> str:
        """Why the kernel cannot be followed, as a sentence; nothing where it can."""
        return self._kernel.problem

    # What others ask for

    def reload(self, settings: Settings) -> None:
        """Take new settings; they hold from now on."""
        self.settings = settings
        self._kernel.netlink = settings.netlink
        self.steerer.reload(settings.offload)
        self._todo.look_around()

    def request_resync(self) -> None:
        """Dump the kernel's tables anew, and look at everything again."""
        self._kernel.request_resync()

    async def read_routes(self) -> None:
        """Read the kernel's routes over VTIs once, for an engine that does not run. Raises OSError and TimeoutError."""
        await self.vtis.look([each.policy for each in outbound(self.model.policies())])

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
            tasks.create_task(self._kernel.follow())
            tasks.create_task(self._kernel.resync())
            if self.vtis.followed:
                tasks.create_task(self._kernel.follow_routes())
            tasks.create_task(self._follow_vpp())
            tasks.create_task(self._ask_for_rekeys())
            tasks.create_task(self.hosts.follow())
            tasks.create_task(self.acquires.run())

    async def _follow_vpp(self) -> None:
        """Connect, keep VPP equal while it lives, and begin anew when it goes."""
        await self._kernel.wait_until_known()  # else what an earlier run made of it would be taken away
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
                self.acquires.forget()
                if self.client is not None:
                    self.counters.requests += self.client.sent
                    client, self.client = self.client, None
                    await client.close()
            await asyncio.sleep(self._reconnect_s)
            self._reconnect_s = min(2 * self._reconnect_s, RECONNECT_LONGEST_S)
            self.counters.reconnects += 1

    def _on_interface_event(self, sw_if_index: int) -> None:
        """An interface of VPP changed. Whether it is one of ours is known once the answers that are under way are in."""
        self._todo.interfaces.add(sw_if_index)
        self._todo.wake.set()

    async def take_stock(self, client: VppClient) -> None:
        """Learn what VPP holds of ours, and mark everything dirty. Raises VppError."""
        found = await inventory.read_inventory(
            client, lambda tag: tag.startswith(TAG_PREFIX), SAD_ID_FIRST, SAD_ID_LAST, INSTANCES, NUMBERS
        )
        self._wear.met_vpp(client.pid)
        self._wishes.clear()
        surroundings = Surroundings(self.journal, found.other_tables)
        await surroundings.read_interfaces(client)
        every = surroundings.interfaces.every
        vpp = VppSide(self.model, self._wear, self._todo, self.journal, self.counters, found, every)
        if found.interfaces or found.sas:
            has = f"{count(len(found.interfaces), 'tunnel')} and {count(len(found.sas), 'SA')}"
            self.journal.note(Source.VPP, f"has {has} of an earlier run; those that are still right stay")
        self._todo.interfaces, self._todo.surroundings = set(), False  # from now on it is told what changes
        await client.call("want_interface_events", {"enable_disable": 1, "pid": 0})
        await surroundings.read(client, self.settings.offload.selector_enforcement)
        vpp.overlays_are(await surroundings.read_overlays(client))
        surroundings.follow_vtis(self.vtis)
        self._know(vpp, surroundings)
        self._todo.soil(self.model.groups)
        if found.neighbors:  # what goes to the kernel shall go on while all groups are looked at again
            for key in self.model.groups:
                self._translate(key)

    async def _keep_equal(self, client: VppClient) -> None:
        """Program what is dirty, again and again. Ends with VppError when VPP goes."""
        loop = asyncio.get_running_loop()
        todo = self._todo
        quiet_until = 0.0
        look_again_at = loop.time() + LOOK_AGAIN_S
        while True:
            await self._wait_for_work(client, min(look_again_at, self._next_retry()))
            if self._others_changed():
                await self.steerer.look_at_overlays(client)  # at once: one that is new may send in clear
            if (pause := quiet_until - loop.time()) > 0 and len(todo) < self.settings.netlink.batch_size:
                await asyncio.sleep(
                    pause
                )  # the first change after a quiet time is handled at once, those after it are gathered
            if todo.surroundings or todo.interfaces or loop.time() >= look_again_at:
                self._working = True  # not in sync before it is known what changed
                await self._look_around(client)
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
        wake = loop.create_task(self._todo.wake.wait())
        try:
            if not self._todo:
                timeout = max(0.0, until - loop.time())
                await asyncio.wait((wake, client.closed), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            wake.cancel()
        self._todo.wake.clear()
        if client.closed.done():
            raise VppUnavailable("VPP closed the connection")

    def _next_retry(self) -> float:
        states = (*self.groups.values(), *self.vpp.orphans)
        retries = [state.refusals.next_retry for state in states if state.refusals]
        steerer = self.steerer
        common = (steerer.refusals, steerer.stale, steerer.overlayer.refusals)
        return min(*(refusals.next_retry for refusals in common), *retries)

    def _soil_retries(self) -> None:
        """Let groups be looked at again of which VPP refused something that is now due again."""
        now = asyncio.get_running_loop().time()
        refused = [(key, state.refusals) for key, state in self.groups.items() if state.refusals]
        self._todo.soil(key for key, refusals in refused if refusals.next_retry <= now)

    async def _look_around(self, client: VppClient) -> None:
        """Read VPP's addresses again, and ask again about remotes; what depends on what changed gets dirty."""
        todo, vpp, surroundings = self._todo, self.vpp, self.surroundings
        others_changed = self._others_changed()
        todo.interfaces = set()
        everything = todo.surroundings or others_changed
        todo.surroundings = False
        if everything:
            self.hosts.forget()
        if others_changed:
            for gone in await surroundings.read_interfaces(client):
                vpp.layers.interface_deleted(gone)
                vpp.lost(gone)
            await self.steerer.look_for_neighbors(client)
        if await surroundings.read_addresses(client):
            todo.soil(self.model.groups)
        if await surroundings.enforce(client, self.settings.offload.selector_enforcement):
            todo.soil(self.model.groups)
        leads = self.vtis.leads
        if (
            leads.lacking
            or leads.routes.keys() - {0}
            or surroundings.in_vrfs
            or self.steerer.stale  # the removal of a route, maybe, that went with its table
            or any(state.refusals for state in self.groups.values())
        ):
            await self._read_tables(client)
        remotes = surroundings.known_remotes(reached_ones=everything)
        moved = await surroundings.look_up(client, remotes, vpp.interfaces())
        if moved := moved | await self._read_mtus(client):
            todo.soil(key for key in self.model.groups if key.low in moved or key.high in moved)

    async def _read_tables(self, client: VppClient) -> None:
        """Look again at the tunnels of VTIs in VRFs whose table VPP has by now, or no longer has."""
        if_ids = await self.surroundings.read_tables(client)
        self.vpp.tables_are(self.surroundings.tables)
        self._todo.soil(key for key in self.model.groups if key.if_id in if_ids)

    async def _steer(self, client: VppClient) -> None:
        """Steer, and look again at the tunnels of VTIs that came, went or are in another VRF; its table may be as new as that.

        What is left in the VRF before goes first: with our last interface VPP may let go of its table, and keeps for the next one
        what is in it.
        """
        if_ids = self.surroundings.follow_vtis(self.vtis)
        self._todo.soil(key for key in self.model.groups if key.if_id in if_ids)
        if self.surroundings.in_vrfs.keys() & if_ids:
            await self._read_tables(client)
        await self.steerer.steer(client)
        if if_ids:
            await self.steerer.remove_stale_routes(client)

    async def _read_mtus(self, client: VppClient) -> set[bytes]:
        """Read how long packets to the remotes of VTIs may be, and return the remotes for which that is news."""
        ends = {end for key in self.model.groups if key.if_id for end in (key.low, key.high)}
        return await self.surroundings.read_mtus(client, ends)

    def _others_changed(self) -> bool:
        unknown = [index for index in self._todo.interfaces if index not in self.vpp.owner_of]
        return bool(unknown) and not self.vpp.junctions.indexes.keys() >= {*unknown}

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

    async def _kernel_stopped(self, keys: Iterable[GroupKey]) -> None:
        """Note which SAs of groups, for whose tunnels the kernel no longer sends itself, it sent with before; VPP must not begin
        with those.
        """
        for key in keys:
            state, group = self.groups.get(key), self.model.groups.get(key)
            if group is None or state is None or state.held.protection is not None:
                continue
            inbound = {sa_id for sa_id, verdict in state.desired.verdicts.items() if verdict.direction == "in"}
            for sa in [sa for sa_id, sa in group.sas.items() if sa_id not in inbound]:
                try:
                    has_sent = await self._source.has_sent(sa)
                except (OSError, ValueError):
                    has_sent = True  # as likely as not; of one that is gone it does not matter
                if has_sent:
                    self._wear.kernel_sends(sa)

    # From dirty to programmed

    async def converge(self, client: VppClient) -> None:
        """Program all that is dirty, then take away what nobody wants any more. Raises VppUnavailable.

        Policies go first, all of them: what they match is dropped from then on until its tunnel is there.
        """
        todo, steerer = self._todo, self.steerer
        self._working = True
        await self._steer(client)
        while todo:
            keys = todo.take(CHUNK)
            await self._look_up_new(client, keys)
            await self._steer(client)  # there may be new policies by now
            states = [state for key in keys if (state := self._translate(key)) is not None]
            if steerer.fallbacks_changed:
                await steerer.steer(client)  # the kernel is to have no more of what VPP takes over now
            await self._programmer.program(client, states)
            self.acquires.programmed()
            if not all(map(steerer.may_receive, states)):
                await steerer.steer(client)  # their interfaces are there by now
            for state in states:
                key = state.desired.key
                gone = key not in self.model.groups and key not in todo  # else it went just now
                if gone and state.held.empty and not state.refusals:
                    self.groups.pop(key, None)
                    steerer.forget(key)
        await self._remove_leftovers(client)
        self.hosts.look(self.groups)
        self._working = False

    async def _remove_leftovers(self, client: VppClient) -> None:
        """Take away what an earlier run left and nobody claims, and routes that nobody claims any more."""
        vpp = self.vpp
        if told := vpp.give_up_leftovers():
            log.info("removing %s of an earlier run from VPP", told)
            self.journal.note(Source.VPP, f"removing {told} of an earlier run")
        await self.steerer.remove_stale_routes(client)
        await self.steerer.steer(client)  # there may be new tunnels to be asked, and tables that are empty now
        for state in vpp.orphans:
            state.refusals.let_due_be_tried()
        await self._programmer.program(client, vpp.orphans)
        vpp.orphans = [state for state in vpp.orphans if not state.held.empty]

    async def _look_up_new(self, client: VppClient, keys: Iterable[GroupKey]) -> None:
        """Ask VPP about the remote ends that it was not asked about yet."""
        new: dict[bytes, None] = {}
        for key in keys:
            group = self.model.groups.get(key)
            if group is not None:
                remote = remote_of(key, group, self.surroundings.env.addresses)
                if remote is not None and not self.surroundings.knows(remote):
                    new[remote] = None
        if new:
            await self.surroundings.look_up(client, list(new), self.vpp.interfaces())
            await self._read_mtus(client)

    def _translate(self, key: GroupKey) -> GroupState | None:
        """Bring the desired state of a group up to date."""
        group = self.model.groups.get(key)
        state = self.groups.get(key)
        if group is None and state is None:
            return None
        env = self.surroundings.env
        known = state.desired.verdicts if state is not None and state.env is env else {}
        group = group or Group(key)
        if state is None:
            state = self.vpp.state_of(key)
        before = state.desired.tunnel
        state.desired = self._translated(group, known, state.held)
        state.env = env
        state.waits = self.acquires.note(group, env)
        self.steerer.translated(state, before)
        self._wish_for_rekeys(state)
        state.refusals.let_due_be_tried()
        return state

    def _translated(self, group: Group, known: Mapping[SaId, Verdict], held: HeldTunnel) -> Desired:
        """Translate; an SA that our own code stumbles over costs its own group, not the service."""
        worn = {sa_id for sa_id, sa in group.sas.items() if self._wear.worn(sa)}
        try:
            env = self.surroundings.env
            goes_on = [sa.spec for sa in held.sas.values() if not self._wear.is_kernels(sa.spec)] if worn else ()
            return translate(group.key, group, env, known, worn, goes_on)
        except Exception as error:  # whatever it is: the other tunnels go on
            log.error("a tunnel cannot be translated: %s at %s", type(error).__name__, tag_of(group.key))
            verdict = Verdict(Fate.UNSUPPORTED, f"a mistake in vpp-ipsecd: {type(error).__name__}")
            return Desired(group.key, verdicts=dict.fromkeys(group.sas, verdict))

    def _wish_for_rekeys(self, state: GroupState) -> None:
        """Let those SAs of a group be rekeyed, and no others, that have to be."""
        verdicts = state.desired.verdicts
        worn = frozenset(sa_id for sa_id, verdict in verdicts.items() if verdict.fate is Fate.REKEYING)
        for sa_id in state.worn - worn:
            self._wishes.drop(sa_id)
        for sa_id in worn:
            self._wishes.add(sa_id)
        state.worn = worn
