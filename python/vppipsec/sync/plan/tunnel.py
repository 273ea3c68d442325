"""From desired and held to requests. Pure: no I/O; what it reads it does not change.

`tunnel_requests` says what can be sent *now*, in order and without waiting in between; after the answers it is asked again, until
it says that nothing is left. So the order lives here, and a refusal or a lost answer needs no special case. Why this order:

1. Routes come as early as there is an interface for them to lead into. Until then those that are exposed drop: the packets would
   leave in clear, or through another tunnel. An interface without protection drops.
2. SAs are added, and have been accepted, before a protection names them: an update that fails leaks references in VPP.
3. A protection lets go of an SA, and VPP has said so, before the SA is deleted: deleting a protecting SA only drops a reference.
4. Routes leave an interface before it is deleted: they would dangle.
5. An interface of others' that is to be protected is muted, not let go of, while it has no SAs: it would send in clear.
6. An interface that is to be filtered, or asked for packets of other policies, is, and VPP has said so, before it is
   protected: until then it receives nothing.
7. An interface that is to be in another FIB table receives nothing until it is there: what it decrypts would be forwarded by
   the wrong one.
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
    """Tell of any route that it has to be there."""
    return True


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send now. `complete` tells that VPP holds what is wanted once all of it is accepted."""

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
    """Return what to send now so that VPP holds `desired` and leads `routes` into it.

    Without a tunnel the routes drop; those that are not exposed do so by not being there. `routes` are those that this
    tunnel owns; another's claim to a destination is not its business. `refused` are SAs that VPP refused and that are not
    to be tried now. An interface that may not receive yet is not protected yet. `shares` are routes of which this tunnel
    has a share only, and where they shall lead now. `wants_host_interface` tells whether the interface shall have a host
    interface in the kernel. Raises NumbersExhausted when VPP has no room and nothing is left to do that needs none.
    """
    if desired is None:
        return _teardown(actual, actual_routes, set(filter(needs_explicit_drop, routes)), route_source, shares)
    wanted = (*desired.inbound, *desired.outbound)
    matches = [_find_actual(spec, actual) for spec in wanted]
    moves: list[SadEntryUpdate] = []
    missing: list[SaSpec] = []
    for spec, match in zip(wanted, matches, strict=True):
        if match is None:
            if not refused or spec not in refused:  # the hash of an SA is dear
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
        requests.append(
            TunnelUnprotect(index)
        )  # its SAs are gone from the kernel, and VPP refuses those that replace them
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
    """Have an interface of others' protected so, where there is one."""
    if actual.gre_ipip is not None and actual.protection != protection:
        yield TunnelProtect(actual.gre_ipip.sw_if_index, protection.outbound, protection.inbound)


def _with_shortage(requests: Sequence[Request], complete: bool, shortage: str) -> Plan:
    """Put a shortage of numbers off while there is something to do that needs none: it may end it. Raises NumbersExhausted."""
    if shortage and not requests:
        raise NumbersExhausted(shortage)
    return Plan(requests, complete and not shortage)


def _is_in_table(desired: DesiredTunnel, actual: ActualTunnel) -> bool:
    """Tell whether an interface is in its table. In that of IPv6 only while it passes any, and in the main one otherwise."""
    table, table6 = actual.tables
    return table == desired.table and (table6 == desired.table or not (table6 or desired.ip6 or actual.ip6))


def _set_tables(index: int, desired: DesiredTunnel, actual: ActualTunnel) -> Iterator[Request]:
    """Put an interface into its table: in one round it stops receiving, in the next passing IP, and then it goes there."""
    is_in_other_table = actual.tables[0] != desired.table or actual.ip6  # else it is a family that it does not pass yet
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
    """Have an interface tagged. Its tag tells of IPv6 once VPP has accepted that, since no dump does."""
    tag = desired.tag + IP6_TAG if actual.ip6 else desired.tag
    if actual.tag != tag:
        yield SetInterfaceTag(index, tag)


def _set_up(index: int, desired: DesiredTunnel, actual: ActualTunnel) -> Iterator[Request]:
    """Make an interface pass IP. In another table than the main one it has an address, since it cannot borrow any."""
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
    """Have the ACL with the rules that are wanted; one that is in use changes from one packet to the next."""
    if desired.inbound_rules is not None and actual.rules != desired.inbound_rules:
        yield AclAddReplace(NO_INDEX if actual.acl is None else actual.acl, desired.tag, desired.inbound_rules)


def _apply_acl(index: int, desired: DesiredTunnel, actual: ActualTunnel) -> Iterator[Request]:
    """Hold what an interface receives against its ACL, or let go of the ACL first and delete it in the next round."""
    if desired.inbound_rules is not None:
        yield from _set_acl_rules(desired, actual)
        if actual.acl is not None and not actual.acl_applied:
            yield SetInterfaceAcls(index, actual.acl)
    elif actual.acl_applied:
        yield SetInterfaceAcls(index, NO_INDEX)
    elif actual.acl is not None:
        yield AclDel(actual.acl)


def _set_host_interface(index: int, wants_host_interface: bool, actual: ActualTunnel) -> Iterator[Request]:
    """Give an interface its host interface, once it is up since that is not told to the kernel later, or take it away."""
    if actual.host is not None and not wants_host_interface:
        yield LcpPairAddDel(index, actual.host.name, False)
    elif wants_host_interface and actual.host is None and actual.up:
        yield LcpPairAddDel(index, f"ipsec{actual.instance}")


def _change_routes(
    index: int, routes: Set[Route], actual_routes: ActualRoutes, route_source: int, shares: Mapping[Route, Paths]
) -> Iterator[Request]:
    """Lead into an interface what shall go there, and nothing else."""
    for route in routes:
        if actual_routes.get(route) != index:
            yield RouteAddDel(index, route.prefix, route_source, True, route.table)
    for route in actual_routes.into(index):
        if route not in routes and route not in shares:
            yield RouteAddDel(NO_INDEX, route.prefix, route_source, False, route.table)


def _discard_routes(routes: Set[Route], actual_routes: ActualRoutes, route_source: int) -> Iterator[Request]:
    """Let what has no tunnel be dropped, not leave in clear."""
    for route in routes:
        if actual_routes.get(route) != NO_INDEX:
            yield RouteAddDel(NO_INDEX, route.prefix, route_source, True, route.table)


def _change_shared_routes(
    shares: Mapping[Route, Paths], actual_routes: ActualRoutes, route_source: int
) -> Iterator[Request]:
    """Lead what several tunnels share into those that are there."""
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
    """Take a tunnel down: first what leads into it and what holds its SAs, then the rest."""
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
        requests.append(IpsecItfDelete(index))  # and VPP takes the ACL off it
    if blocking := list(_protect_gre_ipip(actual, BLOCK_PROTECTION)):
        return Plan([*requests, *blocking], False)
    requests += map(SadEntryDel, actual.sas)
    if actual.acl is not None and not actual.acl_applied:
        requests.append(AclDel(actual.acl))
    return Plan(requests, not actual.acl_applied)


def _find_actual(spec: SaSpec, actual: ActualTunnel) -> int | None:
    """Find the held SA that is `spec`, else the one that becomes it, sequence numbers kept, by a change of its UDP ports.

    Of two that are alike, the one that protects counts.
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
    """Return the protection that is best now, with SAs that VPP already holds, oldest first; None where there is no such."""
    inbound_ids = tuple(sad_id for sad_id in inbound if sad_id is not None)[-MAX_INBOUND_SAS:]
    outbound_ids = [sad_id for sad_id in outbound if sad_id is not None]
    return Protection(outbound_ids[-1], inbound_ids) if inbound_ids and outbound_ids else None


def _named(protection: Protection | None) -> tuple[int, ...]:
    return () if protection is None else (protection.outbound, *protection.inbound)
