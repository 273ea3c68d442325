"""Reads the environment from VPP: its interfaces and addresses, other FIB tables, and which remotes it reaches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace

from vppipsec.kernel.text import format_addr
from vppipsec.kernel.xfrm.sad_spd import TunnelKey
from vppipsec.sync.actual.vtis import Vtis
from vppipsec.sync.desired.environment import EnvironmentSnapshot
from vppipsec.sync.desired.vti_routes import TableId
from vppipsec.sync.journal import EventKind, Journal, JournalSource
from vppipsec.vpp import inventory
from vppipsec.vpp.api.client import VppClient
from vppipsec.vpp.api.ip import UNREACHABLE, VIA_RECURSION, RouteLookup
from vppipsec.vpp.gre_ipip import GreIpipInterface
from vppipsec.vpp.ownership import SAD_ID_FIRST, SAD_ID_LAST, TABLE_NUMBERS
from vppipsec.vpp.types import Prefix, Protection, Route


class Environment:
    """The environment of one VPP. `snapshot` is its immutable form for `translate`, replaced when it changes."""

    def __init__(self, journal: Journal, tables: frozenset[TableId] = frozenset()) -> None:
        """Start with VPP's FIB tables that the service did not create."""
        self.snapshot = EnvironmentSnapshot({}, tables=tables)
        self.interfaces = inventory.InterfaceIndexes()
        self.gre_ipip: frozenset[GreIpipInterface] = frozenset()
        """The gre and ipip interfaces that only the service protects, if any."""
        self.interface_addresses: frozenset[Route] = frozenset()
        """The addresses of VPP's interfaces, each in its table.

        While no VTI is in a VRF, all count as in the main table.
        """
        self._journal = journal
        self._tables_of: Mapping[tuple[int, bool], int] = {}
        self._reached: dict[bytes, bool] = {}
        self._egress_links: dict[bytes, int] = {}
        """The interface over which VPP reaches a remote address, where VPP names one."""
        self._vti_changes = -1

    @property
    def tables(self) -> frozenset[TableId]:
        """VPP's FIB tables that the service did not create."""
        return self.snapshot.tables

    async def read_all(self, client: VppClient, enforce_selectors: bool) -> None:
        """Read everything but the interfaces for the first time."""
        if enforce_selectors:
            await _enable_acl_counters(client)
        addresses = await inventory.read_addresses(client, self.interfaces.up)
        self.snapshot = replace(
            self.snapshot,
            addresses=addresses,
            ciphers=inventory.supported_ciphers(client),
            enforce_selectors=enforce_selectors,
        )
        self._locate_addresses()

    async def read_interfaces(self, client: VppClient) -> Set[int]:
        """Read the interfaces, and return those that are gone."""
        before, self.interfaces = self.interfaces, await inventory.read_interfaces(client)
        return before.all - self.interfaces.all

    async def read_addresses(self, client: VppClient) -> bool:
        """Read the addresses of VPP's interfaces, and return whether they changed."""
        addresses = await inventory.read_addresses(client, self.interfaces.up)
        if addresses == self.snapshot.addresses:
            return False
        self._journal.note(
            JournalSource.VPP, "the addresses of its interfaces changed: every tunnel is looked at again"
        )
        self.snapshot = replace(self.snapshot, addresses=addresses)
        self._locate_addresses()
        return True

    async def set_enforcement(self, client: VppClient, enforce_selectors: bool) -> bool:
        """Set whether VPP checks decrypted packets against the selectors. Return whether that changes anything."""
        if enforce_selectors == self.snapshot.enforce_selectors:
            return False
        if enforce_selectors:
            await _enable_acl_counters(client)
        self.snapshot = replace(self.snapshot, enforce_selectors=enforce_selectors)
        return True

    async def read_gre_ipip(self, client: VppClient) -> Mapping[GreIpipInterface, Protection | None]:
        """Read the gre and ipip interfaces, and return each with the protection that the service gave it."""
        found = await inventory.read_gre_ipip(client, SAD_ID_FIRST, SAD_ID_LAST)
        self.gre_ipip = frozenset(found)
        return found

    def set_gre_ipip_of(self, gre_ipip_interfaces: Mapping[TunnelKey, GreIpipInterface]) -> set[TunnelKey]:
        """Set the gre and ipip interface of each tunnel in transport mode. Return the tunnels that this changes."""
        before = self.snapshot.gre_ipip
        changed = {
            key for key in before.keys() | gre_ipip_interfaces.keys() if before.get(key) != gre_ipip_interfaces.get(key)
        }
        if changed:
            self.snapshot = replace(self.snapshot, gre_ipip=gre_ipip_interfaces)
        return changed

    def set_classified_vtis(self, vtis: frozenset[int]) -> None:
        """Set the VTIs, by if_id, that have a classifier."""
        if vtis != self.snapshot.classified_vtis:
            self.snapshot = replace(self.snapshot, classified_vtis=vtis)

    @property
    def vrf_tables(self) -> Mapping[int, int]:
        """The tables of VTIs that are in VRFs, by if_id."""
        return {if_id: table for if_id, table in (self.snapshot.vtis or {}).items() if table}

    def update_vtis(self, vtis: Vtis) -> set[int]:
        """Update the kernel's VTIs and their VRFs, and return the if_ids that changed."""
        if vtis.changes == self._vti_changes:
            return set()
        self._vti_changes = vtis.changes
        known, now = self.snapshot.vtis or {}, vtis.tables()
        if now != self.snapshot.vtis:
            self.snapshot = replace(self.snapshot, vtis=now)
        now = now or {}
        return {if_id for if_id in known.keys() | now.keys() if known.get(if_id) != now.get(if_id)}

    async def read_tables(self, client: VppClient) -> set[int]:
        """Read VPP's other tables and their interfaces. Return the if_ids of VTIs whose VRF's table came or went."""
        tables = await inventory.read_other_tables(client, TABLE_NUMBERS)
        holders = (
            {(index, len(address) == 16) for address, index in self.snapshot.addresses.items()}
            if self.vrf_tables
            else set()
        )
        self._tables_of = await inventory.read_tables_of(client, holders)
        self._locate_addresses()
        changed = {number for number, _ in tables ^ self.tables}
        if changed:
            self.snapshot = replace(self.snapshot, tables=tables)
        return {if_id for if_id, table in self.vrf_tables.items() if table in changed}

    def _locate_addresses(self) -> None:
        """Set which addresses VPP recognises as the router's."""
        found = (
            (Prefix(address, 8 * len(address)), self._tables_of.get((index, len(address) == 16), 0))
            for address, index in self.snapshot.addresses.items()
        )
        self.interface_addresses = frozenset(Route(prefix, table) for prefix, table in found)

    def unknown_addresses(self, own: Iterable[Route]) -> frozenset[Route]:
        """Return the router's own addresses whose table VPP has but which it does not know."""
        return (
            frozenset(route for route in own if (route.table, len(route.prefix.address) == 16) in self.tables)
            - self.interface_addresses
        )

    def looked_up_remotes(self, include_reached: bool) -> list[bytes]:
        """Return the remotes that VPP was asked about: all of them, or only those that it does not reach."""
        return [remote for remote, reached in self._reached.items() if include_reached or not reached]

    def has_looked_up(self, remote: bytes) -> bool:
        """Return whether VPP was asked about a remote."""
        return remote in self._reached

    async def look_up_remotes(
        self, client: VppClient, remotes: Sequence[bytes], tunnel_interfaces: Set[int]
    ) -> set[bytes]:
        """Ask VPP whether it reaches addresses. Return those whose answer is new or has changed.

        `tunnel_interfaces` are the interfaces of tunnels. A remote behind one counts as unreachable: VPP would encrypt
        the tunnel's packets again and again.
        """
        replies = await client.run([RouteLookup(remote) for remote in remotes])
        changed = set()
        for remote, reply in zip(remotes, replies, strict=True):
            if reply.retval and remote in self._reached:
                continue  # VPP's answer is an error: no reason to delete a tunnel
            reached = not reply.retval and reply.value != UNREACHABLE and reply.value not in tunnel_interfaces
            self._egress_links.pop(remote, None)
            if reached and reply.value != VIA_RECURSION:
                self._egress_links[remote] = reply.value
            if self._reached.get(remote) != reached:
                if not reached or remote in self._reached:
                    route = "a route" if reached else "no route"
                    self._journal.note_limited(
                        JournalSource.VPP, EventKind.REACHED, f"has {route} to {format_addr(remote)}"
                    )
                self._reached[remote] = reached
                changed.add(remote)
        if changed:
            self.snapshot = replace(self.snapshot, unreachable=frozenset(self.looked_up_remotes(False)))
        return changed

    async def read_mtus(self, client: VppClient, remotes: Set[bytes]) -> set[bytes]:
        """Read the MTUs of the links to remotes, and return the remotes for which they changed."""
        by = {remote: (self._egress_links[remote], len(remote) == 16) for remote in remotes & self._egress_links.keys()}
        mtus = {link: await inventory.read_mtu(client, *link) for link in set(by.values())}
        found = {remote: mtus[link] for remote, link in by.items()}
        before = self.snapshot.link_mtus
        changed = {remote for remote in before.keys() | found.keys() if before.get(remote) != found.get(remote)}
        if changed:
            self.snapshot = replace(self.snapshot, link_mtus=found)
        return changed


async def _enable_acl_counters(client: VppClient) -> None:
    """Enable VPP's ACL counters. They count for all ACLs, so they stay off where the service does not need them."""
    await client.call("acl_stats_intf_counters_enable", {"enable": True})
