"""Builds the nftables ruleset and the XFRM policies that send the router's own packets to host interfaces. Pure: no I/O.

nftables can match the SA with which the kernel is about to encrypt a packet (`ipsec out`). The match covers all that the kernel
considers: the order of the policies, ports, and a policy of the socket itself. If VPP has that SA, the packet gets the mark of a
host interface, and the kernel routes it again. On the host interface IPv4 XFRM is off. IPv6 XFRM cannot be turned off there
(net.ipv4.conf.*.disable_xfrm has no counterpart). So the service adds an XFRM policy that allows packets with that mark on that
interface.

A packet may leave by another interface: its socket is bound to one, or the host interface is gone. Then its own policy applies,
as if it had no mark. So no fault lets it leave unencrypted.

A packet that a host interface receives gets the mark of that interface until it is routed. So the source check (rp_filter) finds
the same route back. Then it gets a mark for an IPv6 policy that accepts it, since the kernel sees it as not encrypted.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import NamedTuple

from vppipsec.kernel.netlink.wire import AF_INET, AF_INET6
from vppipsec.kernel.ownership import FULL_MASK, MARK_IN, MARK_OUT, NFT_TABLE
from vppipsec.kernel.xfrm.values import (
    NO_LIMITS,
    Mark,
    Policy,
    PolicyAction,
    PolicyDir,
    PolicyType,
    Selector,
    Usage,
)


class HostLink(NamedTuple):
    """A host interface: name and ifindex."""

    name: str
    ifindex: int

    @property
    def mark(self) -> int:
        """The mark of packets for this interface, which is also the number of its routing table."""
        return MARK_OUT.value + self.ifindex


class TunnelSas(NamedTuple):
    """Identifies packets of a tunnel: outer addresses and reqid of their SA, and their own family (AF_INET or AF_INET6)."""

    local: bytes
    remote: bytes
    reqid: int
    family: int


def _pass_policy(direction: PolicyDir, mark: Mark, ifindex: int = 0) -> Policy:
    everything = Selector(AF_INET6, bytes(16), 0, bytes(16), 0, ifindex=ifindex)
    rest = 0, 0, 0, 0, PolicyType.MAIN, (), NO_LIMITS, Usage(0, 0, 0, 0)
    return Policy(everything, direction, PolicyAction.ALLOW, *rest, mark=mark)


PASS_IN_POLICY = _pass_policy(PolicyDir.IN, MARK_IN)
"""The policy that accepts IPv6 packets from host interfaces. Its priority is 0; older policies with priority 0 precede it."""


def pass_out_policy(ifindex: int) -> Policy:
    """Return the policy that exempts marked packets to a host interface from IPv6 XFRM. `ifindex` is that interface."""
    return _pass_policy(PolicyDir.OUT, Mark(MARK_OUT.value + ifindex, FULL_MASK), ifindex)


def ruleset(hosts: Mapping[TunnelSas, HostLink]) -> str:
    """Return the ruleset that replaces the service's table, as nft reads it. Without `hosts` it only deletes the table.

    Marks by other programs, and NAT, come earlier. Packets to the router itself stay unmarked, since the kernel may look up their
    routes late.
    """
    links = sorted(set(hosts.values()))
    out = [f"{_sa_match(sas)} meta mark set {host.mark:#x}" for sas, host in sorted(hosts.items())]
    back = [f'iifname "{host.name}" meta mark set {host.mark:#x}' for host in links]
    let_in = [f'iifname "{host.name}" meta mark set {MARK_IN.value:#x}' for host in links]
    body = _chain("output", "route", -90, ['oifname "lo" return', *out])
    body += _chain("prerouting", "filter", 300, back)
    body += _chain("input", "filter", 300, [f"meta mark {MARK_IN.value:#x} meta mark set 0", *let_in])
    comment = f'\tcomment "{blake2b(body.encode(), digest_size=16).hexdigest()}"\n'
    lines = f"table inet {NFT_TABLE}\ndelete table inet {NFT_TABLE}\n"
    return f"{lines}table inet {NFT_TABLE} {{\n{comment}{body}}}\n" if hosts else lines


def is_loaded(text: str, listing: str) -> bool:
    """Return whether a table, as nft lists it, equals a ruleset. Compares the digest in its comment, and the number of lines."""
    _, _, *table = text.splitlines()
    listed = [line for line in listing.splitlines() if line.strip()]
    return len(listed) == len(table) and table[1:2] == listed[1:2]


def _chain(hook: str, kind: str, priority: int, rules: Iterable[str]) -> str:
    lines = "".join(f"\t\t{rule}\n" for rule in rules)
    return f"\tchain {hook} {{\n\t\ttype {kind} hook {hook} priority {priority}; policy accept;\n{lines}\t}}\n"


def _sa_match(sas: TunnelSas) -> str:
    local, remote = ipaddress.ip_address(sas.local), ipaddress.ip_address(sas.remote)
    outer = "ip" if local.version == 4 else "ip6"
    inner = "ipv4" if sas.family == AF_INET else "ipv6"
    ends = f"ipsec out {outer} saddr {local} ipsec out {outer} daddr {remote}"
    return f"meta nfproto {inner} {ends} ipsec out reqid {sas.reqid}"
