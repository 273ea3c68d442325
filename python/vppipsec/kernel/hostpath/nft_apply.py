"""Makes the kernel mark packets of some SAs, and route them to host interfaces. `nft_ruleset` explains the method.

An nftables table sets the marks. The program nft replaces it as a whole if it differs. Each host interface and family needs a
routing rule for its mark, and a routing table with one route. IPv6 also needs an XFRM policy.

No packet leaves unencrypted, whichever of these objects exist. While some are missing, the kernel encrypts. So a run loads the
nftables table after it adds routes, and before it removes routes.
"""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Collection, Mapping, Set
from functools import partial
from typing import Any, NamedTuple

from vppipsec.kernel.hostpath.netlink_changes import GONE_ERRNOS, ChangeRunner
from vppipsec.kernel.hostpath.nft_ruleset import (
    PASS_IN_POLICY,
    HostLink,
    TunnelSas,
    is_loaded,
    pass_out_policy,
    ruleset,
)
from vppipsec.kernel.netlink.messages import error_of
from vppipsec.kernel.netlink.socket import READ_SIZE, open_netlink
from vppipsec.kernel.netlink.wire import AF_INET, AF_INET6, NLMSG_ERROR, message_type, messages_in
from vppipsec.kernel.ownership import FULL_MASK, MARK_OUT, NFT_TABLE, ROUTE_METRIC, ROUTE_PROTOCOL
from vppipsec.kernel.xfrm.events import PolicyAdded
from vppipsec.kernel.xfrm.messages import policy_request
from vppipsec.kernel.xfrm.socket import NETLINK_XFRM
from vppipsec.kernel.xfrm.values import MsgType, Policy
from vppipsec.kernel.xfrm.wire import decode_xfrm

_RULE_PREFERENCE = 218
"""Preference of the service's rules. The rules of an IKE daemon come later (strongSwan: 220)."""
_ROUTE_MTU_BYTES = 1460
"""MTU of the service's routes, bytes. No tunnel over a link with an MTU of 1500 carries longer packets.

TCP takes its segment size from it, so it needs no path MTU discovery. Host interfaces accept longer packets; those must be
fragmented first. IPv6 packets arrive in fragments that fit the tunnel. IPv4 packets are fragmented again, to this length. So VPP
has to send some ESP packets in fragments, as the kernel does."""
_LINK_SCOPE = 253  # RT_SCOPE_LINK
_IP = {AF_INET: "IPv4", AF_INET6: "IPv6"}
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_NFT_TIMEOUT_S = 20.0


class _Rule(NamedTuple):
    """A routing rule for a mark, for packets that the router itself sends. The mark is also the number of the routing table."""

    family: int
    mark: int
    priority: int = _RULE_PREFERENCE
    mask: int = FULL_MASK

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of pyroute2's `rule`."""
        asked = {"family": self.family, "priority": self.priority, "action": "to_tbl", "table": self.mark}
        return asked | {"fwmark": self.mark, "fwmask": self.mask, "iifname": "lo", "protocol": ROUTE_PROTOCOL}


_FamilyHost = tuple[int, HostLink]
"""A family, and the host interface for its packets."""


class Marking(ChangeRunner):
    """One run. Correct objects stay untouched, also those of an earlier run."""

    def __init__(self, kernel: Any, refused: type[Exception]) -> None:
        """`kernel` is pyroute2's IPRoute. `refused` is the exception that it raises if the kernel refuses."""
        super().__init__(refused)
        self._kernel = kernel

    def run(self, wanted: Mapping[TunnelSas, HostLink]) -> None:
        """Program the wanted marks in the kernel. Raises `refused` and OSError if the kernel cannot be read.

        A failure for one host interface does not affect the others. If nft fails, the loaded table stays, with all that it needs.
        """
        found_rules: list[_Rule] = []
        wanted_hosts = {(sas.family, host) for sas, host in wanted.items()}
        try:
            for family in (AF_INET, AF_INET6):
                rules = self._kernel.get_rules(family=family)
                found_rules += (rule for found in rules if (rule := _decode_rule(family, found)) is not None)
            listing = _listing()
            if not is_loaded(ruleset(wanted), listing):
                _nft("--check", "--file", "-", text=ruleset(wanted))
            routed = self._apply_routes(wanted_hosts, found_rules)
            text = ruleset({sas: host for sas, host in wanted.items() if (sas.family, host) in routed})
            if not is_loaded(text, listing):
                _nft("--file", "-", text=text)
        except (NftError, self._refused) as error:
            if wanted or found_rules:
                self.problems.append(f"policies' packets cannot be marked: {error}")
        else:
            self._remove(found_rules, routed)

    def _apply_routes(self, hosts: Collection[_FamilyHost], found_rules: Collection[_Rule]) -> Set[_FamilyHost]:
        """Add rules, routes and XFRM policies for marked packets. Return the host interfaces that have all of them."""
        ready = {family_host for family_host in sorted(hosts) if self._route_to_host(*family_host, found_rules)}
        if any(family == AF_INET6 for family, _ in ready):
            lets_in = self._try("a policy of XFRM for what comes in", partial(_ensure_policy, PASS_IN_POLICY))
            return {(family, host) for family, host in ready if family == AF_INET or lets_in}
        return ready

    def _route_to_host(self, family: int, host: HostLink, found_rules: Collection[_Rule]) -> bool:
        """Add those of one host interface. The rule is added first and removed last: a later run finds the rest by it."""
        rule = _Rule(family, host.mark)
        add = partial(self._kernel.rule, "add", **rule.arguments())
        route = partial(
            self._kernel.route, "replace", **_route_arguments(rule, host.ifindex), metrics={"mtu": _ROUTE_MTU_BYTES}
        )
        return (
            (rule in found_rules or self._try(f"the {_IP[family]} rule for {host.name}", add))
            and (host.ifindex in self._route_links(rule) or self._try(f"the {_IP[family]} route to {host.name}", route))
            and (
                family == AF_INET
                or self._try(
                    f"a policy of XFRM for {host.name}", partial(_ensure_policy, pass_out_policy(host.ifindex))
                )
            )
        )

    def _route_links(self, rule: _Rule) -> list[int]:
        """Return the ifindex of each route of the service in the table of a rule."""
        try:
            found = list(self._kernel.get_routes(family=rule.family, table=rule.mark))
        except self._refused as error:
            if getattr(error, "code", 0) != errno.ENOENT:  # there is no such table
                raise
            return []
        return [each.get_attr("RTA_OIF") for each in found if each["proto"] == ROUTE_PROTOCOL]

    def _remove(self, found_rules: Collection[_Rule], routed: Set[_FamilyHost]) -> None:
        """Remove rules, routes and XFRM policies of all other host interfaces."""
        kept = {_Rule(family, host.mark) for family, host in routed}
        tables = {(rule.family, rule.mark) for rule in kept}
        if AF_INET6 in {rule.family for rule in found_rules} - {family for family, _ in tables}:
            self._try("to remove a policy of XFRM", partial(_remove_policy, PASS_IN_POLICY))
        for rule in found_rules:
            if (rule.family, rule.mark) not in tables:
                if rule.family == AF_INET6:
                    self._try(
                        "to remove a policy of XFRM",
                        partial(_remove_policy, pass_out_policy(rule.mark - MARK_OUT.value)),
                    )
                for index in self._route_links(rule):
                    change = partial(self._kernel.route, "del", **_route_arguments(rule, index))
                    self._try(f"to remove an {_IP[rule.family]} route", change, GONE_ERRNOS)
            if rule not in kept:
                change = partial(self._kernel.rule, "del", **rule.arguments())
                self._try(f"to remove an {_IP[rule.family]} rule", change, GONE_ERRNOS)


def _decode_rule(family: int, found: Any) -> _Rule | None:
    """Decode a rule; return None for a rule of another program."""
    mark, mask = found.get_attr("FRA_FWMARK") or 0, found.get_attr("FRA_FWMASK") or 0
    if found.get_attr("FRA_PROTOCOL") != ROUTE_PROTOCOL or mark & MARK_OUT.mask != MARK_OUT.value:
        return None
    return _Rule(family, mark, found.get_attr("FRA_PRIORITY") or 0, mask)


def _route_arguments(rule: _Rule, ifindex: int) -> dict[str, Any]:
    """Return the arguments of pyroute2's `route` for a route to a link in the table of a rule."""
    everything = "::/0" if rule.family == AF_INET6 else "0.0.0.0/0"
    asked = {
        "family": rule.family,
        "table": rule.mark,
        "proto": ROUTE_PROTOCOL,
        "priority": ROUTE_METRIC,
        "dst": everything,
    }
    return asked | {"oif": ifindex} | ({} if rule.family == AF_INET6 else {"scope": _LINK_SCOPE})


# nftables


class NftError(Exception):
    """The program nft failed or is missing; the text says why, in a sentence."""


def _listing() -> str:
    """Return the service's table as nft lists it; an empty text if it does not exist. Raises NftError."""
    there = f"table inet {NFT_TABLE}" in _nft("list", "tables").splitlines()
    return _nft("list", "table", "inet", NFT_TABLE) if there else ""


def _nft(*arguments: str, text: str = "") -> str:
    """Run nft and return its output. Raises NftError."""
    command = ("nft", *arguments)
    try:
        ran = subprocess.run(
            command, input=text, capture_output=True, text=True, env=_ENVIRONMENT, timeout=_NFT_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise NftError("there is no program nft: install Debian's package nftables") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NftError(f"the program nft cannot be run: {error}") from error
    if ran.returncode:
        message = ran.stderr.partition("\n")[0]
        raise NftError(f"nft fails: {message.partition('Error: ')[2] or message}")
    return ran.stdout


# XFRM


def _ensure_policy(policy: Policy) -> None:
    """Add a policy if the kernel does not have it. Raises OSError."""
    found = _query_policy(MsgType.GETPOLICY, policy)
    if found is None or (found.action, found.priority) != (policy.action, policy.priority):
        _query_policy(MsgType.UPDPOLICY, policy)


def _remove_policy(policy: Policy) -> None:
    """Remove a policy if the kernel has it. Raises OSError."""
    if _query_policy(MsgType.GETPOLICY, policy) is not None:
        _query_policy(MsgType.DELPOLICY, policy)


def _query_policy(kind: MsgType, policy: Policy) -> Policy | None:
    """Send a request about a policy; return the policy if the answer contains one. Raises OSError."""
    with open_netlink(NETLINK_XFRM, ()) as asking:
        asking.settimeout(_NFT_TIMEOUT_S)
        asking.send(policy_request(kind, policy, 1))
        answer = next(messages_in(asking.recv(READ_SIZE)))
    if message_type(answer) != NLMSG_ERROR:
        event = decode_xfrm(answer)
        return event.policy if isinstance(event, PolicyAdded) else None
    reason = error_of(answer)
    if reason and not (reason == errno.ENOENT and kind is MsgType.GETPOLICY):
        raise OSError(reason, "refused")
    return None
