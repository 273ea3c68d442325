"""VTI classifiers: VTI packets re-enter VPP on these interfaces, so that ACLs can select the child SA.

A classifier is an `ipsec` interface of the service without SAs, so it receives nothing else. All classifiers are in one
table of their own, which has no routes. There VPP drops packets that no rule matches. The main table would send them
back to the classifier for ever. Each classifier has an address of its own in that table, so that it passes IPv4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field

from vppipsec.vpp.api.interface import InterfaceAddressAddDel, SetInterfaceTable, SetInterfaceTag, SetInterfaceUp
from vppipsec.vpp.api.ip import EnableIp6, TableAddDel
from vppipsec.vpp.api.ipsec import IpsecItfCreate, IpsecItfDelete
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.inventory import FoundInterface, FoundTable
from vppipsec.vpp.ownership import CLASSIFIER_TABLE, CLASSIFIER_TABLE_NAME, CLASSIFIER_TAG, interface_address
from vppipsec.vpp.state.numbers import NumberPools

_FAMILIES = (False, True)


def is_classifier_request(request: Request) -> bool:
    """Return whether a request is one of those that create and delete classifiers."""
    kinds = (
        IpsecItfCreate
        | IpsecItfDelete
        | SetInterfaceTag
        | SetInterfaceTable
        | InterfaceAddressAddDel
        | EnableIp6
        | SetInterfaceUp
    )
    return isinstance(request, kinds) or (isinstance(request, TableAddDel) and request.table == CLASSIFIER_TABLE)


def classifier_if_id(tag: str) -> int | None:
    """Return the if_id of the VTI whose classifier has this tag, None where the tag is not a classifier's."""
    number = tag.removeprefix(CLASSIFIER_TAG)
    return int(number) if tag.startswith(CLASSIFIER_TAG) and number.isdecimal() else None


@dataclass(slots=True)
class ActualClassifier:
    """A classifier in VPP. `tables`: the families for which it is in the classifiers' table.

    `up` is set last: the classifier is then complete.
    """

    instance: int
    sw_if_index: int
    tag: str = ""
    tables: set[bool] = field(default_factory=set)
    has_address: bool = False
    ip6: bool = False
    up: bool = False


class ActualClassifiers:
    """The classifiers in VPP by their VTI's if_id. Every request that VPP accepts updates them."""

    def __init__(self, interfaces: Iterable[FoundInterface] = (), tables: Iterable[FoundTable] = ()) -> None:
        """Adopt what an earlier run left. A classifier that is not up may be incomplete, and is removed."""
        self.by_if_id: dict[int, ActualClassifier] = {}
        self.surplus: list[ActualClassifier] = []
        """Classifiers to remove."""
        self._tables = {table.ip6 for table in tables if table.number == CLASSIFIER_TABLE}
        self._creating: dict[int, int] = {}  # if_id by instance
        for itf in interfaces:
            if_id = classifier_if_id(itf.tag)
            if if_id is None:
                continue
            classifier = ActualClassifier(itf.instance, itf.sw_if_index, itf.tag, {*_FAMILIES}, True, True, itf.up)
            if itf.up and if_id not in self.by_if_id:
                self.by_if_id[if_id] = classifier
            else:
                self.surplus.append(classifier)

    @property
    def if_ids(self) -> Mapping[int, int]:
        """The if_id of each classifier, by its sw_if_index; 0 for one that is to be removed."""
        surplus = {classifier.sw_if_index: 0 for classifier in self.surplus}
        return surplus | {classifier.sw_if_index: if_id for if_id, classifier in self.by_if_id.items()}

    def index(self, if_id: int) -> int | None:
        """Return the sw_if_index of a VTI's complete classifier, None where there is none."""
        classifier = self.by_if_id.get(if_id)
        return classifier.sw_if_index if classifier is not None and classifier.up else None

    def match(self, wanted: Set[int]) -> bool:
        """Return whether VPP has exactly the classifiers of these VTIs, all complete."""
        whole = all(classifier.up for classifier in self.by_if_id.values())
        return whole and self.by_if_id.keys() == wanted and not self.surplus and bool(self._tables) == bool(wanted)

    def next_requests(self, wanted: Set[int], in_use: Set[int], numbers: NumberPools) -> Iterator[Request]:
        """Yield what can be sent now towards having exactly the classifiers of these VTIs.

        `in_use` are the sw_if_indexes of classifiers that routes still lead to, or that layers are attached to. Raises
        NumbersExhausted.
        """
        for if_id in [if_id for if_id in self.by_if_id if if_id not in wanted]:
            self.surplus.append(self.by_if_id.pop(if_id))
        for classifier in self.surplus:
            if classifier.sw_if_index not in in_use:
                yield IpsecItfDelete(classifier.sw_if_index)
        if not wanted:
            if not self.surplus:
                yield from (
                    TableAddDel(CLASSIFIER_TABLE, ip6, CLASSIFIER_TABLE_NAME, False)
                    for ip6 in _FAMILIES
                    if ip6 in self._tables
                )
            return
        yield from (
            TableAddDel(CLASSIFIER_TABLE, ip6, CLASSIFIER_TABLE_NAME) for ip6 in _FAMILIES if ip6 not in self._tables
        )
        for if_id in sorted(wanted):
            if if_id in self.by_if_id:
                yield from self._configure(if_id, self.by_if_id[if_id])
            elif self._tables.issuperset(_FAMILIES):
                instance = numbers.instance()
                self._creating[instance] = if_id
                yield IpsecItfCreate(instance)

    def _configure(self, if_id: int, classifier: ActualClassifier) -> Iterator[Request]:
        """Yield what an interface lacks, step by step: it gets its table first, then its address, and then comes up."""
        index = classifier.sw_if_index
        if not classifier.tag or not classifier.tables.issuperset(_FAMILIES):
            if not classifier.tag:
                yield SetInterfaceTag(index, f"{CLASSIFIER_TAG}{if_id}")
            yield from (
                SetInterfaceTable(index, ip6, CLASSIFIER_TABLE) for ip6 in _FAMILIES if ip6 not in classifier.tables
            )
        elif not classifier.has_address or not classifier.ip6:
            if not classifier.has_address:
                yield InterfaceAddressAddDel(index, interface_address(classifier.instance))
            if not classifier.ip6:
                yield EnableIp6(index)
        elif not classifier.up:
            yield SetInterfaceUp(index)

    def apply_accepted(self, request: Request, value: int, numbers: NumberPools) -> None:
        """Record that VPP accepted a request of `next_requests`; `value` is the value in VPP's reply."""
        match request:
            case TableAddDel(_, ip6, _, is_add):
                (self._tables.add if is_add else self._tables.discard)(ip6)
            case IpsecItfCreate(instance):
                self.by_if_id[self._creating.pop(instance)] = ActualClassifier(instance, value)
            case IpsecItfDelete(index):
                (gone,) = [classifier for classifier in self.surplus if classifier.sw_if_index == index]
                self.surplus.remove(gone)
                numbers.free_instance(gone.instance)
            case SetInterfaceTag(index, tag):
                self._at(index).tag = tag
            case SetInterfaceTable(index, ip6):
                self._at(index).tables.add(ip6)
            case InterfaceAddressAddDel(index):
                self._at(index).has_address = True
            case EnableIp6(index):
                self._at(index).ip6 = True
            case SetInterfaceUp(index):
                self._at(index).up = True

    def _at(self, sw_if_index: int) -> ActualClassifier:
        return next(classifier for classifier in self.by_if_id.values() if classifier.sw_if_index == sw_if_index)
