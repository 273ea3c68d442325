"""What the guard lets through, and what it holds back, of requests for the rules of outbound policies."""

from __future__ import annotations

import pytest

from vppipsec.vpp.api.abf import AttachAbf, SetAbfPolicy
from vppipsec.vpp.api.acl import DelAcl, PutAcl
from vppipsec.vpp.api.interface import SetItfAddress, SetItfTable, SetItfUp, TagItf
from vppipsec.vpp.api.ip import ChangeRoute, EnableIp6, SetTable
from vppipsec.vpp.api.ipsec import CreateItf, DeleteItf
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.guard import GuardError, check_junction, check_layer
from vppipsec.vpp.state.policy_layers import HeldLayer, Stack
from vppipsec.vpp.types import NO_INDEX, RECEIVED, Hop, Prefix, Rule

LAN, DMZ, GONE, JUNCTION, IN_USE, NEVER = 1, 2, 3, 4, 5, 9
WHOLE, BARE, EMPTY = 100, 101, 102
"""A layer with all that belongs to one, one whose policy is attached to nothing, and one that has an ACL alone."""
SIX = 200
NET = Prefix(bytes((10, 2, 0, 0)), 16)
RULE = Rule(True, NET, NET)
LAYERS = {
    layer.number: layer
    for layer in (
        HeldLayer(WHOLE, Stack(False), 5, 50, (RULE,), True, {LAN}, {GONE}),
        HeldLayer(BARE, Stack(False), 6, 51, (RULE,), True),
        HeldLayer(EMPTY, Stack(False), 7, 52, (RULE,)),
        HeldLayer(SIX, Stack(True), 5, 60, (), True),
    )
}

GOOD: tuple[Request, ...] = (
    SetTable(103, False, "vpp-ipsecd 8"),
    SetTable(EMPTY, False, "vpp-ipsecd 7", False),
    SetTable(WHOLE, True, "vpp-ipsecd 8"),  # the same number is another table in the other family
    PutAcl(NO_INDEX, "vpp-ipsecd out 103", (RULE,)),
    PutAcl(50, "vpp-ipsecd out 100", (RULE,)),
    DelAcl(52),
    SetAbfPolicy(EMPTY, 52, EMPTY, False),
    SetAbfPolicy(BARE, 51, BARE, False, False),
    AttachAbf(WHOLE, DMZ, 5, False),
    AttachAbf(WHOLE, LAN, 5, False, False),
    AttachAbf(WHOLE, GONE, 5, False, False),
    ChangeRoute(LAN, NET, 23, True, WHOLE),
    ChangeRoute((Hop(LAN, 1), Hop(DMZ, 2)), NET, 23, True),
    ChangeRoute(RECEIVED + JUNCTION, NET, 23, True),
    ChangeRoute((Hop(RECEIVED + JUNCTION, 1), Hop(DMZ, 2, NET.address)), NET, 23, True),
    ChangeRoute(NO_INDEX, NET, 23, False, WHOLE),
)
BAD: tuple[tuple[Request, str], ...] = (
    (SetTable(WHOLE, False, "vpp-ipsecd 8"), f"FIB table {WHOLE} is there already, or not at all"),
    (SetTable(103, False, "vpp-ipsecd 8", False), "FIB table 103 is there already, or not at all"),
    (SetTable(103, False, "x" * 64), "a tag of 64 characters"),
    (PutAcl(99, "vpp-ipsecd out 100", (RULE,)), "ACL 99 is no layer's"),
    (PutAcl(50, "vpp-ipsecd out 100", (RULE._replace(dports=(2, 1)),)), "an ACL rule for ports 2 to 1"),
    (DelAcl(50), "ACL 50 is no layer's, or in use"),
    (DelAcl(99), "ACL 99 is no layer's, or in use"),
    (SetAbfPolicy(WHOLE, 50, WHOLE, False), f"ABF policy {WHOLE} cannot be made or removed"),  # it has that path
    (SetAbfPolicy(EMPTY, 50, EMPTY, False), f"ABF policy {EMPTY} cannot be made or removed"),  # another layer's ACL
    (SetAbfPolicy(103, 52, 103, False), "ABF policy 103 cannot be made or removed"),
    (SetAbfPolicy(EMPTY, 52, EMPTY, False, False), f"ABF policy {EMPTY} cannot be made or removed"),
    (SetAbfPolicy(WHOLE, 50, WHOLE, False, False), f"ABF policy {WHOLE} is attached"),
    (AttachAbf(EMPTY, LAN, 7, False), f"there is no ABF policy {EMPTY} of that family"),
    (AttachAbf(103, LAN, 7, False), "there is no ABF policy 103 of that family"),
    (AttachAbf(WHOLE, DMZ, 5, True), f"there is no ABF policy {WHOLE} of that family"),
    (AttachAbf(WHOLE, LAN, 5, True, False), f"there is no ABF policy {WHOLE} of that family"),
    (AttachAbf(WHOLE, NO_INDEX, 5, False), f"there is no ABF policy {WHOLE} of that family"),
    (AttachAbf(WHOLE, LAN, 5, False), f"ABF policy {WHOLE} cannot be attached to interface {LAN}"),
    (AttachAbf(WHOLE, GONE, 5, False), f"ABF policy {WHOLE} cannot be attached to interface {GONE}"),
    (AttachAbf(WHOLE, NEVER, 5, False), f"ABF policy {WHOLE} cannot be attached to interface {NEVER}"),
    (AttachAbf(WHOLE, DMZ, 5, False, False), f"ABF policy {WHOLE} is not attached to interface {DMZ}"),
    (ChangeRoute(NEVER, NET, 23, True, WHOLE), "a route would lead into an interface that is not there"),
    (
        ChangeRoute((Hop(LAN, 1), Hop(NEVER, 1)), NET, 23, True),
        "a route would lead into an interface that is not there",
    ),
    (
        ChangeRoute((Hop(LAN, 1), Hop(DMZ, 1, bytes(15) + b"\1")), NET, 23, True),
        "a route would have a next hop of the other family",
    ),
    (ChangeRoute(RECEIVED + LAN, NET, 23, True), "a route would lead into an interface that is not there"),
    (ChangeRoute(LAN, NET, 0, True, WHOLE), "a route without our FIB source would be taken for somebody else's"),
    (ChangeRoute(LAN, Prefix(NET.address, 8), 23, True, WHOLE), "a prefix with host bits"),
)


@pytest.mark.parametrize("request_", GOOD, ids=str)
def test_what_is_right_passes(request_: Request) -> None:
    check_layer(request_, LAYERS, {LAN, DMZ, RECEIVED + JUNCTION})


@pytest.mark.parametrize(("request_", "complaint"), BAD, ids=str)
def test_what_vpp_would_refuse_or_die_of_is_held_back(request_: Request, complaint: str) -> None:
    with pytest.raises(GuardError) as caught:
        check_layer(request_, LAYERS, {LAN, DMZ})
    assert str(caught.value) == complaint


TABLE = 300
OF_JUNCTIONS: tuple[Request, ...] = (
    SetTable(TABLE, True, "vpp-ipsecd junctions"),
    SetTable(TABLE, True, "vpp-ipsecd junctions", False),
    CreateItf(256),
    TagItf(JUNCTION, "vpp-ipsecd junction 7"),
    SetItfTable(JUNCTION, False, TABLE),
    SetItfAddress(JUNCTION, bytes((169, 254, 1, 0))),
    EnableIp6(JUNCTION),
    SetItfUp(IN_USE),
    DeleteItf(JUNCTION),
)
NOT_OF_JUNCTIONS: tuple[tuple[Request, str], ...] = (
    (SetTable(301, True, "vpp-ipsecd junctions"), "FIB table 301 is not the junctions'"),
    (CreateItf(1 << 14), "interface ipsec16384 cannot be made"),
    (TagItf(JUNCTION, "x" * 64), "a tag of 64 characters"),
    (SetItfTable(JUNCTION, False, 0), f"interface {JUNCTION} is no junction, or FIB table 0 not the junctions'"),
    (SetItfTable(LAN, False, TABLE), f"interface {LAN} is no junction, or FIB table {TABLE} not the junctions'"),
    (DeleteItf(IN_USE), f"packets are still received on interface {IN_USE}, or it asks rules"),
    *(
        (request, f"interface {LAN} is no junction")
        for request in (TagItf(LAN, "a"), SetItfAddress(LAN, bytes(4)), EnableIp6(LAN), SetItfUp(LAN), DeleteItf(LAN))
    ),
)


@pytest.mark.parametrize("request_", OF_JUNCTIONS, ids=str)
def test_what_makes_a_junction_passes(request_: Request) -> None:
    check_junction(request_, {JUNCTION, IN_USE}, {IN_USE}, TABLE)


@pytest.mark.parametrize(("request_", "complaint"), NOT_OF_JUNCTIONS, ids=str)
def test_what_is_no_junctions_or_would_kill_vpp_is_held_back(request_: Request, complaint: str) -> None:
    with pytest.raises(GuardError) as caught:
        check_junction(request_, {JUNCTION, IN_USE}, {IN_USE}, TABLE)
    assert str(caught.value) == complaint
