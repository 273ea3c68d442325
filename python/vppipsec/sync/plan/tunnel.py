"""From desired and held to requests. Pure: no I/O; what it reads it does not change.

`next_requests` says what can be sent *now*, in order and without waiting in between; after the answers it is asked again, until
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

from vppipsec.sync.desired.state import Tunnel
from vppipsec.vpp.api.acl import DelAcl, FilterItf, PutAcl
from vppipsec.vpp.api.interface import SetItfAddress, SetItfTable, SetItfUp, SetMtu, SetUnnumbered, TagItf
from vppipsec.vpp.api.ip import ChangeRoute, DisableIp6, EnableIp6
from vppipsec.vpp.api.ipsec import AddSa, CreateItf, DeleteItf, DelSa, Protect, SetSaPorts, Unprotect
from vppipsec.vpp.api.linux_cp import PairItf
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.gre_ipip import MUTED
from vppipsec.vpp.ownership import IP6_TAG, own_address
from vppipsec.vpp.state.numbers import Numbers, NumbersExhausted
from vppipsec.vpp.state.routes import HeldRoutes
from vppipsec.vpp.state.tunnels import HeldTunnel
from vppipsec.vpp.types import MAX_INBOUND_SAS, NO_INDEX, Lead, Protection, Route, SaSpec

_NOTHING: Mapping[Route, Lead] = MappingProxyType({})


def always(route: Route) -> bool:
    """Tell of any route that it has to be there."""
    return True


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send now. `complete` tells that VPP holds what is wanted once all of it is accepted."""

    requests: Sequence[Request]
    complete: bool


def next_requests(
    want: Tunnel | None,
    routes: Set[Route],
    held: HeldTunnel,
    held_routes: HeldRoutes,
    route_source: int,
    numbers: Numbers,
    refused: Set[SaSpec] = frozenset(),
    is_exposed: Callable[[Route], bool] = always,
    may_receive: bool = True,
    shares: Mapping[Route, Lead] = _NOTHING,
    is_paired: bool = False,
) -> Plan:
    """Return what to send now so that VPP holds `want` and leads `routes` into it.

    Without a tunnel the routes drop; those that are not exposed do so by not being there. `routes` are those that this tunnel
    owns; another's claim to a destination is not its business. `refused` are SAs that VPP refused and that are not to be tried
    now. An interface that may not receive yet is not protected yet. `shares` are routes of which this tunnel has a share only,
    and where they shall lead now. `is_paired` tells whether the interface shall have a host interface in the kernel. Raises
    NumbersExhausted when VPP has no room and nothing is left to do that needs none.
    """
    if want is None:
        return _teardown(held, held_routes, set(filter(is_exposed, routes)), route_source, shares)
    wanted = (*want.inbound, *want.outbound)
    matches = [_find(spec, held) for spec in wanted]
    moves: list[SetSaPorts] = []
    lacking: list[SaSpec] = []
    for spec, match in zip(wanted, matches, strict=True):
        if match is None:
            if not refused or spec not in refused:  # the hash of an SA is dear
                lacking.append(spec)
        elif held.sas[match].spec != spec:
            moves.append(SetSaPorts(match, spec.udp_src_port, spec.udp_dst_port))
    index = held.sw_if_index
    lacks_itf = index is None and want.overlay is None
    shortage = numbers.shortage(len(lacking), int(lacks_itf)) if lacking or lacks_itf else ""
    new = [] if shortage else [AddSa(numbers.sad_id(), spec) for spec in lacking]
    protection = _protection(matches[: len(want.inbound)], matches[len(want.inbound) :])
    unwanted = [sad_id for sad_id in held.sas if sad_id not in matches]
    named = _named(held.protection)
    free = [sad_id for sad_id in unwanted if sad_id not in named]
    requests: list[Request] = []
    if want.overlay is not None:
        requests += [*moves, *new]
        if held.overlay == want.overlay and not (protection is None and new):
            requests += _protect_overlay(held, protection or MUTED)
        requests += map(DelSa, free)
        return _plan(requests, not new and len(free) == len(unwanted), shortage)
    if index is None:
        if not shortage:
            requests += [CreateItf(numbers.instance()), *_put_acl(want, held)]
        exposed = set(filter(is_exposed, routes))
        requests += _drop_routes(exposed, held_routes, route_source)
        requests += [*_share_routes(shares, held_routes, route_source), *moves, *new]
        return _plan(requests, False, shortage)
    is_placed = _is_placed(want, held)
    requests += _set_up(index, want, held) if is_placed else _place(index, want, held)
    requests += _share_routes(shares, held_routes, route_source)
    requests += _lead_routes(index, routes, held_routes, route_source, shares)
    requests += [*_filter(index, want, held), *_pair(index, is_paired and is_placed, held), *moves, *new]
    changes = is_placed and protection != held.protection
    is_filtered = want.admitted is None or held.filtered
    if changes and protection is not None and ((is_filtered and may_receive) or held.protection is not None):
        requests.append(Protect(index, protection.outbound, protection.inbound))
    elif changes and protection is None and not new:
        requests.append(Unprotect(index))  # its SAs are gone from the kernel, and VPP refuses those that replace them
    requests += map(DelSa, free)
    tag_is_final = held.ip6 or not want.ip6
    pair_is_final = (held.host is not None) == is_paired
    filter_is_final = is_filtered and may_receive and (want.admitted is not None or held.acl is None)
    return _plan(
        requests,
        is_placed and not new and len(free) == len(unwanted) and tag_is_final and filter_is_final and pair_is_final,
        shortage,
    )


def _protect_overlay(held: HeldTunnel, protection: Protection) -> Iterator[Request]:
    """Have an interface of others' protected so, where there is one."""
    if held.overlay is not None and held.protection != protection:
        yield Protect(held.overlay.sw_if_index, protection.outbound, protection.inbound)


def _plan(requests: Sequence[Request], complete: bool, shortage: str) -> Plan:
    """Put a shortage of numbers off while there is something to do that needs none: it may end it. Raises NumbersExhausted."""
    if shortage and not requests:
        raise NumbersExhausted(shortage)
    return Plan(requests, complete and not shortage)


def _is_placed(want: Tunnel, held: HeldTunnel) -> bool:
    """Tell whether an interface is in its table. In that of IPv6 only while it passes any, and in the main one otherwise."""
    table, table6 = held.tables
    return table == want.table and (table6 == want.table or not (table6 or want.ip6 or held.ip6))


def _place(index: int, want: Tunnel, held: HeldTunnel) -> Iterator[Request]:
    """Put an interface into its table: in one round it stops receiving, in the next passing IP, and then it goes there."""
    is_open = held.tables[0] != want.table or held.ip6  # else it is a family that it does not pass yet
    if is_open and held.protection is not None:
        yield Unprotect(index)
    elif is_open and (held.lender is not None or held.addressed or held.ip6):
        if held.lender is not None:
            yield SetUnnumbered(index, held.lender, False)
        if held.addressed:
            yield SetItfAddress(index, own_address(held.instance), False)
        if held.ip6:
            yield DisableIp6(index) if held.tag == want.tag else TagItf(index, want.tag)
    else:
        yield from _tag(index, want, held)
        for ip6, table in ((False, want.table), (True, want.table if want.ip6 else 0)):
            if held.tables[ip6] != table:
                yield SetItfTable(index, ip6, table)


def _tag(index: int, want: Tunnel, held: HeldTunnel) -> Iterator[Request]:
    """Have an interface tagged. Its tag tells of IPv6 once VPP has accepted that, since no dump does."""
    tag = want.tag + IP6_TAG if held.ip6 else want.tag
    if held.tag != tag:
        yield TagItf(index, tag)


def _set_up(index: int, want: Tunnel, held: HeldTunnel) -> Iterator[Request]:
    """Make an interface pass IP. In another table than the main one it has an address, since it cannot borrow any."""
    if want.ip6 and not held.ip6:
        yield EnableIp6(index)
    yield from _tag(index, want, held)
    if want.table:
        if not held.addressed:
            yield SetItfAddress(index, own_address(held.instance))
    elif held.lender != want.lender:
        if held.lender is not None:
            yield SetUnnumbered(index, held.lender, False)
        yield SetUnnumbered(index, want.lender)
    if want.mtu and held.mtu != want.mtu:
        yield SetMtu(index, want.mtu)
    if not held.up:
        yield SetItfUp(index)


def _put_acl(want: Tunnel, held: HeldTunnel) -> Iterator[Request]:
    """Have the ACL with the rules that are wanted; one that is in use changes from one packet to the next."""
    if want.admitted is not None and held.rules != want.admitted:
        yield PutAcl(NO_INDEX if held.acl is None else held.acl, want.tag, want.admitted)


def _filter(index: int, want: Tunnel, held: HeldTunnel) -> Iterator[Request]:
    """Hold what an interface receives against its ACL, or let go of the ACL first and delete it in the next round."""
    if want.admitted is not None:
        yield from _put_acl(want, held)
        if held.acl is not None and not held.filtered:
            yield FilterItf(index, held.acl)
    elif held.filtered:
        yield FilterItf(index, NO_INDEX)
    elif held.acl is not None:
        yield DelAcl(held.acl)


def _pair(index: int, is_paired: bool, held: HeldTunnel) -> Iterator[Request]:
    """Give an interface its host interface, once it is up since that is not told to the kernel later, or take it away."""
    if held.host is not None and not is_paired:
        yield PairItf(index, held.host.name, False)
    elif is_paired and held.host is None and held.up:
        yield PairItf(index, f"ipsec{held.instance}")


def _lead_routes(
    index: int, routes: Set[Route], held_routes: HeldRoutes, route_source: int, shares: Mapping[Route, Lead]
) -> Iterator[Request]:
    """Lead into an interface what shall go there, and nothing else."""
    for route in routes:
        if held_routes.get(route) != index:
            yield ChangeRoute(index, route.prefix, route_source, True, route.table)
    for route in held_routes.into(index):
        if route not in routes and route not in shares:
            yield ChangeRoute(NO_INDEX, route.prefix, route_source, False, route.table)


def _drop_routes(routes: Set[Route], held_routes: HeldRoutes, route_source: int) -> Iterator[Request]:
    """Let what has no tunnel be dropped, not leave in clear."""
    for route in routes:
        if held_routes.get(route) != NO_INDEX:
            yield ChangeRoute(NO_INDEX, route.prefix, route_source, True, route.table)


def _share_routes(shares: Mapping[Route, Lead], held_routes: HeldRoutes, route_source: int) -> Iterator[Request]:
    """Lead what several tunnels share into those that are there."""
    for route, lead in shares.items():
        if held_routes.get(route) != lead:
            yield ChangeRoute(lead, route.prefix, route_source, True, route.table)


def _teardown(
    held: HeldTunnel, held_routes: HeldRoutes, routes: Set[Route], route_source: int, shares: Mapping[Route, Lead]
) -> Plan:
    """Take a tunnel down: first what leads into it and what holds its SAs, then the rest."""
    requests = [
        *_drop_routes(routes, held_routes, route_source),
        *_share_routes(shares, held_routes, route_source),
    ]
    index = held.sw_if_index
    if index is not None:
        leading = held_routes.into(index)
        for route in leading:
            if route not in routes and route not in shares:
                requests.append(ChangeRoute(NO_INDEX, route.prefix, route_source, False, route.table))
        if held.protection is not None:
            requests.append(Unprotect(index))
        if leading or held.protection is not None:
            return Plan(requests, False)
        requests.append(DeleteItf(index))  # and VPP takes the ACL off it
    if muting := list(_protect_overlay(held, MUTED)):
        return Plan([*requests, *muting], False)
    requests += map(DelSa, held.sas)
    if held.acl is not None and not held.filtered:
        requests.append(DelAcl(held.acl))
    return Plan(requests, not held.filtered)


def _find(spec: SaSpec, held: HeldTunnel) -> int | None:
    """Find the held SA that is `spec`, else the one that becomes it, sequence numbers kept, by a change of its UDP ports.

    Of two that are alike, the one that protects counts.
    """
    found = before_move = None
    for sad_id, sa in held.sas.items():
        if sa.spec is spec or (sa.spec.spi == spec.spi and sa.spec == spec):
            if found is None or sad_id in _named(held.protection):
                found = sad_id
        elif sa.spec.spi == spec.spi and sa.spec.moved() == spec.moved():
            before_move = sad_id
    return before_move if found is None else found


def _protection(inbound: Sequence[int | None], outbound: Sequence[int | None]) -> Protection | None:
    """Return the protection that is best now, with SAs that VPP already holds, oldest first; None where there is no such."""
    ways_in = tuple(sad_id for sad_id in inbound if sad_id is not None)[-MAX_INBOUND_SAS:]
    ways_out = [sad_id for sad_id in outbound if sad_id is not None]
    return Protection(ways_out[-1], ways_in) if ways_in and ways_out else None


def _named(protection: Protection | None) -> tuple[int, ...]:
    return () if protection is None else (protection.outbound, *protection.inbound)
