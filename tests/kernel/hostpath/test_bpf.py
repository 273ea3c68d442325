"""Which child of a VTI takes a packet: programs in filters of this machine's kernel, with packets of all kinds."""

from __future__ import annotations

import ipaddress
import itertools
import os
import random
import select
import socket
import struct
import subprocess
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest

from support.build import make_policy
from support.netns import in_new_netns, ip
from support.tuns import Tun, tun
from support.veth_vti import links
from vppipsec.kernel.hostpath.bpf import MATCH_ALL, Choice, choice_program
from vppipsec.kernel.hostpath.tc import EGRESS, Redirect, TcFilters
from vppipsec.kernel.xfrm.values import Mark, Selector

TCP, UDP, ICMP, ICMP6, SCTP, GRE = 6, 17, 1, 58, 132, 47
HOSTS = ("ipsec256", "ipsec257")
_SO_MARK = 36


class Packet(NamedTuple):
    """A packet. `ports` are source and destination, or ICMP's type and code; `fragment` is the field of that name in IPv4."""

    src: str
    dst: str
    proto: int = UDP
    ports: tuple[int, int] = (1000, 2000)
    fragment: int = 0
    options: bool = False
    before: tuple[int, ...] = ()
    mark: int = 0

    def built(self) -> bytes:
        ends = ipaddress.ip_address(self.src).packed + ipaddress.ip_address(self.dst).packed
        ports = struct.pack(">BB" if self.proto in (ICMP, ICMP6) else ">HH", *self.ports)
        body = ports + bytes(16)
        if len(ends) == 8:
            words = 6 if self.options else 5
            head = struct.pack(">BBHHHBBH", 0x40 + words, 0, 4 * words + len(body), 1, self.fragment, 64, self.proto, 0)
            return head + ends + bytes(4 * words - 20) + body
        kinds = [*self.before, self.proto]
        for kind, following in reversed([*itertools.pairwise(kinds)]):
            body = (bytes((following, 1)) + bytes(14) if kind != 44 else bytes((following, 0)) + bytes(6)) + body
        return struct.pack(">IHBB", 6 << 28, len(body), kinds[0], 64) + ends + body


def choice(host: str, dst: str, src: str = "", mark: Mark | None = None, **ports: int) -> Choice:
    """Return the choice of a host interface by a policy, whose ports are given as in `Selector`, under a full mask."""
    policy = make_policy(src=src or ("::/0" if ":" in dst else "0.0.0.0/0"), dst=dst)
    fields = {"proto": ports.get("proto", 0)}
    for key in ("sport", "dport"):
        if key in ports:
            fields |= {key: ports[key], f"{key}_mask": ports.get(f"{key}_mask", 0xFFFF)}
    made = policy.selector
    return Choice(
        Selector(made.family, made.daddr, made.prefixlen_d, made.saddr, made.prefixlen_s, **fields), mark, host
    )


def decided(choices: Sequence[Choice], packets: Sequence[Packet]) -> list[str]:
    """Return where the kernel sends packets on a VTI that has these policies: to a host interface, or nowhere special."""
    found: list[str] = []

    def work() -> None:
        ip(*links("vti7"), "link set vti7 arp off")
        subprocess.run(["tc", "qdisc", "add", "dev", "vti7", "clsact"], check=True, timeout=30)
        with tun(*HOSTS) as tuns, TcFilters() as filters, socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM) as wire:
            for name in HOSTS:
                ip(f"link set {name} up")
                program = choice_program(choices, name)
                filters.add(Redirect(socket.if_nametoindex("vti7"), EGRESS, socket.if_nametoindex(name), program), 7)
            for each in packets:
                wire.setsockopt(socket.SOL_SOCKET, _SO_MARK, each.mark)
                wire.sendto(each.built(), ("vti7", 0x86DD if ":" in each.dst else 0x0800))
                found.append(" ".join(it.name for it in tuns if each.built() in _read(it)))

    in_new_netns(work)
    return found


def _read(it: Tun) -> list[bytes]:
    """Return what has come: a filter hands it over before its sender goes on."""
    found = []
    while select.select([it.fileno()], [], [], 0)[0]:
        found.append(os.read(it.fileno(), 65536))
    return found


ONE, TWO = HOSTS
WEB = choice(ONE, "10.2.0.0/16", "10.1.0.0/16", proto=TCP, dport=80)
REST = choice(TWO, "10.2.0.0/16")
WEB6 = choice(ONE, "fd02::/16", "fd01::/64", proto=TCP, dport=80)
REST6 = choice(TWO, "fd02::/16")


@pytest.mark.parametrize(
    ("choices", "packet", "host"),
    [
        ([WEB, REST], Packet("10.1.0.1", "10.2.0.1", TCP, (1, 80)), ONE),
        ([WEB, REST], Packet("10.1.0.1", "10.2.0.1", TCP, (1, 80), options=True), ONE),
        ([WEB, REST], Packet("10.1.0.1", "10.2.0.1", TCP, (80, 1)), TWO),
        ([WEB, REST], Packet("10.1.0.1", "10.2.0.1", UDP, (1, 80)), TWO),
        ([WEB, REST], Packet("10.9.0.1", "10.2.0.1", TCP, (1, 80)), TWO),
        ([WEB, REST], Packet("10.1.0.1", "10.3.0.1", TCP, (1, 80)), ""),
        ([REST, WEB], Packet("10.1.0.1", "10.2.0.1", TCP, (1, 80)), TWO),
        ([WEB, REST], Packet("10.1.0.1", "10.2.0.1", TCP, (1, 80), fragment=0x2000), TWO),
        ([WEB, REST], Packet("10.1.0.1", "10.2.0.1", TCP, (1, 80), fragment=5), TWO),
        ([WEB], Packet("10.1.0.1", "10.2.0.1", TCP, (1, 80), fragment=0x2000), ""),
        ([WEB, REST], Packet("10.1.0.1", "10.2.0.1", TCP, (1, 80), fragment=0x4000), ONE),  # may not be fragmented
        ([choice(ONE, "10.2.0.0/16", proto=TCP)], Packet("10.1.0.1", "10.2.0.1", TCP, fragment=0x2000), ONE),
        ([WEB6, REST6], Packet("fd01::1", "fd02::1", TCP, (1, 80)), ONE),
        ([WEB6, REST6], Packet("fd01::1", "fd02::1", TCP, (1, 80), before=(0, 43, 60)), ONE),
        ([WEB6, REST6], Packet("fd01::1", "fd02::1", TCP, (1, 80), before=(44,)), TWO),
        ([WEB6, REST6], Packet("fd01:0:0:1::1", "fd02::1", TCP, (1, 80)), TWO),
        ([choice(ONE, "fd02::/16", proto=UDP)], Packet("fd01::1", "fd02::1", UDP, before=(0, 44)), ONE),
        ([choice(ONE, "fd02::/16", proto=TCP)], Packet("fd01::1", "fd02::1", UDP, before=(0, 44)), ""),
        ([WEB, REST6], Packet("fd01::1", "fd02::1"), TWO),
        ([choice(ONE, "0.0.0.0/0")], Packet("fd01::1", "fd02::1"), ""),
        ([choice(ONE, "::/0")], Packet("10.1.0.1", "10.2.0.1"), ""),
        ([choice(ONE, "0.0.0.0/0"), REST], Packet("10.1.0.1", "10.2.0.1"), ONE),
        ([choice("", "10.2.0.0/24"), REST], Packet("10.1.0.1", "10.2.0.1"), ""),
        ([choice("", "10.2.0.0/24"), REST], Packet("10.1.0.1", "10.2.1.1"), TWO),
        ([choice(ONE, "10.2.0.0/16", proto=ICMP, sport=8), REST], Packet("10.1.0.1", "10.2.0.1", ICMP, (8, 0)), ONE),
        ([choice(ONE, "10.2.0.0/16", proto=ICMP, sport=8), REST], Packet("10.1.0.1", "10.2.0.1", ICMP, (0, 8)), TWO),
        ([choice(ONE, "fd02::/16", proto=ICMP6, sport=1, dport=4)], Packet("fd01::1", "fd02::1", ICMP6, (1, 4)), ONE),
        ([choice(ONE, "fd02::/16", proto=ICMP6, sport=1, dport=4)], Packet("fd01::1", "fd02::1", ICMP6, (1, 3)), ""),
        ([choice(ONE, "10.2.0.0/16", dport=5, dport_mask=0xFFFE)], Packet("10.1.0.1", "10.2.0.1", SCTP, (1, 4)), ONE),
        ([choice(ONE, "10.2.0.0/16", dport=5, dport_mask=0xFFFE)], Packet("10.1.0.1", "10.2.0.1", SCTP, (1, 6)), ""),
        ([choice(ONE, "10.2.0.0/16", proto=GRE, sport=8)], Packet("10.1.0.1", "10.2.0.1", GRE, (8, 8)), ""),
        ([choice(ONE, "10.2.0.0/16", mark=Mark(2, 3)), REST], Packet("10.1.0.1", "10.2.0.1", mark=6), ONE),
        ([choice(ONE, "10.2.0.0/16", mark=Mark(2, 3)), REST], Packet("10.1.0.1", "10.2.0.1", mark=3), TWO),
    ],
)
def test_the_first_policy_that_matches_a_packet_chooses(choices: list[Choice], packet: Packet, host: str) -> None:
    assert decided(choices, [packet]) == [host]


def test_policies_of_all_kinds_choose_as_they_say() -> None:
    dice = random.Random(4950)
    nets = {
        4: ("0.0.0.0/0", "10.0.0.0/8", "10.2.0.0/15", "10.2.3.0/24", "10.2.3.4/32"),
        6: ("::/0", "fd02::/20", "fd02::1/128"),
    }
    hosts = {
        4: ("10.2.3.4", "10.2.3.5", "10.3.0.1", "10.9.0.1", "192.0.2.1"),
        6: ("fd02::1", "fd02::2", "fd02:fff::1", "fe00::1"),
    }
    for _ in range(8):
        choices = []
        for _ in range(12):
            family = nets[dice.choice((4, 6))]
            ports = {key: dice.choice((53, 80)) for key in ("sport", "dport") if dice.random() < 0.2}
            proto = {"proto": dice.choice((TCP, UDP))} if ports or dice.random() < 0.3 else {}
            host = dice.choice((*HOSTS, ""))
            choices.append(choice(host, dice.choice(family), dice.choice(family), **ports, **proto))
        packets = []
        for _ in range(100):
            family = hosts[dice.choice((4, 6))]
            ends = dice.choice(family), dice.choice(family)
            packets.append(Packet(*ends, dice.choice((TCP, UDP)), (dice.choice((53, 80)), dice.choice((53, 80)))))
        expected = [next((it.host for it in choices if _matches(it.selector, packet)), "") for packet in packets]
        assert decided(choices, packets) == expected


def _matches(it: Selector, packet: Packet) -> bool:
    ends = (packet.src, it.saddr, it.prefixlen_s), (packet.dst, it.daddr, it.prefixlen_d)
    if any(ipaddress.ip_address(at) not in ipaddress.ip_network((net, length)) for at, net, length in ends):
        return False
    sport, dport = packet.ports
    return (
        it.proto in (0, packet.proto)
        and not (sport ^ it.sport) & it.sport_mask
        and not (dport ^ it.dport) & it.dport_mask
    )


def test_as_many_policies_as_a_vti_may_have_fit_a_program() -> None:
    many = [choice(ONE, f"10.{n >> 8}.{n & 255}.0/24", "10.2.0.0/15", proto=UDP, dport=9) for n in range(200)]
    many += [choice(ONE, f"fd02:{n:x}::/32", "fd01::/64", proto=UDP, dport=9) for n in range(100)]
    last = [Packet("10.2.0.1", "10.0.199.1", ports=(1, 9)), Packet("fd01::1", "fd02:63::1", ports=(1, 9))]
    assert decided([*many, choice(TWO, "0.0.0.0/0")], [*last, Packet("10.2.0.1", "10.0.200.1", ports=(1, 9))]) == [
        ONE,
        ONE,
        TWO,
    ]


def test_what_a_filter_is_can_be_read_back() -> None:
    def work(filters: TcFilters, here: int, there: int) -> None:
        wanted = [
            Redirect(here, EGRESS, there, choice_program([WEB, REST], ONE)),
            Redirect(here, EGRESS, there, MATCH_ALL),
        ]
        for each in wanted:
            filters.add(each, 7)
        found = filters.list_filters(here, EGRESS)
        assert {(each.preference, each.redirect) for each in found} == {(7, each) for each in wanted}
        filters.delete(next(each for each in found if each.redirect == wanted[0]))
        assert [each.redirect for each in filters.list_filters(here, EGRESS)] == wanted[1:]

    _with_filters(work)


def test_a_filter_of_another_kind_is_told_from_ours() -> None:
    def work(filters: TcFilters, here: int, there: int) -> None:
        other = (
            "tc filter add dev vti7 egress pref 5 protocol all u32 match u32 0 0 action mirred egress mirror dev eth0"
        )
        subprocess.run(other.split(), check=True, timeout=30)
        found = filters.list_filters(here, EGRESS)
        assert {(each.preference, each.redirect) for each in found} == {(5, Redirect(here, EGRESS, 0, b""))}

    _with_filters(work)


def _with_filters(work: Callable[[TcFilters, int, int], None]) -> None:
    def story() -> None:
        ip(*links("vti7", "eth0"))
        subprocess.run(["tc", "qdisc", "add", "dev", "vti7", "clsact"], check=True, timeout=30)
        with TcFilters() as filters:
            work(filters, socket.if_nametoindex("vti7"), socket.if_nametoindex("eth0"))

    in_new_netns(story)
