"""Holds what VPP has against what the kernel's tables mean: read from VPP afresh, without the engine's own books."""

from __future__ import annotations

from collections.abc import Sequence

from vppipsec.sync.desired import Desired
from vppipsec.sync.held import INSTANCES, IP6_TAG, SAD_ID_FIRST, SAD_ID_LAST
from vppipsec.sync.translate import TAG_PREFIX, Environment, remote_of, translate
from vppipsec.vpp.client import VppClient, connect
from vppipsec.vpp.inventory import Inventory, offered_ciphers, read_addresses, read_interfaces, read_inventory
from vppipsec.vpp.objects import NO_INDEX, Prefix, Rule
from vppipsec.vpp.requests import NOT_REACHED, LookupRoute
from vppipsec.xfrm.model import GroupKey, KernelModel
from vppipsec.xfrm.text import format_addr
from vppipsec.xfrm.values import Policy, Sa


async def differences(api_socket: str, sas: Sequence[Sa], policies: Sequence[Policy]) -> list[str]:
    """Return in sentences how VPP differs from what a dump of the kernel (newest first) means; nothing where it is equal."""
    client = await connect(api_socket, "equality")
    try:
        model = KernelModel()
        model.replace(sas, policies)
        env = await _environment(client, model)
        desired = {key: translate(key, group, env) for key, group in model.groups.items()}
        found = await read_inventory(
            client, lambda tag: tag.startswith(TAG_PREFIX), SAD_ID_FIRST, SAD_ID_LAST, INSTANCES
        )
        return compare(desired, found)
    finally:
        await client.close()


async def _environment(client: VppClient, model: KernelModel) -> Environment:
    addresses = await read_addresses(client, await read_interfaces(client))
    remotes = {remote_of(key, group, addresses) for key, group in model.groups.items()} - {None}
    asked = [remote for remote in remotes if remote is not None]
    replies = await client.run([LookupRoute(remote) for remote in asked])
    lost = {remote for remote, reply in zip(asked, replies, strict=True) if reply.retval or reply.extra == NOT_REACHED}
    return Environment(addresses, frozenset(lost), offered_ciphers(client))


def compare(desired: dict[GroupKey, Desired], found: Inventory) -> list[str]:
    """Return in sentences how what was found in VPP differs from what is desired; nothing where it does not."""
    complaints = []
    acls: dict[int | None, tuple[Rule, ...]] = {acl.acl_index: acl.rules for acl in found.acls}
    used = {itf.acl for itf in found.interfaces}
    complaints += [f"ACL {index} is too many" for index in acls if index not in used]
    tunnels = {want.tunnel.tag: want.tunnel for want in desired.values() if want.tunnel is not None}
    held = {sa.sad_id: sa.spec for sa in found.sas}
    unexplained = set(held)
    interfaces = {itf.tag.removesuffix(IP6_TAG): itf for itf in found.interfaces}
    if len(interfaces) != len(found.interfaces):
        complaints.append("two interfaces have the same tag")
    complaints += [
        f"interface ipsec{interfaces[tag].instance} is too many" for tag in interfaces.keys() - tunnels.keys()
    ]
    for tag, want in tunnels.items():
        itf = interfaces.get(tag)
        if itf is None or itf.protection is None:
            complaints.append(f"'{tag}' has no {'interface' if itf is None else 'protection'}")
            continue
        if want.ip6 and not itf.tag.endswith(IP6_TAG):
            complaints.append(f"ipsec{itf.instance} does not pass IPv6")
        if not itf.up or itf.lender != want.lender:
            complaints.append(f"ipsec{itf.instance} is up: {itf.up}, borrows from {itf.lender}, not {want.lender}")
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
    return complaints + _compare_routes(desired, found)


def _compare_routes(desired: dict[GroupKey, Desired], found: Inventory) -> list[str]:
    claims: dict[Prefix, list[tuple[int, str]]] = {}
    for want in desired.values():
        for prefix, priority in want.routes.items():
            claims.setdefault(prefix, []).append((priority, want.tunnel.tag if want.tunnel is not None else ""))
    tags = {itf.sw_if_index: itf.tag.removesuffix(IP6_TAG) for itf in found.interfaces} | {NO_INDEX: ""}
    complaints = []
    for prefix in claims.keys() | found.routes.keys():
        shown = f"route {format_addr(prefix.address)}/{prefix.length}"
        if prefix not in claims:
            complaints.append(f"{shown} is too many")
        elif prefix not in found.routes:
            complaints.append(f"{shown} is missing")
        else:
            best = min(claims[prefix])[0]
            leads = tags.get(found.routes[prefix])
            if leads not in [tag for priority, tag in claims[prefix] if priority == best]:
                complaints.append(f"{shown} leads to '{leads}'")
    return complaints
