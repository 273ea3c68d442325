"""Actual state of the policy layers: each layer is a FIB table, an ACL, an ABF policy and its attachments.

The state comes from dumps at connect, then from each request that VPP accepts. Layers form *stacks*, which VPP evaluates in
order: for each family one stack for all interfaces, and one for the VTI classifier of each VTI.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from vppipsec.vpp.api.abf import AbfAttach, AbfPolicyAddDel
from vppipsec.vpp.api.acl import AclAddReplace, AclDel
from vppipsec.vpp.api.ip import TableAddDel
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.inventory import Inventory
from vppipsec.vpp.ownership import ACL_TAG, TABLE_NUMBERS, TAG_PREFIX
from vppipsec.vpp.types import Rule


class StackKey(NamedTuple):
    """Names a stack: its family, and the if_id of its VTI classifier, 0 for the stack of all interfaces."""

    ip6: bool
    if_id: int = 0


@dataclass(slots=True)
class ActualLayer:
    """A policy layer in VPP. Its table exists; ACL, policy and attachments may be missing.

    `number` names both table and policy. `dangling` are attachments to deleted interfaces, which VPP keeps.
    """

    number: int
    stack: StackKey
    priority: int
    acl_index: int | None = None
    rules: tuple[Rule, ...] = ()
    has_policy: bool = False
    attached: set[int] = field(default_factory=set)
    dangling: set[int] = field(default_factory=set)

    @property
    def acl_tag(self) -> str:
        """The tag of the layer's ACL, which contains the layer's number."""
        return f"{ACL_TAG}{self.number}"

    @property
    def table_name(self) -> str:
        """The name of the layer's table, which contains the if_id of its stack and its priority."""
        if_id = self.stack.if_id
        return f"{TAG_PREFIX}vti {if_id} {self.priority}" if if_id else f"{TAG_PREFIX}{self.priority}"


def _stack_position(name: str) -> tuple[int, int] | None:
    """Return if_id and priority from the name of a layer's table, None if the name is not a layer's."""
    match name.removeprefix(TAG_PREFIX).split(" "):
        case [priority] if name.startswith(TAG_PREFIX) and priority.isdecimal():
            return 0, int(priority)
        case ["vti", if_id, priority] if name.startswith(TAG_PREFIX) and if_id.isdecimal() and priority.isdecimal():
            return int(if_id), int(priority)
    return None


class ActualLayers:
    """The policy layers in VPP by number, updated with each request that VPP accepts."""

    def __init__(self) -> None:
        self.layers: dict[int, ActualLayer] = {}
        self._stacks: dict[StackKey, list[ActualLayer]] = {}

    def add(self, layer: ActualLayer) -> None:
        """Add a layer that VPP holds to its stack, by priority."""
        self.layers[layer.number] = layer
        layers = self._stacks.setdefault(layer.stack, [])
        layers.insert(bisect_left(layers, layer.priority, key=lambda it: it.priority), layer)

    def stack(self, stack: StackKey) -> Sequence[ActualLayer]:
        """Return the layers of a stack, in the order of evaluation."""
        return self._stacks.get(stack, ())

    @property
    def stacks(self) -> Set[StackKey]:
        """The stacks that have layers."""
        return self._stacks.keys()

    @property
    def acls(self) -> frozenset[int]:
        """The ACLs of the layers."""
        return frozenset(layer.acl_index for layer in self.layers.values() if layer.acl_index is not None)

    @property
    def rule_count(self) -> int:
        """Number of ACL rules in all layers."""
        return sum(len(layer.rules) for layer in self.layers.values())

    def free_numbers(self) -> Iterator[int]:
        """Yield numbers that no layer has."""
        return (number for number in TABLE_NUMBERS[:-1] if number not in self.layers)

    def interface_deleted(self, sw_if_index: int) -> None:
        """Record that an interface is gone. Its attachments become dangling: remove them before its number is used again."""
        for layer in self.layers.values():
            if sw_if_index in layer.attached:
                layer.attached.remove(sw_if_index)
                layer.dangling.add(sw_if_index)

    def apply_accepted(self, request: Request, value: int) -> None:
        """Record that VPP accepted a request for a layer. `value` is the value of its answer."""
        match request:
            case TableAddDel(number, ip6, name, True):
                if place := _stack_position(name):
                    self.add(ActualLayer(number, StackKey(ip6, place[0]), place[1]))
            case TableAddDel(number, _, _, False):
                layer = self.layers.pop(number)
                self._stacks[layer.stack].remove(layer)
                if not self._stacks[layer.stack]:
                    del self._stacks[layer.stack]
            case AclAddReplace(_, tag, rules):
                layer = self.layers[int(tag.removeprefix(ACL_TAG))]
                layer.acl_index, layer.rules = value, rules
            case AclDel(acl_index):
                layer = next(layer for layer in self.layers.values() if layer.acl_index == acl_index)
                layer.acl_index, layer.rules = None, ()
            case AbfPolicyAddDel(number, _, _, _, is_add):
                self.layers[number].has_policy = is_add
            case AbfAttach(number, sw_if_index, _, _, True):
                self.layers[number].attached.add(sw_if_index)
            case AbfAttach(number, sw_if_index):
                self.layers[number].attached.discard(sw_if_index)
                self.layers[number].dangling.discard(sw_if_index)


def adopt_layers(found: Inventory, interfaces: Set[int]) -> ActualLayers:
    """Return the policy layers that an earlier run left in VPP. `interfaces` are all interfaces in VPP."""
    actual = ActualLayers()
    policies = {policy.policy_id: policy.attachments for policy in found.policies}
    layers: dict[str, ActualLayer] = {}
    for table in found.tables:
        if place := _stack_position(table.name):
            stack = StackKey(table.ip6, place[0])
            layer = ActualLayer(table.number, stack, place[1], has_policy=table.number in policies)
            layer.attached = set(policies.get(table.number, ())) & interfaces
            layer.dangling = set(policies.get(table.number, ())) - interfaces
            layers[layer.acl_tag] = layer
            actual.add(layer)
    for acl in found.acls:
        if acl.tag in layers:
            layers[acl.tag].acl_index, layers[acl.tag].rules = acl.acl_index, acl.rules
    return actual
