"""The plan against a small VPP that holds requests against VPP's rules: the order, claim by claim and as a property."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.small_vpp import (
    HERE,
    INBOUND_RULES,
    OTHER_INBOUND_RULES,
    PREFIXES,
    SOURCE,
    THERE,
    VRFS,
    Bench,
    in_spec,
    out_spec,
    tunnel,
)
from vppipsec.sync.desired.state import DesiredTunnel
from vppipsec.sync.plan.tunnel import Plan, tunnel_requests
from vppipsec.vpp.api.acl import AclAddReplace, AclDel, SetInterfaceAcls
from vppipsec.vpp.api.interface import (
    InterfaceAddressAddDel,
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
from vppipsec.vpp.api.linux_cp import LcpPairAddDel
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.guard import check_tunnel_request
from vppipsec.vpp.ownership import INSTANCES, IP6_TAG, SAD_ID_FIRST, SAD_ID_LAST
from vppipsec.vpp.state.numbers import NumberPools, NumbersExhausted
from vppipsec.vpp.state.routes import ActualRoutes
from vppipsec.vpp.state.tunnels import ActualSa, ActualTunnel
from vppipsec.vpp.types import NO_INDEX, HostInterface, Path, Prefix, Protection, Route, SaSpec

# The order, claim by claim


@pytest.fixture
def bench() -> Bench:
    """Return a VPP that holds one tunnel, with two inbound SAs, as wanted."""
    made = Bench()
    made.want(0, tunnel([in_spec(1), in_spec(2)], [out_spec(3)]), {PREFIXES[0]: 1})
    made.converge()
    return made


ROUTE = Route(PREFIXES[0])


def kinds(requests: Sequence[Request]) -> list[type[Request]]:
    return [type(request) for request in requests]


def test_routes_drop_first_then_lead_in_before_protection() -> None:
    bench = Bench()
    bench.want(0, tunnel([in_spec(1)], [out_spec(2)]), {PREFIXES[0]: 1})
    bench.converge()
    assert kinds(bench.sent) == [
        IpsecItfCreate,
        AclAddReplace,
        RouteAddDel,
        SadEntryAdd,
        SadEntryAdd,
        SetInterfaceTag,
        SetUnnumbered,
        SetInterfaceUp,
        RouteAddDel,
        SetInterfaceAcls,
        TunnelProtect,
    ]
    routes = [request.paths for request in bench.sent if isinstance(request, RouteAddDel)]
    assert routes == [NO_INDEX, bench.sides[0].actual.sw_if_index]
    bench.assert_equal()


def test_policy_without_sas_makes_its_traffic_drop() -> None:
    bench = Bench()
    bench.want(0, None, {PREFIXES[0]: 1})
    assert bench.converge() == 1
    assert bench.vpp.routes == {ROUTE: NO_INDEX}


def test_rekey_adds_then_protects_then_deletes_step_by_step(bench: Bench) -> None:
    bench.want(0, tunnel([in_spec(2), in_spec(4)], [out_spec(5)]), {PREFIXES[0]: 1})
    assert bench.converge() == 3
    assert kinds(bench.sent) == [SadEntryAdd, SadEntryAdd, TunnelProtect, SadEntryDel, SadEntryDel]
    bench.assert_equal()


def test_tunnel_goes_routes_and_protection_first(bench: Bench) -> None:
    bench.want(0, None, {})
    assert bench.converge() == 3
    assert kinds(bench.sent) == [
        RouteAddDel,
        TunnelUnprotect,
        IpsecItfDelete,
        SadEntryDel,
        SadEntryDel,
        SadEntryDel,
        AclDel,
    ]
    bench.assert_equal()


def test_interface_receives_nothing_while_vpp_refuses_its_acl() -> None:
    bench = Bench()
    bench.want(0, tunnel([in_spec(1)], [out_spec(2)]), {PREFIXES[0]: 1})
    bench.converge(frozenset({1}))
    assert isinstance(bench.sent[1], AclAddReplace)
    assert [itf.protection for itf in bench.vpp.interfaces.values()] == [None]
    bench.converge()
    bench.assert_equal()


def test_interface_that_may_not_receive_yet_is_not_protected_yet() -> None:
    bench = Bench()
    bench.want(0, tunnel([in_spec(1)], [out_spec(2)]), {PREFIXES[0]: 1})
    bench.may_receive = False
    bench.converge()
    assert [itf.protection for itf in bench.vpp.interfaces.values()] == [None]
    bench.may_receive = True
    bench.converge()
    assert kinds(bench.sent) == [TunnelProtect]
    bench.assert_equal()


def test_other_selectors_change_the_acl_in_place(bench: Bench) -> None:
    bench.want(0, tunnel([in_spec(1), in_spec(2)], [out_spec(3)], inbound_rules=OTHER_INBOUND_RULES), {PREFIXES[0]: 1})
    bench.converge()
    assert kinds(bench.sent) == [AclAddReplace]
    bench.assert_equal()


def test_enforcement_that_ends_lets_go_of_the_acl_before_it_is_deleted(bench: Bench) -> None:
    bench.want(0, tunnel([in_spec(1), in_spec(2)], [out_spec(3)], inbound_rules=None), {PREFIXES[0]: 1})
    assert bench.converge() == 2
    assert kinds(bench.sent) == [SetInterfaceAcls, AclDel]
    bench.assert_equal()


def test_tunnel_whose_policy_stays_leaves_its_routes_dropping(bench: Bench) -> None:
    bench.want(0, None, {PREFIXES[0]: 1})
    bench.converge()
    assert bench.vpp.routes == {ROUTE: NO_INDEX}
    bench.assert_equal()


def test_interface_waits_until_another_tunnel_has_taken_its_route_over(bench: Bench) -> None:
    bench.want(1, tunnel([in_spec(11)], [out_spec(12)]), {PREFIXES[0]: 5})
    bench.converge()
    assert bench.vpp.routes == {ROUTE: bench.sides[0].actual.sw_if_index}
    bench.want(0, None, {})
    bench.converge()
    assert bench.vpp.routes == {ROUTE: bench.sides[1].actual.sw_if_index}
    routes = [request for request in bench.sent if isinstance(request, RouteAddDel)]
    assert [request.is_add for request in routes] == [True]
    bench.assert_equal()


def nat(number: int, port: int) -> tuple[SaSpec, SaSpec]:
    return in_spec(number, ports=(port, 4500)), out_spec(number + 10, ports=(4500, port))


def test_change_of_ports_during_a_rekey_keeps_every_sa_in_use() -> None:
    bench = Bench()
    (in_old, out_old), (in_new, out_new) = nat(1, 4500), nat(2, 4500)
    bench.want(0, tunnel([in_old, in_new], [out_old, out_new]), {})
    bench.converge()
    for moved in ([nat(1, 40123)[0], in_new], [nat(1, 40123)[0], nat(2, 40123)[0]]):
        bench.want(0, tunnel(moved, [out_old, out_new]), {})
        bench.converge()
        assert kinds(bench.sent) == [SadEntryUpdate]
    bench.want(0, tunnel(moved, [nat(1, 40123)[1], nat(2, 40123)[1]]), {})
    bench.converge()
    assert kinds(bench.sent) == [SadEntryUpdate, SadEntryUpdate]
    bench.assert_equal()


def test_sa_with_the_same_spi_and_another_key_is_another_sa(bench: Bench) -> None:
    bench.want(0, tunnel([in_spec(1, key=9), in_spec(2)], [out_spec(3, key=9)]), {PREFIXES[0]: 1})
    bench.converge()
    assert kinds(bench.sent) == [SadEntryAdd, SadEntryAdd, TunnelProtect, SadEntryDel, SadEntryDel]
    bench.assert_equal()


def test_sa_that_vpp_refuses_leaves_the_older_one_in_use(bench: Bench) -> None:
    bench.want(0, tunnel([in_spec(1), in_spec(2)], [out_spec(3), out_spec(4)]), {PREFIXES[0]: 1})
    bench.converge(frozenset({0}))
    side = bench.sides[0]
    assert side.actual.protection == side.protected_before
    bench.converge()
    bench.assert_equal()


def test_protection_goes_when_vpp_refuses_the_new_sas(bench: Bench) -> None:
    bench.want(0, tunnel([in_spec(1), in_spec(2)], [out_spec(4)]), {PREFIXES[0]: 1})
    bench.converge(frozenset({0}))
    assert kinds(bench.sent) == [SadEntryAdd, TunnelUnprotect, SadEntryDel]
    assert bench.vpp.routes == {ROUTE: bench.sides[0].actual.sw_if_index}  # an interface without protection drops
    bench.converge()
    bench.assert_equal()


def test_tag_tells_of_ipv6_only_once_vpp_has_accepted_it() -> None:
    bench = Bench()
    bench.want(0, tunnel([in_spec(1)], [out_spec(2)], ip6=True), {})
    bench.converge(frozenset({4}))
    assert isinstance(bench.sent[4], EnableIp6)
    assert [itf.tag for itf in bench.vpp.interfaces.values()] == ["tag"]
    bench.converge()
    assert [itf.tag for itf in bench.vpp.interfaces.values()] == ["tag" + IP6_TAG]
    bench.assert_equal()


def test_of_two_alike_the_one_that_protects_stays() -> None:
    sas = {number: ActualSa(spec, 0) for number, spec in enumerate([in_spec(1), in_spec(1), out_spec(2), out_spec(2)])}
    for protection in (Protection(2, (0,)), Protection(3, (1,)), Protection(3, (0,))):
        actual = ActualTunnel(0, 9, "tag", 1, False, True, protection, dict(sas), 5, INBOUND_RULES, True)
        plan = tunnel_requests(
            tunnel([in_spec(1)], [out_spec(2)]), set(), actual, ActualRoutes(), SOURCE, NumberPools()
        )
        surplus = sas.keys() - {protection.outbound, *protection.inbound}
        assert plan == Plan([SadEntryDel(sad_id) for sad_id in sorted(surplus)], True)


@pytest.mark.parametrize(
    ("sad_ids", "instances"),
    [((), INSTANCES), (range(SAD_ID_FIRST + 1, SAD_ID_LAST + 1), ())],
    ids=["interfaces", "SAs"],
)
def test_traffic_drops_without_room_for_its_tunnel(sad_ids: range, instances: range) -> None:
    numbers = NumberPools(sad_ids, instances)
    room = [bool(numbers.shortage(*few)) for few in ((1, 0), (0, 1))]
    want, routes = tunnel([in_spec(1)], [out_spec(2)]), ActualRoutes()
    plan = tunnel_requests(want, {ROUTE}, ActualTunnel(), routes, SOURCE, numbers)
    drop = RouteAddDel(NO_INDEX, PREFIXES[0], SOURCE, True)
    assert plan == Plan([drop], False)
    routes.apply_accepted(drop)
    with pytest.raises(NumbersExhausted, match=r"no more than \d+ "):
        tunnel_requests(want, {ROUTE}, ActualTunnel(), routes, SOURCE, numbers)
    assert [bool(numbers.shortage(*few)) for few in ((1, 0), (0, 1))] == room


def test_shared_route_keeps_its_shares_when_a_tunnel_goes() -> None:
    want, routes, both = tunnel([in_spec(1)], [out_spec(2)]), ActualRoutes(), (Path(9, 1), Path(11, 1))
    actual = ActualTunnel(0, 9, "tag", 1, False, True)
    plan = tunnel_requests(want, set(), actual, routes, SOURCE, NumberPools(), shares={ROUTE: both})
    assert RouteAddDel(both, PREFIXES[0], SOURCE, True) in plan.requests
    routes.apply_accepted(RouteAddDel(both, PREFIXES[0], SOURCE, True))
    plan = tunnel_requests(want, set(), actual, routes, SOURCE, NumberPools(), shares={ROUTE: both})
    assert not [request for request in plan.requests if isinstance(request, RouteAddDel)]
    plan = tunnel_requests(None, set(), actual, routes, SOURCE, NumberPools(), shares={ROUTE: 11})
    assert plan == Plan([RouteAddDel(11, PREFIXES[0], SOURCE, True)], False)
    routes.apply_accepted(RouteAddDel(11, PREFIXES[0], SOURCE, True))
    plan = tunnel_requests(None, set(), actual, routes, SOURCE, NumberPools(), shares={ROUTE: 11})
    assert plan == Plan([IpsecItfDelete(9)], True)


def test_sa_shortage_does_not_block_deletions() -> None:
    numbers = NumberPools(range(SAD_ID_FIRST, SAD_ID_LAST + 1))
    sas = {SAD_ID_FIRST: ActualSa(in_spec(1), 0), SAD_ID_FIRST + 1: ActualSa(out_spec(2), 0)}
    actual = ActualTunnel(0, 9, "tag", 1, False, True, Protection(SAD_ID_FIRST + 1, (SAD_ID_FIRST,)), sas)
    want = tunnel([in_spec(1)], [out_spec(3)], inbound_rules=None)
    sent: list[Request] = []
    plan = Plan([], False)
    while not plan.complete:
        plan = tunnel_requests(want, set(), actual, ActualRoutes(), SOURCE, numbers)
        for request in plan.requests:
            check_tunnel_request(request, actual, set())
            actual.apply_accepted(request, 0)
            if isinstance(request, SadEntryDel):
                numbers.free_sad_id(request.sad_id)
        sent += plan.requests
    assert kinds(sent) == [TunnelUnprotect, SadEntryDel, SadEntryAdd, TunnelProtect]


# Other tables


def test_interface_enters_its_table_before_it_passes_ip_or_is_protected() -> None:
    bench = Bench()
    bench.want(0, tunnel([in_spec(1)], [out_spec(2)], ip6=True, inbound_rules=None, table=10), {})
    bench.converge()
    assert kinds(bench.sent) == [
        *(IpsecItfCreate, SadEntryAdd, SadEntryAdd),
        *(SetInterfaceTag, SetInterfaceTable, SetInterfaceTable),
        *(EnableIp6, InterfaceAddressAddDel, SetInterfaceUp, TunnelProtect),
        SetInterfaceTag,
    ]
    bench.assert_equal()


@pytest.mark.parametrize(("before", "after"), [(0, 10), (10, 0), (10, 20)])
def test_interface_moving_to_another_table_receives_nothing_meanwhile(before: int, after: int) -> None:
    bench = Bench()
    for table in (before, after):
        bench.want(0, tunnel([in_spec(1)], [out_spec(2)], ip6=True, table=table), {PREFIXES[0]: 1})
        bench.converge()
    let_go, take = (
        InterfaceAddressAddDel if before else SetUnnumbered,
        InterfaceAddressAddDel if after else SetUnnumbered,
    )
    assert kinds(bench.sent) == [
        *(TunnelUnprotect, let_go, SetInterfaceTag, DisableIp6),
        *(SetInterfaceTable, SetInterfaceTable),
        *(EnableIp6, take, TunnelProtect, SetInterfaceTag),
    ]
    taken = [request.is_add for request in bench.sent if isinstance(request, InterfaceAddressAddDel | SetUnnumbered)]
    assert taken == [False, True]
    assert bench.vpp.routes == {ROUTE: bench.sides[0].actual.sw_if_index}  # an interface without protection drops
    bench.assert_equal()


def test_ipv6_comes_along_without_a_break_where_only_it_is_new() -> None:
    bench = Bench()
    for ip6 in (False, True):
        bench.want(0, tunnel([in_spec(1)], [out_spec(2)], ip6=ip6, table=10), {})
        bench.converge()
    assert kinds(bench.sent) == [SetInterfaceTable, EnableIp6, SetInterfaceTag]
    bench.assert_equal()


def test_an_interface_of_a_tunnel_without_ipv6_needs_no_table_of_it() -> None:
    bench = Bench()
    bench.want(0, tunnel([in_spec(1)], [out_spec(2)], table=10), {})
    bench.converge()
    assert [request for request in bench.sent if isinstance(request, SetInterfaceTable)] == [
        SetInterfaceTable(101, False, 10)
    ]


def test_an_interface_that_vpp_leaves_where_it_is_is_not_protected_there() -> None:
    bench = Bench()
    for table in (0, 10):
        bench.want(0, tunnel([in_spec(1)], [out_spec(2)], table=table), {})
        bench.converge(frozenset({2} if table else ()))
    assert isinstance(bench.sent[2], SetInterfaceTable)
    assert [itf.protection for itf in bench.vpp.interfaces.values()] == [None]
    bench.converge()
    bench.assert_equal()


def test_a_host_interface_goes_before_its_tunnels_own_changes_tables() -> None:
    actual = ActualTunnel(
        300, 7, "tag", 1, up=True, acl=5, rules=INBOUND_RULES, acl_applied=True, host=HostInterface("ipsec300", 12)
    )
    want = tunnel([], [], table=10)
    plan = tunnel_requests(want, set(), actual, ActualRoutes(), SOURCE, NumberPools(), wants_host_interface=True)
    assert plan.requests == [SetUnnumbered(7, 1, False), LcpPairAddDel(7, "ipsec300", False)]


# The order, whatever happens

PORTS = st.sampled_from(((0, 0), (4500, 4500), (4500, 40123)))
ENDS = st.sampled_from(((HERE, THERE), (THERE, HERE)))
CLAIMS = st.dictionaries(st.sampled_from(PREFIXES), st.integers(1, 2))


@st.composite
def wants(draw: st.DrawFn) -> DesiredTunnel | None:
    """Return a tunnel of few SPIs, so that those that follow each other have much in common."""
    if draw(st.integers(0, 5)) == 0:
        return None
    ends, ports, key = draw(ENDS), draw(PORTS), draw(st.integers(0, 1))

    def spec(spi: int, inbound: bool) -> SaSpec:
        mine = (4500, 40999) if ports[0] and draw(st.integers(0, 4)) == 0 else ports
        return (in_spec if inbound else out_spec)(spi, key, mine, ends)

    inbound = [spec(spi, True) for spi in draw(st.lists(st.integers(1, 6), min_size=1, max_size=4, unique=True))]
    outbound = [spec(spi, False) for spi in draw(st.lists(st.integers(7, 10), min_size=1, max_size=3, unique=True))]
    inbound_rules = draw(st.sampled_from((INBOUND_RULES, INBOUND_RULES, OTHER_INBOUND_RULES, None)))
    unnumbered_from, ip6, table = draw(st.integers(1, 2)), draw(st.booleans()), draw(st.sampled_from((0, 0, *VRFS)))
    return tunnel(inbound, outbound, "tag", unnumbered_from, ip6, inbound_rules, table)


STEPS = st.lists(
    st.tuples(
        st.integers(0, 1),
        wants(),
        CLAIMS,
        st.frozensets(st.integers(0, 24), max_size=3),
        st.one_of(st.none(), st.integers(0, 24)),
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(STEPS)
def test_random_plans_keep_the_guard_rules_and_end_equal(
    steps: list[tuple[int, DesiredTunnel | None, dict[Prefix, int], frozenset[int], int | None]],
) -> None:
    bench = Bench()
    for number, want, claims, to_refuse, halt_after in steps:
        bench.want(number, want, claims)
        bench.converge(to_refuse, halt_after)
    bench.converge()
    bench.assert_equal()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), wants(), CLAIMS), min_size=1, max_size=8))
def test_without_refusals_every_change_ends_equal(
    steps: list[tuple[int, DesiredTunnel | None, dict[Prefix, int]]],
) -> None:
    bench = Bench()
    for number, want, claims in steps:
        bench.want(number, want, claims)
        bench.converge()
        bench.assert_equal()


# Host interfaces


def paired(actual: ActualTunnel, wanted: bool) -> Plan:
    return tunnel_requests(
        tunnel([], []), set(), actual, ActualRoutes(), SOURCE, NumberPools(), wants_host_interface=wanted
    )


def test_host_interface_follows_the_tunnel_interface_and_its_need() -> None:
    actual = ActualTunnel(300, 7, "tag", 1, acl=5, rules=INBOUND_RULES, acl_applied=True)
    plan = paired(actual, True)
    assert (plan.requests, plan.complete) == ([SetInterfaceUp(7)], False)
    actual.apply_accepted(SetInterfaceUp(7), 0)
    assert paired(actual, True).requests == [LcpPairAddDel(7, "ipsec300")]
    actual.apply_accepted(LcpPairAddDel(7, "ipsec300"), 12)
    assert paired(actual, True) == Plan([], True)
    assert paired(actual, False).requests == [LcpPairAddDel(7, "ipsec300", False)]
    actual.apply_accepted(LcpPairAddDel(7, "ipsec300", False), 0)
    assert paired(actual, False) == Plan([], True)


def test_a_host_interface_goes_with_the_tunnels_own() -> None:
    actual = ActualTunnel(300, 7, "tag", 1, up=True, host=HostInterface("ipsec300", 12))
    plan = tunnel_requests(None, set(), actual, ActualRoutes(), SOURCE, NumberPools())
    assert plan.requests == [IpsecItfDelete(7)]
    actual.apply_accepted(IpsecItfDelete(7), 0)
    assert actual.is_empty
    assert actual.host is None
