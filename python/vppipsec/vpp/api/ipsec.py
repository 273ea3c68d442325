"""The requests for SAs, `ipsec` interfaces and tunnel protections (src/vnet/ipsec/ipsec.api)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

from vppipsec.vpp.api.request import API_HEADER, Arguments, Request, address_fields, family_of
from vppipsec.vpp.types import NO_INDEX, SadFlag, SaSpec

IPPROTO_ESP = 50
_ANY4 = bytes(4)


@dataclass(frozen=True, slots=True)
class SadEntryAdd(Request):
    """ipsec_sad_entry_add_v2: add an SA. VPP holds it with one reference."""

    message: ClassVar[str] = "ipsec_sad_entry_add_v2"
    reply_field: ClassVar[str | None] = "stat_index"
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "IIIIB128sIB128sIIB16sB16sIIBBBBBIHHI")

    sad_id: int
    sa: SaSpec

    def arguments(self) -> Arguments:
        sa = self.sa
        return {
            "entry": {
                "sad_id": self.sad_id,
                "spi": sa.spi,
                "protocol": IPPROTO_ESP,
                "crypto_algorithm": int(sa.crypto),
                "crypto_key": {"length": len(sa.crypto_key), "data": sa.crypto_key},
                "integrity_algorithm": int(sa.integ),
                "integrity_key": {"length": len(sa.integ_key), "data": sa.integ_key},
                "flags": int(sa.flags),
                "tunnel": {
                    "instance": NO_INDEX,
                    "src": address_fields(sa.src),
                    "dst": address_fields(sa.dst),
                    "sw_if_index": NO_INDEX,
                    "table_id": 0,
                    "encap_decap_flags": int(sa.tunnel_flags),
                    "mode": 0,
                    "flags": 0,
                    "dscp": 0,
                    "hop_limit": 0,
                },
                "salt": sa.salt,
                "udp_src_port": sa.udp_src_port,
                "udp_dst_port": sa.udp_dst_port,
                "anti_replay_window_size": sa.replay_window,
            }
        }

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        sa = self.sa
        return self._layout.pack(
            msg_id,
            client,
            context,
            self.sad_id,
            sa.spi,
            IPPROTO_ESP,
            sa.crypto,
            len(sa.crypto_key),
            sa.crypto_key,
            sa.integ,
            len(sa.integ_key),
            sa.integ_key,
            sa.flags,
            NO_INDEX,
            family_of(sa.src),
            sa.src,
            family_of(sa.dst),
            sa.dst,
            NO_INDEX,
            0,
            sa.tunnel_flags,
            0,
            0,
            0,
            0,
            sa.salt,
            sa.udp_src_port,
            sa.udp_dst_port,
            sa.replay_window,
        )


@dataclass(frozen=True, slots=True)
class SadEntryUpdate(Request):
    """ipsec_sad_entry_update: change the UDP ports of an SA. Its sequence numbers go on."""

    message: ClassVar[str] = "ipsec_sad_entry_update"
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "I?IB16sB16sIIBBBBBHH")

    sad_id: int
    udp_src_port: int
    udp_dst_port: int

    def arguments(self) -> Arguments:
        tunnel = {
            "instance": NO_INDEX,
            "src": address_fields(_ANY4),
            "dst": address_fields(_ANY4),
            "sw_if_index": NO_INDEX,
            "table_id": 0,
            "encap_decap_flags": 0,
            "mode": 0,
            "flags": 0,
            "dscp": 0,
            "hop_limit": 0,
        }
        return {
            "sad_id": self.sad_id,
            "is_tun": False,
            "tunnel": tunnel,
            "udp_src_port": self.udp_src_port,
            "udp_dst_port": self.udp_dst_port,
        }

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(
            msg_id,
            client,
            context,
            self.sad_id,
            False,
            NO_INDEX,
            0,
            _ANY4,
            0,
            _ANY4,
            NO_INDEX,
            0,
            0,
            0,
            0,
            0,
            0,
            self.udp_src_port,
            self.udp_dst_port,
        )


@dataclass(frozen=True, slots=True)
class SadEntryDel(Request):
    """ipsec_sad_entry_del: release the reference of SadEntryAdd. Never sent while the SA protects, and never twice."""

    message: ClassVar[str] = "ipsec_sad_entry_del"
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "I")

    sad_id: int

    def arguments(self) -> Arguments:
        return {"id": self.sad_id}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.sad_id)


@dataclass(frozen=True, slots=True)
class IpsecItfCreate(Request):
    """ipsec_itf_create: create the point-to-point interface `ipsec<instance>`."""

    message: ClassVar[str] = "ipsec_itf_create"
    reply_field: ClassVar[str | None] = "sw_if_index"
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "IBI")

    instance: int

    def arguments(self) -> Arguments:
        return {"itf": {"user_instance": self.instance, "mode": 0, "sw_if_index": NO_INDEX}}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.instance, 0, NO_INDEX)


@dataclass(frozen=True, slots=True)
class IpsecItfDelete(Request):
    """ipsec_itf_delete: delete an `ipsec` interface. Its routes and its protection must be removed before."""

    message: ClassVar[str] = "ipsec_itf_delete"
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "I")

    sw_if_index: int

    def arguments(self) -> Arguments:
        return {"sw_if_index": self.sw_if_index}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.sw_if_index)


@dataclass(frozen=True, slots=True)
class TunnelProtect(Request):
    """ipsec_tunnel_protect_update: protect an interface by these SAs, in place of its former ones."""

    message: ClassVar[str] = "ipsec_tunnel_protect_update"
    _layout: ClassVar[tuple[struct.Struct, ...]] = tuple(
        struct.Struct(API_HEADER + "IB16sIB" + "I" * n) for n in range(5)
    )

    sw_if_index: int
    outbound: int
    inbound: tuple[int, ...]

    def arguments(self) -> Arguments:
        return {
            "tunnel": {
                "sw_if_index": self.sw_if_index,
                "nh": address_fields(_ANY4),
                "sa_out": self.outbound,
                "n_sa_in": len(self.inbound),
                "sa_in": list(self.inbound),
            }
        }

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        count = len(self.inbound)
        return self._layout[count].pack(
            msg_id, client, context, self.sw_if_index, 0, _ANY4, self.outbound, count, *self.inbound
        )


@dataclass(frozen=True, slots=True)
class TunnelUnprotect(Request):
    """ipsec_tunnel_protect_del: remove a protection. Without one an `ipsec` interface drops packets that are routed into it."""

    message: ClassVar[str] = "ipsec_tunnel_protect_del"
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "IB16s")

    sw_if_index: int

    def arguments(self) -> Arguments:
        return {"sw_if_index": self.sw_if_index, "nh": address_fields(_ANY4)}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.sw_if_index, 0, _ANY4)


_SAMPLE_SA = SaSpec(
    0xC0FFEE01,
    bytes(range(1, 5)),
    bytes(range(17, 33)),
    crypto=12,  # type: ignore[arg-type]  # a plain number checks the layout as well
    crypto_key=bytes(range(32)),
    integ=5,  # type: ignore[arg-type]  # likewise
    integ_key=bytes(range(100, 148)),
    flags=SadFlag.IS_TUNNEL | SadFlag.UDP_ENCAP | SadFlag.IS_INBOUND,
    tunnel_flags=0x15,
    salt=0xDEADBEEF,
    udp_src_port=4501,
    udp_dst_port=4502,
    replay_window=2048,
)

IPSEC_SAMPLES: tuple[Request, ...] = (
    SadEntryAdd(0x01020304, _SAMPLE_SA),
    SadEntryUpdate(0x01020304, 4501, 4502),
    SadEntryDel(0x01020304),
    IpsecItfCreate(0x1234),
    IpsecItfDelete(0x01020305),
    TunnelProtect(0x0102030B, 0x0102030C, (0x0102030D, 0x0102030E)),
    TunnelUnprotect(0x0102030F),
)
"""At least one request of each kind, for comparing the two wire forms. Fields have distinct values where possible."""
