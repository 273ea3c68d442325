"""What becomes of the packets of tunnels that VPP cannot carry: the kernel's stack gets them, or they are dropped. Pure.

Out: what an outbound policy matches, or a route leads over a VTI, goes to the kernel, which looks again and encrypts. In: the
peer's ESP goes there, told by its addresses, since an ACL sees no SPI. So a peer of which VPP carries another tunnel, between the
same two addresses, keeps its ESP in VPP, and what the kernel would have to carry is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from vppipsec.kernel.xfrm.sad_spd import Tunnel, TunnelKey
from vppipsec.kernel.xfrm.values import Proto, Sa
from vppipsec.sync.desired.environment import EnvironmentSnapshot
from vppipsec.sync.desired.policy_layers import KernelTap, Target
from vppipsec.sync.desired.state import OffloadStatus, Translation
from vppipsec.sync.desired.tunnel import endpoints_of
from vppipsec.vpp.types import ANY_PORT, Prefix, Rule

_IPPROTO_UDP = 17


class KernelFallback(NamedTuple):
    """By which tap the kernel gets a group's packets, and rules for what its peer sends. Without `target` they are dropped."""

    target: KernelTap | None
    reason: str = ""
    inbound_rules: tuple[Rule, ...] = ()


def kernel_fallbacks(
    desired: Collection[Translation],
    tunnels: Mapping[TunnelKey, Tunnel],
    env: EnvironmentSnapshot,
    taps: Mapping[int, int],
    vpp_may_have_sent: Callable[[Sa], bool],
) -> dict[TunnelKey, KernelFallback]:
    """Return what becomes of the groups that VPP cannot carry; those that may yet be carried are not among them.

    `taps` are linux-cp's by the sw_if_index of the interface that the kernel has through them. `vpp_may_have_sent` tells of
    an SA with which this VPP may have sent: the kernel would begin its sequence numbers anew.
    """
    unsupported = [each for each in desired if is_unsupported(each) and each.key in tunnels]
    offloaded_ends = (
        {(each.key.low, each.key.high) for each in desired if each.tunnel is not None} if unsupported else set()
    )
    return {
        each.key: _kernel_fallback(tunnels[each.key], env, taps, offloaded_ends, vpp_may_have_sent)
        for each in unsupported
    }


def fallback_inbound_rules(found: Mapping[TunnelKey, KernelFallback]) -> list[tuple[Rule, Target]]:
    """Return the rules for what peers send, each once, with the tap that it goes to."""
    rules = {rule: each.target for each in found.values() if each.target is not None for rule in each.inbound_rules}
    return sorted(rules.items())


def is_unsupported(desired: Translation) -> bool:
    """Tell whether VPP cannot carry a group, nor may be able to once something comes that is expected."""
    return desired.tunnel is None and {decision.status for decision in desired.decisions.values()} == {
        OffloadStatus.UNSUPPORTED
    }


def _kernel_fallback(
    tunnel: Tunnel,
    env: EnvironmentSnapshot,
    taps: Mapping[int, int],
    offloaded_ends: Collection[tuple[bytes, bytes]],
    vpp_may_have_sent: Callable[[Sa], bool],
) -> KernelFallback:
    key = tunnel.key
    local, remote = endpoints_of(key, tunnel, env.addresses)
    if local is None or remote is None:
        return KernelFallback(None, "no interface of VPP has its local address")
    if remote in env.unreachable:
        return KernelFallback(None, "VPP carries it as soon as there is a route")
    tap = taps.get(env.addresses[local])
    if tap is None:
        return KernelFallback(
            None, "the interface with its local address has no linux-cp pair by which the kernel could get them"
        )
    if (key.low, key.high) in offloaded_ends:
        return KernelFallback(
            None, "VPP carries another tunnel between the same addresses, and cannot tell their ESP apart"
        )
    if any(sa.saddr == local and vpp_may_have_sent(sa) for sa in tunnel.sas.values()):
        return KernelFallback(None, "VPP has sent with its SA: the kernel takes over with the next one")
    return KernelFallback(KernelTap(tap), "", tuple(sorted(_inbound_rules(tunnel, local, remote))))


def _inbound_rules(tunnel: Tunnel, local: bytes, remote: bytes) -> set[Rule]:
    """Return rules for what the peer sends: ESP or AH, and where its SAs say so ESP in UDP, whatever port a NAT gives it."""
    bits = 8 * len(local)
    rule = Rule(True, Prefix(remote, bits), Prefix(local, bits))
    ports = {
        sa.encap.dport if sa.daddr == local else sa.encap.sport for sa in tunnel.sas.values() if sa.encap is not None
    }
    rules = {rule._replace(proto=sa.proto) for sa in tunnel.sas.values() if sa.proto in (Proto.ESP, Proto.AH)}
    return rules | {rule._replace(proto=_IPPROTO_UDP, sports=ANY_PORT, dports=(port, port)) for port in ports}
