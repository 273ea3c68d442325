"""From desired and held to requests. Pure: no I/O; what it reads it does not change.

`next_requests` says what can be sent *now*, in order and without waiting in between; after the answers it is asked again, until
there is nothing left. So the order lives here, and a refusal or a lost answer needs no special case. Why this order:

1. Routes come as early as there is an interface for them to lead into: until then the packets that a policy covers would
   leave in clear. An interface without protection drops.
2. SAs are added, and have been accepted, before a protection names them: an update that fails leaks references in VPP.
3. A protection lets go of an SA, and VPP has said so, before the SA is deleted: deleting a protecting SA only drops a reference.
4. Routes leave an interface before it is deleted: they would dangle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import replace

from vppipsec.sync.desired import Tunnel
from vppipsec.sync.held import HeldRoutes, HeldTunnel, Numbers
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


def next_requests(
    want: Tunnel | None,
    routes: Set[Prefix],
    held: HeldTunnel,
    held_routes: HeldRoutes,
    route_source: int,
    numbers: Numbers,
    refused: Set[SaSpec] = frozenset(),
) -> list[Request]:
    """Return what to send now so that VPP holds `want` and leads `routes` into it; an empty list when it is so.

    Without a tunnel the routes drop. `routes` are those that this tunnel owns; another's claim to a prefix is not its business.
    `refused` are SAs that VPP refused and that are not to be tried now. Raises NumbersExhausted when VPP has no room.
    """
    if want is None:
        return [*_drop_routes(routes, held_routes, route_source), *_teardown(held, held_routes, routes, route_source)]
    requests: list[Request] = []
    if held.sw_if_index is None:
        requests.append(CreateItf(numbers.instance()))
        requests += _drop_routes(routes, held_routes, route_source)
        requests += _missing_sas(want, held, numbers, refused)
        return requests
    index = held.sw_if_index
    if held.tag != want.tag:
        requests.append(TagItf(index, want.tag))
    if held.lender != want.lender:
        if held.lender is not None:
            requests.append(SetUnnumbered(index, held.lender, False))
        requests.append(SetUnnumbered(index, want.lender))
    if want.ip6 and not held.ip6:
        requests.append(EnableIp6(index))
    if not held.up:
        requests.append(SetItfUp(index))
    requests += [
        ChangeRoute(index, prefix, route_source, True) for prefix in routes if held_routes.get(prefix) != index
    ]
    requests += [
        ChangeRoute(NO_INDEX, prefix, route_source, False) for prefix in held_routes.into(index) if prefix not in routes
    ]
    missing = list(_missing_sas(want, held, numbers, refused))
    requests += missing
    by_spec = _by_spec(held)
    protection = _protection(want, by_spec)
    if protection is not None and protection != held.protection:
        requests.append(Protect(index, protection.outbound, protection.inbound))
    elif protection is None and held.protection is not None and not missing:
        requests.append(Unprotect(index))  # its SAs are gone from the kernel, and VPP refuses those that replace them
    requests += _surplus_sas(want, held, by_spec, protection)
    return requests


def _drop_routes(routes: Set[Prefix], held_routes: HeldRoutes, route_source: int) -> Iterator[Request]:
    """Let what has no tunnel be dropped, not leave in clear."""
    for prefix in routes:
        if held_routes.get(prefix) != NO_INDEX:
            yield ChangeRoute(NO_INDEX, prefix, route_source, True)


def _teardown(held: HeldTunnel, held_routes: HeldRoutes, routes: Set[Prefix], route_source: int) -> Iterator[Request]:
    """Take a tunnel down: first what leads into it and what holds its SAs, then the rest."""
    index = held.sw_if_index
    if index is not None:
        leading = held_routes.into(index)
        for prefix in leading:
            if prefix not in routes:
                yield ChangeRoute(NO_INDEX, prefix, route_source, False)
        if held.protection is not None:
            yield Unprotect(index)
        if leading or held.protection is not None:
            return
        yield DeleteItf(index)
    for sad_id in held.sas:
        yield DelSa(sad_id)


def _missing_sas(want: Tunnel, held: HeldTunnel, numbers: Numbers, refused: Set[SaSpec]) -> Iterator[Request]:
    """Add SAs that VPP lacks; where one differs in its UDP ports alone, change those and keep its sequence numbers."""
    specs = {sa.spec for sa in held.sas.values()}
    for spec in (*want.inbound, *want.outbound):
        if spec in specs or spec in refused:
            continue
        moved = next((sad_id for sad_id, sa in held.sas.items() if _only_ports_differ(sa.spec, spec)), None)
        if moved is not None:
            yield SetSaPorts(moved, spec.udp_src_port, spec.udp_dst_port)
        else:
            yield AddSa(numbers.sad_id(), spec)


def _only_ports_differ(a: SaSpec, b: SaSpec) -> bool:
    return a.spi == b.spi and a != b and a == replace(b, udp_src_port=a.udp_src_port, udp_dst_port=a.udp_dst_port)


def _by_spec(held: HeldTunnel) -> dict[SaSpec, int]:
    """Find held SAs by what they are. Of two that are alike, the one that protects counts."""
    by_spec: dict[SaSpec, int] = {}
    in_use = _named(held.protection)
    for sad_id, sa in held.sas.items():
        if sa.spec not in by_spec or sad_id in in_use:
            by_spec[sa.spec] = sad_id
    return by_spec


def _protection(want: Tunnel, by_spec: Mapping[SaSpec, int]) -> Protection | None:
    """Return the protection that is best now, with SAs that VPP already holds; None where there is no such."""
    outbound = [by_spec[spec] for spec in want.outbound if spec in by_spec]
    inbound = [by_spec[spec] for spec in want.inbound if spec in by_spec]
    if not outbound or not inbound:
        return None
    return Protection(outbound[-1], tuple(inbound[-MAX_INBOUND_SAS:]))


def _surplus_sas(
    want: Tunnel, held: HeldTunnel, by_spec: Mapping[SaSpec, int], protection: Protection | None
) -> Iterator[Request]:
    """Delete SAs that are no longer wanted and that no protection names, neither the present nor the coming one."""
    wanted = (*want.inbound, *want.outbound)
    kept = {by_spec[spec] for spec in wanted if spec in by_spec} | {*_named(held.protection), *_named(protection)}
    for sad_id, sa in held.sas.items():
        if sad_id not in kept and not any(_only_ports_differ(sa.spec, spec) for spec in wanted):
            yield DelSa(sad_id)


def _named(protection: Protection | None) -> tuple[int, ...]:
    return () if protection is None else (protection.outbound, *protection.inbound)
