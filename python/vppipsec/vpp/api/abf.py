"""The requests for ACL-based forwarding (src/plugins/abf/abf.api).

An ABF policy names a FIB table. VPP looks up the destination of each packet that the policy's ACL permits in that table. On an
interface the ACLs of all attached policies form one list, in order of priority. The first rule that matches decides. Packets
that it denies follow VPP's normal forwarding.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

from vppipsec.vpp.api.fib_types import PATH_NORMAL, path_fields
from vppipsec.vpp.api.request import API_HEADER, Arguments, Request
from vppipsec.vpp.types import NO_INDEX


@dataclass(frozen=True, slots=True)
class AbfPolicyAddDel(Request):
    """abf_policy_add_del: add a policy whose only path looks destinations up in `table`, or remove policy and path.

    VPP 26.06 crashes when a policy gets a path that it already has, and when an attached policy is removed.
    """

    message: ClassVar[str] = "abf_policy_add_del"
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "?IIBIIIBBIII16sIIIB112s")

    policy_id: int
    acl_index: int
    table: int
    ip6: bool
    is_add: bool = True

    def arguments(self) -> Arguments:
        path = path_fields(NO_INDEX, self.table, PATH_NORMAL, int(self.ip6))
        policy = {"policy_id": self.policy_id, "acl_index": self.acl_index, "n_paths": 1, "paths": [path]}
        return {"is_add": self.is_add, "policy": policy}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(
            msg_id,
            client,
            context,
            self.is_add,
            self.policy_id,
            self.acl_index,
            1,
            NO_INDEX,
            self.table,
            NO_INDEX,
            1,
            0,
            PATH_NORMAL,
            0,
            int(self.ip6),
            b"",
            0,
            0,
            0,
            0,
            b"",
        )


@dataclass(frozen=True, slots=True)
class AbfAttach(Request):
    """abf_itf_attach_add_del: apply a policy to the packets that an interface receives, or stop. The lowest priority goes first.

    VPP 26.06 crashes if the policy does not exist, if the interface is NO_INDEX, or if a removal names the other family. An
    attachment outlives its interface and must be removed like any other.
    """

    message: ClassVar[str] = "abf_itf_attach_add_del"
    _layout: ClassVar[struct.Struct] = struct.Struct(API_HEADER + "?III?")

    policy_id: int
    sw_if_index: int
    priority: int
    ip6: bool
    is_add: bool = True

    def arguments(self) -> Arguments:
        attach = {
            "policy_id": self.policy_id,
            "sw_if_index": self.sw_if_index,
            "priority": self.priority,
            "is_ipv6": self.ip6,
        }
        return {"is_add": self.is_add, "attach": attach}

    def pack(self, msg_id: int, client: int, context: int) -> bytes:
        return self._layout.pack(
            msg_id, client, context, self.is_add, self.policy_id, self.sw_if_index, self.priority, self.ip6
        )


ABF_SAMPLES: tuple[Request, ...] = (
    AbfPolicyAddDel(0x01020304, 0x01020305, 0x01020306, True),
    AbfAttach(0x01020304, 0x01020305, 0x01020306, True),
)
"""At least one request of each kind, for comparing the two wire forms. Fields have distinct values where possible."""
