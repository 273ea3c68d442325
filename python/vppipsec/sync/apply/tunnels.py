"""Reconciles tunnels: asks the plan round by round, checks its requests against the guard, and sends them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence, Set

from vppipsec.sync.actual.backoff import refusal_key
from vppipsec.sync.actual.vpp_state import TunnelState, VppState
from vppipsec.sync.apply.host_interfaces import HostInterfaceReconciler
from vppipsec.sync.apply.steering import SteeringReconciler
from vppipsec.sync.desired.policy_layers import Action, KernelTap, VtiClassifier
from vppipsec.sync.desired.routes import WeightedTargets
from vppipsec.sync.plan.tunnel import Plan, always_explicit, tunnel_requests
from vppipsec.vpp.api.client import VppClient
from vppipsec.vpp.api.ip import RouteAddDel
from vppipsec.vpp.api.ipsec import IpsecItfCreate
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.guard import GuardError, check_block_protection, check_tunnel_request
from vppipsec.vpp.state.numbers import NumbersExhausted
from vppipsec.vpp.types import NO_INDEX, Route, SaSpec

_NO_SAS: frozenset[SaSpec] = frozenset()
_NO_ACTUAL_ROUTES: frozenset[Route] = frozenset()
_NO_INTERFACES: Set[int] = frozenset()


class TunnelReconciler:
    """Reconciles the tunnels of one VPP. `steering` knows the target of each route, and when a tunnel may receive."""

    def __init__(self, vpp: VppState, steering: SteeringReconciler, host_interfaces: HostInterfaceReconciler) -> None:
        self._vpp = vpp
        self._steering = steering
        self._host_interfaces = host_interfaces

    async def reconcile(self, client: VppClient, states: Sequence[TunnelState]) -> None:
        """Bring tunnels to their desired state, in two lanes: while VPP works on one lane, the other is planned.

        Tunnels that share routes are in one lane, so that VPP gets the latest request for a route last. Raises
        VppUnavailable.
        """
        if not self._steering.knows_route_targets:
            return
        shared = self._steering.route_targets.shared_routes
        sharing = [state for state in states if shared(state.desired.key)]
        alone = [state for state in states if not shared(state.desired.key)] if sharing else states
        lanes = [self._reconcile_lane(client, lane) for lane in ([*sharing, *alone[::2]], alone[1::2]) if lane]
        for outcome in await asyncio.gather(*lanes, return_exceptions=True):
            if outcome is not None:
                raise outcome

    async def _reconcile_lane(self, client: VppClient, states: Sequence[TunnelState]) -> None:
        """Send what the plan returns, round by round, until nothing is left or the rest was refused."""
        waiting = list(states)
        while waiting:
            planned = []
            batch: list[Request] = []
            for state in waiting:
                plan = self._plan(state)
                if plan.requests:
                    planned.append((state, plan))
                    batch += plan.requests
            replies = iter(await client.run(batch))
            waiting = []
            for state, plan in planned:
                accepted = [self._vpp.apply_reply(state, request, next(replies)) for request in plan.requests]
                if not plan.complete or not all(accepted) or state.refusals:
                    waiting.append(state)

    def _plan(self, state: TunnelState) -> Plan:
        """Return the next requests of a tunnel, without those refused lately and those that the guard rejects."""
        vpp, steering, route_targets, refusals = self._vpp, self._steering, self._steering.route_targets, state.refusals
        refused = frozenset(key for key in refusals if isinstance(key, SaSpec)) if refusals else _NO_SAS
        shares = {
            route: steering.route_resolver.paths_of(route_targets.targets[route])
            for route in route_targets.shared_routes(state.desired.key)
        }
        share_indexes = steering.route_resolver.share_indexes(shares.values()) if shares else _NO_INTERFACES
        actual = state.actual
        try:
            plan = tunnel_requests(
                state.desired.tunnel,
                route_targets.exclusive_routes(state.desired.key),
                actual,
                vpp.routes,
                vpp.route_source,
                vpp.numbers,
                refused,
                always_explicit if state.awaits_sa else route_targets.needs_explicit_drop,
                steering.inbound_ready(state) and self._host_interfaces.may_protect(state),
                shares,
                self._host_interfaces.wants_host_interface(state.desired.key, actual.host),
            )
        except NumbersExhausted as error:
            vpp.note_refused(refusals, IpsecItfCreate(NO_INDEX), str(error))
            return Plan((), True)
        routes_into = vpp.routes.into(actual.sw_if_index) if actual.sw_if_index is not None else _NO_ACTUAL_ROUTES
        allowed, rejected = [], set()
        for request in plan.requests:
            if refusals and (key := refusal_key(request)) in refusals:
                rejected.add(key)
                vpp.free_numbers(request)
                continue
            if isinstance(request, RouteAddDel) and not request.is_add and self._will_be_replaced(request.route):
                continue
            try:
                is_shared = isinstance(request, RouteAddDel) and request.route in shares
                check_tunnel_request(
                    request, actual, routes_into, share_indexes if is_shared else _NO_INTERFACES, vpp.tables
                )
                check_block_protection(request, vpp.has_block_sa)
            except GuardError as error:
                vpp.note_withheld(refusals, request, error)
                rejected.add(refusal_key(request))
                continue
            allowed.append(request)
        if not allowed and (refusals or refusals.retrying):
            _drop_moot_refusals(state, rejected)
        return Plan(allowed, plan.complete)

    def _will_be_replaced(self, route: Route) -> bool:
        """Return whether another request gives a route its new target. The route then stays until VPP replaces it."""
        route_targets = self._steering.route_targets
        target = route_targets.target(route)
        if target is None or route_targets.needs_explicit_drop(route) or isinstance(target, KernelTap):
            return target is not None
        state = None if isinstance(target, Action | WeightedTargets | VtiClassifier) else self._vpp.tunnels.get(target)
        return state is not None and state.desired.tunnel is not None


def _drop_moot_refusals(state: TunnelState, rejected: Set[SaSpec | Request]) -> None:
    """Forget refusals of requests that a tunnel no longer needs. Called when it has nothing left to send."""
    want = state.desired.tunnel
    wanted = () if want is None else (*want.inbound, *want.outbound)
    state.refusals.retain_only(lambda key: key in rejected or key in wanted)
