"""Packets that get marks, with the kernel of this machine. A tun of ours stands for VPP's.

Where that kernel has no ESP it never comes to an SA, so a table of nftables of the test's own marks in place of ours; the lab has
the real thing (`tests/lab/wirescenarios.py`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from support.host_kernel import HOST, PATH, everything, index, marks_to, sas, shown
from support.netns import in_new_netns, ip
from support.tuns import Tun, receives, send, tun
from support.veth_vti import links
from vppipsec.kernel.hostpath import nft_apply
from vppipsec.kernel.hostpath.apply import HostError, HostRedirects, apply_host_redirects
from vppipsec.kernel.hostpath.netlink_changes import ChangeRunner
from vppipsec.kernel.hostpath.nft_ruleset import HostLink
from vppipsec.kernel.netlink.socket import open_netlink
from vppipsec.kernel.netlink.wire import AF_INET, AF_INET6
from vppipsec.kernel.ownership import MARK_IN
from vppipsec.kernel.xfrm.socket import NETLINK_XFRM
from vppipsec.kernel.xfrm.values import MulticastGroup

pytestmark = pytest.mark.versions

OTHER_HOST = "ipsec257"
CHANGES = (5, 7, 8, 9, 11, 19)
"""Groups that tell of changes: RTNLGRP_IPV4_IFADDR, ROUTE and RULE, and IPv6's."""


class At(NamedTuple):
    """A tunnel of one family. `own` and `far` are within it, `local` and `peer` its ends."""

    family: int
    own: str = "10.1.0.1"
    far: str = "10.2.0.9"
    local: str = "192.0.2.1"
    peer: str = "192.0.2.9"

    def to(self, *hosts: str) -> HostRedirects:
        """Return what leads its packets to a host interface, and those of others to others."""
        return marks_to(*hosts, family=self.family)

    @property
    def name(self) -> str:
        """Its family, as nftables says it."""
        return "ip" if self.family == AF_INET else "ip6"

    @property
    def ip(self) -> str:
        """The command that is about its routes and rules."""
        return "ip -4" if self.family == AF_INET else "ip -6"

    @property
    def everything(self) -> str:
        """All of its addresses."""
        return "0.0.0.0/0" if self.family == AF_INET else "::/0"


V4, V6 = At(AF_INET), At(AF_INET6, "fd01::1", "fd02::9", "fd09::1", "fd09::9")
FAMILIES = pytest.mark.parametrize("at", [V4, V6], ids=("ip4", "ip6"))


def marking_table(at: At, name: str, hook: str, rule: str) -> None:
    """Make a table of nftables with one rule at a hook."""
    text = f"table {at.name} {name} {{\nchain c {{\ntype {hook}\n{rule}\n}}\n}}\n"
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True, timeout=30, env={"PATH": PATH})


def mark_of(name: str) -> int:
    return HostLink(name, index(name)).mark


def with_router(at: At, story: Callable[[Tun, Tun], None]) -> None:
    """Run in a namespace of a router whose packets for `far` go out by `bare`, unless a policy or a mark says otherwise.

    The story gets the host interface, and `bare`. Somebody listens for ACQUIREs, or sockets would refuse what a policy is for.
    """

    def work() -> None:
        ip("link set lo up", *links("eth0"))
        for each in (V4, V6):
            nodad = " nodad" if each is V6 else ""
            ip(
                f"addr add {each.local}/{24 if each is V4 else 64} dev eth0{nodad}",
                f"addr add {each.own} dev lo{nodad}",
            )
        with open_netlink(NETLINK_XFRM, (MulticastGroup.ACQUIRE,)), tun(HOST, "bare") as (host, bare):
            ip(f"link set {HOST} up", "link set bare up", f"route add {at.far} dev bare")
            story(host, bare)

    in_new_netns(work)


def want_esp(at: At) -> None:
    """Add the policies of a tunnel that has no SA: nothing for it goes out, or comes in, in clear."""
    ends = {"out": (at.own, at.far, at.local, at.peer), "in": (at.far, at.own, at.peer, at.local)}
    for way, (src, dst, here, there) in ends.items():
        ip(
            f"xfrm policy add src {src} dst {dst} dir {way} priority 9 tmpl src {here} dst {there} proto esp mode tunnel"
        )


@contextlib.contextmanager
def marked(at: At, mark: int) -> Iterator[None]:
    """Mark what goes to `far`, as if the kernel had been about to encrypt it by an SA."""
    marking_table(at, "test", "route hook output priority -89;", f"{at.name} daddr {at.far} meta mark set {mark:#x}")
    try:
        yield
    finally:
        shown(f"nft delete table {at.name} test")


def settings() -> list[str]:
    """Return IPv4's settings of the host interface that it takes."""
    place = Path("/proc/sys/net/ipv4/conf", HOST)
    names = ("rp_filter", "src_valid_mark", "disable_xfrm", "disable_policy")
    return [f"{name} {(place / name).read_text().strip()}" for name in names]


# What is marked


@FAMILIES
def test_only_marked_packets_bypass_policies_into_host_interfaces(at: At) -> None:
    def story(host: Tun, bare: Tun) -> None:
        send(at.far, from_=at.own)
        assert bare.udp() == [(at.own, at.far)]
        want_esp(at)
        apply_host_redirects(at.to(HOST))
        send(at.far, from_=at.own)
        assert (host.udp(), bare.udp()) == ([], [])
        with marked(at, mark_of(HOST)):
            send(at.far, from_=at.own)
            assert (host.udp(), bare.udp()) == ([(at.own, at.far)], [])
        with marked(at, mark_of("bare")):
            send(at.far, from_=at.own)
            assert (host.udp(), bare.udp()) == ([], [])

    with_router(at, story)


@FAMILIES
def test_long_packets_reach_the_host_interface_in_fragments(at: At) -> None:
    def story(host: Tun, _: Tun) -> None:
        ip(f"link set {HOST} mtu 9000", "link set bare mtu 9000")
        apply_host_redirects(at.to(HOST))
        host.udp()
        with marked(at, mark_of(HOST)), socket.socket(at.family, socket.SOCK_DGRAM) as sender:
            sender.sendto(bytes(3000), (at.far, 9))
        sizes = []
        while select.select([host._fd], [], [], 0.1)[0]:
            sizes.append(len(os.read(host._fd, 65536)))
        assert len(sizes) == 3
        assert 1280 < max(sizes) <= 1460

    with_router(at, story)


@FAMILIES
@pytest.mark.parametrize("rp_filter", [0, 1, 2])
def test_host_interface_input_passes_and_foreign_marks_do_not(at: At, rp_filter: int) -> None:
    def story(host: Tun, bare: Tun) -> None:
        Path("/proc/sys/net/ipv4/conf/all/rp_filter").write_text(str(rp_filter))
        want_esp(at)
        assert not receives(host, at.far, at.own)
        apply_host_redirects(at.to(HOST))
        assert receives(host, at.far, at.own)
        assert not receives(bare, at.far, at.own)
        for mark in (MARK_IN.value, mark_of(HOST)):
            marking_table(at, f"test{mark}", "filter hook prerouting priority 0;", f"meta mark set {mark:#x}")
            assert not receives(bare, at.far, at.own)
        assert receives(host, at.far, at.own)

    with_router(at, story)


@FAMILIES
def test_input_reaches_the_router_with_late_local_lookup(at: At) -> None:
    def story(host: Tun, _: Tun) -> None:
        for rule in ("add pref 32765 table local", "del pref 0 table local"):  # as VyOS does with VRFs
            shown(f"{at.ip} rule {rule}")
        assert "0:\tfrom all lookup local" not in shown(f"{at.ip} rule")
        apply_host_redirects(at.to(HOST))
        assert receives(host, at.far, at.own)

    with_router(at, story)


@FAMILIES
def test_a_mark_leads_the_routers_own_packets_alone(at: At) -> None:
    def story(_: Tun, __: Tun) -> None:
        apply_host_redirects(at.to(HOST))
        shown("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
        mark = mark_of(HOST)
        assert f"dev {HOST} " in shown(f"ip route get {at.far} mark {mark}")
        assert "dev bare " in shown(f"ip route get {at.far} from {at.peer} iif eth0 mark {mark}")

    with_router(at, story)


@pytest.mark.parametrize(
    ("at", "break_it"),
    [
        *(
            (at, each)
            for at in (V4, V6)
            for each in (
                "nft flush ruleset",
                f"{at.ip} rule del pref 218",
                f"{at.ip} route flush table {{mark}}",
                "ip link set ipsec256 down",
            )
        ),
        (V4, "sysctl -qw net.ipv4.conf.ipsec256.disable_xfrm=0"),
        (V6, "ip xfrm policy delete src ::/0 dst ::/0 dev ipsec256 dir out mark {mark}"),
    ],
)
def test_next_run_restores_what_was_removed_without_cleartext(at: At, break_it: str) -> None:
    def story(host: Tun, bare: Tun) -> None:
        want_esp(at)
        apply_host_redirects(at.to(HOST))
        before, mark = without_handles(), mark_of(HOST)
        subprocess.run(break_it.format(mark=mark).split(), check=True, timeout=30, env=os.environ | {"PATH": PATH})
        assert without_handles() != before
        with marked(at, mark):
            send(at.far, from_=at.own)
        assert bare.udp() == []
        assert (host.udp() != []) == break_it.startswith("nft"), "the test's own mark is not ours to lose"
        apply_host_redirects(at.to(HOST))
        assert without_handles() == before
        with marked(at, mark):
            send(at.far, from_=at.own)
        assert (host.udp(), bare.udp()) == ([(at.own, at.far)], [])

    with_router(at, story)


def without_handles() -> list[str]:
    """Return everything in no order that depends on when it was made, and settings."""
    return sorted(re.sub(r"handle \d+", "", everything()).splitlines()) + settings()


@FAMILIES
def test_recreated_host_interface_gets_another_mark(
    at: At,
) -> None:
    def story(_: Tun, bare: Tun) -> None:
        want_esp(at)
        marks = []
        for _ in range(2):
            with tun(OTHER_HOST) as (host,):
                apply_host_redirects(at.to(OTHER_HOST))
                marks.append(mark_of(OTHER_HOST))
                assert shown("nft list ruleset").count("0xc0") == 2
                with marked(at, marks[-1]):
                    send(at.far, from_=at.own)
                assert host.udp() == [(at.own, at.far)]
            for mark in marks:
                with marked(at, mark):
                    send(at.far, from_=at.own)
            assert bare.udp() == []
        apply_host_redirects(HostRedirects())
        assert "proto 73" not in shown(f"{at.ip} rule")
        assert "mark" not in shown("ip xfrm policy")

    with_router(at, story)


class Crash(BaseException):
    """The service ends."""


@pytest.mark.parametrize("on", [True, False], ids=("on", "off"))
@FAMILIES
def test_killed_at_any_step_nothing_leaks_and_the_next_run_completes(
    at: At, on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = at.to(HOST) if on else HostRedirects()
    done, nft_done, left = ChangeRunner._try, nft_apply._nft, 0

    def count() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Crash

    def counted(self: ChangeRunner, *arguments: object) -> bool:
        count()
        return done(self, *arguments)  # type: ignore[arg-type]  # whatever they are

    def counted_nft(*arguments: str, text: str = "") -> str:
        count()
        return nft_done(*arguments, text=text)

    def story(host: Tun, bare: Tun) -> None:
        nonlocal left
        want_esp(at)
        for steps in itertools.count():
            monkeypatch.undo()
            apply_host_redirects(HostRedirects() if on else at.to(HOST))
            monkeypatch.setattr(ChangeRunner, "_try", counted)
            monkeypatch.setattr(nft_apply, "_nft", counted_nft)
            left = steps
            with contextlib.suppress(Crash), marked(at, mark_of(HOST)):
                apply_host_redirects(wanted)
                break
            with marked(at, mark_of(HOST)):
                send(at.far, from_=at.own)
            send(at.far, from_=at.own)
            assert bare.udp() == []
        assert steps > 3
        monkeypatch.undo()
        apply_host_redirects(at.to(HOST))
        host.udp()
        with marked(at, mark_of(HOST)):
            send(at.far, from_=at.own)
        assert (host.udp(), bare.udp()) == ([(at.own, at.far)], [])

    with_router(at, story)


# What there is


@FAMILIES
def test_next_run_keeps_what_is_right_and_changes_in_place(at: At) -> None:
    def story(host: Tun, _: Tun) -> None:
        with tun(OTHER_HOST):
            apply_host_redirects(at.to(HOST))
            before = everything()
            assert shown(f"{at.ip} rule").count("proto 73") == 1
            with open_netlink(NETLINK_XFRM, (MulticastGroup.POLICY,)) as told, open_netlink(0, CHANGES) as changed:
                apply_host_redirects(at.to(HOST))
                assert everything() == before
                for quiet in (told, changed):
                    with pytest.raises(BlockingIOError):
                        quiet.recv(1 << 16)
            apply_host_redirects(at.to(HOST, OTHER_HOST))
            assert shown(f"{at.ip} rule").count("proto 73") == 2
            apply_host_redirects(at.to(OTHER_HOST))
            said = everything()
            assert f"{mark_of(HOST):#x}" not in said
            assert said.count(f"{mark_of(OTHER_HOST):#x}") == before.count(f"{mark_of(HOST):#x}")

    with_router(at, story)


@FAMILIES
def test_nothing_is_left_of_what_is_not_wanted_and_what_is_not_ours_stays(at: At) -> None:
    def story(_: Tun, __: Tun) -> None:
        want_esp(at)
        marking_table(at, "theirs", "route hook output priority -150;", "meta mark set 5")
        for rule in ("fwmark 0xc0000003/0xff lookup 100 pref 218", "fwmark 7 lookup 100 protocol 73"):
            subprocess.run([*at.ip.split(), "rule", "add", *rule.split()], check=True, timeout=30)
        ip(f"xfrm policy add src {at.everything} dst {at.everything} dir out mark 0xc0000003 action allow priority 0")
        before = everything()
        apply_host_redirects(at.to(HOST))
        assert everything() != before
        apply_host_redirects(HostRedirects())
        assert everything() == before

    with_router(at, story)


@FAMILIES
def test_works_with_net_admin_alone_and_adopts_earlier_state(
    at: At,
) -> None:
    def story(_: Tun, __: Tun) -> None:
        assert confined(at.to(HOST)) == ""
        before = everything()
        assert f"{mark_of(HOST):#x}" in before
        apply_host_redirects(at.to(HOST))
        assert everything() == before

    with_router(at, story)


def confined(wanted: HostRedirects) -> str:
    """Bring about as the service may, in another process, and return what is refused."""
    code = "from vppipsec.kernel.hostpath.apply import *\ntry: apply_host_redirects({})\nexcept HostError as error: print(error)"
    command = ["setpriv", "--bounding-set=-all,+net_admin", "--no-new-privs", sys.executable, "-c", code.format(wanted)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def test_ruleset_matches_family_endpoints_and_reqid() -> None:
    def story(_: Tun, __: Tun) -> None:
        ends = [(V4.local, V4.peer), (V6.local, V6.peer)]
        next_hops = {
            sas(reqid, *each, family): HOST for reqid in (0, 7) for each in ends for family in (AF_INET, AF_INET6)
        }
        apply_host_redirects(HostRedirects(marks=next_hops))
        pattern = r"nfproto (ipv\d) ipsec out (ip6?) saddr (\S+) .*daddr (\S+) ipsec out reqid (\d+)"
        outer = [("ip", *ends[0]), ("ip6", *ends[1])]
        expected = {(inner, *each, reqid) for reqid in "07" for each in outer for inner in ("ipv4", "ipv6")}
        assert {*re.findall(pattern, everything())} == expected
        assert shown("ip -4 rule").count("proto 73") == shown("ip -6 rule").count("proto 73") == 1
        apply_host_redirects(V4.to(HOST))
        assert (shown("ip -4 rule").count("proto 73"), shown("ip -6 rule").count("proto 73")) == (1, 0)
        assert "mark" not in shown("ip xfrm policy")

    with_router(V4, story)


# What does not work


def refused(wanted: HostRedirects) -> tuple[str, str]:
    """Return what is said of others and of marks."""
    with pytest.raises(HostError) as caught:
        apply_host_redirects(wanted)
    assert str(caught.value) == "; ".join(filter(None, (caught.value.other_problem, caught.value.mark_problem)))
    return caught.value.other_problem, caught.value.mark_problem


@FAMILIES
def test_without_the_program_nft_it_is_said_and_nothing_is_made(
    at: At, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def story(_: Tun, __: Tun) -> None:
        before = everything()
        monkeypatch.setitem(nft_apply._ENVIRONMENT, "PATH", str(tmp_path))
        other_problem, of_marks = refused(at.to(HOST))
        assert (other_problem, of_marks) == (
            "",
            "policies' packets cannot be marked: there is no program nft: install Debian's package nftables",
        )
        apply_host_redirects(HostRedirects())
        assert everything() == before

    with_router(at, story)


@FAMILIES
def test_what_the_kernel_lacks_is_said_and_nothing_is_made(
    at: At, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def story(_: Tun, __: Tun) -> None:
        before = everything()
        (tmp_path / "nft").write_text(
            "#!/bin/sh\n[ $1 = list ] && exit; echo '/dev/stdin:7:3-9: Error: Could not process rule: No such file or directory'"
            " >&2; exit 1\n"
        )
        (tmp_path / "nft").chmod(0o755)
        monkeypatch.setitem(nft_apply._ENVIRONMENT, "PATH", f"{tmp_path}:{PATH}")
        said = "policies' packets cannot be marked: nft fails: Could not process rule: No such file or directory"
        assert refused(at.to(HOST)) == ("", said)
        assert everything() == before

    with_router(at, story)


def test_host_interface_without_ipv6_is_reported_and_carries_ipv4() -> None:
    def story(host: Tun, bare: Tun) -> None:
        with tun(OTHER_HOST) as (other,):
            Path(f"/proc/sys/net/ipv6/conf/{OTHER_HOST}/disable_ipv6").write_text("1")
            wanted = HostRedirects(marks=V6.to(OTHER_HOST, HOST).marks | V4.to(OTHER_HOST).marks)
            other_problem, of_marks = refused(wanted)
            assert other_problem == ""
            assert of_marks.startswith(f"the kernel refused the IPv6 route to {OTHER_HOST}: ")
            want_esp(V6)
            with marked(V6, mark_of(HOST)):
                send(V6.far, from_=V6.own)
            assert (host.udp(), bare.udp()) == ([(V6.own, V6.far)], [])
            ip(f"route add {V4.far} dev bare")
            with marked(V4, mark_of(OTHER_HOST)):
                send(V4.far, from_=V4.own)
            assert (other.udp(), bare.udp()) == ([(V4.own, V4.far)], [])

    with_router(V6, story)


@FAMILIES
def test_missing_host_interface_is_reported_and_the_rest_works(at: At) -> None:
    def story(_: Tun, __: Tun) -> None:
        assert refused(at.to("ipsec300", HOST)) == ("there is no interface ipsec300", "")
        assert f"reqid 2 meta mark set {mark_of(HOST):#x}" in shown("nft list ruleset")

    with_router(at, story)
