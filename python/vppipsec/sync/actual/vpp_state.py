"""The actual state of one VPP, by tunnel and across tunnels: the inventory at connection, updated by VPP's replies."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace

from vppipsec.kernel.xfrm.sad_spd import KernelModel, Tunnel, TunnelKey
from vppipsec.kernel.xfrm.values import SaId
from vppipsec.sync.actual.adoption import Adoption
from vppipsec.sync.actual.backoff import Refusals
from vppipsec.sync.actual.classifiers import ActualClassifiers, classifier_if_id
from vppipsec.sync.desired.environment import EnvironmentSnapshot
from vppipsec.sync.desired.state import Translation
from vppipsec.sync.desired.tunnel import tag_of
from vppipsec.sync.desired.vti_routes import TableId
from vppipsec.sync.ike.sa_usage import SaUsage
from vppipsec.sync.journal import Counters, Journal
from vppipsec.sync.work_queue import WorkQueue
from vppipsec.vpp.api.client import Reply
from vppipsec.vpp.api.errors import describe_error
from vppipsec.vpp.api.ip import RouteAddDel
from vppipsec.vpp.api.ipsec import IpsecItfCreate, IpsecItfDelete, SadEntryAdd, SadEntryDel
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.gre_ipip import GreIpipInterface
from vppipsec.vpp.inventory import Inventory
from vppipsec.vpp.ownership import TABLE_NUMBERS
from vppipsec.vpp.state.numbers import NumberPools
from vppipsec.vpp.state.policy_layers import adopt_layers
from vppipsec.vpp.state.routes import ActualRoutes
from vppipsec.vpp.state.tunnels import ActualTunnel
from vppipsec.vpp.types import NO_INDEX, Protection, interfaces_of

log = logging.getLogger(__name__)

NO_TUNNEL = TunnelKey(b"", b"", 0, 0, 0)
"""Owner of what an earlier run left in VPP and no tunnel of the kernel claims."""
EMPTY_INVENTORY = Inventory((), (), (), {}, 0, frozenset(), frozenset())
_GONE_INDEX = NO_INDEX - 1
"""Replaces the interface of a route after it is gone. No interface of VPP has this index."""


@dataclass(slots=True)
class TunnelState:
    """The state of one tunnel in VPP. `env` is the environment of its last translation."""

    desired: Translation
    actual: ActualTunnel = field(default_factory=ActualTunnel)
    env: EnvironmentSnapshot | None = None
    awaits_sa: bool = False
    """Whether the kernel has no outbound SA. The routes then have to exist and drop, so that VPP counts their packets.
    """
    awaiting_rekey: frozenset[SaId] = frozenset()
    """SAs that must be rekeyed before VPP carries the tunnel on."""
    refusals: Refusals = field(init=False)

    def __post_init__(self) -> None:
        self.refusals = Refusals(self.desired.key)


class VppState:
    """What the service holds in one VPP, and what VPP refused.

    `tunnel_of_interface`: sw_if_index of the service's interface -> its tunnel.
    """

    def __init__(
        self,
        model: KernelModel,
        sa_usage: SaUsage,
        work_queue: WorkQueue,
        journal: Journal,
        counters: Counters,
        found: Inventory = EMPTY_INVENTORY,
        interfaces: Set[int] = frozenset(),
    ) -> None:
        """Adopt the inventory; `interfaces` are all interfaces of VPP, whoever created them."""
        self.tunnels: dict[TunnelKey, TunnelState] = {}
        self.routes = ActualRoutes()
        self.route_source = found.route_source
        self.numbers = NumberPools(found.sad_ids, found.instances)
        self.layers = adopt_layers(found, interfaces)
        self.classifiers = ActualClassifiers(found.interfaces, found.tables)
        found = replace(found, interfaces=tuple(itf for itf in found.interfaces if classifier_if_id(itf.tag) is None))
        self.neighbors = dict(found.neighbors)
        self.multicast_tables: set[TableId] = set()
        """Tables that already receive link multicast, or cannot have multicast at all."""
        self.tables: Set[TableId] = found.other_tables
        """FIB tables that the service did not create."""
        self.tunnel_of_interface = {itf.sw_if_index: NO_TUNNEL for itf in found.interfaces}
        self.has_block_sa = found.has_block_sa
        """Whether VPP has the SA that blocks gre and ipip interfaces."""
        self.orphans: list[TunnelState] = []
        """What an earlier run left and the service removes."""
        self._adoption = Adoption(found, self.layers.acls)
        self.gre_ipip = dict(self._adoption.gre_ipip)
        """Protections of gre and ipip interfaces with the service's SAs, by sw_if_index."""
        self._model = model
        self._sa_usage = sa_usage
        self._work_queue = work_queue
        self._journal = journal
        self._counters = counters
        for route, paths in found.routes.items():
            change = RouteAddDel(paths, route.prefix, found.route_source, True, route.table)
            self.routes.apply_accepted(change, found.counters[route])
        for sa in found.sas:
            sa_usage.note_added_to_vpp(sa.spec)

    @property
    def unclaimed_count(self) -> int:
        """Number of an earlier run's tunnels, SAs and ACLs that no tunnel has claimed and that are still in VPP."""
        return len(self._adoption) + len(self.orphans)

    def tunnel_state(self, key: TunnelKey) -> TunnelState:
        """Return the state of a tunnel. A new one starts with what it adopts from an earlier run."""
        state = self.tunnels.get(key)
        if state is None:
            tunnel = self._model.tunnels.get(key) or Tunnel(key)
            actual = self._adoption.adopt(tag_of(key), tunnel.sas)
            state = self.tunnels[key] = TunnelState(Translation(key), actual)
            if actual.sw_if_index is not None:
                self.tunnel_of_interface[actual.sw_if_index] = key
        return state

    def orphan_unclaimed(self) -> str:
        """Turn what no tunnel claims into orphans, and return their numbers as text; empty where there are none."""
        if not self._adoption:
            return ""
        what = str(self._adoption)
        self.orphans += [TunnelState(Translation(NO_TUNNEL), actual) for actual in self._adoption.pop_unclaimed()]
        return what

    def tunnel_interfaces(self) -> set[int]:
        """Return the interfaces of all tunnels, and the gre and ipip interfaces that the service's SAs protect."""
        interfaces = {
            state.actual.sw_if_index for state in self.tunnels.values() if state.actual.sw_if_index is not None
        }
        return interfaces | self.gre_ipip.keys()

    def set_tables(self, tables: Set[TableId]) -> None:
        """Set VPP's other FIB tables. Routes in a table that is gone are gone, too."""
        self.tables = tables
        for route in list(self.routes):
            if route.table not in TABLE_NUMBERS and (route.table, len(route.prefix.address) == 16) not in tables:
                self.routes.apply_accepted(RouteAddDel(NO_INDEX, route.prefix, self.route_source, False, route.table))

    def note_interface_gone(self, sw_if_index: int) -> None:
        """Record that another owner's interface is gone.

        Routes into it drop for good, even if its index is used again.
        """
        for route in list(self.routes.into(sw_if_index)):
            self.routes.apply_accepted(RouteAddDel(_GONE_INDEX, route.prefix, self.route_source, True, route.table))

    def note_unprotected(self, sw_if_index: int) -> None:
        """Record that the service no longer protects a gre or ipip interface."""
        actual = self.gre_ipip.pop(sw_if_index, None)
        if actual is not None:
            actual.gre_ipip = actual.protection = None
            self.mark_owner_dirty(actual)

    def set_gre_ipip(self, protected: Mapping[GreIpipInterface, Protection | None]) -> None:
        """Set the gre and ipip interfaces and their protections. An interface that is gone loses its protection."""
        for index, actual in list(self.gre_ipip.items()):
            if actual.gre_ipip is None or protected.get(actual.gre_ipip) != actual.protection:
                self.note_unprotected(index)

    def mark_owner_dirty(self, actual: ActualTunnel) -> None:
        """Mark the tunnel dirty that this actual state belongs to."""
        self._work_queue.mark_dirty(key for key, state in self.tunnels.items() if state.actual is actual)

    # VPP's replies

    def apply_reply(self, state: TunnelState, request: Request, reply: Reply) -> bool:
        """Record VPP's reply to a tunnel's request; return whether VPP accepted."""
        if not self.is_accepted(state.refusals, request, reply):
            return False
        if isinstance(request, RouteAddDel):
            self.apply_route_reply(request, reply, state.actual.sw_if_index)
            return True
        if isinstance(request, IpsecItfCreate):
            self.tunnel_of_interface[reply.value] = state.desired.key
        elif isinstance(request, IpsecItfDelete):
            self.tunnel_of_interface.pop(request.sw_if_index, None)
            self.layers.interface_deleted(request.sw_if_index)
            self.numbers.free_instance(state.actual.instance)
        elif isinstance(request, SadEntryDel):
            self.numbers.free_sad_id(request.sad_id)
        elif isinstance(request, SadEntryAdd):
            self._sa_usage.note_added_to_vpp(request.sa)
        state.actual.apply_accepted(request, reply.value)
        return True

    def is_accepted(self, refusals: Refusals, request: Request, reply: Reply) -> bool:
        """Return whether VPP accepted a request; record the refusal where it did not."""
        if reply.retval and reply.retval != request.already_done_retval:
            self.note_refused(refusals, request, describe_error(reply.retval))
            return False
        refusals.note_accepted(request)
        return True

    def apply_route_reply(self, request: RouteAddDel, reply: Reply, own: int | None = None) -> None:
        """Record an accepted change of a route; `own` is the interface of the tunnel that sent the request."""
        before = self.routes.get(request.route, NO_INDEX)
        self.routes.apply_accepted(request, reply.value)
        left = {*interfaces_of(before)} - {NO_INDEX, own}
        # their tunnels may wait for the route to leave
        self._work_queue.mark_dirty({self.tunnel_of_interface.get(index, NO_TUNNEL) for index in left})

    def note_withheld(self, refusals: Refusals, request: Request, why: Exception) -> None:
        """Record that a request was not sent, since it breaks a rule of the guard."""
        self._counters.withheld += 1
        self.note_refused(refusals, request, f"not sent to VPP: {why}")

    def note_refused(self, refusals: Refusals, request: Request, reason: str) -> None:
        """Record a refusal, log it once, and free the number that the request would have used."""
        self.free_numbers(request)
        self._counters.refusals += 1
        if refusals.note_refused(request, reason):
            owner = refusals.owner
            name = type(request).__name__
            log.warning("%s of %s: %s", name, owner if isinstance(owner, str) else tag_of(owner), reason)
            self._journal.note_refused(owner, request, reason)

    def free_numbers(self, request: Request) -> None:
        """Free the number of a request that had no effect."""
        if isinstance(request, SadEntryAdd):
            self.numbers.free_sad_id(request.sad_id)
        elif isinstance(request, IpsecItfCreate):
            self.numbers.free_instance(request.instance)
