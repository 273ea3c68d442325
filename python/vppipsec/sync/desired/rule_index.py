"""Which tunnels bring packets that outbound policies may match, as the interfaces of the LAN do. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from vppipsec.vpp.types import Prefix, Rule

PATIENCE = 200
"""Rules that are looked at for a tunnel before it is taken to meet one: to be asked for nothing costs little."""


class Meetings:
    """The rules of all layers by their destination."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._by_destination: dict[Prefix, list[Rule]] = {}
        for rule in rules:
            self._by_destination.setdefault(rule.dst, []).append(rule)
        self._destinations: dict[int, list[Prefix]] = {4: [], 16: []}
        for destination in sorted(self._by_destination):
            self._destinations[len(destination.address)].append(destination)
        self._lengths = {size: sorted({p.length for p in found}) for size, found in self._destinations.items()}

    def may_meet(self, admitted: Sequence[Rule] | None) -> bool:
        """Tell whether a packet that a tunnel admits may match a rule. None: it admits whatever comes."""
        if admitted is None:
            return bool(self._by_destination)
        return any(rule.permit and self._meets(rule) for rule in admitted)

    def _meets(self, admitted: Rule) -> bool:
        looked_at = 0
        for destination in self._sharing(admitted.dst):
            for rule in self._by_destination[destination]:
                looked_at += 1
                if looked_at > PATIENCE or rule.src.meets(admitted.src):
                    return True
        return False

    def _sharing(self, prefix: Prefix) -> Iterable[Prefix]:
        """Yield the destinations that contain a prefix or are within it."""
        for length in self._lengths[len(prefix.address)]:
            if length < prefix.length and (wider := prefix.cut(length)) in self._by_destination:
                yield wider
        destinations = self._destinations[len(prefix.address)]
        for place in range(bisect_left(destinations, prefix), len(destinations)):  # none of those is wider
            if not prefix.covers(destinations[place]):
                return
            yield destinations[place]
