"""IPv6 packets that get marks, with the kernel of this machine. A tun of ours stands for VPP's.

Where that kernel has no ESP it never comes to an SA, so a table of nftables of the test's own marks in place of ours; the lab has
the real thing (`tests/lab/wirescenarios.py`).
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import re
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from netns import in_new_netns, ip
from tuns import Tun, receives, send, tun
from vethvti import links
from vppipsec.xfrm import marking
from vppipsec.xfrm.changes import Attempts
from vppipsec.xfrm.hostways import HostError, HostWays, bring_about
from vppipsec.xfrm.marks import IN, Host, TunnelSas
from vppipsec.xfrm.netlink import open_netlink
from vppipsec.xfrm.socket import NETLINK_XFRM
from vppipsec.xfrm.values import Group

HOST, OTHER_HOST = "ipsec256", "ipsec257"
OWN, FAR, LOCAL, PEER = "fd01::1", "fd02::9", "fd09::1", "fd09::9"
PATH = marking._ENVIRONMENT["PATH"]


def sas(reqid: int, local: str = LOCAL, peer: str = PEER) -> TunnelSas:
    return TunnelSas(ipaddress.ip_address(local).packed, ipaddress.ip_address(peer).packed, reqid)


def to(*hosts: str) -> HostWays:
    """Return what leads each tunnel's packets to a host interface; reqids count from 1."""
    return HostWays(marks={sas(number): name for number, name in enumerate(hosts, 1)})


def shown(*command: str) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30, env=os.environ | {"PATH": PATH})
    return ran.stdout


def marking_table(name: str, hook: str, rule: str) -> None:
    """Make a table of nftables with one rule at a hook."""
    text = f"table ip6 {name} {{\nchain c {{\ntype {hook}\n{rule}\n}}\n}}\n"
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True, timeout=30, env={"PATH": PATH})


def everything() -> str:
    """Return all that there is of it in the kernel. Of nftables with handles: what is made anew gets new ones."""
    rules = shown("ip", "-6", "rule"), shown("ip", "-6", "route", "show", "table", "all", "proto", "73")
    return "\n".join((*rules, shown("ip", "xfrm", "policy"), shown("nft", "-a", "list", "ruleset")))


def mark_of(name: str) -> int:
    return Host(name, int(shown("ip", "-o", "link", "show", name).split(":")[0])).mark


def with_router(story: Callable[[Tun, Tun], None]) -> None:
    """Run in a namespace of a router whose packets for FAR go out by `bare`, unless a policy or a mark says otherwise.

    The story gets the host interface, and `bare`. Somebody listens for ACQUIREs, or sockets would refuse what a policy is for.
    """

    def work() -> None:
        ip("link set lo up", *links("eth0"), f"addr add {LOCAL}/64 dev eth0 nodad", f"addr add {OWN}/64 dev lo nodad")
        with open_netlink(NETLINK_XFRM, (Group.ACQUIRE,)), tun(HOST, "bare") as (host, bare):
            ip(f"link set {HOST} up", "link set bare up", f"route add {FAR} dev bare")
            story(host, bare)

    in_new_netns(work)


def want_esp() -> None:
    """Add the policies of a tunnel that has no SA: nothing for it goes out, or comes in, in clear."""
    ends = {"out": (OWN, FAR, LOCAL, PEER), "in": (FAR, OWN, PEER, LOCAL)}
    for way, (src, dst, here, there) in ends.items():
        ip(
            f"xfrm policy add src {src} dst {dst} dir {way} priority 9 tmpl src {here} dst {there} proto esp mode tunnel"
        )


@contextlib.contextmanager
def marked(mark: int) -> Iterator[None]:
    """Mark what goes to FAR, as if the kernel had been about to encrypt it by an SA."""
    marking_table("test", "route hook output priority -89;", f"ip6 daddr {FAR} meta mark set {mark:#x}")
    try:
        yield
    finally:
        shown("nft", "delete", "table", "ip6", "test")


# What is marked


def test_what_is_marked_goes_in_clear_into_the_host_interface_in_spite_of_a_policy_and_nothing_else() -> None:
    def story(host: Tun, bare: Tun) -> None:
        send(FAR, from_=OWN)
        assert bare.udp() == [(OWN, FAR)]
        want_esp()
        bring_about(to(HOST))
        send(FAR, from_=OWN)
        assert (host.udp(), bare.udp()) == ([], [])
        with marked(mark_of(HOST)):
            send(FAR, from_=OWN)
            assert (host.udp(), bare.udp()) == ([(OWN, FAR)], [])
        with marked(mark_of("bare")):
            send(FAR, from_=OWN)
            assert (host.udp(), bare.udp()) == ([], [])

    with_router(story)


def test_what_is_long_comes_to_the_host_interface_in_fragments_that_fit_a_tunnel() -> None:
    def story(host: Tun, _: Tun) -> None:
        ip(f"link set {HOST} mtu 9000", "link set bare mtu 9000")
        bring_about(to(HOST))
        host.udp()
        with marked(mark_of(HOST)), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender:
            sender.sendto(bytes(3000), (FAR, 9))
        sizes = []
        while select.select([host._fd], [], [], 0.1)[0]:
            sizes.append(len(os.read(host._fd, 65536)))
        assert len(sizes) == 3
        assert 1280 < max(sizes) <= 1460

    with_router(story)


def test_what_comes_in_by_the_host_interface_is_let_in_and_what_others_mark_is_not() -> None:
    def story(host: Tun, bare: Tun) -> None:
        want_esp()
        assert not receives(host, FAR, OWN)
        bring_about(to(HOST))
        assert receives(host, FAR, OWN)
        assert not receives(bare, FAR, OWN)
        marking_table("test", "filter hook prerouting priority 0;", f"meta mark set {IN.value:#x}")
        assert not receives(bare, FAR, OWN)
        assert receives(host, FAR, OWN)

    with_router(story)


@pytest.mark.parametrize(
    "break_it",
    [
        "nft flush ruleset",
        "ip -6 rule del pref 218",
        "ip -6 route flush table {mark}",
        "ip xfrm policy delete src ::/0 dst ::/0 dev ipsec256 dir out mark {mark}",
        "ip link set ipsec256 down",
    ],
)
def test_whatever_somebody_takes_away_nothing_leaves_in_clear_and_the_next_run_puts_it_back(break_it: str) -> None:
    def story(host: Tun, bare: Tun) -> None:
        want_esp()
        bring_about(to(HOST))
        before, mark = without_handles(), mark_of(HOST)
        subprocess.run(break_it.format(mark=mark).split(), check=True, timeout=30, env=os.environ | {"PATH": PATH})
        assert without_handles() != before
        with marked(mark):
            send(FAR, from_=OWN)
        assert bare.udp() == []
        assert (host.udp() != []) == break_it.startswith("nft"), "the test's own mark is not ours to lose"
        bring_about(to(HOST))
        assert without_handles() == before
        with marked(mark):
            send(FAR, from_=OWN)
        assert (host.udp(), bare.udp()) == ([(OWN, FAR)], [])

    with_router(story)


def without_handles() -> list[str]:
    """Return everything in no order that depends on when it was made."""
    return sorted(re.sub(r"handle \d+", "", everything()).splitlines())


def test_when_the_host_interface_is_gone_nothing_leaves_in_clear_and_the_next_one_of_its_name_gets_another_mark() -> (
    None
):
    def story(_: Tun, bare: Tun) -> None:
        want_esp()
        marks = []
        for _ in range(2):
            with tun(OTHER_HOST) as (host,):
                bring_about(to(OTHER_HOST))
                marks.append(mark_of(OTHER_HOST))
                assert shown("nft", "list", "ruleset").count("0xc0") == 1
                with marked(marks[-1]):
                    send(FAR, from_=OWN)
                assert host.udp() == [(OWN, FAR)]
            for mark in marks:
                with marked(mark):
                    send(FAR, from_=OWN)
            assert bare.udp() == []
        bring_about(HostWays())
        assert "proto 73" not in shown("ip", "-6", "rule")
        assert "mark" not in shown("ip", "xfrm", "policy")

    with_router(story)


class Crash(BaseException):
    """The service ends."""


@pytest.mark.parametrize("wanted", [to(HOST), HostWays()], ids=("on", "off"))
def test_wherever_the_service_is_killed_nothing_leaves_in_clear_and_the_next_run_goes_on(
    wanted: HostWays, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, nft_done, left = Attempts._try, marking._nft, 0

    def count() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Crash

    def counted(self: Attempts, *arguments: object) -> bool:
        count()
        return done(self, *arguments)  # type: ignore[arg-type]  # whatever they are

    def counted_nft(*arguments: str, text: str = "") -> str:
        count()
        return nft_done(*arguments, text=text)

    def story(host: Tun, bare: Tun) -> None:
        nonlocal left
        want_esp()
        for steps in itertools.count():
            monkeypatch.undo()
            bring_about(to(HOST) if wanted == HostWays() else HostWays())
            monkeypatch.setattr(Attempts, "_try", counted)
            monkeypatch.setattr(marking, "_nft", counted_nft)
            left = steps
            with contextlib.suppress(Crash), marked(mark_of(HOST)):
                bring_about(wanted)
                break
            with marked(mark_of(HOST)):
                send(FAR, from_=OWN)
            send(FAR, from_=OWN)
            assert bare.udp() == []
        assert steps > 4
        monkeypatch.undo()
        bring_about(to(HOST))
        host.udp()
        with marked(mark_of(HOST)):
            send(FAR, from_=OWN)
        assert (host.udp(), bare.udp()) == ([(OWN, FAR)], [])

    with_router(story)


# What there is


def test_what_is_there_is_left_alone_by_the_next_run_and_is_changed_in_place() -> None:
    def story(host: Tun, _: Tun) -> None:
        with tun(OTHER_HOST):
            bring_about(to(HOST))
            before = everything()
            assert shown("ip", "-6", "rule").count("proto 73") == 1
            with open_netlink(NETLINK_XFRM, (Group.POLICY,)) as told, open_netlink(0, (11, 19)) as changed:
                bring_about(to(HOST))
                assert everything() == before
                for quiet in (told, changed):
                    with pytest.raises(BlockingIOError):
                        quiet.recv(1 << 16)
            bring_about(to(HOST, OTHER_HOST))
            assert shown("ip", "-6", "rule").count("proto 73") == 2
            bring_about(to(OTHER_HOST))
            said = everything()
            assert f"{mark_of(HOST):#x}" not in said
            assert said.count(f"{mark_of(OTHER_HOST):#x}") == before.count(f"{mark_of(HOST):#x}")

    with_router(story)


def test_nothing_is_left_of_what_is_not_wanted_and_what_is_not_ours_stays() -> None:
    def story(_: Tun, __: Tun) -> None:
        want_esp()
        marking_table("theirs", "route hook output priority -150;", "meta mark set 5")
        for rule in ("fwmark 0xc0000003/0xff lookup 100 pref 218", "fwmark 7 lookup 100 protocol 73"):
            subprocess.run(["ip", "-6", "rule", "add", *rule.split()], check=True, timeout=30)
        ip("xfrm policy add src ::/0 dst ::/0 dir out mark 0xc0000003 action allow priority 0")
        before = everything()
        bring_about(to(HOST))
        assert everything() != before
        bring_about(HostWays())
        assert everything() == before

    with_router(story)


def test_works_with_the_right_to_administer_the_network_and_no_other_and_what_another_process_made_is_adopted() -> None:
    def story(_: Tun, __: Tun) -> None:
        assert confined(to(HOST)) == ""
        before = everything()
        assert f"{mark_of(HOST):#x}" in before
        bring_about(to(HOST))
        assert everything() == before

    with_router(story)


def confined(wanted: HostWays) -> str:
    """Bring about as the service may, in another process, and return what is refused."""
    code = "from vppipsec.xfrm.hostways import *\ntry: bring_about({})\nexcept HostError as error: print(error)"
    command = ["setpriv", "--bounding-set=-all,+net_admin", "--no-new-privs", sys.executable, "-c", code.format(wanted)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def test_sas_of_either_family_are_told_apart_by_both_ends_and_reqid() -> None:
    def story(_: Tun, __: Tun) -> None:
        ways = {sas(7): HOST, sas(7, "192.0.2.1", "192.0.2.9"): HOST, sas(0): HOST}
        bring_about(HostWays(marks=ways))
        found = re.findall(r"ipsec out (ip6?) saddr (\S+) .*daddr (\S+) ipsec out reqid (\d+)", everything())
        v6 = ("ip6", LOCAL, PEER)
        assert sorted(found) == [("ip", "192.0.2.1", "192.0.2.9", "7"), (*v6, "0"), (*v6, "7")]

    with_router(story)


# What does not work


def refused(wanted: HostWays) -> tuple[str, str]:
    """Return what is said of others and of marks."""
    with pytest.raises(HostError) as caught:
        bring_about(wanted)
    assert str(caught.value) == "; ".join(filter(None, (caught.value.of_others, caught.value.of_marks)))
    return caught.value.of_others, caught.value.of_marks


def test_without_the_program_nft_it_is_said_and_nothing_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def story(_: Tun, __: Tun) -> None:
        before = everything()
        monkeypatch.setitem(marking._ENVIRONMENT, "PATH", str(tmp_path))
        of_others, of_marks = refused(to(HOST))
        assert (of_others, of_marks) == (
            "",
            "IPv6 of policies: there is no program nft: install Debian's package nftables",
        )
        bring_about(HostWays())
        assert everything() == before

    with_router(story)


def test_what_the_kernel_lacks_is_said_and_nothing_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def story(_: Tun, __: Tun) -> None:
        before = everything()
        (tmp_path / "nft").write_text(
            "#!/bin/sh\n[ $1 = list ] && exit; echo '/dev/stdin:7:3-9: Error: Could not process rule: No such file or directory'"
            " >&2; exit 1\n"
        )
        (tmp_path / "nft").chmod(0o755)
        monkeypatch.setitem(marking._ENVIRONMENT, "PATH", f"{tmp_path}:{PATH}")
        said = "IPv6 of policies: nft fails: Could not process rule: No such file or directory"
        assert refused(to(HOST)) == ("", said)
        assert everything() == before

    with_router(story)


def test_a_host_interface_without_ipv6_is_told_and_the_others_are_led_to() -> None:
    def story(host: Tun, bare: Tun) -> None:
        with tun(OTHER_HOST):
            Path(f"/proc/sys/net/ipv6/conf/{OTHER_HOST}/disable_ipv6").write_text("1")
            of_others, of_marks = refused(to(OTHER_HOST, HOST))
            assert of_others == ""
            assert of_marks.startswith(f"the kernel refused the IPv6 route to {OTHER_HOST}: ")
            assert f"{mark_of(OTHER_HOST):#x}" not in shown("nft", "list", "ruleset")
            want_esp()
            with marked(mark_of(HOST)):
                send(FAR, from_=OWN)
            assert (host.udp(), bare.udp()) == ([(OWN, FAR)], [])

    with_router(story)


def test_a_host_interface_that_is_not_there_is_told_and_the_others_are_led_to() -> None:
    def story(_: Tun, __: Tun) -> None:
        assert refused(to("ipsec300", HOST)) == ("there is no interface ipsec300", "")
        assert f"reqid 2 meta mark set {mark_of(HOST):#x}" in shown("nft", "list", "ruleset")

    with_router(story)
