"""What one VPP holds of ours, by group and across groups: what was found when we connected, kept up by its answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace

from vppipsec.kernel.xfrm.sad_spd import Group, GroupKey, KernelModel
from vppipsec.kernel.xfrm.values import SaId
from vppipsec.sync.actual.adoption import Leftovers
from vppipsec.sync.actual.backoff import Refusals
from vppipsec.sync.actual.classifiers import HeldJunctions, if_id_of
from vppipsec.sync.desired.environment import Environment
from vppipsec.sync.desired.state import Desired
from vppipsec.sync.desired.tunnel import tag_of
from vppipsec.sync.desired.vti_routes import Table
from vppipsec.sync.ike.sa_usage import Wear
from vppipsec.sync.journal import Counters, Journal
from vppipsec.sync.work_queue import Todo
from vppipsec.vpp.api.client import Reply
from vppipsec.vpp.api.errors import describe_error
from vppipsec.vpp.api.ip import ChangeRoute
from vppipsec.vpp.api.ipsec import AddSa, CreateItf, DeleteItf, DelSa
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.gre_ipip import Overlay
from vppipsec.vpp.inventory import Inventory
from vppipsec.vpp.ownership import NUMBERS
from vppipsec.vpp.state.numbers import Numbers
from vppipsec.vpp.state.policy_layers import adopt
from vppipsec.vpp.state.routes import HeldRoutes
from vppipsec.vpp.state.tunnels import HeldTunnel
from vppipsec.vpp.types import NO_INDEX, Protection, interfaces_of

log = logging.getLogger(__name__)

NOBODY = GroupKey(b"", b"", 0, 0, 0)
"""Group of what was left in VPP by an earlier run and belongs to no group of the kernel."""
NOTHING = Inventory((), (), (), {}, 0, frozenset(), frozenset())
_GONE = NO_INDEX - 1
"""Stands for the interface of a route whose interface is gone; no interface of VPP's has it."""


@dataclass(slots=True)
class GroupState:
    """What is known of one group on VPP's side. `env` is what its desired state was translated by."""

    desired: Desired
    held: HeldTunnel = field(default_factory=HeldTunnel)
    env: Environment | None = None
    waits: bool = False
    """Whether the kernel has no SA to send with: then its routes have to be there, dropping, so that VPP counts their packets."""
    worn: frozenset[SaId] = frozenset()
    """SAs of the group that are to be rekeyed before VPP carries the tunnel on."""
    refusals: Refusals = field(init=False)

    def __post_init__(self) -> None:
        self.refusals = Refusals(self.desired.key)


class VppSide:
    """What one VPP holds of ours, and what it refused. `owner_of` are the groups of our interfaces, by sw_if_index."""

    def __init__(
        self,
        model: KernelModel,
        wear: Wear,
        todo: Todo,
        journal: Journal,
        counters: Counters,
        found: Inventory = NOTHING,
        interfaces: Set[int] = frozenset(),
    ) -> None:
        """Take what VPP was found to hold; `interfaces` are those that it has, of whomever."""
        self.groups: dict[GroupKey, GroupState] = {}
        self.routes = HeldRoutes()
        self.route_source = found.route_source
        self.numbers = Numbers(found.sad_ids, found.instances)
        self.layers = adopt(found, interfaces)
        self.junctions = HeldJunctions(found.interfaces, found.tables)
        found = replace(found, interfaces=tuple(itf for itf in found.interfaces if if_id_of(itf.tag) is None))
        self.neighbors = dict(found.neighbors)
        self.multicast: set[Table] = set()
        """Tables that are known to have multicast of a link received, or no multicast at all."""
        self.tables: Set[Table] = found.other_tables
        """FIB tables of others."""
        self.owner_of = {itf.sw_if_index: NOBODY for itf in found.interfaces}
        self.mute = found.mute
        """Whether VPP has the SA by which interfaces of others are muted."""
        self.orphans: list[GroupState] = []
        """What is left of an earlier run, and is to go."""
        self._left = Leftovers(found, self.layers.acls)
        self.overlays = dict(self._left.overlays)
        """What protects interfaces of others with SAs of ours, by sw_if_index."""
        self._model = model
        self._wear = wear
        self._todo = todo
        self._journal = journal
        self._counters = counters
        for route, lead in found.routes.items():
            change = ChangeRoute(lead, route.prefix, found.route_source, True, route.table)
            self.routes.took(change, found.counters[route])
        for sa in found.sas:
            wear.took(sa.spec)

    @property
    def leftovers(self) -> int:
        """Number of tunnels and SAs of an earlier run that nobody claimed so far and that are still in VPP."""
        return len(self._left) + len(self.orphans)

    def state_of(self, key: GroupKey) -> GroupState:
        """Return what is known of a group; at first that is what an earlier run left."""
        state = self.groups.get(key)
        if state is None:
            group = self._model.groups.get(key) or Group(key)
            held = self._left.claim(tag_of(key), group.sas)
            state = self.groups[key] = GroupState(Desired(key), held)
            if held.sw_if_index is not None:
                self.owner_of[held.sw_if_index] = key
        return state

    def give_up_leftovers(self) -> str:
        """Make orphans of what an earlier run left and nobody claims, and say how much that is; nothing where there is none."""
        if not self._left:
            return ""
        told = str(self._left)
        self.orphans += [GroupState(Desired(NOBODY), held) for held in self._left.rest()]
        return told

    def interfaces(self) -> set[int]:
        """Return the interfaces of the groups' tunnels, and those of others that SAs of ours protect."""
        ours = {state.held.sw_if_index for state in self.groups.values() if state.held.sw_if_index is not None}
        return ours | self.overlays.keys()

    def tables_are(self, tables: Set[Table]) -> None:
        """Note which tables VPP has but for ours: what was in others went with them."""
        self.tables = tables
        for route in list(self.routes):
            if route.table not in NUMBERS and (route.table, len(route.prefix.address) == 16) not in tables:
                self.routes.took(ChangeRoute(NO_INDEX, route.prefix, self.route_source, False, route.table))

    def lost(self, sw_if_index: int) -> None:
        """Note that an interface of others went: what led there drops for good, whatever now has its number."""
        for route in list(self.routes.into(sw_if_index)):
            self.routes.took(ChangeRoute(_GONE, route.prefix, self.route_source, True, route.table))

    def let_go(self, sw_if_index: int) -> None:
        """Note that nothing of ours protects an interface of others any more."""
        held = self.overlays.pop(sw_if_index, None)
        if held is not None:
            held.overlay = held.protection = None
            self.soil(held)

    def overlays_are(self, protected: Mapping[Overlay, Protection | None]) -> None:
        """Note which interfaces of others there are, and what protects them: one that goes loses its protection."""
        for index, held in list(self.overlays.items()):
            if held.overlay is None or protected.get(held.overlay) != held.protection:
                self.let_go(index)

    def soil(self, held: HeldTunnel) -> None:
        """Have the group looked at again whose tunnel it is."""
        self._todo.soil(key for key, state in self.groups.items() if state.held is held)

    # What VPP answers

    def took(self, state: GroupState, request: Request, reply: Reply) -> bool:
        """Note VPP's answer to a request of a group; tell whether VPP accepted."""
        if not self.accepts(state.refusals, request, reply):
            return False
        if isinstance(request, ChangeRoute):
            self.led(request, reply, state.held.sw_if_index)
            return True
        if isinstance(request, CreateItf):
            self.owner_of[reply.extra] = state.desired.key
        elif isinstance(request, DeleteItf):
            self.owner_of.pop(request.sw_if_index, None)
            self.layers.interface_deleted(request.sw_if_index)
            self.numbers.free_instance(state.held.instance)
        elif isinstance(request, DelSa):
            self.numbers.free_sad_id(request.sad_id)
        elif isinstance(request, AddSa):
            self._wear.took(request.sa)
        state.held.took(request, reply.extra)
        return True

    def accepts(self, refusals: Refusals, request: Request, reply: Reply) -> bool:
        """Tell whether VPP accepted a request, and take note of it where it did not."""
        if reply.retval and reply.retval != request.done_before:
            self.refuse(refusals, request, describe_error(reply.retval))
            return False
        refusals.accepted(request)
        return True

    def led(self, request: ChangeRoute, reply: Reply, own: int | None = None) -> None:
        """Note that VPP accepted a change of route; `own` is the interface of the group whose request it was."""
        before = self.routes.get(request.route, NO_INDEX)
        self.routes.took(request, reply.extra)
        left = {*interfaces_of(before)} - {NO_INDEX, own}
        self._todo.soil({self.owner_of.get(index, NOBODY) for index in left})  # they may have waited for it to leave

    def withhold(self, refusals: Refusals, request: Request, why: Exception) -> None:
        """Note that a request was not sent, since it breaks a rule of the guard's."""
        self._counters.withheld += 1
        self.refuse(refusals, request, f"not sent to VPP: {why}")

    def refuse(self, refusals: Refusals, request: Request, reason: str) -> None:
        """Remember a refusal, log it once, and free the number that the request would have used."""
        self.give_back(request)
        self._counters.refusals += 1
        if refusals.refuse(request, reason):
            whose = refusals.whose
            name = type(request).__name__
            log.warning("%s of %s: %s", name, whose if isinstance(whose, str) else tag_of(whose), reason)
            self._journal.refused(whose, request, reason)

    def give_back(self, request: Request) -> None:
        """Free the number of a request that came to nothing."""
        if isinstance(request, AddSa):
            self.numbers.free_sad_id(request.sad_id)
        elif isinstance(request, CreateItf):
            self.numbers.free_instance(request.instance)
