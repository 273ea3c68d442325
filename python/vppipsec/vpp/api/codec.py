"""Messages of VPP's binary API as bytes: vpp_papi's serializer with the definitions that VPP itself serves.

Requests have a second, packed form (`Request.pack`), since the service sends them by the thousand. At connect the codec checks
both forms of a sample of each. If the bytes differ, it uses vpp_papi's form.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from vpp_papi.vpp_papi import VPPApiJSONFiles
from vpp_papi.vpp_serializer import vpp_get_type

from vppipsec.vpp.api import abf, acl, interface, ip, ipsec, linux_cp
from vppipsec.vpp.api.errors import VppIncompatible
from vppipsec.vpp.api.ip import SAMPLE_ROUTE
from vppipsec.vpp.api.request import Request

SOCKCLNT_CREATE_ID = 15
"""Message number of sockclnt_create, the only fixed one (VL_API_SOCKCLNT_CREATE)."""
SOCKCLNT_CREATE_REPLY_ID = 16

SAMPLES = (
    *ipsec.IPSEC_SAMPLES,
    *acl.ACL_SAMPLES,
    *abf.ABF_SAMPLES,
    *linux_cp.LINUX_CP_SAMPLES,
    *ip.MULTICAST_SAMPLES,
    *interface.VRF_SAMPLES,
)
CALLS: tuple[str, ...] = (
    "sockclnt_delete",
    "control_ping",
    "show_version",
    "want_interface_events",
    "sw_interface_dump",
    "ip_address_dump",
    "ip_unnumbered_dump",
    "ip_route_v2_dump",
    "fib_source_add",
    "fib_source_dump",
    "ipsec_itf_dump",
    "ipsec_sa_v5_dump",
    "ipsec_tunnel_protect_dump",
    "acl_dump",
    "acl_stats_intf_counters_enable",
    "acl_interface_list_dump",
    "abf_policy_dump",
    "abf_itf_attach_dump",
    "ip_table_dump",
    "ip_neighbor_dump",
    "ip_mroute_dump",
)
"""Messages that have vpp_papi's form only."""
OPTIONAL: tuple[str, ...] = (
    "lcp_itf_pair_get",
    "lcp_itf_pair_add_del_v3",
    "gre_tunnel_v2_dump",
    "gre_tunnel_dump",
    "ipip_tunnel_dump",
)
"""Messages of plugins that are optional in VPP (`Codec.knows`)."""

_EVENT_MESSAGE = "sw_interface_event"
_EVENT_FIELDS = ("_vl_msg_id", "client_index", "pid", "sw_if_index")
_HEADER = struct.Struct(">HII")  # _vl_msg_id, client_index, context of a request
_ADDED = {"case", "discriminator"}
_REPLY_FIELDS = ("_vl_msg_id", "context", "retval")


def bootstrap_messages() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return messages and services of vpp_papi's own memclnt.api.json: enough to ask VPP for all others."""
    text = resources.files("vpp_papi.data").joinpath("memclnt.api.json").read_text()
    messages, services = VPPApiJSONFiles.process_json_str(text)
    return messages, services


class Codec:
    """Packs requests to one VPP and unpacks its answers, by that VPP's message table and definitions."""

    def __init__(self, client_index: int, table: Mapping[str, int], definitions: str, also: Sequence[str] = ()) -> None:
        """Build the codec from VPP's answers at connect: client index, message numbers by `name_crc`, text of get_api_json.

        `also` names messages to know in addition to those that the service uses.

        Raises VppIncompatible if a needed message is missing or has an unexpected layout.
        """
        self.client_index = client_index
        wanted = _with_answers((*CALLS, *OPTIONAL, *also, *(sample.message for sample in SAMPLES)))
        wanted.add(_EVENT_MESSAGE)
        messages, services = _process(definitions, wanted)
        self._messages = messages
        self._services: dict[str, dict[str, Any]] = services
        self._ids: dict[str, int] = {}
        missing = []
        for name in sorted(messages):
            number = table.get(f"{name}_{messages[name].crc[2:]}")
            if number is None:
                missing.append(name)
            else:
                self._ids[name] = number
        needed = {*CALLS, *also, _EVENT_MESSAGE, *(sample.message for sample in SAMPLES)}
        missing += sorted(needed - messages.keys())
        missing = sorted(set(missing) - _with_answers(OPTIONAL))
        if missing:
            absent = ", ".join(missing)
            plugins = [
                f"{name}_plugin.so" for name in ("acl", "abf") if any(it.startswith(f"{name}_") for it in missing)
            ]
            hint = f": enable its plugin {' and '.join(plugins)}" if plugins else ""
            raise VppIncompatible(f"this VPP lacks messages that are needed: {absent}{hint}")
        self._names = {number: name for name, number in self._ids.items()}
        samples = [sample for sample in SAMPLES if sample.message not in OPTIONAL or self.knows(sample.message)]
        misfits = {type(sample) for sample in samples if not self._packed_form_fits(sample)}
        self._packed = {type(sample) for sample in samples} - misfits
        for sample in samples:
            self._check_reply(sample)
        if tuple(messages[_EVENT_MESSAGE].fields[: len(_EVENT_FIELDS)]) != _EVENT_FIELDS:
            raise VppIncompatible(f"this VPP's {_EVENT_MESSAGE} is laid out in a way that we do not know")
        self.event_id = self._ids[_EVENT_MESSAGE]
        """Message number of sw_interface_event."""

    def uses_packed(self, request: type[Request]) -> bool:
        """Return whether requests of this class are sent in their packed form."""
        return request in self._packed

    def knows(self, message: str) -> bool:
        """Return whether this VPP has an optional message and its answers."""
        service = self._services.get(message, {"reply": ""})
        return {message, service["reply"], service.get("stream_msg", service["reply"])} <= self._ids.keys()

    def pack(self, request: Request, context: int) -> bytes:
        """Return a request as bytes."""
        if type(request) in self._packed:
            return request.pack(self._ids[request.message], self.client_index, context)
        return self.pack_call(request.message, request.arguments(), context)

    def pack_call(self, message: str, arguments: Mapping[str, Any], context: int) -> bytes:
        """Return any known message as bytes, from arguments for vpp_papi's serializer."""
        header = {"_vl_msg_id": self._ids[message], "client_index": self.client_index, "context": context}
        return bytes(self._messages[message].pack({**arguments, **header}))

    def name_of(self, msg_id: int) -> str | None:
        """Return the name of a message by its number on this VPP, None if the codec does not know it."""
        return self._names.get(msg_id)

    def stream_of(self, message: str) -> str | None:
        """Return the name of a dump's details message, None for a plain call."""
        service = self._services[message]
        if not service.get("stream"):
            return None
        return str(service.get("stream_msg", service["reply"]))

    def enum_values(self, name: str) -> frozenset[int]:
        """Return the values of an enum of VPP's API, such as `vl_api_ipsec_crypto_alg_t`."""
        return frozenset(int(member) for member in vpp_get_type(name).enum.__members__.values())

    def unpack(self, name: str, data: bytes) -> Any:
        """Return a message as vpp_papi's named tuple, addresses as (af, un) with bytes. Raises VppIncompatible."""
        try:
            return self._messages[name].unpack(data, ntc=True)[0]
        except (struct.error, ValueError, LookupError, TypeError) as error:  # their text may show the message's bytes
            raise VppIncompatible(f"VPP's {name} cannot be read: {type(error).__name__}") from None

    def _packed_form_fits(self, sample: Request) -> bool:
        slow = self.pack_call(sample.message, sample.arguments(), 0x0A0B0C0D)
        return slow == sample.pack(self._ids[sample.message], self.client_index, 0x0A0B0C0D)

    def _check_reply(self, sample: Request) -> None:
        name = f"{sample.message}_reply"
        fields = tuple(self._messages[name].fields)
        extra = (sample.reply_field,) if sample.reply_field else ()
        expected = (*_REPLY_FIELDS[:2], *extra, "retval") if sample.reply_field_first else _REPLY_FIELDS + extra
        if fields[: len(expected)] != expected:
            raise VppIncompatible(f"this VPP's {name} has fields {', '.join(fields)}, not {', '.join(expected)}")
        if sample.reply_field is not None:
            value = SAMPLE_ROUTE if sample.reply_field == "route" else 0x01020304
            header = {"_vl_msg_id": 1, "context": 2, "retval": 0}
            reply = bytes(self._messages[name].pack({**header, sample.reply_field: value}))
            if sample.read_reply(reply, 0x01020304 if sample.reply_field_first else 0) != (0, 0x01020304):
                raise VppIncompatible(f"this VPP's {name} is laid out in a way that we do not know")


def _with_answers(names: Iterable[str]) -> set[str]:
    """Return the names of requests and of all their possible answers."""
    wanted = set()
    for name in names:
        wanted |= {name, f"{name}_reply", f"{name.removesuffix('_dump').removesuffix('_get')}_details"}
    return wanted


def _plain_value(kind: list[Any]) -> list[Any]:
    """Return a type without the additions of VPP 26.06 that vpp_papi 2.3 cannot parse.

    These are the options of types, and the discriminators of unions. Neither affects the layout.
    """
    fields = [part for part in kind if not isinstance(part, dict)]
    return [
        fields[0],
        *([p for p in field if not isinstance(p, dict) or not _ADDED & p.keys()] for field in fields[1:]),
    ]


def _process(definitions: str, wanted: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parse get_api_json's text. Only the wanted messages become Python types."""
    try:
        apis = json.loads(definitions)
        for api in apis:
            api["messages"] = [message for message in api.get("messages", ()) if message[0] in wanted]
            for kinds in ("types", "unions"):
                api[kinds] = [_plain_value(kind) for kind in api.get(kinds, ())]
        messages, services = bootstrap_messages()  # get_api_json's text lacks these
        messages = {name: messages[name] for name in wanted & messages.keys()}
        served, served_services = VPPApiJSONFiles.process_json_array_str(json.dumps(apis))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise VppIncompatible(f"VPP's API definitions cannot be read: {type(error).__name__}") from error
    return messages | served, services | served_services
