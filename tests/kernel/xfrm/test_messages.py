"""What we ask the kernel, byte by byte."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from support.build import make_policy
from support.recorded import shared_data
from vppipsec.kernel.hostpath.nft_ruleset import PASS_IN_POLICY, pass_out_policy
from vppipsec.kernel.netlink.messages import NLM_F_ACK, NLM_F_REQUEST
from vppipsec.kernel.netlink.wire import HEADER
from vppipsec.kernel.xfrm.events import Acquired, PolicyAdded, PolicyDeleted
from vppipsec.kernel.xfrm.messages import acquire_request, policy_request
from vppipsec.kernel.xfrm.values import Mark, MsgType, Policy, Usage
from vppipsec.kernel.xfrm.wire import decode_xfrm

SELECTOR, POLICY, ADDED, SEQ = 56, 112, 248, 292
"""Where these begin in an ACQUIRE, its header included: offsets into struct xfrm_user_acquire + 16."""
SELECTOR_BYTES = 56


def recorded_acquire(name: str) -> bytes:
    messages = [bytes.fromhex(json.loads(line)["hex"]) for line in shared_data("xfrm", name).read_text().splitlines()]
    (found,) = [message for message in messages if HEADER.unpack_from(message)[1] == MsgType.ACQUIRE]
    return found


@pytest.mark.parametrize("name", ["handmade.jsonl", "strongswan-a.jsonl"])
def test_acquire_is_the_kernels_own_but_for_the_packet_that_it_tells_of(name: str) -> None:
    message = recorded_acquire(name)
    told = decode_xfrm(message)
    assert isinstance(told, Acquired)
    expected = bytearray(message)
    HEADER.pack_into(expected, 0, len(message), MsgType.ACQUIRE, NLM_F_REQUEST | NLM_F_ACK, 0x01020304, 0)
    expected[SELECTOR : SELECTOR + SELECTOR_BYTES] = message[POLICY : POLICY + SELECTOR_BYTES]
    expected[ADDED : ADDED + 8] = bytes(8)  # when the policy was added
    expected[SEQ : SEQ + 4] = bytes(4)  # the kernel numbers what it hands on
    assert acquire_request(told.policy, 0x01020304) == bytes(expected)


@pytest.mark.parametrize(
    ("changes", "attributes"),
    [
        ({}, ""),
        ({"mark": Mark(0x11, 0xFF)}, "0c00150011000000ff000000"),
        ({"if_id": 7}, "08001f0007000000"),
        ({"mark": Mark(1, 2), "if_id": 0x1234}, "0c001500010000000200000008001f0034120000"),
    ],
)
def test_acquire_carries_mark_and_if_id_of_its_policy(changes: dict[str, object], attributes: str) -> None:
    policy = replace(make_policy(), **changes)  # type: ignore[arg-type]  # whatever they are
    plain = acquire_request(make_policy(), 1)
    asked = acquire_request(policy, 1)
    assert asked[HEADER.size :] == plain[HEADER.size :] + bytes.fromhex(attributes)
    assert HEADER.unpack_from(asked)[0] == len(asked)
    told = decode_xfrm(asked)
    assert isinstance(told, Acquired)
    assert told.policy.id == policy.id
    assert told.policy.templates == policy.templates
    assert told.selector == policy.selector


@pytest.mark.parametrize(
    "policy", [PASS_IN_POLICY, pass_out_policy(7), make_policy(templates=(), if_id=9, usage=Usage(0, 0, 0, 0))]
)
def test_policy_added_to_the_kernel_and_removed_reads_as_meant(policy: Policy) -> None:
    put = decode_xfrm(policy_request(MsgType.UPDPOLICY, policy, 1))
    assert put == PolicyAdded(policy, updated=True)
    removed = decode_xfrm(policy_request(MsgType.DELPOLICY, policy, 1))
    assert removed == PolicyDeleted(policy.id, policy.index)
    asked = policy_request(MsgType.GETPOLICY, policy, 1)
    assert asked[HEADER.size :] == policy_request(MsgType.DELPOLICY, policy, 1)[HEADER.size :]
    assert HEADER.unpack_from(asked)[1:3] == (MsgType.GETPOLICY, NLM_F_REQUEST | NLM_F_ACK)
