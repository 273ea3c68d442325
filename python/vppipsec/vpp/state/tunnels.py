"""Actual state of tunnels: read from dumps at connect, then updated with each request that VPP accepts."""

from __future__ import annotations

from dataclasses import dataclass, field

from vppipsec.vpp.api.acl import AclAddReplace, AclDel, SetInterfaceAcls
from vppipsec.vpp.api.interface import (
    InterfaceAddressAddDel,
    SetInterfaceMtu,
    SetInterfaceTable,
    SetInterfaceTag,
    SetInterfaceUp,
    SetUnnumbered,
)
from vppipsec.vpp.api.ip import DisableIp6, EnableIp6
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
from vppipsec.vpp.gre_ipip import GreIpipInterface
from vppipsec.vpp.types import (
    NO_INDEX,
    HostInterface,
    Protection,
    Rule,
    SaSpec,
)


@dataclass(slots=True)
class ActualSa:
    """An SA of the service in VPP. `stat_index` is the index of its counters in the stats segment."""

    spec: SaSpec
    stat_index: int


@dataclass(slots=True)
class ActualTunnel:
    """A tunnel in VPP: its `ipsec` interface, SAs, ACL and protection. `sw_if_index` is None while the interface is missing.

    Or the SAs for `gre_ipip`, a gre or ipip interface that another program created. `protection` is then that interface's.
    `unnumbered_from` is the sw_if_index whose addresses the interface borrows, None if it borrows none. `sas` is in the order of
    addition. `acl` is the acl_index of the ACL that denies packets which the peer may not send, None if there is none. `rules`
    are its rules. `acl_applied` says whether the interface uses it. `host` is the host interface in the kernel, None if there is
    none. `tables` are the IPv4 and IPv6 tables in which VPP looks up packets that the interface receives. `has_address` says
    whether it has an address of its own.
    """

    instance: int = NO_INDEX
    sw_if_index: int | None = None
    tag: str = ""
    unnumbered_from: int | None = None
    ip6: bool = False
    up: bool = False
    protection: Protection | None = None
    sas: dict[int, ActualSa] = field(default_factory=dict)
    acl: int | None = None
    rules: tuple[Rule, ...] = ()
    acl_applied: bool = False
    host: HostInterface | None = None
    gre_ipip: GreIpipInterface | None = None
    mtu: int = 0
    tables: tuple[int, int] = (0, 0)
    has_address: bool = False

    @property
    def is_empty(self) -> bool:
        """True if VPP holds no object of this tunnel."""
        return self.sw_if_index is None and not self.sas and self.acl is None

    def apply_accepted(self, request: Request, value: int) -> None:
        """Record that VPP accepted a request for this tunnel. `value` is the value of its answer."""
        match request:
            case SadEntryAdd(sad_id, spec):
                self.sas[sad_id] = ActualSa(spec, value)
            case SadEntryUpdate(sad_id, src, dst):
                sa = self.sas[sad_id]
                sa.spec = sa.spec.with_ports(src, dst)
            case SadEntryDel(sad_id):
                del self.sas[sad_id]
            case IpsecItfCreate(instance):
                self.instance, self.sw_if_index = instance, value
            case IpsecItfDelete():
                self.instance, self.sw_if_index, self.tag = NO_INDEX, None, ""
                self.unnumbered_from, self.ip6, self.up, self.acl_applied, self.host = None, False, False, False, None
                self.mtu, self.tables, self.has_address = 0, (0, 0), False
            case SetInterfaceTag(_, tag):
                self.tag = tag
            case SetUnnumbered(_, unnumbered_from, is_add):
                self.unnumbered_from = unnumbered_from if is_add else None
            case EnableIp6() | DisableIp6():
                self.ip6 = isinstance(request, EnableIp6)
            case SetInterfaceTable(_, ip6, table):
                self.tables = (self.tables[0], table) if ip6 else (table, self.tables[1])
            case InterfaceAddressAddDel(_, _, is_add):
                self.has_address = is_add
            case SetInterfaceUp():
                self.up = True
            case SetInterfaceMtu(_, mtu):
                self.mtu = mtu
            case TunnelProtect(_, outbound, inbound):
                self.protection = Protection(outbound, inbound)
            case TunnelUnprotect():
                self.protection = None
            case AclAddReplace(_, _, rules):
                self.acl, self.rules = value, rules
            case AclDel():
                self.acl, self.rules = None, ()
            case SetInterfaceAcls(_, acl):
                self.acl_applied = acl != NO_INDEX
            case LcpPairAddDel(_, name, is_add):
                self.host = HostInterface(name, value) if is_add else None
