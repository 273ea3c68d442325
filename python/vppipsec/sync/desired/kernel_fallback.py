"""Decides where the packets of tunnels that VPP cannot carry go: to the kernel's stack, or nowhere. Pure.

Outbound: what a policy matches, or what a route sends over a VTI, goes to the kernel. The kernel looks it up again and
encrypts it. Inbound: the peer's ESP goes to the kernel. An ACL sees no SPI, so rules match the peer's addresses. Where
VPP carries another tunnel between the same two addresses, their ESP stays in VPP. VPP then drops the packets of tunnels
that the kernel would have to carry.
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
    """The linux-cp tap that hands a tunnel's packets to the kernel, and rules for what its peer sends.

    Without `target`, VPP drops the packets; `reason` says why.
    """

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
    """Return the kernel fallback of each tunnel that VPP cannot carry. Tunnels that VPP may yet carry are not included.

    `taps`: sw_if_index of a VPP interface -> its linux-cp tap. `vpp_may_have_sent` returns whether this VPP may have
    sent with an SA. The kernel would start such an SA's sequence numbers again.
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
    """Return the rules for what peers send, each once, with the tap that its packets go to."""
    rules = {rule: each.target for each in found.values() if each.target is not None for rule in each.inbound_rules}
    return sorted(rules.items())


def is_unsupported(desired: Translation) -> bool:
    """Return whether VPP cannot carry a tunnel, whatever SA or policy is still expected."""
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
    """Return rules for what the peer sends: ESP or AH, and ESP in UDP, from any port, where an SA uses it.

    The source port is open because a NAT may assign any.
    """
    bits = 8 * len(local)
    rule = Rule(True, Prefix(remote, bits), Prefix(local, bits))
    ports = {
        sa.encap.dport if sa.daddr == local else sa.encap.sport for sa in tunnel.sas.values() if sa.encap is not None
    }
    rules = {rule._replace(proto=sa.proto) for sa in tunnel.sas.values() if sa.proto in (Proto.ESP, Proto.AH)}
    return rules | {rule._replace(proto=_IPPROTO_UDP, sports=ANY_PORT, dports=(port, port)) for port in ports}
