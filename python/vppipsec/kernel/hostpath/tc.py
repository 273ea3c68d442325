"""Lists, adds and deletes tc filters that redirect the packets that a BPF program matches. Each filter takes one message.

pyroute2 cannot encode classic BPF programs. Layouts: include/uapi/linux/rtnetlink.h, pkt_cls.h (TCA_BPF_*), and
tc_act/tc_mirred.h.
"""

from __future__ import annotations

import itertools
import socket
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from vppipsec.kernel.netlink.messages import NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkError, attribute, error_of
from vppipsec.kernel.netlink.socket import READ_SIZE, open_netlink
from vppipsec.kernel.netlink.wire import HEADER, NLMSG_DONE, NLMSG_ERROR, attributes, message_type, messages_in

INGRESS, EGRESS = 0xFFFFFFF2, 0xFFFFFFF3  # TC_H_MIN_INGRESS, TC_H_MIN_EGRESS of clsact
_NEW, _DELETE, _GET = 44, 45, 46  # RTM_NEWTFILTER, RTM_DELTFILTER, RTM_GETTFILTER
_CREATE_NEW = 0x600  # NLM_F_CREATE | NLM_F_EXCL
_TCMSG = struct.Struct("=B3xiIII")  # family, ifindex, handle, parent, preference and protocol
_MIRRED = struct.Struct("=IIiiiiI")  # struct tc_mirred: index, capab, action, refcnt, bindcnt, eaction, ifindex
_STOLEN = 4  # TC_ACT_STOLEN
_REDIRECTIONS = {EGRESS: 1, INGRESS: 3}  # TCA_EGRESS_REDIR, TCA_INGRESS_REDIR
_NESTED = 0x8000  # NLA_F_NESTED
_ETH_P_ALL = socket.htons(3)  # ETH_P_ALL
_NETLINK_TIMEOUT_S = 5.0


class _FilterAttr(IntEnum):
    KIND = 1
    OPTIONS = 2


class _BpfAttr(IntEnum):
    ACT = 1
    OPS_LEN = 4
    OPS = 5


class _ActionAttr(IntEnum):
    KIND = 1
    OPTIONS = 2


class _MirredAttr(IntEnum):
    PARMS = 2


class Redirect(NamedTuple):
    """A filter on one hook of a link. It sends the packets that its program matches to the link `target`."""

    ifindex: int
    hook: int
    target: int
    program: bytes


class FoundFilter(NamedTuple):
    """A filter in the kernel. `target` is 0 if it does not redirect. `program` is empty if it is no BPF filter."""

    preference: int
    handle: int
    redirect: Redirect


class TcFilters:
    """A socket for requests about filters. Requests raise NetlinkError if the kernel refuses, and OSError."""

    def __init__(self) -> None:
        self._socket = open_netlink(0, ())
        self._socket.settimeout(_NETLINK_TIMEOUT_S)
        self._seq = itertools.count(1)

    def __enter__(self) -> TcFilters:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def list_filters(self, ifindex: int, hook: int) -> list[FoundFilter]:
        """Return the filters of a link with a clsact qdisc, in the order in which the kernel runs them."""
        self._send(_GET, NLM_F_DUMP, _TCMSG.pack(0, ifindex, 0, hook, 0))
        return [found for message in self._answers() if (found := _decode_filter(message, ifindex, hook)) is not None]

    def add(self, redirect: Redirect, preference: int) -> None:
        """Add a filter. Other filters with the same preference stay."""
        action = _MIRRED.pack(0, 0, _STOLEN, 0, 0, _REDIRECTIONS[redirect.hook], redirect.target)
        action = attribute(_ActionAttr.OPTIONS | _NESTED, attribute(_MirredAttr.PARMS, action))
        action = attribute(1, attribute(_ActionAttr.KIND, b"mirred\0") + action)
        length = struct.pack("=H", len(redirect.program) // 8)
        options = attribute(_BpfAttr.ACT, action) + attribute(_BpfAttr.OPS_LEN, length)
        options += attribute(_BpfAttr.OPS, redirect.program)
        body = _TCMSG.pack(0, redirect.ifindex, 0, redirect.hook, preference << 16 | _ETH_P_ALL)
        body += attribute(_FilterAttr.KIND, b"bpf\0") + attribute(_FilterAttr.OPTIONS, options)
        self._ask(_NEW, _CREATE_NEW, body)

    def delete(self, found: FoundFilter) -> None:
        """Delete a filter. It must be for all protocols, as those of `add` are."""
        place = found.redirect.ifindex, found.handle, found.redirect.hook
        self._ask(_DELETE, 0, _TCMSG.pack(0, *place, found.preference << 16 | _ETH_P_ALL))

    def _ask(self, kind: int, flags: int, body: bytes) -> None:
        self._send(kind, flags | NLM_F_ACK, body)
        for _ in self._answers():
            pass

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        flags |= NLM_F_REQUEST
        self._socket.send(HEADER.pack(HEADER.size + len(body), kind, flags, next(self._seq), 0) + body)

    def _answers(self) -> Iterator[memoryview]:
        while True:
            for message in messages_in(self._socket.recv(READ_SIZE)):
                if message_type(message) in (NLMSG_DONE, NLMSG_ERROR):
                    if reason := error_of(message):
                        raise NetlinkError("a filter", reason)
                    return
                yield message


def _decode_filter(message: memoryview, ifindex: int, hook: int) -> FoundFilter | None:
    """Decode a message about a filter. Return None for a message about what filters of one preference share."""
    _, _, handle, _, info = _TCMSG.unpack_from(message, HEADER.size)
    attrs = attributes(message, HEADER.size + _TCMSG.size, _FilterAttr)
    if not handle or _FilterAttr.OPTIONS not in attrs:
        return None
    if bytes(attrs[_FilterAttr.KIND]) != b"bpf\0":
        return FoundFilter(info >> 16, handle, Redirect(ifindex, hook, 0, b""))
    bpf = attributes(attrs[_FilterAttr.OPTIONS], 0, _BpfAttr)
    return FoundFilter(
        info >> 16,
        handle,
        Redirect(ifindex, hook, _redirect_target(bpf.get(_BpfAttr.ACT)), bytes(bpf.get(_BpfAttr.OPS, b""))),
    )


def _redirect_target(actions: memoryview | None) -> int:
    """Return the ifindex that the first action redirects to, 0 if it is not a redirection."""
    if actions is None:
        return 0
    action = attributes(attributes(actions, 0, _ActionAttr)[1], 0, _ActionAttr)
    if bytes(action[_ActionAttr.KIND]) != b"mirred\0":
        return 0
    parameters = attributes(action[_ActionAttr.OPTIONS], 0, _MirredAttr)[_MirredAttr.PARMS]
    return int(_MIRRED.unpack_from(parameters)[-1])
