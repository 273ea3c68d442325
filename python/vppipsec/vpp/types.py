"""Frozen values for what VPP holds, or should hold: SAs, routes and tunnels with their `ipsec` interface.

Addresses are `bytes` in network order (4 or 16 long). Names of algorithms and flags are VPP's own
(src/vnet/ipsec/ipsec_types.api, src/vnet/tunnel/tunnel_types.api).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from vppipsec.vpp.algorithms import CryptoAlg, IntegAlg


class SadFlag(IntEnum):
    """enum ipsec_sad_flags. IS_TUNNEL_V6 is VPP's own addition, derived from the addresses."""

    NONE = 0
    USE_ESN = 0x01
    USE_ANTI_REPLAY = 0x02
    IS_TUNNEL = 0x04
    IS_TUNNEL_V6 = 0x08
    UDP_ENCAP = 0x10
    IS_INBOUND = 0x40


class TunnelFlag(IntEnum):
    """enum tunnel_encap_decap_flags."""

    NONE = 0
    ENCAP_COPY_DF = 0x01
    ENCAP_SET_DF = 0x02
    ENCAP_COPY_DSCP = 0x04
    ENCAP_COPY_ECN = 0x08
    DECAP_COPY_ECN = 0x10


MAX_INBOUND_SAS = 4
"""Inbound SAs of one protection (ITP_MAX_N_SA_IN, src/vnet/ipsec/ipsec_tun.h)."""

MAX_ITF_INSTANCE = 16 * 1024
"""Instances of `ipsec` interfaces are below this (IPSEC_ITF_MAX_INSTANCE, src/vnet/ipsec/ipsec_itf.c)."""

DEFAULT_MTU = 9000
"""What VPP gives an `ipsec` interface that it makes, bytes."""
MAX_MTU = 0xFFFF
"""The longest that an IPv4 packet can be, bytes."""
MIN_MTU, MIN_MTU6 = 68, 1280
"""The longest packets that every IPv4 link (RFC 791) and every IPv6 link (RFC 8200) takes, bytes."""

NO_INDEX = 0xFFFFFFFF
"""VPP's ~0: no interface, no index."""

LOCAL_INDEX = NO_INDEX - 2
"""Stands for the router itself where a route leads to it; no interface of VPP's has this number."""

INTERFACE_RX = 1 << 32
"""Added to a sw_if_index where packets are not to leave there, but to be as if they had come in there."""

_MAX_WEIGHT = 0xFF


_INBOUND = SadFlag.IS_INBOUND.value  # enum members are slow to look up


class SaSpec(NamedTuple):
    """What an SA in VPP is, apart from its number: the fields of ipsec_sad_entry_v4 that we set.

    `salt` is the number that VPP takes (the kernel's last four key bytes, read big-endian). `replay_window` is the window in
    packets as VPP rounds it, 0 where anti-replay is off. `flags` are of SadFlag, `tunnel_flags` of TunnelFlag. Ports are 0
    without UDP encapsulation. Keys never show.
    """

    spi: int
    src: bytes
    dst: bytes
    crypto: CryptoAlg
    crypto_key: bytes
    integ: IntegAlg
    integ_key: bytes
    flags: int
    tunnel_flags: int
    salt: int
    udp_src_port: int = 0
    udp_dst_port: int = 0
    replay_window: int = 0

    def __repr__(self) -> str:
        ends = f"src={self.src.hex()}, dst={self.dst.hex()}, crypto={self.crypto!r}, integ={self.integ!r}"
        return f"SaSpec(spi={self.spi:#x}, {ends}, flags={self.flags:#x})"

    @property
    def inbound(self) -> bool:
        """True for an SA that decrypts."""
        return bool(self.flags & _INBOUND)

    def with_ports(self, udp_src_port: int = 0, udp_dst_port: int = 0) -> SaSpec:
        """Return the SA with other UDP ports, by default none: what of it stays when they change."""
        return self._replace(udp_src_port=udp_src_port, udp_dst_port=udp_dst_port)


class Prefix(NamedTuple):
    """An IP prefix; host bits are zero."""

    address: bytes
    length: int

    def shortened(self, length: int) -> Prefix:
        """Return the prefix of a length that contains this one."""
        bits = 8 * len(self.address)
        net = int.from_bytes(self.address, "big") >> (bits - length) << (bits - length)
        return Prefix(net.to_bytes(bits // 8, "big"), length)

    def covers(self, other: Prefix) -> bool:
        """Tell whether all of another prefix is within this one, or is it; of two families neither is."""
        same_family = len(self.address) == len(other.address)
        return same_family and self.length <= other.length and other.shortened(self.length) == self

    def overlaps(self, other: Prefix) -> bool:
        """Tell whether two prefixes have addresses in common: then one is within the other; of two families they have none."""
        if len(self.address) != len(other.address):
            return False
        difference = int.from_bytes(self.address, "big") ^ int.from_bytes(other.address, "big")
        return not difference >> (8 * len(self.address) - min(self.length, other.length))


class Route(NamedTuple):
    """A destination in a FIB table, by the table's number; table 0 is the default one."""

    prefix: Prefix
    table: int = 0


class Path(NamedTuple):
    """A share of a route's packets: where they go, as a `Paths` that is a number says it. Weights are relative.

    `next_hop` is an address on an interface of others', empty where there is none or the interface is ours.
    """

    sw_if_index: int
    weight: int
    next_hop: bytes = b""


Paths = int | tuple[Path, ...]
"""Where a route leads: a sw_if_index, one with RECEIVED added, NO_INDEX where it drops, FOR_US to the router itself; or several
of the former, as `weighted_paths` makes it."""


def weighted_paths(hops: Iterable[Path]) -> Paths:
    """Return where a route leads that has these shares: each way once, in order, and one alone by its number.

    Shares that drop (NO_INDEX) count only where there are no others: VPP 26.06 gives their packets to the others anyway
    (fib_path_is_resolved, src/vnet/fib/fib_path.c). It holds weights in a byte, so larger ones are made smaller together, and
    none gets 0.
    """
    weights: dict[tuple[int, bytes], int] = {}
    for index, weight, next_hop in hops:
        if index != NO_INDEX:
            weights[index, next_hop] = weights.get((index, next_hop), 0) + weight
    if len(weights) < 2:
        return next((index for index, _ in weights), NO_INDEX)
    heaviest = max(*weights.values(), _MAX_WEIGHT)
    return tuple(Path(path[0], max(1, weights[path] * _MAX_WEIGHT // heaviest), path[1]) for path in sorted(weights))


def interfaces_of(paths: Paths) -> tuple[int, ...]:
    """Return the interfaces that a route leads into, NO_INDEX where it drops."""
    return (paths,) if isinstance(paths, int) else tuple(path.sw_if_index for path in paths)


class HostInterface(NamedTuple):
    """An interface of the kernel's that is the other end of one of VPP's; `ifindex` is its number in the kernel."""

    name: str
    ifindex: int


@dataclass(frozen=True, slots=True)
class Protection:
    """Which SAs an interface uses, by `sad_id`."""

    outbound: int
    inbound: tuple[int, ...]

    @property
    def sad_ids(self) -> tuple[int, ...]:
        """All of them."""
        return (self.outbound, *self.inbound)


ANY_PORT = (0, 0xFFFF)


class Rule(NamedTuple):
    """A rule of an ACL. Both prefixes are of one family. `proto` 0 stands for every protocol, and ports mean nothing then.

    Ports are ranges, both ends included; of ICMP and ICMPv6 the first is the type and the second is the code.
    """

    permit: bool
    src: Prefix
    dst: Prefix
    proto: int = 0
    sports: tuple[int, int] = ANY_PORT
    dports: tuple[int, int] = ANY_PORT


def everything(ip6: bool) -> Prefix:
    """Return the prefix of every address of a family."""
    return Prefix(bytes(16 if ip6 else 4), 0)
