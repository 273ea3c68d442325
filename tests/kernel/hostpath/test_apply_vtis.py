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
from vppipsec.kernel.hostpath.apply import HostRedirects, apply_host_redirects

pytestmark = pytest.mark.versions


def test_what_the_kernel_sends_on_a_vti_goes_out_by_its_host_interface() -> None:
    def story(host: Tun, wanted: HostRedirects) -> None:
        apply_host_redirects(wanted)
        send("10.7.0.5")
        send("fd07::5")
        send("10.8.0.5")
        assert host.udp() == [("10.99.0.1", "10.7.0.5"), ("fd99::1", "fd07::5")]

    with_vti(story)


def test_host_interface_input_arrives_as_on_the_vti() -> None:
    def story(host: Tun, wanted: HostRedirects) -> None:
        apply_host_redirects(wanted)
        assert receives(host, "10.7.0.5", "10.99.0.1", "vti7")
        assert receives(host, "fd07::5", "fd99::1", "vti7")
        assert not receives(host, "10.7.0.5", "10.99.0.1", VTI_HOST)

    with_vti(story)


def test_a_vti_without_its_host_interface_drops_and_serves_the_next_one() -> None:
    def story(host: Tun, wanted: HostRedirects) -> None:
        with tun(HOST) as (first,):
            apply_host_redirects(vti_to(HOST))
            send("10.7.0.5")
            assert first.udp() == [("10.99.0.1", "10.7.0.5")]
        send("10.7.0.6")
        assert host.udp() == []
        apply_host_redirects(wanted)
        send("10.7.0.7")
        assert host.udp() == [("10.99.0.1", "10.7.0.7")]
        assert shown("tc filter show dev vti7 egress").count("mirred") == 1
        apply_host_redirects(HostRedirects())
        assert "clsact" not in shown("tc qdisc"), "it is known to be ours after all"

    with_vti(story)


def test_each_vti_child_gets_its_packets_and_the_kernel_the_rest() -> None:
    def story(host: Tun, _: HostRedirects) -> None:
        with tun(HOST) as (other,):
            mine, others = choice(VTI_HOST, "10.7.0.0/24"), choice(HOST, "10.7.0.0/16")
            own = choice("", "10.7.0.9/32")  # of a child that VPP does not carry
            back = {VTI_HOST: index("vti7"), HOST: index("vti7")}

            def come() -> tuple[list[str], list[str]]:
                for to in ("10.7.0.5", "10.7.0.9", "10.7.1.5", "fd07::5"):
                    send(to)
                return [to for _, to in host.udp()], [to for _, to in other.udp()]

            apply_host_redirects(HostRedirects(to_host={index("vti7"): (own, mine, others)}, from_host=back))
            assert come() == (["10.7.0.5"], ["10.7.1.5"])
            assert receives(host, "10.7.0.5", "10.99.0.1", "vti7")
            assert receives(other, "10.7.1.5", "10.99.0.1", "vti7")
            apply_host_redirects(HostRedirects(to_host={index("vti7"): (own, others, mine)}, from_host=back))
            assert come() == ([], ["10.7.0.5", "10.7.1.5"])
            apply_host_redirects(
                HostRedirects(
                    to_host={index("vti7"): (mine, choice("", "10.7.0.0/16"))}, from_host={VTI_HOST: index("vti7")}
                )
            )
            assert come() == (["10.7.0.5", "10.7.0.9"], [])
            assert "clsact" not in shown(f"tc qdisc show dev {HOST}")

    with_vti(story)


def test_unchanged_redirects_of_a_vti_hold_during_a_change() -> None:
    def story(_: Tun, __: HostRedirects) -> None:
        with tun(HOST):
            vti = index("vti7")
            back = {VTI_HOST: vti, HOST: vti}
            apply_host_redirects(
                HostRedirects(to_host={vti: (choice(VTI_HOST, "10.7.0.0/24"), choice(HOST))}, from_host=back)
            )
            listener = Listener()
            apply_host_redirects(
                HostRedirects(to_host={vti: (choice(VTI_HOST, "10.7.0.0/16"), choice(HOST))}, from_host=back)
            )
            assert listener.kinds() == [NEWTFILTER, NEWTFILTER, DELTFILTER, DELTFILTER]
            apply_host_redirects(
                HostRedirects(
                    to_host={vti: (choice(VTI_HOST, "10.7.0.0/16"), choice(HOST), choice("", "10.9.0.0/16"))},
                    from_host=back,
                )
            )
            assert listener.kinds() == [], "what changes nothing is not told"

    with_vti(story)
