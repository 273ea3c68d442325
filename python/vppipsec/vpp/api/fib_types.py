"""Paths of routes in VPP's API (src/vnet/fib/fib_types.api)."""

from __future__ import annotations

import struct
from typing import Any

from vppipsec.vpp.types import INTERFACE_RX, LOCAL_INDEX, NO_INDEX

PATH_NORMAL = 0  # enum fib_path_type, src/vnet/fib/fib_types.api
PATH_LOCAL = 1
_PATH_DROP = 2
_PATH_INTERFACE_RX = 9


def path_fields(sw_if_index: int, table: int, kind: int, family: int, next_hop: bytes = b"") -> dict[str, Any]:
    """Return vl_api_fib_path_t in the form of vpp_papi's serializer."""
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
    """Return the bytes of vl_api_fib_path_t, without a table."""
    return _PATH.pack(sw_if_index, 0, NO_INDEX, weight, preference, kind, 0, family, next_hop, 0, 0, 0, 0, b"")


_FIXED_PATHS = {NO_INDEX: (NO_INDEX, _PATH_DROP), LOCAL_INDEX: (NO_INDEX, PATH_LOCAL)}


def path_type_of(paths: int) -> tuple[int, int]:
    """Return the sw_if_index and the path type (enum fib_path_type) that VPP expects for a path's number."""
    if paths >= INTERFACE_RX:
        return paths - INTERFACE_RX, _PATH_INTERFACE_RX
    return _FIXED_PATHS.get(paths) or (paths, PATH_NORMAL)
