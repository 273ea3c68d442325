"""What the plan of steering sends, sent to VPP, stand-in and real: it takes every request, and nothing stays in the end."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings

from support.layers_vpp import DMZ, LAN, Bench, Delta, SmallVpp, stories
from support.policy_sets import A, B, C
from support.rig import KINDS, Rig, play
from support.spd import Packet
from vppipsec.sync.desired.policy_layers import Action, FamilySteering, Target
from vppipsec.vpp.api.abf import AbfAttach, AbfPolicyAddDel
from vppipsec.vpp.api.acl import AclAddReplace, AclDel
from vppipsec.vpp.api.client import VppClient, connect
from vppipsec.vpp.api.ip import RouteAddDel
from vppipsec.vpp.api.ipsec import IpsecItfCreate
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.ownership import TABLE_NUMBERS
from vppipsec.vpp.types import NO_INDEX

Log = Sequence[tuple[Request, int] | Delta | SmallVpp]


def logs() -> list[tuple[bool, Log]]:
    """Return what VPP is told in some stories, and in between what it holds then."""
    found: list[tuple[bool, Log]] = []

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(stories())
    def run(story: tuple[bool, list[FamilySteering], list[Packet], int]) -> None:
        ip6, states, _, seed = story
        bench = Bench(ip6, (LAN, DMZ))
        bench.chance, bench.haste = random.Random(seed), 0.5
        log: list[tuple[Request, int] | Delta | SmallVpp] = []
        for state in [*states, FamilySteering()]:
            bench.log = []
            bench.steer(state)
            bench.converge()
            log += bench.log
            actual = replace(bench.vpp, acls=dict(bench.vpp.acls), attached=dict(bench.vpp.attached))
            log.append(actual)
        found.append((ip6, log))

    run()
    return found


class Sender:
    """Sends what was logged, with VPP's own numbers in place of the small VPP's."""

    def __init__(self, client: VppClient, source: int, interfaces: Mapping[int | Target | None, int]) -> None:
        self._client = client
        self._source = source
        self._interfaces = interfaces
        self._acls: dict[int, int] = {}

    async def send(self, request: Request, extra: int) -> None:
        """Send a request, which VPP shall take; `extra` is what the small VPP answered."""
        if isinstance(request, AclAddReplace | AclDel | AbfPolicyAddDel) and request.acl_index != NO_INDEX:
            request = replace(request, acl_index=self._acls[request.acl_index])
        elif isinstance(request, AbfAttach):
            request = replace(request, sw_if_index=self._interfaces[request.sw_if_index])
        (reply,) = await self._client.run([request])
        assert reply.retval == 0, request
        if isinstance(request, AclAddReplace):
            self._acls[extra] = reply.value

    async def route(self, delta: Delta) -> None:
        """Change a route."""
        change = RouteAddDel(
            self._interfaces[delta.target], delta.prefix, self._source, delta.target is not None, delta.table
        )
        (reply,) = await self._client.run([change])
        assert reply.retval == 0, change

    async def assert_holds(self, small: SmallVpp) -> None:
        """Hold VPP against the small VPP."""
        acls = await self._client.dump("acl_dump", {"acl_index": NO_INDEX})
        assert {it.acl_index: (it.tag, it.count) for it in acls} == {
            self._acls[number]: (tag, len(rules)) for number, (tag, rules) in small.acls.items()
        }
        attached = await self._client.dump("abf_itf_attach_dump")
        assert {(it.attach.policy_id, it.attach.sw_if_index): it.attach.priority for it in attached} == {
            (number, self._interfaces[index]): priority for (number, index), (priority, _) in small.attached.items()
        }
        policies = await self._client.dump("abf_policy_dump")
        tables = [it.table.table_id for it in await self._client.dump("ip_table_dump")]
        numbers = sorted(it.policy.policy_id for it in policies)
        assert numbers == sorted(number for number in tables if number in TABLE_NUMBERS)
        assert len(numbers) == len(small.acls)


async def interface(client: VppClient, name: str, arguments: Mapping[str, Any]) -> int:
    return int((await client.call(name, arguments)).sw_if_index)


@pytest.mark.parametrize("kind", KINDS)
def test_vpp_takes_every_request_and_nothing_stays(kind: str) -> None:
    told = logs()

    async def story(rig: Rig) -> None:
        client = await connect(rig.api_socket, "steering", also=("create_loopback_instance", "fib_source_add"))
        rig.admins.append(client)
        here: dict[int | Target | None, int] = {None: NO_INDEX, Action.DISCARD: NO_INDEX}
        for number in (LAN, DMZ):
            loopback = {"mac_address": f"de:ad:00:00:01:{number:02x}", "is_specified": False}
            here[number] = await interface(client, "create_loopback_instance", loopback)
        for number, target in enumerate((A, B, C, A._replace(reqid=4))):
            (made,) = await client.run([IpsecItfCreate(300 + number)])
            here[target] = made.value
        source = (await client.call("fib_source_add", {"src": {"priority": 0x0F, "name": "steering"}})).id
        for _, log in told:
            sender = Sender(client, source, here)
            for entry in log:
                match entry:
                    case SmallVpp():
                        await sender.assert_holds(entry)
                    case Delta():
                        await sender.route(entry)
                    case request, extra:
                        await sender.send(request, extra)
        assert rig.standin is None or rig.standin.world.leaks == []

    assert sum(map(len, (log for _, log in told))) > 1000
    play(kind, story)
