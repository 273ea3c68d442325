"""The part of the request script for interfaces in tables of their own, and for routes whose packets they receive."""

from __future__ import annotations

from typing import Any

from support.script import Index, Step, address, fib_source, itf, lookup, on, path, routes_of
from support.script_forwarding import TABLES, acl, all_routes, attach, deag, policy, rule, table, via

INTERFACE_RX = 9


def bind(name: str | int, number: int, ip6: bool = False) -> Step:
    return on("sw_interface_set_table", name, is_ipv6=ip6, vrf_id=number)


def received(name: Any, ip6: bool = False, **more: Any) -> dict[str, Any]:
    return path(Index(name) if isinstance(name, str) else name, INTERFACE_RX, int(ip6)) | more


def ours(number: int, prefix: str, *paths: dict[str, Any], is_add: bool = True) -> Step:
    return via(number, prefix, *paths, is_add=is_add, source=Index("received"))


RECEIVED: tuple[Step, ...] = (
    fib_source("received", "received"),
    itf(300, "j"),
    itf(301, "k"),
    itf(302, "away"),
    # an interface in a table
    bind("j", 40),
    bind(999, 0),
    table(40, name="ours"),
    bind("j", 40, ip6=True),
    table(40, ip6=True, name="ours"),
    bind("j", 40),
    bind("j", 40, ip6=True),
    address("j", "169.254.1.44/32"),
    bind("j", 0),
    bind("j", 0, ip6=True),
    bind("j", 40, ip6=True),
    on("sw_interface_ip6_enable_disable", "j", enable=True),
    bind("j", 0, ip6=True),
    bind("j", 40, ip6=True),
    on("sw_interface_set_flags", "j", flags=1),
    lookup("169.254.1.44/32"),
    lookup("169.254.1.44/32", table=40),
    all_routes(40),
    address("k", "169.254.1.44/32"),
    bind("k", 40),
    address("k", "169.254.1.44/32", is_add=False),
    bind("k", 40),
    address("k", "169.254.1.45/32"),
    # packets received on it
    ours(0, "10.60.0.0/16", received("j")),
    ours(0, "10.61.0.0/16", received("j", weight=3), received("k")),
    ours(0, "10.62.0.0/16", received("j"), path(Index("away"))),
    ours(0, "10.63.0.1/32", received("j")),
    ours(0, "10.64.0.0/16", received("j"), path(Index("j")) | {"preference": 1}),
    ours(0, "10.65.0.1/32", received("j"), path(Index("away")), path(Index("j")) | {"preference": 1}),
    ours(0, "fd61::/64", received("j", True), path(Index("j"), proto=1) | {"preference": 1}),
    ours(0, "fd60::/64", received("j", True)),
    ours(0, "fd60::1/128", received("k", True), received("j", True)),
    routes_of("received"),
    routes_of("received", is_ip6=True),
    lookup("10.60.0.1/32"),
    lookup("10.61.0.1/32"),
    lookup("10.63.0.1/32"),
    lookup("10.64.0.1/32"),
    lookup("fd60::2/128"),
    table(41),
    acl(rule(dst="10.60.1.0/24"), tag="j"),
    policy(60, 0, deag(41)),
    attach(60, "j"),
    ours(41, "10.60.1.0/24", path(Index("away"))),
    # removal
    ours(0, "10.60.0.0/16", path(Index("away"))),
    *(ours(0, f"10.{number}.0.0/16", is_add=False) for number in (60, 61, 62, 64)),
    *(ours(0, f"10.{number}.0.1/32", is_add=False) for number in (63, 65)),
    ours(0, "fd61::/64", is_add=False),
    ours(0, "fd60::/64", is_add=False),
    ours(0, "fd60::1/128", is_add=False),
    routes_of("received"),
    attach(60, "j", is_add=False),
    policy(60, 0, deag(41), is_add=False),
    table(40, is_add=False),
    TABLES,
    on("ipsec_itf_delete", "j"),
    TABLES,
    on("ipsec_itf_delete", "k"),
    TABLES,
    table(40, ip6=True, is_add=False),
    TABLES,
)

DEADLY_LATER: tuple[tuple[str, tuple[Step, ...]], ...] = (
    ("is not there", (fib_source("received", "received"), ours(0, "10.60.0.0/16", received(999)))),
    (
        "interface that goes",
        (
            fib_source("received", "received"),
            itf(300, "j"),
            ours(0, "10.60.0.0/16", received("j")),
            on("ipsec_itf_delete", "j"),
        ),
    ),
)
"""Requests that VPP 26.06 accepts, but crashes on as soon as a packet comes; in the form of `DEADLY`."""
