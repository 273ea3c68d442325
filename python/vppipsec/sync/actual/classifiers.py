"""The junctions of VTIs: interfaces in VPP on which what is routed over a VTI is received once more, to be told apart by rules.

A junction is an `ipsec` interface of ours without SAs, so nothing else ever comes in there. It is in a table of its own that
nothing is in: what no rule takes drops, where the main table would lead it back for ever. So that it passes IPv4 it has an
address there, another one each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field

from vppipsec.vpp.api.interface import SetItfAddress, SetItfTable, SetItfUp, TagItf
from vppipsec.vpp.api.ip import EnableIp6, SetTable
from vppipsec.vpp.api.ipsec import CreateItf, DeleteItf
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.inventory import FoundItf, FoundTable
from vppipsec.vpp.ownership import JUNCTION_TABLE, JUNCTION_TABLE_NAME, JUNCTION_TAG, own_address
from vppipsec.vpp.state.numbers import Numbers

_FAMILIES = (False, True)


def is_of_junction(request: Request) -> bool:
    """Tell whether a request is one of those that make and remove junctions."""
    kinds = CreateItf | DeleteItf | TagItf | SetItfTable | SetItfAddress | EnableIp6 | SetItfUp
    return isinstance(request, kinds) or (isinstance(request, SetTable) and request.table == JUNCTION_TABLE)


def if_id_of(tag: str) -> int | None:
    """Return the if_id of the VTI whose junction has a tag, None where the tag is no junction's."""
    number = tag.removeprefix(JUNCTION_TAG)
    return int(number) if tag.startswith(JUNCTION_TAG) and number.isdecimal() else None


@dataclass(slots=True)
class HeldJunction:
    """A junction in VPP. `tables` are the families of which it is in the junctions' table. `up` comes last: then it is whole."""

    instance: int
    sw_if_index: int
    tag: str = ""
    tables: set[bool] = field(default_factory=set)
    address: bool = False
    ip6: bool = False
    up: bool = False


class HeldJunctions:
    """The junctions in VPP by the if_id of their VTI, kept up by every request that VPP accepts."""

    def __init__(self, interfaces: Iterable[FoundItf] = (), tables: Iterable[FoundTable] = ()) -> None:
        """Take what an earlier run left. One that is not up may not be whole, and is not to be used."""
        self.held: dict[int, HeldJunction] = {}
        self.strays: list[HeldJunction] = []
        """Those to be removed."""
        self._tables = {table.ip6 for table in tables if table.number == JUNCTION_TABLE}
        self._making: dict[int, int] = {}  # if_id by instance
        for itf in interfaces:
            if_id = if_id_of(itf.tag)
            if if_id is None:
                continue
            junction = HeldJunction(itf.instance, itf.sw_if_index, itf.tag, {*_FAMILIES}, True, True, itf.up)
            if itf.up and if_id not in self.held:
                self.held[if_id] = junction
            else:
                self.strays.append(junction)

    @property
    def indexes(self) -> Mapping[int, int]:
        """The if_id of each junction, by its sw_if_index; 0 stands for one that is to go."""
        strays = {junction.sw_if_index: 0 for junction in self.strays}
        return strays | {junction.sw_if_index: if_id for if_id, junction in self.held.items()}

    def index(self, if_id: int) -> int | None:
        """Return the sw_if_index of a VTI's junction that is whole, None where there is none."""
        junction = self.held.get(if_id)
        return junction.sw_if_index if junction is not None and junction.up else None

    def are(self, wanted: Set[int]) -> bool:
        """Tell whether there are the junctions of these VTIs, whole, and nothing else."""
        whole = all(junction.up for junction in self.held.values())
        return whole and self.held.keys() == wanted and not self.strays and bool(self._tables) == bool(wanted)

    def next_requests(self, wanted: Set[int], in_use: Set[int], numbers: Numbers) -> Iterator[Request]:
        """Yield what can be sent now, so that there are the junctions of these VTIs and no others.

        `in_use` are the sw_if_indexes of those to which something of ours still leads, or is attached. Raises NumbersExhausted.
        """
        for if_id in [if_id for if_id in self.held if if_id not in wanted]:
            self.strays.append(self.held.pop(if_id))
        for junction in self.strays:
            if junction.sw_if_index not in in_use:
                yield DeleteItf(junction.sw_if_index)
        if not wanted:
            if not self.strays:
                yield from (
                    SetTable(JUNCTION_TABLE, ip6, JUNCTION_TABLE_NAME, False)
                    for ip6 in _FAMILIES
                    if ip6 in self._tables
                )
            return
        yield from (SetTable(JUNCTION_TABLE, ip6, JUNCTION_TABLE_NAME) for ip6 in _FAMILIES if ip6 not in self._tables)
        for if_id in sorted(wanted):
            if if_id in self.held:
                yield from self._complete(if_id, self.held[if_id])
            elif self._tables.issuperset(_FAMILIES):
                instance = numbers.instance()
                self._making[instance] = if_id
                yield CreateItf(instance)

    def _complete(self, if_id: int, junction: HeldJunction) -> Iterator[Request]:
        """Yield what an interface lacks, step by step: it must have no address before it is in its table, nor be up."""
        index = junction.sw_if_index
        if not junction.tag or not junction.tables.issuperset(_FAMILIES):
            if not junction.tag:
                yield TagItf(index, f"{JUNCTION_TAG}{if_id}")
            yield from (SetItfTable(index, ip6, JUNCTION_TABLE) for ip6 in _FAMILIES if ip6 not in junction.tables)
        elif not junction.address or not junction.ip6:
            if not junction.address:
                yield SetItfAddress(index, own_address(junction.instance))
            if not junction.ip6:
                yield EnableIp6(index)
        elif not junction.up:
            yield SetItfUp(index)

    def took(self, request: Request, extra: int, numbers: Numbers) -> None:
        """Note that VPP accepted a request of `next_requests`; `extra` is what its answer carried."""
        match request:
            case SetTable(_, ip6, _, is_add):
                (self._tables.add if is_add else self._tables.discard)(ip6)
            case CreateItf(instance):
                self.held[self._making.pop(instance)] = HeldJunction(instance, extra)
            case DeleteItf(index):
                (gone,) = [junction for junction in self.strays if junction.sw_if_index == index]
                self.strays.remove(gone)
                numbers.free_instance(gone.instance)
            case TagItf(index, tag):
                self._of(index).tag = tag
            case SetItfTable(index, ip6):
                self._of(index).tables.add(ip6)
            case SetItfAddress(index):
                self._of(index).address = True
            case EnableIp6(index):
                self._of(index).ip6 = True
            case SetItfUp(index):
                self._of(index).up = True

    def _of(self, sw_if_index: int) -> HeldJunction:
        return next(junction for junction in self.held.values() if junction.sw_if_index == sw_if_index)
