"""The marks that lead packets of the router itself to host interfaces, and what the kernel is told of them. Pure: no I/O.

nftables can tell with which SA the kernel is about to encrypt a packet (`ipsec out`), whatever decided on that: the policies'
order, ports, a policy of the socket's own. Where VPP has that SA the packet gets the mark of a host interface, and so is routed
again. There XFRM of IPv4 is off; that of IPv6 cannot be (net.ipv4.conf.*.disable_xfrm has no counterpart), so a policy of ours
lets pass what has that mark and goes there. Whatever goes another way, since the socket is bound to an interface or the host
interface is gone, meets its own policy as if it had no mark: no fault lets it out in clear.

What comes in by a host interface is marked as what goes out by it until it is routed, so that a check of its source (rp_filter)
finds the same way back; then for a policy of IPv6 that lets it in: else it would count as not encrypted.
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
    """A host interface, and its ifindex."""

    name: str
    ifindex: int

    @property
    def mark(self) -> int:
        """The mark that leads there; the number of its routing table, too."""
        return MARK_OUT.value + self.ifindex


class TunnelSas(NamedTuple):
    """What tells packets for a tunnel: their family, AF_INET or AF_INET6, and their SA's outer addresses and reqid."""

    local: bytes
    remote: bytes
    reqid: int
    family: int


def _pass_policy(direction: PolicyDir, mark: Mark, ifindex: int = 0) -> Policy:
    everything = Selector(AF_INET6, bytes(16), 0, bytes(16), 0, ifindex=ifindex)
    rest = 0, 0, 0, 0, PolicyType.MAIN, (), NO_LIMITS, Usage(0, 0, 0, 0)
    return Policy(everything, direction, PolicyAction.ALLOW, *rest, mark=mark)


PASS_IN_POLICY = _pass_policy(PolicyDir.IN, MARK_IN)
"""The policy that lets in what came by host interfaces, of IPv6. Others of its priority, 0, go before it where they are older."""


def pass_out_policy(ifindex: int) -> Policy:
    """Return the policy that keeps XFRM of IPv6 off what is marked for the host interface with an ifindex, and goes there."""
    return _pass_policy(PolicyDir.OUT, Mark(MARK_OUT.value + ifindex, FULL_MASK), ifindex)


def ruleset(hosts: Mapping[TunnelSas, HostLink]) -> str:
    """Return the table that marks packets of some SAs, as nft reads it, in place of what there is; none for no SAs.

    Others' marks, and NAT, come before. What is for the router itself is left alone: its routes may be asked for late.
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
    """Tell whether a table, as nft lists it, is that of a ruleset: by what it says of itself, and its number of lines."""
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
