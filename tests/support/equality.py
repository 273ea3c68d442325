"""Holds what VPP has against what the kernel's tables mean: read from VPP afresh, without the engine's own books."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from vppipsec.kernel.route.model import KernelRoutes
from vppipsec.kernel.text import format_addr
from vppipsec.kernel.xfrm.sad_spd import GroupKey, KernelModel
from vppipsec.kernel.xfrm.values import Policy, Sa
from vppipsec.sync.actual.classifiers import if_id_of
from vppipsec.sync.desired.environment import Environment
from vppipsec.sync.desired.gre_ipip import Claims, claims_on, not_in_clear
from vppipsec.sync.desired.host_interfaces import choose, local_addresses, senders
from vppipsec.sync.desired.kernel_fallback import Fallback, fallbacks, inbound_of
from vppipsec.sync.desired.outbound_policy import of_vti, outbound
from vppipsec.sync.desired.policy_layers import (
    Beside,
    FamilySteering,
    Fixed,
    Handover,
    Junction,
    Target,
    steer,
    steer_routed,
)
from vppipsec.sync.desired.routes import Aim, Split
from vppipsec.sync.desired.state import Desired
from vppipsec.sync.desired.tunnel import remote_of, translate
from vppipsec.sync.desired.vti_routes import MAIN, selectors_of, vti_leads
from vppipsec.sync.ike.acquire import awaits_sa
from vppipsec.vpp.api.client import VppClient, connect
from vppipsec.vpp.api.ip import NOT_REACHED, VIA_RECURSION, LookupRoute
from vppipsec.vpp.gre_ipip import MUTED, Overlay
from vppipsec.vpp.inventory import (
    Interfaces,
    Inventory,
    Neighbor,
    offered_ciphers,
    read_addresses,
    read_interfaces,
    read_inventory,
    read_mtu,
    read_overlays,
    read_tables_of,
)
from vppipsec.vpp.ownership import INSTANCES, IP6_TAG, JUNCTION_TABLE, NUMBERS, SAD_ID_FIRST, SAD_ID_LAST, TAG_PREFIX
from vppipsec.vpp.state.policy_layers import Stack, adopt
from vppipsec.vpp.types import FOR_US, NO_INDEX, RECEIVED, Lead, Prefix, Route, Rule

Leads = Mapping[int, Mapping[Prefix, Aim]]
NOTHING: Leads = MappingProxyType({})


async def differences(
    api_socket: str,
    sas: Sequence[Sa],
    policies: Sequence[Policy],
    unsupported: str = "kernel",
    routes: KernelRoutes | None = None,
) -> list[str]:
    """Return in sentences how VPP differs from what a dump of the kernel (newest first) means; nothing where it is equal.

    `unsupported` as the setting; `routes` are the kernel's over VTIs.
    """
    client = await connect(api_socket, "equality")
    try:
        model = KernelModel()
        model.replace(sas, policies)
        claims = claims_on(await read_overlays(client, SAD_ID_FIRST, SAD_ID_LAST), outbound(model.policies()))
        env = replace(await _environment(client, model), overlays=claims.of_groups)
        found = await read_inventory(
            client, lambda tag: tag.startswith(TAG_PREFIX), SAD_ID_FIRST, SAD_ID_LAST, INSTANCES, NUMBERS
        )
        interfaces = await read_interfaces(client)
        over_vtis: Leads = {}
        if routes is not None:
            vtis = [vti for if_id in routes.if_ids() if (vti := routes.link(if_id)) is not None]
            env = replace(
                env, vtis={vti.if_id: 0 if vti.table == MAIN else vti.table for vti in vtis}, tables=found.other_tables
            )
            selectors = selectors_of([each.policy for each in outbound(model.policies())])
            leads = vti_leads(routes.ways(), selectors, found.other_tables, vtis)
            over_vtis, env = leads.routes, replace(env, told_apart=frozenset(leads.junctions))
        desired = {key: translate(key, group, env) for key, group in model.groups.items()}
        known = await _known(client, env)
        hosts = hosts_of(model, routes, known, env.tables) if routes is not None and interfaces.taps else NO_HOSTS
        complaints = compare_overlays(desired, claims, found)
        return complaints + compare(
            desired, model, env, found, interfaces, unsupported, over_vtis, hosts, claims.guarded
        )
    finally:
        await client.close()


class Hosts(NamedTuple):
    """Whose tunnels shall have host interfaces, and which addresses VPP shall know for the router's because of them."""

    paired: frozenset[GroupKey] = frozenset()
    local: frozenset[Route] = frozenset()


MAIN_TABLES = frozenset({(0, False), (0, True)})


def hosts_of(
    model: KernelModel, routes: KernelRoutes, known: Set[Route], tables: Set[tuple[int, bool]] = MAIN_TABLES
) -> Hosts:
    """Return what they should be; `known` are the addresses of VPP's interfaces, `tables` are VPP's, by number and family."""
    policies, by_table = outbound(model.policies()), routes.own()
    paired = choose(senders(policies, by_table.get(0, ()), routes.link), ())
    own = {host_route(address, table) for table, addresses in by_table.items() for address in addresses}
    there = {route for route in own if (route.table, len(route.prefix.address) == 16) in tables}
    return Hosts(paired, local_addresses(policies, paired, there - known, routes.link))


async def _known(client: VppClient, env: Environment) -> set[Route]:
    """Return the addresses of VPP's interfaces, each in its table. Where there is but one, nobody is asked."""
    holders = {(index, len(address) == 16) for address, index in env.addresses.items()}
    tables = await read_tables_of(client, holders) if any(number for number, _ in env.tables) else {}
    return {host_route(it, tables.get((index, len(it) == 16), 0)) for it, index in env.addresses.items()}


def host_route(address: bytes, table: int = 0) -> Route:
    return Route(Prefix(address, 8 * len(address)), table)


NO_HOSTS = Hosts()


async def _environment(client: VppClient, model: KernelModel) -> Environment:
    addresses = await read_addresses(client, (await read_interfaces(client)).up)
    remotes = {remote_of(key, group, addresses) for key, group in model.groups.items()} - {None}
    asked = [remote for remote in remotes if remote is not None]
    replies = await client.run([LookupRoute(remote) for remote in asked])
    links = {
        remote: await read_mtu(client, reply.extra, len(remote) == 16)
        for remote, reply in zip(asked, replies, strict=True)
        if not reply.retval and reply.extra not in (NOT_REACHED, VIA_RECURSION)
    }
    lost = {remote for remote, reply in zip(asked, replies, strict=True) if reply.retval or reply.extra == NOT_REACHED}
    return Environment(addresses, frozenset(lost), offered_ciphers(client), link_mtus=links)


def compare(
    desired: dict[GroupKey, Desired],
    model: KernelModel,
    env: Environment,
    found: Inventory,
    interfaces_there: Interfaces,
    unsupported: str = "kernel",
    over_vtis: Leads = NOTHING,
    hosts: Hosts = NO_HOSTS,
    guarded: Iterable[Overlay] = (),
) -> list[str]:
    """Return in sentences how what was found in VPP differs from what is desired; nothing where it does not.

    `over_vtis` are the routes that VPP shall have for those over VTIs.
    """
    complaints = []
    acls: dict[int | None, tuple[Rule, ...]] = {acl.acl_index: acl.rules for acl in found.acls}
    used = {itf.acl for itf in found.interfaces} | {policy.acl_index for policy in found.policies}
    complaints += [f"ACL {index} is too many" for index in acls if index not in used]
    every = [want.tunnel for want in desired.values() if want.tunnel is not None]
    tunnels = {want.tag: want for want in every if want.overlay is None}
    held = {sa.sad_id: sa.spec for sa in found.sas}
    of_overlays = {spec for want in every if want.overlay is not None for spec in (*want.inbound, *want.outbound)}
    unexplained = {sad_id for sad_id, spec in held.items() if spec not in of_overlays}
    interfaces = {itf.tag.removesuffix(IP6_TAG): itf for itf in found.interfaces}
    if len(interfaces) != len(found.interfaces):
        complaints.append("two interfaces have the same tag")
    interfaces = {tag: itf for tag, itf in interfaces.items() if if_id_of(tag) not in env.told_apart}
    of_junctions = {if_id_of(itf.tag): itf for itf in found.interfaces}
    for if_id in env.told_apart:
        itf = of_junctions.get(if_id)
        if itf is None or not itf.up or itf.protection is not None:
            complaints.append(f"the junction of if_id {if_id} is {itf}")
    complaints += [
        f"interface ipsec{interfaces[tag].instance} is too many" for tag in interfaces.keys() - tunnels.keys()
    ]
    paired = {want.tunnel.tag for key, want in desired.items() if want.tunnel is not None and key in hosts.paired}
    for tag, want in tunnels.items():
        itf = interfaces.get(tag)
        if itf is None or itf.protection is None:
            complaints.append(f"'{tag}' has no {'interface' if itf is None else 'protection'}")
            continue
        if want.ip6 and not itf.tag.endswith(IP6_TAG):
            complaints.append(f"ipsec{itf.instance} does not pass IPv6")
        lender = None if want.table else want.lender
        if not itf.up or itf.lender != lender:
            complaints.append(f"ipsec{itf.instance} is up: {itf.up}, borrows from {itf.lender}, not {lender}")
        tables = {itf.tables[0], itf.tables[1] if itf.tag.endswith(IP6_TAG) else want.table}
        if tables != {want.table} or itf.addressed != bool(want.table):
            complaints.append(f"ipsec{itf.instance} is in tables {itf.tables}, not {want.table}")
        if (itf.host is not None) != (tag in paired):
            complaints.append(f"ipsec{itf.instance} has the host interface {itf.host}")
        if want.mtu and itf.mtu != want.mtu:
            complaints.append(f"ipsec{itf.instance} takes packets of {itf.mtu} bytes, not {want.mtu}")
        if acls.get(itf.acl) != want.admitted:
            complaints.append(f"ipsec{itf.instance} holds its packets against {acls.get(itf.acl)}, not {want.admitted}")
        inbound = [held.get(sad_id) for sad_id in itf.protection.inbound]
        if set(inbound) != set(want.inbound) or len(inbound) != len(want.inbound):
            complaints.append(f"ipsec{itf.instance} has inbound {inbound}, not {want.inbound}")
        if held.get(itf.protection.outbound) != want.outbound[-1]:
            complaints.append(
                f"ipsec{itf.instance} has outbound {held.get(itf.protection.outbound)}, not {want.outbound[-1]}"
            )
        for spec in want.outbound:
            if spec not in held.values():
                complaints.append(f"outbound SA {spec.spi:#x} is missing")
        wanted = {*want.inbound, *want.outbound}
        unexplained -= {sad_id for sad_id in unexplained if held[sad_id] in wanted}
    if len(set(held.values())) != len(held):
        complaints.append("an SA is in VPP twice")
    complaints += [f"SA {held[sad_id].spi:#x} is too many" for sad_id in unexplained]
    fallen: dict[GroupKey, Fallback] = {}
    if unsupported == "kernel":
        fallen = fallbacks(desired.values(), model.groups, env, interfaces_there.taps, lambda sa: False)
    taps = {each.target.sw_if_index for each in fallen.values() if each.target is not None}
    neighbors = {Neighbor(tap, ip6): interfaces_there.macs[tap] for tap in taps for ip6 in (False, True)}
    if found.neighbors != neighbors:
        complaints.append(f"there are the neighbors {found.neighbors}, not {neighbors}")
    return complaints + _compare_steering(
        desired, model, env, found, interfaces_there, fallen, over_vtis, hosts.local, guarded
    )


def compare_overlays(desired: Mapping[GroupKey, Desired], claims: Claims, found: Inventory) -> list[str]:
    """Return in sentences how interfaces of others are protected otherwise than the policies call for."""
    complaints = [
        f"{overlay.name} is protected for nobody" for overlay in found.overlays.keys() - claims.guarded.keys()
    ]
    if found.mute != bool(claims.guarded):
        complaints.append(f"there is the mute SA: {found.mute}")
    held = {sa.sad_id: sa.spec for sa in found.sas}
    for overlay, key in claims.guarded.items():
        want, protection = None if key is None else desired[key].tunnel, found.overlays.get(overlay)
        if protection is None or want is None:
            if protection != MUTED:
                complaints.append(f"{overlay.name} is not muted")
            continue
        inbound = [held.get(sad_id) for sad_id in protection.inbound]
        if held.get(protection.outbound) != want.outbound[-1] or set(inbound) != set(want.inbound):
            complaints.append(f"{overlay.name} is protected by {protection}")
        complaints += [f"SA {spec.spi:#x} is missing" for spec in want.outbound if spec not in held.values()]
    return complaints


def _named(lead: Lead, tags: Mapping[int, str]) -> str:
    if isinstance(lead, int):
        return tags.get(lead, "?")
    return " ".join(sorted(f"{tags.get(hop.sw_if_index, '?')}*{hop.weight}" for hop in lead))


def _compare_steering(
    desired: dict[GroupKey, Desired],
    model: KernelModel,
    env: Environment,
    found: Inventory,
    interfaces_there: Interfaces,
    fallen: Mapping[GroupKey, Fallback],
    over_vtis: Leads,
    local: frozenset[Route],
    guarded: Iterable[Overlay],
) -> list[str]:
    def handed(target: Target) -> Target:
        fallback = fallen.get(target) if isinstance(target, GroupKey) else None
        return target if fallback is None or fallback.target is None else fallback.target

    interfaces = set(interfaces_there.up)
    policies = outbound(model.policies())
    peers = {template.daddr for each in policies for template in each.policy.templates}
    wanted_policies = [each.wanted._replace(target=handed(each.wanted.target)) for each in policies if each.wanted]
    drops = [(rule, Fixed.DROP) for rule in not_in_clear(guarded, model.policies())]
    steering = steer(wanted_policies, env.addresses, peers, [*inbound_of(fallen), *drops])
    tags = {itf.sw_if_index: itf.tag.removesuffix(IP6_TAG) for itf in found.interfaces} | {
        NO_INDEX: "drop",
        FOR_US: "router",
    }
    junctions = {if_id_of(itf.tag): itf.sw_if_index for itf in found.interfaces}
    tags |= {RECEIVED + index: f"junction {if_id}" for if_id, index in junctions.items() if if_id is not None}
    tags |= {tap: f"tap {tap}" for tap in interfaces_there.macs}
    tags |= {index: f"link {link}" for link, index in interfaces_there.links.items()}
    tunnels = {key: it.tag for key, want in desired.items() if (it := want.tunnel) is not None and it.overlay is None}
    complaints = []
    left = {route: _named(lead, tags) for route, lead in found.routes.items()}

    for route in local:
        if (leads := left.pop(route, "")) != "router":
            complaints.append(f"the route to the router's address {route} leads to '{leads}'")

    def look(number: int, routes: Mapping[Prefix, Target]) -> None:
        for prefix, target in routes.items():
            wanted = tunnels.get(target, "drop") if isinstance(target, GroupKey) else "drop"
            if isinstance(target, Handover):
                wanted = f"tap {target.sw_if_index}"
            leads = left.pop(Route(prefix, number), "")
            wider = any(prefix.length > other.length and prefix.cut(other.length) == other for other in routes)
            counts = isinstance(target, GroupKey) and awaits_sa(model.groups[target], env)
            if leads != wanted and (leads or wanted != "drop" or not number or wider or counts):
                shown = f"{format_addr(prefix.address)}/{prefix.length}"
                complaints.append(f"route {shown} of table {number:#x} leads to '{leads}', not '{wanted}'")

    for number, table in over_vtis.items():
        for prefix, target in table.items():
            claimed = not number and prefix in {**steering.ip4.routes, **steering.ip6.routes}
            if not claimed and Route(prefix, number) not in local:
                target = target if isinstance(target, Split | Junction) else handed(target)
                shares = target.shares if isinstance(target, Split) else ((target, 1),)
                tunnel = {}
                for share, weight in shares:
                    if isinstance(share, Junction):
                        tunnel[f"junction {share.if_id}"] = weight
                    elif isinstance(share, Beside) and share.ifindex in interfaces_there.links:
                        tunnel[f"link {share.ifindex}"] = weight
                    elif isinstance(share, GroupKey) and share in tunnels:
                        tunnel[tunnels[share]] = weight
                wanted = " ".join(f"{tag}*{tunnel[tag]}" for tag in sorted(tunnel)) if len(tunnel) > 1 else ""
                wanted = wanted or next(iter(tunnel), "drop")
                if isinstance(target, Handover):
                    wanted = f"tap {target.sw_if_index}"
                if (leads := left.pop(Route(prefix, number), "")) != wanted:
                    complaints.append(f"the route over a VTI to {prefix} leads to '{leads}', not '{wanted}'")
    wanted_stacks = {Stack(ip6): (steering.of(ip6), interfaces) for ip6 in (False, True)}
    for if_id in env.told_apart:
        of_its = [of_vti(each.policy).wanted for each in policies if each.policy.if_id == if_id]
        apart = steer_routed([it._replace(target=handed(it.target)) for it in of_its if it is not None])
        wanted_stacks |= {Stack(ip6, if_id): (apart.of(ip6), {junctions.get(if_id, NO_INDEX)}) for ip6 in (False, True)}
    held = adopt(found, interfaces_there.every)
    look(0, {**steering.ip4.routes, **steering.ip6.routes})
    for stack in wanted_stacks.keys() | held.stacks:
        family, asking = wanted_stacks.get(stack, (FamilySteering(), set()))
        if len(held.of(stack)) != len(family.layers):
            complaints.append(f"there are {len(held.of(stack))} layers of rules, not {len(family.layers)}, for {stack}")
        for layer, wanted_layer in zip(held.of(stack), family.layers, strict=False):
            # policies that are installed anew as they were keep their place until the kernel's tables are read in full
            if sorted(layer.rules) != sorted(wanted_layer.rules):
                complaints.append(f"a layer has rules {layer.rules}, not {wanted_layer.rules}")
            if not layer.attached >= asking or (stack.if_id and layer.attached != asking):
                complaints.append(f"a layer is attached to {sorted(layer.attached)}, not to {sorted(asking)}")
            look(layer.number, wanted_layer.routes)
    policies_there = {policy.table for policy in found.policies} | ({JUNCTION_TABLE} if env.told_apart else set())
    numbers = {table.number for table in found.tables}
    if numbers != policies_there:
        complaints.append(f"there are tables {sorted(numbers)}, and layers lead to {sorted(policies_there)}")
    return complaints + [f"route {route} is too many" for route in left]
