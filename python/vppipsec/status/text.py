"""The status socket's answers as text for a terminal: a table for many rows, a paragraph for one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vppipsec.sync.journal import count_text

Row = dict[str, Any]

EVENTS_SHOWN = 20
"""Default number of lines of `show events`, about one screen."""


def sync_text(view: Row) -> str:
    """Return the answer to `show sync` for a terminal."""
    kernel, vpp, counts = view["kernel"], view["vpp"], view["counts"]
    what = f"VPP {vpp['version']}, process {vpp['pid']}" if vpp["pid"] else "VPP not connected"
    holds = [
        count_text(vpp[f"{thing}s"], name) for thing, name in (("sa", "SA"), ("tunnel", "tunnel"), ("route", "route"))
    ]
    holds += [f"{count_text(vpp['leftovers'], 'leftover')} of an earlier run"] if vpp["leftovers"] else []
    lines = [
        f"State      {view['state']}" + (f": {view['problem']}" if view["problem"] else ""),
        f"Kernel     {count_text(kernel['sas'], 'SA')}, {count_text(kernel['policies'], 'policy', 'policies')}",
        f"VPP        {', '.join(holds)}  ({what})",
        "SAs        " + ", ".join(f"{number:,} {name}" for name, number in counts.items()),
        f"Last event {_ago(view['last_event']['time'], view['last_event']['name'])}",
        f"Queue      {count_text(view['queue'], 'tunnel')} to look at",
        f"Netlink    {count_text(view['events'], 'event')}, {count_text(view['overflows'], 'overflow')},"
        f" {count_text(view['resyncs'], 'resync')} (last {_ago(view['last_resync'])})",
        f"VPP API    {count_text(view['requests'], 'request')}, {count_text(view['refusals'], 'refusal')},"
        f" {view['withheld']:,} withheld, {count_text(view['reconnects'], 'reconnect')},"
        f" {count_text(view['rekeys'], 'rekey')} and {count_text(view['acquires'], 'tunnel')} asked for",
    ]
    if view["own_packets"]:
        lines.insert(1, f"Router     its own packets are the kernel's: {view['own_packets']}")
    return "\n".join(lines)


def sa_text(rows: Sequence[Row]) -> str:
    """Return the answer to `show sa` for a terminal: a line for each SA."""
    if not rows:
        return "There are no such SAs in the kernel."
    table = [
        (
            row["spi"],
            f"{row['src']} > {row['dst']}",
            row["direction"],
            str(row["reqid"]),
            row["algorithm"] + (" esn" if row["esn"] else "") + (f" udp {row['encap']}" if row["encap"] else ""),
            row["tunnel"] or "-",
            _state(row),
        )
        for row in rows
    ]
    return columns(("SPI", "Endpoints", "Dir", "Reqid", "Algorithms", "Tunnel", "State"), table)


def sa_detail_text(answer: Row) -> str:
    """Return the answer to `show sa` with details for a terminal: a paragraph for each SA."""
    if not answer["rows"]:
        return "There are no such SAs in the kernel."
    return _with_problem(answer, "\n\n".join(map(_paragraph, answer["rows"])))


def counters_text(answer: Row) -> str:
    """Return the answer to `show counters` for a terminal: a line for each SA."""
    if not answer["rows"]:
        return _with_problem(answer, "There are no such SAs in the kernel.")
    table = [
        (
            row["spi"],
            f"{row['src']} > {row['dst']}",
            row["direction"],
            str(row["reqid"]),
            row["tunnel"] or "-",
            _number_text(row["packets"]),
            _number_text(row["bytes"]),
            _errors(row) or "-",
        )
        for row in answer["rows"]
    ]
    head = ("SPI", "Endpoints", "Dir", "Reqid", "Tunnel", "Packets", "Bytes", "Errors")
    return _with_problem(answer, columns(head, table))


def tunnel_text(rows: Sequence[Row]) -> str:
    """Return the answer to `show tunnel` for a terminal: a line for each tunnel."""
    if not rows:
        return "The kernel has no tunnels."
    table = [
        (
            row["local"],
            row["remote"],
            str(row["reqid"]),
            str(row["if_id"] or "-"),
            row["tunnel"] or "-",
            f"{row['inbound']}/{row['outbound']}",
            _number_text(row["denied"]),
            row["own_packets"].removeprefix("the ").split(":")[0].split(",")[0] or "-",
            _short_list(row["routes"]),
            _state(row),
        )
        for row in rows
    ]
    return columns(
        ("Local", "Remote", "Reqid", "If-id", "Tunnel", "SAs in/out", "Denied", "Own packets", "Routes", "State"), table
    )


def policy_text(rows: Sequence[Row]) -> str:
    """Return the answer to `show policy` for a terminal: a line for each policy."""
    if not rows:
        return "There are no such policies in the kernel."
    table = [
        (
            row["selector"] + (f" mark {row['mark']}" if row["mark"] else ""),
            row["direction"],
            row["action"],
            str(row["priority"]),
            str(row["reqid"] or "-"),
            str(row["if_id"] or "-"),
            _short_list(row["peers"]),
            _steering(row),
        )
        for row in rows
    ]
    return columns(("Selector", "Dir", "Action", "Priority", "Reqid", "If-id", "Tunnel", "In VPP"), table)


def events_text(rows: Sequence[Row], last: int = EVENTS_SHOWN) -> str:
    """Return the answer to `show events` for a terminal: at most `last` lines, the newest at the end."""
    if not rows:
        return "Nothing has happened yet."
    shown = rows[-last:] if last > 0 else []
    lines = [f"{_moment(row['time'])}  {row['source']:8}  {row['text']}{_span(row)}" for row in shown]
    earlier = len(rows) - len(shown)
    return "\n".join(([f"({earlier} earlier)"] if earlier else []) + lines)


TEXTS: Mapping[str, Callable[[Any], str]] = {
    "sync": sync_text,
    "sa": sa_text,
    "policy": policy_text,
    "tunnel": tunnel_text,
    "events": events_text,
    "counters": counters_text,
}
"""The text function of each `show` command."""


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text, with a line under its head. The last column is not padded."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    widths[-1] = len(head[-1])
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _paragraph(row: Row) -> str:
    """Return one SA as text, in a layout like that of `ip -s xfrm state`."""
    flags = [*row["flags"], *([f"udp-encap {row['encap']}"] if row["encap"] else [])]
    window = f"{row['replay_window']} packets"
    if row["replay_window_in_vpp"] is not None:
        window += f", {row['replay_window_in_vpp'] or 'none'} in VPP"
    marks = " ".join(f"{name} {row[name]}" for name in ("mark", "set_mark") if row[name])
    numbers = "not in VPP"
    if row["sad_id"] is not None:
        numbers = f"sad_id {row['sad_id']:#x}, stat_index {row['stat_index']}, {row['tunnel'] or 'no interface'}"
    lines = [
        f"src {row['src']} dst {row['dst']}",
        f"    spi {row['spi']} reqid {row['reqid']} mode {row['mode']} direction {row['direction']}"
        + (f" if_id {row['if_id']}" if row["if_id"] else "")
        + (f" {marks}" if marks else ""),
        f"    state       {_state(row)}",
        f"    algorithms  {row['algorithm']}",
        f"    replay      {window}",
        f"    flags       {' '.join(flags) or '-'}",
        f"    selector    {row['selector']}",
        f"    limits      {_limits_text(row['limits'])}",
        f"    added       {_moment(row['added']) if row['added'] else '-'}",
        f"    VPP         {numbers}",
        f"    passed      {_number_text(row['packets'])} packets, {_number_text(row['bytes'])} bytes",
        f"    errors      {_errors(row) or '-'}",
    ]
    return "\n".join(lines)


def _limits_text(limits: Mapping[str, int]) -> str:
    """Return soft and hard limits as text, such as `bytes 1,000/2,000, add 3,300/3,600 s (soft/hard)`."""
    message = []
    for name, unit in (("bytes", ""), ("packets", ""), ("add_s", " s"), ("use_s", " s")):
        soft, hard = limits.get(f"soft_{name}"), limits.get(f"hard_{name}")
        if soft is not None or hard is not None:
            message.append(f"{name.removesuffix('_s')} {_number_text(soft)}/{_number_text(hard)}{unit}")
    return ", ".join(message) + " (soft/hard)" if message else "none"


def _steering(row: Row) -> str:
    """Return as text what VPP does with the packets of a policy."""
    match row["steering"]:
        case "":
            return "-"
        case "routed":
            text = f"{row['route']} into {row['tunnel']} by {row['by']}".lstrip()
            return text + (f": {row['reason']}" if row["reason"] else "")
        case "to the kernel":
            return f"{row['route']} to the kernel: {row['reason']}"
        case "dropped":
            return f"{row['route']} dropped: {row['reason']}".lstrip()
    route = f" {row['route']}" if row["route"] else ""
    return f"{row['steering']}{route}" + (f": {row['reason']}" if row["reason"] else "")


def _state(row: Row) -> str:
    message = str(row["state"]) + (f": {row['reason']}" if row["reason"] else "")
    if row.get("fallback") == "kernel":
        return f"{message}; the kernel has its packets"
    if row.get("fallback") == "drop":
        return message + (
            f"; dropped: {row['fallback_reason']}" if row["fallback_reason"] else "; its packets are dropped"
        )
    return message


def _with_problem(answer: Row, text: str) -> str:
    return f"{answer['problem']}\n\n{text}" if answer["problem"] else text


def _errors(row: Row) -> str:
    return ", ".join(f"{name} {_number_text(number)}" for name, number in row["errors"].items())


def _number_text(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _short_list(things: Sequence[str]) -> str:
    """Return the first item and the number of the others."""
    return "-" if not things else things[0] + (f" +{len(things) - 1}" if len(things) > 1 else "")


def _moment(then: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(then))
    except (OSError, OverflowError, ValueError):  # the kernel accepts any number as an SA's time of addition
        return f"{then:,} s after 1970"


def _span(row: Row) -> str:
    seconds = row["until"] - row["time"]
    return f" within {seconds:.1f} s" if seconds >= 0.1 else ""


def _ago(then: float, what: str = "") -> str:
    if not then:
        return "never"
    return f"{max(0.0, time.time() - then):.1f} s ago" + (f" ({what})" if what else "")
