"""From desired and held to requests. Pure: no I/O; what it reads it does not change.

`next_requests` says what can be sent *now*, in order and without waiting in between; after the answers it is asked again, until
it says that nothing is left. So the order lives here, and a refusal or a lost answer needs no special case. Why this order:

1. Routes come as early as there is an interface for them to lead into: until then the packets that a policy covers would
   leave in clear. An interface without protection drops.
2. SAs are added, and have been accepted, before a protection names them: an update that fails leaks references in VPP.
3. A protection lets go of an SA, and VPP has said so, before the SA is deleted: deleting a protecting SA only drops a reference.
4. Routes leave an interface before it is deleted: they would dangle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from vppipsec.sync.desired import Tunnel
from vppipsec.sync.held import IP6_TAG, HeldRoutes, HeldTunnel, Numbers
from vppipsec.vpp.objects import MAX_INBOUND_SAS, NO_INDEX, Prefix, Protection, SaSpec
from vppipsec.vpp.requests import (
    AddSa,
    ChangeRoute,
    CreateItf,
    DeleteItf,
    DelSa,
    EnableIp6,
    Protect,
    Request,
    SetItfUp,
    SetSaPorts,
    SetUnnumbered,
    TagItf,
    Unprotect,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send now. `complete` tells that VPP holds what is wanted once all of it is accepted."""

    requests: Sequence[Request]
    complete: bool


def next_requests(
    want: Tunnel | None,
    routes: Set[Prefix],
    held: HeldTunnel,
    held_routes: HeldRoutes,
    route_source: int,
    numbers: Numbers,
    refused: Set[SaSpec] = frozenset(),
) -> Plan:
    """Return what to send now so that VPP holds `want` and leads `routes` into it.

    Without a tunnel the routes drop. `routes` are those that this tunnel owns; another's claim to a prefix is not its business.
    `refused` are SAs that VPP refused and that are not to be tried now. Raises NumbersExhausted when VPP has no room.
    """
    if want is None:
        return _teardown(held, held_routes, routes, route_source)
    wanted = (*want.inbound, *want.outbound)
    matches = [_find(spec, held) for spec in wanted]
    missing = list(_missing_sas(wanted, matches, held, numbers, refused))
    index = held.sw_if_index
    if index is None:
        dropping = _drop_routes(routes, held_routes, route_source)
        return Plan([CreateItf(numbers.instance()), *dropping, *missing], False)
    requests: list[Request] = []
    if want.ip6 and not held.ip6:
        requests.append(EnableIp6(index))
    tag = want.tag + IP6_TAG if want.ip6 or held.ip6 else want.tag
    if held.tag != tag:
        requests.append(TagItf(index, tag))  # after what it tells
    if held.lender != want.lender:
        if held.lender is not None:
            requests.append(SetUnnumbered(index, held.lender, False))
        requests.append(SetUnnumbered(index, want.lender))
    if not held.up:
        requests.append(SetItfUp(index))
    for prefix in routes:
        if held_routes.get(prefix) != index:
            requests.append(ChangeRoute(index, prefix, route_source, True))
    for prefix in held_routes.into(index):
        if prefix not in routes:
            requests.append(ChangeRoute(NO_INDEX, prefix, route_source, False))
    requests += missing
    protection = _protection(matches[: len(want.inbound)], matches[len(want.inbound) :])
    changes = protection != held.protection
    if changes and protection is not None:
        requests.append(Protect(index, protection.outbound, protection.inbound))
    elif changes and not missing:
        requests.append(Unprotect(index))  # its SAs are gone from the kernel, and VPP refuses those that replace them
    unwanted = [sad_id for sad_id in held.sas if sad_id not in matches and not (missing and _moves(sad_id, missing))]
    named = _named(held.protection)
    free = [sad_id for sad_id in unwanted if sad_id not in named]
    requests += map(DelSa, free)
    return Plan(requests, not missing and len(free) == len(unwanted))


def _drop_routes(routes: Set[Prefix], held_routes: HeldRoutes, route_source: int) -> Iterator[Request]:
    """Let what has no tunnel be dropped, not leave in clear."""
    for prefix in routes:
        if held_routes.get(prefix) != NO_INDEX:
            yield ChangeRoute(NO_INDEX, prefix, route_source, True)


def _teardown(held: HeldTunnel, held_routes: HeldRoutes, routes: Set[Prefix], route_source: int) -> Plan:
    """Take a tunnel down: first what leads into it and what holds its SAs, then the rest."""
    requests = list(_drop_routes(routes, held_routes, route_source))
    index = held.sw_if_index
    if index is not None:
        leading = held_routes.into(index)
        for prefix in leading:
            if prefix not in routes:
                requests.append(ChangeRoute(NO_INDEX, prefix, route_source, False))
        if held.protection is not None:
            requests.append(Unprotect(index))
        if leading or held.protection is not None:
            return Plan(requests, False)
        requests.append(DeleteItf(index))
    requests += map(DelSa, held.sas)
    return Plan(requests, True)


def _find(spec: SaSpec, held: HeldTunnel) -> int | None:
    """Find the held SA that is `spec`. Of two that are alike, the one that protects counts."""
    found = None
    for sad_id, sa in held.sas.items():
        if (sa.spec is spec or (sa.spec.spi == spec.spi and sa.spec == spec)) and (
            found is None or sad_id in _named(held.protection)
        ):
            found = sad_id
    return found


def _missing_sas(
    wanted: Sequence[SaSpec], matches: Sequence[int | None], held: HeldTunnel, numbers: Numbers, refused: Set[SaSpec]
) -> Iterator[Request]:
    """Add SAs that VPP lacks; where one differs in its UDP ports alone, change those and keep its sequence numbers."""
    for spec, match in zip(wanted, matches, strict=True):
        if match is not None or (refused and spec in refused):
            continue
        moved = next((sad_id for sad_id, sa in held.sas.items() if _only_ports_differ(sa.spec, spec)), None)
        if moved is not None:
            yield SetSaPorts(moved, spec.udp_src_port, spec.udp_dst_port)
        else:
            yield AddSa(numbers.sad_id(), spec)


def _only_ports_differ(a: SaSpec, b: SaSpec) -> bool:
    return a.spi == b.spi and a != b and a == b._replace(udp_src_port=a.udp_src_port, udp_dst_port=a.udp_dst_port)


def _moves(sad_id: int, missing: Sequence[Request]) -> bool:
    """Tell whether a held SA is to become a wanted one by a change of its ports."""
    return any(isinstance(request, SetSaPorts) and request.sad_id == sad_id for request in missing)


def _protection(inbound: Sequence[int | None], outbound: Sequence[int | None]) -> Protection | None:
    """Return the protection that is best now, with SAs that VPP already holds, oldest first; None where there is no such."""
    ways_in = tuple(sad_id for sad_id in inbound if sad_id is not None)[-MAX_INBOUND_SAS:]
    ways_out = [sad_id for sad_id in outbound if sad_id is not None]
    return Protection(ways_out[-1], ways_in) if ways_in and ways_out else None


def _named(protection: Protection | None) -> tuple[int, ...]:
    return () if protection is None else (protection.outbound, *protection.inbound)
