"""Status as text for a screen: tables for many, one answer in one screen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def sync_text(view: Row) -> str:
    """Return the answer to `show sync` for a terminal."""
    kernel, vpp, counts = view["kernel"], view["vpp"], view["counts"]
    what = f"VPP {vpp['version']}, process {vpp['pid']}" if vpp["pid"] else "VPP not connected"
    lines = [
        f"State      {view['state']}" + (f": {view['problem']}" if view["problem"] else ""),
        f"Kernel     {kernel['sas']} SAs, {kernel['policies']} policies",
        f"VPP        {vpp['sas']} SAs, {vpp['tunnels']} tunnels, {vpp['routes']} routes  ({what})",
        "SAs        " + ", ".join(f"{count} {name}" for name, count in counts.items()),
        f"Last event {_ago(view['last_event']['time'], view['last_event']['name'])}",
        f"Queue      {view['queue']} tunnels to look at",
        f"Netlink    {view['events']} events, {view['overflows']} overflows, {view['resyncs']} resyncs"
        f" (last {_ago(view['last_resync'])})",
        f"VPP API    {view['requests']} requests, {view['refusals']} refusals, {view['withheld']} withheld,"
        f" {view['reconnects']} reconnects",
    ]
    return "\n".join(lines)


def sa_text(rows: Sequence[Row]) -> str:
    """Return the answer to `show sa` for a terminal: a line for each SA."""
    if not rows:
        return "The kernel has no SAs."
    table = [
        (
            row["spi"],
            f"{row['src']} > {row['dst']}",
            row["direction"],
            str(row["reqid"]),
            row["algorithm"] + (" esn" if row["esn"] else "") + (f" udp {row['encap']}" if row["encap"] else ""),
            row["tunnel"] or "-",
            row["state"] + (f": {row['reason']}" if row["reason"] else ""),
        )
        for row in rows
    ]
    return columns(("SPI", "Endpoints", "Dir", "Reqid", "Algorithms", "Tunnel", "State"), table)


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table with a line under its head; the last column is as long as it likes."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    widths[-1] = len(head[-1])
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _ago(then: float, what: str = "") -> str:
    if not then:
        return "never"
    return f"{max(0.0, time.time() - then):.1f} s ago" + (f" ({what})" if what else "")
