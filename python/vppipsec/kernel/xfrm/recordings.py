"""Prints recorded netlink messages as JSON, one line for each: the output of `vpp-ipsec decode`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TextIO

from vppipsec.kernel.netlink.wire import WireError, message_type
from vppipsec.kernel.text import format_addr
from vppipsec.kernel.xfrm.values import Algorithm
from vppipsec.kernel.xfrm.wire import decode_xfrm


def records(lines: Iterable[str], show_keys: bool) -> Iterator[dict[str, Any]]:
    """Yield a record for the `hex` of each line of JSON. Lines without `hex`, such as remarks, are skipped.

    A line that is not JSON, or has a malformed message, yields {"line": n, "error": ...}. The next lines are still read.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            recorded = json.loads(line)
            text = recorded.get("hex") if isinstance(recorded, dict) else None
            if text is None:
                continue
            message = bytes.fromhex(text)
            event = decode_xfrm(message)
        except (WireError, ValueError, TypeError, RecursionError) as error:
            reason = str(error) if isinstance(error, WireError) else "not a line of JSON with a message in hex"
            yield {"line": number, "error": reason}
            continue
        shown = {"line": number, "type": message_type(message), "event": type(event).__name__}
        yield shown | _fields(event, show_keys)


def decode_file(path: Path, show_keys: bool, out: TextIO) -> int:
    """Print a file of recorded messages as JSON lines. Returns 1 if a line could not be decoded, else 0. Raises OSError."""
    status = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for record in records(lines, show_keys):
            status |= "error" in record
            print(json.dumps(record), file=out)
    return int(status)


def _fields(value: Any, show_keys: bool) -> dict[str, Any]:
    names = [field.name for field in fields(value)] if is_dataclass(value) else value._fields
    return {name: _json_value(name, getattr(value, name), show_keys) for name in names}


def _json_value(name: str, value: Any, show_keys: bool) -> Any:
    if isinstance(value, Algorithm):
        shown: dict[str, Any] = {"name": value.name, "key_bits": 8 * len(value.key), "icv_bits": value.icv_bits}
        return shown | {"key": value.key.hex()} if show_keys else shown
    if name == "spi":
        return f"{value:#010x}"
    if isinstance(value, bytes):
        return format_addr(value)
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) or hasattr(value, "_fields"):
        return _fields(value, show_keys)
    return [_json_value("", item, show_keys) for item in value] if isinstance(value, tuple) else value
