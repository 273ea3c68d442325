"""The kernel's routes over VTIs: decoder and model on what a kernel with xfrm interfaces has said, and follower in a namespace.

`vti.jsonl` was recorded with Linux 6.1: what `ip` was told to do, what the kernel told of it, and dumps (links, addresses and
routes). Of links only some attributes are in it. In the tests with a live kernel a veth stands for a VTI where the kernel has no
xfrm interfaces: all but its kind is the same.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import random
import struct
import subprocess
from collections.abc import Callable, Coroutine
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from support.netns import in_new_netns, ip
from support.recorded import PATIENCE_S
from support.veth_vti import VethsAsVtis, links
from vppipsec.kernel.netlink.socket import Overflow
from vppipsec.kernel.netlink.wire import HEADER, WireError
from vppipsec.kernel.route.follower import RouteFollower
from vppipsec.kernel.route.model import KernelRoutes, NextHop, RouteDump
from vppipsec.kernel.route.wire import (
    NLM_F_APPEND,
    NLM_F_REPLACE,
    Address,
    AddressGone,
    Destination,
    KernelRoute,
    Link,
    LinkEvent,
    LinkGone,
    NextHopChanged,
    RouteAdded,
    RouteFilter,
    RouteGone,
    RouteKind,
    decode_route,
    route_key,
)
from vppipsec.kernel.route.wire import KernelPath as PathOut

RECORDING = Path(__file__).with_name("vti.jsonl")
ROUTE_TYPES = (24, 25)
SEEDS = 40 if os.environ.get("VPPIPSEC_LONG") else 6
QUIET_S = 0.15
"""After this time without a word the kernel has said all, s."""


@cache
def recording() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDING.read_text().splitlines()]


def told(did: str) -> list[bytes]:
    """Return what the kernel told when it was told to do something."""
    (step,) = [step for step in recording() if step.get("did") == did]
    return [bytes.fromhex(text) for text in step["told"]]


def every_message() -> list[bytes]:
    return [bytes.fromhex(text) for step in recording() for text in step.get("told", step.get("dump"))]


def as_dump(messages: list[str]) -> RouteDump:
    """Decode a dump whole, and keep of its routes what a dump of ours would."""
    events = [decode_route(bytes.fromhex(text)) for text in messages]
    found = tuple(event for event in events if isinstance(event, Link))
    vtis = {link.ifindex for link in found if link.if_id}
    routes = [event.route for event in events if isinstance(event, RouteAdded)]
    wanted = {route.destination for route in routes if any(path.ifindex in vtis for path in route.paths)}
    return RouteDump(
        found,
        tuple(event for event in events if isinstance(event, Address)),
        tuple(route for route in routes if route.destination in wanted),
    )


def to(text: str, table: int = 254) -> Destination:
    net = ipaddress.ip_network(text)
    return Destination(table, net.network_address.packed, net.prefixlen)


def packed(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


def shown(routes: KernelRoutes) -> dict[str, str]:
    """Return the ways to destinations that a VTI is a way to, as text: `if_id*weight`, `-` for another link."""
    text = {}
    for (table, address, length), next_hops in routes.next_hops().items():
        if any(way.if_id for way in next_hops):
            place = f"{ipaddress.ip_address(address)}/{length}" + (f" table {table}" if table != 254 else "")
            text[place] = " ".join(f"{way.if_id or '-'}*{way.weight}" for way in next_hops)
    return text


# The decoder, on what a kernel said


@pytest.mark.parametrize(
    ("did", "expected"),
    [
        ("ip link add vti7 type xfrm dev lo if_id 7", [Link(2, "vti7", False, 7, carrier=False)]),
        ("ip link set vti8 master blue", [Link(3, "vti8", False, 8, 10, carrier=False)]),
        ("ip link add eth0 type dummy", [Link(4, "eth0", False, carrier=False)]),
        ("ip link set blue up", [Link(5, "blue", True, table=10)]),
        (
            "ip addr add 10.98.0.1 peer 10.98.0.2/32 dev vti7",
            [
                Address(2, packed("10.98.0.1"), 32),
                RouteAdded(KernelRoute(to("10.98.0.1/32", 255), 0, RouteKind.LOCAL, ()), 0),
                RouteAdded(KernelRoute(to("10.98.0.2/32"), 0, RouteKind.UNICAST, (PathOut(2),)), 0),
            ],
        ),
        (
            "ip route add 10.2.0.0/16 via 10.99.0.2 dev vti7 metric 20",
            [RouteAdded(KernelRoute(to("10.2.0.0/16"), 20, 1, (PathOut(2, packed("10.99.0.2")),)), 0)],
        ),
        (
            "ip -6 route add fd03::/48 dev vti8 table 10",
            [RouteAdded(KernelRoute(to("fd03::/48", 10), 1024, 1, (PathOut(3),)), 0)],
        ),
        (
            "ip route add 10.4.0.0/16 nexthop dev vti7 weight 2 nexthop via 10.0.0.9",
            [
                RouteAdded(
                    KernelRoute(to("10.4.0.0/16"), 0, 1, (PathOut(2, None, 2), PathOut(4, packed("10.0.0.9")))), 0
                )
            ],
        ),
        ("ip nexthop add id 3 group 1,3/2", [NextHopChanged(3)]),
        (
            "ip route add 10.6.0.0/16 nhid 3",
            [
                RouteAdded(
                    KernelRoute(to("10.6.0.0/16"), 0, 1, (PathOut(2, None, 3), PathOut(4, packed("10.0.0.9"))), 3), 0
                )
            ],
        ),
        ("ip route add 10.8.0.0/16 dev vti7 tos 0x10", [None]),
        ("ip nexthop del id 1", [NextHopChanged(1), NextHopChanged(3)]),
    ],
)
def test_decodes_what_the_kernel_tells(did: str, expected: list[LinkEvent | None]) -> None:
    assert [decode_route(message) for message in told(did)] == expected


def test_a_link_that_is_deleted_is_told_last() -> None:
    events = [decode_route(message) for message in told("ip link del vti7")]
    assert events[-1] == LinkGone(2)
    assert AddressGone(Address(2, packed("10.99.0.1"), 30)) in events
    v4 = [e for e in events if isinstance(e, RouteGone) and len(e.route.destination.address) == 4]
    assert {event.route.destination.table for event in v4} == {255}, "routes of IPv4 go without a word"


def test_routes_for_addresses_of_a_link_alone_are_of_no_interest() -> None:
    routes = [event.route for event in map(decode_route, told("ip link set vti8 up")) if isinstance(event, RouteAdded)]
    own = [route.destination for route in routes if route.kind == RouteKind.LOCAL]
    assert [route.destination for route in routes if route.destination not in own] == [to("ff00::/8", 10)]
    assert not any(route.paths for route in routes), "nor is what is multicast, or ours, forwarded"


def test_a_link_that_leaves_a_bridge_is_not_gone() -> None:
    port = struct.pack("=BxHiII", 7, 1, 4, 0, 0)  # AF_BRIDGE
    assert decode_route(HEADER.pack(HEADER.size + len(port), 17, 0, 0, 0) + port) is None


def test_whatever_is_cut_short_or_made_long_is_a_wire_error_or_a_value() -> None:
    tried = refused = 0
    for message in {m[4:6] + m[16:20]: m for m in every_message()}.values():  # one of each kind
        for size in range(len(message)):
            cut = struct.pack("=I", size) + message[4:size]
            for attempt in (cut, message[:size], message[:size] + b"\xff" * (len(message) - size)):
                tried += 1
                try:
                    decode_route(attempt)
                except WireError:
                    refused += 1
    assert tried > refused > tried // 4


def test_unknown_types_are_refused_with_their_number() -> None:
    with pytest.raises(WireError, match=r"^netlink message of unknown type 0x77, 16 bytes$"):
        decode_route(HEADER.pack(16, 0x77, 0, 0, 0))


# The watch


def route_messages() -> list[tuple[bytes, KernelRoute]]:
    found = []
    for message in every_message():
        event = decode_route(message) if HEADER.unpack_from(message)[1] in ROUTE_TYPES else None
        if isinstance(event, RouteAdded | RouteGone):
            found.append((message, event.route))
    return found


@pytest.mark.parametrize("indices", [[2], [3], [4], [2, 3], [77], [20], [254], [255, 12]])
def test_watch_wants_all_routes_over_its_links_and_hardly_any_other(indices: list[int]) -> None:
    watch = RouteFilter(indices)
    over = [any(path.ifindex in indices for path in route.paths) for _, route in route_messages()]
    local = [route.kind != RouteKind.UNICAST for _, route in route_messages()]  # has a link, but no way out
    wants = [watch.matches(message) for message, _ in route_messages()]
    assert all(want for want, needed in zip(wants, over, strict=True) if needed)
    assert not any(w for w, needed, own in zip(wants, over, local, strict=True) if not needed and not own)


def test_watch_of_very_many_links_misses_none() -> None:
    watch = RouteFilter(range(2, 70_000))
    assert all(watch.matches(message) for message, route in route_messages() if route.paths)


def test_watch_wants_all_routes_of_its_destinations() -> None:
    messages = route_messages()
    for destination in {route.destination for _, route in messages}:
        watch = RouteFilter([77])
        watch.add(destination)
        assert [watch.matches(message) for message, _ in messages] == [
            route.destination == destination for _, route in messages
        ]


def test_messages_of_one_destination_have_one_key() -> None:
    keys = {(route_key(message), route.destination) for message, route in route_messages()}
    assert len(keys) == len({key for key, _ in keys}) == len({destination for _, destination in keys}) > 20


def test_watch_without_links_wants_nothing() -> None:
    assert not any(RouteFilter().matches(message) for message, _ in route_messages())


# The model, on what a kernel said

AT_DUMPS = [
    {
        "10.1.0.0/16": "7*1",
        "10.3.0.0/16 table 10": "8*1",
        "10.4.0.0/16": "7*2 -*1",
        "10.5.0.0/16": "7*1",
        "10.6.0.0/16": "7*3 -*1",
        "10.7.0.0/16": "7*1",
        "10.98.0.2/32": "7*1",
        "10.99.0.0/30": "7*1",
        "fd03::/48 table 10": "8*1",
        "fd07::/48": "7*1",
        "fd99::/64": "7*1",
    },
    {"10.6.0.0/16": "", "10.7.0.0/16": ""},  # its next hop is gone, and they say nothing
    {"10.2.0.0/16": "7*1", "10.4.0.0/16": "7*1", "10.5.0.0/16": ""},  # the better one is gone with its address
    {"10.3.0.0/16 table 10": "", "fd03::/48 table 10": ""},  # they do not come along
    dict.fromkeys(["10.1.0.0/16", "10.2.0.0/16", "10.4.0.0/16", "10.98.0.2/32", "10.99.0.0/30"], "")
    | dict.fromkeys(["fd07::/48", "fd99::/64"], ""),
    {"10.98.0.2/32": "7*1", "10.99.0.0/30": "7*1"},  # what the kernel makes of addresses comes back, and no other
    {"10.98.0.2/32": "", "10.99.0.0/30": ""},
]
"""What ways there are at each dump of the recording, as changes."""


def test_model_follows_a_recorded_kernel() -> None:
    routes = KernelRoutes()
    routes.replace(RouteDump((), (), ()))
    expected: dict[str, str] = {}
    dumps = 0
    for step in recording():
        if "dump" not in step:
            for text in step["told"]:
                event = decode_route(bytes.fromhex(text), routes.watch)
                if event is not None:
                    routes.apply(event)
            continue
        expected |= AT_DUMPS[dumps]
        expected = {place: next_hops for place, next_hops in expected.items() if next_hops}
        dumps += 1
        was_stale = routes.stale
        if not was_stale:
            assert shown(routes) == expected
        changed = routes.replace(as_dump(step["dump"]))
        assert was_stale or not changed
        assert shown(routes) == expected
        assert not routes.stale
    assert dumps == len(AT_DUMPS)


def test_model_drops_the_routes_of_a_vti_at_once_when_it_goes_down_or_away() -> None:
    for last_words in (Link(2, "vti7", False, 7), LinkGone(2)):
        routes = KernelRoutes()
        routes.replace(as_dump(next(step["dump"] for step in recording() if "dump" in step)))
        assert 7 in routes.apply(last_words)
        left = shown(routes)
        assert left == {"10.3.0.0/16 table 10": "8*1", "fd03::/48 table 10": "8*1"}
        assert routes.stale


def test_model_tells_of_a_vti() -> None:
    routes = KernelRoutes()
    dump = as_dump(next(step["dump"] for step in recording() if "dump" in step))
    assert routes.replace(dump) >= {7, 8}
    assert routes.if_ids() == {7, 8}
    seven, eight = routes.link(7), routes.link(8)
    assert seven is not None
    assert eight is not None
    assert (seven.name, seven.ifindex, seven.up, seven.table) == ("vti7", 2, True, 0)
    assert {(a.address, a.length) for a in seven.addresses} >= {
        (packed("10.98.0.1"), 32),
        (packed("10.99.0.1"), 30),
        (packed("fd99::1"), 64),
    }
    assert (eight.name, eight.up, eight.table) == ("vti8", True, 10)
    assert routes.link(9) is None
    assert routes.replace(dump) == set()


# The model, by tables

NET4, NET6 = "10.1.0.0/16", "fd01::/48"
VTI7, VTI8, LINK = 2, 3, 4


def route(text: str, *paths: int | tuple[int, str], metric: int = 0, kind: int = RouteKind.UNICAST) -> KernelRoute:
    """Return a route. A path is a link, or a link with a next hop."""
    outs = tuple(PathOut(p) if isinstance(p, int) else PathOut(p[0], packed(p[1])) for p in paths)
    return KernelRoute(to(text), metric, kind, outs)


def new(text: str, *paths: int | tuple[int, str], flags: int = 0, metric: int = 0) -> RouteAdded:
    return RouteAdded(route(text, *paths, metric=metric), flags)


def gone(text: str, *paths: int | tuple[int, str], metric: int = 0) -> RouteGone:
    return RouteGone(route(text, *paths, metric=metric))


def filled(*known: KernelRoute) -> KernelRoutes:
    routes = KernelRoutes()
    found = (Link(VTI7, "vti7", True, 7), Link(VTI8, "vti8", True, 8), Link(LINK, "eth0", True))
    routes.replace(RouteDump(found, (), known))
    return routes


STORIES: dict[str, tuple[list[KernelRoute], list[LinkEvent], dict[str, str], bool]] = {
    "a route over another link alone is not kept": ([], [new(NET4, LINK)], {}, False),
    "a new destination calls for a dump": ([], [new(NET4, VTI7)], {NET4: "7*1"}, True),
    "a better route over another link wins": (
        [route(NET4, VTI7, metric=20)],
        [new(NET4, LINK, metric=10)],
        {},
        False,
    ),
    "and loses again when it is gone": (
        [route(NET4, LINK, metric=10), route(NET4, VTI7, metric=20)],
        [gone(NET4, LINK, metric=10)],
        {NET4: "7*1"},
        False,
    ),
    "a blackhole that is better wins": (
        [route(NET4, kind=RouteKind.BLACKHOLE), route(NET4, VTI7, metric=20)],
        [],
        {},
        False,
    ),
    "a worse one does not": ([route(NET4, VTI7)], [new(NET4, LINK, metric=10)], {NET4: "7*1"}, False),
    "a route takes the place of another": (
        [route(NET4, VTI7)],
        [new(NET4, VTI8, flags=NLM_F_REPLACE)],
        {NET4: "8*1"},
        False,
    ),
    "of several with one metric who knows which": (
        [route(NET4, VTI7), route(NET4, LINK)],
        [new(NET4, VTI8, flags=NLM_F_REPLACE)],
        {NET4: "8*1"},
        True,
    ),
    "IPv4 puts a new one first": ([route(NET4, VTI7)], [new(NET4, VTI8)], {NET4: "8*1"}, False),
    "unless it is told to append": (
        [route(NET4, VTI7)],
        [new(NET4, VTI8, flags=NLM_F_APPEND)],
        {NET4: "7*1"},
        False,
    ),
    "heard twice it is one": (
        [route(NET4, VTI7)],
        [new(NET4, VTI7), gone(NET4, VTI7)],
        {},
        False,
    ),
    "two of IPv4 that differ by weight are two": (
        [KernelRoute(to(NET4), 0, 1, (PathOut(VTI7), PathOut(VTI8)))],
        [
            RouteAdded(KernelRoute(to(NET4), 0, 1, (PathOut(VTI7), PathOut(VTI8, None, 3))), 0),
            RouteGone(KernelRoute(to(NET4), 0, 1, (PathOut(VTI7), PathOut(VTI8)))),
        ],
        {NET4: "7*1 8*3"},
        False,
    ),
    "IPv6 tells all paths when one is added": (
        [route(NET6, (VTI7, "fd99::2"))],
        [new(NET6, (VTI8, "fd98::2"), (VTI7, "fd99::2"), flags=NLM_F_APPEND)],
        {NET6: "7*1 8*1"},
        False,
    ),
    "and lets them go one by one": (
        [route(NET6, (VTI7, "fd99::2"), (VTI8, "fd98::2"))],
        [gone(NET6, (VTI7, "fd99::2"))],
        {NET6: "8*1"},
        False,
    ),
    "a route that is gone and was not known may be another": (
        [route(NET4, VTI7)],
        [gone(NET4, VTI8)],
        {NET4: "7*1"},
        True,
    ),
    "a route that is gone with another metric is another": (
        [route(NET4, VTI7)],
        [gone(NET4, VTI7, metric=5)],
        {NET4: "7*1"},
        False,
    ),
    "a VTI that goes down leaves its share to the others": (
        [route(NET4, VTI7, VTI8, (LINK, "10.0.0.9"))],
        [Link(VTI7, "vti7", False, 7)],
        {NET4: "8*1 -*1"},
        True,
    ),
    "a VTI that loses its carrier calls for a dump": (
        [route(NET4, VTI7)],
        [Link(VTI7, "vti7", True, 7, carrier=False)],
        {NET4: "7*1"},
        True,
    ),
    "another link that goes down calls for a dump where it is in use": (
        [route(NET4, VTI7, (LINK, "10.0.0.9"))],
        [Link(LINK, "eth0", False)],
        {NET4: "7*1 -*1"},
        True,
    ),
    "another link that gets an address may bring paths to life": (
        [route(NET4, VTI7, (LINK, "10.0.0.9"))],
        [Address(LINK, packed("10.0.0.1"), 24)],
        {NET4: "7*1 -*1"},
        True,
    ),
    "and not where it is not": ([route(NET4, VTI7)], [Link(LINK, "eth0", False)], {NET4: "7*1"}, False),
    "another link that is deleted takes its share along": (
        [route(NET4, VTI7, (LINK, "10.0.0.9"))],
        [LinkGone(LINK)],
        {NET4: "7*1"},
        True,
    ),
    "a next hop object that is not in use is of no interest": (
        [route(NET4, VTI7)],
        [NextHopChanged(3)],
        {NET4: "7*1"},
        False,
    ),
    "one that is calls for a dump": (
        [route(NET4, VTI7)._replace(next_hop=3)],
        [NextHopChanged(3)],
        {NET4: "7*1"},
        True,
    ),
}


@pytest.mark.parametrize("name", STORIES)
def test_model(name: str) -> None:
    known, events, expected, stale = STORIES[name]
    routes = filled(*known)
    for event in events:
        routes.apply(event)
    assert shown(routes) == expected
    assert routes.stale == stale


def test_dead_paths_are_no_next_hops() -> None:
    halves = (PathOut(VTI7, None, 1, True), PathOut(VTI8, None, 3))
    assert shown(filled(KernelRoute(to(NET4), 0, 1, halves))) == {NET4: "8*1"}
    assert shown(filled(KernelRoute(to(NET4), 0, 1, halves[:1]), route(NET4, VTI8, metric=9))) == {NET4: "8*1"}


def test_changes_name_the_vtis_that_share_a_destination() -> None:
    routes = filled(route(NET4, VTI7, VTI8), route("10.2.0.0/16", VTI8))
    assert routes.apply(gone("10.2.0.0/16", VTI8)) == {8}
    assert routes.apply(Link(VTI7, "vti7", False, 7)) == {7, 8}
    assert routes.apply(Link(VTI7, "vti7", False, 7)) == set()
    assert routes.apply(Address(VTI8, packed("10.99.0.1"), 30)) == {8}
    assert routes.apply(Address(VTI8, packed("10.99.0.1"), 30)) == set()
    assert routes.apply(Overflow()) == set()


def test_own_addresses_exclude_link_scope_and_carry_their_table() -> None:
    routes = filled()
    for address in ("10.0.0.1", "fe80::1", "169.254.0.9", "127.0.0.1", "::1", "fd00::1"):
        link_local = address not in ("10.0.0.1", "fd00::1")
        assert routes.apply(Address(LINK, packed(address), 24)) == (set() if link_local else {0})
    assert routes.apply(Address(LINK, packed("10.0.0.1"), 24)) == set()
    assert routes.apply(Address(VTI7, packed("10.99.0.1"), 30)) == {7}
    of_link, of_vti = {packed("10.0.0.1"), packed("fd00::1")}, {packed("10.99.0.1")}
    assert routes.addresses_by_table() == {0: of_link | of_vti}
    for table in (100, 200):
        assert routes.apply(Link(LINK, "eth0", True, 0, table)) == {0}
        assert routes.addresses_by_table() == {0: of_vti, table: of_link}
    routes.apply(Link(VTI7, "vti7", True, 7, 200))
    assert routes.addresses_by_table() == {200: of_link | of_vti}
    assert routes.apply(Link(LINK, "eth0", True)) == {0}
    assert routes.addresses_by_table() == {0: of_link, 200: of_vti}
    assert routes.apply(AddressGone(Address(LINK, packed("10.0.0.1"), 24))) == {0}
    assert routes.addresses_by_table() == {0: {packed("fd00::1")}, 200: of_vti}
    assert routes.apply(LinkGone(LINK)) == {0}
    assert routes.addresses_by_table() == {200: of_vti}
    for address in ("169.254.0.9", "fe80::1"):
        assert routes.apply(Address(VTI7, packed(address), 30)) == {7}
    assert routes.addresses_by_table() == {200: of_vti | {packed("169.254.0.9")}}


def test_own_addresses_are_those_of_a_dump() -> None:
    routes = filled()
    vrf, plain = Link(LINK, "eth0", True, 0, 100), Link(LINK + 1, "eth1", True)
    addresses = tuple(Address(index, packed(f"10.0.{index}.1"), 24) for index in (LINK, LINK + 1))
    assert routes.replace(RouteDump((vrf, plain), addresses, ())) == {0, 7, 8}  # and the VTIs are gone
    assert routes.addresses_by_table() == {100: {packed(f"10.0.{LINK}.1")}, 0: {packed(f"10.0.{LINK + 1}.1")}}


def test_destinations_that_are_asked_for_are_kept_whatever_their_links() -> None:
    routes = filled(route("10.0.0.0/8", VTI7))
    routes.keep_destinations({to(NET4)})
    assert routes.stale
    dump = RouteDump((Link(VTI7, "vti7", True, 7),), (), (route("10.0.0.0/8", VTI7), route(NET4, LINK)))
    assert routes.replace(dump) == {0, 8}  # and vti8 is gone
    assert routes.next_hops()[to(NET4)] == (NextHop(0, 1, LINK, None),)
    assert routes.apply(gone(NET4, LINK)) == {0}
    assert to(NET4) not in routes.next_hops()
    assert routes.apply(new(NET4, LINK)) == {0}
    routes.keep_destinations({to(NET4)})
    assert not routes.stale


# Socket and follower, with the kernel of this machine


class Following:
    """A follower, its model, and how often it has looked."""

    def __init__(self, rx_buffer_size: int = 0) -> None:
        self.routes = KernelRoutes()
        self.source = VethsAsVtis(self.routes.watch, rx_buffer_size)
        self.follower = RouteFollower(self.source, self.routes)
        self.dumps = 0
        take = self.source.dump

        async def counted() -> RouteDump:
            self.dumps += 1
            return await take()

        self.source.dump = counted  # type: ignore[method-assign]  # to count

    async def settle(self) -> set[int]:
        """Follow until the kernel has said all, and return what changed."""
        changed: set[int] = set()
        while True:
            try:
                async with asyncio.timeout(QUIET_S):
                    changed |= await self.follower.changed(1000)
            except TimeoutError:
                if not self.routes.stale:
                    return changed


def with_kernel(story: Callable[[Following], Coroutine[Any, Any, None]], rx_buffer_size: int = 0) -> None:
    def work() -> None:
        async def run() -> None:
            following = Following(rx_buffer_size)
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await story(following)
            finally:
                following.source.close()

        ip("link set lo up")
        asyncio.run(run())

    in_new_netns(work)


def test_follows_a_kernel_from_no_vti_to_none() -> None:
    async def story(following: Following) -> None:
        assert await following.settle() == set()
        ip(*links("eth0"), "addr add 10.0.0.1/24 dev eth0", "route add 10.1.0.0/16 via 10.0.0.9")
        assert await following.settle() == {0}
        assert following.routes.addresses_by_table() == {0: {packed("10.0.0.1")}}
        assert following.dumps == 1
        ip(*links("vti7"), "addr add 10.99.0.1/30 dev vti7", "route add 10.1.0.0/16 dev vti7 metric 5")
        assert await following.settle() == {0, 7}
        assert shown(following.routes) == {"10.99.0.0/30": "7*1"}, "the other link's metric is better"
        ip("route del 10.1.0.0/16 via 10.0.0.9")
        assert await following.settle() == {0, 7}
        assert shown(following.routes)["10.1.0.0/16"] == "7*1"
        ip("link set vti7 down")
        assert await following.settle() == {7}
        assert shown(following.routes) == {}
        ip("link del vti7")
        assert await following.settle() == {7}
        assert following.routes.if_ids() == set()

    with_kernel(story)


def test_a_next_hop_of_the_other_family_is_known_for_one() -> None:
    async def story(following: Following) -> None:
        ip(*links("eth0", "vti7"), "addr add 10.0.0.1/24 dev eth0", "addr add 10.99.0.1/30 dev vti7")
        ip("route add 10.1.0.0/16 nexthop dev vti7 nexthop via inet6 fe80::9 dev eth0")
        await following.settle()
        assert {way.gateway for way in following.routes.next_hops()[to("10.1.0.0/16")]} == {None, packed("fe80::9")}

    with_kernel(story)


def test_the_routers_own_addresses_are_followed_with_and_without_a_vti() -> None:
    async def story(following: Following) -> None:
        await following.settle()
        assert following.routes.addresses_by_table() == {}
        ip(*links("eth0"), "addr add 10.0.0.1/24 dev eth0", "addr add 10.0.0.2/32 dev lo")
        assert await following.settle() == {0}
        assert following.routes.addresses_by_table() == {0: {packed("10.0.0.1"), packed("10.0.0.2")}}
        assert following.dumps == 1, "events tell of them whole"
        ip(*links("vti7"), "addr add 10.99.0.1/30 dev vti7", "addr add fd99::1/64 dev vti7 nodad")
        await following.settle()
        assert following.routes.addresses_by_table()[0] >= {packed("10.0.0.1"), packed("10.99.0.1"), packed("fd99::1")}
        ip("addr del 10.0.0.1/24 dev eth0", "link del vti7")
        await following.settle()
        assert following.routes.addresses_by_table() == {0: {packed("10.0.0.2")}}

    with_kernel(story)


def test_what_events_tell_whole_takes_no_dump() -> None:
    async def story(following: Following) -> None:
        ip(*links("vti7", "vti8", "eth0"), "route add 10.1.0.0/16 dev vti7")
        await following.settle()
        dumps = following.dumps
        ip("route replace 10.1.0.0/16 dev vti8", "route add 10.1.0.0/16 dev vti7 metric 7")
        ip(
            "route del 10.1.0.0/16 dev vti8",
            "route del 10.1.0.0/16 dev vti7 metric 7",
            "route add 10.1.0.0/16 dev vti8",
        )
        ip("route add 172.16.0.0/12 dev eth0")
        assert await following.settle() == {7, 8}
        assert shown(following.routes) == {"10.1.0.0/16": "8*1"}
        assert following.dumps == dumps

    with_kernel(story)


def test_foreign_routes_are_neither_decoded_nor_kept() -> None:
    async def story(following: Following) -> None:
        ip(*links("vti7", "eth0"), "addr add 10.0.0.1/24 dev eth0", "route add 10.1.0.0/16 dev vti7")
        ip(*(f"route add 172.16.{n}.0/24 via 10.0.0.9" for n in range(200)))
        await following.settle()
        ip(*(f"route add 172.17.{n}.0/24 via 10.0.0.9" for n in range(200)))
        assert following.source.queued(1000) == []
        await following.settle()
        assert following.routes.next_hops().keys() == {to("10.1.0.0/16")}

    with_kernel(story)


def test_a_dump_can_be_asked_for_while_the_follower_waits() -> None:
    async def story(following: Following) -> None:
        ip(*links("vti7", "eth0"), "route add 10.0.0.0/8 dev vti7", "route add 10.1.0.0/16 dev eth0")
        await following.settle()
        waiting = asyncio.create_task(following.follower.changed(1000))
        await asyncio.sleep(0)
        following.follower.keep_destinations({to("10.1.0.0/16"), to("10.2.0.0/16")})
        assert await waiting == {0}
        assert [way.if_id for way in following.routes.next_hops()[to("10.1.0.0/16")]] == [0]
        dumps = following.dumps
        waiting = asyncio.create_task(following.follower.changed(1000))
        await asyncio.sleep(0)
        following.follower.resync()
        ip("route add 10.2.0.0/16 dev eth0")
        assert await waiting == {0}
        await following.settle()
        assert following.dumps == dumps + 1
        assert following.routes.next_hops().keys() == {to("10.0.0.0/8"), to("10.1.0.0/16"), to("10.2.0.0/16")}

    with_kernel(story)


def test_overflow_is_made_up_for_by_a_dump() -> None:
    async def story(following: Following) -> None:
        ip(*links("vti7"))
        await following.settle()
        before = following.source.overflows
        ip(*(f"route add 10.1.{n}.0/24 dev vti7" for n in range(250)), "route del 10.1.7.0/24 dev vti7")
        assert await following.settle() == {7}
        assert following.source.overflows == before + 1
        assert len(shown(following.routes)) == 249

    with_kernel(story, rx_buffer_size=8192)


def test_says_what_to_set_where_next_hops_are_hidden(caplog: pytest.LogCaptureFixture) -> None:
    async def story(following: Following) -> None:
        hide_next_hops()
        ip(*links("vti7"))
        await following.settle()
        ip("link set vti7 down")
        await following.settle()

    with caplog.at_level(logging.WARNING):
        with_kernel(story)
    assert [record.getMessage() for record in caplog.records] == [
        "routes that use next hop objects do not say where they lead, so those over a VTI are not seen: "
        "set net.ipv4.nexthop_compat_mode to 1"
    ]


def hide_next_hops() -> None:
    Path("/proc/sys/net/ipv4/nexthop_compat_mode").write_text("0")


def ip_whatever(commands: list[str]) -> None:
    """Run commands of `ip`, some of which may be refused."""
    lines = "\n".join(commands)
    subprocess.run(["ip", "-force", "-batch", "-"], input=lines, text=True, capture_output=True, timeout=30)


def random_command(dice: random.Random) -> str:
    """Return one of the many things that an operator or a routing daemon may do, most of them to a few destinations."""
    link = dice.choice(["vti7", "vti8", "eth0"])
    six = dice.random() < 0.4
    net = dice.choice(["fd01::/48", "fd02::/48", "::/0"] if six else ["10.1.0.0/16", "10.1.0.0/24", "0.0.0.0/0"])
    hop = {"vti7": "fd97::9", "vti8": "fd98::9", "eth0": "fd90::9"} if six else {"eth0": "10.0.0.9"}
    via = f"via {hop[link]} " if link in hop and (six or dice.random() < 0.8) else ""
    table = dice.choice(["", "", "", "table 10"])
    metric = dice.choice(["metric 5", "metric 10", "metric 20"])
    draw = dice.random()
    if draw < 0.62:
        verb = dice.choice(["add", "add", "append", "replace", "prepend", "del", "del"])
        return f"route {verb} {net} {via}dev {link} {metric} {table}"
    if draw < 0.74:
        hops = " ".join(
            f"nexthop {f'via {hop[name]} ' if name in hop else ''}dev {name} weight {dice.randint(1, 3)}"
            for name in dice.sample(["vti7", "vti8", "eth0"], 2)
        )
        return f"route {dice.choice(['replace', 'append', 'del'])} {net} {metric} {table} {hops}"
    if draw < 0.82:
        return f"link set {dice.choice(['vti7', 'vti8', 'eth0', 'peth0'])} {dice.choice(['up', 'up', 'down'])}"
    if draw < 0.86:
        return f"route {dice.choice(['add', 'del'])} blackhole {net} {metric} {table}"
    if draw < 0.91:
        number = dice.choice([1, 2])
        return f"nexthop {dice.choice(['replace', 'replace', 'del'])} id {number}" + f" dev {link}" * (draw < 0.895)
    if draw < 0.95:
        return f"route replace {dice.choice(['10.1.0.0/16', '10.3.0.0/16'])} {metric} nhid {dice.choice([1, 2])}"
    return f"addr {dice.choice(['add', 'del'])} 10.0.0.1/24 dev eth0"


def seen(routes: KernelRoutes) -> tuple[object, ...]:
    return shown(routes), routes.link(7), routes.link(8), routes.addresses_by_table()


PLACES = ("10.1.0.5", "10.1.9.9", "10.3.0.1", "fd01::5", "fd02::5", "192.0.2.1", "2001:db8::1")


def chosen_by_kernel() -> dict[str, set[str]]:
    """Return the links of the route that the kernel finds for each place, where one of them is a VTI."""
    found = {}
    for place in PLACES:
        asked = subprocess.run(["ip", "-j", "route", "get", "fibmatch", place], capture_output=True, timeout=30)
        if asked.returncode == 0 and asked.stdout.strip():
            (answer,) = json.loads(asked.stdout)
            hops = [hop for hop in answer.get("nexthops", [answer]) if "dead" not in hop.get("flags", ())]
            links = {hop["dev"] for hop in hops if "dev" in hop}
            if any(link.startswith("vti") for link in links):
                found[f"{place} by {answer['dst']}"] = links
    return found


def chosen_by_model(routes: KernelRoutes) -> dict[str, set[str]]:
    """Return what `chosen_by_kernel` does, asking the kernel for the prefix alone."""
    names = {0: "eth0", 7: "vti7", 8: "vti8"}
    found = {}
    for place in PLACES:
        asked = subprocess.run(["ip", "-j", "route", "get", "fibmatch", place], capture_output=True, timeout=30)
        if asked.returncode == 0 and asked.stdout.strip():
            dst = json.loads(asked.stdout)[0]["dst"]
            whole = ("::/0" if ":" in place else "0.0.0.0/0") if dst == "default" else dst
            next_hops = routes.next_hops().get(to(whole), ())
            if any(way.if_id for way in next_hops):
                found[f"{place} by {dst}"] = {names[way.if_id] for way in next_hops}
    return found


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_happens_the_model_ends_as_a_dump_says(seed: int) -> None:
    dice = random.Random(seed)

    async def story(following: Following) -> None:
        ip(*links("vti7", "vti8", "eth0"), "addr add 10.0.0.1/24 dev eth0")
        ip(
            *(
                f"addr add {net}::1/64 dev {name} nodad"
                for name, net in (("vti7", "fd97"), ("vti8", "fd98"), ("eth0", "fd90"))
            )
        )
        routes = following.routes
        await following.settle()
        most = 0
        for _ in range(12):
            commands = [random_command(dice) for _ in range(dice.randint(1, 12))]
            ip_whatever(commands)
            for _ in range(40):  # the kernel may tell of a carrier a second late, of a tentative address two
                await following.settle()
                fresh = KernelRoutes()
                fresh.replace(await following.source.dump())
                if seen(routes) == seen(fresh):
                    break
            assert seen(routes) == seen(fresh), commands
            assert chosen_by_model(routes) == chosen_by_kernel(), commands
            most = max(most, len(shown(routes)))
        assert most > 2

    with_kernel(story)
