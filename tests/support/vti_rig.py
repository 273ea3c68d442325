"""VTIs next to a VPP: short forms of the kernel's tables and of VPP's answers."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from support.build import make_policy, sa_in, sa_out
from support.fake_routes import FakeRoutes
from support.recorded import PATIENCE_S
from support.rig import Rig, rig
from vppipsec.kernel.xfrm.values import Policy, PolicyDir, Sa
from vppipsec.status.tunnels import policy_rows
from vppipsec.vpp.ownership import FIB_SOURCE
from vppstandin.server import Fault

EVERYTHING, EVERYTHING6 = "0.0.0.0/0", "::/0"

READING = {
    "lcp_itf_pair_get",
    "sockclnt_create",
    "sockclnt_delete",
    "control_ping",
    "show_version",
    "get_api_json",
    "api_versions",
    "want_interface_events",
    "acl_stats_intf_counters_enable",
    "ip_route_lookup_v2",
}


def tunnel(number: int, if_id: int, *remotes: str, src: str = EVERYTHING, **changes: Any) -> list[Sa | Policy]:
    """Return the SAs and policies of a child of a VTI; `number` is its reqid."""
    policies: list[Sa | Policy] = []
    for remote in remotes:
        near = EVERYTHING6 if ":" in remote and src == EVERYTHING else src
        selectors = {PolicyDir.OUT: (near, remote), PolicyDir.IN: (remote, near), PolicyDir.FWD: (remote, near)}
        policies += [make_policy(way, *ends, number, if_id=if_id, **changes) for way, ends in selectors.items()]
    return [sa_in(0xC0 + number, number, if_id=if_id), sa_out(0xD0 + number, number, if_id=if_id), *policies]


async def paths_of_route(made: Rig) -> dict[str, str]:
    """Return the service's routes in VPP.

    The form: `prefix` or `prefix table N` -> reqids of the tunnels, with weights, or `drop`.
    """
    admin = await made.admin()
    (source,) = [it.src.id for it in await admin.dump("fib_source_dump") if it.src.name == FIB_SOURCE]
    found = {}
    for table in [it.table for it in await admin.dump("ip_table_dump")]:
        if table.table_id >= 0x49500000:
            continue
        which = {"table_id": table.table_id, "is_ip6": table.is_ip6, "name": ""}
        routes = [it.route for it in await admin.dump("ip_route_v2_dump", {"src": source, "table": which})]
        names = {
            state.actual.sw_if_index: str(key.reqid)
            for key, state in made.engine.tunnels.items()
            if state.actual.sw_if_index is not None
        }
        for route in routes:
            where = str(route.prefix) if isinstance(route.prefix, str) else shown(route.prefix)
            taken = [path for path in route.paths if not path.preference]
            next_hops = [paths_in_vpp(made, path, names) + f"*{path.weight}" * (len(taken) > 1) for path in taken]
            found[where + (f" table {table.table_id}" if table.table_id else "")] = " ".join(next_hops)
    return found


def paths_in_vpp(made: Rig, path: Any, names: Mapping[int, str]) -> str:
    """Return the end of a path; for a VTI classifier the VTI's if_id."""
    if int(path.type) == 9:
        return f"vti {made.engine.vpp.classifiers.if_ids[path.sw_if_index]}"
    return "drop" if int(path.type) == 2 else names[path.sw_if_index]


async def classified_vtis(made: Rig) -> dict[str, list[str]]:
    """Return the targets of classifiers' rules in VPP: `prefix behind vti N` -> reqids, layer by layer."""
    names = {
        state.actual.sw_if_index: str(key.reqid)
        for key, state in made.engine.tunnels.items()
        if state.actual.sw_if_index is not None
    }
    admin = await made.admin()
    found: dict[str, list[str]] = {}
    policies = {it.policy.policy_id: it.policy for it in await admin.dump("abf_policy_dump")}
    attached = sorted((it.attach.priority, it.attach) for it in await admin.dump("abf_itf_attach_dump"))
    for _, attach in attached:
        if_id = made.engine.vpp.classifiers.if_ids.get(attach.sw_if_index)
        table = policies[attach.policy_id].paths[0].table_id
        (rules,) = [it.r for it in await admin.dump("acl_dump", {"acl_index": policies[attach.policy_id].acl_index})]
        which = {"table_id": table, "is_ip6": attach.is_ipv6, "name": ""}
        routes = [it.route for it in await admin.dump("ip_route_v2_dump", {"src": 0, "table": which})]
        targets = {
            shown(route.prefix): paths_in_vpp(made, route.paths[0], names) for route in routes if route.src >= 23
        }
        for rule in rules if if_id is not None else ():
            where = shown(rule.dst_prefix)
            found.setdefault(f"{where} behind vti {if_id}", []).append(targets.get(where, "drop"))
    return found


async def until_paths(made: Rig, expected: dict[str, str]) -> None:
    """Wait until the service's routes are as expected."""
    async with asyncio.timeout(PATIENCE_S):
        while await paths_of_route(made) != expected:  # noqa: ASYNC110  # VPP has no event for it
            await asyncio.sleep(0.02)


def shown(prefix: Any) -> str:
    address = bytes(prefix.address.un.ip4 if int(prefix.address.af) == 0 else prefix.address.un.ip6)
    return f"{ipaddress.ip_address(address)}/{prefix.len}"


def said(made: Rig) -> dict[str, tuple[str, str, str]]:
    """Return the status of each outbound policy: steering, route and reason, by selector."""
    return {
        row["selector"]: (row["steering"], row["route"], row["reason"])
        for row in policy_rows(made.engine)
        if row["direction"] == "out"
    }


def play_with_routes(
    kind: str, story: Callable[[Rig, FakeRoutes], Awaitable[None]], fault: Fault | None = None
) -> None:
    """Run a test in a rig whose kernel has routes."""

    async def run() -> None:
        routes = FakeRoutes()
        async with asyncio.timeout(PATIENCE_S), rig(kind, fault, routes=routes) as made:
            await story(made, routes)

    asyncio.run(run())


async def begun(made: Rig, *items: Sequence[Sa | Policy]) -> None:
    for each in items:
        made.kernel.add(*each)
    made.start()
    await made.settle()
