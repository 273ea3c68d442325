"""The loop that reconciles VPP with the kernel: events mark tunnels dirty; dirty tunnels are translated, planned and
sent.

Start-up, events, recovery and reset share one path: each only marks tunnels dirty. All tasks share the state within one
event loop. Those of `KernelWatcher` keep the models equal to the kernel; `_follow_vpp` keeps VPP equal to the desired
state.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from vppipsec.conf.settings import Settings
from vppipsec.kernel.hostpath.apply import HostRedirects
from vppipsec.kernel.xfrm.sad_spd import KernelModel, Tunnel, TunnelKey
from vppipsec.kernel.xfrm.values import SaId
from vppipsec.sync.actual.environment import Environment
from vppipsec.sync.actual.vpp_state import TunnelState, VppState
from vppipsec.sync.actual.vtis import RouteSource, Vtis
from vppipsec.sync.apply.host_interfaces import HostInterfaceReconciler
from vppipsec.sync.apply.steering import SteeringReconciler
from vppipsec.sync.apply.tunnels import TunnelReconciler
from vppipsec.sync.desired.outbound_policy import outbound_policies
from vppipsec.sync.desired.state import OffloadDecision, OffloadStatus, Translation
from vppipsec.sync.desired.tunnel import remote_endpoint, tag_of, translate
from vppipsec.sync.ike.acquire import Acquires
from vppipsec.sync.ike.rekey_queue import RekeyQueue
from vppipsec.sync.ike.sa_usage import SaUsage
from vppipsec.sync.journal import Counters, Journal, JournalSource, count_text
from vppipsec.sync.kernel_watcher import KernelSource, KernelWatcher
from vppipsec.sync.work_queue import WorkQueue
from vppipsec.vpp import inventory
from vppipsec.vpp.api.client import VppClient, connect
from vppipsec.vpp.api.errors import VppError, VppUnavailable
from vppipsec.vpp.ownership import INSTANCES, SAD_ID_FIRST, SAD_ID_LAST, TABLE_NUMBERS, TAG_PREFIX
from vppipsec.vpp.state.tunnels import ActualTunnel
from vppipsec.vpp.stats import read_route_packets

log = logging.getLogger(__name__)

TUNNELS_PER_CHUNK = 500
"""Tunnels that are translated and sent together. The first chunk is complete before the last one starts."""
RECONNECT_FIRST_S = 0.1
RECONNECT_MAX_S = 5.0
ENVIRONMENT_INTERVAL_S = 2.0
"""Interval at which VPP is asked again about its addresses and about remotes that it could not reach."""


class Engine:
    """Keeps one VPP equal to one kernel. `run` works until it is cancelled; VPP then keeps its state.

    The state of a VPP (`vpp`, `environment`, `steering`) is created again for each connection.
    """

    def __init__(
        self,
        settings: Settings,
        source: KernelSource,
        connector: Callable[..., Awaitable[VppClient]] = connect,
        routes: RouteSource | None = None,
        apply_hosts: Callable[[HostRedirects], None] | None = None,
        read_packets: Callable[[str, Sequence[int]], Awaitable[list[int]]] = read_route_packets,
    ) -> None:
        """`source` delivers the kernel's SAs and policies, `routes` its routes over VTIs; without `routes` there are
        none.

        `apply_hosts` makes the kernel send to host interfaces (`HostInterfaceReconciler`). Without it, the kernel keeps
        encrypting the router's own packets. `read_packets` reads VPP's route counters from the given stats socket.
        """
        self.settings = settings
        self.model = KernelModel()
        self.counters = Counters()
        self.journal = Journal()
        self.vtis = Vtis(routes)
        self._work_queue = WorkQueue()
        self.host_interfaces = HostInterfaceReconciler(
            self.vtis, self._work_queue, self.journal, apply_hosts, self._kernel_stopped
        )
        self.client: VppClient | None = None
        self.vpp_problem = "not connected yet"
        self._source = source
        self._connect = connector
        self._sa_usage = SaUsage()
        self._rekey_queue = RekeyQueue()
        self._kernel = KernelWatcher(
            source,
            settings.netlink,
            self.model,
            self.vtis,
            self._sa_usage,
            self._work_queue,
            self.journal,
            self.counters,
        )
        self.acquires = Acquires(
            self.model,
            self.journal,
            self.counters,
            source.acquire,
            lambda indices: read_packets(self.settings.vpp.stats_socket, indices),
            lambda: self.vpp.routes.discarding(),
            lambda route: self.steering.route_targets.target(route),
        )
        self._synced = asyncio.Event()
        self._is_working = False
        self._reconnect_s = RECONNECT_FIRST_S
        self._set_vpp_state(
            VppState(self.model, self._sa_usage, self._work_queue, self.journal, self.counters),
            Environment(self.journal),
        )

    def _set_vpp_state(self, vpp: VppState, environment: Environment) -> None:
        """Replace the state of the VPP."""
        self.acquires.clear()
        self.vpp = vpp
        self.environment = environment
        self.steering = SteeringReconciler(
            vpp,
            environment,
            self.model,
            self.vtis,
            self._sa_usage,
            self._work_queue,
            self.journal,
            self.settings.offload,
            self.host_interfaces,
        )
        self._tunnel_reconciler = TunnelReconciler(vpp, self.steering, self.host_interfaces)
        self.host_interfaces.reset()

    # Read by status

    @property
    def in_sync(self) -> bool:
        """True when VPP holds exactly the desired state of the kernel's state as last read."""
        return (
            self.client is not None
            and not self.vpp_problem  # its state has been read
            and self._kernel.is_current
            and self._work_queue.is_empty
            and not self._is_working
            and not self.vpp.unclaimed_count
            and self.steering.settled
            and self.host_interfaces.settled
            and not self._rekey_queue
            and not any(state.refusals for state in self.tunnels.values())
        )

    @property
    def queue_length(self) -> int:
        """Number of dirty tunnels."""
        return len(self._work_queue)

    @property
    def tunnels(self) -> dict[TunnelKey, TunnelState]:
        """The state of each tunnel in VPP."""
        return self.vpp.tunnels

    @property
    def kernel_problem(self) -> str:
        """Why the kernel cannot be followed, as a sentence; empty where it can."""
        return self._kernel.problem

    # Called by others

    def reload(self, settings: Settings) -> None:
        """Apply new settings from now on."""
        self.settings = settings
        self._kernel.netlink = settings.netlink
        self.steering.reload(settings.offload)
        self._work_queue.request_environment_read()

    def request_resync(self) -> None:
        """Dump the kernel's tables again, and check everything again."""
        self._kernel.request_resync()

    async def read_routes(self) -> None:
        """Read the kernel's routes over VTIs once, for an engine that does not run. Raises OSError and TimeoutError."""
        await self.vtis.read([each.policy for each in outbound_policies(self.model.policies())])

    async def wait_in_sync(self) -> None:
        """Return once `in_sync` holds."""
        while not self.in_sync:
            self._synced.clear()
            await self._synced.wait()

    # The tasks

    async def run(self) -> None:
        """Work until cancelled. It never returns by itself, and raises only on a programming error."""
        self.request_resync()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._kernel.follow())
            tasks.create_task(self._kernel.resync())
            if self.vtis.followed:
                tasks.create_task(self._kernel.follow_routes())
            tasks.create_task(self._follow_vpp())
            tasks.create_task(self._send_rekey_requests())
            tasks.create_task(self.host_interfaces.run())
            tasks.create_task(self.acquires.run())

    async def _follow_vpp(self) -> None:
        """Connect, keep VPP in sync while it lives, and connect again after it is gone."""
        await self._kernel.wait_until_known()  # else an earlier run's objects would be removed
        while True:
            try:
                self.client = await self._connect(self.settings.vpp.api_socket, on_event=self._on_interface_event)
                log.info("connected to VPP %s, process %d", self.client.version, self.client.pid)
                self.journal.note(
                    JournalSource.VPP, f"connected to VPP {self.client.version}, process {self.client.pid}"
                )
                await self.adopt_vpp(self.client)
                self.vpp_problem = ""
                await self._keep_in_sync(self.client)
            except VppError as error:
                if str(error) != self.vpp_problem:
                    log.error("%s", error)
                    self.journal.note(JournalSource.VPP, str(error))
                self.vpp_problem = str(error)
            finally:
                self._is_working = False
                self.acquires.clear()
                if self.client is not None:
                    self.counters.requests += self.client.sent
                    client, self.client = self.client, None
                    await client.close()
            await asyncio.sleep(self._reconnect_s)
            self._reconnect_s = min(2 * self._reconnect_s, RECONNECT_MAX_S)
            self.counters.reconnects += 1

    def _on_interface_event(self, sw_if_index: int) -> None:
        """Record that an interface of VPP changed.

        Whether it is one of the service's is known only after the pending replies.
        """
        self._work_queue.changed_interfaces.add(sw_if_index)
        self._work_queue.wake.set()

    async def adopt_vpp(self, client: VppClient) -> None:
        """Read what the service holds in VPP, and mark everything dirty. Raises VppError."""
        found = await inventory.read_inventory(
            client, lambda tag: tag.startswith(TAG_PREFIX), SAD_ID_FIRST, SAD_ID_LAST, INSTANCES, TABLE_NUMBERS
        )
        self._sa_usage.set_vpp_start(client.pid)
        self._rekey_queue.clear()
        environment = Environment(self.journal, found.other_tables)
        await environment.read_interfaces(client)
        every = environment.interfaces.all
        vpp = VppState(self.model, self._sa_usage, self._work_queue, self.journal, self.counters, found, every)
        if found.interfaces or found.sas:
            what = f"{count_text(len(found.interfaces), 'tunnel')} and {count_text(len(found.sas), 'SA')}"
            self.journal.note(JournalSource.VPP, f"has {what} of an earlier run; those that are still right stay")
        # from now on VPP reports changes
        self._work_queue.changed_interfaces, self._work_queue.environment_dirty = (
            set(),
            False,
        )
        await client.call("want_interface_events", {"enable_disable": 1, "pid": 0})
        await environment.read_all(client, self.settings.offload.selector_enforcement)
        vpp.set_gre_ipip(await environment.read_gre_ipip(client))
        environment.update_vtis(self.vtis)
        self._set_vpp_state(vpp, environment)
        self._work_queue.mark_dirty(self.model.tunnels)
        if found.neighbors:  # packets to the kernel continue while all tunnels are translated again
            for key in self.model.tunnels:
                self._translate(key)

    async def _keep_in_sync(self, client: VppClient) -> None:
        """Reconcile whatever is dirty, again and again. Raises VppError when VPP is gone."""
        loop = asyncio.get_running_loop()
        work_queue = self._work_queue
        quiet_until = 0.0
        look_again_at = loop.time() + ENVIRONMENT_INTERVAL_S
        while True:
            await self._wait_for_work(client, min(look_again_at, self._next_retry()))
            if self._foreign_interfaces_changed():
                await self.steering.read_gre_ipip(client)  # at once: a new one may send unencrypted
            if (pause := quiet_until - loop.time()) > 0 and len(work_queue) < self.settings.netlink.batch_size:
                # the first change after a quiet time is handled at once, later ones are batched
                await asyncio.sleep(pause)
            if work_queue.environment_dirty or work_queue.changed_interfaces or loop.time() >= look_again_at:
                self._is_working = True  # not in sync before the changes are known
                await self._read_environment(client)
                look_again_at = loop.time() + ENVIRONMENT_INTERVAL_S
            self._mark_due_retries()
            await self.reconcile(client)
            self._reconnect_s = RECONNECT_FIRST_S  # only now: if a request crashes VPP, reconnecting must slow down
            quiet_until = loop.time() + self.settings.netlink.batch_delay_ms / 1000
            if self.in_sync:
                self._synced.set()

    async def _wait_for_work(self, client: VppClient, until: float) -> None:
        """Wait until something is dirty, a retry is due, or VPP is gone (VppUnavailable)."""
        loop = asyncio.get_running_loop()
        wake = loop.create_task(self._work_queue.wake.wait())
        try:
            if not self._work_queue:
                timeout = max(0.0, until - loop.time())
                await asyncio.wait((wake, client.closed), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            wake.cancel()
        self._work_queue.wake.clear()
        if client.closed.done():
            raise VppUnavailable("VPP closed the connection")

    def _next_retry(self) -> float:
        states = (*self.tunnels.values(), *self.vpp.orphans)
        retries = [state.refusals.next_retry for state in states if state.refusals]
        steering = self.steering
        common = (steering.refusals, steering.stale_route_refusals, steering.gre_ipip.refusals)
        return min(*(refusals.next_retry for refusals in common), *retries)

    def _mark_due_retries(self) -> None:
        """Mark tunnels dirty that have a refusal due for retry."""
        now = asyncio.get_running_loop().time()
        refused = [(key, state.refusals) for key, state in self.tunnels.items() if state.refusals]
        self._work_queue.mark_dirty(key for key, refusals in refused if refusals.next_retry <= now)

    async def _read_environment(self, client: VppClient) -> None:
        """Read VPP's addresses again, ask again about remotes, and mark the tunnels dirty that depend on a change."""
        work_queue, vpp, environment = self._work_queue, self.vpp, self.environment
        foreign_changed = self._foreign_interfaces_changed()
        work_queue.changed_interfaces = set()
        read_everything = work_queue.environment_dirty or foreign_changed
        work_queue.environment_dirty = False
        if read_everything:
            self.host_interfaces.invalidate()
        if foreign_changed:
            for gone in await environment.read_interfaces(client):
                vpp.layers.interface_deleted(gone)
                vpp.note_interface_gone(gone)
            await self.steering.read_neighbors(client)
        if await environment.read_addresses(client):
            work_queue.mark_dirty(self.model.tunnels)
        if await environment.set_enforcement(client, self.settings.offload.selector_enforcement):
            work_queue.mark_dirty(self.model.tunnels)
        vti_targets = self.vtis.route_targets
        if (
            vti_targets.missing_tables
            or vti_targets.routes.keys() - {0}
            or environment.vrf_tables
            or self.steering.stale_route_refusals  # perhaps the removal of a route that is gone with its table
            or any(state.refusals for state in self.tunnels.values())
        ):
            await self._read_tables(client)
        remotes = environment.looked_up_remotes(include_reached=read_everything)
        moved = await environment.look_up_remotes(client, remotes, vpp.tunnel_interfaces())
        if moved := moved | await self._read_mtus(client):
            work_queue.mark_dirty(key for key in self.model.tunnels if key.low in moved or key.high in moved)

    async def _read_tables(self, client: VppClient) -> None:
        """Read VPP's tables, and mark tunnels of VTIs dirty whose VRF's table came or went."""
        if_ids = await self.environment.read_tables(client)
        self.vpp.set_tables(self.environment.tables)
        self._work_queue.mark_dirty(key for key in self.model.tunnels if key.if_id in if_ids)

    async def _reconcile_steering(self, client: VppClient) -> None:
        """Reconcile steering, and mark tunnels dirty whose VTI came, went or changed its VRF. The VRF's table may be
        new, too.

        Routes in the former VRF are removed first. Without an interface of the service, VPP may release its table, and
        keep the routes for the table's next user.
        """
        changed_vtis = self.environment.update_vtis(self.vtis)
        self._work_queue.mark_dirty(key for key in self.model.tunnels if key.if_id in changed_vtis)
        if self.environment.vrf_tables.keys() & changed_vtis:
            await self._read_tables(client)
        await self.steering.reconcile(client)
        if changed_vtis:
            await self.steering.remove_stale_routes(client)

    async def _read_mtus(self, client: VppClient) -> set[bytes]:
        """Read the MTUs of the links to the remotes of VTIs, and return the remotes for which they changed."""
        ends = {end for key in self.model.tunnels if key.if_id for end in (key.low, key.high)}
        return await self.environment.read_mtus(client, ends)

    def _foreign_interfaces_changed(self) -> bool:
        unknown = [index for index in self._work_queue.changed_interfaces if index not in self.vpp.tunnel_of_interface]
        return bool(unknown) and not self.vpp.classifiers.if_ids.keys() >= {*unknown}

    async def _send_rekey_requests(self) -> None:
        """Ask the IKE daemon, through the kernel, to rekey SAs; at most `restart_rekey_rate` a second."""
        while True:
            sa_id = await self._rekey_queue.next()
            sa = self.model.find(sa_id)
            if sa is None or self.client is None:
                continue
            try:
                await self._source.expire(sa)
                self.counters.rekeys += 1
                self.journal.note_rekey(sa)
            except (OSError, TimeoutError) as error:
                log.warning("an SA cannot be rekeyed: %s", error)
                self.request_resync()
            await asyncio.sleep(1 / self.settings.offload.restart_rekey_rate)

    async def _kernel_stopped(self, keys: Iterable[TunnelKey]) -> None:
        """Record SAs with which the kernel has sent before it stopped sending for these tunnels.

        VPP must not start with them.
        """
        for key in keys:
            state, tunnel = self.tunnels.get(key), self.model.tunnels.get(key)
            if tunnel is None or state is None or state.actual.protection is not None:
                continue
            inbound = {sa_id for sa_id, decision in state.desired.decisions.items() if decision.direction == "in"}
            for sa in [sa for sa_id, sa in tunnel.sas.items() if sa_id not in inbound]:
                try:
                    has_sent = await self._source.has_sent(sa)
                except (OSError, ValueError):
                    has_sent = True  # it may well have; for an SA that is gone it does not matter
                if has_sent:
                    self._sa_usage.note_kernel_sends(sa)

    # Reconciling

    async def reconcile(self, client: VppClient) -> None:
        """Reconcile all dirty tunnels, then remove what is no longer wanted. Raises VppUnavailable.

        All policies go first: VPP drops the packets that they match until the tunnels exist.
        """
        work_queue, steering = self._work_queue, self.steering
        self._is_working = True
        await self._reconcile_steering(client)
        while work_queue:
            keys = work_queue.pop_batch(TUNNELS_PER_CHUNK)
            await self._look_up_new_remotes(client, keys)
            await self._reconcile_steering(client)  # there may be new policies by now
            states = [state for key in keys if (state := self._translate(key)) is not None]
            if steering.fallbacks_changed:
                # the kernel must not get packets of tunnels that VPP carries from now on
                await steering.reconcile(client)
            await self._tunnel_reconciler.reconcile(client, states)
            self.acquires.note_routes_applied()
            if not all(map(steering.inbound_ready, states)):
                await steering.reconcile(client)  # their interfaces exist by now
            for state in states:
                key = state.desired.key
                gone = key not in self.model.tunnels and key not in work_queue  # else it was deleted just now
                if gone and state.actual.is_empty and not state.refusals:
                    self.tunnels.pop(key, None)
                    steering.note_tunnel_gone(key)
        await self._remove_unclaimed(client)
        self.host_interfaces.update(self.tunnels)
        self._is_working = False

    async def _remove_unclaimed(self, client: VppClient) -> None:
        """Remove what an earlier run left and no tunnel claims, and routes that are no longer wanted."""
        vpp = self.vpp
        if what := vpp.orphan_unclaimed():
            log.info("removing %s of an earlier run from VPP", what)
            self.journal.note(JournalSource.VPP, f"removing {what} of an earlier run")
        await self.steering.remove_stale_routes(client)
        await self.steering.reconcile(client)  # layers may attach to new tunnels, and tables may be empty now
        for state in vpp.orphans:
            state.refusals.release_due()
        await self._tunnel_reconciler.reconcile(client, vpp.orphans)
        vpp.orphans = [state for state in vpp.orphans if not state.actual.is_empty]

    async def _look_up_new_remotes(self, client: VppClient, keys: Iterable[TunnelKey]) -> None:
        """Ask VPP about remote ends that it was not asked about yet."""
        new: dict[bytes, None] = {}
        for key in keys:
            tunnel = self.model.tunnels.get(key)
            if tunnel is not None:
                remote = remote_endpoint(key, tunnel, self.environment.snapshot.addresses)
                if remote is not None and not self.environment.has_looked_up(remote):
                    new[remote] = None
        if new:
            await self.environment.look_up_remotes(client, list(new), self.vpp.tunnel_interfaces())
            await self._read_mtus(client)

    def _translate(self, key: TunnelKey) -> TunnelState | None:
        """Return the state of a tunnel with its desired state updated."""
        tunnel = self.model.tunnels.get(key)
        state = self.tunnels.get(key)
        if tunnel is None and state is None:
            return None
        env = self.environment.snapshot
        known = state.desired.decisions if state is not None and state.env is env else {}
        tunnel = tunnel or Tunnel(key)
        if state is None:
            state = self.vpp.tunnel_state(key)
        before = state.desired.tunnel
        state.desired = self._translate_contained(tunnel, known, state.actual)
        state.env = env
        state.awaits_sa = self.acquires.update(tunnel, env)
        self.steering.note_translated(state, before)
        self._update_rekey_queue(state)
        state.refusals.release_due()
        return state

    def _translate_contained(
        self, tunnel: Tunnel, known: Mapping[SaId, OffloadDecision], actual: ActualTunnel
    ) -> Translation:
        """Translate. An SA that raises an internal error affects its own tunnel only."""
        sequence_lost = {sa_id for sa_id, sa in tunnel.sas.items() if self._sa_usage.sequence_lost(sa)}
        try:
            env = self.environment.snapshot
            keeps_sequence = (
                [sa.spec for sa in actual.sas.values() if not self._sa_usage.kernel_has_sent(sa.spec)]
                if sequence_lost
                else ()
            )
            return translate(tunnel.key, tunnel, env, known, sequence_lost, keeps_sequence)
        except Exception as error:  # whatever it is: the other tunnels go on
            log.error("a tunnel cannot be translated: %s at %s", type(error).__name__, tag_of(tunnel.key))
            decision = OffloadDecision(OffloadStatus.UNSUPPORTED, f"a mistake in vpp-ipsecd: {type(error).__name__}")
            return Translation(tunnel.key, decisions=dict.fromkeys(tunnel.sas, decision))

    def _update_rekey_queue(self, state: TunnelState) -> None:
        """Set which SAs of a tunnel are in the rekey queue."""
        decisions = state.desired.decisions
        awaiting = frozenset(
            sa_id for sa_id, decision in decisions.items() if decision.status is OffloadStatus.AWAITING_REKEY
        )
        for sa_id in state.awaiting_rekey - awaiting:
            self._rekey_queue.discard(sa_id)
        for sa_id in awaiting:
            self._rekey_queue.add(sa_id)
        state.awaiting_rekey = awaiting
