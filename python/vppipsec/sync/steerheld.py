"""What VPP holds of steering: layers of table, ACL, ABF policy and attachments; from dumps at first, then by what it accepts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

from vppipsec.sync.translate import TAG_PREFIX
from vppipsec.vpp.filters import DelAcl, PutAcl
from vppipsec.vpp.forwarding import AttachAbf, SetAbfPolicy, SetTable
from vppipsec.vpp.inventory import Inventory
from vppipsec.vpp.objects import Rule
from vppipsec.vpp.requests import Request

NUMBERS = range(0x49500000, 0x49600000)
"""Numbers of our FIB tables and ABF policies."""


@dataclass(slots=True)
class HeldLayer:
    """A table, and what of the ACL, the policy and the attachments of a layer there is. `number` is the table's and the policy's.

    `dangling` are attachments to interfaces that were deleted, which VPP keeps.
    """

    number: int
    priority: int
    acl_index: int | None = None
    rules: tuple[Rule, ...] = ()
    policy: bool = False
    attached: set[int] = field(default_factory=set)
    dangling: set[int] = field(default_factory=set)

    @property
    def acl_tag(self) -> str:
        """The tag of its ACL, which tells whose it is."""
        return f"{TAG_PREFIX}out {self.number}"

    @property
    def table_name(self) -> str:
        """The name of its table, which tells of its place."""
        return f"{TAG_PREFIX}{self.priority}"


class HeldSteering:
    """The layers in VPP of both families, by `ip6`, each in order of priority; kept up by every request that VPP accepts."""

    def __init__(self) -> None:
        self.layers: dict[bool, list[HeldLayer]] = {False: [], True: []}

    def add(self, ip6: bool, layer: HeldLayer) -> None:
        """Take a layer that VPP holds into its place."""
        layers = self.layers[ip6]
        layers.insert(bisect_left(layers, layer.priority, key=lambda it: it.priority), layer)

    @property
    def tables(self) -> Mapping[bool, Sequence[int]]:
        """The tables of the layers, by family."""
        return {ip6: [layer.number for layer in layers] for ip6, layers in self.layers.items()}

    @property
    def acls(self) -> frozenset[int]:
        """The ACLs of the layers."""
        found = (layer.acl_index for layers in self.layers.values() for layer in layers)
        return frozenset(index for index in found if index is not None)

    @property
    def rules(self) -> int:
        """Number of ACL rules that tell the packets of outbound policies."""
        return sum(len(layer.rules) for layers in self.layers.values() for layer in layers)

    def free_numbers(self) -> Iterator[int]:
        """Yield numbers that no layer of either family has."""
        taken = {layer.number for layers in self.layers.values() for layer in layers}
        return (number for number in NUMBERS if number not in taken)

    def interface_deleted(self, sw_if_index: int) -> None:
        """Note that an interface is gone. Its attachments are to be taken away before its number may serve another one."""
        for layers in self.layers.values():
            for layer in layers:
                if sw_if_index in layer.attached:
                    layer.attached.remove(sw_if_index)
                    layer.dangling.add(sw_if_index)

    def took(self, request: Request, extra: int) -> None:
        """Note that VPP accepted a request of `next_requests`; `extra` is what its answer carried."""
        match request:
            case SetTable(number, ip6, name, True):
                self.add(ip6, HeldLayer(number, int(name.removeprefix(TAG_PREFIX))))
            case SetTable(number, ip6, _, False):
                self.layers[ip6].remove(self._layer(lambda it: it.number == number))
            case PutAcl(_, tag, rules):
                layer = self._layer(lambda it: it.acl_tag == tag)
                layer.acl_index, layer.rules = extra, rules
            case DelAcl(acl_index):
                layer = self._layer(lambda it: it.acl_index == acl_index)
                layer.acl_index, layer.rules = None, ()
            case SetAbfPolicy(number, _, _, _, is_add):
                self._layer(lambda it: it.number == number).policy = is_add
            case AttachAbf(number, sw_if_index, _, _, True):
                self._layer(lambda it: it.number == number).attached.add(sw_if_index)
            case AttachAbf(number, sw_if_index):
                layer = self._layer(lambda it: it.number == number)
                layer.attached.discard(sw_if_index)
                layer.dangling.discard(sw_if_index)

    def _layer(self, wanted: Callable[[HeldLayer], bool]) -> HeldLayer:
        return next(layer for layers in self.layers.values() for layer in layers if wanted(layer))


def adopt(found: Inventory, interfaces: Set[int]) -> HeldSteering:
    """Return what of ours an earlier run left in VPP; `interfaces` are those that VPP has."""
    held = HeldSteering()
    policies = {policy.policy_id: policy.attachments for policy in found.policies}
    layers: dict[str, HeldLayer] = {}
    for table in found.tables:
        priority = table.name.removeprefix(TAG_PREFIX)
        if table.name.startswith(TAG_PREFIX) and priority.isdecimal():
            layer = HeldLayer(table.number, int(priority), policy=table.number in policies)
            layer.attached = set(policies.get(table.number, ())) & interfaces
            layer.dangling = set(policies.get(table.number, ())) - interfaces
            layers[layer.acl_tag] = layer
            held.add(table.ip6, layer)
    for acl in found.acls:
        if acl.tag in layers:
            layers[acl.tag].acl_index, layers[acl.tag].rules = acl.acl_index, acl.rules
    return held
