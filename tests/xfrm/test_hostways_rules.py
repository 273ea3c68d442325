"""Host interfaces of policies that name a protocol or ports, with the kernel of this machine."""

from __future__ import annotations

import contextlib
import re
import socket
from dataclasses import replace

import pytest

from hostkernel import (
    DELRULE,
    GRE,
    HOST,
    ICMP,
    NEWRULE,
    OWN,
    PEER,
    POLICY,
    UDP,
    VTI_HOST,
    Listener,
    refused,
    rule,
    shown,
    to_host,
    way,
    with_router,
)
from netns import ip
from tuns import Tun, send, tun
from vppipsec.xfrm.hostways import Aside, HostRule, HostWays, bring_about


def sockets(host: Tun, to: str) -> set[str]:
    """Return which packets of the router itself come to a host interface, of those that it sends to an address."""
    tcp = [socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) for _ in range(2)]
    try:
        for number, each in enumerate(tcp, 80):
            each.connect_ex((to, number))
        for port in (53, 54):
            send(to, port)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connected, contextlib.suppress(OSError):
                connected.connect((to, port))
                connected.send(b"connected to the peer")
        send(to, 55, source_port=161)
        with (
            socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw,
            socket.socket(socket.AF_INET, socket.SOCK_RAW, GRE) as other,
            contextlib.suppress(OSError),
        ):
            raw.sendto(bytes((8, 0, 0xF7, 0xFF, 0, 0, 0, 0)), (to, 0))
            other.sendto(bytes(8), (to, 0))
        return set(host.packets())
    finally:
        for each in tcp:
            each.close()


ALL_SOCKETS = {"tcp 80", "tcp 81", "udp 53", "udp 54", "udp 55", "icmp", "gre"}


@pytest.mark.parametrize(
    ("rules", "come"),
    [
        ([rule(dport=80)], {"tcp 80"}),
        ([rule()], {"tcp 80", "tcp 81"}),
        ([rule(proto=UDP, dport=53)], {"udp 53"}),
        ([rule(proto=UDP, sport=161)], {"udp 55"}),
        ([rule(proto=ICMP)], {"icmp"}),
        ([rule(proto=GRE)], {"gre"}),
        ([rule(Aside.KERNEL, dport=80), rule(src="0.0.0.0/0")], {"tcp 81"}),
        ([rule(Aside.KERNEL, "10.1.0.5/32", dport=80), rule()], {"tcp 81"}),
        ([rule(Aside.KERNEL, "10.1.0.6/32"), rule()], {"tcp 80", "tcp 81"}),
        ([rule(), rule(Aside.KERNEL)], {"tcp 80", "tcp 81"}),
        ([rule(dst="10.2.0.0/16")], set()),
        ([rule(src="10.9.0.0/24", own="")], set()),
    ],
)
def test_what_a_rule_matches_goes_in_clear_into_the_host_interface_and_the_rest_as_without_us(
    rules: list[HostRule], come: set[str]
) -> None:
    def story() -> None:
        with tun(HOST, "bare") as (host, bare):
            ip("link set bare up", "route replace default dev bare")
            bring_about(HostWays(rules=rules))
            assert sockets(host, "10.1.0.5") == come
            assert set(bare.packets()) == ALL_SOCKETS - come
            ip(f"xfrm policy add src 0.0.0.0/0 dst 10.1.0.0/16 {POLICY.format('out', OWN, PEER)}")
            assert sockets(host, "10.1.0.5") == come
            assert set(bare.packets()) == set(), "a policy without an SA lets nothing out"

    with_router(story)


def test_rules_are_asked_before_routes_and_one_may_leave_packets_to_them() -> None:
    def story() -> None:
        with tun(HOST, VTI_HOST):
            rules = [rule(Aside.ROUTES, "10.1.2.0/24"), rule(VTI_HOST, dport=80)]
            bring_about(replace(to_host("10.1.0.0/16"), rules=rules))
            assert way("10.1.3.5 ipproto tcp dport 80") == f"{VTI_HOST} {OWN}"
            assert way("10.1.3.5 ipproto tcp dport 81") == f"{HOST} {OWN}"
            assert way("10.1.3.5 ipproto udp dport 80") == f"{HOST} {OWN}"
            assert way("10.1.2.5 ipproto tcp dport 80") == f"{HOST} {OWN}"
            assert way("10.2.3.5 ipproto tcp dport 80") == f"eth0 {OWN}"
            bring_about(HostWays(rules=rules))
            assert way("10.1.2.5 ipproto tcp dport 80") == f"eth0 {OWN}", "there is no route that it could be left to"

    with_router(story)


def test_what_is_from_no_address_yet_gets_one_only_where_all_of_a_host_interfaces_rules_are_for_it() -> None:
    def story() -> None:
        with tun(HOST):
            ip("addr add 192.168.1.1/32 dev lo")
            own = "192.168.1.1"
            bring_about(HostWays(rules=[rule(src="192.168.1.0/24", own=own), rule(proto=UDP, own="")]))
            assert way("10.1.0.5 ipproto tcp") == f"{HOST} {own}"
            assert way("10.1.0.5 ipproto udp") == f"eth0 {OWN}"
            assert way(f"10.1.0.5 from {OWN} ipproto udp") == f"{HOST} {OWN}"
            assert way(f"10.1.0.5 from {OWN} ipproto tcp") == f"eth0 {OWN}"

    with_router(story)


def test_ike_and_the_routers_own_addresses_are_not_for_rules() -> None:
    def story() -> None:
        with tun(HOST):
            bring_about(HostWays(rules=[rule(dst="0.0.0.0/0", proto=UDP, src="0.0.0.0/0")]))
            assert way("198.51.100.9 ipproto udp sport 4500 dport 4500") == f"eth0 {OWN}"
            assert way("198.51.100.9 ipproto udp sport 4501 dport 4500") == f"{HOST} {OWN}"
            assert way(f"{OWN} ipproto udp") == f"local lo {OWN}"

    with_router(story)


def test_rules_change_so_that_each_packet_goes_where_it_went_or_where_it_is_to_go() -> None:
    def story() -> None:
        with tun(HOST, VTI_HOST):
            common = rule(dst="10.7.0.0/16")
            old = [common, rule(Aside.KERNEL, "10.1.1.0/24"), rule(), rule(VTI_HOST, "10.1.0.0/16", UDP, dport=53)]
            new = [common, rule(VTI_HOST, dport=80), rule(Aside.KERNEL), rule(VTI_HOST, "10.1.0.0/16", UDP, dport=53)]
            bring_about(HostWays(rules=old))
            listener = Listener()
            bring_about(HostWays(rules=new))
            told = listener.kinds()
            assert told == [NEWRULE] * 6 + [DELRULE] * 6
            held = [line.split() for line in shown("ip rule").splitlines() if line.startswith("217:")]
            assert [(line[line.index("to") + 1], "lookup" in line, "goto" in line) for line in held[::2]] == [
                ("10.7.0.0/16", True, False),
                ("10.1.0.0/16", True, False),
                ("10.1.0.0/16", False, True),
                ("10.1.0.0/16", True, False),
            ]
            bring_about(HostWays(rules=new))
            assert listener.kinds() == []

    with_router(story)


def test_a_host_interface_keeps_its_table_while_others_come_and_go() -> None:
    def story() -> None:
        def tables() -> dict[str, str]:
            said = shown("ip route show table all proto 73")
            return dict(re.findall(r"default dev (\S+) table (\d+)", said))

        with tun(HOST, VTI_HOST):
            bring_about(HostWays(rules=[rule(), rule(VTI_HOST, proto=UDP)]))
            both = tables()
            assert len({*both.values()}) == 2
            bring_about(HostWays(rules=[rule(VTI_HOST, proto=UDP)]))
            assert tables() == {VTI_HOST: both[VTI_HOST]}
            bring_about(HostWays(rules=[rule(VTI_HOST, proto=UDP), rule()]))
            assert tables()[VTI_HOST] == both[VTI_HOST]
        with tun(HOST):
            bring_about(HostWays(rules=[rule()]))
            assert way("10.1.0.5 ipproto tcp") == f"{HOST} {OWN}"
            assert [*tables()] == [HOST]

    with_router(story)


def test_a_rule_to_a_host_interface_that_is_not_there_leaves_its_packets_with_the_kernel() -> None:
    def story() -> None:
        with tun(HOST):
            wanted = HostWays(rules=[rule("ipsec258", dport=80), rule()])
            assert refused(wanted) == "there is no interface ipsec258"
            assert way("10.1.0.5 ipproto tcp dport 80") == f"eth0 {OWN}"
            assert way("10.1.0.5 ipproto tcp dport 81") == f"{HOST} {OWN}"

    with_router(story)
