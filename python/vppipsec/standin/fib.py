"""The stand-in's FIB: routes by prefix and source; of several sources for one prefix the best one answers.

Sources and priorities: src/vnet/fib/fib_source.h of VPP 26.06.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

SOURCE_INTERFACE = 4
SOURCE_API = 8
SOURCE_RECURSIVE = 18
SOURCE_DEFAULT = 20
FIRST_FREE_SOURCE = 23
_BUILT_IN = {SOURCE_INTERFACE: 0x04, SOURCE_API: 0x80, SOURCE_RECURSIVE: 0xA0, SOURCE_DEFAULT: 0xFF}

PATH_NORMAL, PATH_LOCAL, PATH_DROP = 0, 1, 2
NO_INDEX = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Net:
    """A prefix, host bits zero."""

    address: bytes
    length: int


@dataclass(frozen=True, slots=True)
class Path:
    """Where a route leads."""

    sw_if_index: int
    kind: int = PATH_NORMAL
    next_hop: bytes = b""


@dataclass(slots=True)
class Entry:
    """One prefix: paths by source, and the address that VPP shows for it; an interface's own prefix has host bits there."""

    shown: bytes
    paths: dict[int, Path] = field(default_factory=dict)


def network(address: bytes, length: int) -> bytes:
    """Zero the host bits."""
    bits = 8 * len(address)
    value = int.from_bytes(address, "big") >> (bits - length) << (bits - length)
    return value.to_bytes(len(address), "big")


class Fib:
    """Table 0, IPv4 and IPv6."""

    def __init__(self) -> None:
        self.entries: dict[Net, Entry] = {}
        self.sources: dict[int, tuple[str, int]] = {}
        for zero in (bytes(4), bytes(16)):
            self.put(zero, 0, SOURCE_DEFAULT, Path(NO_INDEX, PATH_DROP))

    def add_source(self, name: str, priority: int) -> int:
        """Make a source; the same name again makes another one, as in VPP."""
        number = FIRST_FREE_SOURCE + len(self.sources)
        self.sources[number] = (name, priority)
        return number

    def priority(self, source: int) -> int:
        """Return a source's priority; the lowest wins."""
        return self.sources[source][1] if source in self.sources else _BUILT_IN.get(source, 0xFF)

    def put(self, address: bytes, length: int, source: int, path: Path) -> None:
        """Add or replace a source's path of a prefix."""
        net = Net(network(address, length), length)
        entry = self.entries.setdefault(net, Entry(address))
        entry.paths[source] = path

    def drop(self, address: bytes, length: int, source: int) -> None:
        """Remove a source's path of a prefix, if it is there."""
        net = Net(network(address, length), length)
        entry = self.entries.get(net)
        if entry is not None:
            entry.paths.pop(source, None)
            if not entry.paths:
                del self.entries[net]

    def best(self, net: Net) -> tuple[int, Path] | None:
        """Return the source that answers for a prefix, and its path."""
        entry = self.entries.get(net)
        if entry is None:
            return None
        source = min(entry.paths, key=self.priority)
        return source, entry.paths[source]

    def lookup(self, address: bytes, length: int, exact: bool) -> Net | None:
        """Return the prefix that matches, longest first; with `exact` only the very one."""
        lengths = (length,) if exact else range(length, -1, -1)
        for candidate in lengths:
            net = Net(network(address, candidate), candidate)
            if net in self.entries:
                return net
        return None

    def of_source(self, source: int, is_ip6: bool) -> Iterator[tuple[Net, Path]]:
        """Yield the prefixes for which a source answers, with its paths."""
        for net in self.entries:
            best = self.best(net)
            if best is not None and best[0] == source and (len(net.address) == 16) == is_ip6:
                yield net, best[1]
