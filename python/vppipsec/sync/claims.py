"""Who may route a destination: several tunnels can have policies for the same prefix, VPP has one route for it."""

from __future__ import annotations

from collections.abc import Mapping

from vppipsec.vpp.objects import Prefix
from vppipsec.xfrm.model import GroupKey


class Claims:
    """Claims of groups to prefixes, by the priority of the policy behind them; the lowest number wins, then the first to come."""

    def __init__(self) -> None:
        self._by_group: dict[GroupKey, Mapping[Prefix, int]] = {}
        self._by_prefix: dict[Prefix, dict[GroupKey, int]] = {}
        self._owned: dict[GroupKey, frozenset[Prefix]] = {}
        """What `owned` said, while it holds: it is asked several times for each change."""

    def put(self, key: GroupKey, routes: Mapping[Prefix, int]) -> set[GroupKey]:
        """Set what a group claims. Return the other groups that won or lost a prefix by it."""
        before = self._by_group.get(key, {})
        if before == routes:
            return set()
        touched = before.keys() | routes.keys()
        owners = {prefix: self.owner(prefix) for prefix in touched}
        for prefix in before.keys() - routes.keys():
            claims = self._by_prefix[prefix]
            del claims[key]
            if not claims:
                del self._by_prefix[prefix]
        for prefix, priority in routes.items():
            self._by_prefix.setdefault(prefix, {})[key] = priority
        if routes:
            self._by_group[key] = routes
        else:
            self._by_group.pop(key, None)
        changed = set()
        for prefix, owner in owners.items():
            now = self.owner(prefix)
            if now != owner:
                changed |= {now, owner}
        for other in (*changed, key):
            if other is not None:
                self._owned.pop(other, None)
        return {other for other in changed if other is not None and other != key}

    def owner(self, prefix: Prefix) -> GroupKey | None:
        """Return the group whose claim to a prefix wins, None where nobody claims it."""
        claims = self._by_prefix.get(prefix)
        if not claims:
            return None
        return next(iter(claims)) if len(claims) == 1 else min(claims, key=claims.__getitem__)

    def owned(self, key: GroupKey) -> frozenset[Prefix]:
        """Return the prefixes that a group won."""
        owned = self._owned.get(key)
        if owned is None:
            owned = frozenset(prefix for prefix in self._by_group.get(key, ()) if self.owner(prefix) == key)
            if owned:
                self._owned[key] = owned
        return owned

    def claimed(self, prefix: Prefix) -> bool:
        """Tell whether any group claims a prefix."""
        return prefix in self._by_prefix
