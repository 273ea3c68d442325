"""Decoding agrees with iproute2, and survives whatever bytes come."""

from __future__ import annotations

import contextlib
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.iproute import limit_lines, monitor_text, sa_lines
from support.recorded import shared_data
from vppipsec.kernel.netlink.wire import HEADER, WireError, messages_in
from vppipsec.kernel.text import format_addr, format_prefix, format_proto
from vppipsec.kernel.xfrm.events import (
    Acquired,
    Irrelevant,
    Mapped,
    Migrated,
    PoliciesFlushed,
    PolicyAdded,
    PolicyDeleted,
    PolicyExpired,
    SaAdded,
    SaDeleted,
    SaExpired,
    SaProgress,
    SasFlushed,
)
from vppipsec.kernel.xfrm.values import XFRM_INF, MsgType, PolicyAction, PolicyDir, PolicyType, Sa, SaExtraFlag, SaFlag
from vppipsec.kernel.xfrm.wire import decode_xfrm


def recorded(name: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in shared_data("xfrm", name).read_text().splitlines()]
    return [row | {"message": bytes.fromhex(row["hex"])} for row in rows]


def read_monitor(path: Path) -> list[str]:
    """Cut iproute2's text into messages, without time stamps and trailing blanks."""
    parts = re.split(r"^\[[^]]*\] ", path.read_text(), flags=re.MULTILINE)[1:]
    return ["\n".join(line.rstrip() for line in part.rstrip("\n").split("\n")) for part in parts]


def test_every_notification_of_strongswan_reads_as_iproute2_reads_it() -> None:
    rows = recorded("strongswan-a.jsonl")
    texts = read_monitor(shared_data("xfrm", "strongswan-a.monitor.txt"))
    assert len(rows) == len(texts) == 179
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        ours = monitor_text(decode_xfrm(row["message"])).rstrip("\n")
        assert ours == text, f"message {number}, {row['name']}"


def known_sas() -> dict[int, Sa]:
    events = (decode_xfrm(row["message"]) for row in recorded("strongswan-a.jsonl"))
    return {event.sa.spi: event.sa for event in events if isinstance(event, SaAdded)}


def test_limits_and_sequence_numbers_read_as_in_ip_s_xfrm_state() -> None:
    text = shared_data("xfrm", "strongswan-a.state.txt").read_text()
    sas = known_sas()
    compared = 0
    for block in re.split(r"^(?=src )", text, flags=re.MULTILINE)[1:]:
        lines = [line.strip() for line in block.splitlines()]
        sa = sas[int(re.search(r"spi (0x[0-9a-f]+)", block)[1], 16)]  # type: ignore[index]  # every block has one
        start = lines.index("lifetime config:")
        assert lines[start : start + 5] == limit_lines(sa.limits)
        assert f"seq {sa.seq:#010x}" in lines[2]
        assert f"reqid {sa.reqid}({sa.reqid:#010x})" in lines[1]
        for line in (line.strip() for line in sa_lines(sa, "")):
            if line.startswith(("auth-trunc", "aead", "enc")):  # there with the key's length behind the key
                assert line in re.sub(r" \(\d+ bits\)", "", block)
        compared += 1
    assert compared == text.count("lifetime config") > 10


def test_policies_read_as_in_ip_s_xfrm_policy() -> None:
    text = shared_data("xfrm", "strongswan-a.policy.txt").read_text()
    events = (decode_xfrm(row["message"]) for row in recorded("strongswan-a.jsonl"))
    policies = {(e.policy.index, e.policy.priority): e.policy for e in events if isinstance(e, PolicyAdded)}
    compared = 0
    for block in re.split(r"^(?=src )", text, flags=re.MULTILINE)[1:]:
        index, priority = (int(n) for n in re.search(r"index (\d+) priority (\d+)", block).groups())  # type: ignore[union-attr]  # every block has them
        policy = policies.get((index, priority))
        if policy is None:
            continue  # of a socket, which is not announced
        selector, template = policy.selector, policy.templates[0]
        ends = (
            f"src {format_prefix(selector.saddr, selector.prefixlen_s)}",
            f"dst {format_prefix(selector.daddr, selector.prefixlen_d)}",
        )
        assert " ".join(ends) in block
        assert (
            f"dir {PolicyDir(policy.direction).name.lower()} action {PolicyAction(policy.action).name.lower()}" in block
        )
        assert f"priority {policy.priority} ptype {PolicyType(policy.type).name.lower()}" in block
        masks = f"enc-mask {template.ealgos:08x} auth-mask {template.aalgos:08x} comp-mask {template.calgos:08x}"
        assert masks in block
        assert ("level use" if template.optional else "level required") in block
        lines = [line.strip() for line in block.splitlines()]
        start = lines.index("lifetime config:")
        assert lines[start : start + 5] == limit_lines(policy.limits)
        compared += 1
    assert compared == 20


# What `ip xfrm state add` was told, and what the kernel then said


def words_of(cause: str) -> dict[str, str]:
    """Return the fields of an `ip xfrm state` command by name; those that come more than once are joined."""
    told: dict[str, str] = {}
    tokens = iter(cause.split(" sel ")[0].split()[2:])
    for token in tokens:
        if token in ("enc", "auth", "auth-trunc", "aead", "limit", "encap", "mark", "output-mark", "offload"):
            count = {"enc": 2, "auth": 2, "auth-trunc": 3, "aead": 3, "limit": 2, "encap": 4, "offload": 4}.get(
                token, 3
            )
            if ("cipher_null" in cause and token == "enc") or ("digest_null" in cause and token == "auth"):
                count = 1
            value = " ".join(next(tokens, "") for _ in range(count))
        else:
            value = next(tokens, "")
        told[token] = f"{told[token]} {value}" if token in told else value
    return told


def said_of(sa: Sa, told: dict[str, str]) -> dict[str, str]:
    """Return what a decoded SA says to each field that was told."""
    limits = sa.limits
    said = {
        "src": format_addr(sa.saddr),
        "dst": format_addr(sa.daddr),
        "proto": format_proto(sa.proto),
        "spi": f"{sa.spi:#x}",
        "mode": {0: "transport", 1: "tunnel", 4: "beet"}[sa.mode],
        "reqid": str(sa.reqid),
        "replay-window": str(sa.replay_window),
        "if_id": f"{sa.if_id:#x}",
        "tfcpad": str(sa.tfcpad),
        "flag": " ".join(flag.name.lower().replace("_", "-") for flag in SaFlag if sa.flags & flag),
        "extra-flag": " ".join(f.name.lower().replace("_", "-") for f in SaExtraFlag if sa.extra_flags & f),
    }
    if sa.crypt is not None:
        said["enc"] = sa.crypt.name + (f" 0x{sa.crypt.key.hex()}" if sa.crypt.key else "")
    if sa.auth is not None:
        said["auth-trunc"] = f"{sa.auth.name} 0x{sa.auth.key.hex()} {sa.auth.icv_bits}"
        said["auth"] = sa.auth.name + (f" 0x{sa.auth.key.hex()}" if sa.auth.key else "")
    if sa.aead is not None:
        said["aead"] = f"{sa.aead.name} 0x{sa.aead.key.hex()} {sa.aead.icv_bits}"
    if sa.encap is not None:
        said["encap"] = f"espinudp {sa.encap.sport} {sa.encap.dport} {format_addr(sa.encap.oa)}"
    if sa.mark is not None:
        said["mark"] = f"{sa.mark.value:#x} mask {sa.mark.mask:#x}"
    if sa.set_mark is not None:
        said["output-mark"] = f"{sa.set_mark.value:#x} mask {sa.set_mark.mask:#x}"
    if sa.replay is not None:
        low = 0xFFFFFFFF
        said |= {"replay-seq": str(sa.replay.seq & low), "replay-seq-hi": str(sa.replay.seq >> 32)}
        said |= {"replay-oseq": str(sa.replay.oseq & low), "replay-oseq-hi": str(sa.replay.oseq >> 32)}
    named = {
        "byte-soft": limits.soft_bytes,
        "byte-hard": limits.hard_bytes,
        "packet-soft": limits.soft_packets,
        "packet-hard": limits.hard_packets,
        "time-soft": limits.soft_add_s,
        "time-hard": limits.hard_add_s,
        "time-use-soft": limits.soft_use_s,
        "time-use-hard": limits.hard_use_s,
    }
    said["limit"] = " ".join(f"{word} {named[word]}" for word in told.get("limit", "").split()[::2])
    return said


def handmade(*names: str) -> list[dict[str, Any]]:
    return [row for row in recorded("handmade.jsonl") if row["name"] in names]


def test_every_handmade_sa_says_what_ip_was_told() -> None:
    compared = 0
    for row in handmade("NEWSA", "UPDSA"):
        event = decode_xfrm(row["message"])
        assert isinstance(event, SaAdded)
        assert event.updated == (row["name"] == "UPDSA")
        if not row["cause"].startswith("state "):
            continue
        told = words_of(row["cause"])
        told.pop("offload", None)  # the device cannot, and the kernel does not say that it was asked to
        said = said_of(event.sa, told)
        assert {field: said.get(field) for field in told} == told, row["cause"]
        compared += 1
    assert compared == 25


def test_selector_of_a_transport_mode_sa() -> None:
    sa = next(e.sa for r in handmade("NEWSA") if (e := decode_xfrm(r["message"])).sa.spi == 0x100A)
    selector = sa.selector
    assert (format_prefix(selector.saddr, selector.prefixlen_s), selector.sport) == ("10.0.0.1/32", 7777)
    assert (format_prefix(selector.daddr, selector.prefixlen_d), selector.dport) == ("10.0.0.2/32", 7778)
    assert (selector.proto, selector.sport_mask, selector.dport_mask) == (17, 0xFFFF, 0xFFFF)


def said_in_dump(sa: Sa) -> tuple[Any, ...]:
    """Return what does not change while an SA lives."""
    return (
        *(sa.saddr, sa.mode, sa.reqid, sa.replay_window, sa.flags, sa.extra_flags, sa.selector),
        *(sa.crypt, sa.auth, sa.aead, sa.encap, sa.mark, sa.set_mark, sa.limits, sa.if_id, sa.tfcpad),
    )


def test_dump_replies_say_what_the_notifications_said() -> None:
    noted = {}
    for row in handmade("NEWSA", "UPDSA"):
        event = decode_xfrm(row["message"])
        noted.setdefault(event.sa.id, []).append(event.sa)
    compared = 0
    for row in handmade("GETSA-dump-reply"):
        event = decode_xfrm(row["message"])
        assert isinstance(event, SaAdded)
        if event.sa.larval:
            continue
        assert said_in_dump(event.sa) in [said_in_dump(sa) for sa in noted[event.sa.id]]
        compared += 1
    assert compared >= 18


def test_handmade_policies() -> None:
    events = [decode_xfrm(row["message"]) for row in handmade("NEWPOLICY", "UPDPOLICY")]
    policies = [event.policy for event in events if isinstance(event, PolicyAdded)]
    by_text = {
        (
            format_prefix(p.selector.saddr, p.selector.prefixlen_s),
            format_prefix(p.selector.daddr, p.selector.prefixlen_d),
            PolicyDir(p.direction).name,
            p.priority,
        ): p
        for p in policies
    }
    block = by_text["10.9.0.0/24", "10.9.0.0/24", "OUT", 10]
    assert (block.action, block.selector.proto, block.selector.sport, block.templates) == (
        PolicyAction.BLOCK,
        17,
        500,
        (),
    )
    sub = by_text["10.9.0.0/24", "10.9.0.0/24", "OUT", 11]
    assert (sub.type, sub.selector.proto, sub.selector.sport) == (PolicyType.SUB, 1, 8)
    bundle = by_text["10.1.0.0/24", "10.4.0.0/24", "OUT", 100]
    assert [(t.proto, t.mode, t.reqid) for t in bundle.templates] == [(108, 1, 5), (50, 0, 5)]
    assert by_text["0.0.0.0/0", "0.0.0.0/0", "OUT", 200].if_id == 42
    marked = by_text["10.1.0.0/24", "10.3.0.0/24", "OUT", 90].mark
    assert marked is not None
    assert (marked.value, marked.mask) == (0x11, 0xFF)
    limited = by_text["10.1.0.0/24", "10.5.0.0/24", "OUT", 100].limits
    assert (limited.soft_add_s, limited.hard_add_s, limited.hard_bytes) == (1, 2, XFRM_INF)
    assert by_text["10.2.0.0/24", "10.1.0.0/24", "FWD", 100].templates[0].optional
    assert len(by_text["fd01::/64", "fd02::/64", "OUT", 100].selector.daddr) == 16


def only(name: str, number: int = 0) -> Any:
    return decode_xfrm(handmade(name)[number]["message"])


def test_handmade_events_of_every_other_kind() -> None:
    used = only("NEWAE", 0)
    assert isinstance(used, SaProgress)
    assert used.usage is not None
    assert (used.id.spi, used.usage.bytes, used.usage.packets) == (0x1002, 3000, 50)
    assert only("NEWAE", 1).replay is not None
    expiries = [decode_xfrm(row["message"]) for row in handmade("EXPIRE") if row["cause"].startswith("EXPIRE")]
    assert [(e.sa.spi, e.hard) for e in expiries if isinstance(e, SaExpired)] == [(0x1003, False), (0x1004, True)]
    migrated = only("MIGRATE")
    assert isinstance(migrated, Migrated)
    assert migrated.steps[0].reqid == 1
    step = migrated.steps[0]
    assert [format_addr(a) for a in (step.old_saddr, step.new_saddr, step.new_daddr)] == [
        "10.0.0.1",
        "10.0.0.9",
        "10.0.0.2",
    ]
    mapped = only("MAPPING")
    assert isinstance(mapped, Mapped)
    assert (mapped.old_sport, mapped.new_sport) == (4500, 4600)
    acquired = only("ACQUIRE")
    assert isinstance(acquired, Acquired)
    assert (format_addr(acquired.selector.daddr), acquired.selector.dport) == ("10.0.0.2", 9999)
    assert [only("POLEXPIRE", n).hard for n in (0, 1)] == [False, True]
    assert isinstance(only("POLEXPIRE"), PolicyExpired)
    deleted = [only("DELSA", n) for n in (0, 1)]
    assert [(d.id.spi, d.id.mark is not None) for d in deleted if isinstance(d, SaDeleted)] == [
        (0x1001, False),
        (0x100D, True),
    ]
    assert all(isinstance(only("DELPOLICY", n), PolicyDeleted) for n in (0, 1))
    assert only("DELPOLICY", 1).id.direction == PolicyDir.FWD
    assert [only("FLUSHSA", n) for n in (0, 1)] == [SasFlushed(50), SasFlushed(0)]
    assert [only("FLUSHPOLICY", n) for n in (0, 1)] == [PoliciesFlushed(0), PoliciesFlushed(1)]
    assert only("GETDEFAULT") == Irrelevant(MsgType.GETDEFAULT)


def test_deleted_sa_is_named_the_same_with_and_without_its_last_words() -> None:
    for row in (*handmade("DELSA"), *(r for r in recorded("strongswan-a.jsonl") if r["name"] == "DELSA")):
        whole, brief = decode_xfrm(row["message"]), decode_xfrm(row["message"], last_words=False)
        assert whole.id == brief.id
        assert whole.sa is not None
        assert whole.sa.id == whole.id
        assert brief.sa is None


# Whatever bytes come


def all_messages() -> list[bytes]:
    return [row["message"] for name in ("strongswan-a.jsonl", "handmade.jsonl") for row in recorded(name)]


def test_every_truncation_raises_wire_error_and_nothing_else() -> None:
    for message in {m[4:6]: m for m in all_messages()}.values():
        for length in range(len(message)):
            with pytest.raises(WireError):
                decode_xfrm(message[:length])
            # and with a header that fits what is left
            if length >= HEADER.size:
                decode_or_refuse(length.to_bytes(4, "little") + message[4:length])


def decode_or_refuse(message: bytes) -> None:
    with contextlib.suppress(WireError):
        decode_xfrm(message)


def test_flipped_bytes_never_raise_anything_else() -> None:
    rng = random.Random(1)
    messages = all_messages()
    for _ in range(20_000):
        message = bytearray(rng.choice(messages))
        for _ in range(rng.randint(1, 4)):
            message[rng.randrange(4, len(message))] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        decode_or_refuse(bytes(message))


@settings(max_examples=300)
@given(st.binary(max_size=600), st.sampled_from(list(MsgType)))
def test_any_body_decodes_or_is_refused(body: bytes, kind: MsgType) -> None:
    decode_or_refuse(HEADER.pack(HEADER.size + len(body), kind, 0, 0, 0) + body)


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (b"", "a netlink message of 0 bytes has no header"),
        (HEADER.pack(16, 0x99, 0, 0, 0), "netlink message of unknown type 0x99, 16 bytes"),
        (HEADER.pack(16, MsgType.NEWSA, 0, 0, 0), "NEWSA of 16 bytes: its fixed part has 224 bytes, 0 are there"),
        (HEADER.pack(99, MsgType.FLUSHSA, 0, 0, 0), "FLUSHSA of 16 bytes: it claims 99 bytes"),
        (HEADER.pack(16, MsgType.FLUSHSA, 0, 0, 0), "FLUSHSA of 16 bytes: it has no protocol"),
    ],
)
def test_refusals_say_what_is_wrong(message: bytes, complaint: str) -> None:
    with pytest.raises(WireError) as caught:
        decode_xfrm(message)
    assert str(caught.value) == complaint


def test_refusals_never_tell_a_key() -> None:
    for message in all_messages():
        keys = re.findall(rb"[^\0]{16,}", message)
        complaints: list[str] = []
        for cut in range(HEADER.size, len(message), 3):
            with pytest.raises(WireError) as caught:
                decode_xfrm(message[:cut])
            complaints.append(str(caught.value))
        text = "".join(complaints)
        assert not any(key.hex() in text or repr(key)[2:-1] in text for key in keys)


def test_messages_in_refuses_an_impossible_length() -> None:
    one, two = HEADER.pack(17, 1, 0, 0, 0) + b"a\0\0\0", HEADER.pack(16, 2, 0, 0, 0)
    assert [bytes(m) for m in messages_in(one + two)] == [one[:17], two]
    parts = messages_in(two + HEADER.pack(15, 1, 0, 0, 0))
    assert bytes(next(parts)) == two
    with pytest.raises(WireError, match="claims 15 bytes; 16 are there"):
        next(parts)
    with pytest.raises(WireError, match="5 bytes are left over"):
        list(messages_in(two + b"12345"))
