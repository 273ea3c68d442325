"""Which tunnels bring packets that outbound policies may match, against a naive comparison of all rules."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vppipsec.sync.desired import rule_index
from vppipsec.sync.desired.rule_index import RuleIndex
from vppipsec.vpp.types import Prefix, Rule, everything

ANY = everything(False)


def prefix(number: int, length: int) -> Prefix:
    """Return one of few prefixes of 10.0.0.0/8, nested in each other."""
    return Prefix(bytes((10, number & 0xFF, 0, 0)), 32).shortened(length)


PREFIXES = st.one_of(
    st.just(ANY),
    st.builds(prefix, st.sampled_from((0, 1, 2, 3, 128)), st.sampled_from((8, 9, 15, 16, 24))),
    st.just(everything(True)),
)
RULES = st.builds(Rule, st.booleans(), PREFIXES, PREFIXES).filter(lambda it: len(it.src.address) == len(it.dst.address))


def share(one: Prefix, other: Prefix) -> bool:
    length = min(one.length, other.length)
    return len(one.address) == len(other.address) and one.shortened(length) == other.shortened(length)


@settings(max_examples=300, deadline=None)
@given(st.lists(RULES, max_size=8), st.lists(RULES, max_size=4))
def test_tunnel_meets_a_rule_where_some_packet_of_it_may_match(rules: list[Rule], inbound_rules: list[Rule]) -> None:
    naive = any(
        mine.permit and share(mine.src, rule.src) and share(mine.dst, rule.dst)
        for mine in inbound_rules
        for rule in rules
    )
    assert RuleIndex(rules).may_match(inbound_rules) == naive


def test_tunnel_that_admits_whatever_comes_meets_any_rule() -> None:
    assert RuleIndex([Rule(True, ANY, ANY)]).may_match(None)
    assert not RuleIndex([]).may_match(None)


def test_after_many_rules_a_tunnel_is_taken_to_match_one() -> None:
    classified = [Rule(True, prefix(1, 16), Prefix(bytes((10, 2, number, 0)), 24)) for number in range(256)]
    inbound_rules = [Rule(True, prefix(3, 16), prefix(2, 16))]
    assert not RuleIndex(classified[: rule_index.MAX_RULES_COMPARED]).may_match(inbound_rules)
    assert RuleIndex(classified).may_match(inbound_rules)
