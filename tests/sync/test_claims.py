"""Who routes a prefix that several tunnels claim, against a naive list of claims."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from smallvpp import HERE, PREFIXES, THERE
from vppipsec.sync.claims import Claims
from vppipsec.vpp.objects import Prefix
from vppipsec.xfrm.model import GroupKey

FIRST, SECOND, THIRD = (GroupKey(HERE, THERE, 1, reqid, 0) for reqid in (1, 2, 3))
PREFIX, OTHER, _ = PREFIXES


def test_lowest_priority_number_wins_whoever_comes_first() -> None:
    claims = Claims()
    claims.put(FIRST, {PREFIX: 200})
    assert claims.put(SECOND, {PREFIX: 100}) == {FIRST}
    assert claims.owner(PREFIX) == SECOND
    assert (claims.owned(FIRST), claims.owned(SECOND)) == (frozenset(), {PREFIX})


def test_first_to_come_wins_among_equals() -> None:
    claims = Claims()
    for key in (SECOND, FIRST, THIRD):
        assert claims.put(key, {PREFIX: 100}) == set()
    assert claims.owner(PREFIX) == SECOND
    assert claims.put(SECOND, {}) == {FIRST}
    assert claims.owner(PREFIX) == FIRST


def test_claim_that_only_changes_its_priority_keeps_its_place() -> None:
    claims = Claims()
    claims.put(FIRST, {PREFIX: 100})
    claims.put(SECOND, {PREFIX: 200})
    claims.put(FIRST, {PREFIX: 200})
    assert claims.owner(PREFIX) == FIRST


def test_who_takes_a_prefix_and_gives_one_up_tells_both_others() -> None:
    claims = Claims()
    claims.put(FIRST, {PREFIX: 5})
    claims.put(SECOND, {OTHER: 5})
    claims.put(THIRD, {OTHER: 1})
    assert claims.put(THIRD, {PREFIX: 1}) == {FIRST, SECOND}
    assert [claims.owner(prefix) for prefix in (PREFIX, OTHER)] == [THIRD, SECOND]


def test_prefix_that_nobody_claims_has_no_owner() -> None:
    claims = Claims()
    claims.put(FIRST, {PREFIX: 5})
    assert claims.claimed(PREFIX)
    assert claims.put(FIRST, {}) == set()
    assert not claims.claimed(PREFIX)
    assert claims.owner(PREFIX) is None
    assert claims.owned(FIRST) == frozenset()


class NaiveClaims:
    """Claims as a list, oldest first."""

    def __init__(self) -> None:
        self.claims: list[tuple[GroupKey, Prefix, int]] = []

    def put(self, key: GroupKey, routes: dict[Prefix, int]) -> None:
        kept = [
            (owner, prefix, routes[prefix] if owner == key else priority)
            for owner, prefix, priority in self.claims
            if owner != key or prefix in routes
        ]
        known = {prefix for owner, prefix, _ in kept if owner == key}
        self.claims = kept + [(key, prefix, priority) for prefix, priority in routes.items() if prefix not in known]

    def owners(self) -> dict[Prefix, GroupKey]:
        found: dict[Prefix, tuple[int, GroupKey]] = {}
        for key, prefix, priority in self.claims:
            if prefix not in found or priority < found[prefix][0]:
                found[prefix] = (priority, key)
        return {prefix: key for prefix, (_, key) in found.items()}


PUTS = st.lists(
    st.tuples(st.sampled_from((FIRST, SECOND, THIRD)), st.dictionaries(st.sampled_from(PREFIXES), st.integers(1, 3))),
    max_size=30,
)


@given(PUTS)
def test_claims_agree_with_a_naive_list_and_tell_the_others_whose_share_changed(
    puts: list[tuple[GroupKey, dict[Prefix, int]]],
) -> None:
    claims, naive = Claims(), NaiveClaims()
    for key, routes in puts:
        before = naive.owners()
        naive.put(key, routes)
        after = naive.owners()
        moved = {prefix for prefix in PREFIXES if before.get(prefix) != after.get(prefix)}
        told = claims.put(key, dict(routes))
        assert told == {owners.get(prefix) for owners in (before, after) for prefix in moved} - {key, None}
        for prefix in PREFIXES:
            assert claims.owner(prefix) == after.get(prefix)
            assert claims.claimed(prefix) is (prefix in after)
        for group in (FIRST, SECOND, THIRD):
            assert claims.owned(group) == {prefix for prefix, owner in after.items() if owner == group}
        assert claims.put(key, dict(routes)) == set()
        assert {prefix: claims.owner(prefix) for prefix in after} == after
