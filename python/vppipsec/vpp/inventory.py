"""Reads VPP's dumps: its interfaces and addresses, and all objects of the service.

The service recognises its interfaces and ACLs by tag, its SAs, tables and ABF policies by number, its routes by FIB source.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from vppipsec.vpp.algorithms import CryptoAlg, IntegAlg
from vppipsec.vpp.api.client import VppClient
from vppipsec.vpp.api.interface import GetInterfaceTable
from vppipsec.vpp.gre_ipip import GreIpipInterface
from vppipsec.vpp.ownership import (
    BLOCK_SAD_ID,
    FIB_PRIORITY,
    FIB_SOURCE,
    KERNEL_NEXT_HOP,
    LINK_GROUPS,
    interface_address,
)
from vppipsec.vpp.types import (
    INTERFACE_RX,
    LOCAL_INDEX,
    NO_INDEX,
    HostInterface,
    Path,
    Paths,
    Prefix,
    Protection,
    Route,
    Rule,
    SadFlag,
    SaSpec,
    weighted_paths,
)

_DEVICE_TYPE = "IPSEC Tunnel"  # ipsec_itf_device_class.name, src/vnet/ipsec/ipsec_itf.c
_FIXED_PATH_TYPES = {1: LOCAL_INDEX, 2: NO_INDEX}  # FIB_API_PATH_TYPE_LOCAL, FIB_API_PATH_TYPE_DROP
_PATH_INTERFACE_RX = 9  # FIB_API_PATH_TYPE_INTERFACE_RX
_TAP = 0  # LCP_API_ITF_HOST_TAP
_GRE = 47
_IPIP = (4, 41)
"""IP protocols of IPv4 and IPv6 inside another IP header."""
_GRE_DUMPS = ("gre_tunnel_v2_dump", "gre_tunnel_dump")
"""VPP 25.10 has only the second, which does not show keys."""
_L3_MTU, _IP4_MTU, _IP6_MTU = range(3)  # enum mtu_proto
_L3, _P2P = 0, 0  # GRE_API_TUNNEL_TYPE_L3, TUNNEL_API_MODE_P2P
_L2_KINDS = {1: "it carries Ethernet (TEB)", 2: "it mirrors ports (ERSPAN)"}


@dataclass(frozen=True, slots=True)
class FoundInterface:
    """An `ipsec` interface of the service. It has no tag if the service ended right after creating it.

    `acl` is the ACL for packets that it receives, None if there is none or several. `host` is its host interface in the kernel,
    None if it has none. `tables` are the IPv4 and IPv6 tables in which VPP looks up packets that it receives. `has_address` says
    whether it has its own address there (`interface_address`).
    """

    instance: int
    sw_if_index: int
    tag: str
    unnumbered_from: int | None
    up: bool
    protection: Protection | None
    acl: int | None
    host: HostInterface | None = None
    mtu: int = 0
    tables: tuple[int, int] = (0, 0)
    has_address: bool = False


@dataclass(frozen=True, slots=True)
class FoundAcl:
    """An ACL of the service."""

    acl_index: int
    tag: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class FoundSa:
    """An SA of the service: its `sad_id` is in the service's range, and it protects no foreign interface."""

    sad_id: int
    spec: SaSpec
    stat_index: int


@dataclass(frozen=True, slots=True)
class FoundTable:
    """A FIB table of the service, recognised by its number."""

    number: int
    ip6: bool
    name: str


@dataclass(frozen=True, slots=True)
class FoundAbf:
    """An ABF policy of the service, recognised by its number. `attachments` maps sw_if_index to priority.

    `table` is the FIB table of its path.
    """

    policy_id: int
    acl_index: int
    table: int
    ip6: bool
    attachments: Mapping[int, int]


class Neighbor(NamedTuple):
    """The neighbor on a tap that stands for the kernel."""

    sw_if_index: int
    ip6: bool


@dataclass(frozen=True, slots=True)
class Inventory:
    """All objects of the service in VPP, and all numbers in use.

    `routes` are the routes of the service's FIB source, with their paths. `counters` has the stats_index of each. `instances` and
    `sad_ids` include those of other programs. `other_tables` are the FIB tables that the service did not create, as (number, is
    IPv6).
    """

    interfaces: tuple[FoundInterface, ...]
    sas: tuple[FoundSa, ...]
    acls: tuple[FoundAcl, ...]
    routes: dict[Route, Paths]
    route_source: int
    instances: frozenset[int]
    sad_ids: frozenset[int]
    tables: tuple[FoundTable, ...] = ()
    policies: tuple[FoundAbf, ...] = ()
    other_tables: frozenset[tuple[int, bool]] = frozenset()
    neighbors: Mapping[Neighbor, bytes] = field(default_factory=dict)
    counters: Mapping[Route, int] = field(default_factory=dict)
    gre_ipip: Mapping[GreIpipInterface, Protection] = field(default_factory=dict)
    """gre and ipip interfaces that the service's SAs protect, with the protection."""
    has_block_sa: bool = False
    """Whether VPP has the block SA."""


async def read_inventory(
    client: VppClient,
    is_our_tag: Callable[[str], bool],
    first: int,
    last: int,
    our_instances: range = range(0),
    our_tables: range = range(0),
) -> Inventory:
    """Return all objects of the service in VPP. Adds the service's FIB source if it is missing.

    `sad_id`s from `first` to `last` are the service's, as are tables and ABF policies with numbers in `our_tables`. An `ipsec`
    interface without a tag is the service's if its instance is in `our_instances`, unless foreign SAs protect it.

    Raises VppError.
    """
    source = await _route_source(client)
    instances = {
        itf.itf.sw_if_index: itf.itf.user_instance for itf in await client.dump("ipsec_itf_dump", _all_interfaces())
    }
    protections = await read_protections(client)
    found_gre_ipip = await read_gre_ipip(client, first, last)
    gre_ipip_interfaces = {
        gre_ipip: protection for gre_ipip, protection in found_gre_ipip.items() if protection is not None
    }
    gre_ipip_indices = {gre_ipip.sw_if_index for gre_ipip in gre_ipip_interfaces}
    unnumbered = {u.sw_if_index: u.ip_sw_if_index for u in await client.dump("ip_unnumbered_dump", _all_interfaces())}
    pairs = await _read_pairs(client)
    hosts = {pair.phy_sw_if_index: HostInterface(pair.host_if_name, pair.vif_index) for pair in pairs}
    tables, foreign_tables = await _read_tables(client, our_tables)
    acls_of = {
        bound.sw_if_index: tuple(bound.acls)
        for bound in await client.dump("acl_interface_list_dump", _all_interfaces())
    }
    found = []
    foreign_sas: set[int] = set()
    for itf in await client.dump("sw_interface_dump", {"sw_if_index": NO_INDEX}):
        index = itf.sw_if_index
        protection = protections.get(index)
        named = () if protection is None else protection.sad_ids
        untagged = not itf.tag and instances.get(index) in our_instances and all(first <= n <= last for n in named)
        if index in instances and (is_our_tag(itf.tag) or untagged):
            up = bool(int(itf.flags) & 1)
            bound_to = acls_of.get(index, ())
            acl = bound_to[0] if len(bound_to) == 1 else None
            unnumbered_from, host, mtu = unnumbered.get(index), hosts.get(index), int(itf.mtu[_L3_MTU])
            found.append(
                FoundInterface(instances[index], index, itf.tag, unnumbered_from, up, protection, acl, host, mtu)
            )
        elif protection is not None and index not in gre_ipip_indices:
            foreign_sas.update(protection.sad_ids)
    if any(number for number, _ in foreign_tables):
        found = await _with_tables(client, found)
    sas, sad_ids = [], set()
    endpoints = {
        sad_id: (gre_ipip.local, gre_ipip.remote)  # VPP keeps no endpoints for an SA in transport mode
        for gre_ipip, protection in gre_ipip_interfaces.items()
        for sad_id in protection.sad_ids
    }
    for details in await client.dump("ipsec_sa_v5_dump"):
        sad_id = details.entry.sad_id
        sad_ids.add(sad_id)
        if first <= sad_id <= last and sad_id not in foreign_sas:
            spec = _sa_spec(details.entry)
            if sad_id in endpoints:
                src, dst = endpoints[sad_id][:: -1 if spec.inbound else 1]
                spec = spec._replace(src=src, dst=dst)
            sas.append(FoundSa(sad_id, spec, details.stat_index))
    routes, counters = {}, {}
    for number, ip6 in (*((table.number, table.ip6) for table in tables), *foreign_tables):
        table = {"table_id": number, "is_ip6": ip6, "name": ""}
        for details in await client.dump("ip_route_v2_dump", {"src": source, "table": table}):
            route = details.route
            key = Route(Prefix(_bytes(route.prefix.address), route.prefix.len), number)
            taken = [path for path in route.paths if not path.preference]
            routes[key] = weighted_paths(_path(path, instances, len(key.prefix.address)) for path in taken)
            counters[key] = route.stats_index
    acls = [_found_acl(acl) for acl in await client.dump("acl_dump", {"acl_index": NO_INDEX}) if is_our_tag(acl.tag)]
    return Inventory(
        tuple(found),
        tuple(sas),
        tuple(acls),
        routes,
        source,
        frozenset(instances.values()),
        frozenset(sad_ids),
        tables,
        await _read_abf_policies(client, our_tables),
        foreign_tables,
        await read_neighbors(client),
        counters,
        gre_ipip_interfaces,
        BLOCK_SAD_ID in sad_ids,
    )


def _path(path: Any, ipsec: Collection[int], size: int) -> Path:
    """Return the Path for vl_api_fib_path_t. Leaves out a next hop on an `ipsec` interface, which VPP adds to a host route."""
    kind, index = int(path.type), path.sw_if_index
    if kind == _PATH_INTERFACE_RX:
        return Path(INTERFACE_RX + index, path.weight)
    if kind in _FIXED_PATH_TYPES or index in ipsec:
        return Path(_FIXED_PATH_TYPES.get(kind, index), path.weight)
    next_hop = bytes(path.nh.address.ip6)[:size]
    return Path(index, path.weight, next_hop if any(next_hop) else b"")


async def read_multicast_entries(
    client: VppClient, tables: Collection[tuple[int, bool]]
) -> dict[tuple[int, bool], bool]:
    """Return whether tables have the service's multicast entry. Tables are (number, is IPv6).

    The result leaves out tables for which VPP has no multicast table. Raises VppError.
    """
    found = {}
    for number, ip6 in sorted(tables):
        table = {"table_id": number, "is_ip6": ip6, "name": ""}
        prefixes = [details.route.prefix for details in await client.dump("ip_mroute_dump", {"table": table})]
        if prefixes:
            size = 16 if ip6 else 4
            groups = [Prefix(bytes(it.grp_address.ip6)[:size], it.grp_address_length) for it in prefixes]
            found[number, ip6] = LINK_GROUPS[ip6] in groups
    return found


async def read_other_tables(client: VppClient, owned: range) -> frozenset[tuple[int, bool]]:
    """Return VPP's FIB tables as (number, is IPv6), except the service's, whose numbers are `owned`. Raises VppError."""
    return (await _read_tables(client, owned))[1]


async def _read_tables(client: VppClient, owned: range) -> tuple[tuple[FoundTable, ...], frozenset[tuple[int, bool]]]:
    """Return VPP's FIB tables: the service's, and all others as (number, is IPv6)."""
    every = [details.table for details in await client.dump("ip_table_dump")]
    tables = [FoundTable(table.table_id, bool(table.is_ip6), table.name) for table in every]
    foreign_tables = frozenset((table.number, table.ip6) for table in tables if table.number not in owned)
    return tuple(table for table in tables if table.number in owned), foreign_tables


async def _with_tables(client: VppClient, found: Sequence[FoundInterface]) -> list[FoundInterface]:
    """Return the interfaces with `tables` and `has_address` filled in."""
    tables = await read_tables_of(client, [(itf.sw_if_index, ip6) for itf in found for ip6 in (False, True)])
    by = [(itf, tables[itf.sw_if_index, False], tables[itf.sw_if_index, True]) for itf in found]
    addresses = await read_addresses(client, [itf.sw_if_index for itf, table, _ in by if table])
    return [
        replace(
            itf, tables=(table, table6), has_address=addresses.get(interface_address(itf.instance)) == itf.sw_if_index
        )
        for itf, table, table6 in by
    ]


async def read_tables_of(client: VppClient, asked: Collection[tuple[int, bool]]) -> dict[tuple[int, bool], int]:
    """Return the FIB table for each (sw_if_index, is IPv6), 0 if VPP refuses the question. Raises VppError."""
    replies = await client.run([GetInterfaceTable(*each) for each in asked])
    return {each: 0 if reply.retval else reply.value for each, reply in zip(asked, replies, strict=True)}


async def _read_abf_policies(client: VppClient, owned: range) -> tuple[FoundAbf, ...]:
    attachments: dict[int, dict[int, int]] = {}
    for details in await client.dump("abf_itf_attach_dump"):
        attach = details.attach
        attachments.setdefault(attach.policy_id, {})[attach.sw_if_index] = attach.priority
    return tuple(
        FoundAbf(
            policy.policy_id,
            policy.acl_index,
            policy.paths[0].table_id,
            bool(int(policy.paths[0].proto)),
            attachments.get(policy.policy_id, {}),
        )
        for policy in (details.policy for details in await client.dump("abf_policy_dump"))
        if policy.policy_id in owned
    )


@dataclass(frozen=True, slots=True)
class InterfaceIndexes:
    """VPP's interfaces by sw_if_index: `all` of them, and those that are administratively `up`, in order.

    `up` excludes `ipsec` interfaces, which only borrow addresses. It also excludes linux-cp's taps: the kernel's packets come in
    there, and the kernel has encrypted them already if its policies say so.
    """

    up: tuple[int, ...] = ()
    all: frozenset[int] = frozenset()
    taps: Mapping[int, int] = field(default_factory=dict)
    """linux-cp's taps, by the interface whose packets and addresses the tap shares with the kernel."""
    macs: Mapping[int, bytes] = field(default_factory=dict)
    """MAC of the kernel's end of each tap. It equals the interface's MAC."""
    links: Mapping[int, int] = field(default_factory=dict)
    """The interfaces that the kernel shares through taps, by the kernel's ifindex of the tap."""


async def read_interfaces(client: VppClient) -> InterfaceIndexes:
    """Return VPP's interfaces. Raises VppError."""
    found = await client.dump("sw_interface_dump", {"sw_if_index": NO_INDEX})
    pairs = await _read_pairs(client)
    hosts = {pair.host_sw_if_index for pair in pairs}
    up = tuple(
        itf.sw_if_index
        for itf in found
        if itf.interface_dev_type != _DEVICE_TYPE and itf.sw_if_index not in hosts and int(itf.flags) & 1
    )
    taps = {pair.phy_sw_if_index: pair.host_sw_if_index for pair in pairs if int(pair.host_if_type) == _TAP}
    mac_of = {itf.sw_if_index: bytes(itf.l2_address) for itf in found}
    macs = {tap: mac_of[phy] for phy, tap in taps.items() if phy in mac_of and tap in mac_of}
    taps = {phy: tap for phy, tap in taps.items() if tap in macs}
    links = {pair.vif_index: pair.phy_sw_if_index for pair in pairs if pair.phy_sw_if_index in taps}
    return InterfaceIndexes(up, frozenset(mac_of), taps, macs, links)


async def _read_pairs(client: VppClient) -> list[Any]:
    """Return linux-cp's pairs. There are none if VPP runs without that plugin. Raises VppError."""
    return await client.stream("lcp_itf_pair_get") if client.codec.knows("lcp_itf_pair_get") else []


async def read_neighbors(client: VppClient) -> dict[Neighbor, bytes]:
    """Return the neighbors on taps that stand for the kernel, with their MACs. Raises VppError."""
    neighbors = {}
    for pair in await _read_pairs(client):
        for ip6 in (False, True):
            of = {"sw_if_index": pair.host_sw_if_index, "af": int(ip6)}
            for details in await client.dump("ip_neighbor_dump", of):
                if _bytes(details.neighbor.ip_address) == KERNEL_NEXT_HOP[ip6]:
                    neighbors[Neighbor(pair.host_sw_if_index, ip6)] = bytes(details.neighbor.mac_address)
    return neighbors


async def read_mtu(client: VppClient, sw_if_index: int, ip6: bool) -> int:
    """Return the MTU of an interface for a family, bytes; 0 if there is no such interface. Raises VppError."""
    for itf in await client.dump("sw_interface_dump", {"sw_if_index": sw_if_index}):
        mtu = int(itf.mtu[_IP6_MTU if ip6 else _IP4_MTU] or itf.mtu[_L3_MTU])
        if mtu or itf.sup_sw_if_index == sw_if_index:
            return mtu
        return await read_mtu(client, itf.sup_sw_if_index, ip6)  # vnet_sw_interface_get_mtu, src/vnet/interface_funcs.h
    return 0


async def read_addresses(client: VppClient, interfaces: Iterable[int]) -> dict[bytes, int]:
    """Return the addresses of interfaces, each with the sw_if_index of its interface. Raises VppError."""
    addresses: dict[bytes, int] = {}
    for index in interfaces:
        for is_ip6 in (False, True):
            for details in await client.dump("ip_address_dump", {"sw_if_index": index, "is_ipv6": is_ip6}):
                addresses.setdefault(_bytes(details.prefix.address), index)
    return addresses


async def read_gre_ipip(client: VppClient, first: int, last: int) -> dict[GreIpipInterface, Protection | None]:
    """Return VPP's gre and ipip interfaces with their protection, except those that foreign SAs protect.

    `sad_id`s from `first` to `last` are the service's. Raises VppError.
    """
    found: dict[GreIpipInterface, Protection | None] = {}
    for gre_ipip in await _read_tunnels(client):
        protection = (await read_protections(client, gre_ipip.sw_if_index)).get(gre_ipip.sw_if_index)
        named = () if protection is None else protection.sad_ids
        if all(first <= sad_id <= last or sad_id == BLOCK_SAD_ID for sad_id in named):
            found[gre_ipip] = protection
    return found


async def _read_tunnels(client: VppClient) -> list[GreIpipInterface]:
    found = []
    for message in [name for name in _GRE_DUMPS if client.codec.knows(name)][:1]:
        for details in await client.dump(message, _all_interfaces()):
            found.append(_gre(details.tunnel))
    if client.codec.knows("ipip_tunnel_dump"):
        for details in await client.dump("ipip_tunnel_dump", _all_interfaces()):
            found.append(_ipip(details.tunnel))
    return found


def _gre(tunnel: Any) -> GreIpipInterface:
    unsupported_reason = _L2_KINDS.get(int(tunnel.type), "") or _unsupported_reason(tunnel, tunnel.outer_table_id)
    if not unsupported_reason and getattr(tunnel, "key", False):
        unsupported_reason = (
            "it has a key: VPP would decrypt its packets wrongly"  # is_tun in src/vnet/ipsec/esp_decrypt.c
        )
    return _gre_ipip(tunnel, f"gre{tunnel.instance}", (_GRE,), unsupported_reason)


def _ipip(tunnel: Any) -> GreIpipInterface:
    return _gre_ipip(tunnel, f"ipip{tunnel.instance}", _IPIP, _unsupported_reason(tunnel, tunnel.table_id))


def _unsupported_reason(tunnel: Any, table: int) -> str:
    if int(tunnel.mode) != _P2P or not any(_bytes(tunnel.dst)):
        return "it has several remotes"
    return f"its packets are routed by table {table}" if table else ""


def _gre_ipip(tunnel: Any, name: str, protos: tuple[int, ...], unsupported_reason: str) -> GreIpipInterface:
    local, remote = _bytes(tunnel.src), _bytes(tunnel.dst)
    return GreIpipInterface(
        tunnel.sw_if_index, name, local, remote.ljust(len(local), b"\0"), protos, unsupported_reason
    )


async def read_protections(client: VppClient, sw_if_index: int = NO_INDEX) -> Mapping[int, Protection]:
    """Return the protections of all interfaces, or of one, by sw_if_index. Raises VppError."""
    found = {}
    for details in await client.dump("ipsec_tunnel_protect_dump", {"sw_if_index": sw_if_index}):
        tun = details.tun
        found[tun.sw_if_index] = Protection(tun.sa_out, tuple(tun.sa_in[: tun.n_sa_in]))
    return found


def supported_ciphers(client: VppClient) -> frozenset[CryptoAlg]:
    """Return the ciphers that the API of this VPP has."""
    known = client.codec.enum_values("vl_api_ipsec_crypto_alg_t")
    return frozenset(cipher for cipher in CryptoAlg if cipher.value in known)


async def _route_source(client: VppClient) -> int:
    """Return the service's FIB source; add it if it is missing. VPP would accept a second one of the same name."""
    for details in await client.dump("fib_source_dump"):
        if details.src.name == FIB_SOURCE:
            return int(details.src.id)
    reply = await client.call("fib_source_add", {"src": {"priority": FIB_PRIORITY, "id": 0, "name": FIB_SOURCE}})
    return int(reply.id)


def _all_interfaces() -> dict[str, int]:
    return {"sw_if_index": NO_INDEX}


def _bytes(address: Any) -> bytes:
    """Return the bytes of vl_api_address_t."""
    return bytes(address.un.ip4 if int(address.af) == 0 else address.un.ip6)


def _found_acl(details: Any) -> FoundAcl:
    return FoundAcl(details.acl_index, details.tag, tuple(map(_acl_rule, details.r)))


def _acl_rule(rule: Any) -> Rule:
    return Rule(
        bool(int(rule.is_permit)),
        Prefix(_bytes(rule.src_prefix.address), rule.src_prefix.len),
        Prefix(_bytes(rule.dst_prefix.address), rule.dst_prefix.len),
        int(rule.proto),
        (rule.srcport_or_icmptype_first, rule.srcport_or_icmptype_last),
        (rule.dstport_or_icmpcode_first, rule.dstport_or_icmpcode_last),
    )


def _sa_spec(entry: Any) -> SaSpec:
    """Return the SA for ipsec_sad_entry_v4 as VPP dumps it: with the salt's bytes swapped and IS_TUNNEL_V6 added."""
    flags = int(entry.flags) & ~SadFlag.IS_TUNNEL_V6
    return SaSpec(
        spi=entry.spi,
        src=_bytes(entry.tunnel.src),
        dst=_bytes(entry.tunnel.dst),
        crypto=CryptoAlg(int(entry.crypto_algorithm)),
        crypto_key=bytes(entry.crypto_key.data[: entry.crypto_key.length]),
        integ=IntegAlg(int(entry.integrity_algorithm)),
        integ_key=bytes(entry.integrity_key.data[: entry.integrity_key.length]),
        flags=flags,
        tunnel_flags=int(entry.tunnel.encap_decap_flags),
        salt=int.from_bytes(entry.salt.to_bytes(4, "little"), "big"),
        udp_src_port=entry.udp_src_port,
        udp_dst_port=entry.udp_dst_port,
        replay_window=entry.anti_replay_window_size if flags & SadFlag.USE_ANTI_REPLAY else 0,
    )
