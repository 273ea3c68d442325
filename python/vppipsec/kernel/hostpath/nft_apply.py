"""Has the kernel mark packets of some SAs, and route them to host interfaces: `marks` says what that takes, and why.

A table of nftables marks, which the program nft replaces as a whole where it is another one than before. For each host interface
and family there are a routing rule for its mark and a table with one route, and for IPv6 a policy of XFRM. At no moment can
anything leave in clear, whichever of these are there; while some are not the kernel encrypts, so the table of nftables comes
last and goes first.
"""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Collection, Mapping, Set
from functools import partial
from typing import Any, NamedTuple

from vppipsec.kernel.hostpath.netlink_changes import GONE, Attempts
from vppipsec.kernel.hostpath.nft_ruleset import WAY_IN, Host, TunnelSas, is_loaded, ruleset, way_out
from vppipsec.kernel.netlink.messages import error_of
from vppipsec.kernel.netlink.socket import READ_SIZE, open_netlink
from vppipsec.kernel.netlink.wire import AF_INET, AF_INET6, NLMSG_ERROR, message_type, split
from vppipsec.kernel.ownership import METRIC, NFT_TABLE, OUT, PROTOCOL, WHOLE
from vppipsec.kernel.xfrm.events import PolicyAdded
from vppipsec.kernel.xfrm.messages import policy_request
from vppipsec.kernel.xfrm.socket import NETLINK_XFRM
from vppipsec.kernel.xfrm.values import MsgType, Policy
from vppipsec.kernel.xfrm.wire import decode

_PREFERENCE = 218
"""Of our rules. An IKE daemon's own come after (strongSwan: 220)."""
_MTU = 1460
"""Longest packet along our routes, bytes. No tunnel over a link with 1500 takes more, and TCP knows what it takes, so that it is
never told otherwise; host interfaces take more, but what is longer has to be fragmented before. IPv6 comes in fragments that
fit the tunnel; IPv4 is cut anew, to this length, so that VPP has to send some ESP in fragments, as the kernel does."""
_LINK_SCOPE = 253  # RT_SCOPE_LINK
_IP = {AF_INET: "IPv4", AF_INET6: "IPv6"}
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_PATIENCE_S = 20.0


class _Rule(NamedTuple):
    """A routing rule for a mark: the number of its table, too. It is for what the router itself sends."""

    family: int
    mark: int
    priority: int = _PREFERENCE
    mask: int = WHOLE

    def arguments(self) -> dict[str, Any]:
        """Return it as pyroute2 takes it."""
        asked = {"family": self.family, "priority": self.priority, "action": "to_tbl", "table": self.mark}
        return asked | {"fwmark": self.mark, "fwmask": self.mask, "iifname": "lo", "protocol": PROTOCOL}


_Way = tuple[int, Host]
"""A family, and the host interface that packets of it go to."""


class Marking(Attempts):
    """One run. What is right stays untouched, be it of an earlier run."""

    def __init__(self, kernel: Any, refused: type[Exception]) -> None:
        """Take pyroute2's IPRoute, and what it raises where the kernel refuses."""
        super().__init__(refused)
        self._kernel = kernel

    def run(self, wanted: Mapping[TunnelSas, Host]) -> None:
        """Bring the kernel to what is wanted. Raises what was told, and OSError, where the kernel cannot be read.

        Where one host interface cannot be led to, the others are. What nft loaded stays, and all that it takes, where nft fails.
        """
        held: list[_Rule] = []
        ways = {(sas.family, host) for sas, host in wanted.items()}
        try:
            for family in (AF_INET, AF_INET6):
                rules = self._kernel.get_rules(family=family)
                held += (rule for found in rules if (rule := _rule(family, found)) is not None)
            listing = _listing()
            if not is_loaded(ruleset(wanted), listing):
                _nft("--check", "--file", "-", text=ruleset(wanted))
            led = self._led(ways, held)
            text = ruleset({sas: host for sas, host in wanted.items() if (sas.family, host) in led})
            if not is_loaded(text, listing):
                _nft("--file", "-", text=text)
        except (NftError, self._refused) as error:
            if wanted or held:
                self.problems.append(f"policies' packets cannot be marked: {error}")
        else:
            self._remove(held, led)

    def _led(self, ways: Collection[_Way], held: Collection[_Rule]) -> Set[_Way]:
        """Have the kernel lead what is marked to host interfaces, and let it pass; return those for which it does."""
        ready = {way for way in sorted(ways) if self._leads(*way, held)}
        if any(family == AF_INET6 for family, _ in ready):
            lets_in = self._try("a policy of XFRM for what comes in", partial(_have, WAY_IN))
            return {(family, host) for family, host in ready if family == AF_INET or lets_in}
        return ready

    def _leads(self, family: int, host: Host, held: Collection[_Rule]) -> bool:
        """Do so for one. The rule is first, and removed last: by it the rest is found again."""
        rule = _Rule(family, host.mark)
        add = partial(self._kernel.rule, "add", **rule.arguments())
        route = partial(self._kernel.route, "replace", **_route(rule, host.ifindex), metrics={"mtu": _MTU})
        return (
            (rule in held or self._try(f"the {_IP[family]} rule for {host.name}", add))
            and (host.ifindex in self._ends(rule) or self._try(f"the {_IP[family]} route to {host.name}", route))
            and (
                family == AF_INET
                or self._try(f"a policy of XFRM for {host.name}", partial(_have, way_out(host.ifindex)))
            )
        )

    def _ends(self, rule: _Rule) -> list[int]:
        """Return the ifindex of each of our routes in the table of a rule."""
        try:
            found = list(self._kernel.get_routes(family=rule.family, table=rule.mark))
        except self._refused as error:
            if getattr(error, "code", 0) != errno.ENOENT:  # there is no such table
                raise
            return []
        return [each.get_attr("RTA_OIF") for each in found if each["proto"] == PROTOCOL]

    def _remove(self, held: Collection[_Rule], led: Set[_Way]) -> None:
        """Remove what led to other host interfaces."""
        kept = {_Rule(family, host.mark) for family, host in led}
        tables = {(rule.family, rule.mark) for rule in kept}
        if AF_INET6 in {rule.family for rule in held} - {family for family, _ in tables}:
            self._try("to remove a policy of XFRM", partial(_lose, WAY_IN))
        for rule in held:
            if (rule.family, rule.mark) not in tables:
                if rule.family == AF_INET6:
                    self._try("to remove a policy of XFRM", partial(_lose, way_out(rule.mark - OUT.value)))
                for index in self._ends(rule):
                    change = partial(self._kernel.route, "del", **_route(rule, index))
                    self._try(f"to remove an {_IP[rule.family]} route", change, GONE)
            if rule not in kept:
                change = partial(self._kernel.rule, "del", **rule.arguments())
                self._try(f"to remove an {_IP[rule.family]} rule", change, GONE)


def _rule(family: int, found: Any) -> _Rule | None:
    """Return a rule as read, None where it is not ours."""
    mark, mask = found.get_attr("FRA_FWMARK") or 0, found.get_attr("FRA_FWMASK") or 0
    if found.get_attr("FRA_PROTOCOL") != PROTOCOL or mark & OUT.mask != OUT.value:
        return None
    return _Rule(family, mark, found.get_attr("FRA_PRIORITY") or 0, mask)


def _route(rule: _Rule, ifindex: int) -> dict[str, Any]:
    """Return what pyroute2 takes for a route to a link in the table of a rule."""
    everything = "::/0" if rule.family == AF_INET6 else "0.0.0.0/0"
    asked = {"family": rule.family, "table": rule.mark, "proto": PROTOCOL, "priority": METRIC, "dst": everything}
    return asked | {"oif": ifindex} | ({} if rule.family == AF_INET6 else {"scope": _LINK_SCOPE})


# nftables


class NftError(Exception):
    """The program nft failed, or there is none; the text says why, in a sentence."""


def _listing() -> str:
    """Return our table as nft lists it; nothing where there is none. Raises NftError."""
    there = f"table inet {NFT_TABLE}" in _nft("list", "tables").splitlines()
    return _nft("list", "table", "inet", NFT_TABLE) if there else ""


def _nft(*arguments: str, text: str = "") -> str:
    """Run nft and return what it prints. Raises NftError."""
    command = ("nft", *arguments)
    try:
        ran = subprocess.run(
            command, input=text, capture_output=True, text=True, env=_ENVIRONMENT, timeout=_PATIENCE_S, check=False
        )
    except FileNotFoundError:
        raise NftError("there is no program nft: install Debian's package nftables") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NftError(f"the program nft cannot be run: {error}") from error
    if ran.returncode:
        said = ran.stderr.partition("\n")[0]
        raise NftError(f"nft fails: {said.partition('Error: ')[2] or said}")
    return ran.stdout


# XFRM


def _have(policy: Policy) -> None:
    """See to it that the kernel has a policy. Raises OSError."""
    found = _answer(MsgType.GETPOLICY, policy)
    if found is None or (found.action, found.priority) != (policy.action, policy.priority):
        _answer(MsgType.UPDPOLICY, policy)


def _lose(policy: Policy) -> None:
    """See to it that the kernel does not have a policy. Raises OSError."""
    if _answer(MsgType.GETPOLICY, policy) is not None:
        _answer(MsgType.DELPOLICY, policy)


def _answer(kind: MsgType, policy: Policy) -> Policy | None:
    """Ask the kernel something of a policy; return the policy where it tells of one that it has. Raises OSError."""
    with open_netlink(NETLINK_XFRM, ()) as asking:
        asking.settimeout(_PATIENCE_S)
        asking.send(policy_request(kind, policy, 1))
        answer = next(split(asking.recv(READ_SIZE)))
    if message_type(answer) != NLMSG_ERROR:
        told = decode(answer)
        return told.policy if isinstance(told, PolicyAdded) else None
    reason = error_of(answer)
    if reason and not (reason == errno.ENOENT and kind is MsgType.GETPOLICY):
        raise OSError(reason, "refused")
    return None
