"""Builds kernel SAs and policies for tests, as strongSwan would install them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vppipsec.kernel.text import format_addr, parse_addr
from vppipsec.kernel.xfrm.values import (
    NO_LIMITS,
    Algorithm,
    Policy,
    PolicyDir,
    PolicyType,
    Sa,
    SaStats,
    Selector,
    Template,
    Usage,
)
from vppipsec.sync.desired.environment import EnvironmentSnapshot
from vppipsec.vpp.algorithms import CryptoAlg

LOCAL, REMOTE = parse_addr("192.0.2.1"), parse_addr("192.0.2.2")
LOCAL6, REMOTE6 = parse_addr("2001:db8::1"), parse_addr("2001:db8::2")
WAN = 1
"""sw_if_index of the interface that has the local addresses."""
ENV = EnvironmentSnapshot({LOCAL: WAN, LOCAL6: WAN}, frozenset(), frozenset(CryptoAlg))

GCM = Algorithm("rfc4106(gcm(aes))", bytes(range(32)) + b"\xde\xad\xbe\xef", 128)
GCM128 = Algorithm("rfc4106(gcm(aes))", bytes(range(16)) + b"\xde\xad\xbe\xef", 128)
CBC = Algorithm("cbc(aes)", bytes(range(16)))
SHA256 = Algorithm("hmac(sha256)", bytes(range(32)), 128)

NOT_USED = Usage(0, 0, 4_000_000_000, 0)  # added after every VPP was started
_NO_STATS = SaStats(0, 0, 0)


def any_selector(family: int = 2) -> Selector:
    """Return the selector that matches everything."""
    zero = bytes(4 if family == 2 else 16)
    return Selector(family, zero, 0, zero, 0)


def make_sa(spi: int, src: bytes = LOCAL, dst: bytes = REMOTE, reqid: int = 1, **changes: Any) -> Sa:
    """Return an outbound tunnel mode SA with GCM, with the given changes."""
    sa = Sa(
        daddr=dst,
        saddr=src,
        spi=spi,
        proto=50,
        family=2 if len(dst) == 4 else 10,
        mode=1,
        reqid=reqid,
        seq=0,
        replay_window=0 if src in (LOCAL, LOCAL6) else 32,
        flags=32,
        extra_flags=0,
        selector=any_selector(2 if len(dst) == 4 else 10),
        limits=NO_LIMITS,
        usage=NOT_USED,
        stats=_NO_STATS,
        aead=GCM,
    )
    return sa._replace(**changes)


def sa_out(spi: int, reqid: int = 1, **changes: Any) -> Sa:
    """Return an outbound SA of the default tunnel."""
    return make_sa(spi, LOCAL, REMOTE, reqid, **changes)


def sa_in(spi: int, reqid: int = 1, **changes: Any) -> Sa:
    """Return an inbound SA of the default tunnel."""
    return make_sa(spi, REMOTE, LOCAL, reqid, **changes)


def prefix_of(text: str) -> tuple[bytes, int]:
    """Return address and length of a prefix such as `10.1.0.0/16`."""
    address, length = text.split("/")
    return parse_addr(address), int(length)


def make_policy(
    direction: PolicyDir = PolicyDir.OUT,
    src: str = "10.1.0.0/24",
    dst: str = "10.2.0.0/24",
    reqid: int = 1,
    ends: tuple[bytes, bytes] = (LOCAL, REMOTE),
    **changes: Any,
) -> Policy:
    """Return a policy with one tunnel template; `ends` are the template's addresses for the outbound direction."""
    saddr, prefixlen_s = prefix_of(src)
    daddr, prefixlen_d = prefix_of(dst)
    tmpl_src, tmpl_dst = ends if direction == PolicyDir.OUT else ends[::-1]
    everything = 0xFFFFFFFF
    template = Template(
        daddr=tmpl_dst,
        saddr=tmpl_src,
        spi=0,
        proto=50,
        family=2 if len(tmpl_dst) == 4 else 10,
        mode=1,
        reqid=reqid,
        share=0,
        optional=False,
        aalgos=everything,
        ealgos=everything,
        calgos=everything,
    )
    policy = Policy(
        selector=Selector(2 if len(daddr) == 4 else 10, daddr, prefixlen_d, saddr, prefixlen_s),
        direction=direction,
        action=0,
        priority=1000,
        index=0,
        flags=0,
        share=0,
        type=PolicyType.MAIN,
        templates=(template,),
        limits=NO_LIMITS,
        usage=NOT_USED,
    )
    return replace(policy, **changes)


def transport(policy: Policy) -> Policy:
    """Return a policy for transport mode instead, as charon installs it: its templates name no addresses."""
    size = len(policy.selector.daddr)
    bare = [replace(it, mode=0, saddr=bytes(size), daddr=bytes(size)) for it in policy.templates]
    return replace(policy, templates=tuple(bare))


def host_policies(
    proto: int = 0, reqid: int = 1, ends: tuple[bytes, bytes] = (LOCAL, REMOTE), **changes: Any
) -> tuple[Policy, ...]:
    """Return the policies of all three directions for a protocol between two hosts, in transport mode."""
    local, remote = (f"{format_addr(end)}/{8 * len(end)}" for end in ends)
    made = [
        make_policy(PolicyDir.OUT, local, remote, reqid, ends, **changes),
        make_policy(PolicyDir.IN, remote, local, reqid, ends, **changes),
        make_policy(PolicyDir.FWD, remote, local, reqid, ends, **changes),
    ]
    return tuple(transport(replace(it, selector=replace(it.selector, proto=proto))) for it in made)
