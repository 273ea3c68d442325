"""The request script that both VPP and the stand-in run, and the normal form in which their answers are compared."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vppipsec.vpp.algorithms import CRYPTO_KEY_BYTES, INTEG_KEY_BYTES, CryptoAlg, IntegAlg
from vppipsec.vpp.api.client import VppClient, connect
from vppipsec.vpp.api.errors import VppRefused
from vppipsec.vpp.types import NO_INDEX

ALSO = (
    "create_loopback_instance",
    "delete_loopback",
    "sw_interface_add_del_address",
    "ipsec_sad_entry_add_v2",
    "ipsec_sad_entry_del",
    "ipsec_sad_entry_update",
    "ipsec_itf_create",
    "ipsec_itf_delete",
    "ipsec_tunnel_protect_update",
    "ipsec_tunnel_protect_del",
    "sw_interface_tag_add_del",
    "sw_interface_set_unnumbered",
    "sw_interface_set_flags",
    "sw_interface_set_table",
    "sw_interface_ip6_enable_disable",
    "ip_route_add_del_v2",
    "ip_route_lookup_v2",
    "ip_table_add_del_v2",
    "ip_table_dump",
    "acl_add_replace",
    "acl_del",
    "acl_dump",
    "acl_interface_set_acl_list",
    "acl_interface_list_dump",
    "acl_stats_intf_counters_enable",
    "abf_policy_add_del",
    "abf_policy_dump",
    "abf_itf_attach_add_del",
    "abf_itf_attach_dump",
    "lcp_itf_pair_get",
    "lcp_itf_pair_add_del_v3",
    "ip_neighbor_add_del",
    "ip_neighbor_dump",
    "ipip_add_tunnel",
    "ipip_del_tunnel",
    "ipip_tunnel_dump",
    "sw_interface_set_mtu",
    "sw_interface_set_table",
    "sw_interface_get_table",
    "ip_mroute_add_del",
    "ip_mroute_dump",
)

ESN, REPLAY, TUNNEL, V6, UDP, INBOUND = 0x01, 0x02, 0x04, 0x08, 0x10, 0x40
A4, B4, A6, B6 = "10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2"


@dataclass(frozen=True)
class Index:
    """Replaces, in arguments, a number that VPP returned earlier."""

    name: str


@dataclass(frozen=True)
class Step:
    """One request. `save` names the number in its answer for later steps."""

    message: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    save: str = ""


def tunnel(src: str, dst: str, flags: int = 0, table: int = 0) -> dict[str, Any]:
    return {
        "instance": NO_INDEX,
        "src": src,
        "dst": dst,
        "sw_if_index": NO_INDEX,
        "table_id": table,
        "encap_decap_flags": flags,
        "mode": 0,
        "flags": 0,
        "dscp": 0,
        "hop_limit": 0,
    }


def key(length: int) -> dict[str, Any]:
    return {"length": length, "data": bytes(range(length))}


def sa(
    sad_id: int,
    flags: int = TUNNEL,
    src: str = A4,
    dst: str = B4,
    crypto: int = CryptoAlg.AES_GCM_128,
    integ: int = IntegAlg.NONE,
    table: int = 0,
    **more: Any,
) -> Step:
    entry = {
        "sad_id": sad_id,
        "spi": 0x1000 + sad_id,
        "protocol": 50,
        "crypto_algorithm": int(crypto),
        "crypto_key": key(CRYPTO_KEY_BYTES[CryptoAlg(crypto)]),
        "integrity_algorithm": int(integ),
        "integrity_key": key(INTEG_KEY_BYTES[IntegAlg(integ)]),
        "flags": flags,
        "tunnel": tunnel(src, dst, more.pop("tunnel_flags", 0), table),
        "salt": 0xDEADBEEF,
        "udp_src_port": 4500,
        "udp_dst_port": 4500,
        "anti_replay_window_size": 64,
    }
    return Step("ipsec_sad_entry_add_v2", {"entry": entry | more})


def sa_del(sad_id: int) -> Step:
    return Step("ipsec_sad_entry_del", {"id": sad_id})


def sa_update(sad_id: int, is_tun: bool, src: str = A4, dst: str = B4, sport: int = 4501, dport: int = 4502) -> Step:
    arguments = {"sad_id": sad_id, "is_tun": is_tun, "tunnel": tunnel(src, dst), "udp_src_port": sport}
    return Step("ipsec_sad_entry_update", arguments | {"udp_dst_port": dport})


def itf(instance: int, save: str = "", mode: int = 0) -> Step:
    inner = {"user_instance": instance, "mode": mode, "sw_if_index": NO_INDEX}
    return Step("ipsec_itf_create", {"itf": inner}, save)


def protect(name: str | int, out: int, *ins: int) -> Step:
    index = Index(name) if isinstance(name, str) else name
    inner = {"sw_if_index": index, "nh": "0.0.0.0", "sa_out": out, "n_sa_in": len(ins), "sa_in": list(ins)}
    return Step("ipsec_tunnel_protect_update", {"tunnel": inner})


def on(message: str, name: str | int, **more: Any) -> Step:
    return Step(message, {"sw_if_index": Index(name) if isinstance(name, str) else name, **more})


def path(index: Any, kind: int = 0, proto: int = 0) -> dict[str, Any]:
    return {
        "sw_if_index": index,
        "table_id": 0,
        "rpf_id": NO_INDEX,
        "weight": 1,
        "preference": 0,
        "type": kind,
        "flags": 0,
        "proto": proto,
        "nh": {"address": {"ip6": bytes(16)}, "via_label": 0, "obj_id": 0, "classify_table_index": 0},
        "n_labels": 0,
        "label_stack": [{"is_uniform": 0, "label": 0, "ttl": 0, "exp": 0}] * 16,
    }


def route(prefix: str, index: Any, source: Any, is_add: bool = True, table: int = 0, kind: int = 0) -> Step:
    inner = {
        "table_id": table,
        "stats_index": 0,
        "prefix": prefix,
        "n_paths": 1,
        "src": source,
        "paths": [path(index, kind, int(":" in prefix))],
    }
    return Step("ip_route_add_del_v2", {"is_add": is_add, "is_multipath": False, "route": inner})


def lookup(prefix: str, exact: bool = False, table: int = 0) -> Step:
    return Step("ip_route_lookup_v2", {"table_id": table, "exact": exact, "prefix": prefix})


def address(name: str, prefix: str, is_add: bool = True) -> Step:
    return on("sw_interface_add_del_address", name, is_add=is_add, prefix=prefix)


def fib_source(name: str, save: str = "") -> Step:
    return Step("fib_source_add", {"src": {"priority": 0x0F, "id": 0, "name": name}}, save)


def routes_of(name: str, is_ip6: bool = False, table: int = 0) -> Step:
    return Step("ip_route_v2_dump", {"src": Index(name), "table": {"table_id": table, "is_ip6": is_ip6, "name": ""}})


def pair(phy: str | int, is_add: bool = True, host: str = "host") -> Step:
    names = {"host_if_name": host, "host_if_type": 0, "netns": ""}
    return on("lcp_itf_pair_add_del_v3", phy, is_add=is_add, **names)


def neighbor(name: str | int, address: str, mac: str = "02:00:00:00:00:07", is_add: bool = True) -> Step:
    index = Index(name) if isinstance(name, str) else name
    inner = {"sw_if_index": index, "flags": 3, "mac_address": mac, "ip_address": address}
    return Step("ip_neighbor_add_del", {"is_add": is_add, "neighbor": inner})


def neighbors(name: str, af: int) -> Step:
    return on("ip_neighbor_dump", name, af=af)


def via(prefix: str, name: str, next_hop: str, source: str) -> Step:
    step = route(prefix, Index(name), Index(source))
    (hop,) = step.arguments["route"]["paths"]
    hop["nh"]["address"]["ip6"] = ipaddress.ip_address(next_hop).packed.ljust(16, b"\0")
    return step


def ipip(src: str, dst: str, save: str = "", instance: int = NO_INDEX, mode: int = 0, table: int = 0) -> Step:
    ends = {"src": src, "dst": dst, "sw_if_index": NO_INDEX, "table_id": table}
    return Step("ipip_add_tunnel", {"tunnel": {"instance": instance, "flags": 0, "mode": mode, "dscp": 0} | ends}, save)


def gre(src: str, dst: str, save: str = "", is_add: bool = True, **more: int) -> Step:
    inner = {"type": 0, "mode": 0, "flags": 0, "session_id": 0, "instance": NO_INDEX, "outer_table_id": 0, "key": 0}
    ends = {"src": src, "dst": dst, "sw_if_index": NO_INDEX}
    return Step("gre_tunnel_add_del_v2", {"is_add": is_add, "tunnel": inner | ends | more}, save)


def unprotect(name: str | int) -> Step:
    return on("ipsec_tunnel_protect_del", name, nh="0.0.0.0")


PAIRS = Step("lcp_itf_pair_get")
SAS = Step("ipsec_sa_v5_dump")
ITFS = Step("ipsec_itf_dump", {"sw_if_index": NO_INDEX})
PROTECTIONS = Step("ipsec_tunnel_protect_dump", {"sw_if_index": NO_INDEX})
INTERFACES = Step("sw_interface_dump", {"sw_if_index": NO_INDEX})
UNNUMBERED = Step("ip_unnumbered_dump", {"sw_if_index": NO_INDEX})
IPIPS = Step("ipip_tunnel_dump", {"sw_if_index": NO_INDEX})
GRES = Step("gre_tunnel_v2_dump", {"sw_if_index": NO_INDEX})
EVERYTHING = (SAS, ITFS, PROTECTIONS, INTERFACES, UNNUMBERED)

_CIPHERS = [
    CryptoAlg.AES_CBC_128,
    CryptoAlg.AES_CBC_192,
    CryptoAlg.AES_CBC_256,
    CryptoAlg.AES_CTR_128,
    CryptoAlg.AES_CTR_192,
    CryptoAlg.AES_CTR_256,
    CryptoAlg.TDES_CBC,
    CryptoAlg.NONE,
]
_AEADS = [
    CryptoAlg.AES_GCM_128,
    CryptoAlg.AES_GCM_192,
    CryptoAlg.AES_GCM_256,
    CryptoAlg.CHACHA20_POLY1305,
    CryptoAlg.AES_NULL_GMAC_128,
    CryptoAlg.AES_NULL_GMAC_192,
    CryptoAlg.AES_NULL_GMAC_256,
]


def _algorithms() -> Iterator[Step]:
    number = 1000
    for cipher in _CIPHERS:
        for integ in IntegAlg:
            yield sa(number, crypto=cipher, integ=integ)
            yield sa_del(number)
            number += 1
    for cipher in _AEADS:
        for integ in (IntegAlg.NONE, IntegAlg.SHA_256_128):
            yield sa(number, TUNNEL | ESN, crypto=cipher, integ=integ)
            yield sa_del(number)
            number += 1


SCRIPT: tuple[Step, ...] = (
    Step("create_loopback_instance", {"mac_address": "de:ad:00:00:00:01", "is_specified": False}, "wan"),
    address("wan", "10.0.0.1/24"),
    address("wan", "fd00::1/64"),
    Step("ip_address_dump", {"sw_if_index": Index("wan"), "is_ipv6": False}),
    on("sw_interface_set_flags", "wan", flags=1),
    on("sw_interface_set_flags", 999, flags=1),
    address("wan", "10.0.0.1/24"),
    Step("ip_address_dump", {"sw_if_index": Index("wan"), "is_ipv6": False}),
    Step("ip_address_dump", {"sw_if_index": Index("wan"), "is_ipv6": True}),
    Step("want_interface_events", {"enable_disable": 1, "pid": 0}),
    # paths to addresses
    lookup("10.0.0.2/32"),
    lookup("10.0.0.1/32"),
    lookup("8.8.8.8/32"),
    lookup("fd00::2/128"),
    lookup("fd01::2/128"),
    lookup("10.0.0.2/32", exact=True),
    lookup("10.0.0.0/24", exact=True),
    lookup("10.0.0.2/32", table=77),
    # SAs
    sa(1),
    sa(2, TUNNEL | REPLAY | INBOUND, B4, A4),
    sa(1),
    sa(3, TUNNEL | REPLAY | INBOUND, B4, A4, anti_replay_window_size=32),
    sa(4, TUNNEL | REPLAY | INBOUND, B4, A4, anti_replay_window_size=65),
    sa(5, TUNNEL | REPLAY | INBOUND | ESN, B4, A4, anti_replay_window_size=4096),
    sa(6, TUNNEL | REPLAY | INBOUND, B4, A4, anti_replay_window_size=1024),
    sa(7, TUNNEL | UDP, udp_src_port=4501, udp_dst_port=4502),
    sa(8, TUNNEL | UDP | INBOUND | REPLAY, B4, A4, udp_src_port=4502, udp_dst_port=4501),
    sa(9, TUNNEL, A6, B6),
    sa(10, TUNNEL | REPLAY | INBOUND, B6, A6),
    sa(11, 0),
    sa(12, INBOUND | REPLAY, B4, A4),
    sa(13, TUNNEL, tunnel_flags=0x0D),
    sa(14, TUNNEL, table=77),
    sa(14, TUNNEL | INBOUND, table=77),
    sa(15, TUNNEL, protocol=51, crypto=CryptoAlg.NONE, integ=IntegAlg.SHA_256_128),
    sa(16, TUNNEL, A4, "203.0.113.1"),
    sa(17, TUNNEL | INBOUND, B4, A4, anti_replay_window_size=0),
    sa(18, TUNNEL | REPLAY | INBOUND, B4, A4, crypto_key=key(20)),
    sa(18, 0, crypto_key=key(15)),
    sa(19, crypto_key=key(0)),
    sa(20, crypto=CryptoAlg.AES_CBC_128, integ=IntegAlg.SHA_256_128, integrity_key=key(31)),
    sa(21, TUNNEL, A4, B6),
    sa(21, TUNNEL, A6, B4),
    sa(21, TUNNEL, A4, A4),  # precedes all other errors
    sa(1, TUNNEL | INBOUND, A6, A6, crypto_key=key(15)),
    sa(21, 0, A4, B6),
    *EVERYTHING,
    *(sa_del(number) for number in (18, 19, 20, 21)),
    lookup("10.0.0.2/32"),
    *_algorithms(),
    sa_update(7, False),
    sa_update(999, False),
    sa_update(1, True, A4, "10.0.0.3"),
    SAS,
    sa_update(1, True, A4, B4),
    sa_del(999),
    sa_del(17),
    sa_del(17),
    # interfaces
    itf(3, "a"),
    itf(3),
    itf(16384),
    itf(16383, "b"),
    itf(NO_INDEX, "c"),
    ITFS,
    on("sw_interface_tag_add_del", "a", is_add=True, tag="ours"),
    on("sw_interface_tag_add_del", "a", is_add=True, tag="ours again"),
    on("sw_interface_tag_add_del", 999, is_add=True, tag="ours"),
    Step(
        "sw_interface_set_unnumbered",
        {"sw_if_index": Index("wan"), "unnumbered_sw_if_index": Index("a"), "is_add": True},
    ),
    Step(
        "sw_interface_set_unnumbered",
        {"sw_if_index": Index("wan"), "unnumbered_sw_if_index": Index("a"), "is_add": True},
    ),
    Step("sw_interface_set_unnumbered", {"sw_if_index": 999, "unnumbered_sw_if_index": Index("a"), "is_add": True}),
    Step("sw_interface_set_unnumbered", {"sw_if_index": Index("wan"), "unnumbered_sw_if_index": 999, "is_add": True}),
    UNNUMBERED,
    on("sw_interface_ip6_enable_disable", "a", enable=True),
    on("sw_interface_ip6_enable_disable", "a", enable=True),
    on("sw_interface_ip6_enable_disable", 999, enable=True),
    on("sw_interface_set_flags", "a", flags=1),
    on("sw_interface_set_flags", "a", flags=1),
    # protections
    protect("a", 1),
    protect("a", 1, 2),
    protect("a", 1, 2, 3, 4, 5),
    protect("a", 1, 2, 3, 4, 5, 6),
    protect("a", 1, 2, 3),
    protect(999, 1, 2),
    protect("wan", 1, 2),
    protect("b", 9, 10),
    PROTECTIONS,
    Step("ipsec_tunnel_protect_dump", {"sw_if_index": Index("b")}),
    sa_del(2),
    SAS,
    protect("a", 7, 8),
    SAS,
    Step("ipsec_tunnel_protect_del", {"sw_if_index": Index("a"), "nh": "0.0.0.0"}),
    Step("ipsec_tunnel_protect_del", {"sw_if_index": Index("a"), "nh": "0.0.0.0"}),
    Step("ipsec_tunnel_protect_del", {"sw_if_index": 999, "nh": "0.0.0.0"}),
    sa_del(8),
    SAS,
    # routes
    fib_source("ours", "source"),
    fib_source("ours", "second"),
    route("10.2.0.0/16", Index("a"), Index("source")),
    route("10.2.0.0/16", Index("b"), Index("source")),
    lookup("10.2.3.4/32"),
    route("10.2.0.0/16", Index("wan"), 0),
    lookup("10.2.3.4/32"),
    route("10.3.0.0/16", NO_INDEX, Index("source"), kind=2),
    lookup("10.3.0.1/32"),
    route("10.7.0.1/32", NO_INDEX, Index("source"), kind=1),
    route("fd07::1/128", NO_INDEX, Index("source"), kind=1),
    lookup("10.7.0.1/32"),
    lookup("fd07::1/128"),
    routes_of("source"),
    routes_of("source", is_ip6=True),
    route("10.7.0.1/32", NO_INDEX, Index("source"), kind=2),
    lookup("10.7.0.1/32"),
    route("10.7.0.1/32", NO_INDEX, Index("source"), kind=1),
    route("10.7.0.1/32", NO_INDEX, Index("source"), is_add=False, kind=2),
    route("fd07::1/128", NO_INDEX, Index("source"), is_add=False, kind=1),
    lookup("10.7.0.1/32"),
    route("fd02::/64", Index("b"), Index("source")),
    lookup("fd02::1/128"),
    route("10.4.0.0/16", 999, Index("source")),
    route("10.4.0.0/16", Index("a"), Index("source"), table=77),
    routes_of("source"),
    routes_of("source", True),
    routes_of("second"),
    route("10.2.0.0/16", NO_INDEX, Index("source"), is_add=False, kind=2),
    lookup("10.2.3.4/32"),
    route("10.2.0.0/16", NO_INDEX, Index("source"), is_add=False, kind=2),
    route("10.9.0.0/16", NO_INDEX, Index("source"), is_add=False, kind=2),
    route("10.2.0.0/16", Index("wan"), 0, is_add=False),
    lookup("10.2.3.4/32"),
    # removal
    on("ipsec_itf_delete", "b"),
    PROTECTIONS,
    SAS,
    routes_of("source", True),
    on("ipsec_itf_delete", "b"),
    on("ipsec_itf_delete", "wan"),
    on("ipsec_itf_delete", 999),
    route("fd02::/64", NO_INDEX, Index("source"), is_add=False, kind=2),
    route("10.3.0.0/16", NO_INDEX, Index("source"), is_add=False, kind=2),
    Step(
        "sw_interface_set_unnumbered",
        {"sw_if_index": Index("wan"), "unnumbered_sw_if_index": Index("a"), "is_add": False},
    ),
    on("ipsec_itf_delete", "a"),
    on("ipsec_itf_delete", "c"),
    *EVERYTHING,
    routes_of("source"),
    itf(3, "d"),
    protect("d", 16, 3),
    *EVERYTHING,
    sa_del(3),
    sa_del(16),
    Step("ipsec_tunnel_protect_del", {"sw_if_index": Index("d"), "nh": "0.0.0.0"}),
    *EVERYTHING,
    # leaks: an update that fails leaves references behind
    protect("d", 1, 4, 999),
    sa_del(4),
    SAS,
    protect("d", 11, 5),
    PROTECTIONS,
    sa_del(11),
    SAS,
    # linux-cp: pairs that cannot be created; one that can needs vhost-net
    PAIRS,
    pair(999),
    pair("wan", False),
    pair("wan", host="a name"),
    pair("d"),
    PAIRS,
    # next hops that stand for the kernel
    neighbor("wan", "169.254.73.80"),
    neighbor("wan", "fe80::4950"),
    neighbor("wan", "169.254.73.80", "02:00:00:00:00:08"),
    neighbor(999, "169.254.73.80"),
    neighbors("wan", 0),
    neighbors("wan", 1),
    neighbors("d", 0),
    via("10.5.0.0/16", "wan", "169.254.73.80", "source"),
    via("10.6.0.1/32", "wan", "169.254.73.80", "source"),
    via("fd05::/64", "wan", "fe80::4950", "source"),
    routes_of("source"),
    routes_of("source", True),
    *(
        route(net, NO_INDEX, Index("source"), is_add=False, kind=2)
        for net in ("10.5.0.0/16", "10.6.0.1/32", "fd05::/64")
    ),
    neighbor("wan", "169.254.73.80", is_add=False),
    neighbor("wan", "169.254.73.80", is_add=False),
    neighbor("wan", "fe80::4950", is_add=False),
    neighbors("wan", 0),
    neighbors("wan", 1),
    # gre and ipip interfaces that SAs in transport mode protect
    ipip(A4, B4, "over"),
    ipip(A4, B4),
    ipip(A4, "10.0.0.3", instance=0),
    ipip(A4, A4),
    ipip(A4, B6),
    ipip(A4, "10.0.0.3", table=77),
    ipip(A4, "10.0.0.3", mode=1),
    ipip(A4, "0.0.0.0", "many", instance=9, mode=1),
    ipip(A6, B6, "over six"),
    IPIPS,
    on("ipip_tunnel_dump", "over"),
    sa(40, 0),
    sa(41, INBOUND | REPLAY, B4, A4),
    sa(42, 0),
    sa(43, 0, "0.0.0.0", "0.0.0.0", CryptoAlg.NONE, IntegAlg.NONE, anti_replay_window_size=0),
    sa(44, TUNNEL),
    protect("over", 43),
    protect("over", 40, 41),
    PROTECTIONS,
    protect("over", 42, 41),
    sa_del(40),
    protect("over", 43),
    protect("over six", 43),
    protect("over", 44, 41),
    protect("over", 42, 41),
    *EVERYTHING,
    unprotect("over six"),
    unprotect("over six"),
    on("ipip_del_tunnel", "over"),
    on("ipip_del_tunnel", "over"),
    on("ipip_del_tunnel", "wan"),
    unprotect("over"),
    PROTECTIONS,
    SAS,
    ipip(A4, B4, "anew"),
    PROTECTIONS,
    *(sa_del(number) for number in (41, 42, 43, 44)),
    SAS,
    INTERFACES,
    *(on("ipip_del_tunnel", name) for name in ("anew", "many", "over six")),
    IPIPS,
    # MTUs
    on("sw_interface_set_mtu", "wan", mtu=[1500, 0, 0, 0]),
    on("sw_interface_set_mtu", "d", mtu=[1000, 0, 1280, 0]),
    on("sw_interface_set_mtu", 999, mtu=[1000, 0, 0, 0]),
    on("sw_interface_dump", "wan"),
    on("sw_interface_dump", "d"),
    on("sw_interface_dump", 999),
    on("sw_interface_dump", 0),
    on("sw_interface_set_mtu", "wan", mtu=[9000, 0, 0, 0]),
)

GRE: tuple[Step, ...] = (
    Step("create_loopback_instance", {"mac_address": "de:ad:00:00:00:01", "is_specified": False}, "wan"),
    gre(A4, B4, "gre"),
    gre(A4, B4),
    gre(A4, B4, "keyed", key=7),
    gre(A4, B4, "bridge", type=1),
    gre(A4, B4, "mirror", type=2, session_id=5),
    gre(A4, "10.0.0.3", instance=0),
    gre(A4, A4),
    gre(A4, B6),
    gre(A4, "10.0.0.3", outer_table_id=77),
    gre(A4, "10.0.0.3", mode=1),
    gre(A4, "0.0.0.0", "many", mode=1),
    gre(A6, B6, "six"),
    GRES,
    on("gre_tunnel_v2_dump", "six"),
    sa(40, 0),
    sa(41, INBOUND | REPLAY, B4, A4),
    protect("gre", 40, 41),
    INTERFACES,
    PROTECTIONS,
    gre(A4, B4, is_add=False),
    gre(A4, B4, is_add=False),
    unprotect("gre"),
    PROTECTIONS,
    SAS,
    gre(A4, B4, "anew"),
    PROTECTIONS,
    GRES,
)
"""Steps for a VPP that has the gre plugin."""
GRE_ALSO = ("gre_tunnel_add_del_v2", "gre_tunnel_v2_dump")


class Asker:
    """Runs a script step by step. Answers are plain values, with saved numbers replaced by their names."""

    def __init__(self, client: VppClient) -> None:
        self._client = client
        self._numbers: dict[str, int] = {}

    async def ask(self, step: Step) -> Any:
        arguments = self._fill(step.arguments)
        if step.message == PAIRS.message:
            return [self._plain(details) for details in await self._client.stream(step.message)]
        if step.message.endswith("_dump"):
            return [self._plain(details) for details in await self._client.dump(step.message, arguments)]
        try:
            reply = await self._client.call(step.message, arguments)
        except VppRefused as refused:
            return {"retval": refused.retval}
        if step.save:
            self._numbers[step.save] = reply.id if hasattr(reply, "id") else reply.sw_if_index
        return self._plain(reply)

    def _fill(self, value: Any) -> Any:
        if isinstance(value, Index):
            return self._numbers[value.name]
        if isinstance(value, Mapping):
            return {name: self._fill(inner) for name, inner in value.items()}
        return [self._fill(inner) for inner in value] if isinstance(value, list) else value

    def _plain(self, value: Any, name: str = "") -> Any:
        if hasattr(value, "_asdict"):
            shown = {
                field: self._plain(inner, field)
                for field, inner in value._asdict().items()
                if field not in ("_0", "context", "_vl_msg_id", "vpe_pid", "client_index", "label_stack", "age")
            }
            return shown
        if isinstance(value, bytes):
            return value.hex()
        if isinstance(value, list | tuple):
            return [self._plain(inner, name) for inner in value]
        if name in _INDEXES and value != NO_INDEX:
            return self._named(int(value))
        if name in ("stats_index", "stat_index"):
            return "an index" if value != NO_INDEX else "no index"
        return int(value) if isinstance(value, int) else value

    def _named(self, number: int) -> str | int:
        for name, known in reversed(self._numbers.items()):  # VPP reuses numbers: the newest name is valid
            if known == number and name not in ("source", "second", "tables"):
                return name
        return number


_INDEXES = ("sw_if_index", "sup_sw_if_index", "ip_sw_if_index")


async def ask_all(client: VppClient, script: Sequence[Step]) -> list[Any]:
    """Run a whole script over one connection."""
    asker = Asker(client)
    return [await asker.ask(step) for step in script]


async def _run(path: str, script: Sequence[Step], also: Sequence[str]) -> list[Any]:
    client = await connect(path, "conformance", also=also)
    answers = await ask_all(client, script)
    await client.close()
    return answers


def answers_of(path: str, script: Sequence[Step] = SCRIPT, also: Sequence[str] = ALSO) -> list[Any]:
    """Run the whole script on a VPP or the stand-in, and return the answers."""
    return asyncio.run(_run(path, script, also))
