"""Checks every request before it is sent, and stops requests that VPP would refuse, leak from or crash on.

A comment at each rule gives VPP 26.06's reaction without it: an error number, a leak or a crash. The sources are ipsec_sa.c,
ipsec_tun.c and ipsec_itf.c in src/vnet/ipsec, and acl.c in src/plugins/acl.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence, Set
from typing import Protocol

from vppipsec.vpp.algorithms import AEAD_ALGS, CRYPTO_KEY_BYTES, CTR_ALGS, INTEG_KEY_BYTES, CryptoAlg, IntegAlg
from vppipsec.vpp.api.abf import AbfAttach, AbfPolicyAddDel
from vppipsec.vpp.api.acl import AclAddReplace, AclDel, SetInterfaceAcls
from vppipsec.vpp.api.errors import VppError
from vppipsec.vpp.api.interface import (
    InterfaceAddressAddDel,
    SetInterfaceMtu,
    SetInterfaceTable,
    SetInterfaceTag,
    SetInterfaceUp,
    SetUnnumbered,
)
from vppipsec.vpp.api.ip import DisableIp6, EnableIp6, NeighborAddDel, RouteAddDel, TableAddDel
from vppipsec.vpp.api.ipsec import (
    IpsecItfCreate,
    IpsecItfDelete,
    SadEntryAdd,
    SadEntryDel,
    SadEntryUpdate,
    TunnelProtect,
    TunnelUnprotect,
)
from vppipsec.vpp.api.linux_cp import LcpPairAddDel
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.gre_ipip import BLOCK_PROTECTION, BLOCK_SA, GreIpipInterface
from vppipsec.vpp.ownership import BLOCK_SAD_ID, KERNEL_NEXT_HOP
from vppipsec.vpp.types import (
    LOCAL_INDEX,
    MAX_INBOUND_SAS,
    MAX_ITF_INSTANCE,
    MAX_MTU,
    MIN_MTU,
    NO_INDEX,
    HostInterface,
    Paths,
    Prefix,
    Protection,
    Route,
    Rule,
    SadFlag,
    SaSpec,
    TunnelFlag,
    interfaces_of,
)

MAX_WINDOW_PACKETS = 4096
"""Longest anti-replay window, packets: the kernel's limit (XFRMA_REPLAY_ESN_MAX). VPP itself has no limit and allocates any."""
MAX_TAG_BYTES = 63
_FLAGS = SadFlag.USE_ESN | SadFlag.USE_ANTI_REPLAY | SadFlag.IS_TUNNEL | SadFlag.UDP_ENCAP | SadFlag.IS_INBOUND
"""SA flags that a request may set. VPP itself adds IS_TUNNEL_V6."""
_TUNNEL_FLAGS = functools.reduce(operator.or_, TunnelFlag)


class GuardError(VppError):
    """A request was not sent, because VPP could refuse it, leak from it or crash on it."""


class GuardedSa(Protocol):
    """The attributes of an SA in VPP that the guard reads."""

    @property
    def spec(self) -> SaSpec:
        """The SA's parameters."""


class GuardedTunnel(Protocol):
    """The attributes of a tunnel in VPP that the guard reads."""

    @property
    def sw_if_index(self) -> int | None:
        """Its interface, None if there is none yet."""

    @property
    def protection(self) -> Protection | None:
        """Its protection, None if there is none."""

    @property
    def sas(self) -> Mapping[int, GuardedSa]:
        """Its SAs by `sad_id`."""

    @property
    def acl(self) -> int | None:
        """Its ACL, None if there is none yet."""

    @property
    def acl_applied(self) -> bool:
        """Whether the interface uses the ACL."""

    @property
    def host(self) -> HostInterface | None:
        """Its host interface, None if it has none."""

    @property
    def unnumbered_from(self) -> int | None:
        """The interface whose addresses its interface borrows, None if it borrows none."""

    @property
    def has_address(self) -> bool:
        """Whether the interface has an address of its own."""

    @property
    def ip6(self) -> bool:
        """Whether the interface passes IPv6."""

    @property
    def tables(self) -> tuple[int, int]:
        """The IPv4 and IPv6 tables in which VPP looks up packets that the interface receives."""

    @property
    def gre_ipip(self) -> GreIpipInterface | None:
        """The gre or ipip interface that its SAs protect, None if they protect an `ipsec` interface."""


def check_tunnel_request(
    request: Request,
    actual: GuardedTunnel,
    routes_into: Set[Route],
    share_indexes: Set[int] = frozenset(),
    tables: Set[tuple[int, bool]] = frozenset(),
) -> None:
    """Check a tunnel's request against VPP's present state.

    `routes_into` are the service's routes into the tunnel's interface. `share_indexes` are interfaces of other tunnels that may
    be paths of the same route. `tables` are the FIB tables that the service did not create, as (number, is IPv6).

    Raises GuardError with a sentence that says what is wrong. It never contains key material.
    """
    match request:
        case SadEntryAdd(sad_id, sa):
            if sad_id in actual.sas:
                raise GuardError(f"SA {sad_id:#x} is in VPP already")
            check_sa(sa)
        case TunnelProtect(index, outbound, inbound) if actual.gre_ipip is not None:
            if index != actual.gre_ipip.sw_if_index or actual.protection is None:  # it would send unencrypted
                raise GuardError(f"interface {index} is not the tunnel's, or not muted")
            if (outbound, inbound) != (BLOCK_PROTECTION.outbound, BLOCK_PROTECTION.inbound):
                _check_protection(outbound, inbound, actual.sas, 0)
        case SadEntryUpdate(sad_id, src, dst):
            udp = sad_id in actual.sas and actual.sas[sad_id].spec.flags & SadFlag.UDP_ENCAP
            if not udp or not 0 < src < 1 << 16 or not 0 < dst < 1 << 16:
                raise GuardError(f"the UDP ports of SA {sad_id:#x} cannot become {src} and {dst}")
        case SadEntryDel(sad_id):
            if sad_id not in actual.sas:
                raise GuardError(f"SA {sad_id:#x} is not in VPP: deleting it would drop somebody else's reference")
            if actual.protection is not None and sad_id in (actual.protection.outbound, *actual.protection.inbound):
                raise GuardError(f"SA {sad_id:#x} protects an interface: deleting it would only drop a reference")
        case TunnelProtect(index, outbound, inbound):
            _check_interface(index, actual)
            _check_protection(outbound, inbound, actual.sas, SadFlag.IS_TUNNEL)
        case IpsecItfCreate(instance):
            if actual.sw_if_index is not None or not 0 <= instance < MAX_ITF_INSTANCE:
                raise GuardError(f"interface ipsec{instance} cannot be made")
        case IpsecItfDelete(index):
            _check_interface(index, actual)
            if actual.protection is not None or routes_into:
                raise GuardError("the interface is still protected, or routes lead into it")
        case SetInterfaceTag(index, tag):
            _check_interface(index, actual)
            _check_tag(tag)
        case RouteAddDel(paths, prefix, source):
            _check_paths(paths, actual, share_indexes)
            _check_route(prefix, source)
        case AclAddReplace(index, tag, rules):
            if index != (NO_INDEX if actual.acl is None else actual.acl):  # -6, or another ACL would be replaced
                raise GuardError(f"ACL {index} is not the tunnel's")
            _check_acl(tag, rules)
        case AclDel(index):
            if index != actual.acl or actual.acl_applied:  # -6, -142
                raise GuardError(f"ACL {index} is not the tunnel's, or in use")
        case SetInterfaceAcls(index, acl):
            _check_interface(index, actual)
            if acl not in (NO_INDEX, actual.acl):  # -6
                raise GuardError(f"ACL {acl} is not the tunnel's")
        case LcpPairAddDel(index, name, is_add):
            _check_interface(index, actual)
            if (actual.host is not None) == is_add:  # -81, -2
                raise GuardError(f"host interface {name} is there already, or not at all")
        case TunnelUnprotect(index):
            _check_interface(index, actual)
            if actual.protection is None:  # -6
                raise GuardError("the interface is not protected")
        case SetInterfaceMtu(index, mtu):
            _check_interface(index, actual)
            if not MIN_MTU <= mtu <= MAX_MTU:
                raise GuardError(f"an MTU of {mtu} bytes")
        case SetUnnumbered(index, _, is_add):
            _check_interface(index, actual)
            if is_add and (actual.tables[0] or actual.has_address):  # -74
                raise GuardError("the interface would borrow addresses of another table, or has one")
        case InterfaceAddressAddDel(index, address, is_add):
            _check_interface(index, actual)
            if len(address) != 4 or is_add == actual.has_address or actual.unnumbered_from is not None:  # -105, -60
                raise GuardError("the interface has an address already, or none")
        case SetInterfaceTable(index, ip6, table):
            _check_interface(index, actual)
            _check_itf_table(table, ip6, actual, tables)
        case _:
            if isinstance(request, EnableIp6 | DisableIp6 | SetInterfaceUp):
                _check_interface(request.sw_if_index, actual)


def _check_itf_table(table: int, ip6: bool, actual: GuardedTunnel, tables: Set[tuple[int, bool]]) -> None:
    """Check that an interface may be bound to a table. Raises GuardError."""
    if table and (table, ip6) not in tables:  # -3
        raise GuardError(f"VPP has no {'IPv6' if ip6 else 'IPv4'} table {table}")
    if table == actual.tables[ip6]:  # VPP releases it first: an IPv6 one without other users is freed, and used on
        raise GuardError(f"the interface is in table {table} already")
    if (not ip6 and actual.has_address) or actual.unnumbered_from is not None:  # -114
        raise GuardError("the interface has an address")
    if actual.protection is not None and (actual.ip6 or not ip6):
        raise GuardError("the interface still receives packets that are for another table")


def check_block_protection(request: Request, has_block_sa: bool) -> None:
    """Check that a protection names the block SA only if VPP has it (else -7, and leaked references). Raises GuardError."""
    if isinstance(request, TunnelProtect) and request.outbound == BLOCK_SAD_ID and not has_block_sa:
        raise GuardError("there is no SA by which an interface could be muted")


def check_gre_ipip_request(
    request: Request, gre_ipip_interfaces: Set[int], protected: Set[int], has_block_sa: bool
) -> None:
    """Check a request that blocks a gre or ipip interface, or removes its protection.

    `gre_ipip_interfaces` are all such interfaces. `protected` are those that the service's SAs protect. `has_block_sa` says
    whether VPP has the block SA. Raises GuardError.
    """
    check_block_protection(request, has_block_sa)
    match request:
        case SadEntryAdd(sad_id, sa):
            if has_block_sa or (sad_id, sa) != (BLOCK_SAD_ID, BLOCK_SA):  # -116, or an SA of a tunnel
                raise GuardError(f"SA {sad_id:#x} is no mute one, or in VPP already")
        case SadEntryDel(sad_id):
            if sad_id != BLOCK_SAD_ID or not has_block_sa or protected:
                raise GuardError(f"SA {sad_id:#x} is no mute one, or may be in use")
        case TunnelProtect(index, outbound, inbound):
            if index not in gre_ipip_interfaces or (outbound, inbound) != (
                BLOCK_PROTECTION.outbound,
                BLOCK_PROTECTION.inbound,
            ):  # -2
                raise GuardError(f"interface {index} is no gre or ipip one, or would not be muted")
        case TunnelUnprotect(index):
            if index not in protected:  # -2, -6
                raise GuardError(f"interface {index} is not protected")


def _check_paths(paths: Paths, actual: GuardedTunnel, share_indexes: Set[int]) -> None:
    """Check the paths of a tunnel's route. Raises GuardError."""
    if not isinstance(paths, int) and (len(paths) < 2 or not all(0 < hop.weight <= 0xFF for hop in paths)):
        raise GuardError("a route's shares are fewer than two, or weigh nothing or too much")
    for index in interfaces_of(paths):
        if index not in (NO_INDEX, LOCAL_INDEX) and index not in share_indexes:
            _check_interface(index, actual)


class GuardedStack(Protocol):
    """The attributes of a stack of policy layers that the guard reads."""

    @property
    def ip6(self) -> bool:
        """Whether its layers are for IPv6."""


class GuardedLayer(Protocol):
    """The attributes of a policy layer in VPP that the guard reads."""

    @property
    def stack(self) -> GuardedStack:
        """The stack that it belongs to."""

    @property
    def acl_index(self) -> int | None:
        """Its ACL, None if there is none."""

    @property
    def has_policy(self) -> bool:
        """Whether it has an ABF policy."""

    @property
    def attached(self) -> Set[int]:
        """Interfaces that the policy is attached to."""

    @property
    def dangling(self) -> Set[int]:
        """Deleted interfaces that the policy is still attached to."""


def check_layer_request(request: Request, layers: Mapping[int, GuardedLayer], interfaces: Set[int]) -> None:
    """Check a request for a policy layer: its table, routes, ACL, ABF policy or attachments.

    `layers` are the actual layers by number. `interfaces` are the existing interfaces, and with INTERFACE_RX added those on which
    packets may be received again. Raises GuardError.
    """
    match request:
        case RouteAddDel(paths, prefix, source):
            if any(index not in (NO_INDEX, LOCAL_INDEX) and index not in interfaces for index in interfaces_of(paths)):
                raise GuardError("a route would lead into an interface that is not there")
            if not isinstance(paths, int) and any(len(hop.next_hop) not in (0, len(prefix.address)) for hop in paths):
                raise GuardError("a route would have a next hop of the other family")  # VPP would use part of it
            _check_route(prefix, source)
        case AclAddReplace(index, tag, rules):
            if index != NO_INDEX and not any(layer.acl_index == index for layer in layers.values()):  # -6
                raise GuardError(f"ACL {index} is no layer's")
            _check_acl(tag, rules)
        case AclDel(index):
            if not any(layer.acl_index == index and not layer.has_policy for layer in layers.values()):  # -149
                raise GuardError(f"ACL {index} is no layer's, or in use")
        case TableAddDel(number, ip6, name, is_add):
            _check_tag(name)
            if is_add == (_layer_of_family(layers, number, ip6) is not None):
                raise GuardError(f"FIB table {number} is there already, or not at all")
        case AbfPolicyAddDel(number, acl, _, ip6, is_add):
            layer = _layer_of_family(layers, number, ip6)
            if layer is None or acl != layer.acl_index or layer.has_policy == is_add:  # the same path again crashes VPP
                raise GuardError(f"ABF policy {number} cannot be made or removed")
            if not is_add and (layer.attached or layer.dangling):  # VPP crashes at the next request for the policy
                raise GuardError(f"ABF policy {number} is attached")
        case AbfAttach(number, index, _, ip6, is_add):
            layer = _layer_of_family(layers, number, ip6)
            if layer is None or not layer.has_policy or index == NO_INDEX:  # VPP crashes
                raise GuardError(f"there is no ABF policy {number} of that family")
            if is_add and (index in layer.attached or index in layer.dangling or index not in interfaces):  # -116
                raise GuardError(f"ABF policy {number} cannot be attached to interface {index}")
            if not is_add and index not in layer.attached and index not in layer.dangling:  # -6
                raise GuardError(f"ABF policy {number} is not attached to interface {index}")


def check_classifier_request(request: Request, classifiers: Set[int], in_use: Set[int], classifier_table: int) -> None:
    """Check a request that creates or deletes a VTI classifier.

    `classifiers` are the existing ones. `in_use` are those that a route leads to or that a policy is attached to.
    `classifier_table` is the number of their FIB table. Raises GuardError.
    """
    match request:
        case TableAddDel(number, _, name):
            _check_tag(name)
            if number != classifier_table:
                raise GuardError(f"FIB table {number} is not the junctions'")
        case IpsecItfCreate(instance):
            if not 0 <= instance < MAX_ITF_INSTANCE:
                raise GuardError(f"interface ipsec{instance} cannot be made")
        case IpsecItfDelete(index) if index in in_use:  # VPP crashes at the next packet
            raise GuardError(f"packets are still received on interface {index}, or it asks rules")
        case SetInterfaceTable(index, _, number) if number != classifier_table or index not in classifiers:  # -3, -2
            raise GuardError(f"interface {index} is no junction, or FIB table {number} not the junctions'")
        case (
            IpsecItfDelete(index)
            | SetInterfaceTag(index)
            | InterfaceAddressAddDel(index)
            | EnableIp6(index)
            | SetInterfaceUp(index)
        ):
            if index not in classifiers:
                raise GuardError(f"interface {index} is no junction")
            if isinstance(request, SetInterfaceTag):
                _check_tag(request.tag)


def check_kernel_tap_request(request: Request, macs: Mapping[int, bytes]) -> None:
    """Check a request for kernel fallback: a neighbor or a route.

    `macs` maps linux-cp's taps to the MAC of the kernel's end. Raises GuardError.
    """
    match request:
        case NeighborAddDel(tap, _, mac, is_add):
            if tap not in macs or (is_add and mac != macs[tap]):  # -2
                raise GuardError(f"interface {tap} is no tap of linux-cp's with that MAC")
        case RouteAddDel(index, prefix, _, True, _, next_hop) if next_hop or index in macs:
            if index not in macs or next_hop != KERNEL_NEXT_HOP[len(prefix.address) == 16]:
                raise GuardError(f"interface {index} does not lead to the kernel, or not by next hop {next_hop.hex()}")


def _layer_of_family(layers: Mapping[int, GuardedLayer], number: int, ip6: bool) -> GuardedLayer | None:
    layer = layers.get(number)
    return layer if layer is not None and layer.stack.ip6 == ip6 else None


def check_sa(sa: SaSpec) -> None:
    """Check an SA that is to be added. Raises GuardError."""
    if sa.crypto not in CRYPTO_KEY_BYTES or sa.integ not in INTEG_KEY_BYTES:
        raise GuardError(f"algorithm {int(sa.crypto)} with {int(sa.integ)} is unknown")
    if len(sa.crypto_key) != CRYPTO_KEY_BYTES[sa.crypto]:  # VPP 26.06 crashes
        raise GuardError(
            f"{sa.crypto.name} with a key of {len(sa.crypto_key)} bytes, not {CRYPTO_KEY_BYTES[sa.crypto]}"
        )
    if len(sa.integ_key) != INTEG_KEY_BYTES[sa.integ]:
        raise GuardError(f"{sa.integ.name} with a key of {len(sa.integ_key)} bytes, not {INTEG_KEY_BYTES[sa.integ]}")
    if (sa.crypto in AEAD_ALGS) == (sa.integ != IntegAlg.NONE):  # -9, or packets without integrity
        raise GuardError(f"{sa.crypto.name} with {sa.integ.name}")
    if sa.crypto in CTR_ALGS and sa.integ == IntegAlg.MD5_96:  # -9
        raise GuardError(f"{sa.crypto.name} with {sa.integ.name}")
    if sa.crypto == CryptoAlg.DES_CBC:
        raise GuardError("DES-CBC is not safe")
    if len(sa.src) != len(sa.dst) or len(sa.src) not in (4, 16):
        raise GuardError("tunnel endpoints of different families")
    if sa.src == sa.dst:  # -82
        raise GuardError("tunnel endpoints that are the same")
    if sa.tunnel_flags & TunnelFlag.ENCAP_COPY_DF and len(sa.src) == 4:
        raise GuardError("copying DF into an IPv4 header, whose checksum VPP would get wrong")
    if sa.flags & ~_FLAGS or sa.tunnel_flags & ~_TUNNEL_FLAGS:
        raise GuardError(f"flags {sa.flags:#x} and {sa.tunnel_flags:#x}")
    lowest, highest = (1, 0xFFFF) if sa.flags & SadFlag.UDP_ENCAP else (0, 0)
    if not lowest <= sa.udp_src_port <= highest or not lowest <= sa.udp_dst_port <= highest:
        raise GuardError(f"UDP ports {sa.udp_src_port} and {sa.udp_dst_port}")
    if not 0 <= sa.salt < 1 << 32:
        raise GuardError("a salt of more than 32 bits")
    if not 0 < sa.spi < 1 << 32 or not 0 <= sa.replay_window <= MAX_WINDOW_PACKETS:
        raise GuardError(f"SPI {sa.spi:#x} with a window of {sa.replay_window}")


def check_prefix(prefix: Prefix) -> None:
    """Check the prefix of a route. Raises GuardError."""
    bits = 8 * len(prefix.address)
    if bits not in (32, 128) or not 0 <= prefix.length <= bits:
        raise GuardError(f"a prefix of {prefix.length} bits in an address of {bits}")
    if int.from_bytes(prefix.address, "big") & ((1 << (bits - prefix.length)) - 1):
        raise GuardError("a prefix with host bits")


def check_rule(rule: Rule) -> None:
    """Check a rule of an ACL. Raises GuardError."""
    check_prefix(rule.src)
    check_prefix(rule.dst)
    if len(rule.src.address) != len(rule.dst.address):  # -57
        raise GuardError("an ACL rule with addresses of two families")
    if not 0 <= rule.proto <= 0xFF:
        raise GuardError(f"an ACL rule for IP protocol {rule.proto}")
    for first, last in (rule.sports, rule.dports):
        if not 0 <= first <= last <= 0xFFFF:  # -8
            raise GuardError(f"an ACL rule for ports {first} to {last}")


def _check_acl(tag: str, rules: Sequence[Rule]) -> None:
    _check_tag(tag)
    for rule in rules:
        check_rule(rule)


def _check_route(prefix: Prefix, source: int) -> None:
    check_prefix(prefix)
    if not source:
        raise GuardError("a route without our FIB source would be taken for somebody else's")


def _check_tag(tag: str) -> None:
    if len(tag) > MAX_TAG_BYTES or not tag.isascii():
        raise GuardError(f"a tag of {len(tag)} characters")


def _check_interface(index: int, actual: GuardedTunnel) -> None:
    if actual.sw_if_index is None or index != actual.sw_if_index:
        raise GuardError(f"interface {index} is not the tunnel's")


def _check_protection(outbound: int, inbound: tuple[int, ...], sas: Mapping[int, GuardedSa], mode: int) -> None:
    if not 1 <= len(inbound) <= MAX_INBOUND_SAS:  # -162
        raise GuardError(f"{len(inbound)} inbound SAs")
    named = [sas.get(sad_id) for sad_id in (outbound, *inbound)]
    if None in named or len(set(inbound)) != len(inbound):  # -7, and leaked references
        raise GuardError("a protection by an SA that VPP does not hold, or by one twice")
    specs = [sa.spec for sa in named if sa is not None]
    if specs[0].inbound or not all(spec.inbound for spec in specs[1:]):
        raise GuardError("inbound and outbound SAs mixed up")
    if any(spec.flags & SadFlag.IS_TUNNEL != mode for spec in specs):  # -58, and leaked references
        whose = "an ipsec" if mode else "an others'"
        raise GuardError(f"{whose} interface cannot be protected by SAs of that mode")
    if any((spec.src, spec.dst) != (specs[0].dst, specs[0].src) for spec in specs[1:]):
        raise GuardError("inbound and outbound SAs with different endpoints")
