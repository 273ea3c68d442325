"""What the kernel sends to host interfaces: packets of the router itself that somebody else is to encrypt, and those alone.

For policies without if_id, of IPv4, a routing table of ours leads there, which rules ask for packets that the router itself
sends. The rules lead around it, in this order: packets in VRFs, IKE (UDP from ports 500 and 4500, a peer may be within a
destination), and what is for the router itself, since the table of local addresses is not asked first where there are VRFs.
Between those and the table go policies that name a protocol or ports: rules of their own, in the kernel's order, each to a table
with a route to one host interface, or past it.

What is sent on a VTI (an xfrm interface) is redirected to its child's host interface before the kernel applies XFRM to it
(xfrmi_xmit), and what comes in there is as if it had come in on the VTI. On host interfaces the kernel applies no XFRM of IPv4.
IPv6 of policies without if_id goes another way, which `marks` explains.

This is no way of packets or events, so pyroute2 does it. Ours are rules and routes of our protocol number, and filters of our
preference.
"""

from __future__ import annotations

import errno
import ipaddress
import itertools
import socket
import struct
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vppipsec.xfrm.changes import GONE, PROTOCOL, TABLE, Attempts
from vppipsec.xfrm.choices import ALL, Choice, chosen
from vppipsec.xfrm.filters import EGRESS, INGRESS, Filters, Redirect
from vppipsec.xfrm.marking import Marking
from vppipsec.xfrm.marks import Host, TunnelSas
from vppipsec.xfrm.netlink import READ_SIZE, open_netlink
from vppipsec.xfrm.request import NLM_F_ACK, NLM_F_REQUEST, error_of
from vppipsec.xfrm.wire import AF_INET, HEADER

MTU = 1360
"""Longest packet along our routes, bytes: with whatever ESP adds it fits into 1500, and into PPPoE's 1492. Host interfaces keep
theirs, which VPP's linux-nl would take for the tunnel's."""
_END, _LEADING, _NARROW = 219, 218, 217
"""Preferences: of the last of our rules, of those that lead to our table, of those of policies that name a protocol. An IKE
daemon's own come after (strongSwan: 220)."""
_LOCAL_TABLE = 255
_TO_TABLE, _GOTO, _NOTHING = 1, 2, 3  # FR_ACT_TO_TBL, FR_ACT_GOTO, FR_ACT_NOP
_THROW = 9  # RTN_THROW
_IFF_UP = 1
_LINK_SCOPE = 253  # RT_SCOPE_LINK
_TOLD = 3
"""Of many problems so many are told in full."""

Net = tuple[bytes, int]
"""An IPv4 prefix: address in network byte order, length in bits."""
Ports = tuple[int, int]
"""A range of ports in host order, with both ends: from 1 to 65534, since rules know no others."""


class HostRoute(NamedTuple):
    """To which host interface the router's own packets for a destination go, and from which address if none was chosen."""

    host: str
    source: bytes


class Aside(Enum):
    """Where packets go that a rule keeps from the rules after it: as without us, or where `routes` say."""

    KERNEL = _END
    ROUTES = _LEADING


class HostRule(NamedTuple):
    """Packets that the first rule which matches decides about. `to` is a host interface, by name, or what keeps them from one.

    `own` is the address that packets get which are from none yet; without it, and with a host interface, they are not matched.
    It is the same for all rules to a host interface that have one, and one has. Any ports are None.
    """

    source: Net
    destination: Net
    proto: int
    to: str | Aside
    own: bytes = b""
    sports: Ports | None = None
    dports: Ports | None = None


@dataclass(frozen=True, slots=True)
class HostWays:
    """What the kernel shall send to host interfaces, which are given by name. The default is nothing at all.

    `routes` are for packets from `sources`, or from no address yet; `throws` are destinations within them that go on as without
    us, and go before a route for the same; `rules` are asked before them. `out` is by ifindex of a VTI: its policies in the
    kernel's order. `back` are host interfaces whose packets arrive as if on a VTI, by its ifindex. `marks` are for IPv6, by the
    SAs that the kernel would use.
    """

    routes: Mapping[Net, HostRoute] = field(default_factory=dict)
    sources: frozenset[Net] = frozenset()
    throws: frozenset[Net] = frozenset()
    rules: Sequence[HostRule] = ()
    out: Mapping[int, Sequence[Choice]] = field(default_factory=dict)
    back: Mapping[str, int] = field(default_factory=dict)
    marks: Mapping[TunnelSas, str] = field(default_factory=dict)


class HostError(Exception):
    """Not all came about; the text says what and why, in sentences. What could not be changed is as it was.

    `of_marks` is what of it concerns IPv6 by policies without if_id alone, `of_others` the rest.
    """

    def __init__(self, of_others: str, of_marks: str = "") -> None:
        super().__init__("; ".join(filter(None, (of_others, of_marks))))
        self.of_others = of_others
        self.of_marks = of_marks


class _Rule(NamedTuple):
    """A routing rule. `to` is a table, or the preference that a GOTO goes on at.

    `serial` tells rules apart that the kernel would take for one: it is a firewall mark under a mask of 0, which every packet
    has. It finds a rule to remove by what is asked for alone, whatever else the rule asks for (rule_find, net/core/fib_rules.c).
    """

    priority: int
    action: int
    to: int = 0
    own: bool = True
    source: Net | None = None
    destination: Net | None = None
    proto: int = 0
    sports: str = ""
    dports: str = ""
    vrf: bool = False
    serial: int = 0

    def arguments(self) -> dict[str, Any]:
        """Return it as pyroute2 takes it."""
        name = {_TO_TABLE: "to_tbl", _GOTO: "goto", _NOTHING: "nop"}[self.action]
        asked: dict[str, Any] = {"family": AF_INET, "priority": self.priority, "action": name, "protocol": PROTOCOL}
        if self.action != _NOTHING:
            asked["table" if self.action == _TO_TABLE else "goto"] = self.to
        if self.own:
            asked["iifname"] = "lo"
        for key, net in (("src", self.source), ("dst", self.destination)):
            if net is not None:
                asked |= {key: _text(net[0]), f"{key}_len": net[1]}
        if self.proto:
            asked["ip_proto"] = self.proto
        asked |= {f"{key}_range": ports for key, ports in (("sport", self.sports), ("dport", self.dports)) if ports}
        if self.vrf:
            asked["l3mdev"] = 1
        if self.serial:
            asked |= {"fwmark": self.serial, "fwmask": 0}
        return asked


class _Route(NamedTuple):
    """A route of a table of ours, a throw where it has no link."""

    net: Net
    ifindex: int = 0
    source: bytes = b""
    table: int = TABLE

    def arguments(self) -> dict[str, Any]:
        """Return it as pyroute2 takes it."""
        net = f"{_text(self.net[0])}/{self.net[1]}"
        asked = {"family": AF_INET, "table": self.table, "proto": PROTOCOL, "priority": TABLE, "dst": net}
        if not self.ifindex:
            return asked | {"type": _THROW}
        return asked | {
            "oif": self.ifindex,
            "prefsrc": _text(self.source),
            "scope": _LINK_SCOPE,
            "metrics": {"mtu": MTU},
        }


_FIXED = (
    _Rule(_END, _NOTHING, own=False),
    _Rule(_NARROW - 4, _GOTO, _END, own=False, vrf=True),
    _Rule(_NARROW - 3, _GOTO, _END, proto=socket.IPPROTO_UDP, sports="500:500"),
    _Rule(_NARROW - 2, _GOTO, _END, proto=socket.IPPROTO_UDP, sports="4500:4500"),
    _Rule(_NARROW - 1, _TO_TABLE, _LOCAL_TABLE),
)
"""The rules around those that lead to our tables, in the order in which they are made."""
_ANY: Net = (bytes(4), 0)
_NO_SOURCE: Net = (bytes(4), 32)


def bring_about(wanted: HostWays) -> None:
    """Bring the kernel of this network namespace to what is wanted; it has acknowledged all of it when this returns.

    What is right stays untouched, be it of an earlier run; what is not wanted goes before anything new leads to a host interface.
    It blocks for some milliseconds. Raises HostError; to call again is right then.
    """
    try:
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError as Refused
    except ImportError as error:
        raise HostError(f"the Python module pyroute2 cannot be used: {error}") from None
    try:
        with IPRoute(strict_check=True) as kernel:
            work = _Work(kernel, Refused)
            work.run(wanted)
    except (OSError, Refused) as error:
        raise HostError(f"the kernel's links, rules and routes cannot be read: {error}") from error
    if work.problems or work.marking.problems:
        raise HostError(_sentences(work.problems), _sentences(work.marking.problems))


def _sentences(problems: list[str]) -> str:
    more = len(problems) - _TOLD
    return "; ".join(problems[:_TOLD]) + (f"; and {more} more" if more > 0 else "")


class _Work(Attempts):
    """One run. `marking` is its part for IPv6 policies, whose problems are told apart."""

    def __init__(self, kernel: Any, refused: type[Exception]) -> None:
        super().__init__(refused)
        self.marking = Marking(kernel, refused)
        self._kernel = kernel
        self._names: dict[int, str] = {}

    def run(self, wanted: HostWays) -> None:
        links = list(self._kernel.get_links())
        self._names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in links}
        kinds = {link.get_attr("IFLA_IFNAME"): _inner(link, "IFLA_LINKINFO", "IFLA_INFO_KIND") for link in links}
        names = {route.host for route in wanted.routes.values()} | {*wanted.back}
        names |= {host for choices in wanted.out.values() for _, _, host in choices if host}
        names |= {rule.to for rule in wanted.rules if isinstance(rule.to, str)}
        names.update(wanted.marks.values())
        up = {link.get_attr("IFLA_IFNAME") for link in links if link["flags"] & _IFF_UP}
        hosts = self._settled(sorted(names), kinds, up)
        with Filters() as filters:
            self._redirect(wanted, hosts, filters)
        self._route(wanted, hosts)
        self.marking.run({sas: Host(name, hosts[name]) for sas, name in wanted.marks.items() if name in hosts})

    def _settled(self, names: Iterable[str], kinds: Mapping[str, str | None], up: Set[str]) -> dict[str, int]:
        """Give host interfaces their settings. Return those that have them: name -> ifindex."""
        indices = {name: index for index, name in self._names.items()}
        settled = {}
        for name in names:
            if name not in indices:
                self.problems.append(f"there is no interface {name}")
            elif kinds[name] != "tun":
                self.problems.append(f"the interface {name} is not a tun interface, so not VPP's: give it another name")
            elif self._try(f"the settings of {name}", partial(self._settle, indices[name], name in up)):
                settled[name] = indices[name]
        return settled

    def _settle(self, index: int, is_up: bool) -> None:
        """Keep XFRM off a host interface. Its addresses stay: when its link-local one goes, VPP's linux-nl takes IPv6 from the
        tunnel (lcp_router_link_addr_add_del, src/plugins/linux-cp/lcp_router.c).
        """
        if not _has_devconf(self._names[index]):
            _set_devconf(index)
        if not is_up:
            self._kernel.link("set", index=index, state="up")

    # Policies without if_id

    def _route(self, wanted: HostWays, hosts: Mapping[str, int]) -> None:
        """Bring about rules and routes. Throws are there before routes that they are within, and stay as long as those."""
        led = {net: way for net, way in wanted.routes.items() if net not in wanted.throws and way.host in hosts}
        want = {net: _Route(net, hosts[way.host], way.source) for net, way in led.items()}
        throws = {net: _Route(net) for net in wanted.throws} if want else {}
        held_rules = [rule for found in self._kernel.get_rules(family=AF_INET) if (rule := _rule(found)) is not None]
        held = {route.net: route for route in self._our_routes(TABLE)}
        gone = [route for net, route in held.items() if net not in want and net not in throws]
        self._ask("route", "del", [route for route in gone if route.ifindex], GONE)
        narrow = self._narrow(wanted, hosts, [rule for rule in held_rules if rule.priority == _NARROW])
        sources = [_NO_SOURCE, *sorted(wanted.sources if want else ())]
        leading = [_Rule(_LEADING, _TO_TABLE, TABLE, **_from(source)) for source in sources]
        rules = [*_FIXED, *leading] if want or narrow.rules else []
        is_led = self._ask("rule", "add", [rule for rule in rules if rule not in held_rules])
        if is_led:
            self._lead_narrowly(narrow)
        dropped = [rule for rule in reversed(held_rules) if rule not in rules and rule.priority != _NARROW]
        self._ask("rule", "del", dropped, GONE)
        throwing = [route for net, route in throws.items() if held.get(net) != route]
        if is_led and self._ask("route", "replace", throwing):
            self._ask("route", "replace", [route for net, route in want.items() if held.get(net) != route])
        self._ask("route", "del", [route for route in gone if not route.ifindex], GONE)

    def _narrow(self, wanted: HostWays, hosts: Mapping[str, int], held: Sequence[_Rule]) -> _Narrow:
        """Return what policies that name a protocol call for. A host interface keeps its table."""
        own = {rule.to: rule.own for rule in wanted.rules if rule.to in hosts and rule.own}
        used = {rule.to for rule in held if rule.action == _TO_TABLE}
        held_routes = [route for table in sorted(used) for route in self._our_routes(table)]
        tables = {route.ifindex: route.table for route in held_routes}
        free = (table for table in itertools.count(TABLE + 1) if table not in used)
        routes = {
            host: _Route(_ANY, hosts[host], source, tables.get(hosts[host]) or next(free))
            for host, source in own.items()
            if isinstance(host, str)
        }
        rules: list[_Rule] = []
        for rule in wanted.rules if routes else ():
            route = routes.get(rule.to) if isinstance(rule.to, str) else None
            aside = (
                rule.to if isinstance(rule.to, Aside) else Aside.KERNEL
            )  # what cannot lead there goes on as without us
            action, to = (_GOTO, aside.value) if route is None else (_TO_TABLE, route.table)
            sports, dports = (f"{ports[0]}:{ports[1]}" if ports else "" for ports in (rule.sports, rule.dports))
            sources = (
                [None] if not rule.source[1] else [rule.source] if route and not rule.own else [rule.source, _NO_SOURCE]
            )
            destination = rule.destination if rule.destination[1] else None
            common = _Rule(_NARROW, action, to, True, None, destination, rule.proto, sports, dports)
            rules += [common._replace(source=source) for source in sources]
        return _Narrow(rules, list(routes.values()), held, held_routes)

    def _lead_narrowly(self, narrow: _Narrow) -> None:
        """Bring those rules and routes about. New rules come after the old ones, which then go from the last to the first: so
        each packet goes where it went, or where it is to go, and nowhere else.
        """
        same = sum(1 for _ in itertools.takewhile(_are_alike, zip(narrow.held, narrow.rules, strict=False)))
        last = max((rule.serial for rule in narrow.held), default=0)
        added = [rule._replace(serial=last + number) for number, rule in enumerate(narrow.rules[same:], 1)]
        replaced = [route for route in narrow.routes if route not in narrow.held_routes]
        if self._ask("route", "replace", replaced) and self._ask("rule", "add", added):
            self._ask("rule", "del", narrow.held[same:][::-1], GONE)
            kept = {route.table for route in narrow.routes}
            self._ask("route", "del", [route for route in narrow.held_routes if route.table not in kept], GONE)

    def _our_routes(self, table: int) -> list[_Route]:
        try:
            found = list(self._kernel.get_routes(family=AF_INET, table=table))
        except self._refused as error:
            if getattr(error, "code", 0) != errno.ENOENT:  # there is no such table
                raise
            return []
        return [_route(each, table) for each in found if each["proto"] == PROTOCOL]

    # VTIs

    def _redirect(self, wanted: HostWays, hosts: Mapping[str, int], filters: Filters) -> None:
        """Bring about filters. The way back is there before the way out, and what is new before the old goes."""
        want = [Redirect(hosts[host], INGRESS, vti, ALL) for host, vti in wanted.back.items() if host in hosts]
        for vti, choices in wanted.out.items():
            names = dict.fromkeys(host for _, _, host in choices if host in hosts)
            want += [Redirect(vti, EGRESS, hosts[host], chosen(choices, host)) for host in names]
        for vti in {*wanted.out, *wanted.back.values()} - self._names.keys():
            self.problems.append(f"there is no interface with index {vti} any more")
        want = [each for each in want if {each.ifindex, each.target} <= self._names.keys()]
        kinds = [(each["index"], each.get_attr("TCA_KIND")) for each in self._kernel.get_qdiscs()]
        qdiscs = {index for index, kind in kinds if kind == "clsact"}
        for index in {index for index, kind in kinds if kind == "ingress"} & {each.ifindex for each in want}:
            self.problems.append(f"{self._names[index]} has a qdisc of kind ingress where clsact is needed")
            want = [each for each in want if each.ifindex != index]
        found = {index: [each for hook in (INGRESS, EGRESS) for each in filters.of(index, hook)] for index in qdiscs}
        held = [each for index in qdiscs for each in found[index] if each.preference == TABLE]
        there = {each.redirect for each in held}
        for redirect in want:
            if redirect not in there:
                self._try(self._what(redirect), partial(self._add_redirect, redirect, qdiscs, filters))
        gone = [each for each in held if each.redirect not in want]
        for each in gone:
            self._try(f"to remove {self._what(each.redirect)}", partial(filters.delete, each), GONE)
        for index in {each.redirect.ifindex for each in gone} - {each.ifindex for each in want}:
            if all(each in gone for each in found[index]):
                what = f"to remove the qdisc of {self._names.get(index, index)}"
                self._try(what, partial(self._kernel.tc, "del", "clsact", index=index), GONE)

    def _add_redirect(self, redirect: Redirect, qdiscs: set[int], filters: Filters) -> None:
        if redirect.ifindex not in qdiscs:
            self._kernel.tc("add", "clsact", index=redirect.ifindex)
            qdiscs.add(redirect.ifindex)
        filters.add(redirect, TABLE)

    def _what(self, redirect: Redirect) -> str:
        ends = (self._names.get(index, f"link {index}") for index in (redirect.ifindex, redirect.target))
        return "a filter from {} to {}".format(*ends)

    def _ask(self, kind: str, command: str, of: Iterable[_Rule | _Route], as_good: tuple[int, ...] = ()) -> bool:
        """Ask for changes of rules or routes, and tell whether the kernel made all of them."""
        ask = getattr(self._kernel, kind)
        done = [self._try(_told(each, command), partial(ask, command, **each.arguments()), as_good) for each in of]
        return all(done)


class _Narrow(NamedTuple):
    """Rules and routes that policies call for which name a protocol, without serials, and those that there are."""

    rules: Sequence[_Rule]
    routes: Sequence[_Route]
    held: Sequence[_Rule]
    held_routes: Sequence[_Route]


def _are_alike(rules: tuple[_Rule, _Rule]) -> bool:
    held, wanted = rules
    return held == wanted._replace(serial=held.serial)


def _from(source: Net) -> dict[str, Any]:
    """Return what makes a rule ask for a source. The kernel takes one for all sources for the same as any other."""
    return {"source": source} if source[1] else {"serial": 1}


def _told(each: _Rule | _Route, command: str) -> str:
    what = f"routing rule {each.priority}" if isinstance(each, _Rule) else f"the route for {each.arguments()['dst']}"
    return f"to remove {what}" if command == "del" else what


def _rule(found: Any) -> _Rule | None:
    """Return a rule as read, None where it is not ours."""
    if found.get_attr("FRA_PROTOCOL") != PROTOCOL:
        return None
    action = found["action"]
    to = {_TO_TABLE: found.get_attr("FRA_TABLE"), _GOTO: found.get_attr("FRA_GOTO")}.get(action) or 0
    source, destination = (
        None if (text := found.get_attr(name)) is None else (ipaddress.ip_address(text).packed, found[size])
        for name, size in (("FRA_SRC", "src_len"), ("FRA_DST", "dst_len"))
    )
    sports, dports = (found.get_attr(name) or "" for name in ("FRA_SPORT_RANGE", "FRA_DPORT_RANGE"))
    return _Rule(
        found.get_attr("FRA_PRIORITY"),
        action,
        to,
        found.get_attr("FRA_IIFNAME") == "lo",
        source,
        destination,
        found.get_attr("FRA_IP_PROTO") or 0,
        sports,
        dports,
        bool(found.get_attr("FRA_L3MDEV")),
        found.get_attr("FRA_FWMARK") or 0,
    )


def _route(found: Any, table: int) -> _Route:
    address, source = found.get_attr("RTA_DST"), found.get_attr("RTA_PREFSRC")
    net = (bytes(4) if address is None else ipaddress.ip_address(address).packed, found["dst_len"])
    prefsrc = b"" if source is None else ipaddress.ip_address(source).packed
    return _Route(net, found.get_attr("RTA_OIF") or 0, prefsrc, table)


def _inner(message: Any, *names: str) -> Any:
    """Return what nested attributes hold, None where one is absent."""
    for name in names:
        message = None if message is None else message.get_attr(name)
    return message


def _text(address: bytes) -> str:
    return str(ipaddress.ip_address(address))


# What pyroute2 cannot say

_SETLINK = 19
_IFINFO = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, ifindex, flags, change
_ATTR = struct.Struct("=HH")
_SETTINGS = {"rp_filter": (8, 0), "disable_xfrm": (15, 1), "disable_policy": (16, 1)}
"""Settings of a host interface: number (IPV4_DEVCONF_*, include/uapi/linux/ip.h) and value, by the kernel's name for them."""
_PROC = Path("/proc/sys/net")


def _set_devconf(index: int) -> None:
    """Set IPv4's settings of a link by netlink, since /proc/sys may be read-only for the service. Raises OSError."""
    body = b"".join(_ATTR.pack(8, number) + struct.pack("=I", value) for number, value in _SETTINGS.values())
    for kind in (1, AF_INET, 26):  # IFLA_INET_CONF in AF_INET in IFLA_AF_SPEC
        body = _ATTR.pack(_ATTR.size + len(body), kind) + body
    body = _IFINFO.pack(0, 0, index, 0, 0) + body
    with open_netlink(0, ()) as asking:
        asking.settimeout(5)
        asking.send(HEADER.pack(HEADER.size + len(body), _SETLINK, NLM_F_REQUEST | NLM_F_ACK, 1, 0) + body)
        if reason := error_of(asking.recv(READ_SIZE)):
            raise OSError(reason, "refused")


def _has_devconf(name: str) -> bool:
    """Tell whether IPv4's settings of a link are as they shall be."""
    place = _PROC / "ipv4/conf" / name
    try:
        return all((place / key).read_text().strip() == str(value) for key, (_, value) in _SETTINGS.items())
    except OSError:
        return False
