"""The model of the kernel's policy lookup, held against the kernel of this machine: packets that it forwards in a namespace."""

from __future__ import annotations

import errno
import itertools
import select
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6Unknown, IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import GRE, Ether
from scapy.packet import Packet as ScapyPacket
from scapy.packet import Raw

from support import spd
from support.netlink_encode import flush_policies, flush_sas, new_policy
from support.netns import in_new_netns, ip
from support.policy_sets import packets, policies
from support.recorded import PATIENCE_S
from support.spd import Fragment, Packet, lookup, target_of
from vppipsec.kernel.netlink.messages import NLM_F_ACK, NLM_F_REQUEST, error_of
from vppipsec.kernel.netlink.wire import HEADER
from vppipsec.kernel.xfrm.events import Acquired
from vppipsec.kernel.xfrm.values import MsgType, Policy
from vppipsec.kernel.xfrm.wire import decode_xfrm
from vppipsec.sync.desired.policy_layers import Action

_NETLINK_XFRM = 6
_GROUP_ACQUIRE = 1
_ETH_P_ALL = 3


class Router:
    """This kernel as a router between two veth pairs: we send into one, and listen to what leaves by the other."""

    def __init__(self) -> None:
        ip("link set lo up", "link add lan type veth peer name wire", "link add wan type veth peer name far")
        for name in ("all", "lan"):
            _write(f"ipv4/conf/{name}/rp_filter", "0")
        _write("ipv4/ip_forward", "1")
        _write("ipv6/conf/all/forwarding", "1")
        ip("link set wan arp off", *(f"link set {name} up" for name in ("lan", "wire", "wan", "far")))
        ip("route add default dev wan", "route add ::/0 dev wan")
        self._ends = Ether(dst=_mac_of("lan"), src=_mac_of("wire"))
        self._wire = self._packet_socket("wire")
        self._wan = self._packet_socket("wan")
        self._asking = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_XFRM)
        self._asking.bind((0, 0))
        self._acquires = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_XFRM)
        self._acquires.bind((0, 1 << (_GROUP_ACQUIRE - 1)))
        self._sent = 0

    def close(self) -> None:
        """Close the sockets."""
        for each in (self._wire, self._wan, self._asking, self._acquires):
            each.close()

    def install(self, actual: Sequence[Policy]) -> None:
        """Have the kernel hold these policies, in this order, and no others."""
        self._ask(flush_policies())
        for policy in actual:
            self._ask(new_policy(policy))

    def forward(self, packet: Packet) -> Policy | Action:
        """Send a packet through the router: what became of it, or the policy whose SA the kernel asked for."""
        self._ask(flush_sas())  # else it asks once for all packets of a policy
        self._sent += 1
        mark = b"packet %08d" % self._sent
        blocked = _blocked()
        self._wire.send(bytes(self._ends / _as_bytes(packet) / Raw(mark)))
        while select.select([self._wan, self._acquires], [], [], 0.02 if _blocked() > blocked else PATIENCE_S)[0]:
            for ready in select.select([self._wan, self._acquires], [], [], 0)[0]:
                data = ready.recv(65536)
                if ready is self._acquires:
                    event = decode_xfrm(data)
                    assert isinstance(event, Acquired)
                    return event.policy
                if mark in data:
                    return Action.BYPASS
        assert _blocked() > blocked, f"{packet} is lost"
        return Action.DISCARD

    def _ask(self, message: bytes) -> None:
        length, kind, _, _, _ = HEADER.unpack_from(message)
        head = HEADER.pack(length, kind, NLM_F_REQUEST | NLM_F_ACK, 1, 0)
        self._asking.send(head + message[HEADER.size :])
        trouble = error_of(self._asking.recv(65536))
        if trouble not in (0, errno.ESRCH):  # there was nothing to flush
            raise OSError(trouble, f"the kernel refused message {MsgType(kind).name}")

    @staticmethod
    def _packet_socket(name: str) -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        made.bind((name, _ETH_P_ALL))
        return made


def _mac_of(name: str) -> str:
    shown = subprocess.run(["ip", "-o", "link", "show", name], check=True, capture_output=True, text=True, timeout=10)
    return shown.stdout.split("link/ether ")[1].split()[0]


def _write(name: str, text: str) -> None:
    Path("/proc/sys/net", name).write_text(text)


def _blocked() -> int:
    """Return how many packets policies have blocked, in the namespace of this thread."""
    lines = Path("/proc/thread-self/net/xfrm_stat").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("XfrmOutPolBlock"))


def _as_bytes(packet: Packet) -> ScapyPacket:
    src, dst = (socket.inet_ntop(socket.AF_INET6 if len(it) == 16 else socket.AF_INET, it) for it in packet[:2])
    match packet.proto:
        case spd.TCP:
            inner: ScapyPacket = TCP(sport=packet.sport, dport=packet.dport)
        case spd.UDP:
            inner = UDP(sport=packet.sport, dport=packet.dport)
        case spd.ICMP:
            inner = ICMP(type=packet.sport, code=packet.dport)
        case spd.ICMP6:
            inner = ICMPv6Unknown(type=packet.sport, code=packet.dport)
        case _:
            inner = GRE()
    offset = 3 if isinstance(packet, Fragment) else 0
    if len(packet.src) == 4:
        return IP(src=src, dst=dst, proto=packet.proto, frag=offset) / inner
    if offset:
        return IPv6(src=src, dst=dst) / IPv6ExtHdrFragment(nh=packet.proto, offset=offset) / inner
    return IPv6(src=src, dst=dst, nh=packet.proto) / inner


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Policy], list[Packet]]:
    ip6 = draw(st.booleans())
    actual = draw(st.lists(policies(ip6), min_size=1, max_size=9, unique_by=lambda it: it.selector))
    whole = packets(ip6, actual).filter(lambda packet: packet.src != packet.dst)
    return actual, draw(st.lists(whole | whole.map(lambda packet: Fragment(*packet)), min_size=4, max_size=8))


@pytest.fixture
def router() -> Iterator[list[Router]]:
    """Return where to keep a router that is closed in the end."""
    made: list[Router] = []
    yield made
    for each in made:
        each.close()


def test_model_of_the_lookup_agrees_with_this_kernel(router: list[Router]) -> None:
    met = set()

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(cases())
    def agrees(case: tuple[list[Policy], list[Packet]]) -> None:
        actual, sent = case
        router[0].install(actual)
        for packet in sent:
            policy = lookup(actual, packet)
            expected, found = target_of(policy), router[0].forward(packet)
            if policy is not None and not isinstance(expected, Action):
                assert isinstance(found, Policy), (packet, policy)
                assert (found.selector, found.priority) == (policy.selector, policy.priority), packet
            else:
                assert found == expected, (packet, policy)
            met.add((type(packet), expected if isinstance(expected, Action) else Policy))

    def work() -> None:
        try:
            router.append(Router())
        except (OSError, subprocess.CalledProcessError) as why:
            pytest.skip(f"this kernel cannot be made a router here: {why}")
        agrees()

    in_new_netns(work)
    assert met == {*itertools.product((Packet, Fragment), (Action.BYPASS, Action.DISCARD, Policy))}
