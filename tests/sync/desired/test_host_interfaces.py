"""Which tunnels get a host interface, and what the kernel sends there, policy by policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from support.build import LOCAL, LOCAL6, REMOTE, REMOTE6, host_policies, make_policy, prefix_of
from vppipsec.kernel.hostpath.apply import HostRedirects
from vppipsec.kernel.hostpath.bpf import Choice
from vppipsec.kernel.hostpath.nft_ruleset import TunnelSas
from vppipsec.kernel.netlink.wire import AF_INET, AF_INET6
from vppipsec.kernel.route.model import Vti
from vppipsec.kernel.xfrm.sad_spd import TunnelKey, tunnel_keys_of_policy
from vppipsec.kernel.xfrm.values import Mark, Policy, PolicyDir
from vppipsec.sync.desired.host_interfaces import (
    MAX_HOST_INTERFACES,
    choose_host_interfaces,
    host_interface_candidates,
    host_redirects,
    local_addresses,
    multicast_tables,
    why_kernel_sends,
)
from vppipsec.sync.desired.outbound_policy import outbound_policies
from vppipsec.vpp.types import Prefix, Route

LAN, BACK, OTHER = bytes((10, 1, 0, 1)), bytes((10, 1, 0, 9)), bytes((172, 16, 0, 1))
ANYWHERE = make_policy(dst="0.0.0.0/0").selector
LAN6 = bytes.fromhex("fd01") + bytes(13) + b"\1"
OWN = frozenset({LAN, BACK, LOCAL, OTHER, LAN6})
VTI = Vti(7, 40, "vti0", True, 0, ())
VTIS = {7: VTI, 8: Vti(8, 41, "vti1", True, 100, ())}
THIRD = bytes((192, 0, 2, 77))


def prefix(text: str) -> Prefix:
    return Prefix(*prefix_of(text))


def group(policy: Policy) -> TunnelKey:
    return tunnel_keys_of_policy(policy)[0]


def redirects(policies: list[Policy], hosts: Mapping[TunnelKey, str]) -> HostRedirects:
    return host_redirects(outbound_policies(policies), hosts, OWN, VTIS.get)


PLAIN = make_policy()
ELSEWHERE = make_policy(dst="10.3.0.0/16", reqid=3, ends=(LOCAL, THIRD))
PLAIN6 = make_policy(src="fd01::/64", dst="fd02::/64", reqid=6, ends=(LOCAL6, REMOTE6))
OVER_VTI = make_policy(src="0.0.0.0/0", dst="0.0.0.0/0", reqid=7, if_id=7)


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (PLAIN, ""),
        (OVER_VTI, ""),
        (make_policy(src="fd01::/64", dst="fd02::/64", if_id=7), ""),
        (make_policy(src="10.9.0.0/24", if_id=8), ""),
        (make_policy(if_id=9), "no interface of the kernel's has its if_id"),
        (host_policies(0)[0], "its policy is in transport mode"),
        (make_policy(if_id=7, selector=replace(PLAIN.selector, ifindex=3)), "its policy names an interface"),
        (make_policy(selector=replace(PLAIN.selector, ifindex=3)), ""),
        (make_policy(selector=replace(PLAIN.selector, proto=6)), ""),
        (make_policy(dst="0.0.0.0/0", selector=replace(ANYWHERE, proto=6)), ""),
        (PLAIN6, ""),
        (make_policy(src="::/0", dst="::/0", ends=(LOCAL6, REMOTE6)), ""),
        (make_policy(src="fd01::/64", dst="2001:db8::2/128", ends=(LOCAL6, REMOTE6)), ""),
        (replace(PLAIN6, selector=replace(PLAIN6.selector, proto=132, dport=9, dport_mask=0xFFFF)), ""),
        (make_policy(src="fd09::/64", dst="fd02::/64"), "the router has no address that its policy is for"),
        (
            make_policy(src="fd01::/64", dst="fd02::/64", priority=0),
            "its policy has priority 0, before which nothing goes",
        ),
        (make_policy(priority=0), ""),
        (make_policy(dst="0.0.0.0/0", selector=replace(ANYWHERE, proto=17)), ""),
        (make_policy(selector=replace(PLAIN.selector, proto=1, sport=8, sport_mask=0xFFFF)), ""),
        (make_policy(selector=replace(PLAIN.selector, proto=6, dport=65535, dport_mask=0xFFFF)), ""),
        (make_policy(dst="0.0.0.0/0"), ""),
        (make_policy(dst="192.0.2.2/32", ends=(LOCAL, bytes((192, 0, 2, 2)))), ""),
        (make_policy(src="10.9.0.0/24"), "the router has no address that its policy is for"),
    ],
)
def test_why_the_kernel_goes_on_to_encrypt_is_said(policy: Policy, reason: str) -> None:
    assert why_kernel_sends(policy, OWN, VTIS.get) == reason
    assert host_interface_candidates(outbound_policies([policy]), OWN, VTIS.get) == ([] if reason else [group(policy)])


def test_vtis_go_first_and_policies_that_encrypt_nothing_do_not_count() -> None:
    marked, blocked = make_policy(reqid=4, mark=Mark(1, 1)), make_policy(reqid=5, action=1)
    twice = make_policy(reqid=6, templates=2 * PLAIN.templates)
    policies = [
        PLAIN,
        marked,
        blocked,
        twice,
        make_policy(templates=()),
        make_policy(PolicyDir.IN),
        OVER_VTI,
        ELSEWHERE,
    ]
    assert host_interface_candidates(outbound_policies(policies), OWN, VTIS.get) == [
        group(OVER_VTI),
        group(PLAIN),
        group(ELSEWHERE),
    ]


def test_those_that_have_a_host_interface_keep_it_when_there_are_too_many() -> None:
    keys = [group(make_policy(reqid=n)) for n in range(1, MAX_HOST_INTERFACES + 6)]
    assert choose_host_interfaces(keys, ()) == frozenset(keys[:MAX_HOST_INTERFACES])
    assert choose_host_interfaces(keys, keys[MAX_HOST_INTERFACES:]) == {
        *keys[: MAX_HOST_INTERFACES - 5],
        *keys[MAX_HOST_INTERFACES:],
    }
    assert choose_host_interfaces(keys[:3], keys) == frozenset(keys[:3])


def test_vtis_with_host_interfaces_receive_multicast_by_family() -> None:
    of6, in_vrf = make_policy(src="::/0", dst="::/0", reqid=9, if_id=7), make_policy(reqid=10, if_id=8)
    policies = outbound_policies([PLAIN, OVER_VTI, of6, in_vrf])
    assert multicast_tables(policies, {group(PLAIN)}, VTIS.get) == set()
    assert multicast_tables(policies, {group(OVER_VTI), group(in_vrf)}, VTIS.get) == {(0, False), (100, False)}
    assert multicast_tables(policies, {group(of6)}, VTIS.get) == {(0, True)}


def test_without_a_host_interface_the_kernel_is_left_alone() -> None:
    assert redirects([PLAIN, OVER_VTI], {}) == HostRedirects()


def test_all_policies_of_a_vti_choose_the_child_in_the_kernels_order() -> None:
    second = make_policy(dst="10.8.0.0/16", reqid=8, if_id=7, priority=500)
    lacking = make_policy(dst="10.9.0.0/16", reqid=9, if_id=7, priority=400)
    blocked = make_policy(dst="10.8.1.0/24", reqid=8, if_id=7, priority=300, action=1)
    marked = make_policy(dst="10.8.2.0/24", reqid=8, if_id=7, priority=200, mark=Mark(1, 1))
    elsewhere = make_policy(dst="10.8.3.0/24", src="10.9.0.0/24", reqid=9, if_id=7, priority=100)
    in_vrf = make_policy(reqid=10, if_id=8)
    hosts = {group(OVER_VTI): "ipsec256", group(second): "ipsec257", group(in_vrf): "ipsec258"}
    found = redirects([OVER_VTI, second, in_vrf, lacking, blocked, marked, elsewhere], hosts)
    assert found.marks == {}
    assert found.from_host == {"ipsec256": 40, "ipsec257": 40, "ipsec258": 41}
    assert found.to_host == {
        41: (Choice(in_vrf.selector, None, "ipsec258"),),
        40: (
            Choice(elsewhere.selector, None, ""),
            Choice(marked.selector, Mark(1, 1), ""),
            Choice(blocked.selector, None, ""),
            Choice(lacking.selector, None, ""),
            Choice(second.selector, None, "ipsec257"),
            Choice(OVER_VTI.selector, None, "ipsec256"),
        ),
    }


def test_vti_policies_that_match_no_redirected_packet_are_omitted() -> None:
    many = [make_policy(dst=f"10.{n}.0.0/16", reqid=n, if_id=7) for n in range(10, 40)]
    wide = make_policy(dst="10.0.0.0/8", reqid=50, if_id=7)
    found = redirects([*many, wide], {group(many[3]): "ipsec256"})
    assert found.to_host == {40: (Choice(many[3].selector, None, "ipsec256"), Choice(wide.selector, None, ""))}


def test_a_vti_without_a_host_interface_is_left_alone() -> None:
    other = make_policy(dst="10.3.0.0/16", reqid=3)
    found = redirects([OVER_VTI, other], {group(other): "ipsec256"})
    assert (found.to_host, found.from_host) == ({}, {})


def test_marks_follow_the_family_and_sas_the_kernel_would_use() -> None:
    mixed = make_policy(src="fd01::/64", dst="fd03::/64", reqid=1)  # IPv6 in the tunnel of PLAIN
    hosts = {group(PLAIN): "ipsec256", group(PLAIN6): "ipsec257"}
    plain = {TunnelSas(LOCAL, REMOTE, 1, AF_INET): "ipsec256"}
    found = redirects([PLAIN6, mixed, PLAIN, make_policy(dst="10.9.0.0/16"), ELSEWHERE, OVER_VTI], hosts)
    assert found == HostRedirects(
        marks={
            **plain,
            TunnelSas(LOCAL, REMOTE, 1, AF_INET6): "ipsec256",
            TunnelSas(LOCAL6, REMOTE6, 6, AF_INET6): "ipsec257",
        }
    )
    assert redirects([PLAIN6, PLAIN], {group(PLAIN): "ipsec256"}).marks == plain
    also = replace(PLAIN6, templates=(*PLAIN6.templates, *PLAIN.templates))
    assert redirects([also, PLAIN6, PLAIN], hosts).marks == {}, "the kernel would begin with the same SAs"


def test_vpp_gets_routes_to_own_addresses_it_does_not_have() -> None:
    in_vrf = make_policy(src="10.1.0.0/24", dst="0.0.0.0/0", reqid=8, if_id=8)
    policies = outbound_policies([PLAIN, OVER_VTI, ELSEWHERE, in_vrf])
    main, red = ({Route(Prefix(address, 32), table) for address in (BACK, OTHER)} for table in (0, 100))

    def told(*hosts: Policy, unknown: set[Route] = main | red) -> set[Route]:
        return {*local_addresses(policies, {group(each) for each in hosts}, unknown, VTIS.get)}

    assert told(PLAIN) == {Route(Prefix(BACK, 32))}
    assert told(OVER_VTI) == main
    assert told(in_vrf) == {Route(Prefix(BACK, 32), 100)}
    assert told(OVER_VTI, in_vrf) == {*main, Route(Prefix(BACK, 32), 100)}
    assert told(OVER_VTI, in_vrf, unknown=set()) == told() == set()
