"""Whatever passes the guard, VPP takes: held against the stand-in, which refuses what VPP refuses and dies where VPP dies."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vpp_papi.vpp_papi import VPPApiJSONFiles

from support.vpp_box import VppBox, vpp_binary
from vppipsec.vpp.algorithms import AEAD_ALGS, CRYPTO_KEY_BYTES, INTEG_KEY_BYTES, CryptoAlg, IntegAlg
from vppipsec.vpp.api.client import connect
from vppipsec.vpp.api.interface import (
    InterfaceAddressAddDel,
    SetInterfaceMtu,
    SetInterfaceTable,
    SetInterfaceTag,
    SetInterfaceUp,
    SetUnnumbered,
)
from vppipsec.vpp.api.ip import DisableIp6, EnableIp6, RouteAddDel, TableAddDel
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
from vppipsec.vpp.guard import GuardError, check_sa, check_tunnel_request
from vppipsec.vpp.ownership import interface_address
from vppipsec.vpp.state.routes import ActualRoutes
from vppipsec.vpp.state.tunnels import ActualTunnel
from vppipsec.vpp.types import MAX_ITF_INSTANCE, NO_INDEX, Prefix, SadFlag, SaSpec
from vppstandin.server import definitions
from vppstandin.world import Refusal, World

pytestmark = pytest.mark.versions

UNNUMBERED_FROM = 1
"""sw_if_index of an interface that is there from the beginning."""
TUNNEL = 2
"""sw_if_index that the tunnel's own interface gets."""
SOURCE = 23
"""Number of our FIB source."""


class Vpp:
    """What the stand-in keeps, asked without a socket."""

    messages: ClassVar[dict[str, Any]] = VPPApiJSONFiles.process_json_array_str(definitions())[0]

    def __init__(self) -> None:
        self.world = World()
        made = self.world.handle("create_loopback_instance", SimpleNamespace(mac_address=bytes(6)))
        assert made == {"sw_if_index": UNNUMBERED_FROM}
        self.world.interfaces[UNNUMBERED_FROM].up = True
        for ip6 in (False, True):
            assert self.ask(TableAddDel(10, ip6, "")) == (0, 0)
        assert self.world.fib.add_source("vpp-ipsecd", 0x0F) == SOURCE

    def ask(self, request: Request) -> tuple[int, int]:
        """Return `retval` and the number that the reply carries. Raises Death."""
        message = self.messages[request.message].unpack(request.pack(1, 2, 3), ntc=True)[0]
        try:
            reply = self.world.handle(request.message, message)
        except Refusal as refusal:
            return refusal.retval, 0
        assert isinstance(reply, dict)
        return 0, 0 if request.reply_field is None else int(reply[request.reply_field])


WRONG: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("spi", (0, -1, 1 << 32)),
    ("src", (b"", bytes(4), bytes(5), bytes(16), b"\xff" * 4, b"\xff" * 16)),
    ("dst", (b"", bytes(4), bytes(5), bytes(16), b"\xff" * 4, b"\xff" * 16)),
    ("crypto", (*CryptoAlg, 16, 255)),
    ("crypto_key", tuple(map(bytes, (0, 8, 15, 16, 17, 20, 24, 32, 36, 128, 129)))),
    ("integ", (*IntegAlg, 7, 255)),
    ("integ_key", tuple(map(bytes, (0, 15, 16, 20, 32, 48, 64, 128, 129)))),
    ("flags", (0, 0x08, 0x0C, 0x14, 0x24, 0x84, 1 << 31, 1 << 32, -1)),
    ("tunnel_flags", (0x20, 0xFF, 0x100, -1)),
    ("salt", (-1, 1 << 32)),
    ("udp_src_port", (0, 1, 0xFFFF, 0x10000, -1)),
    ("udp_dst_port", (0, 1, 0xFFFF, 0x10000, -1)),
    ("replay_window", (4097, 1 << 31, 1 << 32, -1)),
)
"""Values, most of them wrong, that a field may be given."""
CIPHERS = sorted(set(CryptoAlg) - {CryptoAlg.DES_CBC})


@st.composite
def specs(draw: st.DrawFn) -> SaSpec:
    """Draw an SA that may be right, and change some of its fields."""
    crypto = draw(st.sampled_from(CIPHERS))
    integ = IntegAlg.NONE if crypto in AEAD_ALGS else draw(st.sampled_from(sorted(set(IntegAlg) - {IntegAlg.NONE})))
    size = draw(st.sampled_from((4, 16)))
    address, port = st.binary(min_size=size, max_size=size), st.integers(1, 0xFFFF)
    flags = SadFlag.IS_TUNNEL | draw(st.integers(0, 0x7F)) & (0x01 | 0x02 | 0x10 | 0x40)
    udp = flags & SadFlag.UDP_ENCAP
    spec = SaSpec(
        spi=draw(st.integers(1, (1 << 32) - 1)),
        src=draw(address),
        dst=draw(address),
        crypto=crypto,
        crypto_key=draw(st.binary(min_size=CRYPTO_KEY_BYTES[crypto], max_size=CRYPTO_KEY_BYTES[crypto])),
        integ=integ,
        integ_key=draw(st.binary(min_size=INTEG_KEY_BYTES[integ], max_size=INTEG_KEY_BYTES[integ])),
        flags=flags,
        tunnel_flags=draw(st.integers(0, 0x1F)),
        salt=draw(st.integers(0, (1 << 32) - 1)),
        udp_src_port=draw(port) if udp else 0,
        udp_dst_port=draw(port) if udp else 0,
        replay_window=draw(st.integers(0, 4096)),
    )
    for name, values in draw(st.lists(st.sampled_from(WRONG), max_size=2)):
        spec = spec._replace(**{name: draw(st.sampled_from(values))})
    return spec


def passing(count: int) -> list[SaSpec]:
    """Return the SAs that pass the guard, of so many."""
    passed = []

    @settings(max_examples=count, deadline=None, database=None)
    @given(specs())
    def look(spec: SaSpec) -> None:
        with contextlib.suppress(GuardError):
            check_sa(spec)
            passed.append(spec)

    look()
    assert count // 5 < len(passed) < count
    return passed


def test_every_sa_that_passes_the_guard_is_taken() -> None:
    for spec in passing(1000):
        vpp = Vpp()
        assert vpp.ask(SadEntryAdd(7, spec)) == (0, 0)
        assert vpp.ask(SadEntryDel(7)) == (0, 0)
        assert not vpp.world.sas


@pytest.mark.vpp
@pytest.mark.skipif(vpp_binary() is None, reason="VPP_BIN does not name a VPP")
def test_every_sa_that_passes_the_guard_is_taken_by_a_real_vpp() -> None:
    async def run(box: VppBox) -> None:
        client = await connect(box.api_socket, "guard")
        sas = passing(1000)
        added = await client.run([SadEntryAdd(number, spec) for number, spec in enumerate(sas)])
        assert {reply.retval for reply in added} == {0}
        dumped = await client.dump("ipsec_sa_v5_dump")
        assert [(sa.entry.sad_id, sa.entry.spi) for sa in dumped] == [(n, spec.spi) for n, spec in enumerate(sas)]
        deleted = await client.run([SadEntryDel(number) for number in range(len(sas))])
        assert {reply.retval for reply in deleted} == {0}
        assert await client.dump("ipsec_sa_v5_dump") == []
        await client.close()

    with VppBox() as box:
        asyncio.run(run(box))
        assert box.alive


A, B = bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))
OUT = SaSpec(1, A, B, CryptoAlg.AES_GCM_128, bytes(16), IntegAlg.NONE, b"", SadFlag.IS_TUNNEL, 0, 5)
IN = OUT._replace(src=B, dst=A, flags=SadFlag.IS_TUNNEL | SadFlag.IS_INBOUND, replay_window=64)
NATT = OUT._replace(flags=SadFlag.IS_TUNNEL | SadFlag.UDP_ENCAP, udp_src_port=4500, udp_dst_port=4500)

numbers = st.sampled_from((1, 1, 2, 2, 3, 4, 5, 6))
interfaces = st.sampled_from((TUNNEL, TUNNEL, TUNNEL, UNNUMBERED_FROM, 99, NO_INDEX))
prefixes = st.builds(
    Prefix, st.sampled_from((A, bytes(4), bytes(16), b"", bytes(5))), st.sampled_from((0, 31, 32, 33, 128, 129, -1))
)
requests: st.SearchStrategy[Request] = st.one_of(
    st.builds(
        SadEntryAdd, numbers, st.sampled_from((OUT, IN, IN, NATT, OUT._replace(src=B, dst=A), OUT._replace(flags=0)))
    ),
    st.builds(SadEntryUpdate, numbers, st.sampled_from((0, 1, 4500, 1 << 16)), st.sampled_from((4500, 65535))),
    st.builds(SadEntryDel, numbers),
    st.builds(TunnelProtect, interfaces, numbers, st.lists(numbers, max_size=5).map(tuple)),
    st.builds(TunnelUnprotect, interfaces),
    st.builds(IpsecItfCreate, st.sampled_from((-1, 0, 1, MAX_ITF_INSTANCE - 1, MAX_ITF_INSTANCE, NO_INDEX))),
    st.builds(IpsecItfDelete, interfaces),
    st.builds(SetInterfaceTag, interfaces, st.text(max_size=70)),
    st.builds(SetUnnumbered, interfaces, st.just(UNNUMBERED_FROM), st.booleans()),
    st.builds(EnableIp6, interfaces),
    st.builds(DisableIp6, interfaces),
    st.builds(SetInterfaceTable, interfaces, st.booleans(), st.sampled_from((0, 10, 10, 99))),
    st.builds(InterfaceAddressAddDel, interfaces, st.sampled_from((interface_address(256), bytes(16))), st.booleans()),
    st.builds(SetInterfaceUp, interfaces),
    st.builds(SetInterfaceMtu, interfaces, st.integers(0, (1 << 32) - 1)),
    st.builds(RouteAddDel, interfaces, prefixes, st.sampled_from((SOURCE, 0)), st.booleans()),
)


def run_past_the_guard(work_queue: Sequence[Request]) -> int:
    """Send what passes the guard, keep books as the engine does, and return how many passed."""
    vpp, actual, routes = Vpp(), ActualTunnel(), ActualRoutes()
    passed = 0
    for request in work_queue:
        routes_into = routes.into(actual.sw_if_index) if actual.sw_if_index is not None else frozenset()
        try:
            check_tunnel_request(request, actual, routes_into, tables={(10, False), (10, True)})
        except GuardError:
            continue
        retval, extra = vpp.ask(request)
        assert retval in (0, request.already_done_retval), f"{request} was refused: {retval}"
        if isinstance(request, RouteAddDel):
            routes.apply_accepted(request)
        else:
            actual.apply_accepted(request, extra)
        passed += 1
    assert vpp.world.lost_references == []
    assert {number: sa.references for number, sa in vpp.world.sas.items()} == {
        number: 1
        + (actual.protection is not None and number in (actual.protection.outbound, *actual.protection.inbound))
        for number in actual.sas
    }
    assert (TUNNEL in vpp.world.interfaces) == (actual.sw_if_index is not None)
    return passed


def test_every_request_that_passes_the_guard_is_taken_in_whatever_order() -> None:
    passed = []

    @settings(max_examples=1000, deadline=None, database=None)
    @given(st.lists(requests, max_size=60))
    def look(work_queue: list[Request]) -> None:
        passed.append(
            run_past_the_guard(
                [
                    IpsecItfCreate(0),
                    SadEntryAdd(1, OUT),
                    SadEntryAdd(2, IN),
                    TunnelProtect(TUNNEL, 1, (2,)),
                    *work_queue,
                ]
            )
        )

    look()
    assert sum(passed) > 5 * len(passed)
