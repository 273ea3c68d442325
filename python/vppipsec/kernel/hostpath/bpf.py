"""Builds classic BPF programs for tc filters that pick the child SA of a packet on a VTI. Pure: no I/O, no state.

The kernel tries the policies of the VTI's if_id in order; the first match decides (xfrmi_xmit2,
net/xfrm/xfrm_interface_core.c). _decode_session4 and _decode_session6 (net/xfrm/xfrm_policy.c) define the compared fields:
- A fragment has a protocol and no ports.
- In IPv6 the kernel skips the extension headers before the protocol.
- ICMP's type and code count as ports.
Each program evaluates all policies and matches if they choose its host interface. So no two programs match the same packet, and
filters may be added and removed in any order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from vppipsec.kernel.xfrm.values import Mark, Selector

_INSTRUCTION = struct.Struct("=HBBI")  # struct sock_filter: code, jt, jf, k
_LD_WORD, _LD_HALF, _LD_BYTE = 0x20, 0x28, 0x30  # BPF_LD | BPF_ABS
_LD_HALF_X, _LD_BYTE_X = 0x48, 0x50  # BPF_LD | BPF_IND
_LD_IMM, _LD_MEM, _ST, _LDX_IMM = 0x00, 0x60, 0x02, 0x01
_ADD, _ADD_X, _AND, _LSH, _TAX = 0x04, 0x0C, 0x54, 0x64, 0x07
_JA, _JEQ, _JSET, _RET = 0x05, 0x15, 0x45, 0x06
_NET = 0xFFF00000  # SKF_NET_OFF: offsets from here on count from the network header
_PROTOCOL, _SKF_AD_MARK = 0xFFFFF000, 0xFFFFF014  # SKF_AD_OFF + SKF_AD_PROTOCOL, SKF_AD_MARK
_NO_MATCH, _ALL_BITS = 0, 0xFFFFFFFF
_PROTO, _SPORT, _DPORT = 0, 1, 2
"""Cells of a program's memory for the fields that the kernel compares."""
_ETHERTYPES = {4: 0x0800, 16: 0x86DD}  # ETH_P_IP, ETH_P_IPV6, by the length of addresses
_WITH_PORTS = (6, 17, 33, 132, 136)  # TCP, UDP, DCCP, SCTP, UDP-Lite
_ICMP = {4: 1, 16: 58}
_EXTENSIONS, _FRAGMENT = (0, 43, 60), 44  # hop-by-hop, routing, destination options
_MAX_EXTENSIONS = 4
"""Number of extension headers that a program skips in an IPv6 packet."""

MATCH_ALL = _INSTRUCTION.pack(_RET, 0, 0, _ALL_BITS)
"""The program that matches every packet."""


class Choice(NamedTuple):
    """A policy of a VTI, and the host interface for its packets. `host` is empty if the kernel carries them itself."""

    selector: Selector
    mark: Mark | None
    host: str


class _Step(NamedTuple):
    """An instruction. `met` and `unmet` are the labels to jump to after the comparison with `k`. Empty means the next one."""

    code: int
    k: int = 0
    met: str = ""
    unmet: str = ""


_Steps = Iterator[_Step | str]
"""Instructions, and labels. A label names the instruction after it."""


def choice_program(choices: Sequence[Choice], host: str) -> bytes:
    """Return the program that matches the packets for a host interface. `choices` are in the kernel's order."""
    return _assemble(_program(choices, host))


def _program(choices: Sequence[Choice], host: str) -> _Steps:
    yield _Step(_LD_WORD, _PROTOCOL)
    for size, kind in _ETHERTYPES.items():
        yield _Step(_JEQ, kind, unmet=f"other than {size}")
        yield _Step(_JA, met=f"as {size}")  # a comparison cannot jump this far
        yield f"other than {size}"
    yield _Step(_RET, _NO_MATCH)
    for size in _ETHERTYPES:
        yield f"as {size}"
        yield from _family([each for each in choices if len(each.selector.daddr) == size], host, size)


def _family(choices: Sequence[Choice], host: str, size: int) -> _Steps:
    """Yield the tests of all policies with addresses of `size` bytes, up to the last one for the host interface."""
    last = max((at + 1 for at, each in enumerate(choices) if each.host == host), default=0)
    if any(_is_narrow(each.selector) for each in choices[:last]):
        yield from _ports_of_ip4() if size == 4 else _ports_of_ip6()
    for at, choice in enumerate(choices[:last]):
        behind = f"behind {size} {at}"
        yield from _tests(choice, behind)
        yield _Step(_RET, _ALL_BITS if choice.host == host else _NO_MATCH)
        yield behind
    yield _Step(_RET, _NO_MATCH)


def _is_narrow(selector: Selector) -> bool:
    return bool(selector.proto or selector.sport_mask or selector.dport_mask)


def _tests(choice: Choice, unmet: str) -> _Steps:
    """Yield the tests of one policy, as in xfrm_policy_match and xfrm4_selector_match. A failed test jumps to `unmet`."""
    selector, mark = choice.selector, choice.mark
    if mark is not None and mark.mask:
        yield from _test(_Step(_LD_WORD, _SKF_AD_MARK), mark.mask, mark.value, unmet)
    if selector.proto:
        yield from _test(_Step(_LD_MEM, _PROTO), 0xFF, selector.proto, unmet)
    ports = (_SPORT, selector.sport_mask, selector.sport), (_DPORT, selector.dport_mask, selector.dport)
    for place, mask, port in ports:
        if mask:
            yield from _test(_Step(_LD_MEM, place), mask, port & mask, unmet)
    size = len(selector.daddr)
    source = 12 if size == 4 else 8
    ends = (selector.saddr, selector.prefixlen_s, source), (selector.daddr, selector.prefixlen_d, source + size)
    for address, length, offset in ends:
        for word in range(0, -(-length // 32) * 4, 4):
            mask = _ALL_BITS << max(0, 32 - (length - 8 * word)) & _ALL_BITS
            value = int.from_bytes(address[word : word + 4], "big") & mask
            yield from _test(_Step(_LD_WORD, _NET + offset + word), mask, value, unmet)


def _test(load: _Step, mask: int, value: int, unmet: str) -> _Steps:
    yield load
    if mask != _ALL_BITS:
        yield _Step(_AND, mask)
    yield _Step(_JEQ, value, unmet=unmet)


def _ports_of_ip4() -> _Steps:
    yield from _no_ports()
    yield _Step(_LD_BYTE, _NET + 9)
    yield _Step(_ST, _PROTO)
    yield _Step(_LD_HALF, _NET + 6)
    yield _Step(_JSET, 0x3FFF, met="known 4")  # more fragments, or not the first
    yield _Step(_LD_BYTE, _NET)
    yield _Step(_AND, 0x0F)
    yield _Step(_LSH, 2)
    yield _Step(_TAX)
    yield from _ports(4)


def _ports_of_ip6() -> _Steps:
    yield from _no_ports()
    yield _Step(_LDX_IMM, 40)
    yield _Step(_LD_BYTE, _NET + 6)
    yield _Step(_ST, _PROTO)
    for number in range(_MAX_EXTENSIONS):
        extension, fragment = f"extension {number}", f"fragment {number}"
        for kind in _EXTENSIONS:
            yield _Step(_JEQ, kind, met=extension)
        yield _Step(_JEQ, _FRAGMENT, met=fragment)
        yield _Step(_JA, met="ports 16")
        yield fragment
        yield _Step(_LD_BYTE_X, _NET)
        yield _Step(_ST, _PROTO)
        yield _Step(_JA, met="known 16")
        yield extension
        yield _Step(_LD_BYTE_X, _NET)
        yield _Step(_ST, _PROTO)
        yield _Step(_LD_BYTE_X, _NET + 1)
        yield _Step(_ADD, 1)
        yield _Step(_LSH, 3)
        yield _Step(_ADD_X)
        yield _Step(_TAX)
        yield _Step(_LD_MEM, _PROTO)
    yield from _ports(16)


def _no_ports() -> _Steps:
    yield _Step(_LD_IMM, 0)
    yield _Step(_ST, _SPORT)
    yield _Step(_ST, _DPORT)


def _ports(size: int) -> _Steps:
    """Yield the loads of the ports, or of ICMP's type and code. X is the offset of the transport header."""
    yield f"ports {size}"
    yield _Step(_LD_MEM, _PROTO)
    for proto in _WITH_PORTS:
        yield _Step(_JEQ, proto, met=f"two ports {size}")
    yield _Step(_JEQ, _ICMP[size], unmet=f"known {size}")
    yield from _load_ports(_LD_BYTE_X, 1)
    yield _Step(_JA, met=f"known {size}")
    yield f"two ports {size}"
    yield from _load_ports(_LD_HALF_X, 2)
    yield f"known {size}"


def _load_ports(load: int, width: int) -> _Steps:
    yield _Step(load, _NET)
    yield _Step(_ST, _SPORT)
    yield _Step(load, _NET + width)
    yield _Step(_ST, _DPORT)


def _assemble(steps: Iterable[_Step | str]) -> bytes:
    code: list[_Step] = []
    places: dict[str, int] = {}
    for step in steps:
        if isinstance(step, str):
            places[step] = len(code)
        else:
            code.append(step)
    packed = bytearray()
    for at, (kind, k, met, unmet) in enumerate(code, 1):
        further = [places[label] - at if label else 0 for label in (met, unmet)]
        packed += _INSTRUCTION.pack(kind, 0, 0, further[0]) if kind == _JA else _INSTRUCTION.pack(kind, *further, k)
    return bytes(packed)
