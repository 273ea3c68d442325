"""The stand-in's gre and ipip interfaces (src/plugins/gre/interface.c, src/vnet/ipip/ipip.c). The service creates none itself.

The gre plugin is optional in VPP. The stand-in always has it. It has no 6RD.
"""

from __future__ import annotations

from typing import Any

from vppstandin.base import (
    IF_ALREADY_EXISTS,
    INSTANCE_IN_USE,
    INVALID_DST_ADDRESS,
    INVALID_PROTOCOL,
    NO_INDEX,
    NO_SUCH_ENTRY,
    NO_SUCH_FIB,
    SAME_SRC_DST,
    Pool,
    Refusal,
    ReplyFields,
    address_of,
    address_reply,
)
from vppstandin.fib import TableKey, Tables
from vppstandin.interfaces import Interfaces

GRE_IPIP_KINDS = ("GRE tunnel device", "IPIP tunnel device")
"""Device classes other than `ipsec` that VPP can protect (ip_tun_desc)."""
_MULTIPOINT = 1
_L3_FRAME, _L2_FRAME = 65536, 9022  # longest frame, bytes, including the tunnel's headers


class _TunnelKind:
    """The tunnels of one kind: the fields of their requests, by sw_if_index.

    `header` is the length of the header between the two IP headers, bytes.
    """

    def __init__(self, name: str, device: str, header: int) -> None:
        self.name = name
        self.device = device
        self.header = header
        self.by_index: dict[int, Any] = {}
        self.order: dict[int, int] = {}
        self.pool = Pool()

    def details(self, message: Any) -> list[ReplyFields]:
        return [
            {"tunnel": self._fields(self.by_index[index])}
            for index in sorted(self.order, key=self.order.__getitem__)
            if message.sw_if_index in (NO_INDEX, index)
        ]

    @staticmethod
    def _fields(tunnel: Any) -> ReplyFields:
        ends = {name: address_reply(address_of(getattr(tunnel, name))) for name in ("src", "dst")}
        return {**tunnel._asdict(), **ends}

    def forget(self, sw_if_index: int) -> None:
        if self.by_index.pop(sw_if_index, None) is not None:
            self.pool.give(self.order.pop(sw_if_index))


class GreIpipTunnels:
    """Handlers of gre and ipip tunnels."""

    def __init__(self, tables: Tables, interfaces: Interfaces) -> None:
        self._tables = tables
        self._interfaces = interfaces
        self._gre = _TunnelKind("gre", GRE_IPIP_KINDS[0], 4)
        self._ipip = _TunnelKind("ipip", GRE_IPIP_KINDS[1], 0)
        interfaces.on_remove += [self._gre.forget, self._ipip.forget]

    def gre_tunnel_add_del_v2(self, message: Any) -> ReplyFields:
        tunnel = message.tunnel
        self._check(tunnel, tunnel.outer_table_id)
        found = self._find(self._gre, tunnel, ("type", "mode", "session_id", "outer_table_id", "key"))
        if message.is_add:
            return self._add(self._gre, tunnel, found)
        if found is None:
            raise Refusal(NO_SUCH_ENTRY)
        self._interfaces.remove(self._interfaces.get(found))
        return {"sw_if_index": found}

    def gre_tunnel_v2_dump(self, message: Any) -> list[ReplyFields]:
        return self._gre.details(message)

    def ipip_add_tunnel(self, message: Any) -> ReplyFields:
        tunnel = message.tunnel
        self._check(tunnel, tunnel.table_id)
        return self._add(self._ipip, tunnel, self._find(self._ipip, tunnel, ("mode", "table_id")))

    def ipip_del_tunnel(self, message: Any) -> ReplyFields:
        if message.sw_if_index not in self._ipip.by_index:
            raise Refusal(NO_SUCH_ENTRY)
        self._interfaces.remove(self._interfaces.get(message.sw_if_index))
        return {}

    def ipip_tunnel_dump(self, message: Any) -> list[ReplyFields]:
        return self._ipip.details(message)

    def _check(self, tunnel: Any, table: int) -> None:
        src, dst = address_of(tunnel.src), address_of(tunnel.dst)
        if len(src) != len(dst):
            raise Refusal(INVALID_PROTOCOL)
        if src == dst:
            raise Refusal(SAME_SRC_DST)
        if TableKey(table, len(src) == 16) not in self._tables.fibs:
            raise Refusal(NO_SUCH_FIB)
        if int(tunnel.mode) == _MULTIPOINT and any(dst):
            raise Refusal(INVALID_DST_ADDRESS)

    @staticmethod
    def _find(kind: _TunnelKind, tunnel: Any, named_by: tuple[str, ...]) -> int | None:
        """Return the sw_if_index of the tunnel with the same addresses and the same `named_by` fields, None if there is none."""

        def name(it: Any) -> tuple[Any, ...]:
            return (address_of(it.src), address_of(it.dst), *(int(getattr(it, field)) for field in named_by))

        return next((index for index, present in kind.by_index.items() if name(present) == name(tunnel)), None)

    def _add(self, kind: _TunnelKind, tunnel: Any, found: int | None) -> ReplyFields:
        if found is not None:
            raise Refusal(IF_ALREADY_EXISTS)
        place = kind.pool.take()
        instance = place if tunnel.instance == NO_INDEX else tunnel.instance
        if any(present.instance == instance for present in kind.by_index.values()):
            kind.pool.give(place)
            raise Refusal(INSTANCE_IN_USE)
        is_l2 = kind is self._gre and bool(int(tunnel.type))
        overhead = (40 if len(address_of(tunnel.src)) == 16 else 20) + kind.header
        index = self._interfaces.add(
            f"{kind.name}{instance}",
            kind.device,
            bytes((0xD0, 0x0B, 0xEE, 0xD0, 0, place)) if is_l2 else bytes(6),
            instance,
            (_L2_FRAME if is_l2 else _L3_FRAME) - overhead,
        )
        kind.by_index[index] = tunnel._replace(instance=instance, sw_if_index=index)
        kind.order[index] = place
        return {"sw_if_index": index}
