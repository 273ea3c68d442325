"""The dry run says what would change, in order and without keys, and changes nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from support.build import CBC, GCM, LOCAL6, REMOTE6, SHA256, make_policy, make_sa, sa_in, sa_out
from support.recorded import PATIENCE_S
from support.rig import KINDS, Rig, play
from support.small_vpp import PREFIXES, SOURCE, in_spec, out_spec
from vppipsec.conf.settings import Settings, VppSettings
from vppipsec.kernel.xfrm.values import Encap, Policy, Sa
from vppipsec.sync.preview import describe_request, dry_run
from vppipsec.vpp.algorithms import IntegAlg
from vppipsec.vpp.api.errors import VppUnavailable
from vppipsec.vpp.api.interface import (
    InterfaceAddressAddDel,
    SetInterfaceMtu,
    SetInterfaceTable,
    SetInterfaceTag,
    SetInterfaceUp,
    SetUnnumbered,
)
from vppipsec.vpp.api.ip import DisableIp6, EnableIp6, RouteAddDel
from vppipsec.vpp.api.ipsec import (
    IpsecItfCreate,
    IpsecItfDelete,
    SadEntryAdd,
    SadEntryDel,
    SadEntryUpdate,
    TunnelProtect,
    TunnelUnprotect,
)
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.types import INTERFACE_RX, NO_INDEX

READING = {"sockclnt_create", "sockclnt_delete", "get_api_json", "control_ping", "show_version", "ip_route_lookup_v2"}
"""Messages that change nothing, beside those that only read."""

PAIR: tuple[Sa | Policy, ...] = (sa_in(1), sa_out(2), make_policy())
CBC_PAIR = tuple(sa._replace(aead=None, crypt=CBC, auth=SHA256) for sa in (sa_in(11, 2), sa_out(12, 2)))
SIX: tuple[Sa | Policy, ...] = (
    make_sa(21, REMOTE6, LOCAL6, 3),
    make_sa(22, LOCAL6, REMOTE6, 3),
    make_policy(src="fd01::/64", dst="fd02::/64", reqid=3, ends=(LOCAL6, REMOTE6)),
)


def changing(rig: Rig) -> list[str]:
    """Return the names of the requests to the stand-in that change something."""
    assert rig.standin is not None
    return [name for name in rig.standin.requests if name not in READING and not name.endswith(("_dump", "_get"))]


async def state_of_vpp(rig: Rig) -> list[Any]:
    """Return all that VPP dumps of what the service could change."""
    admin = await rig.admin()
    every = {"sw_if_index": NO_INDEX}
    sources = await admin.dump("fib_source_dump")
    routes = [
        await admin.dump(
            "ip_route_v2_dump", {"src": source.src.id, "table": {"table_id": 0, "is_ip6": six, "name": ""}}
        )
        for source in sources
        for six in (False, True)
    ]
    dumps = [
        await admin.dump(name, every)
        for name in ("sw_interface_dump", "ipsec_itf_dump", "ipsec_tunnel_protect_dump", "ip_unnumbered_dump")
    ]
    found = [sources, routes, await admin.dump("ipsec_sa_v5_dump"), *dumps]
    rig.admins.remove(admin)
    await admin.close()
    return [[without_context(item) for item in items] for items in found]


def without_context(item: Any) -> Any:
    return [without_context(each) for each in item] if isinstance(item, list) else item._replace(context=0)


async def plan_of(rig: Rig) -> list[str]:
    """Return what a dry run says, and check that it changes nothing and shows no key."""
    before = await state_of_vpp(rig)
    if rig.standin is not None:
        rig.standin.requests.clear()
    lines = await dry_run(rig.settings, rig.kernel)
    if rig.standin is not None:
        assert changing(rig) == []
    assert await state_of_vpp(rig) == before
    text = "\n".join(lines)
    for key in (GCM.key, CBC.key, SHA256.key):
        assert key[:8].hex() not in text
        assert repr(key)[2:-1] not in text
    return lines


@pytest.mark.parametrize("kind", KINDS)
def test_new_tunnel_is_planned_in_order_with_names(kind: str) -> None:
    async def story(rig: Rig) -> None:
        rig.kernel.add(*PAIR)
        lines = await plan_of(rig)
        wan, tag = lines[3].split()[-1], lines[8].split("'")[1]
        assert wan.startswith("loop")
        assert tag.startswith("vpp-ipsecd ")
        assert lines == [
            "make FIB table 0x49500000 of IPv4",
            "make an ACL of 1 rule",
            "make ABF policy 0x49500000: what its ACL permits is looked up in table 0x49500000",
            f"attach ABF policy 0x49500000 to {wan}",
            "create interface ipsec256",
            "make an ACL of 2 rules",
            "add inbound SA 0x49500000: spi 0x00000001 192.0.2.2 > 192.0.2.1 AES_GCM_256",
            "add outbound SA 0x49500001: spi 0x00000002 192.0.2.1 > 192.0.2.2 AES_GCM_256",
            f"tag ipsec256 '{tag}'",
            f"let ipsec256 borrow the addresses of {wan}",
            "set ipsec256 up",
            "route 10.2.0.0/24 in table 0x49500000 into ipsec256",
            "filter what ipsec256 receives",
            "protect ipsec256 with SA 0x49500001 out, 0x49500000 in",
        ]
        assert await plan_of(rig) == lines

    play(kind, story)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_planned_where_vpp_is_equal(kind: str) -> None:
    async def story(rig: Rig) -> None:
        assert await plan_of(rig) == []
        rig.kernel.add(*PAIR, *CBC_PAIR, make_policy(reqid=2, dst="10.3.0.0/24"), *SIX)
        rig.start()
        await rig.settle()
        await rig.stop()
        assert await plan_of(rig) == []

    play(kind, story)


@pytest.mark.parametrize("kind", KINDS)
def test_rekey_and_removal_are_planned_over_what_vpp_holds(kind: str) -> None:
    async def story(rig: Rig) -> None:
        rig.kernel.add(*PAIR)
        rig.start()
        await rig.settle()
        await rig.stop()
        rig.kernel.delete(sa_out(2))
        rig.kernel.add(sa_out(3))
        assert await plan_of(rig) == [
            "add outbound SA 0x49500002: spi 0x00000003 192.0.2.1 > 192.0.2.2 AES_GCM_256",
            "protect ipsec256 with SA 0x49500002 out, 0x49500000 in",
            "delete SA 0x49500001",
        ]
        rig.kernel.delete(sa_in(1), sa_out(3))
        assert await plan_of(rig) == [
            "route 10.2.0.0/24 in table 0x49500000 to drop",
            "remove the protection of ipsec256",
            "delete interface ipsec256",
            "delete SA 0x49500001",
            "delete SA 0x49500000",
            "delete ACL 1",
        ]
        rig.kernel.delete(make_policy())
        lines = await plan_of(rig)
        wan = next(line for line in lines if line.startswith("detach")).split()[-1]
        assert set(lines) == {
            "route 10.2.0.0/24 in table 0x49500000 to drop",
            f"detach ABF policy 0x49500000 from {wan}",
            "remove ABF policy 0x49500000",
            "remove route 10.2.0.0/24 in table 0x49500000",
            "remove FIB table 0x49500000 of IPv4",
            "remove the protection of ipsec256",
            "delete interface ipsec256",
            "delete SA 0x49500000",
            "delete SA 0x49500001",
            "delete ACL 0",
            "delete ACL 1",
        }

    play(kind, story)


def test_service_then_does_what_was_planned_and_no_more() -> None:
    async def story(rig: Rig) -> None:
        assert rig.standin is not None
        udp = Encap(2, 4500, 4500, bytes(4))
        rig.kernel.add(*PAIR, *CBC_PAIR, make_policy(reqid=2, dst="10.3.0.0/24"))
        rig.kernel.add(sa_in(31, 4, encap=udp), sa_out(32, 4, encap=udp), make_policy(reqid=4, dst="10.4.0.0/24"))
        for change in range(3):
            if change == 1:
                rig.kernel.add(sa_out(32, 4, encap=Encap(2, 4500, 40123, bytes(4))), *SIX)
                rig.kernel.delete(*CBC_PAIR)
            elif change == 2:
                rig.kernel.delete(*SIX, *PAIR)
            lines = await plan_of(rig)
            rig.standin.requests.clear()
            await rig.restart_engine()
            await rig.settle()
            await rig.stop()
            begun = {"want_interface_events", "acl_stats_intf_counters_enable", "fib_source_add"}
            assert len(lines) == len([name for name in changing(rig) if name not in begun])
            assert await plan_of(rig) == []

    play("standin", story)


def test_what_vpp_cannot_carry_is_not_planned() -> None:
    async def story(rig: Rig) -> None:
        rig.kernel.add(sa_in(1, proto=51), sa_out(2, proto=51))
        assert await plan_of(rig) == []

    play("standin", story)


def test_vpp_that_is_not_there_is_said_in_a_sentence(tmp_path: Path) -> None:
    settings = Settings(vpp=VppSettings(api_socket=str(tmp_path / "none.sock")))

    async def story(rig: Rig) -> None:
        with pytest.raises(VppUnavailable, match=r"none\.sock cannot be opened: No such file or directory"):
            await asyncio.wait_for(dry_run(settings, rig.kernel), PATIENCE_S)

    play("standin", story)


NAMES = {7: "ipsec3", 1: "eth0"}


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (SadEntryAdd(1, out_spec(2)), "add outbound SA 0x1: spi 0x00000002 192.0.2.1 > 192.0.2.2 AES_GCM_128"),
        (
            SadEntryAdd(1, in_spec(2)._replace(integ=IntegAlg.SHA_256_128)),
            "add inbound SA 0x1: spi 0x00000002 192.0.2.2 > 192.0.2.1 AES_GCM_128 SHA_256_128",
        ),
        (SadEntryUpdate(1, 4500, 40123), "set UDP ports of SA 0x1 to 4500 > 40123"),
        (SadEntryDel(0xABC), "delete SA 0xabc"),
        (IpsecItfCreate(3), "create interface ipsec3"),
        (IpsecItfDelete(7), "delete interface ipsec3"),
        (IpsecItfDelete(8), "delete interface sw_if_index 8"),
        (SetInterfaceTag(7, "a tag"), "tag ipsec3 'a tag'"),
        (SetUnnumbered(7, 1), "let ipsec3 borrow the addresses of eth0"),
        (SetUnnumbered(7, 1, False), "let ipsec3 no longer borrow the addresses of eth0"),
        (SetInterfaceTable(7, True, 0x495FFFFF), "have IPv6 packets on ipsec3 looked up in FIB table 0x495fffff"),
        (InterfaceAddressAddDel(7, bytes((169, 254, 1, 3))), "give ipsec3 the address 169.254.1.3"),
        (EnableIp6(7), "let ipsec3 pass IPv6"),
        (DisableIp6(7), "let ipsec3 pass no IPv6"),
        (InterfaceAddressAddDel(7, bytes((169, 254, 4, 0)), False), "take from ipsec3 the address 169.254.4.0"),
        (SetInterfaceUp(7), "set ipsec3 up"),
        (SetInterfaceMtu(7, 1446), "let ipsec3 take packets of 1446 bytes"),
        (TunnelProtect(7, 1, (2, 3)), "protect ipsec3 with SA 0x1 out, 0x2, 0x3 in"),
        (TunnelUnprotect(7), "remove the protection of ipsec3"),
        (RouteAddDel(7, PREFIXES[0], SOURCE, True), "route 10.1.0.0/16 into ipsec3"),
        (RouteAddDel(INTERFACE_RX + 7, PREFIXES[0], SOURCE, True), "route 10.1.0.0/16 to be received on ipsec3"),
        (RouteAddDel(NO_INDEX, PREFIXES[0], SOURCE, True), "route 10.1.0.0/16 to drop"),
        (RouteAddDel(NO_INDEX, PREFIXES[0], SOURCE, False), "remove route 10.1.0.0/16"),
    ],
)
def test_each_request_is_described(request_: Request, text: str) -> None:
    assert describe_request(request_, NAMES) == text
