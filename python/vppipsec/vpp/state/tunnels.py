"""What VPP holds of ours, as its answers tell: filled from dumps at connect, kept up by every request that VPP accepts."""

from __future__ import annotations

from dataclasses import dataclass, field

from vppipsec.vpp.api.acl import DelAcl, FilterItf, PutAcl
from vppipsec.vpp.api.interface import SetItfAddress, SetItfTable, SetItfUp, SetMtu, SetUnnumbered, TagItf
from vppipsec.vpp.api.ip import DisableIp6, EnableIp6
from vppipsec.vpp.api.ipsec import AddSa, CreateItf, DeleteItf, DelSa, Protect, SetSaPorts, Unprotect
from vppipsec.vpp.api.linux_cp import PairItf
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.gre_ipip import Overlay
from vppipsec.vpp.types import (
    NO_INDEX,
    HostItf,
    Protection,
    Rule,
    SaSpec,
)


@dataclass(slots=True)
class HeldSa:
    """An SA of ours in VPP. `stat_index` finds its counters in the stats segment."""

    spec: SaSpec
    stat_index: int


@dataclass(slots=True)
class HeldTunnel:
    """One of our `ipsec` interfaces with what hangs on it, or the SAs and the ACL that wait for one (`sw_if_index` None).

    Or SAs for an interface of others', `overlay`; `protection` is that interface's then.
    `lender` is the sw_if_index whose addresses it borrows, None while it borrows none. `sas` is in the order of addition.
    `acl` is the number of the ACL that is to hold back what its peer may not send, None where there is none; `rules` are the
    ACL's; `filtered` says whether the interface receives nothing that the ACL denies. `host` is its host interface in the
    kernel, None where it has none. `tables` are those, of IPv4 and of IPv6, by which is forwarded what it receives; `addressed`
    says whether it has an address of its own.
    """

    instance: int = NO_INDEX
    sw_if_index: int | None = None
    tag: str = ""
    lender: int | None = None
    ip6: bool = False
    up: bool = False
    protection: Protection | None = None
    sas: dict[int, HeldSa] = field(default_factory=dict)
    acl: int | None = None
    rules: tuple[Rule, ...] = ()
    filtered: bool = False
    host: HostItf | None = None
    overlay: Overlay | None = None
    mtu: int = 0
    tables: tuple[int, int] = (0, 0)
    addressed: bool = False

    @property
    def empty(self) -> bool:
        """True when VPP holds nothing of it."""
        return self.sw_if_index is None and not self.sas and self.acl is None

    def took(self, request: Request, extra: int) -> None:
        """Note that VPP accepted a request of this tunnel; `extra` is what its answer carried."""
        match request:
            case AddSa(sad_id, sa):
                self.sas[sad_id] = HeldSa(sa, extra)
            case SetSaPorts(sad_id, src, dst):
                held = self.sas[sad_id]
                held.spec = held.spec.moved(src, dst)
            case DelSa(sad_id):
                del self.sas[sad_id]
            case CreateItf(instance):
                self.instance, self.sw_if_index = instance, extra
            case DeleteItf():
                self.instance, self.sw_if_index, self.tag = NO_INDEX, None, ""
                self.lender, self.ip6, self.up, self.filtered, self.host = None, False, False, False, None
                self.mtu, self.tables, self.addressed = 0, (0, 0), False
            case TagItf(_, tag):
                self.tag = tag
            case SetUnnumbered(_, lender, is_add):
                self.lender = lender if is_add else None
            case EnableIp6() | DisableIp6():
                self.ip6 = isinstance(request, EnableIp6)
            case SetItfTable(_, ip6, table):
                self.tables = (self.tables[0], table) if ip6 else (table, self.tables[1])
            case SetItfAddress(_, _, is_add):
                self.addressed = is_add
            case SetItfUp():
                self.up = True
            case SetMtu(_, mtu):
                self.mtu = mtu
            case Protect(_, outbound, inbound):
                self.protection = Protection(outbound, inbound)
            case Unprotect():
                self.protection = None
            case PutAcl(_, _, rules):
                self.acl, self.rules = extra, rules
            case DelAcl():
                self.acl, self.rules = None, ()
            case FilterItf(_, acl):
                self.filtered = acl != NO_INDEX
            case PairItf(_, name, is_add):
                self.host = HostItf(name, extra) if is_add else None
