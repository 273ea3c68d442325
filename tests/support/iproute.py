"""Prints decoded events as iproute2's `ip xfrm monitor` does, to compare the two decoders."""

from __future__ import annotations

from collections.abc import Iterator

from vppipsec.kernel.text import format_addr, format_prefix, format_proto
from vppipsec.kernel.xfrm.events import (
    Acquired,
    Event,
    PolicyAdded,
    PolicyDeleted,
    SaAdded,
    SaDeleted,
    SaExpired,
    SaProgress,
)
from vppipsec.kernel.xfrm.values import XFRM_INF, Algorithm, Limits, Mark, Policy, ReplayState, Sa, Selector, Template

_MODES = {0: "transport", 1: "tunnel", 4: "beet"}
_DIRECTIONS = {0: "in", 1: "out", 2: "fwd"}
_FLAGS = (
    (1, "noecn"),
    (2, "decap-dscp"),
    (4, "nopmtudisc"),
    (8, "wildrecv"),
    (16, "icmp"),
    (32, "af-unspec"),
    (64, "align4"),
    (128, "esn"),
)
_AEVENTS = {0x10: "replay update", 0x20: "timer expired"}


def monitor_text(event: Event) -> str:
    """Return what `ip xfrm monitor` prints, without its time stamps and trailing blanks."""
    return "\n".join(line.rstrip() for line in _lines(event))


def _lines(event: Event) -> Iterator[str]:
    match event:
        case SaAdded(sa, updated):
            yield from sa_lines(sa, "Updated " if updated else "")
        case SaDeleted(_, sa):
            assert sa is not None
            yield from sa_lines(sa, "Deleted ")
        case SaExpired(sa, hard):
            yield from _sa_head(sa, "Expired ")
            if sa.if_id:
                yield f"\tif_id {sa.if_id:#x}"
            yield f"\thard {int(hard)}"
        case PolicyAdded(policy, updated):
            yield from policy_lines(policy, "Updated " if updated else "")
        case PolicyDeleted(_, _, policy):
            assert policy is not None
            yield from policy_lines(policy, "Deleted ")
        case SaProgress(sa_id, saddr, flags, reqid):
            yield f"Async event  ({flags:#x})  {_AEVENTS[flags]}"
            ends = f"src {format_addr(saddr)} dst {format_addr(sa_id.daddr)}"
            yield f"\t{ends}  reqid {reqid:#x} protocol {format_proto(sa_id.proto)}  SPI {sa_id.spi:#x}"
        case Acquired(sa_id, _, selector, policy):
            yield f"acquire proto {format_proto(sa_id.proto)}"
            yield f"  sel {_selector(selector)}"
            body = list(policy_lines(policy, ""))
            yield f"  policy {body[0]}"
            yield from ("    " + line for line in body[1:])
            yield ""
        case _:
            raise AssertionError(f"no text for {type(event).__name__}")


def sa_lines(sa: Sa, prefix: str) -> Iterator[str]:
    """Print an SA with its attributes."""
    yield from _sa_head(sa, prefix)
    marks = []
    if sa.mark is not None:
        marks.append(f"mark {_mark(sa.mark)}")
    if sa.set_mark is not None:
        marks.append(f"output-mark {_mark(sa.set_mark)}")
    if marks:
        yield "\t" + " ".join(marks)
    if sa.auth is not None:
        name = "auth-trunc" if sa.auth.icv_bits else "auth"
        yield f"\t{name} {_algorithm(sa.auth)}"
    if sa.aead is not None:
        yield f"\taead {_algorithm(sa.aead)}"
    if sa.crypt is not None:
        yield f"\tenc {_algorithm(sa.crypt)}"
    if sa.encap is not None:
        encap = sa.encap
        yield f"\tencap type espinudp sport {encap.sport} dport {encap.dport} addr {format_addr(encap.oa)}"
    if sa.replay is not None:
        yield from _replay(sa.replay)
    if sa.if_id:
        yield f"\tif_id {sa.if_id:#x}"
    if sa.selector.prefixlen_d or sa.selector.prefixlen_s:
        yield f"\tsel {_selector(sa.selector)}"


def _sa_head(sa: Sa, prefix: str) -> Iterator[str]:
    yield f"{prefix}src {format_addr(sa.saddr)} dst {format_addr(sa.daddr)}"
    yield f"\tproto {format_proto(sa.proto)} spi {sa.spi:#010x} reqid {sa.reqid} mode {_MODES[sa.mode]}"
    flags = "".join(f" {name}" for bit, name in _FLAGS if sa.flags & bit)
    yield f"\treplay-window {_header_window(sa)}" + (f" flag{flags}" if flags else "")


def policy_lines(policy: Policy, prefix: str) -> Iterator[str]:
    """Print a policy with its templates."""
    yield f"{prefix}{_selector(policy.selector)}"
    kind = "main" if policy.type == 0 else "sub"
    yield f"\tdir {_DIRECTIONS[policy.direction]} priority {policy.priority} ptype {kind}"
    if policy.mark is not None:
        yield f"\tmark {_mark(policy.mark)}"
    for template in policy.templates:
        yield from _template(template)
    if policy.if_id:
        yield f"\tif_id {policy.if_id:#x}"


def _template(template: Template) -> Iterator[str]:
    yield f"\ttmpl src {format_addr(template.saddr)} dst {format_addr(template.daddr)}"
    spi = f" spi {template.spi:#010x}" if template.spi else ""
    yield f"\t\tproto {format_proto(template.proto)}{spi} reqid {template.reqid} mode {_MODES[template.mode]}"


def limit_lines(limits: Limits) -> list[str]:
    """Print limits as `ip -s` does."""

    def amount(value: int) -> str:
        return "(INF)" if value == XFRM_INF else str(value)

    return [
        "lifetime config:",
        f"limit: soft {amount(limits.soft_bytes)}(bytes), hard {amount(limits.hard_bytes)}(bytes)",
        f"limit: soft {amount(limits.soft_packets)}(packets), hard {amount(limits.hard_packets)}(packets)",
        f"expire add: soft {limits.soft_add_s}(sec), hard {limits.hard_add_s}(sec)",
        f"expire use: soft {limits.soft_use_s}(sec), hard {limits.hard_use_s}(sec)",
    ]


def _selector(selector: Selector) -> str:
    ends = f"src {format_prefix(selector.saddr, selector.prefixlen_s)} dst {format_prefix(selector.daddr, selector.prefixlen_d)}"
    if not selector.proto:
        return ends
    ends += f" proto {format_proto(selector.proto)}"
    if selector.proto in (1, 58):
        return f"{ends} type {selector.sport} code {selector.dport}"
    return f"{ends} sport {selector.sport} dport {selector.dport}"


def _algorithm(algorithm: Algorithm) -> str:
    key = f" 0x{algorithm.key.hex()}" if algorithm.key else " "
    return f"{algorithm.name}{key}" + (f" {algorithm.icv_bits}" if algorithm.icv_bits else "")


def _mark(mark: Mark) -> str:
    return f"{mark.value:#x}/{mark.mask:#x}"


def _replay(replay: ReplayState) -> Iterator[str]:
    if not replay.window:  # the short form
        yield f"\tanti-replay context: seq {replay.seq:#x}, oseq {replay.oseq:#x}, bitmap {replay.bitmap[0]:#010x}"
        return
    low, high = 0xFFFFFFFF, 32
    yield "\tanti-replay esn context:"
    seq, oseq = (
        f"{name}-hi {n >> high:#x}, {name} {n & low:#x}" for name, n in (("seq", replay.seq), ("oseq", replay.oseq))
    )
    yield f"\t {seq}, {oseq}"
    yield f"\t replay_window {replay.window}, bitmap-length {len(replay.bitmap)}"
    words = replay.bitmap[::-1]  # iproute2 prints the highest word first
    for start in range(0, len(words), 8):
        yield "\t " + " ".join(f"{word:08x}" for word in words[start : start + 8])


def _header_window(sa: Sa) -> int:
    """Return the value of the header's field: 0 where XFRMA_REPLAY_ESN_VAL has the window."""
    return 0 if sa.replay is not None and sa.replay.window else sa.replay_window
