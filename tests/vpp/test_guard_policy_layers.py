"""What the guard lets through, and what it holds back, of requests for the rules of outbound policies."""

from __future__ import annotations

import pytest

from vppipsec.vpp.api.abf import AbfAttach, AbfPolicyAddDel
from vppipsec.vpp.api.acl import AclAddReplace, AclDel
from vppipsec.vpp.api.interface import InterfaceAddressAddDel, SetInterfaceTable, SetInterfaceTag, SetInterfaceUp
from vppipsec.vpp.api.ip import EnableIp6, RouteAddDel, TableAddDel
from vppipsec.vpp.api.ipsec import IpsecItfCreate, IpsecItfDelete
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.guard import GuardError, check_classifier_request, check_layer_request
from vppipsec.vpp.state.policy_layers import ActualLayer, StackKey
from vppipsec.vpp.types import INTERFACE_RX, NO_INDEX, Path, Prefix, Rule

LAN, DMZ, GONE, CLASSIFIER, IN_USE, NEVER = 1, 2, 3, 4, 5, 9
WHOLE, BARE, EMPTY = 100, 101, 102
"""A layer with all that belongs to one, one whose policy is attached to nothing, and one that has an ACL alone."""
SIX = 200
NET = Prefix(bytes((10, 2, 0, 0)), 16)
RULE = Rule(True, NET, NET)
LAYERS = {
    layer.number: layer
    for layer in (
        ActualLayer(WHOLE, StackKey(False), 5, 50, (RULE,), True, {LAN}, {GONE}),
        ActualLayer(BARE, StackKey(False), 6, 51, (RULE,), True),
        ActualLayer(EMPTY, StackKey(False), 7, 52, (RULE,)),
        ActualLayer(SIX, StackKey(True), 5, 60, (), True),
    )
}

GOOD: tuple[Request, ...] = (
    TableAddDel(103, False, "vpp-ipsecd 8"),
    TableAddDel(EMPTY, False, "vpp-ipsecd 7", False),
    TableAddDel(WHOLE, True, "vpp-ipsecd 8"),  # the same number is another table in the other family
    AclAddReplace(NO_INDEX, "vpp-ipsecd out 103", (RULE,)),
    AclAddReplace(50, "vpp-ipsecd out 100", (RULE,)),
    AclDel(52),
    AbfPolicyAddDel(EMPTY, 52, EMPTY, False),
    AbfPolicyAddDel(BARE, 51, BARE, False, False),
    AbfAttach(WHOLE, DMZ, 5, False),
    AbfAttach(WHOLE, LAN, 5, False, False),
    AbfAttach(WHOLE, GONE, 5, False, False),
    RouteAddDel(LAN, NET, 23, True, WHOLE),
    RouteAddDel((Path(LAN, 1), Path(DMZ, 2)), NET, 23, True),
    RouteAddDel(INTERFACE_RX + CLASSIFIER, NET, 23, True),
    RouteAddDel((Path(INTERFACE_RX + CLASSIFIER, 1), Path(DMZ, 2, NET.address)), NET, 23, True),
    RouteAddDel(NO_INDEX, NET, 23, False, WHOLE),
)
BAD: tuple[tuple[Request, str], ...] = (
    (TableAddDel(WHOLE, False, "vpp-ipsecd 8"), f"FIB table {WHOLE} is there already, or not at all"),
    (TableAddDel(103, False, "vpp-ipsecd 8", False), "FIB table 103 is there already, or not at all"),
    (TableAddDel(103, False, "x" * 64), "a tag of 64 characters"),
    (AclAddReplace(99, "vpp-ipsecd out 100", (RULE,)), "ACL 99 is no layer's"),
    (AclAddReplace(50, "vpp-ipsecd out 100", (RULE._replace(dports=(2, 1)),)), "an ACL rule for ports 2 to 1"),
    (AclDel(50), "ACL 50 is no layer's, or in use"),
    (AclDel(99), "ACL 99 is no layer's, or in use"),
    (AbfPolicyAddDel(WHOLE, 50, WHOLE, False), f"ABF policy {WHOLE} cannot be made or removed"),  # it has that path
    (AbfPolicyAddDel(EMPTY, 50, EMPTY, False), f"ABF policy {EMPTY} cannot be made or removed"),  # another layer's ACL
    (AbfPolicyAddDel(103, 52, 103, False), "ABF policy 103 cannot be made or removed"),
    (AbfPolicyAddDel(EMPTY, 52, EMPTY, False, False), f"ABF policy {EMPTY} cannot be made or removed"),
    (AbfPolicyAddDel(WHOLE, 50, WHOLE, False, False), f"ABF policy {WHOLE} is attached"),
    (AbfAttach(EMPTY, LAN, 7, False), f"there is no ABF policy {EMPTY} of that family"),
    (AbfAttach(103, LAN, 7, False), "there is no ABF policy 103 of that family"),
    (AbfAttach(WHOLE, DMZ, 5, True), f"there is no ABF policy {WHOLE} of that family"),
    (AbfAttach(WHOLE, LAN, 5, True, False), f"there is no ABF policy {WHOLE} of that family"),
    (AbfAttach(WHOLE, NO_INDEX, 5, False), f"there is no ABF policy {WHOLE} of that family"),
    (AbfAttach(WHOLE, LAN, 5, False), f"ABF policy {WHOLE} cannot be attached to interface {LAN}"),
    (AbfAttach(WHOLE, GONE, 5, False), f"ABF policy {WHOLE} cannot be attached to interface {GONE}"),
    (AbfAttach(WHOLE, NEVER, 5, False), f"ABF policy {WHOLE} cannot be attached to interface {NEVER}"),
    (AbfAttach(WHOLE, DMZ, 5, False, False), f"ABF policy {WHOLE} is not attached to interface {DMZ}"),
    (RouteAddDel(NEVER, NET, 23, True, WHOLE), "a route would lead into an interface that is not there"),
    (
        RouteAddDel((Path(LAN, 1), Path(NEVER, 1)), NET, 23, True),
        "a route would lead into an interface that is not there",
    ),
    (
        RouteAddDel((Path(LAN, 1), Path(DMZ, 1, bytes(15) + b"\1")), NET, 23, True),
        "a route would have a next hop of the other family",
    ),
    (RouteAddDel(INTERFACE_RX + LAN, NET, 23, True), "a route would lead into an interface that is not there"),
    (RouteAddDel(LAN, NET, 0, True, WHOLE), "a route without our FIB source would be taken for somebody else's"),
    (RouteAddDel(LAN, Prefix(NET.address, 8), 23, True, WHOLE), "a prefix with host bits"),
)


@pytest.mark.parametrize("request_", GOOD, ids=str)
def test_what_is_right_passes(request_: Request) -> None:
    check_layer_request(request_, LAYERS, {LAN, DMZ, INTERFACE_RX + CLASSIFIER})


@pytest.mark.parametrize(("request_", "complaint"), BAD, ids=str)
def test_guard_stops_requests_vpp_would_refuse_or_die_of(request_: Request, complaint: str) -> None:
    with pytest.raises(GuardError) as caught:
        check_layer_request(request_, LAYERS, {LAN, DMZ})
    assert str(caught.value) == complaint


TABLE = 300
CLASSIFIER_REQUESTS: tuple[Request, ...] = (
    TableAddDel(TABLE, True, "vpp-ipsecd junctions"),
    TableAddDel(TABLE, True, "vpp-ipsecd junctions", False),
    IpsecItfCreate(256),
    SetInterfaceTag(CLASSIFIER, "vpp-ipsecd junction 7"),
    SetInterfaceTable(CLASSIFIER, False, TABLE),
    InterfaceAddressAddDel(CLASSIFIER, bytes((169, 254, 1, 0))),
    EnableIp6(CLASSIFIER),
    SetInterfaceUp(IN_USE),
    IpsecItfDelete(CLASSIFIER),
)
BAD_CLASSIFIER_REQUESTS: tuple[tuple[Request, str], ...] = (
    (TableAddDel(301, True, "vpp-ipsecd junctions"), "FIB table 301 is not the junctions'"),
    (IpsecItfCreate(1 << 14), "interface ipsec16384 cannot be made"),
    (SetInterfaceTag(CLASSIFIER, "x" * 64), "a tag of 64 characters"),
    (
        SetInterfaceTable(CLASSIFIER, False, 0),
        f"interface {CLASSIFIER} is no junction, or FIB table 0 not the junctions'",
    ),
    (SetInterfaceTable(LAN, False, TABLE), f"interface {LAN} is no junction, or FIB table {TABLE} not the junctions'"),
    (IpsecItfDelete(IN_USE), f"packets are still received on interface {IN_USE}, or it asks rules"),
    *(
        (request, f"interface {LAN} is no junction")
        for request in (
            SetInterfaceTag(LAN, "a"),
            InterfaceAddressAddDel(LAN, bytes(4)),
            EnableIp6(LAN),
            SetInterfaceUp(LAN),
            IpsecItfDelete(LAN),
        )
    ),
)


@pytest.mark.parametrize("request_", CLASSIFIER_REQUESTS, ids=str)
def test_guard_passes_classifier_requests(request_: Request) -> None:
    check_classifier_request(request_, {CLASSIFIER, IN_USE}, {IN_USE}, TABLE)


@pytest.mark.parametrize(("request_", "complaint"), BAD_CLASSIFIER_REQUESTS, ids=str)
def test_guard_stops_requests_for_no_classifier_or_fatal_to_vpp(request_: Request, complaint: str) -> None:
    with pytest.raises(GuardError) as caught:
        check_classifier_request(request_, {CLASSIFIER, IN_USE}, {IN_USE}, TABLE)
    assert str(caught.value) == complaint
