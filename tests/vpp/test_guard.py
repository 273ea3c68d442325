"""Whatever VPP would refuse, leak or die of is held back, with a sentence and without keys."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vppipsec.vpp.algorithms import CRYPTO_KEY_BYTES, INTEG_KEY_BYTES, CryptoAlg, IntegAlg
from vppipsec.vpp.api.acl import DelAcl, FilterItf, PutAcl
from vppipsec.vpp.api.interface import SetItfAddress, SetItfTable, SetItfUp, SetMtu, SetUnnumbered, TagItf
from vppipsec.vpp.api.ip import ChangeRoute, DisableIp6, EnableIp6
from vppipsec.vpp.api.ipsec import AddSa, CreateItf, DeleteItf, DelSa, Protect, SetSaPorts, Unprotect
from vppipsec.vpp.api.linux_cp import PairItf
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.gre_ipip import MUTE, MUTED, Overlay
from vppipsec.vpp.guard import GuardError, check, check_mute, check_overlay, check_sa
from vppipsec.vpp.ownership import MUTE_SAD_ID
from vppipsec.vpp.state.tunnels import HeldSa, HeldTunnel
from vppipsec.vpp.types import (
    FOR_US,
    MAX_ITF_INSTANCE,
    NO_INDEX,
    Hop,
    Lead,
    Prefix,
    Protection,
    Rule,
    SadFlag,
    SaSpec,
    TunnelFlag,
    shared,
)

A, B = bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))
OUT = SaSpec(1, A, B, CryptoAlg.AES_GCM_128, bytes(range(16)), IntegAlg.NONE, b"", SadFlag.IS_TUNNEL, 0, 5)
IN = OUT._replace(src=B, dst=A, flags=SadFlag.IS_TUNNEL | SadFlag.IS_INBOUND, replay_window=64)
NATT = OUT._replace(flags=SadFlag.IS_TUNNEL | SadFlag.UDP_ENCAP, udp_src_port=4500, udp_dst_port=4500)
PREFIX = Prefix(bytes((10, 2, 0, 0)), 16)
RULE = Rule(True, PREFIX, Prefix(bytes(4), 0), 17, (500, 500))
ANY6 = Prefix(bytes(16), 0)


def holding(protected: bool = True) -> HeldTunnel:
    sas = {
        1: HeldSa(OUT, 0),
        2: HeldSa(IN, 0),
        3: HeldSa(IN._replace(spi=9), 0),
        4: HeldSa(OUT._replace(src=B, dst=A), 0),
        5: HeldSa(NATT, 0),
    }
    return HeldTunnel(0, 7, "tag", 1, True, True, Protection(1, (2,)) if protected else None, sas, 5, (RULE,), True)


GOOD: tuple[Request, ...] = (
    AddSa(9, OUT),
    AddSa(9, IN),
    SetSaPorts(5, 4500, 4501),
    DelSa(3),
    Protect(7, 1, (2, 3)),
    Unprotect(7),
    TagItf(7, "x" * 63),
    SetUnnumbered(7, 1),
    EnableIp6(7),
    DisableIp6(7),
    SetUnnumbered(7, 1, False),
    SetItfUp(7),
    SetMtu(7, 68),
    SetMtu(7, 0xFFFF),
    ChangeRoute(7, PREFIX, 5, True),
    ChangeRoute(NO_INDEX, PREFIX, 5, False),
    PutAcl(5, "x" * 63, (RULE, Rule(False, ANY6, ANY6))),
    FilterItf(7, 5),
    FilterItf(7, NO_INDEX),
    PairItf(7, "ipsec256"),
    ChangeRoute(FOR_US, PREFIX, 5, True),
)
BAD: tuple[tuple[Request, str], ...] = (
    (AddSa(1, OUT), "SA 0x1 is in VPP already"),
    (DelSa(9), "SA 0x9 is not in VPP: deleting it would drop somebody else's reference"),
    (DelSa(2), "SA 0x2 protects an interface: deleting it would only drop a reference"),
    (DelSa(1), "SA 0x1 protects an interface: deleting it would only drop a reference"),
    (SetSaPorts(9, 1, 1), "the UDP ports of SA 0x9 cannot become 1 and 1"),
    (SetSaPorts(5, 0, 1), "the UDP ports of SA 0x5 cannot become 0 and 1"),
    (SetSaPorts(5, 1, 65536), "the UDP ports of SA 0x5 cannot become 1 and 65536"),
    (SetSaPorts(1, 1, 1), "the UDP ports of SA 0x1 cannot become 1 and 1"),  # no UDP encapsulation
    (Protect(8, 1, (2,)), "interface 8 is not the tunnel's"),
    (Protect(7, 1, ()), "0 inbound SAs"),
    (SetMtu(8, 1446), "interface 8 is not the tunnel's"),
    (SetMtu(7, 67), "an MTU of 67 bytes"),
    (SetMtu(7, 0x10000), "an MTU of 65536 bytes"),
    (Protect(7, 1, (2, 3, 2, 3, 2)), "5 inbound SAs"),
    (Protect(7, 1, (2, 2)), "a protection by an SA that VPP does not hold, or by one twice"),
    (Protect(7, 1, (9,)), "a protection by an SA that VPP does not hold, or by one twice"),
    (Protect(7, 9, (2,)), "a protection by an SA that VPP does not hold, or by one twice"),
    (Protect(7, 2, (3,)), "inbound and outbound SAs mixed up"),
    (Protect(7, 1, (4,)), "inbound and outbound SAs mixed up"),
    (Protect(7, 4, (2,)), "inbound and outbound SAs with different endpoints"),
    (PutAcl(6, "tag", (RULE,)), "ACL 6 is not the tunnel's"),
    (PutAcl(NO_INDEX, "tag", (RULE,)), f"ACL {NO_INDEX} is not the tunnel's"),  # it has one
    (PutAcl(5, "x" * 64, (RULE,)), "a tag of 64 characters"),
    (PutAcl(5, "tag", (RULE._replace(dst=ANY6),)), "an ACL rule with addresses of two families"),
    (PutAcl(5, "tag", (RULE._replace(src=Prefix(A, 16)),)), "a prefix with host bits"),
    (PutAcl(5, "tag", (RULE._replace(proto=256),)), "an ACL rule for IP protocol 256"),
    (PutAcl(5, "tag", (RULE._replace(dports=(2, 1)),)), "an ACL rule for ports 2 to 1"),
    (PutAcl(5, "tag", (RULE._replace(sports=(0, 65536)),)), "an ACL rule for ports 0 to 65536"),
    (DelAcl(5), "ACL 5 is not the tunnel's, or in use"),
    (DelAcl(6), "ACL 6 is not the tunnel's, or in use"),
    (FilterItf(8, 5), "interface 8 is not the tunnel's"),
    (FilterItf(7, 6), "ACL 6 is not the tunnel's"),
    (PairItf(8, "ipsec256"), "interface 8 is not the tunnel's"),
    (PairItf(7, "ipsec256", False), "host interface ipsec256 is there already, or not at all"),
    (Unprotect(8), "interface 8 is not the tunnel's"),
    (SetUnnumbered(8, 1), "interface 8 is not the tunnel's"),
    (EnableIp6(8), "interface 8 is not the tunnel's"),
    (DisableIp6(8), "interface 8 is not the tunnel's"),
    (SetItfTable(8, False, 10), "interface 8 is not the tunnel's"),
    (SetItfAddress(8, A), "interface 8 is not the tunnel's"),
    (SetItfAddress(7, A), "the interface has an address already, or none"),  # a borrowed one
    (SetItfUp(8), "interface 8 is not the tunnel's"),
    (TagItf(7, "x" * 64), "a tag of 64 characters"),
    (CreateItf(1), "interface ipsec1 cannot be made"),  # there is one
    (DeleteItf(7), "the interface is still protected, or routes lead into it"),
    (ChangeRoute(7, Prefix(A, 33), 5, True), "a prefix of 33 bits in an address of 32"),
    (ChangeRoute(7, Prefix(A, 16), 5, True), "a prefix with host bits"),
    (ChangeRoute(8, PREFIX, 5, True), "interface 8 is not the tunnel's"),
    (ChangeRoute((Hop(7, 1), Hop(8, 1)), PREFIX, 5, True), "interface 8 is not the tunnel's"),
    (ChangeRoute((Hop(7, 1),), PREFIX, 5, True), "a route's shares are fewer than two, or weigh nothing or too much"),
    (
        ChangeRoute((Hop(7, 0), Hop(7, 1)), PREFIX, 5, True),
        "a route's shares are fewer than two, or weigh nothing or too much",
    ),
    (
        ChangeRoute((Hop(7, 1), Hop(7, 256)), PREFIX, 5, True),
        "a route's shares are fewer than two, or weigh nothing or too much",
    ),
    (ChangeRoute(7, PREFIX, 0, True), "a route without our FIB source would be taken for somebody else's"),
)


@pytest.mark.parametrize("request_", GOOD, ids=lambda r: type(r).__name__)
def test_what_is_right_passes(request_: Request) -> None:
    check(request_, holding(), set())


@pytest.mark.parametrize(("request_", "complaint"), BAD, ids=str)
def test_what_is_wrong_is_held_back(request_: Request, complaint: str) -> None:
    with pytest.raises(GuardError) as caught:
        check(request_, holding(), set())
    assert str(caught.value) == complaint


def test_a_shared_route_leads_into_other_tunnels_too() -> None:
    for lead in ((Hop(7, 1), Hop(8, 255)), 8, NO_INDEX):
        check(ChangeRoute(lead, PREFIX, 5, True), holding(), set(), {8})
    with pytest.raises(GuardError, match="interface 9 is not the tunnel's"):
        check(ChangeRoute((Hop(8, 1), Hop(9, 1)), PREFIX, 5, True), holding(), set(), {8})


@pytest.mark.parametrize(
    ("hops", "lead"),
    [
        ((), NO_INDEX),
        ([(7, 3)], 7),
        ([(7, 3), (NO_INDEX, 5)], 7),
        ([(NO_INDEX, 1), (NO_INDEX, 2)], NO_INDEX),
        ([(8, 1), (7, 3), (8, 1)], (Hop(7, 3), Hop(8, 2))),
        ([(7, 512), (8, 256)], (Hop(7, 255), Hop(8, 127))),
        ([(7, 10_000), (8, 1)], (Hop(7, 255), Hop(8, 1))),
    ],
)
def test_shares_are_told_in_one_way_and_fit_a_byte(hops: list[tuple[int, int]], lead: Lead) -> None:
    assert shared(Hop(*hop) for hop in hops) == lead


def test_what_is_not_protected_is_not_unprotected() -> None:
    with pytest.raises(GuardError, match="the interface is not protected"):
        check(Unprotect(7), holding(protected=False), set())


def test_interface_goes_last() -> None:
    with pytest.raises(GuardError):
        check(DeleteItf(7), holding(protected=False), {PREFIX})
    check(DeleteItf(7), holding(protected=False), set())


TABLES = frozenset({(10, False), (10, True), (20, False)})
PLACED: tuple[tuple[HeldTunnel, Request, str], ...] = (
    (HeldTunnel(0, 7), SetItfTable(7, False, 10), ""),
    (HeldTunnel(0, 7, ip6=True), SetItfTable(7, True, 10), ""),
    (HeldTunnel(0, 7, tables=(10, 10)), SetItfTable(7, True, 0), ""),
    (HeldTunnel(0, 7), SetItfTable(7, True, 20), "VPP has no IPv6 table 20"),
    (HeldTunnel(0, 7), SetItfTable(7, False, 30), "VPP has no IPv4 table 30"),
    (HeldTunnel(0, 7, tables=(10, 0)), SetItfTable(7, False, 10), "the interface is in table 10 already"),
    (HeldTunnel(0, 7, lender=1), SetItfTable(7, False, 10), "the interface has an address"),
    (HeldTunnel(0, 7, lender=1), SetItfTable(7, True, 10), "the interface has an address"),
    (HeldTunnel(0, 7, tables=(10, 0), addressed=True), SetItfTable(7, False, 0), "the interface has an address"),
    (HeldTunnel(0, 7, tables=(10, 0), addressed=True), SetItfTable(7, True, 10), ""),
    (
        HeldTunnel(0, 7, protection=Protection(1, (2,))),
        SetItfTable(7, False, 10),
        "the interface still receives packets that are for another table",
    ),
    (
        HeldTunnel(0, 7, ip6=True, protection=Protection(1, (2,))),
        SetItfTable(7, True, 10),
        "the interface still receives packets that are for another table",
    ),
    (HeldTunnel(0, 7, tables=(10, 0), protection=Protection(1, (2,))), SetItfTable(7, True, 10), ""),
    (HeldTunnel(0, 7, tables=(10, 0)), SetItfAddress(7, A), ""),
    (HeldTunnel(0, 7, tables=(10, 0), addressed=True), SetItfAddress(7, A, False), ""),
    (HeldTunnel(0, 7), SetItfAddress(7, A, False), "the interface has an address already, or none"),
    (HeldTunnel(0, 7), SetItfAddress(7, bytes(16)), "the interface has an address already, or none"),
    (
        HeldTunnel(0, 7, tables=(10, 0)),
        SetUnnumbered(7, 1),
        "the interface would borrow addresses of another table, or has one",
    ),
)


@pytest.mark.parametrize(("held", "request_", "complaint"), PLACED, ids=str)
def test_an_interface_changes_tables_only_where_vpp_lets_it_and_nothing_leaks(
    held: HeldTunnel, request_: Request, complaint: str
) -> None:
    with pytest.raises(GuardError) if complaint else contextlib.nullcontext() as caught:
        check(request_, held, set(), tables=TABLES)
    assert (str(caught.value) if caught else "") == complaint


def test_instances_end_where_vpp_ends() -> None:
    check(CreateItf(MAX_ITF_INSTANCE - 1), HeldTunnel(), set())
    with pytest.raises(GuardError):
        check(CreateItf(MAX_ITF_INSTANCE), HeldTunnel(), set())


WRONG_SAS: tuple[tuple[SaSpec, str], ...] = (
    (
        OUT._replace(tunnel_flags=TunnelFlag.ENCAP_COPY_DF),
        "copying DF into an IPv4 header, whose checksum VPP would get wrong",
    ),
    (OUT._replace(crypto=CryptoAlg.AES_GCM_256), "AES_GCM_256 with a key of 16 bytes, not 32"),
    (OUT._replace(crypto_key=b""), "AES_GCM_128 with a key of 0 bytes, not 16"),
    (OUT._replace(crypto=99), "algorithm 99 with 0 is unknown"),  # type: ignore[arg-type]  # hostile
    (OUT._replace(integ=IntegAlg.SHA1_96, integ_key=bytes(20)), "AES_GCM_128 with SHA1_96"),
    (OUT._replace(crypto=CryptoAlg.AES_CBC_128), "AES_CBC_128 with NONE"),
    (OUT._replace(crypto=CryptoAlg.NONE, crypto_key=b""), "NONE with NONE"),
    (
        OUT._replace(crypto=CryptoAlg.AES_CBC_128, integ=IntegAlg.SHA1_96, integ_key=bytes(19)),
        "SHA1_96 with a key of 19 bytes, not 20",
    ),
    (
        OUT._replace(crypto=CryptoAlg.DES_CBC, crypto_key=bytes(8), integ=IntegAlg.SHA1_96, integ_key=bytes(20)),
        "DES-CBC is not safe",
    ),
    (
        OUT._replace(crypto=CryptoAlg.AES_CTR_128, crypto_key=bytes(16), integ=IntegAlg.MD5_96, integ_key=bytes(16)),
        "AES_CTR_128 with MD5_96",
    ),
    (OUT._replace(dst=A), "tunnel endpoints that are the same"),
    (OUT._replace(flags=SadFlag.IS_TUNNEL | SadFlag.IS_TUNNEL_V6), "flags 0xc and 0x0"),
    (OUT._replace(tunnel_flags=0x20), "flags 0x4 and 0x20"),
    (OUT._replace(salt=1 << 32), "a salt of more than 32 bits"),
    (OUT._replace(udp_src_port=4500), "UDP ports 4500 and 0"),
    (OUT._replace(dst=bytes(16)), "tunnel endpoints of different families"),
    (OUT._replace(src=b"", dst=b""), "tunnel endpoints of different families"),
    (OUT._replace(flags=SadFlag.IS_TUNNEL | SadFlag.UDP_ENCAP), "UDP ports 0 and 0"),
    (OUT._replace(udp_src_port=4500, udp_dst_port=4500), "UDP ports 4500 and 4500"),
    (OUT._replace(spi=0), "SPI 0x0 with a window of 0"),
    (OUT._replace(spi=1 << 32), "SPI 0x100000000 with a window of 0"),
    (OUT._replace(replay_window=8192), "SPI 0x1 with a window of 8192"),
)


@pytest.mark.parametrize(("spec", "complaint"), WRONG_SAS, ids=str)
def test_sas_that_vpp_could_not_bear_are_held_back(spec: SaSpec, complaint: str) -> None:
    with pytest.raises(GuardError) as caught:
        check_sa(spec)
    assert str(caught.value) == complaint


@given(
    st.sampled_from(CryptoAlg),
    st.sampled_from(IntegAlg),
    st.integers(0, 64),
    st.integers(0, 64),
    st.sampled_from((OUT, IN)),
)
def test_no_sa_passes_whose_keys_do_not_fit(
    crypto: CryptoAlg, integ: IntegAlg, crypto_bytes: int, integ_bytes: int, like: SaSpec
) -> None:
    spec = like._replace(crypto=crypto, integ=integ, crypto_key=bytes(crypto_bytes), integ_key=bytes(integ_bytes))
    try:
        check_sa(spec)
    except GuardError:
        return
    assert (crypto_bytes, integ_bytes) == (CRYPTO_KEY_BYTES[crypto], INTEG_KEY_BYTES[integ])


def on_overlay(protection: Protection | None = MUTED) -> HeldTunnel:
    """Return SAs in transport mode, and one in tunnel mode, for an interface of others."""
    specs = (OUT, IN, IN, IN)
    sas = {number: HeldSa(spec._replace(spi=number, flags=spec.flags & ~4), 0) for number, spec in enumerate(specs, 1)}
    sas |= {5: HeldSa(OUT, 0), 6: HeldSa(IN, 0)}
    return HeldTunnel(sas=sas, protection=protection, overlay=Overlay(9, "gre0", A, B, (47,)))


def test_an_interface_of_others_is_protected_by_sas_in_transport_mode_or_muted() -> None:
    for request in (Protect(9, 1, (2, 3)), Protect(9, MUTE_SAD_ID, ()), AddSa(8, OUT), DelSa(4)):
        check(request, on_overlay(), set())


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (Protect(8, 1, (2,)), "interface 8 is not the tunnel's, or not muted"),
        (Protect(9, 1, ()), "0 inbound SAs"),
        (Protect(9, MUTE_SAD_ID, (2,)), "a protection by an SA that VPP does not hold, or by one twice"),
        (Protect(9, 5, (6,)), "an others' interface cannot be protected by SAs of that mode"),
        (Protect(9, 1, (2, 6)), "an others' interface cannot be protected by SAs of that mode"),
        (Unprotect(9), "interface 9 is not the tunnel's"),
        (DeleteItf(9), "interface 9 is not the tunnel's"),
        (SetItfUp(9), "interface 9 is not the tunnel's"),
        (TagItf(9, "a tag"), "interface 9 is not the tunnel's"),
        (SetUnnumbered(9, 1), "interface 9 is not the tunnel's"),
        (ChangeRoute(9, PREFIX, 5, True), "interface 9 is not the tunnel's"),
    ],
    ids=str,
)
def test_nothing_else_is_done_to_an_interface_of_others(request_: Request, complaint: str) -> None:
    with pytest.raises(GuardError) as caught:
        check(request_, on_overlay(), set())
    assert str(caught.value) == complaint


def test_an_interface_of_others_is_muted_before_sas_protect_it() -> None:
    with pytest.raises(GuardError, match="not muted"):
        check(Protect(9, 1, (2,)), on_overlay(None), set())


def test_sas_in_transport_mode_do_not_protect_an_interface_of_ours() -> None:
    held = holding()
    held.sas[1] = HeldSa(OUT._replace(flags=0), 0)
    with pytest.raises(GuardError, match="an ipsec interface cannot be protected by SAs of that mode"):
        check(Protect(7, 1, (2,)), held, set())


def test_what_is_protecting_an_interface_of_others_is_not_deleted() -> None:
    with pytest.raises(GuardError, match="protects an interface"):
        check(DelSa(2), on_overlay(Protection(1, (2,))), set())


def test_muting_needs_the_mute_sa() -> None:
    check_mute(Protect(9, MUTE_SAD_ID, ()), True)
    check_mute(Protect(9, 1, (2,)), False)
    with pytest.raises(GuardError):
        check_mute(Protect(9, MUTE_SAD_ID, ()), False)


@pytest.mark.parametrize(
    ("request_", "protected", "has_mute"),
    [
        (AddSa(MUTE_SAD_ID, MUTE), set(), False),
        (DelSa(MUTE_SAD_ID), set(), True),
        (Protect(9, MUTE_SAD_ID, ()), set(), True),
        (Unprotect(9), {9}, True),
    ],
    ids=str,
)
def test_interfaces_of_others_are_muted_and_let_go_of(request_: Request, protected: set[int], has_mute: bool) -> None:
    check_overlay(request_, {9}, protected, has_mute)


@pytest.mark.parametrize(
    ("request_", "protected", "has_mute"),
    [
        (AddSa(MUTE_SAD_ID, MUTE), set(), True),
        (AddSa(MUTE_SAD_ID, OUT), set(), False),
        (AddSa(5, MUTE), set(), False),
        (DelSa(MUTE_SAD_ID), {9}, True),
        (DelSa(MUTE_SAD_ID), set(), False),
        (DelSa(5), set(), True),
        (Protect(9, MUTE_SAD_ID, ()), set(), False),
        (Protect(8, MUTE_SAD_ID, ()), set(), True),
        (Protect(9, 5, ()), set(), True),
        (Protect(9, MUTE_SAD_ID, (5,)), set(), True),
        (Unprotect(9), set(), True),
    ],
    ids=str,
)
def test_what_mutes_interfaces_of_others_is_held_back_where_vpp_would_refuse_it(
    request_: Request, protected: set[int], has_mute: bool
) -> None:
    with pytest.raises(GuardError):
        check_overlay(request_, {9}, protected, has_mute)
