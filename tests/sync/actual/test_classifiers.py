"""The junctions of VTIs: made step by step, adopted whole, and removed when nothing leads there any more."""

from __future__ import annotations

from collections.abc import Set

import pytest

from vppipsec.sync.actual.classifiers import HeldJunctions, if_id_of, is_of_junction
from vppipsec.vpp.api.interface import SetItfAddress, SetItfTable, SetItfUp, TagItf
from vppipsec.vpp.api.ip import EnableIp6, SetTable
from vppipsec.vpp.api.ipsec import CreateItf, DeleteItf
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.inventory import FoundItf, FoundTable
from vppipsec.vpp.ownership import INSTANCES, JUNCTION_TABLE, JUNCTION_TABLE_NAME, NUMBERS, own_address
from vppipsec.vpp.state.numbers import Numbers, NumbersExhausted

FIRST = INSTANCES[0]
TABLES = tuple(FoundTable(JUNCTION_TABLE, ip6, JUNCTION_TABLE_NAME) for ip6 in (False, True))


class Maker:
    """Asks what to do, and does it: the first interface that is made gets index 100."""

    def __init__(self, held: HeldJunctions | None = None) -> None:
        self.held = held or HeldJunctions()
        self.numbers = Numbers()
        self.next_index = 100

    def round(self, wanted: Set[int], in_use: Set[int] = frozenset()) -> list[Request]:
        """Do what can be done now."""
        requests = list(self.held.next_requests(wanted, in_use, self.numbers))
        assert all(map(is_of_junction, requests))
        for request in requests:
            self.held.took(request, self.next_index, self.numbers)
            self.next_index += isinstance(request, CreateItf)
        return requests


def test_one_is_in_its_table_before_it_passes_ip_and_is_up_last() -> None:
    maker = Maker()
    assert not maker.held.are({7})
    rounds = []
    while requests := maker.round({7}):
        assert (maker.held.index(7) is not None) == (requests == [SetItfUp(100)])
        rounds.append(requests)
    assert rounds == [
        [SetTable(JUNCTION_TABLE, ip6, JUNCTION_TABLE_NAME) for ip6 in (False, True)],
        [CreateItf(FIRST)],
        [TagItf(100, "vpp-ipsecd junction 7"), *(SetItfTable(100, ip6, JUNCTION_TABLE) for ip6 in (False, True))],
        [SetItfAddress(100, own_address(FIRST)), EnableIp6(100)],
        [SetItfUp(100)],
    ]
    assert (maker.held.index(7), maker.held.indexes) == (100, {100: 7})
    assert maker.held.are({7})
    assert if_id_of("vpp-ipsecd junction 7") == 7
    assert JUNCTION_TABLE in NUMBERS


def test_one_that_nobody_wants_goes_once_nothing_leads_there_and_the_table_last() -> None:
    maker = Maker()
    while maker.round({7, 8}):
        pass
    assert maker.held.indexes == {100: 7, 101: 8}
    assert maker.round({8}, {100}) == []
    assert maker.held.index(7) is None
    assert not maker.held.are({8})
    assert maker.round({8}) == [DeleteItf(100)]
    assert maker.held.are({8})
    assert maker.round({7, 8}) == [CreateItf(FIRST + 2)]  # a number that was given back comes again last
    assert maker.round(set(), {101, 102}) == []
    assert maker.round(set()) == [DeleteItf(101), DeleteItf(102)]
    assert maker.round(set()) == [SetTable(JUNCTION_TABLE, ip6, JUNCTION_TABLE_NAME, False) for ip6 in (False, True)]
    assert maker.held.are(set())


def test_what_an_earlier_run_left_is_adopted_where_it_is_whole() -> None:
    def found(index: int, tag: str, up: bool) -> FoundItf:
        return FoundItf(FIRST + index, index, tag, None, up, None, None)

    whole, half = found(5, "vpp-ipsecd junction 7", True), found(6, "vpp-ipsecd junction 8", False)
    twice, tunnel = found(7, "vpp-ipsecd junction 7", True), found(8, "vpp-ipsecd 0123456789abcdef0123", True)
    maker = Maker(HeldJunctions([whole, half, twice, tunnel], TABLES))
    assert maker.held.indexes == {5: 7, 6: 0, 7: 0}
    assert maker.round({7, 8}, {5, 7}) == [DeleteItf(6), CreateItf(FIRST)]
    assert maker.round({7, 8}, {5})[0] == DeleteItf(7)
    assert maker.held.index(7) == 5


def test_without_a_free_instance_there_is_none() -> None:
    maker = Maker(HeldJunctions((), TABLES))
    maker.numbers = Numbers((), INSTANCES)
    with pytest.raises(NumbersExhausted):
        maker.round({7})
