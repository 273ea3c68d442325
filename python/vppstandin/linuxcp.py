"""The stand-in's linux-cp: pairs of an interface and the tap that shares it with the kernel (src/plugins/linux-cp/lcp_api.c).

The plugin is optional in VPP. The stand-in always has it, and needs no vhost-net for a tap.
"""

from __future__ import annotations

import itertools
import string
from typing import Any, NamedTuple

from vppstandin.base import (
    EAGAIN,
    INVALID_ARGUMENT,
    INVALID_SW_IF_INDEX,
    INVALID_VALUE,
    NO_INDEX,
    VALUE_EXIST,
    Pool,
    Portion,
    Refusal,
    ReplyFields,
)
from vppstandin.interfaces import Interfaces

TAP, TUN = 0, 1
_NOT_ETHERNET = "IPSEC Tunnel"
_NAME_CHARACTERS = frozenset(string.ascii_letters + string.digits + "-_%@:.")


class LcpPair(NamedTuple):
    """A pair: the interface `phy`, and VPP's tap or tun `host`. The kernel's end is the interface `name`.

    `kind` is TAP or TUN.
    """

    phy: int
    host: int
    vif_index: int
    name: str
    kind: int
    netns: str


class LinuxCp:
    """Handlers of pairs."""

    def __init__(self, interfaces: Interfaces) -> None:
        self.pairs: dict[int, LcpPair] = {}
        """Pairs by index in VPP's pool."""
        self.portion: int | None = None
        """Most pairs in one answer. None means all, as an idle VPP answers."""
        self._interfaces = interfaces
        self._pool = Pool()
        self._names = itertools.count(4096)
        self._vif_indexes = itertools.count(10)
        interfaces.on_remove.append(self._forget)

    def lcp_itf_pair_add_del_v3(self, message: Any) -> ReplyFields:
        phy = self._interfaces.get(message.sw_if_index)
        place = self._place(phy.sw_if_index)
        if not message.is_add:
            if place is None:
                raise Refusal(INVALID_SW_IF_INDEX)
            self._delete(place)
            return {"vif_index": NO_INDEX, "host_sw_if_index": NO_INDEX}
        kind = int(message.host_if_type)
        if place is not None:
            raise Refusal(VALUE_EXIST)
        if not set(message.host_if_name) <= _NAME_CHARACTERS or (kind == TAP and phy.kind == _NOT_ETHERNET):
            raise Refusal(INVALID_ARGUMENT)
        host = self._interfaces.add(f"tap{next(self._names)}", "virtio", bytes((2, 0xFE, 0, 0, 0, 1)))
        pair = LcpPair(phy.sw_if_index, host, next(self._vif_indexes), message.host_if_name, kind, message.netns)
        self.pairs[self._pool.take()] = pair
        self._interfaces.set_up(host, True)
        return {"vif_index": pair.vif_index, "host_sw_if_index": host}

    def _place(self, phy: int) -> int | None:
        return next((place for place, pair in self.pairs.items() if pair.phy == phy), None)

    def _forget(self, sw_if_index: int) -> None:
        """Delete the pair of a deleted interface."""
        place = self._place(sw_if_index)
        if place is not None:
            self._delete(place)

    def _delete(self, place: int) -> None:
        pair = self.pairs.pop(place)
        self._pool.give(place)
        self._interfaces.remove(self._interfaces.get(pair.host))

    def lcp_itf_pair_get(self, message: Any) -> Portion:
        """Return pairs from the cursor on, as REPLY_AND_DETAILS_MACRO_END does (src/vlibapi/api_helper_macros.h)."""
        if not self.pairs:
            return Portion([], 0, 0)
        first = 0 if message.cursor == NO_INDEX else message.cursor
        places = sorted(place for place in self.pairs if place >= first)
        if not places:
            return Portion([], INVALID_VALUE, NO_INDEX)
        text, left = places[: self.portion], places[self.portion :] if self.portion is not None else []
        details = [self._details(self.pairs[place]) for place in text]
        return Portion(details, EAGAIN if left else 0, left[0] if left else NO_INDEX)

    def _details(self, pair: LcpPair) -> ReplyFields:
        return {
            "phy_sw_if_index": pair.phy,
            "host_sw_if_index": pair.host,
            "vif_index": pair.vif_index,
            "host_if_name": pair.name,
            "host_if_type": pair.kind,
            "netns": pair.netns,
        }
