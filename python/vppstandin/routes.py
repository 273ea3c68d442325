"""The stand-in's API of tables and routes (src/vnet/ip/ip_api.c, src/vnet/fib/fib_api.c).

It supports paths into an interface, interface-rx paths, paths that drop, paths to the router itself, and lookups in another
table. It adds and removes all paths of a route at once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vppstandin.base import (
    INVALID_PREFIX_LENGTH,
    NO_INDEX,
    NO_MATCHING_INTERFACE,
    NO_PATHS_IN_ROUTE,
    NO_SUCH_ENTRY,
    NO_SUCH_FIB,
    UNIMPLEMENTED,
    Death,
    Refusal,
    ReplyFields,
    address_of,
    address_reply,
)
from vppstandin.fib import (
    PATH_DROP,
    PATH_INTERFACE_RX,
    PATH_LOCAL,
    PATH_NORMAL,
    SOURCE_API,
    Fib,
    FibPath,
    Net,
    TableKey,
    Tables,
    network,
)
from vppstandin.interfaces import Interfaces

_UNKNOWN_PROTOCOL = -1
_API_IP4, _API_IP6, _PROTOCOLS = 0, 1, 5


class Routes:
    """Handlers of tables, FIB sources and routes."""

    def __init__(self, tables: Tables, interfaces: Interfaces) -> None:
        self._tables = tables
        self._interfaces = interfaces

    def ip_table_add_del_v2(self, message: Any) -> ReplyFields:
        key = TableKey(message.table.table_id, bool(message.table.is_ip6))
        if message.is_add:
            self._tables.add(key, message.table.name, bool(message.create_mfib))
        else:
            self._tables.delete(key)
        return {}

    def ip_table_dump(self, message: Any) -> list[ReplyFields]:
        fibs = sorted(self._tables.fibs.values(), key=lambda fib: (fib.key.is_ip6, fib.slot))
        return [{"table": {"table_id": fib.key.table_id, "is_ip6": fib.key.is_ip6, "name": fib.name}} for fib in fibs]

    def fib_source_add(self, message: Any) -> ReplyFields:
        return {"id": self._tables.sources.add(message.src.name, message.src.priority)}

    def fib_source_dump(self, message: Any) -> list[ReplyFields]:
        return [
            {"src": {"priority": priority, "id": number, "name": name}}
            for number, (name, priority) in self._tables.sources.added.items()
        ]

    def _fib(self, table_id: int, address: bytes) -> Fib:
        fib = self._tables.fibs.get(TableKey(table_id, len(address) == 16))
        if fib is None:
            raise Refusal(NO_SUCH_FIB)
        return fib

    def ip_route_add_del_v2(self, message: Any) -> ReplyFields:
        route = message.route
        address, length = address_of(route.prefix.address), int(route.prefix.len)
        fib = self._fib(route.table_id, address)
        paths = [self.path(path) for path in route.paths]
        source = route.src or SOURCE_API
        if length > 8 * len(address):
            raise Refusal(INVALID_PREFIX_LENGTH)
        if message.is_multipath:
            raise Refusal(UNIMPLEMENTED)  # VPP supports adding and removing single paths
        if not message.is_add:
            fib.drop(address, length, source)
            return {"stats_index": NO_INDEX}
        if not paths:
            raise Refusal(NO_PATHS_IN_ROUTE)
        if length == 8 * len(address):
            paths = [_to_host(path, address) for path in paths]
        net = Net(network(address, length), length)
        fib.put(net.address, net.length, source, *sorted(paths, key=_order))
        return {"stats_index": fib.entries[net].stats_index}

    def path(self, path: Any) -> FibPath:
        """Return a decoded path, as fib_api_path_decode does. Raises Refusal and Death."""
        kind, proto = int(path.type), int(path.proto)
        if proto >= _PROTOCOLS:
            raise Refusal(_UNKNOWN_PROTOCOL)
        if proto not in (_API_IP4, _API_IP6) or kind not in (PATH_NORMAL, PATH_LOCAL, PATH_DROP, PATH_INTERFACE_RX):
            raise Refusal(UNIMPLEMENTED)  # VPP supports more
        if kind == PATH_LOCAL and (path.sw_if_index != NO_INDEX or any(bytes(path.nh.address.ip6))):
            raise Refusal(UNIMPLEMENTED)  # in VPP: an address of an interface
        is_ip6 = proto == _API_IP6
        weight, preference = path.weight or 1, path.preference
        if kind == PATH_INTERFACE_RX:
            if path.sw_if_index not in self._interfaces.by_index:
                raise Death("packets would be received on an interface that is not there: the first one kills VPP")
            return FibPath(path.sw_if_index, kind, b"", is_ip6, None, weight, preference)
        if kind != PATH_NORMAL:
            return FibPath(NO_INDEX, kind, b"", is_ip6, None, weight, preference)
        next_hop = bytes(path.nh.address.ip6)[: 16 if is_ip6 else 4]
        if path.sw_if_index == NO_INDEX:
            if path.rpf_id not in (0, NO_INDEX) or any(next_hop):
                raise Refusal(UNIMPLEMENTED)  # in VPP: lookup in a multicast table, or recursion through the next hop
            table = TableKey(path.table_id, is_ip6)
            if table not in self._tables.fibs:
                raise Refusal(NO_SUCH_FIB)
            return FibPath(NO_INDEX, PATH_NORMAL, b"", is_ip6, table, weight, preference)
        if path.sw_if_index not in self._interfaces.by_index:
            raise Refusal(NO_MATCHING_INTERFACE)
        return FibPath(path.sw_if_index, PATH_NORMAL, next_hop, is_ip6, None, weight, preference)

    def ip_route_lookup_v2(self, message: Any) -> ReplyFields:
        address = address_of(message.prefix.address)
        fib = self._fib(message.table_id, address)
        net = fib.lookup(address, int(message.prefix.len), bool(message.exact))
        if net is None:
            raise Refusal(NO_SUCH_ENTRY)
        return {"route": _route_reply(fib, net)}

    def ip_route_v2_dump(self, message: Any) -> list[ReplyFields]:
        fib = self._tables.fibs.get(TableKey(message.table.table_id, bool(message.table.is_ip6)))
        return [] if fib is None else [{"route": _route_reply(fib, net)} for net, _ in fib.of_source(message.src)]


def _to_host(path: FibPath, address: bytes) -> FibPath:
    """Return a host route's path with the host as next hop on its interface (fib_table_route_path_fixup)."""
    if path.kind != PATH_NORMAL or path.sw_if_index == NO_INDEX or any(path.next_hop):
        return path
    return replace(path, next_hop=address)


def _order(path: FibPath) -> tuple[int, bool, int, bytes]:
    """Return the sort key of VPP's order of paths (fib_path_cmp_for_sort, for the kinds of path that are supported here)."""
    return path.preference, path.kind == PATH_INTERFACE_RX, path.sw_if_index, path.next_hop


def _route_reply(fib: Fib, net: Net) -> ReplyFields:
    best = fib.best(net)
    assert best is not None
    source, paths = best
    entry = fib.entries[net]
    prefix = {"address": address_reply(entry.shown), "len": net.length}
    route = {"table_id": fib.key.table_id, "stats_index": entry.stats_index, "prefix": prefix, "src": source}
    return route | {"n_paths": len(paths), "paths": [path_reply(path) for path in paths]}


def path_reply(path: FibPath) -> ReplyFields:
    """Return vl_api_fib_path_t as fib_api_path_encode fills it."""
    return {
        "sw_if_index": path.sw_if_index,
        "table_id": path.table.table_id if path.table is not None else 0,
        "weight": path.weight,
        "preference": path.preference,
        "type": path.kind,
        "proto": int(path.is_ip6),
        "nh": {"address": {"ip6": path.next_hop.ljust(16, b"\0")}},
        "n_labels": 0,
        "label_stack": [{"is_uniform": 0, "label": 0, "ttl": 0, "exp": 0}] * 16,
    }
