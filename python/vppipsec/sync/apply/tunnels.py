"""Brings VPP to what is desired of groups: asks the plan round by round, holds its requests against the guard, and sends them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence, Set

from vppipsec.sync.actual.backoff import refusal_key
from vppipsec.sync.actual.vpp_state import GroupState, VppSide
from vppipsec.sync.apply.host_interfaces import HostKeeper
from vppipsec.sync.apply.steering import Steerer
from vppipsec.sync.desired.policy_layers import Fixed, Handover, Junction
from vppipsec.sync.desired.routes import Split
from vppipsec.sync.plan.tunnel import Plan, always, next_requests
from vppipsec.vpp.api.client import VppClient
from vppipsec.vpp.api.ip import ChangeRoute
from vppipsec.vpp.api.ipsec import CreateItf
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.guard import GuardError, check, check_mute
from vppipsec.vpp.state.numbers import NumbersExhausted
from vppipsec.vpp.types import NO_INDEX, Route, SaSpec

_NO_SAS: frozenset[SaSpec] = frozenset()
_NO_ROUTES: frozenset[Route] = frozenset()
_NO_INTERFACES: Set[int] = frozenset()


class Programmer:
    """Programs the groups of one VPP. The steerer says whose each route is, and when a tunnel may receive."""

    def __init__(self, vpp: VppSide, steerer: Steerer, hosts: HostKeeper) -> None:
        self._vpp = vpp
        self._steerer = steerer
        self._hosts = hosts

    async def program(self, client: VppClient, states: Sequence[GroupState]) -> None:
        """Bring VPP to what is desired of groups, in two lanes: while VPP works for the one, the other is planned.

        Tunnels that share routes are in one lane: so it is always the latest request for a route that VPP gets last.
        Raises VppUnavailable.
        """
        if not self._steerer.knows_owners:
            return
        shared = self._steerer.owners.shared
        sharing = [state for state in states if shared(state.desired.key)]
        alone = [state for state in states if not shared(state.desired.key)] if sharing else states
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
                accepted = [self._vpp.took(state, request, next(replies)) for request in plan.requests]
                if not plan.complete or not all(accepted) or state.refusals:
                    todo.append(state)

    def _plan(self, state: GroupState) -> Plan:
        """Ask the plan for the next requests of a group, without those that were refused lately or that break a rule."""
        vpp, steerer, owners, refusals = self._vpp, self._steerer, self._steerer.owners, state.refusals
        refused = frozenset(key for key in refusals if isinstance(key, SaSpec)) if refusals else _NO_SAS
        shares = {route: steerer.leading.lead_of(owners.targets[route]) for route in owners.shared(state.desired.key)}
        ways = steerer.leading.ways(shares.values()) if shares else _NO_INTERFACES
        held = state.held
        try:
            plan = next_requests(
                state.desired.tunnel,
                owners.owned(state.desired.key),
                held,
                vpp.routes,
                vpp.route_source,
                vpp.numbers,
                refused,
                always if state.waits else owners.exposed,
                steerer.may_receive(state) and self._hosts.may_begin(state),
                shares,
                self._hosts.is_paired(state.desired.key, held.host),
            )
        except NumbersExhausted as error:
            vpp.refuse(refusals, CreateItf(NO_INDEX), str(error))
            return Plan((), True)
        leading = vpp.routes.into(held.sw_if_index) if held.sw_if_index is not None else _NO_ROUTES
        allowed, barred = [], set()
        for request in plan.requests:
            if refusals and (key := refusal_key(request)) in refusals:
                barred.add(key)
                vpp.give_back(request)
                continue
            if isinstance(request, ChangeRoute) and not request.is_add and self._will_be_replaced(request.route):
                continue
            try:
                is_shared = isinstance(request, ChangeRoute) and request.route in shares
                check(request, held, leading, ways if is_shared else _NO_INTERFACES, vpp.tables)
                check_mute(request, vpp.mute)
            except GuardError as error:
                vpp.withhold(refusals, request, error)
                barred.add(refusal_key(request))
                continue
            allowed.append(request)
        if not allowed and (refusals or refusals.past):
            _forget_moot_refusals(state, barred)
        return Plan(allowed, plan.complete)

    def _will_be_replaced(self, route: Route) -> bool:
        """Tell whether the new owner of a route leads it elsewhere, so that there is no moment without."""
        owners = self._steerer.owners
        owner = owners.owner(route)
        if owner is None or owners.exposed(route) or isinstance(owner, Handover):
            return owner is not None
        state = None if isinstance(owner, Fixed | Split | Junction) else self._vpp.groups.get(owner)
        return state is not None and state.desired.tunnel is not None


def _forget_moot_refusals(state: GroupState, barred: Set[SaSpec | Request]) -> None:
    """Nothing is left to send of a group: forget the refusals of what is not wanted any more."""
    want = state.desired.tunnel
    wanted = () if want is None else (*want.inbound, *want.outbound)
    state.refusals.forget_all_but(lambda key: key in barred or key in wanted)
