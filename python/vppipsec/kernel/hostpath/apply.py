"""Programs the kernel to send the router's own packets to host interfaces, if VPP has to encrypt them.

Packets sent on a VTI (an xfrm interface) go to the host interface of their child SA. A tc filter redirects them before the kernel
applies XFRM (xfrmi_xmit). A second filter makes packets from the host interface arrive on the VTI. Packets for policies without
if_id get marks: see `nft_ruleset`. The kernel applies no IPv4 XFRM on host interfaces.

This code handles neither packets nor events, so it may use pyroute2. The service owns rules and routes with its protocol number,
and filters with its preference.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vppipsec.kernel.hostpath.bpf import MATCH_ALL, Choice, choice_program
from vppipsec.kernel.hostpath.netlink_changes import GONE_ERRNOS, ChangeRunner
from vppipsec.kernel.hostpath.nft_apply import Marking
from vppipsec.kernel.hostpath.nft_ruleset import HostLink, TunnelSas
from vppipsec.kernel.hostpath.tc import EGRESS, INGRESS, Redirect, TcFilters
from vppipsec.kernel.netlink.messages import NLM_F_ACK, NLM_F_REQUEST, attribute, error_of
from vppipsec.kernel.netlink.socket import READ_SIZE, open_netlink
from vppipsec.kernel.netlink.wire import AF_INET, HEADER
from vppipsec.kernel.ownership import ROUTE_METRIC

_IFF_UP = 1
_MAX_PROBLEMS_SHOWN = 3
"""An error text has at most this number of problems in full."""


@dataclass(frozen=True, slots=True)
class HostRedirects:
    """Desired redirections to and from host interfaces. Host interfaces are given by name. The default is none.

    `to_host`: ifindex of a VTI -> its policies in the kernel's order. `from_host`: host interface -> ifindex of the VTI on which
    its packets arrive. `marks` is for policies without if_id: SAs that the kernel would use -> host interface.
    """

    to_host: Mapping[int, Sequence[Choice]] = field(default_factory=dict)
    from_host: Mapping[str, int] = field(default_factory=dict)
    marks: Mapping[TunnelSas, str] = field(default_factory=dict)


class HostError(Exception):
    """Some changes failed; the text says which and why, in sentences. A failed change leaves the kernel's object as it was.

    `mark_problem` has the problems that concern only policies without if_id. `other_problem` has the rest.
    """

    def __init__(self, other_problem: str, mark_problem: str = "") -> None:
        super().__init__("; ".join(filter(None, (other_problem, mark_problem))))
        self.other_problem = other_problem
        self.mark_problem = mark_problem


def apply_host_redirects(wanted: HostRedirects) -> None:
    """Program `wanted` in the kernel of this network namespace. On return the kernel has acknowledged all changes.

    Correct objects stay untouched, also those of an earlier run. New filters are added before the old ones are removed. The call
    blocks for some milliseconds. Raises HostError; the caller may then call again.
    """
    try:
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError as Refused
    except ImportError as error:
        raise HostError(f"the Python module pyroute2 cannot be used: {error}") from None
    try:
        with IPRoute(strict_check=True) as kernel:
            work = _HostChanges(kernel, Refused)
            work.run(wanted)
    except (OSError, Refused) as error:
        raise HostError(f"the kernel's links, rules and routes cannot be read: {error}") from error
    if work.problems or work.marking.problems:
        raise HostError(_sentences(work.problems), _sentences(work.marking.problems))


def _sentences(problems: list[str]) -> str:
    more = len(problems) - _MAX_PROBLEMS_SHOWN
    return "; ".join(problems[:_MAX_PROBLEMS_SHOWN]) + (f"; and {more} more" if more > 0 else "")


class _HostChanges(ChangeRunner):
    """One run. `marking` handles policies without if_id and keeps its own list of problems."""

    def __init__(self, kernel: Any, refused: type[Exception]) -> None:
        super().__init__(refused)
        self.marking = Marking(kernel, refused)
        self._kernel = kernel
        self._names: dict[int, str] = {}

    def run(self, wanted: HostRedirects) -> None:
        links = list(self._kernel.get_links())
        self._names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in links}
        kinds = {
            link.get_attr("IFLA_IFNAME"): _nested_attribute(link, "IFLA_LINKINFO", "IFLA_INFO_KIND") for link in links
        }
        names = {*wanted.from_host, *wanted.marks.values()}
        names |= {host for choices in wanted.to_host.values() for _, _, host in choices if host}
        up = {link.get_attr("IFLA_IFNAME") for link in links if link["flags"] & _IFF_UP}
        hosts = self._configured_hosts(sorted(names), kinds, up)
        with TcFilters() as filters:
            self._apply_filters(wanted, hosts, filters)
        self.marking.run({sas: HostLink(name, hosts[name]) for sas, name in wanted.marks.items() if name in hosts})

    def _configured_hosts(self, names: Iterable[str], kinds: Mapping[str, str | None], up: Set[str]) -> dict[str, int]:
        """Configure host interfaces. Return those that are configured: name -> ifindex."""
        indices = {name: index for index, name in self._names.items()}
        configured = {}
        for name in names:
            if name not in indices:
                self.problems.append(f"there is no interface {name}")
            elif kinds[name] != "tun":
                self.problems.append(f"the interface {name} is not a tun interface, so not VPP's: give it another name")
            elif self._try(f"the settings of {name}", partial(self._configure, indices[name], name in up)):
                configured[name] = indices[name]
        return configured

    def _configure(self, index: int, is_up: bool) -> None:
        """Turn XFRM off on a host interface, and set it up.

        Its addresses stay. If its link-local address goes, VPP's linux-nl disables IPv6 on the tunnel interface
        (lcp_router_link_addr_add_del, src/plugins/linux-cp/lcp_router.c).
        """
        if not _has_devconf(self._names[index]):
            _set_devconf(index)
        if not is_up:
            self._kernel.link("set", index=index, state="up")

    def _apply_filters(self, wanted: HostRedirects, hosts: Mapping[str, int], filters: TcFilters) -> None:
        """Add and remove filters. Filters from host interfaces come before those to them; new ones before old ones go."""
        want = [
            Redirect(hosts[host], INGRESS, vti, MATCH_ALL) for host, vti in wanted.from_host.items() if host in hosts
        ]
        for vti, choices in wanted.to_host.items():
            names = dict.fromkeys(host for _, _, host in choices if host in hosts)
            want += [Redirect(vti, EGRESS, hosts[host], choice_program(choices, host)) for host in names]
        for vti in {*wanted.to_host, *wanted.from_host.values()} - self._names.keys():
            self.problems.append(f"there is no interface with index {vti} any more")
        want = [each for each in want if {each.ifindex, each.target} <= self._names.keys()]
        kinds = [(each["index"], each.get_attr("TCA_KIND")) for each in self._kernel.get_qdiscs()]
        qdiscs = {index for index, kind in kinds if kind == "clsact"}
        for index in {index for index, kind in kinds if kind == "ingress"} & {each.ifindex for each in want}:
            self.problems.append(f"{self._names[index]} has a qdisc of kind ingress where clsact is needed")
            want = [each for each in want if each.ifindex != index]
        found = {
            index: [each for hook in (INGRESS, EGRESS) for each in filters.list_filters(index, hook)]
            for index in qdiscs
        }
        of_service = [each for index in qdiscs for each in found[index] if each.preference == ROUTE_METRIC]
        there = {each.redirect for each in of_service}
        for redirect in want:
            if redirect not in there:
                self._try(self._filter_name(redirect), partial(self._add_redirect, redirect, qdiscs, filters))
        gone = [each for each in of_service if each.redirect not in want]
        for each in gone:
            self._try(f"to remove {self._filter_name(each.redirect)}", partial(filters.delete, each), GONE_ERRNOS)
        for index in {each.redirect.ifindex for each in gone} - {each.ifindex for each in want}:
            if all(each in gone for each in found[index]):
                what = f"to remove the qdisc of {self._names.get(index, index)}"
                self._try(what, partial(self._kernel.tc, "del", "clsact", index=index), GONE_ERRNOS)

    def _add_redirect(self, redirect: Redirect, qdiscs: set[int], filters: TcFilters) -> None:
        if redirect.ifindex not in qdiscs:
            self._kernel.tc("add", "clsact", index=redirect.ifindex)
            qdiscs.add(redirect.ifindex)
        filters.add(redirect, ROUTE_METRIC)

    def _filter_name(self, redirect: Redirect) -> str:
        ends = (self._names.get(index, f"link {index}") for index in (redirect.ifindex, redirect.target))
        return "a filter from {} to {}".format(*ends)


def _nested_attribute(message: Any, *names: str) -> Any:
    """Return the value of a nested attribute, None if it or an attribute around it is absent."""
    for name in names:
        message = None if message is None else message.get_attr(name)
    return message


# Requests that pyroute2 cannot make

_SETLINK = 19
_IFINFO = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, ifindex, flags, change
_SETTINGS = {"rp_filter": (8, 0), "disable_xfrm": (15, 1), "disable_policy": (16, 1), "src_valid_mark": (24, 1)}
"""Settings of a host interface: the kernel's name -> number (IPV4_DEVCONF_*, include/uapi/linux/ip.h) and value."""
_PROC = Path("/proc/sys/net")


def _set_devconf(index: int) -> None:
    """Set a link's IPv4 settings by netlink, since /proc/sys may be read-only for the service. Raises OSError."""
    body = b"".join(attribute(number, struct.pack("=I", value)) for number, value in _SETTINGS.values())
    for kind in (1, AF_INET, 26):  # IFLA_INET_CONF in AF_INET in IFLA_AF_SPEC
        body = attribute(kind, body)
    body = _IFINFO.pack(0, 0, index, 0, 0) + body
    with open_netlink(0, ()) as asking:
        asking.settimeout(5)
        asking.send(HEADER.pack(HEADER.size + len(body), _SETLINK, NLM_F_REQUEST | NLM_F_ACK, 1, 0) + body)
        if reason := error_of(asking.recv(READ_SIZE)):
            raise OSError(reason, "refused")


def _has_devconf(name: str) -> bool:
    """Return whether a link has all of `_SETTINGS`."""
    place = _PROC / "ipv4/conf" / name
    try:
        return all((place / key).read_text().strip() == str(value) for key, (_, value) in _SETTINGS.items())
    except OSError:
        return False
