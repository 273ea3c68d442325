"""Programs steering: the ACL/ABF layers for outbound policies, and all routes of the service.

Pure modules compute the desired state. If a computation raises, its last good result stays valid; without one, VPP
keeps what it has. The error is logged, and the computation is tried again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Set

from vppipsec.conf.settings import OffloadSettings
from vppipsec.kernel.xfrm.sad_spd import KernelModel, TunnelKey
from vppipsec.kernel.xfrm.values import Policy
from vppipsec.sync.actual.backoff import OUTBOUND_POLICIES, Refusals, refusal_key
from vppipsec.sync.actual.classifiers import is_classifier_request
from vppipsec.sync.actual.environment import Environment
from vppipsec.sync.actual.vpp_state import NO_TUNNEL, TunnelState, VppState
from vppipsec.sync.actual.vtis import Vtis
from vppipsec.sync.apply.gre_ipip import GreIpipReconciler
from vppipsec.sync.apply.host_interfaces import HostInterfaceReconciler
from vppipsec.sync.apply.route_resolver import RouteResolver
from vppipsec.sync.desired.classifiers import VtiClassifierConfig
from vppipsec.sync.desired.gre_ipip import cleartext_discard_rules
from vppipsec.sync.desired.kernel_fallback import (
    KernelFallback,
    fallback_inbound_rules,
    is_unsupported,
    kernel_fallbacks,
)
from vppipsec.sync.desired.outbound_policy import OutboundPolicy, outbound_policies, vti_outbound_policy
from vppipsec.sync.desired.policy_layers import (
    NO_STEERING,
    Action,
    FamilySteering,
    Placement,
    Target,
    VtiClassifier,
    compute_steering,
    compute_vti_steering,
)
from vppipsec.sync.desired.routes import RouteTarget, RouteTargets, WeightedTargets
from vppipsec.sync.desired.rule_index import RuleIndex
from vppipsec.sync.desired.state import DesiredTunnel
from vppipsec.sync.ike.sa_usage import SaUsage
from vppipsec.sync.journal import Journal, JournalSource
from vppipsec.sync.plan import policy_layers as plan_policy_layers
from vppipsec.sync.work_queue import WorkQueue
from vppipsec.vpp import inventory
from vppipsec.vpp.api.client import VppClient
from vppipsec.vpp.api.errors import VppError
from vppipsec.vpp.api.ip import MrouteAdd, NeighborAddDel, RouteAddDel
from vppipsec.vpp.api.ipsec import IpsecItfCreate
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.guard import GuardError, check_classifier_request, check_kernel_tap_request, check_layer_request
from vppipsec.vpp.ownership import CLASSIFIER_TABLE, KERNEL_NEXT_HOP, TABLE_NUMBERS
from vppipsec.vpp.state.numbers import NumbersExhausted
from vppipsec.vpp.state.policy_layers import StackKey
from vppipsec.vpp.types import INTERFACE_RX, LOCAL_INDEX, NO_INDEX, Prefix, Route, Rule, SaSpec

log = logging.getLogger(__name__)

MAX_ROUNDS = 100
"""Rounds of requests after which a change of the layers counts as an internal error."""
_PART_VTI_ROUTES = "the routes over VTIs"
_PART_FALLBACKS = "what goes to the kernel"
_PART_LAYERS = "the rules for outbound policies"
_PART_ROUTES = "the routes into tunnels"
_PART_HOSTS = "the router's own packets"
_PART_GRE_IPIP = "what protects gre and ipip interfaces"


class SteeringReconciler:
    """The layers for outbound policies in one VPP, and all routes of the service there.

    `fallbacks` are the kernel fallbacks of tunnels that VPP cannot carry. `route_targets` holds the target of each
    route, `route_resolver` its paths. `refusals` are of layers, `stale_route_refusals` of the removal of unclaimed
    routes. `internal_errors`: failed computation -> its error.
    """

    def __init__(
        self,
        vpp: VppState,
        environment: Environment,
        model: KernelModel,
        vtis: Vtis,
        sa_usage: SaUsage,
        work_queue: WorkQueue,
        journal: Journal,
        offload: OffloadSettings,
        host_interfaces: HostInterfaceReconciler,
    ) -> None:
        """`vpp` and `environment` belong to one VPP, `model` and `vtis` to the kernel."""
        self.fallbacks: dict[TunnelKey, KernelFallback] = {}
        self.route_targets = RouteTargets()
        self.refusals = Refusals(OUTBOUND_POLICIES)
        self.stale_route_refusals = Refusals(NO_TUNNEL)
        self.internal_errors: dict[str, str] = {}
        self.gre_ipip = GreIpipReconciler(vpp, environment, work_queue, journal)
        self.route_resolver = RouteResolver(vpp, environment)
        self._vpp = vpp
        self._environment = environment
        self._model = model
        self._vtis = vtis
        self._sa_usage = sa_usage
        self._work_queue = work_queue
        self._journal = journal
        self._offload = offload
        self._host_interfaces = host_interfaces
        self._outbound: list[OutboundPolicy] = []
        self._steering = NO_STEERING
        self._classifiers: dict[int, VtiClassifierConfig] = {}
        """The configurations of VTI classifiers, by if_id."""
        self._unsupported_tunnels: set[TunnelKey] = set()
        """Tunnels that the kernel may have to carry. Mostly there are none, and the check of all tunnels is skipped."""
        self._steering_computed_from: object = None
        self._routes_computed_from: object = None
        self._targets_computed_from: tuple[object, object] = (None, None)
        self._not_computed = {OUTBOUND_POLICIES, _PART_VTI_ROUTES, _PART_FALLBACKS, _PART_LAYERS}
        """Computations that have not succeeded yet for this VPP."""
        self._is_complete = False
        self._stack_tables: Mapping[StackKey, Mapping[int, Mapping[Prefix, Target]]] = {}
        """The routes that the layers' tables should have now."""
        self._rule_index = RuleIndex(())
        self._tunnels_to_attach: set[TunnelKey] = set()
        self._attached_interfaces: set[int] = set()
        self._may_have_stale_routes = True
        self._completed: dict[StackKey, tuple[FamilySteering, Set[int], plan_policy_layers.SteeringPlan]] = {}
        """Of classifiers: the desired state and the plan that was complete for it. Nothing else changes their layers.
        """

    @property
    def settled(self) -> bool:
        """True when VPP holds what the present policies and routes over VTIs require."""
        return (
            self._steering_computed_from == self._steering_inputs(self.fallbacks)
            and self._routes_computed_from == self._route_inputs()
            and self._is_complete
            and not self.refusals
            and not self.stale_route_refusals
            and not self.internal_errors
            and self.gre_ipip.settled
        )

    @property
    def fallbacks_changed(self) -> bool:
        """Whether the kernel fallbacks differ from those in use."""
        return self._compute_fallbacks() != self.fallbacks

    @property
    def knows_route_targets(self) -> bool:
        """Whether the target of each route is known. Until then no tunnel is changed."""
        return _PART_ROUTES not in self.internal_errors

    def outbound_policies(self) -> Iterator[tuple[OutboundPolicy, Placement | None]]:
        """Yield the outbound policies in the kernel's order, each with its placement; None where VPP has no rule for
        it.

        Policies of VTIs with a classifier have their placement there.
        """
        placements = iter(self._steering.placements)
        classified = {found[0].policy: found for each in self._classifiers.values() for found in each.placements()}
        for each in self._outbound:
            if each.policy_rules is None:
                yield classified.get(each.policy, (each, None))
            else:
                yield each, next(placements)

    def reload(self, offload: OffloadSettings) -> None:
        """Apply new settings from now on."""
        if offload.unsupported != self._offload.unsupported:
            self._is_complete = False
        self._offload = offload

    def note_translated(self, state: TunnelState, before: DesiredTunnel | None) -> None:
        """Record a tunnel's new desired state; `before` is the one that it replaces."""
        now = state.desired.tunnel
        if now is None or before is None or now.inbound_rules != before.inbound_rules:
            self._note_attachment(state)
        (self._unsupported_tunnels.add if is_unsupported(state.desired) else self._unsupported_tunnels.discard)(
            state.desired.key
        )

    def note_tunnel_gone(self, key: TunnelKey) -> None:
        """Record that a tunnel is gone."""
        self._tunnels_to_attach.discard(key)
        self._unsupported_tunnels.discard(key)

    def inbound_ready(self, state: TunnelState) -> bool:
        """Return whether outbound policies would apply to a tunnel's decrypted packets, where they have to."""
        if self._not_computed:
            return False
        if state.desired.key not in self._tunnels_to_attach:
            return True
        index, layers = state.actual.sw_if_index, self._vpp.layers
        return all(index in layer.attached for ip6 in (False, True) for layer in layers.stack(StackKey(ip6)))

    async def read_neighbors(self, client: VppClient) -> None:
        """Find out which taps are gone, even if they came back at once."""
        vpp = self._vpp
        if vpp.neighbors:
            before, vpp.neighbors = vpp.neighbors, await inventory.read_neighbors(client)
            for index in {neighbor.sw_if_index for neighbor in before.keys() - vpp.neighbors.keys()}:
                vpp.note_interface_gone(index)
                self._is_complete = False

    async def read_gre_ipip(self, client: VppClient) -> None:
        """Read the gre and ipip interfaces, and block them from sending unencrypted."""
        self._vpp.set_gre_ipip(await self._environment.read_gre_ipip(client))
        if OUTBOUND_POLICIES not in self._not_computed:
            with self._contain_errors(_PART_GRE_IPIP):
                self.gre_ipip.update_claims(self._outbound)
        await self._reconcile_gre_ipip(client)

    async def _reconcile_gre_ipip(self, client: VppClient) -> None:
        # else what an earlier run blocked or protected would be released
        if OUTBOUND_POLICIES not in self._not_computed:
            with self._contain_errors(_PART_GRE_IPIP):
                await self.gre_ipip.reconcile(client)

    async def remove_stale_routes(self, client: VppClient) -> None:
        """Remove unclaimed routes, where there may be any."""
        if not self.knows_route_targets or not (self._may_have_stale_routes or self.stale_route_refusals):
            return
        self._may_have_stale_routes = False
        vpp = self._vpp
        routes = [route for route in vpp.routes if self.route_targets.target(route) is None]
        requests = [RouteAddDel(NO_INDEX, route.prefix, vpp.route_source, False, route.table) for route in routes]
        self.stale_route_refusals.retain_only(set(requests).__contains__)
        self.stale_route_refusals.release_due()
        requests = [request for request in requests if request not in self.stale_route_refusals]
        for request, reply in zip(requests, await client.run(requests), strict=True):
            if vpp.is_accepted(self.stale_route_refusals, request, reply):
                vpp.apply_route_reply(request, reply)

    # The desired state

    async def reconcile(self, client: VppClient) -> None:
        """Bring layers and routes towards the desired state. Packets whose tunnel does not exist yet are dropped."""
        found = self._compute_fallbacks()
        inputs = self._steering_inputs(found)
        if is_new := inputs != self._steering_computed_from:
            self._steering_computed_from = inputs
            with self._contain_errors(OUTBOUND_POLICIES):
                self._compute_layers(found)
        await self._reconcile_gre_ipip(client)
        if OUTBOUND_POLICIES not in self._not_computed:
            with self._contain_errors(_PART_HOSTS):
                self._host_interfaces.compute(self._outbound, self._model.policy_changes, self._vpp, self._environment)
        route_inputs = self._route_inputs()
        is_complete = (
            self._is_complete and not self.refusals and self._interfaces_to_attach() == self._attached_interfaces
        )
        if not is_new and route_inputs == self._routes_computed_from and is_complete:
            return
        if is_new or route_inputs != self._routes_computed_from:
            routes_changed, self._routes_computed_from = route_inputs != self._routes_computed_from, route_inputs
            with self._contain_errors(_PART_VTI_ROUTES):
                if routes_changed:
                    self._compute_vti_routes()
                self._compute_classifiers()
        if self._not_computed <= {_PART_LAYERS}:
            with self._contain_errors(_PART_LAYERS):
                await self._reconcile_layers(client)
        with self._contain_errors(_PART_ROUTES):
            if self._not_computed:
                self._keep_actual_routes()

    @contextlib.contextmanager
    def _contain_errors(self, what: str) -> Iterator[None]:
        """Limit an internal error to the named computation."""
        try:
            yield
        except VppError:
            raise
        except Exception as error:  # whatever it is: the tunnels go on
            problem = f"a mistake in vpp-ipsecd: {type(error).__name__}"
            if self.internal_errors.get(what) != problem:
                log.error("VPP keeps what it has of %s: %s", what, problem)
                self._journal.note(JournalSource.VPP, f"keeps what it has of {what}: {problem}")
            self.internal_errors[what] = problem
        else:
            self._not_computed.discard(what)
            if self.internal_errors.pop(what, None):
                self._work_queue.mark_dirty(self._model.tunnels)  # some may have waited for it

    def _steering_inputs(self, found: Mapping[TunnelKey, KernelFallback]) -> object:
        """Return the inputs of the layers. While they are equal, the layers are."""
        env = self._environment.snapshot
        return self._model.policy_changes, env.addresses, env.enforce_selectors, self._environment.gre_ipip, found

    def _route_inputs(self) -> object:
        """Return the inputs of the routes over VTIs and to the router itself. While they are equal, the routes are."""
        links = self._environment.interfaces.links
        host_interfaces = self._host_interfaces
        return (
            self._model.policy_changes,
            self._vtis.changes,
            self._environment.tables,
            host_interfaces.local_addresses,
            host_interfaces.multicast_tables,
            links,
        )

    def _compute_fallbacks(self) -> dict[TunnelKey, KernelFallback]:
        """Return the kernel fallbacks of tunnels that VPP cannot carry; none where the settings forbid them."""
        with self._contain_errors(_PART_FALLBACKS):
            if self._offload.unsupported != "kernel" or not self._unsupported_tunnels:
                return {}
            desired = [state.desired for state in self._vpp.tunnels.values()]
            tunnels, env, taps = self._model.tunnels, self._environment.snapshot, self._environment.interfaces.taps
            found = kernel_fallbacks(desired, tunnels, env, taps, self._sa_usage.vpp_may_have_sent)
            for key, fallback in found.items():
                if fallback.target is not None:
                    for sa in tunnels[key].sas.values():
                        self._sa_usage.note_kernel_sends(sa)
            return found
        return self.fallbacks

    def _compute_layers(self, found: dict[TunnelKey, KernelFallback]) -> None:
        """Compute the layers that VPP should have; `found` are the kernel fallbacks."""
        policies = outbound_policies(self._model.policies())
        self.gre_ipip.update_claims(policies)
        peers = {template.daddr for each in policies for template in each.policy.templates}
        wanted = [each.policy_rules for each in policies if each.policy_rules is not None]
        with_fallback = [each._replace(target=_target_or_kernel(each.target, found)) for each in wanted]
        steering = compute_steering(
            with_fallback,
            self._environment.snapshot.addresses,
            peers,
            [*fallback_inbound_rules(found), *self._cleartext_discards()],
        )
        rule_index = RuleIndex(rule for layer in (*steering.ip4.layers, *steering.ip6.layers) for rule in layer.rules)
        self.fallbacks, self._outbound, self._steering, self._rule_index = found, policies, steering, rule_index
        for state in self._vpp.tunnels.values():
            self._note_attachment(state)
        for each in wanted:
            if isinstance(each.target, TunnelKey) and each.target in self._model.tunnels:
                self._vpp.tunnel_state(each.target)  # its tunnel may exist already
        if OUTBOUND_POLICIES in self.internal_errors:
            self._routes_computed_from = None  # the routes were computed from policies that are not the latest

    def _cleartext_discards(self) -> list[tuple[Rule, Target]]:
        """Return rules that drop unencrypted packets to protected gre and ipip interfaces."""
        if not self._environment.snapshot.enforce_selectors:
            return []
        return [
            (rule, Action.DISCARD)
            for rule in cleartext_discard_rules(self.gre_ipip.claims.must_encrypt, self._model.policies())
        ]

    def _compute_vti_routes(self) -> None:
        """Compute the routes that VPP should have for the kernel's routes over VTIs."""
        missing_before = self._vtis.route_targets.missing_tables
        if self._vtis.compute([each.policy for each in self._outbound], self._environment.tables):
            for number, ip6 in sorted(self._vtis.route_targets.missing_tables - missing_before):
                family = "IPv6" if ip6 else "IPv4"
                line = f"has no {family} table {number}: the routes over VTIs in it are left out"
                self._journal.note(JournalSource.VPP, line)
            self._work_queue.request_environment_read()  # from now on the path to a peer may be another one
        for target in self._vtis.route_targets.targets:
            if target in self._model.tunnels:
                self._vpp.tunnel_state(target)  # its tunnel may exist already

    def _compute_classifiers(self) -> None:
        """Compute the layers of VTI classifiers."""
        policies: dict[int, list[Policy]] = {if_id: [] for if_id in self._vtis.route_targets.classifiers}
        for each in self._outbound:
            if each.policy.if_id in policies:
                policies[each.policy.if_id].append(each.policy)
        classifiers = {}
        for if_id, vti_policies in policies.items():
            before = self._classifiers.get(if_id, VtiClassifierConfig((), (), NO_STEERING))
            same = [each.policy for each in before.policies] == vti_policies
            found = before.policies if same else [vti_outbound_policy(policy) for policy in vti_policies]
            wanted = [each.policy_rules for each in found if each.policy_rules is not None]
            with_fallback = tuple(
                each._replace(target=_target_or_kernel(each.target, self.fallbacks)) for each in wanted
            )
            steering = before.steering if before.policy_rules == with_fallback else compute_vti_steering(with_fallback)
            classifiers[if_id] = VtiClassifierConfig(found, with_fallback, steering)
            for key in self._model.tunnels.keys() & {each.target for each in wanted}:
                self._vpp.tunnel_state(key)  # its tunnel may exist already
        changed = classifiers.keys() ^ self._classifiers.keys()
        self._classifiers = classifiers
        self._environment.set_classified_vtis(frozenset(classifiers))
        self._work_queue.mark_dirty(key for key in self._model.tunnels if key.if_id in changed)

    def _note_attachment(self, state: TunnelState) -> None:
        """Record whether a tunnel's decrypted packets may match outbound policies."""
        tunnel = state.desired.tunnel
        if tunnel is not None and tunnel.gre_ipip is None and self._rule_index.may_match(tunnel.inbound_rules):
            self._tunnels_to_attach.add(state.desired.key)
        else:
            self._tunnels_to_attach.discard(state.desired.key)

    def _keep_actual_routes(self) -> None:
        """Use the routes in VPP as the desired ones, so that every route keeps its target."""
        for key in self._model.tunnels:
            self._vpp.tunnel_state(key)
        self.route_resolver.ready_vtis = frozenset(self._vpp.classifiers.by_if_id)
        tables: dict[int, dict[Prefix, RouteTarget]] = {}
        for route, paths in self._vpp.routes.items():
            tables.setdefault(route.table, {})[route.prefix] = self.route_resolver.target_of_paths(paths)
        self.route_targets = RouteTargets(tables.items(), frozenset(self._vpp.layers.layers))

    # Requests to VPP

    def _interfaces_to_attach(self) -> set[int]:
        """Return the interfaces that may receive packets that outbound policies match."""
        states = (self._vpp.tunnels[key] for key in self._tunnels_to_attach)
        return {
            *self._environment.interfaces.up,
            *(state.actual.sw_if_index for state in states if state.actual.sw_if_index is not None),
        }

    def _desired_neighbors(self) -> dict[inventory.Neighbor, bytes]:
        """Return the next hops on taps over which the kernel gets packets."""
        taps = {each.target.sw_if_index for each in self.fallbacks.values() if each.target is not None}
        macs = self._environment.interfaces.macs
        return {inventory.Neighbor(tap, ip6): macs[tap] for tap in taps for ip6 in (False, True)}

    async def _reconcile_layers(self, client: VppClient) -> None:
        """Bring the layers, and the routes of their tables, as far towards the desired state as possible now."""
        vpp = self._vpp
        self._is_complete = False
        self.refusals.release_due()
        self._attached_interfaces = self._interfaces_to_attach()
        waiting = [key for key in self._tunnels_to_attach if not self._may_be_protected(key)]
        rejected: set[SaSpec | Request] = set()
        wanted = self._desired_neighbors()
        missing = [NeighborAddDel(*it, mac) for it, mac in wanted.items() if vpp.neighbors.get(it) != mac]
        await self._send(client, missing, rejected)
        await self._receive_multicast(client, rejected)
        complete = await self._reconcile_stacks(client, rejected)
        if complete:
            surplus = [NeighborAddDel(*it, mac, False) for it, mac in vpp.neighbors.items() if it not in wanted]
            await self._send(client, surplus, rejected)
        self.refusals.retain_only(rejected.__contains__)
        self._is_complete = complete and vpp.neighbors == wanted
        self._work_queue.mark_dirty(filter(self._may_be_protected, waiting))

    async def _receive_multicast(self, client: VppClient, rejected: set[SaSpec | Request]) -> None:
        """Make VPP receive link multicast in the tables of VTIs with host interfaces, where VPP has multicast tables."""
        vpp = self._vpp
        # other tables are not watched: one may go and come again
        vpp.multicast_tables &= self._host_interfaces.multicast_tables
        if unknown := self._host_interfaces.multicast_tables - vpp.multicast_tables:
            found = await inventory.read_multicast_entries(client, unknown)
            vpp.multicast_tables |= {table for table in unknown if found.get(table, True)}
            await self._send(client, [MrouteAdd(*table) for table, is_there in found.items() if not is_there], rejected)

    def _may_be_protected(self, key: TunnelKey) -> bool:
        """Return whether a tunnel has an interface that may receive by now."""
        state = self._vpp.tunnels[key]
        is_there = state.desired.tunnel is not None and state.actual.sw_if_index is not None
        return is_there and self.inbound_ready(state)

    async def _reconcile_stacks(self, client: VppClient, rejected: set[SaSpec | Request]) -> bool:
        """Bring each stack of layers to its desired state, and return whether all are complete.

        Add refused requests to `rejected`.
        """
        vpp = self._vpp
        for _ in range(MAX_ROUNDS):
            refused = {(key.table, key.prefix) for key in self.refusals if isinstance(key, RouteAddDel)}
            actual = {ip6: self._actual_targets(ip6) for ip6 in (False, True)}
            numbers = vpp.layers.free_numbers()
            plans: dict[StackKey, plan_policy_layers.SteeringPlan] = {}
            for stack, want, interfaces in self._stacks():
                done = self._completed.get(stack)
                if done is not None and done[:2] == (want, interfaces):
                    plans[stack] = done[2]
                    continue
                plan = plan_policy_layers.layer_requests(
                    stack, want, interfaces, vpp.layers, actual[stack.ip6], refused, numbers
                )
                plans[stack] = plan
                self._completed.pop(stack, None)
                if plan.complete and stack.if_id and interfaces:
                    self._completed[stack] = want, interfaces, plan
            self._set_route_targets({stack: plan.routes for stack, plan in plans.items()})
            requests = [request for plan in plans.values() for request in plan.requests]
            requests += self._classifier_requests()
            was_sent = await self._send(client, [*self._route_changes(), *requests], rejected)
            before, self.route_resolver.ready_vtis = self.route_resolver.ready_vtis, self._ready_classifiers(plans)
            if was_sent or self.route_resolver.ready_vtis != before:
                continue
            is_ready = self.route_resolver.ready_vtis.issuperset(self._classifiers)
            if is_ready or not await self._send(client, list(self._route_changes(is_last=True)), rejected):
                return all(plan.complete for plan in plans.values()) and vpp.classifiers.match(self._classifiers.keys())
        log.error("the rules for outbound policies do not come to an end; they are tried again")
        return False

    def _ready_classifiers(self, plans: Mapping[StackKey, plan_policy_layers.SteeringPlan]) -> frozenset[int]:
        """Return the VTIs whose classifiers are complete, so that routes may lead to them."""
        return frozenset(
            if_id
            for if_id in self._classifiers
            if self._vpp.classifiers.index(if_id) is not None
            and all(plans[StackKey(ip6, if_id)].complete for ip6 in (False, True))
        )

    def _stacks(self) -> Iterator[tuple[StackKey, FamilySteering, Set[int]]]:
        """Yield each desired or actual stack of layers, with its desired steering and the interfaces to attach."""
        vpp = self._vpp
        for ip6 in (False, True):
            yield StackKey(ip6), self._steering.family(ip6), self._attached_interfaces
        for if_id in self._classifiers.keys() | {stack.if_id for stack in vpp.layers.stacks if stack.if_id}:
            config, index = self._classifiers.get(if_id), vpp.classifiers.index(if_id)
            steering = NO_STEERING if config is None else config.steering
            interfaces = frozenset() if config is None or index is None else frozenset({index})
            for ip6 in (False, True):
                yield StackKey(ip6, if_id), steering.family(ip6), interfaces

    def _classifier_requests(self) -> list[Request]:
        vpp = self._vpp
        try:
            return list(
                vpp.classifiers.next_requests(self._classifiers.keys(), self._classifiers_in_use(), vpp.numbers)
            )
        except NumbersExhausted as error:
            vpp.note_refused(self.refusals, IpsecItfCreate(NO_INDEX), str(error))
            return []

    def _classifiers_in_use(self) -> set[int]:
        """Return the classifiers, by sw_if_index, that have routes into them or layers attached."""
        vpp = self._vpp
        stacks = [vpp.layers.stack(stack) for stack in vpp.layers.stacks if stack.if_id]
        attached = {index for layers in stacks for layer in layers for index in (*layer.attached, *layer.dangling)}
        return {index for index in vpp.classifiers.if_ids if index in attached or vpp.routes.into(INTERFACE_RX + index)}

    async def _send(self, client: VppClient, requests: Sequence[Request], rejected: set[SaSpec | Request]) -> bool:
        """Send requests for steering, and return whether any was sent. Add refusals, new and old, to `rejected`."""
        if not requests:
            return False
        vpp, is_safe = self._vpp, self._request_check()
        allowed = []
        for request in requests:
            if refusal_key(request) in self.refusals:
                vpp.free_numbers(request)
                rejected.add(refusal_key(request))
            elif is_safe(request):
                allowed.append(request)
            else:
                rejected.add(refusal_key(request))
        for request, reply in zip(allowed, await client.run(allowed), strict=True):
            if not vpp.is_accepted(self.refusals, request, reply):
                rejected.add(refusal_key(request))
            elif isinstance(request, RouteAddDel):
                vpp.apply_route_reply(request, reply)
            elif isinstance(request, NeighborAddDel):
                vpp.neighbors.pop(neighbor := inventory.Neighbor(request.sw_if_index, request.ip6), None)
                if request.is_add:
                    vpp.neighbors[neighbor] = request.mac
            elif isinstance(request, MrouteAdd):
                vpp.multicast_tables.add((request.table, request.ip6))
            elif is_classifier_request(request):
                vpp.classifiers.apply_accepted(request, reply.value, vpp.numbers)
            else:
                vpp.layers.apply_accepted(request, reply.value)
        return bool(allowed)

    def _request_check(self) -> Callable[[Request], bool]:
        """Return a function that checks a request against the present state of VPP. It records a violated rule."""
        vpp, macs, classifiers = self._vpp, self._environment.interfaces.macs, self._vpp.classifiers.if_ids.keys()
        received = {INTERFACE_RX + index for index in classifiers}
        interfaces = self._environment.interfaces.all | vpp.tunnel_of_interface.keys() | classifiers | received
        in_use = self._classifiers_in_use()

        def is_safe(request: Request) -> bool:
            try:
                if is_classifier_request(request):
                    check_classifier_request(request, classifiers, in_use, CLASSIFIER_TABLE)
                else:
                    check_layer_request(request, vpp.layers.layers, interfaces)
                    check_kernel_tap_request(request, macs)
            except GuardError as error:
                vpp.note_withheld(self.refusals, request, error)
                return False
            return True

        return is_safe

    # Targets of routes

    def _set_route_targets(self, stack_tables: Mapping[StackKey, Mapping[int, Mapping[Prefix, Target]]]) -> None:
        """Set the target of each route."""
        vti_targets = self._vtis.route_targets.routes
        inputs = (
            self._host_interfaces.local_addresses,
            {key: each.target for key, each in self.fallbacks.items() if key.if_id},
        )
        if (
            self._stack_tables == stack_tables
            and self._targets_computed_from[0] is vti_targets
            and self._targets_computed_from[1] == inputs
        ):
            return
        steered = [item for family in stack_tables.values() for item in family.items()]
        over_vtis = [
            (number, {prefix: _route_target_or_kernel(target, self.fallbacks) for prefix, target in table.items()})
            for number, table in vti_targets.items()
        ]
        routes_to_us = [(route.table, {route.prefix: Action.LOCAL}) for route in self._host_interfaces.local_addresses]
        route_targets = RouteTargets([*over_vtis, *steered, *routes_to_us], frozenset(self._vpp.layers.layers))
        self._stack_tables = stack_tables
        self._targets_computed_from = vti_targets, inputs
        self._work_queue.mark_dirty(route_targets.changed_tunnels(self.route_targets))
        self._may_have_stale_routes |= not self.route_targets.targets.keys() <= route_targets.targets.keys()
        self.route_targets = route_targets

    def _actual_targets(self, ip6: bool) -> dict[int, dict[Prefix, Target]]:
        """Return the targets of routes in VPP, by table, without those over VTIs and to the router itself."""
        targets: dict[int, dict[Prefix, Target]] = {}
        for route, paths in self._vpp.routes.items():
            if (len(route.prefix.address) == 16) != ip6 or not isinstance(paths, int) or paths == LOCAL_INDEX:
                continue
            if not self._is_vti_route(route, ip6):
                target = self.route_resolver.target_of_index(paths)
                targets.setdefault(route.table, {})[route.prefix] = (
                    NO_TUNNEL if isinstance(target, VtiClassifier) else target
                )
        return targets

    def _is_vti_route(self, route: Route, ip6: bool) -> bool:
        """Return whether a route is one over a VTI.

        Layers' tables have none. In the main table, host routes may be a policy's.
        """
        if route.table in TABLE_NUMBERS:
            return False
        if route.table or route.prefix.length < 8 * len(route.prefix.address):
            return True
        claimed = (self._steering.family(ip6).routes, self._stack_tables.get(StackKey(ip6), {}).get(0, {}))
        return route.prefix in self._vtis.route_targets.routes.get(0, {}) and not any(
            route.prefix in it for it in claimed
        )

    def _route_changes(self, is_last: bool = False) -> Iterator[RouteAddDel]:
        """Yield requests that give routes their present paths. A route without a tunnel drops.

        Routes to a classifier that is not ready stay as they are. In the `is_last` round, when it was refused, they
        drop.
        """
        vpp, macs = self._vpp, self._environment.interfaces.macs
        replaced = any(len(vpp.layers.stack(stack)) > len(want.layers) for stack, want, _ in self._stacks())
        for route, target in self.route_targets.targets.items():
            paths, actual = self.route_resolver.paths_of(target), vpp.routes.get(route)
            if actual == paths or (actual is not None and not is_last and not self.route_resolver.is_ready(target)):
                continue
            if actual is not None or paths != NO_INDEX or replaced or self.route_targets.needs_explicit_drop(route):
                is_tap = isinstance(paths, int) and paths in macs
                next_hop = KERNEL_NEXT_HOP[len(route.prefix.address) == 16] if is_tap else b""
                yield RouteAddDel(paths, route.prefix, vpp.route_source, True, route.table, next_hop)


def _route_target_or_kernel(target: RouteTarget, found: Mapping[TunnelKey, KernelFallback]) -> RouteTarget:
    """Return the target of a route over a VTI, or its kernel fallback. Shared routes have none: that share drops."""
    return target if isinstance(target, WeightedTargets | VtiClassifier) else _target_or_kernel(target, found)


def _target_or_kernel(target: Target, found: Mapping[TunnelKey, KernelFallback]) -> Target:
    """Return a target, or its kernel fallback where it has one."""
    fallback = found.get(target) if isinstance(target, TunnelKey) else None
    return target if fallback is None or fallback.target is None else fallback.target
