"""What was in VPP of ours when we came: each group claims what is its own, and what nobody claims is to be removed."""

from __future__ import annotations

from collections.abc import Iterable, Set

from vppipsec.kernel.xfrm.values import SaId
from vppipsec.sync.journal import count
from vppipsec.vpp.inventory import FoundAcl, Inventory
from vppipsec.vpp.ownership import IP6_TAG
from vppipsec.vpp.state.tunnels import HeldSa, HeldTunnel

_Name = tuple[bytes, int]
"""Destination and SPI of an SA."""


class Leftovers:
    """Tunnels, and SAs and ACLs that none of them uses, such as those that were added right before an end."""

    def __init__(self, found: Inventory | None = None, others: Set[int] = frozenset()) -> None:
        """Take what was found. `others` are ACLs that serve something else."""
        self._tunnels: dict[str | _Name, HeldTunnel] = {}
        """By tag; one without a tag by its outbound SA."""
        self._sas: dict[_Name, dict[int, HeldSa]] = {}
        self._acls: dict[str, FoundAcl] = {}
        """By tag, those that no interface uses."""
        self._strays: list[HeldTunnel] = []
        self.overlays: dict[int, HeldTunnel] = {}
        """What protects interfaces of others, by sw_if_index. Those that SAs name are tunnels to be claimed, too."""
        if found is not None:
            self._sort(found, others)

    def _sort(self, found: Inventory, others: Set[int]) -> None:
        sas = {sa.sad_id: HeldSa(sa.spec, sa.stat_index) for sa in found.sas}
        acls = {acl.acl_index: acl for acl in found.acls if acl.acl_index not in others}
        for itf in found.interfaces:
            ip6 = itf.tag.endswith(IP6_TAG)
            held = HeldTunnel(
                itf.instance,
                itf.sw_if_index,
                itf.tag,
                itf.lender,
                ip6,
                itf.up,
                itf.protection,
                host=itf.host,
                mtu=itf.mtu,
                tables=itf.tables,
                addressed=itf.addressed,
            )
            if itf.protection is not None:
                named = (itf.protection.outbound, *itf.protection.inbound)
                held.sas = {sad_id: sas.pop(sad_id) for sad_id in named if sad_id in sas}
            if itf.acl is not None and itf.acl in acls:
                held.acl, held.rules, held.filtered = itf.acl, acls.pop(itf.acl).rules, True
            key: str | _Name = itf.tag.removesuffix(IP6_TAG)
            if not key and itf.protection is not None and itf.protection.outbound in held.sas:
                key = _name(held.sas[itf.protection.outbound])
            if not key or key in self._tunnels:
                self._strays.append(held)
            else:
                self._tunnels[key] = held
        for overlay, protection in found.overlays.items():
            held = HeldTunnel(protection=protection, overlay=overlay)
            held.sas = {sad_id: sas.pop(sad_id) for sad_id in protection.named if sad_id in sas}
            self.overlays[overlay.sw_if_index] = held
            if protection.outbound in held.sas:
                self._tunnels[_name(held.sas[protection.outbound])] = held
            elif held.sas:
                self._strays.append(held)
        for sad_id, sa in sas.items():
            self._sas.setdefault(_name(sa), {})[sad_id] = sa
        for acl in acls.values():
            if acl.tag in self._acls:
                self._strays.append(_with_acl(HeldTunnel(), acl))
            else:
                self._acls[acl.tag] = acl

    def __len__(self) -> int:
        return len(self._tunnels) + len(self._strays) + len(self._acls) + sum(map(len, self._sas.values()))

    def __str__(self) -> str:
        tunnels, sas = len(self._tunnels) + len(self._strays), sum(map(len, self._sas.values()))
        numbers = ((tunnels, "tunnel"), (sas, "SA"), (len(self._acls), "ACL"))
        *parts, last = [count(number, name) for number, name in numbers if number] or [""]
        return f"{', '.join(parts)} and {last}" if parts else last

    def claim(self, tag: str, sas: Iterable[SaId]) -> HeldTunnel:
        """Return the tunnel that has a tag, or none yet but one of the SAs, and with it those of the SAs that wait for one.

        It is empty where there is nothing of the kind.
        """
        if not self:
            return HeldTunnel()
        names = [(sa_id.daddr, sa_id.spi) for sa_id in sas]
        held = next((self._tunnels.pop(key) for key in (tag, *names) if key in self._tunnels), HeldTunnel())
        for name in names:
            held.sas |= self._sas.pop(name, {})
        if held.acl is None and tag in self._acls:
            _with_acl(held, self._acls.pop(tag))
        return held

    def rest(self) -> list[HeldTunnel]:
        """Return what nobody claimed; it is no longer here then."""
        found = [*self._tunnels.values(), *self._strays, *(HeldTunnel(sas=sas) for sas in self._sas.values())]
        found += [_with_acl(HeldTunnel(), acl) for acl in self._acls.values()]
        self._tunnels, self._strays, self._sas, self._acls = {}, [], {}, {}
        return found


def _with_acl(held: HeldTunnel, acl: FoundAcl) -> HeldTunnel:
    held.acl, held.rules = acl.acl_index, acl.rules
    return held


def _name(sa: HeldSa) -> _Name:
    return sa.spec.dst, sa.spec.spi
