"""Which tunnels get a host interface, and what the kernel is to send there: packets of the router itself. Pure: no I/O, no state.

The kernel would encrypt such packets with the SA that VPP uses, and count its sequence numbers for itself: the peer drops what
one of the two sends. So where a tunnel has a host interface the kernel gives VPP the packets in clear. Only VPP encrypts then.

What policies without if_id are for is told by the SAs that the kernel is about to use, whatever the policy. Of what is sent on a
VTI each child's host interface gets what the VTI's policies have for it, and the rest is left to the kernel.
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
"""Host interfaces that we make at most. Each keeps 256 of VPP's buffers, of which it has 16,384 for all if nobody sets more."""

NO_OWN_SOURCE = "the router has no address that its policy is for"
VtiOf = Callable[[int], Vti | None]
"""Returns the kernel's xfrm interface of an if_id, None where there is none."""


def why_kernel_sends(policy: Policy, own: Collection[bytes], vti_of: VtiOf) -> str:
    """Say why the kernel itself encrypts what the router sends by an outbound policy; nothing where VPP can do it.

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
    """Return the groups whose tunnels VPP shall encrypt the router's own packets for, those of VTIs first.

    Of others those are looked for that have a host interface, `actual`, and as many as there can be of them.
    """
    found: dict[bool, dict[TunnelKey, None]] = {True: {}, False: {}}
    for policy, key in _encrypting_policies(outbound):
        is_of_use = key.if_id or len(found[False]) < MAX_HOST_INTERFACES or key in actual
        if is_of_use and not why_kernel_sends(policy, own, vti_of):
            found[bool(key.if_id)][key] = None
    return [*found[True], *found[False]]


def choose_host_interfaces(candidates: Sequence[TunnelKey], actual: Collection[TunnelKey]) -> frozenset[TunnelKey]:
    """Return those of `candidates` that get a host interface; the ones that have one keep it before others get one."""
    return frozenset(sorted(candidates, key=lambda key: key not in actual)[:MAX_HOST_INTERFACES])


def host_redirects(
    outbound: Sequence[OutboundPolicy], hosts: Mapping[TunnelKey, str], own: Collection[bytes], vti_of: VtiOf
) -> HostRedirects:
    """Return what the kernel is to send to the host interfaces that there are, `hosts`.

    Policies are in the order in which the kernel asks them.
    """
    return HostRedirects(*_vti_redirects(outbound, hosts, own, vti_of), _marks(outbound, hosts, own, vti_of))


def _marks(
    outbound: Iterable[OutboundPolicy], hosts: Mapping[TunnelKey, str], own: Collection[bytes], vti_of: VtiOf
) -> dict[TunnelSas, str]:
    """Return by which SAs goes what belongs on host interfaces, by policies without if_id.

    Left out are those that a policy with several transformations begins with, as VPP could not tell its packets.
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
    """Return the ways out and back of VTIs. All policies choose that may match what leads to a host interface."""
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
    """Tell whether a packet may be between the ends of one and of any other."""
    return any(destination.overlaps(one[1]) and source.overlaps(one[0]) for source, destination in pairs)


def _host_interface_of(policy: Policy, hosts: Mapping[TunnelKey, str], own: Collection[bytes], vti_of: VtiOf) -> str:
    """Return the host interface that the router's own packets go to by a policy, nothing where the kernel does what it says."""
    host = hosts.get(tunnel_keys_of_policy(policy)[0]) if _has_one_template(policy) else None
    return host if host is not None and not why_kernel_sends(policy, own, vti_of) else ""


def local_addresses(
    outbound: Iterable[OutboundPolicy], hosts: Collection[TunnelKey], unknown: Collection[Route], vti_of: VtiOf
) -> frozenset[Route]:
    """Return those addresses of the router that tunnels with a host interface may bring packets for, each in VPP's table.

    `unknown` are the ones that VPP would not know for the router's.
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
    """Return VPP's tables, by number and family (True for IPv6), in which VTIs with a host interface may bring multicast."""
    found = set()
    for policy, key in _encrypting_policies(outbound):
        vti = vti_of(policy.if_id) if policy.if_id and key in hosts else None
        if vti is not None:
            found.add((vti.table, len(policy.selector.daddr) == 16))
    return frozenset(found)


def _encrypting_policies(outbound: Iterable[OutboundPolicy]) -> Iterator[tuple[Policy, TunnelKey]]:
    """Yield the policies that lead into a tunnel, each with its group."""
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
