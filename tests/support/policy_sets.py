"""Small sets of outbound policies for tests of steering: written by hand, and drawn from a small universe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from support.build import LOCAL, REMOTE, make_policy
from support.spd import GRE, ICMP, ICMP6, TCP, UDP, Packet, target_of
from vppipsec.kernel.text import parse_addr
from vppipsec.kernel.xfrm.sad_spd import TunnelKey
from vppipsec.kernel.xfrm.values import Policy, Selector
from vppipsec.sync.desired.policy_layers import Action, PolicyRules, Target
from vppipsec.sync.desired.selectors import rules_of
from vppipsec.vpp.types import Prefix, Rule

A, B, C = (TunnelKey(LOCAL, REMOTE, 1, reqid, 0) for reqid in (1, 2, 3))
DROP, CLEAR = Action.DISCARD, Action.BYPASS


def prefix(text: str) -> Prefix:
    address, length = text.split("/")
    return Prefix(parse_addr(address), int(length))


def rule(dst: str, src: str = "0.0.0.0/0", *rest: Any) -> Rule:
    return Rule(True, prefix(src), prefix(dst), *rest)


def deny(dst: str, src: str = "0.0.0.0/0", *rest: Any) -> Rule:
    return rule(dst, src, *rest)._replace(permit=False)


def one(target: Target, dst: str, src: str = "0.0.0.0/0", *rest: Any) -> PolicyRules:
    return PolicyRules((rule(dst, src, *rest),), target)


HOSTS = range(12)
_LENGTHS = (0, 28, 29, 30, 31, 32)
_PROTOS = (0, ICMP, TCP, UDP, GRE)


def address(number: int, ip6: bool) -> bytes:
    return (b"\xfd" + bytes(14) if ip6 else bytes((10, 0, 0))) + bytes([number])


@st.composite
def selectors(draw: st.DrawFn, ip6: bool) -> Selector:
    """Return a selector of a universe so small that many overlap. Ports are masked as swanctl does it."""
    ends = []
    hosts_only = draw(st.booleans())  # what a route can implement, and what conflicts with it
    for lengths in ((28, 32, 32), (0, 0, 0, 32)) if hosts_only else (_LENGTHS, _LENGTHS):
        length = draw(st.sampled_from(lengths))
        number = draw(st.sampled_from(HOSTS)) >> (32 - length) << (32 - length) if length else 0
        ends.append((address(number, ip6) if length else bytes(16 if ip6 else 4), length + 96 * ip6 if length else 0))
    proto = 0 if hosts_only else draw(st.sampled_from(_PROTOS))
    ports = []
    for _ in range(2):
        mask = draw(st.sampled_from((0, 0, 0xFFFF, 0xFFFE))) if proto not in (0, GRE) else 0
        ports.append((draw(st.integers(0, 3)) & mask, mask))
    (daddr, length_d), (saddr, length_s) = ends
    proto = ICMP6 if ip6 and proto == ICMP else proto
    return Selector(10 if ip6 else 2, daddr, length_d, saddr, length_s, proto, *ports[0], *ports[1])


@st.composite
def policies(draw: st.DrawFn, ip6: bool) -> Policy:
    kind = draw(st.integers(0, 6))
    end = make_policy(reqid=kind % 4 + 1, priority=draw(st.integers(1, 3)), selector=draw(selectors(ip6)))
    if kind == 5:
        return make_policy(templates=(), selector=end.selector, priority=end.priority)
    return make_policy(action=1, templates=(), selector=end.selector, priority=end.priority) if kind == 6 else end


@st.composite
def packets(draw: st.DrawFn, ip6: bool, near: Sequence[Policy]) -> Packet:
    """Return any packet, or one that matches a policy, or nearly does."""
    src, dst = (address(draw(st.sampled_from(HOSTS)), ip6) for _ in range(2))
    proto = draw(st.sampled_from((ICMP6 if ip6 else ICMP, TCP, UDP, GRE)))
    sport, dport = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    if draw(st.booleans()):
        selector = draw(st.sampled_from(near)).selector
        src = selector.saddr if selector.prefixlen_s else src
        dst = selector.daddr if selector.prefixlen_d else dst
        proto = selector.proto or proto
        sport = selector.sport ^ draw(st.integers(0, 2)) & 1
        dport = selector.dport ^ draw(st.integers(0, 2)) & 1
    return Packet(src, dst, proto, sport, dport)


def wanted_of(actual: Sequence[Policy]) -> list[PolicyRules]:
    """Return the rules of outbound policies in the kernel's order, as for policies without SAs."""
    return [PolicyRules(rules_of(it.selector), target_of(it)) for it in sorted(actual, key=lambda it: it.priority)]
