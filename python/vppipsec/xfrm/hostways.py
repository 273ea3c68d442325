"""What the kernel sends to host interfaces: packets of the router itself that somebody else is to encrypt, and those alone.

For policies without if_id, of IPv4, a routing table of ours leads there, which rules ask for packets that the router itself
sends. The rules lead around it, in this order: packets in VRFs, IKE (UDP from ports 500 and 4500, a peer may be within a
destination), and what is for the router itself, since the table of local addresses is not asked first where there are VRFs.

What is sent on a VTI (an xfrm interface) is redirected to its child's host interface before the kernel applies XFRM to it
(xfrmi_xmit), and what comes in there is as if it had come in on the VTI. On host interfaces the kernel applies no XFRM of IPv4.

This is no way of packets or events, so pyroute2 does it. Ours are rules and routes of our protocol number, and filters of our
preference.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vppipsec.xfrm.netlink import READ_SIZE, open_netlink
from vppipsec.xfrm.request import NLM_F_ACK, NLM_F_REQUEST, NetlinkError, error_of
from vppipsec.xfrm.wire import AF_INET, HEADER

TABLE = 0x4950
"""Our routing table; the preference of our filters, too."""
MTU = 1360
"""Longest packet along our routes, bytes: with whatever ESP adds it fits into 1500, and into PPPoE's 1492. Host interfaces keep
theirs, which VPP's linux-nl would take for the tunnel's."""
PROTOCOL = 73
"""What our rules and routes say made them (FRA_PROTOCOL, rtm_protocol)."""
_END = 219
"""Preference of the last of our rules. An IKE daemon's own come after (strongSwan: 220)."""
_LOCAL_TABLE = 255
_TO_TABLE, _GOTO, _NOTHING = 1, 2, 3  # FR_ACT_TO_TBL, FR_ACT_GOTO, FR_ACT_NOP
_THROW = 9  # RTN_THROW
_IFF_UP = 1
_LINK_SCOPE = 253  # RT_SCOPE_LINK
_INGRESS, _EGRESS = 0xFFFFFFF2, 0xFFFFFFF3  # TC_H_MIN_INGRESS, TC_H_MIN_EGRESS of clsact
_ALL = 3  # ETH_P_ALL
_GONE = (errno.ENOENT, errno.ESRCH, errno.ENODEV)
_TOLD = 3
"""Of many problems so many are told in full."""

Net = tuple[bytes, int]
"""An IPv4 prefix: address in network byte order, length in bits."""


class HostRoute(NamedTuple):
    """To which host interface the router's own packets for a destination go, and from which address if none was chosen."""

    host: str
    source: bytes


@dataclass(frozen=True, slots=True)
class HostWays:
    """What the kernel shall send to host interfaces, which are given by name. The default is nothing at all.

    `routes` are for packets from `sources`, or from no address yet; `throws` are destinations within them that go on as without
    us, and go before a route for the same. `out` is by ifindex of a VTI: where goes what is sent there. `back` are host
    interfaces whose packets arrive as if on a VTI, by its ifindex.
    """

    routes: Mapping[Net, HostRoute] = field(default_factory=dict)
    sources: frozenset[Net] = frozenset()
    throws: frozenset[Net] = frozenset()
    out: Mapping[int, str] = field(default_factory=dict)
    back: Mapping[str, int] = field(default_factory=dict)


class HostError(Exception):
    """Not all came about; the text says what and why, in sentences. What could not be changed is as it was."""


class _Rule(NamedTuple):
    """A routing rule. `to` is a table, or the preference that a GOTO goes on at."""

    priority: int
    action: int
    to: int = 0
    own: bool = True
    source: Net | None = None
    port: str = ""
    vrf: bool = False

    def arguments(self) -> dict[str, Any]:
        """Return it as pyroute2 takes it."""
        name = {_TO_TABLE: "to_tbl", _GOTO: "goto", _NOTHING: "nop"}[self.action]
        asked: dict[str, Any] = {"family": AF_INET, "priority": self.priority, "action": name, "protocol": PROTOCOL}
        if self.action != _NOTHING:
            asked["table" if self.action == _TO_TABLE else "goto"] = self.to
        if self.own:
            asked["iifname"] = "lo"
        if self.source is not None:
            asked |= {"src": _text(self.source[0]), "src_len": self.source[1]}
        if self.port:
            asked |= {"ip_proto": socket.IPPROTO_UDP, "sport_range": self.port}
        if self.vrf:
            asked["l3mdev"] = 1
        return asked


class _Route(NamedTuple):
    """A route of our table, a throw where it has no link."""

    net: Net
    ifindex: int = 0
    source: bytes = b""

    def arguments(self) -> dict[str, Any]:
        """Return it as pyroute2 takes it."""
        net = f"{_text(self.net[0])}/{self.net[1]}"
        asked = {"family": AF_INET, "table": TABLE, "proto": PROTOCOL, "priority": TABLE, "dst": net}
        if not self.ifindex:
            return asked | {"type": _THROW}
        return asked | {
            "oif": self.ifindex,
            "prefsrc": _text(self.source),
            "scope": _LINK_SCOPE,
            "metrics": {"mtu": MTU},
        }


class _Redirect(NamedTuple):
    """A filter that takes all packets of a link, as they come in or go out, to another one."""

    ifindex: int
    hook: int
    target: int


_FIXED = (
    _Rule(_END, _NOTHING, own=False),
    _Rule(_END - 5, _GOTO, _END, own=False, vrf=True),
    _Rule(_END - 4, _GOTO, _END, port="500:500"),
    _Rule(_END - 3, _GOTO, _END, port="4500:4500"),
    _Rule(_END - 2, _TO_TABLE, _LOCAL_TABLE),
)
"""The rules around those that lead to our table, in the order in which they are made."""
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
            problems = _Work(kernel, Refused).run(wanted)
    except (OSError, Refused) as error:
        raise HostError(f"the kernel's links, rules and routes cannot be read: {error}") from error
    if problems:
        more = len(problems) - _TOLD
        raise HostError("; ".join(problems[:_TOLD]) + (f"; and {more} more" if more > 0 else ""))


class _Work:
    """One run. `problems` are what did not come about, in sentences."""

    def __init__(self, kernel: Any, refused: type[Exception]) -> None:
        self.problems: list[str] = []
        self._kernel = kernel
        self._refused = refused
        self._names: dict[int, str] = {}

    def run(self, wanted: HostWays) -> list[str]:
        links = list(self._kernel.get_links())
        self._names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in links}
        kinds = {link.get_attr("IFLA_IFNAME"): _inner(link, "IFLA_LINKINFO", "IFLA_INFO_KIND") for link in links}
        names = {route.host for route in wanted.routes.values()} | {*wanted.out.values(), *wanted.back}
        up = {link.get_attr("IFLA_IFNAME") for link in links if link["flags"] & _IFF_UP}
        hosts = self._settled(sorted(names), kinds, up)
        self._redirect(wanted, hosts)
        self._route(wanted, hosts)
        return self.problems

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
        sources = [_NO_SOURCE, *sorted(wanted.sources)] if want else []
        leading = [_Rule(_END - 1, _TO_TABLE, TABLE, source=source) for source in sources]
        rules = [*_FIXED, *leading] if want else []
        held_rules = [rule for found in self._kernel.get_rules(family=AF_INET) if (rule := _rule(found)) is not None]
        held = {route.net: route for route in self._our_routes()}
        gone = [route for net, route in held.items() if net not in want and net not in throws]
        self._ask("route", "del", [route for route in gone if route.ifindex], _GONE)
        self._ask("rule", "del", [rule for rule in reversed(held_rules) if rule not in rules], _GONE)
        throwing = [route for net, route in throws.items() if held.get(net) != route]
        added = [rule for rule in rules if rule not in held_rules]
        if self._ask("rule", "add", added) and self._ask("route", "replace", throwing):
            self._ask("route", "replace", [route for net, route in want.items() if held.get(net) != route])
        self._ask("route", "del", [route for route in gone if not route.ifindex], _GONE)

    def _our_routes(self) -> list[_Route]:
        try:
            found = list(self._kernel.get_routes(family=AF_INET, table=TABLE))
        except self._refused as error:
            if getattr(error, "code", 0) != errno.ENOENT:  # there is no such table
                raise
            return []
        return [_route(each) for each in found if each["proto"] == PROTOCOL]

    # VTIs

    def _redirect(self, wanted: HostWays, hosts: Mapping[str, int]) -> None:
        """Bring about filters. The way back is there before the way out."""
        back = [_Redirect(hosts[host], _INGRESS, vti) for host, vti in wanted.back.items() if host in hosts]
        out = [_Redirect(vti, _EGRESS, hosts[host]) for vti, host in wanted.out.items() if host in hosts]
        for vti in {*wanted.out, *wanted.back.values()} - self._names.keys():
            self.problems.append(f"there is no interface with index {vti} any more")
        want = [each for each in (*back, *out) if {each.ifindex, each.target} <= self._names.keys()]
        kinds = [(each["index"], each.get_attr("TCA_KIND")) for each in self._kernel.get_qdiscs()]
        qdiscs = {index for index, kind in kinds if kind == "clsact"}
        for index in {index for index, kind in kinds if kind == "ingress"} & {each.ifindex for each in want}:
            self.problems.append(f"{self._names[index]} has a qdisc of kind ingress where clsact is needed")
            want = [each for each in want if each.ifindex != index]
        held = [each for index in qdiscs for each in self._our_redirects(index)]
        gone = [each for each in held if each not in want]
        for each in gone:
            self._try(f"to remove {self._what(each)}", partial(self._delete_redirect, each), _GONE)
        for index in {each.ifindex for each in gone} - {each.ifindex for each in want}:
            if not any(
                True for hook in (_INGRESS, _EGRESS) for _ in self._kernel.get_filters(index=index, parent=hook)
            ):
                what = f"to remove the qdisc of {self._names.get(index, index)}"
                self._try(what, partial(self._kernel.tc, "del", "clsact", index=index), _GONE)
        for each in want:
            if each not in held:
                self._try(self._what(each), partial(self._add_redirect, each, qdiscs))

    def _our_redirects(self, index: int) -> list[_Redirect]:
        found = []
        for hook in (_INGRESS, _EGRESS):
            for each in self._kernel.get_filters(index=index, parent=hook):
                if each["info"] >> 16 == TABLE and each["handle"] & 0xFFF:  # else a hash table of the filter
                    action = ("TCA_OPTIONS", "TCA_U32_ACT", "TCA_ACT_PRIO_1", "TCA_ACT_OPTIONS", "TCA_MIRRED_PARMS")
                    found.append(_Redirect(index, hook, (_inner(each, *action) or {}).get("ifindex", 0)))
        return found

    def _add_redirect(self, redirect: _Redirect, qdiscs: set[int]) -> None:
        if redirect.ifindex not in qdiscs:
            self._kernel.tc("add", "clsact", index=redirect.ifindex)
            qdiscs.add(redirect.ifindex)
        direction = "egress" if redirect.hook == _EGRESS else "ingress"
        action = {"kind": "mirred", "direction": direction, "action": "redirect", "ifindex": redirect.target}
        place = {"index": redirect.ifindex, "parent": redirect.hook, "prio": TABLE, "protocol": _ALL}
        self._kernel.tc("add-filter", "u32", **place, keys=["0x0/0x0+0"], target=0x10001, action=[action])

    def _delete_redirect(self, redirect: _Redirect) -> None:
        info = TABLE << 16 | socket.htons(
            _ALL
        )  # pyroute2 makes this of `prio` only where it adds, and 0 stands for all filters
        self._kernel.tc("del-filter", index=redirect.ifindex, parent=redirect.hook, info=info)

    def _what(self, redirect: _Redirect) -> str:
        ends = (self._names.get(index, f"link {index}") for index in (redirect.ifindex, redirect.target))
        return "a filter from {} to {}".format(*ends)

    def _ask(self, kind: str, command: str, of: Iterable[_Rule | _Route], as_good: tuple[int, ...] = ()) -> bool:
        """Ask for changes of rules or routes, and tell whether the kernel made all of them."""
        ask = getattr(self._kernel, kind)
        done = [self._try(_told(each, command), partial(ask, command, **each.arguments()), as_good) for each in of]
        return all(done)

    def _try(self, what: str, change: Callable[[], object], as_good: tuple[int, ...] = ()) -> bool:
        try:
            change()
        except (self._refused, OSError) as error:
            reason = int(getattr(error, "code", 0) or getattr(error, "errno", 0) or 0)
            if reason not in as_good:
                self.problems.append(str(NetlinkError(what, reason)))
                return False
        return True


def _told(each: _Rule | _Route, command: str) -> str:
    what = f"routing rule {each.priority}" if isinstance(each, _Rule) else f"the route for {each.arguments()['dst']}"
    return f"to remove {what}" if command == "del" else what


def _rule(found: Any) -> _Rule | None:
    """Return a rule as read, None where it is not ours."""
    if found.get_attr("FRA_PROTOCOL") != PROTOCOL:
        return None
    action = found["action"]
    to = {_TO_TABLE: found.get_attr("FRA_TABLE"), _GOTO: found.get_attr("FRA_GOTO")}.get(action) or 0
    source = found.get_attr("FRA_SRC")
    net = None if source is None else (ipaddress.ip_address(source).packed, found["src_len"])
    ports, own = found.get_attr("FRA_SPORT_RANGE") or "", found.get_attr("FRA_IIFNAME") == "lo"
    return _Rule(found.get_attr("FRA_PRIORITY"), action, to, own, net, ports, bool(found.get_attr("FRA_L3MDEV")))


def _route(found: Any) -> _Route:
    address, source = found.get_attr("RTA_DST"), found.get_attr("RTA_PREFSRC")
    net = (bytes(4) if address is None else ipaddress.ip_address(address).packed, found["dst_len"])
    return _Route(net, found.get_attr("RTA_OIF") or 0, b"" if source is None else ipaddress.ip_address(source).packed)


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
