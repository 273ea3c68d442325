"""Host interfaces of VTIs, with the kernel of this machine; a veth stands for a VTI where there are none."""

from __future__ import annotations

import pytest

from support.host_kernel import (
    DELTFILTER,
    HOST,
    NEWTFILTER,
    VTI_HOST,
    Listener,
    choice,
    index,
    shown,
    vti_to,
    with_vti,
)
from support.tuns import Tun, receives, send, tun
from vppipsec.kernel.hostpath.apply import HostWays, bring_about

pytestmark = pytest.mark.versions


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
