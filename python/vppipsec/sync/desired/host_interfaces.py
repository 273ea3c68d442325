"""Decides which tunnels get a host interface, and which of the router's own packets the kernel sends there. Pure.

The kernel would encrypt such packets with the SA that VPP uses, and count sequence numbers of its own. The peer would
then drop the packets of one of the two. So where a tunnel has a host interface, the kernel hands VPP the packets
unencrypted, and only VPP encrypts them.

For policies without if_id, the kernel selects packets by the SAs that it is about to use, whatever the policy. On a VTI
each child's host interface gets the packets that the VTI's policies select for it. The kernel keeps the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from vppipsec.kernel.hostpath.apply import HostRedirects
from vppipsec.kernel.hostpath.bpf import Choice
from vppipsec.kernel.hostpath.nft_ruleset import TunnelSas
from vppipsec.kernel.netlink.wire import AF_INET, AF_INET6
from vppipsec.kernel.route.model import Vti
from vppipsec.kernel.xfrm.sad_spd import TunnelKey, tunnel_keys_of_policy
from vppipsec.kernel.xfrm.values import Mode, Policy, PolicyAction, PolicyType, Selector
from vppipsec.sync.desired.outbound_policy import OutboundPolicy, matches_mark
from vppipsec.sync.desired.selectors import widest_rule
from vppipsec.vpp.types import Prefix, Route

MAX_HOST_INTERFACES = 32
"""Host interfaces that the service creates at most. Each keeps 256 of VPP's buffers. VPP has 16,384 in all by default.
"""

NO_OWN_SOURCE = "the router has no address that its policy is for"
VtiOf = Callable[[int], Vti | None]
"""Returns the kernel's xfrm interface of an if_id, None where there is none."""


def why_kernel_sends(policy: Policy, own: Collection[bytes], vti_of: VtiOf) -> str:
    """Return why the kernel itself encrypts the router's own packets by an outbound policy; empty where VPP can.

    `own` are the router's addresses that are in no VRF.
    """
    if policy.if_id:
        vti = vti_of(policy.if_id)
        if vti is None:
            return "no interface of the kernel's has its if_id"
        return "its policy names an interface" if policy.selector.ifindex else ""
    if policy.templates and policy.templates[0].mode == Mode.TRANSPORT:
        return "its policy is in transport mode"
    if len(policy.selector.daddr) == 16 and not policy.priority:
        return "its policy has priority 0, before which nothing goes"
    return "" if any(_within(_source(policy), own)) else NO_OWN_SOURCE


def host_interface_candidates(
    outbound: Iterable[OutboundPolicy], own: Collection[bytes], vti_of: VtiOf, actual: Collection[TunnelKey] = ()
) -> list[TunnelKey]:
    """Return the tunnels for which VPP is to encrypt the router's own packets, those of VTIs first.

    Of the other tunnels it returns the first MAX_HOST_INTERFACES, and those in `actual`, which have a host interface.
    """
    found: dict[bool, dict[TunnelKey, None]] = {True: {}, False: {}}
    for policy, key in _encrypting_policies(outbound):
        is_of_use = key.if_id or len(found[False]) < MAX_HOST_INTERFACES or key in actual
        if is_of_use and not why_kernel_sends(policy, own, vti_of):
            found[bool(key.if_id)][key] = None
    return [*found[True], *found[False]]


def choose_host_interfaces(candidates: Sequence[TunnelKey], actual: Collection[TunnelKey]) -> frozenset[TunnelKey]:
    """Return the `candidates` that get a host interface. Tunnels that already have one keep it."""
    return frozenset(sorted(candidates, key=lambda key: key not in actual)[:MAX_HOST_INTERFACES])


def host_redirects(
    outbound: Sequence[OutboundPolicy], hosts: Mapping[TunnelKey, str], own: Collection[bytes], vti_of: VtiOf
) -> HostRedirects:
    """Return what the kernel sends to the host interfaces in `hosts`.

    Policies are in the order in which the kernel asks them.
    """
    return HostRedirects(*_vti_redirects(outbound, hosts, own, vti_of), _marks(outbound, hosts, own, vti_of))


def _marks(
    outbound: Iterable[OutboundPolicy], hosts: Mapping[TunnelKey, str], own: Collection[bytes], vti_of: VtiOf
) -> dict[TunnelSas, str]:
    """Return, for policies without if_id, the SAs whose packets belong on a host interface.

    It omits tunnels that a policy with several transformations also uses: VPP could not distinguish its packets.
    """
    found = {}
    several = {key for each in outbound if len(each.policy.templates) > 1 for key in tunnel_keys_of_policy(each.policy)}
    for policy in (each.policy for each in outbound if not each.policy.if_id):
        host = _host_interface_of(policy, hosts, own, vti_of)
        if host and several.isdisjoint(tunnel_keys_of_policy(policy)):
            (template,) = policy.templates
            family = AF_INET if len(policy.selector.daddr) == 4 else AF_INET6
            found[TunnelSas(template.saddr, template.daddr, template.reqid, family)] = host
    return found


def _vti_redirects(
    outbound: Iterable[OutboundPolicy], hosts: Mapping[TunnelKey, str], own: Collection[bytes], vti_of: VtiOf
) -> tuple[dict[int, tuple[Choice, ...]], dict[str, int]]:
    """Return two maps: VTI -> choices of a host interface, and host interface -> VTI.

    The choices of a VTI contain every policy that may match a packet that goes to a host interface.
    """
    choices: dict[int, list[Choice]] = {}
    redirected: dict[int, list[tuple[Prefix, Prefix]]] = {}
    from_host: dict[str, int] = {}
    for policy in (each.policy for each in outbound if each.policy.if_id):
        if (vti := vti_of(policy.if_id)) is not None:
            host = _host_interface_of(policy, hosts, own, vti_of)
            choices.setdefault(vti.ifindex, []).append(Choice(policy.selector, policy.mark, host))
            if host:
                redirected.setdefault(vti.ifindex, []).append(_selector_prefixes(policy.selector))
                from_host[host] = vti.ifindex
    to_host = {
        vti: tuple(each for each in choices[vti] if each.host or _may_overlap(_selector_prefixes(each.selector), ends))
        for vti, ends in redirected.items()
    }
    return to_host, from_host


def _may_overlap(one: tuple[Prefix, Prefix], pairs: Iterable[tuple[Prefix, Prefix]]) -> bool:
    """Return whether a packet may match both this pair of prefixes and any pair of the others."""
    return any(destination.overlaps(one[1]) and source.overlaps(one[0]) for source, destination in pairs)


def _host_interface_of(policy: Policy, hosts: Mapping[TunnelKey, str], own: Collection[bytes], vti_of: VtiOf) -> str:
    """Return the host interface for the router's own packets that match a policy; empty where the kernel handles them."""
    host = hosts.get(tunnel_keys_of_policy(policy)[0]) if _has_one_template(policy) else None
    return host if host is not None and not why_kernel_sends(policy, own, vti_of) else ""


def local_addresses(
    outbound: Iterable[OutboundPolicy], hosts: Collection[TunnelKey], unknown: Collection[Route], vti_of: VtiOf
) -> frozenset[Route]:
    """Return the router's addresses, with VPP's table, to which tunnels with a host interface may bring packets.

    `unknown` are the addresses that VPP would not recognise as the router's.
    """
    sources = set()
    for policy, key in _encrypting_policies(outbound) if unknown else ():
        if key in hosts:
            vti = vti_of(policy.if_id) if policy.if_id else None
            sources.add(Route(_source(policy), 0 if vti is None else vti.table))
    return frozenset(
        route for route in unknown if any(it.table == route.table and it.prefix.covers(route.prefix) for it in sources)
    )


def multicast_tables(
    outbound: Iterable[OutboundPolicy], hosts: Collection[TunnelKey], vti_of: VtiOf
) -> frozenset[tuple[int, bool]]:
    """Return the tables into which VTIs with a host interface may bring multicast.

    They are VPP's tables, by number and family (True for IPv6).
    """
    found = set()
    for policy, key in _encrypting_policies(outbound):
        vti = vti_of(policy.if_id) if policy.if_id and key in hosts else None
        if vti is not None:
            found.add((vti.table, len(policy.selector.daddr) == 16))
    return frozenset(found)


def _encrypting_policies(outbound: Iterable[OutboundPolicy]) -> Iterator[tuple[Policy, TunnelKey]]:
    """Yield the policies that PROTECT with one template, each with its tunnel."""
    for each in outbound:
        if _has_one_template(each.policy):
            yield each.policy, tunnel_keys_of_policy(each.policy)[0]


def _has_one_template(policy: Policy) -> bool:
    single = policy.action == PolicyAction.ALLOW and policy.type == PolicyType.MAIN and len(policy.templates) == 1
    return single and not matches_mark(policy)


def _source(policy: Policy) -> Prefix:
    return _selector_prefixes(policy.selector)[0]


def _selector_prefixes(selector: Selector) -> tuple[Prefix, Prefix]:
    rule = widest_rule(selector)
    return rule.src, rule.dst


def _host_prefix(address: bytes) -> Prefix:
    return Prefix(address, 8 * len(address))


def _within(prefix: Prefix, addresses: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the addresses within a prefix, in order."""
    return (address for address in sorted(addresses) if prefix.covers(_host_prefix(address)))
