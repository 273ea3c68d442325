"""What becomes of the packets of tunnels that VPP cannot carry: the kernel's stack gets them, or they are dropped. Pure.

Out: what an outbound policy matches, or a route leads over a VTI, goes to the kernel, which looks again and encrypts. In: the
peer's ESP goes there, told by its addresses, since an ACL sees no SPI. So a peer of which VPP carries another tunnel, between the
same two addresses, keeps its ESP in VPP, and what the kernel would have to carry is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from vppipsec.kernel.xfrm.sad_spd import Group, GroupKey
from vppipsec.kernel.xfrm.values import Proto, Sa
from vppipsec.sync.desired.environment import Environment
from vppipsec.sync.desired.policy_layers import Handover, Target
from vppipsec.sync.desired.state import Desired, Fate
from vppipsec.sync.desired.tunnel import ends_of
from vppipsec.vpp.types import ANY_PORT, Prefix, Rule

_UDP = 17


class Fallback(NamedTuple):
    """By which tap the kernel gets a group's packets, and rules for what its peer sends. Without `target` they are dropped."""

    target: Handover | None
    reason: str = ""
    inbound: tuple[Rule, ...] = ()


def fallbacks(
    desired: Collection[Desired],
    groups: Mapping[GroupKey, Group],
    env: Environment,
    taps: Mapping[int, int],
    has_sent: Callable[[Sa], bool],
) -> dict[GroupKey, Fallback]:
    """Return what becomes of the groups that VPP cannot carry; those that may yet be carried are not among them.

    `taps` are linux-cp's by the sw_if_index of the interface that the kernel has through them. `has_sent` tells of an SA with
    which this VPP may have sent: the kernel would begin its sequence numbers anew.
    """
    lacking = [each for each in desired if is_beyond_vpp(each) and each.key in groups]
    carried = {(each.key.low, each.key.high) for each in desired if each.tunnel is not None} if lacking else set()
    return {each.key: _fallback(groups[each.key], env, taps, carried, has_sent) for each in lacking}


def inbound_of(found: Mapping[GroupKey, Fallback]) -> list[tuple[Rule, Target]]:
    """Return the rules for what peers send, each once, with the tap that it goes to."""
    rules = {rule: each.target for each in found.values() if each.target is not None for rule in each.inbound}
    return sorted(rules.items())


def is_beyond_vpp(desired: Desired) -> bool:
    """Tell whether VPP cannot carry a group, nor may be able to once something comes that is expected."""
    return desired.tunnel is None and {verdict.fate for verdict in desired.verdicts.values()} == {Fate.UNSUPPORTED}


def _fallback(
    group: Group,
    env: Environment,
    taps: Mapping[int, int],
    carried: Collection[tuple[bytes, bytes]],
    has_sent: Callable[[Sa], bool],
) -> Fallback:
    key = group.key
    local, remote = ends_of(key, group, env.addresses)
    if local is None or remote is None:
        return Fallback(None, "no interface of VPP has its local address")
    if remote in env.unreachable:
        return Fallback(None, "VPP carries it as soon as there is a route")
    tap = taps.get(env.addresses[local])
    if tap is None:
        return Fallback(
            None, "the interface with its local address has no linux-cp pair by which the kernel could get them"
        )
    if (key.low, key.high) in carried:
        return Fallback(None, "VPP carries another tunnel between the same addresses, and cannot tell their ESP apart")
    if any(sa.saddr == local and has_sent(sa) for sa in group.sas.values()):
        return Fallback(None, "VPP has sent with its SA: the kernel takes over with the next one")
    return Fallback(Handover(tap), "", tuple(sorted(_inbound(group, local, remote))))


def _inbound(group: Group, local: bytes, remote: bytes) -> set[Rule]:
    """Return rules for what the peer sends: ESP or AH, and where its SAs say so ESP in UDP, whatever port a NAT gives it."""
    bits = 8 * len(local)
    rule = Rule(True, Prefix(remote, bits), Prefix(local, bits))
    ports = {
        sa.encap.dport if sa.daddr == local else sa.encap.sport for sa in group.sas.values() if sa.encap is not None
    }
    rules = {rule._replace(proto=sa.proto) for sa in group.sas.values() if sa.proto in (Proto.ESP, Proto.AH)}
    return rules | {rule._replace(proto=_UDP, sports=ANY_PORT, dports=(port, port)) for port in ports}
