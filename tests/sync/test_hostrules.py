"""Which routing rules policies that name a protocol become, one by one and beside each other."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from build import make_policy, prefix_of
from vppipsec.sync.hostrules import Asked, host_rules, why_no_rule
from vppipsec.vpp.objects import Prefix
from vppipsec.xfrm.hostways import Aside, HostRule, Ports
from vppipsec.xfrm.values import Selector

TCP, UDP, ICMP, SCTP = 6, 17, 1, 132
LAN, LOOP = bytes((10, 1, 0, 1)), bytes((172, 16, 0, 1))
ONE, TWO = "ipsec256", "ipsec257"


def selector(dst: str = "10.2.0.0/16", proto: int = 0, src: str = "10.1.0.0/24", **ports: int) -> Selector:
    """Return a selector; ports are under full masks where none is given."""
    masks = {f"{key}_mask": ports.get(f"{key}_mask", 0xFFFF) for key in ("sport", "dport") if key in ports}
    return replace(make_policy(src=src, dst=dst).selector, proto=proto, **(ports | masks))


def rule(
    to: str | Aside,
    dst: str = "10.2.0.0/16",
    proto: int = TCP,
    own: bytes = b"",
    src: str = "10.1.0.0/24",
    sports: Ports | None = None,
    dports: Ports | None = None,
) -> HostRule:
    return HostRule(prefix_of(src), prefix_of(dst), proto, to, own, sports, dports)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (selector(proto=TCP), ""),
        (selector(proto=TCP, dport=80), ""),
        (selector(proto=UDP, sport=0x4000, sport_mask=0xC000), ""),
        (selector(proto=ICMP), ""),
        (selector(proto=ICMP, sport=8), "its policy names an ICMP type, which routing rules do not know"),
        (selector(proto=UDP, dport=0), "its policy names port 0 or 65535, which routing rules do not know"),
        (
            selector(proto=UDP, dport=0x8000, dport_mask=0x8000),
            "its policy names port 0 or 65535, which routing rules do not know",
        ),
        (selector(proto=UDP, dport=1, dport_mask=1), "its policy's port mask 0x0001 is no range"),
        (selector(proto=SCTP, dport=80), "its policy names ports of SCTP: VPP knows those of TCP and UDP"),
        (selector(dport=80), "its policy names ports but no protocol: VPP knows those of TCP and UDP"),
        (replace(selector(), ifindex=3), "its policy is for one interface of the kernel's"),
    ],
)
def test_what_no_rule_can_say_is_told(asked: Selector, reason: str) -> None:
    assert why_no_rule(asked) == reason


def test_a_policy_is_a_rule_with_all_that_it_names() -> None:
    asked = Asked(selector(proto=UDP, sport=0x4000, sport_mask=0xC000, dport=53), ONE, LAN)
    assert host_rules([asked], ()) == (rule(ONE, proto=UDP, own=LAN, sports=(0x4000, 0x7FFF), dports=(53, 53)),)


def test_without_a_policy_that_leads_to_a_host_interface_there_are_no_rules() -> None:
    assert host_rules([Asked(selector(proto=TCP)), Asked(selector())], ()) == ()


WEB = selector(proto=TCP, dport=80)


@pytest.mark.parametrize(
    ("before", "to"),
    [
        (selector("10.2.3.0/24"), Aside.ROUTES),
        (selector("0.0.0.0/0", src="0.0.0.0/0"), Aside.ROUTES),
        (selector("10.2.3.0/24", TCP), Aside.KERNEL),
        (selector("10.2.3.0/24", TCP, dport=80), Aside.KERNEL),
        (selector("10.2.3.0/24", TCP, sport=80), Aside.KERNEL),
        (selector("10.2.3.0/24", TCP, dport=81), None),
        (selector("10.2.3.0/24", UDP), None),
        (selector("10.3.0.0/16"), None),
        (selector("10.2.3.0/24", src="10.1.1.0/24"), None),
    ],
)
def test_what_may_match_the_same_packets_goes_before(before: Selector, to: Aside | None) -> None:
    found = host_rules([Asked(before), Asked(WEB, ONE, LAN)], ())
    assert [each.to for each in found] == ([to, ONE] if to else [ONE])
    assert found[-1] == rule(ONE, own=LAN, dports=(80, 80))
    assert host_rules([Asked(WEB, ONE, LAN), Asked(before)], ()) == found[-1:], "what comes after does not matter"


def test_what_no_rule_can_say_keeps_all_that_it_may_match_from_later_ones() -> None:
    ping = selector("10.2.3.0/24", ICMP, sport=8)
    found = host_rules([Asked(ping), Asked(selector(proto=ICMP), ONE, LAN)], ())
    assert found == (rule(Aside.KERNEL, "10.2.3.0/24", ICMP), rule(ONE, proto=ICMP, own=LAN))


def test_one_address_is_for_all_that_is_sent_to_a_host_interface_from_none_yet() -> None:
    loop = selector(proto=UDP, src="172.16.0.0/24")
    found = host_rules([Asked(WEB, ONE, LAN), Asked(loop, ONE, LOOP), Asked(loop, TWO, LOOP)], ())
    assert [(each.to, each.own) for each in found] == [(ONE, LAN), (ONE, b""), (TWO, LOOP)]


def test_udp_for_a_peer_goes_as_without_us() -> None:
    peers = {Prefix(bytes((10, 2, 0, 9)), 32), Prefix(bytes((10, 3, 0, 9)), 32)}
    anywhere = dict[str, str](src="0.0.0.0/0")
    found = host_rules([Asked(selector(proto=UDP), ONE, LAN), Asked(selector(proto=TCP), ONE, LAN)], peers)
    assert found[0] == rule(Aside.KERNEL, "10.2.0.9/32", UDP, **anywhere)
    assert [each.to for each in found[1:]] == [ONE, ONE]
    assert [each.to for each in host_rules([Asked(WEB, ONE, LAN)], peers)] == [ONE]


def test_rules_lead_to_a_host_interface_just_what_its_policies_match_first() -> None:
    dice = random.Random(73)
    nets = ("10.0.0.0/8", "10.2.0.0/16", "10.2.3.0/24", "10.2.3.4/32")
    for _ in range(200):
        policies = []
        for _ in range(10):
            proto = dice.choice((0, TCP, UDP, ICMP))
            ports = {"dport": dice.choice((53, 80))} if proto in (TCP, UDP) and dice.random() < 0.5 else {}
            types = {"sport": 8} if proto == ICMP and dice.random() < 0.5 else {}
            made = selector(dice.choice(nets), proto, dice.choice(nets), **ports, **types)
            host = dice.choice((ONE, TWO, "")) if proto and not types else ""
            policies.append(Asked(made, host, bytes((10, 2, 3, 4))))
        rules = host_rules(policies, ())
        for _ in range(20):
            ends = [bytes((10, dice.choice((2, 3)), dice.choice((3, 4)), dice.choice((4, 5)))) for _ in range(2)]
            packet = (*ends, dice.choice((TCP, UDP)), dice.choice((53, 80)))
            found = next((it.to for it in rules if _takes(it, *packet)), None)
            wanted = next((it.host for it in policies if _takes(_only(it.selector), *packet)), "")
            assert found == wanted if wanted else not isinstance(found, str)


def _only(it: Selector) -> HostRule:
    """Return the rule that says what a selector of TCP, UDP or all protocols does."""
    (made,) = host_rules([Asked(it, ONE, LAN)], ())
    return made


def _takes(it: HostRule, src: bytes, dst: bytes, proto: int, port: int) -> bool:
    ends = (Prefix(*it.source), src), (Prefix(*it.destination), dst)
    return (
        all(net.covers(Prefix(address, 32)) for net, address in ends)
        and it.proto in (0, proto)
        and (it.dports is None or it.dports[0] <= port <= it.dports[1])
    )
