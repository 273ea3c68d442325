"""The stand-in's ACLs, the ACLs of interfaces, and lookup contexts (src/plugins/acl/acl.c).

A lookup context is another user of the ACL plugin, with an ordered list of ACLs (src/plugins/acl/lookup_context.c). ABF has one
for each interface and family.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from vppstandin.base import (
    ACL_IN_USE_BY_LOOKUP_CONTEXT,
    ACL_IN_USE_INBOUND,
    ACL_IN_USE_OUTBOUND,
    INVALID_DST_ADDRESS,
    INVALID_SRC_ADDRESS,
    INVALID_VALUE,
    INVALID_VALUE_2,
    NO_INDEX,
    NO_SUCH_ENTRY,
    Pool,
    Refusal,
    ReplyFields,
    address_of,
    address_reply,
)
from vppstandin.fib import Net, network
from vppstandin.interfaces import Interfaces

TAG_BYTES = 64
_LIST_TWICE = 1
"""VPP's answer if an ACL is named twice for one direction. VPP turns its error number into a boolean."""


@dataclass(frozen=True, slots=True)
class AclRule:
    """A rule. `is_permit` is 0 for deny, 1 for permit, 2 for permit and reflect. Ports are ranges, both ends included."""

    is_permit: int
    src: Net
    dst: Net
    proto: int
    sports: tuple[int, int]
    dports: tuple[int, int]
    tcp_flags_mask: int = 0
    tcp_flags_value: int = 0


@dataclass(frozen=True, slots=True)
class AclList:
    """An ACL."""

    tag: str
    rules: tuple[AclRule, ...]


@dataclass(frozen=True, slots=True)
class InterfaceAcls:
    """Numbers of an interface's ACLs, in the order of evaluation."""

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


class Acls:
    """ACLs by number, and their users."""

    def __init__(self, interfaces: Interfaces) -> None:
        self.lists: dict[int, AclList] = {}
        self.of_interfaces: dict[int, InterfaceAcls] = {}
        """ACLs of interfaces, by sw_if_index. An interface without ACLs is absent."""
        self.contexts: dict[Hashable, tuple[int, ...]] = {}
        """ACLs by lookup context, except those of interfaces."""
        self.counts_matches = False
        """Whether VPP counts matches on interfaces. Off at start."""
        self.on_put: Callable[[int, int], None] | None = None
        """Called with the number of each new or replaced ACL, and the number of its rules."""
        self._interfaces = interfaces
        self._pool = Pool()
        interfaces.on_remove.append(lambda sw_if_index: self._apply(sw_if_index, InterfaceAcls()))

    def set_context(self, context: Hashable, lists: Sequence[int]) -> None:
        """Set the ACLs of a lookup context.

        If an ACL does not exist or is named twice, the context stays unchanged and no error is returned, as in VPP.
        """
        self.contexts.setdefault(context, ())
        if len(set(lists)) == len(lists) and all(number in self.lists for number in lists):
            self.contexts[context] = tuple(lists)

    def drop_context(self, context: Hashable) -> None:
        """Remove a lookup context."""
        self.contexts.pop(context, None)

    def acl_add_replace(self, message: Any) -> ReplyFields:
        number = message.acl_index
        if len(message.tag.encode()) >= TAG_BYTES:
            raise Refusal(INVALID_VALUE, acl_index=number)
        try:
            rules = tuple(_rule_of(rule) for rule in message.r)
        except Refusal as refused:
            raise Refusal(refused.retval, acl_index=number) from None
        if number == NO_INDEX:
            number = self._pool.take()
        elif number not in self.lists:
            raise Refusal(NO_SUCH_ENTRY, acl_index=number)
        self.lists[number] = AclList(message.tag, rules)
        if self.on_put is not None:
            self.on_put(number, len(rules))
        return {"acl_index": number}

    def acl_del(self, message: Any) -> ReplyFields:
        number = message.acl_index
        if number not in self.lists:
            raise Refusal(NO_SUCH_ENTRY)
        if any(number in acls.inputs for acls in self.of_interfaces.values()):
            raise Refusal(ACL_IN_USE_INBOUND)
        if any(number in acls.outputs for acls in self.of_interfaces.values()):
            raise Refusal(ACL_IN_USE_OUTBOUND)
        if any(number in lists for lists in self.contexts.values()):
            raise Refusal(ACL_IN_USE_BY_LOOKUP_CONTEXT)
        del self.lists[number]
        self._pool.give(number)
        return {}

    def acl_dump(self, message: Any) -> list[ReplyFields]:
        return [
            {
                "acl_index": number,
                "tag": present.tag,
                "count": len(present.rules),
                "r": [_rule_reply(rule) for rule in present.rules],
            }
            for number, present in sorted(self.lists.items())
            if message.acl_index in (NO_INDEX, number)
        ]

    def acl_interface_set_acl_list(self, message: Any) -> ReplyFields:
        index = self._interfaces.get(message.sw_if_index).sw_if_index
        numbers = tuple(message.acls)
        if any(number not in self.lists for number in numbers):
            raise Refusal(NO_SUCH_ENTRY)
        inputs, outputs = numbers[: message.n_input], numbers[message.n_input :]
        if len(set(outputs)) != len(outputs):
            raise Refusal(_LIST_TWICE)
        if len(set(inputs)) != len(inputs):
            self._apply(index, InterfaceAcls(self.of_interfaces.get(index, InterfaceAcls()).inputs, outputs))
            raise Refusal(_LIST_TWICE)  # VPP has set the outputs already
        self._apply(index, InterfaceAcls(inputs, outputs))
        return {}

    def _apply(self, sw_if_index: int, acls: InterfaceAcls) -> None:
        if acls == InterfaceAcls():
            self.of_interfaces.pop(sw_if_index, None)
        else:
            self.of_interfaces[sw_if_index] = acls

    def acl_interface_list_dump(self, message: Any) -> list[ReplyFields]:
        found = [index for index in sorted(self._interfaces.by_index) if message.sw_if_index in (NO_INDEX, index)]
        acls = {index: self.of_interfaces.get(index, InterfaceAcls()) for index in found}
        return [
            {
                "sw_if_index": index,
                "count": len(inputs := acls[index].inputs) + len(outputs := acls[index].outputs),
                "n_input": len(inputs),
                "acls": [*inputs, *outputs],
            }
            for index in found
        ]

    def acl_stats_intf_counters_enable(self, message: Any) -> ReplyFields:
        self.counts_matches = bool(message.enable)
        return {}


def _rule_of(rule: Any) -> AclRule:
    """Return a decoded rule, as acl_add_list does. Raises Refusal."""
    src, dst = _net_of(rule.src_prefix), _net_of(rule.dst_prefix)
    if src is None:
        raise Refusal(INVALID_SRC_ADDRESS)
    if dst is None:
        raise Refusal(INVALID_DST_ADDRESS)
    if len(src.address) != len(dst.address):
        raise Refusal(INVALID_SRC_ADDRESS)
    sports = (rule.srcport_or_icmptype_first, rule.srcport_or_icmptype_last)
    dports = (rule.dstport_or_icmpcode_first, rule.dstport_or_icmpcode_last)
    if sports[0] > sports[1] or dports[0] > dports[1]:
        raise Refusal(INVALID_VALUE_2)
    flags = (rule.tcp_flags_mask, rule.tcp_flags_value)
    return AclRule(int(rule.is_permit), src, dst, int(rule.proto), sports, dports, *flags)


def _net_of(prefix: Any) -> Net | None:
    """Return a decoded prefix, None if it is too long or has host bits."""
    address, length = address_of(prefix.address), int(prefix.len)
    if length > 8 * len(address) or network(address, length) != address:
        return None
    return Net(address, length)


def _rule_reply(rule: AclRule) -> ReplyFields:
    return {
        "is_permit": rule.is_permit,
        "src_prefix": {"address": address_reply(rule.src.address), "len": rule.src.length},
        "dst_prefix": {"address": address_reply(rule.dst.address), "len": rule.dst.length},
        "proto": rule.proto,
        "srcport_or_icmptype_first": rule.sports[0],
        "srcport_or_icmptype_last": rule.sports[1],
        "dstport_or_icmpcode_first": rule.dports[0],
        "dstport_or_icmpcode_last": rule.dports[1],
        "tcp_flags_mask": rule.tcp_flags_mask,
        "tcp_flags_value": rule.tcp_flags_value,
    }
