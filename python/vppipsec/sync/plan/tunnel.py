"""Turns desired and actual state of a tunnel into requests. Pure: no I/O; it does not change what it reads.

`tunnel_requests` returns what can be sent *now*, in order and without waiting in between. It is asked again after the
replies, until nothing is left. So the order is defined here, and a refusal or a lost reply needs no special case. The
order, with reasons:

1. Routes are added as soon as their interface exists. Until then those that need an explicit drop drop. Otherwise the
   packets would leave unencrypted, or through another tunnel. An interface without protection drops.
2. SAs are added, and accepted, before a protection names them: an update that fails leaks references in VPP.
3. A protection releases an SA, and VPP confirms that, before the SA is deleted. Deleting a protecting SA only drops a
   reference.
4. Routes leave an interface before it is deleted: they would dangle.
5. A gre or ipip interface that must be protected is blocked while it has no SAs: unprotected, it would send
   unencrypted.
6. Inbound rules and policy layers are applied to an interface, and accepted, before it is protected. Until then it
   receives nothing.
7. An interface that belongs in another FIB table receives nothing until it is there: the wrong table would forward its
   decrypted packets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType

from vppipsec.sync.desired.state import DesiredTunnel
from vppipsec.vpp.api.acl import AclAddReplace, AclDel, SetInterfaceAcls
from vppipsec.vpp.api.interface import (
    InterfaceAddressAddDel,
    SetInterfaceMtu,
    SetInterfaceTable,
    SetInterfaceTag,
    SetInterfaceUp,
    SetUnnumbered,
)
from vppipsec.vpp.api.ip import DisableIp6, EnableIp6, RouteAddDel
from vppipsec.vpp.api.ipsec import (
    IpsecItfCreate,
    IpsecItfDelete,
    SadEntryAdd,
    SadEntryDel,
    SadEntryUpdate,
    TunnelProtect,
    TunnelUnprotect,
)
from vppipsec.vpp.api.linux_cp import LcpPairAddDel
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.gre_ipip import BLOCK_PROTECTION
from vppipsec.vpp.ownership import IP6_TAG, interface_address
from vppipsec.vpp.state.numbers import NumberPools, NumbersExhausted
from vppipsec.vpp.state.routes import ActualRoutes
from vppipsec.vpp.state.tunnels import ActualTunnel
from vppipsec.vpp.types import MAX_INBOUND_SAS, NO_INDEX, Paths, Protection, Route, SaSpec

_NO_SHARED_PATHS: Mapping[Route, Paths] = MappingProxyType({})


def always_explicit(route: Route) -> bool:
    """Return True: every route needs an explicit drop."""
    return True


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send now. `complete` means that VPP holds the desired state once it has accepted all requests."""

    requests: Sequence[Request]
    complete: bool


def tunnel_requests(
    desired: DesiredTunnel | None,
    routes: Set[Route],
    actual: ActualTunnel,
    actual_routes: ActualRoutes,
    route_source: int,
    numbers: NumberPools,
    refused: Set[SaSpec] = frozenset(),
    needs_explicit_drop: Callable[[Route], bool] = always_explicit,
    inbound_ready: bool = True,
    shares: Mapping[Route, Paths] = _NO_SHARED_PATHS,
    wants_host_interface: bool = False,
) -> Plan:
    """Return what to send now so that VPP holds `desired` and sends `routes` into it.

    Without a tunnel the routes drop; where that needs no explicit route, they are removed. `routes` are those that this
    tunnel alone owns. `refused` are SAs that VPP refused and that must not be tried now. `inbound_ready` says whether
    the interface may receive; until then it is not protected. `shares` are routes that give this tunnel a share, with
    the paths that they should have now. `wants_host_interface` says whether the interface should have a host interface.

    Raises NumbersExhausted when VPP has no room and every remaining request needs a number.
    """
    if desired is None:
        return _teardown(actual, actual_routes, set(filter(needs_explicit_drop, routes)), route_source, shares)
    wanted = (*desired.inbound, *desired.outbound)
    matches = [_find_actual(spec, actual) for spec in wanted]
    moves: list[SadEntryUpdate] = []
    missing: list[SaSpec] = []
    for spec, match in zip(wanted, matches, strict=True):
        if match is None:
            if not refused or spec not in refused:  # the hash of an SA is expensive
                missing.append(spec)
        elif actual.sas[match].spec != spec:
            moves.append(SadEntryUpdate(match, spec.udp_src_port, spec.udp_dst_port))
    index = actual.sw_if_index
    lacks_itf = index is None and desired.gre_ipip is None
    shortage = numbers.shortage(len(missing), int(lacks_itf)) if missing or lacks_itf else ""
    new = [] if shortage else [SadEntryAdd(numbers.sad_id(), spec) for spec in missing]
    protection = _protection(matches[: len(desired.inbound)], matches[len(desired.inbound) :])
    unwanted = [sad_id for sad_id in actual.sas if sad_id not in matches]
    named = _named(actual.protection)
    free = [sad_id for sad_id in unwanted if sad_id not in named]
    requests: list[Request] = []
    if desired.gre_ipip is not None:
        requests += [*moves, *new]
        if actual.gre_ipip == desired.gre_ipip and not (protection is None and new):
            requests += _protect_gre_ipip(actual, protection or BLOCK_PROTECTION)
        requests += map(SadEntryDel, free)
        return _with_shortage(requests, not new and len(free) == len(unwanted), shortage)
    if index is None:
        if not shortage:
            requests += [IpsecItfCreate(numbers.instance()), *_set_acl_rules(desired, actual)]
        explicit_drops = set(filter(needs_explicit_drop, routes))
        requests += _discard_routes(explicit_drops, actual_routes, route_source)
        requests += [*_change_shared_routes(shares, actual_routes, route_source), *moves, *new]
        return _with_shortage(requests, False, shortage)
    is_in_table = _is_in_table(desired, actual)
    requests += _set_up(index, desired, actual) if is_in_table else _set_tables(index, desired, actual)
    requests += _change_shared_routes(shares, actual_routes, route_source)
    requests += _change_routes(index, routes, actual_routes, route_source, shares)
    requests += [
        *_apply_acl(index, desired, actual),
        *_set_host_interface(index, wants_host_interface and is_in_table, actual),
        *moves,
        *new,
    ]
    changes = is_in_table and protection != actual.protection
    is_filtered = desired.inbound_rules is None or actual.acl_applied
    if changes and protection is not None and ((is_filtered and inbound_ready) or actual.protection is not None):
        requests.append(TunnelProtect(index, protection.outbound, protection.inbound))
    elif changes and protection is None and not new:
        # the kernel has deleted its SAs, and VPP refuses the new ones
        requests.append(TunnelUnprotect(index))
    requests += map(SadEntryDel, free)
    tag_is_final = actual.ip6 or not desired.ip6
    pair_is_final = (actual.host is not None) == wants_host_interface
    filter_is_final = is_filtered and inbound_ready and (desired.inbound_rules is not None or actual.acl is None)
    return _with_shortage(
        requests,
        is_in_table and not new and len(free) == len(unwanted) and tag_is_final and filter_is_final and pair_is_final,
        shortage,
    )


def _protect_gre_ipip(actual: ActualTunnel, protection: Protection) -> Iterator[Request]:
    """Yield the request that gives a gre or ipip interface this protection, where there is one."""
    if actual.gre_ipip is not None and actual.protection != protection:
        yield TunnelProtect(actual.gre_ipip.sw_if_index, protection.outbound, protection.inbound)


def _with_shortage(requests: Sequence[Request], complete: bool, shortage: str) -> Plan:
    """Return the plan. A shortage of numbers may end while other requests remain, so it raises only without any.

    Raises NumbersExhausted.
    """
    if shortage and not requests:
        raise NumbersExhausted(shortage)
    return Plan(requests, complete and not shortage)


def _is_in_table(desired: DesiredTunnel, actual: ActualTunnel) -> bool:
    """Return whether an interface is in its table for IPv4, and for IPv6 if it passes IPv6, else in the main one."""
    table, table6 = actual.tables
    return table == desired.table and (table6 == desired.table or not (table6 or desired.ip6 or actual.ip6))


def _set_tables(index: int, desired: DesiredTunnel, actual: ActualTunnel) -> Iterator[Request]:
    """Yield requests that move an interface to its table: in one round it stops receiving, in the next it stops passing
    IP.

    In the round after that it changes its table.
    """
    is_in_other_table = actual.tables[0] != desired.table or actual.ip6  # else a family that it does not pass yet
    if is_in_other_table and actual.protection is not None:
        yield TunnelUnprotect(index)
    elif is_in_other_table and (actual.unnumbered_from is not None or actual.has_address or actual.ip6):
        if actual.unnumbered_from is not None:
            yield SetUnnumbered(index, actual.unnumbered_from, False)
        if actual.has_address:
            yield InterfaceAddressAddDel(index, interface_address(actual.instance), False)
        if actual.ip6:
            yield DisableIp6(index) if actual.tag == desired.tag else SetInterfaceTag(index, desired.tag)
    else:
        yield from _tag(index, desired, actual)
        for ip6, table in ((False, desired.table), (True, desired.table if desired.ip6 else 0)):
            if actual.tables[ip6] != table:
                yield SetInterfaceTable(index, ip6, table)


def _tag(index: int, desired: DesiredTunnel, actual: ActualTunnel) -> Iterator[Request]:
    """Yield the request that tags an interface.

    No dump shows whether VPP enabled IPv6. So the tag shows it once VPP has accepted that.
    """
    tag = desired.tag + IP6_TAG if actual.ip6 else desired.tag
    if actual.tag != tag:
        yield SetInterfaceTag(index, tag)


def _set_up(index: int, desired: DesiredTunnel, actual: ActualTunnel) -> Iterator[Request]:
    """Yield requests that make an interface pass IP.

    Outside the main table it has an address of its own, as it cannot borrow one.
    """
    if desired.ip6 and not actual.ip6:
        yield EnableIp6(index)
    yield from _tag(index, desired, actual)
    if desired.table:
        if not actual.has_address:
            yield InterfaceAddressAddDel(index, interface_address(actual.instance))
    elif actual.unnumbered_from != desired.unnumbered_from:
        if actual.unnumbered_from is not None:
            yield SetUnnumbered(index, actual.unnumbered_from, False)
        yield SetUnnumbered(index, desired.unnumbered_from)
    if desired.mtu and actual.mtu != desired.mtu:
        yield SetInterfaceMtu(index, desired.mtu)
    if not actual.up:
        yield SetInterfaceUp(index)


def _set_acl_rules(desired: DesiredTunnel, actual: ActualTunnel) -> Iterator[Request]:
    """Yield the request that gives the ACL the desired rules. An ACL in use changes from one packet to the next."""
    if desired.inbound_rules is not None and actual.rules != desired.inbound_rules:
        yield AclAddReplace(NO_INDEX if actual.acl is None else actual.acl, desired.tag, desired.inbound_rules)


def _apply_acl(index: int, desired: DesiredTunnel, actual: ActualTunnel) -> Iterator[Request]:
    """Yield requests that filter decrypted packets by the ACL, or that detach the ACL and delete it in the next round."""
    if desired.inbound_rules is not None:
        yield from _set_acl_rules(desired, actual)
        if actual.acl is not None and not actual.acl_applied:
            yield SetInterfaceAcls(index, actual.acl)
    elif actual.acl_applied:
        yield SetInterfaceAcls(index, NO_INDEX)
    elif actual.acl is not None:
        yield AclDel(actual.acl)


def _set_host_interface(index: int, wants_host_interface: bool, actual: ActualTunnel) -> Iterator[Request]:
    """Yield the request that creates or deletes the host interface.

    It is created after the interface is up: VPP does not report that to the kernel later.
    """
    if actual.host is not None and not wants_host_interface:
        yield LcpPairAddDel(index, actual.host.name, False)
    elif wants_host_interface and actual.host is None and actual.up:
        yield LcpPairAddDel(index, f"ipsec{actual.instance}")


def _change_routes(
    index: int, routes: Set[Route], actual_routes: ActualRoutes, route_source: int, shares: Mapping[Route, Paths]
) -> Iterator[Request]:
    """Yield requests that send exactly these routes into an interface."""
    for route in routes:
        if actual_routes.get(route) != index:
            yield RouteAddDel(index, route.prefix, route_source, True, route.table)
    for route in actual_routes.into(index):
        if route not in routes and route not in shares:
            yield RouteAddDel(NO_INDEX, route.prefix, route_source, False, route.table)


def _discard_routes(routes: Set[Route], actual_routes: ActualRoutes, route_source: int) -> Iterator[Request]:
    """Yield requests that make routes without a tunnel drop, so that no packet leaves unencrypted."""
    for route in routes:
        if actual_routes.get(route) != NO_INDEX:
            yield RouteAddDel(NO_INDEX, route.prefix, route_source, True, route.table)


def _change_shared_routes(
    shares: Mapping[Route, Paths], actual_routes: ActualRoutes, route_source: int
) -> Iterator[Request]:
    """Yield requests that give shared routes their paths into the existing tunnels."""
    for route, paths in shares.items():
        if actual_routes.get(route) != paths:
            yield RouteAddDel(paths, route.prefix, route_source, True, route.table)


def _teardown(
    actual: ActualTunnel,
    actual_routes: ActualRoutes,
    routes: Set[Route],
    route_source: int,
    shares: Mapping[Route, Paths],
) -> Plan:
    """Return the plan that deletes a tunnel: first its routes and what holds its SAs, then the rest."""
    requests = [
        *_discard_routes(routes, actual_routes, route_source),
        *_change_shared_routes(shares, actual_routes, route_source),
    ]
    index = actual.sw_if_index
    if index is not None:
        routes_into = actual_routes.into(index)
        for route in routes_into:
            if route not in routes and route not in shares:
                requests.append(RouteAddDel(NO_INDEX, route.prefix, route_source, False, route.table))
        if actual.protection is not None:
            requests.append(TunnelUnprotect(index))
        if routes_into or actual.protection is not None:
            return Plan(requests, False)
        requests.append(IpsecItfDelete(index))  # VPP then detaches the ACL
    if blocking := list(_protect_gre_ipip(actual, BLOCK_PROTECTION)):
        return Plan([*requests, *blocking], False)
    requests += map(SadEntryDel, actual.sas)
    if actual.acl is not None and not actual.acl_applied:
        requests.append(AclDel(actual.acl))
    return Plan(requests, not actual.acl_applied)


def _find_actual(spec: SaSpec, actual: ActualTunnel) -> int | None:
    """Return the actual SA equal to `spec`, else the one that a change of UDP ports makes equal, keeping its sequence
    numbers.

    Of two equal SAs it returns the one that protects.
    """
    found = before_move = None
    for sad_id, sa in actual.sas.items():
        if sa.spec is spec or (sa.spec.spi == spec.spi and sa.spec == spec):
            if found is None or sad_id in _named(actual.protection):
                found = sad_id
        elif sa.spec.spi == spec.spi and sa.spec.with_ports() == spec.with_ports():
            before_move = sad_id
    return before_move if found is None else found


def _protection(inbound: Sequence[int | None], outbound: Sequence[int | None]) -> Protection | None:
    """Return the best protection from SAs that VPP already has, oldest first; None where there is none."""
    inbound_ids = tuple(sad_id for sad_id in inbound if sad_id is not None)[-MAX_INBOUND_SAS:]
    outbound_ids = [sad_id for sad_id in outbound if sad_id is not None]
    return Protection(outbound_ids[-1], inbound_ids) if inbound_ids and outbound_ids else None


def _named(protection: Protection | None) -> tuple[int, ...]:
    return () if protection is None else (protection.outbound, *protection.inbound)
