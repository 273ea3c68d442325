"""From the kernel's selectors to ACL rules: the same packets match, and what VPP cannot tell is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vppipsec.kernel.xfrm.values import Selector
from vppipsec.sync.desired.algorithms import Unsupported
from vppipsec.sync.desired.selectors import rules_of, widest_rule
from vppipsec.vpp.types import ANY_PORT, Prefix, Rule

NET, HOST = bytes((10, 1, 0, 0)), bytes((10, 2, 0, 9))
PLAIN = Selector(2, HOST, 32, NET, 16)
RULE = Rule(True, Prefix(NET, 16), Prefix(HOST, 32))


@pytest.mark.parametrize(
    ("selector", "rule"),
    [
        (PLAIN, RULE),
        (replace(PLAIN, proto=47), RULE._replace(proto=47)),
        (replace(PLAIN, saddr=bytes((10, 1, 2, 3))), RULE),
        (replace(PLAIN, proto=17, dport=53, dport_mask=0xFFFF), RULE._replace(proto=17, dports=(53, 53))),
        (replace(PLAIN, proto=6, sport=1024, sport_mask=0xFC00), RULE._replace(proto=6, sports=(1024, 2047))),
        (replace(PLAIN, proto=6, sport=1025, sport_mask=0xFC00), RULE._replace(proto=6, sports=(1024, 2047))),
        (
            replace(PLAIN, proto=1, sport=8, sport_mask=0xFFFF, dport=0, dport_mask=0xFFFF),
            RULE._replace(proto=1, sports=(8, 8), dports=(0, 0)),
        ),
        (replace(PLAIN, proto=1, sport=8, sport_mask=0xFFFF), RULE._replace(proto=1, sports=(8, 8), dports=ANY_PORT)),
        (replace(PLAIN, proto=1, sport=0, sport_mask=0xFF00), RULE._replace(proto=1, sports=(0, 255))),
    ],
)
def test_selector_becomes_one_rule(selector: Selector, rule: Rule) -> None:
    assert rules_of(selector) == (rule,)


@pytest.mark.parametrize(
    ("selector", "why"),
    [
        (replace(PLAIN, dport=53, dport_mask=0xFFFF), "ports but no protocol"),
        (replace(PLAIN, proto=132, dport=53, dport_mask=0xFFFF), "ports of SCTP"),
        (replace(PLAIN, proto=58, dport=53, dport_mask=0xFFFF), "ports of IP protocol 58"),
        (replace(PLAIN, proto=17, dport=53, dport_mask=0x00FF), "port mask 0x00ff is no range"),
        (replace(PLAIN, proto=1, sport=256, sport_mask=0xFFFF), "ICMP type or code above 255"),
        (replace(PLAIN, ifindex=3), "one interface"),
    ],
)
def test_what_vpp_cannot_tell_is_said(selector: Selector, why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        rules_of(selector)
    assert widest_rule(selector) == RULE._replace(proto=selector.proto)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from((1, 6, 17)),
    st.integers(0, 0xFFFF),
    st.integers(0, 16),
    st.integers(0, 0xFFFF),
    st.integers(0, 16),
    st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF)),
)
def test_rule_matches_the_ports_that_the_kernels_comparison_matches(
    proto: int, sport: int, sbits: int, dport: int, dbits: int, packet: tuple[int, int]
) -> None:
    masks = [(0xFFFF << (16 - bits)) & 0xFFFF for bits in (sbits, dbits)]
    selector = replace(PLAIN, proto=proto, sport=sport, sport_mask=masks[0], dport=dport, dport_mask=masks[1])
    seen = tuple(port & 0xFF for port in packet) if proto == 1 else packet  # a type, a code
    kernel = not (seen[0] ^ sport) & masks[0] and not (seen[1] ^ dport) & masks[1]  # __xfrm4_selector_match
    try:
        (rule,) = rules_of(selector)
    except Unsupported:
        assert proto == 1
        assert not kernel
        return
    assert kernel == (rule.sports[0] <= seen[0] <= rule.sports[1] and rule.dports[0] <= seen[1] <= rule.dports[1])
