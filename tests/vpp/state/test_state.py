"""The books of what VPP holds: numbers that are free, routes by where they lead, tunnels as accepted requests leave them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.small_vpp import PREFIXES, SOURCE, in_spec, out_spec
from vppipsec.vpp.api.interface import SetItfAddress, SetItfTable, SetItfUp, SetMtu, SetUnnumbered, TagItf
from vppipsec.vpp.api.ip import ChangeRoute, DisableIp6, EnableIp6
from vppipsec.vpp.api.ipsec import AddSa, CreateItf, DeleteItf, DelSa, Protect, SetSaPorts, Unprotect
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.ownership import INSTANCES, SAD_ID_FIRST, SAD_ID_LAST
from vppipsec.vpp.state.numbers import Numbers, NumbersExhausted
from vppipsec.vpp.state.routes import HeldRoutes
from vppipsec.vpp.state.tunnels import HeldSa, HeldTunnel
from vppipsec.vpp.types import NO_INDEX, Hop, Prefix, Protection, Route, interfaces_of

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
    numbers = Numbers(sad_ids, instances)
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


def taker(numbers: Numbers, kind: str) -> tuple[Callable[[], int], Callable[[int], None], Callable[[int], str], range]:
    """Return how numbers of a kind are taken, given back and found short, and which there are."""
    if kind == "SAs":
        usable = range(SAD_ID_FIRST, SAD_ID_LAST + 1)
        return numbers.sad_id, numbers.free_sad_id, lambda count: numbers.shortage(count, 0), usable
    return numbers.instance, numbers.free_instance, lambda count: numbers.shortage(0, count), INSTANCES


KINDS = pytest.mark.parametrize("kind", ["SAs", "ipsec interfaces"])


@KINDS
def test_every_number_of_the_range_comes_once_and_then_a_sentence_says_that_there_are_no_more(kind: str) -> None:
    take, free, short, usable = taker(Numbers(), kind)
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
    take, free, _, usable = taker(Numbers(), kind)
    free(take())  # as when VPP refused it: the same again would be refused again
    assert [take() for _ in usable] == [*usable[1:], usable[0]]


def test_numbers_of_others_outside_of_our_range_take_no_room() -> None:
    numbers = Numbers(range(1000))
    assert not numbers.shortage(SAD_IDS, 0)
    assert numbers.sad_id() == SAD_ID_FIRST


# Routes

CHANGES = st.lists(
    st.builds(
        ChangeRoute,
        st.sampled_from((NO_INDEX, 7, 8, (Hop(7, 1), Hop(8, 2)))),
        st.sampled_from(PREFIXES),
        st.just(SOURCE),
        st.booleans(),
        st.sampled_from((0, 5)),
    ),
    max_size=40,
)


@given(CHANGES)
def test_routes_by_interface_agree_with_routes_by_destination(changes: list[ChangeRoute]) -> None:
    routes, naive = HeldRoutes(), {}
    for change in changes:
        routes.took(change)
        if change.is_add:
            naive[change.route] = change.lead
        else:
            naive.pop(change.route, None)
        assert dict(routes) == naive
        for index in (NO_INDEX, 7, 8, 9):
            assert routes.into(index) == {route for route, lead in naive.items() if index in interfaces_of(lead)}


def test_counters_are_known_of_routes_that_drop_and_of_no_others() -> None:
    routes = HeldRoutes()
    here, there = Prefix(bytes((10, 1, 0, 0)), 16), Prefix(bytes((10, 2, 0, 0)), 16)
    routes.took(ChangeRoute(NO_INDEX, here, 23, True, 5), 40)
    routes.took(ChangeRoute(NO_INDEX, there, 23, True), 41)
    assert routes.dropping() == [(Route(here, 5), 40), (Route(there), 41)]
    routes.took(ChangeRoute(7, here, 23, True, 5), 40)
    assert routes.dropping() == [(Route(there), 41)]
    routes.took(ChangeRoute(NO_INDEX, here, 23, True, 5), 40)
    routes.took(ChangeRoute(NO_INDEX, there, 23, False), NO_INDEX)
    assert routes.dropping() == [(Route(here, 5), 40)]


# Tunnels

SPEC = in_spec(1, ports=(4500, 4500))


@pytest.mark.parametrize(
    ("request_", "extra", "after"),
    [
        (CreateItf(3), 9, HeldTunnel(3, 9)),
        (AddSa(5, SPEC), 77, HeldTunnel(sas={5: HeldSa(SPEC, 77)})),
        (TagItf(9, "tag"), 0, HeldTunnel(tag="tag")),
        (SetUnnumbered(9, 2), 0, HeldTunnel(lender=2)),
        (EnableIp6(9), 0, HeldTunnel(ip6=True)),
        (DisableIp6(9), 0, HeldTunnel()),
        (SetItfTable(9, False, 10), 0, HeldTunnel(tables=(10, 0))),
        (SetItfTable(9, True, 10), 0, HeldTunnel(tables=(0, 10))),
        (SetItfAddress(9, bytes(4)), 0, HeldTunnel(addressed=True)),
        (SetItfAddress(9, bytes(4), False), 0, HeldTunnel()),
        (SetItfUp(9), 0, HeldTunnel(up=True)),
        (SetMtu(9, 1446), 0, HeldTunnel(mtu=1446)),
        (Protect(9, 5, (6, 7)), 0, HeldTunnel(protection=Protection(5, (6, 7)))),
    ],
)
def test_accepted_request_is_noted(request_: Request, extra: int, after: HeldTunnel) -> None:
    held = HeldTunnel()
    held.took(request_, extra)
    assert held == after
    assert held.empty is not isinstance(request_, CreateItf | AddSa)


def test_an_interface_that_is_gone_is_in_no_table() -> None:
    held = HeldTunnel(3, 9, "tag", tables=(10, 20), addressed=True)
    held.took(DeleteItf(9), 0)
    assert held == HeldTunnel()


def test_what_is_taken_back_leaves_nothing() -> None:
    held = HeldTunnel(3, 9, "tag", 2, True, True, Protection(6, (5,)), {5: HeldSa(SPEC, 1), 6: HeldSa(out_spec(2), 2)})
    held.took(SetSaPorts(5, 4501, 4502), 0)
    assert held.sas[5] == HeldSa(in_spec(1, ports=(4501, 4502)), 1)
    for request in (SetUnnumbered(9, 2, False), Unprotect(9), DeleteItf(9), DelSa(5)):
        assert not held.empty
        held.took(request, 0)
    assert held == HeldTunnel(sas={6: HeldSa(out_spec(2), 2)})
    held.took(DelSa(6), 0)
    assert held == HeldTunnel()
    assert held.empty
