"""The junctions of VTIs: made step by step, adopted whole, and removed when nothing leads there any more."""

from __future__ import annotations

from collections.abc import Set

import pytest

from vppipsec.sync.actual.classifiers import ActualClassifiers, classifier_if_id, is_classifier_request
from vppipsec.vpp.api.interface import InterfaceAddressAddDel, SetInterfaceTable, SetInterfaceTag, SetInterfaceUp
from vppipsec.vpp.api.ip import EnableIp6, TableAddDel
from vppipsec.vpp.api.ipsec import IpsecItfCreate, IpsecItfDelete
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.inventory import FoundInterface, FoundTable
from vppipsec.vpp.ownership import CLASSIFIER_TABLE, CLASSIFIER_TABLE_NAME, INSTANCES, TABLE_NUMBERS, interface_address
from vppipsec.vpp.state.numbers import NumberPools, NumbersExhausted

FIRST = INSTANCES[0]
TABLES = tuple(FoundTable(CLASSIFIER_TABLE, ip6, CLASSIFIER_TABLE_NAME) for ip6 in (False, True))


class Maker:
    """Asks what to do, and does it: the first interface that is made gets index 100."""

    def __init__(self, actual: ActualClassifiers | None = None) -> None:
        self.actual = actual or ActualClassifiers()
        self.numbers = NumberPools()
        self.next_index = 100

    def round(self, wanted: Set[int], in_use: Set[int] = frozenset()) -> list[Request]:
        """Do what can be done now."""
        requests = list(self.actual.next_requests(wanted, in_use, self.numbers))
        assert all(map(is_classifier_request, requests))
        for request in requests:
            self.actual.apply_accepted(request, self.next_index, self.numbers)
            self.next_index += isinstance(request, IpsecItfCreate)
        return requests


def test_one_is_in_its_table_before_it_passes_ip_and_is_up_last() -> None:
    maker = Maker()
    assert not maker.actual.match({7})
    rounds = []
    while requests := maker.round({7}):
        assert (maker.actual.index(7) is not None) == (requests == [SetInterfaceUp(100)])
        rounds.append(requests)
    assert rounds == [
        [TableAddDel(CLASSIFIER_TABLE, ip6, CLASSIFIER_TABLE_NAME) for ip6 in (False, True)],
        [IpsecItfCreate(FIRST)],
        [
            SetInterfaceTag(100, "vpp-ipsecd junction 7"),
            *(SetInterfaceTable(100, ip6, CLASSIFIER_TABLE) for ip6 in (False, True)),
        ],
        [InterfaceAddressAddDel(100, interface_address(FIRST)), EnableIp6(100)],
        [SetInterfaceUp(100)],
    ]
    assert (maker.actual.index(7), maker.actual.if_ids) == (100, {100: 7})
    assert maker.actual.match({7})
    assert classifier_if_id("vpp-ipsecd junction 7") == 7
    assert CLASSIFIER_TABLE in TABLE_NUMBERS


def test_unused_classifier_goes_after_its_routes_and_its_table_last() -> None:
    maker = Maker()
    while maker.round({7, 8}):
        pass
    assert maker.actual.if_ids == {100: 7, 101: 8}
    assert maker.round({8}, {100}) == []
    assert maker.actual.index(7) is None
    assert not maker.actual.match({8})
    assert maker.round({8}) == [IpsecItfDelete(100)]
    assert maker.actual.match({8})
    assert maker.round({7, 8}) == [IpsecItfCreate(FIRST + 2)]  # a number that was given back comes again last
    assert maker.round(set(), {101, 102}) == []
    assert maker.round(set()) == [IpsecItfDelete(101), IpsecItfDelete(102)]
    assert maker.round(set()) == [
        TableAddDel(CLASSIFIER_TABLE, ip6, CLASSIFIER_TABLE_NAME, False) for ip6 in (False, True)
    ]
    assert maker.actual.match(set())


def test_what_an_earlier_run_left_is_adopted_where_it_is_whole() -> None:
    def found(index: int, tag: str, up: bool) -> FoundInterface:
        return FoundInterface(FIRST + index, index, tag, None, up, None, None)

    whole, half = found(5, "vpp-ipsecd junction 7", True), found(6, "vpp-ipsecd junction 8", False)
    twice, tunnel = found(7, "vpp-ipsecd junction 7", True), found(8, "vpp-ipsecd 0123456789abcdef0123", True)
    maker = Maker(ActualClassifiers([whole, half, twice, tunnel], TABLES))
    assert maker.actual.if_ids == {5: 7, 6: 0, 7: 0}
    assert maker.round({7, 8}, {5, 7}) == [IpsecItfDelete(6), IpsecItfCreate(FIRST)]
    assert maker.round({7, 8}, {5})[0] == IpsecItfDelete(7)
    assert maker.actual.index(7) == 5


def test_without_a_free_instance_there_is_none() -> None:
    maker = Maker(ActualClassifiers((), TABLES))
    maker.numbers = NumberPools((), INSTANCES)
    with pytest.raises(NumbersExhausted):
        maker.round({7})
