"""The requests for ACL-based forwarding (src/plugins/abf/abf.api).

An ABF policy says in which table the destination of what an ACL permits is looked up. On an interface the ACLs of all attached
policies are one list, in order of priority; the first rule that matches decides, and what it denies goes its normal way.
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
    """abf_policy_add_del: make a policy that looks destinations up in `table`, or remove it with that, its only path.

    VPP 26.06 dies when a policy is given a path that it has, and when one is removed that is attached still.
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
    """abf_itf_attach_add_del: ask a policy about what an interface receives, or no more; the lowest priority is asked first.

    VPP 26.06 dies where the policy does not exist, the interface is NO_INDEX, or the family is not the one of the attachment.
    An attachment outlives its interface: it is taken away like any other.
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
"""At least one request of each kind, with every field distinct where it can be, for comparing the two wire forms."""
