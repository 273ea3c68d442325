"""Faults of VPP in a test: the n-th change ends something, some changes are refused, some are slow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vppipsec.vpp.api.abf import AbfAttach, AbfPolicyAddDel
from vppipsec.vpp.api.acl import AclAddReplace, AclDel, SetInterfaceAcls
from vppipsec.vpp.api.interface import (
    InterfaceAddressAddDel,
    SetInterfaceMtu,
    SetInterfaceTable,
    SetInterfaceTag,
    SetInterfaceUp,
    SetUnnumbered,
)
from vppipsec.vpp.api.ip import EnableIp6, NeighborAddDel, RouteAddDel, TableAddDel
from vppipsec.vpp.api.ipsec import (
    IpsecItfCreate,
    IpsecItfDelete,
    SadEntryAdd,
    SadEntryDel,
    SadEntryUpdate,
    TunnelProtect,
    TunnelUnprotect,
)
from vppstandin.server import Busy, End

OWN_CHANGES = (
    SadEntryAdd,
    SadEntryUpdate,
    SadEntryDel,
    IpsecItfCreate,
    IpsecItfDelete,
    SetInterfaceTag,
    SetUnnumbered,
    EnableIp6,
    SetInterfaceTable,
    InterfaceAddressAddDel,
    SetInterfaceUp,
    SetInterfaceMtu,
    TunnelProtect,
    TunnelUnprotect,
    RouteAddDel,
    AclAddReplace,
    AclDel,
    SetInterfaceAcls,
    TableAddDel,
    AbfPolicyAddDel,
    AbfAttach,
    NeighborAddDel,
)
CHANGES = frozenset(request.message for request in OWN_CHANGES)
"""Messages by which the service changes VPP."""

Happening = End | Busy
Chosen = Callable[[str, Any], bool]


@dataclass
class Refusing:
    """Requests that are refused, with which number, and how many times more (None: until `heal`)."""

    chosen: Chosen
    retval: int
    times: int | None = None


@dataclass
class Trouble:
    """A fault of the stand-in that a test arms. `answered` distinguishes its refusals from the stand-in's own."""

    changes: int = 0
    """Changes seen so far, including refused ones."""
    refusing: list[Refusing] = field(default_factory=list)
    answered: int | None = None
    """The number with which the present request was refused, None where it was not."""
    refused: int = 0
    """Requests refused so far."""
    _at: dict[int, tuple[Happening, Callable[[], object]]] = field(default_factory=dict)

    def __call__(self, name: str, request: Any) -> int | Happening | None:
        self.answered = None
        if name in CHANGES:
            self.changes += 1
            happening, then = self._at.pop(self.changes, (None, _nothing))
            then()
            if happening is not None:
                return happening
        for refusing in self.refusing:
            if refusing.chosen(name, request):
                if refusing.times is not None:
                    refusing.times -= 1
                    if not refusing.times:
                        self.refusing.remove(refusing)
                self.answered = refusing.retval
                self.refused += 1
                return refusing.retval
        return None

    def at(self, number: int, happening: Happening, then: Callable[[], object] = lambda: None) -> None:
        """Arm a fault for the `number`-th change from now, and run the test's action at that moment."""
        self._at[self.changes + number] = (happening, then)

    def refuse(self, chosen: Chosen, retval: int = -1, times: int | None = None) -> None:
        """Refuse requests from now on, this many times or until `heal`."""
        self.refusing.append(Refusing(chosen, retval, times))

    def heal(self) -> None:
        """End all faults."""
        self.refusing.clear()
        self._at.clear()


def _nothing() -> None:
    pass


def of_kind(message: str) -> Chosen:
    """Choose all requests of one message."""
    return lambda name, request: name == message
