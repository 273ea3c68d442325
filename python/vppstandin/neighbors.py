"""The stand-in's neighbors: the MAC of an address on an interface (src/vnet/ip-neighbor/ip_neighbor_api.c)."""

from __future__ import annotations

from typing import Any, NamedTuple

from vppstandin.base import NO_INDEX, NO_SUCH_ENTRY, Refusal, ReplyFields, address_of, address_reply
from vppstandin.interfaces import Interfaces

_NO_FIB_ENTRY = 2  # IP_API_NEIGHBOR_FLAG_NO_FIB_ENTRY


class NeighborKey(NamedTuple):
    """Names a neighbor."""

    sw_if_index: int
    address: bytes


class NeighborEntry(NamedTuple):
    """A neighbor's MAC, and its flags of vl_api_ip_neighbor_flags_t."""

    mac: bytes
    flags: int


class Neighbors:
    """Handlers of neighbors. There are only those that the API adds."""

    def __init__(self, interfaces: Interfaces) -> None:
        self.by_key: dict[NeighborKey, NeighborEntry] = {}
        self._interfaces = interfaces
        interfaces.on_remove.append(self._forget)

    def ip_neighbor_add_del(self, message: Any) -> ReplyFields:
        given = message.neighbor
        key = NeighborKey(self._interfaces.get(given.sw_if_index).sw_if_index, address_of(given.ip_address))
        if message.is_add:
            self.by_key.pop(key, None)  # a changed neighbor moves to the end
            self.by_key[key] = NeighborEntry(bytes(given.mac_address), int(given.flags))
            return {"stats_index": NO_INDEX if int(given.flags) & _NO_FIB_ENTRY else 0}
        if key not in self.by_key:
            raise Refusal(NO_SUCH_ENTRY)
        del self.by_key[key]
        return {"stats_index": NO_INDEX}

    def ip_neighbor_dump(self, message: Any) -> list[ReplyFields]:
        size = 16 if int(message.af) else 4
        return [
            {
                "age": 0.0,
                "neighbor": {
                    "sw_if_index": key.sw_if_index,
                    "flags": neighbor.flags,
                    "mac_address": neighbor.mac,
                    "ip_address": address_reply(key.address),
                },
            }
            for key, neighbor in self.by_key.items()
            if len(key.address) == size and message.sw_if_index in (NO_INDEX, key.sw_if_index)
        ]

    def _forget(self, sw_if_index: int) -> None:
        """Remove the neighbors of a deleted interface."""
        self.by_key = {key: neighbor for key, neighbor in self.by_key.items() if key.sw_if_index != sw_if_index}
