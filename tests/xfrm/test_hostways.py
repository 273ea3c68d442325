"""Host interfaces, with the kernel of this machine. A tun of ours stands for VPP's, a veth for a VTI where there are none."""

from __future__ import annotations

import ipaddress
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hostkernel import (
    DELROUTE,
    HOST,
    NEWROUTE,
    NEWRULE,
    OWN,
    PEER,
    POLICY,
    RULES,
    VTI_HOST,
    Listener,
    choice,
    everything,
    net,
    refused,
    shown,
    to_host,
    vti_to,
    way,
    with_router,
    with_vti,
    with_vtis,
)
from netns import ip
from tuns import Tun, receives, send, tun
from vethvti import links
from vppipsec.xfrm.hostways import HostRoute, HostWays, bring_about
from vppipsec.xfrm.wire import message_type

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
