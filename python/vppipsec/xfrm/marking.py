"""Has the kernel mark IPv6 packets of some SAs, and route them to host interfaces: `marks` says what that takes, and why.

A table of nftables marks, which the program nft replaces as a whole where it is another one than before. For each host interface
there are a routing rule for its mark, a table with one route, and a policy of XFRM. At no moment can anything leave in clear,
whichever of these are there; while some are not the kernel encrypts, so the table of nftables comes last and goes first.
"""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Collection, Mapping, Set
from functools import partial
from typing import Any, NamedTuple

from vppipsec.xfrm.changes import GONE, PROTOCOL, TABLE, Attempts
from vppipsec.xfrm.events import PolicyAdded
from vppipsec.xfrm.marks import NFT_TABLE, OUT, WAY_IN, WHOLE, Host, TunnelSas, is_loaded, ruleset, way_out
from vppipsec.xfrm.netlink import READ_SIZE, open_netlink
from vppipsec.xfrm.request import error_of, policy_request
from vppipsec.xfrm.socket import NETLINK_XFRM
from vppipsec.xfrm.values import MsgType, Policy
from vppipsec.xfrm.wire import AF_INET6, NLMSG_ERROR, decode, message_type, split

_PREFERENCE = 218
"""Of our rules. An IKE daemon's own come after (strongSwan: 220)."""
_MTU = 1460
"""Longest packet along our routes, bytes. No tunnel over a link with 1500 takes more, and TCP knows what it takes, so that it is
never told otherwise; host interfaces take more, but what is longer has to be fragmented before."""
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_PATIENCE_S = 20.0


class _Rule(NamedTuple):
    """A routing rule for a mark: the number of its table, too."""

    mark: int
    priority: int = _PREFERENCE
    mask: int = WHOLE

    def arguments(self) -> dict[str, Any]:
        """Return it as pyroute2 takes it."""
        asked = {"family": AF_INET6, "priority": self.priority, "action": "to_tbl", "table": self.mark}
        return asked | {"fwmark": self.mark, "fwmask": self.mask, "protocol": PROTOCOL}


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
        try:
            held += (rule for found in self._kernel.get_rules(family=AF_INET6) if (rule := _rule(found)) is not None)
            listing = _listing()
            if not is_loaded(ruleset(wanted), listing):
                _nft("--check", "--file", "-", text=ruleset(wanted))
            led = self._led(set(wanted.values()), held)
            text = ruleset({sas: host for sas, host in wanted.items() if host in led})
            if not is_loaded(text, listing):
                _nft("--file", "-", text=text)
        except (NftError, self._refused) as error:
            if wanted or held:
                self.problems.append(f"IPv6 of policies: {error}")
        else:
            self._remove(held, led)

    def _led(self, hosts: Collection[Host], held: Collection[_Rule]) -> Set[Host]:
        """Have the kernel lead what is marked to host interfaces, and let it pass; return those for which it does."""
        ready = {host for host in sorted(hosts) if self._leads(host, held)}
        lets_in = ready and self._try("a policy of XFRM for what comes in", partial(_have, WAY_IN))
        return ready if lets_in else set()

    def _leads(self, host: Host, held: Collection[_Rule]) -> bool:
        """Do so for one. The rule is first, and removed last: by it the rest is found again."""
        rule = _Rule(host.mark)
        add = partial(self._kernel.rule, "add", **rule.arguments())
        ways = {"oif": host.ifindex, "metrics": {"mtu": _MTU}}
        route = partial(self._kernel.route, "replace", **ways, **_route(host.mark))
        return (
            (rule in held or self._try(f"the IPv6 rule for {host.name}", add))
            and (host.ifindex in self._ends(host.mark) or self._try(f"the IPv6 route to {host.name}", route))
            and self._try(f"a policy of XFRM for {host.name}", partial(_have, way_out(host.ifindex)))
        )

    def _ends(self, table: int) -> list[int]:
        """Return the ifindex of each of our routes in a table."""
        try:
            found = list(self._kernel.get_routes(family=AF_INET6, table=table))
        except self._refused as error:
            if getattr(error, "code", 0) != errno.ENOENT:  # there is no such table
                raise
            return []
        return [each.get_attr("RTA_OIF") for each in found if each["proto"] == PROTOCOL]

    def _remove(self, held: Collection[_Rule], led: Set[Host]) -> None:
        """Remove what led to other host interfaces."""
        if held and not led:
            self._try("to remove a policy of XFRM", partial(_lose, WAY_IN))
        tables = {host.mark for host in led}
        for rule in held:
            if rule.mark not in tables:
                policy = way_out(rule.mark - OUT.value)
                self._try("to remove a policy of XFRM", partial(_lose, policy))
                for index in self._ends(rule.mark):
                    change = partial(self._kernel.route, "del", oif=index, **_route(rule.mark))
                    self._try("to remove an IPv6 route", change, GONE)
            if rule not in map(_Rule, tables):
                change = partial(self._kernel.rule, "del", **rule.arguments())
                self._try("to remove an IPv6 rule", change, GONE)


def _rule(found: Any) -> _Rule | None:
    """Return a rule as read, None where it is not ours."""
    mark, mask = found.get_attr("FRA_FWMARK") or 0, found.get_attr("FRA_FWMASK") or 0
    if found.get_attr("FRA_PROTOCOL") != PROTOCOL or mark & OUT.mask != OUT.value:
        return None
    return _Rule(mark, found.get_attr("FRA_PRIORITY") or 0, mask)


def _route(table: int) -> dict[str, Any]:
    """Return what pyroute2 takes for the route of a table, but for where it leads."""
    return {"family": AF_INET6, "table": table, "proto": PROTOCOL, "priority": TABLE, "dst": "::/0"}


# nftables


class NftError(Exception):
    """The program nft failed, or there is none; the text says why, in a sentence."""


def _listing() -> str:
    """Return our table as nft lists it; nothing where there is none. Raises NftError."""
    there = f"table ip6 {NFT_TABLE}" in _nft("list", "tables").splitlines()
    return _nft("list", "table", "ip6", NFT_TABLE) if there else ""


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
