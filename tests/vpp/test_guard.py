"""Whatever VPP would refuse, leak or die of is held back, with a sentence and without keys."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vppipsec.vpp.algorithms import CRYPTO_KEY_BYTES, INTEG_KEY_BYTES, CryptoAlg, IntegAlg
from vppipsec.vpp.api.acl import AclAddReplace, AclDel, SetInterfaceAcls
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
from vppipsec.vpp.api.linux_cp import LcpPairAddDel
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.gre_ipip import BLOCK_PROTECTION, BLOCK_SA, GreIpipInterface
from vppipsec.vpp.guard import (
    GuardError,
    check_block_protection,
    check_gre_ipip_request,
    check_sa,
    check_tunnel_request,
)
from vppipsec.vpp.ownership import BLOCK_SAD_ID
from vppipsec.vpp.state.tunnels import ActualSa, ActualTunnel
from vppipsec.vpp.types import (
    LOCAL_INDEX,
    MAX_ITF_INSTANCE,
    NO_INDEX,
    Path,
    Paths,
    Prefix,
    Protection,
    Rule,
    SadFlag,
    SaSpec,
    TunnelFlag,
    weighted_paths,
)

A, B = bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))
OUT = SaSpec(1, A, B, CryptoAlg.AES_GCM_128, bytes(range(16)), IntegAlg.NONE, b"", SadFlag.IS_TUNNEL, 0, 5)
IN = OUT._replace(src=B, dst=A, flags=SadFlag.IS_TUNNEL | SadFlag.IS_INBOUND, replay_window=64)
NATT = OUT._replace(flags=SadFlag.IS_TUNNEL | SadFlag.UDP_ENCAP, udp_src_port=4500, udp_dst_port=4500)
PREFIX = Prefix(bytes((10, 2, 0, 0)), 16)
RULE = Rule(True, PREFIX, Prefix(bytes(4), 0), 17, (500, 500))
ANY6 = Prefix(bytes(16), 0)


def holding(protected: bool = True) -> ActualTunnel:
    sas = {
        1: ActualSa(OUT, 0),
        2: ActualSa(IN, 0),
        3: ActualSa(IN._replace(spi=9), 0),
        4: ActualSa(OUT._replace(src=B, dst=A), 0),
        5: ActualSa(NATT, 0),
    }
    return ActualTunnel(0, 7, "tag", 1, True, True, Protection(1, (2,)) if protected else None, sas, 5, (RULE,), True)


GOOD: tuple[Request, ...] = (
    SadEntryAdd(9, OUT),
    SadEntryAdd(9, IN),
    SadEntryUpdate(5, 4500, 4501),
    SadEntryDel(3),
    TunnelProtect(7, 1, (2, 3)),
    TunnelUnprotect(7),
    SetInterfaceTag(7, "x" * 63),
    SetUnnumbered(7, 1),
    EnableIp6(7),
    DisableIp6(7),
    SetUnnumbered(7, 1, False),
    SetInterfaceUp(7),
    SetInterfaceMtu(7, 68),
    SetInterfaceMtu(7, 0xFFFF),
    RouteAddDel(7, PREFIX, 5, True),
    RouteAddDel(NO_INDEX, PREFIX, 5, False),
    AclAddReplace(5, "x" * 63, (RULE, Rule(False, ANY6, ANY6))),
    SetInterfaceAcls(7, 5),
    SetInterfaceAcls(7, NO_INDEX),
    LcpPairAddDel(7, "ipsec256"),
    RouteAddDel(LOCAL_INDEX, PREFIX, 5, True),
)
BAD: tuple[tuple[Request, str], ...] = (
    (SadEntryAdd(1, OUT), "SA 0x1 is in VPP already"),
    (SadEntryDel(9), "SA 0x9 is not in VPP: deleting it would drop somebody else's reference"),
    (SadEntryDel(2), "SA 0x2 protects an interface: deleting it would only drop a reference"),
    (SadEntryDel(1), "SA 0x1 protects an interface: deleting it would only drop a reference"),
    (SadEntryUpdate(9, 1, 1), "the UDP ports of SA 0x9 cannot become 1 and 1"),
    (SadEntryUpdate(5, 0, 1), "the UDP ports of SA 0x5 cannot become 0 and 1"),
    (SadEntryUpdate(5, 1, 65536), "the UDP ports of SA 0x5 cannot become 1 and 65536"),
    (SadEntryUpdate(1, 1, 1), "the UDP ports of SA 0x1 cannot become 1 and 1"),  # no UDP encapsulation
    (TunnelProtect(8, 1, (2,)), "interface 8 is not the tunnel's"),
    (TunnelProtect(7, 1, ()), "0 inbound SAs"),
    (SetInterfaceMtu(8, 1446), "interface 8 is not the tunnel's"),
    (SetInterfaceMtu(7, 67), "an MTU of 67 bytes"),
    (SetInterfaceMtu(7, 0x10000), "an MTU of 65536 bytes"),
    (TunnelProtect(7, 1, (2, 3, 2, 3, 2)), "5 inbound SAs"),
    (TunnelProtect(7, 1, (2, 2)), "a protection by an SA that VPP does not hold, or by one twice"),
    (TunnelProtect(7, 1, (9,)), "a protection by an SA that VPP does not hold, or by one twice"),
    (TunnelProtect(7, 9, (2,)), "a protection by an SA that VPP does not hold, or by one twice"),
    (TunnelProtect(7, 2, (3,)), "inbound and outbound SAs mixed up"),
    (TunnelProtect(7, 1, (4,)), "inbound and outbound SAs mixed up"),
    (TunnelProtect(7, 4, (2,)), "inbound and outbound SAs with different endpoints"),
    (AclAddReplace(6, "tag", (RULE,)), "ACL 6 is not the tunnel's"),
    (AclAddReplace(NO_INDEX, "tag", (RULE,)), f"ACL {NO_INDEX} is not the tunnel's"),  # it has one
    (AclAddReplace(5, "x" * 64, (RULE,)), "a tag of 64 characters"),
    (AclAddReplace(5, "tag", (RULE._replace(dst=ANY6),)), "an ACL rule with addresses of two families"),
    (AclAddReplace(5, "tag", (RULE._replace(src=Prefix(A, 16)),)), "a prefix with host bits"),
    (AclAddReplace(5, "tag", (RULE._replace(proto=256),)), "an ACL rule for IP protocol 256"),
    (AclAddReplace(5, "tag", (RULE._replace(dports=(2, 1)),)), "an ACL rule for ports 2 to 1"),
    (AclAddReplace(5, "tag", (RULE._replace(sports=(0, 65536)),)), "an ACL rule for ports 0 to 65536"),
    (AclDel(5), "ACL 5 is not the tunnel's, or in use"),
    (AclDel(6), "ACL 6 is not the tunnel's, or in use"),
    (SetInterfaceAcls(8, 5), "interface 8 is not the tunnel's"),
    (SetInterfaceAcls(7, 6), "ACL 6 is not the tunnel's"),
    (LcpPairAddDel(8, "ipsec256"), "interface 8 is not the tunnel's"),
    (LcpPairAddDel(7, "ipsec256", False), "host interface ipsec256 is there already, or not at all"),
    (TunnelUnprotect(8), "interface 8 is not the tunnel's"),
    (SetUnnumbered(8, 1), "interface 8 is not the tunnel's"),
    (EnableIp6(8), "interface 8 is not the tunnel's"),
    (DisableIp6(8), "interface 8 is not the tunnel's"),
    (SetInterfaceTable(8, False, 10), "interface 8 is not the tunnel's"),
    (InterfaceAddressAddDel(8, A), "interface 8 is not the tunnel's"),
    (InterfaceAddressAddDel(7, A), "the interface has an address already, or none"),  # a borrowed one
    (SetInterfaceUp(8), "interface 8 is not the tunnel's"),
    (SetInterfaceTag(7, "x" * 64), "a tag of 64 characters"),
    (IpsecItfCreate(1), "interface ipsec1 cannot be made"),  # there is one
    (IpsecItfDelete(7), "the interface is still protected, or routes lead into it"),
    (RouteAddDel(7, Prefix(A, 33), 5, True), "a prefix of 33 bits in an address of 32"),
    (RouteAddDel(7, Prefix(A, 16), 5, True), "a prefix with host bits"),
    (RouteAddDel(8, PREFIX, 5, True), "interface 8 is not the tunnel's"),
    (RouteAddDel((Path(7, 1), Path(8, 1)), PREFIX, 5, True), "interface 8 is not the tunnel's"),
    (RouteAddDel((Path(7, 1),), PREFIX, 5, True), "a route's shares are fewer than two, or weigh nothing or too much"),
    (
        RouteAddDel((Path(7, 0), Path(7, 1)), PREFIX, 5, True),
        "a route's shares are fewer than two, or weigh nothing or too much",
    ),
    (
        RouteAddDel((Path(7, 1), Path(7, 256)), PREFIX, 5, True),
        "a route's shares are fewer than two, or weigh nothing or too much",
    ),
    (RouteAddDel(7, PREFIX, 0, True), "a route without our FIB source would be taken for somebody else's"),
)


@pytest.mark.parametrize("request_", GOOD, ids=lambda r: type(r).__name__)
def test_what_is_right_passes(request_: Request) -> None:
    check_tunnel_request(request_, holding(), set())


@pytest.mark.parametrize(("request_", "complaint"), BAD, ids=str)
def test_guard_stops_wrong_requests(request_: Request, complaint: str) -> None:
    with pytest.raises(GuardError) as caught:
        check_tunnel_request(request_, holding(), set())
    assert str(caught.value) == complaint


def test_a_shared_route_leads_into_other_tunnels_too() -> None:
    for paths in ((Path(7, 1), Path(8, 255)), 8, NO_INDEX):
        check_tunnel_request(RouteAddDel(paths, PREFIX, 5, True), holding(), set(), {8})
    with pytest.raises(GuardError, match="interface 9 is not the tunnel's"):
        check_tunnel_request(RouteAddDel((Path(8, 1), Path(9, 1)), PREFIX, 5, True), holding(), set(), {8})


@pytest.mark.parametrize(
    ("hops", "paths"),
    [
        ((), NO_INDEX),
        ([(7, 3)], 7),
        ([(7, 3), (NO_INDEX, 5)], 7),
        ([(NO_INDEX, 1), (NO_INDEX, 2)], NO_INDEX),
        ([(8, 1), (7, 3), (8, 1)], (Path(7, 3), Path(8, 2))),
        ([(7, 512), (8, 256)], (Path(7, 255), Path(8, 127))),
        ([(7, 10_000), (8, 1)], (Path(7, 255), Path(8, 1))),
    ],
)
def test_shares_are_told_in_one_way_and_fit_a_byte(hops: list[tuple[int, int]], paths: Paths) -> None:
    assert weighted_paths(Path(*hop) for hop in hops) == paths


def test_what_is_not_protected_is_not_unprotected() -> None:
    with pytest.raises(GuardError, match="the interface is not protected"):
        check_tunnel_request(TunnelUnprotect(7), holding(protected=False), set())


def test_interface_goes_last() -> None:
    with pytest.raises(GuardError):
        check_tunnel_request(IpsecItfDelete(7), holding(protected=False), {PREFIX})
    check_tunnel_request(IpsecItfDelete(7), holding(protected=False), set())


TABLES = frozenset({(10, False), (10, True), (20, False)})
PLACED: tuple[tuple[ActualTunnel, Request, str], ...] = (
    (ActualTunnel(0, 7), SetInterfaceTable(7, False, 10), ""),
    (ActualTunnel(0, 7, ip6=True), SetInterfaceTable(7, True, 10), ""),
    (ActualTunnel(0, 7, tables=(10, 10)), SetInterfaceTable(7, True, 0), ""),
    (ActualTunnel(0, 7), SetInterfaceTable(7, True, 20), "VPP has no IPv6 table 20"),
    (ActualTunnel(0, 7), SetInterfaceTable(7, False, 30), "VPP has no IPv4 table 30"),
    (ActualTunnel(0, 7, tables=(10, 0)), SetInterfaceTable(7, False, 10), "the interface is in table 10 already"),
    (ActualTunnel(0, 7, unnumbered_from=1), SetInterfaceTable(7, False, 10), "the interface has an address"),
    (ActualTunnel(0, 7, unnumbered_from=1), SetInterfaceTable(7, True, 10), "the interface has an address"),
    (
        ActualTunnel(0, 7, tables=(10, 0), has_address=True),
        SetInterfaceTable(7, False, 0),
        "the interface has an address",
    ),
    (ActualTunnel(0, 7, tables=(10, 0), has_address=True), SetInterfaceTable(7, True, 10), ""),
    (
        ActualTunnel(0, 7, protection=Protection(1, (2,))),
        SetInterfaceTable(7, False, 10),
        "the interface still receives packets that are for another table",
    ),
    (
        ActualTunnel(0, 7, ip6=True, protection=Protection(1, (2,))),
        SetInterfaceTable(7, True, 10),
        "the interface still receives packets that are for another table",
    ),
    (ActualTunnel(0, 7, tables=(10, 0), protection=Protection(1, (2,))), SetInterfaceTable(7, True, 10), ""),
    (ActualTunnel(0, 7, tables=(10, 0)), InterfaceAddressAddDel(7, A), ""),
    (ActualTunnel(0, 7, tables=(10, 0), has_address=True), InterfaceAddressAddDel(7, A, False), ""),
    (ActualTunnel(0, 7), InterfaceAddressAddDel(7, A, False), "the interface has an address already, or none"),
    (ActualTunnel(0, 7), InterfaceAddressAddDel(7, bytes(16)), "the interface has an address already, or none"),
    (
        ActualTunnel(0, 7, tables=(10, 0)),
        SetUnnumbered(7, 1),
        "the interface would borrow addresses of another table, or has one",
    ),
)


@pytest.mark.parametrize(("actual", "request_", "complaint"), PLACED, ids=str)
def test_interface_changes_tables_only_where_vpp_allows_it(
    actual: ActualTunnel, request_: Request, complaint: str
) -> None:
    with pytest.raises(GuardError) if complaint else contextlib.nullcontext() as caught:
        check_tunnel_request(request_, actual, set(), tables=TABLES)
    assert (str(caught.value) if caught else "") == complaint


def test_instances_end_where_vpp_ends() -> None:
    check_tunnel_request(IpsecItfCreate(MAX_ITF_INSTANCE - 1), ActualTunnel(), set())
    with pytest.raises(GuardError):
        check_tunnel_request(IpsecItfCreate(MAX_ITF_INSTANCE), ActualTunnel(), set())


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
def test_guard_stops_sas_fatal_to_vpp(spec: SaSpec, complaint: str) -> None:
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


def on_overlay(protection: Protection | None = BLOCK_PROTECTION) -> ActualTunnel:
    """Return SAs in transport mode, and one in tunnel mode, for an interface of others."""
    specs = (OUT, IN, IN, IN)
    sas = {
        number: ActualSa(spec._replace(spi=number, flags=spec.flags & ~4), 0) for number, spec in enumerate(specs, 1)
    }
    sas |= {5: ActualSa(OUT, 0), 6: ActualSa(IN, 0)}
    return ActualTunnel(sas=sas, protection=protection, gre_ipip=GreIpipInterface(9, "gre0", A, B, (47,)))


def test_gre_ipip_interface_is_protected_in_transport_mode_or_blocked() -> None:
    for request in (
        TunnelProtect(9, 1, (2, 3)),
        TunnelProtect(9, BLOCK_SAD_ID, ()),
        SadEntryAdd(8, OUT),
        SadEntryDel(4),
    ):
        check_tunnel_request(request, on_overlay(), set())


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (TunnelProtect(8, 1, (2,)), "interface 8 is not the tunnel's, or not muted"),
        (TunnelProtect(9, 1, ()), "0 inbound SAs"),
        (TunnelProtect(9, BLOCK_SAD_ID, (2,)), "a protection by an SA that VPP does not hold, or by one twice"),
        (TunnelProtect(9, 5, (6,)), "an others' interface cannot be protected by SAs of that mode"),
        (TunnelProtect(9, 1, (2, 6)), "an others' interface cannot be protected by SAs of that mode"),
        (TunnelUnprotect(9), "interface 9 is not the tunnel's"),
        (IpsecItfDelete(9), "interface 9 is not the tunnel's"),
        (SetInterfaceUp(9), "interface 9 is not the tunnel's"),
        (SetInterfaceTag(9, "a tag"), "interface 9 is not the tunnel's"),
        (SetUnnumbered(9, 1), "interface 9 is not the tunnel's"),
        (RouteAddDel(9, PREFIX, 5, True), "interface 9 is not the tunnel's"),
    ],
    ids=str,
)
def test_nothing_else_is_done_to_a_gre_ipip_interface(request_: Request, complaint: str) -> None:
    with pytest.raises(GuardError) as caught:
        check_tunnel_request(request_, on_overlay(), set())
    assert str(caught.value) == complaint


def test_gre_ipip_is_blocked_before_it_is_protected() -> None:
    with pytest.raises(GuardError, match="not muted"):
        check_tunnel_request(TunnelProtect(9, 1, (2,)), on_overlay(None), set())


def test_sas_in_transport_mode_do_not_protect_an_interface_of_ours() -> None:
    actual = holding()
    actual.sas[1] = ActualSa(OUT._replace(flags=0), 0)
    with pytest.raises(GuardError, match="an ipsec interface cannot be protected by SAs of that mode"):
        check_tunnel_request(TunnelProtect(7, 1, (2,)), actual, set())


def test_sa_that_protects_a_gre_ipip_interface_is_not_deleted() -> None:
    with pytest.raises(GuardError, match="protects an interface"):
        check_tunnel_request(SadEntryDel(2), on_overlay(Protection(1, (2,))), set())


def test_blocking_needs_the_block_sa() -> None:
    check_block_protection(TunnelProtect(9, BLOCK_SAD_ID, ()), True)
    check_block_protection(TunnelProtect(9, 1, (2,)), False)
    with pytest.raises(GuardError):
        check_block_protection(TunnelProtect(9, BLOCK_SAD_ID, ()), False)


@pytest.mark.parametrize(
    ("request_", "protected", "has_block_sa"),
    [
        (SadEntryAdd(BLOCK_SAD_ID, BLOCK_SA), set(), False),
        (SadEntryDel(BLOCK_SAD_ID), set(), True),
        (TunnelProtect(9, BLOCK_SAD_ID, ()), set(), True),
        (TunnelUnprotect(9), {9}, True),
    ],
    ids=str,
)
def test_gre_ipip_interfaces_are_blocked_and_unprotected(
    request_: Request, protected: set[int], has_block_sa: bool
) -> None:
    check_gre_ipip_request(request_, {9}, protected, has_block_sa)


@pytest.mark.parametrize(
    ("request_", "protected", "has_block_sa"),
    [
        (SadEntryAdd(BLOCK_SAD_ID, BLOCK_SA), set(), True),
        (SadEntryAdd(BLOCK_SAD_ID, OUT), set(), False),
        (SadEntryAdd(5, BLOCK_SA), set(), False),
        (SadEntryDel(BLOCK_SAD_ID), {9}, True),
        (SadEntryDel(BLOCK_SAD_ID), set(), False),
        (SadEntryDel(5), set(), True),
        (TunnelProtect(9, BLOCK_SAD_ID, ()), set(), False),
        (TunnelProtect(8, BLOCK_SAD_ID, ()), set(), True),
        (TunnelProtect(9, 5, ()), set(), True),
        (TunnelProtect(9, BLOCK_SAD_ID, (5,)), set(), True),
        (TunnelUnprotect(9), set(), True),
    ],
    ids=str,
)
def test_guard_stops_block_requests_vpp_would_refuse(
    request_: Request, protected: set[int], has_block_sa: bool
) -> None:
    with pytest.raises(GuardError):
        check_gre_ipip_request(request_, {9}, protected, has_block_sa)
