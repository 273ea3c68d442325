"""Turns the kernel's selectors into rules of VPP's ACLs that match the same packets. Pure: no I/O, no state.

The kernel compares addresses, protocol, and ports under masks. For ICMP, type and code replace source and destination
port (xfrm4_selector_match in net/xfrm/xfrm_policy.c, xfrm_flowi_sport in include/net/xfrm.h). VPP compares ranges of
ports for TCP and UDP only, and ICMP's type and code (acl_fill_5tuple_l4_and_pkt_data in
src/plugins/acl/public_inlines.h).
"""

from __future__ import annotations

from vppipsec.kernel.xfrm.values import Selector
from vppipsec.sync.desired.algorithms import Unsupported
from vppipsec.vpp.types import ANY_PORT, Prefix, Rule

TCP, UDP = 6, 17
ICMP, ICMP6 = 1, 58
_KERNEL_KNOWS_PORTS = {33: "DCCP", 132: "SCTP", 136: "UDP-Lite"}
"""Further protocols whose ports the kernel compares and VPP does not."""
_MAX_ICMP_TYPE = 0xFF


def rules_of(selector: Selector) -> tuple[Rule, ...]:
    """Return rules that permit exactly the packets that a selector matches. Raises Unsupported where there are none."""
    widest = widest_rule(selector)
    if selector.ifindex:
        raise Unsupported("its policy is for one interface of the kernel's")
    if not selector.sport_mask and not selector.dport_mask:
        return (widest,)
    sports, dports = _range(selector.sport, selector.sport_mask), _range(selector.dport, selector.dport_mask)
    icmp = ICMP6 if len(selector.daddr) == 16 else ICMP
    if selector.proto in (TCP, UDP):
        return (widest._replace(sports=sports, dports=dports),)
    if selector.proto == icmp:
        if _never_icmp(sports) or _never_icmp(dports):
            raise Unsupported("its policy names an ICMP type or code above 255")
        return (widest._replace(sports=_types(sports), dports=_types(dports)),)
    if selector.proto:
        name = _KERNEL_KNOWS_PORTS.get(selector.proto, f"IP protocol {selector.proto}")
        raise Unsupported(f"its policy names ports of {name}: VPP knows those of TCP and UDP")
    raise Unsupported("its policy names ports but no protocol: VPP knows those of TCP and UDP")


def widest_rule(selector: Selector) -> Rule:
    """Return the narrowest rule by addresses and protocol alone that permits every packet that a selector matches."""
    source, destination = (Prefix(address, 8 * len(address)) for address in (selector.saddr, selector.daddr))
    return Rule(
        True, source.shortened(selector.prefixlen_s), destination.shortened(selector.prefixlen_d), selector.proto
    )


def _range(port: int, mask: int) -> tuple[int, int]:
    """Return the ports that equal `port` under a mask, in host order, as an inclusive range. Raises Unsupported."""
    free = ~mask & 0xFFFF
    if free & (free + 1):
        raise Unsupported(f"its policy's port mask {mask:#06x} is no range")
    return port & mask, port & mask | free


def _never_icmp(values: tuple[int, int]) -> bool:
    return values[0] > _MAX_ICMP_TYPE


def _types(values: tuple[int, int]) -> tuple[int, int]:
    """Return a range limited to one byte. The range for any port stays as VPP writes it."""
    return values if values == ANY_PORT else (values[0], min(values[1], _MAX_ICMP_TYPE))
