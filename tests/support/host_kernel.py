"""Shared by tests of host interfaces: a router in a network namespace, its redirects, and its present state."""

from __future__ import annotations

import ipaddress
import os
import socket
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from support.build import make_policy
from support.netns import in_new_netns, ip
from support.tuns import Tun, tun
from support.veth_vti import links
from vppipsec.kernel.hostpath.apply import HostError, HostRedirects, apply_host_redirects
from vppipsec.kernel.hostpath.bpf import Choice
from vppipsec.kernel.hostpath.nft_apply import _ENVIRONMENT
from vppipsec.kernel.hostpath.nft_ruleset import TunnelSas
from vppipsec.kernel.netlink.socket import open_netlink
from vppipsec.kernel.netlink.wire import AF_INET, message_type, messages_in

PATH = _ENVIRONMENT["PATH"]
HOST = "ipsec256"
VTI_HOST = "ipsec257"
OWN, PEER = "10.0.0.1", "10.0.0.9"
POLICY = "dir {} tmpl src {} dst {} proto esp mode tunnel"
_ROUTE_GROUPS = (1, 4, 7, 8)  # RTNLGRP_LINK, TC, IPV4_ROUTE, IPV4_RULE
NEWLINK, NEWROUTE, DELROUTE, NEWRULE, DELRULE, NEWTFILTER, DELTFILTER = 16, 24, 25, 32, 33, 44, 45


def packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


def sas(reqid: int, local: str = OWN, peer: str = PEER, family: int = AF_INET) -> TunnelSas:
    return TunnelSas(packed(local), packed(peer), reqid, family)


def marks_to(*hosts: str, family: int = AF_INET) -> HostRedirects:
    """Return redirects of policies' packets to host interfaces, one tunnel each; reqids count from 1."""
    return HostRedirects(marks={sas(number, family=family): name for number, name in enumerate(hosts, 1)})


def vti_to(host: str) -> HostRedirects:
    """Return redirects from the VTI to a host interface, and back."""
    return HostRedirects(to_host={index("vti7"): (choice(host), choice(host, "::/0"))}, from_host={host: index("vti7")})


def choice(host: str, dst: str = "0.0.0.0/0", src: str = "", **changes: Any) -> Choice:
    """Return a policy's choice of a host interface, or of the kernel."""
    return Choice(
        make_policy(src=src or ("::/0" if ":" in dst else "0.0.0.0/0"), dst=dst, **changes).selector, None, host
    )


def shown(command: str) -> str:
    env = os.environ | {"PATH": PATH}
    return subprocess.run(command.split(), capture_output=True, text=True, timeout=30, env=env).stdout


def everything() -> str:
    """Return all redirects in the kernel as text. It includes nftables handles: new rules get new handles."""
    next_hops = [f"ip {family} {what}" for family in ("-4", "-6") for what in ("rule", "route show table all proto 73")]
    commands = (*next_hops, "ip xfrm policy", "nft -a list ruleset", "tc qdisc", *_filters("vti7", HOST))
    return "\n".join(map(shown, commands))


def _filters(*names: str) -> list[str]:
    return [f"tc filter show dev {name} {hook}" for name in names for hook in ("ingress", "egress")]


def settled(name: str) -> str:
    """Return a link with its addresses once the kernel has noticed that it is up: until then they are tentative."""
    early = ("state DOWN", "LOWERLAYERDOWN", "tentative")
    while any(word in (found := shown(f"ip -d addr show dev {name}")) for word in early):
        pass
    return found


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
    """Captures the kernel's messages about links, filters, IPv4 routes and rules."""

    def __init__(self) -> None:
        self._socket = open_netlink(0, _ROUTE_GROUPS)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)

    def told(self) -> list[bytes]:
        found: list[bytes] = []
        while True:
            try:
                found += map(bytes, messages_in(self._socket.recv(1 << 16)))
            except BlockingIOError:
                return found

    def kinds(self) -> list[int]:
        return [message_type(message) for message in self.told()]


def with_vti(story: Callable[[Tun, HostRedirects], None]) -> None:
    def work() -> None:
        ip(*links("vti7"), "addr add 10.99.0.1/30 dev vti7", "addr add fd99::1/64 dev vti7 nodad")
        if "NOARP" not in shown("ip link show vti7"):
            ip("link set vti7 arp off")
        ip("route add 10.7.0.0/16 dev vti7", "route add fd07::/48 dev vti7")
        for any_ip in ("0.0.0.0/0", "::/0"):  # as an IKE daemon installs them for a VTI
            ip(
                *(
                    f"xfrm policy add src {any_ip} dst {any_ip} {POLICY.format(to, OWN, PEER)} if_id 7"
                    for to in ("in", "out")
                )
            )
        with tun(VTI_HOST) as (host,):
            story(host, vti_to(VTI_HOST))

    with_router(work)


def refused(wanted: HostRedirects) -> str:
    """Return the error text of a failed change."""
    with pytest.raises(HostError) as caught:
        apply_host_redirects(wanted)
    return str(caught.value)
