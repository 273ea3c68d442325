"""The requests for ACLs (src/plugins/acl/acl.api)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, ClassVar

from vppipsec.vpp.api.request import API_HEADER, Arguments, Request, address_fields, family_of
from vppipsec.vpp.types import NO_INDEX, Prefix, Rule


@dataclass(frozen=True, slots=True)
class AclAddReplace(Request):
    """acl_add_replace: add an ACL if `acl_index` is NO_INDEX, else replace all its rules at once, between two packets.

    The first rule that matches decides. A packet that no rule matches is denied. The tag has at most 63 bytes of ASCII.
    """

    message: ClassVar[str] = "acl_add_replace"
    reply_field: ClassVar[str | None] = "acl_index"
    reply_field_first: ClassVar[bool] = True
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "I64sI")
    _rule: ClassVar[struct.Struct] = struct.Struct(">BB16sBB16sBBHHHHBB")

    acl_index: int
    tag: str
    rules: tuple[Rule, ...]

    def arguments(self) -> Arguments:
        return {
            "acl_index": self.acl_index,
            "tag": self.tag,
            "count": len(self.rules),
            "r": [_rule_fields(rule) for rule in self.rules],
        }

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        head = self._layout.pack(msg_id, client, context, self.acl_index, self.tag.encode("ascii"), len(self.rules))
        pack = self._rule.pack
        return head + b"".join(
            pack(
                rule.permit,
                family_of(rule.src.address),
                rule.src.address,
                rule.src.length,
                family_of(rule.dst.address),
                rule.dst.address,
                rule.dst.length,
                rule.proto,
                *rule.sports,
                *rule.dports,
                0,
                0,
            )
            for rule in self.rules
        )


@dataclass(frozen=True, slots=True)
class AclDel(Request):
    """acl_del: delete an ACL. VPP refuses while the ACL is in use."""

    message: ClassVar[str] = "acl_del"
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "I")

    acl_index: int

    def arguments(self) -> Arguments:
        return {"acl_index": self.acl_index}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(msg_id, client, context, self.acl_index)


@dataclass(frozen=True, slots=True)
class SetInterfaceAcls(Request):
    """acl_interface_set_acl_list: check the packets that an interface receives against one ACL, or against none (NO_INDEX).

    The request removes all other ACLs from the interface. VPP removes the ACLs itself when it deletes an interface.
    """

    message: ClassVar[str] = "acl_interface_set_acl_list"
    _layout: ClassVar[tuple[struct.Struct, ...]] = (
        struct.Struct(API_HEADER + "IBB"),
        struct.Struct(API_HEADER + "IBBI"),
    )

    sw_if_index: int
    acl_index: int

    @property
    def _acls(self) -> tuple[int, ...]:
        return () if self.acl_index == NO_INDEX else (self.acl_index,)

    def arguments(self) -> Arguments:
        acls = self._acls
        return {"sw_if_index": self.sw_if_index, "count": len(acls), "n_input": len(acls), "acls": list(acls)}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        acls = self._acls
        count = len(acls)
        return self._layout[count].pack(msg_id, client, context, self.sw_if_index, count, count, *acls)


def _rule_fields(rule: Rule) -> dict[str, Any]:
    return {
        "is_permit": int(rule.permit),
        "src_prefix": _prefix_fields(rule.src),
        "dst_prefix": _prefix_fields(rule.dst),
        "proto": rule.proto,
        "srcport_or_icmptype_first": rule.sports[0],
        "srcport_or_icmptype_last": rule.sports[1],
        "dstport_or_icmpcode_first": rule.dports[0],
        "dstport_or_icmpcode_last": rule.dports[1],
        "tcp_flags_mask": 0,
        "tcp_flags_value": 0,
    }


def _prefix_fields(prefix: Prefix) -> dict[str, Any]:
    return {"address": address_fields(prefix.address), "len": prefix.length}


ACL_SAMPLES: tuple[Request, ...] = (
    AclAddReplace(
        0x01020304,
        "a tag",
        (
            Rule(
                True, Prefix(bytes((10, 1, 2, 0)), 24), Prefix(bytes((10, 3, 4, 128)), 25), 17, (5, 0x607), (8, 0x90A)
            ),
            Rule(False, Prefix(bytes(range(16)), 127), Prefix(bytes(range(16, 32)), 126), 58, (1, 2), (3, 4)),
        ),
    ),
    AclDel(0x01020304),
    SetInterfaceAcls(0x01020304, 0x01020305),
)
"""At least one request of each kind, for comparing the two wire forms. Fields have distinct values where possible."""
