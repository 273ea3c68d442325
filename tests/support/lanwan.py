"""Creates the interfaces that tests need in a VPP, real or stand-in, through the service's API."""

from __future__ import annotations

from vppipsec.vpp.api.client import VppClient
from vppipsec.vpp.types import NO_INDEX

SETUP_CALLS = (
    "create_loopback_instance",
    "sw_interface_add_del_address",
    "lcp_itf_pair_add_del_v3",
    "ipip_add_tunnel",
    "ipip_del_tunnel",
)
"""Messages that these helpers use and the service does not; pass them to `connect` as `destinations`."""


async def make_loopback(client: VppClient, *addresses: str) -> int:
    """Create a loopback interface with addresses, up; return its sw_if_index."""
    made = await client.call("create_loopback_instance", {"mac_address": "de:ad:00:00:00:01", "is_specified": False})
    index = int(made.sw_if_index)
    await client.call("sw_interface_set_flags", {"sw_if_index": index, "flags": 1})
    for address in addresses:
        await client.call("sw_interface_add_del_address", {"sw_if_index": index, "is_add": True, "prefix": address})
    return index


async def set_table(
    client: VppClient, number: int, ip6: bool, is_add: bool = True, has_multicast: bool = False
) -> None:
    """Create or remove a FIB table, optionally with one for multicast."""
    table = {"table_id": number, "is_ip6": ip6, "name": "a VRF"}
    await client.call("ip_table_add_del_v2", {"table": table, "create_mfib": has_multicast, "is_add": is_add})


async def set_pair(client: VppClient, sw_if_index: int, host: str, is_add: bool = True) -> int:
    """Create or remove an interface's linux-cp pair; return the sw_if_index of its tap. A real VPP needs vhost-net."""
    arguments = {"sw_if_index": sw_if_index, "is_add": is_add, "host_if_name": host, "host_if_type": 0, "netns": ""}
    return int((await client.call("lcp_itf_pair_add_del_v3", arguments)).host_sw_if_index)


async def make_ipip(client: VppClient, src: str, dst: str, mode: int = 0, table: int = 0) -> int:
    """Create an ipip interface, up; return its sw_if_index."""
    tunnel = {"instance": NO_INDEX, "src": src, "dst": dst, "sw_if_index": NO_INDEX, "table_id": table}
    made = await client.call("ipip_add_tunnel", {"tunnel": {**tunnel, "flags": 0, "mode": mode, "dscp": 0}})
    index = int(made.sw_if_index)
    await client.call("sw_interface_set_flags", {"sw_if_index": index, "flags": 1})
    return index
