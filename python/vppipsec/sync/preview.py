"""Lists what would change in VPP now, in order, without changing it: the engine runs with a dry-run client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vppipsec.conf.settings import Settings
from vppipsec.kernel.text import format_addr
from vppipsec.sync.actual.vtis import RouteSource
from vppipsec.sync.engine import Engine
from vppipsec.sync.journal import count_text
from vppipsec.sync.kernel_watcher import KernelSource
from vppipsec.vpp.api.abf import AbfAttach, AbfPolicyAddDel
from vppipsec.vpp.api.acl import AclAddReplace, AclDel, SetInterfaceAcls
from vppipsec.vpp.api.client import Reply, VppClient, connect
from vppipsec.vpp.api.interface import (
    GetInterfaceTable,
    InterfaceAddressAddDel,
    SetInterfaceMtu,
    SetInterfaceTable,
    SetInterfaceTag,
    SetInterfaceUp,
    SetUnnumbered,
)
from vppipsec.vpp.api.ip import DisableIp6, EnableIp6, MrouteAdd, NeighborAddDel, RouteAddDel, RouteLookup, TableAddDel
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
from vppipsec.vpp.ownership import BLOCK_SAD_ID
from vppipsec.vpp.types import INTERFACE_RX, LOCAL_INDEX, NO_INDEX, Prefix, interfaces_of

_FIRST_FAKE_INDEX = 0x80000000  # higher than any sw_if_index of a running VPP
_FAKE_SOURCE = 255


class DryRunClient(VppClient):
    """Passes reading requests on to VPP, and answers changing requests itself, with success."""

    def __init__(self, client: VppClient) -> None:
        super().__init__()
        self.requests: list[Request] = []
        self.names: dict[int, str] = {}
        self._client = client
        self._codec = client.codec

    async def run(self, requests: Sequence[Request]) -> list[Reply]:
        if all(isinstance(request, RouteLookup | GetInterfaceTable) for request in requests):
            return await self._client.run(requests)
        replies = []
        for request in requests:
            index = _FIRST_FAKE_INDEX + len(self.requests)
            if isinstance(request, IpsecItfCreate):
                self.names[index] = f"ipsec{request.instance}"
            self.requests.append(request)
            replies.append(Reply(0, index))
        return replies

    async def call(self, message: str, arguments: Mapping[str, Any] | None = None) -> Any:
        if message in ("want_interface_events", "acl_stats_intf_counters_enable"):
            return None
        if message == "fib_source_add":
            return _FibSourceReply(_FAKE_SOURCE)
        return await self._client.call(message, arguments)

    async def dump(self, message: str, arguments: Mapping[str, Any] | None = None) -> list[Any]:
        if message == "ip_route_v2_dump" and arguments is not None and arguments["src"] == _FAKE_SOURCE:
            return []
        details = await self._client.dump(message, arguments)
        if message == "sw_interface_dump":
            self.names.update({itf.sw_if_index: itf.interface_name for itf in details})
        return details

    async def stream(self, message: str) -> list[Any]:
        return await self._client.stream(message)


class _FibSourceReply:
    """The reply that fib_source_add would give."""

    def __init__(self, number: int) -> None:
        self.id = number


async def dry_run(settings: Settings, source: KernelSource, routes: RouteSource | None = None) -> list[str]:
    """Return, a line each, the requests that would make VPP equal to the kernel now. Raises VppError and OSError."""
    engine = Engine(settings, source, routes=routes)
    engine.model.replace(await source.dump_sas(), await source.dump_policies())
    await engine.read_routes()
    vpp_client = await connect(settings.vpp.api_socket, "vpp-ipsec plan")
    try:
        client = DryRunClient(vpp_client)
        await engine.adopt_vpp(client)
        await engine.reconcile(client)
    finally:
        await vpp_client.close()
    return [describe_request(request, client.names) for request in client.requests]


def describe_request(request: Request, names: Mapping[int, str]) -> str:
    """Return what a request does, without keys. `names` are VPP's interfaces by sw_if_index."""

    def name(index: int) -> str:
        return names.get(index, f"sw_if_index {index}")

    match request:
        case SadEntryAdd(sad_id) if sad_id == BLOCK_SAD_ID:
            return f"add the SA {sad_id:#x} that sends nothing"
        case SadEntryAdd(sad_id, sa):
            kind = "inbound" if sa.inbound else "outbound"
            algorithms = sa.crypto.name if not sa.integ else f"{sa.crypto.name} {sa.integ.name}"
            return f"add {kind} SA {sad_id:#x}: spi {sa.spi:#010x} {format_addr(sa.src)} > {format_addr(sa.dst)} {algorithms}"
        case SadEntryUpdate(sad_id, src, dst):
            return f"set UDP ports of SA {sad_id:#x} to {src} > {dst}"
        case SadEntryDel(sad_id):
            return f"delete SA {sad_id:#x}"
        case IpsecItfCreate(instance):
            return f"create interface ipsec{instance}"
        case IpsecItfDelete(index):
            return f"delete interface {name(index)}"
        case SetInterfaceTag(index, tag):
            return f"tag {name(index)} '{tag}'"
        case SetUnnumbered(index, unnumbered_from, is_add):
            return f"let {name(index)} {'borrow' if is_add else 'no longer borrow'} the addresses of {name(unnumbered_from)}"
        case SetInterfaceTable(index, ip6, table):
            return f"have {'IPv6' if ip6 else 'IPv4'} packets on {name(index)} looked up in FIB table {table:#x}"
        case InterfaceAddressAddDel(index, address, is_add):
            return f"{'give' if is_add else 'take from'} {name(index)} the address {format_addr(address)}"
        case EnableIp6(index):
            return f"let {name(index)} pass IPv6"
        case DisableIp6(index):
            return f"let {name(index)} pass no IPv6"
        case SetInterfaceUp(index):
            return f"set {name(index)} up"
        case SetInterfaceMtu(index, mtu):
            return f"let {name(index)} take packets of {mtu} bytes"
        case TunnelProtect(index, outbound) if outbound == BLOCK_SAD_ID:
            return f"let {name(index)} send nothing"
        case TunnelProtect(index, outbound, inbound):
            return (
                f"protect {name(index)} with SA {outbound:#x} out, {', '.join(f'{sad_id:#x}' for sad_id in inbound)} in"
            )
        case TunnelUnprotect(index):
            return f"remove the protection of {name(index)}"
        case AclAddReplace(index, _, rules):
            return f"{'make an ACL' if index == NO_INDEX else f'replace ACL {index} by one'} of {count_text(len(rules), 'rule')}"
        case AclDel(index):
            return f"delete ACL {index}"
        case SetInterfaceAcls(index, acl):
            return f"{'no longer filter' if acl == NO_INDEX else 'filter'} what {name(index)} receives"
        case TableAddDel(number, ip6, _, is_add):
            return f"{'make' if is_add else 'remove'} FIB table {number:#x} of {'IPv6' if ip6 else 'IPv4'}"
        case AbfPolicyAddDel(number, _, _, _, is_add):
            if not is_add:
                return f"remove ABF policy {number:#x}"
            return f"make ABF policy {number:#x}: what its ACL permits is looked up in table {number:#x}"
        case AbfAttach(number, index, _, _, is_add):
            return (
                f"{'attach' if is_add else 'detach'} ABF policy {number:#x} {'to' if is_add else 'from'} {name(index)}"
            )
        case NeighborAddDel(index, ip6, _, is_add):
            family = "IPv6" if ip6 else "IPv4"
            return f"{'let' if is_add else 'no longer let'} {family} packets on {name(index)} reach the kernel"
        case MrouteAdd(table, ip6):
            return f"receive {'IPv6' if ip6 else 'IPv4'} multicast of links in table {table:#x}"
        case LcpPairAddDel(index, host, is_add):
            return f"{'give' if is_add else 'take from'} {name(index)} the host interface {host}"
        case RouteAddDel(paths, prefix, _, is_add, table):
            where = f" in table {table:#x}" if table else ""
            if not is_add:
                return f"remove route {_prefix_text(prefix)}{where}"
            ends = [_FIXED_ENDS.get(index) or _into_text(index, name) for index in interfaces_of(paths)]
            return f"route {_prefix_text(prefix)}{where} {' and '.join(ends)}"
    return request.message


def _into_text(paths: int, name: Callable[[int], str]) -> str:
    return f"to be received on {name(paths - INTERFACE_RX)}" if paths >= INTERFACE_RX else f"into {name(paths)}"


_FIXED_ENDS = {NO_INDEX: "to drop", LOCAL_INDEX: "to the router itself"}


def _prefix_text(prefix: Prefix) -> str:
    return f"{format_addr(prefix.address)}/{prefix.length}"
