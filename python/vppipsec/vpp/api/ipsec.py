"""The requests that we send to VPP, as frozen values, with their wire form.

Each class knows its message, the arguments as vpp_papi takes them (`arguments`), and a packed form made with `struct`
(`pack`), many times faster. `vppipsec.vpp.api.codec` compares the two at connect, against VPP's own definitions, and uses the
packed form only where they agree. All numbers go out in network byte order.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from vppipsec.vpp.types import FOR_US, MIN_MTU6, NO_INDEX, RECEIVED, Hop, Lead, Prefix, Route, SadFlag, SaSpec

Arguments = Mapping[str, Any]  # what vpp_papi's serializer takes; nested dictionaries of plain values

VIA_RECURSION = NO_INDEX
"""Answer of LookupRoute: reached through a next hop that names no interface."""
NOT_REACHED = 1 << 32
"""Answer of LookupRoute: no route, or one that drops or ends in VPP itself."""

IPPROTO_ESP = 50
HEADER = ">HII"  # _vl_msg_id, client_index, context
_ANY4 = bytes(4)
PATH_NORMAL = 0  # enum fib_path_type, src/vnet/fib/fib_types.api
PATH_LOCAL = 1
_PATH_DROP = 2
_PATH_INTERFACE_RX = 9

_U32 = struct.Struct(">I")
_I32 = struct.Struct(">i")
_REPLY_SIZE = 10  # _vl_msg_id, context, retval


def family_of(address: bytes) -> int:
    """Return VPP's number of an address's family: ADDRESS_IP4 or ADDRESS_IP6."""
    return 0 if len(address) == 4 else 1


def address_fields(address: bytes) -> dict[str, Any]:
    """Return vl_api_address_t as vpp_papi takes it."""
    return {"af": family_of(address), "un": {"ip4" if len(address) == 4 else "ip6": address}}


def path_fields(sw_if_index: int, table: int, kind: int, family: int, next_hop: bytes = b"") -> dict[str, Any]:
    """Return vl_api_fib_path_t as vpp_papi takes it."""
    return {
        "sw_if_index": sw_if_index,
        "table_id": table,
        "rpf_id": NO_INDEX,
        "weight": 1,
        "preference": 0,
        "type": kind,
        "flags": 0,
        "proto": family,
        "nh": {"address": {"ip6": next_hop.ljust(16, b"\0")}, "via_label": 0, "obj_id": 0, "classify_table_index": 0},
        "n_labels": 0,
        "label_stack": [{"is_uniform": 0, "label": 0, "ttl": 0, "exp": 0}] * 16,
    }


_PATH = struct.Struct(">IIIBBIII16sIIIB112s")


def pack_path(
    sw_if_index: int, kind: int, family: int, next_hop: bytes = b"", weight: int = 1, preference: int = 0
) -> bytes:
    """Return the bytes of such a path, which names no table."""
    return _PATH.pack(sw_if_index, 0, NO_INDEX, weight, preference, kind, 0, family, next_hop, 0, 0, 0, 0, b"")


_PATH_OF = {NO_INDEX: (NO_INDEX, _PATH_DROP), FOR_US: (NO_INDEX, PATH_LOCAL)}


def _path_to(lead: int) -> tuple[int, int]:
    """Return the sw_if_index and the type of the path that a route takes."""
    if lead >= RECEIVED:
        return lead - RECEIVED, _PATH_INTERFACE_RX
    return _PATH_OF.get(lead) or (lead, PATH_NORMAL)


class Request:
    """What every request offers to the client."""

    __slots__ = ()

    message: ClassVar[str]
    """Name of VPP's message."""
    extra: ClassVar[str | None] = None
    """Name of what the reply carries behind `retval`, if anything."""
    extra_first: ClassVar[bool] = False
    """True where the reply carries `extra` before `retval`, not behind it."""
    done_before: ClassVar[int] = 0
    """The error number by which VPP says that it was so before; 0 where it has none."""

    def arguments(self) -> Arguments:
        """Return the message's fields as vpp_papi's serializer takes them, without the header."""
        raise TypeError(f"{type(self).__name__} says no arguments")

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        """Return the message's bytes."""
        raise TypeError(f"{type(self).__name__} has no packed form")

    @classmethod
    def read(cls, reply: bytes | bytearray) -> int:
        """Return the one number that we use of what the reply carries behind `retval`, 0 where it carries nothing."""
        return 0 if cls.extra is None else int(_U32.unpack_from(reply, _REPLY_SIZE)[0])

    @classmethod
    def read_reply(cls, reply: bytes | bytearray, retval: int) -> tuple[int, int]:
        """Return `retval` and what `read` says of a reply that has something behind, or before, the field called `retval`.

        `retval` is what stands at that field's usual place.
        """
        if cls.extra_first:
            return int(_I32.unpack_from(reply, _REPLY_SIZE)[0]), retval & 0xFFFFFFFF
        return retval, 0 if retval else cls.read(reply)


@dataclass(frozen=True, slots=True)
class AddSa(Request):
    """ipsec_sad_entry_add_v2: add an SA with one reference."""

    message: ClassVar[str] = "ipsec_sad_entry_add_v2"
    extra: ClassVar[str | None] = "stat_index"
    _layout: ClassVar[struct.Struct] = struct.Struct(HEADER + "IIIIB128sIB128sIIB16sB16sIIBBBBBIHHI")

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
class SetSaPorts(Request):
    """ipsec_sad_entry_update: change the UDP ports of an SA, keeping its sequence numbers."""

    message: ClassVar[str] = "ipsec_sad_entry_update"
    _layout: ClassVar[struct.Struct] = struct.Struct(HEADER + "I?IB16sB16sIIBBBBBHH")

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
class DelSa(Request):
    """ipsec_sad_entry_del: drop the one reference that AddSa took. Never sent while the SA protects, and never twice."""

    message: ClassVar[str] = "ipsec_sad_entry_del"
    _layout: ClassVar[struct.Struct] = struct.Struct(HEADER + "I")

    sad_id: int

    def arguments(self) -> Arguments:
        return {"id": self.sad_id}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.sad_id)


@dataclass(frozen=True, slots=True)
class CreateItf(Request):
    """ipsec_itf_create: make interface `ipsec<instance>`, point to point."""

    message: ClassVar[str] = "ipsec_itf_create"
    extra: ClassVar[str | None] = "sw_if_index"
    _layout: ClassVar[struct.Struct] = struct.Struct(HEADER + "IBI")

    instance: int

    def arguments(self) -> Arguments:
        return {"itf": {"user_instance": self.instance, "mode": 0, "sw_if_index": NO_INDEX}}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.instance, 0, NO_INDEX)


@dataclass(frozen=True, slots=True)
class DeleteItf(Request):
    """ipsec_itf_delete: remove an `ipsec` interface. Its routes and its protection go first."""

    message: ClassVar[str] = "ipsec_itf_delete"
    _layout: ClassVar[struct.Struct] = struct.Struct(HEADER + "I")

    sw_if_index: int

    def arguments(self) -> Arguments:
        return {"sw_if_index": self.sw_if_index}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.sw_if_index)


@dataclass(frozen=True, slots=True)
class TagItf(Request):
    """sw_interface_tag_add_del: put the tag on an interface that tells it is ours. At most 63 bytes of ASCII."""

    message: ClassVar[str] = "sw_interface_tag_add_del"
    _layout: ClassVar[struct.Struct] = struct.Struct(HEADER + "?I64s")

    sw_if_index: int
    tag: str

    def arguments(self) -> Arguments:
        return {"is_add": True, "sw_if_index": self.sw_if_index, "tag": self.tag}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, True, self.sw_if_index, self.tag.encode("ascii"))


@dataclass(frozen=True, slots=True)
class SetUnnumbered(Request):
    """sw_interface_set_unnumbered: let an `ipsec` interface borrow the addresses of `lender`, so that it passes IP."""

    message: ClassVar[str] = "sw_interface_set_unnumbered"
    _layout: ClassVar[struct.Struct] = struct.Struct(HEADER + "II?")

    sw_if_index: int
    lender: int
    is_add: bool = True

    def arguments(self) -> Arguments:
        # VPP's names: `sw_if_index` lends, `unnumbered_sw_if_index` borrows
        return {
            "sw_if_index": self.lender,
            "unnumbered_sw_if_index": self.sw_if_index,
            "is_add": self.is_add,
        }

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.lender, self.sw_if_index, self.is_add)


@dataclass(frozen=True, slots=True)
class EnableIp6(Request):
    """sw_interface_ip6_enable_disable: let an interface pass IPv6; borrowing addresses alone does not.

    No dump tells whether it does already, so VPP may be asked a second time where we were ended in between.
    """

    message: ClassVar[str] = "sw_interface_ip6_enable_disable"
    done_before: ClassVar[int] = -81  # VALUE_EXIST
    _layout: ClassVar[struct.Struct] = struct.Struct(HEADER + "I?")

    sw_if_index: int

    def arguments(self) -> Arguments:
        return {"sw_if_index": self.sw_if_index, "enable": True}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.sw_if_index, True)


@dataclass(frozen=True, slots=True)
class DisableIp6(Request):
    """sw_interface_ip6_enable_disable: let an interface pass no IPv6. VPP may be asked a second time, as for EnableIp6."""

    message: ClassVar[str] = "sw_interface_ip6_enable_disable"
    done_before: ClassVar[int] = -62  # IP6_NOT_ENABLED
    _layout: ClassVar[struct.Struct] = struct.Struct(HEADER + "I?")

    sw_if_index: int

    def arguments(self) -> Arguments:
        return {"sw_if_index": self.sw_if_index, "enable": False}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.sw_if_index, False)


@dataclass(frozen=True, slots=True)
class SetItfUp(Request):
    """sw_interface_set_flags: administratively up."""

    message: ClassVar[str] = "sw_interface_set_flags"
    _layout: ClassVar[struct.Struct] = struct.Struct(HEADER + "II")

    sw_if_index: int

    def arguments(self) -> Arguments:
        return {"sw_if_index": self.sw_if_index, "flags": 1}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.sw_if_index, 1)


@dataclass(frozen=True, slots=True)
class SetMtu(Request):
    """sw_interface_set_mtu: let an interface take packets up to this length, bytes; IPv6 ones as long as all links do."""

    message: ClassVar[str] = "sw_interface_set_mtu"
    _layout: ClassVar[struct.Struct] = struct.Struct(HEADER + "IIIII")

    sw_if_index: int
    mtu: int

    def _mtus(self) -> tuple[int, int, int, int]:
        """Of layer 3, and where that is another one of IPv4, of IPv6 and of MPLS."""
        return self.mtu, 0, MIN_MTU6 if self.mtu < MIN_MTU6 else 0, 0

    def arguments(self) -> Arguments:
        return {"sw_if_index": self.sw_if_index, "mtu": list(self._mtus())}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.sw_if_index, *self._mtus())


@dataclass(frozen=True, slots=True)
class Protect(Request):
    """ipsec_tunnel_protect_update: use these SAs on an `ipsec` interface, in place of those before."""

    message: ClassVar[str] = "ipsec_tunnel_protect_update"
    _layout: ClassVar[tuple[struct.Struct, ...]] = tuple(struct.Struct(HEADER + "IB16sIB" + "I" * n) for n in range(5))

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
class Unprotect(Request):
    """ipsec_tunnel_protect_del: an `ipsec` interface without protection drops what is routed into it."""

    message: ClassVar[str] = "ipsec_tunnel_protect_del"
    _layout: ClassVar[struct.Struct] = struct.Struct(HEADER + "IB16s")

    sw_if_index: int

    def arguments(self) -> Arguments:
        return {"sw_if_index": self.sw_if_index, "nh": address_fields(_ANY4)}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.sw_if_index, 0, _ANY4)


@dataclass(frozen=True, slots=True)
class ChangeRoute(Request):
    """ip_route_add_del_v2: add, replace or remove our FIB source's route of `prefix`, in the table `table`.

    It leads into an interface, to a next hop there where one is given, or has packets received on one where RECEIVED is added,
    or drops where `lead` is NO_INDEX, or ends in the router where it is FOR_US, or several share its packets. Removing takes all
    paths of our source; NO_INDEX is right then, since VPP refuses to hear of an interface that is gone. It does not refuse to
    have packets received on one that is not there, nor its deletion, and dies of the first such packet. To have them received
    is no way to an address, and what comes from there for the router drops (ip4_local_check_src); so there is a second path
    then, which leads into that interface and is never taken, as it has the lower preference (fib_path_contribute_urpf).
    """

    message: ClassVar[str] = "ip_route_add_del_v2"
    extra: ClassVar[str | None] = "stats_index"
    _layout: ClassVar[struct.Struct] = struct.Struct(HEADER + "??IIB16sBBB")

    lead: Lead
    prefix: Prefix
    source: int
    is_add: bool
    table: int = 0
    next_hop: bytes = b""

    @property
    def route(self) -> Route:
        """Which route it is about."""
        return Route(self.prefix, self.table)

    @property
    def _hops(self) -> tuple[Hop, ...]:
        return (Hop(self.lead, 1),) if isinstance(self.lead, int) else self.lead

    def _never_taken(self) -> list[Hop]:
        return [Hop(hop.sw_if_index - RECEIVED, 1) for hop in self._hops if hop.sw_if_index >= RECEIVED]

    def arguments(self) -> Arguments:
        family = family_of(self.prefix.address)
        paths = [
            path_fields(index, 0, kind, family, hop.next_hop or self.next_hop)
            | {"weight": hop.weight, "preference": preference}
            for preference, hops in enumerate((self._hops, self._never_taken()))
            for hop in hops
            for index, kind in (_path_to(hop.sw_if_index),)
        ]
        return {
            "is_add": self.is_add,
            "is_multipath": False,
            "route": {
                "table_id": self.table,
                "stats_index": 0,
                "prefix": {"address": address_fields(self.prefix.address), "len": self.prefix.length},
                "n_paths": len(paths),
                "src": self.source,
                "paths": paths,
            },
        }

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        address, length = self.prefix
        family, hops, spare = family_of(address), self._hops, self._never_taken()
        head = self._layout.pack(
            msg_id,
            client,
            context,
            self.is_add,
            False,
            self.table,
            0,
            family,
            address,
            length,
            len(hops) + len(spare),
            self.source,
        )
        if len(hops) == 1 and not spare:  # as of nearly all
            return head + self._pack_path(hops[0], family)
        paths = [self._pack_path(hop, family) for hop in hops]
        return head + b"".join(paths + [self._pack_path(hop, family, 1) for hop in spare])

    def _pack_path(self, hop: Hop, family: int, preference: int = 0) -> bytes:
        index, kind = _path_to(hop.sw_if_index)
        next_hop = hop.next_hop or self.next_hop
        return pack_path(index, kind, family, next_hop, hop.weight, preference)


@dataclass(frozen=True, slots=True)
class LookupRoute(Request):
    """ip_route_lookup_v2: which interface leads to an address, in table 0; longest prefix match.

    The answer is a sw_if_index, VIA_RECURSION or NOT_REACHED.
    """

    message: ClassVar[str] = "ip_route_lookup_v2"
    extra: ClassVar[str | None] = "route"
    _layout: ClassVar[struct.Struct] = struct.Struct(HEADER + "IBB16sB")
    _answer: ClassVar[struct.Struct] = struct.Struct(">IIB16sBBBIIIBBI")  # ip_route_v2 up to the first path's type

    address: bytes

    def arguments(self) -> Arguments:
        prefix = {"address": address_fields(self.address), "len": 8 * len(self.address)}
        return {"table_id": 0, "exact": 0, "prefix": prefix}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        address = self.address
        return self._layout.pack(msg_id, client, context, 0, 0, family_of(address), address, 8 * len(address))

    @classmethod
    def read(cls, reply: bytes | bytearray) -> int:
        if len(reply) < _REPLY_SIZE + cls._answer.size:
            return NOT_REACHED
        _, _, _, _, _, paths, _, sw_if_index, _, _, _, _, kind = cls._answer.unpack_from(reply, _REPLY_SIZE)
        return int(sw_if_index) if paths and kind == PATH_NORMAL else NOT_REACHED


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

SAMPLES: tuple[Request, ...] = (
    AddSa(0x01020304, _SAMPLE_SA),
    SetSaPorts(0x01020304, 4501, 4502),
    DelSa(0x01020304),
    CreateItf(0x1234),
    DeleteItf(0x01020305),
    TagItf(0x01020306, "a tag"),
    SetUnnumbered(0x01020307, 0x01020308),
    EnableIp6(0x01020309),
    DisableIp6(0x01020316),
    SetItfUp(0x0102030A),
    SetMtu(0x01020315, 0x0102),
    Protect(0x0102030B, 0x0102030C, (0x0102030D, 0x0102030E)),
    Unprotect(0x0102030F),
    ChangeRoute(0x01020310, Prefix(bytes(range(33, 49)), 97), 23, True, 0x01020311, bytes(range(65, 81))),
    ChangeRoute(
        (Hop(0x01020312, 7, bytes(range(81, 85))), Hop(RECEIVED + 0x01020313, 9)),
        Prefix(bytes(range(33, 37)), 25),
        23,
        False,
        0x01020314,
    ),
    LookupRoute(bytes(range(49, 65))),
)
"""At least one request of each kind, with every field distinct where it can be, for comparing the two wire forms."""

SAMPLE_ROUTE: Mapping[str, Any] = {
    **ChangeRoute(0x01020304, Prefix(bytes(range(33, 49)), 97), 23, True).arguments()["route"],
}
"""A route as vpp_papi takes it, through interface 0x01020304, for checking how replies are read."""
