"""The stand-in's state and its message handlers. They behave as those of VPP 26.06; each module names VPP's source file."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from vppstandin.abf import Abf, AbfPolicy, Attachment, AttachmentKey
from vppstandin.acl import AclList, Acls, InterfaceAcls
from vppstandin.base import Death, Portion, Refusal, ReplyFields, address_of, address_reply
from vppstandin.fib import Fib, MainTables, TableKey, Tables
from vppstandin.interfaces import Interface, Interfaces
from vppstandin.ipsec import Ipsec, ProtectionEntry, SaEntry
from vppstandin.linuxcp import LinuxCp
from vppstandin.multicast import Multicast
from vppstandin.neighbors import Neighbors
from vppstandin.overlays import GreIpipTunnels
from vppstandin.routes import Routes

__all__ = ["Death", "Interface", "Refusal", "SaEntry", "World", "address_of", "address_reply"]

HandlerAnswer = ReplyFields | list[ReplyFields] | Portion
_Handler = Callable[[Any], HandlerAnswer]


class World:
    """The stand-in's state. `handle` accepts a request that vpp_papi unpacked, and returns the answer."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._tables = Tables()
        self._interfaces = Interfaces(self._tables)
        self._routes = Routes(self._tables, self._interfaces)
        self._ipsec = Ipsec(self._tables, self._interfaces)
        self._acls = Acls(self._interfaces)
        self._abf = Abf(self._tables, self._interfaces, self._routes, self._acls)
        self._overlays = GreIpipTunnels(self._tables, self._interfaces)
        self.linux_cp = LinuxCp(self._interfaces)
        self.neighbors = Neighbors(self._interfaces)
        self.fib = MainTables(self._tables)
        self._multicast = Multicast(self._tables)

    def handle(self, name: str, message: Any) -> HandlerAnswer:
        """Return the answer to a request: fields of a reply, details of a dump, or a portion of details with a cursor.

        Raises Refusal and Death.
        """
        parts = (
            self,
            self._ipsec,
            self._routes,
            self._interfaces,
            self._acls,
            self._abf,
            self._overlays,
            self.linux_cp,
            self.neighbors,
            self._multicast,
        )
        handler: _Handler = next(getattr(part, name) for part in parts if hasattr(part, name))
        return handler(message)

    @property
    def interfaces(self) -> dict[int, Interface]:
        """Interfaces by sw_if_index."""
        return self._interfaces.by_index

    @property
    def events(self) -> list[tuple[int, int, bool]]:
        """Interface events that are not sent yet: sw_if_index, flags, deleted."""
        return self._interfaces.events

    @events.setter
    def events(self, events: list[tuple[int, int, bool]]) -> None:
        self._interfaces.events = events

    @property
    def sas(self) -> dict[int, SaEntry]:
        """SAs by sad_id."""
        return self._ipsec.sas

    @property
    def protections(self) -> dict[int, ProtectionEntry]:
        """Protections by sw_if_index."""
        return self._ipsec.protections

    @property
    def fibs(self) -> dict[TableKey, Fib]:
        """FIB tables by number and family."""
        return self._tables.fibs

    @property
    def acls(self) -> dict[int, AclList]:
        """ACLs by number."""
        return self._acls.lists

    @property
    def interface_acls(self) -> dict[int, InterfaceAcls]:
        """ACLs of interfaces, by sw_if_index. Interfaces without ACLs are absent."""
        return self._acls.of_interfaces

    @property
    def counts_acl_matches(self) -> bool:
        """True while it counts ACL matches on interfaces (acl_stats_intf_counters_enable)."""
        return self._acls.counts_matches

    @property
    def abf_policies(self) -> dict[int, AbfPolicy]:
        """ABF policies by number."""
        return self._abf.policies

    @property
    def abf_attachments(self) -> dict[AttachmentKey, Attachment]:
        """Attachments by ABF policy and sw_if_index."""
        return self._abf.attachments

    @property
    def lost_references(self) -> list[int]:
        """SAs with more references than their own and those of protections. VPP has leaked these; they are never freed."""
        return self._ipsec.lost_references

    @property
    def leaks(self) -> list[str]:
        """Sentences about objects that VPP leaks or silently ignores. Empty if there are none."""
        return [
            *(f"table {key.table_id} was deleted while paths lead into it" for key in self._deleted_tables()),
            *(f"the route {net.address.hex()}/{net.length} outlived its table" for net in self._tables.routes_left),
            *(
                f"policy {key.policy_id} is attached to interface {key.sw_if_index}, which does not exist"
                for key in self.abf_attachments
                if key.sw_if_index not in self.interfaces
            ),
            *(
                f"the list of policy {key.policy_id} is not looked at on interface {key.sw_if_index}"
                for key in self._abf.overlooked
            ),
        ]

    def _deleted_tables(self) -> list[TableKey]:
        return [key for key, fib in self.fibs.items() if not fib.of_api]

    def on_new_sa(self, hook: Callable[[int], None] | None) -> None:
        """Set a hook that is called with the stat_index of each new SA."""
        self._ipsec.on_new_sa = hook

    def on_new_route(self, hook: Callable[[int], None] | None) -> None:
        """Set a hook that is called with the stats_index of each new prefix in a table."""
        self._tables.on_new_route = hook

    def on_put_acl(self, hook: Callable[[int, int], None] | None) -> None:
        """Set a hook that is called for each new or replaced ACL, with its number and the number of its rules."""
        self._acls.on_put = hook

    # vlibmemory, vpp/api

    def control_ping(self, message: Any) -> ReplyFields:
        return {"vpe_pid": self.pid}

    def show_version(self, message: Any) -> ReplyFields:
        return {"program": "vpe", "version": "26.06-standin", "build_date": "", "build_directory": ""}
