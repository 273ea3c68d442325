"""The stand-in's FIB tables: routes by prefix and source. If several sources have one prefix, the best source wins.

Sources and priorities are from src/vnet/fib/fib_source.h of VPP 26.06, tables and their locks from src/vnet/fib/fib_table.c.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from vppstandin.base import NO_INDEX, Pool

SOURCE_SPECIAL = 1
SOURCE_INTERFACE = 4
SOURCE_API = 8
SOURCE_RECURSIVE = 18
SOURCE_DEFAULT = 20
FIRST_FREE_SOURCE = 23
_BUILT_IN = {
    SOURCE_SPECIAL: 0x00,
    SOURCE_INTERFACE: 0x04,
    SOURCE_API: 0x80,
    SOURCE_RECURSIVE: 0xA0,
    SOURCE_DEFAULT: 0xFF,
}

PATH_NORMAL, PATH_LOCAL, PATH_DROP = 0, 1, 2
PATH_INTERFACE_RX = 9


class TableKey(NamedTuple):
    """Names a table. The same number names another table in the other family."""

    table_id: int
    is_ip6: bool


@dataclass(frozen=True, slots=True)
class Net:
    """A prefix. Its host bits are zero."""

    address: bytes
    length: int


@dataclass(frozen=True, slots=True)
class FibPath:
    """A path of a route. If it has a `table`, the destination is looked up again there."""

    sw_if_index: int
    kind: int = PATH_NORMAL
    next_hop: bytes = b""
    is_ip6: bool = False
    table: TableKey | None = None
    weight: int = 1
    preference: int = 0


@dataclass(slots=True)
class FibEntry:
    """The routes of one prefix: paths by source.

    `shown` is the address that VPP shows for the prefix. For an interface's own prefix it has host bits. `stats_index` is the
    index of the packet counter. It stays the same until the last path is removed.
    """

    shown: bytes
    stats_index: int
    paths: dict[int, tuple[FibPath, ...]] = field(default_factory=dict)


_Special = tuple[bytes, int, int, FibPath]
_DROP4, _DROP6 = FibPath(NO_INDEX, PATH_DROP), FibPath(NO_INDEX, PATH_DROP, is_ip6=True)
_SPECIALS: dict[bool, tuple[_Special, ...]] = {
    False: (
        (bytes(4), 0, SOURCE_DEFAULT, _DROP4),
        (bytes(4), 32, SOURCE_DEFAULT, _DROP4),
        (b"\xf0\0\0\0", 4, SOURCE_SPECIAL, _DROP4),
        (b"\xe0\0\0\0", 4, SOURCE_SPECIAL, _DROP4),
        (b"\xff\xff\xff\xff", 32, SOURCE_DEFAULT, _DROP4),
    ),
    True: (
        (bytes(16), 0, SOURCE_DEFAULT, _DROP6),
        (b"\xfe\x80" + bytes(14), 10, SOURCE_SPECIAL, FibPath(NO_INDEX, is_ip6=True)),
    ),
}
"""Initial routes of every table, by `is_ip6` (src/vnet/fib/ip4_fib.c, ip6_fib.c)."""

_LINK6 = b"\xff\x02" + bytes(13)
_GROUPS: dict[bool, dict[Net, bool]] = {
    False: {Net(bytes(4), 0): False, Net(b"\xe0\0\0\1", 32): True, Net(b"\xe0\0\0\2", 32): True},
    True: {
        Net(bytes(16), 0): False,
        Net(_LINK6 + b"\1", 128): True,
        Net(_LINK6 + b"\2", 128): True,
        Net(_LINK6 + b"\x16", 128): True,
        Net(_LINK6[:11] + b"\1\xff\0\0\0", 104): True,
    },
}
"""Initial groups of every multicast table, by `is_ip6` (src/vnet/mfib/ip4_mfib.c, ip6_mfib.c)."""


def network(address: bytes, length: int) -> bytes:
    """Return the address with its host bits zero."""
    bits = 8 * len(address)
    value = int.from_bytes(address, "big") >> (bits - length) << (bits - length)
    return value.to_bytes(len(address), "big")


class Sources:
    """FIB sources and their priorities."""

    def __init__(self) -> None:
        self.added: dict[int, tuple[str, int]] = {}
        """Name and priority of the added sources, by number."""

    def add(self, name: str, priority: int) -> int:
        """Add a source and return its number. The same name again adds another source, as in VPP."""
        number = FIRST_FREE_SOURCE + len(self.added)
        self.added[number] = (name, priority)
        return number

    def priority(self, source: int) -> int:
        """Return a source's priority. The lowest wins."""
        return self.added[source][1] if source in self.added else _BUILT_IN.get(source, 0xFF)


class Fib:
    """One table of one family. It exists until the API has deleted it and nothing else holds it."""

    def __init__(self, tables: Tables, key: TableKey, slot: int, name: str, left: dict[Net, FibEntry]) -> None:
        self.key = key
        self.slot = slot
        self.name = name
        self.entries: dict[Net, FibEntry] = left
        self.of_api = True
        """True until the API deletes it."""
        self.holders = 0
        """Number of paths, tracked addresses and interfaces that hold it."""
        self.groups: dict[Net, bool] | None = None
        """Multicast groups, True if VPP delivers them to the router. None if there is no multicast table."""
        self._tables = tables
        for address, length, source, path in _SPECIALS[key.is_ip6]:
            self.put(address, length, source, path)

    def put(self, address: bytes, length: int, source: int, *paths: FibPath) -> None:
        """Add or replace a source's paths for a prefix."""
        net = Net(network(address, length), length)
        entry = self.entries.get(net)
        if entry is None:
            entry = self.entries[net] = FibEntry(address, self._tables.start_counter())
        before = entry.paths.get(source, ())
        for path in paths:
            self._tables.hold(path.table)
            self._tables.received[path.sw_if_index] += path.kind == PATH_INTERFACE_RX
        entry.paths[source] = paths
        self._forget(before)

    def drop(self, address: bytes, length: int, source: int) -> None:
        """Remove a source's paths for a prefix, if there are any."""
        net = Net(network(address, length), length)
        entry = self.entries.get(net)
        if entry is None or source not in entry.paths:
            return
        paths = entry.paths.pop(source)
        if not entry.paths:
            del self.entries[net]
            self._tables.counters.give(entry.stats_index)
        self._forget(paths)

    def _forget(self, paths: Iterable[FibPath]) -> None:
        for path in paths:
            self._tables.release(path.table)
            self._tables.received[path.sw_if_index] -= path.kind == PATH_INTERFACE_RX

    def best(self, net: Net) -> tuple[int, tuple[FibPath, ...]] | None:
        """Return the best source for a prefix and its paths, None if the prefix is absent."""
        entry = self.entries.get(net)
        if entry is None:
            return None
        source = min(entry.paths, key=self._tables.sources.priority)
        return source, entry.paths[source]

    def lookup(self, address: bytes, length: int, exact: bool) -> Net | None:
        """Return the longest matching prefix, with `exact` only the same prefix; None if there is none."""
        lengths = (length,) if exact else range(length, -1, -1)
        for candidate in lengths:
            net = Net(network(address, candidate), candidate)
            if net in self.entries:
                return net
        return None

    def of_source(self, source: int) -> Iterator[tuple[Net, tuple[FibPath, ...]]]:
        """Yield the prefixes for which a source is the best one, with its paths. 0 stands for every source."""
        for net in self.entries:
            best = self.best(net)
            if best is not None and source in (0, best[0]):
                yield net, best[1]

    def routes_left(self) -> dict[Net, FibEntry]:
        """Return the routes that outlive the destroyed table: all except its initial ones. VPP gives no warning."""
        for address, length, source, _ in _SPECIALS[self.key.is_ip6]:
            self.drop(address, length, source)
        return self.entries


class Tables:
    """All tables, each by its number and family."""

    def __init__(self) -> None:
        self.sources = Sources()
        self.fibs: dict[TableKey, Fib] = {}
        self.counters = Pool()
        """Indexes of route counters. In VPP they belong to load-balance objects (src/vnet/dpo/load_balance.c)."""
        self.received: Counter[int] = Counter()
        """Number of interface-rx paths, by sw_if_index."""
        self.on_new_route: Callable[[int], None] | None = None
        self._slots = {False: Pool(), True: Pool()}
        self._left: dict[int, dict[Net, FibEntry]] = {}
        for is_ip6 in (False, True):
            self.add(TableKey(0, is_ip6), "", has_groups=True)

    def add(self, key: TableKey, name: str, has_groups: bool) -> None:
        """Add a table, and with `has_groups` its multicast table. If it exists, the API holds it again; it keeps its name.

        VPP 26.06 puts a new IPv4 table in the place of the table deleted last, and does not clear that place. So routes that were
        not removed before their table are in the new one, whatever its number.
        """
        if key in self.fibs:
            self.fibs[key].of_api = True
            self.fibs[key].groups = self.fibs[key].groups or (dict(_GROUPS[key.is_ip6]) if has_groups else None)
            return
        slot = self._slots[key.is_ip6].take()
        left = {} if key.is_ip6 else self._left.pop(slot, {})
        signed = key.table_id - (1 << 32) if key.table_id >> 31 else key.table_id
        self.fibs[key] = Fib(self, key, slot, name or f"ipv{6 if key.is_ip6 else 4}-VRF:{signed}", left)
        self.fibs[key].groups = dict(_GROUPS[key.is_ip6]) if has_groups else None

    def delete(self, key: TableKey) -> None:
        """Release the API's hold of a table. That destroys it, unless something else holds it. Table 0 stays."""
        if key.table_id and key in self.fibs:
            self.fibs[key].of_api = False
            self._destroy_unheld(key)

    def start_counter(self) -> int:
        """Return the stats_index of a new counter, which starts at 0."""
        stats_index = self.counters.take()
        if self.on_new_route is not None:
            self.on_new_route(stats_index)
        return stats_index

    def hold(self, key: TableKey | None) -> None:
        """Count one more holder of a table. None does nothing."""
        if key is not None:
            self.fibs[key].holders += 1

    def release(self, key: TableKey | None) -> None:
        """Undo a `hold`. The last release destroys a deleted table. None does nothing."""
        if key is not None:
            self.fibs[key].holders -= 1
            self._destroy_unheld(key)

    def _destroy_unheld(self, key: TableKey) -> None:
        fib = self.fibs[key]
        if fib.of_api or fib.holders:
            return
        del self.fibs[key]
        left = fib.routes_left()
        if left and not key.is_ip6:
            self._left[fib.slot] = left
        self._slots[key.is_ip6].give(fib.slot)

    @property
    def routes_left(self) -> list[Net]:
        """Prefixes left over from destroyed IPv4 tables. They will be in the next new table."""
        return [net for left in self._left.values() for net in left]


class MainTables:
    """Table 0 of both families, as one table."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._fibs = [tables.fibs[TableKey(0, is_ip6)] for is_ip6 in (False, True)]

    @property
    def entries(self) -> Mapping[Net, FibEntry]:
        """Prefixes of both families."""
        return ChainMap(*(fib.entries for fib in self._fibs))

    @property
    def sources(self) -> dict[int, tuple[str, int]]:
        """Name and priority of the added sources, by number."""
        return self._tables.sources.added

    def add_source(self, name: str, priority: int) -> int:
        """Add a source and return its number."""
        return self._tables.sources.add(name, priority)

    def best(self, net: Net) -> tuple[int, tuple[FibPath, ...]] | None:
        """Return the best source for a prefix and its paths, None if the prefix is absent."""
        return self._fibs[len(net.address) == 16].best(net)

    def of_source(self, source: int, is_ip6: bool) -> Iterator[tuple[Net, tuple[FibPath, ...]]]:
        """Yield the prefixes for which a source is the best one, with its paths."""
        return self._fibs[is_ip6].of_source(source)
