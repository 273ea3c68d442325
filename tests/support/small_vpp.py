"""A small VPP that fails the test that breaks its rules, and two tunnels in it that are planned round by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vppipsec.kernel.xfrm.sad_spd import TunnelKey
from vppipsec.sync.actual.backoff import refusal_key
from vppipsec.sync.desired.routes import RouteTargets
from vppipsec.sync.desired.state import DesiredTunnel
from vppipsec.sync.plan.tunnel import Plan, tunnel_requests
from vppipsec.vpp.algorithms import CryptoAlg, IntegAlg
from vppipsec.vpp.api.acl import AclAddReplace, AclDel, SetInterfaceAcls
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
from vppipsec.vpp.guard import check_tunnel_request
from vppipsec.vpp.ownership import INSTANCES, IP6_TAG, SAD_ID_FIRST, SAD_ID_LAST, interface_address
from vppipsec.vpp.state.numbers import NumberPools
from vppipsec.vpp.state.routes import ActualRoutes
from vppipsec.vpp.state.tunnels import ActualTunnel
from vppipsec.vpp.types import NO_INDEX, Prefix, Protection, Route, Rule, SadFlag, SaSpec, everything

HERE, THERE = bytes((192, 0, 2, 1)), bytes((192, 0, 2, 2))
SOURCE = 23
"""Number of the service's FIB source."""
PREFIXES = tuple(Prefix(bytes((10, number, 0, 0)), 16) for number in range(1, 4))
MOST_ROUNDS = 10
"""More rounds than any change needs.

The rounds: unprotect, remove addresses, change tables, set up, protect, delete SAs and an ACL.
"""
VRFS = (10, 20)
"""Numbers of the tables besides the main one."""
INBOUND_RULES = (
    Rule(True, PREFIXES[0], PREFIXES[1]),
    Rule(False, everything(False), everything(False)),
)
OTHER_INBOUND_RULES = (Rule(True, PREFIXES[1], PREFIXES[0]), *INBOUND_RULES)
SAD_IDS = SAD_ID_LAST - SAD_ID_FIRST + 1


def out_spec(
    spi: int, key: int = 0, ports: tuple[int, int] = (0, 0), ends: tuple[bytes, bytes] = (HERE, THERE)
) -> SaSpec:
    flags = SadFlag.IS_TUNNEL | (SadFlag.UDP_ENCAP if ports[0] else 0)
    return SaSpec(spi, *ends, CryptoAlg.AES_GCM_128, bytes([key]) * 16, IntegAlg.NONE, b"", flags, 0, key, *ports)


def in_spec(
    spi: int, key: int = 0, ports: tuple[int, int] = (0, 0), ends: tuple[bytes, bytes] = (HERE, THERE)
) -> SaSpec:
    spec = out_spec(spi, key, ports, ends[::-1])
    return spec._replace(flags=spec.flags | SadFlag.IS_INBOUND)


def without_ports(spec: SaSpec) -> SaSpec:
    return spec._replace(udp_src_port=0, udp_dst_port=0)


def tunnel(
    inbound: Sequence[SaSpec],
    outbound: Sequence[SaSpec],
    tag: str = "tag",
    unnumbered_from: int = 1,
    ip6: bool = False,
    inbound_rules: tuple[Rule, ...] | None = INBOUND_RULES,
    table: int = 0,
) -> DesiredTunnel:
    return DesiredTunnel(tag, unnumbered_from, ip6, tuple(outbound), tuple(inbound), inbound_rules, table=table)


@dataclass
class Interface:
    """An `ipsec` interface of the small VPP."""

    instance: int
    tag: str = ""
    unnumbered_from: int | None = None
    ip6: bool = False
    up: bool = False
    mtu: int = 0
    protection: Protection | None = None
    acl: int | None = None
    addresses: set[bytes] = field(default_factory=set)
    tables: list[int] = field(default_factory=lambda: [0, 0])

    @property
    def passing(self) -> set[int]:
        """Tables that forward packets that it receives."""
        passes = (self.unnumbered_from is not None or bool(self.addresses), self.ip6)
        return {table for table, does in zip(self.tables, passes, strict=True) if does}


@dataclass
class SmallVpp:
    """State of VPP. It fails the test at a request that VPP would refuse, leak from or crash on."""

    sas: dict[int, SaSpec] = field(default_factory=dict)
    interfaces: dict[int, Interface] = field(default_factory=dict)
    routes: dict[Route, int] = field(default_factory=dict)
    acls: dict[int, tuple[str, tuple[Rule, ...]]] = field(default_factory=dict)
    made: int = 0

    def apply(self, request: Request) -> int:
        """Apply a request, and return the value in its reply."""
        match request:
            case SadEntryAdd(sad_id, spec):
                assert sad_id not in self.sas
                self.sas[sad_id] = spec
            case SadEntryUpdate(sad_id, src, dst):
                assert self.sas[sad_id].udp_src_port
                assert src
                assert dst
                self.sas[sad_id] = self.sas[sad_id]._replace(udp_src_port=src, udp_dst_port=dst)
            case SadEntryDel(sad_id):
                assert sad_id not in self.protecting, "deleting a protecting SA only drops a reference"
                del self.sas[sad_id]
            case IpsecItfCreate(instance):
                assert instance not in {itf.instance for itf in self.interfaces.values()}
                self.made += 1
                self.interfaces[100 + self.made] = Interface(instance)
                return 100 + self.made
            case IpsecItfDelete(index):
                assert self.interfaces[index].protection is None
                assert index not in self.routes.values(), "a route would dangle"
                del self.interfaces[index]
            case TunnelProtect(index, outbound, inbound):
                assert {outbound, *inbound} <= self.sas.keys(), "a protection names an SA that is not there"
                assert 1 <= len(inbound) <= 4
                assert len(set(inbound)) == len(inbound)
                assert not self.sas[outbound].inbound
                assert all(self.sas[sad_id].inbound for sad_id in inbound)
                self.interfaces[index].protection = Protection(outbound, inbound)
            case TunnelUnprotect(index):
                assert self.interfaces[index].protection is not None
                self.interfaces[index].protection = None
            case RouteAddDel(index, _, source, is_add):
                assert source == SOURCE
                if is_add:
                    assert index == NO_INDEX or index in self.interfaces
                    self.routes[request.route] = index
                else:
                    del self.routes[request.route]
            case AclAddReplace(index, tag, rules):
                assert index == NO_INDEX or index in self.acls
                self.made += index == NO_INDEX
                number = self.made if index == NO_INDEX else index
                self.acls[number] = tag, rules
                return number
            case AclDel(index):
                assert index not in {itf.acl for itf in self.interfaces.values()}, "it is in use"
                del self.acls[index]
            case SetInterfaceAcls(index, acl):
                assert acl == NO_INDEX or acl in self.acls
                self.interfaces[index].acl = None if acl == NO_INDEX else acl
            case SetInterfaceTag(index, tag):
                self.interfaces[index].tag = tag
            case SetUnnumbered(index, unnumbered_from, is_add):
                assert is_add or self.interfaces[index].unnumbered_from == unnumbered_from
                assert not is_add or not self.interfaces[index].tables[0], "the lender is in the main table"
                self.interfaces[index].unnumbered_from = unnumbered_from if is_add else None
            case InterfaceAddressAddDel(index, address, is_add):
                others = [itf.addresses for number, itf in self.interfaces.items() if number != index]
                assert not is_add or address not in set().union(*others), "another one has that address"
                assert is_add != (address in self.interfaces[index].addresses)
                self.interfaces[index].addresses ^= {address}
            case SetInterfaceTable(index, ip6, table):
                itf = self.interfaces[index]
                assert table in (0, *VRFS)
                assert table != itf.tables[ip6], "VPP lets go of a table before it takes it again"
                assert itf.unnumbered_from is None
                assert ip6 or not itf.addresses
                itf.tables[ip6] = table
            case EnableIp6(index) | DisableIp6(index):
                self.interfaces[index].ip6 = isinstance(request, EnableIp6)
            case SetInterfaceMtu(index, mtu):
                self.interfaces[index].mtu = mtu
            case SetInterfaceUp(index):
                self.interfaces[index].up = True
            case _:
                raise AssertionError(f"{request} was not expected")
        return 7

    @property
    def protecting(self) -> set[int]:
        """SAs that protect some interface."""
        found = [itf.protection for itf in self.interfaces.values() if itf.protection is not None]
        return {sad_id for protection in found for sad_id in (protection.outbound, *protection.inbound)}


@dataclass
class Side:
    """One tunnel: its desired and its actual state."""

    key: TunnelKey
    want: DesiredTunnel | None = None
    actual: ActualTunnel = field(default_factory=ActualTunnel)
    rejected: set[SaSpec | Request] = field(default_factory=set)
    """Requests that VPP refused and that are not sent again for now."""
    complete: bool = False
    protected_before: Protection | None = None
    passing_before: set[int] = field(default_factory=set)
    specs_before: dict[int, SaSpec] = field(default_factory=dict)


class Bench:
    """Two tunnels, the small VPP, and the engine's rounds, with a check at every moment."""

    def __init__(self) -> None:
        self.vpp = SmallVpp()
        self.routes = ActualRoutes()
        self.numbers = NumberPools()
        self.claims: dict[TunnelKey, Mapping[Prefix, int]] = {}
        self.targets = RouteTargets()
        self.sides = [Side(TunnelKey(HERE, THERE, 1, number, 0)) for number in (1, 2)]
        self.may_receive = True
        self.to_refuse: frozenset[int] = frozenset()
        self.halt_after: int | None = None
        self.sent: list[Request] = []

    def want(self, number: int, want: DesiredTunnel | None, claims: Mapping[Prefix, int]) -> None:
        """Change the desired state of a tunnel. Refused requests may be sent again."""
        side = self.sides[number]
        side.want = want
        self.claims[side.key] = claims
        claimed = {prefix for each in self.claims.values() for prefix in each}
        self.targets = RouteTargets(
            [(0, {prefix: min(self.claims, key=lambda key: self.claims[key].get(prefix, 9)) for prefix in claimed})]
        )

    def is_claimed(self, route: Route) -> bool:
        """Return whether a tunnel claims a destination."""
        return self.targets.target(route) is not None

    def converge(self, to_refuse: frozenset[int] = frozenset(), halt_after: int | None = None) -> int:
        """Send plans until nothing is left, and return the number of rounds.

        VPP refuses the requests with the numbers in `to_refuse`. After `halt_after` requests everything ends, as when
        the service is killed.
        """
        self.to_refuse, self.halt_after, self.sent = to_refuse, halt_after, []
        for side in self.sides:
            side.rejected, side.complete = set(), False
            side.protected_before, side.specs_before = side.actual.protection, dict(self.specs(side))
            index = side.actual.sw_if_index
            side.passing_before = set() if index is None else self.vpp.interfaces[index].passing
        kept = set(filter(self.is_claimed, self.vpp.routes))
        for rounds in range(MOST_ROUNDS + 1):
            busy = [self.round(side, kept) for side in self.sides]
            if not any(busy) or self.halted:
                return rounds
            if not rounds:
                rejected = {key.route for side in self.sides for key in side.rejected if isinstance(key, RouteAddDel)}
                kept = set(filter(self.is_claimed, map(Route, PREFIXES))) - rejected
                self.look(kept)
        raise AssertionError(f"there is no end to it: {self.sent[-5:]}")

    def round(self, side: Side, kept: set[Route]) -> bool:
        """Send the present plan, and return whether anything was sent."""
        plan = self.plan(side)
        allowed = [request for request in plan.requests if self.is_allowed(side, request)]
        routes_into = set(self.routes.into(side.actual.sw_if_index)) if side.actual.sw_if_index is not None else set()
        for request in allowed:
            check_tunnel_request(
                request, side.actual, routes_into, tables={(number, ip6) for number in VRFS for ip6 in (False, True)}
            )
        assert not (side.complete and allowed), "it was said to be complete"
        accepted = [self.send(side, request, kept) for request in allowed]
        side.complete = plan.complete and all(accepted)
        return bool(allowed)

    def plan(self, side: Side) -> Plan:
        """Return the present plan; this changes nothing."""
        before = repr(side.actual), dict(self.routes)
        rejected = frozenset(key for key in side.rejected if isinstance(key, SaSpec))
        owned = self.targets.exclusive_routes(side.key)
        plan = tunnel_requests(
            side.want,
            owned,
            side.actual,
            self.routes,
            SOURCE,
            self.numbers,
            rejected,
            self.targets.needs_explicit_drop,
            self.may_receive,
        )
        assert (repr(side.actual), dict(self.routes)) == before
        removed = {
            request.route for request in plan.requests if isinstance(request, RouteAddDel) and not request.is_add
        }
        assert not removed & owned
        return plan

    def is_allowed(self, side: Side, request: Request) -> bool:
        """Return False for a refused request, and for the removal of a route that its new owner replaces.

        The engine does the same.
        """
        if refusal_key(request) in side.rejected:
            self.give_back(request)
            return False
        return not (isinstance(request, RouteAddDel) and not request.is_add and self.is_claimed(request.route))

    def send(self, side: Side, request: Request, kept: set[Route]) -> bool:
        """Let VPP accept or refuse one request, and record the reply."""
        if self.halted:
            self.give_back(request)
            return False
        self.sent.append(request)
        if len(self.sent) - 1 in self.to_refuse:
            side.rejected.add(refusal_key(request))
            self.give_back(request)
            return False
        extra = self.vpp.apply(request)
        if isinstance(request, RouteAddDel):
            self.routes.apply_accepted(request)
        else:
            if isinstance(request, SadEntryDel):
                self.numbers.free_sad_id(request.sad_id)
            elif isinstance(request, IpsecItfDelete):
                self.numbers.free_instance(side.actual.instance)
            side.actual.apply_accepted(request, extra)
        self.look(kept)
        return True

    @property
    def halted(self) -> bool:
        """True once nothing is sent any more."""
        return self.halt_after is not None and len(self.sent) >= self.halt_after

    def give_back(self, request: Request) -> None:
        """Free the number of a request that had no effect."""
        if isinstance(request, SadEntryAdd):
            self.numbers.free_sad_id(request.sad_id)
        elif isinstance(request, IpsecItfCreate):
            self.numbers.free_instance(request.instance)

    def specs(self, side: Side) -> Mapping[int, SaSpec]:
        """Return a tunnel's SAs in VPP."""
        return {sad_id: self.vpp.sas[sad_id] for sad_id in side.actual.sas}

    # Invariants

    def look(self, kept: set[Route]) -> None:
        """Check the invariants of every moment in which VPP may carry a packet."""
        assert kept <= self.vpp.routes.keys(), "a prefix that is wanted has no route: its packets leave in clear"
        assert self.vpp.protecting <= self.vpp.sas.keys()
        assert set(self.vpp.routes.values()) <= {NO_INDEX, *self.vpp.interfaces}
        assert dict(self.routes) == self.vpp.routes
        for side in self.sides:
            self.look_at_books(side)
            if side.want is not None and side.protected_before is not None:
                self.look_at_protection(side, side.want, side.protected_before)

    def look_at_books(self, side: Side) -> None:
        """Check that the recorded state is VPP's."""
        actual = side.actual
        assert (actual.acl is None) == (actual.rules == ())
        assert actual.acl is None or self.vpp.acls[actual.acl][1] == actual.rules
        assert {sad_id: sa.spec for sad_id, sa in actual.sas.items()} == self.specs(side)
        if actual.sw_if_index is None:
            assert actual.protection is None
            return
        itf = self.vpp.interfaces[actual.sw_if_index]
        assert (itf.instance, itf.tag, itf.unnumbered_from) == (actual.instance, actual.tag, actual.unnumbered_from)
        assert (itf.ip6, itf.up, itf.protection) == (actual.ip6, actual.up, actual.protection)
        assert itf.ip6 or not itf.tag.endswith(IP6_TAG), "the tag tells of IPv6 that does not pass"
        assert (tuple(itf.tables), itf.addresses == {interface_address(itf.instance)}) == (
            actual.tables,
            actual.has_address,
        )
        assert (itf.acl is not None) == actual.acl_applied
        if itf.protection is not None and itf.passing and side.want is not None:
            before = itf.passing == side.passing_before and itf.protection == side.protected_before
            assert itf.passing == {side.want.table} or before, "what it decrypts is forwarded by a table of nobody's"
        if side.want is not None and side.want.inbound_rules is not None and side.protected_before is None:
            assert itf.acl is not None or itf.protection is None, "it receives what nobody filters"

    def look_at_protection(self, side: Side, want: DesiredTunnel, before: Protection) -> None:
        """Check make before break, from the previous protection to the desired one."""
        actual = set(self.specs(side).values())
        now = side.actual.protection
        if now is None:
            if side.passing_before != {want.table}:
                return  # it is, or was, to change its table
            assert side.rejected, "the protection is gone though nothing was refused"
            assert not actual & set(want.inbound) or not actual & set(want.outbound)
            return
        inbound = {without_ports(self.vpp.sas[sad_id]) for sad_id in now.inbound}
        used = {without_ports(side.specs_before[sad_id]) for sad_id in before.inbound}
        assert used & {without_ports(spec) for spec in want.inbound} <= inbound, (
            "an inbound SA is not usable for a moment"
        )
        order = [without_ports(spec) for spec in want.outbound]
        old, new = (without_ports(spec) for spec in (side.specs_before[before.outbound], self.vpp.sas[now.outbound]))
        assert new == old or new in order
        assert old not in order or order.index(new) >= order.index(old), "an older SA is used for a moment"

    def assert_equal(self) -> None:
        """Check that VPP holds exactly the desired state."""
        owned = {route: self.targets.target(route) for route in map(Route, PREFIXES) if self.is_claimed(route)}
        index_of = {side.key: side.actual.sw_if_index for side in self.sides}
        routes_into = {route: index_of.get(key) or NO_INDEX for route, key in owned.items()}
        stale = {route: NO_INDEX for route in self.vpp.routes if route not in routes_into}  # the engine removes these
        assert self.vpp.routes == routes_into | stale
        for side in self.sides:
            self.assert_side_equal(side)
        assert len(self.vpp.sas) == sum(len(side.actual.sas) for side in self.sides)
        assert len(self.vpp.interfaces) == sum(side.want is not None for side in self.sides)
        wants = [side.want for side in self.sides if side.want is not None]
        assert sorted(self.vpp.acls.values()) == sorted(
            (w.tag, w.inbound_rules) for w in wants if w.inbound_rules is not None
        )
        sas, interfaces = len(self.vpp.sas), len(self.vpp.interfaces)
        assert not self.numbers.shortage(SAD_IDS - sas, len(INSTANCES) - interfaces), "a number was lost"
        assert self.numbers.shortage(SAD_IDS - sas + 1, 0)
        assert self.numbers.shortage(0, len(INSTANCES) - interfaces + 1)

    def assert_side_equal(self, side: Side) -> None:
        """Check that VPP holds exactly the desired state of one tunnel."""
        want = side.want
        if want is None:
            assert side.actual == ActualTunnel()
            return
        assert side.actual.sw_if_index is not None
        itf = self.vpp.interfaces[side.actual.sw_if_index]
        assert itf.tag == want.tag + (IP6_TAG if itf.ip6 else "")
        assert (itf.unnumbered_from, itf.up) == (None if want.table else want.unnumbered_from, True)
        assert bool(itf.addresses) == bool(want.table)
        assert itf.passing == {want.table}
        assert not want.mtu or itf.mtu == want.mtu
        assert itf.ip6 or not want.ip6
        assert itf.acl == side.actual.acl
        assert side.actual.rules == (want.inbound_rules or ())
        specs = self.specs(side)
        assert sorted(specs.values()) == sorted((*want.inbound, *want.outbound))
        assert itf.protection is not None
        assert specs[itf.protection.outbound] == want.outbound[-1]
        assert tuple(specs[sad_id] for sad_id in itf.protection.inbound) == want.inbound
