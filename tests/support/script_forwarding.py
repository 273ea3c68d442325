"""The part of the request script for ACL-based forwarding: tables, ACLs, policies, attachments, and crashes of VPP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from support.script import NO_INDEX, Index, Step, fib_source, itf, lookup, on, path, route, routes_of

ANY4, ANY6 = "0.0.0.0/0", "::/0"
DROP = 2


def rule(src: Any = ANY4, dst: Any = ANY4, permit: int = 1, proto: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "is_permit": permit,
        "src_prefix": src,
        "dst_prefix": dst,
        "proto": proto,
        "srcport_or_icmptype_first": 0,
        "srcport_or_icmptype_last": 65535,
        "dstport_or_icmpcode_first": 0,
        "dstport_or_icmpcode_last": 65535,
        "tcp_flags_mask": 0,
        "tcp_flags_value": 0,
    } | more


def acl(*rules: dict[str, Any], index: int = NO_INDEX, tag: str = "ours") -> Step:
    return Step("acl_add_replace", {"acl_index": index, "tag": tag, "count": len(rules), "r": list(rules)})


def acl_del(index: int) -> Step:
    return Step("acl_del", {"acl_index": index})


def acl_dump(index: int = NO_INDEX) -> Step:
    return Step("acl_dump", {"acl_index": index})


def lists_on(name: str | int, *acls: int, inputs: int) -> Step:
    return on("acl_interface_set_acl_list", name, count=len(acls), n_input=inputs, acls=list(acls))


def lists_of(name: str | int = NO_INDEX) -> Step:
    return on("acl_interface_list_dump", name)


def raw_prefix(address: bytes, length: int) -> dict[str, Any]:
    return {"address": {"af": 0, "un": {"ip4": address}}, "len": length}


def into(name: Any, ip6: bool = False, **more: Any) -> dict[str, Any]:
    return path(Index(name) if isinstance(name, str) else name, proto=int(ip6)) | more


def deag(table: int, ip6: bool = False, **more: Any) -> dict[str, Any]:
    return path(NO_INDEX, proto=int(ip6)) | {"table_id": table} | more


def drop(ip6: bool = False, **more: Any) -> dict[str, Any]:
    return path(NO_INDEX, DROP, int(ip6)) | more


def policy(policy_id: int, acl_index: int, *paths: dict[str, Any], is_add: bool = True) -> Step:
    inner = {"policy_id": policy_id, "acl_index": acl_index, "n_paths": len(paths), "paths": list(paths)}
    return Step("abf_policy_add_del", {"is_add": is_add, "policy": inner})


def attach(policy_id: int, name: str | int, priority: int = 10, ip6: bool = False, is_add: bool = True) -> Step:
    index = Index(name) if isinstance(name, str) else name
    inner = {"policy_id": policy_id, "sw_if_index": index, "priority": priority, "is_ipv6": ip6}
    return Step("abf_itf_attach_add_del", {"is_add": is_add, "attach": inner})


def table(number: int, ip6: bool = False, is_add: bool = True, name: str = "", multicast: bool = False) -> Step:
    inner = {"table_id": number, "is_ip6": ip6, "name": name}
    return Step("ip_table_add_del_v2", {"table": inner, "create_mfib": multicast, "is_add": is_add})


def via(number: int, prefix: str, *paths: dict[str, Any], is_add: bool = True, source: Any = 0) -> Step:
    step = route(prefix, NO_INDEX, source, is_add, number)
    inner = {**step.arguments["route"], "n_paths": len(paths), "paths": list(paths)}
    return Step(step.message, {**step.arguments, "route": inner})


def all_routes(number: int, ip6: bool = False) -> Step:
    return Step("ip_route_v2_dump", {"src": 0, "table": {"table_id": number, "is_ip6": ip6, "name": ""}})


def loopback(save: str) -> Step:
    return Step("create_loopback_instance", {"mac_address": "de:ad:00:00:00:02", "is_specified": False}, save)


TABLES = Step("ip_table_dump")
POLICIES = Step("abf_policy_dump")
ATTACHMENTS = Step("abf_itf_attach_dump")
BAD_PORTS = {"srcport_or_icmptype_first": 5, "srcport_or_icmptype_last": 4}
BAD_CODES = {"dstport_or_icmpcode_first": 5, "dstport_or_icmpcode_last": 4}

FORWARDING: tuple[Step, ...] = (
    loopback("lan"),
    loopback("dmz"),
    itf(200, "t"),
    fib_source("tables", "tables"),
    # tables
    table(5, name="vpp-ipsecd a"),
    table(5, name="vpp-ipsecd b"),
    table(6, ip6=True),
    table(7),
    table(7, ip6=True, name="seven"),
    table(0, is_add=False),
    table(99, is_add=False),
    TABLES,
    all_routes(5),
    all_routes(6, ip6=True),
    all_routes(77),
    # routes in them
    via(5, "10.0.0.0/8", into("t"), source=Index("tables")),
    via(5, "10.1.0.0/16", drop()),
    via(5, "10.2.0.0/16", deag(0)),
    via(5, "10.3.0.0/16", deag(7, weight=3)),
    via(5, "10.4.0.0/16", deag(66)),
    via(66, "10.4.0.0/16", drop()),
    via(5, "10.9.9.9/32", into("t")),
    via(5, "10.8.8.8/32", deag(7)),
    via(5, "10.8.8.9/32", drop()),
    via(5, "10.5.0.0/16", into(999)),
    via(5, "10.6.0.0/16"),
    via(5, "10.6.0.0/16", is_add=False),
    via(5, "10.7.0.0/16", into("t", True)),
    via(5, "10.7.0.0/16", drop() | {"proto": 9}),
    via(7, "0.0.0.0/0", into("t")),
    via(7, "224.0.0.0/4", into("t")),
    via(6, "fd10::/64", into("t", True)),
    via(6, "fd10::7/128", into("t", True)),
    via(6, "fd11::/64", deag(7, True)),
    via(6, "fd12::/64", deag(6)),
    *(lookup(f"10.{number}.0.1/32", table=5) for number in range(8)),
    lookup("10.9.9.9/32", table=5),
    lookup("10.8.8.8/32", table=5),
    lookup("10.0.0.0/8", exact=True, table=7),
    lookup("224.0.0.0/4", table=7),
    lookup("fd10::1/128", table=6),
    lookup("fd10::7/128", table=6),
    lookup("fd11::1/128", table=6),
    lookup("fd10::1/128", table=5),
    routes_of("tables", table=5),
    routes_of("tables", table=7),
    all_routes(5),
    all_routes(6, ip6=True),
    # VPP deletes a table when neither the API nor a path holds it
    table(7, is_add=False),
    TABLES,
    lookup("1.2.3.4/32", table=7),
    via(7, "0.0.0.0/0", is_add=False),
    via(7, "224.0.0.0/4", is_add=False),
    via(5, "10.3.0.0/16", drop()),
    TABLES,
    via(5, "10.8.8.8/32", is_add=False),
    TABLES,
    via(5, "10.8.8.8/32", deag(5)),
    *(via(5, prefix, is_add=False) for prefix in ("10.1.0.0/16", "10.2.0.0/16", "10.3.0.0/16", "10.9.9.9/32")),
    *(via(5, prefix, is_add=False) for prefix in ("10.8.8.9/32", "10.7.0.0/16")),
    table(5, is_add=False),
    TABLES,
    # the routes of a deleted IPv4 table appear in the next one
    via(5, "10.8.8.8/32", is_add=False),
    TABLES,
    table(8),
    lookup("10.1.2.3/32", table=8),
    routes_of("tables", table=8),
    via(8, "10.0.0.0/8", is_add=False, source=Index("tables")),
    lookup("10.1.2.3/32", table=8),
    table(8, is_add=False),
    table(7, ip6=True, is_add=False),
    TABLES,
    via(6, "fd11::/64", is_add=False),
    TABLES,
    table(6, ip6=True, is_add=False),
    table(6, ip6=True),
    lookup("fd10::1/128", table=6),
    table(6, ip6=True, is_add=False),
    # access lists
    acl_dump(),
    acl(rule(), index=3),
    acl(rule("10.0.0.0/8", "10.1.0.0/16", 0, 17), rule(proto=1, dst="10.2.0.0/16"), tag="x" * 63),
    acl(tag="none"),
    acl(rule(raw_prefix(b"\n\0\0\1", 24))),
    acl(rule(dst=raw_prefix(b"\n\0\0\1", 24))),
    acl(rule(raw_prefix(b"\n\0\0\0", 33))),
    acl(rule(dst=ANY6)),
    acl(rule(ANY6, "fd10::/64", 2, 6, tcp_flags_mask=2, tcp_flags_value=2), tag=""),
    acl(rule(proto=200)),
    acl(rule(**BAD_PORTS)),
    acl(rule(**BAD_CODES)),
    acl(rule(), rule(**BAD_PORTS), index=0),
    acl(rule(raw_prefix(b"\n\0\0\1", 24), **BAD_PORTS), index=9),
    acl(rule(**BAD_PORTS), index=9),
    acl_dump(),
    acl_dump(1),
    acl_dump(99),
    acl(rule(dst="10.7.0.0/16"), index=1, tag="some"),
    acl(index=0, tag="fewer"),
    acl_dump(),
    acl_del(0),
    acl_del(0),
    acl_del(1),
    acl(rule()),
    acl(rule()),
    acl(rule()),
    acl_dump(),
    Step("acl_stats_intf_counters_enable", {"enable": True}),
    Step("acl_stats_intf_counters_enable", {"enable": True}),
    Step("acl_stats_intf_counters_enable", {"enable": False}),
    # ACLs of interfaces
    lists_on("lan", 0, 1, inputs=1),
    lists_of("lan"),
    acl_del(0),
    acl_del(1),
    lists_on(999, 0, inputs=1),
    lists_on("lan", 0, 99, inputs=1),
    lists_of("lan"),
    lists_on("lan", 0, 0, inputs=2),
    lists_of("lan"),
    lists_on("lan", 0, 3, 3, inputs=1),
    lists_of("lan"),
    lists_on("lan", 3, 3, 0, inputs=2),
    lists_of("lan"),
    lists_on("lan", 1, 1, inputs=1),
    lists_on("dmz", 1, inputs=9),
    lists_of(),
    lists_of(999),
    acl(rule(permit=0), index=1),
    lists_on("dmz", inputs=5),
    lists_of(),
    # policies
    table(5),
    table(7),
    policy(1, 0),
    policy(1, 0, drop(), is_add=False),
    policy(1, 0, deag(66)),
    policy(1, 0, deag(66), is_add=False),
    policy(1, 0, into(999)),
    policy(1, 0, deag(5)),
    policy(1, 2, deag(7)),
    policy(1, 0, deag(7)),
    policy(1, 0, into("t", weight=7)),
    policy(1, 0, drop(), drop(True)),
    policy(1, 0, into("lan")),
    policy(1, 0, into("lan", nh={"address": {"ip6": bytes([10, 0, 0, 9]).ljust(16, b"\0")}})),
    POLICIES,
    policy(1, 2, into("dmz"), is_add=False),
    policy(1, 2, into("t"), into("lan"), drop(True), is_add=False),
    POLICIES,
    policy(3, 99, drop()),
    policy(2, 3, deag(0, True)),
    policy(4, 3, drop()),
    policy(3, 0, drop(), is_add=False),
    policy(3, 0, drop(), is_add=False),
    policy(5, 3, deag(0)),
    policy(6, 3, deag(0)),
    policy(5, 3, deag(0)),  # harmless, since another policy has this path too
    POLICIES,
    # attachments
    attach(1, "dmz"),
    attach(1, "dmz"),
    attach(1, "dmz", 3, ip6=True),
    attach(2, "dmz", 3, ip6=True),
    attach(1, "t", 0x80000001),
    ATTACHMENTS,
    attach(1, "t", is_add=False),
    attach(1, "t", is_add=False),
    attach(99, "t", is_add=False),
    attach(4, "t"),
    attach(5, 998, 0),
    ATTACHMENTS,
    acl_del(0),
    acl_del(3),
    acl(rule(permit=0), rule(), index=0, tag="changed"),
    attach(5, 998, is_add=False),
    attach(2, "dmz", ip6=True, is_add=False),
    attach(4, "t", is_add=False),
    acl_del(3),
    # ACLs that are attached twice, or do not exist, are ignored without an error
    attach(5, "t"),
    attach(6, "t", 20),
    attach(1, "t", 5),
    acl(rule()),
    acl_del(0),
    attach(6, "t", is_add=False),
    attach(5, "t", is_add=False),
    attach(1, "t", is_add=False),
    ATTACHMENTS,
    # a policy that is deleted while attached stays until it is detached
    attach(4, "t"),
    attach(4, "lan"),
    policy(4, 3, drop(), is_add=False),
    ATTACHMENTS,
    policy(4, 2, drop()),
    policy(4, 3, drop()),
    POLICIES,
    attach(4, "lan", is_add=False),
    POLICIES,
    attach(4, "t", is_add=False),
    POLICIES,
    ATTACHMENTS,
    policy(4, 3, drop()),
    # a table that a policy uses
    table(5, is_add=False),
    TABLES,
    via(5, "10.0.0.0/8", drop()),
    lookup("10.0.0.1/32", table=5),
    via(5, "10.0.0.0/8", is_add=False),
    policy(1, 0, deag(5), is_add=False),
    TABLES,
    # deleted interfaces: their ACLs are cleared; their attachments stay, and the next interface has them
    lists_on("t", 2, 0, inputs=1),
    attach(4, "t"),
    attach(5, "lan"),
    acl_del(2),
    on("ipsec_itf_delete", "t"),
    lists_of(),
    acl_del(2),
    ATTACHMENTS,
    itf(201, "t2"),
    attach(4, "t2"),
    lists_of("t2"),
    attach(4, "t2", is_add=False),
    lists_on("lan", inputs=0),
    on("delete_loopback", "lan"),
    ATTACHMENTS,
    attach(5, "lan", is_add=False),
    ATTACHMENTS,
    policy(7, 0, into("t2")),
    on("ipsec_itf_delete", "t2"),
    policy(7, 0, into("t2"), is_add=False),
    POLICIES,
    itf(202, "t3"),
    policy(7, 0, into("t3"), is_add=False),
    POLICIES,
    # routes with several paths
    itf(203, "t4"),
    itf(204, "t5"),
    via(0, "10.50.0.0/16", into("t5", weight=3), into("t4"), source=Index("tables")),
    via(0, "10.51.0.1/32", into("t4", weight=200), into("t5", weight=255), source=Index("tables")),
    via(0, "10.52.0.0/16", drop(weight=2), into("t4"), source=Index("tables")),
    via(0, "fd50::/64", into("t4", True), into("t5", True, weight=0), source=Index("tables")),
    via(0, "fd50::1/128", into("t4", True), into("t5", True), source=Index("tables")),
    routes_of("tables"),
    routes_of("tables", is_ip6=True),
    lookup("10.50.0.1/32"),
    via(0, "10.50.0.0/16", into("t5"), source=Index("tables")),
    via(0, "10.51.0.1/32", drop(), is_add=False, source=Index("tables")),
    via(0, "10.52.0.0/16", into("t4"), into(999), source=Index("tables")),
    routes_of("tables"),
)

POLICY = (policy(1, 0, drop()),)
ATTACHED = (loopback("lan"), acl(rule()), *POLICY, attach(1, "lan"))
DELETED = (*ATTACHED, policy(1, 0, drop(), is_add=False))
DEADLY: tuple[tuple[str, Sequence[Step]], ...] = (
    ("policy 5 does not exist", (loopback("lan"), attach(5, "lan"))),
    ("vector of that many", (*POLICY, attach(1, NO_INDEX))),
    ("policy 1 was deleted while it was attached: VPP", (*DELETED, loopback("dmz"), attach(1, "dmz"))),
    ("deleted while it was attached", (*DELETED, POLICIES)),
    ("deleted before", (*DELETED, policy(1, 0, drop(), is_add=False))),
    (
        "deleted twice",
        (
            *DELETED,
            *POLICY,
            policy(1, 0, drop(), is_add=False),
            policy(2, 0, drop()),
            attach(2, "lan"),
            attach(2, "lan", is_add=False),
            attach(1, "lan", is_add=False),
        ),
    ),
    ("has the path already", (*POLICY, *POLICY, policy(1, 0, deag(0)))),
    ("has the path already", (*POLICY, *POLICY, policy(1, 0, drop(), is_add=False))),
    ("in the other family", (*ATTACHED, attach(1, "lan", ip6=True, is_add=False))),
    (
        "which is deleted",
        (loopback("lan"), policy(1, 0, into("lan")), on("delete_loopback", "lan"), policy(1, 0, drop())),
    ),
    (
        "which is deleted",
        (
            loopback("lan"),
            policy(1, 0, into("lan"), drop()),
            on("delete_loopback", "lan"),
            policy(1, 0, drop(), is_add=False),
        ),
    ),
)
"""What crashes VPP 26.06: a part of the stand-in's message, and the requests.

The last request at the latest is deadly.
"""
