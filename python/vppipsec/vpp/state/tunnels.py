"""What VPP holds of ours, as its answers tell: filled from dumps at connect, kept up by every request that VPP accepts."""

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
    """An SA of ours in VPP. `stat_index` finds its counters in the stats segment."""

    spec: SaSpec
    stat_index: int


@dataclass(slots=True)
class ActualTunnel:
    """One of our `ipsec` interfaces with what hangs on it, or the SAs and the ACL that wait for one (`sw_if_index` None).

    Or SAs for an interface of others', `gre_ipip`; `protection` is that interface's then. `unnumbered_from` is the
    sw_if_index whose addresses it borrows, None while it borrows none. `sas` is in the order of addition. `acl` is the
    number of the ACL that is to hold back what its peer may not send, None where there is none; `rules` are the ACL's;
    `acl_applied` says whether the interface receives nothing that the ACL denies. `host` is its host interface in the
    kernel, None where it has none. `tables` are those, of IPv4 and of IPv6, by which is forwarded what it receives;
    `has_address` says whether it has an address of its own.
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
        """True when VPP holds nothing of it."""
        return self.sw_if_index is None and not self.sas and self.acl is None

    def apply_accepted(self, request: Request, value: int) -> None:
        """Note that VPP accepted a request of this tunnel; `value` is what its answer carried."""
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
