"""Tags, number ranges, FIB source and addresses by which the service recognises its own objects in VPP."""

from __future__ import annotations

from vppipsec.vpp.types import MAX_ITF_INSTANCE, Prefix

TAG_PREFIX = "vpp-ipsecd "
"""Start of the tag of every interface that the service creates."""

SAD_ID_FIRST = 0x49500000
"""First `sad_id` of the service's SAs. SAs of other programs are outside of this range."""
SAD_ID_LAST = SAD_ID_FIRST + 0x000FFFFF
INSTANCES = range(256, MAX_ITF_INSTANCE)
"""Instances of the service's `ipsec` interfaces. Lower ones are left to other programs: VPP assigns the lowest first."""

IP6_TAG = " ip6"
"""End of the tag of an interface that passes IPv6. No dump of VPP shows that."""

BLOCK_SAD_ID = 0x49600000
"""`sad_id` of the block SA, which all blocked interfaces share. It is outside of the range of the service's other SAs."""

TABLE_NUMBERS = range(0x49500000, 0x49600000)
"""Numbers of the service's FIB tables and ABF policies."""
CLASSIFIER_TABLE = TABLE_NUMBERS[-1]
"""The FIB table of the VTI classifiers. It has no routes, so packets that no rule matches are dropped."""

ACL_TAG = f"{TAG_PREFIX}out "
"""Start of the tag of a policy layer's ACL. The layer's number follows."""

CLASSIFIER_TABLE_NAME = f"{TAG_PREFIX}junctions"
CLASSIFIER_TAG = f"{TAG_PREFIX}junction "
"""Start of the tag of a VTI classifier. The if_id of its VTI follows."""

FIB_SOURCE = "vpp-ipsecd"
FIB_PRIORITY = 0x0F
"""Priority of the service's routes, better than the kernel's that linux-cp mirrors (0x10, src/vnet/fib/fib_source.h)."""

KERNEL_NEXT_HOP = {False: bytes((169, 254, 73, 80)), True: bytes.fromhex("fe800000000000000000000000004950")}
"""The next hop that stands for the kernel, by `ip6`: link-local (RFC 3927, RFC 4291)."""

LINK_GROUPS = {False: Prefix(bytes((224, 0, 0, 0)), 25), True: Prefix(bytes((0xFF, 0x02, *bytes(14))), 16)}
"""Link-local multicast groups, by `ip6`. IPv4: the half of 224.0.0.0/24 that is in use (RFC 5771), since linux-nl uses the /24.
IPv6: link-local scope (RFC 4291)."""


def interface_address(instance: int) -> bytes:
    """Return the IPv4 address of `ipsec<instance>` in a FIB table other than the main one. It is unique among the instances.

    It is link-local (RFC 3927), and the lowest of four addresses. So no router has it that uses a /30 of that range on a link.
    """
    assert instance < MAX_ITF_INSTANCE
    return bytes((169, 254, instance >> 6, instance << 2 & 0xFF))
