"""The stand-in's ACL-based forwarding: policies and their attachments (src/plugins/abf/abf_policy.c, abf_itf_attach.c)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

from vppstandin.acl import Acls
from vppstandin.base import (
    ENTRY_ALREADY_EXISTS,
    INVALID_VALUE,
    NO_INDEX,
    NO_SUCH_ENTRY,
    Death,
    Pool,
    Refusal,
    ReplyFields,
)
from vppstandin.fib import PATH_DROP, FibPath, Tables
from vppstandin.interfaces import Interfaces
from vppstandin.routes import Routes, path_reply


@dataclass(slots=True)
class AbfPolicy:
    """A policy. It has no paths if it was deleted while attached; VPP keeps it until it is detached."""

    acl_index: int
    paths: tuple[FibPath, ...]
    locks: int = 1
    """One lock for the API, and one for each attachment."""


class AttachmentKey(NamedTuple):
    """Names an attachment. The family is no part of the name."""

    policy_id: int
    sw_if_index: int


@dataclass(frozen=True, slots=True)
class Attachment:
    """A policy on an interface. The lowest priority is evaluated first."""

    priority: int
    is_ip6: bool
    acl_index: int


class Abf:
    """Policies by number, attachments by policy and interface."""

    def __init__(self, tables: Tables, interfaces: Interfaces, routes: Routes, acls: Acls) -> None:
        self.policies: dict[int, AbfPolicy] = {}
        self.attachments: dict[AttachmentKey, Attachment] = {}
        self._tables = tables
        self._interfaces = interfaces
        self._routes = routes
        self._acls = acls
        self._policy_order: dict[int, int] = {}
        self._policy_pool = Pool()
        self._attachment_order: dict[AttachmentKey, int] = {}
        self._attachment_pool = Pool()

    @property
    def overlooked(self) -> list[AttachmentKey]:
        """Attachments whose ACL VPP ignores, because it does not exist or is attached twice."""
        return [
            key
            for key, attachment in self.attachments.items()
            if attachment.acl_index not in self._acls.contexts[_context(key.sw_if_index, attachment.is_ip6)]
        ]

    def abf_policy_add_del(self, message: Any) -> ReplyFields:
        policy_id, acl_index = message.policy.policy_id, message.policy.acl_index
        if not message.policy.paths:
            raise Refusal(INVALID_VALUE)
        paths = tuple(self._routes.path(path) for path in message.policy.paths)
        policy = self.policies.get(policy_id)
        if not message.is_add:
            if policy is None:
                raise Refusal(INVALID_VALUE)
            self._remove_paths(policy_id, policy, paths)
        elif policy is None:
            self.policies[policy_id] = policy = AbfPolicy(acl_index, ())
            self._policy_order[policy_id] = self._policy_pool.take()
            self._set_paths(policy, paths)
        elif policy.acl_index != acl_index:
            raise Refusal(INVALID_VALUE)
        else:
            self._add_paths(policy_id, policy, paths)
        return {}

    def _add_paths(self, policy_id: int, policy: AbfPolicy, paths: tuple[FibPath, ...]) -> None:
        """Add paths to a policy's present ones (fib_path_list_copy_and_path_add)."""
        there = {self._identity(path) for path in policy.paths}
        new = [path for path in paths if self._identity(path) not in there]
        if not new and not self._path_list_is_shared(policy):
            raise Death(
                f"abf_policy_add_del: policy {policy_id} has the path already: VPP 26.06 frees the path list that it goes on"
                " using, and is hit by SIGSEGV at one of the next requests for it"
            )
        self._set_paths(policy, (*policy.paths, *new))

    def _remove_paths(self, policy_id: int, policy: AbfPolicy, paths: tuple[FibPath, ...]) -> None:
        """Remove paths, and with the last path the policy (fib_path_list_copy_and_path_remove)."""
        if not policy.paths:
            raise Death(
                f"abf_policy_add_del: policy {policy_id} was deleted before and is attached still:"
                " VPP 26.06 is hit by SIGSEGV in fib_path_list_copy_and_path_remove"
            )
        left = list(policy.paths)
        for path in paths:
            same = next((other for other in left if self._identity(other) == self._identity(path)), None)
            if same is not None:
                left.remove(same)
        self._set_paths(policy, tuple(left))
        if not left:
            self._unlock(policy_id, policy)

    def _set_paths(self, policy: AbfPolicy, paths: tuple[FibPath, ...]) -> None:
        gone = [path for path in paths if path.sw_if_index not in (NO_INDEX, *self._interfaces.by_index)]
        if gone and paths != policy.paths:
            raise Death(
                f"abf_policy_add_del: a path that stays leads into interface {gone[0].sw_if_index}, which is deleted:"
                " VPP 26.06 is hit by SIGSEGV as it resolves the path again"
            )
        for path in paths:
            self._tables.hold(path.table)
        for path in policy.paths:
            self._tables.release(path.table)
        policy.paths = paths

    def _path_list_is_shared(self, policy: AbfPolicy) -> bool:
        """Return whether another policy has the same paths. VPP then keeps one path list for both."""
        same = [self._identity(path) for path in self._in_order(policy.paths)]
        return any(
            other is not policy and [self._identity(path) for path in self._in_order(other.paths)] == same
            for other in self.policies.values()
        )

    def _identity(self, path: FibPath) -> tuple[int, bool, bytes, int]:
        """Return a path's sort key, equal for equal paths (fib_path_cmp). Weight and preference are no part of it."""
        if path.kind == PATH_DROP:
            return _SPECIAL, path.is_ip6, b"", 0
        if path.table is not None:
            return _DEAG, path.is_ip6, b"", self._tables.fibs[path.table].slot
        if any(path.next_hop):
            return _ATTACHED_NEXT_HOP, path.is_ip6, path.next_hop, path.sw_if_index
        return _ATTACHED, path.is_ip6, b"", path.sw_if_index

    def _in_order(self, paths: tuple[FibPath, ...]) -> list[FibPath]:
        """Return paths in VPP's order (fib_path_cmp_for_sort)."""
        return sorted(paths, key=lambda path: (path.preference, *self._identity(path)))

    def _unlock(self, policy_id: int, policy: AbfPolicy) -> None:
        """Release one lock of a policy. The last lock deletes the policy, but does not release paths that it may have."""
        policy.locks -= 1
        if policy.locks:
            return
        if any(key.policy_id == policy_id for key in self.attachments):
            raise Death(
                f"abf_policy_add_del: policy {policy_id} was deleted twice while it is attached:"
                " VPP 26.06 frees it, and dies when it is detached"
            )
        del self.policies[policy_id]
        self._policy_pool.give(self._policy_order.pop(policy_id))

    def abf_policy_dump(self, message: Any) -> list[ReplyFields]:
        details = []
        for policy_id in sorted(self._policy_order, key=self._policy_order.__getitem__):
            policy = self.policies[policy_id]
            if not policy.paths:
                raise Death(
                    f"abf_policy_dump: policy {policy_id} was deleted while it was attached:"
                    " VPP 26.06 is hit by SIGSEGV in fib_path_list_walk_w_ext"
                )
            paths = [path_reply(path) for path in self._in_order(policy.paths)]
            shown = {"policy_id": policy_id, "acl_index": policy.acl_index, "n_paths": len(paths), "paths": paths}
            details.append({"policy": shown})
        return details

    def abf_itf_attach_add_del(self, message: Any) -> ReplyFields:
        wanted = message.attach
        key, is_ip6 = AttachmentKey(wanted.policy_id, wanted.sw_if_index), bool(wanted.is_ipv6)
        if message.is_add:
            self._attach(key, wanted.priority, is_ip6)
        else:
            self._detach(key, is_ip6)
        return {}

    def _attach(self, key: AttachmentKey, priority: int, is_ip6: bool) -> None:
        policy = self.policies.get(key.policy_id)
        if key in self.attachments:
            raise Refusal(ENTRY_ALREADY_EXISTS)
        if policy is None or not policy.paths:
            state = "does not exist" if policy is None else "was deleted while it was attached"
            raise Death(f"abf_itf_attach_add_del: policy {key.policy_id} {state}: VPP 26.06 is hit by SIGSEGV")
        if key.sw_if_index == NO_INDEX:
            raise Death("abf_itf_attach_add_del: sw_if_index ~0: VPP 26.06 makes a vector of that many interfaces")
        self.attachments[key] = Attachment(priority, is_ip6, policy.acl_index)
        self._attachment_order[key] = self._attachment_pool.take()
        policy.locks += 1
        self._set_lists(key.sw_if_index, is_ip6)

    def _detach(self, key: AttachmentKey, is_ip6: bool) -> None:
        attachment = self.attachments.get(key)
        if attachment is None:
            raise Refusal(NO_SUCH_ENTRY)
        if attachment.is_ip6 != is_ip6:
            raise Death(
                f"abf_itf_attach_add_del: policy {key.policy_id} is attached to interface {key.sw_if_index} in the other"
                " family: VPP 26.06 is hit by SIGSEGV, or takes another policy off that interface and dies later"
            )
        del self.attachments[key]
        self._attachment_pool.give(self._attachment_order.pop(key))
        self._set_lists(key.sw_if_index, is_ip6)
        self._unlock(key.policy_id, self.policies[key.policy_id])

    def _set_lists(self, sw_if_index: int, is_ip6: bool) -> None:
        """Set the ACLs that VPP evaluates on an interface, in order of priority (abf_setup_acl_lc)."""
        here = [
            attachment
            for key, attachment in self.attachments.items()
            if key.sw_if_index == sw_if_index and attachment.is_ip6 == is_ip6
        ]
        context = _context(sw_if_index, is_ip6)
        if here:
            self._acls.set_context(context, [it.acl_index for it in sorted(here, key=lambda it: it.priority)])
        else:
            self._acls.drop_context(context)

    def abf_itf_attach_dump(self, message: Any) -> list[ReplyFields]:
        return [
            {
                "attach": {
                    "policy_id": key.policy_id,
                    "sw_if_index": key.sw_if_index,
                    "priority": self.attachments[key].priority,
                    "is_ipv6": self.attachments[key].is_ip6,
                }
            }
            for key in sorted(self._attachment_order, key=self._attachment_order.__getitem__)
        ]


_ATTACHED_NEXT_HOP, _ATTACHED, _SPECIAL, _DEAG = 0, 1, 3, 5
"""fib_path_type_t, src/vnet/fib/fib_path.c."""


def _context(sw_if_index: int, is_ip6: bool) -> Hashable:
    return ("abf", sw_if_index, is_ip6)
