"""Host interfaces, with the kernel of this machine. A tun of ours stands for VPP's, a veth for a VTI where there are none."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace

import pytest

from support.host_kernel import (
    HOST,
    VTI_HOST,
    Listener,
    choice,
    everything,
    marks_to,
    refused,
    settled,
    shown,
    vti_to,
    with_router,
    with_vti,
)
from support.netns import ip
from support.tuns import Tun, send, tun
from support.veth_vti import links
from vppipsec.kernel.hostpath.apply import HostRedirects, apply_host_redirects
from vppipsec.kernel.netlink.wire import AF_INET6

pytestmark = pytest.mark.versions

MARKS = marks_to(HOST).marks | marks_to(HOST, family=AF_INET6).marks


def test_a_host_interface_keeps_its_addresses() -> None:
    def story() -> None:
        with tun(HOST):
            ip(f"link set {HOST} up", f"addr add fd05::1/64 dev {HOST} nodad")
            before = settled(HOST)
            assert "inet6 fe80" in before
            apply_host_redirects(marks_to(HOST))
            assert shown(f"ip -d addr show dev {HOST}") == before

    with_router(story)


# All of it


def test_what_is_there_is_left_alone_by_the_next_run() -> None:
    def story(_: Tun, wanted: HostRedirects) -> None:
        with tun(HOST):
            both = replace(wanted, marks=MARKS)
            apply_host_redirects(both)
            before = everything()
            listener = Listener()
            apply_host_redirects(both)
            assert listener.kinds() == []
            assert everything() == before

    with_vti(story)


def test_nothing_is_left_of_what_is_not_wanted() -> None:
    def story(_: Tun, wanted: HostRedirects) -> None:
        with tun(HOST):
            ip(f"link set {HOST} up", f"link set {VTI_HOST} up")
            before = everything()
            apply_host_redirects(replace(wanted, marks=MARKS))
            assert everything() != before
            apply_host_redirects(HostRedirects())
            assert everything() == before

    with_vti(story)


def test_what_is_not_ours_stays() -> None:
    def story(_: Tun, wanted: HostRedirects) -> None:
        with tun(HOST):
            ip(f"link set {HOST} up", f"link set {VTI_HOST} up")
            ip("rule add pref 218 iif lo lookup 18768", "rule add pref 218 fwmark 7 iif lo lookup 100 protocol 73")
            taken = "pref {} protocol all u32 match u32 0 0 action mirred egress mirror dev eth0"
            for command in (
                "tc qdisc add dev vti7 clsact",
                "tc filter add dev vti7 egress pref 5 protocol ip u32 match u32 0 0xf action mirred egress mirror dev eth0",
                f"tc filter add dev vti7 egress {taken.format(7)}",
                f"tc filter add dev vti7 ingress {taken.format(8)}",
            ):
                subprocess.run(command.split(), check=True, timeout=30)
            before = everything()
            both = replace(wanted, marks=MARKS)
            apply_host_redirects(both)
            apply_host_redirects(both)
            assert shown("tc filter show dev vti7 egress").count("mirred") == 3
            apply_host_redirects(HostRedirects())
            assert everything() == before

    with_vti(story)


def test_a_qdisc_of_ours_that_others_use_stays() -> None:
    def story(_: Tun, wanted: HostRedirects) -> None:
        apply_host_redirects(wanted)
        other = (
            "tc filter add dev vti7 ingress pref 5 protocol ip u32 match u32 0 0xf action mirred egress mirror dev eth0"
        )
        subprocess.run(other.split(), check=True, timeout=30)
        apply_host_redirects(HostRedirects())
        assert "mirred" in shown("tc filter show dev vti7 ingress")
        assert "mirred" not in shown("tc filter show dev vti7 egress")

    with_vti(story)


def test_works_with_the_right_to_administer_the_network_and_no_other() -> None:
    def story(_: Tun, wanted: HostRedirects) -> None:
        with tun(HOST):
            both = replace(wanted, marks=MARKS)
            confined(both, "-all,+net_admin")
            before = everything()
            listener = Listener()
            apply_host_redirects(both)
            assert listener.kinds() == []
            assert everything() == before

    with_vti(story)


def confined(wanted: HostRedirects, capabilities: str) -> str:
    """Bring about with few rights, and return what is refused."""
    code = (
        f"import pickle\nfrom vppipsec.kernel.hostpath.apply import *\n"
        f"try: apply_host_redirects(pickle.loads({pickle.dumps(wanted)!r}))\nexcept HostError as error: print(error)"
    )
    command = ["setpriv", f"--bounding-set={capabilities}", "--no-new-privs", sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


# What does not work


def test_without_a_host_interface_the_kernel_keeps_the_packets() -> None:
    def story(_: Tun, wanted: HostRedirects) -> None:
        before = everything()
        both = replace(vti_to("ipsec258"), marks=MARKS)
        assert refused(both) == "there is no interface ipsec256; there is no interface ipsec258"
        assert everything() == before
        with tun(HOST):
            apply_host_redirects(replace(wanted, marks=MARKS))
        assert refused(replace(wanted, marks=MARKS)) == "there is no interface ipsec256"
        assert "proto 73" not in shown("ip rule")
        assert VTI_HOST in shown("tc filter show dev vti7 egress"), "what works goes on"

    with_vti(story)


def test_of_many_problems_the_first_are_told_in_full() -> None:
    said = "; ".join(f"there is no interface ipsec30{number}" for number in range(3))

    def story() -> None:
        assert refused(marks_to(*(f"ipsec30{number}" for number in range(5)))) == f"{said}; and 2 more"

    with_router(story)


def test_foreign_interface_with_a_host_interface_name_is_not_touched() -> None:
    def story() -> None:
        ip(*links(HOST))
        before = settled(HOST)
        assert refused(marks_to(HOST)) == (
            "the interface ipsec256 is not a tun interface, so not VPP's: give it another name"
        )
        assert shown(f"ip -d addr show dev {HOST}") == before

    with_router(story)


def test_an_ingress_qdisc_on_a_vti_is_told_and_stays() -> None:
    def story(host: Tun, wanted: HostRedirects) -> None:
        subprocess.run(["tc", "qdisc", "add", "dev", "vti7", "ingress"], check=True, timeout=30)
        assert refused(wanted) == "vti7 has a qdisc of kind ingress where clsact is needed"
        assert "qdisc ingress" in shown("tc qdisc show dev vti7")
        send("10.7.0.5")
        assert host.udp() == []

    with_vti(story)


def test_a_vti_that_is_gone_is_told_and_the_others_are_served() -> None:
    def story(host: Tun, wanted: HostRedirects) -> None:
        with tun(HOST):
            both = replace(wanted, to_host={**wanted.to_host, 9999: (choice(HOST),)})
            assert refused(both) == "there is no interface with index 9999 any more"
        send("10.7.0.5")
        assert host.udp() == [("10.99.0.1", "10.7.0.5")]

    with_vti(story)


def test_without_the_right_to_change_anything_nothing_changes() -> None:
    def story(_: Tun, wanted: HostRedirects) -> None:
        with tun(HOST):
            before = everything()
            said = confined(replace(wanted, marks=MARKS), "-net_admin")
            assert said.startswith("the kernel refused the settings of ipsec256: Operation not permitted; ")
            assert everything() == before

    with_vti(story)
