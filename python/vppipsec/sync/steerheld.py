"""What VPP holds of steering: layers of table, ACL, ABF policy and attachments; from dumps at first, then by what it accepts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field

from vppipsec.sync.translate import TAG_PREFIX
from vppipsec.vpp.filters import DelAcl, PutAcl
from vppipsec.vpp.forwarding import AttachAbf, SetAbfPolicy, SetTable
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


def adopt(
    tables: Iterable[tuple[int, bool, str]],
    acls: Mapping[int, tuple[str, tuple[Rule, ...]]],
    policies: Mapping[int, int],
    attachments: Iterable[tuple[int, int]],
    interfaces: Set[int],
) -> HeldSteering:
    """Return what of ours an earlier run left in VPP, as its dumps tell.

    `tables` are number, `ip6` and name; `acls` tag and rules by number; `policies` the ACL of each ABF policy by number;
    `attachments` policy and sw_if_index; `interfaces` those that VPP has.
    """
    held = HeldSteering()
    layers: dict[int, HeldLayer] = {}
    for number, ip6, name in tables:
        priority = name.removeprefix(TAG_PREFIX)
        if number in NUMBERS and name.startswith(TAG_PREFIX) and priority.isdecimal():
            layers[number] = HeldLayer(number, int(priority), policy=number in policies)
            held.add(ip6, layers[number])
    by_tag = {layer.acl_tag: layer for layer in layers.values()}
    for index, (tag, rules) in acls.items():
        if tag in by_tag:
            by_tag[tag].acl_index, by_tag[tag].rules = index, rules
    for number, sw_if_index in attachments:
        if number in layers:
            where = layers[number].attached if sw_if_index in interfaces else layers[number].dangling
            where.add(sw_if_index)
    return held
