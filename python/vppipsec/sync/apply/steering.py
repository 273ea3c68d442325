"""Has VPP tell the packets of outbound policies from others, and says whose each of our routes is; brings the two into VPP.

What is wanted is found by pure modules. A mistake of ours in one of them costs what it would have found, not the service: until
it finds something again, what was found before counts, or where nothing was, what VPP holds.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Set

from vppipsec.conf.settings import OffloadSettings
from vppipsec.kernel.xfrm.sad_spd import GroupKey, KernelModel
from vppipsec.kernel.xfrm.values import Policy
from vppipsec.sync.actual.backoff import OUTBOUND, Refusals, refusal_key
from vppipsec.sync.actual.classifiers import is_of_junction
from vppipsec.sync.actual.environment import Surroundings
from vppipsec.sync.actual.vpp_state import NOBODY, GroupState, VppSide
from vppipsec.sync.actual.vtis import Vtis
from vppipsec.sync.apply.gre_ipip import Overlayer
from vppipsec.sync.apply.host_interfaces import HostKeeper
from vppipsec.sync.apply.route_resolver import Leading
from vppipsec.sync.desired.classifiers import Apart
from vppipsec.sync.desired.gre_ipip import not_in_clear
from vppipsec.sync.desired.kernel_fallback import Fallback, fallbacks, inbound_of, is_beyond_vpp
from vppipsec.sync.desired.outbound_policy import Outbound, of_vti, outbound
from vppipsec.sync.desired.policy_layers import (
    NOTHING,
    FamilySteering,
    Fixed,
    Junction,
    Place,
    Target,
    steer,
    steer_routed,
)
from vppipsec.sync.desired.routes import Aim, Owners, Split
from vppipsec.sync.desired.rule_index import Meetings
from vppipsec.sync.desired.state import Tunnel
from vppipsec.sync.ike.sa_usage import Wear
from vppipsec.sync.journal import Journal, Source
from vppipsec.sync.plan import policy_layers as plan_policy_layers
from vppipsec.sync.work_queue import Todo
from vppipsec.vpp import inventory
from vppipsec.vpp.api.client import VppClient
from vppipsec.vpp.api.errors import VppError
from vppipsec.vpp.api.ip import ChangeRoute, ReceiveGroups, SetNeighbor
from vppipsec.vpp.api.ipsec import CreateItf
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.guard import GuardError, check_handover, check_junction, check_layer
from vppipsec.vpp.ownership import JUNCTION_TABLE, KERNEL, NUMBERS
from vppipsec.vpp.state.numbers import NumbersExhausted
from vppipsec.vpp.state.policy_layers import Stack
from vppipsec.vpp.types import FOR_US, NO_INDEX, RECEIVED, Prefix, Route, Rule, SaSpec

log = logging.getLogger(__name__)

MOST_ROUNDS = 100
"""Rounds of requests after which a change of the rules for outbound policies is taken to be a mistake of ours."""
_OVER_VTIS = "the routes over VTIs"
_FALLBACKS = "what goes to the kernel"
_IN_VPP = "the rules for outbound policies"
_ROUTES = "the routes into tunnels"
_HOSTS = "the router's own packets"
_OVERLAYS = "what protects gre and ipip interfaces"


class Steerer:
    """The rules for outbound policies in one VPP, and all routes of ours there.

    `fallbacks` is what becomes of the packets of groups that VPP cannot carry, where the kernel may get them. `owners` says whose
    each route is, `leading` where it leads. `refusals` are of the rules, `stale` of the removal of routes that nobody claims any
    more. `mistakes` says what our own code stumbles over now, and how.
    """

    def __init__(
        self,
        vpp: VppSide,
        surroundings: Surroundings,
        model: KernelModel,
        vtis: Vtis,
        wear: Wear,
        todo: Todo,
        journal: Journal,
        offload: OffloadSettings,
        hosts: HostKeeper,
    ) -> None:
        """Take the two sides, and what the steering is made of."""
        self.fallbacks: dict[GroupKey, Fallback] = {}
        self.owners = Owners()
        self.refusals = Refusals(OUTBOUND)
        self.stale = Refusals(NOBODY)
        self.mistakes: dict[str, str] = {}
        self.overlayer = Overlayer(vpp, surroundings, todo, journal)
        self.leading = Leading(vpp, surroundings)
        self._vpp = vpp
        self._surroundings = surroundings
        self._model = model
        self._vtis = vtis
        self._wear = wear
        self._todo = todo
        self._journal = journal
        self._offload = offload
        self._hosts = hosts
        self._outbound: list[Outbound] = []
        self._steering = NOTHING
        self._junctions: dict[int, Apart] = {}
        """What the junctions of VTIs shall have, by if_id."""
        self._beyond_vpp: set[GroupKey] = set()
        """Groups that the kernel may have to carry; mostly there are none, and then nobody looks at all of them."""
        self._steered_by: object = None
        self._led_by: object = None
        self._owned_by: tuple[object, object] = (None, None)
        self._unknown = {OUTBOUND, _OVER_VTIS, _FALLBACKS, _IN_VPP}
        """What did not come to an end yet for this VPP."""
        self._is_steered = False
        self._tables_of: Mapping[Stack, Mapping[int, Mapping[Prefix, Target]]] = {}
        """What our tables are to have now."""
        self._meetings = Meetings(())
        self._meeting: set[GroupKey] = set()
        self._asked_before: set[int] = set()
        self._routes_suspect = True
        self._done: dict[Stack, tuple[FamilySteering, Set[int], plan_policy_layers.SteerPlan]] = {}
        """Of junctions: what was wanted of them, and the plan that was complete then. Nobody else changes what they ask."""

    @property
    def settled(self) -> bool:
        """True when VPP holds what the policies and the routes over VTIs, as they are now, call for."""
        return (
            self._steered_by == self._steer_by(self.fallbacks)
            and self._led_by == self._lead_by()
            and self._is_steered
            and not self.refusals
            and not self.stale
            and not self.mistakes
            and self.overlayer.settled
        )

    @property
    def fallbacks_changed(self) -> bool:
        """Whether other groups than before are VPP's or the kernel's to carry."""
        return self._find_fallbacks() != self.fallbacks

    @property
    def knows_owners(self) -> bool:
        """Whether it is known whose each route is; until then nothing that leads anywhere is to be touched."""
        return _ROUTES not in self.mistakes

    def outbound_policies(self) -> Iterator[tuple[Outbound, Place | None]]:
        """Yield the outbound policies as the kernel asks them, each with its place in VPP; None where VPP has no part in it.

        Those of VTIs whose packets are told apart by rules have theirs at the junction.
        """
        places = iter(self._steering.places)
        apart = {found[0].policy: found for each in self._junctions.values() for found in each.places()}
        for each in self._outbound:
            if each.wanted is None:
                yield apart.get(each.policy, (each, None))
            else:
                yield each, next(places)

    def reload(self, offload: OffloadSettings) -> None:
        """Take new settings; they hold from now on."""
        if offload.unsupported != self._offload.unsupported:
            self._is_steered = False
        self._offload = offload

    def translated(self, state: GroupState, before: Tunnel | None) -> None:
        """Note what a group's tunnel shall be now; `before` it was another one, or the same."""
        now = state.desired.tunnel
        if now is None or before is None or now.admitted != before.admitted:
            self._note_meeting(state)
        (self._beyond_vpp.add if is_beyond_vpp(state.desired) else self._beyond_vpp.discard)(state.desired.key)

    def forget(self, key: GroupKey) -> None:
        """Note that a group is gone."""
        self._meeting.discard(key)
        self._beyond_vpp.discard(key)

    def may_receive(self, state: GroupState) -> bool:
        """Tell whether what comes out of a tunnel would be held against the outbound policies, where it has to be."""
        if self._unknown:
            return False
        if state.desired.key not in self._meeting:
            return True
        index, layers = state.held.sw_if_index, self._vpp.layers
        return all(index in layer.attached for ip6 in (False, True) for layer in layers.of(Stack(ip6)))

    async def look_for_neighbors(self, client: VppClient) -> None:
        """Find out which taps went, if only to come again at once."""
        vpp = self._vpp
        if vpp.neighbors:
            before, vpp.neighbors = vpp.neighbors, await inventory.read_neighbors(client)
            for index in {neighbor.sw_if_index for neighbor in before.keys() - vpp.neighbors.keys()}:
                vpp.lost(index)
                self._is_steered = False

    async def look_at_overlays(self, client: VppClient) -> None:
        """Find out which gre and ipip interfaces there are, and keep them from sending in clear."""
        self._vpp.overlays_are(await self._surroundings.read_overlays(client))
        if OUTBOUND not in self._unknown:
            with self._contained(_OVERLAYS):
                self.overlayer.claim(self._outbound)
        await self._hold_overlays(client)

    async def _hold_overlays(self, client: VppClient) -> None:
        if OUTBOUND not in self._unknown:  # else what an earlier run muted or protected would be let go of
            with self._contained(_OVERLAYS):
                await self.overlayer.hold(client)

    async def remove_stale_routes(self, client: VppClient) -> None:
        """Take away the routes that nobody claims, where there may be such."""
        if not self.knows_owners or not (self._routes_suspect or self.stale):
            return
        self._routes_suspect = False
        vpp = self._vpp
        routes = [route for route in vpp.routes if self.owners.owner(route) is None]
        requests = [ChangeRoute(NO_INDEX, route.prefix, vpp.route_source, False, route.table) for route in routes]
        self.stale.forget_all_but(set(requests).__contains__)
        self.stale.let_due_be_tried()
        requests = [request for request in requests if request not in self.stale]
        for request, reply in zip(requests, await client.run(requests), strict=True):
            if vpp.accepts(self.stale, request, reply):
                vpp.led(request, reply)

    # What is wanted

    async def steer(self, client: VppClient) -> None:
        """Let VPP tell the packets of outbound policies from others; those for which there is no tunnel yet are dropped."""
        found = self._find_fallbacks()
        by = self._steer_by(found)
        if is_new := by != self._steered_by:
            self._steered_by = by
            with self._contained(OUTBOUND):
                self._find_layers(found)
        await self._hold_overlays(client)
        if OUTBOUND not in self._unknown:
            with self._contained(_HOSTS):
                self._hosts.find(self._outbound, self._model.policy_changes, self._vpp, self._surroundings)
        led_by = self._lead_by()
        is_held = self._is_steered and not self.refusals and self._asked() == self._asked_before
        if not is_new and led_by == self._led_by and is_held:
            return
        if is_new or led_by != self._led_by:
            is_led_anew, self._led_by = led_by != self._led_by, led_by
            with self._contained(_OVER_VTIS):
                if is_led_anew:
                    self._find_vti_routes()
                self._find_junctions()
        if self._unknown <= {_IN_VPP}:
            with self._contained(_IN_VPP):
                await self._bring_layers(client)
        with self._contained(_ROUTES):
            if self._unknown:
                self._leave_as_it_is()

    @contextlib.contextmanager
    def _contained(self, what: str) -> Iterator[None]:
        """Let a mistake of ours cost what is named, not the service."""
        try:
            yield
        except VppError:
            raise
        except Exception as error:  # whatever it is: the tunnels go on
            mistake = f"a mistake in vpp-ipsecd: {type(error).__name__}"
            if self.mistakes.get(what) != mistake:
                log.error("VPP keeps what it has of %s: %s", what, mistake)
                self._journal.note(Source.VPP, f"keeps what it has of {what}: {mistake}")
            self.mistakes[what] = mistake
        else:
            self._unknown.discard(what)
            if self.mistakes.pop(what, None):
                self._todo.soil(self._model.groups)  # some may have waited for it

    def _steer_by(self, found: Mapping[GroupKey, Fallback]) -> object:
        """Return what the steering is made of: while that stays, it does."""
        env = self._surroundings.env
        return self._model.policy_changes, env.addresses, env.enforces, self._surroundings.overlays, found

    def _lead_by(self) -> object:
        """Return what the routes over VTIs and to the router itself are made of: while that stays, they do."""
        links = self._surroundings.interfaces.links
        hosts = self._hosts
        return (
            self._model.policy_changes,
            self._vtis.changes,
            self._surroundings.tables,
            hosts.local,
            hosts.multicast,
            links,
        )

    def _find_fallbacks(self) -> dict[GroupKey, Fallback]:
        """Return what becomes of the groups that VPP cannot carry, where the kernel may get their packets."""
        with self._contained(_FALLBACKS):
            if self._offload.unsupported != "kernel" or not self._beyond_vpp:
                return {}
            desired = [state.desired for state in self._vpp.groups.values()]
            groups, env, taps = self._model.groups, self._surroundings.env, self._surroundings.interfaces.taps
            found = fallbacks(desired, groups, env, taps, self._wear.has_sent)
            for key, fallback in found.items():
                if fallback.target is not None:
                    for sa in groups[key].sas.values():
                        self._wear.kernel_sends(sa)
            return found
        return self.fallbacks

    def _find_layers(self, found: dict[GroupKey, Fallback]) -> None:
        """Find which rules VPP shall have; `found` are groups whose packets the kernel gets, where it may."""
        policies = outbound(self._model.policies())
        self.overlayer.claim(policies)
        peers = {template.daddr for each in policies for template in each.policy.templates}
        wanted = [each.wanted for each in policies if each.wanted is not None]
        handed = [each._replace(target=_handed(each.target, found)) for each in wanted]
        steering = steer(handed, self._surroundings.env.addresses, peers, [*inbound_of(found), *self._clear_drops()])
        meetings = Meetings(rule for layer in (*steering.ip4.layers, *steering.ip6.layers) for rule in layer.rules)
        self.fallbacks, self._outbound, self._steering, self._meetings = found, policies, steering, meetings
        for state in self._vpp.groups.values():
            self._note_meeting(state)
        for each in wanted:
            if isinstance(each.target, GroupKey) and each.target in self._model.groups:
                self._vpp.state_of(each.target)  # its tunnel may be there already
        if OUTBOUND in self.mistakes:
            self._led_by = None  # it was found by policies that were not the latest

    def _clear_drops(self) -> list[tuple[Rule, Target]]:
        """Return rules that drop what is for overlays and must not come in clear."""
        if not self._surroundings.env.enforces:
            return []
        return [(rule, Fixed.DROP) for rule in not_in_clear(self.overlayer.claims.guarded, self._model.policies())]

    def _find_vti_routes(self) -> None:
        """Find which routes VPP shall have for the kernel's over VTIs."""
        lacked = self._vtis.leads.lacking
        if self._vtis.find([each.policy for each in self._outbound], self._surroundings.tables):
            for number, ip6 in sorted(self._vtis.leads.lacking - lacked):
                family = "IPv6" if ip6 else "IPv4"
                told = f"has no {family} table {number}: the routes over VTIs in it are left out"
                self._journal.note(Source.VPP, told)
            self._todo.look_around()  # peers may be reached another way from now on
        for target in self._vtis.leads.targets:
            if target in self._model.groups:
                self._vpp.state_of(target)  # its tunnel may be there already

    def _find_junctions(self) -> None:
        """Find which rules tell the packets of VTIs apart."""
        policies: dict[int, list[Policy]] = {if_id: [] for if_id in self._vtis.leads.junctions}
        for each in self._outbound:
            if each.policy.if_id in policies:
                policies[each.policy.if_id].append(each.policy)
        junctions = {}
        for if_id, of_its in policies.items():
            before = self._junctions.get(if_id, Apart((), (), NOTHING))
            same = [each.policy for each in before.policies] == of_its
            found = before.policies if same else [of_vti(policy) for policy in of_its]
            wanted = [each.wanted for each in found if each.wanted is not None]
            handed = tuple(each._replace(target=_handed(each.target, self.fallbacks)) for each in wanted)
            steering = before.steering if before.wanted == handed else steer_routed(handed)
            junctions[if_id] = Apart(found, handed, steering)
            for key in self._model.groups.keys() & {each.target for each in wanted}:
                self._vpp.state_of(key)  # its tunnel may be there already
        changed = junctions.keys() ^ self._junctions.keys()
        self._junctions = junctions
        self._surroundings.tell_apart(frozenset(junctions))
        self._todo.soil(key for key in self._model.groups if key.if_id in changed)

    def _note_meeting(self, state: GroupState) -> None:
        """Note whether what a tunnel brings may be for another one."""
        tunnel = state.desired.tunnel
        if tunnel is not None and tunnel.overlay is None and self._meetings.may_meet(tunnel.admitted):
            self._meeting.add(state.desired.key)
        else:
            self._meeting.discard(state.desired.key)

    def _leave_as_it_is(self) -> None:
        """Take what VPP holds for what is wanted, so that every route stays whose it is."""
        for key in self._model.groups:
            self._vpp.state_of(key)
        self.leading.ready = frozenset(self._vpp.junctions.held)
        tables: dict[int, dict[Prefix, Aim]] = {}
        for route, lead in self._vpp.routes.items():
            tables.setdefault(route.table, {})[route.prefix] = self.leading.aim_of(lead)
        self.owners = Owners(tables.items(), frozenset(self._vpp.layers.layers))

    # What VPP is told

    def _asked(self) -> set[int]:
        """Return the interfaces on which packets come that outbound policies may be for."""
        states = (self._vpp.groups[key] for key in self._meeting)
        return {
            *self._surroundings.interfaces.up,
            *(state.held.sw_if_index for state in states if state.held.sw_if_index is not None),
        }

    def _wanted_neighbors(self) -> dict[inventory.Neighbor, bytes]:
        """Return the next hops on taps by which the kernel gets packets."""
        taps = {each.target.sw_if_index for each in self.fallbacks.values() if each.target is not None}
        macs = self._surroundings.interfaces.macs
        return {inventory.Neighbor(tap, ip6): macs[tap] for tap in taps for ip6 in (False, True)}

    async def _bring_layers(self, client: VppClient) -> None:
        """Bring the layers of rules, and the routes behind them, towards what is wanted, as far as that can be now."""
        vpp = self._vpp
        self._is_steered = False
        self.refusals.let_due_be_tried()
        self._asked_before = self._asked()
        waiting = [key for key in self._meeting if not self._may_be_opened(key)]
        barred: set[SaSpec | Request] = set()
        wanted = self._wanted_neighbors()
        lacking = [SetNeighbor(*it, mac) for it, mac in wanted.items() if vpp.neighbors.get(it) != mac]
        await self._send(client, lacking, barred)
        await self._receive_multicast(client, barred)
        complete = await self._bring_stacks(client, barred)
        if complete:
            surplus = [SetNeighbor(*it, mac, False) for it, mac in vpp.neighbors.items() if it not in wanted]
            await self._send(client, surplus, barred)
        self.refusals.forget_all_but(barred.__contains__)
        self._is_steered = complete and vpp.neighbors == wanted
        self._todo.soil(filter(self._may_be_opened, waiting))

    async def _receive_multicast(self, client: VppClient, barred: set[SaSpec | Request]) -> None:
        """Have what VTIs with host interfaces bring of multicast received in their tables, as far as VPP has such."""
        vpp = self._vpp
        vpp.multicast &= self._hosts.multicast  # of what is not looked at nothing is known: it may go and come again
        if unknown := self._hosts.multicast - vpp.multicast:
            found = await inventory.read_groups(client, unknown)
            vpp.multicast |= {table for table in unknown if found.get(table, True)}
            await self._send(
                client, [ReceiveGroups(*table) for table, is_there in found.items() if not is_there], barred
            )

    def _may_be_opened(self, key: GroupKey) -> bool:
        """Tell whether the tunnel of a group has an interface that may receive by now."""
        state = self._vpp.groups[key]
        is_there = state.desired.tunnel is not None and state.held.sw_if_index is not None
        return is_there and self.may_receive(state)

    async def _bring_stacks(self, client: VppClient, barred: set[SaSpec | Request]) -> bool:
        """Do so for each stack of layers, and tell whether all is done. Refused requests are added to `barred`."""
        vpp = self._vpp
        for _ in range(MOST_ROUNDS):
            refused = {(key.table, key.prefix) for key in self.refusals if isinstance(key, ChangeRoute)}
            held = {ip6: self._held_targets(ip6) for ip6 in (False, True)}
            numbers = vpp.layers.free_numbers()
            plans: dict[Stack, plan_policy_layers.SteerPlan] = {}
            for stack, want, asking in self._stacks():
                done = self._done.get(stack)
                if done is not None and done[:2] == (want, asking):
                    plans[stack] = done[2]
                    continue
                plan = plan_policy_layers.next_requests(
                    stack, want, asking, vpp.layers, held[stack.ip6], refused, numbers
                )
                plans[stack] = plan
                self._done.pop(stack, None)
                if plan.complete and stack.if_id and asking:
                    self._done[stack] = want, asking, plan
            self._own({stack: plan.routes for stack, plan in plans.items()})
            requests = [request for plan in plans.values() for request in plan.requests]
            requests += self._junction_requests()
            was_sent = await self._send(client, [*self._route_changes(), *requests], barred)
            before, self.leading.ready = self.leading.ready, self._ready(plans)
            if was_sent or self.leading.ready != before:
                continue
            is_ready = self.leading.ready.issuperset(self._junctions)
            if is_ready or not await self._send(client, list(self._route_changes(is_last=True)), barred):
                return all(plan.complete for plan in plans.values()) and vpp.junctions.are(self._junctions.keys())
        log.error("the rules for outbound policies do not come to an end; they are tried again")
        return False

    def _ready(self, plans: Mapping[Stack, plan_policy_layers.SteerPlan]) -> frozenset[int]:
        """Return the VTIs whose junctions have what they shall, and may be led to."""
        return frozenset(
            if_id
            for if_id in self._junctions
            if self._vpp.junctions.index(if_id) is not None
            and all(plans[Stack(ip6, if_id)].complete for ip6 in (False, True))
        )

    def _stacks(self) -> Iterator[tuple[Stack, FamilySteering, Set[int]]]:
        """Yield each stack of layers that is wanted or held, with what it shall have, and the interfaces that are to ask it."""
        vpp = self._vpp
        for ip6 in (False, True):
            yield Stack(ip6), self._steering.of(ip6), self._asked_before
        for if_id in self._junctions.keys() | {stack.if_id for stack in vpp.layers.stacks if stack.if_id}:
            apart, index = self._junctions.get(if_id), vpp.junctions.index(if_id)
            steering = NOTHING if apart is None else apart.steering
            asks = frozenset() if apart is None or index is None else frozenset({index})
            for ip6 in (False, True):
                yield Stack(ip6, if_id), steering.of(ip6), asks

    def _junction_requests(self) -> list[Request]:
        vpp = self._vpp
        try:
            return list(vpp.junctions.next_requests(self._junctions.keys(), self._junctions_in_use(), vpp.numbers))
        except NumbersExhausted as error:
            vpp.refuse(self.refusals, CreateItf(NO_INDEX), str(error))
            return []

    def _junctions_in_use(self) -> set[int]:
        """Return the junctions, by sw_if_index, that something of ours leads to, or that ask a layer of rules."""
        vpp = self._vpp
        stacks = [vpp.layers.of(stack) for stack in vpp.layers.stacks if stack.if_id]
        asking = {index for layers in stacks for layer in layers for index in (*layer.attached, *layer.dangling)}
        return {index for index in vpp.junctions.indexes if index in asking or vpp.routes.into(RECEIVED + index)}

    async def _send(self, client: VppClient, requests: Sequence[Request], barred: set[SaSpec | Request]) -> bool:
        """Send requests for steering, and tell whether any was sent. Those refused, now or before, are added to `barred`."""
        if not requests:
            return False
        vpp, is_safe = self._vpp, self._guard()
        allowed = []
        for request in requests:
            if refusal_key(request) in self.refusals:
                vpp.give_back(request)
                barred.add(refusal_key(request))
            elif is_safe(request):
                allowed.append(request)
            else:
                barred.add(refusal_key(request))
        for request, reply in zip(allowed, await client.run(allowed), strict=True):
            if not vpp.accepts(self.refusals, request, reply):
                barred.add(refusal_key(request))
            elif isinstance(request, ChangeRoute):
                vpp.led(request, reply)
            elif isinstance(request, SetNeighbor):
                vpp.neighbors.pop(neighbor := inventory.Neighbor(request.sw_if_index, request.ip6), None)
                if request.is_add:
                    vpp.neighbors[neighbor] = request.mac
            elif isinstance(request, ReceiveGroups):
                vpp.multicast.add((request.table, request.ip6))
            elif is_of_junction(request):
                vpp.junctions.took(request, reply.extra, vpp.numbers)
            else:
                vpp.layers.took(request, reply.extra)
        return bool(allowed)

    def _guard(self) -> Callable[[Request], bool]:
        """Return what tells whether a request is safe, and notes why where it is not, by what VPP holds now."""
        vpp, macs, junctions = self._vpp, self._surroundings.interfaces.macs, self._vpp.junctions.indexes.keys()
        received = {RECEIVED + index for index in junctions}
        interfaces = self._surroundings.interfaces.every | vpp.owner_of.keys() | junctions | received
        in_use = self._junctions_in_use()

        def is_safe(request: Request) -> bool:
            try:
                if is_of_junction(request):
                    check_junction(request, junctions, in_use, JUNCTION_TABLE)
                else:
                    check_layer(request, vpp.layers.layers, interfaces)
                    check_handover(request, macs)
            except GuardError as error:
                vpp.withhold(self.refusals, request, error)
                return False
            return True

        return is_safe

    # Whose the routes are

    def _own(self, tables_of: Mapping[Stack, Mapping[int, Mapping[Prefix, Target]]]) -> None:
        """Take note of whose each route is from now on."""
        leads = self._vtis.leads.routes
        by = self._hosts.local, {key: each.target for key, each in self.fallbacks.items() if key.if_id}
        if self._tables_of == tables_of and self._owned_by[0] is leads and self._owned_by[1] == by:
            return
        steered = [item for family in tables_of.values() for item in family.items()]
        over_vtis = [
            (number, {prefix: _handed_over(target, self.fallbacks) for prefix, target in table.items()})
            for number, table in leads.items()
        ]
        routes_to_us = [(route.table, {route.prefix: Fixed.ROUTER}) for route in self._hosts.local]
        owners = Owners([*over_vtis, *steered, *routes_to_us], frozenset(self._vpp.layers.layers))
        self._tables_of = tables_of
        self._owned_by = leads, by
        self._todo.soil(owners.differ_from(self.owners))
        self._routes_suspect |= not self.owners.targets.keys() <= owners.targets.keys()
        self.owners = owners

    def _held_targets(self, ip6: bool) -> dict[int, dict[Prefix, Target]]:
        """Return where our routes lead, by table, without those over VTIs and to the router itself."""
        targets: dict[int, dict[Prefix, Target]] = {}
        for route, lead in self._vpp.routes.items():
            if (len(route.prefix.address) == 16) != ip6 or not isinstance(lead, int) or lead == FOR_US:
                continue
            if not self._is_vtis(route, ip6):
                target = self.leading.target_into(lead)
                targets.setdefault(route.table, {})[route.prefix] = NOBODY if isinstance(target, Junction) else target
        return targets

    def _is_vtis(self, route: Route, ip6: bool) -> bool:
        """Tell whether a route is one over a VTI: of the tables that layers don't have, policies claim hosts in the main one."""
        if route.table in NUMBERS:
            return False
        if route.table or route.prefix.length < 8 * len(route.prefix.address):
            return True
        claimed = (self._steering.of(ip6).routes, self._tables_of.get(Stack(ip6), {}).get(0, {}))
        return route.prefix in self._vtis.leads.routes.get(0, {}) and not any(route.prefix in it for it in claimed)

    def _route_changes(self, is_last: bool = False) -> Iterator[ChangeRoute]:
        """Yield what makes our routes lead where they are to lead, as far as there is a tunnel for them.

        Those to a junction that is not ready stay as they are, and drop after the `is_last` round, if it has been refused.
        """
        vpp, macs = self._vpp, self._surroundings.interfaces.macs
        replaced = any(len(vpp.layers.of(stack)) > len(want.layers) for stack, want, _ in self._stacks())
        for route, target in self.owners.targets.items():
            lead, held = self.leading.lead_of(target), vpp.routes.get(route)
            if held == lead or (held is not None and not is_last and not self.leading.may_lead(target)):
                continue
            if held is not None or lead != NO_INDEX or replaced or self.owners.exposed(route):
                is_tap = isinstance(lead, int) and lead in macs
                next_hop = KERNEL[len(route.prefix.address) == 16] if is_tap else b""
                yield ChangeRoute(lead, route.prefix, vpp.route_source, True, route.table, next_hop)


def _handed_over(target: Aim, found: Mapping[GroupKey, Fallback]) -> Aim:
    """Do so for a route over a VTI. One that is shared has next hops in VPP alone: the kernel's share drops."""
    return target if isinstance(target, Split | Junction) else _handed(target, found)


def _handed(target: Target, found: Mapping[GroupKey, Fallback]) -> Target:
    """Return the kernel in place of a group that VPP cannot carry, where the kernel gets its packets."""
    fallback = found.get(target) if isinstance(target, GroupKey) else None
    return target if fallback is None or fallback.target is None else fallback.target
