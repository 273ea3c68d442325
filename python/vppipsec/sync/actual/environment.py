"""What of VPP's own the tunnels depend on: its interfaces and their addresses, other FIB tables, and which remotes it reaches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace

from vppipsec.kernel.text import format_addr
from vppipsec.kernel.xfrm.sad_spd import GroupKey
from vppipsec.sync.actual.vtis import Vtis
from vppipsec.sync.desired.environment import Environment
from vppipsec.sync.desired.vti_routes import Table
from vppipsec.sync.journal import Journal, Kind, Source
from vppipsec.vpp import inventory
from vppipsec.vpp.api.client import VppClient
from vppipsec.vpp.api.ip import NOT_REACHED, VIA_RECURSION, LookupRoute
from vppipsec.vpp.gre_ipip import Overlay
from vppipsec.vpp.ownership import NUMBERS, SAD_ID_FIRST, SAD_ID_LAST
from vppipsec.vpp.types import Prefix, Protection, Route


class Surroundings:
    """What is known of one VPP but for what it holds of ours. `env` is what is translated by: another one where it changed."""

    def __init__(self, journal: Journal, tables: frozenset[Table] = frozenset()) -> None:
        """Take VPP's FIB tables but for ours."""
        self.env = Environment({}, tables=tables)
        self.interfaces = inventory.Interfaces()
        self.overlays: frozenset[Overlay] = frozenset()
        """Interfaces of others, gre and ipip, that none but we protect."""
        self.known: frozenset[Route] = frozenset()
        """The addresses of its interfaces, each in its table. Before a VTI is in a VRF nobody asks: all are in the main one."""
        self._journal = journal
        self._tables_of: Mapping[tuple[int, bool], int] = {}
        self._reached: dict[bytes, bool] = {}
        self._links: dict[bytes, int] = {}
        """By which interface VPP reaches a remote address, where it says so."""
        self._vti_changes = -1

    @property
    def tables(self) -> frozenset[Table]:
        """VPP's FIB tables but for ours."""
        return self.env.tables

    async def read(self, client: VppClient, enforces: bool) -> None:
        """Read all for the first time, the interfaces excepted."""
        if enforces:
            await _count_denied(client)
        addresses = await inventory.read_addresses(client, self.interfaces.up)
        self.env = replace(self.env, addresses=addresses, offered=inventory.offered_ciphers(client), enforces=enforces)
        self._know()

    async def read_interfaces(self, client: VppClient) -> Set[int]:
        """Read the interfaces, and return those that are gone."""
        before, self.interfaces = self.interfaces, await inventory.read_interfaces(client)
        return before.every - self.interfaces.every

    async def read_addresses(self, client: VppClient) -> bool:
        """Read the addresses of VPP's interfaces, and tell whether they changed."""
        addresses = await inventory.read_addresses(client, self.interfaces.up)
        if addresses == self.env.addresses:
            return False
        self._journal.note(Source.VPP, "the addresses of its interfaces changed: every tunnel is looked at again")
        self.env = replace(self.env, addresses=addresses)
        self._know()
        return True

    async def enforce(self, client: VppClient, enforces: bool) -> bool:
        """Take the setting whether decrypted packets are held against the selectors, and tell whether that is new."""
        if enforces == self.env.enforces:
            return False
        if enforces:
            await _count_denied(client)
        self.env = replace(self.env, enforces=enforces)
        return True

    async def read_overlays(self, client: VppClient) -> Mapping[Overlay, Protection | None]:
        """Read the gre and ipip interfaces, and return what of ours protects them."""
        found = await inventory.read_overlays(client, SAD_ID_FIRST, SAD_ID_LAST)
        self.overlays = frozenset(found)
        return found

    def guard(self, overlays: Mapping[GroupKey, Overlay]) -> set[GroupKey]:
        """Take the overlays that groups are for, and return the groups for which that is new."""
        before = self.env.overlays
        changed = {key for key in before.keys() | overlays.keys() if before.get(key) != overlays.get(key)}
        if changed:
            self.env = replace(self.env, overlays=overlays)
        return changed

    def tell_apart(self, vtis: frozenset[int]) -> None:
        """Take the VTIs, by if_id, whose packets are told apart by rules."""
        if vtis != self.env.told_apart:
            self.env = replace(self.env, told_apart=vtis)

    @property
    def in_vrfs(self) -> Mapping[int, int]:
        """The tables of VTIs that are in VRFs, by if_id."""
        return {if_id: table for if_id, table in (self.env.vtis or {}).items() if table}

    def follow_vtis(self, vtis: Vtis) -> set[int]:
        """Take which VTIs the kernel has and in which VRFs, and return the if_ids of those for which that is news."""
        if vtis.changes == self._vti_changes:
            return set()
        self._vti_changes = vtis.changes
        known, now = self.env.vtis or {}, vtis.tables()
        if now != self.env.vtis:
            self.env = replace(self.env, vtis=now)
        now = now or {}
        return {if_id for if_id in known.keys() | now.keys() if known.get(if_id) != now.get(if_id)}

    async def read_tables(self, client: VppClient) -> set[int]:
        """See which tables VPP has but for ours, and who is there. Return the if_ids of VTIs for whose VRF that is news."""
        tables = await inventory.read_other_tables(client, NUMBERS)
        holders = (
            {(index, len(address) == 16) for address, index in self.env.addresses.items()} if self.in_vrfs else set()
        )
        self._tables_of = await inventory.read_tables_of(client, holders)
        self._know()
        changed = {number for number, _ in tables ^ self.tables}
        if changed:
            self.env = replace(self.env, tables=tables)
        return {if_id for if_id, table in self.in_vrfs.items() if table in changed}

    def _know(self) -> None:
        """See which addresses VPP knows for the router's."""
        found = (
            (Prefix(address, 8 * len(address)), self._tables_of.get((index, len(address) == 16), 0))
            for address, index in self.env.addresses.items()
        )
        self.known = frozenset(Route(prefix, table) for prefix, table in found)

    def unknown(self, own: Iterable[Route]) -> frozenset[Route]:
        """Return those of the router's own addresses that VPP has the table of, and does not know."""
        return (
            frozenset(route for route in own if (route.table, len(route.prefix.address) == 16) in self.tables)
            - self.known
        )

    def known_remotes(self, reached_ones: bool) -> list[bytes]:
        """Return the remotes that VPP was asked about and does not reach, or all that it was asked about."""
        return [remote for remote, reached in self._reached.items() if reached_ones or not reached]

    def knows(self, remote: bytes) -> bool:
        """Tell whether VPP was asked about a remote."""
        return remote in self._reached

    async def look_up(self, client: VppClient, remotes: Sequence[bytes], ours: Set[int]) -> set[bytes]:
        """Ask VPP whether it reaches addresses. Return those whose answer is new or has changed.

        `ours` are the interfaces of tunnels: through one of them a tunnel's packets would be encrypted again, and again.
        """
        replies = await client.run([LookupRoute(remote) for remote in remotes])
        changed = set()
        for remote, reply in zip(remotes, replies, strict=True):
            if reply.retval and remote in self._reached:
                continue  # VPP does not say: no reason to take a tunnel down
            reached = not reply.retval and reply.extra != NOT_REACHED and reply.extra not in ours
            self._links.pop(remote, None)
            if reached and reply.extra != VIA_RECURSION:
                self._links[remote] = reply.extra
            if self._reached.get(remote) != reached:
                if not reached or remote in self._reached:
                    route = "a route" if reached else "no route"
                    self._journal.tell(Source.VPP, Kind.REACHED, f"has {route} to {format_addr(remote)}")
                self._reached[remote] = reached
                changed.add(remote)
        if changed:
            self.env = replace(self.env, unreachable=frozenset(self.known_remotes(False)))
        return changed

    async def read_mtus(self, client: VppClient, remotes: Set[bytes]) -> set[bytes]:
        """Read how long packets to remotes may be that leave VPP, and return the remotes for which that is news."""
        by = {remote: (self._links[remote], len(remote) == 16) for remote in remotes & self._links.keys()}
        mtus = {link: await inventory.read_mtu(client, *link) for link in set(by.values())}
        found = {remote: mtus[link] for remote, link in by.items()}
        before = self.env.link_mtus
        changed = {remote for remote in before.keys() | found.keys() if before.get(remote) != found.get(remote)}
        if changed:
            self.env = replace(self.env, link_mtus=found)
        return changed


async def _count_denied(client: VppClient) -> None:
    """Let VPP count what ACLs match; it counts for others' ACLs too then, so it is left alone where nothing needs it."""
    await client.call("acl_stats_intf_counters_enable", {"enable": True})
