"""Adoption: each tunnel claims what an earlier run left for it in VPP. What no tunnel claims is removed."""

from __future__ import annotations

from collections.abc import Iterable, Set

from vppipsec.kernel.xfrm.values import SaId
from vppipsec.sync.journal import count_text
from vppipsec.vpp.inventory import FoundAcl, Inventory
from vppipsec.vpp.ownership import IP6_TAG
from vppipsec.vpp.state.tunnels import ActualSa, ActualTunnel

_SaName = tuple[bytes, int]
"""Destination and SPI of an SA."""


class Adoption:
    """Tunnels that an earlier run left, and SAs and ACLs that no tunnel uses.

    Such SAs and ACLs are, for example, those that were added right before the run ended.
    """

    def __init__(self, found: Inventory | None = None, foreign_acls: Set[int] = frozenset()) -> None:
        """Index the inventory. `foreign_acls` are ACLs that serve another purpose."""
        self._tunnels: dict[str | _SaName, ActualTunnel] = {}
        """By tag; a tunnel without a tag by its outbound SA."""
        self._sas: dict[_SaName, dict[int, ActualSa]] = {}
        self._acls: dict[str, FoundAcl] = {}
        """By tag: ACLs that no interface uses."""
        self._unclaimable: list[ActualTunnel] = []
        self.gre_ipip: dict[int, ActualTunnel] = {}
        """Protections of gre and ipip interfaces, by sw_if_index.

        Those that name SAs are also tunnels to be claimed.
        """
        if found is not None:
            self._sort_found(found, foreign_acls)

    def _sort_found(self, found: Inventory, foreign_acls: Set[int]) -> None:
        sas = {sa.sad_id: ActualSa(sa.spec, sa.stat_index) for sa in found.sas}
        acls = {acl.acl_index: acl for acl in found.acls if acl.acl_index not in foreign_acls}
        for itf in found.interfaces:
            ip6 = itf.tag.endswith(IP6_TAG)
            actual = ActualTunnel(
                itf.instance,
                itf.sw_if_index,
                itf.tag,
                itf.unnumbered_from,
                ip6,
                itf.up,
                itf.protection,
                host=itf.host,
                mtu=itf.mtu,
                tables=itf.tables,
                has_address=itf.has_address,
            )
            if itf.protection is not None:
                named = (itf.protection.outbound, *itf.protection.inbound)
                actual.sas = {sad_id: sas.pop(sad_id) for sad_id in named if sad_id in sas}
            if itf.acl is not None and itf.acl in acls:
                actual.acl, actual.rules, actual.acl_applied = itf.acl, acls.pop(itf.acl).rules, True
            key: str | _SaName = itf.tag.removesuffix(IP6_TAG)
            if not key and itf.protection is not None and itf.protection.outbound in actual.sas:
                key = _sa_name(actual.sas[itf.protection.outbound])
            if not key or key in self._tunnels:
                self._unclaimable.append(actual)
            else:
                self._tunnels[key] = actual
        for gre_ipip, protection in found.gre_ipip.items():
            actual = ActualTunnel(protection=protection, gre_ipip=gre_ipip)
            actual.sas = {sad_id: sas.pop(sad_id) for sad_id in protection.sad_ids if sad_id in sas}
            self.gre_ipip[gre_ipip.sw_if_index] = actual
            if protection.outbound in actual.sas:
                self._tunnels[_sa_name(actual.sas[protection.outbound])] = actual
            elif actual.sas:
                self._unclaimable.append(actual)
        for sad_id, sa in sas.items():
            self._sas.setdefault(_sa_name(sa), {})[sad_id] = sa
        for acl in acls.values():
            if acl.tag in self._acls:
                self._unclaimable.append(_with_acl(ActualTunnel(), acl))
            else:
                self._acls[acl.tag] = acl

    def __len__(self) -> int:
        return len(self._tunnels) + len(self._unclaimable) + len(self._acls) + sum(map(len, self._sas.values()))

    def __str__(self) -> str:
        tunnels, sas = len(self._tunnels) + len(self._unclaimable), sum(map(len, self._sas.values()))
        numbers = ((tunnels, "tunnel"), (sas, "SA"), (len(self._acls), "ACL"))
        *parts, last = [count_text(number, name) for number, name in numbers if number] or [""]
        return f"{', '.join(parts)} and {last}" if parts else last

    def adopt(self, tag: str, sas: Iterable[SaId]) -> ActualTunnel:
        """Return the tunnel that has this tag, else the one that has one of the SAs; add those of the SAs that no
        tunnel uses.

        Return an empty tunnel where nothing matches.
        """
        if not self:
            return ActualTunnel()
        names = [(sa_id.daddr, sa_id.spi) for sa_id in sas]
        actual = next((self._tunnels.pop(key) for key in (tag, *names) if key in self._tunnels), ActualTunnel())
        for name in names:
            actual.sas |= self._sas.pop(name, {})
        if actual.acl is None and tag in self._acls:
            _with_acl(actual, self._acls.pop(tag))
        return actual

    def pop_unclaimed(self) -> list[ActualTunnel]:
        """Remove and return what no tunnel claimed."""
        found = [*self._tunnels.values(), *self._unclaimable, *(ActualTunnel(sas=sas) for sas in self._sas.values())]
        found += [_with_acl(ActualTunnel(), acl) for acl in self._acls.values()]
        self._tunnels, self._unclaimable, self._sas, self._acls = {}, [], {}, {}
        return found


def _with_acl(actual: ActualTunnel, acl: FoundAcl) -> ActualTunnel:
    actual.acl, actual.rules = acl.acl_index, acl.rules
    return actual


def _sa_name(sa: ActualSa) -> _SaName:
    return sa.spec.dst, sa.spec.spi
