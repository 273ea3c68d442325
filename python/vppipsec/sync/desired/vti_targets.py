"""Which routes of ours the kernel's routes over VTIs become, each with the tunnels that it leads into. Pure: no I/O, no state.

`vppipsec.sync.desired.vti_routes` says what the kernel does with each destination; here that meets what VPP has: its tables, and routes that
others keep. Policies that match a firewall mark are left out, as packets in VPP carry none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field

from vppipsec.kernel.route.model import Vti
from vppipsec.kernel.xfrm.sad_spd import GroupKey, groups_of_policy
from vppipsec.kernel.xfrm.values import Policy, PolicyAction, PolicyDir, PolicyType
from vppipsec.sync.desired.outbound_policy import is_marked
from vppipsec.sync.desired.policy_layers import Beside, Fixed, Junction, Target
from vppipsec.sync.desired.routes import Aim, Split
from vppipsec.sync.desired.selectors import widest_rule
from vppipsec.sync.desired.vti_routes import ChildSelector, Selectors, VtiRoute, Ways, vti_routes
from vppipsec.vpp.state.policy_layers import NUMBERS
from vppipsec.vpp.types import Prefix, Route

Table = tuple[int, bool]
"""A FIB table's number and its family (True for IPv6)."""


@dataclass(frozen=True, slots=True)
class VtiLeads:
    """`routes` are those that VPP shall have, by table. `left_out` are those that it shall not, with the reason.

    `lacking` are the tables that VPP would have to have.
    """

    routes: Mapping[int, Mapping[Prefix, Aim]] = field(default_factory=dict)
    left_out: Mapping[Route, str] = field(default_factory=dict)
    lacking: frozenset[Table] = frozenset()

    @property
    def targets(self) -> Set[GroupKey]:
        """The groups into whose tunnels routes lead."""
        return {target for target in self._all() if isinstance(target, GroupKey)}

    @property
    def junctions(self) -> Set[int]:
        """The VTIs, by if_id, to whose junctions routes lead."""
        return {target.if_id for target in self._all() if isinstance(target, Junction)}

    def _all(self) -> Iterator[Target | Junction | Beside]:
        for table in self.routes.values():
            for target in table.values():
                if isinstance(target, Split):
                    yield from target.targets
                else:
                    yield target


def selectors_of(policies: Iterable[Policy]) -> dict[int, list[ChildSelector]]:
    """Return the outbound policies of VTIs, by if_id, in the order in which they are given."""
    found: dict[int, list[ChildSelector]] = {}
    for policy in policies:
        if policy.direction == PolicyDir.OUT and policy.if_id and not is_marked(policy):
            found.setdefault(policy.if_id, []).append(_child(policy))
    return found


def _child(policy: Policy) -> ChildSelector:
    """Return what a policy of a VTI takes. Without a template it lets nothing pass: xfrmi_xmit2 finds no state and drops."""
    single = policy.action == PolicyAction.ALLOW and policy.type == PolicyType.MAIN and len(policy.templates) == 1
    widest, selector = widest_rule(policy.selector), policy.selector
    narrow = bool(
        selector.prefixlen_s or selector.proto or selector.sport_mask or selector.dport_mask or selector.ifindex
    )
    return ChildSelector(widest.dst, policy.priority, groups_of_policy(policy)[0] if single else None, narrow)


def vti_leads(ways: Ways, selectors: Selectors, tables: Set[Table], vtis: Iterable[Vti] = ()) -> VtiLeads:
    """Return what VPP shall have, the longer prefixes first: they take what shall not go along the shorter ones.

    `tables` are VPP's but for ours: it is given no others, since only interfaces bring packets into a table. What is for an
    address of `vtis` drops where it would go along one of the routes: the tunnel would bring it back.
    """
    routes: dict[int, dict[Prefix, Aim]] = {}
    left_out: dict[Route, str] = {}
    lacking = set()
    found = vti_routes(ways, selectors)
    for place in sorted(found, key=lambda place: -place.prefix.length):
        route, table = found[place], (place.table, len(place.prefix.address) == 16)
        if place.table in NUMBERS or table not in tables:
            lacking.add(table)
            left_out[place] = f"VPP has no table {place.table}"
        else:
            routes.setdefault(place.table, {})[place.prefix] = _target(route)
    lengths = {number: {prefix.length for prefix in table} for number, table in routes.items()}
    own: dict[int, dict[Prefix, Aim]] = {}
    for vti in vtis:
        table_routes = routes.get(vti.table, {})
        for _, address, _ in vti.addresses:
            host = Prefix(address, 8 * len(address))
            wider = [length for length in lengths.get(vti.table, ()) if length < host.length]
            if host not in table_routes and any(host.cut(length) in table_routes for length in wider):
                own.setdefault(vti.table, {})[host] = Fixed.DROP
    routes |= {number: hosts | routes[number] for number, hosts in own.items()}
    return VtiLeads(routes, left_out, frozenset(lacking))


def _target(route: VtiRoute) -> Aim:
    shares = tuple((Fixed.DROP if share.target is None else share.target, share.weight) for share in route)
    first = shares[0][0]
    return Split(shares) if len(shares) > 1 or isinstance(first, Beside) else first
