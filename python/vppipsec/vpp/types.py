"""Values that describe desired and actual state in VPP: SAs, protections, prefixes, routes and their paths, ACL rules.

Addresses are `bytes` in network order (4 or 16 long). Algorithms and flags have VPP's names
(src/vnet/ipsec/ipsec_types.api, src/vnet/tunnel/tunnel_types.api).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from vppipsec.vpp.algorithms import CryptoAlg, IntegAlg


class SadFlag(IntEnum):
    """enum ipsec_sad_flags. VPP itself adds IS_TUNNEL_V6, from the addresses."""

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
"""Most inbound SAs of one protection (ITP_MAX_N_SA_IN, src/vnet/ipsec/ipsec_tun.h)."""

MAX_ITF_INSTANCE = 16 * 1024
"""Instances of `ipsec` interfaces are below this (IPSEC_ITF_MAX_INSTANCE, src/vnet/ipsec/ipsec_itf.c)."""

DEFAULT_MTU = 9000
"""MTU of a new `ipsec` interface in VPP, bytes."""
MAX_MTU = 0xFFFF
"""Length of the longest possible IPv4 packet, bytes."""
MIN_MTU, MIN_MTU6 = 68, 1280
"""Longest packets that every IPv4 link (RFC 791) and every IPv6 link (RFC 8200) accepts, bytes."""

NO_INDEX = 0xFFFFFFFF
"""VPP's ~0: no interface, no index."""

LOCAL_INDEX = NO_INDEX - 2
"""Path number of the router itself. No interface of VPP has this number."""

INTERFACE_RX = 1 << 32
"""Added to the sw_if_index of a path: VPP receives the packets on that interface again, instead of sending them there."""

_MAX_WEIGHT = 0xFF


_INBOUND = SadFlag.IS_INBOUND.value  # enum members are slow to look up


class SaSpec(NamedTuple):
    """An SA in VPP without its number: the fields of ipsec_sad_entry_v4 that the service sets.

    `salt` is VPP's number: the last four bytes of the kernel's key, read big-endian. `replay_window` is the window in packets,
    rounded as VPP does, 0 if anti-replay is off. `flags` are SadFlag, `tunnel_flags` are TunnelFlag. Ports are 0 without UDP
    encapsulation. `repr` never shows keys.
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
        """Return the SA with other UDP ports, by default none. SAs that differ only in ports are equal without them."""
        return self._replace(udp_src_port=udp_src_port, udp_dst_port=udp_dst_port)


class Prefix(NamedTuple):
    """An IP prefix. Its host bits are zero."""

    address: bytes
    length: int

    def shortened(self, length: int) -> Prefix:
        """Return the prefix of the given shorter length that contains this one."""
        bits = 8 * len(self.address)
        net = int.from_bytes(self.address, "big") >> (bits - length) << (bits - length)
        return Prefix(net.to_bytes(bits // 8, "big"), length)

    def covers(self, other: Prefix) -> bool:
        """Return whether this prefix contains or equals another one. False for two families."""
        same_family = len(self.address) == len(other.address)
        return same_family and self.length <= other.length and other.shortened(self.length) == self

    def overlaps(self, other: Prefix) -> bool:
        """Return whether two prefixes have addresses in common, so that one contains the other. False for two families."""
        if len(self.address) != len(other.address):
            return False
        difference = int.from_bytes(self.address, "big") ^ int.from_bytes(other.address, "big")
        return not difference >> (8 * len(self.address) - min(self.length, other.length))


class Route(NamedTuple):
    """A destination prefix in a FIB table. Table 0 is the main one."""

    prefix: Prefix
    table: int = 0


class Path(NamedTuple):
    """One path of a route, and its share of the packets. `sw_if_index` may be any number that `Paths` allows.

    Weights are relative. `next_hop` is an address on that interface. It is empty on the service's own interfaces, and if there is
    no next hop.
    """

    sw_if_index: int
    weight: int
    next_hop: bytes = b""


Paths = int | tuple[Path, ...]
"""Where a route's packets go. One number: a sw_if_index, a sw_if_index with INTERFACE_RX added, NO_INDEX to drop, or LOCAL_INDEX
for the router itself. Or several paths, as `weighted_paths` returns them."""


def weighted_paths(hops: Iterable[Path]) -> Paths:
    """Return the `Paths` of a route: each path once, sorted; a single path as its number.

    Paths that drop (NO_INDEX) count only if there are no others. VPP 26.06 sends their packets over the other paths anyway
    (fib_path_is_resolved, src/vnet/fib/fib_path.c). VPP keeps a weight in one byte. So larger weights are scaled down together,
    to 1 at least.
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
    """Return the sw_if_index, or other number, of each path of a route; NO_INDEX if it drops."""
    return (paths,) if isinstance(paths, int) else tuple(path.sw_if_index for path in paths)


class HostInterface(NamedTuple):
    """The kernel's end of an interface in VPP. `ifindex` is its number in the kernel."""

    name: str
    ifindex: int


@dataclass(frozen=True, slots=True)
class Protection:
    """The SAs that protect an interface, by `sad_id`."""

    outbound: int
    inbound: tuple[int, ...]

    @property
    def sad_ids(self) -> tuple[int, ...]:
        """The outbound SA, then the inbound ones."""
        return (self.outbound, *self.inbound)


ANY_PORT = (0, 0xFFFF)


class Rule(NamedTuple):
    """A rule of an ACL. Both prefixes have one family. `proto` 0 matches every protocol, and then ports mean nothing.

    Ports are ranges, both ends included. For ICMP and ICMPv6 `sports` is the range of types and `dports` the range of codes.
    """

    permit: bool
    src: Prefix
    dst: Prefix
    proto: int = 0
    sports: tuple[int, int] = ANY_PORT
    dports: tuple[int, int] = ANY_PORT


def everything(ip6: bool) -> Prefix:
    """Return the prefix of length 0, which contains every address of a family."""
    return Prefix(bytes(16 if ip6 else 4), 0)
