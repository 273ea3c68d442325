"""The part of the request script that moves `ipsec` interfaces into other tables than the main one."""

from __future__ import annotations

from support.script import (
    A4,
    B4,
    INBOUND,
    PROTECTIONS,
    REPLAY,
    TUNNEL,
    UNNUMBERED,
    Index,
    Step,
    address,
    itf,
    lookup,
    on,
    protect,
    route,
    sa,
    sa_del,
    unprotect,
)
from support.script_forwarding import TABLES, table
from vppipsec.vpp.api.ip import MrouteAdd
from vppipsec.vpp.types import NO_INDEX


def unnumbered(name: str, is_add: bool = True) -> Step:
    ends = {"sw_if_index": Index("wan"), "unnumbered_sw_if_index": Index(name)}
    return Step("sw_interface_set_unnumbered", {**ends, "is_add": is_add})


def bind(name: str | int, number: int, is_ip6: bool = False) -> Step:
    return on("sw_interface_set_table", name, is_ipv6=is_ip6, vrf_id=number)


def bound(name: str | int, is_ip6: bool = False) -> Step:
    return on("sw_interface_get_table", name, is_ipv6=is_ip6)


VRFS: tuple[Step, ...] = (
    itf(300, "red"),
    itf(301, "blue"),
    on("sw_interface_set_flags", "red", flags=1),
    on("sw_interface_set_flags", "blue", flags=1),
    bound("red"),
    bound("red", True),
    bound(999),
    bind("red", 55),
    bind("red", 55, True),
    bind(999, 0),
    table(55),
    table(55, True),
    unnumbered("red"),
    sa(50),
    sa(51, TUNNEL | REPLAY | INBOUND, B4, A4),
    protect("red", 50, 51),
    bind("red", 55),
    bind("red", 55, True),
    unnumbered("red", False),
    unnumbered("red", False),
    bind("red", 55),
    bind("red", 55, True),
    bound("red"),
    bound("red", True),
    unnumbered("red"),
    UNNUMBERED,
    on("sw_interface_ip6_enable_disable", "red", enable=False),
    on("sw_interface_ip6_enable_disable", "red", enable=True),
    bind("red", 0, True),
    bind("red", 55, True),
    on("sw_interface_ip6_enable_disable", "red", enable=False),
    address("red", "169.254.4.176/32"),
    address("red", "169.254.4.176/32"),
    Step("ip_address_dump", {"sw_if_index": Index("red"), "is_ipv6": False}),
    lookup("169.254.4.176/32", table=55),
    lookup("169.254.4.176/32"),
    bind("red", 0),
    address("blue", "169.254.4.176/32"),
    address("blue", "169.254.4.176/32", False),
    bind("blue", 55),
    address("blue", "169.254.4.176/32"),
    address("blue", "169.254.4.0/24"),
    address("blue", "169.254.4.180/32"),
    route("10.3.0.0/16", Index("red"), Index("source")),
    route("10.3.0.0/16", Index("red"), Index("source"), table=55),
    route("fd03::/64", Index("blue"), Index("source"), table=55),
    PROTECTIONS,
    table(55, is_add=False),
    table(55, True, False),
    TABLES,
    bound("red"),
    lookup("10.3.0.1/32", table=55),
    route("10.3.0.0/16", NO_INDEX, Index("source"), is_add=False, kind=2),
    route("10.3.0.0/16", NO_INDEX, Index("source"), is_add=False, table=55, kind=2),
    route("fd03::/64", NO_INDEX, Index("source"), is_add=False, table=55, kind=2),
    unprotect("red"),
    on("ipsec_itf_delete", "red"),
    TABLES,
    address("blue", "169.254.4.180/32", False),
    address("blue", "169.254.4.180/32", False),
    bind("blue", 0),
    TABLES,
    itf(300, "green"),
    bound("green"),
    bound("green", True),
    Step("ip_address_dump", {"sw_if_index": Index("green"), "is_ipv6": False}),
    on("ipsec_itf_delete", "green"),
    on("ipsec_itf_delete", "blue"),
    *(sa_del(number) for number in (50, 51)),
)
"""Runs after `script.SCRIPT`, whose names it uses."""


def receive(number: int, ip6: bool) -> Step:
    request = MrouteAdd(number, ip6)
    return Step(request.message, request.arguments())


def groups(number: int, ip6: bool) -> Step:
    return Step("ip_mroute_dump", {"table": {"table_id": number, "is_ip6": ip6, "name": ""}})


MULTICAST: tuple[Step, ...] = tuple(
    step
    for ip6 in (False, True)
    for step in (
        receive(0, ip6),
        table(57, ip6),
        receive(57, ip6),
        groups(57, ip6),
        table(57, ip6, multicast=True),
        groups(57, ip6),
        receive(57, ip6),
        receive(57, ip6),
        groups(57, ip6),
        table(57, ip6, is_add=False),
        groups(57, ip6),
        receive(57, ip6),
        table(57, ip6, multicast=True),
        groups(57, ip6),
        table(57, ip6, is_add=False),
    )
)
