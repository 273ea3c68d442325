"""Recorded messages as JSON, with and without keys."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from support.recorded import shared_data
from vppipsec.kernel.xfrm.recordings import decode_file, records
from vppipsec.kernel.xfrm.wire import decode_xfrm


@pytest.mark.parametrize(("name", "count"), [("strongswan-a.jsonl", 179), ("handmade.jsonl", 94)])
def test_every_recorded_message_decodes(name: str, count: int) -> None:
    out = io.StringIO()
    assert decode_file(shared_data("xfrm", name), False, out) == 0
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    assert len(rows) == count
    assert not any("error" in row for row in rows)


def test_keys_are_printed_on_request_only() -> None:
    lines = shared_data("xfrm", "strongswan-a.jsonl").read_text().splitlines()
    sas = [decode_xfrm(bytes.fromhex(json.loads(line)["hex"])) for line in lines]
    keys = {
        sa.aead.key.hex() for event in sas if (sa := getattr(event, "sa", None)) is not None and sa.aead is not None
    }
    assert len(keys) > 10
    hidden = json.dumps(list(records(lines, show_keys=False)))
    shown = json.dumps(list(records(lines, show_keys=True)))
    assert not any(key in hidden for key in keys)
    assert all(key in shown for key in keys)


def test_values_are_readable() -> None:
    lines = shared_data("xfrm", "strongswan-a.jsonl").read_text().splitlines()
    row = next(records(lines, show_keys=False))
    assert (row["line"], row["event"], row["updated"]) == (1, "SaAdded", True)
    sa = row["sa"]
    assert (sa["saddr"], sa["daddr"], sa["spi"], sa["reqid"]) == ("10.9.0.2", "10.9.0.1", "0xc1041e85", 1)
    assert sa["aead"] == {"name": "rfc4106(gcm(aes))", "key_bits": 288, "icv_bits": 128}


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '{"hex": "zz"}',
        '{"hex": "00"}',
        '{"hex": 5}',
        "[" * 100_000,
        '{"hex": "10000000990000000000000000000000"}',
    ],
)
def test_a_bad_line_is_named_and_the_rest_is_read(line: str, tmp_path: Path) -> None:
    good = '{"hex": "140000001c00000000000000000000003200000000"}'
    path = tmp_path / "messages.jsonl"
    path.write_text(f'{line}\n\n{{"note": "no message"}}\n{good[:-10]}"}}\n{good[:-4]}"}}\n')
    out = io.StringIO()
    assert decode_file(path, False, out) == 1
    rows = [json.loads(row) for row in out.getvalue().splitlines()]
    assert rows[0]["line"] == 1
    assert "error" in rows[0]
    assert rows[-1] == {"line": 5, "type": 0x1C, "event": "SasFlushed", "proto": 50}
