"""Compares VPP with the state that the kernel's tables require. It reads VPP itself, not the engine's records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from vppipsec.kernel.route.model import KernelRoutes
from vppipsec.kernel.text import format_addr
from vppipsec.kernel.xfrm.sad_spd import KernelModel, TunnelKey
from vppipsec.kernel.xfrm.values import Policy, Sa
from vppipsec.sync.actual.classifiers import classifier_if_id
from vppipsec.sync.desired.environment import EnvironmentSnapshot
from vppipsec.sync.desired.gre_ipip import GreIpipClaims, cleartext_discard_rules, gre_ipip_claims
from vppipsec.sync.desired.host_interfaces import choose_host_interfaces, host_interface_candidates, local_addresses
from vppipsec.sync.desired.kernel_fallback import KernelFallback, fallback_inbound_rules, kernel_fallbacks
from vppipsec.sync.desired.outbound_policy import outbound_policies, vti_outbound_policy
from vppipsec.sync.desired.policy_layers import (
    Action,
    FamilySteering,
    KernelTap,
    LinkNextHop,
    Target,
    VtiClassifier,
    compute_steering,
    compute_vti_steering,
)
from vppipsec.sync.desired.routes import RouteTarget, WeightedTargets
from vppipsec.sync.desired.state import Translation
from vppipsec.sync.desired.tunnel import remote_endpoint, translate
from vppipsec.sync.desired.vti_routes import RT_TABLE_MAIN, selectors_of, vti_route_targets
from vppipsec.sync.ike.acquire import awaits_sa
from vppipsec.vpp.api.client import VppClient, connect
from vppipsec.vpp.api.ip import UNREACHABLE, VIA_RECURSION, RouteLookup
from vppipsec.vpp.gre_ipip import BLOCK_PROTECTION, GreIpipInterface
from vppipsec.vpp.inventory import (
    InterfaceIndexes,
    Inventory,
    Neighbor,
    read_addresses,
    read_gre_ipip,
    read_interfaces,
    read_inventory,
    read_mtu,
    read_tables_of,
    supported_ciphers,
)
from vppipsec.vpp.ownership import (
    CLASSIFIER_TABLE,
    INSTANCES,
    IP6_TAG,
    SAD_ID_FIRST,
    SAD_ID_LAST,
    TABLE_NUMBERS,
    TAG_PREFIX,
)
from vppipsec.vpp.state.policy_layers import StackKey, adopt_layers
from vppipsec.vpp.types import INTERFACE_RX, LOCAL_INDEX, NO_INDEX, Paths, Prefix, Route, Rule

TargetsByTable = Mapping[int, Mapping[Prefix, RouteTarget]]
NOTHING: TargetsByTable = MappingProxyType({})


async def differences(
    api_socket: str,
    sas: Sequence[Sa],
    policies: Sequence[Policy],
    unsupported: str = "kernel",
    routes: KernelRoutes | None = None,
) -> list[str]:
    """Return in sentences how VPP differs from what a dump of the kernel (newest first) requires; empty where it is
    equal.

    `unsupported` is the setting of that name; `routes` are the kernel's over VTIs.
    """
    client = await connect(api_socket, "equality")
    try:
        model = KernelModel()
        model.replace(sas, policies)
        claims = gre_ipip_claims(
            await read_gre_ipip(client, SAD_ID_FIRST, SAD_ID_LAST), outbound_policies(model.policies())
        )
        env = replace(await _environment(client, model), gre_ipip=claims.by_tunnel)
        found = await read_inventory(
            client, lambda tag: tag.startswith(TAG_PREFIX), SAD_ID_FIRST, SAD_ID_LAST, INSTANCES, TABLE_NUMBERS
        )
        interfaces = await read_interfaces(client)
        over_vtis: TargetsByTable = {}
        if routes is not None:
            vtis = [vti for if_id in routes.if_ids() if (vti := routes.link(if_id)) is not None]
            env = replace(
                env,
                vtis={vti.if_id: 0 if vti.table == RT_TABLE_MAIN else vti.table for vti in vtis},
                tables=found.other_tables,
            )
            selectors = selectors_of([each.policy for each in outbound_policies(model.policies())])
            targets = vti_route_targets(routes.next_hops(), selectors, found.other_tables, vtis)
            over_vtis, env = targets.routes, replace(env, classified_vtis=frozenset(targets.classifiers))
        desired = {key: translate(key, tunnel, env) for key, tunnel in model.tunnels.items()}
        known = await _known(client, env)
        hosts = hosts_of(model, routes, known, env.tables) if routes is not None and interfaces.taps else NO_HOSTS
        complaints = compare_overlays(desired, claims, found)
        return complaints + compare(
            desired, model, env, found, interfaces, unsupported, over_vtis, hosts, claims.must_encrypt
        )
    finally:
        await client.close()


class Hosts(NamedTuple):
    """Tunnels that should have host interfaces, and addresses that VPP should therefore know as the router's."""

    paired: frozenset[TunnelKey] = frozenset()
    local: frozenset[Route] = frozenset()


MAIN_TABLES = frozenset({(0, False), (0, True)})


def hosts_of(
    model: KernelModel, routes: KernelRoutes, known: Set[Route], tables: Set[tuple[int, bool]] = MAIN_TABLES
) -> Hosts:
    """Return the expected values; `known` are the addresses of VPP's interfaces.

    `tables` are VPP's, by number and family.
    """
    policies, by_table = outbound_policies(model.policies()), routes.addresses_by_table()
    paired = choose_host_interfaces(host_interface_candidates(policies, by_table.get(0, ()), routes.link), ())
    own = {host_route(address, table) for table, addresses in by_table.items() for address in addresses}
    there = {route for route in own if (route.table, len(route.prefix.address) == 16) in tables}
    return Hosts(paired, local_addresses(policies, paired, there - known, routes.link))


async def _known(client: VppClient, env: EnvironmentSnapshot) -> set[Route]:
    """Return the addresses of VPP's interfaces, each in its table. With a single table VPP is not asked."""
    holders = {(index, len(address) == 16) for address, index in env.addresses.items()}
    tables = await read_tables_of(client, holders) if any(number for number, _ in env.tables) else {}
    return {host_route(it, tables.get((index, len(it) == 16), 0)) for it, index in env.addresses.items()}


def host_route(address: bytes, table: int = 0) -> Route:
    return Route(Prefix(address, 8 * len(address)), table)


NO_HOSTS = Hosts()


async def _environment(client: VppClient, model: KernelModel) -> EnvironmentSnapshot:
    addresses = await read_addresses(client, (await read_interfaces(client)).up)
    remotes = {remote_endpoint(key, tunnel, addresses) for key, tunnel in model.tunnels.items()} - {None}
    asked = [remote for remote in remotes if remote is not None]
    replies = await client.run([RouteLookup(remote) for remote in asked])
    links = {
        remote: await read_mtu(client, reply.value, len(remote) == 16)
        for remote, reply in zip(asked, replies, strict=True)
        if not reply.retval and reply.value not in (UNREACHABLE, VIA_RECURSION)
    }
    lost = {remote for remote, reply in zip(asked, replies, strict=True) if reply.retval or reply.value == UNREACHABLE}
    return EnvironmentSnapshot(addresses, frozenset(lost), supported_ciphers(client), link_mtus=links)


def compare(
    desired: dict[TunnelKey, Translation],
    model: KernelModel,
    env: EnvironmentSnapshot,
    found: Inventory,
    interfaces_there: InterfaceIndexes,
    unsupported: str = "kernel",
    over_vtis: TargetsByTable = NOTHING,
    hosts: Hosts = NO_HOSTS,
    guarded: Iterable[GreIpipInterface] = (),
) -> list[str]:
    """Return in sentences how the inventory of VPP differs from the desired state; empty where it does not.

    `over_vtis` are the routes that VPP should have for those over VTIs.
    """
    complaints = []
    acls: dict[int | None, tuple[Rule, ...]] = {acl.acl_index: acl.rules for acl in found.acls}
    used = {itf.acl for itf in found.interfaces} | {policy.acl_index for policy in found.policies}
    complaints += [f"ACL {index} is too many" for index in acls if index not in used]
    every = [want.tunnel for want in desired.values() if want.tunnel is not None]
    tunnels = {want.tag: want for want in every if want.gre_ipip is None}
    actual = {sa.sad_id: sa.spec for sa in found.sas}
    of_overlays = {spec for want in every if want.gre_ipip is not None for spec in (*want.inbound, *want.outbound)}
    unexplained = {sad_id for sad_id, spec in actual.items() if spec not in of_overlays}
    interfaces = {itf.tag.removesuffix(IP6_TAG): itf for itf in found.interfaces}
    if len(interfaces) != len(found.interfaces):
        complaints.append("two interfaces have the same tag")
    interfaces = {tag: itf for tag, itf in interfaces.items() if classifier_if_id(tag) not in env.classified_vtis}
    of_classifiers = {classifier_if_id(itf.tag): itf for itf in found.interfaces}
    for if_id in env.classified_vtis:
        itf = of_classifiers.get(if_id)
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
        unnumbered_from = None if want.table else want.unnumbered_from
        if not itf.up or itf.unnumbered_from != unnumbered_from:
            complaints.append(
                f"ipsec{itf.instance} is up: {itf.up}, borrows from {itf.unnumbered_from}, not {unnumbered_from}"
            )
        tables = {itf.tables[0], itf.tables[1] if itf.tag.endswith(IP6_TAG) else want.table}
        if tables != {want.table} or itf.has_address != bool(want.table):
            complaints.append(f"ipsec{itf.instance} is in tables {itf.tables}, not {want.table}")
        if (itf.host is not None) != (tag in paired):
            complaints.append(f"ipsec{itf.instance} has the host interface {itf.host}")
        if want.mtu and itf.mtu != want.mtu:
            complaints.append(f"ipsec{itf.instance} takes packets of {itf.mtu} bytes, not {want.mtu}")
        if acls.get(itf.acl) != want.inbound_rules:
            complaints.append(
                f"ipsec{itf.instance} holds its packets against {acls.get(itf.acl)}, not {want.inbound_rules}"
            )
        inbound = [actual.get(sad_id) for sad_id in itf.protection.inbound]
        if set(inbound) != set(want.inbound) or len(inbound) != len(want.inbound):
            complaints.append(f"ipsec{itf.instance} has inbound {inbound}, not {want.inbound}")
        if actual.get(itf.protection.outbound) != want.outbound[-1]:
            complaints.append(
                f"ipsec{itf.instance} has outbound {actual.get(itf.protection.outbound)}, not {want.outbound[-1]}"
            )
        for spec in want.outbound:
            if spec not in actual.values():
                complaints.append(f"outbound SA {spec.spi:#x} is missing")
        wanted = {*want.inbound, *want.outbound}
        unexplained -= {sad_id for sad_id in unexplained if actual[sad_id] in wanted}
    if len(set(actual.values())) != len(actual):
        complaints.append("an SA is in VPP twice")
    complaints += [f"SA {actual[sad_id].spi:#x} is too many" for sad_id in unexplained]
    fallen: dict[TunnelKey, KernelFallback] = {}
    if unsupported == "kernel":
        fallen = kernel_fallbacks(desired.values(), model.tunnels, env, interfaces_there.taps, lambda sa: False)
    taps = {each.target.sw_if_index for each in fallen.values() if each.target is not None}
    neighbors = {Neighbor(tap, ip6): interfaces_there.macs[tap] for tap in taps for ip6 in (False, True)}
    if found.neighbors != neighbors:
        complaints.append(f"there are the neighbors {found.neighbors}, not {neighbors}")
    return complaints + _compare_steering(
        desired, model, env, found, interfaces_there, fallen, over_vtis, hosts.local, guarded
    )


def compare_overlays(desired: Mapping[TunnelKey, Translation], claims: GreIpipClaims, found: Inventory) -> list[str]:
    """Return in sentences how the protection of gre and ipip interfaces differs from what the policies require."""
    complaints = [
        f"{gre_ipip.name} is protected for nobody" for gre_ipip in found.gre_ipip.keys() - claims.must_encrypt.keys()
    ]
    if found.has_block_sa != bool(claims.must_encrypt):
        complaints.append(f"there is the mute SA: {found.has_block_sa}")
    actual = {sa.sad_id: sa.spec for sa in found.sas}
    for gre_ipip, key in claims.must_encrypt.items():
        want, protection = None if key is None else desired[key].tunnel, found.gre_ipip.get(gre_ipip)
        if protection is None or want is None:
            if protection != BLOCK_PROTECTION:
                complaints.append(f"{gre_ipip.name} is not muted")
            continue
        inbound = [actual.get(sad_id) for sad_id in protection.inbound]
        if actual.get(protection.outbound) != want.outbound[-1] or set(inbound) != set(want.inbound):
            complaints.append(f"{gre_ipip.name} is protected by {protection}")
        complaints += [f"SA {spec.spi:#x} is missing" for spec in want.outbound if spec not in actual.values()]
    return complaints


def _named(paths: Paths, tags: Mapping[int, str]) -> str:
    if isinstance(paths, int):
        return tags.get(paths, "?")
    return " ".join(sorted(f"{tags.get(hop.sw_if_index, '?')}*{hop.weight}" for hop in paths))


def _compare_steering(
    desired: dict[TunnelKey, Translation],
    model: KernelModel,
    env: EnvironmentSnapshot,
    found: Inventory,
    interfaces_there: InterfaceIndexes,
    fallen: Mapping[TunnelKey, KernelFallback],
    over_vtis: TargetsByTable,
    local: frozenset[Route],
    guarded: Iterable[GreIpipInterface],
) -> list[str]:
    def handed(target: Target) -> Target:
        fallback = fallen.get(target) if isinstance(target, TunnelKey) else None
        return target if fallback is None or fallback.target is None else fallback.target

    interfaces = set(interfaces_there.up)
    policies = outbound_policies(model.policies())
    peers = {template.daddr for each in policies for template in each.policy.templates}
    wanted_policies = [
        each.policy_rules._replace(target=handed(each.policy_rules.target)) for each in policies if each.policy_rules
    ]
    drops = [(rule, Action.DISCARD) for rule in cleartext_discard_rules(guarded, model.policies())]
    steering = compute_steering(wanted_policies, env.addresses, peers, [*fallback_inbound_rules(fallen), *drops])
    tags = {itf.sw_if_index: itf.tag.removesuffix(IP6_TAG) for itf in found.interfaces} | {
        NO_INDEX: "drop",
        LOCAL_INDEX: "router",
    }
    classifiers = {classifier_if_id(itf.tag): itf.sw_if_index for itf in found.interfaces}
    tags |= {INTERFACE_RX + index: f"junction {if_id}" for if_id, index in classifiers.items() if if_id is not None}
    tags |= {tap: f"tap {tap}" for tap in interfaces_there.macs}
    tags |= {index: f"link {link}" for link, index in interfaces_there.links.items()}
    tunnels = {key: it.tag for key, want in desired.items() if (it := want.tunnel) is not None and it.gre_ipip is None}
    complaints = []
    left = {route: _named(paths, tags) for route, paths in found.routes.items()}

    for route in local:
        if (targets := left.pop(route, "")) != "router":
            complaints.append(f"the route to the router's address {route} leads to '{targets}'")

    def look(number: int, routes: Mapping[Prefix, Target]) -> None:
        for prefix, target in routes.items():
            wanted = tunnels.get(target, "drop") if isinstance(target, TunnelKey) else "drop"
            if isinstance(target, KernelTap):
                wanted = f"tap {target.sw_if_index}"
            targets = left.pop(Route(prefix, number), "")
            wider = any(prefix.length > other.length and prefix.shortened(other.length) == other for other in routes)
            counts = isinstance(target, TunnelKey) and awaits_sa(model.tunnels[target], env)
            if targets != wanted and (targets or wanted != "drop" or not number or wider or counts):
                shown = f"{format_addr(prefix.address)}/{prefix.length}"
                complaints.append(f"route {shown} of table {number:#x} leads to '{targets}', not '{wanted}'")

    for number, table in over_vtis.items():
        for prefix, target in table.items():
            claimed = not number and prefix in {**steering.ip4.routes, **steering.ip6.routes}
            if not claimed and Route(prefix, number) not in local:
                target = target if isinstance(target, WeightedTargets | VtiClassifier) else handed(target)
                shares = target.shares if isinstance(target, WeightedTargets) else ((target, 1),)
                tunnel = {}
                for share, weight in shares:
                    if isinstance(share, VtiClassifier):
                        tunnel[f"junction {share.if_id}"] = weight
                    elif isinstance(share, LinkNextHop) and share.ifindex in interfaces_there.links:
                        tunnel[f"link {share.ifindex}"] = weight
                    elif isinstance(share, TunnelKey) and share in tunnels:
                        tunnel[tunnels[share]] = weight
                wanted = " ".join(f"{tag}*{tunnel[tag]}" for tag in sorted(tunnel)) if len(tunnel) > 1 else ""
                wanted = wanted or next(iter(tunnel), "drop")
                if isinstance(target, KernelTap):
                    wanted = f"tap {target.sw_if_index}"
                if (targets := left.pop(Route(prefix, number), "")) != wanted:
                    complaints.append(f"the route over a VTI to {prefix} leads to '{targets}', not '{wanted}'")
    wanted_stacks = {StackKey(ip6): (steering.family(ip6), interfaces) for ip6 in (False, True)}
    for if_id in env.classified_vtis:
        of_its = [vti_outbound_policy(each.policy).policy_rules for each in policies if each.policy.if_id == if_id]
        classified = compute_vti_steering([it._replace(target=handed(it.target)) for it in of_its if it is not None])
        wanted_stacks |= {
            StackKey(ip6, if_id): (classified.family(ip6), {classifiers.get(if_id, NO_INDEX)}) for ip6 in (False, True)
        }
    actual = adopt_layers(found, interfaces_there.all)
    look(0, {**steering.ip4.routes, **steering.ip6.routes})
    for stack in wanted_stacks.keys() | actual.stacks:
        family, asking = wanted_stacks.get(stack, (FamilySteering(), set()))
        if len(actual.stack(stack)) != len(family.layers):
            complaints.append(
                f"there are {len(actual.stack(stack))} layers of rules, not {len(family.layers)}, for {stack}"
            )
        for layer, wanted_layer in zip(actual.stack(stack), family.layers, strict=False):
            # policies that are installed again unchanged keep their position until the kernel's tables are read in full
            if sorted(layer.rules) != sorted(wanted_layer.rules):
                complaints.append(f"a layer has rules {layer.rules}, not {wanted_layer.rules}")
            if not layer.attached >= asking or (stack.if_id and layer.attached != asking):
                complaints.append(f"a layer is attached to {sorted(layer.attached)}, not to {sorted(asking)}")
            look(layer.number, wanted_layer.routes)
    policies_there = {policy.table for policy in found.policies} | (
        {CLASSIFIER_TABLE} if env.classified_vtis else set()
    )
    numbers = {table.number for table in found.tables}
    if numbers != policies_there:
        complaints.append(f"there are tables {sorted(numbers)}, and layers lead to {sorted(policies_there)}")
    return complaints + [f"route {route} is too many" for route in left]
