"""By what our objects in VPP are recognised: tags, ranges of numbers, the FIB source, addresses."""

from __future__ import annotations

from vppipsec.vpp.types import MAX_ITF_INSTANCE, Prefix

TAG_PREFIX = "vpp-ipsecd "
"""How the tag of every interface that is ours begins."""

SAD_ID_FIRST = 0x49500000
"""Numbers of our SAs in VPP begin here; others' SAs are outside."""
SAD_ID_LAST = SAD_ID_FIRST + 0x000FFFFF
INSTANCES = range(256, MAX_ITF_INSTANCE)
"""Instances of our `ipsec` interfaces. Those below are others': VPP hands out the lowest ones first."""

IP6_TAG = " ip6"
"""How the tag of an interface ends that passes IPv6: no dump of VPP's tells."""

BLOCK_SAD_ID = 0x49600000
"""The number of the one SA by which all muted interfaces are muted: behind those of all others of ours."""

TABLE_NUMBERS = range(0x49500000, 0x49600000)
"""Numbers of our FIB tables and ABF policies."""
CLASSIFIER_TABLE = TABLE_NUMBERS[-1]
"""The table of the junctions: nothing is in it, so what no rule matches there drops."""

ACL_TAG = f"{TAG_PREFIX}out "
"""How the tag of a layer's ACL begins; the number of the layer follows."""

CLASSIFIER_TABLE_NAME = f"{TAG_PREFIX}junctions"
CLASSIFIER_TAG = f"{TAG_PREFIX}junction "
"""How the tag of a junction begins; the if_id of its VTI follows."""

FIB_SOURCE = "vpp-ipsecd"
FIB_PRIORITY = 0x0F
"""Priority of our routes: before those that linux-cp mirrors from the kernel (0x10). Source: src/vnet/fib/fib_source.h."""

KERNEL_NEXT_HOP = {False: bytes((169, 254, 73, 80)), True: bytes.fromhex("fe800000000000000000000000004950")}
"""The next hop that stands for the kernel, by `ip6`: link-local (RFC 3927, RFC 4291)."""

LINK_GROUPS = {False: Prefix(bytes((224, 0, 0, 0)), 25), True: Prefix(bytes((0xFF, 0x02, *bytes(14))), 16)}
"""By `ip6`: of 224.0.0.0/24 (RFC 5771), which linux-nl has, the half that is in use; those of link-local scope (RFC 4291)."""


def interface_address(instance: int) -> bytes:
    """Return the IPv4 address that `ipsec<instance>` has in another table than the main one: no other interface of ours has it.

    It is link-local (RFC 3927), and the lowest of four: where two routers share a /30 of that range, none of them has it.
    """
    assert instance < MAX_ITF_INSTANCE
    return bytes((169, 254, instance >> 6, instance << 2 & 0xFF))
