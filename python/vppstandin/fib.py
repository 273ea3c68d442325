"""The stand-in's FIB tables: routes by prefix and source; of several sources for one prefix the best one answers.

Sources and priorities: src/vnet/fib/fib_source.h of VPP 26.06; tables and their locks: src/vnet/fib/fib_table.c.
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
    """What names a table: the same number is another table in the other family."""

    table_id: int
    is_ip6: bool


@dataclass(frozen=True, slots=True)
class Net:
    """A prefix, host bits zero."""

    address: bytes
    length: int


@dataclass(frozen=True, slots=True)
class FibPath:
    """Where a route leads. With a `table` the destination is looked up there again."""

    sw_if_index: int
    kind: int = PATH_NORMAL
    next_hop: bytes = b""
    is_ip6: bool = False
    table: TableKey | None = None
    weight: int = 1
    preference: int = 0


@dataclass(slots=True)
class FibEntry:
    """One prefix: paths by source, and the address that VPP shows for it; an interface's own prefix has host bits there.

    `stats_index` finds what counts its packets, whatever its paths are, until the last of them goes.
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
"""Routes that every table is born with, by `is_ip6` (src/vnet/fib/ip4_fib.c, ip6_fib.c)."""

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
"""Of multicast what every table is born with, by `is_ip6` (src/vnet/mfib/ip4_mfib.c, ip6_mfib.c)."""


def network(address: bytes, length: int) -> bytes:
    """Zero the host bits."""
    bits = 8 * len(address)
    value = int.from_bytes(address, "big") >> (bits - length) << (bits - length)
    return value.to_bytes(len(address), "big")


class Sources:
    """Who may bring routes, and whose win."""

    def __init__(self) -> None:
        self.added: dict[int, tuple[str, int]] = {}
        """Name and priority of those that were added, by number."""

    def add(self, name: str, priority: int) -> int:
        """Make a source; the same name again makes another one, as in VPP."""
        number = FIRST_FREE_SOURCE + len(self.added)
        self.added[number] = (name, priority)
        return number

    def priority(self, source: int) -> int:
        """Return a source's priority; the lowest wins."""
        return self.added[source][1] if source in self.added else _BUILT_IN.get(source, 0xFF)


class Fib:
    """One table of one family. It lives as long as the API or a path that leads into it holds it."""

    def __init__(self, tables: Tables, key: TableKey, slot: int, name: str, left: dict[Net, FibEntry]) -> None:
        self.key = key
        self.slot = slot
        self.name = name
        self.entries: dict[Net, FibEntry] = left
        self.of_api = True
        """True until the API deletes it."""
        self.holders = 0
        """Paths, tracked addresses and interfaces that keep it."""
        self.groups: dict[Net, bool] | None = None
        """Multicast, and whether it is the router's own; None where there is no table for it."""
        self._tables = tables
        for address, length, source, path in _SPECIALS[key.is_ip6]:
            self.put(address, length, source, path)

    def put(self, address: bytes, length: int, source: int, *paths: FibPath) -> None:
        """Add or replace a source's paths of a prefix."""
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
        """Remove a source's paths of a prefix, if there are any."""
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
        """Return the source that answers for a prefix, and its paths."""
        entry = self.entries.get(net)
        if entry is None:
            return None
        source = min(entry.paths, key=self._tables.sources.priority)
        return source, entry.paths[source]

    def lookup(self, address: bytes, length: int, exact: bool) -> Net | None:
        """Return the prefix that matches, longest first; with `exact` only the very one."""
        lengths = (length,) if exact else range(length, -1, -1)
        for candidate in lengths:
            net = Net(network(address, candidate), candidate)
            if net in self.entries:
                return net
        return None

    def of_source(self, source: int) -> Iterator[tuple[Net, tuple[FibPath, ...]]]:
        """Yield the prefixes for which a source answers, with its paths; 0 stands for every source."""
        for net in self.entries:
            best = self.best(net)
            if best is not None and source in (0, best[0]):
                yield net, best[1]

    def routes_left(self) -> dict[Net, FibEntry]:
        """Return what stays of it when it is destroyed: all but the routes it was born with, and without a warning."""
        for address, length, source, _ in _SPECIALS[self.key.is_ip6]:
            self.drop(address, length, source)
        return self.entries


class Tables:
    """All tables, each by its number and family."""

    def __init__(self) -> None:
        self.sources = Sources()
        self.fibs: dict[TableKey, Fib] = {}
        self.counters = Pool()
        """Counters of routes; in VPP they are those of load-balance objects (src/vnet/dpo/load_balance.c)."""
        self.received: Counter[int] = Counter()
        """Number of paths that have packets received on an interface, by sw_if_index."""
        self.on_new_route: Callable[[int], None] | None = None
        self._slots = {False: Pool(), True: Pool()}
        self._left: dict[int, dict[Net, FibEntry]] = {}
        for is_ip6 in (False, True):
            self.add(TableKey(0, is_ip6), "", has_groups=True)

    def add(self, key: TableKey, name: str, has_groups: bool) -> None:
        """Make a table, with one for multicast where it is to have groups, or have the API hold one that is there, and its name.

        VPP 26.06 puts a new IPv4 table where the table deleted last was, and does not clear that place: routes that nobody
        deleted before their table are in the new one, whatever its number.
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
        """Have the API let go of a table. It is gone then, unless a path leads into it. Table 0 stays."""
        if key.table_id and key in self.fibs:
            self.fibs[key].of_api = False
            self._destroy_unheld(key)

    def start_counter(self) -> int:
        """Return the stats_index of a new counter, which begins at 0."""
        stats_index = self.counters.take()
        if self.on_new_route is not None:
            self.on_new_route(stats_index)
        return stats_index

    def hold(self, key: TableKey | None) -> None:
        """Count one that keeps a table; None keeps none."""
        if key is not None:
            self.fibs[key].holders += 1

    def release(self, key: TableKey | None) -> None:
        """Undo a `hold`; the last one takes a deleted table with it."""
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
        """Prefixes that were left in IPv4 tables that are gone, and will be in the next one."""
        return [net for left in self._left.values() for net in left]


class MainTables:
    """Table 0 of both families, as one."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._fibs = [tables.fibs[TableKey(0, is_ip6)] for is_ip6 in (False, True)]

    @property
    def entries(self) -> Mapping[Net, FibEntry]:
        """Prefixes of both."""
        return ChainMap(*(fib.entries for fib in self._fibs))

    @property
    def sources(self) -> dict[int, tuple[str, int]]:
        """Name and priority of the sources that were added, by number."""
        return self._tables.sources.added

    def add_source(self, name: str, priority: int) -> int:
        """Make a source."""
        return self._tables.sources.add(name, priority)

    def best(self, net: Net) -> tuple[int, tuple[FibPath, ...]] | None:
        """Return the source that answers for a prefix, and its paths."""
        return self._fibs[len(net.address) == 16].best(net)

    def of_source(self, source: int, is_ip6: bool) -> Iterator[tuple[Net, tuple[FibPath, ...]]]:
        """Yield the prefixes for which a source answers, with its paths."""
        return self._fibs[is_ip6].of_source(source)
