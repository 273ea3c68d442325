"""The stand-in's multicast tables: groups that VPP delivers to the router (src/vnet/ip/ip_api.c, src/vnet/mfib/mfib_table.c).

VPP creates a multicast table with the unicast table of the same number, on request, and deletes it with that table.
"""

from __future__ import annotations

from typing import Any

from vppstandin.base import NO_INDEX, NO_SUCH_FIB, UNIMPLEMENTED, Refusal, ReplyFields
from vppstandin.fib import PATH_LOCAL, FibPath, Net, TableKey, Tables, network
from vppstandin.routes import path_reply

_ACCEPT_ALL, _FORWARD = 8, 4  # MFIB_API_ENTRY_FLAG_ACCEPT_ALL_ITF, MFIB_API_ITF_FLAG_FORWARD


class Multicast:
    """Handlers of multicast groups. Supports only groups for the router itself that accept packets from every interface."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def ip_mroute_add_del(self, message: Any) -> ReplyFields:
        route = message.route
        prefix = route.prefix
        is_ip6 = bool(int(prefix.af))
        groups = self._groups(TableKey(route.table_id, is_ip6))
        if groups is None:
            raise Refusal(NO_SUCH_FIB)
        paths = [(int(path.itf_flags), int(path.path.type), path.path.sw_if_index) for path in route.paths]
        is_supported = paths == [(_FORWARD, PATH_LOCAL, NO_INDEX)] and int(route.entry_flags) == _ACCEPT_ALL
        if not message.is_add or not is_supported or any(bytes(prefix.src_address.ip6)):
            raise Refusal(UNIMPLEMENTED)  # VPP supports more
        address = bytes(prefix.grp_address.ip6)[: 16 if is_ip6 else 4]
        length = min(prefix.grp_address_length, 8 * len(address))
        groups[Net(network(address, length), length)] = True
        return {"stats_index": 0}

    def ip_mroute_dump(self, message: Any) -> list[ReplyFields]:
        key = TableKey(message.table.table_id, bool(message.table.is_ip6))
        return [_route_reply(key, net, is_same_group) for net, is_same_group in (self._groups(key) or {}).items()]

    def _groups(self, key: TableKey) -> dict[Net, bool] | None:
        fib = self._tables.fibs.get(key)
        return None if fib is None else fib.groups


def _route_reply(key: TableKey, net: Net, is_same_group: bool) -> ReplyFields:
    paths = [path_reply(FibPath(NO_INDEX, PATH_LOCAL, is_ip6=key.is_ip6))] if is_same_group else []
    addresses = {"grp_address": {"ip6": net.address.ljust(16, b"\0")}, "src_address": {"ip6": bytes(16)}}
    prefix = {"af": int(key.is_ip6), "grp_address_length": net.length} | addresses
    route = {"table_id": key.table_id, "entry_flags": 0, "rpf_id": 0, "prefix": prefix, "n_paths": len(paths)}
    return {"route": route | {"paths": [{"itf_flags": 0, "path": path} for path in paths]}}
