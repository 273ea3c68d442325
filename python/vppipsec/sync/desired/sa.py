"""Turns one kernel SA into the SA that VPP should hold, or into the reason why it cannot. Pure: no I/O, no state."""

from __future__ import annotations

from vppipsec.kernel.xfrm.values import Mode, Proto, Sa, SaDir, SaExtraFlag, SaFlag
from vppipsec.sync.desired.algorithms import Unsupported, suite_of
from vppipsec.sync.desired.environment import EnvironmentSnapshot
from vppipsec.sync.desired.state import OffloadDecision, OffloadStatus
from vppipsec.vpp.gre_ipip import GreIpipInterface
from vppipsec.vpp.guard import MAX_WINDOW_PACKETS
from vppipsec.vpp.types import SadFlag, SaSpec, TunnelFlag

ESPINUDP = 2
"""UDP_ENCAP_ESPINUDP (include/uapi/linux/udp.h): RFC 3948."""

_MIN_WINDOW_PACKETS = 64


def direction_of(spec: SaSpec) -> str:
    """Return the direction of an SA as status shows it."""
    return "in" if spec.inbound else "out"


def decision_on(sa: Sa, local: bytes, env: EnvironmentSnapshot, gre_ipip: GreIpipInterface | None) -> OffloadDecision:
    """Return the decision on one SA of a tunnel; `local` is the tunnel's local address."""
    inbound = sa.daddr == local
    direction = "in" if inbound else "out"
    try:
        if sa.direction and inbound != (sa.direction == SaDir.IN):
            raise Unsupported("its direction contradicts its endpoints")
        return OffloadDecision(OffloadStatus.OFFLOADED, "", _spec(sa, inbound, env, gre_ipip), direction, sa)
    except Unsupported as why:
        return OffloadDecision(OffloadStatus.UNSUPPORTED, str(why), None, direction, sa)


def _spec(sa: Sa, inbound: bool, env: EnvironmentSnapshot, gre_ipip: GreIpipInterface | None) -> SaSpec:
    """Return one SA as VPP should hold it. Raises Unsupported."""
    if sa.proto != Proto.ESP:
        raise Unsupported(f"{_proto_name(sa.proto)}: only ESP is carried")
    if sa.mode == Mode.TRANSPORT and gre_ipip is None:
        raise Unsupported("transport mode: VPP has no gre or ipip interface between these hosts that its policy is for")
    if sa.mode == Mode.TRANSPORT and gre_ipip is not None and gre_ipip.unsupported_reason:
        what = "goes on in clear" if gre_ipip.is_multipoint else "sends nothing"
        raise Unsupported(f"transport mode for {gre_ipip.name}, which {what}: {gre_ipip.unsupported_reason}")
    if sa.mode not in (Mode.TUNNEL, Mode.TRANSPORT):
        raise Unsupported(f"{_mode_name(sa.mode)} mode: only tunnel and transport mode are carried")
    if not sa.spi:
        raise Unsupported("an SPI of 0")
    if len(sa.saddr) != len(sa.daddr):
        raise Unsupported("its endpoints are of different families")
    if sa.mark is not None:
        raise Unsupported("a firewall mark: packets in VPP carry none")
    if sa.tfcpad:
        raise Unsupported("traffic flow confidentiality padding")
    if sa.flags & SaFlag.DECAP_DSCP and inbound and sa.mode == Mode.TUNNEL:
        raise Unsupported("copying DSCP out of the tunnel (decap-dscp)")
    suite = suite_of(sa, env.ciphers)
    flags: int = SadFlag.IS_TUNNEL if sa.mode == Mode.TUNNEL else SadFlag.NONE
    udp_src_port = udp_dst_port = 0
    if sa.flags & SaFlag.ESN:
        flags |= SadFlag.USE_ESN
    if sa.encap is not None:
        if sa.encap.kind != ESPINUDP:
            raise Unsupported(f"encapsulation of kind {sa.encap.kind}: only ESP in UDP (RFC 3948) is carried")
        if not sa.encap.sport or not sa.encap.dport:
            raise Unsupported("UDP encapsulation with port 0")
        flags |= SadFlag.UDP_ENCAP
        udp_src_port, udp_dst_port = sa.encap.sport, sa.encap.dport
    window = 0
    if inbound:
        flags |= SadFlag.IS_INBOUND
        if sa.replay_window > MAX_WINDOW_PACKETS:
            raise Unsupported(
                f"an anti-replay window of {sa.replay_window:,} packets: VPP is given {MAX_WINDOW_PACKETS:,} at most"
            )
        if sa.replay_window:
            flags |= SadFlag.USE_ANTI_REPLAY
            window = vpp_replay_window(sa.replay_window)
    return SaSpec(
        spi=sa.spi,
        src=sa.saddr,
        dst=sa.daddr,
        crypto=suite.crypto,
        crypto_key=suite.crypto_key,
        integ=suite.integ,
        integ_key=suite.integ_key,
        flags=flags,
        tunnel_flags=_tunnel_flags(sa, inbound) if sa.mode == Mode.TUNNEL else TunnelFlag.NONE,
        salt=suite.salt,
        udp_src_port=udp_src_port,
        udp_dst_port=udp_dst_port,
        replay_window=window,
    )


def vpp_replay_window(window: int) -> int:
    """Return an anti-replay window, in packets, rounded up to one that VPP has: 64, or a larger power of two.

    Source: ipsec_sa_add_and_lock.
    """
    return max(_MIN_WINDOW_PACKETS, 1 << (window - 1).bit_length())


def _tunnel_flags(sa: Sa, inbound: bool) -> int:
    """Return VPP's flags for the kernel's DSCP and ECN behaviour (xfrm4_tunnel_encap_add, xfrm_prepare_input in
    net/xfrm).

    The kernel also copies DF. VPP 26.06 could, but then writes a wrong header checksum, and peers drop such packets:
    tunnel_encap_fixup_4o4_w_chksum uses the TOS as the flags (src/vnet/tunnel/tunnel_dp.h). So the outer header never
    has DF.
    """
    flags: int = TunnelFlag.NONE
    if inbound:
        return flags if sa.flags & SaFlag.NOECN else flags | TunnelFlag.DECAP_COPY_ECN
    if not sa.extra_flags & SaExtraFlag.DONT_ENCAP_DSCP:
        flags |= TunnelFlag.ENCAP_COPY_DSCP
    if not sa.flags & SaFlag.NOECN:
        flags |= TunnelFlag.ENCAP_COPY_ECN
    return flags


def _proto_name(proto: int) -> str:
    return {Proto.AH.value: "AH", Proto.COMP.value: "IPComp"}.get(proto, f"IP protocol {proto}")


def _mode_name(mode: int) -> str:
    return "BEET" if mode == Mode.BEET else f"unknown ({mode})"
