"""Finds tunnels whose decrypted packets may match outbound policies, as packets from a LAN do. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from vppipsec.vpp.types import Prefix, Rule

MAX_RULES_COMPARED = 200
"""Rules compared for one tunnel before it counts as matching. An interface with needless layers costs little."""


class RuleIndex:
    """The rules of all layers by their destination."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._by_destination: dict[Prefix, list[Rule]] = {}
        for rule in rules:
            self._by_destination.setdefault(rule.dst, []).append(rule)
        self._destinations: dict[int, list[Prefix]] = {4: [], 16: []}
        for destination in sorted(self._by_destination):
            self._destinations[len(destination.address)].append(destination)
        self._lengths = {size: sorted({p.length for p in found}) for size, found in self._destinations.items()}

    def may_match(self, inbound_rules: Sequence[Rule] | None) -> bool:
        """Return whether a packet that a tunnel's inbound rules permit may match a rule. None permits every packet."""
        if inbound_rules is None:
            return bool(self._by_destination)
        return any(rule.permit and self._may_overlap(rule) for rule in inbound_rules)

    def _may_overlap(self, inbound_rules: Rule) -> bool:
        compared = 0
        for destination in self._overlapping(inbound_rules.dst):
            for rule in self._by_destination[destination]:
                compared += 1
                if compared > MAX_RULES_COMPARED or rule.src.overlaps(inbound_rules.src):
                    return True
        return False

    def _overlapping(self, prefix: Prefix) -> Iterable[Prefix]:
        """Yield the destinations that contain a prefix or are within it."""
        for length in self._lengths[len(prefix.address)]:
            if length < prefix.length and (wider := prefix.shortened(length)) in self._by_destination:
                yield wider
        destinations = self._destinations[len(prefix.address)]
        for place in range(bisect_left(destinations, prefix), len(destinations)):  # none of these is wider
            if not prefix.covers(destinations[place]):
                return
            yield destinations[place]
