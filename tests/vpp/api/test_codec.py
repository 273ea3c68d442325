"""Requests in their packed form are what vpp_papi would send, by the definitions of every VPP that we know."""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.recorded import shared_data
from vppipsec.vpp.api.codec import CALLS, SAMPLES, Codec, bootstrap_messages
from vppipsec.vpp.api.errors import VppIncompatible
from vppipsec.vpp.api.linux_cp import LcpPairAddDel
from vppstandin.server import definitions

pytestmark = pytest.mark.versions


def table_of(apis: list[dict[str, Any]]) -> dict[str, int]:
    """Number the messages of definitions, as VPP does at start."""
    names = [(message[0], message[-1]["crc"]) for api in apis for message in api.get("messages", ())]
    names += [(name, message.crc) for name, message in bootstrap_messages()[0].items()]
    return {f"{name}_{crc[2:]}": number for number, (name, crc) in enumerate(sorted(set(names)), 100)}


def served(version: str) -> list[dict[str, Any]]:
    if version == "standin":
        return list(json.loads(definitions()))
    return [json.loads(path.read_text()) for path in sorted(shared_data("vpp-api", version).glob("*.api.json"))]


def codec_of(apis: list[dict[str, Any]]) -> Codec:
    return Codec(7, table_of(apis), json.dumps(apis))


@pytest.mark.parametrize("version", ["25.10", "26.06", "standin"])
def test_all_packed_forms_fit(version: str) -> None:
    codec = codec_of(served(version))
    assert all(codec.uses_packed(type(sample)) for sample in SAMPLES)
    for sample in SAMPLES:
        assert codec.pack(sample, 5) == codec.pack_call(sample.message, sample.arguments(), 5)


@pytest.mark.parametrize("version", ["25.10", "26.06"])
def test_standins_definitions_are_vpps(version: str) -> None:
    known = {m[0]: m for api in served(version) for m in api.get("messages", ())}
    ours = {m[0]: m for api in served("standin") for m in api["messages"]}
    shared = ours.keys() & known.keys()
    assert {*CALLS, *(s.message for s in SAMPLES)} - {"control_ping"} <= shared
    assert {name: ours[name] for name in shared} == {name: known[name] for name in shared}


def message_of(apis: list[dict[str, Any]], name: str) -> list[Any]:
    return next(message for api in apis for message in api["messages"] if message[0] == name)


def change_layout(message: list[Any], place: int, *fields: list[str]) -> None:
    """Put fields in place of one, and give the message another CRC, as VPP does when a layout changes."""
    message[place : place + 1] = fields
    message[-1]["crc"] = "0x12345678"


def test_missing_message_is_named() -> None:
    apis = served("standin")
    for api in apis:
        api["messages"] = [message for message in api["messages"] if message[0] != "ipsec_sad_entry_add_v2"]
    with pytest.raises(VppIncompatible, match=r"this VPP lacks messages that are needed: ipsec_sad_entry_add_v2$"):
        codec_of(apis)


@pytest.mark.parametrize("lacking", ["lcp_itf_pair_get", "lcp_itf_pair_get_reply", "lcp_itf_pair_details"])
def test_vpp_without_an_optional_plugin_does(lacking: str) -> None:
    apis = served("standin")
    assert codec_of(apis).knows("lcp_itf_pair_get")
    for api in apis:
        api["messages"] = [message for message in api["messages"] if message[0] != lacking]
    assert not codec_of(apis).knows("lcp_itf_pair_get")


@pytest.mark.parametrize("lacking", ["lcp_itf_pair_add_del_v3", "lcp_itf_pair_add_del_v3_reply"])
def test_vpp_that_cannot_make_host_interfaces_does(lacking: str) -> None:
    apis = served("standin")
    codec = codec_of(apis)
    assert codec.knows("lcp_itf_pair_add_del_v3")
    assert codec.uses_packed(LcpPairAddDel)
    for api in apis:
        api["messages"] = [message for message in api["messages"] if message[0] != lacking]
    assert not codec_of(apis).knows("lcp_itf_pair_add_del_v3")


def test_other_layout_falls_back_to_the_serializer_of_vpp_papi() -> None:
    apis = served("standin")
    message = message_of(apis, "ipsec_itf_delete")
    change_layout(message, 4, ["u32", "something_new"], message[4])
    codec = codec_of(apis)
    (delete,) = (sample for sample in SAMPLES if sample.message == "ipsec_itf_delete")
    assert not codec.uses_packed(type(delete))
    assert len(codec.pack(delete, 1)) == 18


def test_answer_of_another_layout_is_refused() -> None:
    apis = served("standin")
    change_layout(message_of(apis, "ipsec_itf_create_reply"), 4, ["u32", "sw_if_index_of_another_kind"])
    with pytest.raises(VppIncompatible, match="ipsec_itf_create_reply has fields"):
        codec_of(apis)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"messages": 5}]', '[{"messages": [[]]}]', "nonsense"])
def test_unreadable_definitions_are_refused(text: str) -> None:
    with pytest.raises(VppIncompatible):
        Codec(7, {}, text)
