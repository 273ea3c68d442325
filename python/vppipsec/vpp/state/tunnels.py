"""What VPP holds of ours, as its answers tell: filled from dumps at connect, kept up by every request that VPP accepts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from vppipsec.vpp.api.acl import DelAcl, FilterItf, PutAcl
from vppipsec.vpp.api.interface import SetItfAddress, SetItfTable
from vppipsec.vpp.api.ipsec import (
    AddSa,
    ChangeRoute,
    CreateItf,
    DeleteItf,
    DelSa,
    DisableIp6,
    EnableIp6,
    Protect,
    Request,
    SetItfUp,
    SetMtu,
    SetSaPorts,
    SetUnnumbered,
    TagItf,
    Unprotect,
)
from vppipsec.vpp.api.linux_cp import PairItf
from vppipsec.vpp.gre_ipip import Overlay
from vppipsec.vpp.types import (
    MAX_ITF_INSTANCE,
    NO_INDEX,
    HostItf,
    Lead,
    Protection,
    Route,
    Rule,
    SaSpec,
    interfaces_of,
)

SAD_ID_FIRST = 0x49500000
"""Numbers of our SAs in VPP begin here; others' SAs are outside."""
SAD_ID_LAST = SAD_ID_FIRST + 0x000FFFFF
INSTANCES = range(256, MAX_ITF_INSTANCE)
"""Instances of our `ipsec` interfaces. Those below are others': VPP hands out the lowest ones first."""

IP6_TAG = " ip6"
"""How the tag of an interface ends that passes IPv6: no dump of VPP's tells."""


class NumbersExhausted(Exception):
    """VPP has no room for another SA or interface of ours."""


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


class HeldRoutes(dict[Route, Lead]):
    """Routes of our FIB source, each with where it leads; of those that drop also by which stats_index VPP counts."""

    def __init__(self) -> None:
        super().__init__()
        self._dropping: dict[Route, int] = {}
        self._by_interface: dict[int, set[Route]] = {}

    def into(self, sw_if_index: int) -> frozenset[Route] | set[Route]:
        """Return the routes that lead into an interface, those included of which it has a share only."""
        return self._by_interface.get(sw_if_index, frozenset())

    def dropping(self) -> list[tuple[Route, int]]:
        """Return the routes that drop, each with its stats_index."""
        return list(self._dropping.items())

    def took(self, request: ChangeRoute, stats_index: int = NO_INDEX) -> None:
        """Note that VPP accepted a change of route; `stats_index` is what its answer carried."""
        route = request.route
        before = self.pop(route, None)
        self._dropping.pop(route, None)
        for index in () if before is None else interfaces_of(before):
            routes = self._by_interface[index]
            routes.discard(route)
            if not routes:
                del self._by_interface[index]
        if request.is_add:
            self[route] = request.lead
            if request.lead == NO_INDEX:
                self._dropping[route] = stats_index
            for index in interfaces_of(request.lead):
                self._by_interface.setdefault(index, set()).add(route)


class Numbers:
    """Hands out `sad_id`s and interface instances that nobody uses. A number that was given back comes again last."""

    def __init__(self, sad_ids: Iterable[int] = (), instances: Iterable[int] = ()) -> None:
        """Take the numbers that are in use already; those outside of our ranges don't count."""
        self._sad_ids = _Pool(range(SAD_ID_FIRST, SAD_ID_LAST + 1), sad_ids, "SAs")
        self._instances = _Pool(INSTANCES, instances, "ipsec interfaces")

    def shortage(self, sad_ids: int, instances: int) -> str:
        """Return why so many numbers cannot be had, as a sentence; nothing where they can."""
        for pool, count in ((self._sad_ids, sad_ids), (self._instances, instances)):
            if count > len(pool.numbers) - len(pool.taken):
                return pool.limit
        return ""

    def sad_id(self) -> int:
        """Return a free `sad_id` of our range and take it. Raises NumbersExhausted."""
        return self._sad_ids.take()

    def instance(self) -> int:
        """Return a free instance of `ipsec` interface and take it. Raises NumbersExhausted."""
        return self._instances.take()

    def free_sad_id(self, sad_id: int) -> None:
        """Give a `sad_id` back."""
        self._sad_ids.taken.discard(sad_id)

    def free_instance(self, instance: int) -> None:
        """Give an instance back."""
        self._instances.taken.discard(instance)


class _Pool:
    """Numbers of a range, handed out in turn. `limit` is the sentence that tells how many there are."""

    def __init__(self, numbers: range, taken: Iterable[int], name: str) -> None:
        self.numbers = numbers
        self.taken = {number for number in taken if number in numbers}
        self.limit = f"there can be no more than {len(numbers)} {name} of ours in VPP"
        self._turn = 0

    def take(self) -> int:
        if len(self.taken) == len(self.numbers):
            raise NumbersExhausted(self.limit)
        while (number := self.numbers[self._turn]) in self.taken:
            self._turn = (self._turn + 1) % len(self.numbers)
        self._turn = (self._turn + 1) % len(self.numbers)
        self.taken.add(number)
        return number
