"""Host interfaces, with the kernel of this machine. A tun of ours stands for VPP's, a veth for a VTI where there are none."""

from __future__ import annotations

import contextlib
import ipaddress
import pickle
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from build import make_policy
from netns import in_new_netns, ip
from tuns import Tun, receives, send, tun
from vethvti import links
from vppipsec.xfrm.choices import Choice
from vppipsec.xfrm.hostways import Aside, HostError, HostRoute, HostRule, HostWays, Net, bring_about
from vppipsec.xfrm.netlink import open_netlink
from vppipsec.xfrm.wire import message_type, split

HOST = "ipsec256"
VTI_HOST = "ipsec257"
OWN, PEER = "10.0.0.1", "10.0.0.9"
POLICY = "dir {} tmpl src {} dst {} proto esp mode tunnel"
_ROUTE_GROUPS = (1, 4, 7, 8)  # RTNLGRP_LINK, TC, IPV4_ROUTE, IPV4_RULE
NEWLINK, NEWROUTE, DELROUTE, NEWRULE, DELRULE, NEWTFILTER, DELTFILTER = 16, 24, 25, 32, 33, 44, 45
TCP, UDP, ICMP, GRE = 6, 17, 1, 47


def net(text: str) -> Net:
    found = ipaddress.IPv4Network(text)
    return found.network_address.packed, found.prefixlen


def to_host(*destinations: str, source: str = OWN, throws: Iterable[str] = (), sources: Iterable[str] = ()) -> HostWays:
    """Return what leads destinations to the host interface, for packets that name no source, or one of `sources`."""
    route = HostRoute(HOST, ipaddress.IPv4Address(source).packed)
    return HostWays(
        dict.fromkeys(map(net, destinations), route), frozenset(map(net, sources)), frozenset(map(net, throws))
    )


def vti_to(host: str) -> HostWays:
    """Return what leads the VTI to a host interface, and back."""
    return HostWays(out={index("vti7"): (choice(host), choice(host, "::/0"))}, back={host: index("vti7")})


def choice(host: str, dst: str = "0.0.0.0/0", src: str = "", **changes: Any) -> Choice:
    """Return a choice of a host interface by a policy, none for the kernel."""
    return Choice(
        make_policy(src=src or ("::/0" if ":" in dst else "0.0.0.0/0"), dst=dst, **changes).selector, None, host
    )


def with_vtis(ways: HostWays, vtis: HostWays) -> HostWays:
    return replace(ways, out=vtis.out, back=vtis.back)


def shown(command: str) -> str:
    return subprocess.run(command.split(), capture_output=True, text=True, timeout=30).stdout


def way(query: str) -> str:
    """Return the link by which the kernel sends something, and the source that it has or gets."""
    said = shown(f"ip route get {query}")
    found = re.search(r"^(local |)\S+ (?:from (\S+) )?.*?dev (\S+)(?: .*?src (\S+))?", said)
    return f"{found[1]}{found[3]} {found[2] or found[4]}" if found else said


def everything() -> str:
    """Return all that doors are made of, as people read it, but for the doors themselves."""
    commands = (
        "ip rule",
        "ip route show table all proto 73",
        "ip route show table 18768",
        "tc qdisc",
        *_filters("vti7", HOST),
    )
    return "\n".join(map(shown, commands))


def _filters(*names: str) -> list[str]:
    return [f"tc filter show dev {name} {hook}" for name in names for hook in ("ingress", "egress")]


def index(name: str) -> int:
    return int(shown(f"ip -o link show {name}").split(":")[0])


def with_router(story: Callable[[], None]) -> None:
    """Run in a namespace of a router with an uplink, which has a default route."""

    def work() -> None:
        ip("link set lo up", *links("eth0"), "link set eth0 arp off", f"addr add {OWN}/24 dev eth0")
        ip(f"route add default via {PEER}")
        story()

    in_new_netns(work)


class Listener:
    """Hears what the kernel tells of links, filters, IPv4 routes and rules."""

    def __init__(self) -> None:
        self._socket = open_netlink(0, _ROUTE_GROUPS)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)

    def told(self) -> list[bytes]:
        found: list[bytes] = []
        while True:
            try:
                found += map(bytes, split(self._socket.recv(1 << 16)))
            except BlockingIOError:
                return found

    def kinds(self) -> list[int]:
        return [message_type(message) for message in self.told()]


# Policies without if_id


def test_what_the_router_sends_itself_goes_in_clear_into_the_host_interface_in_spite_of_a_policy() -> None:
    def story() -> None:
        with tun(HOST, "bare") as (host, bare):
            ip("link set bare up", "route add 10.1.0.0/16 dev bare")
            send("10.1.0.5")
            assert bare.udp() == [(OWN, "10.1.0.5")]
            ip(f"xfrm policy add src 0.0.0.0/0 dst 10.1.0.0/16 {POLICY.format('out', OWN, PEER)}")
            send("10.1.0.5")
            assert bare.udp() == [], "a policy without an SA lets nothing out"
            bring_about(to_host("10.1.0.0/16"))
            send("10.1.0.5")
            send("10.2.0.5")
            assert host.udp() == [(OWN, "10.1.0.5")]
            assert bare.udp() == []

    with_router(story)


def test_what_was_decrypted_for_the_router_itself_comes_in_by_the_host_interface_in_spite_of_a_policy() -> None:
    def story() -> None:
        with tun(HOST, "bare") as (host, bare):
            ip("link set bare up", f"xfrm policy add src 10.1.0.0/16 dst 0.0.0.0/0 {POLICY.format('in', PEER, OWN)}")
            Path("/proc/sys/net/ipv4/conf/all/rp_filter").write_text("1")
            bring_about(to_host("10.1.0.0/16", sources=["10.0.0.0/24"]))
            assert receives(host, "10.1.0.5", OWN)
            ip("route add 10.1.0.0/16 dev bare")
            assert not receives(bare, "10.1.0.5", OWN), "elsewhere the policy wants it encrypted"

    with_router(story)


def test_rules_and_routes_concern_the_routers_own_packets_alone_and_name_their_source() -> None:
    def story() -> None:
        with tun(HOST):
            ip("addr add 192.168.1.1/32 dev lo")
            bring_about(to_host("10.1.0.0/16", source="192.168.1.1"))
            assert way("10.1.0.5") == f"{HOST} 192.168.1.1"
            assert "mtu 1360" in shown("ip route get 10.1.0.5")
            assert way("10.2.0.5") == f"eth0 {OWN}"
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
            forwarded = shown("ip route get 10.1.0.5 from 10.0.0.7 iif eth0")
            assert "dev eth0" in forwarded
            assert HOST not in forwarded

    with_router(story)


def test_ike_goes_its_way_where_a_destination_covers_the_peer() -> None:
    def story() -> None:
        with tun(HOST) as (host,):
            bring_about(to_host("0.0.0.0/0"))
            for port in (500, 4500):
                assert way(f"198.51.100.9 ipproto udp sport {port} dport {port}") == f"eth0 {OWN}"
                send("198.51.100.9", port, source_port=port)
            assert host.udp() == []
            assert way("198.51.100.9 ipproto udp sport 501 dport 500") == f"{HOST} {OWN}"
            assert way("198.51.100.9 ipproto tcp sport 500 dport 500") == f"{HOST} {OWN}"

    with_router(story)


def test_what_is_thrown_goes_its_way_though_a_destination_covers_it() -> None:
    def story() -> None:
        with tun(HOST):
            bring_about(to_host("0.0.0.0/0", f"{PEER}/32", throws=[f"{PEER}/32", "10.3.0.0/16"]))
            assert way(PEER) == f"eth0 {OWN}"
            assert way("10.3.0.5") == f"eth0 {OWN}"
            assert way("10.4.0.5") == f"{HOST} {OWN}"

    with_router(story)


def test_what_is_for_the_router_itself_stays_where_local_addresses_are_looked_up_late() -> None:
    def story() -> None:
        with tun(HOST):
            ip("rule add pref 32765 table local", "rule del pref 0 table local")  # as VyOS does with VRFs
            bring_about(to_host("0.0.0.0/0"))
            assert way(OWN) == f"local lo {OWN}"
            assert way("10.4.0.5") == f"{HOST} {OWN}"

    with_router(story)


def test_packets_of_a_vrf_stay_in_it() -> None:
    def story() -> None:
        try:
            ip("link add blue type vrf table 10")
        except subprocess.CalledProcessError:
            pytest.skip("this kernel has no VRFs")
        ip("link set blue up", *links("eth1"), "link set eth1 master blue", "addr add 10.5.0.1/24 dev eth1")
        ip("route add default via 10.5.0.9 table 10")
        with tun(HOST):
            bring_about(to_host("0.0.0.0/0"))
            assert way("198.51.100.9 vrf blue").startswith("eth1 ")
            assert way("198.51.100.9").startswith(f"{HOST} ")

    with_router(story)


def test_a_host_interface_keeps_its_addresses() -> None:
    def story() -> None:
        with tun(HOST):
            ip(f"link set {HOST} up", f"addr add fd05::1/64 dev {HOST} nodad")
            before = shown(f"ip -d addr show dev {HOST}")
            assert "inet6 fe80" in before
            bring_about(to_host("10.1.0.0/16"))
            assert shown(f"ip -d addr show dev {HOST}") == before

    with_router(story)


def test_ten_thousand_routes_and_then_what_changes_alone() -> None:
    def story() -> None:
        with tun(HOST):
            many = [f"10.{n >> 8}.{n & 255}.0/24" for n in range(0x100, 0x100 + 10_000)]
            bring_about(to_host(*many))
            assert len(shown("ip route show table 18768").splitlines()) == 10_000
            listener = Listener()
            bring_about(to_host(*many[1:], "172.16.0.0/12"))
            assert listener.kinds() == [DELROUTE, NEWROUTE]

    with_router(story)


def test_there_is_no_moment_in_which_what_is_thrown_goes_into_the_host_interface() -> None:
    def story() -> None:
        with tun(HOST):
            listener = Listener()
            bring_about(to_host("0.0.0.0/0", throws=["10.3.0.0/16"]))
            made = [kind for kind in listener.told() if message_type(kind) in (NEWROUTE, NEWRULE)]
            assert [message_type(m) for m in made] == [NEWRULE] * 6 + [NEWROUTE] * 2
            assert [m[23] for m in made[-2:]] == [9, 1], "throw, then unicast"
            bring_about(to_host("10.4.0.0/16"))
            told = [m for m in listener.told() if message_type(m) in (NEWROUTE, DELROUTE)]
            assert [(message_type(m), m[23]) for m in told] == [(DELROUTE, 1), (NEWROUTE, 1), (DELROUTE, 9)]

    with_router(story)


def test_a_policy_for_whatever_source_leads_beside_others_and_goes_without_them() -> None:
    def story() -> None:
        with tun(HOST):
            ip(f"link set {HOST} up")
            before = everything()
            for sources in (["10.0.0.0/24"], ["0.0.0.0/0", "10.0.0.0/24"], ["0.0.0.0/0"], ["10.0.0.0/24"]):
                bring_about(to_host("10.1.0.0/16", sources=sources))
                assert way(f"10.1.0.5 from {OWN}") == f"{HOST} {OWN}"
                assert shown("ip rule").count("lookup 18768") == 1 + len(sources)
            bring_about(HostWays())
            assert everything() == before

    with_router(story)


# Policies without if_id that name a protocol


def rule(
    to: str | Aside = HOST,
    dst: str = "10.1.0.0/16",
    proto: int = TCP,
    src: str = "10.0.0.0/24",
    own: str = OWN,
    **ports: int,
) -> HostRule:
    """Return a rule. `sport` and `dport` are single ports."""
    sports, dports = ((ports[key],) * 2 if key in ports else None for key in ("sport", "dport"))
    source = ipaddress.IPv4Address(own).packed if own and isinstance(to, str) else b""
    return HostRule(net(src), net(dst), proto, to, source, sports, dports)


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


RULES = (
    rule(Aside.KERNEL, "10.1.0.0/24", dport=22),
    rule(Aside.ROUTES, "10.1.9.0/24"),
    rule(dport=80),
    rule(),
    rule(proto=ICMP, src="0.0.0.0/0"),
)
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


# VTIs


def with_vti(story: Callable[[Tun, HostWays], None]) -> None:
    def work() -> None:
        ip(*links("vti7"), "addr add 10.99.0.1/30 dev vti7", "addr add fd99::1/64 dev vti7 nodad")
        if "NOARP" not in shown("ip link show vti7"):
            ip("link set vti7 arp off")
        ip("route add 10.7.0.0/16 dev vti7", "route add fd07::/48 dev vti7")
        for any_ip in ("0.0.0.0/0", "::/0"):  # as an IKE daemon has them for a VTI
            ip(
                *(
                    f"xfrm policy add src {any_ip} dst {any_ip} {POLICY.format(to, OWN, PEER)} if_id 7"
                    for to in ("in", "out")
                )
            )
        with tun(VTI_HOST) as (host,):
            story(host, vti_to(VTI_HOST))

    with_router(work)


def test_what_the_kernel_sends_on_a_vti_goes_out_by_its_host_interface() -> None:
    def story(host: Tun, wanted: HostWays) -> None:
        bring_about(wanted)
        send("10.7.0.5")
        send("fd07::5")
        send("10.8.0.5")
        assert host.udp() == [("10.99.0.1", "10.7.0.5"), ("fd99::1", "fd07::5")]

    with_vti(story)


def test_what_comes_in_by_the_host_interface_is_as_if_it_came_in_on_the_vti() -> None:
    def story(host: Tun, wanted: HostWays) -> None:
        bring_about(wanted)
        assert receives(host, "10.7.0.5", "10.99.0.1", "vti7")
        assert receives(host, "fd07::5", "fd99::1", "vti7")
        assert not receives(host, "10.7.0.5", "10.99.0.1", VTI_HOST)

    with_vti(story)


def test_a_vti_without_its_host_interface_drops_and_serves_the_next_one() -> None:
    def story(host: Tun, wanted: HostWays) -> None:
        with tun(HOST) as (first,):
            bring_about(vti_to(HOST))
            send("10.7.0.5")
            assert first.udp() == [("10.99.0.1", "10.7.0.5")]
        send("10.7.0.6")
        assert host.udp() == []
        bring_about(wanted)
        send("10.7.0.7")
        assert host.udp() == [("10.99.0.1", "10.7.0.7")]
        assert shown("tc filter show dev vti7 egress").count("mirred") == 1
        bring_about(HostWays())
        assert "clsact" not in shown("tc qdisc"), "it is known to be ours after all"

    with_vti(story)


def test_each_child_of_a_vti_gets_what_its_policies_are_for_and_the_rest_is_left_to_the_kernel() -> None:
    def story(host: Tun, _: HostWays) -> None:
        with tun(HOST) as (other,):
            mine, others = choice(VTI_HOST, "10.7.0.0/24"), choice(HOST, "10.7.0.0/16")
            own = choice("", "10.7.0.9/32")  # of a child that VPP does not carry
            back = {VTI_HOST: index("vti7"), HOST: index("vti7")}

            def come() -> tuple[list[str], list[str]]:
                for to in ("10.7.0.5", "10.7.0.9", "10.7.1.5", "fd07::5"):
                    send(to)
                return [to for _, to in host.udp()], [to for _, to in other.udp()]

            bring_about(HostWays(out={index("vti7"): (own, mine, others)}, back=back))
            assert come() == (["10.7.0.5"], ["10.7.1.5"])
            assert receives(host, "10.7.0.5", "10.99.0.1", "vti7")
            assert receives(other, "10.7.1.5", "10.99.0.1", "vti7")
            bring_about(HostWays(out={index("vti7"): (own, others, mine)}, back=back))
            assert come() == ([], ["10.7.0.5", "10.7.1.5"])
            bring_about(
                HostWays(out={index("vti7"): (mine, choice("", "10.7.0.0/16"))}, back={VTI_HOST: index("vti7")})
            )
            assert come() == (["10.7.0.5", "10.7.0.9"], [])
            assert "clsact" not in shown(f"tc qdisc show dev {HOST}")

    with_vti(story)


def test_what_a_vti_has_for_host_interfaces_before_and_after_a_change_goes_there_all_the_time() -> None:
    def story(_: Tun, __: HostWays) -> None:
        with tun(HOST):
            vti = index("vti7")
            back = {VTI_HOST: vti, HOST: vti}
            bring_about(HostWays(out={vti: (choice(VTI_HOST, "10.7.0.0/24"), choice(HOST))}, back=back))
            listener = Listener()
            bring_about(HostWays(out={vti: (choice(VTI_HOST, "10.7.0.0/16"), choice(HOST))}, back=back))
            assert listener.kinds() == [NEWTFILTER, NEWTFILTER, DELTFILTER, DELTFILTER]
            bring_about(
                HostWays(
                    out={vti: (choice(VTI_HOST, "10.7.0.0/16"), choice(HOST), choice("", "10.9.0.0/16"))}, back=back
                )
            )
            assert listener.kinds() == [], "what changes nothing is not told"

    with_vti(story)


# All of it


def test_what_is_there_is_left_alone_by_the_next_run() -> None:
    def story(_: Tun, wanted: HostWays) -> None:
        with tun(HOST):
            ip("addr add 192.168.1.1/32 dev lo")
            both = with_vtis(to_host("10.1.0.0/16", source="192.168.1.1", throws=["10.1.0.9/32"]), wanted)
            both = replace(both, rules=RULES)
            bring_about(both)
            before = everything()
            listener = Listener()
            bring_about(both)
            assert listener.kinds() == []
            assert everything() == before

    with_vti(story)


def test_nothing_is_left_of_what_is_not_wanted() -> None:
    def story(_: Tun, wanted: HostWays) -> None:
        with tun(HOST):
            ip(f"link set {HOST} up", f"link set {VTI_HOST} up")
            before = everything()
            ways = with_vtis(to_host("10.1.0.0/16", throws=["10.1.0.9/32"]), wanted)
            bring_about(replace(ways, rules=RULES))
            assert everything() != before
            bring_about(HostWays())
            assert everything() == before

    with_vti(story)


def test_what_is_not_ours_stays() -> None:
    def story(_: Tun, wanted: HostWays) -> None:
        with tun(HOST):
            ip(f"link set {HOST} up", f"link set {VTI_HOST} up")
            ip("rule add pref 219 from 10.9.0.1 lookup main", "rule add pref 218 iif lo lookup 18768")
            ip("route add table 18768 10.6.0.0/16 via 10.0.0.7", "route add table 18768 throw 10.1.0.9/32")
            taken = "pref {} protocol all u32 match u32 0 0 action mirred egress mirror dev eth0"
            for command in (
                "tc qdisc add dev vti7 clsact",
                "tc filter add dev vti7 egress pref 5 protocol ip u32 match u32 0 0xf action mirred egress mirror dev eth0",
                f"tc filter add dev vti7 egress {taken.format(7)}",
                f"tc filter add dev vti7 ingress {taken.format(8)}",
            ):
                subprocess.run(command.split(), check=True, timeout=30)
            before = everything()
            both = with_vtis(to_host("10.1.0.0/16", throws=["10.1.0.9/32"]), wanted)
            bring_about(both)
            bring_about(both)
            assert shown("tc filter show dev vti7 egress").count("mirred") == 3
            bring_about(HostWays())
            assert everything() == before

    with_vti(story)


def test_a_qdisc_of_ours_that_others_use_stays() -> None:
    def story(_: Tun, wanted: HostWays) -> None:
        bring_about(wanted)
        other = (
            "tc filter add dev vti7 ingress pref 5 protocol ip u32 match u32 0 0xf action mirred egress mirror dev eth0"
        )
        subprocess.run(other.split(), check=True, timeout=30)
        bring_about(HostWays())
        assert "mirred" in shown("tc filter show dev vti7 ingress")
        assert "mirred" not in shown("tc filter show dev vti7 egress")

    with_vti(story)


def test_works_with_the_right_to_administer_the_network_and_no_other() -> None:
    def story(_: Tun, wanted: HostWays) -> None:
        with tun(HOST):
            both = replace(with_vtis(to_host("10.1.0.0/16", throws=["10.1.0.9/32"]), wanted), rules=RULES)
            confined(both, "-all,+net_admin")
            before = everything()
            listener = Listener()
            bring_about(both)
            assert listener.kinds() == []
            assert everything() == before

    with_vti(story)


def confined(wanted: HostWays, capabilities: str) -> str:
    """Bring about with few rights, and return what is refused."""
    code = (
        f"import pickle\nfrom vppipsec.xfrm.hostways import *\n"
        f"try: bring_about(pickle.loads({pickle.dumps(wanted)!r}))\nexcept HostError as error: print(error)"
    )
    command = ["setpriv", f"--bounding-set={capabilities}", "--no-new-privs", sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


# What does not work


def refused(wanted: HostWays) -> str:
    with pytest.raises(HostError) as caught:
        bring_about(wanted)
    return str(caught.value)


def test_a_host_interface_that_is_not_there_leaves_the_packets_with_the_kernel() -> None:
    def story(_: Tun, wanted: HostWays) -> None:
        before = everything()
        both = with_vtis(to_host("10.1.0.0/16"), vti_to("ipsec258"))
        assert refused(both) == "there is no interface ipsec256; there is no interface ipsec258"
        assert everything() == before
        with tun(HOST):
            bring_about(with_vtis(to_host("10.1.0.0/16"), wanted))
        assert refused(with_vtis(to_host("10.1.0.0/16"), wanted)) == "there is no interface ipsec256"
        assert "18768" not in shown("ip rule")
        assert VTI_HOST in shown("tc filter show dev vti7 egress"), "what works goes on"

    with_vti(story)


def test_an_interface_of_others_by_the_name_of_a_host_interface_is_not_touched() -> None:
    def story() -> None:
        ip(*links(HOST))
        before = shown(f"ip -d addr show {HOST}")
        assert refused(to_host("10.1.0.0/16")) == (
            "the interface ipsec256 is not a tun interface, so not VPP's: give it another name"
        )
        assert shown(f"ip -d addr show {HOST}") == before

    with_router(story)


def test_an_ingress_qdisc_on_a_vti_is_told_and_stays() -> None:
    def story(host: Tun, wanted: HostWays) -> None:
        subprocess.run(["tc", "qdisc", "add", "dev", "vti7", "ingress"], check=True, timeout=30)
        assert refused(wanted) == "vti7 has a qdisc of kind ingress where clsact is needed"
        assert "qdisc ingress" in shown("tc qdisc show dev vti7")
        send("10.7.0.5")
        assert host.udp() == []

    with_vti(story)


def test_a_vti_that_is_gone_is_told_and_the_others_are_served() -> None:
    def story(host: Tun, wanted: HostWays) -> None:
        with tun(HOST):
            both = replace(wanted, out={**wanted.out, 9999: (choice(HOST),)})
            assert refused(both) == "there is no interface with index 9999 any more"
        send("10.7.0.5")
        assert host.udp() == [("10.99.0.1", "10.7.0.5")]

    with_vti(story)


def test_a_source_that_is_not_the_routers_own_is_told_and_the_other_routes_are_there() -> None:
    def story() -> None:
        with tun(HOST):
            wanted = to_host(
                "10.1.0.0/16", "10.2.0.0/16", "10.3.0.0/16", "10.4.0.0/16", "10.5.0.0/16", source="10.77.0.1"
            )
            own = HostRoute(HOST, ipaddress.IPv4Address(OWN).packed)
            wanted = replace(wanted, routes={**wanted.routes, net("10.6.0.0/16"): own})
            said = refused(wanted)
            assert said.startswith("the kernel refused the route for 10.1.0.0/16: Invalid argument; ")
            assert said.endswith("; and 2 more")
            assert way("10.6.0.5").startswith(HOST)

    with_router(story)


def test_without_the_right_to_change_anything_nothing_changes() -> None:
    def story(_: Tun, wanted: HostWays) -> None:
        with tun(HOST):
            before = everything()
            said = confined(with_vtis(to_host("10.1.0.0/16"), wanted), "-net_admin")
            assert said.startswith("the kernel refused the settings of ipsec256: Operation not permitted; ")
            assert everything() == before

    with_vti(story)
