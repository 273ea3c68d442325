"""The stand-in's interfaces, their addresses and flags (src/vnet/interface_api.c, src/vnet/ip/ip_api.c)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vppstandin.base import (
    ADDRESS_FOUND_FOR_INTERFACE,
    ADDRESS_IN_USE,
    ADDRESS_NOT_FOUND_FOR_INTERFACE,
    INVALID_SW_IF_INDEX,
    INVALID_SW_IF_INDEX_2,
    IP6_NOT_ENABLED,
    NO_INDEX,
    NO_SUCH_FIB,
    UNEXPECTED_INTF_STATE,
    VALUE_EXIST,
    Pool,
    Refusal,
    ReplyFields,
    address_of,
    address_reply,
)
from vppstandin.fib import PATH_LOCAL, SOURCE_INTERFACE, FibPath, TableKey, Tables, network


@dataclass(slots=True)
class Interface:
    """An interface of VPP."""

    sw_if_index: int
    name: str
    kind: str
    mac: bytes = bytes(6)
    instance: int = NO_INDEX
    tag: str = ""
    up: bool = False
    ip6: bool = False
    mtu: list[int] = field(default_factory=lambda: [9000, 0, 0, 0])
    """MTUs of layer 3, IPv4, IPv6 and MPLS, bytes."""
    link_mtu: int = 0
    unnumbered_from: int | None = None
    addresses: list[tuple[bytes, int]] = field(default_factory=list)
    tables: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    """FIB tables in which VPP looks up packets that it receives, by `is_ip6`."""


class Interfaces:
    """All interfaces by sw_if_index."""

    def __init__(self, tables: Tables) -> None:
        self.by_index: dict[int, Interface] = {0: Interface(0, "local0", "local", mtu=[0, 0, 0, 0])}
        self.events: list[tuple[int, int, bool]] = []
        """Events that are not sent yet: sw_if_index, flags, deleted."""
        self.on_remove: list[Callable[[int], object]] = []
        """Called with the sw_if_index of an interface that is being deleted."""
        self.pool = Pool(1)
        self._tables = tables
        self._loopbacks = 0

    def get(self, index: int, error: int = INVALID_SW_IF_INDEX) -> Interface:
        """Return an interface. Raises Refusal with `error` if there is none."""
        found = self.by_index.get(index)
        if found is None:
            raise Refusal(error)
        return found

    def add(self, name: str, kind: str, mac: bytes = bytes(6), instance: int = NO_INDEX, link_mtu: int = 0) -> int:
        """Add an interface and return its sw_if_index."""
        index = self.pool.take()
        self.by_index[index] = Interface(index, name, kind, mac, instance, link_mtu=link_mtu)
        return index

    def remove(self, itf: Interface) -> None:
        """Delete an interface, its routes, its hold of tables, and whatever `on_remove` deletes."""
        for address, length in itf.addresses:
            self._route_address(itf, address, length, False)
        for is_ip6 in (False, True):
            self._bind(itf, TableKey(0, is_ip6))
        for forget in self.on_remove:
            forget(itf.sw_if_index)
        del self.by_index[itf.sw_if_index]
        self.pool.give(itf.sw_if_index)
        self.events.append((itf.sw_if_index, 0, True))

    def want_interface_events(self, message: Any) -> ReplyFields:
        return {}

    def sw_interface_dump(self, message: Any) -> list[ReplyFields]:
        one = message.sw_if_index not in (0, NO_INDEX)
        return [
            self._details(itf)
            for index, itf in sorted(self.by_index.items())
            if not one or index == message.sw_if_index
        ]

    def _details(self, itf: Interface) -> ReplyFields:
        return {
            "sw_if_index": itf.sw_if_index,
            "sup_sw_if_index": itf.sw_if_index,
            "l2_address": itf.mac,
            "flags": 3 if itf.up else 0,
            "mtu": itf.mtu,
            "link_mtu": itf.link_mtu,
            "interface_name": itf.name,
            "interface_dev_type": itf.kind,
            "tag": itf.tag,
        }

    def create_loopback_instance(self, message: Any) -> ReplyFields:
        index = self.add(f"loop{self._loopbacks}", "Loopback", bytes(message.mac_address), link_mtu=9000)
        self._loopbacks += 1
        return {"sw_if_index": index}

    def delete_loopback(self, message: Any) -> ReplyFields:
        itf = self.get(message.sw_if_index)
        if itf.kind != "Loopback":
            raise Refusal(INVALID_SW_IF_INDEX)
        self.remove(itf)
        return {}

    def sw_interface_set_flags(self, message: Any) -> ReplyFields:
        self.set_up(message.sw_if_index, bool(int(message.flags) & 1))
        return {}

    def sw_interface_set_mtu(self, message: Any) -> ReplyFields:
        self.get(message.sw_if_index).mtu = list(message.mtu)
        return {}

    def set_up(self, index: int, up: bool) -> None:
        """Bring an interface up or down. Raises Refusal."""
        itf = self.get(index)
        if up != itf.up:
            itf.up = up
            self.events.append((itf.sw_if_index, 3 if up else 0, False))

    def sw_interface_add_del_address(self, message: Any) -> ReplyFields:
        itf = self.get(message.sw_if_index)
        entry = (address_of(message.prefix.address), int(message.prefix.len))
        if message.is_add:
            if any(self._conflicts(itf, other, entry) for other in self.by_index.values()):
                raise Refusal(ADDRESS_IN_USE)
            itf.addresses.append(entry)
            itf.ip6 |= len(entry[0]) == 16
        elif entry in itf.addresses:
            itf.addresses.remove(entry)
        else:
            raise Refusal(ADDRESS_NOT_FOUND_FOR_INTERFACE)
        self._route_address(itf, *entry, bool(message.is_add))
        return {}

    def _conflicts(self, itf: Interface, other: Interface, entry: tuple[bytes, int]) -> bool:
        """Return whether an address that `other` has in the same table prevents an interface from having `entry`."""
        (address, length), is_ip6 = entry, len(entry[0]) == 16
        return other.tables[is_ip6] == itf.tables[is_ip6] and any(
            len(known) == len(address)
            and network(known, shorter) == network(address, shorter)
            and not (other is itf and known_length == length and known != address)
            for known, known_length in other.addresses
            for shorter in (min(length, known_length),)
        )

    def _route_address(self, itf: Interface, address: bytes, length: int, is_add: bool) -> None:
        """Add or remove the routes of an interface's address: to its network, and to the address itself."""
        whole, is_ip6, index = 8 * len(address), len(address) == 16, itf.sw_if_index
        fib = self._tables.fibs[TableKey(itf.tables[is_ip6], is_ip6)]
        if not is_add:
            fib.drop(address, length, SOURCE_INTERFACE)
            fib.drop(address, whole, SOURCE_INTERFACE)
            return
        if length < whole:
            shown = network(address, length) if is_ip6 else address
            fib.put(shown, length, SOURCE_INTERFACE, FibPath(index, is_ip6=is_ip6))
        fib.put(address, whole, SOURCE_INTERFACE, FibPath(index, PATH_LOCAL, address, is_ip6))

    def sw_interface_set_table(self, message: Any) -> ReplyFields:
        itf, key = self.get(message.sw_if_index), TableKey(message.vrf_id, bool(message.is_ipv6))
        if key not in self._tables.fibs:
            raise Refusal(NO_SUCH_FIB)
        if self._addresses_of(itf, key.is_ip6):
            raise Refusal(ADDRESS_FOUND_FOR_INTERFACE)
        self._bind(itf, key)
        return {}

    def _bind(self, itf: Interface, key: TableKey) -> None:
        """Bind an interface to a table, which it then holds.

        VPP releases the former table first, even if it is the same one.
        """
        before = TableKey(itf.tables[key.is_ip6], key.is_ip6)
        itf.tables[key.is_ip6] = key.table_id
        self._tables.hold(key if key.table_id else None)
        self._tables.release(before if before.table_id else None)

    def sw_interface_get_table(self, message: Any) -> ReplyFields:
        return {"vrf_id": self.get(message.sw_if_index).tables[bool(message.is_ipv6)]}

    def sw_interface_tag_add_del(self, message: Any) -> ReplyFields:
        itf = self.get(message.sw_if_index)
        itf.tag = message.tag if message.is_add else ""
        return {}

    def sw_interface_set_unnumbered(self, message: Any) -> ReplyFields:
        borrower = self.get(message.unnumbered_sw_if_index)
        unnumbered_from = self.get(message.sw_if_index, INVALID_SW_IF_INDEX_2)
        if message.is_add and unnumbered_from.tables[False] != borrower.tables[False]:
            raise Refusal(UNEXPECTED_INTF_STATE)
        borrower.unnumbered_from = unnumbered_from.sw_if_index if message.is_add else None
        return {}

    def sw_interface_ip6_enable_disable(self, message: Any) -> ReplyFields:
        itf = self.get(message.sw_if_index)
        if itf.ip6 == bool(message.enable):
            raise Refusal(VALUE_EXIST if message.enable else IP6_NOT_ENABLED)
        itf.ip6 = bool(message.enable)
        return {}

    def ip_address_dump(self, message: Any) -> list[ReplyFields]:
        itf = self.by_index.get(message.sw_if_index)
        return [
            {"sw_if_index": message.sw_if_index, "prefix": {"address": address_reply(address), "len": length}}
            for address, length in ([] if itf is None else self._addresses_of(itf, bool(message.is_ipv6)))
        ]

    def _addresses_of(self, itf: Interface, is_ip6: bool) -> list[tuple[bytes, int]]:
        """Return the addresses of a family that an interface has or borrows."""
        source = itf if itf.unnumbered_from is None else self.by_index.get(itf.unnumbered_from, itf)
        return [entry for entry in source.addresses if (len(entry[0]) == 16) == is_ip6]

    def ip_unnumbered_dump(self, message: Any) -> list[ReplyFields]:
        return [
            {"sw_if_index": index, "ip_sw_if_index": itf.unnumbered_from}
            for index, itf in sorted(self.by_index.items())
            if itf.unnumbered_from is not None and message.sw_if_index in (NO_INDEX, index)
        ]
