"""The books of what VPP holds: numbers that are free, routes by where they lead, tunnels as accepted requests leave them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.small_vpp import PREFIXES, SOURCE, in_spec, out_spec
from vppipsec.vpp.api.interface import (
    InterfaceAddressAddDel,
    SetInterfaceMtu,
    SetInterfaceTable,
    SetInterfaceTag,
    SetInterfaceUp,
    SetUnnumbered,
)
from vppipsec.vpp.api.ip import DisableIp6, EnableIp6, RouteAddDel
from vppipsec.vpp.api.ipsec import (
    IpsecItfCreate,
    IpsecItfDelete,
    SadEntryAdd,
    SadEntryDel,
    SadEntryUpdate,
    TunnelProtect,
    TunnelUnprotect,
)
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.ownership import INSTANCES, SAD_ID_FIRST, SAD_ID_LAST
from vppipsec.vpp.state.numbers import NumberPools, NumbersExhausted
from vppipsec.vpp.state.routes import ActualRoutes
from vppipsec.vpp.state.tunnels import ActualSa, ActualTunnel
from vppipsec.vpp.types import NO_INDEX, Path, Prefix, Protection, Route, interfaces_of

SAD_IDS = SAD_ID_LAST - SAD_ID_FIRST + 1


# Numbers


@given(
    st.frozensets(st.integers(SAD_ID_FIRST - 2, SAD_ID_FIRST + 12)),
    st.frozensets(st.integers(INSTANCES[0] - 2, INSTANCES[0] + 12)),
    st.lists(st.tuples(st.booleans(), st.integers(0, 11)), max_size=60),
)
def test_no_number_is_given_out_while_somebody_has_it(
    sad_ids: frozenset[int], instances: frozenset[int], steps: list[tuple[bool, int]]
) -> None:
    numbers = NumberPools(sad_ids, instances)
    for take, free, taken, usable in (
        (numbers.sad_id, numbers.free_sad_id, set(sad_ids), range(SAD_ID_FIRST, SAD_ID_LAST + 1)),
        (numbers.instance, numbers.free_instance, set(instances), INSTANCES),
    ):
        for give_back, which in steps:
            if give_back and taken:
                number = sorted(taken)[which % len(taken)]
                taken.remove(number)
                free(number)
            else:
                number = take()
                assert number in usable
                assert number not in taken
                taken.add(number)


def taker(
    numbers: NumberPools, kind: str
) -> tuple[Callable[[], int], Callable[[int], None], Callable[[int], str], range]:
    """Return how numbers of a kind are taken, given back and found short, and which there are."""
    if kind == "SAs":
        usable = range(SAD_ID_FIRST, SAD_ID_LAST + 1)
        return numbers.sad_id, numbers.free_sad_id, lambda count: numbers.shortage(count, 0), usable
    return numbers.instance, numbers.free_instance, lambda count: numbers.shortage(0, count), INSTANCES


KINDS = pytest.mark.parametrize("kind", ["SAs", "ipsec interfaces"])


@KINDS
def test_number_pool_hands_out_each_number_once_then_reports_shortage(kind: str) -> None:
    take, free, short, usable = taker(NumberPools(), kind)
    assert not short(len(usable))
    assert short(len(usable) + 1)
    assert [take() for _ in usable] == list(usable)
    with pytest.raises(NumbersExhausted, match=f"no more than {len(usable)} {kind}") as caught:
        take()
    assert short(1) == str(caught.value)
    assert not short(0)
    free(usable[5])
    assert not short(1)
    assert take() == usable[5]


@KINDS
def test_number_that_was_given_back_comes_again_last(kind: str) -> None:
    take, free, _, usable = taker(NumberPools(), kind)
    free(take())  # as when VPP refused it: the same again would be refused again
    assert [take() for _ in usable] == [*usable[1:], usable[0]]


def test_numbers_of_others_outside_of_our_range_take_no_room() -> None:
    numbers = NumberPools(range(1000))
    assert not numbers.shortage(SAD_IDS, 0)
    assert numbers.sad_id() == SAD_ID_FIRST


# Routes

CHANGES = st.lists(
    st.builds(
        RouteAddDel,
        st.sampled_from((NO_INDEX, 7, 8, (Path(7, 1), Path(8, 2)))),
        st.sampled_from(PREFIXES),
        st.just(SOURCE),
        st.booleans(),
        st.sampled_from((0, 5)),
    ),
    max_size=40,
)


@given(CHANGES)
def test_routes_by_interface_agree_with_routes_by_destination(changes: list[RouteAddDel]) -> None:
    routes, naive = ActualRoutes(), {}
    for change in changes:
        routes.apply_accepted(change)
        if change.is_add:
            naive[change.route] = change.paths
        else:
            naive.pop(change.route, None)
        assert dict(routes) == naive
        for index in (NO_INDEX, 7, 8, 9):
            assert routes.into(index) == {route for route, paths in naive.items() if index in interfaces_of(paths)}


def test_counters_are_known_of_routes_that_drop_and_of_no_others() -> None:
    routes = ActualRoutes()
    here, there = Prefix(bytes((10, 1, 0, 0)), 16), Prefix(bytes((10, 2, 0, 0)), 16)
    routes.apply_accepted(RouteAddDel(NO_INDEX, here, 23, True, 5), 40)
    routes.apply_accepted(RouteAddDel(NO_INDEX, there, 23, True), 41)
    assert routes.discarding() == [(Route(here, 5), 40), (Route(there), 41)]
    routes.apply_accepted(RouteAddDel(7, here, 23, True, 5), 40)
    assert routes.discarding() == [(Route(there), 41)]
    routes.apply_accepted(RouteAddDel(NO_INDEX, here, 23, True, 5), 40)
    routes.apply_accepted(RouteAddDel(NO_INDEX, there, 23, False), NO_INDEX)
    assert routes.discarding() == [(Route(here, 5), 40)]


# Tunnels

SPEC = in_spec(1, ports=(4500, 4500))


@pytest.mark.parametrize(
    ("request_", "extra", "after"),
    [
        (IpsecItfCreate(3), 9, ActualTunnel(3, 9)),
        (SadEntryAdd(5, SPEC), 77, ActualTunnel(sas={5: ActualSa(SPEC, 77)})),
        (SetInterfaceTag(9, "tag"), 0, ActualTunnel(tag="tag")),
        (SetUnnumbered(9, 2), 0, ActualTunnel(unnumbered_from=2)),
        (EnableIp6(9), 0, ActualTunnel(ip6=True)),
        (DisableIp6(9), 0, ActualTunnel()),
        (SetInterfaceTable(9, False, 10), 0, ActualTunnel(tables=(10, 0))),
        (SetInterfaceTable(9, True, 10), 0, ActualTunnel(tables=(0, 10))),
        (InterfaceAddressAddDel(9, bytes(4)), 0, ActualTunnel(has_address=True)),
        (InterfaceAddressAddDel(9, bytes(4), False), 0, ActualTunnel()),
        (SetInterfaceUp(9), 0, ActualTunnel(up=True)),
        (SetInterfaceMtu(9, 1446), 0, ActualTunnel(mtu=1446)),
        (TunnelProtect(9, 5, (6, 7)), 0, ActualTunnel(protection=Protection(5, (6, 7)))),
    ],
)
def test_accepted_request_is_noted(request_: Request, extra: int, after: ActualTunnel) -> None:
    actual = ActualTunnel()
    actual.apply_accepted(request_, extra)
    assert actual == after
    assert actual.is_empty is not isinstance(request_, IpsecItfCreate | SadEntryAdd)


def test_an_interface_that_is_gone_is_in_no_table() -> None:
    actual = ActualTunnel(3, 9, "tag", tables=(10, 20), has_address=True)
    actual.apply_accepted(IpsecItfDelete(9), 0)
    assert actual == ActualTunnel()


def test_what_is_taken_back_leaves_nothing() -> None:
    actual = ActualTunnel(
        3, 9, "tag", 2, True, True, Protection(6, (5,)), {5: ActualSa(SPEC, 1), 6: ActualSa(out_spec(2), 2)}
    )
    actual.apply_accepted(SadEntryUpdate(5, 4501, 4502), 0)
    assert actual.sas[5] == ActualSa(in_spec(1, ports=(4501, 4502)), 1)
    for request in (SetUnnumbered(9, 2, False), TunnelUnprotect(9), IpsecItfDelete(9), SadEntryDel(5)):
        assert not actual.is_empty
        actual.apply_accepted(request, 0)
    assert actual == ActualTunnel(sas={6: ActualSa(out_spec(2), 2)})
    actual.apply_accepted(SadEntryDel(6), 0)
    assert actual == ActualTunnel()
    assert actual.is_empty
